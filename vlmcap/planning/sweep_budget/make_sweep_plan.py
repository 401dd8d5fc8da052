"""Plans a whole sweep for `vlmcap plan -m`, from the plan of each combination; no run is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmcap.config import Config, DemoDataConfig, EncoderTuning
from vlmcap.config_unread import NO_DATA
from vlmcap.errors import UserError
from vlmcap.planning.known_data import known_captions, known_clips, planned
from vlmcap.planning.make_plan import NUM_CLIPS, make_plan
from vlmcap.planning.sweep_budget.budget import ClipSeconds, Job, NumClips, propose
from vlmcap.planning.sweep_budget.sweep_plan import SweepPlan
from vlmcap.sweep_syntax import expand, short_names
from vlmcap.terminal import grouped, transient_bar

if TYPE_CHECKING:
    from vlmcap.planning.plan import Plan

NUM_HELD_OUT = 1000  # about the number of validation, and of test, clips of AI Hub's Korean background video


def plan_sweep(overrides: Sequence[str], price: float | None = None) -> SweepPlan:
    """Plans what each combination and the whole sweep take, and what brings the sweep under `sweep.budget_h`.

    Args:
        overrides: Overrides as after `python train.py -m`; data.root is not needed.
        price: Price per GPU hour.

    Raises:
        UserError: An override is wrong, no combination can be built, or hours of different machines would be added up.
    """
    combinations, swept = expand([NO_DATA, *overrides])
    sweep = _Sweep(combinations, short_names(combinations, swept), swept)
    budget_h = _one_budget(sweep.configs, swept)
    _check_machines(sweep.configs, price)
    jobs = sweep.jobs(())
    assert jobs is not None
    proposals = (
        propose(jobs, 3600 * budget_h, sweep.jobs) if budget_h is not None and any(job.fits for job in jobs) else []
    )
    return SweepPlan(jobs, price, budget_h, proposals, _notes(sweep.configs))


class _Sweep:
    """The combinations of a sweep, and their plans with further overrides, each of which is made once.

    Args:
        combinations: Overrides of each combination.
        names: Name of each combination.
        swept: Keys that differ between combinations.
    """

    def __init__(self, combinations: Sequence[tuple[str, ...]], names: Sequence[str], swept: Sequence[str]) -> None:
        self.combinations, self.names, self.swept = combinations, names, swept
        self._planned: dict[tuple[str, ...], list[Job] | None] = {}
        self.configs: list[Config] = []
        for name, combination in zip(names, combinations, strict=True):
            try:
                self.configs.append(planned(combination))
            except UserError as error:
                raise UserError(f"{name}: {error}" if name else str(error)) from error

    def jobs(self, more: Sequence[str]) -> list[Job] | None:
        """Plans the combinations with further overrides.

        None where one of their keys is swept, or where they are not possible for a combination.
        """
        key = tuple(more)
        if key not in self._planned:
            self._planned[key] = self._plan(key)
        return self._planned[key]

    def _plan(self, more: tuple[str, ...]) -> list[Job] | None:
        # An override of a swept key would replace the values that are compared.
        if any(override.partition("=")[0] in self.swept for override in more):
            return None
        jobs = []
        what = f"with {' '.join(more)}" if more else "combinations"
        with transient_bar(f"Planning {what}", len(self.combinations)) as advance:
            for index, combination in enumerate(self.combinations):
                try:
                    config = planned([*combination, *more]) if more else self.configs[index]
                except UserError:
                    return None
                jobs.append(_job(self.names[index], combination, config))
                advance()
        if not more and all(job.refusal for job in jobs):
            raise UserError(jobs[0].refusal)
        return jobs


def _job(name: str, overrides: tuple[str, ...], config: Config) -> Job:
    refusal, peak_gib, usable_gib, seconds = "", 0.0, 0.0, ClipSeconds(0.0, 0.0, 0.0, 0.0)
    try:
        plan = make_plan(config, captions=known_captions(config))
        peak_gib, usable_gib, seconds = plan.peak_gib, plan.device.usable_gib, _seconds(config, plan)
    except UserError as error:  # the other combinations can still run
        refusal = str(error)
    steps, trainer = config.trainer.max_steps, config.trainer
    return Job(
        name=name or " + ".join(config.component_names.values()),
        overrides=tuple(override for override in overrides if override != NO_DATA),
        hardware=config.hardware.name,
        peak_gib=peak_gib,
        usable_gib=usable_gib,
        seconds=seconds,
        clips=num_clips(config),
        num_epochs=config.tuning.num_epochs,
        every_n_epochs=config.evaluation.every_n_epochs,
        max_eval_clips=config.evaluation.max_clips,
        # -1 is Lightning's "no limit".
        max_trained=None if steps < 0 else steps * config.data.batch_size * trainer.accumulate_grad_batches,
        store=_store(config) if config.cache.enabled is True else None,
        refusal=refusal,
    )


def num_clips(config: Config) -> NumClips:
    """Returns the clips of each split, truncated as in a run.

    They are those of the data where it is there, or else about as many as AI Hub's data set has.
    """
    # Assumed numbers, unless the data is the demo or on this machine.
    train, val, test = NUM_CLIPS, NUM_HELD_OUT, NUM_HELD_OUT
    if isinstance(config.data, DemoDataConfig):
        demo = config.data.demo
        train, val, test = demo.num_train, demo.num_val, demo.num_test
    elif known := known_clips(config):
        train, val, test = (len(known.get(split, ())) for split in ("train", "val", "test"))
    elif config.data.max_clips:
        train = config.data.max_clips
    train = min(train, config.data.max_clips or train)
    if config.trainer.overfit:  # validates on the training clips, without a test
        return NumClips(train, train, 0)
    most = config.evaluation.max_final_clips
    return NumClips(train, min(val, most or val), min(test, most or test))


def _seconds(config: Config, plan: Plan) -> ClipSeconds:
    """Returns the GPU seconds per clip; the validation loss takes a prefill pass, longer by the caption."""
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

    memory_profiler, batch = MemoryProfiler(config, plan.device.has_flash), config.data.batch_size
    speed = plan.device.utilisation * plan.device.peak_flops * batch
    # The profile of a trained encoder is a whole step.
    # Forward, backward to the inputs, and backward to the weights take about the same time.
    passes = {EncoderTuning.none: 1, EncoderTuning.lora: 2, EncoderTuning.full: 3}[config.tuning.encoder_tuning]
    prompt = memory_profiler.sizes.num_before_caption
    longer = 1 + config.llm.caption_tokens / prompt
    return ClipSeconds(
        train=plan.clip_s,
        caption=plan.caption_s,
        loss=longer * memory_profiler.language(batch, 0).flops / speed,
        encode=memory_profiler.encoder(batch).flops / passes / speed,
    )


def _store(config: Config) -> str:
    """Returns a key that is equal for equal stored features; it begins with the encoder's name."""
    settings = {
        key: value
        for key, value in dataclasses.asdict(config.encoder).items()
        if key not in ("name", "is_cached", "attention")
    }
    data, cache = config.data, config.cache
    pool = config.pool_size
    rest = [
        data.num_frames,
        data.sampling.value,
        data.fps,
        data.variable_frames,
        cache.dtype,
        pool,
        config.hardware.precision.value,
    ]
    name = config.model.name if config.is_pretrained_vlm else config.encoder.name
    return f"{name} {json.dumps([settings, rest], default=str, sort_keys=True)}"


def _one_budget(configs: Sequence[Config], swept: Sequence[str]) -> float | None:
    if "sweep.budget_h" in swept:
        raise UserError("sweep.budget_h applies to all combinations together and cannot be swept; give it one value")
    return configs[0].sweep.budget_h


def _check_machines(configs: Sequence[Config], price: float | None) -> None:
    names = sorted({config.hardware.name for config in configs})
    kinds = {config.hardware.accelerator for config in configs}
    if len(kinds) > 1:
        raise UserError(
            f"hardware={','.join(names)} would add up CPU hours and GPU hours; plan hardware=cpu separately"
        )
    if price is not None and len(names) > 1:
        raise UserError(
            f"--price is for one GPU, but the sweep has hardware={','.join(names)}; plan one hardware profile at a time"
        )


def _notes(configs: Sequence[Config]) -> list[str]:
    """Describes what was counted, and how accurate it is."""
    counted = {(config.data.name, num_clips(config), config.tuning.num_epochs) for config in configs}
    lines = []
    for name, clips, epochs in sorted(counted, key=str):
        splits = (
            f"{grouped(clips.train)} training, {grouped(clips.val)} validation and {grouped(clips.test)} test clips"
        )
        lines.append(f"data={name}: {splits}, {epochs} epochs")
    is_cpu = configs[0].hardware.accelerator == "cpu"
    from vlmcap.planning.hardware import CORE_FLOPS, UTILISATION

    speed = f"{CORE_FLOPS / 1e9:.0f} GFLOP/s per core" if is_cpu else "the data sheet's speed"
    return [
        *lines,
        f"Estimates, not measurements: {UTILISATION:.0%} of {speed}; decoding, loading and scoring are not counted.",
    ]
