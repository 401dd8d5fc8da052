"""AI Hub data sets: one label file per clip, paired with it by name, in folders or in AI Hub's archives."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vlmcap.config import AihubConfig
from vlmcap.data.formats.keys import captions_at, text_at, why_no_caption
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.data.media import MediaError, read_text
from vlmcap.data.media.tree import IMAGE_ENDINGS, VIDEO_ENDINGS, TreeFile, list_files
from vlmcap.data.splits import split_in_path, standard_split
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped

MAX_LABEL_BYTES = 64 * 1024**2

# Folders, and prefixes of folder names, that distinguish labels from clips; ignored when the two are compared.
# Matches "labels", "1.라벨링데이터" and "원천데이터".
_KIND_FOLDER = re.compile(r"(\d+[.\s_-]*)?(labels?|videos?|라벨(링)?(데이터)?|원천(데이터)?)", re.IGNORECASE)
# Matches the start of "[라벨]도시", "TL_도시" and "VS1.zip".
_KIND_START = re.compile(r"\[(라벨|원천)[^\]]*\]\s*|[TV][LS](?=[_\-.\d])[_\-.]?")


@dataclass(frozen=True, slots=True)
class _Named:
    """A label or a clip.

    Attributes:
        file: Its file.
        split: Its split; "" if no folder names one.
        key: Its path without the ending and everything that only distinguishes labels from clips.
    """

    file: TreeFile
    split: str
    key: str

    @property
    def stem(self) -> str:
        return self.key.rpartition("/")[2]


def read_aihub(settings: AihubConfig, split: str | None = None) -> Entries:
    """Yields the clips of labels, sorted by path.

    The layout is `{root}/{split}/{videos,labels}/…`, or labels and clips anywhere below the root.

    A label and its clip have the same path below their folders, up to the ending, or else a stem that no other file
    has. A folder named like a split (`train`, `Training`, `2.Validation`) gives the split; labels elsewhere have none.
    Archives count as folders.

    Args:
        settings: Configuration of the data set; `root`, `caption_key` and `category_key` are used.
        split: Split to read; None for all.

    Raises:
        UserError: There are no labels, or a link leaves the root.
    """
    labels: list[_Named] = []
    media: list[_Named] = []
    for file in list_files(settings.root, "follow" if settings.allow_outside else "refuse"):
        if isinstance(file, Skipped):
            if split is None or split_in_path(f"{file.clip.id}/")[0] in ("", standard_split(split)):
                yield file
            continue
        ending = PurePosixPath(file.path).suffix.lower()
        if ending == ".json":
            labels.append(_named(file))
        elif ending in VIDEO_ENDINGS or ending in IMAGE_ENDINGS:
            media.append(_named(file))
    if not labels:
        raise UserError(
            f"{settings.root} contains {len(media)} clips but no labels (.json); set data.root to the folder that "
            "contains both"
        )
    if any(label.split for label in labels):  # a stray .json outside the splits is not a label
        stems = {clip.stem for clip in media if not clip.split}
        labels = [label for label in labels if label.split or label.stem in stems]
    for name in sorted({label.split for label in labels}):
        if split is None or name in ("", standard_split(split)):
            pairs = _pair(
                [label for label in labels if label.split == name], [clip for clip in media if clip.split == name]
            )
            for label, clip_id, clip in pairs:
                yield clip if isinstance(clip, Skipped) else _read_label(label, clip_id, clip.file.address, settings)


def _named(file: TreeFile) -> _Named:
    split, path = split_in_path(file.path)
    *folders, name = path.split("/")
    kept = [_KIND_START.sub("", folder, count=1) for folder in folders if not _KIND_FOLDER.fullmatch(folder)]
    return _Named(file, split, "/".join([*filter(None, kept), PurePosixPath(name).stem]))


def _pair(labels: Sequence[_Named], media: Sequence[_Named]) -> Iterator[tuple[_Named, str, _Named | Skipped]]:
    """Yields each label with its id and its clip, or with what is wrong, sorted by path."""
    # By the path without its kind: labels/city/a.json and videos/city/a.mp4.
    clips_at = {key: _videos_first(group) for key, group in _grouped(media, "key").items()}
    labels_at = _grouped(labels, "key")
    # Files without a counterpart of the same path are compared by their stem alone.
    free_labels = _grouped((label for label in labels if label.key not in clips_at), "stem")
    free_clips = {
        stem: _videos_first(group)
        for stem, group in _grouped((c for c in media if c.key not in labels_at), "stem").items()
    }
    for label in sorted(labels, key=lambda label: (label.key, label.file.path)):
        is_exact = label.key in clips_at
        # Labels that claim the same clip; more than one is an error.
        rivals = labels_at[label.key] if is_exact or len(labels_at[label.key]) > 1 else free_labels[label.stem]
        clips = clips_at[label.key] if is_exact else free_clips.get(label.stem, [])
        if reason := _pairing_problem(label, clips, rivals):
            yield label, label.key, skip(label.key, reason, clips[0].file.address if clips else "")
        else:
            yield label, label.key if is_exact or label.stem in labels_at else label.stem, clips[0]


def _pairing_problem(label: _Named, clips: Sequence[_Named], rivals: Sequence[_Named]) -> str:
    name = label.file.address
    if not clips:
        return f"there is no clip for the label {name}; add {label.stem}.mp4, or remove the label"
    if len(clips) > 1:
        first, second = clips[0].file.address, clips[1].file.address
        return f"both {first} and {second} could be the clip of the label {name}; remove one of them"
    if len(rivals) > 1:
        other = next(rival for rival in rivals if rival is not label)
        return (
            f"the labels {name} and {other.file.address} belong to the same clip, {clips[0].file.address}; "
            "remove one of them"
        )
    return ""


def _grouped(files: Iterable[_Named], name: str) -> Mapping[str, list[_Named]]:
    groups: dict[str, list[_Named]] = defaultdict(list)
    for file in files:
        groups[getattr(file, name)].append(file)
    return dict(groups)


def _videos_first(files: list[_Named]) -> list[_Named]:
    """Returns the videos among files of one name, as the pictures are then previews; the pictures if there are none."""
    videos = [file for file in files if PurePosixPath(file.file.path).suffix.lower() in VIDEO_ENDINGS]
    return videos or files


def _read_label(label: _Named, clip_id: str, video: str, settings: AihubConfig) -> Record | Skipped:
    name = label.file.address
    try:
        content: Any = json.loads(read_text(name, MAX_LABEL_BYTES))
    except MediaError as error:
        return skip(clip_id, str(error), video)
    except (ValueError, RecursionError) as error:
        return skip(clip_id, f"the label {name} is not JSON ({error}); repair or remove it", video)
    captions = captions_at(content, settings.caption_key)
    if not captions.texts:
        why = f"no caption at data.caption_key={settings.caption_key}{why_no_caption(content, settings.caption_key)}"
        return skip(clip_id, f"the label {name} has {why}; set data.caption_key, or repair or remove the label", video)
    category = text_at(content, settings.category_key) if settings.category_key else ""
    return Record(Clip(clip_id, video, captions.texts, category), label.split, num_empty=captions.num_empty)
