"""`vlmcap doctor --measure`: real steps on random weights of true shapes, beside their plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.thinned import thinned
from vlmcap.cli import main
from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.measuring import measure as measure_module
from vlmcap.measuring.measure import Comparison, measure
from vlmcap.measuring.memory_use import PeakMemory
from vlmcap.measuring.random_components import fill_random, quantize_meta, with_blocks
from vlmcap.measuring.steps import Measurement
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.experts import fused_experts
from vlmcap.planning.captioning import TokenWork, token_seconds
from vlmcap.planning.estimate.stages import weight_bytes
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.plan import Change

TINY = ["hardware=cpu", "data.batch_size=4", "data.eval_batch_size=4", "llm.max_new_tokens=8"]
CHANGE = Change(("data.batch_size=1",), "no quality", 0.1)


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Memory profiles, shared as most tests plan the same components."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, profiles: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "plans").symlink_to(profiles)
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path))
    return tmp_path


def kept(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and "plans" not in file.parts]


@pytest.mark.parametrize(
    "overrides",
    thinned(
        [
            [],
            ["cache.enabled=false"],
            ["optim=adamw_8bit", "trainer.accumulate_grad_batches=4"],
            ["data.batch_size=3", "data.eval_batch_size=2"],
        ],
        lambda overrides: "optim=adamw_8bit" in overrides,
    ),
)
def test_tiny_components_are_measured_beside_their_plan(overrides: list[str]) -> None:
    comparison = measure([*TINY, *overrides])
    result = comparison.plain()
    assert result["training"]["measured_gib"] > 0
    assert result["seconds_per_clip"]["measured"] > 0
    assert result["seconds_per_token"]["measured"] > 0
    assert result["caption_tokens"] == 8
    assert comparison.why_not_kept == "the model is too small to be representative of others"


@pytest.mark.slow
def test_the_page_ends_with_how_far_off_the_plan_is(capsys: pytest.CaptureFixture[str], cache_dir: Path) -> None:
    main(["doctor", "--measure", "--blocks", "1", *TINY])
    shown = capsys.readouterr()
    assert shown.out.strip().splitlines()[-1].startswith("The plan's memory is ")
    assert "only 1 block of each component ran" in shown.out
    assert "training step 4 of 4" in shown.err
    assert kept(cache_dir) == []


def test_a_complete_measurement_is_stored_and_used_by_the_plan(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_module, "is_too_small", lambda _: False)
    comparison = measure(TINY)
    assert comparison.why_not_kept == ""
    assert [file.parent.name for file in kept(cache_dir)] == ["calibration"]
    config = compose(["data.root=unset", *TINY])
    short = dataclasses.replace(config, llm=dataclasses.replace(config.llm, max_new_tokens=8))
    plan = make_plan(short)
    assert plan.device.calibrated.startswith(comparison.device_name)
    assert plan.training_gib == pytest.approx(comparison.training_gib, rel=1e-6)
    assert plan.token_s == pytest.approx(comparison.measured.token_s)
    assert plan.clip_s == pytest.approx(comparison.measured.clip_s)
    main(["plan", *TINY])
    assert f"calibrated on {comparison.device_name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("token_bytes", [1e3, 1e12], ids=["launches", "memory"])
@pytest.mark.parametrize("ratio", [0.5, 3.0])
@pytest.mark.parametrize("is_captured", [False, True])
def test_the_calibrated_plan_of_a_token_is_what_was_measured(
    token_bytes: float, ratio: float, is_captured: bool
) -> None:
    config = compose(["data.root=unset", *TINY])
    plan = make_plan(config)
    work = TokenWork(token_bytes, plan.token_launches, is_captured)
    token_s = token_seconds(work, plan.device)
    plan = dataclasses.replace(plan, token_bytes=token_bytes, token_s=token_s, is_captured=is_captured)
    use = PeakMemory(plan.training_gib, plan.training_gib)
    measured = Measurement(use, use, 0.0, plan.clip_s, ratio * token_s, 8)
    gpu = Comparison(plan, measured, "GPU", 8.0, None).calibration().on(plan.device)
    assert token_seconds(work, gpu) == pytest.approx(ratio * token_s)


def test_4_bit_weights_are_those_of_the_plan() -> None:
    """A mixture of experts has packed layers, packed experts and weights that are not packed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlmcap.planning.estimate.fake_tensors import quantize_fake

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    sizes |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 300,
    }
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    with torch.device("meta"):
        llm, fake = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for _ in range(2))
    quantize_meta(llm, "4bit", torch.bfloat16)
    fill_random(llm.requires_grad_(False).eval(), "cpu", torch.bfloat16)
    quantize_fake(fake.requires_grad_(False), "4bit", torch.bfloat16)
    assert all(experts.is_packed for experts in fused_experts(llm))
    assert not any(tensor.is_meta for tensor in [*llm.parameters(), *llm.buffers()])
    assert weight_bytes(llm)["frozen weights"] == weight_bytes(fake)["frozen weights"]
    logits = llm(input_ids=torch.randint(0, 300, (1, 7))).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_tables_are_those_of_the_class(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=90,
    )
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    fill_random(llm, "cpu")
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    assert expected
    for name, buffer in llm.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in llm.named_parameters() if "norm" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    thinned(
        [["encoder=siglip2", "llm=qwen3_8b"], ["model=qwen3_vl_8b"], ["model=llava_next_video_7b"]],
        lambda parts: len(parts) == 2,
    ),
)
def test_a_truncated_configuration_is_planned_as_truncated(overrides: list[str], tmp_path: Path) -> None:
    config = compose(["data.root=unset", "hardware=l4", *overrides])
    whole, cut = make_plan(config), make_plan(with_blocks(config, 2, tmp_path / "cut"))
    assert cut.num_visual == whole.num_visual
    assert cut.weights_gib < 0.6 * whole.weights_gib


@pytest.mark.slow
@pytest.mark.parametrize("kind", thinned(["qwen2_5_vl", "qwen3_vl", "gemma3"], lambda kind: kind != "qwen2_5_vl"))
def test_pretrained_vlms_are_measured(
    kind: str, qwen_folders: dict[str, Path], frames_folder: Callable[[str], Path]
) -> None:
    """Small models of the same classes.

    They have positions in three dimensions, DeepStack, clips of different sizes, and masks of their own.
    """
    name = {"qwen2_5_vl": "qwen2_5_vl_7b", "qwen3_vl": "qwen3_vl_8b", "gemma3": "internvl3_1b"}[kind]
    folder = frames_folder(kind) if kind == "gemma3" else qwen_folders[kind]
    small = ["data.num_frames=2", "llm.max_caption_tokens=16", "llm.max_new_tokens=4"]
    small += [] if kind == "gemma3" else ["encoder.max_patches=16"]
    settings = ["data.batch_size=2", "data.eval_batch_size=2", "hardware=cpu", *small]
    comparison = measure([f"model={name}", f"model.checkpoint={folder}", *settings])
    assert comparison.measured.num_new == 4
    assert comparison.measured.clip_s > 0


def test_out_of_memory_is_one_sentence_with_the_plan_s_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_dir: Path
) -> None:
    def fail(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    make_plan(compose(["data.root=unset", *TINY]))  # planning runs the model too, and keeps its profiles
    monkeypatch.setattr(VideoCaptioner, "forward", fail)
    monkeypatch.setattr(measure_module, "with_changes", lambda plan, *_: dataclasses.replace(plan, changes=[CHANGE]))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--measure", *TINY])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "Error: tiny + pixel_shuffle_linear + tiny ran out of memory on hardware=cpu while training, planned at 0."
    )
    assert error.endswith("try data.batch_size=1, planned at 0.1 GiB")
    assert kept(cache_dir) == []


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(VideoCaptioner, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(TINY)


def test_ctrl_c_leaves_no_file(monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(measure_module.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(VideoCaptioner, "generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--measure", "--blocks", "1", *TINY])
    assert stop.value.code == 130
    assert kept(cache_dir) == []
    assert list(temporary.iterdir()) == []


def test_a_host_without_room_is_refused_before_anything_is_created(monkeypatch: pytest.MonkeyPatch) -> None:
    present = measure_module.detect_cpu()
    monkeypatch.setattr(measure_module, "detect_cpu", lambda: dataclasses.replace(present, free_gib=0.01))
    with pytest.raises(
        UserError, match=r"planned to need 0\.\d GiB and .* has 0\.0 free; measure a part of it with --blocks 1"
    ):
        measure(TINY)


@pytest.mark.gpu
def test_a_gpu_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "doctor",
            "--measure",
            "--json",
            "--blocks",
            "2",
            "encoder=clip",
            "llm=qwen3_4b",
            "hardware=l4",
            "data.eval_batch_size=1",
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert result["training"]["ratio"] == pytest.approx(1, abs=0.25)
    assert result["generation"]["ratio"] == pytest.approx(1, abs=0.25)
    assert 0 < result["context_gib"]["measured"] < 2
