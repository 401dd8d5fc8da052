"""One caption as it is written: its tokens, which tokens may not come next, and which may be guessed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CaptionRow:
    """What a row of the batch has written.

    Args:
        request: Number of its clip.
        num_prompt_tokens: Before the caption.
        no_repeat: Length of n-grams that come once; 0 lets them repeat.
        lookup: Length of the n-grams by which the text to come is looked up in the text so far; 0 guesses nothing.
    """

    def __init__(self, request: int, num_prompt_tokens: int, *, no_repeat: int = 0, lookup: int = 0) -> None:
        self.request, self.num_prompt_tokens = request, num_prompt_tokens
        self.no_repeat, self.lookup = no_repeat, lookup
        self.ids: list[int] = []
        self.used: set[int] = set()
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of the first no_repeat - 1 tokens of an n-gram
        self._places: dict[tuple[int, ...], int] = {}  # where the text goes on behind the latest n-gram

    @property
    def num_cached(self) -> int:
        """Tokens whose keys the cache holds: all but the last, which the next step reads."""
        return self.num_prompt_tokens + len(self.ids) - 1

    def write(self, token: int) -> None:
        """Puts a token behind the text."""
        self.ids.append(token)
        self.used.add(token)
        if self.no_repeat and len(self.ids) >= self.no_repeat:
            self._followers.setdefault(tuple(self.ids[-self.no_repeat : -1]), []).append(token)
        if self.lookup and len(self.ids) > self.lookup:
            self._places[tuple(self.ids[-self.lookup - 1 : -1])] = len(self.ids) - 1

    def banned(self) -> Sequence[int]:
        """Tokens that would repeat an n-gram."""
        known = len(self.ids) - (self.no_repeat - 1)
        return self._followers.get(tuple(self.ids[known:]), ()) if self.no_repeat and known >= 0 else ()

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that came behind the last n-gram when it stood there before, a text that goes in circles read on and on.

        Prompt lookup decoding (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding), on the caption itself.
        """
        place = self._places.get(tuple(self.ids[-self.lookup :])) if self.lookup else None
        if place is None:
            return []
        tokens: list[int] = []
        for index in range(place, place + limit):
            tokens.append(self.ids[index] if index < len(self.ids) else tokens[index - len(self.ids)])
        return tokens


def penalised(logits: Tensor, rows: Sequence[CaptionRow], penalty: float) -> Tensor:
    """Logits (N, vocabulary), float32, after repetition penalty and n-gram ban, as transformers' processors leave them.

    Args:
        logits: (N, vocabulary).
        rows: The N captions so far.
        penalty: Divides the logits above 0 of tokens that were used, and multiplies those below (Keskar et al.,
            https://arxiv.org/abs/1909.05858); 1 changes nothing.
    """
    logits = logits.to(torch.float32, copy=True)
    if penalty != 1.0:
        used = _places([row.used for row in rows], logits.device)
        found = logits[used]
        logits[used] = torch.where(found < 0, found * penalty, found / penalty)
    logits[_places([row.banned() for row in rows], logits.device)] = -torch.inf
    return logits


def _places(tokens: Sequence[Sequence[int] | set[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of rows and tokens."""
    pairs = [(row, token) for row, own in enumerate(tokens) for token in own]
    index = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2)
    return index[:, 0], index[:, 1]
