"""Cross-entropy of a frozen head, a few rows at a time, so that logits of all label tokens never exist at once.

The gradient to the hidden states is computed in the forward pass, while a chunk's logits are there, and only it is
kept: T × Dl numbers in place of T × N. The idea is that of Liger's fused linear cross-entropy (Hsu et al.,
https://arxiv.org/abs/2410.10989), in plain torch.

Legend: T label tokens, N vocabulary, Dl language width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Classes of transformers whose forward returns what the head gives as it is. HyperCLOVA X and Granite scale it, Gemma
# caps it.
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
    }
)
# Gradients of logits are shares of a token, most of them far below float16's least number; a gain lifts them. Their
# absolute values sum to 2 a row at most, so a weight of 30 in the head would be needed to leave the format at the other
# end.
_HALF_GAIN = 1024.0


def labels_per_chunk(vocab_size: int, chunk_bytes: int) -> int:
    """Label tokens whose float32 logits take at most `chunk_bytes`; 1 where not even one fits."""
    return max(1, chunk_bytes // (4 * vocab_size))


def can_chunk(model: Any) -> bool:
    """Whether a causal language model's logits are `lm_head(hidden)`, with a head that is frozen, bare and unquantised."""
    head: Any = getattr(model, "lm_head", None)
    if (
        type(model).__name__ not in UNSCALED
        or type(head) is not nn.Linear
        or {name for name, _ in head.named_parameters()} != {"weight"}
    ):
        return False
    # Whatever stands around the head (a hook, another's forward) may change what it gives, or bring its weight from
    # elsewhere.
    is_bare = not head._forward_hooks and not head._forward_pre_hooks and "forward" not in vars(head)
    return is_bare and not head.weight.requires_grad and head.weight.is_floating_point() and not head.weight.is_meta


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int) -> Tensor:
    """Summed cross-entropy in nats of `hidden @ weight.T` against `labels`, float32 and without dimensions.

    Equal, but for the order of sums, to `F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")`,
    under autocast too.

    Args:
        hidden: Hidden states of label positions, (T, Dl).
        weight: Of the head, frozen, (N, Dl).
        labels: Token ids, int64 (T).
        chunk_rows: Rows whose logits are there at once.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    is_differentiated = torch.is_grad_enabled() and hidden.requires_grad
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_rows, dtype, is_differentiated)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss, with the gradient to the hidden states made on the way."""

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
        gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if is_differentiated else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(dtype)
            for start in range(0, len(hidden), chunk_rows):
                rows = slice(start, start + chunk_rows)
                own, shares = _loss_and_shares(F.linear(hidden[rows].to(dtype), weight), labels[rows])
                loss += own
                if gradient is not None:
                    gradient[rows] = (shares.mul_(gain) if gain != 1 else shares).to(dtype) @ weight
                del shares
        ctx.gradient, ctx.gain, ctx.dtype = gradient, gain, hidden.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradient is not None
        gradient = ctx.gradient.float().mul_(
            grad_loss.float() / ctx.gain
        )  # in float32: the loss scaler's factor may be out of float16
        return gradient.to(ctx.dtype), None, None, None, None, None


def _loss_and_shares(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of some rows, and its gradient to their logits, float32 (rows, N).

    `logits` are overwritten where they are float32.
    """
    shares = logits.float()
    del logits
    picked = shares.gather(1, labels.unsqueeze(1))
    largest = shares.amax(dim=1, keepdim=True)
    sums = shares.sub_(largest).exp_().sum(dim=1, keepdim=True)
    loss = (sums.log() + largest - picked).sum()
    shares.div_(sums)
    shares.scatter_add_(1, labels.unsqueeze(1), shares.new_full((len(labels), 1), -1.0))
    return loss, shares
