"""Settings of hardware, evaluation, planning and folders, and the configuration of a run."""

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
    """Properties of the hardware, and the defaults of other groups that suit it."""

    name: str = MISSING  # name of the hardware in titles and tables
    accelerator: str = MISSING  # Lightning's accelerator: cpu or gpu
    devices: int = 1  # devices per machine, with one process each; see trainer.strategy
    memory_gib: float = MISSING  # memory of a device in GiB
    precision: Precision = MISSING  # precision of training
    quantization: Quantization = Quantization["none"]  # default of llm.quantization
    attention: str = "sdpa"  # default of llm.attention
    batch_size: int = MISSING  # default of data.batch_size
    accumulate_grad_batches: int = 1  # default of trainer.accumulate_grad_batches
    num_frames: int = MISSING  # default of data.num_frames
    image_size: int | None = None  # default of encoder.image_size: side of a frame in pixels; null is the checkpoint's
    frame_stack: int = 1  # default of projector.frame_stack
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # Memory in GiB for activations, by which gradient checkpointing keeps as many layers as fit; null recomputes all.
    activation_budget_gib: float | None = only_with(
        "gradient_checkpointing=true", lambda c: c.gradient_checkpointing, None
    )
    compile: bool = False  # compile the layers of the language model by torch.compile; see benchmarks/train
    # Keep the checkpointed activations of the language model in host memory, which is slower and saves GPU memory.
    offload_checkpoints: bool = only_with("gradient_checkpointing=true", lambda c: c.gradient_checkpointing, False)
    num_workers: int = 2  # default of data.num_workers
    loss_chunk_mib: int | None = 128  # MiB of float32 logits that the loss computes at a time; null is all of a batch

    def __post_init__(self) -> None:
        require_positive("hardware", self, "devices")
        budget = self.activation_budget_gib
        require(
            budget is None or budget > 0,
            f"hardware.activation_budget_gib must be above 0, or null to recompute all layers, not {budget}",
        )
        is_sized = self.loss_chunk_mib is None or self.loss_chunk_mib >= 1
        require(
            is_sized,
            f"hardware.loss_chunk_mib must be at least 1, or null for all logits at once, not {self.loss_chunk_mib}",
        )


_NATIVE = "engine=native num_beams=1 do_sample=false"  # settings with which the native loop generates captions


@dataclass
class EvaluationConfig:
    """Generation of captions and their scores."""

    tokenizer: str = "mecab_ko"  # tokeniser of the scores
    normalize_fullwidth: bool = False  # treat full-width letters and digits as their usual forms
    synonyms: str | None = None  # JSON file of content words that count as equal: {"바다": ["해양"]}
    backend: EvaluationBackend = EvaluationBackend.native  # implementation of BLEU, CIDEr-D and ROUGE-L
    every_n_epochs: int = 1  # epochs between validations
    # Decoding engine: native, hf (transformers' generate, the only one with beam search), or vllm (evaluate.py only).
    engine: Engine = only_with(
        "num_beams=1 do_sample=false", lambda c: c.engine is Engine.vllm or c.is_greedy, Engine.native
    )
    # Folder of `vlmcap export`; null exports one under paths.cache_dir.
    vllm_model: str | None = only_with("engine=vllm", lambda c: c.engine is Engine.vllm, None)
    # Python interpreter of an environment with vLLM; null uses this environment.
    vllm_python: str | None = only_with("engine=vllm", lambda c: c.engine is Engine.vllm, None)
    # Share of the GPU memory for vLLM, 0 to 1; encoder and projector need the rest.
    vllm_gpu_memory: float = only_with("engine=vllm", lambda c: c.engine is Engine.vllm, 0.7)
    max_clips: int = 128  # validation clips that are scored while training; the final scoring uses the full split
    max_final_clips: int | None = None  # first clips of val and of test that are scored at the end; null is all
    # Clips per slot of a decoding batch, at most 128 in total; clips wait for slots that become free. 1 lets none wait.
    clips_per_slot: int = only_with(_NATIVE, lambda c: c.use_continuous_batching, 4)
    # Length in tokens of the n-grams for speculative decoding, which gives the same captions; 0 turns it off.
    speculate_ngram: int = only_with(_NATIVE, lambda c: c.use_continuous_batching, 0)
    # Replay decoding steps as a CUDA graph: true, false, or auto, which is true on a GPU if a step can be captured.
    cuda_graphs: Any = only_with(_NATIVE, lambda c: c.use_continuous_batching, "auto")
    # Merge adapters into copies of unquantised weights while captions are generated: true, false, or auto, which is
    # true if the plan has memory for the copies. In 16 bits the sum is rounded, as in `vlmcap export`.
    merge_adapters: Any = only_with("engine=native", lambda c: c.engine is not Engine.vllm, "auto")
    num_beams: int = 1  # beams; 1 is greedy search
    # Length penalty of beam search; above 0 favours longer captions.
    length_penalty: float = only_with("num_beams=4", lambda c: c.num_beams > 1, 1.0)
    repetition_penalty: float = 1.0  # divides the scores of tokens that occurred already; 1 is off
    no_repeat_ngram_size: int = 0  # length in tokens of n-grams that may occur only once in a caption; 0 is off
    do_sample: bool = False  # sample tokens instead of choosing the most likely one
    temperature: float = only_with("do_sample=true", lambda c: c.do_sample, 1.0)  # temperature of sampling
    top_p: float = only_with("do_sample=true", lambda c: c.do_sample, 1.0)  # probability mass of the sampled tokens
    top_k: int = only_with("do_sample=true", lambda c: c.do_sample, 50)  # number of tokens to sample from
    facts: str | None = None  # JSON file of facts and the phrases that state them
    swap_videos: bool = False  # score again with the videos exchanged between clips
    swap_shifts: int = only_with("swap_videos=true", lambda c: c.swap_videos, 5)  # exchanges that are averaged
    # Hub id or folder of SigLIP, for an image-text score of full splits at the end. It rises when captions collapse.
    siglip_checkpoint: str | None = None
    # Frames per clip for the image-text score.
    siglip_frames: int = only_with("siglip_checkpoint=…", lambda c: c.siglip_checkpoint is not None, 8)
    # Hub id or folder of a Korean text encoder, for BERTScore of full splits at the end.
    bert_checkpoint: str | None = None
    # Hidden layer of BERTScore; null is the last.
    bert_layer: int | None = only_with("bert_checkpoint=…", lambda c: c.bert_checkpoint is not None, None)
    # Weight the tokens of BERTScore by inverse document frequency.
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
            require(getattr(self, key) != "", f"evaluation.{key} is empty; set it to a hub id or a folder, or to null")
        require_positive("evaluation", self, "clips_per_slot")
        for key in ("cuda_graphs", "merge_adapters"):
            value = getattr(self, key)
            require(
                value == "auto" or isinstance(value, bool), f"evaluation.{key} must be true, false or auto, not {value}"
            )
        for key in ("no_repeat_ngram_size", "speculate_ngram"):
            require(getattr(self, key) >= 0, f"evaluation.{key} must not be negative, not {getattr(self, key)}")
        require(
            self.temperature > 0,
            f"evaluation.temperature must be above 0, not {self.temperature}; for greedy search, set "
            "evaluation.do_sample=false",
        )
        share = self.vllm_gpu_memory
        require(
            0 < share < 1,
            f"evaluation.vllm_gpu_memory is a share of the GPU memory and must be above 0 and below 1, not {share}",
        )
        require(0 < self.top_p <= 1, f"evaluation.top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether captions are decoded greedily."""
        return self.num_beams == 1 and not self.do_sample

    @property
    def use_continuous_batching(self) -> bool:
        """Whether the native loop is chosen, in which waiting clips take the slots of finished captions."""
        return self.engine is Engine.native and self.is_greedy


@dataclass
class PlanConfig:
    """The memory plan before a run on a GPU, which `vlmcap plan` shows."""

    enforce: Enforce = Enforce.error  # error refuses a run that cannot fit, warn runs it anyway, off makes no plan


@dataclass
class PathsConfig:
    """Folders of a run."""

    output_dir: str = MISSING  # run folder
    cache_dir: str = MISSING  # folder of demo data, demo models, features and other cached files
    overwrite: bool = False  # allow a new run in a folder that holds the checkpoints or scores of another


@dataclass
class Config:
    """The resolved configuration of a run; its groups are documented at their dataclasses."""

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
    seed: int = 0  # seed of all random generators
    monitor: str = "val/cider"  # metric that best.ckpt, early stopping and sweeps follow, and that train.py returns
    mode: str = "auto"  # whether max or min is better; auto is min for a loss and max for every other metric
    checkpoint: str | None = None  # checkpoint to resume from: a file, or "last" for the last one in paths.output_dir

    @property
    def is_pretrained_vlm(self) -> bool:
        """Whether a pretrained VLM brings all three components."""
        return not isinstance(self.model, AssembledConfig)

    @property
    def component_names(self) -> dict[str, str]:
        """Names of the components by group, for titles, tags and groups of runs."""
        groups = ("model",) if self.is_pretrained_vlm else ("encoder", "projector", "llm")
        return {group: getattr(self, group).name for group in groups}

    @property
    def pool_size(self) -> int | None:
        """Patches per side that are averaged before features are stored; None stores the encoder's features."""
        projector = self.projector
        return projector.pool_size if self.cache.pooled and isinstance(projector, TokenProjectorConfig) else None

    @property
    def monitor_mode(self) -> str:
        """Whether higher ("max") or lower ("min") values of the monitored metric are better."""
        return mode_of(self.monitor, self.mode)

    @property
    def is_deterministic(self) -> bool:
        """Whether training uses only deterministic kernels."""
        chosen = self.trainer.deterministic
        return self.hardware.accelerator == "cpu" if chosen == "auto" else bool(chosen)

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        for group in ("model", "encoder", "projector", "llm", "tuning", "hardware", "data"):
            require(
                getattr(self, group).name.strip() != "", f"{group}.name is empty; set a name, or leave {group}.name out"
            )
        require(self.mode in ("auto", "min", "max"), f"mode must be auto, min or max, not {self.mode}")
        is_wrong = self.mode == "max" and is_lower_better(self.monitor)
        require(not is_wrong, f"lower values of monitor={self.monitor} are better; set mode=min, or leave mode out")
        check_unread(self)
        _check_cache(self)


def mode_of(metric: str, mode: str) -> str:
    """Returns whether higher ("max") or lower ("min") values of a metric are better; `mode` decides unless "auto"."""
    return mode if mode != "auto" else "min" if is_lower_better(metric) else "max"


def is_lower_better(metric: str) -> bool:
    """Returns whether lower values of a metric are better, as of "val/loss"; all others are better if higher."""
    return metric.rsplit("/", 1)[-1] == "loss"


# Keys of encoder and language model that follow those of a pretrained VLM.
MODEL_KEYS = ("checkpoint", "revision", "gate", "license")


def check_native_components(plain: Mapping[str, Any]) -> None:
    """Raises a `ValueError` unless the components are native exactly if the model is a pretrained VLM.

    Args:
        plain: Configuration as plain data, with unresolved references to other keys.
    """
    model, is_pretrained_vlm = plain["model"]["name"], plain["model"]["kind"] != AssembledConfig.kind
    for group in ("encoder", "projector", "llm"):
        name = plain[group]["name"]
        hint = f"leave {group}={name} out, or set model=assembled" if is_pretrained_vlm else f"choose another {group}"
        what = "brings its own" if is_pretrained_vlm else "has no native"
        is_right = (plain[group]["kind"] == "native") == is_pretrained_vlm
        require(is_right, f"model={model} {what} {group}, so {group}={name} cannot be combined with it; {hint}")
    for group in ("encoder", "llm") if is_pretrained_vlm else ():
        for key in MODEL_KEYS:
            path, value = f"{group}.{key}", plain[group][key]
            is_followed = value in (f"${{model.{key}}}", plain["model"].get(key))
            why = f"has no effect in model={model}, which brings its own {group}"
            require(is_followed, f"{path}={value} {why}; set model.{key}, or leave {path} out")


def _check_cache(config: Config) -> None:
    """Raises a `ValueError` for features that change and so cannot be stored; `cache.enabled=auto` turns itself off."""
    cache, projector = config.cache, config.projector
    reducer = projector.reducer if isinstance(projector, TokenProjectorConfig) else Reducer.none
    require(
        cache.enabled is False or not cache.pooled or reducer is Reducer.pool,
        f"cache.pooled=true needs projector.reducer=pool, not projector.reducer={reducer.name}; set "
        "cache.pooled=false, or set projector.reducer=pool",
    )
    is_joined = getattr(config.encoder, "join", None) is not None
    require(
        cache.enabled is False or not cache.pooled or not is_joined,
        "cache.pooled=true stores what one projector reads, but features of joined encoders are stored apart; set "
        "cache.pooled=false",
    )
    if cache.enabled is not True:
        return
    tuned = config.tuning.encoder_tuning
    require(
        tuned is EncoderTuning.none,
        f"tuning.encoder={tuned.name} changes the features that cache.enabled=true stores; set cache.enabled=false",
    )
    changed = config.data.changed_by
    require(
        changed is None,
        f"{changed} changes the frames of a clip in every epoch, but cache.enabled=true stores the features of one "
        "epoch; set cache.enabled=false",
    )
