"""Prompts are rendered by the chat template, and labels follow from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.config import LlmConfig
from vlmcap.data.loading.collate import Collator
from vlmcap.errors import UserError
from vlmcap.models.llm.prompt import PromptEncoder, load_prompt
from vlmcap.types import IGNORED, Clip, Sample

QUESTION = "이 영상을 설명해 주세요."
THOUGHT = "<think>\n\n</think>\n\n"
CAPTIONS = (
    "푸른 바다 위로 해가 뜬다.",
    "'서울 2024' 간판이\n보인다… <|im_start|>?",
    "뷁 쀍 🌊",
)


def prompt_of(folder: Path, *, system: str | None = None, thinking: bool = False) -> PromptEncoder:
    return load_prompt(folder, LlmConfig(prompt=QUESTION, system_prompt=system, enable_thinking=thinking))


def sample(caption: str) -> Sample:
    return Sample(Clip(caption, Path("clip.mp4"), (caption,)), frames=torch.zeros(2, 3, 28, 28, dtype=torch.uint8))


def test_the_parts_are_the_rendered_template(llm_folder: Path, tokenizer: Any) -> None:
    prompt = prompt_of(llm_folder, system="짧게 답한다.")
    before, after = tokenizer.decode(prompt.prefix_ids), tokenizer.decode(prompt.suffix_ids)
    assert before == "<|im_start|>system\n짧게 답한다.<|im_end|>\n<|im_start|>user\n"
    assert after == f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{THOUGHT}"
    assert prompt.num_prompt_tokens == len(prompt.prefix_ids) + len(prompt.suffix_ids)


def test_thinking_is_off_unless_asked_for(llm_folder: Path, tokenizer: Any) -> None:
    assert tokenizer.decode(prompt_of(llm_folder).suffix_ids).endswith(THOUGHT)
    assert "<think>" not in tokenizer.decode(prompt_of(llm_folder, thinking=True).suffix_ids)


def test_special_tokens_are_one_id_each(llm_folder: Path, tokenizer: Any) -> None:
    prompt = prompt_of(llm_folder)
    assert prompt.prefix_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompt.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.pad_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert prompt.stop_ids == [prompt.end_id, prompt.pad_id]  # the latter out of generation_config.json


@pytest.mark.parametrize("caption", CAPTIONS)
def test_labels_decode_to_the_caption_and_its_end_token(llm_folder: Path, tokenizer: Any, caption: str) -> None:
    prompt = prompt_of(llm_folder)
    batch = Collator(prompt, 5, max_caption_tokens=200)([sample(caption), sample(CAPTIONS[0] * 3)])
    assert batch.labels is not None
    labels = batch.labels[0][batch.labels[0] != IGNORED].tolist()
    assert labels[-1] == prompt.end_id
    assert tokenizer.decode(labels) == caption + "<|im_end|>"
    assert tokenizer.decode(labels[:-1]) == caption


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids_are_joined_part_by_part(llm_folder: Path, caption: str) -> None:
    """Also if the tokenizer would merge across the boundaries, as for a caption that starts with a line break."""
    prompt = prompt_of(llm_folder)
    batch = Collator(prompt, 3, max_caption_tokens=200)([sample(caption)])
    expected = [
        *prompt.prefix_ids,
        *[prompt.pad_id] * 3,
        *prompt.suffix_ids,
        *prompt.encode_caption(caption),
        prompt.end_id,
    ]
    assert batch.input_ids[0].tolist() == expected
    assert batch.attention_mask[0].tolist() == [1] * len(expected)
    first = len(prompt.prefix_ids)
    assert batch.visual_mask[0].nonzero().flatten().tolist() == [first, first + 1, first + 2]


def test_visual_tokens_are_never_cut(llm_folder: Path) -> None:
    """Truncation of captions keeps all placeholders and is counted."""
    batch = Collator(prompt_of(llm_folder), 64, max_caption_tokens=2)([sample(CAPTIONS[0]), sample(CAPTIONS[1])])
    assert batch.visual_mask.sum(1).tolist() == [64, 64]
    assert batch.num_label_tokens == 4
    assert batch.num_truncated == 2


def test_decoding_drops_special_tokens_and_blanks(llm_folder: Path) -> None:
    prompt = prompt_of(llm_folder)
    ids = prompt.encode_caption("  바다가 보인다. \n")
    assert prompt.decode([[*ids, prompt.end_id, prompt.pad_id], ids]) == ["바다가 보인다.", "바다가 보인다."]


def copy_without(folder: Path, target: Path, *patterns: str) -> Path:
    return Path(shutil.copytree(folder, target / "copy", ignore=shutil.ignore_patterns(*patterns)))


def test_no_chat_template(llm_folder: Path, tmp_path: Path) -> None:
    folder = copy_without(llm_folder, tmp_path, "*.jinja")
    with pytest.raises(UserError, match=r"no chat template; set llm\.chat_template.* llm\.checkpoint"):
        prompt_of(folder)
    assert load_prompt(
        folder, LlmConfig(prompt=QUESTION, chat_template="{{ messages[-1].content }}<|im_end|>")
    ).suffix_ids


def test_no_tokenizer(llm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.checkpoint .* no tokenizer") as caught:
        prompt_of(copy_without(llm_folder, tmp_path, "token*"))
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_system_turn(llm_folder: Path, tmp_path: Path) -> None:
    folder = copy_without(llm_folder, tmp_path)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template = refusal + "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    assert prompt_of(folder).prefix_ids == []
    with pytest.raises(UserError, match=r"no system turn.*llm\.system_prompt"):
        prompt_of(folder, system="짧게")


def test_a_template_that_drops_the_text(llm_folder: Path, tmp_path: Path) -> None:
    folder = copy_without(llm_folder, tmp_path)
    (folder / "chat_template.jinja").write_text("안녕")
    with pytest.raises(UserError, match=r"drops the user's text.*llm\.chat_template"):
        prompt_of(folder)


def test_a_template_made_for_a_processor(llm_folder: Path, tmp_path: Path) -> None:
    """It expects lists of parts and would drop a string."""
    folder = copy_without(llm_folder, tmp_path)
    inner = "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
    parts = (
        "{% for m in messages %}{{ m.role }}: " + inner + "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(parts + "{% if add_generation_prompt %} assistant:{% endif %}")
    prompt = prompt_of(folder)
    assert prompt.tokenizer.decode(prompt.prefix_ids) == "user: "
    assert prompt.tokenizer.decode(prompt.suffix_ids) == f"\n{QUESTION} assistant:"


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}"])
def test_a_broken_template(llm_folder: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"llm\.chat_template") as caught:
        load_prompt(llm_folder, LlmConfig(prompt=QUESTION, chat_template=template))
    assert "\n" not in str(caught.value)


def test_a_given_template_goes_before_the_tokenizers(llm_folder: Path, tokenizer: Any) -> None:
    template = "Q: {{ messages[-1].content }}{% if add_generation_prompt %} A:{% endif %}"
    prompt = load_prompt(llm_folder, LlmConfig(prompt=QUESTION, chat_template=template))
    assert tokenizer.decode(prompt.prefix_ids) == "Q: "
    assert tokenizer.decode(prompt.suffix_ids) == f"\n{QUESTION} A:"


def test_marks_stand_directly_around_the_visual_tokens(llm_folder: Path, tokenizer: Any) -> None:
    prompt = load_prompt(
        llm_folder, LlmConfig(prompt=QUESTION), visual_prefix="<|im_start|>", visual_suffix="<|endoftext|>"
    )
    assert prompt.prefix_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompt.suffix_ids[0] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.decode(prompt.suffix_ids[1:]).startswith(
        QUESTION
    )  # no line break of ours between, as with Qwen-VL


def test_a_setting_that_the_template_does_not_use_is_refused(llm_folder: Path, tokenizer: Any) -> None:
    plain = "{{ messages[-1].content }}<|im_end|>"
    with pytest.raises(
        UserError, match=r"llm\.enable_thinking=true has no effect.* leave it out, or set llm\.chat_template"
    ):
        load_prompt(llm_folder, LlmConfig(enable_thinking=True, chat_template=plain))
    with pytest.raises(UserError, match=r"llm\.system_prompt has no effect.*drops the system turn.*llm\.prompt"):
        load_prompt(llm_folder, LlmConfig(system_prompt="짧게 답한다.", prompt="짧게 답한다.", chat_template=plain))
    # A template may have the very text as its own.
    template = "{% if messages[0].role != 'system' %}짧게 답한다.{% else %}{{ messages[0].content }}{% endif %}" + plain
    prompt = load_prompt(llm_folder, LlmConfig(system_prompt="짧게 답한다.", chat_template=template))
    assert tokenizer.decode(prompt.prefix_ids) == "짧게 답한다."


def test_the_question_alone(llm_folder: Path, tokenizer: Any) -> None:
    assert tokenizer.decode(prompt_of(llm_folder).question_ids) == QUESTION


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
def test_special_tokens_in_a_caption_are_text(llm_folder: Path, tokenizer: Any, token: str) -> None:
    prompt = prompt_of(llm_folder)
    ids = prompt.encode_caption(f"간판에 {token} 보인다.")
    assert not set(ids) & {tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    assert tokenizer.convert_tokens_to_ids(token) not in ids
    assert prompt.decode([[*ids, prompt.end_id]]) == [f"간판에 {token} 보인다."]


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_is_framed_as_the_template_frames_it(llm_folder: Path, tokenizer: Any, thinking: bool) -> None:
    """The template's blank leads the caption and its special token ends it, not the tokenizer's eos_token."""
    assert prompt_of(llm_folder, thinking=thinking).caption_lead == ""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}{% else %} ASSISTANT: {{ m.content "
        "}}<|endoftext|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    prompt = load_prompt(llm_folder, LlmConfig(prompt=QUESTION, chat_template=template))
    assert prompt.caption_lead == " "
    assert tokenizer.decode([*prompt.suffix_ids, *prompt.encode_caption("바다")]).endswith(" ASSISTANT: 바다")
    assert prompt.end_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert prompt.stop_ids == [prompt.end_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_byte_level_tokenizer_that_begins_sequences(llm_folder: Path, tmp_path: Path) -> None:
    """As for Llama 3: exactly one beginning token, whether the template writes it or not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = copy_without(llm_folder, tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.save_pretrained(folder)
    template = "{{ messages[-1].content }}"
    for written in ("", "{{ bos_token }}"):
        prompt = load_prompt(folder, LlmConfig(prompt=QUESTION, chat_template=written + template))
        assert prompt.prefix_ids == [bos]
        assert bos not in [*prompt.suffix_ids, *prompt.encode_caption("바다"), *prompt.question_ids]


def with_token(folder: Path, target: Path, content: str, *, is_special: bool) -> tuple[Path, int]:
    """Copies a checkpoint and adds a token without an embedding, which is the pad token if it is special."""
    copy = copy_without(folder, target)
    rows = json.loads((copy / "config.json").read_text())["vocab_size"]
    plain = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    plain["added_tokens"].append({"id": rows, "content": content, "special": is_special, **flags})
    (copy / "tokenizer.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    if is_special:
        settings = json.loads((copy / "tokenizer_config.json").read_text()) | {"pad_token": content}
        (copy / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
    return copy, rows


def test_a_pad_token_beyond_the_embedding_is_never_looked_up(llm_folder: Path, tmp_path: Path) -> None:
    folder, rows = with_token(llm_folder, tmp_path, "<새패드>", is_special=True)
    prompt = prompt_of(folder)
    assert prompt.tokenizer.pad_token_id == rows
    assert prompt.pad_id == prompt.end_id
    batch = Collator(prompt, 5, max_caption_tokens=200)([sample("<새패드> 바다"), sample(CAPTIONS[0] * 3)])
    assert int(batch.input_ids.max()) < rows
    with pytest.raises(
        UserError, match=r"1 tokens beyond the .* rows .*<새패드>"
    ):  # a prompt is read with its special tokens
        load_prompt(folder, LlmConfig(prompt="<새패드> 설명"))


def test_a_word_beyond_the_embedding_is_refused(llm_folder: Path, tmp_path: Path) -> None:
    folder, rows = with_token(llm_folder, tmp_path, "드론", is_special=False)
    with pytest.raises(UserError, match=rf"first '드론' \({rows}\); remove them"):
        prompt_of(folder)
