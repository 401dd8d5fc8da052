"""Cross-entropy of a frozen head in chunks of rows, so that the logits of all label tokens never exist at once.

The gradient of the hidden states is computed in the forward pass from each chunk's logits, and only it is kept: T × Dl
numbers instead of T × N. This is the idea of Liger's fused linear cross-entropy (Hsu et al.,
https://arxiv.org/abs/2410.10989), in plain PyTorch.

Legend: T label tokens, N vocabulary, Dl language width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# transformers classes whose forward returns the head's output unchanged. HyperCLOVA X and Granite scale it, Gemma caps
# it.
UNSCALED = frozenset(
    {
        "Exaone4ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    }
)
# Gradients of logits are probabilities, most of them far below the smallest float16 number, so they are scaled up.
# Their absolute values sum to at most 2 per row, so an overflow would need a weight of 30 in the head.
_HALF_GAIN = 1024.0


def labels_per_chunk(vocab_size: int, chunk_bytes: int) -> int:
    """Returns how many label tokens have float32 logits of at most `chunk_bytes`; at least 1."""
    # float32: four bytes per logit
    return max(1, chunk_bytes // (4 * vocab_size))


def can_chunk(model: Any) -> bool:
    """Returns whether the logits of a causal language model are `lm_head(hidden)`, with a frozen, unquantised head."""
    head: Any = getattr(model, "lm_head", None)
    if (
        type(model).__name__ not in UNSCALED
        or type(head) is not nn.Linear
        or {name for name, _ in head.named_parameters()} != {"weight"}
    ):
        return False
    # A hook or a replaced forward may change the head's output, or load its weight from elsewhere.
    is_plain = not head._forward_hooks and not head._forward_pre_hooks and "forward" not in vars(head)
    return is_plain and not head.weight.requires_grad and head.weight.is_floating_point() and not head.weight.is_meta


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int) -> Tensor:
    """Computes the summed cross-entropy in nats of `hidden @ weight.T` against `labels`, a float32 scalar.

    It equals `F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")` except for the order of
    summation, also under autocast.

    Args:
        hidden: Hidden states (T, Dl) of label positions.
        weight: Frozen weight (N, Dl) of the head.
        labels: Token ids, int64 (T,).
        chunk_rows: Number of rows whose logits exist at once.
    """
    kind = hidden.device.type
    # The dtype in which the head itself would compute.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    is_differentiated = torch.is_grad_enabled() and hidden.requires_grad
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_rows, dtype, is_differentiated)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the loss, and the gradient of the hidden states with it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_rows: int,
        dtype: torch.dtype,
        is_differentiated: bool,
    ) -> Tensor:
        gain = _HALF_GAIN if dtype is torch.float16 else 1.0
        loss = torch.zeros((), device=hidden.device)
        # The gradient is computed in the forward pass, so that the logits need not be computed again in backward.
        gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if is_differentiated else None
        # Without autocast, which would cast the weight again in each chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            for start in range(0, len(hidden), chunk_rows):
                rows = slice(start, start + chunk_rows)
                # (rows, Dl) -> (rows, N), without a name here, so that the function can free 16-bit logits.
                chunk_loss, grad_logits = _loss_and_gradient(F.linear(hidden[rows].to(dtype), weight), labels[rows])
                loss += chunk_loss
                if gradient is not None:  # (rows, N) -> (rows, Dl)
                    gradient[rows] = (grad_logits.mul_(gain) if gain != 1 else grad_logits).to(dtype) @ weight
                del grad_logits
        ctx.gradient, ctx.gain, ctx.dtype = gradient, gain, hidden.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradient is not None
        # In float32, because the loss scale may exceed the range of float16.
        gradient = ctx.gradient.float().mul_(grad_loss.float() / ctx.gain)
        return gradient.to(ctx.dtype), None, None, None, None, None


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of some rows and its gradient, float32 (rows, N); float32 `logits` are overwritten."""
    values = logits.float()
    del logits
    target = values.gather(1, labels.unsqueeze(1))
    largest = values.amax(dim=1, keepdim=True)
    # Minus the largest logit, so that exp cannot overflow.
    sums = values.sub_(largest).exp_().sum(dim=1, keepdim=True)
    loss = (sums.log() + largest - target).sum()
    # The gradient is softmax(logits) - one_hot(labels).
    gradient = values.div_(sums)
    gradient.scatter_add_(1, labels.unsqueeze(1), gradient.new_full((len(labels), 1), -1.0))
    return loss, gradient
