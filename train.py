"""Train a captioner: `python train.py`, `python train.py encoder=siglip2 llm=qwen3_8b hardware=l4`, `python train.py --help`."""

import hydra
from omegaconf import DictConfig

from vlmcap.compose import config_dir, register_schemas, to_config
from vlmcap.program import run_program, told_in_one_sentence
from vlmcap.sweeping.job import recorded, taken_up
from vlmcap.sweeping.study import trial_of_job

register_schemas()


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")
def main(node: DictConfig) -> float:
    """Runs one configuration and returns its objective, for sweeps."""
    with told_in_one_sentence(), recorded() as record:
        config = to_config(node)
        record.begin(config)
        from vlmcap.training.run import train  # heavy, and not needed for --help and --cfg

        record.objective = train(taken_up(config), trial_of_job(config.sweep))
        return record.objective


if __name__ == "__main__":
    run_program(main, "train")
