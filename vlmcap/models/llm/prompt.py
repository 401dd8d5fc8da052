"""The prompt around the visual tokens, through the tokenizer's chat template, the places of visual tokens, and the caption's ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmcap.config import LlmConfig
from vlmcap.errors import UserError, first_line
from vlmcap.types import FrameTimes, GridTHW

# Where visual tokens and caption go in the rendered template; neither ever reaches the tokenizer.
_VISUAL, _ANSWER = "<<vlmcap-visual-tokens>>", "<<vlmcap-caption>>"


@dataclass(frozen=True)
class PromptEncoder:
    """Ids of everything that is text.

    Parts are tokenised one by one and joined as ids, so nothing is ever searched for again.

    Attributes:
        tokenizer: Of the language model.
        prefix_ids: Before the visual tokens, with the token that begins a sequence where the model wants one.
        suffix_ids: Between them and the caption.
        end_id: Ends the caption.
        pad_id: Fills batches and stands at placeholder positions.
        stop_ids: Tokens that end generation, `end_id` first.
        question_ids: The bare prompt text, for projectors that are told the question.
        caption_lead: Blank that the chat template puts between its own words and an answer.
    """

    tokenizer: Any
    prefix_ids: list[int]
    suffix_ids: list[int]
    end_id: int
    pad_id: int
    stop_ids: list[int] = field(default_factory=list)
    question_ids: list[int] = field(default_factory=list)
    caption_lead: str = ""

    def encode_caption(self, text: str) -> list[int]:
        """Ids of a caption, without the end token; what looks like a special token in it is text like any other."""
        if not text:
            return []
        # A sentencepiece tokenizer puts its word mark in front, lead or not, as in the training of LLaVA.
        return list(
            self.tokenizer(self.caption_lead + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids to text, special tokens and outer blanks dropped."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    @property
    def num_prompt_tokens(self) -> int:
        """Text tokens before the caption."""
        return len(self.prefix_ids) + len(self.suffix_ids)


@dataclass(frozen=True, slots=True)
class VisualRun:
    """All visual tokens of a clip in one run; goes to the data workers, so it must pickle.

    Attributes:
        num_tokens: (F, (h, w)) -> V.
        own: Size of clips that come without one.
    """

    num_tokens: Callable[[int, tuple[int, int]], int]
    own: GridTHW

    def __call__(self, grid_thw: GridTHW | None, times_s: FrameTimes | None = None) -> Sequence[int]:
        """The one run, as the number of its placeholders; times make no difference to it."""
        num_frames, height, width = grid_thw or self.own
        return (self.num_tokens(num_frames, (height, width)),)


def load_prompt(folder: Path, llm: LlmConfig, *, visual_prefix: str = "", visual_suffix: str = "") -> PromptEncoder:
    """The prompt of a language model, rendered by its chat template.

    Args:
        folder: Checkpoint in Hugging Face layout.
        llm: `prompt` is what the user asks about the video; the visual tokens stand in front of it, on a line of their
            own unless a `visual_suffix` parts them. A `system_prompt` of None leaves the system turn to the template,
            and `chat_template` is a Jinja template in place of the tokenizer's.
        visual_prefix: Directly before the visual tokens, such as Qwen-VL's <|vision_start|>.
        visual_suffix: Directly behind them, such as <|vision_end|>.

    Raises:
        UserError: There is no tokenizer, chat template or end token, or the template does not use a setting that was
            made.
    """
    tokenizer = load_tokenizer(folder)
    break_after = visual_suffix or "\n"
    turns = [{"role": "user", "content": f"{visual_prefix}{_VISUAL}{break_after}{llm.question}"}]
    if llm.system_prompt:
        turns.insert(0, {"role": "system", "content": llm.system_prompt})
    template = _Template(tokenizer, folder, llm.chat_template, llm.enable_thinking)
    rendered = template.render(turns, add_generation_prompt=True)
    before, placeholder, after = rendered.partition(_VISUAL)
    if not placeholder:
        raise UserError(
            f"the chat template of {folder} drops the user's text, as one made for a processor does; set "
            "llm.chat_template to one for text"
        )
    _check_used(template, turns, rendered)
    lead, end_id = _answer_frame(template, turns, rendered)
    num_rows = _num_embeddings(folder)
    pad_id = (
        end_id if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= num_rows else int(tokenizer.pad_token_id)
    )
    encoder = PromptEncoder(
        tokenizer=tokenizer,
        prefix_ids=_first_ids(tokenizer, before),
        suffix_ids=_following_ids(tokenizer, after),
        end_id=end_id,
        pad_id=pad_id,
        stop_ids=[token for token in _stop_ids(folder, [end_id, int(tokenizer.eos_token_id)]) if token < num_rows],
        question_ids=list(tokenizer(llm.question, add_special_tokens=False)["input_ids"]),
        caption_lead=lead,
    )
    _check_rows(encoder, folder, num_rows)
    return encoder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        UserError: There is none, or it names no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(
            f"llm.checkpoint {folder} holds no tokenizer that could be loaded: {first_line(error)}"
        ) from error
    if not tokenizer("가", add_special_tokens=False)[
        "input_ids"
    ]:  # without files, some classes come up with an empty vocabulary
        raise UserError(
            f"llm.checkpoint {folder} holds no tokenizer; put tokenizer.json and tokenizer_config.json there"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} names no end token (eos_token), so captions would have no end")
    return tokenizer


def _num_embeddings(folder: Path) -> float:
    """Rows of the language model's embedding; without end where the folder holds a tokenizer alone."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError):  # whoever loads the model says what is wrong with it
        return math.inf


def _check_rows(encoder: PromptEncoder, folder: Path, num_rows: float) -> None:
    """Refuses a tokenizer that was given tokens for which the model has no embedding, where the prompt or a caption can hold them.

    Special tokens in captions are text like any other, so that those beyond the embedding do no harm there.

    Raises:
        UserError: There is such a token.
    """
    tokenizer = encoder.tokenizer
    added = tokenizer.added_tokens_decoder
    if max(len(tokenizer), *added, 0) < num_rows:
        return
    special = {token for token, entry in added.items() if entry.special} - {tokenizer.unk_token_id}
    beyond = {token for token in tokenizer.get_vocab().values() if token >= num_rows} - special
    used = [*encoder.prefix_ids, *encoder.suffix_ids, *encoder.question_ids, encoder.end_id]
    beyond |= {token for token in used if token >= num_rows}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"the tokenizer in {folder} has {len(beyond)} tokens beyond the {num_rows} rows of the model's embedding "
            "that text can hold, "
            f"first {tokenizer.convert_ids_to_tokens(first)!r} ({first}); remove them from tokenizer.json, or resize "
            "the model's embedding "
            "(resize_token_embeddings) and save it"
        )


@dataclass(frozen=True)
class _Template:
    """A chat template with what it is always given."""

    tokenizer: Any
    folder: Path
    text: str | None
    enable_thinking: bool

    def render(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            UserError: There is no template, or it refuses.
        """
        from jinja2 import TemplateError

        if not self.text and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template; set llm.chat_template, or take an "
                "instruction-tuned llm.checkpoint"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=self.text or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=self.enable_thinking,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:  # such as: no system turn allowed
            reason = first_line(error)
            raise UserError(
                f"the chat template of {self.folder} refuses the prompt ({reason}); change llm.system_prompt or "
                "llm.chat_template"
            ) from error


def _check_used(template: _Template, turns: list[dict[str, str]], rendered: str) -> None:
    """Refuses settings without which the template renders the same prompt.

    Raises:
        UserError: There is such a setting.
    """
    first, name = turns[0], f"the chat template of {template.folder}"
    if template.enable_thinking and rendered == replace(template, enable_thinking=False).render(
        turns, add_generation_prompt=True
    ):
        raise UserError(
            f"llm.enable_thinking=true changes nothing, as {name} does not use it; leave it out, or set "
            "llm.chat_template"
        )
    # A template's own system turn may have the very text.
    is_dropped = first["role"] == "system" and first["content"].strip() not in rendered.partition(_VISUAL)[0]
    if is_dropped and rendered == template.render(turns[1:], add_generation_prompt=True):
        raise UserError(
            f"llm.system_prompt changes nothing, as {name} drops the system turn; leave it out and put its text into "
            "llm.prompt, "
            "or set llm.chat_template"
        )


def _answer_frame(template: _Template, turns: list[dict[str, str]], rendered: str) -> tuple[str, int]:
    """What the template puts directly before an answer, if blank, and the id of the token that it puts behind it."""
    tokenizer = template.tokenizer
    try:
        whole = template.render([*turns, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
    except UserError:  # made for one question only
        whole = rendered
    before, _, after = whole.partition(_ANSWER)
    lead = before.removeprefix(rendered)
    end = tokenizer(after.strip(), add_special_tokens=False)["input_ids"][:1] if after.strip() else []
    is_special = (
        bool(end) and end[0] in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[end[0]].special
    )
    return lead if lead.isspace() else "", int(end[0] if is_special else tokenizer.eos_token_id)


def _first_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what begins the sequence.

    With the beginning token once, where the tokenizer puts one of its own accord.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    wants_bos = bos is not None and tokenizer("가")["input_ids"][:1] == [bos]
    return [bos, *ids] if wants_bos and ids[:1] != [bos] else ids


def _following_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of text behind other tokens: a sentencepiece tokenizer puts a word mark at the beginning only."""
    anchor = tokenizer.added_tokens_decoder.get(tokenizer.eos_token_id)
    if anchor is None or anchor.rstrip:  # it would swallow blanks
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    first, *ids = tokenizer(anchor.content + text, add_special_tokens=False)["input_ids"]
    assert first == tokenizer.eos_token_id
    return list(ids)


def generation_config(folder: Path) -> Any:
    """Transformers' generation settings of a checkpoint; None where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None


def _stop_ids(folder: Path, ends: list[int]) -> list[int]:
    """The end tokens and whatever else the checkpoint's generation settings stop at, without doubles."""
    stops = getattr(generation_config(folder), "eos_token_id", None)
    return list(dict.fromkeys([*ends, *([stops] if isinstance(stops, int) else stops or [])]))
