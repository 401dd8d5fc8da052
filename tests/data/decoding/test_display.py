"""Frames are shown as players show them, in every container; docs/reference/video.md lists the cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tests.data.decoding.document import check_table
from tests.data.encoding import Frames
from vlmcap.config import DataConfig
from vlmcap.data.decoding.container import VideoError
from vlmcap.data.decoding.display import display_matrix
from vlmcap.data.decoding.hdr import to_sdr
from vlmcap.data.decoding.video import DecodeLimits, read_frames

SetUp = Callable[[VideoStream], None]
CONTAINERS = ("mp4", "mov", "mkv", "webm", "avi", "flv", "ts", "mpg")
ONE = 1 << 16
CORNERS = np.asarray(
    [[(230, 30, 30), (30, 200, 30)], [(30, 30, 230), (240, 240, 240)]], np.uint8
)  # red, green; blue, white
OPTIONS = {
    "libx264": {"crf": "4", "preset": "ultrafast"},
    "libvpx-vp9": {"b": "9M", "deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"crf": "4", "preset": "12", "svtav1-params": "lp=1"},
}
STILL = DataConfig(num_frames=1)
PQ, HLG, BT2020, BT2020_NCL = 16, 18, 9, 9


def corners(height: int, width: int, colors: Frames = CORNERS) -> Frames:
    """(H, W, 3): four rectangles."""
    return np.kron(colors, np.ones((height // 2, width // 2, 1), np.uint8)).astype(np.uint8)


def encode(
    path: Path,
    pixels: Frames | VideoFrame,
    *,
    set_up: SetUp | None = None,
    codec: str | None = None,
    pix_fmt: str = "yuv420p",
    x264: str = "",
    colorspace: str = "ITU601",
) -> Path:
    """Fourteen times the same picture; its colours are encoded by `colorspace`, which the file does not say."""
    codec = codec or ("libvpx-vp9" if path.suffix == ".webm" else "libx264")
    options = OPTIONS[codec] | ({"x264-params": x264} if x264 else {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, VideoStream)
        picture = pixels if isinstance(pixels, VideoFrame) else VideoFrame.from_ndarray(pixels, format="rgb24")
        stream.height, stream.width = picture.height, picture.width
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        if set_up is not None:
            set_up(stream)
        for i in range(14):
            frame = picture
            if picture.format.name != pix_fmt:
                frame = picture.reformat(format=pix_fmt, dst_colorspace=colorspace, threads=1)
            frame.colorspace = stream.colorspace
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def show(path: Path) -> Frames:
    """(H, W, 3)."""
    return read_frames(str(path), STILL)[0].permute(1, 2, 0).numpy()


def corner_colors(pixels: Frames) -> Frames:
    """(2, 2, 3): the means of the four corners."""
    height, width = pixels.shape[:2]
    blocks = pixels[: height // 2 * 2, : width // 2 * 2].reshape(2, height // 2, 2, width // 2, 3)
    return blocks[:, 4:-4, :, 4:-4].mean(axis=(1, 3))


def looks_like(pixels: Frames, colors: Frames, tolerance: float = 12) -> bool:
    return bool(np.abs(corner_colors(pixels) - colors.astype(np.float64)).max() < tolerance)


def moved(colors: Frames, matrix: list[int]) -> Frames:
    """The corners where the matrix puts them: FFmpeg's display.h has (x, y) go to (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    shown = np.zeros_like(colors)
    for x, y in itertools.product((-1, 1), (-1, 1)):
        new_x, new_y = np.sign(a * x + c * y), np.sign(b * x + d * y)
        shown[int(new_y > 0), int(new_x > 0)] = colors[int(y > 0), int(x > 0)]
    return shown


def with_matrix(matrix: list[int]) -> SetUp:
    a, b, c, d = (value * ONE for value in matrix)
    return lambda stream: stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])


TURNS = [[a, 0, 0, d] for a in (-1, 1) for d in (-1, 1)] + [[0, b, c, 0] for b in (-1, 1) for c in (-1, 1)]


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_all_turns_and_mirrors(tmp_path: Path, matrix: list[int]) -> None:
    shown = show(encode(tmp_path / "x.mp4", corners(48, 96), set_up=with_matrix(matrix)))
    assert shown.shape == ((48, 96, 3) if matrix[0] else (96, 48, 3))
    assert looks_like(shown, moved(CORNERS, matrix))


@pytest.mark.parametrize("matrix", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], ids=str)
def test_a_matrix_that_shows_nothing_is_none(tmp_path: Path, matrix: list[int]) -> None:
    assert looks_like(show(encode(tmp_path / "x.mp4", corners(48, 96), set_up=with_matrix(matrix))), CORNERS)


def test_a_skewed_matrix_is_the_nearest_turn(tmp_path: Path) -> None:
    def set_up(stream: VideoStream) -> None:
        stream.set_display_rotation(80)

    assert looks_like(show(encode(tmp_path / "x.mp4", corners(48, 96), set_up=set_up)), np.rot90(CORNERS))


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_side_data_of_a_new_kind_hides_no_turn(tmp_path: Path, angle: int) -> None:
    class Frame:
        rotation = angle

        @property
        def side_data(self) -> object:
            raise ValueError("31 is not a valid Type")

    def set_up(stream: VideoStream) -> None:
        stream.set_display_rotation(angle)

    with av.open(str(encode(tmp_path / "x.mp4", corners(48, 96), set_up=set_up))) as container:
        matrix = display_matrix(next(container.decode(video=0)))
    guessed = display_matrix(Frame())  # type: ignore[arg-type]
    assert guessed is not None
    assert np.sign(guessed).tolist() == np.sign(matrix or (1, 0, 0, 1)).tolist()


def stretched(ratio: Fraction) -> SetUp:
    def set_up(stream: VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = ratio

    return set_up


@pytest.mark.parametrize(("ratio", "width"), [("4/3", 256), ("8/9", 171), ("1/2", 96), ("1/1", 192), ("64/45", 273)])
def test_pixels_become_square(tmp_path: Path, ratio: str, width: int) -> None:
    path = encode(tmp_path / "x.mp4", corners(128, 192), set_up=stretched(Fraction(ratio)))
    shown = show(path)
    assert shown.shape == (128, width, 3)
    assert looks_like(shown, CORNERS)


def test_stretched_pixels_are_turned_after_they_are_square(tmp_path: Path) -> None:
    def set_up(stream: VideoStream) -> None:
        stretched(Fraction(4, 3))(stream)
        stream.set_display_rotation(90)

    assert show(encode(tmp_path / "x.mp4", corners(96, 96), set_up=set_up)).shape == (128, 96, 3)


def test_the_largest_picture_is_that_shown(tmp_path: Path) -> None:
    path = encode(tmp_path / "x.mp4", corners(96, 96), set_up=stretched(Fraction(40, 1)))
    with pytest.raises(VideoError, match="3840x96, outside the allowed 1 to 100000 pixels"):
        read_frames(str(path), STILL, limits=DecodeLimits(max_pixels=100_000))


def combed(height: int, width: int) -> Frames:
    """Two moments in one frame: the upper rows show the corners, the lower ones their negative."""
    pixels = corners(height, width)
    pixels[1::2] = 255 - pixels[1::2]
    return pixels


def weave(pix_fmt: str, height: int, width: int) -> VideoFrame:
    """The same as cameras record it: in each plane the rows of both moments take turns."""
    frame = VideoFrame(width, height, pix_fmt)
    moments = corners(height // 2, width), 255 - corners(height // 2, width)
    fields = [VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt, threads=1) for pixels in moments]
    for i, plane in enumerate(frame.planes):
        rows = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        for start, field in enumerate(fields):
            source = field.planes[i]
            content = np.frombuffer(source, np.uint8).reshape(-1, source.line_size)[: source.height, : plane.line_size]
            rows[start : 2 * len(content) : 2, : content.shape[1]] = content
        plane.update(rows.tobytes())
    return frame


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p"])
def test_interlaced_frames_show_one_moment(tmp_path: Path, pix_fmt: str) -> None:
    shown = show(encode(tmp_path / "x.mp4", weave(pix_fmt, 96, 128), pix_fmt=pix_fmt, x264="tff=1"))
    assert shown.shape == (96, 128, 3)
    assert looks_like(shown, CORNERS)


def test_progressive_frames_keep_all_rows(tmp_path: Path) -> None:
    pixels = combed(96, 128)
    shown = show(encode(tmp_path / "x.mp4", pixels, pix_fmt="yuv444p"))
    assert np.abs(shown.astype(int) - pixels).mean() < 6


@pytest.mark.parametrize(
    ("height", "width", "colorspace"),
    [(720, 1280, "ITU709"), (544, 1280, "ITU709"), (1280, 720, "ITU709"), (576, 720, "ITU601"), (480, 640, "ITU601")],
)
def test_untagged_colors_are_those_of_the_size(tmp_path: Path, height: int, width: int, colorspace: str) -> None:
    assert looks_like(show(encode(tmp_path / "x.mp4", corners(height, width), colorspace=colorspace)), CORNERS, 4)


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (480, 640)])
@pytest.mark.parametrize(("tag", "colorspace"), [(1, "ITU709"), (6, "ITU601")])
def test_tagged_colors_are_those_of_the_tag(tmp_path: Path, height: int, width: int, tag: int, colorspace: str) -> None:
    def set_up(stream: VideoStream) -> None:
        stream.codec_context.colorspace = tag

    assert looks_like(
        show(encode(tmp_path / "x.mp4", corners(height, width), colorspace=colorspace, set_up=set_up)), CORNERS, 4
    )


def hdr(transfer: int) -> SetUp:
    def set_up(stream: VideoStream) -> None:
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, BT2020
        stream.codec_context.colorspace = BT2020_NCL

    return set_up


def grey_corners(levels: tuple[float, float, float, float]) -> Frames:
    return np.repeat(np.round(255 * np.asarray(levels)).astype(np.uint8).reshape(2, 2, 1), 3, axis=-1)


# Signals of 0, 20, 203 and 1000 cd/m² (BT.2100), and what a screen shows of them: BT.2408 has 203 as the white of a
# page.
HDR_LEVELS = {PQ: (0.0, 0.3459, 0.5807, 0.7518), HLG: (0.0, 0.3394, 0.75, 1.0)}
SDR_LEVELS = (0.0, 0.349, 0.879, 1.0)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_shown_on_a_normal_screen(tmp_path: Path, transfer: int) -> None:
    pixels = corners(96, 128, grey_corners(HDR_LEVELS[transfer]))
    path = encode(tmp_path / "x.mp4", pixels, set_up=hdr(transfer), colorspace="BT2020", pix_fmt="yuv420p10le")
    np.testing.assert_allclose(corner_colors(show(path)), grey_corners(SDR_LEVELS), atol=8)


@pytest.mark.parametrize("is_hlg", [True, False])
def test_hues_stay_and_brightness_ascends(is_hlg: bool) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    grey = to_sdr(np.repeat(ramp[None, :, None], 3, axis=-1), is_hlg=is_hlg)[0].astype(int)
    assert (np.ptp(grey, axis=-1) <= 2).all()
    assert (np.diff(grey[:, 1]) >= 0).all() and grey[0, 1] == 0 and grey[-1, 1] == 255
    red = to_sdr(np.asarray([[[40000, 15000, 15000]]], np.uint16), is_hlg=is_hlg)[0, 0].astype(int)
    assert red[0] > 2 * red[1] and red[0] > 2 * red[2]


# --- the table of containers ------------------------------------------------------------------------------------------


def turned(angle: float, hflip: bool) -> SetUp:
    return lambda stream: stream.set_display_rotation(angle, hflip=hflip)


def probe_turn(path: Path, angle: float, hflip: bool, expected: Frames) -> str:
    shown = show(encode(path, corners(96, 192), set_up=turned(angle, hflip)))
    return "shown" if looks_like(shown, expected) else "not stored" if looks_like(shown, CORNERS) else "wrong"


def probe_zeros(path: Path) -> str:
    return (
        "as stored"
        if looks_like(show(encode(path, corners(96, 192), set_up=with_matrix([0] * 4))), CORNERS)
        else "wrong"
    )


def probe_stretched(path: Path) -> str:
    width = show(encode(path, corners(96, 192), set_up=stretched(Fraction(4, 3)))).shape[1]
    return {256: "square", 192: "not stored"}.get(width, "wrong")


def probe_interlaced(path: Path) -> str:
    if path.suffix == ".webm":
        return "–"
    return "one field" if looks_like(show(encode(path, weave("yuv420p", 96, 192), x264="tff=1")), CORNERS) else "wrong"


def probe_hdr(path: Path, transfer: int) -> str:
    codec = "libsvtav1" if path.suffix == ".webm" else "libx264"
    pixels = corners(96, 192, grey_corners(HDR_LEVELS[transfer]))
    path = encode(path, pixels, set_up=hdr(transfer), colorspace="BT2020", pix_fmt="yuv420p10le", codec=codec)
    return "mapped" if np.abs(corner_colors(show(path)) - grey_corners(SDR_LEVELS)).max() < 8 else "wrong"


def probe_colors(path: Path, height: int, width: int, colorspace: str) -> str:
    right = looks_like(show(encode(path, corners(height, width), colorspace=colorspace)), CORNERS, 8)
    return {"ITU709": "BT.709", "ITU601": "BT.601"}[colorspace] if right else "wrong"


PROBES: dict[str, Callable[[Path], str]] = {
    "turned by 90°": lambda path: probe_turn(path, 90, False, np.rot90(CORNERS)),
    "mirrored": lambda path: probe_turn(path, 0, True, CORNERS[:, ::-1]),
    "matrix of zeros": probe_zeros,
    "pixels of 4:3": probe_stretched,
    "interlaced": probe_interlaced,
    "PQ": lambda path: probe_hdr(path, PQ),
    "HLG": lambda path: probe_hdr(path, HLG),
    "untagged, 720 rows": lambda path: probe_colors(path, 720, 1280, "ITU709"),
    "untagged, 480 rows": lambda path: probe_colors(path, 480, 640, "ITU601"),
}


def test_the_table_of_containers_is_current(tmp_path: Path) -> None:
    rows = ["| | " + " | ".join(PROBES) + " |", "|---" * (len(PROBES) + 1) + "|"]
    for container in CONTAINERS:
        found = [probe(tmp_path / f"{i}.{container}") for i, probe in enumerate(PROBES.values())]
        assert "wrong" not in found, (container, found)
        rows.append(f"| {container} | " + " | ".join(found) + " |")
    check_table("display", "\n".join(rows))
