"""`vlmcap train`, the same as `train.py`: trains a captioner; `vlmcap train --help` lists the components."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vlmcap import __version__
from vlmcap.compose import checked_config, name_components, read_yaml
from vlmcap.config_files import config_dir
from vlmcap.config_unread import check_single_run, check_training
from vlmcap.program import is_sweep, report_user_errors
from vlmcap.sweeping.job import recorded, with_auto_resume
from vlmcap.sweeping.study import trial_of_job


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")
def main(node: DictConfig) -> float:
    """Trains one configuration and returns its objective, which sweeps compare."""
    with report_user_errors():
        # Everything that can fail is inside `recorded`, which writes the status of the job.
        with recorded() as record:
            name_components(node, HydraConfig.get())
            config = checked_config(node, record.overrides)
            check_training(record.overrides, config)
            if not is_sweep():
                check_single_run(record.overrides, config)
            record.begin(config)
            from vlmcap.training.run import train  # heavy; --help and --cfg do not need it

            record.objective = train(with_auto_resume(config), trial_of_job(config.sweep))
        from vlmcap.reporting.report.run_page import leave_page
        from vlmcap.training.processes import is_main

        if is_main(config):  # outside of `recorded`: a problem with the page must not change the status of the run
            leave_page(Path(config.paths.output_dir), read_yaml, version=__version__)
        return record.objective
