"""AdamW in the kinds of `optim.kind`: plain, fused into one kernel, or with its state in 8 bits.

Source of AdamW: Loshchilov & Hutter, https://arxiv.org/abs/1711.05101; of 8-bit states: Dettmers et al.,
https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlmcap.config import OptimConfig, OptimKind
from vlmcap.errors import UserError

_LEAST_8BIT = 4096  # numbers of a tensor; below it a state stays in float32, as its scales would not be worth it
_QUANTISED = (
    "__bnb_optimizer_quant_state__",
    "state1",
)  # under these names bitsandbytes keeps its state, in a checkpoint and in memory


def make_optimizer(trained: Mapping[str, Mapping[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with a group for each part, matrices decayed and vectors not; the rates, 0 here, are set by a scheduler.

    Args:
        trained: Part to its parameters by name.
        config: Of the run.

    Raises:
        UserError: The parameters are on a device that the kind does not run on.
    """
    groups = []
    for part, parameters in trained.items():
        for decay, rows in ((config.weight_decay, True), (0.0, False)):
            chosen = [parameter for parameter in parameters.values() if (parameter.ndim >= 2) == rows]
            if chosen:
                # LearningRateMonitor shows a group by its name, which must be unique.
                groups.append(
                    {"params": chosen, "weight_decay": decay, "part": part, "name": part if rows else f"{part}_vectors"}
                )
    settings: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2)}
    if config.kind is OptimKind.adamw:
        return torch.optim.AdamW(groups, **settings)  # foreach on a GPU, by torch's own choice
    devices = {parameter.device.type for parameters in trained.values() for parameter in parameters.values()}
    if wrong := sorted(devices - {"cpu", "cuda"}):
        raise UserError(
            f"optim.kind={config.kind.value} runs on a CPU or a CUDA device, and the model is on {wrong[0]}; set "
            "optim.kind=adamw"
        )
    if config.kind is OptimKind.adamw_8bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, min_8bit_size=_LEAST_8BIT, **settings)
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    # Or the scaler of float16 would leave the unscaling to the step, behind the clipping, which Lightning refuses.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def fit_saved_states(saved: list[dict[str, Any]], config: OptimConfig) -> None:
    """Makes saved states go on in the kind of the configuration; fused and plain AdamW have the same.

    Args:
        saved: States of a checkpoint's optimisers, changed in place.
        config: Of the run that goes on.

    Raises:
        UserError: One has its state in 8 bits and the other has not.
    """
    is_wanted = config.kind is OptimKind.adamw_8bit
    for optimizer in saved:
        states = [state for state in optimizer["state"].values() if state]
        if states and any(name in state for state in states for name in _QUANTISED) != is_wanted:
            kind = "adamw" if is_wanted else "adamw_8bit"
            raise UserError(
                f"the checkpoint's optimiser is not optim.kind={config.kind.value}, and its state cannot be turned "
                "into that; "
                f"set optim.kind={kind}, or start a new run"
            )
        for group in optimizer["param_groups"]:
            if "fused" in group:  # loading would take the flag from the checkpoint
                group["fused"] = True if config.kind is OptimKind.adamw_fused else None
