"""Settings of caption decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmcap.config import EvaluationConfig

MAX_PROMPT_BATCH = 128  # clips, unless there are more slots: each data worker holds such a batch in host memory


def prompt_batch_size(num_slots: int, clips_per_slot: int) -> int:
    """Returns the number of clips in a batch of prompts; those beyond the slots wait for a slot that becomes free."""
    return max(num_slots, min(num_slots * clips_per_slot, MAX_PROMPT_BATCH))


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How captions are decoded; one beam without sampling is greedy search.

    Attributes:
        max_new_tokens: Maximum tokens of a caption.
        rules: Engine, search and sampling, with the names and ranges of transformers.
        num_slots: Maximum captions that are decoded at a time; None decodes those of a whole batch together.
        use_cache: Whether the keys and values of earlier tokens are kept.
        is_merged: Whether adapters are merged into copies of unquantised weights for decoding.
    """

    max_new_tokens: int
    rules: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_slots: int | None = None
    use_cache: bool = True
    is_merged: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the search is greedy, with a cache of keys and values."""
        return self.rules.is_greedy and self.use_cache

    def as_arguments(self) -> dict[str, Any]:
        """Returns keyword arguments for transformers' `generate`, except for the repetition penalty.

        Arguments of sampling and of beam search are included only if they apply, as transformers warns otherwise.
        """
        rules, names = self.rules, ["num_beams", "no_repeat_ngram_size", "do_sample"]
        # transformers warns about sampling settings without sampling, and about a length penalty without beams.
        names += ["temperature", "top_p", "top_k"] if rules.do_sample else []
        names += ["length_penalty"] if rules.num_beams > 1 else []
        # None also removes the values of the checkpoint's generation_config.json.
        arguments: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
        arguments |= {"max_new_tokens": self.max_new_tokens, "use_cache": self.use_cache}
        return arguments | {name: getattr(rules, name) for name in names}
