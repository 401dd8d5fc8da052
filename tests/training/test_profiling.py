"""`callbacks=profile` times what is there, changes nothing, and leaves whole files or none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.config import Config
from vlmcap.training.module import CaptioningModule
from vlmcap.training.objects import Run
from vlmcap.training.profiling.callback import StepProfile
from vlmcap.training.profiling.report import AROUND_LABELS, LABELS
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]
PROFILE = (
    "callbacks.profile.enabled=true",
    "callbacks.profile.first_step=2",
    "callbacks.profile.num_steps=3",
    "callbacks.profile.trace_steps=1",
)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def profiled(tiny_config: MakeConfig, straight_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run as `straight_run`, with a profile."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    train(
        tiny_config(
            folder, "tuning.lora.dropout=0.1", "evaluation.swap_videos=true", "evaluation.swap_shifts=2", *PROFILE
        )
    )
    return folder


def test_training_is_the_same_to_the_last_bit(profiled: Path, straight_run: Path) -> None:
    def figures(folder: Path) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in row.items() if "tokens_per_s" not in name}
            for row in metrics(folder)
            if not any(name.startswith("profile/") for name in row)
        ]

    assert figures(profiled) == figures(straight_run)
    weights = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (profiled, straight_run)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_parts_make_up_the_step(profiled: Path) -> None:
    times = read(profiled / "profile" / "steps.json")
    phases = times["phases"]
    assert (times["first_step"], times["num_steps"], times["clips"], times["device"]) == (2, 3, 6, "cpu")
    assert sum(phases.values()) == pytest.approx(times["step_s"], rel=0.02)
    assert all(
        phases[name] > 0 for name in ("decode", "projector", "language", "loss", "backward", "optimiser", "other")
    ), phases
    assert phases["wait"] >= 0
    assert "vision" not in phases, "features come from the store"
    assert times["is_cached"]
    assert phases["other"] < 0.5 * times["step_s"]
    assert sum(times["shares"].values()) == pytest.approx(1, rel=0.02)


def test_evaluation_is_spread_over_the_steps_from_one_to_the_next(profiled: Path) -> None:
    times = read(profiled / "profile" / "steps.json")
    assert times["evaluation"].keys() == AROUND_LABELS.keys()
    assert all(seconds > 0 for seconds in times["evaluation"].values())
    assert times["total_s"] == pytest.approx(times["step_s"] + sum(times["evaluation"].values()))
    assert times["plain_step_s"] > 0


def test_the_trace_is_whole_and_names_the_parts(profiled: Path) -> None:
    with gzip.open(profiled / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"vlmcap: step", "vlmcap: language", "vlmcap: backward", "vlmcap: optimiser", "vlmcap: wait"} <= set(names)
    assert names.count("vlmcap: step") == 1, "a step was asked for"
    assert names.count("vlmcap: language") == 2, "of two micro-batches"


def test_nothing_else_is_left(profiled: Path) -> None:
    files = {path.name for path in (profiled / "profile").iterdir()}
    assert files - {"steps.png"} == {"steps.json", "trace.json.gz"}


def test_the_loggers_get_the_figures(profiled: Path) -> None:
    rows = [row for row in metrics(profiled) if "profile/step_s" in row]
    times = read(profiled / "profile" / "steps.json")
    assert len(rows) == 1
    assert rows[0]["profile/language_s"] == times["phases"]["language"]
    assert rows[0]["profile/evaluation_captions_s"] == times["evaluation"]["captions"]


@pytest.mark.slow
def test_with_frames_and_workers_vision_is_timed_and_decoding_stands_beside(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(
        tiny_config(
            tmp_path, *PROFILE, "cache.enabled=false", "data.num_workers=1", "trainer.max_steps=5", "tuning.epochs=2"
        )
    )
    run.trainer.fit(run.module, datamodule=run.data)
    times = read(tmp_path / "profile" / "steps.json")
    assert times["phases"]["vision"] > 0
    assert "decode" not in times["phases"]
    assert times["worker_decode_s"] > 0
    assert not times["is_cached"]
    shown = capsys.readouterr().out
    assert "Means of steps 2 to 4, 6 clips each, on cpu." in shown
    assert "a worker decoded for" in shown
    for name in times["phases"]:
        assert LABELS[name] in shown


def test_on_a_card_only_the_timed_steps_wait_for_it(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tiny_config(tmp_path, *PROFILE))
    profile = next(callback for callback in run.trainer.callbacks if isinstance(callback, StepProfile))  # type: ignore[attr-defined]
    waits: list[str] = []
    monkeypatch.setattr(
        torch.cuda,
        "synchronize",
        lambda device: waits.append(f"{'val' if run.trainer.validating else 'train'} {device}"),
    )
    started = profile.on_train_start

    def start_on_a_card(*arguments: Any) -> None:
        started(*arguments)
        monkeypatch.setattr(profile.profiler, "device", torch.device("cuda", 0))

    monkeypatch.setattr(profile, "on_train_start", start_on_a_card)
    run.trainer.fit(run.module, datamodule=run.data)
    assert set(waits) == {"train cuda:0", "val cuda:0"}
    assert waits.count("val cuda:0") == 3, (
        "once before each evaluation, and once as the last timed step ends at the first"
    )
    # The timed steps end with the first epoch, its fourth; the trace, the fifth, and those after wait for nothing.
    assert waits.index("val cuda:0") == waits.count("train cuda:0") > 3 * 2 * 10
    assert read(tmp_path / "profile" / "steps.json")["phases"]["transfer"] > 0


def test_no_hook_stays(tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path) -> None:
    run = make_run(tiny_config(tmp_path, *PROFILE))
    run.trainer.fit(run.module, datamodule=run.data)
    left = [name for name, module in run.module.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert left == []


@pytest.mark.parametrize(("broken", "is_traced"), [(3, False), (5, False), (7, True)], ids=["timed", "traced", "after"])
def test_ctrl_c_leaves_no_half_file(
    tiny_config: MakeConfig,
    make_run: Callable[[Config], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: int,
    is_traced: bool,
) -> None:
    import signal

    step = CaptioningModule.training_step

    def interrupt(self: CaptioningModule, *arguments: Any) -> Any:
        if self.global_step == broken - 1:
            raise KeyboardInterrupt
        return step(self, *arguments)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(CaptioningModule, "training_step", interrupt)
    run = make_run(tiny_config(tmp_path, *PROFILE))
    try:
        with pytest.raises(SystemExit):
            run.trainer.fit(run.module, datamodule=run.data)
    finally:
        signal.signal(signal.SIGINT, handler)
    folder = tmp_path / "profile"
    assert [path.name for path in folder.iterdir()] == ["trace.json.gz"] if is_traced else not folder.exists()
    left = [name for name, module in run.module.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert left == []
    with torch.profiler.profile():  # the earlier one has ended, or this would be refused
        torch.ones(2).sum()


def test_a_run_that_ends_too_soon_says_so(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tiny_config(tmp_path, "callbacks.profile.enabled=true", "trainer.max_steps=2"))
    run.trainer.fit(run.module, datamodule=run.data)
    assert "the run ended before step 5 did" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_inside_tells_what_it_has(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(
        tiny_config(tmp_path, "callbacks.profile.enabled=true", "callbacks.profile.first_step=2", "trainer.max_steps=3")
    )
    run.trainer.fit(run.module, datamodule=run.data)
    assert read(tmp_path / "profile" / "steps.json")["num_steps"] == 2
    assert "No profile/trace.json.gz" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumed_inside_the_timed_steps_writes_anew(
    tiny_config: MakeConfig, straight_run: Path, tmp_path: Path
) -> None:
    overrides = ("tuning.lora.dropout=0.1", *PROFILE)
    train(tiny_config(tmp_path, *overrides, "trainer.max_steps=3"))
    folder = tmp_path / "profile"
    assert read(folder / "steps.json")["num_steps"] == 2
    assert not (folder / "trace.json.gz").exists()
    train(tiny_config(tmp_path, *overrides, "checkpoint=last"))
    times = read(folder / "steps.json")
    assert (times["first_step"], times["num_steps"], times["trace"]) == (2, 3, "trace.json.gz")
    assert {path.name for path in folder.iterdir()} - {"steps.png"} == {"steps.json", "trace.json.gz"}
    weights = [
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for path in (tmp_path, straight_run)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_without_it_nothing_is_there(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path
) -> None:
    run = make_run(tiny_config(tmp_path))
    assert not [callback for callback in run.trainer.callbacks if isinstance(callback, StepProfile)]  # type: ignore[attr-defined]
