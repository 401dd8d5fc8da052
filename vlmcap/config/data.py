"""Settings of the data: location and format of clips, splits, decoding, batching and caching."""

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
    """Size of the procedural demo data set."""

    num_train: int = 2000  # training clips
    num_val: int = 100  # validation clips
    num_test: int = 200  # test clips
    seed: int = 0  # seed of the clips

    def __post_init__(self) -> None:
        require_positive("data.demo", self, "num_train", "num_val", "num_test")
        require_seed("data.demo.seed", self.seed)


@dataclass
class SplitConfig:
    """Random splits for a data set that has none.

    Clips with the same source stay together. The split is chosen by a hash, so a growing data set keeps its splits.
    """

    random: bool = False  # draw the splits; false takes them from folders or fields of the data set
    val: float = only_with("random=true", lambda c: c.random, 0.05)  # share of sources in the validation split
    test: float = only_with("random=true", lambda c: c.random, 0.05)  # share of sources in the test split
    seed: int = only_with("random=true", lambda c: c.random, 0)  # seed of the hash
    # Regular expression for the clip id whose first group is the source; null takes the video itself as source.
    group_pattern: str | None = only_with("random=true", lambda c: c.random, None)

    def __post_init__(self) -> None:
        require(
            self.val >= 0 and self.test >= 0 and self.val + self.test < 1,
            "data.splits.val and data.splits.test must not be negative, and their sum must be below 1",
        )
        require_seed("data.splits.seed", self.seed)


@dataclass
class AugmentConfig:
    """Augmentation of training frames that keeps captions valid; frames are not flipped, as captions name sides."""

    color: float = 0.0  # largest relative change of brightness, contrast and saturation, 0 to 0.5; 0 is off
    crop: float = 0.0  # largest share that is cropped from each side, the same in all frames, 0 to 0.5; 0 is off
    jitter: float = 0.0  # largest shift of a frame in time, as a share of its segment, 0 to 0.5; 0 is off

    def __post_init__(self) -> None:
        for name in ("color", "crop", "jitter"):
            require(0 <= getattr(self, name) <= 0.5, f"data.augment.{name} must be 0 to 0.5, not {getattr(self, name)}")

    @property
    def is_on(self) -> bool:
        """Whether any augmentation is on."""
        return any((self.color, self.crop, self.jitter))


@dataclass
class DataConfig:
    """Location of clips and captions, and how they are read."""

    name: str = MISSING  # name of the data set in titles and tables
    kind: str = MISSING  # kind of format, which selects the schema
    root: str = MISSING  # folder of the data set
    allow_outside: bool = False  # allow annotations to name files outside of root
    splits: SplitConfig = field(default_factory=SplitConfig)
    split: Split = Split.test  # the split that evaluate.py scores
    num_frames: int = follows("hardware.num_frames", 8)  # frames per clip
    sampling: Sampling = Sampling.uniform  # which frames of a clip are used
    # Frames per second of video, up to num_frames in total.
    fps: float = only_with("sampling=fps", lambda c: c.sampling is Sampling.fps, 1.0)
    variable_frames: bool = False  # let images and short clips have fewer frames than num_frames; false repeats frames
    decoder: Decoder = Decoder.pyav  # library that decodes videos
    batch_size: int = follows("hardware.batch_size", 1)  # clips per micro-batch and device
    # Clips that are captioned together; null takes as many as the memory plan allows.
    eval_batch_size: int | None = None
    batching: Batching = Batching.shuffled  # which clips share a batch
    # Tokens per batch (visual tokens, prompt, caption and padding), in place of batch_size.
    max_tokens_per_batch: int | None = None
    num_workers: int = follows("hardware.num_workers", 2)  # worker processes per loader; 0 loads in the main process
    max_clips: int | None = None  # largest number of training clips, the first in a seeded order; null uses all
    max_bad_fraction: float = 0.02  # share of unreadable clips above which the run stops, 0 to 1
    decode_timeout_s: float = 60.0  # seconds per clip after which decoding is stopped and the clip is skipped
    decode_memory_gib: float = only_with("is_isolated=true", lambda c: c.is_isolated, 4.0)  # GiB per decoding process
    is_isolated: bool = True  # decode in a child process, so that a crash or a hang does not stop the run
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # augmentation of training frames

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
            f"data.max_tokens_per_batch={budget} needs batches of clips with similar lengths; set "
            "data.batching=by_length or packed",
        )
        require(
            budget is not None or batching is not Batching.packed,
            "data.batching=packed packs clips into sequences of data.max_tokens_per_batch tokens, which has no value; "
            "set it, for example to 4096",
        )

    @property
    def is_demo(self) -> bool:
        """Whether the clips are rendered on first use."""
        return False

    @property
    def changed_by(self) -> str | None:
        """The setting by which a clip's frames differ between epochs, as `key=value`; None if there is none."""
        if self.sampling is Sampling.random:
            return "data.sampling=random"
        on = [name for name in ("color", "crop", "jitter") if getattr(self.augment, name)]
        return f"data.augment.{on[0]}={getattr(self.augment, on[0])}" if on else None


@register("data")
@dataclass
class AihubConfig(DataConfig):
    """AI Hub layout, which pairs videos and label files by name."""

    kind: str = "aihub"  # kind of format
    caption_key: str = "annotation.description_kr"  # dotted path of the caption in a label file
    category_key: str | None = None  # dotted path of the category in a label file, for scores by category


@register("data")
@dataclass
class DemoDataConfig(AihubConfig):
    """Procedural demo data set in AI Hub layout."""

    kind: str = "demo"  # kind of format
    root: str = follows("${paths.cache_dir}/demo", MISSING)  # folder of the rendered clips
    demo: DemoConfig = field(default_factory=DemoConfig)  # size of the demo

    @property
    def is_demo(self) -> bool:
        """Whether the clips are rendered on first use."""
        return True


@dataclass
class AnnotatedConfig(DataConfig):
    """Formats whose captions are in annotation files."""

    annotations: str = MISSING  # annotation file below root, or a pattern of files


@dataclass
class MediaConfig(AnnotatedConfig):
    """Formats whose annotation entries name videos and images."""

    media: str = ""  # folder of videos and images below root
    category_key: str | None = None  # dotted path of the category in an entry, for scores by category


@dataclass
class KeyedConfig(MediaConfig):
    """Formats whose annotation entries have a caption at a key."""

    caption_key: str = "caption"  # dotted path of the caption in an entry


@dataclass
class PatternConfig(KeyedConfig):
    """Formats whose annotation entries have an id but no file name."""

    media_pattern: str = "{id}.mp4"  # file of a clip below media


@register("data")
@dataclass
class JsonlConfig(KeyedConfig):
    """One JSON object per line."""

    kind: str = "jsonl"  # kind of format
    annotations: str = "*.jsonl"  # annotation file below root, or a pattern of files


@register("data")
@dataclass
class CocoKoConfig(KeyedConfig):
    """COCO images with Korean captions."""

    kind: str = "coco_ko"  # kind of format
    annotations: str = "MSCOCO_train_val_Korean.json"  # annotation file below root, or a pattern of files
    caption_key: str = "caption_ko"  # dotted path of the caption in an entry
    split: Split = Split.val  # the split that evaluate.py scores; there is no test split
    variable_frames: bool = True  # an image is one frame


@register("data")
@dataclass
class NiklConfig(PatternConfig):
    """Image captions of the National Institute of Korean Language."""

    kind: str = "nikl"  # kind of format
    annotations: str = "*{split}*.jsonl"  # annotation file below root, or a pattern of files
    media_pattern: str = "{id}.jpg"  # file of an image below media; {id} is the value of `input` without a suffix
    caption_key: str = "output"  # dotted path of the caption in an entry
    variable_frames: bool = True  # an image is one frame


@register("data")
@dataclass
class MsrvttConfig(PatternConfig):
    """MSR-VTT."""

    kind: str = "msrvtt"  # kind of format
    annotations: str = "*videodatainfo*.json"  # annotation file below root, or a pattern of files
    media: str = "videos"  # folder of videos below root
    category_key: str | None = "category"  # key of a video's category number, for scores by category


@register("data")
@dataclass
class VatexConfig(PatternConfig):
    """VATEX."""

    kind: str = "vatex"  # kind of format
    annotations: str = "*{split}*.json"  # annotation file below root, or a pattern of files
    media: str = "videos"  # folder of videos below root
    caption_key: str = "koCap"  # key of Korean translations; the original has enCap and chCap


def _random_splits() -> SplitConfig:
    return SplitConfig(random=True)


@register("data")
@dataclass
class LlavaConfig(MediaConfig):
    """LLaVA conversations, whose first answer is the caption."""

    kind: str = "llava"  # kind of format
    annotations: str = "*.json*"  # annotation file below root, or a pattern of files
    splits: SplitConfig = field(default_factory=_random_splits)  # how clips are split


@register("data")
@dataclass
class WebdatasetConfig(AnnotatedConfig):
    """WebDataset shards, on disk or in an object store."""

    kind: str = "webdataset"  # kind of format
    # Shards, such as "clips-{000..099}.tar", or "{split}/*.tar" with data.splits.random=false if folders are splits.
    annotations: str = "*.tar"
    caption_key: str = "caption"  # dotted path of the caption in KEY.json; KEY.txt is the caption itself
    category_key: str | None = None  # dotted path of the category in KEY.json, for scores by category
    splits: SplitConfig = field(default_factory=_random_splits)  # how clips are split


@dataclass
class CacheConfig:
    """Features of the frozen encoder, computed once per clip and stored on disk."""

    # Any, because OmegaConf does not accept bool | str from an interpolation.

    # Store features: true, false, or auto, which estimates whether it saves time.
    enabled: Any = follows("encoder.is_cached", False)
    # Type of stored features: float16, bfloat16, float32, or int8 with a scale per token, which halves the disk space.
    dtype: str = only_with("enabled=true", lambda c: c.enabled is not False, "float16")
    # Store features after projector.reducer=pool, which takes a quarter of the disk space with projector.pool_size=2.
    pooled: bool = only_with("enabled=true", lambda c: c.enabled is not False, False)
    # Largest size in GiB of all features under paths.cache_dir; the least recently used ones are removed first.
    max_gib: float | None = only_with("enabled=true", lambda c: c.enabled is not False, None)

    def __post_init__(self) -> None:
        require(self.enabled in (True, False, "auto"), f"cache.enabled must be true, false or auto, not {self.enabled}")
        self.enabled = self.enabled if self.enabled == "auto" else bool(self.enabled)  # 0 and 1 equal false and true
        require(
            self.max_gib is None or 0 < self.max_gib < inf,
            f"cache.max_gib must be above 0, or null for no limit, not {self.max_gib}",
        )
