"""Hours of a sweep, and the proposals that bring it under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from vlmcap.assembly.cache_choice import num_visits
from vlmcap.compose import compose
from vlmcap.planning.sweep_budget.budget import (
    ClipSeconds,
    Encoding,
    Job,
    NumClips,
    encodings,
    largest_subset,
    propose,
    sweep_seconds,
    with_clips,
)

# 8 000 clips, 4 epochs, an evaluation of 128 clips after each, 1 000 clips in each other split.
JOB = Job(
    "clip",
    ("encoder=clip",),
    "l4",
    peak_gib=10.0,
    usable_gib=22.0,
    seconds=ClipSeconds(train=3.0, caption=8.0, loss=1.0, encode=0.5),
    clips=NumClips(8000, 1000, 1000),
    num_epochs=4,
    every_n_epochs=1,
    max_eval_clips=128,
)


def test_hours_are_clips_times_seconds() -> None:
    assert JOB.training_s == 4 * 8000 * 3
    assert JOB.evaluation_s == 4 * 128 * (8 + 1 + 0.5) + 2000 * (8 + 0.5)
    assert JOB.total_s == sweep_seconds([JOB]) == 96000 + 4864 + 17000


def test_stored_features_are_encoded_once_for_all_who_read_them() -> None:
    seconds = replace(JOB.seconds, train=2.5)
    stored = replace(JOB, seconds=seconds, store="clip")
    assert stored.evaluation_s == 4 * 128 * 9 + 2000 * 8
    other = replace(stored, name="other", seconds=replace(seconds, train=5.0))
    elsewhere = replace(stored, store="siglip2", seconds=replace(seconds, encode=2.0))
    assert encodings([stored, other, elsewhere, JOB]) == [
        Encoding("clip", 10000, 5000.0, 2),
        Encoding("siglip2", 10000, 20000.0, 1),
    ]
    assert sweep_seconds([stored, other]) == stored.total_s + other.total_s + 5000
    assert encodings([replace(stored, peak_gib=23.0)]) == []


@pytest.mark.parametrize(
    "change", [{"peak_gib": 22.1}, {"refusal": "the widths differ"}], ids=lambda change: next(iter(change))
)
def test_what_cannot_run_costs_nothing(change: dict[str, object]) -> None:
    job = replace(JOB, **change)  # type: ignore[arg-type]
    assert not job.fits
    assert (job.training_s, job.evaluation_s, sweep_seconds([job])) == (0, 0, 0)


def test_a_limit_of_steps_limits_epochs_and_evaluations() -> None:
    assert replace(JOB, max_trained=12000).num_trained == 12000
    assert replace(JOB, max_trained=12000).num_in_loop == 2 * 128  # a run that is stopped evaluates
    assert replace(JOB, max_trained=10**9).training_s == JOB.training_s
    assert replace(JOB, every_n_epochs=3).num_in_loop == 128
    assert replace(JOB, max_eval_clips=5000).num_in_loop == 4 * 1000


@pytest.mark.parametrize(
    "overrides", [[], ["evaluation.every_n_epochs=1"], ["tuning=lora", "data.max_clips=300"], ["trainer.max_steps=500"]]
)
def test_visits_are_those_that_the_feature_cache_counts(overrides: list[str]) -> None:
    """A visit takes a second here: captions and loss of a validation read a clip once."""
    config = compose([*overrides, "data.demo.num_train=1600"])
    sizes = {"train": config.data.max_clips or 1600, "val": 100, "test": 200}
    steps = config.trainer.max_steps
    job = replace(
        JOB,
        seconds=ClipSeconds(train=1.0, caption=1.0, loss=0.0, encode=0.0),
        clips=NumClips(**sizes),
        num_epochs=config.tuning.num_epochs,
        every_n_epochs=config.evaluation.every_n_epochs,
        max_eval_clips=config.evaluation.max_clips,
        max_trained=None if steps < 0 else steps * config.data.batch_size,
    )
    assert num_visits(config, sizes) == job.total_s


def test_the_subset_is_the_largest_multiple_of_a_hundred() -> None:
    budget_s = 60000.0
    found = largest_subset([JOB, JOB], budget_s)
    assert found == 600  # of each 21 864 s of evaluation and 12 s a clip: 30 000 s leave 678 clips
    assert sweep_seconds(with_clips([JOB, JOB], 600)) <= budget_s < sweep_seconds(with_clips([JOB, JOB], 700))
    assert largest_subset([JOB], JOB.total_s) == 7900  # fewer than all
    assert largest_subset([JOB], JOB.evaluation_s + 100 * 12) == 100
    assert largest_subset([JOB], JOB.evaluation_s) is None
    assert largest_subset([replace(JOB, clips=NumClips(80, 10, 10))], 10.0**9) is None


Speeds = dict[str, Callable[[Job], Job]]
SPEEDS: Speeds = {
    "cache.enabled=true": lambda job: replace(
        job, store="clip", seconds=replace(job.seconds, train=job.seconds.train - 0.5)
    ),
    "evaluation.max_clips=32": lambda job: replace(job, max_eval_clips=32),
    "projector.reducer=pool": lambda job: replace(job, seconds=replace(job.seconds, train=job.seconds.train - 1.5)),
    "data.num_frames=4": lambda job: replace(job, seconds=replace(job.seconds, train=job.seconds.train / 2)),
}


def replanner(jobs: Sequence[Job], speeds: Speeds = SPEEDS) -> Callable[[Sequence[str]], list[Job] | None]:
    def replan(overrides: Sequence[str]) -> list[Job] | None:
        found = list(jobs)
        for override in overrides:
            if override not in speeds:
                return None
            found = [speeds[override](job) for job in found]
        return found

    return replan


def names(jobs: Sequence[Job], budget_s: float, speeds: Speeds = SPEEDS) -> list[str]:
    return [proposal.override for proposal in propose(jobs, budget_s, replanner(jobs, speeds))]


def test_the_least_loss_comes_first_and_no_more_than_needed() -> None:
    assert names([JOB], JOB.total_s) == []
    assert names([JOB], JOB.total_s - 1000) == ["cache.enabled=true"]
    everything = list(SPEEDS)
    assert names([JOB], 45000) == [*everything[:1], *everything[2:]]  # the smaller evaluation is not needed
    assert names([JOB], 40000) == everything


def test_hours_of_a_proposal_are_those_with_all_before_it() -> None:
    proposals = propose([JOB], 40000, replanner([JOB]))
    assert proposals[0].total_s == 4 * 8000 * 2.5 + 4 * 128 * 9 + 2000 * 8 + 5000
    assert [proposal.total_s for proposal in proposals] == sorted(
        (proposal.total_s for proposal in proposals), reverse=True
    )
    assert proposals[-1].total_s <= 40000


def test_a_subset_comes_last_and_takes_what_is_left() -> None:
    *_, last = propose([JOB], 30000, replanner([JOB]))
    assert last.override.startswith("data.max_clips=")
    jobs = replanner([JOB])(list(SPEEDS))
    assert jobs is not None
    max_clips = int(last.override.partition("=")[2])
    assert max_clips % 100 == 0
    assert (
        last.total_s
        == sweep_seconds(with_clips(jobs, max_clips))
        <= 30000
        < sweep_seconds(with_clips(jobs, max_clips + 100))
    )


def test_where_nothing_suffices_the_last_proposal_is_above_the_budget() -> None:
    proposals = propose([JOB], 1000, replanner([JOB]))
    assert [proposal.override for proposal in proposals] == list(SPEEDS)
    assert proposals[-1].total_s > 1000


def test_changes_that_do_not_go_or_do_not_help_are_left_out() -> None:
    without = {name: change for name, change in SPEEDS.items() if name != "projector.reducer=pool"}
    assert "projector.reducer=pool" not in names([JOB], 30000, without)
    idle = SPEEDS | {"cache.enabled=true": lambda job: job}
    assert "cache.enabled=true" not in names([JOB], 30000, idle)
    too_large = SPEEDS | {"projector.reducer=pool": lambda job: replace(job, peak_gib=23.0)}
    assert "projector.reducer=pool" not in names([JOB], 30000, too_large)


def test_a_combination_that_fits_only_with_a_change_is_counted_from_then_on() -> None:
    """Features on disk take the encoder off the GPU.

    The change saves hours, and the second combination adds its own.
    """
    large = replace(JOB, name="large", peak_gib=23.0)
    speeds = SPEEDS | {"cache.enabled=true": lambda job: replace(SPEEDS["cache.enabled=true"](job), peak_gib=10.0)}
    first, *_ = propose([JOB, large], 90000, replanner([JOB, large], speeds))
    assert first.override == "cache.enabled=true"
    assert first.total_s == 2 * (4 * 8000 * 2.5 + 4 * 128 * 9 + 2000 * 8) + 5000
