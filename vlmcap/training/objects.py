"""The objects of a run: module, data, trainer and callbacks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.assembly.clips import open_ledger
from vlmcap.assembly.model import Assembly
from vlmcap.compose import to_plain
from vlmcap.config import Config
from vlmcap.training.callbacks.grounding import grounding_check
from vlmcap.training.checkpoints.load import checkpoint_identity
from vlmcap.training.profiling.callback import step_profile
from vlmcap.training.resume import stopping_callbacks
from vlmcap.training.strategy import make_sharder, make_strategy

if TYPE_CHECKING:
    import lightning as L

    from vlmcap.data.loading.datamodule import CaptionDataModule
    from vlmcap.training.callbacks.evaluation import CaptionEvaluation
    from vlmcap.training.callbacks.stopping import Trial
    from vlmcap.training.module import CaptioningModule


@dataclass(frozen=True, slots=True)
class Run:
    """The objects of a run."""

    module: CaptioningModule
    data: CaptionDataModule
    trainer: L.Trainer
    evaluation: CaptionEvaluation
    folder: Path


def build_run(
    config: Config,
    assembly: Assembly,
    data: CaptionDataModule,
    folder: Path,
    step: int | None,
    *,
    is_training: bool = True,
    trial: Trial | None = None,
) -> Run:
    """Module, trainer and callbacks around an assembled model."""
    import lightning as L

    from vlmcap.training.callbacks.evaluation import CaptionEvaluation
    from vlmcap.training.callbacks.progress import RunProgress, TerminalBar
    from vlmcap.training.callbacks.saving import AtomicCheckpointIO, StepLimit, checkpoint_callbacks
    from vlmcap.training.callbacks.scorer import CaptionScorer
    from vlmcap.training.callbacks.stopping import TrialPruning
    from vlmcap.training.loggers.make import make_evaluation_loggers, make_loggers
    from vlmcap.training.loggers.tables import WandbTable
    from vlmcap.training.module import CaptioningModule
    from vlmcap.training.schedule import StagePlan

    plan = StagePlan(config.tuning.stages)
    module = CaptioningModule(
        assembly.captioner,
        plan,
        config.optim,
        identity=checkpoint_identity(config, assembly.sources),
        ledger=open_ledger(config, data.clips),
        max_label_tokens=config.data.max_tokens_per_batch or config.data.batch_size * config.llm.max_caption_tokens,
        sharder=make_sharder(config),
    )
    followed = (config.data.monitor, config.callbacks.early_stopping.monitor)
    evaluation = CaptionEvaluation(CaptionScorer(config.evaluation), data.clips, folder / "predictions", followed)
    progress = RunProgress(config.trainer.log_every_n_steps, config.trainer.max_steps)
    grounding = grounding_check(config, data, evaluation, folder)
    scoring = [evaluation, *([grounding] if grounding else [])]
    if trial is not None:
        scoring.append(TrialPruning(config.objective, trial))
    callbacks: list[L.Callback] = [*scoring, WandbTable(evaluation, config.evaluation.num_table_rows, config.logger), progress]
    has_bar = config.trainer.progress_bar and sys.stderr.isatty()
    if has_bar:
        callbacks.append(TerminalBar(progress))
    profile = step_profile(config, data, folder) if is_training else None
    if is_training:
        callbacks += [*([profile] if profile else []), StepLimit(config.trainer.max_steps)]
        callbacks += [*stopping_callbacks(config, plan, folder), *checkpoint_callbacks(folder, config)]
    plain = to_plain(config)
    trainer = L.Trainer(
        accelerator=config.hardware.accelerator,
        devices=config.hardware.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=make_strategy(config),
        precision=config.hardware.precision.value,
        max_epochs=plan.num_epochs,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.optim.max_grad_norm,
        check_val_every_n_epoch=config.evaluation.every_n_epochs,
        num_sanity_val_steps=0,
        logger=make_loggers(config, plain, folder, step) if is_training else make_evaluation_loggers(config, plain, folder) or False,
        callbacks=callbacks,
        profiler=profile.profiler if profile else None,
        enable_checkpointing=is_training,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=has_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module's own sampler never repeats a clip in evaluation
        deterministic="warn" if config.trainer.deterministic else False,  # an operation without such a kernel is no reason to lose a run
        default_root_dir=folder,
    )
    return Run(module, data, trainer, evaluation, folder)
