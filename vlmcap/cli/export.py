"""`vlmcap export`: a fine-tuned model as a plain folder that transformers and vLLM load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "write the fine-tuned language model, adapters merged, as a folder that transformers and vLLM load"
    parser = commands.add_parser("export", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--checkpoint", required=True, metavar="CKPT", help="a .ckpt file under the checkpoints/ folder of a run")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder, or an empty one")
    parser.add_argument("--dtype", metavar="TYPE", help="bfloat16, float16 or float32 (default: that of the run's arithmetic)")
    parser.add_argument("--device", default="cpu", help="where adapters are merged; has to hold the unquantised model (default: cpu)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="put a value over the checkpoint's configuration, such as llm.checkpoint=DIR; may be repeated",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Writes the folder and says how to load it.

    Raises:
        UserError: The output is in use, or the checkpoint or its base does not do.
    """
    from vlmcap.cli.caption import read_settings
    from vlmcap.training.checkpoints.export import export, tell

    overrides = read_settings(options.set)
    print(tell(export(options.checkpoint, options.output, dtype=options.dtype, device=options.device, overrides=overrides)))
