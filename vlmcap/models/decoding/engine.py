"""Greedy captions of many clips by a few rows, which are never idle while clips wait.

A step of the language model costs nearly the same for one row as for many, and captions differ in length: in plain batches, rows that
have ended wait for the longest. Here they leave at once, and waiting clips take their places, as in continuous batching (Yu et al.,
Orca, https://www.usenix.org/conference/osdi22/presentation/yu).

Legend: N rows, S sequence, q tokens a row in one step, Dl language width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmcap.models.decoding.cache import RowCache
from vlmcap.models.decoding.rows import CaptionRow, penalised
from vlmcap.models.llm.adapt import base_model

if TYPE_CHECKING:
    from vlmcap.models.decoding.settings import GenerationSettings

_DRAFT = 4  # most tokens that are guessed at a time: every row pays for the longest guess
_GROUP = 8  # newcomers come in when an eighth of the rows is free, as reading their prompts one by one would be slower


@torch.no_grad()
def greedy_ids(
    llm: nn.Module, prompts: Iterable[Tensor], settings: GenerationSettings, stop_ids: Collection[int], num_rows: int
) -> list[list[int]]:
    """Ids of captions in the order of the prompts, each up to and with its first end token, as transformers' greedy search finds them.

    Args:
        llm: Causal language model that `can_decode` accepts, with or without adapters.
        prompts: Input embeddings (S, Dl) of each clip, without padding; drawn as rows get free.
        settings: Length, repetition controls and guessing.
        stop_ids: Tokens that end a caption.
        num_rows: Captions that are written at a time.
    """
    decoder = _Decoder(llm, settings, stop_ids, num_rows)
    waiting = enumerate(prompts)
    done: dict[int, list[int]] = {}
    while decoder.admit(waiting) or decoder.rows:
        done |= {row.request: row.ids for row in decoder.take_finished()}
        if decoder.rows:
            decoder.step()
            done |= {row.request: row.ids for row in decoder.take_finished()}
    return [done[request] for request in range(len(done))]


class _Decoder:
    """The rows that are being written, in the places 0 to N of the cache."""

    def __init__(self, llm: nn.Module, settings: GenerationSettings, stop_ids: Collection[int], num_rows: int) -> None:
        self.model: Any = base_model(llm)
        self.settings, self.stop_ids, self.num_rows = settings, frozenset(stop_ids), num_rows
        self.cache = RowCache(num_rows)
        self.rows: list[CaptionRow] = []
        self.is_plain = settings.repetition_penalty == 1.0 and not settings.no_repeat_ngram_size

    def admit(self, waiting: Iterable[tuple[int, Tensor]]) -> int:
        """Number of newcomers, whose prompts were read and whose first token was written."""
        free = self.num_rows - len(self.rows)
        if self.rows and free < max(1, self.num_rows // _GROUP):
            return 0
        newcomers = list(islice(waiting, free))
        if newcomers:
            self._read([prompt for _, prompt in newcomers], [self._new_row(request, len(prompt)) for request, prompt in newcomers])
        return len(newcomers)

    def _new_row(self, request: int, num_prompt_tokens: int) -> CaptionRow:
        chosen = self.settings
        return CaptionRow(request, num_prompt_tokens, no_repeat=chosen.no_repeat_ngram_size, lookup=chosen.speculate_ngram)

    def _read(self, prompts: list[Tensor], newcomers: list[CaptionRow]) -> None:
        # Padded on the right, so that keys stand from the first column on, and no token sees padding: it comes later than all of them.
        embeddings = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=embeddings.device)
        self.cache.expect_newcomers(len(self.rows), embeddings.shape[1])
        # The head runs on last tokens only, through the class's own forward, as some scale what it gives (HyperCLOVA X).
        handle = self.model.lm_head.register_forward_pre_hook(
            lambda _, inputs: (inputs[0][torch.arange(len(last)), last.to(inputs[0].device)].unsqueeze(1),)
        )
        try:
            logits = self.model(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True).logits
        finally:
            handle.remove()
        self._write(logits, newcomers, [[] for _ in newcomers])
        self.rows += newcomers

    def step(self) -> None:
        """Writes the next token of every row, and those behind it that were guessed rightly."""
        most = self.settings.max_new_tokens
        drafts = [row.draft(min(_DRAFT, most - len(row.ids) - 1)) for row in self.rows]
        num_tokens = 1 + max(map(len, drafts))
        device = self.model.get_input_embeddings().weight.device
        tokens = [([row.ids[-1], *draft] + [0] * num_tokens)[:num_tokens] for row, draft in zip(self.rows, drafts, strict=True)]
        lengths = [row.num_cached for row in self.rows]
        positions, mask = self.cache.expect_step(torch.tensor(lengths, device=device), max(lengths), num_tokens)
        logits = self.model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=self._as_wanted(mask),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self._write(logits, self.rows, drafts)

    def _as_wanted(self, mask: Tensor) -> Tensor:
        """The mask as the model's attention takes it."""
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _write(self, logits: Tensor, rows: list[CaptionRow], drafts: list[list[int]]) -> None:
        """Puts the best tokens behind the rows: behind a right guess, the next one's too.

        Args:
            logits: (N, q, vocabulary), behind the last token and behind each guess.
            rows: The N rows.
            drafts: Up to q - 1 guesses of each.
        """
        best = logits.argmax(-1).tolist() if self.is_plain else None
        going = list(range(len(rows)))
        for place in range(logits.shape[1]):
            if best is not None:
                tokens = [best[index][place] for index in going]
            else:
                own = [rows[index] for index in going]
                tokens = penalised(logits[going, place], own, self.settings.repetition_penalty).argmax(-1).tolist()
            right = []
            for index, token in zip(going, tokens, strict=True):
                rows[index].write(token)
                if not self._is_finished(rows[index]) and drafts[index][place : place + 1] == [token]:
                    right.append(index)
            going = right
            if not going:
                break

    def _is_finished(self, row: CaptionRow) -> bool:
        return row.ids[-1] in self.stop_ids or len(row.ids) >= self.settings.max_new_tokens

    def take_finished(self) -> list[CaptionRow]:
        """The rows that have ended; the last of the others take their places."""
        finished = [row for row in self.rows if self._is_finished(row)]
        count = len(self.rows) - len(finished)
        free = [index for index, row in enumerate(self.rows[:count]) if self._is_finished(row)]
        movers = [index for index in range(count, len(self.rows)) if not self._is_finished(self.rows[index])]
        self.cache.move_rows(movers, free)
        for source, target in zip(movers, free, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[count:]
        return finished
