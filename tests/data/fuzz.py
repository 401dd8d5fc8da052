"""Damaged media files, the same for the same seed: what disks, downloads, converters and people make of real ones."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Damaged:
    """A file with what was done to it."""

    kind: str
    path: Path


Edit = Callable[[bytearray, random.Random], None]


def damage_videos(clips: Mapping[str, Path], folder: Path, seed: int = 0, rounds: int = 1) -> list[Damaged]:
    """Damaged copies of MP4 clips, and files that were never videos, written below `folder`.

    Args:
        clips: Name to file; the smallest are used most.
        folder: Where to.
        seed: Of everything random.
        rounds: How many times the random damages are drawn.
    """
    rng = random.Random(seed)
    made: list[Damaged] = []
    originals = {name: path.read_bytes() for name, path in clips.items()}
    small = min(originals, key=lambda name: len(originals[name]))

    def write(kind: str, content: bytes, ending: str = "mp4") -> None:
        path = folder / f"{len(made):05d}-{kind}.{ending}"
        path.write_bytes(content)
        made.append(Damaged(kind, path))

    for kind, content, ending in _never_videos(originals[small]):
        write(kind, content, ending)
    for name, content in originals.items():
        few = 1 if len(content) > 800_000 else 4
        for _ in range(rounds * few):
            write("truncated", content[: rng.randrange(1, len(content))])
            write("headless", content[rng.randrange(1, len(content)) :])
            write("shuffled", _shuffled(content, rng))
            write("holes", _with_holes(content, rng))
            write("bits", flipped(content, rng, num_flips=rng.choice([1, 10, 100, 1000])))
        for _ in range(rounds * few * (6 if name == small else 2)):
            write("bits in header", flipped(content, rng, num_flips=rng.choice([1, 3, 10]), **_header(content)))
    for field in _FIELDS:
        write(field.replace("/", "-"), _edited(originals[small], _FIELDS[field], rng))
    for box in _BOXES:
        for size in (0, 1, 7, 9, 0x7FFFFFFF, 0xFFFFFFFF):
            write(f"size of {box.decode()}", _edited(originals[small], _set_at(box, -4, size, 4), rng))
    for value in (float("nan"), float("inf"), -1.0, 1e300):
        write(f"matroska duration {value:g}", _matroska(originals[small], value), "mkv")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    made += [Damaged("no file", folder / f"{name}.mp4") for name in ("pipe", "folder", "loop", "device", "missing")]
    return made


def _never_videos(video: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Kind, content and ending."""
    text = "바다 위로 해가 뜬다.\n" * 200
    yield "empty", b"", "mp4"
    for size in (1, 4, 8, 12, 31):
        yield "tiny", video[:size], "mp4"
    yield "zeros", bytes(100_000), "mp4"
    yield "noise", random.Random(1).randbytes(100_000), "mp4"
    for encoding in ("utf-8", "utf-16", "cp949"):
        yield "text", text.encode(encoding), "mp4"
    yield "web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "mp4"
    yield "playlist", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "mp4"
    yield "playlist", b"ffconcat version 1.0\nfile /etc/passwd\nfile /dev/zero\n", "mp4"
    yield "playlist", b"<?xml version='1.0'?><MPD><Period><BaseURL>file:///dev/zero</BaseURL></Period></MPD>", "mp4"
    yield "session", b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n", "mp4"
    for ending in ("avi", "mkv", "jpg", "txt", "ts", "h264"):
        yield "wrong ending", video, ending
    yield "twice", video + video, "mp4"
    yield "sound only", _sound(), "mp4"
    for form in ("PNG", "GIF", "JPEG", "WEBP", "TIFF", "BMP"):
        picture = _picture(form)
        yield "picture cut", picture[: len(picture) // 2], "mp4"
        yield "picture bits", flipped(picture, random.Random(2), num_flips=20), "png"
    bomb = bytearray(_picture("PNG"))
    bomb[16:24] = struct.pack(">II", 0x7FFFFFFF, 0x7FFFFFFF)
    yield "picture size", bytes(bomb), "png"
    bomb[16:24] = struct.pack(">II", 5000, 5000)
    yield "picture size", bytes(bomb), "png"
    for ending in ("avi", "mkv", "mp4"):
        for side in (12_000, 65_535):
            yield f"video size {side}", _motion_jpeg(ending, side), ending
    yield "video size hidden", _with_hidden_size(2_000), "mkv"
    bomb = bytearray(_picture("GIF"))
    bomb[6:10] = b"\xff\xff\xff\xff"
    yield "picture size", bytes(bomb), "gif"


def _picture(form: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def _motion_jpeg(ending: str, side: int) -> bytes:
    """A video whose every picture claims to be a square of `side` pixels; unlike H.264, they say so in plain bytes."""
    size, claimed = struct.pack(">HH", 48, 64), struct.pack(">HH", side, side)
    return _pictures(ending, 48, 64, num_frames=4).replace(
        b"\xff\xc0\x00\x11\x08" + size, b"\xff\xc0\x00\x11\x08" + claimed
    )


def _with_hidden_size(side: int) -> bytes:
    """A video of squares of `side` pixels whose header says 64 × 64."""
    content = _pictures("mkv", side, side, num_frames=1)
    for name in (b"\xb0", b"\xba"):  # the elements PixelWidth and PixelHeight, two bytes long
        content = content.replace(name + b"\x82" + struct.pack(">H", side), name + b"\x82\x00\x40")
    return content


def _pictures(ending: str, height: int, width: int, num_frames: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(ending, ending)) as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        for _ in range(num_frames):
            frame = av.VideoFrame(width, height, "yuvj420p")
            for plane in frame.planes:
                plane.update(bytes([128]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode(None))  # type: ignore[attr-defined]
    return file.getvalue()


def _shuffled(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice([512, 4096, 32768])
    blocks = [content[i : i + size] for i in range(0, len(content), size)]
    i, k = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    blocks[i], blocks[k] = blocks[k], blocks[i]
    return b"".join(blocks)


def _with_holes(content: bytes, rng: random.Random) -> bytes:
    """As an interrupted download writes them."""
    damaged = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(len(content))
        size = min(rng.choice([16, 512, 16384]), len(content) - start)
        damaged[start : start + size] = bytes(size)
    return bytes(damaged)


def flipped(content: bytes, rng: random.Random, num_flips: int, start: int = 0, end: int | None = None) -> bytes:
    damaged = bytearray(content)
    for _ in range(num_flips):
        damaged[rng.randrange(start, len(content) if end is None else end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _header(content: bytes) -> dict[str, int]:
    start = content.index(b"moov") - 4
    return {"start": start, "end": start + int.from_bytes(content[start : start + 4], "big")}


def _edited(content: bytes, edit: Edit, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    edit(damaged, rng)
    return bytes(damaged)


def _set_at(box: bytes, offset: int, value: int, size: int) -> Edit:
    """Writes a number `offset` bytes behind the name of every such box."""

    def edit(content: bytearray, _: random.Random) -> None:
        place = content.find(box)
        assert place >= 4, box
        while place >= 0:
            content[place + offset : place + offset + size] = value.to_bytes(size, "big")
            place = content.find(box, place + 4)

    return edit


def _all(*edits: Edit) -> Edit:
    def edit(content: bytearray, rng: random.Random) -> None:
        for one in edits:
            one(content, rng)

    return edit


_BOXES = (
    b"ftyp",
    b"moov",
    b"trak",
    b"mdia",
    b"minf",
    b"stbl",
    b"stsd",
    b"avc1",
    b"avcC",
    b"stts",
    b"stsz",
    b"stco",
    b"stsc",
    b"mdat",
)
_U32 = 0xFFFFFFFF
# Offsets of the fields of version 0 boxes, from the name on (ISO/IEC 14496-12).
_FIELDS: dict[str, Edit] = {
    "size/tkhd huge": _set_at(b"tkhd", 80, 0xFFFF0000_FFFF0000, 8),
    "size/tkhd zero": _set_at(b"tkhd", 80, 0, 8),
    "size/stsd huge": _set_at(b"avc1", 28, _U32, 4),
    "size/stsd zero": _set_at(b"avc1", 28, 0, 4),
    "size/all huge": _all(_set_at(b"tkhd", 80, 0xFFFF0000_FFFF0000, 8), _set_at(b"avc1", 28, _U32, 4)),
    "time/mdhd duration endless": _set_at(b"mdhd", 20, _U32, 4),
    "time/mvhd duration endless": _set_at(b"mvhd", 20, _U32, 4),
    "time/all durations endless": _all(
        *(_set_at(box, at, _U32, 4) for box, at in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)))
    ),
    "time/all durations zero": _all(
        *(_set_at(box, at, 0, 4) for box, at in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)))
    ),
    "time/mdhd scale zero": _set_at(b"mdhd", 16, 0, 4),
    "time/mvhd scale zero": _set_at(b"mvhd", 16, 0, 4),
    "time/scales zero": _all(_set_at(b"mdhd", 16, 0, 4), _set_at(b"mvhd", 16, 0, 4)),
    "time/mdhd scale one": _set_at(b"mdhd", 16, 1, 4),
    "time/mdhd scale huge": _set_at(b"mdhd", 16, _U32, 4),
    "time/stts delta zero": _set_at(b"stts", 16, 0, 4),
    "time/stts delta huge": _set_at(b"stts", 16, 0x7FFFFFFF, 4),
    "time/stts delta negative": _set_at(b"stts", 16, _U32, 4),
    "time/stts count huge": _set_at(b"stts", 12, _U32, 4),
    "table/stts entries zero": _set_at(b"stts", 8, 0, 4),
    "table/stts entries huge": _set_at(b"stts", 8, _U32, 4),
    "table/stsz count huge": _set_at(b"stsz", 12, _U32, 4),
    "table/stsz count large, one size": _all(_set_at(b"stsz", 8, 1, 4), _set_at(b"stsz", 12, 0x10000000, 4)),
    "table/stsz sizes huge": _set_at(b"stsz", 8, 0x7FFFFFFF, 4),
    "table/stsz first size huge": _set_at(b"stsz", 16, 0x7FFFFFF0, 4),
    "table/stco offset huge": _set_at(b"stco", 12, _U32, 4),
    "table/stco offset zero": _set_at(b"stco", 12, 0, 4),
    "table/stco entries huge": _set_at(b"stco", 8, _U32, 4),
    "table/stsc entries huge": _set_at(b"stsc", 8, _U32, 4),
    "table/stsc samples zero": _set_at(b"stsc", 16, 0, 4),
    "table/stsc samples huge": _set_at(b"stsc", 16, _U32, 4),
    "codec/unknown": _set_at(b"avc1", 0, int.from_bytes(b"zzzz", "big"), 4),
    "codec/other": _set_at(b"avc1", 0, int.from_bytes(b"hvc1", "big"), 4),
    "codec/none": _set_at(b"avcC", 0, int.from_bytes(b"free", "big"), 4),
    "box/moov within moov": lambda content, rng: _nest(content, 2000),
}


def _nest(content: bytearray, depth: int) -> None:
    start, size = _header(bytes(content)).values()
    inner = bytes(content[start:size])
    for _ in range(depth):
        inner = struct.pack(">I", len(inner) + 8) + b"moov" + inner
    content[start:size] = inner


def _matroska(video: bytes, duration: float) -> bytes:
    """The clip in Matroska with another duration in its header."""
    file = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(file, "w", format="matroska") as target:
        given = source.streams.video[0]
        stream = target.add_stream_from_template(given)
        for packet in source.demux(given):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = bytearray(file.getvalue())
    place = content.index(b"\x44\x89\x88")  # the element Duration, eight bytes long
    content[place + 3 : place + 11] = struct.pack(">d", duration)
    return bytes(content)
