"""The jobs of a sweep, composed and hashed before the first one starts."""

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
    """A combination.

    Attributes:
        overrides: Of the job.
        name: What tells it from the others.
        config: None where it is wrong.
        refusal: What is wrong.
        trial: Where the trial of a search stands, for the job's environment; empty for none.
    """

    overrides: tuple[str, ...]
    name: str
    config: Config | None
    refusal: str = ""
    trial: str = ""

    @property
    def config_hash(self) -> str | None:
        """Equal for jobs that come to the same."""
        return None if self.config is None else config_hash(self.config)


class Composer:
    """Composes jobs as Hydra's launchers will.

    Args:
        context: Hydra's.
        master: The configuration of the program around the jobs.
    """

    def __init__(self, context: HydraContext, master: DictConfig) -> None:
        self._loader, self._master = context.config_loader, master

    @property
    def parser(self) -> OverridesParser:
        """Of Hydra's override syntax."""
        return OverridesParser.create(config_loader=self._loader)

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """The arguments as Hydra reads them.

        Raises:
            UserError: One cannot be read.
        """
        try:
            return self.parser.parse_overrides([*arguments])
        except HydraException as error:
            raise UserError(explain(innermost(error))) from error

    def grid(self, arguments: Sequence[str]) -> list[Job]:
        """Every combination of the arguments.

        Raises:
            UserError: One cannot be read or composed, none is without a mistake, or what is of the sweep as a whole is
                swept.
        """
        combinations, swept = expand(arguments, self.parser)
        check_arguments(arguments, swept)
        names = short_names(combinations, swept)
        jobs = [self.job(one, name) for one, name in zip(combinations, names, strict=True)]
        if all(job.refusal for job in jobs):
            raise UserError(jobs[0].refusal)
        return jobs

    def job(self, overrides: Sequence[str], name: str, trial: str = "") -> Job:
        """One combination; a mistake of its values is kept in it, as the others can run.

        Raises:
            UserError: There is no such part or key.
        """
        try:
            node: Any = self._loader.load_sweep_config(self._master, [*overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(innermost(error))) from error
        OmegaConf.set_struct(node, False)
        hydra_node = node.pop("hydra")
        node.paths.output_dir = ""  # not known yet, and without effect
        try:
            name_components(node, hydra_node)
            config, refusal = checked_config(node, overrides), ""
        except UserError as error:
            config, refusal = None, str(error)
        return Job(tuple(overrides), name or " ".join(overrides) or "as configured", config, refusal, trial)


def check_arguments(arguments: Sequence[str], swept: Sequence[str]) -> None:
    """Nothing where every job can have a folder of its own, and one sweep holds for all.

    Raises:
        UserError: A key is against that.
    """
    for key in swept:
        if key.split(".")[0] in ("sweep", "launcher"):
            raise UserError(f"{key} is of the sweep as a whole and cannot be swept; give it one value")
    for argument in arguments:
        if argument.lstrip("+").startswith("paths.output_dir="):
            raise UserError(
                "paths.output_dir would put every job of a sweep into one folder; give sweep.folder=… in its place"
            )
