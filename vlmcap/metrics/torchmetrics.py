"""Caption scores as a torchmetrics `Metric`: texts are added by batch and rank, and scored together as one corpus.

    score = CaptionScore(metrics=["bleu_4", "cider"])
    score.update(["파도가 치는 바다."], [["파도가 밀려오는 바다."]], ids=["clip-17"])
    score.compute()  # {"bleu_4": tensor(...), "cider": tensor(...)}

Averages of CIDEr, BLEU and METEOR over batches or ranks differ from the corpus scores (CIDEr by up to 18 %). So the
state consists of the texts themselves, as lines of JSON in tensors of bytes, which torchmetrics gathers, moves, pickles
and resets like any state.

This module imports torch; the rest of `vlmcap.metrics` does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vlmcap.config import EvaluationConfig
from vlmcap.errors import UserError
from vlmcap.metrics.backend import check_backend, score_with
from vlmcap.metrics.captions import check_captions
from vlmcap.metrics.content import Synonyms, load_synonyms
from vlmcap.metrics.scores import METRIC_LABELS
from vlmcap.metrics.tokenizers import TOKENIZER_NAMES, get_tokenizer


class CaptionScore(Metric):
    """The scores of `score_captions` over all updates of all ranks.

    The corpus is sorted before it is scored, so batches and ranks do not affect any digit.

    Args:
        tokenizer: A name in `TOKENIZER_NAMES`.
        metrics: Names in `METRIC_LABELS` to compute; those in `STANDARD_METRICS` if None.
        backend: A name in `vlmcap.metrics.backend.BACKENDS`.
        normalize_fullwidth: Whether to convert full-width forms ("３ｋｍ") to the usual ones before the split.
        synonyms: Words that count as the same content word, or the path of a JSON file of them.
        kwargs: Arguments of torchmetrics, such as `sync_on_compute`.

    Raises:
        UserError: A name is unknown.
    """

    is_differentiable = False
    higher_is_better = None  # True for most, but not for the length ratio
    # An update does not depend on earlier ones, so that `forward` needs to update only one time.
    full_state_update = False
    records: list[Tensor]  # bytes of JSON lines

    def __init__(
        self,
        tokenizer: str = EvaluationConfig.tokenizer,
        metrics: Sequence[str] | None = None,
        *,
        backend: str = EvaluationConfig.backend.value,
        normalize_fullwidth: bool = EvaluationConfig.normalize_fullwidth,
        synonyms: Synonyms | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if tokenizer not in TOKENIZER_NAMES:
            raise UserError(f"Unknown tokenizer {tokenizer!r}; choose one of {', '.join(TOKENIZER_NAMES)}.")
        unknown = metrics if isinstance(metrics, str) else [name for name in metrics or () if name not in METRIC_LABELS]
        if unknown:
            raise UserError(f"metrics must be a list of names among {', '.join(METRIC_LABELS)}, not {unknown!r}.")
        check_backend(backend)
        self.tokenizer, self.metrics, self.backend = tokenizer, metrics, backend
        self.normalize_fullwidth, self.synonyms = normalize_fullwidth, synonyms
        load_synonyms(synonyms)  # so that a mistake is reported now and not after an epoch
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def update(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], ids: Sequence[str] | None = None
    ) -> None:
        """Adds clips.

        Args:
            predictions: One caption per clip.
            references: One or more captions per clip.
            ids: One name per clip. A clip that is added again under its name is scored one time, since distributed
                samplers repeat clips to give every rank the same number. Without names every caption counts.

        Raises:
            UserError: The numbers differ, a text is None, or a clip has no reference.
        """
        if len(predictions) == 0 and len(references) == 0:
            return  # a rank may have no clips
        check_captions(predictions, references)
        if ids is not None and len(ids) != len(predictions):
            raise UserError(f"There are {len(predictions)} predictions but {len(ids)} ids; give each clip one of both.")
        names = [None] * len(predictions) if ids is None else [str(name) for name in ids]
        clips = zip(names, predictions, map(list, references), strict=True)
        lines = "".join(json.dumps(clip) + "\n" for clip in clips)  # ASCII, so that no text breaks a line
        # torchmetrics gathers only tensors between ranks, so texts travel as bytes.
        self.records.append(torch.tensor(bytearray(lines.encode("ascii")), dtype=torch.uint8, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Scores the whole corpus, in float64: float32 would drop the digits in which ranks must agree.

        Raises:
            UserError: There are no clips, or two clips with different references have the same id.
        """
        corpus = self.corpus()
        scores = score_with(
            self.backend,
            [prediction for _, prediction, _ in corpus],
            [references for _, _, references in corpus],
            tokenizer=get_tokenizer(self.tokenizer, normalize_fullwidth=self.normalize_fullwidth),
            metrics=self.metrics,
            synonyms=self.synonyms,
        )
        # MPS has no float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in scores.items()}

    def corpus(self) -> list[tuple[str | None, str, list[str]]]:
        """Returns id, prediction and references of each clip held here, each id once, in the order of scoring."""
        if len(self.records) == 0:
            return []
        # `set_dtype` may have changed the dtype of the bytes, which half precision represents exactly.
        lines = dim_zero_cat(self.records).to("cpu", torch.uint8).numpy().tobytes().decode("ascii").splitlines()
        corpus: list[tuple[str | None, str, list[str]]] = []
        seen: dict[str, list[str]] = {}
        # Sums of floats depend on their order. Sorting makes the result independent of the order of arrival, also for
        # different captions of a repeated clip.
        for name, prediction, references in map(json.loads, sorted(lines)):
            if name is not None:
                if seen.setdefault(name, references) != references:
                    raise UserError(f"Two clips with different references have the id {name!r}; give each its own.")
                # Samplers repeat clips so that all ranks have equally many; sorted, equal ids are neighbours.
                if len(corpus) and corpus[-1][0] == name:
                    continue
            corpus.append((name, prediction, references))
        return corpus

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For a rank without clips torchmetrics would send an empty float tensor, which other ranks could not gather
        # with their bytes.
        if len(self.records) == 0:
            self.records.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super()._sync_dist(*args, **kwargs)
