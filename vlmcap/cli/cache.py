"""`vlmcap cache`: features of frozen encoders on disk, prepared, listed and pruned."""

from __future__ import annotations

import argparse
from typing import Any

_OVERRIDES = "as of train.py, such as encoder=siglip2 data.root=…; paths.cache_dir says where the features are"


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    parser = commands.add_parser("cache", help="prepare, list and prune cached features of frozen encoders")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, run, text in (
        ("build", _build, "encode every clip of a configuration that is not there yet, without loading its language model"),
        ("info", _info, "list the stores of features and what they take"),
        ("prune", _prune, "delete features: one store, all, or the longest unused ones"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_OVERRIDES)
        action.set_defaults(run=run)
        if name == "prune":
            chosen = action.add_mutually_exclusive_group(required=True)
            chosen.add_argument("--max-gib", type=float, metavar="N", help="delete the longest unused stores until N GiB are left")
            chosen.add_argument("--all", action="store_true", help="delete every store")
            chosen.add_argument("--key", metavar="K", help="delete the store of this key, as `vlmcap cache info` lists it")


def _build(options: argparse.Namespace) -> None:
    from vlmcap.build.cache_command import build

    build(options.overrides)


def _info(options: argparse.Namespace) -> None:
    from vlmcap.build.cache_command import info

    info(options.overrides)


def _prune(options: argparse.Namespace) -> None:
    from vlmcap.build.cache_command import prune

    prune(options.overrides, max_gib=options.max_gib, key=options.key)
