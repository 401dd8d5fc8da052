"""`encoder=[NAME,NAME]`: one configuration of two encoders whose features are joined.

Hydra composes both files into one group, where values of the second replace those of the first. Here they are taken
apart again: the group has the values of the first, and its key `join` those of the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vlmcap.config import PatchEncoderConfig, SquareEncoderConfig
from vlmcap.config_files import config_file
from vlmcap.errors import UserError

_SCHEMAS = ("patches_schema", "patches_schema@encoder")


def check_names(value: str) -> None:
    """Checks every list of names in a value of `encoder`, which has several in a sweep.

    Raises:
        UserError: A list does not have two names, or one of them cannot be joined.
    """
    # In a sweep: "[dinov2,siglip2],[dinov2,clip]".
    for names in map(_names, re.findall(r"\[[^\]]*\]", value)):
        if len(names) != 2:
            raise UserError(
                f"encoder=[{','.join(names)}] joins {len(names)} encoders, but two can be joined; set "
                "encoder=[NAME,NAME], or encoder=NAME for one"
            )
        for name in names:
            if config_file(f"encoder/{name}").is_file() and not _values(name):
                raise UserError(
                    f"encoder={name} cannot be joined with another, as its frames do not have one size; join two "
                    "encoders whose frames have, or choose one encoder"
                )


def join_encoders(node: DictConfig, overrides: Sequence[str], following: Callable[[type], DictConfig]) -> None:
    """Takes the two encoders of `encoder=[NAME,NAME]` apart, in place; does nothing for one encoder.

    Args:
        node: Composed configuration before interpolations are resolved.
        overrides: Overrides of the command line.
        following: Function that returns a dataclass as a node with its defaults.
    """
    typed = {key: value for key, _, value in (override.lstrip("+").partition("=") for override in overrides)}
    names = _names(typed.get("encoder", ""))
    if len(names) != 2:
        return
    first, second = map(_values, names)
    defaults = following(PatchEncoderConfig)
    # What neither the first file nor the command line sets is a default, and not a value of the second file.
    for key in {*first, *second} - {key.removeprefix("encoder.") for key in typed}:
        node.encoder[key] = first[key] if key in first else defaults._get_node(key)
    node.encoder.join = OmegaConf.merge(following(SquareEncoderConfig), {"kind": "patches"}, second)
    if "encoder.name" not in typed:
        node.encoder.name = "+".join(names)


def _names(value: str) -> list[str]:
    """Returns the names of a list; none for a single name."""
    value = value.strip()
    if not value.startswith("["):
        return []
    return [name.strip().strip("'\"") for name in value.strip("[]").split(",") if name.strip()]


def _values(name: str) -> dict[str, Any]:
    """Returns what the file of an encoder sets; nothing if it is of another kind."""
    content = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(config_file(f"encoder/{name}"))))
    defaults = content.pop("defaults", [])
    return dict(content.get("encoder", content)) if {*_SCHEMAS} & {*map(str, defaults)} else {}
