"""Settings of hardware, evaluation, logging and folders, and the whole of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import Enum

from omegaconf import MISSING

from vlmcap.config.callbacks import CallbacksConfig
from vlmcap.config.checks import require, require_positive, require_seed
from vlmcap.config.choices import (
    EncoderTuning,
    Enforce,
    Engine,
    EvaluationBackend,
    LoggerKind,
    ModelKind,
    Precision,
    ProjectorKind,
    Quantization,
    Reducer,
)
from vlmcap.config.data import CacheConfig, DataConfig
from vlmcap.config.model import EncoderConfig, LlmConfig, ModelConfig, ProjectorConfig, TuningConfig
from vlmcap.config.sweep import LauncherConfig, SweepConfig
from vlmcap.config.trainer import OptimConfig, TrainerConfig


@dataclass
class HardwareConfig:
    """A card as plain data that the other groups read."""

    name: str = MISSING
    accelerator: str = MISSING  # Lightning's: cpu, gpu
    devices: int = 1  # of each machine, a process each; see trainer.strategy
    memory_gib: float = MISSING
    precision: Precision = MISSING
    quantization: Quantization = Quantization["none"]
    attention: str = "sdpa"
    batch_size: int = MISSING
    eval_batch_size: int = MISSING
    accumulate_grad_batches: int = 1
    num_frames: int = MISSING
    image_size: int | None = None  # side of a frame in pixels; null is the encoder's own
    frame_stack: int = 1
    gradient_checkpointing: bool = False
    activation_budget_gib: float | None = None  # gradient_checkpointing computes only so many layers again as this needs; null is all
    compile: bool = False  # the language model's layers by torch.compile; benchmarks/train says what it brings
    offload_checkpoints: bool = False  # what gradient_checkpointing keeps of the language model waits in host memory: slower, and smaller
    num_workers: int = 2
    loss_chunk_mib: int | None = 128  # of float32 logits that the loss has at once; null is all of a batch

    def __post_init__(self) -> None:
        require_positive("hardware", self, "devices")
        require(
            self.gradient_checkpointing or not self.offload_checkpoints,
            "hardware.offload_checkpoints=true has nothing to move without hardware.gradient_checkpointing=true; set both, or neither",
        )
        budget = self.activation_budget_gib
        require(budget is None or budget > 0, f"hardware.activation_budget_gib must be above 0, or null for none, not {budget}")
        is_sized = self.loss_chunk_mib is None or self.loss_chunk_mib >= 1
        require(is_sized, f"hardware.loss_chunk_mib must be at least 1, or null for all logits at once, not {self.loss_chunk_mib}")


@dataclass
class EvaluationConfig:
    """Captions generated in the loop and their scores."""

    tokenizer: str = "mecab_ko"
    fold_width: bool = False  # count full-width letters and digits as the usual ones
    synonyms: str | None = None  # JSON file of content words that count as the same: {"바다": ["해양"]}
    backend: EvaluationBackend = EvaluationBackend.native  # pycocoevalcap's BLEU, CIDEr-D and ROUGE-L of the same tokens instead
    every_n_epochs: int = 1
    engine: Engine = Engine.own  # what decodes captions: ours, transformers' generate, or vllm, which is for evaluate.py
    vllm_model: str | None = None  # folder of `vlmcap export`; null makes one under paths.cache_dir
    vllm_python: str | None = None  # interpreter of vLLM's own environment; null takes the vllm installed here
    vllm_gpu_memory: float = 0.7  # share of the card that vLLM takes; encoder and projector need the rest
    max_clips: int = 128  # of the validation split while training; the whole split once at the end
    clips_per_row: int = 4  # of a batch to caption, for each of data.eval_batch_size rows: those beyond wait for rows that end; 1 for none
    speculate_ngram: int = 0  # guess what comes next by n-grams of this many tokens; same captions, maybe sooner; 0 does not guess
    num_beams: int = 1
    length_penalty: float = 1.0  # of beam search: above 0 favours longer captions
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0  # n-grams of this many tokens come once a caption; 0 lets them repeat
    do_sample: bool = False
    temperature: float = 1.0  # of sampling, as are the two below
    top_p: float = 1.0
    top_k: int = 50
    facts: str | None = None  # JSON file of facts and the phrases that state them
    swap_videos: bool = False  # score again with the videos exchanged between clips
    swap_shifts: int = 5
    siglip_checkpoint: str | None = None  # hub id or folder; image-text score of whole splits at the end. Rises when captions collapse
    siglip_frames: int = 8  # of each clip
    bert_checkpoint: str | None = None  # hub id or folder of a Korean text encoder; BERTScore of whole splits at the end
    bert_layer: int | None = None  # hidden layer; null is the last
    bert_idf: bool = False  # rare tokens weigh more
    num_table_rows: int = 16  # of the W&B table

    def __post_init__(self) -> None:
        require_positive("evaluation", self, "num_beams", "siglip_frames")
        for key in ("siglip_checkpoint", "bert_checkpoint"):
            require(getattr(self, key) != "", f"evaluation.{key} is empty; give a hub id or a folder, or null to do without")
        require_positive("evaluation", self, "clips_per_row")
        for key in ("no_repeat_ngram_size", "speculate_ngram"):
            require(getattr(self, key) >= 0, f"evaluation.{key} must be 0 or a number of tokens, not {getattr(self, key)}")
        require(self.temperature > 0, f"evaluation.temperature must be above 0, not {self.temperature}; greedy search is do_sample=false")
        share = self.vllm_gpu_memory
        require(0 < share < 1, f"evaluation.vllm_gpu_memory must be above 0 and below 1, not {share}: it is a share of the card")
        require(0 < self.top_p <= 1, f"evaluation.top_p must be above 0 and at most 1, not {self.top_p}")


LoggedCheckpoint = Enum("LoggedCheckpoint", {"best": "best", "last": "last", "none": "none"})
LoggedCheckpoint.__doc__ = "Which checkpoint is sent to W&B at the end of a run."


@dataclass
class LoggerConfig:
    """Metrics beside `metrics.jsonl`; what is sent to W&B beside numbers has a bound."""

    kind: LoggerKind = LoggerKind.csv
    project: str = "vlmcap"  # of W&B and trackio, and MLflow's experiment
    entity: str | None = None  # of W&B: a user or a team; null is the key's default
    group: str | None = None  # of W&B and trackio; null is the encoder and the language model
    offline: bool = False
    log_checkpoints: LoggedCheckpoint = LoggedCheckpoint.best  # of W&B: trained weights and optimiser state, never frozen weights
    log_predictions: bool = True  # of W&B: the predictions of whole splits as an artifact
    max_artifact_mib: int = 1024  # a larger checkpoint stays here
    max_media_mib: int = 50  # of thumbnails and tables in a run; tables that would go beyond are left out
    table_every_n_validations: int = 1
    thumbnail_height: int = 96  # pixels of each of a clip's four frames
    jpeg_quality: int = 70

    def __post_init__(self) -> None:
        require_positive("logger", self, "max_artifact_mib", "max_media_mib", "table_every_n_validations")
        require(self.thumbnail_height >= 8, f"logger.thumbnail_height must be at least 8 pixels, not {self.thumbnail_height}")
        require(1 <= self.jpeg_quality <= 95, f"logger.jpeg_quality must be 1 to 95, not {self.jpeg_quality}")


@dataclass
class PlanConfig:
    """The memory plan in front of a run on a card; `vlmcap plan` shows it."""

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
    cache: CacheConfig
    plan: PlanConfig
    paths: PathsConfig
    callbacks: CallbacksConfig
    sweep: SweepConfig = field(default_factory=SweepConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    seed: int = 0
    objective: str = "val/cider"  # the metric that train.py returns, for sweeps
    objective_mode: str = "max"
    checkpoint: str | None = None  # resume: a file, or "last" for this output_dir's last one

    @property
    def is_whole(self) -> bool:
        """Whether a pretrained model stands in place of the three parts."""
        return self.model.kind is not ModelKind.assembled

    @property
    def part_names(self) -> dict[str, str]:
        """What the model is made of, group to name: for titles, tags and groups of runs."""
        groups = ("model",) if self.is_whole else ("encoder", "projector", "llm")
        return {group: getattr(self, group).name for group in groups}

    def better(self, metric: str) -> str:
        """Whether more or less of a metric is better, "max" or "min"; what `objective_mode` says of the objective counts."""
        return self.objective_mode if metric == self.objective else "min" if is_lower_better(metric) else "max"

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        own = {
            "encoder": self.encoder.name == "own",
            "projector": self.projector.kind is ProjectorKind.own,
            "llm": self.llm.name == "own",
        }
        for part, is_own in own.items():
            name = getattr(self, part).name
            mend = f"leave {part}={name} out, or set model=assembled" if self.is_whole else f"choose another {part}"
            what = "brings its own" if self.is_whole else "has no own"
            require(is_own == self.is_whole, f"model={self.model.name} {what} {part}, so {part}={name} does not go with it: {mend}")
        if self.is_whole:
            _refuse_unread("projector", self.projector, ProjectorConfig("own", ProjectorKind.own), self.model.name)
            unread = ("feature_layer", "image_size", "image_mean", "image_std", "tiling")
            fixed = replace(self.encoder, **{name: getattr(EncoderConfig("own"), name) for name in unread})
            _refuse_unread("encoder", self.encoder, fixed, self.model.name)
        _check_cache(self)


def is_lower_better(metric: str) -> bool:
    """Whether a metric such as "val/loss" is better when it is lower; all others are better when they are higher."""
    return metric.rsplit("/", 1)[-1] == "loss"


def _check_cache(config: Config) -> None:
    """`ValueError` for features that cannot be kept, as they change; `cache.enabled=auto` leaves them out by itself."""
    cache, pooled = config.cache, config.projector.reducer
    require(
        cache.enabled is False or not cache.pooled or pooled is Reducer.pool,
        f"cache.pooled=true keeps what projector.reducer=pool leaves, and projector.reducer={pooled.name}; set cache.pooled=false",
    )
    if cache.enabled is not True:
        return
    tuned = config.tuning.encoder
    require(
        tuned is EncoderTuning.none,
        f"tuning.encoder={tuned.name} changes the features that cache.enabled=true keeps; set cache.enabled=false",
    )
    changed = config.data.changed_by
    require(
        changed is None,
        f"{changed} gives a clip other frames in every epoch, and cache.enabled=true keeps the features of one; set cache.enabled=false",
    )


def _refuse_unread(part: str, given: object, fixed: object, model: str) -> None:
    """`ValueError` for a setting of a part that a whole model brings as it is."""
    for known in fields(given):  # type: ignore[arg-type]
        value = getattr(given, known.name)
        key = f"{part}.{known.name}={getattr(value, 'value', value)}"
        require(value == getattr(fixed, known.name), f"{key} changes nothing in model={model}, which brings its own {part}; leave it out")
