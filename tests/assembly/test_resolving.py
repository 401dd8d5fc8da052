"""What the data and the checkpoints decide: the prompt, lengths of captions, and licenses."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcap.assembly import resolving
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.resolving import resolve, token_limit, with_model_kind
from vlmcap.compose import compose, to_plain
from vlmcap.config import ENGLISH_PROMPT, KOREAN_PROMPT, Config, LlmConfig, Split
from vlmcap.errors import UserError
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import family_of
from vlmcap.types import Clip

LENGTHS = ("llm.max_caption_tokens=", "llm.max_new_tokens=")


@pytest.fixture
def left(real_path: list[str]) -> Callable[..., Config]:
    """A function from overrides to the configuration of the real path that leaves lengths to the data."""

    def make(*overrides: str) -> Config:
        return compose([*(override for override in real_path if not override.startswith(LENGTHS)), *overrides])

    return make


def needed(config: Config, *splits: Split) -> int:
    """The limit by another way: every caption encoded."""
    prompt = load_prompt(Path(config.llm.checkpoint), LlmConfig(prompt="?"))
    clips = [clip for members in load_splits(config, splits).values() for clip in members]
    return token_limit(max(len(prompt.encode_caption(clip.captions[0])) + 1 for clip in clips))


@pytest.mark.parametrize(("longest", "limit"), [(0, 32), (1, 32), (32, 32), (33, 64), (711, 736)])
def test_a_limit_is_a_multiple_of_32(longest: int, limit: int) -> None:
    assert token_limit(longest) == limit


def test_the_longest_caption_decides_and_the_numbers_are_plain(left: Callable[..., Config]) -> None:
    config = left()
    assert config.llm.is_length_open
    decided = resolve(config, load_splits(config, list(Split)))
    limit = needed(config, Split.train, Split.val)
    assert (decided.llm.max_caption_tokens, decided.llm.max_new_tokens) == (limit, limit)
    assert not decided.llm.is_length_open
    assert to_plain(decided)["llm"]["max_new_tokens"] == limit


def test_what_is_given_stays(left: Callable[..., Config]) -> None:
    config = left("llm.max_new_tokens=7")
    decided = resolve(config, load_splits(config, list(Split)))
    assert (decided.llm.max_new_tokens, decided.llm.max_caption_tokens) == (7, needed(config, Split.train, Split.val))


def test_captions_are_counted_once(left: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = left()
    clips = load_splits(config, list(Split))
    first = resolve(config, clips)
    monkeypatch.setattr("vlmcap.data.loading.lengths.count_tokens", lambda *_: pytest.fail("counted again"))
    assert resolve(config, clips) == first


def test_a_split_alone_decides_where_there_is_no_other(left: Callable[..., Config]) -> None:
    config = left()
    decided = resolving.resolve_from_data(config, load_splits(config, [Split.test]))
    assert decided.llm.new_tokens == needed(config, Split.test)


def test_the_license_is_that_of_the_folder(left: Callable[..., Config], llm_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llm_folder, tmp_path / "mine"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    config = left(f"llm.checkpoint={folder}")
    decided = resolve(config, load_splits(config, [Split.train]))
    assert (decided.llm.name, decided.llm.license) == ("mine", "apache-2.0")
    assert decided.encoder.license == "unknown"
    known = dataclasses.replace(config, llm=dataclasses.replace(config.llm, license="MIT"))
    assert resolve(known, load_splits(config, [Split.train])).llm.license == "MIT"


@pytest.mark.parametrize(
    ("captions", "prompt"),
    [
        (["푸른 바다 위로 해가 뜬다.", "눈이 온다."], KOREAN_PROMPT),
        (["간판에 Seoul 2024라고 쓰인 거리를 택시가 지나간다."], KOREAN_PROMPT),
        (["A dog runs in the park.", "개"], ENGLISH_PROMPT),
        (["一只狗在跑。"], ENGLISH_PROMPT),
    ],
)
def test_the_prompt_speaks_the_language_of_the_captions(
    captions: list[str], prompt: str, left: Callable[..., Config]
) -> None:
    config = left(*(f"{name}9" for name in LENGTHS))
    clips = {"train": [Clip(str(index), "clip.mp4", (text,)) for index, text in enumerate(captions)]}
    assert config.llm.question == KOREAN_PROMPT
    decided = resolve(config, clips)
    assert (decided.llm.prompt, decided.llm.question) == (prompt, prompt)
    given = left(*(f"{name}9" for name in LENGTHS), "llm.prompt=Was?")
    assert resolve(given, clips).llm.prompt == "Was?"


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next_video"])
def test_the_class_of_a_custom_model_is_that_of_its_checkpoint(
    kind: str, qwen_folders: dict[str, Path], llava_folder: Path
) -> None:
    folder = (qwen_folders | {"llava_next_video": llava_folder})[kind]
    config = with_model_kind(compose(["model=custom", f"model.checkpoint={folder}"]))
    assert (config.model.kind, config.model.name) == (family_of(kind).kind, folder.name.lower())
    assert config.encoder.checkpoint == config.llm.checkpoint == str(folder)


def test_another_class_is_no_whole_model(llm_folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"has the model type qwen3, but pretrained VLMs must be one of .*llava_next_video.*encoder=custom",
    ):
        with_model_kind(compose(["model=custom", f"model.checkpoint={llm_folder}"]))
