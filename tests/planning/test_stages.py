"""Two short profiles give that of a deep model, and a profile with fake tensors is that of real ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planning.trial import Trial, profile_trial
from vlmcap.planning.estimate.stages import extrapolate, extrapolate_kept

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 6
MODELS: dict[str, Trial] = {
    "qwen3 in 4 bits": Trial("qwen3", width=128, quantization="4bit", has_checkpointing=True),
    "llama in 8 bits": Trial("llama", width=128, quantization="8bit", has_checkpointing=False, num_clips=2),
    "experts in 4 bits": Trial("qwen3_moe", width=128, quantization="4bit", has_checkpointing=True),
}


@pytest.mark.parametrize("trial", MODELS.values(), ids=MODELS.keys())
def test_two_short_profiles_give_a_deep_one(trial: Trial) -> None:
    deep = profile_trial(trial, DEPTH)
    guess = extrapolate(profile_trial(trial, 2), profile_trial(trial, 3), DEPTH - 2)
    deep_peaks = {moment: peak for moment, peak in deep.peaks.items() if "middle" not in moment}
    assert {moment: _nonzero(peak) for moment, peak in guess.peaks.items()} == {
        m: _nonzero(p) for m, p in deep_peaks.items()
    }
    assert _nonzero(guess.retained) == _nonzero(deep.retained)
    assert _nonzero(guess.left) == _nonzero(deep.left)
    assert guess.weights == deep.weights
    assert guess.num_trained == deep.num_trained
    assert guess.flops == pytest.approx(deep.flops)
    assert guess.launches == deep.launches
    assert max(sum(peak.values()) for peak in deep_peaks.values()) == max(
        sum(peak.values()) for peak in deep.peaks.values()
    )


@pytest.mark.slow
def test_kept_blocks_are_extrapolated_from_three_short_profiles() -> None:
    trial = Trial("qwen3", width=128)
    deep = profile_trial(replace(trial, num_kept=3), DEPTH + 1)
    shapes = ((3, 1), (4, 1), (4, 2))
    base, again, kept = (profile_trial(replace(trial, num_kept=num_kept), depth) for depth, num_kept in shapes)
    guess = extrapolate_kept(base, again, kept, 2, 2)
    assert {"forward last recomputed", "backward last recomputed"} <= guess.peaks.keys()
    for moment, peak in guess.peaks.items():
        assert _nonzero(peak) == _nonzero(deep.peaks[moment])
    assert _nonzero(guess.retained) == _nonzero(deep.retained)
    assert guess.flops == pytest.approx(deep.flops)
    assert max(sum(peak.values()) for peak in guess.peaks.values()) == max(
        sum(peak.values()) for peak in deep.peaks.values()
    )
    assert sum(guess.retained.values()) > sum(profile_trial(trial, DEPTH + 1).retained.values())
    assert guess.flops < profile_trial(trial, DEPTH + 1).flops


@pytest.mark.slow
def test_inputs_in_host_memory_take_nothing() -> None:
    trial = Trial("qwen3", width=128)
    stays, waits = profile_trial(trial, DEPTH), profile_trial(replace(trial, is_offloaded=True), DEPTH)
    layers = DEPTH * (trial.num_visual + trial.num_caption + 8) * trial.width * 4
    assert sum(stays.retained.values()) - sum(waits.retained.values()) == pytest.approx(
        layers, rel=0.25
    )  # the last layer's output stays


def _nonzero(peak: Any) -> dict[str, float]:
    return {tag: size for tag, size in peak.items() if size}


@pytest.mark.slow
@pytest.mark.parametrize("has_checkpointing", [True, False])
def test_the_profile_is_within_a_tenth_of_a_real_step(has_checkpointing: bool) -> None:
    """Compares with the peak of the resident set of a fresh process that runs the same step on real tensors."""
    trial = Trial(
        "qwen3", width=256, vocabulary=8000, has_checkpointing=has_checkpointing, num_visual=1024, num_caption=512
    )
    profile = profile_trial(trial, 4)
    planned = max(sum(peak.values()) for peak in profile.peaks.values())
    measured = _measure(trial, 4)
    assert planned == pytest.approx(measured, rel=0.1)


_SCRIPT = """
import sys
from tests.planning.trial import Trial, peak_of_real_step
print(peak_of_real_step(Trial(**eval(sys.argv[1])), int(sys.argv[2])))
"""


def _measure(trial: Trial, depth: int) -> float:
    import dataclasses
    import os

    # Freed memory goes back at once, as the resident set is to show what is alive.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _SCRIPT, repr(dataclasses.asdict(trial)), str(depth)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True, timeout=300)
    return float(result.stdout.split()[-1])
