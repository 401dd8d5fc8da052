"""The arguments of every command, and the checks of their combinations."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmcap.errors import UserError

# `vlmcap train` and `vlmcap evaluate`, whose arguments Hydra parses.
PROGRAMS = {
    "train": "train a captioner, like train.py; -m runs every combination of a sweep",
    "evaluate": "score a checkpoint on a split, like evaluate.py",
}
_TRAIN_OVERRIDES = "overrides as for `vlmcap train`, such as encoder=siglip2 llm=qwen3_8b hardware=l4"


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand, whose body is the function `run(options)` in the module of its name.

    Attributes:
        name: Name on the command line; the module under `vlmcap.cli` has _ in place of -.
        help: Line in `vlmcap --help`.
        add_arguments: Adds the arguments to the parser of the command.
        check: Raises `UserError` for arguments that cannot be combined.
        traces_models: Whether the command needs torch and transformers from the start.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    check: Callable[[Namespace], None] = lambda options: None
    traces_models: bool = False


def _add_overrides(parser: ArgumentParser, text: str = _TRAIN_OVERRIDES) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)
    _add_config_dir(parser)


def _add_config_dir(parser: ArgumentParser) -> None:
    text = "folder of your own YAML files, laid out like conf/; it takes precedence over the built-in files"
    parser.add_argument("--config-dir", metavar="DIR", help=text)
    text = "Python file or importable module that registers your own components; may be repeated"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help=text)
    parser.set_defaults(overrides=[])


# Matches "llm=qwen3_8b", "+data.fps=2" and "~logger=", but no path such as "./a=b".
_OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")


def is_override(argument: str) -> bool:
    """Returns whether an argument is `KEY=VALUE` rather than a file or a folder."""
    # A file whose name contains "=" is still a file.
    return bool(_OVERRIDE.match(argument)) and not Path(argument).exists()


def _separate_overrides(options: Namespace, name: str) -> None:
    """Moves the overrides among the paths in `options.<name>` to `options.overrides`."""
    paths = getattr(options, name)
    options.overrides = [*(str(path) for path in paths if is_override(str(path))), *options.overrides]
    # argparse cannot tell paths from overrides, as both are positional.
    setattr(options, name, [path for path in paths if not is_override(str(path))])
    if not getattr(options, name):
        raise UserError(
            f"vlmcap {options.command} needs {'a FOLDER' if name == 'folders' else 'a PATH'} in addition to "
            f"{options.overrides[0]}"
        )


def _check_keys(options: Namespace, keys: Sequence[str]) -> None:
    """Refuses overrides of keys that a command does not read."""
    for override in options.overrides:
        # "+data.root=x" -> "data.root"
        key = override.lstrip("+").partition("=")[0]
        if key not in keys:
            hint = "remove it, or add --sweep FILE" if options.command == "dashboard" else "remove it"
            raise UserError(
                f"{override} has no effect on `vlmcap {options.command}`, which reads only {', '.join(keys)}; {hint}"
            )


def _add_json(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print the {what} as JSON")


def _doctor(parser: ArgumentParser) -> None:
    parser.epilog = (
        "With llm.checkpoint=… or encoder.checkpoint=…, that checkpoint is described instead. "
        "The exit code is 1 if there is a problem."
    )
    _add_overrides(parser)
    text = "run four training steps and generate short captions at full size with random weights"
    parser.add_argument("--measure", action="store_true", help=text)
    text = "measure and plan only N blocks of the encoder and of the language model"
    parser.add_argument("--blocks", type=int, metavar="N", help=text)
    parser.add_argument("--forget", action="store_true", help="delete the stored measurements that plans use")
    _add_json(parser, "result")


def _check_doctor(options: Namespace) -> None:
    if options.forget and (options.measure or options.json):
        raise UserError("--forget cannot be combined with --measure or --json; run it alone, then run --measure")
    if options.blocks is not None and not options.measure:
        raise UserError("--blocks limits what is measured; add --measure")
    if options.blocks is not None and options.blocks < 1:
        raise UserError(f"--blocks must be at least 1, not {options.blocks}")


def _plan(parser: ArgumentParser) -> None:
    parser.epilog = "The exit code is 1 if the configuration does not fit its GPU."
    _add_overrides(parser)
    _add_json(parser, "plan")
    parser.add_argument("--all", action="store_true", help="show every item of the memory, including small ones")
    text = "plan all combinations of a sweep, such as encoder=clip,siglip2, and their total"
    parser.add_argument("-m", "--multirun", action="store_true", help=text)
    parser.add_argument("--price", type=float, metavar="X", help="with -m: price of one GPU hour")
    text = "print a table of all encoders, llms and GPUs, or of given ones, such as llm=qwen3_4b,qwen3_8b"
    parser.add_argument("--grid", action="store_true", help=text)
    parser.add_argument("--output", type=Path, metavar="PNG", help="with --grid: also draw the table to a file")


def _check_plan(options: Namespace) -> None:
    if options.output and not options.grid:
        raise UserError("--output draws the table of --grid; add --grid, or remove --output")
    if options.multirun and options.all:
        raise UserError("--all shows the memory of one combination; remove -m")
    if options.price is not None and not options.multirun:
        raise UserError("--price applies to a sweep; add -m")
    if options.price is not None and not 0 <= options.price < math.inf:
        raise UserError(f"--price must be the price of one GPU hour, 0 or more, not {options.price}")


def _cache(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    texts = {
        "build": "encode every clip of a configuration that is not cached yet, without loading its language model",
        "info": "list the feature stores and their sizes",
        "verify": "compare all features with their checksums and remove damaged ones, which the next run encodes again",
        "prune": "delete feature stores: one, all, or the least recently used ones",
    }
    parsers = {
        name: actions.add_parser(name, help=text, description=f"{text.capitalize()}.") for name, text in texts.items()
    }
    # Each action has the overrides, because argparse accepts options of a parent only before the action.
    for action in parsers.values():
        _add_overrides(
            action,
            "overrides as for `vlmcap train`, such as encoder=siglip2 data.root=…; paths.cache_dir is the folder of "
            "the feature stores",
        )
    chosen = parsers["prune"].add_mutually_exclusive_group(required=True)
    text = "delete the least recently used stores until at most N GiB are left"
    chosen.add_argument("--max-gib", type=float, metavar="N", help=text)
    chosen.add_argument("--all", action="store_true", help="delete every store")
    chosen.add_argument("--key", metavar="K", help="delete the store with this key; `vlmcap cache info` lists the keys")


def _check_cache(options: Namespace) -> None:
    max_gib = getattr(options, "max_gib", None)
    if max_gib is not None and not 0 <= max_gib < math.inf:
        raise UserError(f"--max-gib must be 0 or more, not {max_gib}")


def _caption(parser: ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="video files, or folders and archives to search for videos"
    )
    text = "a .ckpt file of a run, or a folder written by `vlmcap export`"
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help=text)
    text = "write one JSON object per clip to this file as soon as it is captioned, instead of printing text"
    parser.add_argument("--output", metavar="F.jsonl", help=text)
    parser.add_argument(
        "--resume", action="store_true", help="keep the captions in --output and continue with the remaining clips"
    )
    parser.epilog = (
        "KEY=VALUE among the paths overrides the checkpoint's configuration, such as hardware.accelerator=cpu."
    )
    _add_config_dir(parser)


def _check_caption(options: Namespace) -> None:
    _separate_overrides(options, "paths")


def _data(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    text = "count clips and captions, find broken files and duplicates, and write a page with pictures"
    description = (
        "Count clips and captions, find broken files, captions that will be truncated and clips that look alike, and "
        "write a page with pictures."
    )
    check = actions.add_parser("check", help=text, description=description)
    _add_overrides(check, "overrides as for `vlmcap train`, such as data=aihub data.root=… llm=qwen3_8b")
    text = "HTML file of the page (default: data-check.html)"
    check.add_argument("--output", type=Path, default=Path("data-check.html"), metavar="FILE", help=text)
    text = "read only the videos of the first N clips of each split"
    check.add_argument("--max-clips", type=int, metavar="N", help=text)
    check.add_argument("--captions-only", action="store_true", help="do not read the videos")


def _check_data(options: Namespace) -> None:
    if options.max_clips is not None and options.max_clips < 1:
        raise UserError(f"--max-clips must be at least 1, not {options.max_clips}")


def _export(parser: ArgumentParser) -> None:
    text = "a .ckpt file under the checkpoints/ folder of a run"
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help=text)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new or an empty folder")
    text = "bfloat16, float16 or float32 (default: the precision of the run)"
    parser.add_argument("--dtype", metavar="TYPE", help=text)
    text = "device that merges the adapters; its memory must hold the unquantised model (default: cpu)"
    parser.add_argument("--device", default="cpu", help=text)
    _add_overrides(parser, "overrides of the checkpoint's configuration, such as llm.checkpoint=DIR")


def _report(parser: ArgumentParser) -> None:
    text = "folder of a run, or of a sweep: multirun/<date>/<time>"
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=text)
    text = "folder of the report (default: report)"
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help=text)
    text = "metric that runs are compared by, such as test/cider (default: the one that the runs monitored)"
    parser.add_argument("--metric", metavar="NAME", help=text)
    parser.add_argument("--title", metavar="TEXT", help="title of the page (default: the folders)")
    text = "number of clips shown with all captions side by side (default: 40)"
    parser.add_argument("--clips", type=int, default=40, metavar="N", help=text)
    text = "score all captions again with this tokenizer, if the runs used different ones"
    parser.add_argument("--tokenizer", metavar="NAME", help=text)
    parser.epilog = (
        "Among the folders, monitor=NAME means --metric NAME, and evaluation.tokenizer=NAME means --tokenizer NAME."
    )
    _add_config_dir(parser)


def _check_report(options: Namespace) -> None:
    _separate_overrides(options, "folders")
    _check_keys(options, ("monitor", "evaluation.tokenizer"))
    if options.clips < 0:
        raise UserError(f"--clips must be 0 or more, not {options.clips}")


def _spectrum(parser: ArgumentParser) -> None:
    _add_overrides(parser, "overrides as for `vlmcap train`; encoder=clip,siglip2 compares encoders")
    text = "folder of spectrum.json, a PNG per encoder, and comparison.png"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=text)
    text = "images or videos to encode instead of the clips of the data set"
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help=text)
    text = "number of clips, spread over the validation split (default: 32)"
    parser.add_argument("--clips", type=int, default=32, metavar="N", help=text)
    text = "number of patch features whose singular values are computed (default: 8192)"
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help=text)
    parser.add_argument("--layers", action="store_true", help="also measure each layer up to encoder.feature_layer")
    _add_json(parser, "figures")


def _check_spectrum(options: Namespace) -> None:
    for name in ("clips", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")


def _dashboard(parser: ArgumentParser) -> None:
    _add_overrides(parser, "overrides; with --sweep those of `vlmcap train -m`, such as encoder=clip,siglip2")
    text = "W&B project (default: logger.project)"
    parser.add_argument("--project", metavar="P", help=text)
    text = "user or team that owns the project (default: logger.entity, or the owner of the API key)"
    parser.add_argument("--entity", metavar="E", help=text)
    text = "metric that runs are compared by (default: monitor)"
    parser.add_argument("--objective", metavar="NAME", help=text)
    text = "write the dashboard's definition to a file instead of publishing it"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)
    text = "write a sweep over the overrides to a file for `wandb sweep`"
    parser.add_argument("--sweep", type=Path, metavar="FILE", help=text)


def _check_dashboard(options: Namespace) -> None:
    if not options.sweep:
        _check_keys(options, ("logger.project", "logger.entity", "monitor"))


def _check_plugin(parser: ArgumentParser) -> None:
    parser.epilog = "The exit code is 1 if a check fails."
    text = (
        "Python files or importable modules that register components; KEY=VALUE sets one of their settings, such as "
        "projector.expansion=4"
    )
    parser.add_argument("plugins", nargs="*", metavar="FILE", help=text)
    _add_config_dir(parser)


def _check_plugins(options: Namespace) -> None:
    options.overrides = [*(name for name in options.plugins if is_override(name)), *options.overrides]
    # `--plugin` files come first, so that positional ones may depend on them.
    options.plugins = [*options.plugin, *(name for name in options.plugins if not is_override(name))]


COMMANDS = (
    Command(
        "doctor",
        "check whether this machine is ready; with --measure, compare a plan with its GPU",
        _doctor,
        _check_doctor,
    ),
    Command(
        "plan",
        "estimate peak memory, time and disk of a configuration, without weights, GPU or network",
        _plan,
        _check_plan,
        traces_models=True,
    ),
    Command("cache", "build, list, verify and prune the cached features of frozen encoders", _cache, _check_cache),
    Command("caption", "caption video files with a trained checkpoint", _caption, _check_caption),
    Command("data", "inspect a data set before training on it", _data, _check_data),
    Command(
        "export",
        "write the fine-tuned language model, adapters merged, as a folder that transformers and vLLM load",
        _export,
    ),
    Command(
        "report",
        "compare runs in a page, tables and pictures, with confidence intervals and significance",
        _report,
        _check_report,
    ),
    Command(
        "spectrum",
        "measure effective rank and locality of encoders' patch features; print a table and write JSON and pictures",
        _spectrum,
        _check_spectrum,
        traces_models=True,
    ),
    Command(
        "check-plugin",
        "check that the components of a plugin satisfy the contracts that the package relies on",
        _check_plugin,
        _check_plugins,
    ),
    Command(
        "dashboard",
        "publish the Weights & Biases dashboard that compares runs, or write a sweep for W&B agents",
        _dashboard,
        _check_dashboard,
    ),
)
