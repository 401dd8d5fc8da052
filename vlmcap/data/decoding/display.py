"""Conversion of decoded frames to what a player shows: upright, square pixels, full frames, standard dynamic range.

Captions mention left and right, shapes and colours, so a file's display settings are followed. docs/reference/video.md
lists which of them are followed in which kind of file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
from av.sidedata.sidedata import SideData, Type
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, ColorTrc
from numpy.typing import NDArray

from vlmcap.data.decoding.hdr import to_sdr

# Threads of the colour conversion. With more, each frame owns a pool of threads; a data worker forked from a process
# with such a frame in its garbage hangs forever when it frees it, since the pool's threads do not exist there.
_THREADS = 1
_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED
_HD_HEIGHT, _HD_WIDTH = 720, 1280
_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # matrices of quarter turns, counter-clockwise
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)


def square_size(frame: VideoFrame, aspect_ratio: float) -> tuple[int, int]:
    """Returns width and height of a frame with square pixels, as stored: the height is kept and the width is scaled.

    Args:
        frame: Decoded frame.
        aspect_ratio: Width of a pixel over its height.
    """
    return round(frame.width * aspect_ratio), frame.height


def is_hd(width: int, height: int) -> bool:
    """Returns whether untagged pictures of this size have the colours of BT.709 rather than of BT.601."""
    return width >= _HD_WIDTH or height >= _HD_HEIGHT


def is_plain(frame: VideoFrame, aspect_ratio: float) -> bool:
    """Returns whether a frame needs at most a rotation, so that any decoder that follows rotation gives the same."""
    matrix = display_matrix(frame)
    # A positive determinant rotates, a negative one mirrors.
    is_turn = matrix is None or matrix[0] * matrix[3] - matrix[1] * matrix[2] > 0
    return (
        is_turn
        and aspect_ratio == 1
        and not frame.interlaced_frame
        and frame.color_trc not in _HDR
        and not _is_untagged_hd(frame)
    )


def to_rgb(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    """Scales a frame to `width` and `height`, then rotates and mirrors it as its file requires; uint8 (3, H, W).

    Interlaced frames show the moment of their upper field, rather than two moments at once.
    """
    # Both fields of an interlaced frame are from different moments; one of them is enough.
    if frame.interlaced_frame:
        frame = _upper_field(frame)
    colorspace = Colorspace.ITU709 if _is_untagged_hd(frame) else None
    if frame.color_trc in _HDR:
        deep = frame.to_ndarray(
            format="rgb48le", width=width, height=height, src_colorspace=colorspace, threads=_THREADS
        )
        pixels = to_sdr(np.asarray(deep, dtype=np.uint16), is_hlg=frame.color_trc == ColorTrc.ARIB_STD_B67)
    else:
        shallow = frame.to_ndarray(
            format="rgb24", width=width, height=height, src_colorspace=colorspace, threads=_THREADS
        )
        pixels = np.asarray(shallow, dtype=np.uint8)
    return _oriented(pixels, display_matrix(frame)).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int] | None:
    """Returns a, b, c, d of the matrix that maps (x, y) of the stored picture to the displayed (a x + c y, b x + d y).

    None if there is no matrix, or a singular one, such as all zeros.
    """
    try:
        all_side_data = cast("Iterable[SideData]", frame.side_data)
        side_data = next((data for data in all_side_data if data.type == Type.DISPLAYMATRIX), None)
    except ValueError:  # a kind of side data unknown to PyAV, whose own `rotation` has no mirrors
        return _TURNS[round(frame.rotation / 90) % 4]
    if side_data is None:
        return None
    # The first two rows of a 3 × 3 matrix, whose third column is about perspective.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(side_data), np.int32)[:5])
    return (a, b, c, d) if a * d != b * c else None


def _oriented(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
    """Returns a view of (H, W, 3) pixels, rotated by the nearest multiple of 90 degrees and mirrored."""
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    across, down = a, d
    # Nearer to a quarter turn: x and y change places.
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.transpose(1, 0, 2)  # (H, W, 3) -> (W, H, 3)
        across, down = c, b
    # Negative entries reverse an axis.
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _is_untagged_hd(frame: VideoFrame) -> bool:
    return frame.colorspace == _UNTAGGED and is_hd(frame.width, frame.height)


def _upper_field(frame: VideoFrame) -> VideoFrame:
    """Returns every second row of each plane, in YUV, because each field has chroma rows of its own."""
    field = VideoFrame(frame.width, (frame.height + 1) // 2, frame.format.name)
    field.colorspace, field.color_range = frame.colorspace, frame.color_range
    field.color_trc, field.color_primaries = frame.color_trc, frame.color_primaries
    for source, target in zip(frame.planes, field.planes, strict=True):
        # (bytes,) -> (rows of the plane, line_size), of which every second
        rows = np.frombuffer(memoryview(source), np.uint8).reshape(-1, source.line_size)[: source.height : 2]
        copy = np.zeros((target.buffer_size // target.line_size, target.line_size), np.uint8)
        width = min(source.line_size, target.line_size)
        copy[: len(rows), :width] = rows[: len(copy), :width]
        target.update(copy.tobytes())
    return field
