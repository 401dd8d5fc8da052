"""Hydra's sweep syntax as `python train.py -m` reads it.

`encoder=clip,siglip2`, `seed=range(3)`, `optim=choice(adamw,adamw_8bit)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from vlmcap.compose import register_schemas
from vlmcap.config_errors import explain, innermost
from vlmcap.config_files import config_dir, config_dirs
from vlmcap.errors import UserError
from vlmcap.overrides import read_overrides, sweep_values


@contextmanager
def override_parser() -> Iterator[OverridesParser]:
    """Hydra's parser of overrides, outside of a running program.

    Raises:
        UserError: An override that is parsed inside cannot be read.
    """
    register_schemas()
    with _explained(), hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        # glob() asks the loader for the names
        yield OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())


@contextmanager
def _explained() -> Iterator[None]:
    """Turns an error of Hydra into one sentence."""
    try:
        yield
    except HydraException as error:
        raise UserError(explain(innermost(error))) from error


def expand(overrides: Sequence[str], parser: OverridesParser | None = None) -> tuple[list[tuple[str, ...]], list[str]]:
    """The overrides of each job, in the order of Hydra's BasicSweeper, and the keys that are swept.

    Args:
        overrides: As after `python train.py -m`; of a key that is there twice the last counts, as for Hydra.
        parser: Of the running program; None makes one, and puts what the experiment file has under
            `hydra.sweeper.params` in front.

    Raises:
        UserError: An override cannot be read, or has no values to try one by one.
    """
    if parser is None:
        with override_parser() as made:
            return expand([*_study(overrides, made), *overrides], made)
    values: dict[str, list[str]] = {}
    with _explained():
        for override in parser.parse_overrides(read_overrides(overrides, is_sweep=True)):
            key = override.get_key_element()
            if not override.is_sweep_override():
                values[key] = [f"{key}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep():
                values[key] = [f"{key}={value}" for value in sweep_values(override)]
            else:
                hint = "give a list such as 1e-4,2e-4, range(start,stop,step), or sweep=optuna"
                raise UserError(f"{override.input_line} has no values to try one by one; {hint}")
    empty = next((key for key, found in values.items() if not found), None)
    if empty is not None:
        raise UserError(f"{empty} has no values to try; glob() finds none, or a range is empty")
    return list(itertools.product(*values.values())), [key for key, found in values.items() if len(found) > 1]


def _study(overrides: Sequence[str], parser: OverridesParser) -> list[str]:
    """What an experiment file sweeps; nothing where none is named, or several are."""
    with _explained():
        given = parser.parse_overrides(read_overrides(overrides, is_sweep=True))
        if not any(override.key_or_group == "experiment" and isinstance(override.value(), str) for override in given):
            return []
        fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
        params = hydra.compose("train", fixed, return_hydra_config=True).hydra.sweeper.params or {}
    return [f"{key}={value}" for key, value in params.items()]


def short_names(jobs: Sequence[Sequence[str]], swept: Sequence[str]) -> list[str]:
    """What tells each job from the others: names of parts as they are, other values with their key."""
    return [
        " ".join(_shown(*override.split("=", 1)) for override in job if override.split("=", 1)[0] in swept)
        for job in jobs
    ]


def _shown(key: str, value: str) -> str:
    return value if any((folder / key).is_dir() for folder in config_dirs()) else f"{key}={value}"
