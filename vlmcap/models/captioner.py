"""Encoder, projector and language model joined into one captioner.

Legend: B batch, F frames, P patches a frame, V visual tokens a clip, S sequence, T label tokens, Dv vision width, Dl language width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError
from vlmcap.models.encoders import VisionEncoder
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.prompt import PromptEncoder
from vlmcap.models.projectors import Projector
from vlmcap.types import Batch, Skipped


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How captions are decoded; one beam is greedy search."""

    max_new_tokens: int
    num_beams: int = 1
    repetition_penalty: float = 1.0


class VideoCaptioner(nn.Module):
    """Captions of video clips.

    Args:
        encoder: None when features come from the cache and nobody will bring frames.
        projector: Features to visual tokens, float32.
        llm: Causal language model, with or without adapters.
        prompt: Its tokenizer and the ids around the visual tokens.
        generation: Decoding of `generate`.
    """

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

    @property
    def device(self) -> torch.device:
        """Where the projector is."""
        return next(self.projector.parameters()).device

    def encode(self, frames: Tensor) -> Tensor:
        """Patch features of the frozen encoder, uint8 (B, F, 3, H, W) -> (B, F, P, Dv)."""
        assert self.encoder is not None, "frames came, but the encoder was not loaded"
        with torch.no_grad():
            features: Tensor = self.encoder(frames)
        return features

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings with the visual tokens in their places, (B, S, Dl)."""
        model: Any = base_model(self.llm)
        embeddings: Tensor = model.get_input_embeddings()(batch.input_ids)
        features = batch.features if batch.features is not None else self.encode(_required(batch.frames))
        visual = self.projector(features)
        assert int(batch.visual_mask.sum()) == visual.shape[0] * visual.shape[1], "placeholders and visual tokens differ in number"
        # By mask, not by position: ids, labels, mask and embeddings keep one length, whatever the padding side.
        return embeddings.masked_scatter(batch.visual_mask.unsqueeze(-1), visual.to(embeddings.dtype))

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed negative log-likelihood of the T label tokens in nats, and T.

        The head runs on label positions only: with a vocabulary of 150 000, logits of visual positions would be most of the memory.
        """
        model: Any = base_model(self.llm)
        hidden = model.model(inputs_embeds=self.embed(batch), attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        labels = _required(batch.labels)[:, 1:]
        is_label = labels != -100
        logits = model.lm_head(hidden[:, :-1][is_label])
        return F.cross_entropy(logits.float(), labels[is_label], reduction="sum"), int(is_label.sum())

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """Captions of a left-padded batch, in row order."""
        settings, model = self.generation, self.llm
        ids = model.generate(  # type: ignore[operator]
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention_mask,
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            repetition_penalty=settings.repetition_penalty,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.prompt.stop_ids,
            pad_token_id=self.prompt.pad_id,
        )
        return self.prompt.decode(ids.tolist())

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
            texts = self.generate(batch) if len(batch) else []
            found: dict[str, str | Skipped] = {clip.id: text for clip, text in zip(batch.clips, texts, strict=True)}
            found |= {skipped.clip.id: skipped for skipped in batch.skipped}
            for index in sorted(found, key=int):
                yield paths[int(index)], found[index]


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
