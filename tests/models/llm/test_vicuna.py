"""Vicuna as published: pickled weights, a sentencepiece tokenizer, no chat template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import CAPTIONS
from vlmcap.config import LlmConfig
from vlmcap.errors import UserError
from vlmcap.models.llm.load import context_length, load_language_model, text_width
from vlmcap.models.llm.prompt import PromptEncoder, load_prompt

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "이 영상을 설명해 주세요."
CONF = Path(__file__).parents[3] / "conf" / "llm" / "vicuna_7b.yaml"


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A BPE with LLaMA's settings: a word mark as prefix, and byte fallback."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CAPTIONS, *CAPTIONS, SYSTEM, "USER: ASSISTANT:"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def vicuna_folder(sentencepiece_model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves LLaMA with random weights in two .bin files, and the files of Vicuna's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vicuna")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=480,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.14,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weights = list(LlamaForCausalLM(config).state_dict().items())
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    index: dict[str, str] = {}
    for name, part in zip(names, (dict(weights[:9]), dict(weights[9:])), strict=True):
        torch.save(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**marks, **settings, "model_max_length": 4096}))
    (folder / "special_tokens_map.json").write_text(json.dumps({**marks, "pad_token": "<unk>"}))
    # As published: sampling values without sampling, which transformers reads but refuses to write.
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6})
    )
    return folder


def template() -> str:
    return str(yaml.safe_load(CONF.read_text())["chat_template"])


def vicuna_prompt(
    folder: Path, *, chat_template: str | None = None, system: str | None = None, **around: str
) -> PromptEncoder:
    chat_template = template() if chat_template is None else chat_template
    return load_prompt(folder, LlmConfig(prompt=QUESTION, system_prompt=system, chat_template=chat_template), **around)


def load(folder: Path, quantization: str = "none") -> Any:
    return load_language_model(folder, dtype=torch.float32, quantization=quantization, attention="sdpa", device="cpu")


# --- weights ----------------------------------------------------------------------------------------------------------


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in folder.glob("*.bin") for name, tensor in torch.load(file, weights_only=True).items()
    }


def test_pickled_weights_are_loaded_as_saved(vicuna_folder: Path) -> None:
    loaded, saved = load(vicuna_folder).state_dict(), saved_weights(vicuna_folder)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert (context_length(vicuna_folder), text_width(vicuna_folder)) == (256, 64)


def test_pickled_weights_are_quantised_as_any(vicuna_folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load(vicuna_folder, "4bit")
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    assert not isinstance(model.lm_head, Linear4bit)
    full = load(vicuna_folder)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (
            torch.cosine_similarity(model(input_ids=ids).logits.flatten(), full(input_ids=ids).logits.flatten(), dim=0)
            > 0.9
        )


class Malicious:
    """Unpickles to a call that creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(vicuna_folder: Path, tmp_path: Path, zipped: bool) -> None:
    folder = shutil.copytree(vicuna_folder, tmp_path / "copy")
    file, trace = folder / "pytorch_model-00001-of-00002.bin", tmp_path / "trace"
    content = torch.load(file, weights_only=True)
    torch.save({**content, "extra": Malicious(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"llm\.checkpoint .*holds more than tensors.*safetensors") as caught:
        load(folder)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch would advise to switch it off
    torch.load(file, weights_only=False)
    assert trace.exists()  # or the test would show nothing


def test_broken_and_missing_parts_are_one_sentence(vicuna_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vicuna_folder, tmp_path / "copy")
    for content in (b"no weights", b""):
        (folder / "pytorch_model-00002-of-00002.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"llm\.checkpoint"):
            load(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"llm\.checkpoint"):
        load(folder)


def test_other_pickles_beside_the_weights_are_not_touched(vicuna_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vicuna_folder, tmp_path / "copy")
    torch.save(Malicious(tmp_path / "trace"), folder / "training_args.bin")
    load(folder)
    assert not (tmp_path / "trace").exists()


def test_safetensors_go_before_pickles(vicuna_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vicuna_folder, tmp_path / "copy")
    load(vicuna_folder).save_pretrained(folder / "safe")
    shutil.move(folder / "safe" / "model.safetensors", folder / "model.safetensors")
    for file in folder.glob("pytorch_model-*.bin"):
        file.write_bytes(b"never read")
    load(folder)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_template_is_that_of_its_training(vicuna_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(vicuna_folder)
    turns = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    text = tokenizer.apply_chat_template(turns, chat_template=template(), tokenize=False, add_generation_prompt=True)
    assert text == f"{SYSTEM} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    with_system = [{"role": "system", "content": "짧게."}, *turns[:2]]
    assert (
        tokenizer.apply_chat_template(with_system, chat_template=template(), tokenize=False)
        == "짧게. USER: Q1 ASSISTANT: A1</s>"
    )


def test_without_a_template_the_mend_is_named(vicuna_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vicuna_folder, tmp_path / "copy")
    # LLaVA-NeXT-Video keeps one for its processor, which the tokenizer does not read.
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    with pytest.raises(UserError, match=r"no chat template; set llm\.chat_template") as caught:
        vicuna_prompt(folder, chat_template="")
    assert "\n" not in str(caught.value)


def test_the_sequence_begins_once(vicuna_folder: Path) -> None:
    for chat_template in (template(), "{{ bos_token }}" + template()):
        prompt = vicuna_prompt(vicuna_folder, chat_template=chat_template)
        ids = [*prompt.prefix_ids, *prompt.suffix_ids, *prompt.encode_caption(CAPTIONS[0])]
        assert ids.count(1) == 1
        assert ids[0] == 1
    prompt = vicuna_prompt(vicuna_folder, chat_template="{{ messages[-1].content }}")
    assert prompt.prefix_ids == [1]  # nothing before the visual tokens but this


def test_ids_decode_to_the_whole_text(vicuna_folder: Path) -> None:
    prompt = vicuna_prompt(vicuna_folder)
    caption = "'서울 2024'  간판이 🌊\n보인다."
    ids = [*prompt.prefix_ids, *prompt.suffix_ids, *prompt.encode_caption(caption), prompt.end_id]
    text = f"{SYSTEM} USER: \n{QUESTION} ASSISTANT: {caption}"
    assert prompt.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (prompt.end_id, prompt.stop_ids, prompt.pad_id) == (2, [2], 0)
    assert prompt.decode([[*prompt.encode_caption(caption), 2, 0]]) == [caption]


def test_ids_are_those_of_sentencepiece(vicuna_folder: Path, sentencepiece_model: bytes) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    prompt = vicuna_prompt(vicuna_folder)
    assert prompt.prefix_ids[1:] == reference.encode(f"{SYSTEM} USER: ")
    for caption in CAPTIONS:
        assert prompt.encode_caption(caption) == reference.encode(caption)


@pytest.mark.parametrize("legacy", [False, True])
def test_parts_are_the_pieces_of_the_whole(vicuna_folder: Path, tmp_path: Path, legacy: bool) -> None:
    """Tokenises like a processor, at once with a special token in place of the video."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(vicuna_folder, tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": legacy}))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    prompt = vicuna_prompt(folder)
    whole = tokenizer(f"{SYSTEM} USER: <video>\n{QUESTION} ASSISTANT: {CAPTIONS[0]}</s>")["input_ids"]
    video = tokenizer.convert_tokens_to_ids("<video>")
    assert [*prompt.prefix_ids, video, *prompt.suffix_ids, *prompt.encode_caption(CAPTIONS[0]), prompt.end_id] == whole


def test_the_caption_begins_with_a_word_mark(vicuna_folder: Path) -> None:
    prompt = vicuna_prompt(vicuna_folder)
    assert prompt.caption_lead == " "
    first = prompt.tokenizer.convert_ids_to_tokens(prompt.encode_caption(CAPTIONS[0]))[0]
    assert first.startswith("▁푸")
    assert prompt.encode_caption("") == []


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>"])
def test_special_tokens_in_a_caption_are_text(vicuna_folder: Path, token: str) -> None:
    prompt = vicuna_prompt(vicuna_folder)
    ids = prompt.encode_caption(f"푸른 {token} 바다")
    assert not {0, 1, 2} & set(ids)
    assert prompt.decode([ids]) == [f"푸른 {token} 바다"]
    # And the switch is thrown back: the tokenizer is shared with other users.
    assert prompt.tokenizer(token, add_special_tokens=False)["input_ids"][0] in (0, 1, 2)


def test_a_slow_tokenizer_does_the_same(sentencepiece_model: bytes, tmp_path: Path) -> None:
    from transformers import GPTSw3Tokenizer

    (tmp_path / "spiece.model").write_bytes(sentencepiece_model)
    GPTSw3Tokenizer(
        str(tmp_path / "spiece.model"), pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    prompt = vicuna_prompt(tmp_path)
    caption = "푸른 </s> 바다"
    assert 2 not in prompt.encode_caption(caption)
    assert prompt.decode([prompt.encode_caption(caption)]) == [caption]
    assert prompt.end_id == 2
