"""`vlmcap doctor --measure`: three training steps and a short generation at true size on random weights, beside their plan."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.planning.calibration import write_calibration
from vlmcap.planning.device import Present, assumed_card, calibration_folder, present_card, present_processor
from vlmcap.planning.make import make_plan, with_changes

if TYPE_CHECKING:
    from vlmcap.measuring.measured import Comparison, Measured
    from vlmcap.planning.plan import Plan

NUM_NEW = 32  # tokens of the short captions, where the configuration's are not shorter still
_NO_DATA = "data.root=unset"
_MOST_CONTEXT_GIB = 2.0  # more on the card beside our own memory is another program's
_HEADROOM = 0.85  # of the memory that ended: what a change has to come down to


def measure(overrides: Sequence[str], num_blocks: int | None = None) -> Comparison:
    """The plan of a configuration beside what this machine did; kept for later plans where it says something of them.

    Args:
        overrides: As `train.py` takes them; data.root is not needed.
        num_blocks: That encoder and language model are cut to; None takes all.

    Raises:
        UserError: Something in the configuration does not do, or the memory ended.
    """
    from vlmcap.assembly.parts import device_of
    from vlmcap.libraries import import_libraries, quiet_libraries
    from vlmcap.measuring.measured import Comparison

    import_libraries(with_adapters=True)
    quiet_libraries()
    overrides = [_NO_DATA, *overrides]
    config = compose(overrides)
    _check(config)
    device_of(config)
    with tempfile.TemporaryDirectory(prefix="vlmcap-measure-") as folder:
        measured_config = _shortened(_cut(config, num_blocks, Path(folder)))
        plan = make_plan(measured_config, assumed_card(measured_config))
        present = _present(config)
        _check_room(plan, present, config)
        measured = _measured(measured_config, plan, overrides)
    comparison = Comparison(plan, measured, present.name, present.total_gib, num_blocks)
    comparison = dataclasses.replace(comparison, why_not_kept=_obstacle(comparison, present))
    return comparison if comparison.why_not_kept else _kept(config, comparison)


def _check(config: Config) -> None:
    if config.llm.max_new_tokens < 2:
        raise UserError(f"llm.max_new_tokens must be at least 2 to time a token, not {config.llm.max_new_tokens}")
    if config.cache.enabled is True and config.cache.pooled:
        raise UserError("pooled features cannot be measured; set cache.pooled=false")


def _cut(config: Config, num_blocks: int | None, folder: Path) -> Config:
    from vlmcap.measuring.cut import with_blocks

    return config if num_blocks is None else with_blocks(config, num_blocks, folder)


def _shortened(config: Config) -> Config:
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, max_new_tokens=min(NUM_NEW, config.llm.max_new_tokens)))


def _present(config: Config) -> Present:
    card = None if config.hardware.accelerator == "cpu" else present_card()
    return card or present_processor()


def _check_room(plan: Plan, present: Present, config: Config) -> None:
    """A host that runs out of memory ends programs without a word, so there it is refused; a card says so itself.

    Raises:
        UserError: The plan is larger than what is free on the host.
    """
    if not present.free_gib or plan.peak_gib <= present.free_gib:
        return
    sentence = f"{plan.title} needs {plan.peak_gib:.1f} GiB by its plan and {present.name} has {present.free_gib:.1f} free"
    if config.hardware.accelerator == "cpu":
        raise UserError(f"{sentence}; measure less of it with --blocks 1, a smaller data.batch_size or data.eval_batch_size")
    print(f"Warning: {sentence}.", file=sys.stderr, flush=True)


@contextmanager
def _progress(moment: dict[str, str]) -> Iterator[Callable[[str], None]]:
    """Gives a function that says what is done, with the seconds since it began."""
    started = time.perf_counter()

    def say(what: str) -> None:
        moment["doing"] = f"making or running: {what}"
        print(f"[{time.perf_counter() - started:6.1f} s] {what}", file=sys.stderr, flush=True)

    yield say


def _measured(config: Config, plan: Plan, overrides: Sequence[str]) -> Measured:
    from vlmcap.assembly.parts import device_of
    from vlmcap.measuring.measured import Measured
    from vlmcap.measuring.memory_use import MemoryUse
    from vlmcap.measuring.random_parts import random_captioner, told_memory
    from vlmcap.measuring.steps import Training, gone_after, random_batch, token_seconds
    from vlmcap.planning.estimate.sizes import sizes_of

    device, sizes, num_new = device_of(config), sizes_of(config), config.llm.max_new_tokens
    moment: dict[str, str] = {"doing": "making weights"}
    with _explained(config, plan, overrides, moment), gone_after(device), told_memory(), _progress(moment) as say:
        use = MemoryUse(device)
        captioner = random_captioner(config, has_encoder=config.cache.enabled is not True, say=say)
        batch = random_batch(config, sizes, config.data.batch_size, config.llm.max_caption_tokens, device)
        moment["doing"] = "training"
        training = Training(config, captioner)
        use.start()
        clip_s = training.run(batch, say)
        train_use, context_gib = use.peak(), use.context_gib()
        del batch
        prompts = random_batch(config, sizes, config.data.eval_batch_size, 0, device)
        moment["doing"] = "writing captions"
        use.start()
        token_s = token_seconds(config, captioner, prompts, num_new, say)
        return Measured(train_use, use.peak(), max(context_gib, use.context_gib()), clip_s, token_s, num_new)


@contextmanager
def _explained(config: Config, plan: Plan, overrides: Sequence[str], moment: dict[str, str]) -> Iterator[None]:
    """Adds the plan's advice to the sentence on memory that ended; it is made only then, as it takes many plans."""
    from vlmcap.measuring.random_parts import MemoryEndedError

    try:
        yield
    except MemoryEndedError:
        advice = _advice(config, plan, overrides)
        has = f"{plan.title} ran out of memory on hardware={plan.hardware} while {moment['doing']}, planned at {plan.peak_gib:.1f} GiB"
        raise UserError(f"{has} of {plan.card.usable_gib:.1f}; {advice}") from None


def _advice(config: Config, plan: Plan, overrides: Sequence[str]) -> str:
    """What makes it smaller: so small that it fits, or by a sixth where the plan said that it would fit."""
    card = dataclasses.replace(plan.card, usable_gib=min(plan.card.usable_gib, _HEADROOM * plan.peak_gib))
    whole = make_plan(compose(list(overrides)), card)
    changes = with_changes(whole, overrides, card).changes
    if not changes:
        return "take a smaller llm or a larger card, or measure less of it with --blocks"
    return f"try {' '.join(override for change in changes for override in change.overrides)}, planned at {changes[-1].peak_gib:.1f} GiB"


def _obstacle(comparison: Comparison, present: Present) -> str:
    """Why a measurement is not kept; empty if it is."""
    from vlmcap.measuring.measured import is_too_small

    plan = comparison.plan
    if comparison.num_blocks is not None:
        return f"only {comparison.num_blocks} block{'s' if comparison.num_blocks > 1 else ''} of each part ran"
    if present.profile != plan.hardware:
        return f"hardware={plan.hardware} is not the profile that suits this card, which is {present.profile or 'none'}"
    if is_too_small(plan):
        return "the model is too small to say anything of others"
    if comparison.measured.context_gib > _MOST_CONTEXT_GIB:
        return f"other programs seem to be on the card: {comparison.measured.context_gib:.1f} GiB of it are not ours"
    return ""


def _kept(config: Config, comparison: Comparison) -> Comparison:
    try:
        write_calibration(calibration_folder(config), comparison.calibration())
    except ValueError:
        return dataclasses.replace(comparison, why_not_kept="it is too far from the plan to make a sound figure")
    except OSError as error:
        return dataclasses.replace(comparison, why_not_kept=f"paths.cache_dir cannot be written to ({error.strerror})")
    return comparison
