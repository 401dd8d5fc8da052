"""Labels as people, editors and converters leave them, the same for the same seed."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator

from tests.data.fuzz import flipped

LABEL = {"annotation": {"description_kr": "사람이 ‘가’라고 적힌 문을 왼쪽에서 연다."}}


def damage_labels(seed: int = 0) -> Iterator[tuple[str, bytes, bool]]:
    """Kind, content, and whether a caption can be read from it."""
    rng = random.Random(seed)
    good = json.dumps(LABEL, ensure_ascii=False)
    yield "good", good.encode(), True
    yield "byte order mark", good.encode("utf-8-sig"), True
    for encoding in ("cp949", "utf-16", "utf-32", "utf-16-le"):
        yield encoding, good.encode(encoding), False
    for cut in sorted(rng.sample(range(1, len(good.encode()) - 1), 15)):
        yield "truncated", good.encode()[:cut], False
    for content in (
        b"",
        b" \n",
        b"\0" * 100,
        b"null",
        b"3",
        b"[]",
        b"{}",
        b'"text"',
        b"{'a': 1}",
        b"NaN",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ):
        yield "no label", content, False
    yield "two labels", good.encode() + good.encode(), False
    yield "huge number", b'{"annotation": ' + b"9" * 10_000 + b"}", False
    for value in (None, 3, True, {}, [], [None], ["", " "], "", " \n\t", {"text": "가"}, [["가"]], ["가", 3]):
        yield "no caption", json.dumps({"annotation": {"description_kr": value}}).encode(), False
    yield "no annotation", b'{"Annotation": {"description_kr": "\xea\xb0\x80"}}', False
    for annotation in ("text", ["list"], None, 7):
        yield "annotation of another type", json.dumps({"annotation": annotation}).encode(), False
    for kind, caption in (
        ("decomposed", unicodedata.normalize("NFD", "왼쪽에서 사람이 걷는다.")),
        ("control characters", "".join(map(chr, range(32))) + "사람\x7f이\x85 걷\u2028는\u2029다\ufeff."),
        ("very long", "가나다라 " * 20_000),
        ("no white space", "가" * 100_000),
        ("outside the plane", "😀🇰🇷" * 50),
        ("half a pair", "\ud83d 사람"),
        ("right to left", "\u202e사람\u202c"),
        ("list", ["하나.", "둘."]),
    ):
        yield kind, json.dumps({"annotation": {"description_kr": caption}}).encode(), True
    for _ in range(40):
        damaged = flipped(good.encode(), rng, num_flips=rng.choice([1, 2, 5]))
        yield "bits", damaged, _is_good(damaged)


def _is_good(content: bytes) -> bool:
    try:
        caption = json.loads(content.decode("utf-8-sig"))["annotation"]["description_kr"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(caption, str) and bool(caption.strip())
