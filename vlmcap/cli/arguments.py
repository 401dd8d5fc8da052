"""The arguments of every command, and which of them go together."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmcap.errors import UserError

# `vlmcap train` and `vlmcap evaluate`, whose arguments Hydra reads.
PROGRAMS = {
    "train": "train a captioner, as train.py does; -m runs one combination after another",
    "evaluate": "score a checkpoint on a split, as evaluate.py does",
}
_PARTS = "overrides of `vlmcap train`, such as encoder=siglip2 llm=qwen3_8b hardware=l4"


@dataclass(frozen=True, slots=True)
class Command:
    """A command, whose body is `run(options)` in the module of its name.

    Attributes:
        name: What is typed, and with _ for - the module under `vlmcap.cli`.
        help: Its line in `vlmcap --help`.
        add_arguments: Adds its arguments to its parser.
        check: Raises `UserError` for arguments that do not go together.
        traces_models: Whether its body begins with loading torch and transformers.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    check: Callable[[Namespace], None] = lambda options: None
    traces_models: bool = False


def _add_overrides(parser: ArgumentParser, text: str = _PARTS) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)
    _add_config_dir(parser)


def _add_config_dir(parser: ArgumentParser) -> None:
    text = "folder of your own YAML files, laid out as conf/, which are found before ours"
    parser.add_argument("--config-dir", metavar="DIR", help=text)
    text = "Python file or importable module with parts of your own; may be given several times"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help=text)
    parser.set_defaults(overrides=[])


_OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")


def is_override(argument: str) -> bool:
    """Whether this is `KEY=VALUE` and not a file or a folder."""
    return bool(_OVERRIDE.match(argument)) and not Path(argument).exists()


def _part_overrides(options: Namespace, name: str) -> None:
    """Moves the overrides among paths to where overrides are."""
    paths = getattr(options, name)
    options.overrides = [*(str(path) for path in paths if is_override(str(path))), *options.overrides]
    setattr(options, name, [path for path in paths if not is_override(str(path))])
    if not getattr(options, name):
        raise UserError(
            f"vlmcap {options.command} needs {'a FOLDER' if name == 'folders' else 'a PATH'} beside "
            f"{options.overrides[0]}"
        )


def _check_read(options: Namespace, keys: Sequence[str]) -> None:
    """Refuses overrides of keys that a command does not read."""
    for override in options.overrides:
        key = override.lstrip("+").partition("=")[0]
        if key not in keys:
            hint = "add --sweep FILE, or leave it out" if options.command == "dashboard" else "leave it out"
            raise UserError(
                f"{override} changes nothing in `vlmcap {options.command}`, which reads {', '.join(keys)}; {hint}"
            )


def _add_json(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print the {what} as JSON")


def _doctor(parser: ArgumentParser) -> None:
    parser.epilog = (
        "llm.checkpoint=… or encoder.checkpoint=… describes that checkpoint instead. Exit code 1 on a problem."
    )
    _add_overrides(parser)
    text = "take four training steps and write short captions at true size with random weights"
    parser.add_argument("--measure", action="store_true", help=text)
    text = "measure and plan with only N blocks of encoder and language model"
    parser.add_argument("--blocks", type=int, metavar="N", help=text)
    parser.add_argument("--forget", action="store_true", help="remove the measurements that plans use")
    _add_json(parser, "result")


def _check_doctor(options: Namespace) -> None:
    if options.forget and (options.measure or options.json):
        raise UserError("--forget goes with no other flag; run it alone, and --measure behind it")
    if options.blocks is not None and not options.measure:
        raise UserError("--blocks cuts what is measured; add --measure")
    if options.blocks is not None and options.blocks < 1:
        raise UserError(f"--blocks must be at least 1, not {options.blocks}")


def _plan(parser: ArgumentParser) -> None:
    parser.epilog = "Exit code 1 where it does not fit."
    _add_overrides(parser)
    _add_json(parser, "plan")
    parser.add_argument("--all", action="store_true", help="show every part of the memory, small ones too")
    text = "add up all combinations of a sweep, such as encoder=clip,siglip2"
    parser.add_argument("-m", "--multirun", action="store_true", help=text)
    parser.add_argument("--price", type=float, metavar="X", help="with -m: the price of an hour of the GPU")
    text = "a table of all encoders, llms and GPUs, or of llm=qwen3_4b,qwen3_8b and so on"
    parser.add_argument("--grid", action="store_true", help=text)
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw the table of --grid, too")


def _check_plan(options: Namespace) -> None:
    if options.output and not options.grid:
        raise UserError("--output is the picture of --grid's table; add --grid, or leave it out")
    if options.multirun and options.all:
        raise UserError("--all shows the memory of one combination; leave out -m")
    if options.price is not None and not options.multirun:
        raise UserError("--price is for a sweep; add -m")
    if options.price is not None and not 0 <= options.price < math.inf:
        raise UserError(f"--price must be what an hour costs, 0 or more, not {options.price}")


def _cache(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    texts = {
        "build": "encode every clip of a configuration that is not there yet, without loading its language model",
        "info": "list the stores of features and what they take",
        "verify": "compare all features with their checksums, and remove what is damaged: runs encode it again",
        "prune": "delete features: one store, all, or the longest unused ones",
    }
    made = {
        name: actions.add_parser(name, help=text, description=f"{text.capitalize()}.") for name, text in texts.items()
    }
    for action in made.values():
        _add_overrides(
            action,
            "overrides of `vlmcap train`, such as encoder=siglip2 data.root=…; paths.cache_dir says where the "
            "features are",
        )
    chosen = made["prune"].add_mutually_exclusive_group(required=True)
    text = "delete the longest unused stores until N GiB are left"
    chosen.add_argument("--max-gib", type=float, metavar="N", help=text)
    chosen.add_argument("--all", action="store_true", help="delete every store")
    chosen.add_argument("--key", metavar="K", help="delete the store of this key, as `vlmcap cache info` lists it")


def _check_cache(options: Namespace) -> None:
    max_gib = getattr(options, "max_gib", None)
    if max_gib is not None and not 0 <= max_gib < math.inf:
        raise UserError(f"--max-gib must be 0 or more, not {max_gib}")


def _caption(parser: ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="video files, or folders and archives that are searched for them"
    )
    text = "a .ckpt file of a run, or a folder of `vlmcap export`"
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help=text)
    text = "write one JSON object per clip here, as it is done, instead of text to the screen"
    parser.add_argument("--output", metavar="F.jsonl", help=text)
    parser.add_argument(
        "--resume", action="store_true", help="keep the captions that --output has, and go on with the other clips"
    )
    parser.epilog = (
        "KEY=VALUE among the paths is put over the checkpoint's configuration, such as hardware.accelerator=cpu."
    )
    _add_config_dir(parser)


def _check_caption(options: Namespace) -> None:
    _part_overrides(options, "paths")


def _data(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    text = "count clips and captions, find broken files and duplicates, and write a page with pictures"
    description = "Count clips and captions, find broken files, captions that will be cut and clips that look alike, and write a page."
    check = actions.add_parser("check", help=text, description=description)
    _add_overrides(check, "overrides of `vlmcap train`, such as data=aihub data.root=… llm=qwen3_8b")
    text = "the page (default: data-check.html)"
    check.add_argument("--output", type=Path, default=Path("data-check.html"), metavar="FILE", help=text)
    text = "read the videos of the first N clips of each split only"
    check.add_argument("--max-clips", type=int, metavar="N", help=text)
    check.add_argument("--captions-only", action="store_true", help="read no video")


def _check_data(options: Namespace) -> None:
    if options.max_clips is not None and options.max_clips < 1:
        raise UserError(f"--max-clips must be at least 1, not {options.max_clips}")


def _export(parser: ArgumentParser) -> None:
    text = "a .ckpt file under the checkpoints/ folder of a run"
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help=text)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder, or an empty one")
    text = "bfloat16, float16 or float32 (default: that of the run's arithmetic)"
    parser.add_argument("--dtype", metavar="TYPE", help=text)
    text = "where adapters are merged; has to hold the unquantised model (default: cpu)"
    parser.add_argument("--device", default="cpu", help=text)
    _add_overrides(parser, "values over the checkpoint's configuration, such as llm.checkpoint=DIR")


def _report(parser: ArgumentParser) -> None:
    text = "of a run, or of a sweep: multirun/<date>/<time>"
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=text)
    text = "where everything is written (default: report)"
    parser.add_argument("--output", type=Path, default=Path("report"), metavar="DIR", help=text)
    text = "by which runs are compared, such as test/cider (default: what the runs monitored)"
    parser.add_argument("--metric", metavar="NAME", help=text)
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the folders)")
    text = "clips shown with all captions side by side (default: 40)"
    parser.add_argument("--clips", type=int, default=40, metavar="N", help=text)
    text = "score all captions again with this tokenizer, where runs used different ones"
    parser.add_argument("--tokenizer", metavar="NAME", help=text)
    parser.epilog = (
        "Among the folders, monitor=NAME is --metric NAME and evaluation.tokenizer=NAME is --tokenizer NAME."
    )
    _add_config_dir(parser)


def _check_report(options: Namespace) -> None:
    _part_overrides(options, "folders")
    _check_read(options, ("monitor", "evaluation.tokenizer"))
    if options.clips < 0:
        raise UserError(f"--clips must be 0 or more, not {options.clips}")


def _spectrum(parser: ArgumentParser) -> None:
    _add_overrides(parser, "overrides of `vlmcap train`; encoder=clip,siglip2 compares: one encoder per combination")
    text = "for spectrum.json, a PNG per encoder, and comparison.png"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=text)
    text = "images or videos to look at in place of the data's clips"
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help=text)
    text = "clips of the validation split, spread over it (default: 32)"
    parser.add_argument("--clips", type=int, default=32, metavar="N", help=text)
    text = "patches that the singular values are of (default: 8192)"
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help=text)
    parser.add_argument("--layers", action="store_true", help="also each layer up to the one that is read")
    _add_json(parser, "figures")


def _check_spectrum(options: Namespace) -> None:
    for name in ("clips", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")


def _dashboard(parser: ArgumentParser) -> None:
    _add_overrides(parser, "overrides, with --sweep those of `vlmcap train -m`, such as encoder=clip,siglip2")
    text = "W&B project (default: logger.project)"
    parser.add_argument("--project", metavar="P", help=text)
    text = "user or team that has the project (default: logger.entity, or that of the key)"
    parser.add_argument("--entity", metavar="E", help=text)
    text = "score to compare by (default: monitor)"
    parser.add_argument("--objective", metavar="NAME", help=text)
    text = "write the definition to a file and publish nothing"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)
    text = "write a sweep of the overrides for `wandb sweep` to a file"
    parser.add_argument("--sweep", type=Path, metavar="FILE", help=text)


def _check_dashboard(options: Namespace) -> None:
    if not options.sweep:
        _check_read(options, ("logger.project", "logger.entity", "monitor"))


def _check_plugin(parser: ArgumentParser) -> None:
    parser.epilog = "Exit code 1 where a contract does not hold."
    text = "Python files or importable modules that register parts; KEY=VALUE sets one of their settings, such as projector.expansion=4"
    parser.add_argument("plugins", nargs="*", metavar="FILE", help=text)
    _add_config_dir(parser)


def _check_plugins(options: Namespace) -> None:
    options.overrides = [*(name for name in options.plugins if is_override(name)), *options.overrides]
    options.plugins = [*options.plugin, *(name for name in options.plugins if not is_override(name))]


COMMANDS = (
    Command(
        "doctor",
        "whether this machine is ready; with --measure, how far a plan is off on its GPU",
        _doctor,
        _check_doctor,
    ),
    Command(
        "plan",
        "peak memory, time and disk of a configuration, without weights, GPU or network",
        _plan,
        _check_plan,
        traces_models=True,
    ),
    Command("cache", "prepare, list, verify and prune cached features of frozen encoders", _cache, _check_cache),
    Command("caption", "caption video files with a trained checkpoint", _caption, _check_caption),
    Command("data", "look at a data set before training on it", _data, _check_data),
    Command(
        "export",
        "write the fine-tuned language model, adapters merged, as a folder that transformers and vLLM load",
        _export,
    ),
    Command(
        "report", "compare runs: a page, tables and pictures with intervals and significance", _report, _check_report
    ),
    Command(
        "spectrum",
        "effective rank and locality of encoders' patch features, as a table, JSON and pictures",
        _spectrum,
        _check_spectrum,
        traces_models=True,
    ),
    Command(
        "check-plugin",
        "whether the parts of a plugin hold what everything else relies on",
        _check_plugin,
        _check_plugins,
    ),
    Command(
        "dashboard",
        "the Weights & Biases dashboard that compares runs, and sweeps for W&B's agents",
        _dashboard,
        _check_dashboard,
    ),
)
