"""Runs one way of step.py or scaling.py in a separate process.

It waits for a line before each step, and answers with a line of JSON.

    python benchmarks/train/ways.py SHAPE FOLDER save|trainer|uncached|cached STEPS

SHAPE is a name of parts.SHAPES or a JSON object of a shape's fields.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


class Turns:
    """The child's side of the turns; standard output is only for its answers."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to standard error
        self.is_first = True
        self.wall_s = self.cpu_s = 0.0

    def begin(self) -> None:
        """Waits for the parent's line."""
        if self.is_first:
            self.say({"peak_gib": peak_gib()})
            self.is_first = False
        sys.stdin.readline()
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, Any]:
        return {
            "wall_s": time.perf_counter() - self.wall_s,
            "cpu_s": time.process_time() - self.cpu_s,
            "peak_gib": peak_gib(),
        }

    def say(self, content: dict[str, Any]) -> None:
        self.answers.write(json.dumps(content) + "\n")
        self.answers.flush()


def peak_gib() -> float:
    """Returns the largest resident set of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def main() -> None:
    from parts import SHAPES, Shape, count_flops, save_model

    name, folder, way, steps = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    fields = json.loads(name) if name.startswith("{") else None
    shape = SHAPES[name] if fields is None else Shape(**fields | {"captions": tuple(fields["captions"])})
    if way == "save":
        save_model(shape, Path(folder))
        return
    turns = Turns()
    run = run_trainer if way == "trainer" else run_ours
    model, loss = run(Path(folder), shape, way, int(steps), turns)
    peak = peak_gib()  # before the counting, which is no part of it
    turns.say({"peak_gib": peak, "flops": count_flops(model, loss)})


def run_trainer(folder: Path, shape: Any, way: str, num_steps: int, turns: Turns) -> tuple[Any, Any]:
    """Runs the stock class under the Hugging Face Trainer."""
    from parts import ADAPTER_RATE, PROJECTOR_RATE, make_stock
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vlmcap.config import OptimConfig
    from vlmcap.training.optimizer import make_optimizer

    model, inputs = make_stock(folder, shape)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    by_part = {
        part: {n: p for n, p in trained.items() if ("lora_" in n) == (part == "adapter")}
        for part in ("projector", "adapter")
    }
    optimizer = make_optimizer(by_part, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = ADAPTER_RATE if group["component"] == "adapter" else PROJECTOR_RATE
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    losses: list[float] = []

    class Recording(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.say({"loss": losses[-1], **turns.stop()})

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=num_steps,
            per_device_train_batch_size=1,  # an item is a whole batch
            max_grad_norm=OptimConfig().max_grad_norm,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Recording(
            model,
            arguments,
            train_dataset=[inputs] * num_steps,  # type: ignore[arg-type]
            data_collator=lambda items: items[0],
            optimizers=(optimizer, scheduler),
            callbacks=[Watch()],
        ).train()
    return model, lambda: model(**inputs).loss


def run_ours(folder: Path, shape: Any, way: str, num_steps: int, turns: Turns) -> tuple[Any, Any]:
    """Runs this project's module under Lightning's Trainer, with the settings of train.py."""
    import lightning as L
    from parts import make_ours
    from torch.utils.data import DataLoader

    module, batch = make_ours(folder, shape, is_cached=way == "cached", num_steps=num_steps)

    class Watch(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            turns.begin()

        def on_train_batch_end(self, *args: Any) -> None:
            seconds = turns.stop()
            turns.say({"loss": module.take_log()["train/loss"], **seconds})

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=module.optim_config.max_grad_norm,
        logger=False,
        callbacks=[Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * num_steps, batch_size=None))  # type: ignore[arg-type]
    return module, lambda: module.captioner(batch)[0]


if __name__ == "__main__":
    main()
