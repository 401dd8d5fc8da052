"""Hydra's sweep syntax of `python train.py -m`, such as `encoder=clip,siglip2`, `seed=range(3)` and `choice(a,b)`."""

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
    """Yields Hydra's parser of overrides, outside of a Hydra program.

    Raises:
        UserError: An override that is parsed inside the context cannot be read.
    """
    register_schemas()
    with _explained(), hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        # glob() needs the loader to list names.
        yield OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())


@contextmanager
def _explained() -> Iterator[None]:
    """Turns errors of Hydra into a `UserError` with one sentence."""
    try:
        yield
    except HydraException as error:
        raise UserError(explain(innermost(error))) from error


def expand(overrides: Sequence[str], parser: OverridesParser | None = None) -> tuple[list[tuple[str, ...]], list[str]]:
    """Returns the overrides of each job in the order of Hydra's BasicSweeper, and the swept keys.

    Args:
        overrides: Overrides after `python train.py -m`; of a repeated key, the last one counts, as in Hydra.
        parser: Parser of the running program; None creates one, and prepends `hydra.sweeper.params` of the experiment.

    Raises:
        UserError: An override cannot be read, or has no discrete values.
    """
    if parser is None:
        with override_parser() as new_parser:
            return expand([*_experiment_params(overrides, new_parser), *overrides], new_parser)
    # By key: the last override of a key wins, and an argument wins over the experiment file.
    values: dict[str, list[str]] = {}
    with _explained():
        for override in parser.parse_overrides(read_overrides(overrides, is_sweep=True)):
            key = override.get_key_element()
            if not override.is_sweep_override():
                values[key] = [f"{key}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep():
                values[key] = [f"{key}={value}" for value in sweep_values(override)]
            else:
                hint = "give a list such as 1e-4,2e-4 or range(start,stop,step), or set sweep=optuna"
                raise UserError(f"{override.input_line} has no values to try one by one; {hint}")
    empty = next((key for key, tried in values.items() if not tried), None)
    if empty is not None:
        raise UserError(f"{empty} has no values to try, because glob() finds none or a range is empty; give it values")
    # The last key changes fastest, as in Hydra's BasicSweeper.
    return list(itertools.product(*values.values())), [key for key, tried in values.items() if len(tried) > 1]


def _experiment_params(overrides: Sequence[str], parser: OverridesParser) -> list[str]:
    """Returns the swept overrides of an experiment file; none without an experiment or with several."""
    with _explained():
        given = parser.parse_overrides(read_overrides(overrides, is_sweep=True))
        if not any(override.key_or_group == "experiment" and isinstance(override.value(), str) for override in given):
            return []
        fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
        # `hydra.sweeper.params` of an experiment file is Hydra's way to define a sweep in YAML.
        params = hydra.compose("train", fixed, return_hydra_config=True).hydra.sweeper.params or {}
    return [f"{key}={value}" for key, value in params.items()]


def short_names(jobs: Sequence[Sequence[str]], swept: Sequence[str]) -> list[str]:
    """Returns a short name of each job by its swept values: choices of groups alone, other values with their key."""
    return [
        " ".join(_shown(*override.split("=", 1)) for override in job if override.split("=", 1)[0] in swept)
        for job in jobs
    ]


def _shown(key: str, value: str) -> str:
    return value if any((folder / key).is_dir() for folder in config_dirs()) else f"{key}={value}"
