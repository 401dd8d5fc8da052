"""No name in annotations leads out of the root, however it is written, and every honest one leads to its file."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlmcap.config import JsonlConfig
from vlmcap.data.media import open_media, parse_address
from vlmcap.data.media.roots import OutsideRootError, annotation_files, relative_address, resolve_media
from vlmcap.errors import UserError

PARTS = [
    "",
    ".",
    "..",
    "...",
    "a.mp4",
    "sub",
    "out",
    "up",
    "secret.mp4",
    "inner.zip",
    "b.mp4",
    "root",
    "~",
    "\\",
    "C:",
    "\0",
    "바다",
    "%2e%2e",
]
NAMES = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=7).map("/".join),
    st.lists(st.sampled_from(PARTS), max_size=5).map("\\".join),
    st.tuples(
        st.sampled_from(["/", "//", "zip://", "tar://", "file://", "file:", "s3://", "memory://"]),
        st.sampled_from(PARTS),
    ).map("".join),
    st.text(max_size=20),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with files, an archive, and links inward, outward and in circles."""
    base = tmp_path_factory.mktemp("roots")
    root = base / "root"
    (root / "sub").mkdir(parents=True)
    (base / "outside").mkdir()
    for path in (root / "a.mp4", root / "sub" / "b.mp4", base / "outside" / "secret.mp4", base / "secret.mp4"):
        path.write_bytes(b"secret" if path.name == "secret.mp4" else b"x")
    with zipfile.ZipFile(root / "inner.zip", "w") as archive:
        archive.writestr("sub/c.mp4", "c")
        archive.writestr("../secret.mp4", "inside")
    (root / "out").symlink_to(base / "outside")
    (root / "sub" / "up").symlink_to(root)
    (root / "stolen.mp4").symlink_to(base / "secret.mp4")
    (root / "alias.mp4").symlink_to(root / "sub" / "b.mp4")
    return root


@given(name=NAMES, media=st.sampled_from(["", "sub", "inner.zip", "out"]))
@example(name="out/secret.mp4", media="")
@example(name="stolen.mp4", media="")
@example(name="sub/up/../../secret.mp4", media="")
@example(name="zip://a.mp4::/root/x.zip", media="")
@example(name="x::../secret.mp4", media="")
@example(name="secret.mp4", media="out")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_escapes(root: Path, name: str, media: str) -> None:
    try:
        address = resolve_media(JsonlConfig(root=str(root), media=media), name)
    except OutsideRootError as error:
        assert "\n" not in str(error)
        return
    assert Path(os.path.realpath(parse_address(address).file)).is_relative_to(root)
    with open_media(address) as file:
        assert file.read() != b"secret"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "absolute path"),
        ("C:\\clips\\a.mp4", "absolute path"),
        ("\\\\server\\a.mp4", "absolute path"),
        ("../secret.mp4", "contains '..'"),
        ("sub\\..\\a.mp4", "contains '..'"),
        ("https://example.org/a.mp4", "is an address"),
        ("zip://a.mp4::inner.zip", "is an address"),
        ("a.mp4::inner.zip", "is an address"),
        ("out/secret.mp4", "link out of data.root"),
        ("stolen.mp4", "link out of data.root"),
        ("sub", "there is no file"),
        ("", "not a file name"),
        ("lost.mp4", "there is no file"),
        ("x" * 5000, "there is no file"),
    ],
)
def test_refusals_say_why(root: Path, name: str, reason: str) -> None:
    with pytest.raises(OutsideRootError) as caught:
        resolve_media(JsonlConfig(root=str(root)), name)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["sub/b.mp4", "./sub//b.mp4", "sub\\b.mp4", "sub/up/sub/b.mp4", "alias.mp4"])
def test_files_inside_are_found(root: Path, name: str) -> None:
    assert Path(resolve_media(JsonlConfig(root=str(root)), name)).resolve() == root / "sub" / "b.mp4"


def test_what_is_outside_may_be_allowed(root: Path) -> None:
    free = JsonlConfig(root=str(root), allow_outside=True)
    outside = str(root.parent / "secret.mp4")
    assert resolve_media(free, outside) == outside
    assert resolve_media(free, "s3://bucket/a.mp4") == "s3://bucket/a.mp4"
    for name in ("../secret.mp4", "out/secret.mp4", "stolen.mp4"):
        assert Path(resolve_media(free, name)).read_bytes() == b"secret"


def test_the_media_folder_must_be_inside_too(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.media: '\.\./outside' contains '\.\.'"):
        resolve_media(JsonlConfig(root=str(root), media="../outside"), "secret.mp4")


@pytest.mark.parametrize(("on_disk", "in_text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_both_forms_of_hangul_are_tried(tmp_path: Path, on_disk: str, in_text: str) -> None:
    stored = unicodedata.normalize(on_disk, "바다/파도.mp4")
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(unicodedata.normalize(on_disk, "숲.mp4"), "x")
    source = JsonlConfig(root=str(tmp_path))
    assert resolve_media(source, unicodedata.normalize(in_text, "바다/파도.mp4")) == str(tmp_path / stored)
    assert resolve_media(source, unicodedata.normalize(in_text, "숲.mp4")).startswith("zip://")


@pytest.mark.parametrize(
    ("media", "name"),
    [
        ("", "sub/c.mp4"),
        ("inner", "sub/c.mp4"),
        ("inner.zip", "sub/c.mp4"),
        ("inner/sub", "c.mp4"),
        ("", "inner/sub/c.mp4"),
    ],
)
def test_members_of_archives_are_found(root: Path, media: str, name: str) -> None:
    assert resolve_media(JsonlConfig(root=str(root), media=media), name) == f"zip://sub/c.mp4::{root}/inner.zip"


def test_the_root_may_be_an_archive(root: Path) -> None:
    archive = f"{root}/inner.zip"
    assert resolve_media(JsonlConfig(root=archive), "sub/c.mp4") == f"zip://sub/c.mp4::{archive}"
    with pytest.raises(OutsideRootError, match="there is no file"):
        resolve_media(JsonlConfig(root=archive), "d.mp4")


def test_a_member_of_two_archives_is_ambiguous_until_one_is_named(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("a.mp4", name)
    with pytest.raises(OutsideRootError, match=r"x\.zip and .*y\.zip have the same name; set data\.media"):
        resolve_media(JsonlConfig(root=str(tmp_path)), "a.mp4")
    assert resolve_media(JsonlConfig(root=str(tmp_path), media="y"), "a.mp4").endswith("y.zip")


def test_a_broken_archive_is_named_where_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4")
    with pytest.raises(
        OutsideRootError, match=r"there is no file 'a\.mp4' below .*; .*cut\.zip is not a complete zip archive"
    ):
        resolve_media(JsonlConfig(root=str(tmp_path)), "a.mp4")


def test_remote_roots_are_joined_and_names_cannot_mislead_a_server() -> None:
    source = JsonlConfig(root="https://example.org/set", media="videos")
    assert resolve_media(source, "a/b.mp4") == "https://example.org/set/videos/a/b.mp4"
    for name in ("%2e%2e/secret", "a?b", "../x", "https://evil.example/x"):
        with pytest.raises(OutsideRootError):
            resolve_media(source, name)


def test_annotations_are_a_file_or_a_pattern(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "[라벨].jsonl", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")

    def found(pattern: str) -> list[str]:
        return [
            os.path.relpath(path, tmp_path)
            for path in annotation_files(JsonlConfig(root=str(tmp_path), annotations=pattern))
        ]

    assert found("a.jsonl") == ["a.jsonl"]
    assert found("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found("**/*.jsonl") == ["[라벨].jsonl", "a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert found("[라벨].jsonl") == ["[라벨].jsonl"]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("x/a.jsonl", "")
        archive.writestr("b.txt", "")
    assert annotation_files(JsonlConfig(root=f"{tmp_path}/z.zip", annotations="*.jsonl")) == [
        f"zip://x/a.jsonl::{tmp_path}/z.zip"
    ]


@pytest.mark.parametrize("pattern", ["../x.jsonl", "/etc/*", "out/*.jsonl", "s3://x/a.jsonl"])
def test_annotations_stay_inside(tmp_path: Path, pattern: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "x.jsonl").write_text("")
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"data\.root"):
        annotation_files(JsonlConfig(root=str(root), annotations=pattern))


@pytest.mark.parametrize(
    ("address", "root", "expected"),
    [
        ("/data/set/a/b.mp4", "/data/set", "a/b.mp4"),
        ("/data/set/a/b.mp4", "/data/set/", "a/b.mp4"),
        ("zip://m.mp4::/data/set/a.zip", "/data/set", "m.mp4::a.zip"),
        ("zip://m.mp4::/data/set.zip", "/data/set.zip", "m.mp4::"),
    ],
)
def test_relative_addresses_do_not_know_where_the_data_lies(address: str, root: str, expected: str) -> None:
    assert relative_address(address, root).removeprefix("zip://") == expected
