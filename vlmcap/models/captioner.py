"""Encoder, projector and language model joined into one captioner.

Legend: B clips, R rows, F frames, P patches per frame, V visual tokens per clip, S sequence, T label tokens, N
vocabulary, Dv vision width, Dl language width.
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
from vlmcap.models.decoding.settings import GenerationSettings, clips_for
from vlmcap.models.encoders import VisionEncoder
from vlmcap.models.encoders.base import on_device
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import is_causal
from vlmcap.models.llm.chunked_loss import can_chunk, chunked_cross_entropy, rows_per_chunk
from vlmcap.models.llm.prompt import PromptEncoder
from vlmcap.models.precision import autocast
from vlmcap.models.projectors import Projector
from vlmcap.types import Batch, Skipped

CLIPS_AT_A_TIME = 4  # clips that are encoded together for captions: more would only take memory


class ClipReader(Protocol):
    """Reads videos, by path or address, as batches of prompts, whose clips have the positions of their paths as ids."""

    def __call__(self, paths: Sequence[str | Path], batch_size: int) -> Iterable[Batch]:
        """Batches of up to `batch_size` clips on the CPU, in the order of the paths."""
        ...


class VideoCaptioner(nn.Module):
    """Captions of video clips.

    Args:
        encoder: Vision encoder; None when features come from the cache and nobody will bring frames.
        projector: Features to visual tokens, float32.
        llm: Causal language model, with or without adapters.
        prompt: Its tokenizer and the ids around the visual tokens.
        generation: Decoding of `generate`.
        loss_chunk_bytes: Bytes of float32 logits that `loss_sum` has at once; None for all.
        autocast_dtype: Type of the arithmetic of `caption`, as in training and evaluation; None for float32.
        reader: Reads the files of `caption`; None where only batches are captioned.
    """

    question_ids: Tensor
    has_plain_inputs = True  # the language model is called with embeddings and a mask, and nothing else

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
        self._graphs: tuple[Graphs | None] | None = None  # made at the first caption
        self.prompt, self.generation = prompt, generation
        self.loss_chunk_bytes, self.autocast_dtype, self.reader = loss_chunk_bytes, autocast_dtype, reader
        self.register_buffer("question_ids", torch.tensor(prompt.question_ids, dtype=torch.long), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the projector is."""
        return next(self.projector.parameters()).device

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of the T label tokens in nats, and T."""
        targets, places = _required(batch.targets), _required(batch.label_places)  # (T,)
        # 1. Encode: frames become patch features, unless those come from the cache.
        features = self.encode(batch)  # (B, F, 3, H, W) -> (B, F, P, Dv)
        # 2. Project: the features of each clip become visual tokens of the language model's width.
        visual = self.project(batch, features)  # (B, F, P, Dv) -> (sum of V, Dl)
        # 3. Merge: visual tokens take the places of the placeholders among the words' embeddings.
        inputs = self.language_inputs(batch, visual)  # (R, S) -> (R, S, Dl)
        del features, visual  # their memory is free while the language model runs
        # 4. Decode: the head runs on label positions only, as logits of all positions would take most of the memory.
        chunk_rows = self._chunk_rows(len(targets))
        hidden, logits = self._decode(inputs, places, has_head=chunk_rows is None)  # (R, S, Dl) -> (T, Dl), (T, N)
        # 5. Loss: over the whole vocabulary of N tokens; where logits take too much room, a few of their rows at a
        # time.
        if chunk_rows is not None:
            head: Any = base_model(self.llm).lm_head
            return chunked_cross_entropy(hidden, head.weight, targets, chunk_rows), len(targets)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)

    def encode(self, batch: Batch) -> Tensor:
        """Patch features (B, F, P, Dv), of frames or out of the cache.

        With gradients only where the encoder is trained.
        """
        if batch.features is not None:
            return batch.features.to(batch.input_ids.device)
        assert self.encoder is not None, "frames came, but the encoder was not loaded"
        is_trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            features: Tensor = self.encoder(
                _required(batch.frames), batch.grid_thw
            )  # uint8 (B, F, 3, H, W) -> (B, F, P, Dv)
        return features

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Batch:
        """Prompts with features in the place of frames, encoded as many at a time as captions are written.

        They wait in host memory.
        """
        if batch.features is not None or not len(batch):
            return batch
        size = self.generation.num_rows or len(batch)
        groups = [range(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
        return replace(batch, frames=None, features=torch.cat([self.encode(batch.part(rows)).cpu() for rows in groups]))

    def project(self, batch: Batch, features: Tensor) -> Tensor:
        """Visual tokens of all clips, one clip after another, float32 (B, F, P, Dv) -> (sum of V, Dl)."""
        prompt = self._embed_words(self.question_ids)
        if batch.grid_thw is None:
            return self.projector(features, prompt=prompt).flatten(0, 1)  # (B, V, Dl) -> (B * V, Dl)
        tokens: dict[int, Tensor] = {}
        for grid_thw in dict.fromkeys(
            batch.grid_thw
        ):  # clips of one size go through the projector together, without their padding
            rows = [row for row, other in enumerate(batch.grid_thw) if other == grid_thw]
            num_frames, height, width = grid_thw
            index = on_device(rows, features.device)
            own = features[index, :num_frames, : height * width]  # (B, F, P, Dv) -> the rows' own F and P
            tokens |= dict(zip(rows, self.projector(own, grid=(height, width), prompt=prompt), strict=True))
        return torch.cat([tokens[row] for row in range(len(batch))])

    def merge(self, batch: Batch, visual: Tensor) -> Tensor:
        """Input embeddings (R, S, Dl) with the visual tokens (sum of V, Dl) in their places."""
        embeddings = self._embed_words(batch.input_ids)  # (R, S) -> (R, S, Dl)
        assert len(batch.visual_places) == len(visual), "placeholders and visual tokens differ in number"
        # Ids, labels, mask and embeddings keep one length, whatever the padding side and the clips of a row.
        flat = embeddings.flatten(0, 1).index_copy(0, batch.visual_places, visual.to(embeddings.dtype))
        return flat.view(embeddings.shape)  # (R · S, Dl) -> (R, S, Dl)

    def language_inputs(self, batch: Batch, visual: Tensor) -> dict[str, Any]:
        """What the language model is called with, in training and for generation."""
        embeddings = self.merge(batch, visual)
        if batch.position_ids is None:
            return {"inputs_embeds": embeddings, "attention_mask": self.language_mask(batch)}
        # No mask: only without one does transformers keep apart the clips of a row, which it knows by positions that
        # start at 0 again.
        return {"inputs_embeds": embeddings, "position_ids": batch.position_ids}

    def language_mask(self, batch: Batch) -> Tensor | None:
        """The mask (R, S) that the language model is called with; None where it changes nothing for real tokens.

        With any mask, SDPA leaves its flash kernel, repeats keys and values for all heads, and takes a mask of S × S
        for each row.
        """
        return None if batch.is_right_padded and self.is_causal else batch.attention_mask

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Visual tokens (sum of V, Dl) of all clips, encoded and projected."""
        return self.project(batch, self.encode(batch))

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings (R, S, Dl) with the visual tokens of all clips in their places."""
        return self.merge(batch, self.visual_tokens(batch))

    def _embed_words(self, ids: Tensor) -> Tensor:
        model: Any = base_model(self.llm)
        embeddings: Tensor = model.get_input_embeddings()(ids)
        return embeddings

    def _chunk_rows(self, num_labels: int) -> int | None:
        """Label positions whose logits the loss makes at a time.

        None where it makes all at once, in the model's own forward pass.
        """
        model: Any = base_model(self.llm)
        if self.loss_chunk_bytes is None or not can_chunk(model):
            return None
        rows = rows_per_chunk(model.lm_head.out_features, self.loss_chunk_bytes)
        return rows if num_labels > rows else None

    def _decode(self, inputs: dict[str, Any], places: Tensor, *, has_head: bool) -> tuple[Tensor, Tensor]:
        """Hidden states of the places that predict labels (T, Dl), and their logits (T, N), or (0, N) without the head.

        The head is called by the class's own forward, as some scale what the head gives (HyperCLOVA X).
        """
        model: Any = base_model(self.llm)
        seen: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(arguments[0].flatten(0, 1).index_select(0, places))  # (R, S, Dl) -> (T, Dl)
            return (seen[0] if has_head else seen[0][:0],)

        handle = model.lm_head.register_forward_pre_hook(keep)
        try:
            logits = model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        return seen[0], logits

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """Captions of a left-padded batch, in row order.

        Of more clips than `GenerationSettings.num_rows`, some wait for others.
        """
        from vlmcap.models.llm.merge import adapters_for_captions

        self._explain_engine()
        with fastest_kernels(), adapters_for_captions(self.llm, is_merged=self.generation.is_merged):
            ids = self._native_ids(batch) if self.is_refilling else self._library_ids(batch)
        return self.prompt.decode(ids)

    @property
    def is_refilling(self) -> bool:
        """Whether our own decoding writes the captions, in which waiting clips take the rows of those that ended."""
        return self.generation.rules.engine is Engine.native and not self._engine_obstacle()

    def _engine_obstacle(self) -> str:
        """Why our own decoding cannot write the captions; empty if it can."""
        from vlmcap.models.decoding.engine import obstacle

        if not self.generation.is_greedy:
            return "it writes greedy captions alone"
        return obstacle(self.llm) if self.has_plain_inputs else "this model needs positions in time, height and width"

    def _explain_engine(self) -> None:
        """Says once why transformers writes the captions in place of our own decoding."""
        if self._has_explained or self.is_refilling or self.generation.rules.engine is not Engine.native:
            return
        self._has_explained = True
        ignored = "; evaluation.speculate_ngram is ignored" if self.generation.rules.speculate_ngram else ""
        reason = self._engine_obstacle()
        print(
            f"Captions are written by transformers, not by evaluation.engine=native, as {reason}{ignored}.",
            file=sys.stderr,
            flush=True,
        )

    @property
    def prompt_batch_size(self) -> int:
        """Clips of a batch to caption.

        More than there are rows where waiting clips can take the rows of those that end.
        """
        chosen = self.generation
        return clips_for(chosen.num_rows or 1, chosen.rules.clips_per_row if self.is_refilling else 1)

    def _native_ids(self, batch: Batch) -> list[list[int]]:
        """Greedy captions in row order, each up to and with its end token.

        With half of the rows from now on where memory runs out.
        """
        num_rows = self.generation.num_rows or len(batch)
        try:
            return self._ids_of_rows(batch, num_rows)
        except RuntimeError as error:  # PyTorch's own kind is one of these
            if num_rows == 1 or not is_out_of_memory(error):
                raise
        self.generation = replace(self.generation, num_rows=num_rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(
            f"Memory ran out: captions are written {num_rows // 2} at a time from here on.", file=sys.stderr, flush=True
        )
        return self._native_ids(batch)

    def _ids_of_rows(self, batch: Batch, num_rows: int) -> list[list[int]]:
        from vlmcap.models.decoding.engine import greedy_ids
        from vlmcap.models.decoding.graphs import make_graphs

        if self._graphs is None:
            self._graphs = (make_graphs(self.llm, self.generation.rules.cuda_graphs, self.device),)
        group = min(num_rows, CLIPS_AT_A_TIME)
        lengths = batch.lengths
        order = sorted(
            range(len(batch)), key=lambda row: -lengths[row]
        )  # like lengths together, so that little is padding

        def prompts() -> Iterator[Tensor]:
            for start in range(0, len(order), group):  # clips that wait are not encoded yet
                rows = order[start : start + group]
                embeddings = self.embed(batch.part(rows))
                yield from (embeddings[place, -lengths[row] :] for place, row in enumerate(rows))

        ids = greedy_ids(
            self.llm, prompts(), self.generation, self.prompt.stop_ids, min(num_rows, len(batch)), *self._graphs
        )
        by_row = dict(zip(order, ids, strict=True))
        return [by_row[row] for row in range(len(batch))]

    def _library_ids(self, batch: Batch) -> list[list[int]]:
        """Captions by transformers, in row order, padding behind them."""
        num_rows = self.generation.num_rows or len(batch)
        if num_rows >= len(batch):
            return self._generate_by_library(batch)
        ids: list[list[int]] = []
        for start in range(0, len(batch), num_rows):
            ids += self._generate_by_library(batch.part(range(start, min(start + num_rows, len(batch)))))
        return ids

    def _generate_by_library(self, batch: Batch) -> list[list[int]]:
        from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

        # transformers takes a row's left padding off its generated tokens, as if they were the prompt, when it
        # penalises repetition itself, so a caption would depend on what it is batched with. The 1.0 overrides what a
        # checkpoint may ask for.
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
        """Captions of video files, in order.

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
        """Each path or address with its caption, or with why it has none, in order and as the batches get ready."""
        assert self.reader is not None, "a captioner that was made without a reader captions batches only"
        self.eval()
        for batch in self.reader(paths, self.prompt_batch_size):
            batch = batch.to(self.device)
            with torch.inference_mode(), autocast(self.device, self.autocast_dtype):  # as Lightning's test loop
                texts = self.generate(batch) if len(batch) else []
            found: dict[str, str | Skipped] = {clip.id: text for clip, text in zip(batch.clips, texts, strict=True)}
            found |= {skipped.clip.id: skipped for skipped in batch.skipped}
            for index in sorted(found, key=int):
                yield paths[int(index)], found[index]


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
