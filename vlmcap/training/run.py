"""A whole training run and a whole evaluation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.clips import load_splits, open_ledger
from vlmcap.assembly.data import build_data
from vlmcap.assembly.features import prepare_features, warn_of_clips
from vlmcap.assembly.model import assemble, describe_model
from vlmcap.assembly.parts import device_of
from vlmcap.compose import to_plain, write_yaml
from vlmcap.config import Config, Split
from vlmcap.demo.prepare import prepare
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.libraries import import_libraries, quiet_libraries
from vlmcap.planning.activation_budget import num_kept_layers
from vlmcap.planning.make import enforce_plan
from vlmcap.training.checkpoints.load import load_weights, read_checkpoint
from vlmcap.training.checkpoints.trained import assemble_trained
from vlmcap.training.checks import check_engine, check_facts, check_objective, check_stages
from vlmcap.training.console import show_end
from vlmcap.training.fitting import fit
from vlmcap.training.objects import Run, build_run
from vlmcap.training.processes import as_process, check_launch, is_hollow, is_main, process_rank, single_process
from vlmcap.training.resume import check_folder, find_resume
from vlmcap.training.strategy import check_strategy
from vlmcap.training.summary import plain_scores, release_memory, summarize, tokenizer_version

if TYPE_CHECKING:
    from vlmcap.training.callbacks.stopping import Trial

NEEDED = (Split.train, Split.val)  # splits of a training run
OPTIONAL = (Split.test,)


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

    from vlmcap.training.callbacks.saving import best_checkpoint
    from vlmcap.training.loggers.make import end_loggers

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
    if is_main(config):
        warn_of_clips(config, clips)
    spec = describe_model(config)
    # Features are encoded before the language model is loaded, so the two never share the memory.
    features = prepare_features(spec.feature_plan, clips)
    assembly = assemble(spec, features, is_fresh=resumed is None, num_kept_layers=num_kept_layers(config), is_meta=is_hollow(config))
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
