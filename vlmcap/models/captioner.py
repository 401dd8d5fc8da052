"""A video captioner that joins a vision encoder, a projector and a language model.

Legend: B clips, R rows (B, or 1 for a packed batch), F frames, P patches per frame, V visual tokens per clip,
S sequence, T label tokens, N vocabulary, Dv vision width, Dl language width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.config import Engine
from vlmcap.determinism import fastest_kernels
from vlmcap.errors import UserError, is_out_of_memory
from vlmcap.models.decoding.graphs import Graphs
from vlmcap.models.decoding.settings import GenerationSettings, prompt_batch_size
from vlmcap.models.encoders import VisionEncoder
from vlmcap.models.encoders.base import on_device
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import is_causal
from vlmcap.models.llm.chunked_loss import can_chunk, chunked_cross_entropy, labels_per_chunk
from vlmcap.models.llm.prompt import PromptEncoder
from vlmcap.models.precision import autocast
from vlmcap.models.projectors import Projector
from vlmcap.types import Batch, Skipped

MAX_ENCODED_CLIPS = 4  # clips that `generate` encodes together: more would only take memory


class ClipReader(Protocol):
    """Reads videos, by path or address, as batches of prompts whose clips carry the indices of their paths as ids."""

    def __call__(self, paths: Sequence[str | Path], batch_size: int) -> Iterable[Batch]:
        """Yields batches of up to `batch_size` clips on the CPU, in the order of the paths."""
        ...


class VideoCaptioner(nn.Module):
    """Encodes video clips, projects their features and lets a language model caption them.

    Args:
        encoder: Vision encoder; None if all features come from the cache.
        projector: Maps features to visual tokens, in float32.
        llm: Causal language model, with or without adapters.
        prompt: Tokenizer of the language model and the ids around the visual tokens.
        generation: Decoding settings of `generate`.
        loss_chunk_bytes: Bytes of float32 logits that `forward` materialises at a time; None for all logits at once.
        autocast_dtype: Dtype of the arithmetic in `caption`, as in training and evaluation; None for float32.
        reader: Reads the files for `caption`; None if only batches are captioned.
    """

    question_ids: Tensor
    has_plain_inputs = True  # the language model takes embeddings and a mask, and no further inputs

    def __init__(
        self,
        encoder: VisionEncoder | None,
        projector: Projector,
        llm: nn.Module,
        prompt: PromptEncoder,
        generation: GenerationSettings,
        *,
        loss_chunk_bytes: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        reader: ClipReader | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.llm = encoder, projector, llm
        self.is_causal = is_causal(base_model(llm))
        self._has_explained = False
        self._graphs: tuple[Graphs | None] | None = None  # created by the first call of `generate`
        self.prompt, self.generation = prompt, generation
        self.loss_chunk_bytes, self.autocast_dtype, self.reader = loss_chunk_bytes, autocast_dtype, reader
        # Not persistent: the ids follow from the configuration, and no checkpoint needs them.
        self.register_buffer("question_ids", torch.tensor(prompt.question_ids, dtype=torch.long), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the projector."""
        return next(self.projector.parameters()).device

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """Computes the training loss of a batch.

        Args:
            batch: Clips with their captions as targets.

        Returns:
            The negative log-likelihood in nats, summed over the T label tokens, and T.
        """
        targets, label_indices = _required(batch.targets), _required(batch.label_indices)  # (T,)
        # 1. Encode: frames become patch features, unless these come from the cache.
        features = self.encode(batch)  # (B, F, 3, H, W) -> (B, F, P, Dv)
        # 2. Project: the features of each clip become visual tokens of the language model's width.
        visual = self.project(batch, features)  # (B, F, P, Dv) -> (sum of V, Dl)
        # 3. Merge: visual tokens replace the placeholders among the word embeddings.
        inputs = self.language_inputs(batch, visual)  # (R, S) -> (R, S, Dl)
        del features, visual  # their memory is free while the language model runs
        # 4. Decode: the head runs on label positions only, as logits of all positions would take most of the memory.
        chunk_size = self._loss_chunk_size(len(targets))
        hidden, logits = self._decode(
            inputs, label_indices, has_head=chunk_size is None
        )  # (R, S, Dl) -> (T, Dl), (T, N)
        # 5. Loss: over the N tokens of the vocabulary; in chunks where the logits of all T labels take too much memory.
        if chunk_size is not None:
            head: Any = base_model(self.llm).lm_head
            return chunked_cross_entropy(hidden, head.weight, targets, chunk_size), len(targets)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)

    def encode(self, batch: Batch) -> Tensor:
        """Returns patch features (B, F, P, Dv), encoded from the frames or taken from the cache.

        The encoder builds a graph for gradients only if some of its parameters are trained.
        """
        if batch.features is not None:
            return batch.features.to(batch.input_ids.device)
        assert self.encoder is not None, "the batch holds frames, but the encoder was not loaded"
        frames = _required(batch.frames)
        is_trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            features: Tensor = self.encoder(frames, batch.grid_thw)  # uint8 (B, F, 3, H, W) -> (B, F, P, Dv)
        return features

    @torch.no_grad()
    def with_features(self, batch: Batch) -> Batch:
        """Returns the prompts with features in host memory in place of frames, encoded a few clips at a time."""
        if batch.features is not None or not len(batch):
            return batch
        size = self.generation.num_slots or len(batch)
        groups = [range(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
        # Features of waiting clips lie in host memory, which is larger; a GPU holds those of one group.
        features = torch.cat([self.encode(batch.select(group)).cpu() for group in groups])
        return replace(batch, frames=None, features=features)

    def project(self, batch: Batch, features: Tensor) -> Tensor:
        """Projects features to the visual tokens of all clips, one clip after another.

        Args:
            batch: Clips of the features.
            features: (B, F, P, Dv).

        Returns:
            Visual tokens, float32 (sum of V, Dl).
        """
        prompt = self._embed_words(self.question_ids)
        if batch.grid_thw is None:
            return self.projector(features, prompt=prompt).flatten(0, 1)  # (B, V, Dl) -> (B * V, Dl)
        tokens: dict[int, Tensor] = {}
        for grid_thw in dict.fromkeys(batch.grid_thw):  # clips of one size are projected together, without padding
            clips = [clip for clip, other in enumerate(batch.grid_thw) if other == grid_thw]
            # h · w of these clips may be below P, the size to which the batch is padded.
            num_frames, height, width = grid_thw
            index = on_device(clips, features.device)
            selected = features[index, :num_frames, : height * width]  # (B, F, P, Dv) -> F and P of these clips
            tokens |= dict(zip(clips, self.projector(selected, grid=(height, width), prompt=prompt), strict=True))
        return torch.cat([tokens[clip] for clip in range(len(batch))])

    def merge(self, batch: Batch, visual: Tensor) -> Tensor:
        """Returns input embeddings (R, S, Dl) with the visual tokens (sum of V, Dl) in place of the placeholders."""
        embeddings = self._embed_words(batch.input_ids)  # (R, S) -> (R, S, Dl)
        assert len(batch.visual_indices) == len(visual), "placeholders and visual tokens differ in number"
        # Ids, labels, mask and embeddings keep one length, for both padding sides and for packed rows.
        flat = embeddings.flatten(0, 1).index_copy(0, batch.visual_indices, visual.to(embeddings.dtype))
        return flat.view(embeddings.shape)  # (R · S, Dl) -> (R, S, Dl)

    def language_inputs(self, batch: Batch, visual: Tensor) -> dict[str, Any]:
        """Returns the keyword arguments of the language model, for training and for generation."""
        embeddings = self.merge(batch, visual)
        if batch.position_ids is None:
            return {"inputs_embeds": embeddings, "attention_mask": self.language_mask(batch)}
        # Without a mask: only then does transformers keep the clips of a packed row apart, by the positions that
        # restart at 0.
        return {"inputs_embeds": embeddings, "position_ids": batch.position_ids}

    def language_mask(self, batch: Batch) -> Tensor | None:
        """Returns the attention mask (R, S) of the language model; None where it changes nothing for real tokens.

        With any mask, SDPA does not use its flash kernel, repeats keys and values for all heads, and needs an S × S
        mask for each row.
        """
        return None if batch.is_right_padded and self.is_causal else batch.attention_mask

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Encodes and projects all clips to visual tokens (sum of V, Dl)."""
        return self.project(batch, self.encode(batch))

    def embed(self, batch: Batch) -> Tensor:
        """Returns input embeddings (R, S, Dl) with the visual tokens of all clips in place."""
        return self.merge(batch, self.visual_tokens(batch))

    def _embed_words(self, ids: Tensor) -> Tensor:
        model: Any = base_model(self.llm)
        embeddings: Tensor = model.get_input_embeddings()(ids)
        return embeddings

    def _loss_chunk_size(self, num_labels: int) -> int | None:
        """Returns how many labels have their logits computed at a time; None for all, by the model's forward pass."""
        model: Any = base_model(self.llm)
        if self.loss_chunk_bytes is None or not can_chunk(model):
            return None
        size = labels_per_chunk(model.lm_head.out_features, self.loss_chunk_bytes)
        return size if num_labels > size else None

    def _decode(self, inputs: dict[str, Any], label_indices: Tensor, *, has_head: bool) -> tuple[Tensor, Tensor]:
        """Runs the language model, its head on the positions that predict labels only.

        The class's own forward calls the head, because some classes scale its output (HyperCLOVA X).

        Returns:
            Hidden states (T, Dl) of these positions, and their logits (T, N), or (0, N) without the head.
        """
        model: Any = base_model(self.llm)
        # The hook keeps the hidden states for the chunked loss, whose head runs outside of the model.
        seen: list[Tensor] = []

        def keep_label_positions(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(arguments[0].flatten(0, 1).index_select(0, label_indices))  # (R, S, Dl) -> (T, Dl)
            # An empty slice gives the head nothing to do, while the rest of the class's own forward still runs.
            return (seen[0] if has_head else seen[0][:0],)

        handle = model.lm_head.register_forward_pre_hook(keep_label_positions)
        try:
            # Keys and values would only take memory, as nothing is generated.
            logits = model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        return seen[0], logits

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """Captions the clips of a left-padded batch, in order.

        Clips beyond `GenerationSettings.num_slots` wait until a slot is free.
        """
        from vlmcap.models.llm.merge import adapters_for_inference

        self._explain_engine()
        with fastest_kernels(), adapters_for_inference(self.llm, is_merged=self.generation.is_merged):
            ids = self._native_ids(batch) if self.use_continuous_batching else self._library_ids(batch)
        return self.prompt.decode(ids)

    @property
    def use_continuous_batching(self) -> bool:
        """Whether the native engine decodes: a waiting clip then takes the slot of a caption that has ended."""
        return self.generation.rules.engine is Engine.native and not self._native_engine_obstacle()

    def _native_engine_obstacle(self) -> str:
        """Returns why the native engine cannot decode; empty if it can."""
        from vlmcap.models.decoding.engine import native_engine_obstacle

        if not self.generation.is_greedy:
            return "the native engine supports greedy search only"
        if not self.has_plain_inputs:
            return "its language model takes more than embeddings and a mask of padding"
        return native_engine_obstacle(self.llm)

    def _explain_engine(self) -> None:
        """Prints once why transformers decodes in place of the native engine."""
        if self._has_explained or self.use_continuous_batching or self.generation.rules.engine is not Engine.native:
            return
        self._has_explained = True
        ignored = "; evaluation.speculate_ngram is ignored" if self.generation.rules.speculate_ngram else ""
        reason = self._native_engine_obstacle()
        _print(f"Captions are generated by transformers instead of evaluation.engine=native, as {reason}{ignored}.")

    @property
    def prompt_batch_size(self) -> int:
        """Clips in a batch of prompts: more than there are slots if waiting clips can take slots that become free."""
        chosen = self.generation
        clips_per_slot = chosen.rules.clips_per_slot if self.use_continuous_batching else 1
        return prompt_batch_size(chosen.num_slots or 1, clips_per_slot)

    def _native_ids(self, batch: Batch) -> list[list[int]]:
        """Decodes with the native engine; halves the number of slots for good when memory runs out.

        Returns:
            Ids of each clip's caption, up to and including its end token.
        """
        num_slots = self.generation.num_slots or len(batch)
        try:
            return self._ids_with_slots(batch, num_slots)
        except RuntimeError as error:  # torch.cuda.OutOfMemoryError is a subclass
            if num_slots == 1 or not is_out_of_memory(error):
                raise
        # After the `except` block, whose exception keeps the tensors of the failed attempt alive.
        self.generation = replace(self.generation, num_slots=num_slots // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _print(f"Memory ran out: from now on, at most {num_slots // 2} captions are decoded at a time.")
        return self._native_ids(batch)

    def _ids_with_slots(self, batch: Batch, num_slots: int) -> list[list[int]]:
        from vlmcap.models.decoding.engine import greedy_ids
        from vlmcap.models.decoding.graphs import make_graphs

        if self._graphs is None:
            self._graphs = (make_graphs(self.llm, self.generation.rules.cuda_graphs, self.device),)
        group_size = min(num_slots, MAX_ENCODED_CLIPS)
        lengths = batch.lengths
        order = sorted(range(len(batch)), key=lambda clip: -lengths[clip])  # similar lengths together: little padding

        def prompts() -> Iterator[Tensor]:
            for start in range(0, len(order), group_size):  # waiting clips are not encoded yet
                clips = order[start : start + group_size]
                embeddings = self.embed(batch.select(clips))
                # The batch is left-padded, so the last `length` positions are the prompt: (N, S, Dl) -> N × (length,
                # Dl).
                yield from (embeddings[index, -lengths[clip] :] for index, clip in enumerate(clips))

        ids = greedy_ids(
            self.llm, prompts(), self.generation, self.prompt.stop_ids, min(num_slots, len(batch)), *self._graphs
        )
        # Back from the order of lengths to that of the batch.
        by_clip = dict(zip(order, ids, strict=True))
        return [by_clip[clip] for clip in range(len(batch))]

    def _library_ids(self, batch: Batch) -> list[list[int]]:
        """Decodes with transformers, a batch of `num_slots` clips at a time; returns ids padded at the end."""
        size = self.generation.num_slots or len(batch)
        if size >= len(batch):
            return self._generate_by_library(batch)
        ids: list[list[int]] = []
        for start in range(0, len(batch), size):
            ids += self._generate_by_library(batch.select(range(start, min(start + size, len(batch)))))
        return ids

    def _generate_by_library(self, batch: Batch) -> list[list[int]]:
        from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

        # When transformers adds the repetition penalty itself, it strips a row's left padding from the generated tokens
        # as if they were the prompt, so a caption would depend on what it is batched with. The 1.0 overrides the
        # checkpoint's generation_config.json.
        penalty = self.generation.rules.repetition_penalty
        processors = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []
        ids: Tensor = self.llm.generate(  # type: ignore[operator]
            **self.language_inputs(batch, self.visual_tokens(batch)),
            **self.generation.as_arguments(),
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList(processors),
            eos_token_id=self.prompt.stop_ids,
            pad_token_id=self.prompt.pad_id,
        )
        return ids.tolist()

    def caption(self, paths: Sequence[str | Path]) -> list[str]:
        """Captions video files, in order.

        Raises:
            UserError: A file could not be read.
        """
        captions = []
        for _, caption in self.caption_files(paths):
            if isinstance(caption, Skipped):
                raise UserError(f"{caption.clip.video} could not be read: {caption.reason}")
            captions.append(caption)
        return captions

    def caption_files(self, paths: Sequence[str | Path]) -> Iterator[tuple[str | Path, str | Skipped]]:
        """Yields each path or address with its caption or the reason why it has none, in order, batch by batch."""
        assert self.reader is not None, "a captioner without a reader captions batches only"
        self.eval()
        for batch in self.reader(paths, self.prompt_batch_size):
            batch = batch.to(self.device)
            with torch.inference_mode(), autocast(self.device, self.autocast_dtype):  # as in Lightning's test loop
                texts = self.generate(batch) if len(batch) else []
            # Ids are the indices of the paths; see `ClipReader`.
            captions: dict[str, str | Skipped] = {clip.id: text for clip, text in zip(batch.clips, texts, strict=True)}
            captions |= {skipped.clip.id: skipped for skipped in batch.skipped}
            for index in sorted(captions, key=int):
                yield paths[int(index)], captions[index]


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
