"""What each row has written, on the device, and the choice of its next tokens.

Nothing here waits for the device or changes a shape.

Legend: R rows, N rows of one call, M most tokens of a caption, q tokens a row in one step, K tokens that are guessed.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vlmcap.models.decoding.settings import GenerationSettings


class RowTexts:
    """Captions in progress.

    Args:
        num_rows: R.
        settings: Length and repetition controls.
        stop_ids: Tokens that end a caption.
        device: Where the language model is.

    Attributes:
        ids: int64 (R, M), each row's tokens from the first column on, and anything behind them.
        counts: int64 (R,), tokens that each row has written.
        prompt_lengths: int64 (R,), tokens in front of them.
        is_done: bool (R,); a row that has ended writes nothing more.
    """

    def __init__(
        self, num_rows: int, settings: GenerationSettings, stop_ids: Collection[int], device: torch.device
    ) -> None:
        self.most, rules = settings.max_new_tokens, settings.rules
        self.penalty, self.no_repeat = rules.repetition_penalty, rules.no_repeat_ngram_size
        self.lookup = rules.speculate_ngram if rules.speculate_ngram < self.most else 0
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.ids = torch.zeros(num_rows, self.most, dtype=torch.int64, device=device)
        # A row that nobody has taken reads one token at the first position, so that no row of a step attends to
        # nothing.
        self.counts = torch.ones(num_rows, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros_like(self.counts)
        self.is_done = torch.ones(num_rows, dtype=torch.bool, device=device)

    def start(self, row: int, num_prompt_tokens: int) -> None:
        """Gives a row to a caption that is still empty."""
        self.counts[row].fill_(0)
        self.prompt_lengths[row].fill_(num_prompt_tokens)
        self.is_done[row].fill_(False)

    def move(self, source: int, target: int) -> None:
        """Puts a row into the place of another, which is lost."""
        for own in (self.ids, self.counts, self.prompt_lengths, self.is_done):
            own[target] = own[source]

    def num_cached(self, count: int) -> Tensor:
        """Tokens of rows 0 to N whose keys the cache holds, int64 (N,): all but the last, which the next step reads."""
        return self.prompt_lengths[:count] + self.counts[:count] - 1

    def last(self, count: int) -> Tensor:
        """The last token of rows 0 to N, int64 (N, 1)."""
        return _tail(self.ids[:count], self.counts[:count], 1)

    def drafts(self, count: int, num_tokens: int) -> Tensor:
        """Guesses at the next tokens of rows 0 to N, int64 (N, K), -1 where there is none.

        They are what came behind the last n-gram when it stood in the caption before; a text that goes in circles is
        read on and on.
        Prompt lookup decoding (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding), on the caption itself.
        """
        ids, counts, size = self.ids[:count], self.counts[:count, None], self.lookup
        if not size:
            return ids[:, :0]
        starts = torch.arange(self.most - size, device=ids.device)
        windows = ids.unfold(1, size, 1)[:, :-1]  # (N, M) -> (N, M - n, n): those that something may follow
        is_match = (windows == _tail(ids, self.counts[:count], size)[:, None]).all(-1) & (starts < counts - size)
        place = (
            (starts + size).masked_fill(~is_match, -1).amax(1, keepdim=True)
        )  # (N, 1), where the text goes on behind the latest match
        period = (counts - place).clamp(min=1)
        index = place.clamp(min=0) + torch.arange(num_tokens, device=ids.device) % period
        return ids.gather(1, index).masked_fill(place < 0, -1)

    def write(self, logits: Tensor, drafts: Tensor, first: int = 0) -> None:
        """Puts the best tokens behind rows `first` to `first` + N: behind a right guess, the next one's too.

        Args:
            logits: (N, q, vocabulary), behind the last token and behind each guess.
            drafts: int64 (N, q - 1), as `drafts` gave them.
            first: First of the rows.
        """
        rows = slice(first, first + len(logits))
        ids, counts, is_done = self.ids[rows], self.counts[rows], self.is_done[rows]
        is_going = ~is_done
        for place in range(logits.shape[1]):
            tokens = self._chosen(logits[:, place], ids, counts).argmax(-1)
            slots = counts.clamp(max=self.most - 1)[:, None]
            ids.scatter_(1, slots, torch.where(is_going[:, None], tokens[:, None], ids.gather(1, slots)))
            counts += is_going
            is_over = (tokens[:, None] == self.stops).any(1) | (counts >= self.most)
            is_done |= is_going & is_over
            if place < drafts.shape[1]:
                is_going = is_going & ~is_over & (drafts[:, place] == tokens)

    def _chosen(self, logits: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """Logits (N, vocabulary) that the best token is taken from."""
        if self.penalty == 1.0 and not self.no_repeat:
            return logits
        logits = logits.float()
        if self.penalty != 1.0:
            logits = penalised(logits, ids, counts, self.penalty)
        return without_repeats(logits, ids, counts, self.no_repeat) if 0 < self.no_repeat <= self.most else logits


def penalised(logits: Tensor, ids: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Logits (N, vocabulary), float32, after the repetition penalty, as transformers' processor leaves them.

    Args:
        logits: (N, vocabulary), float32.
        ids: int64 (N, M), the captions so far.
        counts: int64 (N,), their tokens.
        penalty: Divides the logits above 0 of tokens that were used, and multiplies those below (Keskar et al.,
            https://arxiv.org/abs/1909.05858).
    """
    is_used = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    used = torch.where(is_used, ids, ids[:, :1])  # the first token stands in for those that are not written yet
    found = logits.gather(1, used)
    lowered = torch.where(found < 0, found * penalty, found / penalty)
    return logits.scatter(1, used, torch.where(counts[:, None] > 0, lowered, found))


def without_repeats(logits: Tensor, ids: Tensor, counts: Tensor, size: int) -> Tensor:
    """Logits (N, vocabulary) with -inf for tokens that would repeat an n-gram of `size` tokens."""
    windows = ids.unfold(1, size, 1)  # (N, M) -> (N, M - n + 1, n)
    is_repeat = (windows[..., :-1] == _tail(ids, counts, size - 1)[:, None]).all(-1)
    is_repeat &= torch.arange(windows.shape[1], device=ids.device) <= counts[:, None] - size  # written to their end
    banned = logits.new_full(is_repeat.shape, torch.inf).masked_fill(is_repeat, -torch.inf)
    return logits.scatter_reduce(1, windows[..., -1], banned, "amin")


def _tail(ids: Tensor, counts: Tensor, size: int) -> Tensor:
    """The last `size` tokens of each row, (N, size); something of the row where it has fewer."""
    index = counts[:, None] - size + torch.arange(size, device=ids.device)
    return ids.gather(1, index.clamp(min=0))
