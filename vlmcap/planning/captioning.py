"""Captions by the plan: how many are written at a time, the fullest moment meanwhile, and the seconds that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmcap.assembly.components import lora_of
from vlmcap.config import Config, Engine, Quantization, Strategy
from vlmcap.libraries import has_expandable_segments
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.hardware import GIB, DeviceInfo
from vlmcap.planning.memory import (
    EXPANDABLE_SHARE,
    FIXED_SHARE,
    Captioning,
    Moment,
    Stage,
    generation_peak,
    kept_between_steps,
    scale_beyond,
)

if TYPE_CHECKING:
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

# Rows at most: each one more adds less to the captions per second, and more clips wait in the host's memory.
MOST_ROWS = 64
FILL = 0.9  # of a GPU's memory that rows are added up to: a plan is an estimate
UNPACKED_BYTES = 2.5  # moved for a 4-bit weight that a product unpacks: half a byte read, two written
READ_AGAIN = 2  # bytes: then the product reads it
# Rows up to which bitsandbytes 0.50 multiplies by packed weights without unpacking them: at least 16 for most layers of
# these sizes on each GPU here (`_gemm_4bit_use_custom_cuda`, bitsandbytes PR #1949).
FUSED_ROWS = 16


@dataclass(frozen=True, slots=True)
class TokenWork:
    """What one caption token of every clip of an evaluation batch takes.

    Attributes:
        moved_bytes: Through the GPU's memory.
        num_launches: Kernels.
        is_captured: Whether they are launched as one graph.
    """

    moved_bytes: float
    num_launches: float
    is_captured: bool = False


@dataclass(frozen=True, slots=True)
class CaptionPlan:
    """How captions are written.

    Attributes:
        num_slots: Captions that are decoded at a time.
        is_merged: Whether adapters are merged into copies of the weights.
        moment: The fullest moment.
        token: Work of a token of every row.
        token_s: Its seconds.
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
    gpu: DeviceInfo,
    memory_profiler: MemoryProfiler,
    steps: Sequence[Stage],
    lengths: CaptionLengths,
    scores: Mapping[str, Stage],
) -> CaptionPlan:
    """How a configuration writes captions on a GPU: with as many rows as fit, or as it says itself.

    Args:
        config: Run configuration.
        gpu: GPU that it runs on.
        memory_profiler: MemoryProfiler of the configuration.
        steps: Stages of a training step, whose weights are there.
        lengths: Lengths of captions.
        scores: Models of scores by their names.
    """
    plans = [
        _Captions(config, gpu, memory_profiler, steps, lengths, scores, is_merged).largest()
        for is_merged in ways_to_merge(config)
    ]
    fitting = [plan for plan in plans if _fits(plan.moment, gpu, 1.0)]
    return min(fitting or plans[-1:], key=lambda plan: plan.caption_s)


def ways_to_merge(config: Config) -> list[bool]:
    """Ways to treat adapters that are possible, the one with copies of the weights first."""
    wanted = config.evaluation.merge_adapters
    can_merge = (
        config.tuning.use_lora
        and config.llm.quantization is Quantization["none"]
        and config.evaluation.engine is not Engine.vllm
    )
    if wanted == "auto":  # a CPU's memory is not planned
        return [True, False] if can_merge and config.hardware.accelerator != "cpu" else [False]
    return [can_merge and wanted is True]


def _fits(moment: Moment, gpu: DeviceInfo, share: float) -> bool:
    return moment.total / GIB + gpu.context_gib <= share * gpu.usable_gib


@dataclass(frozen=True)
class _Captions:
    """Captions of any number of rows."""

    config: Config
    gpu: DeviceInfo
    memory_profiler: MemoryProfiler
    steps: Sequence[Stage]
    lengths: CaptionLengths
    scores: Mapping[str, Stage]
    is_merged: bool

    def largest(self) -> CaptionPlan:
        """The plan of the configured number of rows, or of the largest one that fits; of one row where none does."""
        rows = self.config.data.eval_batch_size
        if rows is None:
            low, high = 1, MOST_ROWS
            while low < high:  # memory rises with the rows
                middle = (low + high + 1) // 2
                low, high = (middle, high) if _fits(self.moment(middle), self.gpu, FILL) else (low, middle - 1)
            rows = low
        return self.plan(rows)

    def plan(self, rows: int) -> CaptionPlan:
        """The plan of a number of rows."""
        token = self.token(rows)
        token_s = token_seconds(token, self.gpu)
        return CaptionPlan(rows, self.is_merged, self.moment(rows), token, token_s, self.seconds(rows, token_s))

    def seconds(self, rows: int, token_s: float) -> float:
        """Seconds to caption a clip of many.

        A row writes one caption after the other, and the last of its batch waits for the longest of those of the other
        rows.
        """
        from vlmcap.models.decoding.settings import prompt_batch_size
        from vlmcap.planning.estimate.sizes import writes_itself

        per_row = (
            prompt_batch_size(rows, self.config.evaluation.clips_per_slot if writes_itself(self.config) else 1) / rows
        )
        num_tokens = (per_row - 1) * self.lengths.mean + self.lengths.longest_of(rows)
        read_s = self.prompt(rows).trace.flops / self.group(rows) / (self.gpu.utilisation * self.gpu.peak_flops)
        return read_s + num_tokens * token_s / (per_row * rows)

    def group(self, rows: int) -> int:
        """Prompts that the language model reads at a time."""
        from vlmcap.models.decoding.engine import PROMPT_TOKENS
        from vlmcap.planning.estimate.sizes import writes_itself

        return (
            min(rows, max(1, PROMPT_TOKENS // self.memory_profiler.sizes.num_before_caption))
            if writes_itself(self.config)
            else rows * self.config.evaluation.num_beams
        )

    def prompt(self, rows: int) -> Stage:
        """The language model's pass over the prompts that are read at a time."""
        from vlmcap.planning.estimate.stages import clips_of

        group = self.group(rows)
        traces = [
            self.memory_profiler.with_adapters(is_merged=self.is_merged).language(count, 0)
            for count in range(1, min(2, group) + 1)
        ]
        return Stage("language model", clips_of(traces[0], traces[-1], group))

    def moment(self, rows: int) -> Moment:
        """The fullest moment."""
        from vlmcap.models.captioner import MAX_ENCODED_CLIPS
        from vlmcap.models.decoding.settings import prompt_batch_size
        from vlmcap.planning.estimate.sizes import grouped_queries, key_value_bytes, writes_itself

        config, memory_profiler, is_own = self.config, self.memory_profiler, writes_itself(self.config)
        # Keys and values are repeated for all queries of a token before compute capability 8.0, and where guesses make
        # it several tokens.
        is_repeated = not self.gpu.has_flash or config.evaluation.speculate_ngram > 0
        name, size = clip_bytes(config, memory_profiler)
        waiting = prompt_batch_size(
            rows, config.evaluation.clips_per_slot if is_own else 1
        )  # clips that are captioned later wait on the GPU
        held = {name: size * waiting} | kept_between_steps(self.steps, config.optim.kind.value)
        prompt = self.prompt(rows).trace
        held["originals of adapted weights"] = sum(prompt.weights.values()) - sum(self.steps[-1].trace.weights.values())
        work = Captioning(
            prefill=prompt,
            validation=memory_profiler.language(config.data.batch_size, config.llm.caption_tokens, is_training=False),
            token_bytes=key_value_bytes(config),
            num_rows=rows * config.evaluation.num_beams,
            num_read=self.group(rows),
            prompt_tokens=self.memory_profiler.sizes.num_before_caption,
            new_tokens=config.llm.new_tokens,
            copied_share=(grouped_queries(config) if is_repeated else 0.0 if is_own else 1.0) / memory_profiler.depth,
            is_reserved=is_own,
        )
        stages = [
            *stages_in_front(config, memory_profiler, min(rows, MAX_ENCODED_CLIPS) if is_own else rows),
            self.steps[-1],
        ]
        moment = generation_peak(stages, held, work, self.scores, unused_share=unused_share(config))
        return scale_beyond(moment, self.gpu.beyond_ratio)

    def token(self, rows: int) -> TokenWork:
        """The work of a token: all weights and the cache once, and the kernels of the prompt's pass."""
        from vlmcap.planning.estimate.memory_profiler import ORIGINALS
        from vlmcap.planning.estimate.sizes import key_value_bytes, unpacked_experts

        prompt = self.prompt(rows)
        # Experts are unpacked whatever the number of rows, other weights for many rows alone.
        share = unpacked_experts(self.config, rows) or float(rows > FUSED_ROWS)
        unpacking = 2 * share * packed_bytes(self.config, prompt) * (UNPACKED_BYTES - 0.5 + READ_AGAIN)
        weights = sum(size for kind, size in prompt.trace.weights.items() if kind != ORIGINALS)
        cached = (
            key_value_bytes(self.config)
            * rows
            * (self.memory_profiler.sizes.num_before_caption + self.config.llm.new_tokens / 2)
        )
        return TokenWork(weights + unpacking + cached, prompt.trace.launches, is_captured(self.config))


def is_captured(config: Config) -> bool:
    """Whether decoding steps are CUDA graphs, as far as a configuration tells; see `vlmcap.models.decoding.graphs`."""
    from vlmcap.planning.estimate.sizes import unpacked_experts, writes_itself

    is_stock = config.llm.quantization is Quantization["none"] and not (
        config.tuning.use_lora and lora_of(config).use_experts
    )
    waits = config.llm.quantization is Quantization["8bit"] or (is_stock and unpacked_experts(config, 1) > 0)
    is_wanted = config.hardware.accelerator != "cpu" and config.evaluation.cuda_graphs is not False
    return (
        is_wanted
        and writes_itself(config)
        and not waits
        and not config.hardware.compile
        and config.trainer.strategy is not Strategy.fsdp2
    )


def token_seconds(work: TokenWork, gpu: DeviceInfo) -> float:
    """Seconds of one token of every clip of a batch.

    They are the GPU's, for moving bytes or for running kernels that are small, or the host's for launching kernels,
    where those are more.
    """
    return max(
        work.moved_bytes / (gpu.bandwidth_share * gpu.bytes_per_s), work.num_launches * seconds_per_kernel(work, gpu)
    )


def seconds_per_kernel(work: TokenWork, gpu: DeviceInfo) -> float:
    """The GPU's in a graph, or else the host's."""
    return gpu.kernel_s if work.is_captured else gpu.launch_s


def stages_in_front(config: Config, memory_profiler: MemoryProfiler, num_clips: int) -> list[Stage]:
    """What clips go through in front of the language model."""
    first = [] if config.cache.enabled is True else [Stage("encoder", memory_profiler.encoder(num_clips))]
    return [*first, Stage("projector", memory_profiler.projector(num_clips))]


def clip_bytes(config: Config, memory_profiler: MemoryProfiler) -> tuple[str, float]:
    """What a clip is on the GPU in front of the first stage, and its bytes."""
    is_cached = config.cache.enabled is True
    return (
        ("stored features", cached_bytes(memory_profiler))
        if is_cached
        else ("frames", float(memory_profiler.sizes.frame_bytes))
    )


def feature_values(memory_profiler: MemoryProfiler) -> float:
    """Numbers in the features of a clip."""
    frames, rows, columns = memory_profiler.sizes.grid
    return float(frames * rows * columns * memory_profiler.sizes.embed_dim)


def cached_bytes(memory_profiler: MemoryProfiler) -> float:
    """Bytes of a clip's stored features."""
    size = {"float32": 4.0, "int8": 1.0}.get(memory_profiler.config.cache.dtype, 2.0)
    return size * feature_values(memory_profiler) / (memory_profiler.config.pool_size or 1) ** 2


def unused_share(config: Config) -> float:
    """What the allocator cannot hand out, of all but weights."""
    if config.hardware.accelerator == "cpu":
        return 0.0
    return EXPANDABLE_SHARE if has_expandable_segments() else FIXED_SHARE


def packed_bytes(config: Config, stage: Stage) -> float:
    """Bytes of 4-bit weights."""
    return (
        stage.trace.weights.get("quantisation state", 0.0) * 32
        if config.llm.quantization is Quantization["4bit"]
        else 0.0
    )
