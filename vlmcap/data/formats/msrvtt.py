"""MSR-VTT: a JSON object of `videos` (`video_id`, `split`, `category`, `url`) and `sentences`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vlmcap.config import MsrvttConfig
from vlmcap.data.formats.annotations import annotation_sources, checked, json_list, load_json, make_record, media_name
from vlmcap.data.formats.keys import Captions, captions_at, describe_keys, text_at
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.errors import UserError
from vlmcap.types import Skipped


def read_msrvtt(settings: MsrvttConfig, split: str | None = None) -> Entries:
    """Yield a record for each video with all its sentences (`video_id`, `caption`), in the order of `videos`.

    The group is the film that the video was taken from (`url`). `data.caption_key` is a path in a sentence,
    `data.category_key` one in a video.

    Raises:
        UserError: A file is not such an object, or no video can be used.
    """
    return checked(_entries(settings, split), settings)


def _entries(settings: MsrvttConfig, split: str | None) -> Entries:
    for name, address in annotation_sources(settings, split):
        content = load_json(address)
        videos, sentences = (json_list(content, address, key) for key in ("videos", "sentences"))
        captions = _captions_by_video(settings, sentences)
        for number, video in enumerate(videos):
            yield _record(settings, video, number, captions, name)
        for id in captions:  # those of videos have been removed
            yield skip(id or "a sentence", "the sentences belong to a video that is not in 'videos'")


def _captions_by_video(settings: MsrvttConfig, sentences: list[Any]) -> dict[str, Captions]:
    captions: defaultdict[str, list[Captions]] = defaultdict(list)
    for sentence in sentences:
        found = captions_at(sentence, settings.caption_key)
        # A sentence without a caption at the key counts as an empty one.
        captions[text_at(sentence, "video_id")].append(found if found.texts else Captions((), max(1, found.num_empty)))
    if sentences and not any(found.texts for of_video in captions.values() for found in of_video):
        raise UserError(
            f"no sentence has a caption at data.caption_key={settings.caption_key}, the first has "
            f"{describe_keys(sentences[0])}; set data.caption_key"
        )
    return {
        id: Captions(sum((found.texts for found in of_video), ()), sum(found.num_empty for found in of_video))
        for id, of_video in captions.items()
    }


def _record(
    settings: MsrvttConfig, video: Any, number: int, captions: dict[str, Captions], split: str
) -> Record | Skipped:
    id = text_at(video, "video_id")
    if not id:
        return skip(f"video {number}", "the video has no video_id")
    found = captions.pop(id, Captions(()))
    file = media_name(settings, id)
    if not found.texts:
        return skip(id, "no sentence of the video has a caption", file)
    split = split or text_at(video, "split")
    return make_record(settings, id, [file], found, video, split=split, group=text_at(video, "url"))
