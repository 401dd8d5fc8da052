"""`vlmcap plan -m`: combinations are Hydra's, a tiny sweep is added up, and what is not possible is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from vlmcap.cli import main
from vlmcap.compose import compose, register_schemas
from vlmcap.config_files import config_dir
from vlmcap.errors import UserError
from vlmcap.planning.sweep_budget import make_sweep_plan as module
from vlmcap.planning.sweep_budget.budget import NumClips
from vlmcap.planning.sweep_budget.make_sweep_plan import num_clips, plan_sweep
from vlmcap.planning.sweep_budget.sweep_plan import show_budget
from vlmcap.sweep_syntax import expand, short_names

pytestmark = pytest.mark.usefixtures("store")

TINY = ["data.num_frames=8", "data.max_clips=1000"]  # data.demo on a CPU


def hydras_jobs(overrides: list[str]) -> list[list[str]]:
    """The jobs of `train.py -m`."""
    register_schemas()
    with initialize_config_dir(config_dir(), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        [jobs] = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)
    return jobs


SYNTAX = {
    "lists": (["encoder=clip,siglip2", "llm=qwen3_4b,qwen3_8b", "hardware=l4"], 4),
    "single": (["llm=tiny"], 1),
    "choice": (["optim=choice(adamw,adamw_8bit)", "seed=choice(1,2,3)"], 6),
    "range": (["seed=range(3)", "data.batch_size=range(2,9,step=3)"], 9),
    "floats": (["tuning.adapter_lr=1e-4,0.0002", "tuning.lora.dropout=range(0,0.3,0.1)"], 6),
    "sorted": (["seed=sort(3,1,2)", "data.num_frames=sort(range(2,8,2),reverse=true)"], 9),
    "glob": (["optim=glob([adamw*],exclude=[*schema])", "seed=0"], 3),
    "lists of lists": (["+x=[1,2],[3]", "seed=1"], 2),
    "quotes": (["llm.prompt='가, 나','다'", "seed=0"], 2),
    "escapes": ([r"llm.prompt=a\,b,c"], 2),
    "repeated": (["seed=1,2", "llm=tiny", "seed=3"], 1),
    "null and removal": (["data.max_clips=null,100", "~logger", "++seed=1,2"], 4),
}


@pytest.mark.parametrize(("overrides", "count"), SYNTAX.values(), ids=SYNTAX)
def test_combinations_are_those_of_hydra(overrides: list[str], count: int) -> None:
    found, swept = expand(overrides)
    assert [list(job) for job in found] == hydras_jobs(overrides)
    assert len(found) == count
    assert bool(swept) == (count > 1)


def test_shuffled_values_are_all_there() -> None:
    found, _ = expand(["seed=shuffle(range(20))"])
    assert sorted(found) == sorted((f"seed={seed}",) for seed in range(20))


def test_names_are_components_and_other_keys_with_their_values() -> None:
    jobs, swept = expand(["encoder=clip,siglip2", "hardware=l4", "data.num_frames=4,8"])
    assert short_names(jobs, swept)[:2] == ["clip data.num_frames=4", "clip data.num_frames=8"]


@pytest.mark.slow
def test_a_tiny_sweep_is_added_up() -> None:
    plan = plan_sweep(["tuning=two_stage,projector_only", "seed=0,1", *TINY], price=2.0)
    assert [job.name for job in plan.jobs] == [
        "two_stage seed=0",
        "two_stage seed=1",
        "projector_only seed=0",
        "projector_only seed=1",
    ]
    assert all(job.fits for job in plan.jobs)
    assert plan.jobs[0].overrides == ("tuning=two_stage", "seed=0", *TINY)
    assert plan.jobs[0].num_trained == 4 * 1000
    assert plan.jobs[0].num_in_loop == 0
    [encoding] = plan.encodings  # encoder=tiny keeps features, and all four read the same
    assert (encoding.encoder, encoding.num_clips, encoding.num_readers) == ("tiny", 1300, 4)
    hours = sum(job.training_s + job.evaluation_s for job in plan.jobs) / 3600 + encoding.seconds / 3600
    assert plan.total_h == pytest.approx(hours)
    assert plan.plain()["price"] == round(2 * hours, 2)
    assert plan.is_within
    assert plan.is_possible


def test_stored_features_take_the_encoder_out_of_training_and_evaluation() -> None:
    stored, encoded = plan_sweep(["cache.enabled=true,false", *TINY]).jobs
    assert (stored.store is None, encoded.store is None) == (False, True)
    assert encoded.seconds.train - stored.seconds.train == pytest.approx(stored.seconds.encode, rel=0.02)
    assert encoded.evaluation_s > stored.evaluation_s


@pytest.mark.slow
def test_other_frames_are_other_features() -> None:
    plan = plan_sweep(["data.num_frames=8,16", *TINY[1:]])
    assert [encoding.num_readers for encoding in plan.encodings] == [1, 1]


@pytest.mark.slow
def test_proposals_bring_it_under_the_budget_and_are_true() -> None:
    """The hours of the last proposal are those of a plan with all proposals."""
    overrides = ["seed=0,1", "cache.enabled=false", *TINY]
    whole = plan_sweep(overrides).total_h
    plan = plan_sweep([*overrides, f"sweep.budget_h={0.6 * whole}"])
    assert (plan.is_within, plan.is_possible) == (False, True)
    names = [proposal.override for proposal in plan.proposals]
    assert names[0] == "cache.enabled=true"
    assert len(names) > 1
    assert not any(name.startswith("data.num_frames") for name in names)  # projector.frame_stack=8 refuses four frames
    again = plan_sweep([*overrides, *names])
    assert again.total_h == pytest.approx(plan.proposed_h)
    assert again.total_h <= 0.6 * whole


@pytest.mark.slow
def test_a_swept_key_is_not_proposed() -> None:
    plan = plan_sweep(["cache.enabled=true,false", "sweep.budget_h=0.000001", *TINY])
    assert not any(proposal.override.startswith("cache.enabled") for proposal in plan.proposals)
    assert not plan.is_possible


def test_a_step_limit_counts_batches_and_their_accumulation() -> None:
    [job] = plan_sweep(["trainer.max_steps=5", "trainer.accumulate_grad_batches=3", "data.batch_size=4", *TINY]).jobs
    assert job.num_trained == 60


def test_clips_are_counted_by_the_data_set() -> None:
    def count(*overrides: str) -> NumClips:
        return num_clips(compose(["data.root=unset", *overrides]))

    assert count("data=aihub") == NumClips(8000, 1000, 1000)
    assert count("data=aihub", "data.max_clips=300") == NumClips(300, 1000, 1000)
    assert count() == NumClips(2000, 100, 200)
    assert count("data.max_clips=300") == NumClips(300, 100, 200)
    assert count("data.max_clips=9000") == NumClips(2000, 100, 200)


def test_impossible_combinations_are_named_and_the_others_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan = module.make_plan

    def refuse(config: Any, **_: Any) -> Any:
        if config.seed == 1:
            raise UserError("the widths differ")
        return make_plan(config)

    monkeypatch.setattr(module, "make_plan", refuse)
    plan = plan_sweep(["seed=0,1", *TINY])
    assert [job.fits for job in plan.jobs] == [True, False]
    show_budget(plan)
    assert "Left out: seed=1: the widths differ" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^the widths differ$"):
        plan_sweep(["seed=1", *TINY])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.num_frame=4,8"],
            r"data\.num_frame=4: there is no key 'data\.num_frame'; did you mean data\.num_frames",
        ),
        (
            ["encoder=clip,siglp2", "hardware=l4"],
            r"siglp2: encoder=siglp2 does not exist; choose one of ",
        ),
        (
            ["hardware=cpu,l4"],
            r"hardware=cpu,l4 would add up CPU hours and GPU hours; plan hardware=cpu separately",
        ),
        (["sweep.budget_h=10,20"], r"sweep\.budget_h applies to all combinations together and cannot be swept"),
        (["seed=interval(0,1)"], r"seed=interval\(0,1\) has no values to try one by one; give a list"),
        (["seed=range(3,1)"], r"seed has no values to try"),
        (["seed=(1,2"], r"seed has a wrong value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        plan_sweep(overrides)
    assert "\n" not in str(caught.value)


def test_a_price_is_for_one_gpu() -> None:
    with pytest.raises(UserError, match=r"--price is for one GPU, but the sweep has hardware=a100,l4"):
        plan_sweep(["hardware=l4,a100"], price=1.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--price", "1"], "add -m"), (["-m", "--all"], "remove -m"), (["-m", "--price", "-1"], "--price must be")],
    ids=" ".join,
)
def test_flags_that_do_not_go_together(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_the_table_keeps_to_80_columns_and_ends_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "plan",
            "-m",
            "seed=0,1",
            "llm.prompt='아주 긴 지시문입니다 아주 긴 지시문입니다 아주 긴 지시문','짧다'",
            *TINY,
            "--price",
            "0.8",
        ]
    )
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["combination", "GiB", "fits", "training", "h", "evaluation", "h", "total", "h"]
    assert lines[-1].startswith("4 of 4 combinations: ")
    assert lines[-1].endswith("at 0.8 per hour.")


def test_json_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "-m", "seed=0,1", "cache.enabled=false", *TINY, "--json"]
    main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert len(found["combinations"]) == 2
    assert {
        "training_h",
        "evaluation_h",
        "encoding_h",
        "total_h",
        "budget_h",
        "proposals",
        "add",
        "notes",
    } <= found.keys()
    main([*arguments[:-1], "sweep.budget_h=0.5", "--json"])  # proposals suffice, or none are needed
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments[:-1], "sweep.budget_h=0.000001", "--json"])
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out)["is_possible"] is False


def test_a_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan_sweep(["seed=0,1", *TINY])
    assert capsys.readouterr().err == ""
    written: list[str] = []
    monkeypatch.setattr(
        "sys.stderr", SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None, encoding="utf-8")
    )
    plan_sweep(["seed=0,1", *TINY])
    assert "Planning" in "".join(written)
