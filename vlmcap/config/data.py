"""Settings of the data: where clips are, how they are split, read, batched and cached."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from vlmcap.config.checks import follows, only_with, require, require_positive, require_seed
from vlmcap.config.choices import Batching, Decoder, Sampling, Split
from vlmcap.config.kinds import register


@dataclass
class DemoConfig:
    """The procedural demo data set."""

    num_train: int = 2000
    num_val: int = 100
    num_test: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("data.demo", self, "num_train", "num_val", "num_test")
        require_seed("data.demo.seed", self.seed)


@dataclass
class SplitConfig:
    """Splits drawn here, where a data set brings none.

    Whole groups, by a hash, so that a growing set keeps its old assignments.
    """

    random: bool = False  # false: folders or fields of the data set say which clip is in which split
    val: float = only_with("random=true", lambda c: c.random, 0.05)  # shares of the groups
    test: float = only_with("random=true", lambda c: c.random, 0.05)
    seed: int = only_with("random=true", lambda c: c.random, 0)
    # Regular expression on a clip's id whose first group names its source; null: the video itself.
    group_pattern: str | None = only_with("random=true", lambda c: c.random, None)

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
    kind: str = MISSING
    root: str = MISSING
    allow_outside: bool = False  # let annotations name files outside root
    splits: SplitConfig = field(default_factory=SplitConfig)
    split: Split = Split.test  # the split that evaluate.py scores
    num_frames: int = follows("hardware.num_frames", 8)
    sampling: Sampling = Sampling.uniform
    fps: float = only_with(
        "sampling=fps", lambda c: c.sampling is Sampling.fps, 1.0
    )  # frames per second, at most num_frames of them
    variable_frames: bool = False  # images and short clips keep fewer frames than num_frames; false repeats frames
    decoder: Decoder = Decoder.pyav
    batch_size: int = follows("hardware.batch_size", 1)
    eval_batch_size: int | None = (
        None  # clips that are captioned together; null takes the most that the memory plan has room for
    )
    batching: Batching = Batching.shuffled
    max_tokens_per_batch: int | None = (
        None  # visual tokens, prompt, caption and padding together; in place of batch_size
    )
    num_workers: int = follows("hardware.num_workers", 2)
    max_clips: int | None = None  # training clips at most, the first of a seeded order
    max_bad_fraction: float = 0.02  # unreadable clips above this share stop the run
    decode_timeout_s: float = 60.0  # per clip; whatever takes longer is stopped and noted
    decode_memory_gib: float = only_with("is_isolated=true", lambda c: c.is_isolated, 4.0)  # of one decoding process
    is_isolated: bool = True  # decode in a child process, which may hang or die without harm
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require_positive("data", self, "num_frames", "batch_size", "eval_batch_size", "max_clips")
        require(
            0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction must be in [0, 1], not {self.max_bad_fraction}"
        )
        require(self.fps > 0, f"data.fps must be above 0, not {self.fps}")
        require(self.num_workers >= 0, f"data.num_workers must not be negative, not {self.num_workers}")
        require(self.decode_timeout_s > 0, f"data.decode_timeout_s must be above 0, not {self.decode_timeout_s}")
        require(
            self.decode_memory_gib >= 0.5, f"data.decode_memory_gib must be at least 0.5, not {self.decode_memory_gib}"
        )
        self._check_batching()

    def _check_batching(self) -> None:
        budget, batching = self.max_tokens_per_batch, self.batching
        require(budget is None or budget > 0, f"data.max_tokens_per_batch must be at least 1, not {budget}")
        require(
            budget is None or batching is not Batching.shuffled,
            f"data.max_tokens_per_batch={budget} needs batches of clips of like length; set data.batching=by_length "
            "or packed",
        )
        require(
            budget is not None or batching is not Batching.packed,
            "data.batching=packed fills rows up to data.max_tokens_per_batch; set it, for example to 4096",
        )

    @property
    def is_demo(self) -> bool:
        """Whether the clips are made on first use."""
        return False

    @property
    def changed_by(self) -> str | None:
        """The setting by which a clip's frames differ from epoch to epoch, as `key=value`."""
        if self.sampling is Sampling.random:
            return "data.sampling=random"
        on = [name for name in ("color", "crop", "jitter") if getattr(self.augment, name)]
        return f"data.augment.{on[0]}={getattr(self.augment, on[0])}" if on else None


@register("data")
@dataclass
class AihubConfig(DataConfig):
    """AI Hub's layout, which pairs a video and a label by their names."""

    kind: str = "aihub"
    caption_key: str = "annotation.description_kr"  # dotted path in a label
    category_key: str | None = None  # dotted path in a label, for scores by category


@register("data")
@dataclass
class DemoDataConfig(AihubConfig):
    """The procedural demo data set, in AI Hub's layout."""

    kind: str = "demo"
    root: str = follows("${paths.cache_dir}/demo", MISSING)
    demo: DemoConfig = field(default_factory=DemoConfig)

    @property
    def is_demo(self) -> bool:
        """Whether the clips are made on first use."""
        return True


@dataclass
class AnnotatedConfig(DataConfig):
    """What formats have whose captions stand in files that are named."""

    annotations: str = MISSING  # file, or pattern of files, below root


@dataclass
class MediaConfig(AnnotatedConfig):
    """Formats whose entries name videos and images."""

    media: str = ""  # folder of videos and images below root
    category_key: str | None = None  # dotted path in an entry, for scores by category


@dataclass
class KeyedConfig(MediaConfig):
    """Formats whose entries have a caption at a key."""

    caption_key: str = "caption"  # dotted path in an entry


@dataclass
class PatternConfig(KeyedConfig):
    """Formats that name an id and no file."""

    media_pattern: str = "{id}.mp4"  # a clip's file below media


@register("data")
@dataclass
class JsonlConfig(KeyedConfig):
    """One JSON object per line."""

    kind: str = "jsonl"
    annotations: str = "*.jsonl"


@register("data")
@dataclass
class CocoKoConfig(KeyedConfig):
    """COCO images with Korean captions."""

    kind: str = "coco_ko"
    annotations: str = "MSCOCO_train_val_Korean.json"
    caption_key: str = "caption_ko"
    split: Split = Split.val  # there is no test
    variable_frames: bool = True  # an image is one frame


@register("data")
@dataclass
class NiklConfig(PatternConfig):
    """Image captions of the National Institute of Korean Language."""

    kind: str = "nikl"
    annotations: str = "*{split}*.jsonl"
    media_pattern: str = "{id}.jpg"  # {id} is the value of input, where that has no ending
    caption_key: str = "output"
    variable_frames: bool = True  # an image is one frame


@register("data")
@dataclass
class MsrvttConfig(PatternConfig):
    """MSR-VTT."""

    kind: str = "msrvtt"
    annotations: str = "*videodatainfo*.json"
    media: str = "videos"
    category_key: str | None = "category"  # in a video: its number


@register("data")
@dataclass
class VatexConfig(PatternConfig):
    """VATEX."""

    kind: str = "vatex"
    annotations: str = "*{split}*.json"
    media: str = "videos"
    caption_key: str = "koCap"  # of a Korean translation; the original has enCap and chCap


def _drawn() -> SplitConfig:
    return SplitConfig(random=True)


@register("data")
@dataclass
class LlavaConfig(MediaConfig):
    """LLaVA conversations, whose first answer is the caption."""

    kind: str = "llava"
    annotations: str = "*.json*"
    splits: SplitConfig = field(default_factory=_drawn)


@register("data")
@dataclass
class WebdatasetConfig(AnnotatedConfig):
    """WebDataset shards, on disk or in an object store."""

    kind: str = "webdataset"
    annotations: str = (
        "*.tar"  # or "clips-{000..099}.tar"; "{split}/*.tar" with data.splits.random=false where folders are the splits
    )
    caption_key: str = "caption"  # in KEY.json; KEY.txt is the caption itself
    category_key: str | None = None  # in KEY.json, for scores by category
    splits: SplitConfig = field(default_factory=_drawn)


@dataclass
class CacheConfig:
    """Features of the frozen encoder, computed once a clip."""

    # True, false, or auto: what the costs say. OmegaConf takes no bool | str from an interpolation.
    enabled: Any = follows("encoder.is_cached", False)
    # float16, bfloat16, float32, or int8: half the disk, with a scale for each token.
    dtype: str = only_with("enabled=true", lambda c: c.enabled is not False, "float16")
    # Keep them after projector.reducer=pool: a quarter of the disk with projector.pool_size=2.
    pooled: bool = only_with("enabled=true", lambda c: c.enabled is not False, False)
    # Of all features under paths.cache_dir; the longest unused ones go first.
    max_gib: float | None = only_with("enabled=true", lambda c: c.enabled is not False, None)

    def __post_init__(self) -> None:
        require(self.enabled in (True, False, "auto"), f"cache.enabled must be true, false or auto, not {self.enabled}")
        self.enabled = self.enabled if self.enabled == "auto" else bool(self.enabled)  # 0 and 1 are no other values
        require(
            self.max_gib is None or 0 < self.max_gib < inf,
            f"cache.max_gib must be above 0, or null for no limit, not {self.max_gib}",
        )
