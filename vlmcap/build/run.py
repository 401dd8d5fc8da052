"""A whole training run and a whole evaluation."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.build.checkpoints import checkpoint_identity, load_weights, read_checkpoint
from vlmcap.build.checks import check_engine, check_facts, check_objective, check_stages
from vlmcap.build.clips import load_splits, open_ledger
from vlmcap.build.data import build_data
from vlmcap.build.demo import prepare
from vlmcap.build.fitting import fit
from vlmcap.build.grounding import grounding_check
from vlmcap.build.model import Assembly, assemble
from vlmcap.build.parts import device_of
from vlmcap.build.plan import enforce_plan
from vlmcap.build.processes import as_process, check_launch, is_main, process_rank, single_process
from vlmcap.build.profile import step_profile
from vlmcap.build.quiet import import_libraries, quiet_libraries
from vlmcap.build.run_texts import show_end
from vlmcap.build.stopping import check_folder, find_resume, stopping_callbacks
from vlmcap.build.strategy import check_strategy, make_sharder, make_strategy
from vlmcap.build.summary import plain_scores, release_memory, summarize, tokenizer_version
from vlmcap.build.trained import assemble_trained
from vlmcap.compose import to_plain, write_yaml
from vlmcap.config import Config, Split
from vlmcap.errors import UserError
from vlmcap.files import replacing

if TYPE_CHECKING:
    import lightning as L

    from vlmcap.data.loading.datamodule import CaptionDataModule
    from vlmcap.training.evaluation import CaptionEvaluation
    from vlmcap.training.module import CaptioningModule
    from vlmcap.training.pruning import Trial

NEEDED = (Split.train, Split.val)  # splits of a training run
OPTIONAL = (Split.test,)


@dataclass(frozen=True, slots=True)
class Run:
    """The objects of a run."""

    module: CaptioningModule
    data: CaptionDataModule
    trainer: L.Trainer
    evaluation: CaptionEvaluation
    folder: Path


def train(config: Config, trial: Trial | None = None) -> float:
    """Trains, scores the best checkpoint on the whole validation and test splits, and returns the objective.

    Of several processes each calls this, and the first one writes and prints.

    Args:
        config: Of the run.
        trial: Of the search that the run is of; hears of every validation, and may end the run.

    Raises:
        UserError: Something in the configuration or the data does not do.
    """
    with as_process(config):
        return _train(config, trial)


def _train(config: Config, trial: Trial | None) -> float:
    import_libraries(with_adapters=config.tuning.use_lora)
    import lightning as L

    from vlmcap.training.loggers.make import end_loggers
    from vlmcap.training.saving import best_checkpoint

    started = time.perf_counter()
    quiet_libraries()
    release_memory()
    L.seed_everything(config.seed, verbose=False)
    folder = Path(config.paths.output_dir)
    resumed = find_resume(config)
    step = None if resumed is None else int(read_checkpoint(resumed)["global_step"])
    check_engine(config)
    check_stages(config)
    check_objective(config)
    if is_main(config):
        check_folder(config, resumed)
    device_of(config)  # a missing card is said before anything is made
    check_strategy(config)
    check_launch(config)
    if is_main(config):
        enforce_plan(config)
    clips = None if config.data.is_demo else load_splits(config, NEEDED, OPTIONAL)  # so is bad data
    if clips is not None:
        open_ledger(config, clips)
    config = prepare(config)
    check_facts(config)
    clips = clips or load_splits(config, NEEDED, OPTIONAL)
    assembly = assemble(config, clips, is_fresh=resumed is None)
    trained = time.perf_counter()

    def start(config: Config) -> Run:
        data = build_data(config, assembly, clips)
        folder.mkdir(parents=True, exist_ok=True)
        if is_main(config):
            write_yaml(to_plain(config), folder / "config.yaml")
        # Whatever was made or found in caches, training starts from the same state, and each process drops out other things.
        L.seed_everything(config.seed + process_rank(config), verbose=False)
        return build_run(config, assembly, data, folder, step, trial=trial)

    asked = config.data.batch_size
    config, run, parts = fit(config, assembly, start, resumed)
    seconds = {"prepare": trained - started, "fit": time.perf_counter() - trained}
    scores = dict(run.evaluation.scores)
    best = best_checkpoint(run.trainer)
    if best is not None and best.is_file():
        load_weights(assembly, read_checkpoint(best), config)
    for split in list(clips)[1:]:
        scores |= test(run, Split[split])
    seconds["total"] = time.perf_counter() - started
    show_end(config, run, scores, seconds)
    if is_main(config):
        summary = summarize(config, run, scores, seconds, parts) | {"shrunk_from": asked if asked != config.data.batch_size else None}
        write_json(folder / "summary.json", summary)
        end_loggers(run.trainer.loggers, config, folder, summary)
    if config.objective not in scores:
        raise UserError(f"objective={config.objective} was not measured; choose one of {', '.join(sorted(scores))}")
    return scores[config.objective]


def evaluate(config: Config, checkpoint: Path) -> dict[str, float]:
    """Scores a checkpoint on `config.data.split`, writing `metrics.json` and `predictions.jsonl` into the output folder."""
    import_libraries(with_adapters=config.tuning.use_lora)
    import lightning as L

    from vlmcap.training.loggers.make import end_evaluation_loggers

    quiet_libraries()
    L.seed_everything(config.seed, verbose=False)
    config = prepare(single_process(config))
    split = config.data.split
    clips = load_splits(config, [split])
    config, assembly = assemble_trained(config, checkpoint, clips)
    data = build_data(config, assembly, clips)
    folder = Path(config.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(to_plain(config), folder / "evaluation.yaml")
    run = build_run(config, assembly, data, folder, None, is_training=False)
    scores = test(run, split)
    (folder / "predictions" / f"{split.value}.jsonl").replace(folder / "predictions.jsonl")
    if not any((folder / "predictions").iterdir()):  # the output folder may be that of the training run
        (folder / "predictions").rmdir()
    write_json(folder / "metrics.json", {"checkpoint": str(checkpoint), "tokenizer": tokenizer_version(config), **plain_scores(scores)})
    end_evaluation_loggers(run.trainer.loggers, config, folder, checkpoint, scores)
    return scores


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

    from vlmcap.training.evaluation import CaptionEvaluation
    from vlmcap.training.loggers.make import make_evaluation_loggers, make_loggers
    from vlmcap.training.loggers.tables import WandbTable
    from vlmcap.training.module import CaptioningModule
    from vlmcap.training.progress import RunProgress, TerminalBar
    from vlmcap.training.pruning import TrialPruning
    from vlmcap.training.saving import AtomicCheckpointIO, StepLimit, checkpoint_callbacks
    from vlmcap.training.schedule import StagePlan
    from vlmcap.training.scorer import CaptionScorer

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
    evaluation = CaptionEvaluation(
        CaptionScorer(config.evaluation), folder / "predictions", (config.data.monitor, config.callbacks.early_stopping.monitor)
    )
    progress = RunProgress(config.trainer.log_every_n_steps, config.trainer.max_steps)
    grounding = grounding_check(config, data, evaluation, folder)
    scoring = [evaluation, *([grounding] if grounding else [])]
    if trial is not None:
        scoring.append(TrialPruning(evaluation, config.objective, trial))
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
        profiler=profile.actions if profile else None,
        enable_checkpointing=is_training,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=has_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module's own sampler never repeats a clip in evaluation
        deterministic="warn" if config.trainer.deterministic else False,  # an operation without such a kernel is no reason to lose a run
        default_root_dir=folder,
    )
    return Run(module, data, trainer, evaluation, folder)


def test(run: Run, split: Split) -> dict[str, float]:
    """Captions and scores of a whole split."""
    run.evaluation.split = split.value
    run.data.trainer = run.trainer
    with run.data.watch.naming_clips():
        run.trainer.test(run.module, dataloaders=run.data.prompt_loader(split.value), verbose=False)
    return dict(run.evaluation.scores)


def write_json(path: Path, values: Any) -> None:
    """A JSON file that appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
