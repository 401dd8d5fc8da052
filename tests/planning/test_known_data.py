"""What a plan takes from the data.

The number of clips and the length of captions, or assumptions where it is not there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmcap.cli import main
from vlmcap.config import ASSUMED_CAPTION_TOKENS, Split
from vlmcap.config_unread import NO_DATA
from vlmcap.planning.known_data import known_captions, known_clips, planned
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.sweep_budget.budget import NumClips
from vlmcap.planning.sweep_budget.make_sweep_plan import num_clips

LENGTHS = ("llm.max_caption_tokens=", "llm.max_new_tokens=")


@pytest.fixture
def open_path(real_path: list[str]) -> list[str]:
    """The real path with lengths left to the data."""
    return [override for override in real_path if not override.startswith(LENGTHS)]


def test_clips_of_the_data_are_counted(open_path: list[str], aihub_root: Path) -> None:
    config = planned(open_path)
    assert {split: len(clips) for split, clips in known_clips(config).items()} == {"train": 6, "val": 3, "test": 2}
    assert num_clips(config) == NumClips(6, 3, 2)
    assert num_clips(planned([*open_path, "data.max_clips=4"])) == NumClips(4, 3, 2)
    assert num_clips(planned([*open_path, NO_DATA])) == NumClips(8000, 1000, 1000)
    assert known_clips(planned(["data.max_clips=5"])) == {}  # the demo makes its own


def test_captions_of_the_data_decide_a_plan(open_path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--json", *open_path])
    plan = json.loads(capsys.readouterr().out)
    limit = planned(open_path).llm.max_caption_tokens
    assert limit % 32 == 0
    assert limit < ASSUMED_CAPTION_TOKENS
    assert (plan["num_clips"], plan["caption_tokens"], plan["caption_tokens_assumed"]) == (6, limit, False)


def test_seconds_are_those_of_the_data_s_captions(open_path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = planned(open_path)
    lengths = known_captions(config)
    assert lengths is not None and len(lengths.tokens) == 6
    assert lengths.longest <= config.llm.caption_tokens < lengths.longest + 32
    main(["plan", "--json", *open_path])
    assert json.loads(capsys.readouterr().out)["flops_per_clip"] == make_plan(config, captions=lengths).flops
    assert make_plan(config).flops != make_plan(config, captions=lengths).flops, "assumed captions are others"
    assert known_captions(planned([*open_path, NO_DATA])) is None
    assert known_captions(planned([*open_path, "llm.checkpoint=nobody/no-such-model"])) is None


def test_an_assumption_is_stated(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "llm=qwen3_4b", "encoder=clip", "hardware=a100_80", "data=aihub"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"up to {ASSUMED_CAPTION_TOKENS} tokens (assumed; set data.root to count the captions)" in out
    assert "8 000 clips" in out


def test_data_without_a_tokenizer_is_counted_all_the_same(open_path: list[str]) -> None:
    """The plan of a model that was not downloaded yet assumes the length, and knows the clips."""
    config = planned([*open_path, "llm.checkpoint=nobody/no-such-model"])
    assert config.llm.caption_tokens == ASSUMED_CAPTION_TOKENS
    assert len(known_clips(config)[Split.train.value]) == 6
