"""`vlmcap spectrum`: how many directions an encoder's patch features use, and how local they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlmcap.errors import UserError


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "effective rank and locality of encoders' patch features, as a table, JSON and pictures"
    parser = commands.add_parser("spectrum", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as of train.py; encoder=clip,siglip2 compares: one encoder a combination"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for spectrum.json, a PNG an encoder, and comparison.png")
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="images or videos to look at in place of the data's clips")
    parser.add_argument("--clips", type=int, default=32, metavar="N", help="clips of the validation split, spread over it (32)")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="patches that the singular values are of (8192)")
    parser.add_argument("--layers", action="store_true", help="also each layer up to the one that is read")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    for name in ("clips", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    from vlmcap.libraries import import_libraries

    import_libraries(with_adapters=False, with_training=False)
    from vlmcap.spectrum.measure import SpectrumSettings, show_spectra

    settings = SpectrumSettings(options.clips, options.tokens, options.layers, tuple(options.images or ()))
    show_spectra(options.overrides, settings, options.output, as_json=options.json)
