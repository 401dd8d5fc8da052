"""The token ids of captions in progress, on the device, and the choice of the next tokens.

No operation synchronises with the device or changes a shape, so a step can be captured as a CUDA graph.

Legend: R slots, N slots of one call, M maximum tokens of a caption, q tokens per slot in one step, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vlmcap.models.decoding.settings import GenerationSettings


class SlotTexts:
    """Captions in progress, one per slot.

    Args:
        num_slots: R.
        settings: Length and repetition controls.
        stop_ids: Tokens that end a caption.
        device: Device of the language model.

    Attributes:
        ids: int64 (R, M), generated tokens of each slot from the first column on; later columns hold stale values.
        counts: int64 (R,), number of generated tokens.
        prompt_lengths: int64 (R,), number of prompt tokens.
        is_done: bool (R,), whether the caption has ended; nothing more is written then.
    """

    def __init__(
        self, num_slots: int, settings: GenerationSettings, stop_ids: Collection[int], device: torch.device
    ) -> None:
        self.max_tokens, rules = settings.max_new_tokens, settings.rules
        self.penalty, self.no_repeat = rules.repetition_penalty, rules.no_repeat_ngram_size
        # An n-gram as long as the caption could not repeat.
        self.ngram_size = rules.speculate_ngram if rules.speculate_ngram < self.max_tokens else 0
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.ids = torch.zeros(num_slots, self.max_tokens, dtype=torch.int64, device=device)
        # An empty slot holds one token, so that every slot of a step attends to something.
        self.counts = torch.ones(num_slots, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros_like(self.counts)
        self.is_done = torch.ones(num_slots, dtype=torch.bool, device=device)

    def start(self, slot: int, num_prompt_tokens: int) -> None:
        """Starts an empty caption in a slot."""
        self.counts[slot].fill_(0)
        self.prompt_lengths[slot].fill_(num_prompt_tokens)
        self.is_done[slot].fill_(False)

    def move(self, source: int, target: int) -> None:
        """Copies slot `source` over slot `target`, whose caption is lost."""
        for buffer in (self.ids, self.counts, self.prompt_lengths, self.is_done):
            buffer[target] = buffer[source]

    def num_cached(self, count: int) -> Tensor:
        """Returns the cached tokens of the first N slots, int64 (N,): all but the last, which the next step reads."""
        return self.prompt_lengths[:count] + self.counts[:count] - 1

    def last(self, count: int) -> Tensor:
        """Returns the last token of the first N slots, int64 (N, 1)."""
        return _tail(self.ids[:count], self.counts[:count], 1)

    def drafts(self, count: int, num_tokens: int) -> Tensor:
        """Returns draft tokens for the first N slots, int64 (N, K), -1 where there are none.

        A draft is what followed the last n-gram at its previous occurrence in the caption; a text that repeats itself
        is continued periodically. This is prompt lookup decoding (Saxena,
        https://github.com/apoorvumang/prompt-lookup-decoding), applied to the caption itself.
        """
        ids, counts, size = self.ids[:count], self.counts[:count, None], self.ngram_size
        if not size:
            return ids[:, :0]
        starts = torch.arange(self.max_tokens - size, device=ids.device)
        windows = ids.unfold(1, size, 1)[:, :-1]  # (N, M) -> (N, M - n, n): those with a token after them
        # (N, M - n): whether the window equals the last n tokens, and whether a written token follows it.
        is_match = (windows == _tail(ids, self.counts[:count], size)[:, None]).all(-1) & (starts < counts - size)
        # (N, 1): column after the latest match, -1 without a match.
        continuation = (starts + size).masked_fill(~is_match, -1).amax(1, keepdim=True)
        period = (counts - continuation).clamp(min=1)
        index = continuation.clamp(min=0) + torch.arange(num_tokens, device=ids.device) % period
        return ids.gather(1, index).masked_fill(continuation < 0, -1)

    def write(self, logits: Tensor, drafts: Tensor, first: int = 0) -> None:
        """Appends the best next token to slots `first` to `first` + N, and further ones while drafts are confirmed.

        Args:
            logits: (N, q, vocabulary), after the last token and after each draft token.
            drafts: int64 (N, q - 1), as returned by `drafts`.
            first: First of the slots.
        """
        written = slice(first, first + len(logits))
        ids, counts, is_done = self.ids[written], self.counts[written], self.is_done[written]
        is_active = ~is_done
        # Position by position: the model's own token is written, and the next position counts only if the draft there
        # was
        # this token.
        for step in range(logits.shape[1]):
            tokens = self._apply_penalties(logits[:, step], ids, counts).argmax(-1)
            # A slot that is full or done keeps its content, and needs a valid column all the same.
            column = counts.clamp(max=self.max_tokens - 1)[:, None]
            ids.scatter_(1, column, torch.where(is_active[:, None], tokens[:, None], ids.gather(1, column)))
            counts += is_active
            # (N, 1) == (number of stop ids,) -> (N, number of stop ids)
            is_over = (tokens[:, None] == self.stops).any(1) | (counts >= self.max_tokens)
            is_done |= is_active & is_over
            if step < drafts.shape[1]:
                is_active = is_active & ~is_over & (drafts[:, step] == tokens)

    def _apply_penalties(self, logits: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """Returns logits (N, vocabulary) after the repetition controls."""
        if self.penalty == 1.0 and not self.no_repeat:
            return logits
        logits = logits.float()
        if self.penalty != 1.0:
            logits = penalised(logits, ids, counts, self.penalty)
        return without_repeats(logits, ids, counts, self.no_repeat) if 0 < self.no_repeat <= self.max_tokens else logits


def penalised(logits: Tensor, ids: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Applies the repetition penalty to logits (N, vocabulary), like transformers' processor.

    Args:
        logits: (N, vocabulary), float32.
        ids: int64 (N, M), tokens of the captions so far.
        counts: int64 (N,), number of these tokens.
        penalty: Divides positive logits of tokens that were used, and multiplies negative ones (Keskar et al.,
            https://arxiv.org/abs/1909.05858).
    """
    is_used = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    used = torch.where(is_used, ids, ids[:, :1])  # the first token replaces those not written yet
    used_logits = logits.gather(1, used)
    # A penalty above 1 lowers the probability in both cases: a positive logit shrinks, a negative one grows in size.
    lowered = torch.where(used_logits < 0, used_logits * penalty, used_logits / penalty)
    return logits.scatter(1, used, torch.where(counts[:, None] > 0, lowered, used_logits))


def without_repeats(logits: Tensor, ids: Tensor, counts: Tensor, size: int) -> Tensor:
    """Returns logits (N, vocabulary) with -inf for tokens that would repeat an n-gram of `size` tokens."""
    windows = ids.unfold(1, size, 1)  # (N, M) -> (N, M - n + 1, n)
    # Windows whose first n - 1 tokens are the last n - 1 of the caption; their last token would complete the n-gram.
    is_repeat = (windows[..., :-1] == _tail(ids, counts, size - 1)[:, None]).all(-1)
    is_repeat &= torch.arange(windows.shape[1], device=ids.device) <= counts[:, None] - size  # complete
    # +inf changes nothing in a minimum, -inf bans the token.
    banned = logits.new_full(is_repeat.shape, torch.inf).masked_fill(is_repeat, -torch.inf)
    return logits.scatter_reduce(1, windows[..., -1], banned, "amin")


def _tail(ids: Tensor, counts: Tensor, size: int) -> Tensor:
    """Returns the last `size` tokens of each slot, (N, size); arbitrary ones of the slot if it has fewer."""
    index = counts[:, None] - size + torch.arange(size, device=ids.device)
    return ids.gather(1, index.clamp(min=0))
