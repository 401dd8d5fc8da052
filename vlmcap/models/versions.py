"""Versions of transformers that a part of the models needs, checked where it is used.

pip holds to the bounds of pyproject.toml, but a machine that has no package index runs with what is installed there.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from vlmcap.errors import UserError

LEAST_TRANSFORMERS = Version(
    "5.23"
)  # with 5.17, the logits of Qwen-VL did not depend on the video, and 4-bit experts failed


def check_transformers(what: str) -> None:
    """Nothing, if the installed transformers can be trusted with a part.

    Args:
        what: The part, as the beginning of a sentence.

    Raises:
        UserError: It is older than `LEAST_TRANSFORMERS`.
    """
    installed = importlib.metadata.version("transformers")
    if Version(installed) < LEAST_TRANSFORMERS:
        raise UserError(
            f"{what} need transformers {LEAST_TRANSFORMERS} or newer, as older versions compute something else, and "
            f"{installed} is installed; run `pip install 'transformers>={LEAST_TRANSFORMERS}'`"
        )
