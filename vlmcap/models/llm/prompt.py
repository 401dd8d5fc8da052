"""The prompt around the visual tokens, through the tokenizer's chat template, and the caption's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmcap.errors import UserError

_VISUAL = "<<vlmcap-visual-tokens>>"  # where the visual tokens go in the rendered template; never reaches the tokenizer


@dataclass(frozen=True)
class PromptEncoder:
    """Ids of everything that is text. Parts are tokenised one by one and joined as ids, so nothing is ever searched for again.

    Attributes:
        tokenizer: Of the language model.
        prefix_ids: Before the visual tokens.
        suffix_ids: Between them and the caption.
        end_id: Ends the caption.
        pad_id: Fills batches and stands at placeholder positions.
    """

    tokenizer: Any
    prefix_ids: list[int]
    suffix_ids: list[int]
    end_id: int
    pad_id: int
    stop_ids: list[int] = field(default_factory=list)

    def encode_caption(self, text: str) -> list[int]:
        """Ids of a caption, without the end token."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids to text, special tokens and outer blanks dropped."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    @property
    def num_prompt_tokens(self) -> int:
        """Text tokens before the caption."""
        return len(self.prefix_ids) + len(self.suffix_ids)


def load_prompt(folder: Path, *, prompt: str, system_prompt: str | None, enable_thinking: bool) -> PromptEncoder:
    """The prompt of a language model, rendered by its tokenizer's chat template.

    Args:
        folder: Checkpoint in Hugging Face layout.
        prompt: What the user asks about the video; the visual tokens stand in front of it.
        system_prompt: None leaves the system turn to the template.
        enable_thinking: Passed to the template; templates that know no thinking ignore it.

    Raises:
        UserError: No tokenizer, no chat template, or no end token.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(f"llm.checkpoint {folder} holds no tokenizer that could be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer("가", add_special_tokens=False)["input_ids"]:  # without files, some classes come up with an empty vocabulary
        raise UserError(f"llm.checkpoint {folder} holds no tokenizer; put tokenizer.json and tokenizer_config.json there")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer in {folder} has no chat template; take an instruction-tuned checkpoint for llm.checkpoint")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} names no end token (eos_token), so captions would have no end")
    turns = [{"role": "user", "content": f"{_VISUAL}\n{prompt}"}]
    if system_prompt:
        turns.insert(0, {"role": "system", "content": system_prompt})
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking)
    except TemplateError as error:  # such as: no system turn allowed
        raise UserError(f"the chat template in {folder} refuses the prompt ({error}); change llm.system_prompt or llm.prompt") from error
    before, placeholder, after = rendered.partition(_VISUAL)
    if not placeholder:
        raise UserError(f"the chat template in {folder} drops the user's text; take another llm.checkpoint")
    end_id = int(tokenizer.eos_token_id)
    return PromptEncoder(
        tokenizer=tokenizer,
        prefix_ids=list(tokenizer(before, add_special_tokens=False)["input_ids"]),
        suffix_ids=list(tokenizer(after, add_special_tokens=False)["input_ids"]),
        end_id=end_id,
        pad_id=int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_id),
        stop_ids=_stop_ids(folder, end_id),
    )


def _stop_ids(folder: Path, end_id: int) -> list[int]:
    """The end token and whatever else the checkpoint's generation settings stop at."""
    from transformers import GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        stops = None
    listed = [stops] if isinstance(stops, int) else list(stops or [])
    return [end_id, *(stop for stop in listed if stop != end_id)]
