"""Caption lengths of the data, or assumed shares of the longest caption where the data is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MAX_LENGTHS = 200  # lengths that represent all
# Korean captions of AI Hub's background video (data set 71849): 311 to 708 tokens with a mean of 402 by Qwen3's
# tokenizer, 761 to 1 572 with a mean of 932 by Vicuna's. Relative to the longest one, they start at 0.45, have a mean
# of 0.58 and follow a power of the rank.
_SHORTEST, _POWER = 0.45, 3.2


@dataclass(frozen=True, slots=True)
class CaptionLengths:
    """Caption lengths of a data set.

    Attributes:
        tokens: Tokens per caption including the end token, ascending.
    """

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[int], most: int) -> CaptionLengths:
        """Returns the lengths of a data set.

        Args:
            counts: Tokens of each caption, in any order; zeros are left out.
            most: Length that longer captions are truncated to.
        """
        ordered = sorted(min(int(count), most) for count in counts if count)
        # Every n-th length represents its neighbours.
        step = max(1, len(ordered) // _MAX_LENGTHS)
        return cls(tuple(ordered[::-step][::-1]))  # includes the longest one

    @classmethod
    def assumed(cls, longest: int) -> CaptionLengths:
        """Returns the lengths of Korean captions of which the longest is given."""
        shares = (
            # Most captions are short, and few are near the longest.
            _SHORTEST + (1 - _SHORTEST) * ((index + 0.5) / _MAX_LENGTHS) ** _POWER
            for index in range(_MAX_LENGTHS - 1)
        )
        return cls((*(max(1, round(share * longest)) for share in shares), longest))

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return self.tokens[-1]

    @property
    def mean(self) -> float:
        """Mean tokens per caption."""
        return sum(self.tokens) / len(self.tokens)

    def longest_of(self, count: int) -> float:
        """Returns the expected length of the longest of `count` random captions, which a batch of them is padded to."""
        total = len(self.tokens)
        return sum(
            # The chance that the longest of `count` has this length: all are at most so long, but not all are shorter.
            length * (((index + 1) / total) ** count - (index / total) ** count)
            for index, length in enumerate(self.tokens)
        )

    def spread(self, count: int) -> list[int]:
        """Returns `count` lengths, evenly spread over the captions, ascending."""
        return [self.tokens[int((index + 0.5) / count * len(self.tokens))] for index in range(count)]
