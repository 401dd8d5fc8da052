"""An image is a clip of one frame, a list of images or an animation a clip of as many."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, features
from torch import Tensor

from tests.data.encoding import Frames, encode
from vlmcap.config import DataConfig, Sampling
from vlmcap.data.decoding.video import VideoError, pad_frames, read_frames
from vlmcap.types import Clip

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
EXIF_ORIENTATION = 0x0112


def as_image(frames: Tensor) -> Frames:
    return frames[0].permute(1, 2, 0).numpy()


def save(path: Path, pixels: Frames = PICTURE, **options: object) -> str:
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return str(path)


def listed(paths: list[str]) -> Clip:
    return Clip("a", paths[0], ("그림이다.",), frames=tuple(paths))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_an_image_is_one_frame(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    frames = read_frames(path, DataConfig(sampling=Sampling.adaptive, num_frames=8))
    assert frames.shape == (1, 3, 20, 30)
    np.testing.assert_array_equal(as_image(frames), PICTURE)
    assert pad_frames(frames, 8).shape == (8, 3, 20, 30)


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_pictures_of_phones_are_upright(tmp_path: Path, orientation: int, turns: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(as_image(read_frames(path, DataConfig())), np.rot90(PICTURE, turns))


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) << 8
    grey = as_image(read_frames(save(tmp_path / "deep.png", deep), DataConfig()))  # type: ignore[arg-type]
    np.testing.assert_array_equal(grey[..., 0], np.arange(256).reshape(16, 16))
    Image.fromarray(PICTURE).quantize(16).save(tmp_path / "palette.png")
    expected = np.asarray(Image.open(tmp_path / "palette.png").convert("RGB"))
    np.testing.assert_array_equal(as_image(read_frames(str(tmp_path / "palette.png"), DataConfig())), expected)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_on_one_thread(tmp_path: Path) -> None:
    path = save(tmp_path / "x.avif", quality=100, subsampling="4:4:4")
    assert np.abs(as_image(read_frames(path, DataConfig())).astype(int) - PICTURE).mean() < 8
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_a_video(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    shades = [Image.new("RGB", (16, 12), (20 * i, 20 * i, 20 * i)) for i in range(10)]
    shades[0].save(path, save_all=True, append_images=shades[1:], duration=100, lossless=True)
    frames = read_frames(str(path), DataConfig(num_frames=5))
    assert frames[:, 0, 0, 0].tolist() == [20, 60, 100, 140, 180]
    assert len(read_frames(str(path), DataConfig(num_frames=16))) == 10


def test_a_list_of_images_is_a_video(tmp_path: Path) -> None:
    sizes = [(12, 16), *([(24, 32)] * 5), (12, 16)]
    paths = [save(tmp_path / f"{i}.png", np.full((*size, 3), 10 * i, np.uint8)) for i, size in enumerate(sizes)]
    frames = read_frames(listed(paths), DataConfig(sampling=Sampling.keyframe, num_frames=3))
    assert frames.shape == (3, 3, 24, 32)  # of the first one taken
    assert frames[:, 0, 0, 0].tolist() == [10, 30, 50]
    assert read_frames(listed(paths), DataConfig(num_frames=16))[:, 0, 5, 5].tolist() == [0, 10, 20, 30, 40, 50, 60]


def test_chance_in_a_list_of_images(tmp_path: Path) -> None:
    clip = listed([save(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8)) for i in range(30)])
    taken = {
        tuple(
            read_frames(clip, DataConfig(sampling=Sampling.random, num_frames=3), rng=np.random.default_rng(s))[
                :, 0, 0, 0
            ].tolist()
        )
        for s in range(5)
    }
    assert len(taken) > 1
    assert all(10 * i <= index < 10 * (i + 1) for indices in taken for i, index in enumerate(indices))


def test_names_lie(tmp_path: Path, make_frames: Callable[..., Frames]) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "image.mp4", format="png")
    np.testing.assert_array_equal(as_image(read_frames(str(tmp_path / "image.mp4"), DataConfig())), PICTURE)
    encode(tmp_path / "video.mp4", make_frames(8)).rename(tmp_path / "video.jpg")
    assert len(read_frames(str(tmp_path / "video.jpg"), DataConfig(num_frames=4))) == 4


def huge_png(width: int, height: int) -> bytes:
    """A well-formed header of an image of that size, and next to no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 64)
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, pixels, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("side", "reason"), [(9_000, "its frames are 9000x9000, outside"), (60_000, "far more than the allowed")]
)
def test_decompression_bombs_are_refused_by_their_header(tmp_path: Path, side: int, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(huge_png(side, side))
    with pytest.raises(VideoError, match=rf"^x\.png cannot be read: .*{reason}"):
        read_frames(str(tmp_path / "x.png"), DataConfig())


@pytest.mark.parametrize("kind", ["cut", "head only", "postscript"])
def test_broken_images_say_so(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, format="eps" if kind == "postscript" else "jpeg")
    content = buffer.getvalue()
    cut = {"cut": content[: len(content) // 2], "head only": content[:20], "postscript": content}[kind]
    (tmp_path / "x.jpg").write_bytes(cut)
    with pytest.raises(VideoError, match=r"^x\.jpg cannot be read: it is damaged"):
        read_frames(str(tmp_path / "x.jpg"), DataConfig())


def test_a_bad_image_of_a_list_is_named(tmp_path: Path) -> None:
    clip = listed([save(tmp_path / "good.png"), str(tmp_path / "gone.png")])
    with pytest.raises(VideoError, match=r"^gone\.png cannot be read: there is no such file"):
        read_frames(clip, DataConfig())
    with pytest.raises(VideoError, match="longer than"):
        read_frames(listed([save(tmp_path / "good.png")]), DataConfig(decode_timeout_s=1e-9))
