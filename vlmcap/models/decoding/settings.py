"""How captions are decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmcap.config import EvaluationConfig

MOST_CLIPS = 128  # of a batch to caption where there are fewer rows: each data worker holds such a batch in host memory


def clips_for(num_rows: int, clips_per_row: int) -> int:
    """Clips of a batch to caption, those beyond the rows waiting for rows that end."""
    return max(num_rows, min(num_rows * clips_per_row, MOST_CLIPS))


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How captions are decoded; one beam without sampling is greedy search.

    Attributes:
        max_new_tokens: Most tokens of a caption.
        rules: Engine, search and sampling; names and ranges are those of transformers.
        num_rows: Most captions that are written at a time; None writes those of a whole batch.
        use_cache: Whether the keys of earlier tokens are kept.
        is_merged: Whether adapters are merged into unquantised weights meanwhile, of which the originals are kept
            beside.
    """

    max_new_tokens: int
    rules: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_rows: int | None = None
    use_cache: bool = True
    is_merged: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the best next token is all there is to choose, and keys are kept."""
        return self.rules.is_greedy and self.use_cache

    def as_arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`, but for the penalty.

        Those of sampling and beams only where they count, or it warns.
        """
        rules, names = self.rules, ["num_beams", "no_repeat_ngram_size", "do_sample"]
        names += ["temperature", "top_p", "top_k"] if rules.do_sample else []
        names += ["length_penalty"] if rules.num_beams > 1 else []
        arguments: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
        arguments |= {"max_new_tokens": self.max_new_tokens, "use_cache": self.use_cache}
        return arguments | {name: getattr(rules, name) for name in names}
