"""Exchanges videos between clips, and compares captions and losses with own, exchanged and black videos."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from vlmcap.files import replacing
from vlmcap.metrics import score_each
from vlmcap.training.callbacks.scorer import CaptionScorer, Prediction
from vlmcap.types import Clip

OWN, SWAPPED, BLANKED = "own", "swapped", "blanked"
CONDITIONS = (OWN, SWAPPED, BLANKED)
_NUM_STANDARD_ERRORS = 2.0  # a mean difference within this many standard errors may be chance
_SMALL_DROP = 0.05  # share of the own score; a larger difference is not small, even if it may be chance
_SAME_VIDEO, _SAME_CATEGORY = 1000, 1  # costs; avoiding the same video always comes first


def swap_order(clips: Sequence[Clip], seed: int) -> list[int]:
    """Returns a permutation: for each clip, the index of the clip whose video it gets.

    No clip keeps its index. If possible, no clip gets its own video from another clip with the same file, nor a video
    of its own category.

    Args:
        clips: At least two clips.
        seed: Seed of the choice among the possible permutations.
    """
    assert len(clips) > 1
    shuffled = np.random.default_rng(seed).permutation(len(clips)).tolist()
    by_category = len({clip.category for clip in clips}) > 1
    # Clips of one group should not exchange videos among themselves: categories if there are several, else videos.
    groups: list[str | tuple[str, ...]] = [clip.category if by_category else _video(clip) for clip in clips]
    # Sort by group, then by video, each in the order of its first appearance in the shuffle.
    first: dict[tuple[object, ...], int] = {
        key: position
        # In reverse, so that the first appearance is written last and stays.
        for position, index in reversed([*enumerate(shuffled)])
        for key in (("group", groups[index]), _video(clips[index]))
    }
    by_group = sorted(shuffled, key=lambda index: (first["group", groups[index]], first[_video(clips[index])]))
    # A rotation by the size of the largest group moves every clip out of its group, unless that group is over half.
    # One group of all clips would give a rotation by 0, which exchanges nothing.
    shift = max(Counter(groups).values()) % len(clips) or 1
    order = [0] * len(clips)
    for position, index in enumerate(by_group):
        order[index] = by_group[(position + shift) % len(by_group)]
    return _reduce_cost(clips, order)


def cost(clip: Clip, other: Clip) -> int:
    """Returns the cost of giving a clip the video of another one."""
    if _video(clip) == _video(other):
        return _SAME_VIDEO
    return _SAME_CATEGORY if clip.category and clip.category == other.category else 0


def _reduce_cost(clips: Sequence[Clip], order: list[int]) -> list[int]:
    """Swaps pairs of clips as long as a swap reduces the total cost."""
    costs = [cost(clip, clips[other]) for clip, other in zip(clips, order, strict=True)]
    is_better = True
    while is_better and any(costs):
        is_better = False
        # Only clips with a cost can gain; the other one of a pair may be any clip.
        for one in [index for index, value in enumerate(costs) if value]:
            for two in range(len(clips)):
                # After this swap, a clip would have its own video.
                if order[two] == one or order[one] == two:
                    continue
                new = cost(clips[one], clips[order[two]]), cost(clips[two], clips[order[one]])
                if sum(new) < costs[one] + costs[two]:
                    order[one], order[two] = order[two], order[one]
                    costs[one], costs[two] = new
                    is_better = True
    return order


def _video(clip: Clip) -> tuple[str, ...]:
    return ("video", *(clip.frames or (clip.video,)))


@dataclass(frozen=True, slots=True)
class Observation:
    """Loss and caption of one clip with one video.

    Attributes:
        condition: The video, one of `CONDITIONS`.
        clip_id: Id of the clip whose caption is the label.
        loss: Loss in nats, summed over the label tokens.
        num_tokens: Number of label tokens.
        text: Generated caption; None if only the loss is measured.
    """

    condition: str
    clip_id: str
    loss: float
    num_tokens: int
    text: str | None = None


@dataclass(frozen=True, slots=True)
class VisualReliance:
    """Comparison over the clips that could be read with all three videos.

    Attributes:
        clips: N clips with their own videos.
        swapped: N clips whose videos they got.
        seen: Observations by condition, in the order of `clips`.
        ciders: CIDEr of each clip by condition; empty without captions.
        scores: Scores by condition: `loss` (nats per label token) and, with captions, `cider` and `facts/*`.
    """

    clips: tuple[Clip, ...]
    swapped: tuple[Clip, ...]
    seen: Mapping[str, Sequence[Observation]]
    ciders: Mapping[str, Sequence[float]]
    scores: Mapping[str, Mapping[str, float]]

    @property
    def has_captions(self) -> bool:
        """Whether captions were generated."""
        return bool(self.ciders)

    @property
    def is_blind(self) -> bool:
        """Whether another clip's video is as good as the own one, by CIDEr or, without captions, by the loss."""
        if self.has_captions:
            return is_near_zero(
                self.ciders[OWN],
                [own - other for own, other in zip(self.ciders[OWN], self.ciders[SWAPPED], strict=True)],
            )
        own, swapped = ([one.loss / one.num_tokens for one in self.seen[name]] for name in (OWN, SWAPPED))
        # A loss is better when it is lower, so the difference has the other sign.
        return is_near_zero(own, [other - one for one, other in zip(own, swapped, strict=True)])

    def named(self) -> dict[str, float]:
        """Returns scores by name: `visual_reliance/<condition>/<score>`, `cider_drop`, `facts_drop` and `loss_rise`.

        The last three are above 0 for a model that uses the video.
        """
        named = {
            f"visual_reliance/{name}/{score}": value
            for name, condition_scores in self.scores.items()
            for score, value in condition_scores.items()
        }
        for score, label, sign in (
            ("cider", "cider_drop", 1),
            ("facts/mean", "facts_drop", 1),
            ("loss", "loss_rise", -1),
        ):
            if score in self.scores[OWN]:
                for name in (SWAPPED, BLANKED):
                    named[f"visual_reliance/{name}/{label}"] = sign * (
                        self.scores[OWN][score] - self.scores[name][score]
                    )
        return named | {"visual_reliance/is_blind": float(self.is_blind)}

    def sentence(self) -> str:
        """Returns the result in one line."""
        score, label = ("cider", "CIDEr") if self.has_captions else ("loss", "loss")
        own, swapped, blanked = (self.scores[name][score] for name in CONDITIONS)
        return (
            f"{label} {own:.3f} with the own video, {swapped:.3f} with another clip's, {blanked:.3f} with a black one"
        )


def is_near_zero(own: Sequence[float], drops: Sequence[float]) -> bool:
    """Returns whether the mean drop is small, and within what chance gives for a model that ignores the video.

    Args:
        own: N scores with the own videos, N at least 2.
        drops: N differences to the scores with another clip's video.
    """
    # Standard error of the mean over clips.
    mean, error = fmean(drops), stdev(drops) / math.sqrt(len(drops))
    return mean <= _SMALL_DROP * fmean(own) and mean <= _NUM_STANDARD_ERRORS * error


def compare(
    clips: Sequence[Clip], order: Sequence[int], seen: Sequence[Observation], scorer: CaptionScorer
) -> VisualReliance | None:
    """Compares the clips that could be read with every video; None if there are fewer than two.

    Args:
        clips: Clips with their own videos.
        order: For each clip, the index of the clip whose video it got.
        seen: Observations of all ranks, in any order.
        scorer: Scorer of the captions, if there are any.
    """
    # 1. Keep the clips that were observed under every condition.
    by_key = {(one.condition, one.clip_id): one for one in seen}
    indices = [index for index, clip in enumerate(clips) if all((name, clip.id) in by_key for name in CONDITIONS)]
    if len(indices) < 2:
        return None
    kept = {name: [by_key[name, clips[index].id] for index in indices] for name in CONDITIONS}
    # 2. Compare their losses and, if captions were generated, the scores of these.
    scores = {
        name: {"loss": sum(one.loss for one in group) / sum(one.num_tokens for one in group)}
        for name, group in kept.items()
    }
    ciders: dict[str, list[float]] = {}
    if all(one.text is not None for group in kept.values() for one in group):
        for name, group in kept.items():
            # An empty caption is a caption.
            predictions = [Prediction(clips[index], one.text or "") for index, one in zip(indices, group, strict=True)]
            scores[name] |= scorer.score(predictions, metrics=("cider",))
            texts = [prediction.text for prediction in predictions]
            references = [prediction.clip.captions for prediction in predictions]
            ciders[name] = [each["cider"] for each in score_each(texts, references, tokenizer=scorer.tokenizer)]
    return VisualReliance(
        tuple(clips[index] for index in indices), tuple(clips[order[index]] for index in indices), kept, ciders, scores
    )


def write_visual_reliance(path: Path, result: VisualReliance) -> None:
    """Writes one JSON object per clip: `id`, `video`, `swapped_video`, `references` and one object per condition.

    The file is written atomically.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for index, (clip, other) in enumerate(zip(result.clips, result.swapped, strict=True)):
            record: dict[str, object] = {
                "id": clip.id,
                "video": clip.video,
                "swapped_video": other.video,
                "references": [*clip.captions],
            }
            for name in CONDITIONS:
                one = result.seen[name][index]
                observed: dict[str, object] = {"loss": round(one.loss / one.num_tokens, 6)}
                if result.has_captions:
                    observed |= {"prediction": one.text, "cider": round(result.ciders[name][index], 6)}
                record[name] = observed
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
