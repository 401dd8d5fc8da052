"""The captioner as a LightningModule: loss, optimiser, learning rates, and the content of a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from vlmcap.training.callbacks.saving import normalize_loop_state, request_validation
from vlmcap.training.checkpoints.load import check_base_checkpoints, check_weights, trained_parameters
from vlmcap.training.optimizer import adapt_optimizer_states, make_optimizer
from vlmcap.training.random_state import gather_random_states, set_random_states
from vlmcap.training.schedule import StagePlan, StageRates, peak_rate
from vlmcap.types import Batch, ValidationBatch, select_entries


@dataclass(frozen=True, slots=True)
class ValidationOutput:
    """Result of a validation batch.

    Attributes:
        captions: Captions in the order of the prompts; empty if only the loss is measured.
        loss: Loss in nats, summed over label tokens.
        num_labels: Number of label tokens.
    """

    captions: list[str]
    loss: float
    num_labels: int


class CaptioningModule(L.LightningModule):
    """Trains a captioner stage by stage.

    Args:
        captioner: The assembled model; whatever is not trained is frozen.
        plan: Training stages and their learning rates.
        optim: Kind and settings of the optimiser.
        identity: Plain data that is saved in every checkpoint: the configuration and the fingerprints of the frozen
            base checkpoints.
        skipped_log: Log of clips that could not be used.
        max_label_tokens: Largest number of label tokens in a micro-batch; the loss sum is divided by this constant to
            stay small in half precision.
        sharder: Function `(captioner, mesh, device)` that shards the captioner; None keeps it unsharded.
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
        self.strict_loading = False  # checkpoints hold no frozen weights; `on_load_checkpoint` checks the trained ones
        self.trained = trained_parameters(captioner, plan)
        self.num_truncated = 0
        self.needs_validation = False  # whether a resumed run must first validate the epoch that it has trained
        self._position: Mapping[str, int] = {"epoch": 0, "batches": 0}  # where this process starts
        # Loss sum of the last micro-batch, on the device, and its number of label tokens.
        self.last_loss: tuple[float | Tensor, int] = (0.0, 0)
        self.grad_norm: Tensor | None = None  # of the last step, before clipping, on the device
        # Rates of the last step by component; when they are logged, the scheduler has advanced already.
        self._step_rates: dict[str, float] = {}
        self._sharder, self._is_sharded = sharder, False
        self._usable_batch: Batch | None = None
        self._window_tokens = 0  # label tokens since the last optimiser step
        self._log_loss: float | Tensor = 0.0  # stays on the device until it is logged
        self._log_labels, self._log_tokens, self._log_time = 0, 0, 0.0
        # Components are built in evaluation mode and Lightning keeps modes, but gradient checkpointing needs training
        # mode.
        self.train()

    def configure_model(self) -> None:
        """Shards the captioner, once, if the strategy needs it."""
        if self._sharder is None or self._is_sharded:
            return
        self._is_sharded = True
        assert self.device_mesh is not None
        self._sharder(self.captioner, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)
        self.trained = trained_parameters(self.captioner, self.plan)

    def configure_optimizers(self) -> Any:
        """Builds AdamW of the configured kind and the scheduler of its rates, which advances at each optimiser step."""
        optimizer = make_optimizer(self.trained, self.optim_config)
        rates = StageRates(optimizer, self.plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def train(self, mode: bool = True) -> CaptioningModule:
        """Sets the training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.captioner.encoder is not None and "encoder" not in self.trained:
            self.captioner.encoder.eval()
        return self

    def on_train_start(self) -> None:
        """Sets the rates of the first step, and the stage, as no epoch starts when a run resumes inside one."""
        epoch, batches = self._position["epoch"], self._position["batches"]
        self.rates.begin(epoch, -(-batches // self.trainer.accumulate_grad_batches), self.steps_per_epoch)
        if self.needs_validation:  # moves to the end of the epoch, whose number of batches may have changed
            counts: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            counts.ready = counts.started = counts.processed = counts.completed = int(self.trainer.num_training_batches)
        self._set_stage()

    def on_validation_end(self) -> None:
        """Clears the pending validation of a resumed run."""
        self.needs_validation = False

    def on_train_epoch_start(self) -> None:
        """Sets the stage that the epoch belongs to."""
        self._set_stage()
        self.num_truncated = 0  # counted per epoch, because every epoch sees the same captions

    def _set_stage(self) -> None:
        """Unfreezes the components that the stage trains, and freezes the others."""
        stage = self.plan.at_epoch(self.current_epoch).stage
        for component, parameters in self.trained.items():
            for parameter in parameters.values():
                parameter.requires_grad_(peak_rate(stage, component) > 0)
        self._log_time = time.perf_counter()

    @property
    def rates(self) -> StageRates:
        """The learning rate scheduler."""
        rates = self.lr_schedulers()
        assert isinstance(rates, StageRates)
        return rates

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return max(1, -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss sum of a micro-batch divided by a constant.

        `on_before_optimizer_step` turns the sum over the accumulated micro-batches into a mean over their label tokens.
        """
        self._log_skipped(batch)
        self.num_truncated += batch.num_truncated
        self.last_loss = (0.0, 0)
        if len(batch) == 0:
            return self._zero_loss()
        self._usable_batch = batch if self._is_sharded else None
        loss, num_labels = self.captioner(batch)
        self._window_tokens += num_labels
        self.last_loss = (loss.detach(), num_labels)
        self._log_loss = self._log_loss + loss.detach().double()
        self._log_labels += num_labels
        self._log_tokens += batch.num_tokens
        return loss / self.loss_unit

    def _zero_loss(self) -> Tensor:
        """Returns a zero loss with gradients, which the other ranks and the float16 scaler wait for."""
        if not self._is_sharded:
            return torch.stack(
                [p.sum() * 0.0 for component in self.trained.values() for p in component.values() if p.requires_grad]
            ).sum()
        # The other ranks gather the shards of this rank in every block, so it must compute a forward pass.
        if self._usable_batch is None:
            raise UserError(
                "trainer=fsdp2 needs a usable clip in the first batch of each process, but one process has none; see "
                "skipped_clips.jsonl for the reasons"
            )
        return self.captioner(self._usable_batch)[0] * 0.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides gradients by the label tokens of the accumulated batch of all ranks, as one large batch would.

        Lightning averages over micro-batches and ranks, which would give a mean of means.
        """
        (tokens,) = self._sum_over_ranks(self._window_tokens)
        self._window_tokens = 0  # the next step counts from zero
        self._step_rates = {group["component"]: float(group["lr"]) for group in optimizer.param_groups}
        # Undoes the division of `training_step` and Lightning's two means, then divides by the label tokens.
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
        """Clips gradients like Lightning, and keeps their norm, which Lightning discards."""
        limit = gradient_clip_val if gradient_clip_val else math.inf
        norm = nn.utils.clip_grad_norm_(self.trainer.precision_plugin.main_params(optimizer), limit)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # reduced over shards

    def rate_groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimiser, each with `component` and `lr`."""
        return self._optimizer().param_groups

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> Any:
        """Returns a `ValidationOutput` with the loss and, if requested, captions; each clip is encoded once."""
        self._log_skipped(batch)
        # 1. Encode the clips, and write their captions.
        prompts = self.captioner.with_features(batch.prompts)
        captions = self.captioner.generate(prompts) if batch.is_captioned and len(prompts) else []
        # 2. Measure the loss in micro-batches as large as those of training, with the same features.
        losses, num_labels = [0.0], 0
        indices = {clip.id: index for index, clip in enumerate(prompts.clips)}
        for micro_batch in batch.labelled:
            if len(micro_batch):
                assert prompts.features is not None
                features = select_entries(prompts.features, [indices[clip.id] for clip in micro_batch.clips])
                loss, count = self.captioner(replace(micro_batch, features=features))  # a sum over `count` label tokens
                losses.append(float(loss))
                num_labels += count
        return ValidationOutput(captions, sum(losses), num_labels)

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        """Returns the captions of a batch of prompts."""
        self._log_skipped(batch)
        return self.captioner.generate(batch) if len(batch) else []

    def transfer_batch_to_device(
        self, batch: Batch | ValidationBatch, device: torch.device, dataloader_idx: int
    ) -> Batch | ValidationBatch:
        """Moves the tensors of a batch to a device."""
        return batch.to(device)

    def take_log(self) -> dict[str, float]:
        """Returns loss (nats per label token), rates and speed since the last call, over all ranks.

        Every rank must call this method.
        """
        values = self._log_values(*self._sum_over_ranks(float(self._log_loss), self._log_labels, self._log_tokens))
        self._log_loss, self._log_labels, self._log_tokens, self._log_time = 0.0, 0, 0, time.perf_counter()
        return values

    def read_log(self) -> dict[str, float]:
        """Returns the values of `take_log` for this rank without resetting them; empty before the first step.

        A single rank may call this method.
        """
        return self._log_values(float(self._log_loss), self._log_labels, self._log_tokens) if self._step_rates else {}

    def _log_values(self, loss: float, num_labels: float, num_tokens: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._log_time
        values = {"train/loss": loss / max(1, num_labels), "train/tokens_per_s": num_tokens / max(seconds, 1e-9)}
        return values | {f"train/lr_{component}": rate for component, rate in self._step_rates.items()}

    # --- only trained weights are saved, averaged and copied; the base checkpoints hold the frozen ones

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the trained weights alone; weight averaging would destroy packed 4-bit weights."""
        trained = {id(parameter) for component in self.trained.values() for parameter in component.values()}
        return (parameter for parameter in super().parameters(recurse) if id(parameter) in trained)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yields nothing; buffers hold constants such as positions, which must not be averaged."""
        return iter(())

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Returns the trained weights alone, by their names in the module."""
        state = {} if destination is None else destination
        for component in self.trained.values():
            for name, weight in component.items():
                state[f"{prefix}captioner.{name}"] = weight if keep_vars else weight.detach()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the result of `state_dict`.

        Raises:
            UserError: `strict` is true and a trained weight is missing, unknown or of another shape.
        """
        if strict:
            check_weights(state_dict, self.trained)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copies the trained weights under their names, for weight averaging; frozen weights are never copied."""
        copied = nn.Module()
        names = {id(parameter): name for component in self.trained.values() for name, parameter in component.items()}
        for parameter in self.parameters():  # weight averaging pairs parameters by their order
            *path, leaf = f"captioner.{names[id(parameter)]}".split(".")
            holder = copied
            for word in path:
                if word not in holder._modules:
                    holder.add_module(word, nn.Module())
                holder = holder.get_submodule(word)
            holder.register_parameter(leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        return copied

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds identity, random states and the position in the data to a checkpoint."""
        # Not `completed`: Lightning counts a batch as completed only after the callbacks that save at its end.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        epoch = self.trainer.current_epoch
        # 1. Where the run continues in the data.
        position = self._train_sampler().position(epoch, int(progress.processed))
        # An epoch counts as processed only after its validation.
        is_last = position["epoch"] > epoch == epochs.processed
        normalize_loop_state(checkpoint["loops"]["fit_loop"], epoch, position["epoch"], checkpoint["global_step"])
        # 2. Sums since the last log, which a resumed run continues.
        sums = self._sum_over_ranks(float(self._log_loss), self._log_labels, self._log_tokens, self.num_truncated)
        log = {"loss": sums[0], "labels": int(sums[1]), "tokens": int(sums[2]), "truncated": int(sums[3])}
        first, *others = gather_random_states()
        checkpoint["vlmcap"] = self.identity | {
            "position": position,
            "needs_validation": is_last and self._is_validated(epoch),
            "plan": {"stages": self.plan.stage_names(), "accumulate": self.trainer.accumulate_grad_batches},
            "random": first,
            "random_of_others": others,
            "log": log,
        }

    def _is_validated(self, epoch: int) -> bool:
        """Returns whether the loop validates after an epoch."""
        return self.trainer.enable_validation and (epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint belongs to this model, and restores random states and the position in the data.

        Raises:
            UserError: A trained weight is missing, unknown or of another shape, a base checkpoint differs, or the
                optimiser state has another kind.
        """
        held = checkpoint.get("vlmcap") or {}
        # 1. Refuse a checkpoint of another model, and convert the optimiser state.
        check_base_checkpoints(held.get("base_checkpoints", {}), self.identity.get("base_checkpoints", {}))
        check_weights(checkpoint["state_dict"], self.trained)
        adapt_optimizer_states(checkpoint.get("optimizer_states", []), self.optim_config)
        # 2. Restore random states and sums.
        states, rank = [held["random"], *held.get("random_of_others", [])], self.trainer.global_rank
        if rank < len(states):  # additional ranks keep the states of their seeds
            set_random_states(states[rank])
        if rank == 0:  # the saved sums are over all ranks
            log = held["log"]
            self._log_loss, self._log_labels, self._log_tokens = log["loss"], log["labels"], log["tokens"]
            self.num_truncated = log["truncated"]
        # 3. Continue at the saved position, after the validation that the run may have missed.
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, CaptionDataModule):
            datamodule.resume_at(held["position"])
        self._position = held["position"]
        epoch = self._position["epoch"] - 1
        self.needs_validation = held["needs_validation"] and self._is_validated(epoch)
        if self.needs_validation:
            request_validation(checkpoint["loops"]["fit_loop"], epoch, checkpoint["global_step"])

    def on_train_end(self) -> None:
        """Sums the truncated captions of all ranks, for the summary of the first rank."""
        (self.num_truncated,) = map(int, self._sum_over_ranks(self.num_truncated))

    def _sum_over_ranks(self, *values: float) -> list[float]:
        """Returns the sum of each value over all ranks."""
        if self.trainer.world_size == 1:
            return list(values)
        local = torch.tensor(values, device=self.device, dtype=torch.float64)
        total: Tensor = self.trainer.strategy.reduce(local, reduce_op="sum")
        return [float(value) for value in total.tolist()]

    def _train_sampler(self) -> BatchSampler:
        loader: Any = self.trainer.train_dataloader
        assert isinstance(loader.batch_sampler, BatchSampler)
        return loader.batch_sampler

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _log_skipped(self, batch: Batch | ValidationBatch) -> None:
        """Logs clips that could not be used; the log raises if there are too many."""
        if batch.skipped:
            for skipped in batch.skipped:
                self.skipped_log.add(skipped)
            self.skipped_log.check()
