"""The traces of a configuration: encoder, projector, language model in training, and its pass over prompts.

Legend: B clips, F frames, P patches a frame, Dv vision width, V visual tokens a clip, Dl language width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.parts import dtype_of, loss_chunk_bytes
from vlmcap.config import Config, EncoderTuning, ModelKind, Precision
from vlmcap.planning.estimate.meta_models import (
    PROMPT_TOKENS,
    architecture,
    hollow_encoder,
    hollow_llm,
    hollow_projector,
    outline,
    plain_vision_blocks,
    planned_spec,
    text_config,
    whole_outline,
)
from vlmcap.planning.estimate.sizes import Sizes, frames_shape, sizes_of
from vlmcap.planning.estimate.trace_store import TraceStore

if TYPE_CHECKING:
    import torch

    from vlmcap.planning.estimate.stages import StageTrace

_SHORT = 2  # blocks of the shorter of two traces


class Tracer:
    """Makes and keeps the traces of one configuration.

    Args:
        config: Of the run.
        has_flash: Of the card.
        sizes: In place of those of the configuration's largest clip.
    """

    def __init__(self, config: Config, has_flash: bool, sizes: Sizes | None = None) -> None:
        self.config, self.has_flash = config, has_flash
        self.sizes = sizes or sizes_of(config)
        self.store = TraceStore(Path(config.paths.cache_dir).expanduser() / "plans")
        self.trains_encoder = config.tuning.encoder is not EncoderTuning.none

    @property
    def depth(self) -> int:
        """Blocks of the language model."""
        return int(text_config(self.config).num_hidden_layers)

    @property
    def fewest_again(self) -> int:
        """Blocks computed again, at the fewest, that a trace with kept blocks begins with."""
        return self.short("language")

    def encoder(self, num_clips: int) -> StageTrace:
        """Frames to features; every figure is linear in the clips, as none of them sees another."""
        from vlmcap.planning.estimate.stages import extrapolate

        if num_clips > 2:
            return extrapolate(self.encoder(1), self.encoder(2), num_clips - 1)
        settings = dataclasses.asdict(self.config.encoder) | {"name": "", "is_cached": False}
        key = {
            "encoder": settings,
            "base": self._base("encoder"),
            "tuning": self._encoder_tuning(),
            "frames": [self.sizes.grid, self.sizes.frame_bytes, self.sizes.num_encoder_blocks],
        }
        depth = plain_vision_blocks(self.config) if self.config.is_whole else self.sizes.num_encoder_blocks
        return self._trace("encoder", key | {"clips": num_clips}, depth, lambda blocks: self._trace_encoder(num_clips, blocks))

    def projector(self, num_clips: int) -> StageTrace:
        """Features to visual tokens."""
        key = {"projector": dataclasses.asdict(self.config.projector), "sizes": dataclasses.asdict(self.sizes), "clips": num_clips}
        key |= {"width": int(text_config(self.config).hidden_size), "base": self.config.model.checkpoint, "input": self.trains_encoder}
        key["trained"] = [stage.projector_lr > 0 for stage in self.config.tuning.stages.values()]
        return self._trace("projector", key, None, lambda _: self._trace_projector(num_clips))

    def language(self, num_clips: int, num_caption: int, num_kept: int = 0) -> StageTrace:
        """Visual tokens and text to the loss, or with no caption the pass over a prompt that generation begins with."""
        key, make = self._language_key(num_clips, num_caption), partial(self._trace_language, num_clips, num_caption)
        return self._trace_kept(key, num_kept, make) if num_kept else self._trace("language", key, self.depth, make)

    def shallow_language(self, num_clips: int, num_caption: int, num_more: int = 0) -> StageTrace:
        """The same of as few blocks as may stand for all, and `num_more`."""
        key, make = self._language_key(num_clips, num_caption), partial(self._trace_language, num_clips, num_caption)
        return self._keep("language", key, self.short("language") + num_more, make)

    def _language_key(self, num_clips: int, num_caption: int) -> dict[str, Any]:
        key = {"base": self._base("llm"), "llm": [self.config.llm.quantization.value, self.config.llm.attention], "clips": num_clips}
        key |= {"runs": self.sizes.runs, "gap": self.sizes.gap, "caption": num_caption, "tuning": dataclasses.asdict(self.config.tuning)}
        key |= {"grid": self.sizes.grid if self.config.is_whole else (), "chunk": self.config.hardware.loss_chunk_mib}
        return key | {"offload": self.config.hardware.offload_checkpoints}

    def short(self, what: str) -> int:
        """Blocks of the shorter of two traces; the first blocks of Qwen3-VL take DeepStack's features."""
        return _SHORT + (self._deep_layers() - 1 if what == "language" else 0)

    def _trace(self, what: str, key: dict[str, Any], depth: int | None, make: Callable[[int], StageTrace]) -> StageTrace:
        from vlmcap.planning.estimate.stages import extrapolate

        short = self.short(what)
        if depth is None or depth <= short + 1:
            return self._keep(what, key, depth, make)
        return extrapolate(self._keep(what, key, short, make), self._keep(what, key, short + 1, make), depth - short)

    def _keep(self, what: str, key: dict[str, Any], depth: int | None, make: Callable[[int], StageTrace]) -> StageTrace:
        hardware = self.config.hardware
        key = key | {"what": what, "precision": hardware.precision.value, "checkpointing": hardware.gradient_checkpointing}
        return self.store.get(key | {"flash": self.has_flash, "depth": depth}, lambda: make(depth or 0))

    def _trace_kept(self, key: dict[str, Any], num_kept: int, make: Callable[[int, int], StageTrace]) -> StageTrace:
        """The trace with the last blocks kept, out of three short ones: two blocks computed again and one kept, and one more of each."""
        from vlmcap.planning.estimate.stages import extrapolate_kept

        again = self.fewest_again
        key = key | {"what": "language", "precision": self.config.hardware.precision.value, "flash": self.has_flash}
        shapes = ((again + 1, 1), (again + 2, 1), (again + 2, 2))
        base, longer, wider = (self.store.get(key | {"kept": shape}, partial(make, *shape)) for shape in shapes)
        return extrapolate_kept(base, longer, wider, self.depth - num_kept - again, num_kept - 1)

    def _base(self, part: str) -> Any:
        return architecture(self.config, "model" if self.config.is_whole else part)

    def _encoder_tuning(self) -> Any:
        return [self.config.tuning.encoder.value, dataclasses.asdict(self.config.tuning.lora)] if self.trains_encoder else None

    @property
    def _autocast(self) -> torch.dtype | None:
        precision = self.config.hardware.precision
        return None if precision is Precision.fp32 else dtype_of(precision)

    def _trace_encoder(self, num_clips: int, depth: int) -> StageTrace:
        import torch

        from vlmcap.planning.estimate.stages import blocks_of, trace_stage

        mode = _fake_mode()
        encoder = hollow_encoder(self.config, mode, depth or None)
        encoder.train(self.trains_encoder)
        shape = frames_shape(self.config, encoder, self.sizes.grid)
        with mode:
            frames = torch.empty(num_clips, *shape, dtype=torch.uint8)
        varies = shape[1] != 3
        grids = [self.sizes.grid] * num_clips if varies else None
        return trace_stage(
            encoder,
            lambda: encoder(frames, grids),
            mode=mode,
            blocks=() if self.config.is_whole else list(blocks_of(encoder, depth)),
            inputs=[frames],
            dtype=self._autocast,
            has_flash=self.has_flash,
            has_backward=self.trains_encoder,
        )

    def _trace_projector(self, num_clips: int) -> StageTrace:
        import torch

        from vlmcap.planning.estimate.stages import trace_stage

        mode = _fake_mode()
        encoder = outline(self.config)
        projector = hollow_projector(self.config, planned_spec(self.config, encoder), mode)
        frames, rows, columns = self.sizes.grid
        dtype, width = dtype_of(self.config.hardware.precision), int(text_config(self.config).hidden_size)
        with mode:
            shape = (num_clips, frames, rows * columns, self.sizes.embed_dim)
            features = torch.empty(shape, dtype=dtype, requires_grad=self.trains_encoder)
            prompt = torch.empty(PROMPT_TOKENS // 2, width, dtype=dtype)
        is_trained = any(parameter.requires_grad for parameter in projector.parameters())
        return trace_stage(
            projector,
            lambda: projector(features, grid=(rows, columns), prompt=prompt),
            mode=mode,
            inputs=[features, prompt],
            dtype=self._autocast,
            has_flash=self.has_flash,
            has_backward=is_trained or self.trains_encoder,
        )

    def _trace_language(self, num_clips: int, num_caption: int, depth: int, num_kept: int = 0) -> StageTrace:
        import torch

        from vlmcap.models.llm.adapt import base_model
        from vlmcap.planning.estimate.batches import language_batch
        from vlmcap.planning.estimate.stages import blocks_of, trace_stage

        mode = _fake_mode()
        llm, captioner_class = hollow_llm(self.config, mode, depth, self.has_flash, num_kept)
        llm.train(num_caption > 0)
        width = int(text_config(self.config).hidden_size) * self._deep_layers()
        with mode:
            visual = torch.empty(num_clips, self.sizes.num_visual, width, requires_grad=num_caption > 0)
        grid = self.sizes.grid if self.config.is_whole else None
        batch = language_batch(num_clips, self.sizes.runs, PROMPT_TOKENS, num_caption, grid, self.sizes.gap)
        prompt: Any = SimpleNamespace(question_ids=[1])
        captioner = captioner_class(None, torch.nn.Identity(), llm, prompt, None, loss_chunk_bytes=loss_chunk_bytes(self.config))
        captioner.encode = lambda batch: visual  # type: ignore[method-assign]
        captioner.project = lambda batch, features: features.flatten(0, 1)  # type: ignore[method-assign]
        inner = base_model(llm).model
        if hasattr(inner, "get_placeholder_mask"):  # Qwen-VL's class compares embeddings, which have no values here
            places = batch.visual_mask.unsqueeze(-1)
            inner.get_placeholder_mask = lambda *_, **__: (places, places)
        caches: list[Any] = []

        def prefill() -> torch.Tensor:
            output = llm(**captioner.language_inputs(batch, captioner.visual_tokens(batch)), use_cache=True, logits_to_keep=1)
            caches.append(output.past_key_values)
            logits: torch.Tensor = output.logits
            return logits

        return trace_stage(
            llm,
            (lambda: captioner.loss_sum(batch)[0]) if num_caption else prefill,
            mode=mode,
            blocks=list(blocks_of(base_model(llm), depth)),
            inputs=[visual],
            dtype=self._autocast,
            has_flash=self.has_flash,
            has_backward=num_caption > 0,
            num_kept=num_kept,
        )

    def _deep_layers(self) -> int:
        """How often the language width stands in what the projector gives: Qwen3-VL's DeepStack layers come with it."""
        if self.config.model.kind is not ModelKind.qwen3_vl:
            return 1
        return 1 + int(whole_outline(self.config).encoder.num_deep_layers)


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
