"""Clips of a configuration: given or random splits, bad entries in the log, and one sentence for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import reduce
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from vlmcap.assembly import clips as module
from vlmcap.assembly.clips import load_splits, open_skipped_log
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.errors import UserError

ALL = list(Split)
Make = Callable[..., Config]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(60):
        (root / f"tape{number // 3}_{number % 3}.mp4").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def composed() -> dict[str, Config]:
    return {name: compose([f"data={name}", "data.root=x", "paths.output_dir=x"]) for name in ("jsonl", "aihub")}


@pytest.fixture
def make(composed: dict[str, Config], root: Path, tmp_path: Path) -> Make:
    """A function from values of `data` and a format to a configuration; composing each would take most of the time."""

    def make(*overrides: str, format: str = "jsonl") -> Config:
        config = deepcopy(composed[format])
        config.data.root, config.paths.cache_dir, config.paths.output_dir = (
            str(root),
            str(tmp_path / "cache"),
            str(tmp_path / "run"),
        )
        for override in overrides:
            key, _, value = override.partition("=")
            *groups, name = key.split(".")
            owner = reduce(getattr, groups, config)
            assert hasattr(owner, name)
            setattr(owner, name, yaml.safe_load(value))
        return config

    return make


def line(name: str, **values: object) -> str:
    return json.dumps({"video": f"{name}.mp4", "caption": f"{name} 영상이다.", "id": name} | values, ensure_ascii=False)


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines), encoding="utf-8")


def names(root: Path) -> list[str]:
    return sorted(path.stem for path in root.glob("*.mp4"))


def given(root: Path, *splits: str) -> None:
    for index, split in enumerate(splits):
        write(root / f"{split}.jsonl", *map(line, names(root)[index * 10 : index * 10 + 10]))


def test_given_splits_are_read_in_one_pass(root: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given(root, "train", "val", "test")
    calls: list[str | None] = []
    original = module.read_records
    monkeypatch.setattr(
        module, "read_records", lambda *arguments: [calls.append(arguments[1]), original(*arguments)][1]
    )
    splits = load_splits(make(), ALL)
    assert calls == [None]
    assert [(name, len(clips)) for name, clips in splits.items()] == [("train", 10), ("val", 10), ("test", 10)]
    assert [clip.id for clip in splits["val"]] == names(root)[10:20]
    assert splits.skipped == ()
    load_splits(make(), [Split.test])
    assert calls[1:] == ["test"], "one split may save reading the others"


def test_the_test_split_is_optional(root: Path, make: Make) -> None:
    given(root, "train", "val")
    assert list(load_splits(make(), ALL[:2], ALL[2:])) == ["train", "val"]
    assert list(load_splits(make(), (), ALL)) == [split.value for split in ALL[:2]]


@pytest.mark.parametrize(
    ("there", "missing"), [(("train", "test"), "val"), (("val",), "train"), (("extra", "train"), "val")]
)
def test_a_missing_split_is_told(root: Path, make: Make, there: tuple[str, ...], missing: str) -> None:
    given(root, *there)
    with pytest.raises(UserError) as caught:
        load_splits(make(), ALL[:2], ALL[2:])
    for part in (f"no clips of the split {missing}", f"{there[-1]}: 10", "test is optional", "data.splits.random=true"):
        assert part in str(caught.value)
    assert not list((Path(make().paths.cache_dir) / "manifests").iterdir())


def test_data_without_splits_says_how_to_draw_them(root: Path, make: Make) -> None:
    write(root / "all.jsonl", *map(line, names(root)))
    with pytest.raises(UserError, match=r"none of the 60 entries .*it has no split; set data\.splits\.random=true"):
        load_splits(make(), ALL)
    splits = load_splits(make("data.splits.random=true", "data.splits.val=0.3", "data.splits.test=0.3"), ALL)
    assert sum(map(len, splits.values())) == 60


def test_entries_without_a_split_among_others_are_named(root: Path, make: Make) -> None:
    given(root, "train", "val")
    write(root / "more.jsonl", line(names(root)[40]))
    (skipped,) = load_splits(make(), ALL[:2]).skipped
    assert (skipped.clip.id, "it has no split" in skipped.reason) == (names(root)[40], True)


def test_drawn_splits_hold_whole_groups_and_keep_them_when_data_grow(root: Path, make: Make) -> None:
    config = make(
        "data.splits.random=true",
        "data.splits.val=0.3",
        "data.splits.test=0.3",
        'data.splits.group_pattern="^(.*)_[0-9]$"',
    )

    def drawn(count: int) -> dict[str, str]:
        write(root / "all.jsonl", *map(line, names(root)[:count]))
        return {clip.id: split for split, clips in load_splits(config, ALL).items() for clip in clips}

    small, large = drawn(45), drawn(60)
    assert len({(name.split("_")[0], split) for name, split in large.items()}) == 20, "no tape is in two splits"
    assert small.items() <= large.items()
    assert set(large.values()) == {"train", "val", "test"}


def test_a_drawn_split_may_be_empty_and_says_so(root: Path, make: Make) -> None:
    write(root / "all.jsonl", line("tape0_0"))
    with pytest.raises(UserError, match=r"no clips of the split .*val.*raise data\.splits\.val"):
        load_splits(make("data.splits.random=true", "data.splits.val=0.01"), ALL[:2])


def test_bad_group_patterns_are_refused(root: Path, make: Make) -> None:
    write(root / "all.jsonl", *map(line, names(root)))
    for pattern, message in (("(", "regular expression"), ("^(film)", "matches no id")):
        with pytest.raises(UserError, match=message):
            load_splits(make("data.splits.random=true", f'data.splits.group_pattern="{pattern}"'), ALL)


def test_subsets_of_the_training_clips_are_nested(root: Path, make: Make) -> None:
    given(root, "train", "val")
    few, more = (
        [clip.id for clip in load_splits(make(f"data.max_clips={count}"), ALL[:2])["train"]] for count in (3, 6)
    )
    assert set(few) < set(more)
    assert (len(few), few) == (3, sorted(few))
    assert len(load_splits(make("data.max_clips=3"), ALL[:2])["val"]) == 10
    assert len(load_splits(make("data.max_clips=99"), ALL[:2])["train"]) == 10


def test_bad_entries_go_to_the_ledger(root: Path, make: Make, tmp_path: Path) -> None:
    given(root, "train", "val")
    with (root / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            "\n{\n"
            + line("lost", video="lost.mp4")
            + "\n"
            + json.dumps({"video": "tape9_0.mp4", "caption": "\ud800", "id": "half"})
        )
    config = make("data.max_bad_fraction=0.2")
    splits = load_splits(config, ALL[:2])
    assert [skipped.clip.id for skipped in splits.skipped] == [f"{root}/train.jsonl:11", "lost", "half"]
    skipped_log = open_skipped_log(config, splits)
    assert (len(skipped_log), skipped_log.num_clips) == (3, 23)
    lines = [
        json.loads(text) for text in (tmp_path / "run" / "skipped_clips.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [entry["id"] for entry in lines] == [skipped.clip.id for skipped in splits.skipped]
    with pytest.raises(UserError, match=r"3 of 23 clips cannot be used, more than data\.max_bad_fraction=0\.1"):
        open_skipped_log(make("data.max_bad_fraction=0.1"), splits)


def test_a_good_data_set_leaves_no_ledger(root: Path, make: Make, tmp_path: Path) -> None:
    given(root, "train", "val")
    open_skipped_log(make(), load_splits(make(), ALL[:2]))
    assert not (tmp_path / "run").exists()


def test_bad_entries_of_drawn_splits_belong_to_one(root: Path, make: Make) -> None:
    bad = [line(f"lost{number}", video=f"lost{number}.mp4") for number in range(30)]
    write(root / "all.jsonl", *map(line, names(root)), *bad)
    config = make("data.splits.random=true", "data.splits.val=0.3", "data.splits.test=0.3")
    parts = [load_splits(config, [split]).skipped for split in ALL]
    assert sum(map(len, parts)) == len(load_splits(config, ALL).skipped) == 30
    assert all(parts)


def test_a_wrong_key_is_one_sentence_long_before_the_end(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_BAD_START", 5)
    given(root, "train", "val")
    with pytest.raises(UserError) as caught:
        load_splits(make("data.caption_key=text.ko"), ALL[:2])
    for part in (
        "none of the first 5 entries",
        "train.jsonl:1",
        "data.caption_key=text.ko",
        "text at video, caption, id",
    ):
        assert part in str(caught.value)


def test_equal_ids_within_a_split_are_refused_and_in_two_are_not(root: Path, make: Make) -> None:
    write(root / "train.jsonl", line("tape0_0", id="x"), line("tape0_1"))
    write(root / "val.jsonl", line("tape1_0", id="x"))
    load_splits(make(), ALL[:2])
    write(root / "train.jsonl", line("tape0_0", id="x"), line("tape0_1", id="x"))
    with pytest.raises(UserError, match=r"two clips of one split have the id 'x'.*tape0_0\.mp4.*tape0_1\.mp4"):
        load_splits(make(), ALL[:2])


def test_the_ai_hub_format_goes_the_same_way(root: Path, make: Make) -> None:
    for name in names(root)[:12]:
        (root / f"{name}.json").write_text(json.dumps({"annotation": {"description_kr": name}}), encoding="utf-8")
    config = make("data.splits.random=true", "data.splits.val=0.3", "data.splits.test=0.2", format="aihub")
    assert sum(map(len, load_splits(config, ALL[:1], ALL[1:]).values())) == 12


def test_long_reading_is_reported(
    root: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(root, "train", "val")
    load_splits(make(), ALL[:2])
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr(module, "_REPORT_EVERY", 5)
    monkeypatch.setattr(module, "_SILENT_S", 0.0)
    load_splits(make(), ALL[:2])
    assert "reading the annotations: 20 in" in capsys.readouterr().err


def load_and_name(config: Config) -> list[str]:
    return [clips.path.name for clips in load_splits(config, ALL[:2]).values()]


def test_many_ranks_get_the_same_tables(root: Path, make: Make) -> None:
    given(root, "train", "val")
    with get_context("fork").Pool(4) as pool:
        found = pool.map(load_and_name, [make()] * 8)
    assert all(tables == found[0] for tables in found)
    assert len(list((Path(make().paths.cache_dir) / "manifests").iterdir())) == 4
