"""Scores the captions of runs per clip, resamples the scores, and decides which runs are comparable."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmcap.config import EvaluationConfig
from vlmcap.errors import UserError
from vlmcap.metrics import FactLexicon, get_tokenizer
from vlmcap.metrics.clip_metrics import COUNTED, ClipMetric, clip_scores, is_clip_score, mean_metric
from vlmcap.metrics.significance import Resampled, resampled, resampled_sums
from vlmcap.metrics.tokenizers import Tokenizer
from vlmcap.reporting.report.captions import Captions
from vlmcap.reporting.report.folders import RunFolder

RESAMPLES = 2000
_SEED = 0
# Scores of clips that are read from the file, because their mean over clips is the score of the corpus.
_FROM_FILE = ("cider", "cider_d", "rouge_l")
# Prefixes of metrics that depend on the tokenizer.
_BY_TOKENS = (*COUNTED, "meteor", "length_ratio", "repetition_rate", "self_bleu", "swapped/", "category/")
_BATCH_ELEMENTS = 1 << 24  # numbers that are resampled at a time


def score_clips(
    run: RunFolder, split: str, captions: Captions, wanted: str, tokenizer: str | None
) -> tuple[Captions, dict[str, ClipMetric]]:
    """Scores the captions of one file, as far as the file does not contain the scores already.

    Args:
        run: Run of the captions, which receives scores and warnings.
        split: Split of the captions.
        captions: Captions, with or without scores.
        wanted: Metric to compute if the file does not contain it; empty for none.
        tokenizer: Name of the tokenizer that scores all captions again; None keeps existing scores.

    Returns:
        The captions with scores, and the metrics that can be resampled by name without the split.

    Raises:
        UserError: The tokenizer is unknown or not installed.
    """
    metrics = {name: mean_metric(name, captions.scores[name]) for name in _FROM_FILE if name in captions.scores}
    # 1. CIDEr, which the file may lack, or which was computed with another tokenizer.
    if tokenizer is not None or "cider" not in metrics:
        chosen = get_tokenizer(tokenizer) if tokenizer is not None else _tokenizer_of(run, captions)
        # CIDEr's document frequencies need at least two clips.
        if len(captions) > 1:
            metrics |= clip_scores("cider", captions.texts, captions.references, tokenizer=chosen)
            each = {name: metrics[name].values[:, 0] for name in _FROM_FILE}
            captions = dataclasses.replace(captions, scores=each, tokenizer=f"{chosen.name} ({chosen.version})")
    # 2. The metric of the report.
    if wanted and wanted not in metrics and is_clip_score(wanted):
        metrics |= _computed(run, captions, wanted)
    # 3. Compare with the run's own scores.
    _check_scores(run, split, metrics, is_new=tokenizer is not None)
    return captions, metrics


def resample(metrics: Sequence[Mapping[str, ClipMetric]], sets: Sequence[str]) -> list[dict[str, Resampled]]:
    """Computes each score on resampled clips, with the same resampled clips for all runs of a set.

    Args:
        metrics: Metrics of each run on one split.
        sets: Set of clips of each run: equal for runs with the same clips.
    """
    members: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, (names, clip_set) in enumerate(zip(metrics, sets, strict=True)):
        members[clip_set] += [(index, name) for name in names]
    samples: list[dict[str, Resampled]] = [{} for _ in metrics]
    for left in members.values():
        while left:  # in batches, because the columns of all runs together may take gigabytes
            # Metrics of one batch, by the size of the first one's columns.
            size = max(1, _BATCH_ELEMENTS // max(1, metrics[left[0][0]][left[0][1]].values.size))
            batch, left = left[:size], left[size:]
            chosen = [metrics[index][name] for index, name in batch]
            # The columns of all metrics are summed over resampled clips in one product, then split by metric.
            ends = np.cumsum([metric.values.shape[1] for metric in chosen])[:-1]
            chunks = [
                np.split(sums, ends, axis=1)
                for sums in resampled_sums([metric.values for metric in chosen], RESAMPLES, _SEED)
            ]
            for position, (index, name) in enumerate(batch):
                scores = np.concatenate([chosen[position].score(chunk[position]) for chunk in chunks])  # (resamples,)
                samples[index][name] = resampled(chosen[position], scores, _SEED)
    return samples


def comparable(metric: str, captions: Sequence[Captions | None]) -> list[str]:
    """Returns why each run is not comparable with the majority; empty for the majority.

    The majority is the largest number of runs with the same clips, references and tokenizer.

    Args:
        metric: Metric without its split; some do not depend on the tokenizer.
        captions: Captions of each run that has the metric, on its split.
    """
    has_tokens = metric.startswith(_BY_TOKENS)
    keys = [None if one is None else (one.digest, one.tokenizer if has_tokens else "") for one in captions]
    known = [key for key in keys if key is not None]
    if not known:
        return [""] * len(captions)
    # Of equally common keys, the one with the most clips counts.
    sizes = {key: len(one) for key, one in zip(keys, captions, strict=True) if one is not None}
    # First by the number of runs, then by the number of clips.
    majority = max(dict.fromkeys(known), key=lambda key: (known.count(key), sizes[key]))
    typical = next(one for key, one in zip(keys, captions, strict=True) if key == majority)
    assert typical is not None
    return ["" if key == majority else _why_not(one, typical) for key, one in zip(keys, captions, strict=True)]


def _why_not(captions: Captions | None, typical: Captions) -> str:
    if captions is None:
        return "Not compared: its captions are missing, so it may have been scored on other clips."
    if captions.ids != typical.ids:
        return f"Not compared: its {len(captions)} clips differ from the {len(typical)} clips of most runs."
    if captions.digest != typical.digest:
        return "Not compared: its references differ from those of most runs."
    return (
        f"Not compared: it was scored with {captions.tokenizer or 'an unknown tokenizer'}, most runs with "
        f"{typical.tokenizer or 'an unknown one'}; add --tokenizer mecab_ko to score all captions again."
    )


def find_lexicon(runs: Sequence[RunFolder]) -> FactLexicon | None:
    """Reads the facts of the first run whose file of facts still exists; returns None if there is none."""
    for path in dict.fromkeys(run.config.get("evaluation.facts") for run in runs):
        with contextlib.suppress(UserError):
            if path:
                return FactLexicon.from_json(Path(path))
    return None


def _computed(run: RunFolder, captions: Captions, wanted: str) -> dict[str, ClipMetric]:
    """Computes a metric from the texts; returns nothing, with a warning, if a file of its settings is missing."""
    facts, synonyms = run.config.get("evaluation.facts"), run.config.get("evaluation.synonyms")
    try:
        lexicon = FactLexicon.from_json(Path(facts)) if wanted.startswith("facts/") and facts else None
        texts, references = captions.texts, captions.references
        return clip_scores(
            wanted, texts, references, tokenizer=_tokenizer_of(run, captions), synonyms=synonyms, lexicon=lexicon
        )
    except UserError as error:
        run.warnings.append(f"{wanted} has no interval over clips: {error}")
        return {}


def _tokenizer_of(run: RunFolder, captions: Captions) -> Tokenizer:
    """Returns the tokenizer named in the prediction file, in the summary or in the configuration."""
    stated = captions.tokenizer or run.tokenizer
    # "mecab_ko (mecab_ko 1.0.3, …)" -> "mecab_ko"
    name = stated.split(" ")[0] or str(run.config.get("evaluation.tokenizer") or EvaluationConfig.tokenizer)
    return get_tokenizer(name, normalize_fullwidth="full-width normalized" in stated)


def _check_scores(run: RunFolder, split: str, metrics: Mapping[str, ClipMetric], *, is_new: bool) -> None:
    """Replaces the run's scores by those of its captions; adds a warning if they should be equal and are not."""
    for name, metric in metrics.items():
        score, logged = metric.corpus_score(), run.scores.get(f"{split}/{name}")
        if math.isnan(score):
            continue
        if logged is not None and not is_new and abs(score - logged) > 1e-3 * max(1.0, abs(logged)):
            run.warnings.append(
                f"{split}/{name} is {logged:.4f} in the run's summary but {score:.4f} for its captions; the latter is "
                "used here."
            )
        run.scores[f"{split}/{name}"] = score
