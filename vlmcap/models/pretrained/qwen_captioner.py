"""Captioner for Qwen-VL models: positions in time, height and width (mRoPE), and DeepStack.

Legend: B batch, S sequence, T temporal patches, h/w patch rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        **kwargs: Keyword arguments of `VideoCaptioner`.
    """

    has_plain_inputs = False

    def __init__(self, *args: Any, frames_per_patch: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frames_per_patch = frames_per_patch

    def language_inputs(self, batch: Batch, visual: Tensor) -> dict[str, Any]:
        """Returns the keyword arguments of the language model, for training and for generation."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        assert batch.position_ids is None, "check_packing refuses models with positions in time, height and width"
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
        return {
            "inputs_embeds": embeddings,
            "attention_mask": self.language_mask(batch),
            "position_ids": self.position_ids(batch, ids),
            "mm_encoder_outputs": {"video": output},
        }

    def position_ids(self, batch: Batch, ids: Tensor) -> Tensor:
        """Returns positions in time, height and width, int64 (3, B, S)."""
        assert batch.grid_thw is not None, "clips of this model need grid_thw"
        model: Any = base_model(self.llm)
        # Computed on the host with one synchronisation, as the class reads one number after the other.
        # 3 × (B, S) -> (3, B, S)
        host_ids, kinds, mask = torch.stack([ids, batch.visual_mask * _VIDEO, batch.attention_mask]).cpu()
        positions, _ = model.model.get_rope_index(
            host_ids,
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor(batch.grid_thw),
            second_per_grid_ts=[self.seconds_per_patch(times_s) for times_s in batch.times_s or [None] * len(batch)],
            attention_mask=mask,
        )
        return (positions.pin_memory() if ids.is_cuda and torch.cuda.is_available() else positions).to(
            ids.device, non_blocking=True
        )

    def seconds_per_patch(self, times_s: FrameTimes | None) -> float:
        """Returns the time between temporal patches, from which Qwen2.5-VL computes positions.

        The class takes one number per clip, so unevenly sampled frames are treated as evenly spaced over their time
        span.
        """
        if times_s is None:
            return self.frames_per_patch / CLOCKLESS_FPS
        # Mean distance of frames × frames per patch.
        return self.frames_per_patch * (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)
