"""The frames that are read are those of a full decode, of whatever encoding in whatever container."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.decoding.matrix import CONTAINERS, ENCODINGS, NUM_FRAMES, PROPERTIES, UnavailableError, Video, make_video, read_number
from tests.data.encoding import on_screen
from vlmcap.data.decoding.container import DecodeLimits, MediaFile
from vlmcap.data.decoding.frame_reader import FrameReader
from vlmcap.data.decoding.sampling import KINDS, FrameSampling, choose_moments
from vlmcap.data.decoding.video import read_timed_frames

SAMPLINGS = [FrameSampling(kind, 5, fps=1.9) for kind in KINDS] + [FrameSampling("uniform", 7, jitter=0.4)]
FRAME_S = 0.04
ROUNDING_S = 0.0021  # containers that count milliseconds


def test_one():
    pass
