"""What a run shows: tables of parts and of results, a bar, a line an epoch."""

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


def part_counts(
    captioner: VideoCaptioner, trained: Mapping[str, Mapping[str, object]], num_encoder_parameters: int
) -> dict[str, dict[str, int]]:
    """Parameters of each part in all and trained, quantised weights counted by what they stand for.

    Args:
        captioner: The model, its encoder perhaps dropped.
        trained: Part to trained parameters by name.
        num_encoder_parameters: Of the encoder.
    """
    names = {name for parameters in trained.values() for name in parameters}
    parts: dict[str, dict[str, int]] = {}
    if captioner.encoder is None:
        parts["encoder"] = {"parameters": num_encoder_parameters, "trained": 0}
    for name, parameter in captioner.named_parameters():
        part = "adapters" if "lora_" in name else name.split(".")[0]
        # bitsandbytes packs two 4-bit weights into a byte and remembers the shape.
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        entry = parts.setdefault(part, {"parameters": 0, "trained": 0})
        entry["parameters"] += count
        entry["trained"] += count if name in names else 0
    return parts


def show_parts(
    parts: Mapping[str, Mapping[str, int]], *, num_visual_tokens: int, title: str, notes: Mapping[str, str]
) -> None:
    """Prints what is trained and what is frozen."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("part", "parameters", "trained", ""):
        table.add_column(column, justify="right" if column in ("parameters", "trained") else "left")
    for name, entry in parts.items():
        trained = f"{entry['trained']:,}" if entry["trained"] else "-"
        table.add_row(name, f"{entry['parameters']:,}", trained, "trained" if entry["trained"] else "frozen")
    table.caption = f"{num_visual_tokens} visual tokens a clip" + "".join(
        f" · {key} {value}" for key, value in notes.items()
    )
    table.caption_justify = "left"
    Console().print(table)


def show_scores(scores: Mapping[str, float], tokenizer: str) -> None:
    """Prints the final scores of each split, beside them those with swapped videos, and below them those by category, where there are some.

    Args:
        scores: Named `split/score`.
        tokenizer: Name and version; no Korean score means anything without.
    """
    for split in dict.fromkeys(name.split("/")[0] for name in scores):
        own = {name.removeprefix(f"{split}/"): value for name, value in scores.items() if name.startswith(f"{split}/")}
        table = Table(title=f"{split} split, tokens by {tokenizer}", title_justify="left", title_style="bold")
        is_swapped = any(name.startswith("swapped/") for name in own)
        for column in ("score", "value", *(("videos swapped", "expected of chance") if is_swapped else ())):
            table.add_column(column, justify="left" if column == "score" else "right")
        for name, value in own.items():
            if name.startswith(("swapped/", "permuted/", "category/", "visual_reliance/")):
                continue
            others = [own.get(f"{kind}/{name}") for kind in ("swapped", "permuted")] if is_swapped else []
            table.add_row(
                score_label(name), f"{value:.3f}", *("" if other is None else f"{other:.3f}" for other in others)
            )
        Console().print(table)
        _show_categories(split, own)
        _show_visual_reliance(split, own)


def score_label(name: str) -> str:
    """What a score is called where people read it."""
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
            category, _, metric = name.removeprefix("category/").rpartition("/")
            rows.setdefault(category, {})[metric] = value
    if not rows:
        return
    table = Table(title=f"{split} split by category", title_justify="left", title_style="bold")
    metrics = list(next(iter(rows.values())))
    for column in ("category", *(METRIC_LABELS.get(metric, metric) for metric in metrics)):
        table.add_column(column, justify="left" if column == "category" else "right")
    for category, row in sorted(rows.items(), key=lambda item: -item[1].get("clips", 0)):
        table.add_row(
            category, *(f"{row[metric]:.0f}" if metric == "clips" else f"{row[metric]:.3f}" for metric in metrics)
        )
    Console().print(table)


def _show_visual_reliance(split: str, scores: Mapping[str, float]) -> None:
    """A row a score, a column a video."""
    names = [name.removeprefix("visual_reliance/own/") for name in scores if name.startswith("visual_reliance/own/")]
    if not names:
        return
    table = Table(title=f"{split} split, does it look?", title_justify="left", title_style="bold")
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
    """Logs loss, speed and rates every few steps, and prints a line per epoch and, where there is no bar, now and then within it.

    The metrics are logged with `log_dict`, so that any callback finds them in `trainer.callback_metrics`. The rows of
    the loggers are written here, as Lightning's `LearningRateMonitor` writes its own: Lightning itself would count
    steps from 0, leave out the last step of an epoch unless it is a multiple of `log_every_n_steps`, and round to
    float32.

    Args:
        log_every_n_steps: Optimiser steps between log lines.
        max_steps: At which the run stops, for the time left; -1 for the end of the last epoch.
        clock: Seconds, by which lines within an epoch are printed where there is no bar.
    """

    def __init__(
        self, log_every_n_steps: int, max_steps: int = -1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.log_every_n_steps, self.max_steps = log_every_n_steps, max_steps
        self._clock, self._schedule = clock, LineClock(clock)
        self._batches = WorkLines("", clock)  # of the loop that captions or measures now
        self._logged_step = -1
        self._started = 0.0
        self._first_step = 0
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._schedule = LineClock(self._clock)
        self._started, self._first_step, self._logged_step = (
            time.perf_counter(),
            trainer.global_step,
            trainer.global_step,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs after every few optimiser steps and after the last of an epoch."""
        assert isinstance(pl_module, CaptioningModule)
        self._print_if_due(trainer, lambda: self._step_line(trainer, pl_module))
        step = trainer.global_step
        is_due = step % self.log_every_n_steps == 0 or batch_idx + 1 >= trainer.num_training_batches
        if step == self._logged_step or not is_due:
            return
        self._logged_step = step
        self._last = pl_module.take_log()
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
        """Prints how far validation is, now and then."""
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
        """Prints how far the captions of a split are, now and then."""
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
        """Stage and epoch, optimiser step, the metrics of the last log step or, before the first one, those so far, and the time left."""
        position = pl_module.plan.at_epoch(trainer.current_epoch)
        number = trainer.current_epoch - position.first_epoch + 1
        items = [f"{name} {value}" for name, value in _shown_items(self._last or pl_module.read_log()).items()]
        step = f"step {trainer.global_step} of {self._last_step(trainer)}"
        return "  ".join([f"{position.name} {number}/{position.stage.epochs}", step, *items, self._time_left(trainer)])

    def bar_items(self) -> dict[str, str]:
        """What a bar shows of the last metrics."""
        return _shown_items(self._last)

    def seconds_left(self, trainer: L.Trainer) -> float:
        """Expected seconds to the end, from the steps so far."""
        done, left = trainer.global_step - self._first_step, self._last_step(trainer) - trainer.global_step
        return (time.perf_counter() - self._started) / max(1, done) * max(0, left)

    def _last_step(self, trainer: L.Trainer) -> int:
        assert isinstance(trainer.lightning_module, CaptioningModule)
        last = trainer.global_step + trainer.lightning_module.rates.steps_left
        return min(last, self.max_steps) if self.max_steps >= 0 else last

    def _time_left(self, trainer: L.Trainer) -> str:
        left = self.seconds_left(trainer)
        return "done" if left < 0.5 else f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the epoch's line."""
        assert isinstance(pl_module, CaptioningModule)
        if not trainer.is_global_zero:
            return
        position = pl_module.plan.at_epoch(trainer.current_epoch)
        number = trainer.current_epoch - position.first_epoch + 1
        is_scored = (trainer.current_epoch + 1) % (
            trainer.check_val_every_n_epoch or 1
        ) == 0  # otherwise the metrics are of an earlier epoch
        scores = trainer.callback_metrics if is_scored else {}
        parts = [
            f"{position.name} {number}/{position.stage.epochs}",
            f"loss {self._last['train/loss']:.3f}" if self._last else "loss –",
        ]
        for name, label in _SHOWN.items():
            if name in scores:
                parts.append(f"{label} {float(scores[name]):.3f}")
        if self._last:
            parts.append(f"{self._last['train/tokens_per_s']:,.0f} tok/s")
        parts.append(self._time_left(trainer))
        print_line(trainer, "  ".join(parts))
        self._schedule.postpone()


def _shown_items(metrics: Mapping[str, float]) -> dict[str, str]:
    """Loss, highest rate and speed as a bar and a line show them."""
    if not metrics:
        return {}
    rate = max(value for name, value in metrics.items() if name.startswith("train/lr_"))
    loss, speed = metrics["train/loss"], metrics["train/tokens_per_s"]
    return {"loss": f"{loss:.3f}", "lr": f"{rate:.3g}", "tok/s": f"{speed:,.0f}"}


class TerminalBar(TQDMProgressBar):
    """Lightning's bar with the loss, the highest rate, the speed, and the time left to the end of the run.

    Args:
        progress: Knows all of them.
    """

    def __init__(self, progress: RunProgress) -> None:
        super().__init__(leave=False)
        self.progress = progress

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Lightning's numbers without the version, the metrics of the last log step, and the minutes left."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if trainer.training:
            items |= self.progress.bar_items()
            items["left"] = f"{self.progress.seconds_left(trainer) / 60:.1f} min"
        return items
