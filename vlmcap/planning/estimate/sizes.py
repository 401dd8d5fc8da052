"""Sizes of a configuration: patches and visual tokens per clip, batches of such clips, bytes of weights.

Legend: B clips, F frames, P patches per frame, Dv vision width, V visual tokens per clip, T caption tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from vlmcap.assembly.base_checkpoints import encoder_configs, has_plugin_encoder
from vlmcap.assembly.components import dtype_of
from vlmcap.assembly.model import check_length
from vlmcap.config import Config, MropeVlmConfig
from vlmcap.data.loading.collate import flat_indices
from vlmcap.demo.prepare import TINY, TINY_ENCODERS
from vlmcap.models.checkpoint import VISION, is_present
from vlmcap.models.decoding.engine import supports_native_engine
from vlmcap.models.encoders.joined import JoinedEncoder
from vlmcap.models.llm.experts import EXPERT_COUNTS
from vlmcap.models.projectors import check_projector, count_tokens
from vlmcap.planning.estimate.meta_models import (
    PROMPT_TOKENS,
    cached,
    cached_meta_encoder,
    cached_meta_vlm,
    meta_vlm,
    num_blocks,
    plain_vision_blocks,
    planned_sizes,
    text_config,
    text_values,
)
from vlmcap.types import IGNORED, Batch, Clip, GridTHW

# Most tokens between two runs, such as a timestamp and its marks: a digit is a token, and clips may last a day.
_TEXT_BETWEEN_RUNS = 12
_CLOCK_BETWEEN_RUNS = 16  # with words around the time, as in SmolVLM


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a clip.

    Attributes:
        grid: Most frames (tiles count as frames), rows and columns of its patches.
        frame_bytes: Bytes of its frames on the GPU.
        embed_dim: Dv.
        num_encoder_blocks: Encoder blocks that are run.
        num_visual: V.
        runs: Visual tokens of each run of placeholders.
        gap: Text tokens between two runs.
    """

    grid: GridTHW
    frame_bytes: int
    embed_dim: int
    num_encoder_blocks: int
    num_visual: int
    runs: tuple[int, ...]
    gap: int

    @property
    def num_prompt(self) -> int:
        """Text tokens in front of the caption."""
        return PROMPT_TOKENS + self.gap * (len(self.runs) - 1)

    @property
    def num_before_caption(self) -> int:
        """Visual and text tokens in front of the caption."""
        return self.num_visual + self.num_prompt


def clip_sizes(config: Config) -> Sizes:
    """Returns the sizes of the largest clip that a configuration may meet.

    Raises:
        UserError: The components do not fit together, or a clip exceeds the language model's context.
    """
    encoder = cached_meta_encoder(config)
    grid = max(encoder.possible_grids(config.data.num_frames), key=lambda size: size[0] * size[1] * size[2])
    projector = planned_sizes(config, encoder)
    steps, rows, columns = grid
    if projector is None:
        num_visual = cached_meta_vlm(config).num_tokens(steps, (rows, columns))
    else:
        check_projector(config.projector, projector)
        num_visual = count_tokens(config.projector, projector, steps, (rows, columns))
    # Some VLMs, such as Qwen3-VL, write text between the visual tokens of their steps, which so come in several runs.
    text = None if projector is not None else cached_meta_vlm(config).run_text
    runs = (num_visual,) if text is None else (num_visual // steps,) * steps
    gap = 0 if text is None else _CLOCK_BETWEEN_RUNS if "{clock}" in text.before else _TEXT_BETWEEN_RUNS
    frame_bytes = 1
    # uint8 frames: one byte per value.
    for side in frames_shape(encoder, grid):
        frame_bytes *= side
    has_known_blocks = not config.is_pretrained_vlm and not has_plugin_encoder(config)
    depth = num_blocks(encoder) if has_known_blocks else 0
    sizes = Sizes(grid, frame_bytes, encoder.embed_dim, depth, num_visual, runs, gap)
    check_length(config, num_visual, sizes.num_prompt, int(text_config(config).max_position_embeddings))
    return sizes


def frames_shape(encoder: Any, grid: GridTHW) -> tuple[int, ...]:
    """Returns the shape of one clip's frames as the encoder takes them, in bytes."""
    frames, rows, columns = grid
    if isinstance(encoder, JoinedEncoder):
        return (frames * encoder.frames_per_token, encoder.transform.frame_bytes)
    # 1. Encoders of square frames: (F, 3, H, W).
    if side := getattr(encoder.transform, "image_size", None):
        return (frames * getattr(encoder, "frames_per_token", 1), 3, side, side)
    # 2. Qwen-VL and NaFlex take patches: (F, P, values of a patch).
    tower = encoder.tower.config
    patch = int(tower.patch_size if not isinstance(tower.patch_size, list | tuple) else tower.patch_size[0])
    depth = int(getattr(tower, "temporal_patch_size", 1) or 1)
    return (frames, rows * columns, 3 * depth * patch * patch)


def key_value_bytes(config: Config) -> float:
    """Returns the bytes of one token's keys and values in the cache of all blocks."""
    text = text_config(config)
    # Grouped queries share keys and values.
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    num_linear = (getattr(text, "layer_types", None) or []).count("linear_attention")  # they keep a state instead
    # 2: keys and values
    return 2.0 * (int(text.num_hidden_layers) - num_linear) * heads * dim * dtype_of(config.hardware.precision).itemsize


def uses_native_decoding(config: Config) -> bool:
    """Returns whether the native engine decodes the captions, as far as it can be decided without weights."""
    has_plain_inputs = not isinstance(config.model, MropeVlmConfig)
    return (
        config.evaluation.use_continuous_batching
        and has_plain_inputs
        and supports_native_engine(text_config(config), None)
    )


def grouped_queries(config: Config) -> float:
    """Returns the query heads per head of keys and values."""
    text = text_config(config)
    return float(text.num_attention_heads / (getattr(text, "num_key_value_heads", None) or text.num_attention_heads))


def unpacked_experts(config: Config, num_tokens: int) -> float:
    """Returns the share of a layer's experts that a step of `num_tokens` unpacks; 0 without experts."""
    text = text_config(config)
    total = next((int(getattr(text, key)) for key in EXPERT_COUNTS if getattr(text, key, None)), 0)
    return min(1.0, num_tokens * int(text.num_experts_per_tok) / total) if total else 0.0


def download_bytes(config: Config) -> float:
    """Returns the bytes of published weights, two per parameter, that this machine does not have yet."""
    if config.is_pretrained_vlm:
        if _is_downloaded(config, "model"):
            return 0.0
        return 2.0 * (
            _num_language_parameters(config)
            + _num_parameters(cached_meta_encoder(config))
            + _num_parameters(cached_meta_vlm(config).projector)
        )
    missing = [one for one in encoder_configs(config) if not _is_downloaded(one, "encoder")]
    vision = sum(_num_parameters(cached_meta_encoder(one)) for one in missing)
    return 2.0 * (vision + (0 if _is_downloaded(config, "llm") else _num_language_parameters(config)))


def _is_downloaded(config: Config, component: str) -> bool:
    """Returns whether nothing of a component is left to download; the demo makes its own."""
    settings = getattr(config, component)
    is_made = settings.checkpoint in (TINY, *TINY_ENCODERS)
    return is_made or is_present(settings.checkpoint, settings.revision, VISION if component == "encoder" else None)


def _num_language_parameters(config: Config) -> int:
    """Returns the parameters of the language model, from two depths, as its blocks are alike."""
    num_blocks = int(text_config(config).num_hidden_layers)
    key, short = ["parameters", text_values(config), config.is_pretrained_vlm], range(1, min(2, num_blocks) + 1)
    counts: list[int] = cached(key, lambda: [_count_language_parameters(config, depth) for depth in short])
    # One block, and each further one the difference of the two depths.
    return counts[0] + (num_blocks - 1) * (counts[-1] - counts[0])


def _count_language_parameters(config: Config, depth: int) -> int:
    if config.is_pretrained_vlm:
        return _num_parameters(meta_vlm(config, depth, plain_vision_blocks(config) and 1).llm)
    with torch.device("meta"):
        return _num_parameters(AutoModelForCausalLM.from_config(text_config(config, depth)))


def _num_parameters(module: nn.Module) -> int:
    return sum(int(parameter.numel()) for parameter in module.parameters())


def language_batch(
    captions: Sequence[int],
    runs: Sequence[int],
    num_prompt: int,
    grid_thw: GridTHW | None = None,
    gap: int = 0,
    *,
    is_packed: bool = False,
) -> Batch:
    """Makes a batch of clips of one size like the collator, padded on the right or packed, without frames or features.

    Its ids and masks are real tensors, as their values decide on shapes.

    Args:
        captions: Caption tokens of each clip, including the end token; zeros for a batch for generation.
        runs: Visual tokens of each run; V is their sum.
        num_prompt: Text tokens in front of the caption, half of them before the visual tokens.
        grid_thw: Size of a clip in patches, where the model's positions depend on it.
        gap: Text tokens between two runs.
        is_packed: Whether all clips are in one sequence.
    """
    # 1. The prompt that all clips share: True at visual tokens.
    before = num_prompt // 2
    prompt = [False] * before
    for index, run in enumerate(runs):
        prompt += [False] * (gap if index else 0) + [True] * run
    prompt += [False] * (num_prompt - before)
    is_visual, lengths = torch.tensor(prompt), [len(prompt) + count for count in captions]
    # 2. (R, S): one packed row, or a row per clip.
    shape = (1, sum(lengths)) if is_packed else (len(lengths), max(lengths))
    # In a packed row the clips follow each other, otherwise each begins its own row.
    starts = [0, *accumulate(lengths)] if is_packed else [0] * len(lengths)
    ids, positions = torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    visual = torch.zeros(shape, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORED)
    for index, length in enumerate(lengths):
        row, start = (0 if is_packed else index), starts[index]
        visual[row, start : start + len(prompt)] = is_visual
        attention[row, start : start + length] = 1
        labels[row, start + len(prompt) : start + length] = 1
        positions[row, start : start + length] = torch.arange(length)
    is_labelled = any(captions)
    return Batch(
        clips=tuple(Clip(str(index), "", ("",)) for index in range(len(captions))),
        input_ids=ids,
        attention_mask=attention,
        **flat_indices(visual, labels if is_labelled else None),
        num_visual=(sum(runs),) * len(captions),
        lengths=tuple(lengths),
        is_right_padded=is_labelled,
        position_ids=positions if is_packed else None,
        grid_thw=None if grid_thw is None else (grid_thw,) * len(captions),
    )
