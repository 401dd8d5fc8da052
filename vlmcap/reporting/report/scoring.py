"""Captions of all runs as scores of clips, resampled together, and which runs may be compared by them."""

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
_FROM_FILE = (
    "cider",
    "cider_d",
    "rouge_l",
)  # the mean over clips is the score of the corpus, so no caption need be read again
_BY_TOKENS = (*COUNTED, "meteor", "length_ratio", "repetition_rate", "self_bleu", "swapped/", "category/")
_BATCH_ELEMENTS = 1 << 24


def score_clips(
    run: RunFolder, split: str, captions: Captions, wanted: str, tokenizer: str | None
) -> tuple[Captions, dict[str, ClipMetric]]:
    """The scores of one file that can be resampled, by name without the split, and the captions with scores of each clip.

    Args:
        run: Gets warnings.
        split: Of the captions.
        captions: Scored already, or not.
        wanted: A score that is computed if the file does not have it; empty for none.
        tokenizer: Its name, if everything is to be scored anew.

    Raises:
        UserError: The tokeniser is not known or not installed.
    """
    metrics = {name: mean_metric(name, captions.scores[name]) for name in _FROM_FILE if name in captions.scores}
    if tokenizer is not None or "cider" not in metrics:
        chosen = get_tokenizer(tokenizer) if tokenizer is not None else _tokenizer_of(run, captions)
        if len(captions) > 1:
            metrics |= clip_scores("cider", captions.texts, captions.references, tokenizer=chosen)
            each = {name: metrics[name].values[:, 0] for name in _FROM_FILE}
            captions = dataclasses.replace(captions, scores=each, tokenizer=f"{chosen.name} ({chosen.version})")
    if wanted and wanted not in metrics and is_clip_score(wanted):
        metrics |= _computed(run, captions, wanted)
    _check_scores(run, split, metrics, is_new=tokenizer is not None)
    return captions, metrics


def resample(metrics: Sequence[Mapping[str, ClipMetric]], sets: Sequence[str]) -> list[dict[str, Resampled]]:
    """Each score on resampled clips: the same clips for all runs of a set.

    Args:
        metrics: Of each run, on one split.
        sets: Of each run: equal for runs of the same clips.
    """
    members: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, (own, name_of_set) in enumerate(zip(metrics, sets, strict=True)):
        members[name_of_set] += [(index, name) for name in own]
    samples: list[dict[str, Resampled]] = [{} for _ in metrics]
    for those in members.values():
        while those:  # some at a time: the columns of all runs side by side may take gigabytes
            size = max(1, _BATCH_ELEMENTS // max(1, metrics[those[0][0]][those[0][1]].values.size))
            batch, those = those[:size], those[size:]
            chosen = [metrics[index][name] for index, name in batch]
            ends = np.cumsum([metric.values.shape[1] for metric in chosen])[:-1]
            parts = [
                np.split(sums, ends, axis=1)
                for sums in resampled_sums([metric.values for metric in chosen], RESAMPLES, _SEED)
            ]
            for place, (index, name) in enumerate(batch):
                scores = np.concatenate([chosen[place].score(part[place]) for part in parts])
                samples[index][name] = resampled(chosen[place], scores, _SEED)
    return samples


def comparable(metric: str, captions: Sequence[Captions | None]) -> list[str]:
    """Why each run cannot be compared with the most.

    Empty for those most, who have the same clips, references and tokeniser.

    Args:
        metric: Without its split; some do not depend on the tokeniser.
        captions: Of each run that has the metric, on its split.
    """
    has_tokens = metric.startswith(_BY_TOKENS)
    keys = [None if own is None else (own.digest, own.tokenizer if has_tokens else "") for own in captions]
    known = [key for key in keys if key is not None]
    if not known:
        return [""] * len(captions)
    sizes = {key: len(own) for key, own in zip(keys, captions, strict=True) if own is not None}
    most = max(dict.fromkeys(known), key=lambda key: (known.count(key), sizes[key]))
    model = next(own for key, own in zip(keys, captions, strict=True) if key == most)
    assert model is not None
    return ["" if key == most else _why_not(own, model) for key, own in zip(keys, captions, strict=True)]


def _why_not(own: Captions | None, most: Captions) -> str:
    if own is None:
        return "Not compared: its captions are missing, so they may be of other clips."
    if own.ids != most.ids:
        return f"Not compared: its {len(own)} clips are not the {len(most)} of most runs."
    if own.digest != most.digest:
        return "Not compared: its references are not those of most runs."
    return (
        f"Not compared: its tokens are by {own.tokenizer or 'an unnamed tokeniser'}, those of most runs by "
        f"{most.tokenizer or 'an unnamed one'}; --tokenizer mecab_ko scores all anew."
    )


def find_lexicon(runs: Sequence[RunFolder]) -> FactLexicon | None:
    """The facts of the first run whose file of them is still there; None where no run has any."""
    for path in dict.fromkeys(run.config.get("evaluation.facts") for run in runs):
        with contextlib.suppress(UserError):
            if path:
                return FactLexicon.from_json(Path(path))
    return None


def _computed(run: RunFolder, captions: Captions, wanted: str) -> dict[str, ClipMetric]:
    """The wanted score from the texts.

    Nothing, and a warning, where the run's own settings of it are not there any more.
    """
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
    """The tokeniser that the file, the scores or the configuration names."""
    said = captions.tokenizer or run.tokenizer
    name = said.split(" ")[0] or str(run.config.get("evaluation.tokenizer") or EvaluationConfig.tokenizer)
    return get_tokenizer(name, normalize_fullwidth="full-width folded" in said)


def _check_scores(run: RunFolder, split: str, metrics: Mapping[str, ClipMetric], *, is_new: bool) -> None:
    """Puts the captions' scores in place of the run's; a warning where they should be equal and are not."""
    for name, metric in metrics.items():
        score, said = metric.corpus_score(), run.scores.get(f"{split}/{name}")
        if math.isnan(score):
            continue
        if said is not None and not is_new and abs(score - said) > 1e-3 * max(1.0, abs(said)):
            run.warnings.append(
                f"{split}/{name} is {said:.4f} in the run's record and {score:.4f} by its captions, which are counted "
                "here."
            )
        run.scores[f"{split}/{name}"] = score
