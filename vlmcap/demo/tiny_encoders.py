"""Trains the tiny encoders, each of its family's real class, from scratch on the demo clips with CLIP's objective.

They differ in what their families differ in: where positions come from, what is pooled for the caption (CLS, attention
or a mean), normalisation of pixels, registers, and whether a frame or a clip is seen. Width, depth, patches, examples
and steps are the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.config import DataConfig
from vlmcap.data.loading.clip_dataset import ClipDataset
from vlmcap.demo.tiny_llm import Progress, optimise
from vlmcap.models.encoders import FrameTransform, default_preprocessing
from vlmcap.models.encoders.classes import fixed_arguments, frames_per_token, pixels_argument
from vlmcap.models.encoders.preprocessing import Preprocessing
from vlmcap.models.rates import cosine_rate
from vlmcap.types import Clip, Sample

_IMAGE_SIZE, _PATCH_SIZE, _WIDTH = 64, 8, 96
_SHARED = {"hidden_size": _WIDTH, "num_attention_heads": 4, "projection_dim": _WIDTH}
_TOWER = {"intermediate_size": 288, "num_hidden_layers": 2, "image_size": _IMAGE_SIZE, "patch_size": _PATCH_SIZE}
_CLIP = {"model_type": "clip_vision_model", **_SHARED, **_TOWER}
_OTHER = {"hidden_size": _WIDTH, "num_attention_heads": 4, **_TOWER}
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": _CLIP,
    "tiny_untrained": _CLIP,
    "tiny_siglip2": {"model_type": "siglip_vision_model", **_OTHER},
    "tiny_dinov3": {"model_type": "dinov3_vit", **_OTHER, "num_register_tokens": 4},
    "tiny_internvit": {"model_type": "internvl_vision", **_OTHER, "attention_bias": True, "use_mean_pooling": False},
    "tiny_vjepa2": {
        "model_type": "vjepa2",
        **{key: _OTHER[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size")},
        "mlp_ratio": 3,
        "crop_size": _IMAGE_SIZE,
        "pred_hidden_size": 24,  # the predictor, which features do not need
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
}
"""Of each tiny encoder, as a `config.json` has it."""


def make_encoder(
    folder: Path, clips: Sequence[Clip], tokenizer: Any, *, name: str, num_steps: int, seed: int, progress: Progress
) -> None:
    """Trains a vision tower of 0.2 M parameters beside a text tower that is dropped afterwards, and saves it.

    Source of the objective: Radford et al., https://arxiv.org/abs/2103.00020.

    Args:
        folder: Where to save.
        clips: The training split.
        tokenizer: For the text tower.
        name: A key of `VISION_CONFIGS`; `tiny_untrained` is saved before its first step.
        num_steps: Optimiser steps of 64 pairs.
        seed: Of weights and pairs.
        progress: Called with work done and work in all.
    """
    from transformers import CLIPConfig, CLIPModel

    num_steps = 0 if name == "tiny_untrained" else num_steps
    # Clips to read and steps to train.
    total = len(clips) + num_steps
    preprocessing = default_preprocessing(VISION_CONFIGS[name]["model_type"])
    frames = _read_frames(clips, lambda done: progress(done, total), preprocessing) if num_steps else None
    ids, mask = _encode_captions(clips, tokenizer)
    text = _SHARED | {
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": ids.shape[1],
    }
    text |= {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = CLIPModel(CLIPConfig(vision_config=_CLIP, text_config=text, projection_dim=_WIDTH))
        if VISION_CONFIGS[name] is not _CLIP:
            model.vision_model = _Pooled(VISION_CONFIGS[name])
        if frames is not None:
            is_video = isinstance(model.vision_model, _Pooled) and model.vision_model.is_video
            batches = _batches(frames, ids, mask, preprocessing, is_video)
            _contrast(model, batches, num_steps, lambda step: progress(len(clips) + step, total))
    _save(model.vision_model, folder)


def _batches(
    frames: Tensor, ids: Tensor, mask: Tensor, preprocessing: Preprocessing, is_video: bool
) -> Iterator[dict[str, Tensor]]:
    """Yields without end what CLIP's class takes: 64 captions, and a frame of each one's clip or four frames of it."""
    # for pixels in 0…255
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (preprocessing.mean, preprocessing.std))
    while True:
        rows = torch.randperm(len(frames))[:64]
        if is_video:
            # Every second frame, from the first or the second on, the same for all clips of a batch.
            chosen = frames[rows, torch.randint(2, (1,)).item() :: 2]  # (64, F, 3, H, W) -> (64, F / 2, 3, H, W)
        else:
            chosen = frames[rows, torch.randint(frames.shape[1], rows.shape)]  # (64, F, 3, H, W) -> (64, 3, H, W)
        pixels = (chosen.float() - mean) / std
        yield {"input_ids": ids[rows], "attention_mask": mask[rows].long(), "pixel_values": pixels}


def _contrast(
    model: Any, batches: Iterator[dict[str, Tensor]], num_steps: int, progress: Callable[[int], None]
) -> None:
    # `optimise` sets the rate of each step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.05)
    for step in range(num_steps):
        loss = model(**next(batches), return_loss=True).loss
        optimise(optimizer, loss, cosine_rate(step, num_steps, peak=1.5e-3, warmup_steps=20, final_ratio=0.0))
        model.logit_scale.data.clamp_(max=4.6)  # at most 100, as in CLIP
        progress(step + 1)


class _Pooled(nn.Module):
    """Another family's tower in the place of CLIP's.

    Args:
        values: Its `config.json`.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.tower: Any = AutoModel.from_config(AutoConfig.for_model(**values))
        self.is_video = frames_per_token(self.tower.config) > 0

    def forward(self, pixel_values: Tensor, **_: object) -> Any:
        """Returns features and one vector per frame or clip, which some classes leave to their user."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        outputs = self.tower(**{pixels_argument(type(self.tower)): pixel_values}, **fixed_arguments(type(self.tower)))
        features = outputs.last_hidden_state
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            # (B, tokens, width) -> (B, width)
            pooled = features[:, 0 if self.is_video else 1 :].mean(1)  # InternViT has a CLS token
        return BaseModelOutputWithPooling(features, pooled)


def _save(tower: Any, folder: Path) -> None:
    from transformers import CLIPImageProcessor

    if isinstance(tower, _Pooled):
        tower.tower.save_pretrained(folder)  # its family's own preprocessing holds, as it stands in no file
        if tower.is_video:  # but for the margin that V-JEPA 2 crops, where the demo has things to see
            size = {"size": {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}}
            (folder / "preprocessor_config.json").write_text(json.dumps(size), encoding="utf-8")
        return
    tower.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": _IMAGE_SIZE}, crop_size=_IMAGE_SIZE).save_pretrained(folder)


def _encode_captions(clips: Sequence[Clip], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Returns ids and mask (N, S) of each clip's first caption."""
    encoded = tokenizer(
        [clip.captions[0] for clip in clips], padding=True, return_tensors="pt", truncation=True, max_length=95
    )
    # (N, S) -> (N, S + 1): room for the end token, also behind the longest caption
    ids = torch.cat([encoded["input_ids"], torch.full((len(clips), 1), tokenizer.pad_token_id)], dim=1)
    lengths = encoded["attention_mask"].sum(1)
    ids[torch.arange(len(clips)), lengths] = tokenizer.eos_token_id  # CLIP reads the caption off its end token
    return ids, torch.arange(ids.shape[1])[None] <= lengths[:, None]  # <= includes the end token


def _read_frames(clips: Sequence[Clip], progress: Callable[[int], None], preprocessing: Preprocessing) -> Tensor:
    """Returns the frames of all clips, uint8 (N, F, 3, H, W)."""
    data = DataConfig(num_frames=8, is_isolated=False)  # the demo's own clips
    transform = FrameTransform(_IMAGE_SIZE, preprocessing.resampling, preprocessing.is_cropped)
    dataset = ClipDataset(clips, data, seed=0, frame_transform=transform)
    frames: list[Tensor] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        assert isinstance(sample, Sample), "the demo's own clips decode"
        assert sample.frames is not None
        frames.append(sample.frames)
        progress(index + 1)
    return torch.stack(frames)
