"""Settings of the data: where clips are, how they are split, read, batched and cached."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from vlmcap.config.checks import require, require_positive, require_seed
from vlmcap.config.choices import Batching, DataFormat, Decoder, Sampling, Split


@dataclass
class DemoConfig:
    """The procedural demo data set."""

    num_train: int = 2000
    num_val: int = 100
    num_test: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("data.demo.seed", self.seed)


@dataclass
class SplitConfig:
    """Splits drawn here, where a data set brings none: whole groups, by a hash, so that a growing set keeps its old assignments."""

    is_drawn: bool = False  # false: folders or fields of the data set say which clip is in which split
    val: float = 0.05  # shares of the groups
    test: float = 0.05
    seed: int = 0
    group_pattern: str | None = None  # regular expression on a clip's id whose first group names its source; null: the video itself

    def __post_init__(self) -> None:
        require(
            self.val >= 0 and self.test >= 0 and self.val + self.test < 1,
            "data.splits.val and .test must be shares that leave some to train",
        )
        require_seed("data.splits.seed", self.seed)


@dataclass
class AugmentConfig:
    """Changes of training frames that keep captions true; 0 is off. No flips: captions say left and right."""

    color: float = 0.0  # brightness, contrast and saturation by up to this share
    crop: float = 0.0  # up to this share of each side cut off, the same of all frames
    jitter: float = 0.0  # frames moved in time by up to this share of their segment

    def __post_init__(self) -> None:
        for name in ("color", "crop", "jitter"):
            require(0 <= getattr(self, name) <= 0.5, f"data.augment.{name} must be 0 to 0.5, not {getattr(self, name)}")

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return any((self.color, self.crop, self.jitter))


@dataclass
class DataConfig:
    """Where clips and captions are and how they are read."""

    name: str = MISSING
    format: DataFormat = MISSING
    root: str = MISSING
    annotations: str | None = None  # file, or pattern of files, below root, for formats that keep captions in one file
    media: str = ""  # folder of videos and images below root
    media_pattern: str = "{id}.mp4"  # of a clip's file below media, for formats that name an id and no file
    caption_key: str = "annotation.description_kr"  # dotted path in a label
    category_key: str | None = None  # dotted path in a label, for scores by category
    allow_outside: bool = False  # let annotations name files outside root
    splits: SplitConfig = field(default_factory=SplitConfig)
    split: Split = Split.test  # the split that evaluate.py scores
    num_frames: int = MISSING
    sampling: Sampling = Sampling.uniform
    fps: float = 1.0  # of sampling=fps, at most num_frames of them
    variable_frames: bool = False  # images and short clips keep fewer frames than num_frames; false repeats frames
    decoder: Decoder = Decoder.pyav
    batch_size: int = MISSING
    eval_batch_size: int = MISSING
    batching: Batching = Batching.shuffled
    max_tokens_per_batch: int | None = None  # visual tokens, prompt, caption and padding together; in place of batch_size
    num_workers: int = 2
    align_epochs: int = 1  # that suit its size; the stages of tuning read them
    tune_epochs: int = 3
    eval_every_n_epochs: int = 1  # evaluation reads it
    monitor: str = "val/cider"  # the metric that best.ckpt follows
    max_clips: int | None = None  # training clips at most, the first of a seeded order
    max_bad_fraction: float = 0.02  # unreadable clips above this share stop the run
    decode_timeout_s: float = 60.0  # of one clip; whatever takes longer is stopped and noted
    decode_memory_gib: float = 4.0  # of one decoding process
    is_isolated: bool = True  # decode in a child process, which may hang or die without harm
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    is_demo: bool = False  # made on first use
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self) -> None:
        require_positive("data", self, "num_frames", "batch_size", "eval_batch_size")
        require(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction must be in [0, 1], not {self.max_bad_fraction}")
        require(self.fps > 0, f"data.fps must be above 0, not {self.fps}")
        require(self.num_workers >= 0, f"data.num_workers must not be negative, not {self.num_workers}")
        require(self.max_clips is None or self.max_clips >= 1, f"data.max_clips must be at least 1, or null for all, not {self.max_clips}")
        require(self.decode_timeout_s > 0, f"data.decode_timeout_s must be above 0, not {self.decode_timeout_s}")
        require(self.decode_memory_gib >= 0.5, f"data.decode_memory_gib must be at least 0.5, not {self.decode_memory_gib}")
        self._check_batching()
        self._check_unread()

    def _check_batching(self) -> None:
        budget, batching = self.max_tokens_per_batch, self.batching
        require(budget is None or budget > 0, f"data.max_tokens_per_batch must be at least 1, not {budget}")
        require(
            budget is None or batching is not Batching.shuffled,
            f"data.max_tokens_per_batch={budget} needs batches of clips of like length; set data.batching=by_length or packed",
        )
        require(
            budget is not None or batching is not Batching.packed,
            "data.batching=packed fills rows up to data.max_tokens_per_batch; set it, for example to 4096",
        )

    def _check_unread(self) -> None:
        """`ValueError` for a setting that changes nothing beside the others: it was meant to."""
        require(
            self.splits.group_pattern is None or self.splits.is_drawn,
            "data.splits.group_pattern changes nothing unless splits are drawn; set data.splits.is_drawn=true",
        )
        if self.format is DataFormat.aihub:
            for name, unset in (("annotations", None), ("media", ""), ("media_pattern", "{id}.mp4")):
                value = getattr(self, name)
                require(
                    value == unset, f"data.{name}={value} changes nothing in data.format=aihub, which pairs files by name; leave it out"
                )

    @property
    def changed_by(self) -> str | None:
        """The setting by which a clip's frames differ from epoch to epoch, as `key=value`."""
        if self.sampling is Sampling.random:
            return "data.sampling=random"
        on = [name for name in ("color", "crop", "jitter") if getattr(self.augment, name)]
        return f"data.augment.{on[0]}={getattr(self.augment, on[0])}" if on else None


@dataclass
class CacheConfig:
    """Features of the frozen encoder, computed once a clip."""

    enabled: Any = False  # true, false, or auto: what the costs say (OmegaConf takes no bool | str from an interpolation)
    dtype: str = "float16"  # float16, bfloat16, float32 or int8 (a scale for each token)
    pooled: bool = False  # keep them after projector.reducer=pool
    max_gib: float | None = None  # of all features under paths.cache_dir; the longest unused go first

    def __post_init__(self) -> None:
        require(self.enabled in (True, False, "auto"), f"cache.enabled must be true, false or auto, not {self.enabled}")
        require(self.max_gib is None or 0 < self.max_gib < inf, f"cache.max_gib must be above 0, or null for no limit, not {self.max_gib}")
