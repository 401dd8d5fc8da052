"""Minimum version of transformers for some models, checked when they are loaded.

pip enforces the bounds in pyproject.toml, but a machine without a package index runs with what is installed there.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from vlmcap.errors import UserError

# With 5.17, the logits of Qwen-VL did not depend on the video, and 4-bit experts failed.
MIN_TRANSFORMERS = Version("5.23")


def check_transformers(what: str) -> None:
    """Checks that the installed transformers computes a feature correctly.

    Args:
        what: Plural name of the feature, the subject of the error message.

    Raises:
        UserError: transformers is older than `MIN_TRANSFORMERS`.
    """
    installed = importlib.metadata.version("transformers")
    if Version(installed) < MIN_TRANSFORMERS:
        raise UserError(
            f"{what} need transformers {MIN_TRANSFORMERS} or newer, as older versions compute wrong results, but "
            f"{installed} is installed; run `pip install 'transformers>={MIN_TRANSFORMERS}'`"
        )
