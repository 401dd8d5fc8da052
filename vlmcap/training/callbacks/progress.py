"""Console output of a run: tables of components and scores, the progress bar, and a line per epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console
from rich.table import Table

from vlmcap.metrics import METRIC_LABELS
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.terminal import LineClock, WorkLines
from vlmcap.training.module import CaptioningModule


def component_counts(
    captioner: VideoCaptioner, trained: Mapping[str, Mapping[str, object]], num_encoder_parameters: int
) -> dict[str, dict[str, int]]:
    """Counts all and trained parameters of each component; quantised weights count with their original size.

    Args:
        captioner: The model; its encoder is None if features are cached.
        trained: Trained parameters by name, for each component.
        num_encoder_parameters: Number of parameters of the encoder.
    """
    names = {name for parameters in trained.values() for name in parameters}
    components: dict[str, dict[str, int]] = {}
    # With stored features the encoder is not in the model, but the table still names it.
    if captioner.encoder is None:
        components["encoder"] = {"parameters": num_encoder_parameters, "trained": 0}
    for name, parameter in captioner.named_parameters():
        # "llm.base_model.model.…lora_A.default.weight" -> "adapters", "projector.0.weight" -> "projector"
        component = "adapters" if "lora_" in name else name.split(".")[0]
        # bitsandbytes packs two 4-bit weights into a byte and keeps the original shape.
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        entry = components.setdefault(component, {"parameters": 0, "trained": 0})
        entry["parameters"] += count
        entry["trained"] += count if name in names else 0
    return components


def show_components(
    components: Mapping[str, Mapping[str, int]], *, num_visual_tokens: int, title: str, notes: Mapping[str, str]
) -> None:
    """Prints a table of the components with their parameters, trained or frozen.

    Args:
        components: Result of `component_counts`.
        num_visual_tokens: Visual tokens per clip.
        title: Title of the table.
        notes: Settings that are listed below the table, name to value.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("component", "parameters", "trained", ""):
        table.add_column(column, justify="right" if column in ("parameters", "trained") else "left")
    for name, entry in components.items():
        trained = f"{entry['trained']:,}" if entry["trained"] else "-"
        table.add_row(name, f"{entry['parameters']:,}", trained, "trained" if entry["trained"] else "frozen")
    table.caption = f"{num_visual_tokens} visual tokens per clip" + "".join(
        f" · {key} {value}" for key, value in notes.items()
    )
    table.caption_justify = "left"
    Console().print(table)


def show_scores(scores: Mapping[str, float], tokenizer: str) -> None:
    """Prints the final scores of each split, with scores of swapped videos and by category if there are some.

    Args:
        scores: Scores, named `split/score`.
        tokenizer: Name and version of the tokeniser, without which Korean scores cannot be compared.
    """
    # Names are "<split>/<score>"; `dict.fromkeys` keeps the order of the splits.
    for split in dict.fromkeys(name.split("/")[0] for name in scores):
        shown = {
            name.removeprefix(f"{split}/"): value for name, value in scores.items() if name.startswith(f"{split}/")
        }
        table = Table(title=f"{split} split, tokens by {tokenizer}", title_justify="left", title_style="bold")
        is_swapped = any(name.startswith("swapped/") for name in shown)
        for column in ("score", "value", *(("videos swapped", "expected by chance") if is_swapped else ())):
            table.add_column(column, justify="left" if column == "score" else "right")
        for name, value in shown.items():
            # These groups have columns or tables of their own.
            if name.startswith(("swapped/", "permuted/", "category/", "visual_reliance/")):
                continue
            others = [shown.get(f"{kind}/{name}") for kind in ("swapped", "permuted")] if is_swapped else []
            table.add_row(
                score_label(name), f"{value:.3f}", *("" if other is None else f"{other:.3f}" for other in others)
            )
        Console().print(table)
        _show_categories(split, shown)
        _show_visual_reliance(split, shown)


def score_label(name: str) -> str:
    """Returns the display name of a score."""
    # "facts/object" -> "facts", "object"
    kind, _, rest = name.partition("/")
    words = rest.replace("_", " ")
    groups = {
        "facts": f"fact: {rest}",
        "content": f"content words: {words}",
        "siglip": f"SigLIP, no reference: {words}",
    }
    groups["bertscore"] = f"BERTScore: {words}"
    return METRIC_LABELS.get(name) or groups.get(kind, name)


def _show_categories(split: str, scores: Mapping[str, float]) -> None:
    rows: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        if name.startswith("category/"):
            # "category/<category>/<metric>"; a category may contain a slash, a metric never does.
            category, _, metric = name.removeprefix("category/").rpartition("/")
            rows.setdefault(category, {})[metric] = value
    if not rows:
        return
    table = Table(title=f"{split} split by category", title_justify="left", title_style="bold")
    metrics = list(next(iter(rows.values())))
    for column in ("category", *(METRIC_LABELS.get(metric, metric) for metric in metrics)):
        table.add_column(column, justify="left" if column == "category" else "right")
    # Largest category first.
    for category, row in sorted(rows.items(), key=lambda item: -item[1].get("clips", 0)):
        table.add_row(
            category, *(f"{row[metric]:.0f}" if metric == "clips" else f"{row[metric]:.3f}" for metric in metrics)
        )
    Console().print(table)


def _show_visual_reliance(split: str, scores: Mapping[str, float]) -> None:
    """Prints a table with one row per score and one column per video."""
    names = [name.removeprefix("visual_reliance/own/") for name in scores if name.startswith("visual_reliance/own/")]
    if not names:
        return
    table = Table(title=f"{split} split, visual reliance", title_justify="left", title_style="bold")
    for column in ("score", "own video", "another clip's", "black"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name in names:
        values = (scores[f"visual_reliance/{video}/{name}"] for video in ("own", "swapped", "blanked"))
        table.add_row(
            "loss of the labels" if name == "loss" else score_label(name), *(f"{value:.3f}" for value in values)
        )
    Console().print(table)


def print_line(trainer: L.Trainer, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if trainer.progress_bar_callback is None:
        print(text, flush=True)
    else:
        Tqdm.write(text)


_SHOWN = {"val/loss": "val loss", "val/cider": "val CIDEr", "val/facts/mean": "facts", "val/distinct_ratio": "distinct"}


class RunProgress(L.Callback):
    """Logs loss, speed and learning rates every few steps, and prints a line per epoch.

    Without a progress bar, it also prints lines within an epoch. The metrics are logged with `log_dict`, so that any
    callback finds them in `trainer.callback_metrics`. The loggers are called directly, as by Lightning's
    `LearningRateMonitor`: Lightning itself would count steps from 0, leave out the last step of an epoch unless it is a
    multiple of `log_every_n_steps`, and round to float32.

    Args:
        log_every_n_steps: Optimiser steps between log lines.
        max_steps: Step at which the run stops, or -1 for the end of the last epoch; used for the time left.
        clock: Clock in seconds that decides when lines within an epoch are printed.
    """

    def __init__(
        self, log_every_n_steps: int, max_steps: int = -1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.log_every_n_steps, self.max_steps = log_every_n_steps, max_steps
        self._clock, self._schedule = clock, LineClock(clock)
        self._batches = WorkLines("", clock)  # progress of the validation or test loop
        self._logged_step = -1
        self._started = 0.0
        self._first_step = 0
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock of the run."""
        self._schedule = LineClock(self._clock)
        self._started = time.perf_counter()
        self._first_step = trainer.global_step
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs every few optimiser steps and after the last step of an epoch."""
        assert isinstance(pl_module, CaptioningModule)
        # Lines go by the clock, log entries by optimiser steps.
        self._print_if_due(trainer, lambda: self._step_line(trainer, pl_module))
        step = trainer.global_step
        # The last step of an epoch is logged too, so that its validation has the loss of the same step beside it.
        is_due = step % self.log_every_n_steps == 0 or batch_idx + 1 >= trainer.num_training_batches
        # With gradient accumulation, several micro-batches end at the same step.
        if step == self._logged_step or not is_due:
            return
        self._logged_step = step
        self._last = pl_module.take_log()
        # Directly, and not by `log_dict`; see the docstring of the class.
        for logger in trainer.loggers:
            logger.log_metrics(self._last | {"epoch": trainer.current_epoch}, step=step)
        pl_module.log_dict(self._last, logger=False)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints the progress of validation from time to time."""
        self._report(trainer, "validation", batch_idx, trainer.num_val_batches[0])

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._schedule = LineClock(self._clock)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints the progress of captioning a split from time to time."""
        self._report(trainer, "captioning", batch_idx, trainer.num_test_batches[dataloader_idx])

    def _report(self, trainer: L.Trainer, label: str, batch_idx: int, total: int | float) -> None:
        if batch_idx == 0:
            self._batches = WorkLines(f"{label}, batches", self._clock)
        self._batches.report(batch_idx + 1, int(total))
        self._print_if_due(trainer, self._batches.text)

    def _print_if_due(self, trainer: L.Trainer, line: Callable[[], str]) -> None:
        if trainer.progress_bar_callback is None and trainer.is_global_zero and self._schedule.is_due():
            print_line(trainer, line())

    def _step_line(self, trainer: L.Trainer, pl_module: CaptioningModule) -> str:
        """Returns stage, epoch, step, metrics and time left; before the first log step, the metrics so far."""
        position = pl_module.plan.at_epoch(trainer.current_epoch)
        # Epochs are counted within their stage: "tune 2/3".
        number = trainer.current_epoch - position.first_epoch + 1
        items = [f"{name} {value}" for name, value in _shown_items(self._last or pl_module.read_log()).items()]
        step = f"step {trainer.global_step} of {self._last_step(trainer)}"
        return "  ".join([f"{position.name} {number}/{position.stage.epochs}", step, *items, self._time_left(trainer)])

    def bar_items(self) -> dict[str, str]:
        """Returns the last metrics in the form that a progress bar shows."""
        return _shown_items(self._last)

    def seconds_left(self, trainer: L.Trainer) -> float:
        """Estimates the seconds to the end of the run from the steps so far."""
        # Steps before a resume do not count, as this process has not timed them.
        done, left = trainer.global_step - self._first_step, self._last_step(trainer) - trainer.global_step
        return (time.perf_counter() - self._started) / max(1, done) * max(0, left)

    def _last_step(self, trainer: L.Trainer) -> int:
        assert isinstance(trainer.lightning_module, CaptioningModule)
        last = trainer.global_step + trainer.lightning_module.rates.steps_left
        return min(last, self.max_steps) if self.max_steps >= 0 else last

    def _time_left(self, trainer: L.Trainer) -> str:
        left = self.seconds_left(trainer)
        # Minutes above 90 s, seconds below.
        return "done" if left < 0.5 else f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the line of the epoch."""
        assert isinstance(pl_module, CaptioningModule)
        if not trainer.is_global_zero:
            return
        position = pl_module.plan.at_epoch(trainer.current_epoch)
        number = trainer.current_epoch - position.first_epoch + 1
        # Without a validation in this epoch, the metrics are those of an earlier one.
        is_scored = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        scores = trainer.callback_metrics if is_scored else {}
        items = [
            f"{position.name} {number}/{position.stage.epochs}",
            f"loss {self._last['train/loss']:.3f}" if self._last else "loss –",
        ]
        for name, label in _SHOWN.items():
            if name in scores:
                items.append(f"{label} {float(scores[name]):.3f}")
        if self._last:
            items.append(f"{self._last['train/tokens_per_s']:,.0f} tok/s")
        items.append(self._time_left(trainer))
        print_line(trainer, "  ".join(items))
        self._schedule.postpone()


def _shown_items(metrics: Mapping[str, float]) -> dict[str, str]:
    """Formats loss, highest learning rate and speed for the progress bar and for lines."""
    if not metrics:
        return {}
    # The highest rate stands for all components; every component has its own in the loggers.
    rate = max(value for name, value in metrics.items() if name.startswith("train/lr_"))
    loss, speed = metrics["train/loss"], metrics["train/tokens_per_s"]
    return {"loss": f"{loss:.3f}", "lr": f"{rate:.3g}", "tok/s": f"{speed:,.0f}"}


class TerminalBar(TQDMProgressBar):
    """Lightning's progress bar with loss, highest learning rate, speed, and the time left in the run.

    Args:
        progress: Callback that provides these values.
    """

    def __init__(self, progress: RunProgress) -> None:
        super().__init__(leave=False)
        self.progress = progress

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Returns Lightning's items without the version, the metrics of the last log step, and the minutes left."""
        items = super().get_metrics(trainer, pl_module)
        # Lightning shows the version of its loggers, which says nothing here.
        items.pop("v_num", None)
        if trainer.training:
            items |= self.progress.bar_items()
            items["left"] = f"{self.progress.seconds_left(trainer) / 60:.1f} min"
        return items
