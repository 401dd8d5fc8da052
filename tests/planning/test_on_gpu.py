"""The memory profile of a step is what PyTorch's allocator hands out on a GPU; not run on one yet."""

from __future__ import annotations

import pytest
import torch

from tests.planning.trial import Trial, peak_on_gpu, profile_trial

DEPTH = 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_checkpointing", [True, False])
def test_the_profile_is_within_a_twentieth_of_a_gpu(has_checkpointing: bool) -> None:
    """Qwen3 of 8 blocks, 1 024 wide, 4 096 visual tokens, in float32."""
    trial = Trial(
        "qwen3", width=1024, vocabulary=32000, has_checkpointing=has_checkpointing, num_visual=4096, num_caption=768
    )
    planned = max(sum(peak.values()) for peak in profile_trial(trial, DEPTH).peaks.values())
    assert planned == pytest.approx(peak_on_gpu(trial, DEPTH, torch.device("cuda")), rel=0.05)
