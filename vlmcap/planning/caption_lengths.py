"""How long captions are: those of the data where it is there, or else shares of the longest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 200  # lengths that stand for all
# Korean captions of AI Hub's background video (data set 71849): 311 to 708 tokens with a mean of 402 by Qwen3's
# tokenizer, 761 to 1 572 with a mean of 932 by Vicuna's. Shares of the longest one, from 0.45 with a mean of 0.58,
# follow a power of the rank.
_SHORTEST, _POWER = 0.45, 3.2


@dataclass(frozen=True, slots=True)
class CaptionLengths:
    """Caption lengths of a data set.

    Attributes:
        tokens: Tokens of captions with their end token, ascending.
    """

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[int], most: int) -> CaptionLengths:
        """The lengths of a data set.

        Args:
            counts: Tokens of each caption, in any order; those of 0 are left out.
            most: Longer captions are cut to it.
        """
        ordered = sorted(min(int(count), most) for count in counts if count)
        step = max(1, len(ordered) // _MOST)
        return cls(tuple(ordered[::-step][::-1]))  # with the longest one

    @classmethod
    def assumed(cls, longest: int) -> CaptionLengths:
        """The lengths of Korean captions of which the longest is given."""
        shares = (_SHORTEST + (1 - _SHORTEST) * ((index + 0.5) / _MOST) ** _POWER for index in range(_MOST - 1))
        return cls((*(max(1, round(share * longest)) for share in shares), longest))

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return self.tokens[-1]

    @property
    def mean(self) -> float:
        """Mean tokens of a caption."""
        return sum(self.tokens) / len(self.tokens)

    def longest_of(self, count: int) -> float:
        """Expected tokens of the longest of so many random captions, which a batch of them is padded to."""
        total = len(self.tokens)
        return sum(
            length * (((index + 1) / total) ** count - (index / total) ** count)
            for index, length in enumerate(self.tokens)
        )

    def spread(self, count: int) -> list[int]:
        """So many lengths, evenly spread over the captions, ascending."""
        return [self.tokens[int((index + 0.5) / count * len(self.tokens))] for index in range(count)]
