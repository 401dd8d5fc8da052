"""The captioner as a LightningModule: its loss, the optimiser and its rates, and what a checkpoint holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from vlmcap.config import OptimConfig
from vlmcap.data.loading.batches import BatchSampler
from vlmcap.data.loading.datamodule import CaptionDataModule
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.training.callbacks.saving import reopen_epoch, settle_loop
from vlmcap.training.checkpoints.load import check_base_checkpoints, check_weights, trained_parameters
from vlmcap.training.optimizer import fit_saved_states, make_optimizer
from vlmcap.training.random_state import set_random_states, states_of_all
from vlmcap.training.schedule import StagePlan, StageRates, peak_rate
from vlmcap.types import Batch, ValidationBatch, select_rows


@dataclass(frozen=True, slots=True)
class Validated:
    """What validation finds in a batch.

    Attributes:
        captions: Of the prompts, in their order; empty where the loss alone was asked for.
        loss: Summed, in nats.
        num_labels: Tokens that the sum is over.
    """

    captions: list[str]
    loss: float
    num_labels: int


class CaptioningModule(L.LightningModule):
    """Trains a captioner stage by stage.

    Args:
        captioner: The assembled model, frozen where nothing is trained.
        plan: Stages and rates.
        optim: Kind and settings of the optimiser.
        identity: Plain data that goes into every checkpoint: the configuration and the fingerprints of the frozen
            bases.
        skipped_log: Of clips that could not be used.
        max_label_tokens: Most label tokens of one micro-batch; a constant that keeps loss sums small in half precision.
        sharder: Cuts the captioner into shards of all processes on a device; None leaves it whole.
    """

    def __init__(
        self,
        captioner: VideoCaptioner,
        plan: StagePlan,
        optim: OptimConfig,
        *,
        identity: Mapping[str, Any],
        skipped_log: SkippedClipLog,
        max_label_tokens: int,
        sharder: Callable[[nn.Module, DeviceMesh, torch.device], None] | None = None,
    ) -> None:
        super().__init__()
        self.captioner, self.plan, self.optim_config = captioner, plan, optim
        self.identity, self.skipped_log, self.loss_unit = dict(identity), skipped_log, float(max_label_tokens)
        self.strict_loading = False  # frozen weights are never in a checkpoint; `on_load_checkpoint` checks the rest
        self.trained = trained_parameters(captioner, plan)
        self.num_truncated = 0
        self.owes_validation = False  # a resumed run, whose last epoch was trained and not validated
        self._position: Mapping[str, int] = {"epoch": 0, "batches": 0}  # of the first batch of this process
        self.last_loss: tuple[float | Tensor, int] = (
            0.0,
            0,
        )  # of the last micro-batch: its sum, on the device, and its label tokens
        self.grad_norm: Tensor | None = None  # of the last step, before clipping, on the device
        self._step_rates: dict[
            str, float
        ] = {}  # of the last step, by part: the scheduler has moved on when they are logged
        self._sharder, self._is_sharded, self._earlier = sharder, False, cast("Batch | None", None)
        self._window_tokens = 0
        self._log_loss: float | Tensor = 0.0  # stays on the device until it is asked for
        self._log_labels, self._log_tokens, self._log_time = 0, 0, 0.0
        self.train()  # parts come in evaluation mode, and Lightning leaves modes alone; gradient checkpointing works in training mode only

    def configure_model(self) -> None:
        """Cuts the captioner into shards, once, where the strategy wants that."""
        if self._sharder is None or self._is_sharded:
            return
        self._is_sharded = True
        assert self.device_mesh is not None
        self._sharder(self.captioner, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)
        self.trained = trained_parameters(self.captioner, self.plan)

    def configure_optimizers(self) -> Any:
        """AdamW of the configured kind, and the scheduler of its rates, which steps with it."""
        optimizer = make_optimizer(self.trained, self.optim_config)
        rates = StageRates(optimizer, self.plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def train(self, mode: bool = True) -> CaptioningModule:
        """Training mode for what is trained; a frozen encoder keeps its evaluation mode."""
        super().train(mode)
        if self.captioner.encoder is not None and "encoder" not in self.trained:
            self.captioner.encoder.eval()
        return self

    def on_train_start(self) -> None:
        """Sets the rates of the first step, and the stage of a run that resumes inside an epoch, where no epoch starts."""
        epoch, batches = self._position["epoch"], self._position["batches"]
        self.rates.begin(epoch, -(-batches // self.trainer.accumulate_grad_batches), self.steps_per_epoch)
        if self.owes_validation:  # at the end of the epoch, which may have another number of batches now
            counts: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            counts.ready = counts.started = counts.processed = counts.completed = int(self.trainer.num_training_batches)
        self._set_stage()

    def on_validation_end(self) -> None:
        """Notes that nothing is owed."""
        self.owes_validation = False

    def on_train_epoch_start(self) -> None:
        """Sets the stage that the epoch belongs to."""
        self._set_stage()
        self.num_truncated = 0  # counted an epoch, as each epoch sees the same captions

    def _set_stage(self) -> None:
        """Thaws the parts that the stage trains, and freezes the others."""
        stage = self.plan.at_epoch(self.current_epoch).stage
        for part, parameters in self.trained.items():
            for parameter in parameters.values():
                parameter.requires_grad_(peak_rate(stage, part) > 0)
        self._log_time = time.perf_counter()

    @property
    def rates(self) -> StageRates:
        """The scheduler."""
        rates = self.lr_schedulers()
        assert isinstance(rates, StageRates)
        return rates

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return max(1, -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Summed loss over a constant.

        `on_before_optimizer_step` turns the sum of the window into a mean over its label tokens.
        """
        self._note(batch)
        self.num_truncated += batch.num_truncated
        self.last_loss = (0.0, 0)
        if len(batch) == 0:
            return self._zero()
        self._earlier = batch if self._is_sharded else None
        loss, num_labels = self.captioner(batch)
        self._window_tokens += num_labels
        self.last_loss = (loss.detach(), num_labels)
        self._log_loss = self._log_loss + loss.detach().double()
        self._log_labels += num_labels
        self._log_tokens += batch.num_tokens
        return loss / self.loss_unit

    def _zero(self) -> Tensor:
        """A zero with gradients, as other ranks and the scaler of half precision wait for them."""
        if not self._is_sharded:
            return torch.stack(
                [p.sum() * 0.0 for part in self.trained.values() for p in part.values() if p.requires_grad]
            ).sum()
        if (
            self._earlier is None
        ):  # the other ranks wait for this one's shards in every block, so it must compute something
            raise UserError(
                "no clip of the first batch of a process can be used, and trainer=fsdp2 needs one; see "
                "skipped_clips.jsonl"
            )
        return self.captioner(self._earlier)[0] * 0.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides gradients by the label tokens of the whole accumulated batch of all ranks, as one large batch would.

        Lightning divides each micro-batch by their number and averages over ranks, which would be a mean of means.
        """
        (tokens,) = self._sums(self._window_tokens)
        self._window_tokens = 0
        self._step_rates = {group["part"]: float(group["lr"]) for group in optimizer.param_groups}
        scale = self.loss_unit * self.trainer.accumulate_grad_batches * self.trainer.world_size / max(1.0, tokens)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, and keeps the norm, which it throws away."""
        limit = gradient_clip_val if gradient_clip_val else math.inf
        norm = nn.utils.clip_grad_norm_(self.trainer.precision_plugin.main_params(optimizer), limit)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards

    def rate_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, each with `part` and `lr`."""
        return self._adamw().param_groups

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> Any:
        """Captions of the clips, if they are asked for, and their loss, as `Validated`; each clip is encoded once."""
        self._note(batch)
        prompts = self.captioner.with_features(batch.prompts)
        captions = self.captioner.generate(prompts) if batch.is_captioned and len(prompts) else []
        losses, num_labels = [0.0], 0
        rows = {clip.id: row for row, clip in enumerate(prompts.clips)}
        for part in batch.labelled:
            if len(part):
                assert prompts.features is not None
                features = select_rows(prompts.features, [rows[clip.id] for clip in part.clips])
                loss, count = self.captioner(replace(part, features=features))
                losses.append(float(loss))
                num_labels += count
        return Validated(captions, sum(losses), num_labels)

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        """Captions of prompts."""
        self._note(batch)
        return self.captioner.generate(batch) if len(batch) else []

    def transfer_batch_to_device(
        self, batch: Batch | ValidationBatch, device: torch.device, dataloader_idx: int
    ) -> Batch | ValidationBatch:
        """Moves the tensors of a batch."""
        return batch.to(device)

    def take_log(self) -> dict[str, float]:
        """Loss (nats a label token), rates and speed of all ranks since the last call; every rank must ask for them."""
        values = self._log_values(*self._sums(float(self._log_loss), self._log_labels, self._log_tokens))
        self._log_loss, self._log_labels, self._log_tokens, self._log_time = 0.0, 0, 0, time.perf_counter()
        return values

    def read_log(self) -> dict[str, float]:
        """What `take_log` would give for this rank alone, which may ask at any time.

        Empty before the first optimiser step.
        """
        return self._log_values(float(self._log_loss), self._log_labels, self._log_tokens) if self._step_rates else {}

    def _log_values(self, loss: float, num_labels: float, num_tokens: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._log_time
        values = {"train/loss": loss / max(1, num_labels), "train/tokens_per_s": num_tokens / max(seconds, 1e-9)}
        return values | {f"train/lr_{part}": rate for part, rate in self._step_rates.items()}

    # --- trained weights alone are saved, averaged and copied: the frozen ones are in the checkpoints that the run starts from

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The trained weights alone: weight averaging averages these, and would spoil packed 4-bit weights."""
        trained = {id(parameter) for part in self.trained.values() for parameter in part.values()}
        return (parameter for parameter in super().parameters(recurse) if id(parameter) in trained)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """None: buffers hold constants such as positions, which no average may touch."""
        return iter(())

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The trained weights alone, by their names in the module."""
        found = {} if destination is None else destination
        for part in self.trained.values():
            for name, weight in part.items():
                found[f"{prefix}captioner.{name}"] = weight if keep_vars else weight.detach()
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave.

        Raises:
            UserError: `strict`, and a trained weight is missing, unknown or of another shape.
        """
        if strict:
            check_weights(state_dict, self.trained)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the trained weights under their names, for weight averaging; the frozen model is never copied."""
        copied = nn.Module()
        names = {id(parameter): name for part in self.trained.values() for name, parameter in part.items()}
        for parameter in self.parameters():  # in this order, as weights are averaged by their place in it
            *path, leaf = f"captioner.{names[id(parameter)]}".split(".")
            holder = copied
            for word in path:
                if word not in holder._modules:
                    holder.add_module(word, nn.Module())
                holder = holder.get_submodule(word)
            holder.register_parameter(leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        return copied

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds identity, random states and the position in the data."""
        # Not `completed`: Lightning counts a batch as completed only after the callbacks that save on its end.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        epoch = self.trainer.current_epoch
        position = self._train_sampler().position(epoch, int(progress.processed))
        is_last = (
            position["epoch"] > epoch == epochs.processed
        )  # an epoch counts as processed once its validation is over
        settle_loop(checkpoint["loops"]["fit_loop"], epoch, position["epoch"], checkpoint["global_step"])
        sums = self._sums(float(self._log_loss), self._log_labels, self._log_tokens, self.num_truncated)
        log = {"loss": sums[0], "labels": int(sums[1]), "tokens": int(sums[2]), "truncated": int(sums[3])}
        first, *others = states_of_all()
        checkpoint["vlmcap"] = self.identity | {
            "position": position,
            "owes_validation": is_last and self._is_validated(epoch),
            "plan": {"stages": self.plan.stage_names(), "accumulate": self.trainer.accumulate_grad_batches},
            "random": first,
            "random_of_others": others,
            "log": log,
        }

    def _is_validated(self, epoch: int) -> bool:
        """Whether the loop validates after an epoch."""
        return self.trainer.enable_validation and (epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint belongs to this model, and restores random states and the position in the data.

        Raises:
            UserError: Trained weights are missing, unknown or of another shape, a frozen base is another one, or the
                optimiser's state is.
        """
        held = checkpoint.get("vlmcap") or {}
        check_base_checkpoints(held.get("bases", {}), self.identity.get("bases", {}))
        check_weights(checkpoint["state_dict"], self.trained)
        fit_saved_states(checkpoint.get("optimizer_states", []), self.optim_config)
        states, rank = [held["random"], *held.get("random_of_others", [])], self.trainer.global_rank
        if rank < len(states):  # more ranks than there were go on with the states that their seeds gave
            set_random_states(states[rank])
        if rank == 0:  # the sums of all
            log = held["log"]
            self._log_loss, self._log_labels, self._log_tokens = log["loss"], log["labels"], log["tokens"]
            self.num_truncated = log["truncated"]
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, CaptionDataModule):
            datamodule.resume_at(held["position"])
        self._position = held["position"]
        epoch = self._position["epoch"] - 1
        self.owes_validation = held["owes_validation"] and self._is_validated(epoch)
        if self.owes_validation:
            reopen_epoch(checkpoint["loops"]["fit_loop"], epoch, checkpoint["global_step"])

    def on_train_end(self) -> None:
        """Counts cut captions over all ranks, for the first one's summary."""
        (self.num_truncated,) = map(int, self._sums(self.num_truncated))

    def _sums(self, *values: float) -> list[float]:
        """Of each number over all ranks."""
        if self.trainer.world_size == 1:
            return list(values)
        own = torch.tensor(values, device=self.device, dtype=torch.float64)
        total: Tensor = self.trainer.strategy.reduce(own, reduce_op="sum")
        return [float(value) for value in total.tolist()]

    def _train_sampler(self) -> BatchSampler:
        loader: Any = self.trainer.train_dataloader
        assert isinstance(loader.batch_sampler, BatchSampler)
        return loader.batch_sampler

    def _adamw(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _note(self, batch: Batch | ValidationBatch) -> None:
        """Counts what could not be used, and stops when it is too much."""
        if batch.skipped:
            for skipped in batch.skipped:
                self.skipped_log.add(skipped)
            self.skipped_log.check()
