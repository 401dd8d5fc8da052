"""Encoder, projector and language model joined into one captioner.

Legend: B clips, R rows, F frames, P patches a frame, V visual tokens a clip, S sequence, T label tokens, Dv vision width, Dl language
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.encoders import VisionEncoder
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.chunked_loss import can_chunk, chunked_cross_entropy, rows_per_chunk
from vlmcap.models.llm.prompt import PromptEncoder
from vlmcap.models.projectors import Projector
from vlmcap.types import Batch, GridTHW, Skipped


class VideoCaptioner(nn.Module):
    """Captions of video clips.

    Args:
        encoder: None when features come from the cache and nobody will bring frames.
        projector: Features to visual tokens, float32.
        llm: Causal language model, with or without adapters.
        prompt: Its tokenizer and the ids around the visual tokens.
        generation: Decoding of `generate`.
    """

    has_plain_inputs = True  # the language model is called with embeddings and a mask, and nothing else

    def __init__(
        self,
        encoder: VisionEncoder | None,
        projector: Projector,
        llm: nn.Module,
        prompt: PromptEncoder,
        generation: GenerationSettings,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.llm = encoder, projector, llm
        self.prompt, self.generation = prompt, generation
        # Set by the composition root, as models know nothing of files: paths -> batches for `generate`; a clip's id is its path's index.
        self.prepare: Callable[[Sequence[Path]], Iterable[Batch]] | None = None
        self.autocast_dtype: torch.dtype | None = None  # set there too: arithmetic of `caption`, as it was in training and evaluation
        self.loss_chunk_bytes: int | None = None  # and this: of float32 logits that `loss_sum` has at once; None is all

    @property
    def device(self) -> torch.device:
        """Where the projector is."""
        return next(self.projector.parameters()).device

    def encode(self, frames: Tensor, grid_thw: Sequence[GridTHW] | None = None) -> Tensor:
        """Patch features, uint8 (B, F, 3, H, W) -> (B, F, P, Dv); with gradients only where the encoder is trained."""
        assert self.encoder is not None, "frames came, but the encoder was not loaded"
        is_trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            features: Tensor = self.encoder(frames, grid_thw)
        return features

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Projected tokens of all clips, one clip after another, float32 (sum of V, Dl)."""
        features = batch.features if batch.features is not None else self.encode(_required(batch.frames), batch.grid_thw)
        question = torch.tensor(self.prompt.question_ids, device=features.device, dtype=torch.long)
        prompt = base_model(self.llm).get_input_embeddings()(question)  # type: ignore[operator]
        if batch.grid_thw is None:
            return self.projector(features, prompt=prompt).flatten(0, 1)
        tokens: dict[int, Tensor] = {}
        for grid_thw in dict.fromkeys(batch.grid_thw):  # clips of one size go through the projector together, without their padding
            rows = [row for row, other in enumerate(batch.grid_thw) if other == grid_thw]
            num_frames, height, width = grid_thw
            own = features[rows, :num_frames, : height * width]
            tokens |= dict(zip(rows, self.projector(own, grid=(height, width), prompt=prompt), strict=True))
        return torch.cat([tokens[row] for row in range(len(batch))])

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings with the visual tokens in their places, (R, S, Dl)."""
        model: Any = base_model(self.llm)
        embeddings: Tensor = model.get_input_embeddings()(batch.input_ids)
        visual = self.visual_tokens(batch)
        assert int(batch.visual_mask.sum()) == visual.shape[0], "placeholders and visual tokens differ in number"
        # By mask, not by position: ids, labels, mask and embeddings keep one length, whatever the padding side and the clips a row.
        return embeddings.masked_scatter(batch.visual_mask.unsqueeze(-1), visual.to(embeddings.dtype))

    def language_inputs(self, batch: Batch) -> dict[str, Any]:
        """What the language model is called with, in training and for generation."""
        if batch.position_ids is None:
            return {"inputs_embeds": self.embed(batch), "attention_mask": batch.attention_mask}
        # No mask: only without one does transformers keep apart the clips of a row, which it knows by positions that start anew.
        return {"inputs_embeds": self.embed(batch), "position_ids": batch.position_ids}

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of the T label tokens in nats, and T.

        The head runs on label positions only: with a vocabulary of 150 000, logits of visual positions would be most of the memory.
        """
        labels = _required(batch.labels)[:, 1:]
        is_label = labels != -100
        targets = labels[is_label]
        model: Any = base_model(self.llm)
        if self.loss_chunk_bytes is not None and can_chunk(model):
            rows = rows_per_chunk(model.lm_head.out_features, self.loss_chunk_bytes)
            if len(targets) > rows:
                hidden, _ = self._run_head_on(batch, is_label, is_skipped=True)
                return chunked_cross_entropy(hidden, model.lm_head.weight, targets, rows), len(targets)
        _, logits = self._run_head_on(batch, is_label)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)

    def _run_head_on(self, batch: Batch, is_label: Tensor, *, is_skipped: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states of label positions (T, Dl), and their logits (T, N), or (0, N) where the head is skipped.

        Through the class's own forward, as some scale what the head gives (HyperCLOVA X).
        """
        model: Any = base_model(self.llm)
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(inputs[0][:, :-1][is_label])
            return (seen[0][:0] if is_skipped else seen[0],)

        handle = model.lm_head.register_forward_pre_hook(keep)
        try:
            logits = model(**self.language_inputs(batch), use_cache=False).logits
        finally:
            handle.remove()
        return seen[0], logits

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """Captions of a left-padded batch, in row order; of more clips than `GenerationSettings.num_rows`, some wait for others."""
        return self.prompt.decode(self._own_ids(batch) if self.is_refilling else self._library_ids(batch))

    @property
    def is_refilling(self) -> bool:
        """Whether our own decoding writes the captions, in which waiting clips take the rows of those that ended."""
        from vlmcap.models.decoding.support import can_decode

        chosen = self.generation
        return chosen.engine == "own" and chosen.is_greedy and self.has_plain_inputs and can_decode(self.llm)

    def _own_ids(self, batch: Batch) -> list[list[int]]:
        """Greedy captions in row order, each up to and with its end token."""
        from vlmcap.models.decoding.engine import greedy_ids

        num_rows = self.generation.num_rows or len(batch)
        lengths = batch.attention_mask.sum(1).tolist()
        order = sorted(range(len(batch)), key=lambda row: -lengths[row])  # like lengths together, so that little is padding

        def prompts() -> Iterator[Tensor]:
            for start in range(0, len(order), num_rows):  # clips that wait are not encoded yet
                rows = order[start : start + num_rows]
                embeddings = self.embed(batch.part(rows))
                yield from (embeddings[place, -lengths[row] :] for place, row in enumerate(rows))

        ids = greedy_ids(self.llm, prompts(), self.generation, self.prompt.stop_ids, min(num_rows, len(batch)))
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

        # transformers takes a row's left padding off its generated tokens, as if they were the prompt, when it penalises repetition
        # itself, so a caption would depend on what it is batched with. The 1.0 overrides what a checkpoint may ask for.
        penalty = self.generation.repetition_penalty
        processors = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []
        ids: Tensor = self.llm.generate(  # type: ignore[operator]
            **self.language_inputs(batch),
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
        for _, caption in self.caption_files([Path(path) for path in paths]):
            if isinstance(caption, Skipped):
                raise UserError(f"{caption.clip.video} could not be read: {caption.reason}")
            captions.append(caption)
        return captions

    def caption_files(self, paths: Sequence[Path]) -> Iterator[tuple[Path, str | Skipped]]:
        """Each file with its caption, or with why it has none, in order and as the batches get ready."""
        assert self.prepare is not None, "made by vlmcap.load"
        self.eval()
        for batch in self.prepare(paths):
            with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                texts = self.generate(batch) if len(batch) else []
            found: dict[str, str | Skipped] = {clip.id: text for clip, text in zip(batch.clips, texts, strict=True)}
            found |= {skipped.clip.id: skipped for skipped in batch.skipped}
            for index in sorted(found, key=int):
                yield paths[int(index)], found[index]


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
