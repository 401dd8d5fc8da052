"""How captions are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How captions are decoded; one beam without sampling is greedy search. Names and ranges are those of transformers.

    Attributes:
        engine: "own" decodes greedily with `vlmcap.models.decoding` where it can; "hf" leaves everything to transformers.
        num_rows: Most captions that are written at a time; None writes those of a whole batch.
        clips_per_row: Clips of a batch to caption for each row, where waiting clips can take the rows of those that end.
        speculate_ngram: Length of n-grams by which our own decoding guesses the tokens to come; 0 guesses nothing.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    use_cache: bool = True
    engine: str = "own"
    num_rows: int | None = None
    clips_per_row: int = 1
    speculate_ngram: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the best next token is all there is to choose, and keys are kept."""
        return self.num_beams == 1 and not self.do_sample and self.use_cache

    def as_arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`, but for the penalty; those of sampling and beams only where they count, or it warns."""
        names = ["max_new_tokens", "num_beams", "no_repeat_ngram_size", "do_sample", "use_cache"]
        arguments: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
        names += ["temperature", "top_p", "top_k"] if self.do_sample else []
        names += ["length_penalty"] if self.num_beams > 1 else []
        return arguments | {name: getattr(self, name) for name in names}
