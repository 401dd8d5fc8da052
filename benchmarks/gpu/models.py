"""Models at true size with random weights, batches with captions of different lengths, and Lightning's trainer."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Skip
from vlmcap.assembly.resolving import with_model_kind
from vlmcap.compose import compose
from vlmcap.config import Config, Precision
from vlmcap.config_unread import NO_DATA
from vlmcap.data.loading.collate import Collator
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.libraries import silence_libraries
from vlmcap.measuring.random_components import random_captioner, with_blocks
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.planning.estimate.meta_models import PROMPT_TOKENS, meta_encoder
from vlmcap.planning.estimate.sizes import Sizes, clip_sizes, frames_shape
from vlmcap.planning.hardware import GPUS, detect_gpu, matching_profile, planned_device
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.plan import Plan
from vlmcap.training.callbacks.guard import DivergenceGuard
from vlmcap.training.module import CaptioningModule
from vlmcap.training.processes import make_strategy
from vlmcap.training.schedule import StagePlan
from vlmcap.types import Batch, Clip, Sample

NUM_NEW = 16  # tokens of the captions that are written
_MOST_ID = 600  # random ids are smaller, where every vocabulary has tokens
# All that any stage trains is trained, and no clips wait for a slot, as a plan counts their frames on the GPU.
_COMMON = ("tuning.align_epochs=0", "tuning.epochs=1", "evaluation.clips_per_slot=1")
_TINY = (
    "hardware=cpu",
    "cache.enabled=false",
    "data.batch_size=2",
    "data.eval_batch_size=2",
    "llm.max_caption_tokens=16",
)
# Tokens of the Korean data's captions, as shares of the 768 that a plan assumes: 311 to 708, mean 402.
_LEAST_LENGTH, _MEAN_LENGTH, _MOST_LENGTH = 0.40, 0.52, 0.92
_TINY_MOE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 640,
    "max_position_embeddings": 2048,
}


# Overrides of the checks at true size, and the number of blocks that encoder and language model are truncated to, where
# all blocks take the same path.
TRUE_SIZES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "recommended_l4": (("experiment=recommended_l4",), None),
    "recommended_h100": (("experiment=recommended_h100",), None),
    "moe": (("encoder=clip", "llm=qwen3_30b_a3b", "hardware=l4", "data.batch_size=2", "data.eval_batch_size=8"), 4),
    "t4": (("encoder=siglip2", "llm=qwen3_8b", "hardware=t4"), 4),
    # Prompts of about a hundred tokens: what is measured is a token, not the prompt.
    "decode": (
        (
            "experiment=recommended_l4",
            "data.num_frames=1",
            "projector.reducer=pool",
            "projector.pool_size=3",
            "projector.frame_stack=1",
        ),
        None,
    ),
    "teardown_8bit": (("experiment=recommended_l4", "llm.quantization=8bit"), 4),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A configuration at true size and its plan.

    Attributes:
        config: Configuration with captions of at most `NUM_NEW` tokens.
        whole: The same with captions of full length.
        plan: Plan of `config`, by data sheets alone.
        sizes: Sizes of a clip.
    """

    config: Config
    whole: Config
    plan: Plan
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class Prepared(Planned):
    """A planned configuration with its model.

    Attributes:
        captioner: Captioner with random weights.
    """

    captioner: VideoCaptioner


def planned(place: Place, name: str, tiny: Sequence[str] = ()) -> Planned:
    """Returns the configuration of a check and its plan.

    Args:
        place: Where it runs.
        name: A key of `TRUE_SIZES`.
        tiny: Overrides of a rehearsal, in addition to the demo's components.
    """
    silence_libraries()
    overrides, num_blocks = TRUE_SIZES[name]
    chosen = [*_TINY, *tiny] if place.is_tiny else list(overrides)
    folders = [f"paths.output_dir={place.folder / 'run'}", f"paths.cache_dir={place.folder / 'cache'}"]
    config = with_model_kind(compose([NO_DATA, *chosen, *_COMMON, *folders]))
    if num_blocks is not None and not place.is_tiny:
        config = with_blocks(config, num_blocks, place.folder / "cut")
    short = dataclasses.replace(config, llm=dataclasses.replace(config.llm, max_new_tokens=NUM_NEW))
    return Planned(short, config, make_plan(short, planned_device(short)), clip_sizes(short))


def prepare(place: Place, name: str, tiny: Sequence[str] = ()) -> Prepared:
    """Builds the model of a check; the arguments are those of `planned`.

    Raises:
        Skip: The GPU is too small or too old.
    """
    found = planned(place, name, tiny)
    require_gpu(place, found.plan.peak_gib, found.config.hardware.precision)
    captioner = random_captioner(found.config, has_encoder=True, report=say)
    return Prepared(found.config, found.whole, found.plan, found.sizes, captioner)


def require_gpu(place: Place, gib: float, precision: Precision) -> None:
    """Checks that this GPU can run a check.

    Raises:
        Skip: It has too little memory, or no bfloat16.
    """
    gpu = detect_gpu() if place.device == "cuda" else None
    if gpu is None:
        return
    if gib > gpu.total_gib:
        raise Skip(f"needs {gib:.0f} GiB, and {gpu.name} has {gpu.total_gib:.0f}")
    if precision is Precision.bf16 and gpu.capability is not None and gpu.capability < (8, 0):
        raise Skip(f"needs bfloat16, which {gpu.name} does not have")


def peak_flops() -> float | None:
    """Returns dense half-precision operations per second of this GPU; None where its data sheet is not known."""
    gpu = detect_gpu()
    if gpu is None:
        return None
    if re.search(r"\bH200\b", gpu.name):  # the same chip with more memory
        return GPUS["h100"].peak_flops
    profile = matching_profile(gpu.name, gpu.total_gib)
    return None if profile is None else GPUS[profile].peak_flops


def tiny_moe(folder: Path) -> str:
    """Returns a folder with the `config.json` of a mixture of experts of a few thousand weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **_TINY_MOE}), encoding="utf-8")
    return str(folder)


def say(text: str) -> None:
    """Prints what a check is doing, for its log."""
    print(text, flush=True)


# --- batches and the loop ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """Stands in for the tokenizer of the collator, with as much text as a plan assumes.

    A caption's text is the number of its tokens.
    """

    prefix_ids: tuple[int, ...] = (1,) * (PROMPT_TOKENS // 2)
    suffix_ids: tuple[int, ...] = (1,) * (PROMPT_TOKENS - PROMPT_TOKENS // 2)
    end_id: int = 2
    pad_id: int = 0

    def encode_caption(self, text: str) -> list[int]:
        """Returns random tokens, one less than the number, as the end token follows."""
        rng = random.Random(text)
        return [rng.randrange(3, _MOST_ID) for _ in range(int(text) - 1)]


def training_batch(found: Planned, rng: random.Random, *, is_longest: bool) -> Batch:
    """Makes a micro-batch on the CPU with the collator of a run, padded on the right.

    Args:
        found: Configuration that runs.
        rng: Draws the lengths of the captions.
        is_longest: Whether one of the captions has the most tokens that the plan assumes.
    """
    most, count = found.config.llm.caption_tokens, found.config.data.batch_size
    lengths = [most if is_longest and not index else draw_length(rng, most) for index in range(count)]
    return _collated(found, lengths, "train")


def prompt_batch(found: Planned, num_prompts: int) -> Batch:
    """Makes the prompts of `num_prompts` clips on the CPU."""
    return _collated(found, [1] * num_prompts, "generate")


def _collated(found: Planned, lengths: Sequence[int], mode: Literal["train", "generate"]) -> Batch:
    config, sizes = found.config, found.sizes
    collator = Collator(_Prompt(), sizes.num_visual, config.llm.caption_tokens, mode)
    shape = frames_shape(meta_encoder(config), sizes.grid)
    clips = [Clip(str(index), "", (str(length),)) for index, length in enumerate(lengths)]
    return collator([Sample(clip, frames=torch.randint(0, 256, shape, dtype=torch.uint8)) for clip in clips])


def draw_length(rng: random.Random, most: int) -> int:
    """Draws the tokens of a caption between the least and the most of the Korean data, around their mean."""
    span = _MOST_LENGTH - _LEAST_LENGTH
    first = 2.0
    second = first * (span / (_MEAN_LENGTH - _LEAST_LENGTH) - 1)
    return max(2, round(most * (_LEAST_LENGTH + span * rng.betavariate(first, second))))


def training(
    prepared: Prepared, place: Place, callbacks: Sequence[L.Callback], num_batches: int, accumulate: int
) -> tuple[L.Trainer, CaptioningModule]:
    """Returns Lightning's trainer with the settings of a run, and the module around the captioner."""
    config, plan = prepared.config, StagePlan(prepared.config.tuning.stages)
    module = CaptioningModule(
        prepared.captioner,
        plan,
        config.optim,
        identity={},
        skipped_log=SkippedClipLog(place.folder / "skipped_clips.jsonl", 0.0, num_batches),
        max_label_tokens=config.data.batch_size * config.llm.caption_tokens,
    )
    guard = DivergenceGuard(config.callbacks.guard, place.folder, is_scaled=config.hardware.precision is Precision.fp16)
    trainer = L.Trainer(
        accelerator=config.hardware.accelerator,
        devices=1,
        strategy=make_strategy(config),
        precision=config.hardware.precision.value,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=config.optim.max_grad_norm,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[*callbacks, guard],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=place.folder,
    )
    return trainer, module


def writer(
    prepared: Prepared, trainer: L.Trainer, module: CaptioningModule, num_prompts: int
) -> Callable[[int], list[str]]:
    """Returns a function that decodes captions of a number of tokens for a batch of prompts, as in evaluation."""
    prompts = prompt_batch(prepared, num_prompts).to(module.captioner.device)
    plugin: Any = trainer.precision_plugin

    def write(num_new: int) -> list[str]:
        chosen = module.captioner.generation
        module.captioner.generation = dataclasses.replace(chosen, max_new_tokens=num_new)
        with plugin.test_step_context(), torch.no_grad():
            captions: list[str] = module.test_step(prompts, 0)
        module.captioner.generation = chosen
        return captions

    return write
