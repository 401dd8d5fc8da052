"""Builds the objects of a run: module, data, trainer and callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.clips import open_skipped_log
from vlmcap.assembly.data import build_data
from vlmcap.assembly.model import Assembly
from vlmcap.compose import to_plain, write_yaml
from vlmcap.config import Config, Precision, WandbConfig
from vlmcap.terminal import draws_bars
from vlmcap.training.checkpoints.load import checkpoint_identity
from vlmcap.training.checks import extra_callbacks
from vlmcap.training.processes import is_main, make_sharder, make_strategy, process_rank

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger

    from vlmcap.data.loading.datamodule import CaptionDataModule
    from vlmcap.data.skipped_clips import SkippedClipLog
    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.training.callbacks.evaluation import CaptionEvaluation
    from vlmcap.training.callbacks.stopping import Trial
    from vlmcap.training.module import CaptioningModule
    from vlmcap.training.profiling.callback import StepProfile
    from vlmcap.training.schedule import StagePlan
    from vlmcap.types import Clip


@dataclass(frozen=True, slots=True)
class Run:
    """The objects of a run.

    Attributes:
        module: Model, loss and optimiser.
        data: Loaders of the run's clips.
        trainer: Lightning trainer with all callbacks and loggers.
        evaluation: Callback that scores captions; it holds the latest scores and predictions.
        folder: Run folder.
    """

    module: CaptioningModule
    data: CaptionDataModule
    trainer: L.Trainer
    evaluation: CaptionEvaluation
    folder: Path


def build_run(
    config: Config,
    assembly: Assembly,
    clips: Mapping[str, Sequence[Clip]],
    folder: Path,
    step: int | None = None,
    trial: Trial | None = None,
    *,
    is_training: bool = True,
) -> Run:
    """Builds module, data, trainer and callbacks around an assembled model.

    Args:
        config: Run configuration; a training run writes it into the folder.
        assembly: The assembled model.
        clips: Clips of each split.
        folder: Run folder.
        step: Step of the checkpoint that the run resumes from; later lines of `metrics.jsonl` are dropped.
        trial: Trial of a hyperparameter search.
        is_training: Whether the run trains; an evaluation has neither checkpoints nor training callbacks.
    """
    import lightning as L

    from vlmcap.training.callbacks.evaluation import CaptionEvaluation
    from vlmcap.training.callbacks.scorer import CaptionScorer
    from vlmcap.training.loggers.make import make_evaluation_loggers, make_loggers
    from vlmcap.training.profiling.callback import step_profile
    from vlmcap.training.schedule import StagePlan

    # 1. Build the loaders, and seed what training draws.
    data = build_data(config, assembly, clips)
    if is_training:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main(config):
            write_yaml(to_plain(config), folder / "config.yaml")
        # The random state does not depend on what was cached before, and each rank draws its own dropout.
        L.seed_everything(config.seed + process_rank(config), verbose=False)
    # 2. Build the module, and the callbacks that training and evaluation share.
    plan = StagePlan(config.tuning.stages)
    identity, skipped_log = checkpoint_identity(config, assembly.base_checkpoints), open_skipped_log(config, data.clips)
    module = make_module(config, assembly.captioner, plan, identity, skipped_log)
    evaluation = CaptionEvaluation(CaptionScorer(config.evaluation), data.clips, folder / "predictions", config.monitor)
    callbacks = _common_callbacks(config, data, evaluation, folder, trial)
    if not is_training:
        loggers = make_evaluation_loggers(config, to_plain(config), folder)
        return Run(module, data, make_trainer(config, plan, folder, callbacks, loggers), evaluation, folder)
    # 3. Add what only training needs.
    profile = step_profile(config, data, folder)
    callbacks += _training_callbacks(config, plan, profile, folder)
    loggers = make_loggers(config, to_plain(config), folder, step)
    trainer = make_trainer(
        config,
        plan,
        folder,
        callbacks,
        loggers,
        enable_checkpointing=True,
        profiler=profile.profiler if profile else None,
    )
    return Run(module, data, trainer, evaluation, folder)


def make_module(
    config: Config, captioner: VideoCaptioner, plan: StagePlan, identity: Mapping[str, Any], skipped_log: SkippedClipLog
) -> CaptioningModule:
    """Builds the Lightning module of a run or of a measurement.

    Args:
        config: Run configuration.
        captioner: The assembled model.
        plan: Training stages and their learning rates.
        identity: Plain data that is saved in every checkpoint.
        skipped_log: Log of the clips that cannot be used.
    """
    from vlmcap.training.module import CaptioningModule

    # A caption has at most `caption_tokens` label tokens; a packed batch cannot have more labels than tokens.
    max_label_tokens = config.data.max_tokens_per_batch or config.data.batch_size * config.llm.caption_tokens
    return CaptioningModule(
        captioner,
        plan,
        config.optim,
        identity=identity,
        skipped_log=skipped_log,
        max_label_tokens=max_label_tokens,
        sharder=make_sharder(config),
    )


def make_trainer(
    config: Config, plan: StagePlan, folder: Path, callbacks: list[L.Callback], loggers: list[Logger], **settings: Any
) -> L.Trainer:
    """Builds the Lightning trainer of a run or of a measurement.

    Args:
        config: Run configuration.
        plan: Training stages, which decide the number of epochs.
        folder: Run folder.
        callbacks: All callbacks, in the order in which Lightning calls them.
        loggers: Loggers of the run.
        **settings: Further arguments of `L.Trainer`; they take precedence.
    """
    import lightning as L

    from vlmcap.training.callbacks.saving import AtomicCheckpointIO

    return L.Trainer(
        accelerator=config.hardware.accelerator,
        devices=config.hardware.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=make_strategy(config),
        precision=config.hardware.precision.value,
        max_epochs=plan.num_epochs,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.optim.max_grad_norm,
        log_every_n_steps=config.trainer.log_every_n_steps,
        num_sanity_val_steps=0,  # a validation generates captions, which takes minutes with a large model
        logger=loggers or False,
        # The order of callbacks is that of their calls, except that Lightning moves checkpoint callbacks to the end.
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=_shows_bar(config),
        enable_model_summary=False,  # the start table has the components instead
        use_distributed_sampler=False,  # Lightning's sampler would repeat clips in evaluation; ours never does
        default_root_dir=folder,
        # Measurements save nothing; `build_run` sets True for a training run, with its own checkpoint callbacks.
        **{"enable_checkpointing": False, "check_val_every_n_epoch": config.evaluation.every_n_epochs, **settings},
    )


def _shows_bar(config: Config) -> bool:
    return config.trainer.progress_bar and draws_bars()


def _common_callbacks(
    config: Config, data: CaptionDataModule, evaluation: CaptionEvaluation, folder: Path, trial: Trial | None
) -> list[L.Callback]:
    """Returns the callbacks of training and evaluation; those that read scores come after `CaptionEvaluation`."""
    from vlmcap.training.callbacks.progress import RunProgress, TerminalBar
    from vlmcap.training.callbacks.stopping import TrialPruning
    from vlmcap.training.callbacks.visual_reliance import visual_reliance_check
    from vlmcap.training.loggers.tables import WandbTable

    callbacks: list[L.Callback] = [evaluation]
    if visual_reliance := visual_reliance_check(config, data, evaluation, folder):
        callbacks.append(visual_reliance)
    if trial is not None:
        callbacks.append(TrialPruning(config.monitor, trial))
    progress = RunProgress(config.trainer.log_every_n_steps, config.trainer.max_steps)
    callbacks += [WandbTable(evaluation, config.logger)] if isinstance(config.logger, WandbConfig) else []
    callbacks.append(progress)
    return [*callbacks, TerminalBar(progress)] if _shows_bar(config) else callbacks


def _training_callbacks(config: Config, plan: StagePlan, profile: StepProfile | None, folder: Path) -> list[L.Callback]:
    """Returns the callbacks of training alone.

    `StopOnSignal` comes after all callbacks that must have seen a step; Lightning calls checkpoint callbacks last.
    """
    from vlmcap.training.callbacks.guard import DivergenceGuard
    from vlmcap.training.callbacks.requeue import StopOnSignal
    from vlmcap.training.callbacks.saving import StepLimit, checkpoint_callbacks
    from vlmcap.training.callbacks.stopping import PatientStop

    early, guard = config.callbacks.early_stopping, config.callbacks.guard
    callbacks: list[L.Callback] = [profile] if profile else []
    callbacks += [*extra_callbacks(config), StepLimit(config.trainer.max_steps)]
    if early.enabled:
        monitor, mode = config.monitor, config.monitor_mode
        callbacks.append(
            PatientStop(plan, monitor=monitor, mode=mode, patience=early.patience, min_delta=early.min_delta)
        )
    if guard.enabled:
        callbacks.append(DivergenceGuard(guard, folder, is_scaled=config.hardware.precision is Precision.fp16))
    callbacks.append(StopOnSignal(folder, is_requeued=config.trainer.requeue))
    return [*callbacks, *checkpoint_callbacks(folder, config)]
