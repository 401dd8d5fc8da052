"""Splits are drawn by whole groups, from the group alone."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.config import SplitConfig
from vlmcap.data.formats.record import Record
from vlmcap.data.splits import SPLITS, SplitDrawer, draw_split, nested_subset, split_in_path, standard_split
from vlmcap.errors import UserError
from vlmcap.types import Clip

KOREAN = {"train": ("훈련", "학습"), "val": ("검증",), "test": ("시험", "평가", "테스트")}
AROUND = (
    ("", ""),
    ("1.", ""),
    ("2_", ""),
    ("3. ", "데이터"),
    ("", "용"),
    ("", " 데이터셋"),
    ("[라벨]", ""),
    ("", "셋"),
)
HALF = SplitConfig(random=True, val=0.25, test=0.25)


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
        *(
            (f"{before}{name}{after}", split)
            for split, names in KOREAN.items()
            for name in names
            for before, after in AROUND
        ),
        ("재학습", "재학습"),
        ("훈련소", "훈련소"),
        ("데이터", "데이터"),
    ],
)
def test_splits_have_many_names(written: str, split: str) -> None:
    assert standard_split(written) == split
    assert standard_split(unicodedata.normalize("NFD", written)) == split or split == written


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
    drawn = [draw_split(f"tape{index}", SplitConfig(random=True, val=0.1, test=0.2)) for index in range(20_000)]
    assert drawn.count("val") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert drawn.count("test") / 20_000 == pytest.approx(0.2, abs=0.01)


def test_a_draw_is_for_ever() -> None:
    """These are part of every data set that was ever split so."""
    drawn = [draw_split(f"tape{index}", SplitConfig(random=True, val=0.3, test=0.3)) for index in range(8)]
    assert drawn == ["train", "train", "val", "test", "val", "val", "train", "train"]


@given(group=st.text(), seed=st.integers(0, 2**32 - 1), val=st.floats(0, 0.4), more=st.floats(0, 0.2))
def test_a_larger_share_takes_from_training_only(group: str, seed: int, val: float, more: float) -> None:
    before, after = (
        draw_split(group, SplitConfig(random=True, val=share, test=0.3, seed=seed)) for share in (val, val + more)
    )
    assert before == after or (before, after) == ("train", "val")


def test_another_seed_is_another_draw() -> None:
    first, second = (
        [draw_split(f"g{i}", SplitConfig(random=True, val=0.25, test=0.25, seed=seed)) for i in range(50)]
        for seed in (0, 1)
    )
    assert first != second


@given(ids=st.lists(st.text("ab_0123456789", max_size=8)), pattern=st.sampled_from([None, "^(.*)_", "(a+)"]))
def test_groups_never_straddle(ids: list[str], pattern: str | None) -> None:
    drawer = SplitDrawer(SplitConfig(random=True, val=0.3, test=0.3, group_pattern=pattern), "/set")
    splits: dict[str, set[str]] = {}
    for clip in map(record, ids):
        splits.setdefault(drawer.group_of(clip), set()).add(drawer.split_of(clip))
    assert all(len(found) == 1 for found in splits.values())


def test_what_a_group_is() -> None:
    plain, by_pattern = (
        SplitDrawer(SplitConfig(random=True, val=0.3, test=0.3, group_pattern=pattern), "/set")
        for pattern in (None, r"^(.*)_\d+$")
    )
    assert plain.group_of(record("a_1", group="tape")) == "tape"
    assert plain.group_of(record("a_1", "/set/x/b.mp4")) == plain.group_of(record("a_2", "/set/x/b.mp4")) == "x/b.mp4"
    assert by_pattern.group_of(record("a_1", group="tape")) == "a"
    assert by_pattern.group_of(record("odd", group="tape")) == "tape"


def test_a_moved_data_set_keeps_its_splits() -> None:
    here, there = SplitDrawer(HALF, "/a/set"), SplitDrawer(HALF, "/other/place/")
    for index in range(30):
        assert here.split_of(record("x", f"/a/set/{index}.mp4")) == there.split_of(
            record("x", f"/other/place/{index}.mp4")
        )


@pytest.mark.parametrize(("pattern", "message"), [("(", "is not a regular expression"), ("a.*", "has no group")])
def test_bad_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SplitDrawer(SplitConfig(random=True, val=0.1, test=0.1, group_pattern=pattern), "/set")


def test_a_pattern_that_never_matches_is_refused_at_the_end() -> None:
    drawer = SplitDrawer(SplitConfig(random=True, val=0.1, test=0.1, group_pattern="^(tape)"), "/set")
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


def reach(kind: str, root: Path) -> str:
    """Another way to `clips/a.mp4` below the root."""
    if kind == "a link to the file":
        (root / "b.mp4").symlink_to(root / "clips" / "a.mp4")
        return f"{root}/b.mp4"
    if kind == "a relative link to the folder":
        (root / "more").mkdir()
        (root / "more" / "same").symlink_to("../clips")
        return f"{root}/more/same/a.mp4"
    if kind == "a link to a link":
        (root / "one").symlink_to(root / "clips")
        (root / "two").symlink_to(root / "one")
        return f"{root}/two/a.mp4"
    if kind == "a link to the root":
        (root.parent / "elsewhere").symlink_to(root)
        return f"{root.parent}/elsewhere/clips/a.mp4"
    return {"dots": f"{root}/./clips/../clips//a.mp4", "a URL": f"file://{root}/clips/a.mp4"}[kind]


@pytest.mark.parametrize(
    "kind",
    ["a link to the file", "a relative link to the folder", "a link to a link", "a link to the root", "dots", "a URL"],
)
def test_one_video_is_in_one_split_by_whichever_path(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "set"
    (root / "clips").mkdir(parents=True)
    (root / "clips" / "a.mp4").write_bytes(b"video")
    (root / "clips" / "c.mp4").write_bytes(b"video")
    other = reach(kind, root)
    for place in (root, tmp_path / "elsewhere") if kind == "a link to the root" else (root,):
        drawer = SplitDrawer(HALF, str(place))
        groups = [drawer.group_of(record(name, video)) for name, video in (("x", f"{root}/clips/a.mp4"), ("y", other))]
        assert groups == ["clips/a.mp4"] * 2
        assert drawer.group_of(record("z", f"{root}/clips/c.mp4")) == "clips/c.mp4"
        members = [
            drawer.group_of(record("m", f"zip://a.mp4::{path.removeprefix('file://')}"))
            for path in (f"{root}/clips/a.mp4", other)
        ]
        assert len(set(members)) == 1
