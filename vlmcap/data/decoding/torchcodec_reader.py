"""Frames read by torchcodec, where it is installed: an optional second decoder behind the same interface.

The file is opened by PyAV first: its protections, its checks and its moments hold for both decoders, so both give the
same frames.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import BinaryIO

import torch
from torch import Tensor

from vlmcap.config import Decoder
from vlmcap.data.decoding.container import VideoError, check_size
from vlmcap.errors import UserError, first_line


@functools.cache
def _load() -> ModuleType | str:
    """`torchcodec.decoders`, or why there is none.

    It loads FFmpeg's shared libraries, which may be missing or of the wrong version.
    """
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        return first_line(error)


def resolve_decoder(decoder: Decoder) -> Decoder:
    """`pyav` or `torchcodec`: what `decoder` means here; `auto` is torchcodec where it loads.

    Raises:
        UserError: torchcodec is asked for and does not load.
    """
    if decoder is Decoder.pyav:
        return decoder
    loaded = _load()
    if isinstance(loaded, ModuleType):
        return Decoder.torchcodec
    if decoder is Decoder.torchcodec:
        raise UserError(
            f"data.decoder=torchcodec cannot be used, as torchcodec does not load ({loaded}): install it together "
            "with FFmpeg's shared "
            "libraries, or set data.decoder=pyav"
        )
    return Decoder.pyav


class TorchcodecReader:
    """The frames of one clip at given moments.

    Args:
        source: A local path, or an open file at its beginning.
        max_pixels: Largest frame to accept.

    Raises:
        VideoError: torchcodec cannot open it.
    """

    def __init__(self, source: str | BinaryIO, max_pixels: int) -> None:
        loaded = _load()
        assert isinstance(loaded, ModuleType), "resolve_decoder has said that it loads"
        try:
            # exact: the other mode takes a constant frame rate for granted. One thread: data workers are processes
            # already.
            self._decoder = loaded.VideoDecoder(source, seek_mode="exact", num_ffmpeg_threads=1, device="cpu")
        except (RuntimeError, ValueError) as error:
            raise VideoError(f"torchcodec cannot open it ({first_line(error)})") from error
        metadata = self._decoder.metadata
        check_size(metadata.width, metadata.height, max_pixels)
        self.start_s, self.end_s = float(metadata.begin_stream_seconds), float(metadata.end_stream_seconds)

    def frames_at(self, moments_s: Sequence[float]) -> tuple[Tensor, Tensor, list[int]]:
        """uint8 (F', 3, H, W) of the distinct frames on screen, their times (F'), and for each moment which of them it is.

        Args:
            moments_s: Ascending, in seconds of the stream's own clock.
        """
        last_s = max(self.start_s, self.end_s - 1e-6)  # the end itself is on no frame
        try:
            batch = self._decoder.get_frames_played_at([min(max(moment, self.start_s), last_s) for moment in moments_s])
        except (RuntimeError, IndexError, ValueError) as error:
            raise VideoError(f"torchcodec cannot decode it ({first_line(error)})") from error
        times_s, inverse = torch.unique_consecutive(batch.pts_seconds, return_inverse=True)
        rows = inverse.tolist()
        firsts = [rows.index(row) for row in range(rows[-1] + 1)]
        return batch.data[firsts], times_s, rows
