"""Splits are drawn by whole groups, from the group alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.data.formats.record import Record
from vlmcap.data.splits import SPLITS, DrawnSplits, SplitDrawer, draw_split, nested_subset, split_in_path, standard_split
from vlmcap.errors import UserError
from vlmcap.types import Clip

HALF = DrawnSplits(val=0.25, test=0.25)


def record(name: str, video: str = "", group: str = "") -> Record:
    return Record(Clip(name, video or f"/set/{name}.mp4", ("바다.",)), group=group)


@pytest.mark.parametrize(
    ("written", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("1.Training", "train"),
        ("2_validation", "val"),
        ("VAL", "val"),
        ("dev", "val"),
        ("Test", "test"),
        ("restval", "restval"),
        ("", ""),
    ],
)
def test_splits_have_many_names(written: str, split: str) -> None:
    assert standard_split(written) == split


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("train/labels/a.json", ("train", "labels/a.json")),
        ("data/2.Validation/a.json", ("val", "data/a.json")),
        ("labels/a/train.json", ("", "labels/a/train.json")),
        ("test/train/a.json", ("test", "train/a.json")),
    ],
)
def test_folders_name_splits_and_files_do_not(path: str, expected: tuple[str, str]) -> None:
    assert split_in_path(path) == expected


def test_shares_are_those_that_were_asked() -> None:
    drawn = [draw_split(f"tape{index}", DrawnSplits(val=0.1, test=0.2)) for index in range(20_000)]
    assert drawn.count("val") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert drawn.count("test") / 20_000 == pytest.approx(0.2, abs=0.01)


def test_a_draw_is_for_ever() -> None:
    """These are part of every data set that was ever split so."""
    drawn = [draw_split(f"tape{index}", DrawnSplits(val=0.3, test=0.3)) for index in range(8)]
    assert drawn == ["train", "train", "val", "test", "val", "val", "train", "train"]


@given(group=st.text(), seed=st.integers(), val=st.floats(0, 0.4), more=st.floats(0, 0.2))
def test_a_larger_share_takes_from_training_only(group: str, seed: int, val: float, more: float) -> None:
    before, after = (draw_split(group, DrawnSplits(share, 0.3, seed)) for share in (val, val + more))
    assert before == after or (before, after) == ("train", "val")


def test_another_seed_is_another_draw() -> None:
    first, second = ([draw_split(f"g{i}", DrawnSplits(0.25, 0.25, seed)) for i in range(50)] for seed in (0, 1))
    assert first != second


@given(ids=st.lists(st.text("ab_0123456789", max_size=8)), pattern=st.sampled_from([None, "^(.*)_", "(a+)"]))
def test_groups_never_straddle(ids: list[str], pattern: str | None) -> None:
    drawer = SplitDrawer(DrawnSplits(0.3, 0.3, group_pattern=pattern), "/set")
    splits: dict[str, set[str]] = {}
    for clip in map(record, ids):
        splits.setdefault(drawer.group_of(clip), set()).add(drawer.split_of(clip))
    assert all(len(found) == 1 for found in splits.values())


def test_what_a_group_is() -> None:
    plain, by_pattern = (SplitDrawer(DrawnSplits(0.3, 0.3, group_pattern=pattern), "/set") for pattern in (None, r"^(.*)_\d+$"))
    assert plain.group_of(record("a_1", group="tape")) == "tape"
    assert plain.group_of(record("a_1", "/set/x/b.mp4")) == plain.group_of(record("a_2", "/set/x/b.mp4")) == "x/b.mp4"
    assert by_pattern.group_of(record("a_1", group="tape")) == "a"
    assert by_pattern.group_of(record("odd", group="tape")) == "tape"


def test_a_moved_data_set_keeps_its_splits() -> None:
    here, there = SplitDrawer(HALF, "/a/set"), SplitDrawer(HALF, "/other/place/")
    for index in range(30):
        assert here.split_of(record("x", f"/a/set/{index}.mp4")) == there.split_of(record("x", f"/other/place/{index}.mp4"))


@pytest.mark.parametrize(("pattern", "message"), [("(", "is no regular expression"), ("a.*", "has no group")])
def test_bad_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SplitDrawer(DrawnSplits(0.1, 0.1, group_pattern=pattern), "/set")


def test_a_pattern_that_never_matches_is_refused_at_the_end() -> None:
    drawer = SplitDrawer(DrawnSplits(0.1, 0.1, group_pattern="^(tape)"), "/set")
    assert {drawer.split_of(record(f"clip{index}")) for index in range(50)} <= set(SPLITS)
    with pytest.raises(UserError, match=r"group_pattern=\^\(tape\) matches no id, such as 'clip0'"):
        drawer.check()
    drawer.split_of(record("tape"))
    drawer.check()


@given(num_clips=st.integers(1, 200), seed=st.integers(0, 10), data=st.data())
def test_subsets_are_nested_and_sorted(num_clips: int, seed: int, data: st.DataObject) -> None:
    large = data.draw(st.integers(0, num_clips))
    small = data.draw(st.integers(0, large))
    subsets = [nested_subset(num_clips, size, seed).tolist() for size in (small, large)]
    assert set(subsets[0]) <= set(subsets[1]) <= set(range(num_clips))
    assert [len(subset) for subset in subsets] == [small, large]
    assert all(subset == sorted(set(subset)) for subset in subsets)
