"""Plans captioning: how many captions are decoded at a time, its peak memory, and its seconds.

A slot is a place in the decoding batch, which the next clip takes when a caption ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vlmcap.assembly.base_checkpoints import encoder_configs
from vlmcap.assembly.components import lora_of
from vlmcap.config import Config, Engine, Quantization, Strategy
from vlmcap.libraries import has_expandable_segments
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.estimate.meta_models import cached_meta_encoder
from vlmcap.planning.hardware import GIB, DeviceInfo
from vlmcap.planning.peak_memory import (
    EXPANDABLE_SHARE,
    FIXED_SHARE,
    Captioning,
    Moment,
    ProfiledStage,
    generation_peak,
    kept_between_steps,
    scale_activations,
)

if TYPE_CHECKING:
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

# Each further slot adds fewer captions per second, and makes more clips wait in the host's memory.
MAX_SLOTS = 64
FILL = 0.9  # share of a GPU's memory that slots may fill, as a plan is an estimate
UNPACKED_BYTES = 2.5  # bytes moved to unpack a 4-bit weight for a product: half a byte read, two written
READ_AGAIN = 2  # bytes of an unpacked weight that the product then reads
# Slots up to which bitsandbytes 0.50 multiplies by packed weights without unpacking them: at least 16 for most layers
# of these sizes on each GPU here (`_gemm_4bit_use_custom_cuda`, bitsandbytes PR #1949).
FUSED_SLOTS = 16


@dataclass(frozen=True, slots=True)
class TokenWork:
    """Work of decoding one token of every caption in the batch.

    Attributes:
        moved_bytes: Bytes moved through GPU memory.
        num_launches: Kernels.
        is_captured: Whether they are launched as one CUDA graph.
    """

    moved_bytes: float
    num_launches: float
    is_captured: bool = False


@dataclass(frozen=True, slots=True)
class CaptionPlan:
    """How captions are decoded.

    Attributes:
        num_slots: Captions that are decoded at a time.
        is_merged: Whether adapters are merged into copies of the weights.
        moment: Fullest moment.
        token: Work of a token of every slot.
        token_s: Seconds of this work.
        caption_s: Seconds to caption a clip.
    """

    num_slots: int
    is_merged: bool
    moment: Moment
    token: TokenWork
    token_s: float
    caption_s: float


def plan_captions(
    config: Config,
    device: DeviceInfo,
    memory_profiler: MemoryProfiler,
    stages: Sequence[ProfiledStage],
    lengths: CaptionLengths,
    scores: Mapping[str, ProfiledStage],
) -> CaptionPlan:
    """Plans captioning with the configured number of slots, or with as many as fit.

    Args:
        config: Run configuration.
        device: Device that it runs on.
        memory_profiler: Memory profiler of the configuration.
        stages: Stages of a training step, whose weights stay on the GPU.
        lengths: Lengths of captions.
        scores: Score name to the stage of its model.
    """
    plans = [
        _CaptionPlanner(config, device, memory_profiler, stages, lengths, scores, is_merged).largest()
        for is_merged in ways_to_merge(config)
    ]
    # Merged copies are faster but take memory; without a plan that fits, the last one takes the least.
    fitting = [plan for plan in plans if _fits(plan.moment, device, 1.0)]
    return min(fitting or plans[-1:], key=lambda plan: plan.caption_s)


def ways_to_merge(config: Config) -> list[bool]:
    """Returns the possible values of `is_merged`, first the one that keeps copies of the weights."""
    wanted = config.evaluation.merge_adapters
    can_merge = (
        config.tuning.use_lora
        and config.llm.quantization is Quantization["none"]
        and config.evaluation.engine is not Engine.vllm
    )
    if wanted == "auto":  # the memory of a CPU is not planned
        return [True, False] if can_merge and config.hardware.accelerator != "cpu" else [False]
    return [can_merge and wanted is True]


def _fits(moment: Moment, device: DeviceInfo, share: float) -> bool:
    return moment.total / GIB + device.context_gib <= share * device.usable_gib


@dataclass(frozen=True)
class _CaptionPlanner:
    """Plans captioning for any number of slots."""

    config: Config
    device: DeviceInfo
    memory_profiler: MemoryProfiler
    stages: Sequence[ProfiledStage]
    lengths: CaptionLengths
    scores: Mapping[str, ProfiledStage]
    is_merged: bool

    @cached_property
    def is_native(self) -> bool:
        """Whether the native engine decodes the captions."""
        from vlmcap.planning.estimate.sizes import uses_native_decoding

        return uses_native_decoding(self.config)

    def largest(self) -> CaptionPlan:
        """Returns the plan of the configured number of slots, or of the most that fit; of one slot where none fits."""
        slots = self.config.data.eval_batch_size
        if slots is None:
            low, high = 1, MAX_SLOTS
            while low < high:  # binary search, as memory grows with the slots
                middle = (low + high + 1) // 2
                low, high = (middle, high) if _fits(self.moment(middle), self.device, FILL) else (low, middle - 1)
            slots = low
        token = self.token(slots)
        token_s = token_seconds(token, self.device)
        return CaptionPlan(slots, self.is_merged, self.moment(slots), token, token_s, self.seconds(slots, token_s))

    def num_clips(self, slots: int) -> int:
        """Returns the clips that the slots share."""
        from vlmcap.models.decoding.settings import prompt_batch_size

        return prompt_batch_size(slots, self.config.evaluation.clips_per_slot if self.is_native else 1)

    def seconds(self, slots: int, token_s: float) -> float:
        """Returns the seconds to caption one of many clips.

        A slot decodes one caption after the other. The last captions of a batch wait for the longest one among the
        slots.
        """
        num_clips, prompt = self.num_clips(slots), self.prompt(slots)
        # Tokens that the slots decode one after the other: full rounds at the mean length, the last at the longest.
        # `num_clips / slots` captions follow each other in a slot.
        num_tokens = (num_clips / slots - 1) * self.lengths.mean + self.lengths.longest_of(slots)
        prefill_s = prompt.memory.flops / self.group(slots) / (self.device.utilisation * self.device.peak_flops)
        return prefill_s + num_tokens * token_s / num_clips

    def group(self, slots: int) -> int:
        """Returns the number of prompts in a prefill pass."""
        from vlmcap.models.decoding.engine import PROMPT_TOKENS

        if not self.is_native:
            # transformers repeats a prompt for each of its beams.
            return slots * self.config.evaluation.num_beams
        return min(slots, max(1, PROMPT_TOKENS // self.memory_profiler.sizes.num_before_caption))

    def prompt(self, slots: int) -> ProfiledStage:
        """Returns the language model's prefill pass."""
        from vlmcap.planning.estimate.stages import extrapolate_clips

        group = self.group(slots)
        memory_profiler = self.memory_profiler.with_adapters(is_merged=self.is_merged)
        one, two = (memory_profiler.language(min(count, group), 0) for count in (1, 2))
        return ProfiledStage("language model", extrapolate_clips(one, two, group))

    def moment(self, slots: int) -> Moment:
        """Returns the fullest moment."""
        from vlmcap.models.captioner import MAX_ENCODED_CLIPS
        from vlmcap.planning.estimate.sizes import grouped_queries, key_value_bytes

        config, memory_profiler, is_native = self.config, self.memory_profiler, self.is_native
        # Keys and values are repeated for grouped queries before compute capability 8.0, and where speculation decodes
        # several tokens at a time.
        is_repeated = not self.device.has_flash or config.evaluation.speculate_ngram > 0
        name, size = clip_bytes(config, memory_profiler)
        # Clips that are captioned later wait on the GPU.
        held = {name: size * self.num_clips(slots)} | kept_between_steps(self.stages, config.optim.kind.value)
        prompt = self.prompt(slots).memory
        held["originals of adapted weights"] = sum(prompt.weights.values()) - sum(
            self.stages[-1].memory.weights.values()
        )
        work = Captioning(
            prefill=prompt,
            validation=memory_profiler.language(config.data.batch_size, config.llm.caption_tokens, is_training=False),
            token_bytes=key_value_bytes(config),
            num_slots=slots * config.evaluation.num_beams,
            num_prompts=self.group(slots),
            prompt_tokens=self.memory_profiler.sizes.num_before_caption,
            new_tokens=config.llm.new_tokens,
            copied_share=(grouped_queries(config) if is_repeated else 0.0 if is_native else 1.0)
            / memory_profiler.depth,
            is_reserved=is_native,
        )
        generation_stages = [
            *stages_in_front(config, memory_profiler, min(slots, MAX_ENCODED_CLIPS) if is_native else slots),
            self.stages[-1],
        ]
        moment = generation_peak(generation_stages, held, work, self.scores, unused_share=unused_share(config))
        return scale_activations(moment, self.device.activation_ratio)

    def token(self, slots: int) -> TokenWork:
        """Returns the work of a token, which reads all weights and the cache and launches the kernels of a prefill."""
        from vlmcap.planning.estimate.memory_profiler import ORIGINALS
        from vlmcap.planning.estimate.sizes import key_value_bytes, unpacked_experts

        prompt = self.prompt(slots)
        # Experts are unpacked for any number of slots, other weights only for many.
        share = unpacked_experts(self.config, slots) or float(slots > FUSED_SLOTS)
        # Two weights per packed byte; the half byte that is read is among `weights` already.
        unpacking = 2 * share * packed_bytes(self.config, prompt) * (UNPACKED_BYTES - 0.5 + READ_AGAIN)
        weights = sum(size for kind, size in prompt.memory.weights.items() if kind != ORIGINALS)
        cached = (
            key_value_bytes(self.config)
            * slots
            # On average, half of the caption is in the cache.
            * (self.memory_profiler.sizes.num_before_caption + self.config.llm.new_tokens / 2)
        )
        return TokenWork(weights + unpacking + cached, prompt.memory.launches, is_captured(self.config))


def is_captured(config: Config) -> bool:
    """Returns whether decoding steps are CUDA graphs, as far as the configuration decides.

    See `vlmcap.models.decoding.graphs`.
    """
    from vlmcap.planning.estimate.sizes import unpacked_experts, uses_native_decoding

    # 8-bit layers and the experts of transformers wait for the GPU in each step, which a graph cannot contain.
    has_stock_experts = config.llm.quantization is Quantization["none"] and not (
        config.tuning.use_lora and lora_of(config).use_experts
    )
    synchronizes = config.llm.quantization is Quantization["8bit"] or (
        has_stock_experts and unpacked_experts(config, 1) > 0
    )
    is_wanted = config.hardware.accelerator != "cpu" and config.evaluation.cuda_graphs is not False
    return (
        is_wanted
        and uses_native_decoding(config)
        and not synchronizes
        and not config.hardware.compile
        and config.trainer.strategy is not Strategy.fsdp2
    )


def token_seconds(work: TokenWork, device: DeviceInfo) -> float:
    """Returns the seconds of one token of every caption in the batch.

    The slowest of three bounds it: memory bandwidth, small kernels on the GPU, or kernel launches by the host.
    """
    return max(
        # The slower one decides: memory traffic, or the launches of kernels.
        work.moved_bytes / (device.bandwidth_share * device.bytes_per_s),
        work.num_launches * kernel_seconds(work, device),
    )


def kernel_seconds(work: TokenWork, device: DeviceInfo) -> float:
    """Returns the seconds per kernel: the GPU's in a CUDA graph, otherwise the host's per launch."""
    return device.kernel_s if work.is_captured else device.launch_s


def stages_in_front(config: Config, memory_profiler: MemoryProfiler, num_clips: int) -> list[ProfiledStage]:
    """Returns the stages that clips pass before the language model."""
    first = [] if config.cache.enabled is True else [ProfiledStage("encoder", memory_profiler.encoder(num_clips))]
    return [*first, ProfiledStage("projector", memory_profiler.projector(num_clips))]


def clip_bytes(config: Config, memory_profiler: MemoryProfiler) -> tuple[str, float]:
    """Returns the name and the bytes of what a clip is on the GPU before the first stage."""
    if config.cache.enabled is True:
        return "stored features", cached_bytes(memory_profiler)
    return "frames", float(memory_profiler.sizes.frame_bytes)


def feature_values(memory_profiler: MemoryProfiler) -> float:
    """Returns the number of values in a clip's features."""
    frames, rows, columns = memory_profiler.sizes.grid
    return float(frames * rows * columns * memory_profiler.sizes.embed_dim)


def cached_bytes(memory_profiler: MemoryProfiler) -> float:
    """Returns the bytes of a clip's stored features."""
    # float16 and bfloat16 take two bytes.
    size = {"float32": 4.0, "int8": 1.0}.get(memory_profiler.config.cache.dtype, 2.0)
    return size * feature_values(memory_profiler) / (memory_profiler.config.pool_size or 1) ** 2


def stored_bytes(config: Config, memory_profiler: MemoryProfiler) -> float:
    """Returns the bytes of a clip's features on disk, where each of two joined encoders has its own grid."""
    configs = encoder_configs(config)
    if len(configs) == 1:
        return cached_bytes(memory_profiler)
    encoders = list(map(cached_meta_encoder, configs))
    values = sum(
        encoder.embed_dim * math.prod(encoder.possible_grids(config.data.num_frames)[0]) for encoder in encoders
    )
    return cached_bytes(memory_profiler) * values / feature_values(memory_profiler)


def unused_share(config: Config) -> float:
    """Returns the memory that the allocator cannot hand out, as a share of all but weights."""
    if config.hardware.accelerator == "cpu":
        return 0.0
    return EXPANDABLE_SHARE if has_expandable_segments() else FIXED_SHARE


def packed_bytes(config: Config, stage: ProfiledStage) -> float:
    """Returns the bytes of 4-bit weights."""
    if config.llm.quantization is Quantization["4bit"]:
        return stage.memory.weights.get("quantisation state", 0.0) * 32
    return 0.0
