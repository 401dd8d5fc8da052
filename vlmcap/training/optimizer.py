"""AdamW in three kinds: plain, fused into one kernel, or with an 8-bit state.

References: AdamW, Loshchilov & Hutter, https://arxiv.org/abs/1711.05101; 8-bit optimiser states, Dettmers et al.,
https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlmcap.config import OptimConfig, OptimKind
from vlmcap.errors import UserError

_MIN_8BIT_SIZE = 4096  # elements of a tensor; smaller states stay in float32, because 8 bits would save little
_QUANTIZED_STATE = ("__bnb_optimizer_quant_state__", "state1")  # keys of bitsandbytes, in a checkpoint and in memory


def make_optimizer(trained: Mapping[str, Mapping[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """Builds AdamW with two parameter groups per component: matrices with weight decay, vectors without.

    All learning rates are 0 until `StageRates` sets them.

    Args:
        trained: Trained parameters by name, for each component.
        config: Optimiser settings.

    Raises:
        UserError: The parameters are on a device that this kind of optimiser does not support.
    """
    # 1. Two groups per component: matrices decay; biases and the weights of norms are vectors and do not.
    groups = []
    for component, parameters in trained.items():
        for decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
            chosen = [parameter for parameter in parameters.values() if (parameter.ndim >= 2) == is_matrix]
            if chosen:
                # LearningRateMonitor needs a unique name for each group.
                # `component` is the key by which the scheduler finds the rate of a group.
                groups.append(
                    {
                        "params": chosen,
                        "weight_decay": decay,
                        "component": component,
                        "name": component if is_matrix else f"{component}_vectors",
                    }
                )
    # 2. The optimiser of the configured kind.
    # the scheduler sets the rates before the first step
    settings: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2)}
    if config.kind is OptimKind.adamw:
        return torch.optim.AdamW(groups, **settings)  # foreach on a GPU, by torch's own choice
    devices = {parameter.device.type for parameters in trained.values() for parameter in parameters.values()}
    if wrong := sorted(devices - {"cpu", "cuda"}):
        raise UserError(
            f"optim.kind={config.kind.value} needs a CPU or a CUDA device, but the model is on {wrong[0]}; set "
            "optim.kind=adamw"
        )
    if config.kind is OptimKind.adamw_8bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, min_8bit_size=_MIN_8BIT_SIZE, **settings)
    # Fused AdamW updates all tensors of a group in few kernels.
    optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    # Otherwise the float16 scaler would unscale inside the step, after clipping, which Lightning refuses.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def adapt_optimizer_states(saved: list[dict[str, Any]], config: OptimConfig) -> None:
    """Adapts saved optimiser states to the configured kind; fused and plain AdamW have the same state.

    Args:
        saved: Optimiser states of a checkpoint, changed in place.
        config: Optimiser settings of the run that resumes.

    Raises:
        UserError: The saved state has 8 bits and the configured kind does not, or the reverse.
    """
    is_wanted = config.kind is OptimKind.adamw_8bit
    for optimizer in saved:
        # State of a parameter without a gradient so far is empty, and tells nothing about the kind.
        states = [state for state in optimizer["state"].values() if state]
        if states and any(name in state for state in states for name in _QUANTIZED_STATE) != is_wanted:
            kind = "adamw" if is_wanted else "adamw_8bit"
            raise UserError(
                f"the optimiser state of the checkpoint cannot be converted to optim.kind={config.kind.value}; set "
                f"optim.kind={kind}, or start a new run"
            )
        for group in optimizer["param_groups"]:
            if "fused" in group:  # loading would restore the flag of the checkpoint
                group["fused"] = True if config.kind is OptimKind.adamw_fused else None
