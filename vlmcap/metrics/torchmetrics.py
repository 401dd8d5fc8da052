"""Caption scores as a torchmetrics `Metric`.

Texts come in batch by batch and rank by rank, and are scored once, as one corpus.

    score = CaptionScore(metrics=["bleu_4", "cider"])
    score.update(["파도가 치는 바다."], [["파도가 밀려오는 바다."]], ids=["clip-17"])
    score.compute()  # {"bleu_4": tensor(...), "cider": tensor(...)}

CIDEr, BLEU and METEOR of a batch, averaged over batches or ranks, are other numbers (CIDEr by up to 18 %). So the state
is the texts themselves, as lines of JSON in tensors of bytes: what torchmetrics gathers, moves, pickles and resets like
any state.

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
    """The scores of `score_captions` over everything that all updates of all ranks brought.

    The corpus is put in one order before it is scored, so batches and ranks change no digit.

    Args:
        tokenizer: A name of `TOKENIZER_NAMES`.
        metrics: The names of `METRIC_LABELS` to compute, those of `STANDARD_METRICS` if None.
        backend: A name of `vlmcap.metrics.backend.BACKENDS`.
        normalize_fullwidth: Turn full-width forms ("３ｋｍ") into the usual ones before the split.
        synonyms: Words that count as the same content word, or the path of a JSON file of them.
        kwargs: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        UserError: A name is unknown.
    """

    is_differentiable = False
    higher_is_better = None  # of most, but not of the length ratio
    full_state_update = False
    rows: list[Tensor]

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
            raise UserError(f"Unknown tokenizer {tokenizer!r}: choose one of {', '.join(TOKENIZER_NAMES)}.")
        unknown = metrics if isinstance(metrics, str) else [name for name in metrics or () if name not in METRIC_LABELS]
        if unknown:
            raise UserError(f"metrics must be a list of names among {', '.join(METRIC_LABELS)}, got {unknown!r}.")
        check_backend(backend)
        self.tokenizer, self.metrics, self.backend = tokenizer, metrics, backend
        self.normalize_fullwidth, self.synonyms = normalize_fullwidth, synonyms
        load_synonyms(synonyms)  # a mistake in them is said now, not after an epoch
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], ids: Sequence[str] | None = None
    ) -> None:
        """Adds clips.

        Args:
            predictions: One caption a clip.
            references: For each clip one or more captions.
            ids: A name a clip. A clip that comes twice under its name is scored once: distributed samplers repeat clips
                so that every rank has equally many. Without names every caption counts.

        Raises:
            UserError: The numbers differ, a text is None, or a clip has no reference.
        """
        if len(predictions) == 0 and len(references) == 0:
            return  # a rank without clips is no mistake
        check_captions(predictions, references)
        if ids is not None and len(ids) != len(predictions):
            raise UserError(
                f"There are {len(predictions)} predictions but {len(ids)} ids: each clip needs one of both."
            )
        names = [None] * len(predictions) if ids is None else [str(name) for name in ids]
        records = zip(names, predictions, map(list, references), strict=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)  # in ASCII: no text of a caption ends a line
        self.rows.append(torch.tensor(bytearray(lines.encode("ascii")), dtype=torch.uint8, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """The scores of the whole corpus, float64: float32 would drop the digits in which ranks are to agree.

        Raises:
            UserError: No clip was given, or two clips with different references have one id.
        """
        corpus = self.corpus()
        scores = score_with(
            self.backend,
            [row[1] for row in corpus],
            [row[2] for row in corpus],
            tokenizer=get_tokenizer(self.tokenizer, normalize_fullwidth=self.normalize_fullwidth),
            metrics=self.metrics,
            synonyms=self.synonyms,
        )
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in scores.items()}

    def corpus(self) -> list[tuple[str | None, str, list[str]]]:
        """Id, prediction and references of each clip held here, each id once, in the order in which they are scored."""
        if len(self.rows) == 0:
            return []
        # Whatever dtype `set_dtype` made of the bytes: half precision holds them exactly.
        lines = dim_zero_cat(self.rows).to("cpu", torch.uint8).numpy().tobytes().decode("ascii").splitlines()
        corpus: list[tuple[str | None, str, list[str]]] = []
        seen: dict[str, list[str]] = {}
        # Sums of floats depend on their order. Sorting takes out who came first, and which of two captions of a
        # repeated clip counts.
        for name, prediction, references in map(json.loads, sorted(lines)):
            if name is not None:
                if seen.setdefault(name, references) != references:
                    raise UserError(f"Two clips with different references have the id {name!r}: give each its own.")
                if len(corpus) and corpus[-1][0] == name:
                    continue
            corpus.append((name, prediction, references))
        return corpus

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For a rank without clips torchmetrics would send an empty float tensor, which others could not gather with
        # their bytes.
        if len(self.rows) == 0:
            self.rows.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super()._sync_dist(*args, **kwargs)
