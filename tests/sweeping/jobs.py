"""A program like train.py whose jobs take no time: they write down what they saw, and some fail or are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hydra
from omegaconf import DictConfig

from vlmcap.compose import to_config
from vlmcap.config_files import config_dir
from vlmcap.program import report_user_errors, run_program
from vlmcap.sweeping.job import recorded


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")
def main(node: DictConfig) -> float:
    with report_user_errors(), recorded() as record:
        config = to_config(node)
        record.begin(config)
        if config.seed == 1:
            raise RuntimeError("diverged")
        if config.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        Path(config.paths.output_dir, "seen.txt").write_text(f"{os.getpid()} {seen}")
        record.objective = config.seed / 10
        return record.objective


if __name__ == "__main__":
    run_program(main, "train")
