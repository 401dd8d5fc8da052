"""Memory profiles of a configuration's components, and the store that caches them on disk.

There are profiles of the encoder, the projector, the language model in training, and its prefill pass.

Legend: B clips, F frames, P patches per frame, Dv vision width, V visual tokens per clip, Dl language width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmcap.assembly.base_checkpoints import encoder_configs
from vlmcap.assembly.components import autocast_dtype, dtype_of, lora_of, loss_chunk_bytes
from vlmcap.config import Batching, Config, EncoderTuning, PretrainedVlmConfig, TimedVlmConfig
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.merge import adapters_for_inference
from vlmcap.planning.estimate.meta_models import (
    PROMPT_TOKENS,
    architecture,
    cached,
    cached_meta_encoder,
    cached_meta_vlm,
    fake_encoder,
    fake_llm,
    fake_projector,
    plain_vision_blocks,
    planned_sizes,
    text_config,
)
from vlmcap.planning.estimate.profile_store import ProfileStore
from vlmcap.planning.estimate.score_models import KEYS, profile_scores
from vlmcap.planning.estimate.sizes import Sizes, clip_sizes, frames_shape, language_batch, uses_native_decoding
from vlmcap.planning.estimate.stages import (
    Anchors,
    StageMemory,
    extrapolate,
    extrapolate_clips,
    extrapolate_kept,
    find_blocks,
    profile_stage,
)
from vlmcap.plugins import plugins_of
from vlmcap.types import Batch

ORIGINALS = "originals of weights"  # weights that merged copies replace during captioning
_SHORT_DEPTH = 2  # blocks in the shorter of two profiles
_FEW_TOKENS, _MORE_TOKENS = 4096, 24576  # tokens of the batches that the language model is profiled at
NO_SIZES = Sizes((1, 1, 1), 0, 1, 0, 1, (1,), 0)  # for profiles of the language model alone


class MemoryProfiler:
    """Profiles the components of one configuration.

    Args:
        config: Run configuration.
        has_flash: Whether the GPU has compute capability 8.0 or newer.
        sizes: Sizes of a clip; None takes those of the largest clip of the configuration.
    """

    def __init__(self, config: Config, has_flash: bool, sizes: Sizes | None = None) -> None:
        self.config, self.has_flash = config, has_flash
        self.sizes = sizes or clip_sizes(config)
        self.store = ProfileStore(Path(config.paths.cache_dir).expanduser() / "plans")
        self.is_merged = False  # whether adapters are merged during captioning
        self.trains_encoder = config.tuning.encoder_tuning is not EncoderTuning.none

    def with_adapters(self, *, is_merged: bool) -> Self:
        """Returns a memory profiler for captioning with adapters that are merged, or are not."""
        other = copy.copy(self)
        other.is_merged = is_merged
        return other

    @property
    def depth(self) -> int:
        """Blocks of the language model."""
        return int(text_config(self.config).num_hidden_layers)

    @property
    def min_recomputed(self) -> int:
        """Fewest recomputed blocks in a profile that also has kept blocks."""
        return self.short_depth("language")

    def encoder(self, num_clips: int) -> StageMemory:
        """Profiles frames to features; every figure is linear in the clips, as these are encoded independently."""
        if num_clips > 2:
            return extrapolate(self.encoder(1), self.encoder(2), num_clips - 1)
        settings = dataclasses.asdict(self.config.encoder) | {"name": "", "is_cached": False}
        tuning = None
        if self.trains_encoder:
            tuning = [self.config.tuning.encoder_tuning.value, dataclasses.asdict(lora_of(self.config))]
        key = {
            "encoder": settings,
            "base": [self._architecture("encoder", one) for one in encoder_configs(self.config)],
            "tuning": tuning,
            "frames": [self.sizes.grid, self.sizes.frame_bytes, self.sizes.num_encoder_blocks],
            "plugin": plugins_of(self.config).get("encoder"),
        }
        depth = plain_vision_blocks(self.config) if self.config.is_pretrained_vlm else self.sizes.num_encoder_blocks
        return self._profile(
            "encoder", key | {"clips": num_clips}, depth, lambda blocks: self._profile_encoder(num_clips, blocks)
        )

    def projector(self, num_clips: int) -> StageMemory:
        """Profiles features to visual tokens."""
        model = self.config.model
        key = {
            "projector": dataclasses.asdict(self.config.projector),
            "sizes": dataclasses.asdict(self.sizes),
            "clips": num_clips,
            "width": int(text_config(self.config).hidden_size),
            "base": model.checkpoint if isinstance(model, PretrainedVlmConfig) else "",
            "input": self.trains_encoder,
            "plugin": plugins_of(self.config).get("projector"),
            "trained": [stage.projector_lr > 0 for stage in self.config.tuning.stages.values()],
        }
        return self._profile("projector", key, None, lambda _: self._profile_projector(num_clips))

    def language(self, num_clips: int, num_caption: int, num_kept: int = 0, *, is_training: bool = True) -> StageMemory:
        """Profiles visual tokens and text to the loss, or without captions the prefill pass of generation.

        Args:
            num_clips: B.
            num_caption: Caption tokens per clip; 0 for prefill.
            num_kept: Number of last blocks that are not recomputed.
            is_training: False for the validation loss, which has no backward pass.
        """
        key = self._language_key(num_clips, num_caption, is_training)
        make = partial(self._profile_language, num_clips, num_caption, is_training)
        return self._profile_kept(key, num_kept, make) if num_kept else self._profile("language", key, self.depth, make)

    def shallow_language(
        self, num_clips: int, num_caption: int, num_more: int = 0, *, is_training: bool = True
    ) -> StageMemory:
        """Profiles the language model with `num_more` blocks more than the fewest that represent all."""
        key = self._language_key(num_clips, num_caption, is_training)
        make = partial(self._profile_language, num_clips, num_caption, is_training)
        return self._profile_depth("language", key, self.short_depth("language") + num_more, make)

    def scores(self) -> dict[str, StageMemory | None]:
        """Profiles the models of scores, by setting; None for those that are not known on this machine.

        They do not depend on the rest of the configuration.
        """
        checkpoints = {key: getattr(self.config.evaluation, key) for key in KEYS}
        return cached(["scores", checkpoints], lambda: profile_scores(self.config, self.has_flash))  # type: ignore[no-any-return]

    def checkpoint_bytes(self, num_clips: int, num_caption: int) -> float:
        """Returns the bytes of the input of a checkpointed block of the language model."""
        width = int(text_config(self.config).hidden_size)
        num_tokens = num_clips * (self.sizes.num_before_caption + num_caption)
        return float(num_tokens * width * dtype_of(self.config.hardware.precision).itemsize)

    def _language_key(self, num_clips: int, num_caption: int, is_training: bool) -> dict[str, Any]:
        config = self.config
        return {
            "base": self._architecture("llm"),
            "llm": [config.llm.quantization.value, config.llm.attention],
            "clips": num_clips,
            "runs": self.sizes.runs,
            "gap": self.sizes.gap,
            "caption": num_caption,
            "tuning": dataclasses.asdict(config.tuning),
            "grid": self.sizes.grid if config.is_pretrained_vlm else (),
            "chunk": config.hardware.loss_chunk_mib,
            "merged": self.is_merged and not num_caption,
            "training": is_training,
            "packed": self._packs(num_caption, is_training),
            "engine": uses_native_decoding(config),
            "offload": config.hardware.offload_checkpoints,
        }

    def _packs(self, num_caption: int, is_training: bool) -> bool:
        return self.config.data.batching is Batching.packed and num_caption > 0 and is_training

    def short_depth(self, what: str) -> int:
        """Returns the blocks of the shorter of two profiles; the first blocks of Qwen3-VL take DeepStack features."""
        return _SHORT_DEPTH + (self._num_stacked_widths() - 1 if what == "language" else 0)

    def _profile(
        self, what: str, key: dict[str, Any], depth: int | None, make: Callable[[int], StageMemory]
    ) -> StageMemory:
        short = self.short_depth(what)
        if depth is None or depth <= short + 1:
            return self._profile_depth(what, key, depth, make)
        return extrapolate(
            self._profile_depth(what, key, short, make), self._profile_depth(what, key, short + 1, make), depth - short
        )

    def _profile_depth(
        self, what: str, key: dict[str, Any], depth: int | None, make: Callable[[int], StageMemory]
    ) -> StageMemory:
        hardware = self.config.hardware
        key = key | {
            "what": what,
            "precision": hardware.precision.value,
            "checkpointing": hardware.gradient_checkpointing,
        }
        return self.store.get(key | {"flash": self.has_flash, "depth": depth}, lambda: make(depth or 0))

    def _profile_kept(self, key: dict[str, Any], num_kept: int, make: Callable[[int, int], StageMemory]) -> StageMemory:
        """Profiles the language model with the last blocks kept, from three short profiles.

        These have two recomputed blocks and a kept one, and one more of each kind.
        """
        num_recomputed = self.min_recomputed
        key = key | {"what": "language", "precision": self.config.hardware.precision.value, "flash": self.has_flash}
        shapes = ((num_recomputed + 1, 1), (num_recomputed + 2, 1), (num_recomputed + 2, 2))
        base, longer, wider = (self.store.get(key | {"kept": shape}, partial(make, *shape)) for shape in shapes)
        return extrapolate_kept(base, longer, wider, self.depth - num_kept - num_recomputed, num_kept - 1)

    def _architecture(self, component: str, config: Config | None = None) -> Any:
        return architecture(config or self.config, "model" if self.config.is_pretrained_vlm else component)

    def _profile_encoder(self, num_clips: int, depth: int) -> StageMemory:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        encoder = fake_encoder(self.config, mode, depth or None)
        encoder.train(self.trains_encoder)
        with mode:
            frames = torch.empty(num_clips, *frames_shape(encoder, self.sizes.grid), dtype=torch.uint8)
        grids = [self.sizes.grid] * num_clips
        return profile_stage(
            encoder,
            lambda: encoder(frames, grids),
            mode=mode,
            blocks=() if self.config.is_pretrained_vlm or not depth else list(find_blocks(encoder, depth)),
            inputs=[frames],
            dtype=autocast_dtype(self.config),
            has_flash=self.has_flash,
            has_backward=self.trains_encoder,
        )

    def _profile_projector(self, num_clips: int) -> StageMemory:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        encoder = cached_meta_encoder(self.config)
        projector = fake_projector(self.config, planned_sizes(self.config, encoder), mode)
        frames, rows, columns = self.sizes.grid
        dtype, width = dtype_of(self.config.hardware.precision), int(text_config(self.config).hidden_size)
        with mode:
            # (B, T, P, Dv)
            shape = (num_clips, frames, rows * columns, self.sizes.embed_dim)
            features = torch.empty(shape, dtype=dtype, requires_grad=self.trains_encoder)
            prompt = torch.empty(PROMPT_TOKENS // 2, width, dtype=dtype)
        is_trained = any(parameter.requires_grad for parameter in projector.parameters())
        return profile_stage(
            projector,
            lambda: projector(features, grid=(rows, columns), prompt=prompt),
            mode=mode,
            inputs=[features, prompt],
            dtype=autocast_dtype(self.config),
            has_flash=self.has_flash,
            has_backward=is_trained or self.trains_encoder,
        )

    def _profile_language(
        self, num_clips: int, num_caption: int, is_training: bool, depth: int, num_kept: int = 0
    ) -> StageMemory:
        # 1. Build a model of `depth` blocks, and the visual tokens that it gets.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        is_training = is_training and num_caption > 0
        llm, captioner_class = fake_llm(self.config, mode, depth, self.has_flash, num_kept)
        llm.train(is_training)
        width = int(text_config(self.config).hidden_size) * self._num_stacked_widths()
        with mode:
            visual = torch.empty(num_clips, self.sizes.num_visual, width, requires_grad=is_training)
        grid = self.sizes.grid if self.config.is_pretrained_vlm else None
        # 2. Make a batch of text. Lengths differ as in real batches, because libraries drop a mask without padding.
        captions = [num_caption, *[max(0, num_caption - 1)] * (num_clips - 1)]
        is_packed = self._packs(num_caption, is_training)
        batch = language_batch(captions, self.sizes.runs, PROMPT_TOKENS, grid, self.sizes.gap, is_packed=is_packed)
        if not num_caption:
            batch = self._padded_prompts(batch)
        # 3. Build a captioner whose encoder and projector are replaced by these visual tokens.
        prompt: Any = SimpleNamespace(question_ids=[1])
        captioner = captioner_class(
            None, torch.nn.Identity(), llm, prompt, None, loss_chunk_bytes=loss_chunk_bytes(self.config)
        )
        captioner.encode = lambda batch: visual  # type: ignore[method-assign]
        # (B, V, Dl) -> (B * V, Dl)
        captioner.project = lambda batch, features: features.flatten(0, 1)  # type: ignore[method-assign]
        inner = base_model(llm).model
        if hasattr(inner, "get_placeholder_mask"):  # Qwen-VL's class compares embeddings, which are fake here
            mask = batch.visual_mask.unsqueeze(-1)
            inner.get_placeholder_mask = lambda *_, **__: (mask, mask)
        caches: list[Any] = []  # keeps the keys and values alive to the end of the profile

        # 4. Profile a training step, or the prefill pass.
        def prefill() -> torch.Tensor:
            output = llm(
                **captioner.language_inputs(batch, captioner.visual_tokens(batch)), use_cache=True, logits_to_keep=1
            )
            caches.append(output.past_key_values)
            logits: torch.Tensor = output.logits
            return logits

        profile = partial(
            profile_stage,
            llm,
            (lambda: captioner(batch)[0]) if num_caption else prefill,
            mode=mode,
            blocks=list(find_blocks(base_model(llm), depth)),
            inputs=[visual],
            dtype=autocast_dtype(self.config),
            has_flash=self.has_flash,
            has_backward=is_training,
            num_kept=num_kept,
        )
        return profile() if num_caption else self._with_caption_adapters(llm, mode, profile)

    def _with_caption_adapters(
        self, llm: torch.nn.Module, mode: FakeTensorMode, profile: Callable[[], StageMemory]
    ) -> StageMemory:
        """Profiles the model with its adapters in the state that they have during captioning.

        Weights that merged copies replace count as `ORIGINALS`.
        """
        before = {id(parameter): parameter for parameter in llm.parameters()}
        dtype = autocast_dtype(self.config)
        autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
        with mode, autocast, torch.no_grad(), adapters_for_inference(llm, is_merged=self.is_merged):
            memory_profile = profile()
            now = {id(parameter) for parameter in llm.parameters()}
        originals = sum(one.numel() * one.element_size() for key, one in before.items() if key not in now)
        return dataclasses.replace(memory_profile, weights={**memory_profile.weights, ORIGINALS: originals})

    def _padded_prompts(self, batch: Batch) -> Batch:
        """Pads prompts as the decoding engine does.

        The native one pads on the right without a mask, transformers on the left where clips differ in size.
        """
        if uses_native_decoding(self.config):
            return dataclasses.replace(batch, is_right_padded=True)
        if (
            self.config.is_pretrained_vlm
            or len(cached_meta_encoder(self.config).possible_grids(self.config.data.num_frames)) > 1
        ):
            batch.attention_mask[1:, 0] = 0
        return batch

    def _num_stacked_widths(self) -> int:
        """Returns how many language widths a visual token has: Qwen3-VL appends those of its DeepStack layers."""
        if not isinstance(self.config.model, TimedVlmConfig):
            return 1
        return 1 + int(cached_meta_vlm(self.config).encoder.num_deep_layers)


class FastMemoryProfiler(MemoryProfiler):
    """Interpolates, so that encoders share the language model's profiles and batch sizes the projector's."""

    @property
    def width(self) -> int:
        """Width of the language model."""
        return int(text_config(self.config).hidden_size)

    def projector(self, num_clips: int) -> StageMemory:
        """Profiles features to visual tokens, extrapolated from one and two clips."""
        return extrapolate_clips(super().projector(1), super().projector(2), num_clips)

    def language(self, num_clips: int, num_caption: int, num_kept: int = 0, *, is_training: bool = True) -> StageMemory:
        """Interpolates by tokens and blocks; with kept layers the profile is exact."""
        if num_kept:
            return super().language(num_clips, num_caption, num_kept)
        num_tokens = num_clips * (self.sizes.num_visual + PROMPT_TOKENS + num_caption)
        return self.anchors(num_caption, is_training=is_training).at(
            num_tokens, self.depth - self.short_depth("language"), num_clips
        )

    def anchors(self, num_caption: int, *, is_training: bool = True) -> Anchors:
        """Returns the profiles of the language model that serve all clip sizes of this configuration."""
        text, data = PROMPT_TOKENS + num_caption, self.config.data
        has_more = num_caption > 0 and data.batch_size > 1
        is_checkpointed = is_training and num_caption > 0 and self.config.hardware.gradient_checkpointing
        few = max(_FEW_TOKENS, 4 * text)
        few_tokens, more_tokens = self._with_visual(few - text), self._with_visual(few + _MORE_TOKENS - text)
        return Anchors(
            num_tokens=few,
            num_more_tokens=few + _MORE_TOKENS,
            short=few_tokens.shallow_language(1, num_caption, is_training=is_training),
            longer=few_tokens.shallow_language(1, num_caption, 1, is_training=is_training),
            wide=more_tokens.shallow_language(1, num_caption, is_training=is_training),
            wide_longer=None
            if is_checkpointed
            else more_tokens.shallow_language(1, num_caption, 1, is_training=is_training),
            doubled=self._with_visual(few // 2 - text).shallow_language(2, num_caption, is_training=is_training)
            if has_more
            else None,
        )

    def _with_visual(self, num_visual: int) -> MemoryProfiler:
        sizes = Sizes((1, 1, num_visual), 0, 1, 0, num_visual, (num_visual,), 0)
        return MemoryProfiler(self.config, self.has_flash, sizes).with_adapters(is_merged=self.is_merged)
