"""Settings of hardware, evaluation, logging and folders, and the whole of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmcap.config.callbacks import CallbacksConfig
from vlmcap.config.checks import only_with, require, require_positive, require_seed
from vlmcap.config.choices import EncoderTuning, Enforce, Engine, EvaluationBackend, Precision, Quantization, Reducer
from vlmcap.config.data import CacheConfig, DataConfig
from vlmcap.config.logger import LoggerConfig
from vlmcap.config.model import AssembledConfig, EncoderConfig, LlmConfig, ModelConfig
from vlmcap.config.projector import ProjectorConfig, TokenProjectorConfig
from vlmcap.config.sweep import LauncherConfig, SweepConfig
from vlmcap.config.trainer import OptimConfig, TrainerConfig
from vlmcap.config.tuning import TuningConfig
from vlmcap.config.unread import check_unread


@dataclass
class HardwareConfig:
    """A GPU as plain data that the other groups read."""

    name: str = MISSING
    accelerator: str = MISSING  # Lightning's: cpu, gpu
    devices: int = 1  # of each machine, a process each; see trainer.strategy
    memory_gib: float = MISSING
    precision: Precision = MISSING
    quantization: Quantization = Quantization["none"]
    attention: str = "sdpa"
    batch_size: int = MISSING
    accumulate_grad_batches: int = 1
    num_frames: int = MISSING
    image_size: int | None = None  # side of a frame in pixels; null is the encoder's own
    frame_stack: int = 1
    gradient_checkpointing: bool = False
    # Gradient checkpointing computes only so many layers again as this needs; null is all.
    activation_budget_gib: float | None = only_with(
        "gradient_checkpointing=true", lambda c: c.gradient_checkpointing, None
    )
    compile: bool = False  # the language model's layers by torch.compile; benchmarks/train says what it brings
    # What gradient checkpointing keeps of the language model waits in host memory: slower, and smaller.
    offload_checkpoints: bool = only_with("gradient_checkpointing=true", lambda c: c.gradient_checkpointing, False)
    num_workers: int = 2
    loss_chunk_mib: int | None = 128  # of float32 logits that the loss has at once; null is all of a batch

    def __post_init__(self) -> None:
        require_positive("hardware", self, "devices")
        budget = self.activation_budget_gib
        require(
            budget is None or budget > 0,
            f"hardware.activation_budget_gib must be above 0, or null for none, not {budget}",
        )
        is_sized = self.loss_chunk_mib is None or self.loss_chunk_mib >= 1
        require(
            is_sized,
            f"hardware.loss_chunk_mib must be at least 1, or null for all logits at once, not {self.loss_chunk_mib}",
        )


_OWN = "engine=native num_beams=1 do_sample=false"  # where our own loop writes captions


@dataclass
class EvaluationConfig:
    """Captions generated in the loop and their scores."""

    tokenizer: str = "mecab_ko"
    normalize_fullwidth: bool = False  # count full-width letters and digits as the usual ones
    synonyms: str | None = None  # JSON file of content words that count as the same: {"바다": ["해양"]}
    backend: EvaluationBackend = (
        EvaluationBackend.native
    )  # pycocoevalcap's BLEU, CIDEr-D and ROUGE-L of the same tokens instead
    every_n_epochs: int = 1
    # What decodes captions: ours, transformers' generate, or vllm, which is for evaluate.py; transformers alone has
    # beams.
    engine: Engine = only_with(
        "num_beams=1 do_sample=false", lambda c: c.engine is Engine.vllm or c.is_greedy, Engine.native
    )
    # Folder of `vlmcap export`; null makes one under paths.cache_dir.
    vllm_model: str | None = only_with("engine=vllm", lambda c: c.engine is Engine.vllm, None)
    # Interpreter of vLLM's own environment; null takes the vllm installed here.
    vllm_python: str | None = only_with("engine=vllm", lambda c: c.engine is Engine.vllm, None)
    # Share of the GPU that vLLM takes; encoder and projector need the rest.
    vllm_gpu_memory: float = only_with("engine=vllm", lambda c: c.engine is Engine.vllm, 0.7)
    max_clips: int = 128  # of the validation split while training; the whole split once at the end
    max_final_clips: int | None = (
        None  # of each of the splits val and test, the first ones; null scores whole splits at the end
    )
    # Clips of a batch of prompts per decoding slot, at most 128 in all: a waiting clip takes the slot of a caption that
    # has ended; 1 disables waiting.
    clips_per_slot: int = only_with(_OWN, lambda c: c.use_continuous_batching, 4)
    # Guess what comes next by n-grams of this many tokens; same captions, maybe sooner; 0 does not guess.
    speculate_ngram: int = only_with(_OWN, lambda c: c.use_continuous_batching, 0)
    # Repeat a decoding step as a CUDA graph: true, false, or auto, which is true on a GPU wherever a step can be
    # captured.
    cuda_graphs: Any = only_with(_OWN, lambda c: c.use_continuous_batching, "auto")
    # Add adapters to copies of unquantised weights while captions are written: true, false, or auto, which is true
    # where the plan has memory for the copies. In 16 bits the sum is rounded, as in `vlmcap export`.
    merge_adapters: Any = only_with("engine=native", lambda c: c.engine is not Engine.vllm, "auto")
    num_beams: int = 1
    # Of beam search: above 0 favours longer captions.
    length_penalty: float = only_with("num_beams=4", lambda c: c.num_beams > 1, 1.0)
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # n-grams of this many tokens come once a caption; 0 lets them repeat
    do_sample: bool = False
    # Of sampling, as are the two below.
    temperature: float = only_with("do_sample=true", lambda c: c.do_sample, 1.0)
    top_p: float = only_with("do_sample=true", lambda c: c.do_sample, 1.0)
    top_k: int = only_with("do_sample=true", lambda c: c.do_sample, 50)
    facts: str | None = None  # JSON file of facts and the phrases that state them
    swap_videos: bool = False  # score again with the videos exchanged between clips
    swap_shifts: int = only_with("swap_videos=true", lambda c: c.swap_videos, 5)
    siglip_checkpoint: str | None = (
        None  # hub id or folder; image-text score of whole splits at the end. Rises when captions collapse
    )
    # Of each clip.
    siglip_frames: int = only_with("siglip_checkpoint=…", lambda c: c.siglip_checkpoint is not None, 8)
    bert_checkpoint: str | None = (
        None  # hub id or folder of a Korean text encoder; BERTScore of whole splits at the end
    )
    # Hidden layer; null is the last.
    bert_layer: int | None = only_with("bert_checkpoint=…", lambda c: c.bert_checkpoint is not None, None)
    # Rare tokens weigh more.
    bert_idf: bool = only_with("bert_checkpoint=…", lambda c: c.bert_checkpoint is not None, False)

    def __post_init__(self) -> None:
        require_positive(
            "evaluation",
            self,
            "num_beams",
            "siglip_frames",
            "max_final_clips",
            "max_clips",
            "every_n_epochs",
            "swap_shifts",
        )
        for key in ("siglip_checkpoint", "bert_checkpoint"):
            require(
                getattr(self, key) != "", f"evaluation.{key} is empty; give a hub id or a folder, or null to do without"
            )
        require_positive("evaluation", self, "clips_per_slot")
        for key in ("cuda_graphs", "merge_adapters"):
            value = getattr(self, key)
            require(
                value == "auto" or isinstance(value, bool), f"evaluation.{key} must be true, false or auto, not {value}"
            )
        for key in ("no_repeat_ngram_size", "speculate_ngram"):
            require(
                getattr(self, key) >= 0, f"evaluation.{key} must be 0 or a number of tokens, not {getattr(self, key)}"
            )
        require(
            self.temperature > 0,
            f"evaluation.temperature must be above 0, not {self.temperature}; greedy search is do_sample=false",
        )
        share = self.vllm_gpu_memory
        require(
            0 < share < 1,
            f"evaluation.vllm_gpu_memory must be above 0 and below 1, not {share}: it is a share of the GPU",
        )
        require(0 < self.top_p <= 1, f"evaluation.top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the best next token is all there is to choose."""
        return self.num_beams == 1 and not self.do_sample

    @property
    def use_continuous_batching(self) -> bool:
        """Whether the native engine is chosen, in which a waiting clip takes the slot of a caption that has ended."""
        return self.engine is Engine.native and self.is_greedy


@dataclass
class PlanConfig:
    """The memory plan in front of a run on a GPU; `vlmcap plan` shows it."""

    enforce: Enforce = Enforce.error  # a run that cannot fit is refused; warn says so and runs, off plans nothing


@dataclass
class PathsConfig:
    """Folders."""

    output_dir: str = MISSING
    cache_dir: str = MISSING  # demo data, base parts, features
    overwrite: bool = False  # start a run where another has left its checkpoints or scores


@dataclass
class Config:
    """A whole run, resolved."""

    model: ModelConfig
    encoder: EncoderConfig
    projector: ProjectorConfig
    llm: LlmConfig
    tuning: TuningConfig
    hardware: HardwareConfig
    data: DataConfig
    evaluation: EvaluationConfig
    optim: OptimConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    paths: PathsConfig
    callbacks: CallbacksConfig
    sweep: SweepConfig
    launcher: LauncherConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    seed: int = 0
    monitor: str = "val/cider"  # the metric that best.ckpt, early stopping and sweeps follow, and that train.py returns
    mode: str = "auto"  # max, min, or auto: a loss is better when it is lower, all others when they are higher
    checkpoint: str | None = None  # resume: a file, or "last" for this output_dir's last one

    @property
    def is_pretrained_vlm(self) -> bool:
        """Whether a pretrained model stands in place of the three parts."""
        return not isinstance(self.model, AssembledConfig)

    @property
    def component_names(self) -> dict[str, str]:
        """What the model is made of, group to name: for titles, tags and groups of runs."""
        groups = ("model",) if self.is_pretrained_vlm else ("encoder", "projector", "llm")
        return {group: getattr(self, group).name for group in groups}

    @property
    def pool_size(self) -> int | None:
        """Patches per side that are averaged before features are kept; None where they are kept as they are encoded."""
        return (
            self.projector.pool_size if self.cache.pooled and isinstance(self.projector, TokenProjectorConfig) else None
        )

    @property
    def monitor_mode(self) -> str:
        """Whether more or less of the monitored metric is better, "max" or "min"."""
        return mode_of(self.monitor, self.mode)

    @property
    def is_deterministic(self) -> bool:
        """Whether training uses deterministic kernels alone."""
        chosen = self.trainer.deterministic
        return self.hardware.accelerator == "cpu" if chosen == "auto" else bool(chosen)

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        for group in ("model", "encoder", "projector", "llm", "tuning", "hardware", "data"):
            require(
                getattr(self, group).name.strip() != "",
                f"{group}.name is empty; give a name, or leave {group}.name out",
            )
        require(self.mode in ("auto", "min", "max"), f"mode must be auto, min or max, not {self.mode}")
        is_wrong = self.mode == "max" and is_lower_better(self.monitor)
        require(not is_wrong, f"monitor={self.monitor} is better when it is lower; set mode=min, or leave mode out")
        check_unread(self)
        _check_cache(self)


def mode_of(metric: str, mode: str) -> str:
    """Whether more or less of a metric is better, "max" or "min"; `mode` decides unless it is "auto"."""
    return mode if mode != "auto" else "min" if is_lower_better(metric) else "max"


def is_lower_better(metric: str) -> bool:
    """Whether a metric such as "val/loss" is better when it is lower; all others are better when they are higher."""
    return metric.rsplit("/", 1)[-1] == "loss"


OF_THE_MODEL = (
    "checkpoint",
    "revision",
    "gate",
    "license",
)  # what encoder and language model of a pretrained VLM have from it


def check_native_components(plain: Mapping[str, Any]) -> None:
    """Raises a `ValueError` where a pretrained VLM and a part that it does not bring, or the reverse, were chosen.

    Args:
        plain: A configuration as plain data, its references to other keys not yet resolved.
    """
    model, is_pretrained_vlm = plain["model"]["name"], plain["model"]["kind"] != AssembledConfig.kind
    for part in ("encoder", "projector", "llm"):
        name = plain[part]["name"]
        fix = f"leave {part}={name} out, or set model=assembled" if is_pretrained_vlm else f"choose another {part}"
        what = "brings its own" if is_pretrained_vlm else "has no own"
        is_right = (plain[part]["kind"] == "native") == is_pretrained_vlm
        require(is_right, f"model={model} {what} {part}, so {part}={name} does not go with it: {fix}")
    for part in ("encoder", "llm") if is_pretrained_vlm else ():
        for key in OF_THE_MODEL:
            path, value = f"{part}.{key}", plain[part][key]
            is_followed = value in (f"${{model.{key}}}", plain["model"].get(key))
            own = f"changes nothing in model={model}, which brings its own {part}"
            require(is_followed, f"{path}={value} {own}; set model.{key}, or leave {path} out")


def _check_cache(config: Config) -> None:
    """`ValueError` for features that cannot be kept, as they change; `cache.enabled=auto` leaves them out by itself."""
    cache, projector = config.cache, config.projector
    reducer = projector.reducer if isinstance(projector, TokenProjectorConfig) else Reducer.none
    require(
        cache.enabled is False or not cache.pooled or reducer is Reducer.pool,
        f"cache.pooled=true keeps what projector.reducer=pool leaves, and projector.reducer={reducer.name}; set "
        "cache.pooled=false",
    )
    if cache.enabled is not True:
        return
    tuned = config.tuning.encoder_tuning
    require(
        tuned is EncoderTuning.none,
        f"tuning.encoder={tuned.name} changes the features that cache.enabled=true keeps; set cache.enabled=false",
    )
    changed = config.data.changed_by
    require(
        changed is None,
        f"{changed} gives a clip other frames in every epoch, and cache.enabled=true keeps the features of one; set "
        "cache.enabled=false",
    )
