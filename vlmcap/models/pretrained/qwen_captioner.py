"""Captioner for Qwen-VL models: positions in time, height and width (mRoPE), and DeepStack.

Legend: B clips, R rows (B, or 1 for a packed batch), S sequence, T temporal patches, h/w patch rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import base_model
from vlmcap.types import CLOCKLESS_FPS, Batch, FrameTimes

_VIDEO = 2  # transformers' type id of video tokens; 0 is text and 1 is images


class QwenVLCaptioner(VideoCaptioner):
    """Captions video clips with a Qwen-VL model.

    The language model is the checkpoint's own class without its vision tower. It receives projected tokens as the
    output of an earlier run of the tower, so that it handles placement, DeepStack, beams and the key-value cache
    itself.

    Args:
        *args: Positional arguments of `VideoCaptioner`.
        frames_per_patch: Frames that share a temporal patch.
        is_recurrent: Whether some layers of the language model were changed by `separate_recurrent_layers`.
        **kwargs: Keyword arguments of `VideoCaptioner`.
    """

    has_plain_inputs = False

    def __init__(self, *args: Any, frames_per_patch: int, is_recurrent: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frames_per_patch, self.is_recurrent = frames_per_patch, is_recurrent

    def language_inputs(self, batch: Batch, visual: Tensor) -> dict[str, Any]:
        """Returns the keyword arguments of the language model, for training and for generation."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        model: Any = base_model(self.llm)
        # The class finds visual tokens by the embedding of the video token.
        ids = batch.input_ids.masked_fill(batch.visual_mask, model.config.video_token_id)
        embeddings: Tensor = model.get_input_embeddings()(ids)
        counts = batch.num_visual
        assert sum(counts) == len(visual), "placeholders and visual tokens differ in number"
        # (sum of V, (1 + n) · Dl) -> (1 + n) × (sum of V, Dl)
        first, *deep = visual.to(embeddings.dtype).split(embeddings.shape[-1], dim=-1)
        output = BaseModelOutputWithDeepstackFeatures(
            pooler_output=list(first.split(counts)),
            deepstack_features=[list(layer.split(counts)) for layer in deep] or None,
        )
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings,
            "position_ids": self.position_ids(batch, ids),
            "mm_encoder_outputs": {"video": output},
        }
        if batch.position_ids is None:
            return inputs | {"attention_mask": self.language_mask(batch)}
        return inputs | ({"clip_lengths": batch.lengths} if self.is_recurrent else {})

    def position_ids(self, batch: Batch, ids: Tensor) -> Tensor:
        """Returns positions in time, height and width, int64 (3, B, S).

        Those of a packed batch are int64 (4, 1, S), with the positions in the text first: by these, and without a mask,
        the class keeps the clips of the row apart.
        """
        assert batch.grid_thw is not None, "clips of this model need grid_thw"
        model: Any = base_model(self.llm)
        # Computed on the host with one synchronisation, as the class reads one number after the other.
        rows = torch.stack([ids, batch.visual_mask * _VIDEO, batch.attention_mask]).cpu()  # 3 × (R, S) -> (3, R, S)
        if batch.position_ids is not None:  # a row for each clip: (3, 1, S) -> B × (S of the clip, 3) -> (3, B, S)
            rows = pad_sequence(rows[:, 0].T.split(batch.lengths), batch_first=True).permute(2, 0, 1)
        host_ids, kinds, mask = rows
        positions, _ = model.model.get_rope_index(
            host_ids,
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor(batch.grid_thw),
            second_per_grid_ts=[self.seconds_per_patch(times_s) for times_s in batch.times_s or [None] * len(batch)],
            attention_mask=mask,
        )
        if batch.position_ids is not None:
            positions = positions[:, mask.bool()].unsqueeze(1)  # (3, B, S) -> (3, 1, S)
        if ids.is_cuda and torch.cuda.is_available():
            positions = positions.pin_memory()
        positions = positions.to(ids.device, non_blocking=True)
        return positions if batch.position_ids is None else torch.cat([batch.position_ids[None], positions])

    def seconds_per_patch(self, times_s: FrameTimes | None) -> float:
        """Returns the time between temporal patches, from which Qwen2.5-VL computes positions.

        The class takes one number per clip, so unevenly sampled frames are treated as evenly spaced over their time
        span.
        """
        if times_s is None:
            return self.frames_per_patch / CLOCKLESS_FPS
        # Mean distance of frames × frames per patch.
        return self.frames_per_patch * (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)


def separate_recurrent_layers(model: nn.Module) -> bool:
    """Lets the recurrent layers of a language model run clip by clip when `clip_lengths` is among its arguments.

    Without it, their state goes from one clip of a packed row to the next one, as they have no mask.

    Args:
        model: Language model; its recurrent layers are modified in place.

    Returns:
        Whether there are such layers.
    """
    layers: list[Any] = [
        module.linear_attn for module in model.modules() if isinstance(getattr(module, "linear_attn", None), nn.Module)
    ]
    for layer in layers:
        layer.forward = partial(_forward_clip_by_clip, layer.forward)
    return bool(layers)


def _forward_clip_by_clip(
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    *,
    clip_lengths: tuple[int, ...] | None = None,
    **arguments: Any,
) -> Tensor:
    """Runs a recurrent layer, (R, S, Dl) -> (R, S, Dl), once for each clip of a packed row."""
    if clip_lengths is None:
        return forward(hidden_states, **arguments)
    clips = hidden_states.split(clip_lengths, dim=1)  # (1, S, Dl) -> B × (1, S of the clip, Dl)
    return torch.cat([forward(clip, **arguments) for clip in clips], dim=1)
