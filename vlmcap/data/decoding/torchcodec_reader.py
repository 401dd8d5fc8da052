"""Reading of frames by torchcodec, an optional second decoder behind the same interface.

The file is opened by PyAV first, whose protections, checks and moments apply to both decoders, so both give the same
frames.
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
    """Returns `torchcodec.decoders`, or why it cannot be imported.

    It loads FFmpeg's shared libraries, which may be missing or have the wrong version.
    """
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        return first_line(error)


def resolve_decoder(decoder: Decoder) -> Decoder:
    """Returns the decoder that `decoder` selects here: `auto` is torchcodec if it can be loaded.

    Raises:
        UserError: torchcodec is requested but cannot be loaded.
    """
    if decoder is Decoder.pyav:
        return decoder
    loaded = _load()
    if isinstance(loaded, ModuleType):
        return Decoder.torchcodec
    if decoder is Decoder.torchcodec:
        raise UserError(
            f"data.decoder=torchcodec cannot be used, because torchcodec does not load ({loaded}); install it together "
            "with FFmpeg's shared libraries, or set data.decoder=pyav"
        )
    return Decoder.pyav


class TorchcodecReader:
    """Reads the frames of one clip at given moments.

    Args:
        source: Local path, or an open file at its beginning.
        max_pixels: Largest number of pixels per frame.

    Raises:
        VideoError: torchcodec cannot open the file.
    """

    def __init__(self, source: str | BinaryIO, max_pixels: int) -> None:
        loaded = _load()
        assert isinstance(loaded, ModuleType), "resolve_decoder has checked this"
        try:
            # The other seek mode assumes a constant frame rate. One thread, as data workers are processes already.
            self._decoder = loaded.VideoDecoder(source, seek_mode="exact", num_ffmpeg_threads=1, device="cpu")
        except (RuntimeError, ValueError) as error:
            raise VideoError(f"torchcodec cannot open it ({first_line(error)})") from error
        metadata = self._decoder.metadata
        check_size(metadata.width, metadata.height, max_pixels)
        self.start_s, self.end_s = float(metadata.begin_stream_seconds), float(metadata.end_stream_seconds)

    def frames_at(self, moments_s: Sequence[float]) -> tuple[Tensor, Tensor, list[int]]:
        """Reads the distinct frames on screen at the given moments.

        Args:
            moments_s: Ascending moments, in seconds of the stream's own clock.

        Returns:
            uint8 (F', 3, H, W) frames, their times (F',), and the index of the frame at each moment.
        """
        last_s = max(self.start_s, self.end_s - 1e-6)  # there is no frame at the end itself
        try:
            batch = self._decoder.get_frames_played_at([min(max(moment, self.start_s), last_s) for moment in moments_s])
        except (RuntimeError, IndexError, ValueError) as error:
            raise VideoError(f"torchcodec cannot decode it ({first_line(error)})") from error
        # Moments between two frames give the same frame.
        times_s, inverse = torch.unique_consecutive(batch.pts_seconds, return_inverse=True)
        indices = inverse.tolist()
        # The first position of each distinct frame.
        firsts = [indices.index(index) for index in range(indices[-1] + 1)]
        return batch.data[firsts], times_s, indices
