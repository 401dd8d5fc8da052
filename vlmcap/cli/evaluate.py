"""`vlmcap evaluate`, the same as `evaluate.py`: scores a checkpoint on a split."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vlmcap import __version__
from vlmcap.compose import name_components, read_yaml
from vlmcap.config_files import config_dir
from vlmcap.config_saved import with_overrides
from vlmcap.errors import UserError
from vlmcap.program import report_user_errors


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="evaluate")
def main(node: DictConfig) -> float:
    """Scores a checkpoint with its own configuration and the given overrides; returns CIDEr, or NaN without it."""
    with report_user_errors():
        if node.checkpoint is None:
            raise UserError("checkpoint has no value; set it on the command line: checkpoint=…/checkpoints/best.ckpt")
        from vlmcap.reporting.report.run_page import leave_page
        from vlmcap.training.callbacks.progress import show_scores
        from vlmcap.training.checkpoints.load import read_checkpoint  # heavy; --help and --cfg do not need it
        from vlmcap.training.run import evaluate
        from vlmcap.training.summary import tokenizer_version

        checkpoint = Path(node.checkpoint)
        saved = read_checkpoint(checkpoint)["vlmcap"]["config"]
        name_components(node, HydraConfig.get())
        # The saved configuration, changed only by what was given on the command line.
        config = with_overrides(saved, node, HydraConfig.get().overrides.task)
        scores = evaluate(config, checkpoint)
        show_scores(scores, tokenizer_version(config))
        print(f"metrics.json and predictions.jsonl: {config.paths.output_dir}")
        leave_page(Path(config.paths.output_dir), read_yaml, version=__version__)
        return scores.get(f"{config.data.split.value}/cider", float("nan"))
