"""Which clip gets which other clip's video, and what captions and losses with exchanged and black videos come to."""

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
_NUM_ERRORS = 2.0  # standard errors of the mean difference that chance may make
_NEAR = 0.05  # of the own score: a larger difference may be chance, but is no small one
_SAME_VIDEO, _SAME_CATEGORY = 1000, 1  # no number of the latter is worth one of the former


def swap_order(clips: Sequence[Clip], seed: int) -> list[int]:
    """A permutation: the index of the clip whose video each clip gets.

    No clip keeps its own; where it can be avoided, none gets its own video under another clip's name, nor one of its
    own category.

    Args:
        clips: At least two.
        seed: Of the choice among the permutations that do.
    """
    assert len(clips) > 1
    shuffled = np.random.default_rng(seed).permutation(len(clips)).tolist()
    by_category = len({clip.category for clip in clips}) > 1
    groups: list[str | tuple[str, ...]] = [clip.category if by_category else _video(clip) for clip in clips]
    # Groups, and videos in them, stand together in the order in which the shuffle meets them first.
    first: dict[tuple[object, ...], int] = {
        key: place
        for place, index in reversed([*enumerate(shuffled)])
        for key in (("group", groups[index]), _video(clips[index]))
    }
    placed = sorted(shuffled, key=lambda index: (first["group", groups[index]], first[_video(clips[index])]))
    # Turned by the size of the largest group nobody meets their own, unless that group is more than half of all.
    turn = max(Counter(groups).values()) % len(clips) or 1
    order = [0] * len(clips)
    for place, index in enumerate(placed):
        order[index] = placed[(place + turn) % len(placed)]
    return _mend(clips, order)


def cost(clip: Clip, other: Clip) -> int:
    """How bad it is to give a clip the video of another."""
    if _video(clip) == _video(other):
        return _SAME_VIDEO
    return _SAME_CATEGORY if clip.category and clip.category == other.category else 0


def _mend(clips: Sequence[Clip], order: list[int]) -> list[int]:
    """Exchanges between two clips as long as one makes it better."""
    costs = [cost(clip, clips[other]) for clip, other in zip(clips, order, strict=True)]
    is_better = True
    while is_better and any(costs):
        is_better = False
        for one in [index for index, value in enumerate(costs) if value]:
            for two in range(len(clips)):
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
class Seen:
    """What the model made of one clip's label with one video.

    Attributes:
        condition: Which video: one of `CONDITIONS`.
        clip_id: Of the clip whose caption is the label.
        loss: Summed over the label's tokens, in nats.
        num_tokens: Label tokens.
        text: The caption that it wrote; None where none was asked for.
    """

    condition: str
    clip_id: str
    loss: float
    num_tokens: int
    text: str | None = None


@dataclass(frozen=True, slots=True)
class VisualReliance:
    """Clips that were seen with all three videos.

    Attributes:
        clips: N, with their own videos.
        swapped: N, the clips whose videos they got.
        seen: Condition to what was seen, in the order of `clips`.
        ciders: Condition to each clip's CIDEr; empty without captions.
        scores: Condition to its scores: loss (nats a label token), and with captions cider and facts/*.
    """

    clips: tuple[Clip, ...]
    swapped: tuple[Clip, ...]
    seen: Mapping[str, Sequence[Seen]]
    ciders: Mapping[str, Sequence[float]]
    scores: Mapping[str, Mapping[str, float]]

    @property
    def has_captions(self) -> bool:
        """Whether captions were written."""
        return bool(self.ciders)

    @property
    def is_blind(self) -> bool:
        """Whether another clip's video is as good as the own one.

        By CIDEr where there are captions, otherwise by the loss.
        """
        if self.has_captions:
            return is_near_zero(
                self.ciders[OWN],
                [own - other for own, other in zip(self.ciders[OWN], self.ciders[SWAPPED], strict=True)],
            )
        own, swapped = ([one.loss / one.num_tokens for one in self.seen[name]] for name in (OWN, SWAPPED))
        return is_near_zero(own, [other - one for one, other in zip(own, swapped, strict=True)])

    def named(self) -> dict[str, float]:
        """`visual_reliance/<condition>/<score>` and the drops, `cider_drop`, `facts_drop` and `loss_rise`.

        Above 0 for a model that looks.
        """
        named = {
            f"visual_reliance/{name}/{score}": value
            for name, own in self.scores.items()
            for score, value in own.items()
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
        """One line for people."""
        score, label = ("cider", "CIDEr") if self.has_captions else ("loss", "loss")
        own, swapped, blanked = (self.scores[name][score] for name in CONDITIONS)
        return (
            f"{label} {own:.3f} with the own video, {swapped:.3f} with another clip's, {blanked:.3f} with a black one"
        )


def is_near_zero(own: Sequence[float], drops: Sequence[float]) -> bool:
    """Whether the mean drop is small, and no larger than chance makes it for a model that does not look.

    Args:
        own: N scores with the own videos; N at least 2.
        drops: N, how much worse each is with another's.
    """
    mean, error = fmean(drops), stdev(drops) / math.sqrt(len(drops))
    return mean <= _NEAR * fmean(own) and mean <= _NUM_ERRORS * error


def compare(
    clips: Sequence[Clip], order: Sequence[int], seen: Sequence[Seen], scorer: CaptionScorer
) -> VisualReliance | None:
    """The comparison over the clips that could be read with every video; None where they are fewer than two.

    Args:
        clips: With their own videos.
        order: The index of the clip whose video each got.
        seen: Of all ranks, in any order.
        scorer: Of captions, where there are some.
    """
    by_key = {(one.condition, one.clip_id): one for one in seen}
    rows = [row for row, clip in enumerate(clips) if all((name, clip.id) in by_key for name in CONDITIONS)]
    if len(rows) < 2:
        return None
    kept = {name: [by_key[name, clips[row].id] for row in rows] for name in CONDITIONS}
    scores = {
        name: {"loss": sum(one.loss for one in own) / sum(one.num_tokens for one in own)} for name, own in kept.items()
    }
    ciders: dict[str, list[float]] = {}
    if all(one.text is not None for own in kept.values() for one in own):
        for name, own in kept.items():
            predictions = [Prediction(clips[row], one.text or "") for row, one in zip(rows, own, strict=True)]
            scores[name] |= scorer.score(predictions, metrics=("cider",))
            texts, references = [row.text for row in predictions], [row.clip.captions for row in predictions]
            ciders[name] = [each["cider"] for each in score_each(texts, references, tokenizer=scorer.tokenizer)]
    return VisualReliance(
        tuple(clips[row] for row in rows), tuple(clips[order[row]] for row in rows), kept, ciders, scores
    )


def write_visual_reliance(path: Path, found: VisualReliance) -> None:
    """One JSON object a clip, `id, video, swapped_video, references` and a condition each.

    The file appears whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row, (clip, other) in enumerate(zip(found.clips, found.swapped, strict=True)):
            record: dict[str, object] = {
                "id": clip.id,
                "video": clip.video,
                "swapped_video": other.video,
                "references": [*clip.captions],
            }
            for name in CONDITIONS:
                one = found.seen[name][row]
                own: dict[str, object] = {"loss": round(one.loss / one.num_tokens, 6)}
                if found.has_captions:
                    own |= {"prediction": one.text, "cider": round(found.ciders[name][row], 6)}
                record[name] = own
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
