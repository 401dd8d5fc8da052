"""Measurements on a device are stored atomically, read back, and used for that device only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vlmcap.cli import main
from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.planning import calibration
from vlmcap.planning.calibration import (
    Calibration,
    calibrated_device,
    calibration_folder,
    choose_calibration,
    read_calibrations,
    write_calibration,
)
from vlmcap.planning.captioning import TokenWork, token_seconds
from vlmcap.planning.hardware import DetectedDevice, device_info, matching_profile, planned_device, suitable_profile
from vlmcap.planning.make_plan import make_plan, training_seconds
from vlmcap.planning.peak_memory import Moment, is_known, scale_activations

L4 = Calibration(
    "NVIDIA L4", 22.0, "l4", "2026-11-28", "siglip2 + mlp + qwen3_8b", 1.2, 0.4, 0.5, 0.7, 24e-6, 3e-6, 90.0
)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "detect_gpu", lambda: None)
    return tmp_path


def configured(*overrides: str) -> Config:
    return compose(["data.root=unset", *overrides])


def test_it_is_read_back_and_replaces_the_last_of_its_device(tmp_path: Path) -> None:
    write_calibration(tmp_path / "new", L4)
    other = dataclasses.replace(L4, utilisation=0.3)
    file = write_calibration(tmp_path / "new", other)
    assert file.name == "NVIDIA-L4.json"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file.name], "nothing half written is left"
    assert read_calibrations(tmp_path / "new") == [other]


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"device_name": "x"}'])
def test_a_broken_file_is_none(tmp_path: Path, broken: str) -> None:
    (tmp_path / "x.json").write_text(broken)
    assert read_calibrations(tmp_path) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation_ratio", 0.0), ("utilisation", float("nan")), ("context_gib", -1.0), ("device_name", 3)],
)
def test_impossible_figures_are_none(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps(L4.plain() | {key: value}))
    assert read_calibrations(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_calibration(tmp_path, L4)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_calibration(tmp_path, dataclasses.replace(L4, utilisation=0.1))
    monkeypatch.undo()
    assert read_calibrations(tmp_path) == [L4]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("hardware", "here", "here_profile", "is_used"),
    [
        ("l4", None, None, True),  # planned elsewhere: the profile is of this very GPU
        ("l4", "NVIDIA L4", "l4", True),
        ("l4", "NVIDIA GeForce RTX 4090", "l4", False),  # the run will be on another GPU
        ("l4", "NVIDIA H100 80GB HBM3", "h100", True),  # the run will be elsewhere
        ("t4", "NVIDIA L4", "l4", False),  # measured with another profile
    ],
)
def test_only_plans_of_that_gpu_use_it(
    hardware: str, here: str | None, here_profile: str | None, is_used: bool
) -> None:
    assert (choose_calibration([L4], hardware, here, here_profile) == L4) == is_used


def test_one_of_a_gpu_without_a_profile_is_used_on_that_gpu_only() -> None:
    measured_here = dataclasses.replace(L4, device_name="NVIDIA GeForce RTX 4090", memory_gib=23.5)
    assert choose_calibration([L4, measured_here], "l4", measured_here.device_name, "l4") == measured_here
    assert choose_calibration([measured_here], "l4") is None


@pytest.mark.parametrize(
    ("name", "total_gib", "capability", "own", "suitable"),
    [
        ("Tesla T4", 14.6, (7, 5), "t4", "t4"),
        ("NVIDIA L4", 22.0, (8, 9), "l4", "l4"),
        ("NVIDIA L40S", 44.4, (8, 9), None, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, (8, 0), "a100", "a100"),
        ("NVIDIA A100-SXM4-80GB", 79.2, (8, 0), "a100_80", "a100_80"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.7, (8, 0), None, None),
        ("NVIDIA H100 80GB HBM3", 79.2, (9, 0), "h100", "h100"),
        ("NVIDIA GeForce RTX 4090", 23.5, (8, 9), None, "l4"),
        ("Tesla V100-SXM2-32GB", 31.7, (7, 0), None, "t4"),
        ("NVIDIA GeForce RTX 3050", 7.8, (8, 6), None, None),
    ],
)
def test_the_profile_of_a_gpu(
    name: str, total_gib: float, capability: tuple[int, int], own: str | None, suitable: str | None
) -> None:
    assert matching_profile(name, total_gib) == own
    assert suitable_profile(name, total_gib, capability) == suitable


def test_the_figures_change_what_they_should() -> None:
    plain, measured = device_info("l4", 24), L4.on(device_info("l4", 24))
    assert training_seconds(1e12, 0, measured, is_checkpointed=True) == pytest.approx(
        training_seconds(1e12, 0, plain, is_checkpointed=True) * 0.4 / 0.5
    )
    assert token_seconds(TokenWork(30e9, 100), measured) == pytest.approx(30e9 / (0.7 * 300e9))
    assert token_seconds(TokenWork(30e6, 10_000), measured) == pytest.approx(10_000 * 24e-6)
    assert token_seconds(TokenWork(30e6, 10_000, is_captured=True), measured) == pytest.approx(10_000 * 3e-6)
    moment = Moment(
        "a", {"encoder: frozen weights": 8.0, "optimiser state": 4.0, "gradients": 2.0, "fragmentation": 1.0}
    )
    assert scale_activations(moment, 1.5).sizes == {
        "encoder: frozen weights": 8.0,
        "optimiser state": 4.0,
        "gradients": 3.0,
        "fragmentation": 1.5,
    }


@pytest.mark.slow
def test_a_plan_uses_it_and_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "encoder=clip",
        "llm=qwen3_4b",
        "hardware=l4",
        "data.eval_batch_size=4",
        "evaluation.cuda_graphs=false",
    ]
    config = configured(*overrides)
    before = make_plan(config)
    write_calibration(calibration_folder(config), L4)
    after = make_plan(config)

    def beyond(parts: object) -> float:
        return sum(size for name, size in dict(parts).items() if not is_known(name))  # type: ignore[call-overload]

    assert beyond(after.training.sizes) == pytest.approx(1.2 * beyond(before.training.sizes))
    assert after.training_gib - 0.4 > before.training_gib - 0.6
    assert after.weights_gib == before.weights_gib
    assert before.token_s == pytest.approx(before.token_launches * 15e-6), "launches take longer than the weights"
    assert after.token_s == pytest.approx(before.token_s * 24 / 15)
    assert after.clip_s < before.clip_s
    main(["plan", *overrides])
    assert "calibrated on NVIDIA L4, 2026-11-28" in capsys.readouterr().out
    main(["plan", *overrides, "--json"])
    assert json.loads(capsys.readouterr().out)["calibrated"] == "NVIDIA L4, 2026-11-28"
    assert make_plan(config, planned_device(config)) == before
    assert make_plan(configured("encoder=clip", "llm=qwen3_4b", "hardware=a100")).device.calibrated == ""


def test_another_gpu_leaves_the_plan_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("encoder=clip", "llm=qwen3_4b", "hardware=l4")
    write_calibration(calibration_folder(config), L4)
    monkeypatch.setattr(
        calibration, "detect_gpu", lambda: DetectedDevice("NVIDIA GeForce RTX 4090", 23.5, 23.0, "l4", (8, 9))
    )
    assert calibrated_device(config) == planned_device(config)
