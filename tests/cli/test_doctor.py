"""`vlmcap doctor`: its checks of this machine, its messages about missing things, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmcap.cli import doctor, main
from vlmcap.cli.doctor import Check, run_checks
from vlmcap.compose import compose
from vlmcap.planning import hardware
from vlmcap.planning.calibration import Calibration, write_calibration
from vlmcap.planning.hardware import DetectedDevice

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU and without an API key."""
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(hardware, "detect_gpu", lambda: None)
    return tmp_path


def found(*overrides: str) -> dict[str, Check]:
    return {check.name: check for check in run_checks(compose(["data.root=unset", *overrides]))}


def test_this_environment_is_fit_for_the_demo() -> None:
    checks = found()
    names = ["Python", "torch", "transformers", "peft", "bitsandbytes", "lightning"]
    assert list(checks) == [*names, "GPU", "mecab-ko", "decoder", "ffmpeg", "disk", "shared memory", "W&B"]
    assert [check for check in checks.values() if check.level == "problem"] == []
    assert "강아지 가 공원 에서" in checks["mecab-ko"].found
    assert importlib.metadata.version("torch") in checks["torch"].found


def test_a_missing_gpu_is_a_problem_if_the_profile_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "hardware=l4"])
    assert stop.value.code == 1
    assert capsys.readouterr().out.strip().splitlines()[-1] == "Not ready: GPU."


@pytest.mark.parametrize(
    ("free", "overrides", "level", "words"),
    [
        (64 * 2**20, ("data.num_workers=8", "encoder=siglip2"), "warning", "--shm-size=8g"),
        (64 * 2**20, ("data.num_workers=8", "encoder=siglip2"), "warning", "data.num_workers=0"),
        (64 * 2**20, ("data.num_workers=0", "encoder=siglip2"), "ok", "67.1 MB"),
        (8 * 2**30, ("data.num_workers=8", "encoder=siglip2"), "ok", "8.6 GB of 8.6 GB free"),
    ],
)
def test_shared_memory_against_what_workers_need(
    free: int, overrides: tuple[str, ...], level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=free, total=free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check = found(*overrides)["shared memory"]
    assert check.level == level and words in f"{check.found}: {check.hint}"


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["ready"] is True
    assert result["verdict"].startswith("Ready, with ")
    assert {"name": "decoder", "level": "ok", "found": "PyAV wrote and read a clip", "hint": ""} in result["checks"]


@pytest.mark.parametrize(
    ("gpu", "level", "words"),
    [
        (
            DetectedDevice("NVIDIA L4", 22.0, 21.5, "l4", (8, 9)),
            "ok",
            "NVIDIA L4, 21.5 of 22.0 GiB free, compute capability 8.9, hardware=l4",
        ),
        (DetectedDevice("NVIDIA L4", 22.0, 3.0, "l4", (8, 9)), "warning", "another program uses its memory"),
        (DetectedDevice("NVIDIA GeForce RTX 3050", 7.8, 7.5, None, (8, 6)), "warning", "hardware=t4"),
    ],
)
def test_a_gpu(gpu: DetectedDevice, level: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect_gpu", lambda: gpu)
    checks = found("hardware=l4")
    assert checks["GPU"].level == level
    assert words in f"{checks['GPU'].found}: {checks['GPU'].hint}"
    assert "attention" in checks["FlashAttention"].found or checks["FlashAttention"].found == "installed"


@pytest.mark.parametrize(("version", "level"), [("2.10.1", "problem"), ("2.11.0+cu130", "ok"), ("3.0.0", "problem")])
def test_versions_outside_the_tested_range(version: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else true(name))
    check = found()["torch"]
    assert check.level == level
    assert ("pip install 'torch" in check.hint) == (level == "problem")


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found()["peft"].level == "problem"


def test_an_exception_in_a_check_is_reported_as_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("libavcodec.so: cannot open shared object file")

    monkeypatch.setattr("vlmcap.data.decoding.video.write_video", broken)
    check = found()["decoder"]
    assert check.level == "problem"
    assert "libavcodec.so" in check.found


def test_a_decoder_that_gives_other_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(
        "vlmcap.data.decoding.video.decode_frames", lambda *_: torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    )
    assert found()["decoder"].level == "problem"


@pytest.mark.parametrize(("free_gib", "level"), [(500, "ok"), (20, "warning"), (0.5, "problem")])
def test_room_on_the_disk(free_gib: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": int(free_gib * 2**30)})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert found()["disk"].level == level


def test_a_key_is_never_shown(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found("logger=wandb")["W&B"].level == "warning"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    main(["doctor", "logger=wandb"])
    monkeypatch.delenv("WANDB_API_KEY")
    (machine / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    os.chmod(machine / "netrc", 0o600)
    main(["doctor", "--json", "logger=wandb"])
    shown = capsys.readouterr()
    assert shown.out.count("an API key is set") == 2
    assert SECRET not in shown.out + shown.err


def test_forgetting(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = machine / "cache" / "calibration"
    write_calibration(
        folder, Calibration("NVIDIA L4", 22.0, "l4", "2026-11-28", "x", 1.2, 0.4, 0.5, 0.7, 15e-6, 2.5e-6, 90.0)
    )
    main(["doctor", "--forget"])
    assert list(folder.iterdir()) == []
    main(["doctor", "--forget"])
    assert capsys.readouterr().out.splitlines() == [
        "Removed NVIDIA-L4.json.",
        f"There are no measurements in {folder}.",
    ]


@pytest.mark.parametrize("arguments", [["--blocks", "1"], ["--forget", "--measure"], ["--measure", "--blocks", "0"]])
def test_flags_that_cannot_be_combined(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2
    assert "Error: --" in capsys.readouterr().err.splitlines()[-1]
