"""Composes the jobs of a sweep before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmcap.compose import checked_config, name_components
from vlmcap.config import Config
from vlmcap.config_errors import explain, innermost
from vlmcap.config_hash import config_hash
from vlmcap.errors import UserError
from vlmcap.sweep_syntax import expand, short_names


@dataclass(frozen=True, slots=True)
class Job:
    """One combination of a sweep.

    Attributes:
        overrides: Overrides of the job.
        name: Short name made of the values in which jobs differ.
        config: Composed configuration; None if it is invalid.
        refusal: Error message of an invalid configuration, else empty.
        trial: Address of the trial of a search, for the job's environment; empty without a search.
    """

    overrides: tuple[str, ...]
    name: str
    config: Config | None
    refusal: str = ""
    trial: str = ""

    @property
    def config_hash(self) -> str | None:
        """Hash that is equal for equivalent configurations; None for an invalid one."""
        return None if self.config is None else config_hash(self.config)


class Composer:
    """Composes jobs in the same way as Hydra's launchers.

    Args:
        context: Hydra context.
        master: Configuration of the sweep's own program.
    """

    def __init__(self, context: HydraContext, master: DictConfig) -> None:
        self._loader, self._master = context.config_loader, master

    @property
    def parser(self) -> OverridesParser:
        """Parser of Hydra's override syntax."""
        return OverridesParser.create(config_loader=self._loader)

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """Parses arguments.

        Raises:
            UserError: An argument cannot be parsed.
        """
        try:
            return self.parser.parse_overrides([*arguments])
        except HydraException as error:
            raise UserError(explain(innermost(error))) from error

    def grid(self, arguments: Sequence[str]) -> list[Job]:
        """Composes every combination of the arguments.

        Raises:
            UserError: An argument cannot be parsed, no combination is valid, or a key is swept that needs one value
                for the whole sweep.
        """
        combinations, swept = expand(arguments, self.parser)
        # Before composing, which takes longer.
        check_arguments(arguments, swept)
        names = short_names(combinations, swept)
        jobs = [self.job(one, name) for one, name in zip(combinations, names, strict=True)]
        # If every combination is invalid, the arguments are wrong, and one error says more than a table of refusals.
        if all(job.refusal for job in jobs):
            raise UserError(jobs[0].refusal)
        return jobs

    def job(self, overrides: Sequence[str], name: str, trial: str = "") -> Job:
        """Composes one combination; an invalid value is recorded in the job, because the others can run.

        Raises:
            UserError: A component or a key does not exist.
        """
        try:
            # An unknown key or name stops the whole sweep, because it is a mistake in its arguments.
            node: Any = self._loader.load_sweep_config(self._master, [*overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(innermost(error))) from error
        # Hydra's own node is removed as its launchers do, so that the rest is a run's configuration.
        OmegaConf.set_struct(node, False)
        hydra_node = node.pop("hydra")
        node.paths.output_dir = ""  # not known yet, and not part of the hash
        try:
            name_components(node, hydra_node)
            config, refusal = checked_config(node, overrides), ""
        except UserError as error:
            config, refusal = None, str(error)
        return Job(tuple(overrides), name or " ".join(overrides) or "as configured", config, refusal, trial)


def check_arguments(arguments: Sequence[str], swept: Sequence[str]) -> None:
    """Checks that each job can have a folder of its own, and that settings of the sweep have one value.

    Args:
        arguments: Arguments of the command.
        swept: Keys that have several values.

    Raises:
        UserError: A setting of the sweep is swept, or `paths.output_dir` is set.
    """
    for key in swept:
        if key.split(".")[0] in ("sweep", "launcher"):
            raise UserError(f"{key} applies to the whole sweep and cannot have several values; give it one value")
    for argument in arguments:
        if argument.lstrip("+").startswith("paths.output_dir="):
            raise UserError(
                "paths.output_dir would put every job of a sweep into one folder; set sweep.folder=… instead"
            )
