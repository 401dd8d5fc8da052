"""A complete training run and a complete evaluation, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.assembly.clips import Splits, load_splits, open_skipped_log
from vlmcap.assembly.features import prepare_features, warn_about_clips
from vlmcap.assembly.model import assemble, describe_model
from vlmcap.assembly.resolving import resolve, resolve_from_data, with_model_kind
from vlmcap.compose import to_plain, write_yaml
from vlmcap.config import Config, Split
from vlmcap.demo.prepare import prepare
from vlmcap.demo.published import make_published
from vlmcap.determinism import deterministic_kernels
from vlmcap.errors import TrialPruned
from vlmcap.files import write_json
from vlmcap.libraries import import_libraries, silence_libraries
from vlmcap.planning.known_data import for_plan
from vlmcap.planning.make_plan import enforce_plan, num_kept_layers, with_caption_plan
from vlmcap.terminal import progress_reporter
from vlmcap.training.checkpoints.load import load_weights, read_checkpoint, single_process
from vlmcap.training.checkpoints.trained import assemble_trained
from vlmcap.training.checks import (
    check_facts,
    check_monitored_clips,
    check_resume_position,
    check_run,
    find_resume_checkpoint,
)
from vlmcap.training.fitting import fit, handling_signals, release_memory
from vlmcap.training.objects import Run, build_run
from vlmcap.training.processes import as_process, is_main, receives_weights, run_folder
from vlmcap.training.summary import plain_scores, planned_values, show_end, summarize, tokenizer_version

if TYPE_CHECKING:
    from vlmcap.assembly.model import Assembly
    from vlmcap.training.callbacks.stopping import Trial
    from vlmcap.types import Clip

REQUIRED_SPLITS = (Split.train, Split.val)
OPTIONAL_SPLITS = (Split.test,)


def train(config: Config, trial: Trial | None = None) -> float:
    """Trains, scores the best checkpoint on the full validation and test splits, and returns the objective.

    In a run with several processes, each process calls this function; only the first one writes and prints.

    Args:
        config: Run configuration.
        trial: Trial of a hyperparameter search; it receives the scores of every validation and may stop the run.

    Returns:
        The value of `config.monitor`, or NaN if the data yields none.

    Raises:
        InUseError: Another process writes to the run folder.
        UserError: The configuration or the data is wrong, memory ran out, or an operation has no deterministic
            kernel.
    """
    import_libraries(with_adapters=config.tuning.use_lora)
    with run_folder(config), as_process(config), deterministic_kernels(config.is_deterministic):
        return _train(config, trial)


def _train(config: Config, trial: Trial | None) -> float:
    import lightning as L

    from vlmcap.training.loggers.make import end_loggers

    started = time.perf_counter()
    silence_libraries()
    release_memory()  # a sweep runs several jobs in one process
    L.seed_everything(config.seed, verbose=False)
    folder = Path(config.paths.output_dir)

    # 1. Read the checkpoint that the run resumes from, if there is one.
    resumed, step = _find_resume_step(config)

    # 2. Check everything that needs no data and no weights, and make published weights and clips if they are chosen.
    check_run(config, resumed)
    make_published(config)
    config = with_model_kind(config)

    # 3. Plan the memory, and refuse a run that cannot fit. The data is read first if it decides the caption length.
    clips: Mapping[str, Sequence[Clip]] = {}
    if config.llm.is_length_open and not config.data.is_demo:
        clips = _read_splits(config)
    plan = enforce_plan(for_plan(config, clips)) if is_main(config) else None

    # 4. Load the clips (the demo renders its own), and resolve the settings that depend on them.
    config, clips = _load_clips(config, clips)
    config = resolve(config, clips)

    # 5. Encode features before the language model is loaded, so that the two never share memory.
    spec = describe_model(with_caption_plan(config))
    features = prepare_features(spec.feature_plan, clips)

    # 6. Assemble the model.
    with progress_reporter("loading the model") if is_main(config) else nullcontext():
        num_kept, is_meta = num_kept_layers(config), receives_weights(config)
        assembly = assemble(spec, features, is_fresh=resumed is None, num_kept_layers=num_kept, is_meta=is_meta)
    seconds = {"prepare": time.perf_counter() - started}

    # 7. Fit, with smaller micro-batches if memory runs out early and `trainer.shrink_on_oom` allows it.
    configured_batch_size = config.data.batch_size
    config, run = fit(config, assembly, clips, folder, resumed, step, trial)
    seconds["fit"] = time.perf_counter() - started - seconds["prepare"]

    # 8. Score the best checkpoint on full splits.
    scores = _score_best(config, run, assembly)
    seconds["total"] = time.perf_counter() - started

    # 9. Report.
    show_end(config, run, scores, seconds)
    if is_main(config):
        planned = planned_values(config, run, plan, run.trainer.global_step - (step or 0))
        summary = summarize(
            config, run, assembly, scores, seconds, plan=planned, configured_batch_size=configured_batch_size
        )
        write_json(folder / "summary.json", summary)
        end_loggers(run.trainer.loggers, config, folder, summary)
    return _monitored_value(config, scores)


def _find_resume_step(config: Config) -> tuple[Path | None, int | None]:
    """Returns the checkpoint that the run resumes from and its step, or None twice."""
    resumed = find_resume_checkpoint(config)
    if resumed is None:
        return None, None
    checkpoint = read_checkpoint(resumed)
    check_resume_position(checkpoint["vlmcap"], config)
    return resumed, int(checkpoint["global_step"])


def _score_best(config: Config, run: Run, assembly: Assembly) -> dict[str, float]:
    """Scores the best checkpoint, or the last state if there is none, on full splits.

    Scores of its validation that the final scoring does not repeat, such as the loss, are kept.
    """
    from vlmcap.training.callbacks.saving import run_checkpoints

    # 1. Load the best checkpoint. Scores of the training loop are of `evaluation.max_clips` clips at most.
    saved = run_checkpoints(run.trainer)
    scores = dict(run.evaluation.scores)
    if saved.best is not None:
        load_weights(assembly, read_checkpoint(saved.best_path), config)
        scores = dict(saved.best.scores)
    # 2. Caption the splits other than the first, which is the training split.
    with handling_signals(run):
        for split in list(run.data.clips)[1:]:
            scores |= test(run, Split[split])
        # 3. Tests measure no loss, so that a run which ended before its first validation has none yet.
        if config.monitor == "val/loss" and not math.isfinite(scores.get("val/loss", math.nan)):
            scores |= _validation_loss(run)
    return scores


def _validation_loss(run: Run) -> dict[str, float]:
    """Returns the loss of the validation clips for a run that ended before its first validation."""
    # Lightning attaches a data module only when it is given one, and the loaders need the rank.
    run.data.trainer = run.trainer
    labelled = run.data.val_dataloader(is_captioned=False)
    with run.data.watch.as_user_errors(), suppress(TrialPruned):  # training is over, so there is nothing to prune
        run.trainer.validate(run.module, dataloaders=labelled, verbose=False)
    return dict(run.evaluation.scores)


def _monitored_value(config: Config, scores: Mapping[str, float]) -> float:
    """Returns the monitored metric; a finished run without a value warns and returns NaN instead of failing."""
    value = scores.get(config.monitor, math.nan)
    if not math.isfinite(value):
        names = ", ".join(sorted(name for name, score in scores.items() if math.isfinite(score)))
        print(
            f"Warning: monitor={config.monitor} has no value in this run; the metrics with a value are {names}.",
            flush=True,
        )
    return value


def _load_clips(config: Config, clips: Mapping[str, Sequence[Clip]]) -> tuple[Config, Mapping[str, Sequence[Clip]]]:
    """Prepares the demo if it is configured, and returns the configuration and the clips of each split.

    Args:
        config: Run configuration.
        clips: Clips that were read already; empty if none were.
    """
    if not config.data.is_demo:
        # The share of bad clips is checked before the demo is rendered or anything is loaded.
        clips = clips or _read_splits(config)
        open_skipped_log(config, clips)
    config = prepare(config)
    check_facts(config)
    # The demo's clips exist only after `prepare`.
    clips = clips or _read_splits(config)
    check_monitored_clips(config, clips)
    if is_main(config):
        warn_about_clips(config, clips)
    return config, clips


def _read_splits(config: Config) -> Splits:
    """Loads the splits of a training run; `trainer.overfit` validates on the training clips."""
    if not config.trainer.overfit:
        return load_splits(config, REQUIRED_SPLITS, OPTIONAL_SPLITS)
    read = load_splits(config, [Split.train])
    # The same table twice: the captions of the validation show what was memorised.
    return Splits({"train": read["train"], "val": read["train"]}, read.skipped, read.note)


def evaluate(config: Config, checkpoint: Path) -> dict[str, float]:
    """Scores a checkpoint on `config.data.split`, and writes `metrics.json` and `predictions.jsonl`.

    Args:
        config: Configuration of the checkpoint, with overrides.
        checkpoint: Checkpoint file of a run, or a folder that `vlmcap export` wrote.

    Returns:
        Scores by name, such as `test/cider`.

    Raises:
        UserError: The checkpoint, one of its base checkpoints or the data cannot be used.
    """
    import_libraries(with_adapters=config.tuning.use_lora)
    config = single_process(config)
    with run_folder(config):
        return _evaluate(config, checkpoint)


def _evaluate(config: Config, checkpoint: Path) -> dict[str, float]:
    import lightning as L

    from vlmcap.training.loggers.make import end_evaluation_loggers

    silence_libraries()
    L.seed_everything(config.seed, verbose=False)
    config = prepare(config)
    split, folder = config.data.split, Path(config.paths.output_dir)

    # 1. Load the clips, and assemble the model with the weights of the checkpoint.
    clips = load_splits(config, [split])
    config = resolve_from_data(config, clips)
    with progress_reporter("loading the model"):
        config, assembly = assemble_trained(config, checkpoint, clips)
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(to_plain(config), folder / "evaluation.yaml")

    # 2. Score.
    run = build_run(config, assembly, clips, folder, is_training=False)
    scores = test(run, split)

    # 3. Report.
    (folder / "predictions" / f"{split.value}.jsonl").replace(folder / "predictions.jsonl")
    # Only an empty folder is removed.
    if not any((folder / "predictions").iterdir()):  # the folder of a training run holds other predictions
        (folder / "predictions").rmdir()
    write_json(
        folder / "metrics.json",
        {"checkpoint": str(checkpoint), "tokenizer": tokenizer_version(config), **plain_scores(scores)},
    )
    end_evaluation_loggers(run.trainer.loggers, config, folder, checkpoint, scores)
    return scores


def test(run: Run, split: Split) -> dict[str, float]:
    """Captions a full split and returns its scores by name."""
    run.evaluation.split = split.value
    # As in `_validation_loss`.
    run.data.trainer = run.trainer
    with run.data.watch.as_user_errors():
        run.trainer.test(run.module, dataloaders=run.data.prompt_loader(split.value), verbose=False)
    return dict(run.evaluation.scores)
