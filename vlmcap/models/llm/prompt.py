"""The prompt around the visual tokens, rendered by the tokenizer's chat template, and the encoding of captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmcap.config import LlmConfig
from vlmcap.errors import UserError, first_line
from vlmcap.types import FrameTimes, GridTHW

# Markers of visual tokens and caption in the rendered template; neither reaches the tokenizer.
_VISUAL, _ANSWER = "<<vlmcap-visual-tokens>>", "<<vlmcap-caption>>"


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes prompts and captions, and decodes generated ids.

    The texts before and after the visual tokens are tokenised separately and joined as ids.

    Attributes:
        tokenizer: Tokenizer of the language model.
        prefix_ids: Ids before the visual tokens, with a beginning-of-sequence token if the model uses one.
        suffix_ids: Ids between the visual tokens and the caption.
        end_id: Token that ends the caption.
        pad_id: Token at padding and placeholder positions.
        stop_ids: Tokens that end generation, `end_id` first.
        question_ids: Ids of the question without the template, for projectors that read it.
        caption_lead: Whitespace that the chat template puts before an answer.
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
        """Returns the ids of a caption without the end token; special tokens in it are encoded as plain text."""
        if not text:
            return []
        # A sentencepiece tokenizer adds its word mark with and without the lead, as in the training of LLaVA.
        return list(
            self.tokenizer(self.caption_lead + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decodes generated ids to text, without special tokens and surrounding whitespace."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    @property
    def num_prompt_tokens(self) -> int:
        """Number of text tokens before the caption."""
        return len(self.prefix_ids) + len(self.suffix_ids)


@dataclass(frozen=True, slots=True)
class VisualRun:
    """Lays out all visual tokens of a clip in one run; picklable for the data workers.

    Attributes:
        num_tokens: Function (F, (h, w)) -> V.
        default_grid: Size of clips without a `grid_thw`.
    """

    num_tokens: Callable[[int, tuple[int, int]], int]
    default_grid: GridTHW

    def __call__(self, grid_thw: GridTHW | None, times_s: FrameTimes | None = None) -> Sequence[int]:
        """Returns the number of placeholders of the single run; times are ignored."""
        num_frames, height, width = grid_thw or self.default_grid
        return (self.num_tokens(num_frames, (height, width)),)


def load_prompt(folder: Path, llm: LlmConfig, *, visual_prefix: str = "", visual_suffix: str = "") -> PromptEncoder:
    """Renders the prompt of a language model by its chat template, and encodes it.

    Args:
        folder: Checkpoint in Hugging Face layout.
        llm: Settings. The question follows the visual tokens, on a new line unless there is a `visual_suffix`. A
            `system_prompt` of None leaves the system turn to the template, and `chat_template` is a Jinja template that
            replaces the tokenizer's.
        visual_prefix: Text directly before the visual tokens, such as Qwen-VL's <|vision_start|>.
        visual_suffix: Text directly after the visual tokens, such as <|vision_end|>.

    Raises:
        UserError: There is no tokenizer, chat template or end token, or the template ignores a setting.
    """
    # 1. Render the conversation.
    tokenizer = load_tokenizer(folder)
    # LLaVA's convention: the image, a line break, and the question.
    separator = "" if visual_suffix else "\n"
    turns = [{"role": "user", "content": f"{_VISUAL}{separator}{llm.question}"}]
    if llm.system_prompt:
        turns.insert(0, {"role": "system", "content": llm.system_prompt})
    template = _Template(tokenizer, folder, llm.chat_template, llm.enable_thinking)
    rendered = template.render(turns, add_generation_prompt=True)
    if _VISUAL not in rendered:
        template = replace(template, has_parts=True)
        rendered = template.render(turns, add_generation_prompt=True)
    before, placeholder, after = rendered.partition(_VISUAL)
    if not placeholder:
        raise UserError(
            f"the chat template of {folder} drops the user's text; set llm.chat_template to one that writes it"
        )
    _check_used(template, turns, rendered)
    # 2. Find what surrounds an answer: whitespace before it, and the end token.
    lead, end_id = _answer_frame(template, turns, rendered)
    # 3. Encode the texts; tokens without an embedding cannot be used.
    num_embeddings = _num_embeddings(folder)
    # Padding is masked, so any token with an embedding will do.
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= num_embeddings:
        pad_id = end_id
    stop_ids = _stop_ids(folder, [end_id, int(tokenizer.eos_token_id)])
    encoder = PromptEncoder(
        tokenizer=tokenizer,
        # Added here, as some templates strip what begins and ends a turn.
        prefix_ids=_first_ids(tokenizer, before + visual_prefix),
        suffix_ids=_following_ids(tokenizer, visual_suffix + after),
        end_id=end_id,
        pad_id=int(pad_id),
        stop_ids=[token for token in stop_ids if token < num_embeddings],
        question_ids=list(tokenizer(llm.question, add_special_tokens=False)["input_ids"]),
        caption_lead=lead,
    )
    _check_embeddings(encoder, folder, num_embeddings)
    return encoder


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a checkpoint.

    Raises:
        UserError: There is no tokenizer, or it has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(
            f"llm.checkpoint {folder} holds no tokenizer that could be loaded: {first_line(error)}"
        ) from error
    # Without files, some classes are created with an empty vocabulary.
    if not tokenizer("가", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"llm.checkpoint {folder} holds no tokenizer; copy tokenizer.json and tokenizer_config.json to it"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no end token, so captions would never end; set eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer


def _num_embeddings(folder: Path) -> float:
    """Returns the rows of the embedding matrix; infinity if the folder holds only a tokenizer."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError):  # loading the model reports what is wrong
        return math.inf


def _check_embeddings(encoder: PromptEncoder, folder: Path, num_rows: float) -> None:
    """Checks that the model has an embedding for every token that the prompt or a caption can contain.

    Added special tokens without an embedding are harmless, as captions encode them as plain text.

    Raises:
        UserError: A token has no embedding.
    """
    tokenizer = encoder.tokenizer
    added = tokenizer.added_tokens_decoder
    # The common case: every id is below the number of embeddings.
    if max(len(tokenizer), *added, 0) < num_rows:
        return
    # Special tokens are never part of a caption, as `split_special_tokens` cuts them into plain text.
    special = {token for token, entry in added.items() if entry.special} - {tokenizer.unk_token_id}
    beyond = {token for token in tokenizer.get_vocab().values() if token >= num_rows} - special
    used = [*encoder.prefix_ids, *encoder.suffix_ids, *encoder.question_ids, encoder.end_id]
    beyond |= {token for token in used if token >= num_rows}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"the tokenizer in {folder} has {len(beyond)} tokens beyond the {num_rows} rows of the model's embedding, "
            f"first {tokenizer.convert_ids_to_tokens(first)!r} ({first}); remove them from tokenizer.json, or resize "
            "the model's embedding (resize_token_embeddings) and save it"
        )


@dataclass(frozen=True)
class _Template:
    """A chat template with its fixed arguments.

    Attributes:
        tokenizer: Tokenizer with a template of its own.
        folder: Checkpoint, for the error messages.
        text: Template in place of the tokenizer's.
        enable_thinking: Argument of the template.
        has_parts: Whether the content of a turn is a list of parts, as in the templates of processors.
    """

    tokenizer: Any
    folder: Path
    text: str | None
    enable_thinking: bool
    has_parts: bool = False

    def render(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Renders a conversation as text.

        Raises:
            UserError: There is no template, or it refuses the conversation.
        """
        from jinja2 import TemplateError

        if not self.text and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template; set llm.chat_template, or set llm.checkpoint to "
                "an instruction-tuned model"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{**turn, "content": self._content(turn["content"])} for turn in turns],
                    chat_template=self.text or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=self.enable_thinking,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:  # for example, no system turn is allowed
            reason = first_line(error)
            raise UserError(
                f"the chat template of {self.folder} refuses the prompt ({reason}); change llm.system_prompt or "
                "llm.chat_template"
            ) from error

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self.has_parts else text


def _check_used(template: _Template, turns: list[dict[str, str]], rendered: str) -> None:
    """Checks that the template uses the settings.

    Raises:
        UserError: The prompt is the same without a setting.
    """
    first, name = turns[0], f"the chat template of {template.folder}"
    if template.enable_thinking and rendered == replace(template, enable_thinking=False).render(
        turns, add_generation_prompt=True
    ):
        raise UserError(
            f"llm.enable_thinking=true has no effect, as {name} does not use it; leave it out, or set llm.chat_template"
        )
    # The template's default system turn may contain the same text.
    is_dropped = first["role"] == "system" and first["content"].strip() not in rendered.partition(_VISUAL)[0]
    if is_dropped and rendered == template.render(turns[1:], add_generation_prompt=True):
        raise UserError(
            f"llm.system_prompt has no effect, as {name} drops the system turn; leave it out and put its text into "
            "llm.prompt, or set llm.chat_template"
        )


def _answer_frame(template: _Template, turns: list[dict[str, str]], rendered: str) -> tuple[str, int]:
    """Returns the whitespace that the template puts before an answer, and the id of the token after it."""
    tokenizer = template.tokenizer
    try:
        whole = template.render([*turns, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
    except UserError:  # the template supports only one question
        whole = rendered
    before, _, after = whole.partition(_ANSWER)
    # What the template puts between the end of the prompt, such as "<|im_start|>assistant\n", and the answer.
    lead = before.removeprefix(rendered)
    # The first token after the answer, such as <|im_end|>.
    end = tokenizer(after.strip(), add_special_tokens=False)["input_ids"][:1] if after.strip() else []
    added = tokenizer.added_tokens_decoder
    is_special = bool(end) and end[0] in added and added[end[0]].special
    # Text after the answer that is no special token, such as a line break, ends nothing.
    return lead if lead.isspace() else "", int(end[0] if is_special else tokenizer.eos_token_id)


def _first_ids(tokenizer: Any, text: str) -> list[int]:
    """Encodes the start of a sequence, with one beginning-of-sequence token if the tokenizer adds it by default."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    # Whether the tokenizer adds the token itself to any text.
    wants_bos = bos is not None and tokenizer("가")["input_ids"][:1] == [bos]
    return [bos, *ids] if wants_bos and ids[:1] != [bos] else ids


def _following_ids(tokenizer: Any, text: str) -> list[int]:
    """Encodes text after other tokens, without the word mark that sentencepiece tokenizers add at the beginning."""
    anchor = tokenizer.added_tokens_decoder.get(tokenizer.eos_token_id)
    if anchor is None or anchor.rstrip:  # the anchor would strip whitespace after it
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # After another token, so that the text does not count as the beginning; the anchor's id is dropped.
    first, *ids = tokenizer(anchor.content + text, add_special_tokens=False)["input_ids"]
    assert first == tokenizer.eos_token_id
    return list(ids)


def generation_config(folder: Path) -> Any:
    """Returns transformers' generation settings of a checkpoint; None if it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None


def _stop_ids(folder: Path, ends: list[int]) -> list[int]:
    """Returns the end tokens and the stop tokens of the checkpoint's generation settings, without duplicates."""
    stops = getattr(generation_config(folder), "eos_token_id", None)
    # Keeps the order.
    return list(dict.fromkeys([*ends, *([stops] if isinstance(stops, int) else stops or [])]))
