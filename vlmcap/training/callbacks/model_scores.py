"""Scores by pretrained models, of a whole split, where their checkpoints are configured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmcap.config import EvaluationConfig


def model_scores(
    config: EvaluationConfig, videos: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]], *, device: str = "cpu"
) -> dict[str, float]:
    """Means over clips, named `siglip/*` and `bertscore/*`; nothing where no checkpoint is configured.

    Models are loaded for the call and let go after it, one at a time: they are not to take memory while training.

    Args:
        config: Checkpoints, frames, layer and weighting.
        videos: A file a clip, read again for the image-text score.
        texts: One prediction a clip.
        references: For each clip one or more captions.
        device: Where the models run.

    Returns:
        `siglip/cosine`, `siglip/probability` (0 to 1), `siglip/cut_ratio` (sentences longer than the text tower reads), and
        `bertscore/precision`, `bertscore/recall`, `bertscore/f1`, `bertscore/cut_ratio` (clips with a text longer than the encoder reads).

    Raises:
        UserError: A checkpoint cannot be loaded.
        VideoError: A clip cannot be read.
    """
    scores: dict[str, float] = {}
    if config.siglip_checkpoint is not None:
        from vlmcap.data.decoding.video import decode_frames
        from vlmcap.metrics.model_based import SiglipScorer

        siglip = SiglipScorer(config.siglip_checkpoint, device=device)
        # One clip at a time: the frames of a whole split would not fit.
        frames = (list(decode_frames(video, config.siglip_frames).permute(0, 2, 3, 1).numpy()) for video in videos)
        rows = siglip.score(frames, texts)
        scores |= {f"siglip/{name}": _mean([getattr(row, name) for row in rows]) for name in ("cosine", "probability", "cut_ratio")}
        del siglip
    if config.bert_checkpoint is not None:
        from vlmcap.metrics.model_based import BertScorer

        each = BertScorer(config.bert_checkpoint, layer=config.bert_layer, device=device).score(texts, references, idf=config.bert_idf)
        scores |= {f"bertscore/{name}": _mean([getattr(row, name) for row in each]) for name in ("precision", "recall", "f1")}
        scores["bertscore/cut_ratio"] = _mean([float(row.is_cut) for row in each])
    return scores


def _mean(values: Sequence[float]) -> float:
    """The mean, an empty caption's NaN counting as 0: saying nothing is not to pay."""
    return sum(0.0 if math.isnan(value) else value for value in values) / len(values)
