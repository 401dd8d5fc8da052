"""Scores by pretrained models: SigLIP's image-text score and BERTScore.

They are optional, and only meant as a supplement to the overlap scores.

Both need explicitly named checkpoints, torch and transformers (`pip install "vlmcap[model-scores]"`), which are
imported when a scorer is built. Any hub id or folder in Hugging Face layout works, such as
google/siglip2-so400m-patch14-384 and klue/bert-base.

A score without references can mislead: on long Korean captions of background videos SigLIP's score *rose* while the
model collapsed to a few captions for all clips (4 to 11 % distinct), since a caption that fits every clip a little fits
each of them. Read it with `distinct_ratio`, and only next to a score that uses references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmcap.errors import UserError, first_line
from vlmcap.metrics.tokenizers import normalize

if TYPE_CHECKING:
    from torch import Tensor

# The spaces in "새가 난다. 해가 뜬다."; the full stop stays with its sentence.
_SENTENCE_END = re.compile(r"(?<=[.!?。])\s+")


class ImageTextScore(NamedTuple):
    """Agreement of one caption with its frames.

    Attributes:
        cosine: Mean cosine of the embeddings over frames and sentences, -1 to 1.
        probability: Mean of SigLIP's sigmoid of the scaled cosine, 0 to 1: the probability that they are a pair.
        truncated_ratio: Share of sentences longer than the text tower's input, which are truncated.
    """

    cosine: float
    probability: float
    truncated_ratio: float


class SiglipScorer:
    """Image-text score by SigLIP (Zhai et al., ICCV 2023, arXiv:2303.15343) or SigLIP 2 (2025, arXiv:2502.14786).

        cosine      = mean over frames f and sentences s of <f, s> / (|f| |s|)
        probability = mean of sigmoid(exp(t) cosine + b)

    with the t and b of the checkpoint. SigLIP 2's text tower is multilingual but limited to 64 tokens; a caption of 575
    Korean characters has several times as many. So captions are scored sentence by sentence, and sentences that must be
    truncated nevertheless are counted.

    Args:
        checkpoint: A `SiglipModel` or `Siglip2Model` with its tokenizer and image processor.
        device: Device of the model.
        batch_size: Number of frames, or sentences, at a time; it does not affect scores.

    Raises:
        UserError: The checkpoint cannot be loaded, or has another model type.
    """

    def __init__(self, checkpoint: str, *, device: str = "cpu", batch_size: int = 16) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = _load(AutoModel, checkpoint, "siglip_checkpoint", dtype="float32").eval().to(device)
        if self.model.config.model_type not in {"siglip", "siglip2"}:
            raise UserError(
                f"siglip_checkpoint={checkpoint} is a {self.model.config.model_type} model; give one of SigLIP or "
                "SigLIP 2."
            )
        self.tokenizer = _load(AutoTokenizer, checkpoint, "siglip_checkpoint")
        self.processor = _load(AutoImageProcessor, checkpoint, "siglip_checkpoint")
        self.max_length = int(self.model.config.text_config.max_position_embeddings)
        self.device, self.batch_size = device, batch_size

    def score(self, frames: Iterable[Sequence[Any]], captions: Sequence[str]) -> list[ImageTextScore]:
        """Scores each clip.

        Args:
            frames: Frames of each clip, as uint8 arrays (H, W, 3) or PIL images; read one clip at a time.
            captions: One text per clip.

        Returns:
            One score per clip, NaN for an empty caption.

        Raises:
            UserError: A clip has no frame.
        """
        import torch

        scores: list[ImageTextScore] = []
        for pictures, caption in zip(frames, captions, strict=True):
            if len(pictures) == 0:
                raise UserError(f"Clip {len(scores)} has no frame; an image-text score needs at least one.")
            sentences = [sentence for sentence in _SENTENCE_END.split(normalize(caption)) if sentence]
            if not sentences:
                scores.append(ImageTextScore(math.nan, math.nan, 0.0))
                continue
            with torch.inference_mode():
                cosines = self._embed_frames(pictures) @ self._embed_texts(sentences).T  # (frames, sentences)
                probabilities = torch.sigmoid(cosines * self.model.logit_scale.exp() + self.model.logit_bias)
            lengths = [len(ids) for ids in self.tokenizer(sentences, verbose=False)["input_ids"]]
            truncated_ratio = sum(length > self.max_length for length in lengths) / len(sentences)
            scores.append(ImageTextScore(float(cosines.mean()), float(probabilities.mean()), truncated_ratio))
        return scores

    def _embed_frames(self, pictures: Sequence[Any]) -> Tensor:
        import torch

        batches = _batches(pictures, self.batch_size)
        inputs = (self.processor(images=list(batch), return_tensors="pt").to(self.device) for batch in batches)
        return torch.cat([_unit(self.model.get_image_features(**one).pooler_output) for one in inputs])

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        import torch

        vectors = []
        for batch in _batches(texts, self.batch_size):
            # The model was trained on texts padded to a fixed length without a mask, and uses the last position, so
            # padding belongs to the input.
            inputs = self.tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            features = self.model.get_text_features(input_ids=inputs["input_ids"].to(self.device))
            vectors.append(_unit(features.pooler_output))
        return torch.cat(vectors)


class BertScore(NamedTuple):
    """Agreement of a prediction with a reference, by the embeddings of a text encoder.

    Attributes:
        precision: Mean over the prediction's tokens.
        recall: Mean over the reference's tokens.
        f1: Their harmonic mean.
        is_truncated: Whether one of the texts was truncated to the encoder's input length.
    """

    precision: float
    recall: float
    f1: float
    is_truncated: bool = False


class BertScorer:
    """BERTScore (Zhang et al., "BERTScore: evaluating text generation with BERT", ICLR 2020, arXiv:1904.09675).

        P = sum_i w_i max_j <h_i, r_j> / sum_i w_i over the prediction's tokens i,   R the same over the reference's,
        F1 = 2 P R / (P + R)

    with unit vectors h and r of one hidden layer and w = 1, or the inverse document frequency log((N + 1) / (df + 1))
    over the N reference texts. Special tokens are left out, as in torchmetrics. Scores are not rescaled by a baseline,
    so those of unrelated Korean texts are far from 0: only compare scores of the same checkpoint and layer.

    Args:
        checkpoint: A text encoder, such as `BertModel`, with its tokenizer.
        layer: Hidden layer, from 0 for the embeddings to the number of layers; None is the last.
        device: Device of the model.
        batch_size: Number of texts at a time; it affects only the last digits of float32.

    Raises:
        UserError: The checkpoint cannot be loaded, or has no such layer.
    """

    def __init__(self, checkpoint: str, *, layer: int | None = None, device: str = "cpu", batch_size: int = 16) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.model = _load(AutoModel, checkpoint, "bert_checkpoint", dtype="float32").eval().to(device)
        self.tokenizer = _load(AutoTokenizer, checkpoint, "bert_checkpoint")
        num_layers = int(self.model.config.num_hidden_layers)
        self.layer = num_layers if layer is None else layer
        if not 0 <= self.layer <= num_layers:
            raise UserError(f"bert_layer={layer} does not exist; {checkpoint} has the layers 0 to {num_layers}.")
        self.device, self.batch_size = device, batch_size
        # RoBERTa counts positions from behind the padding id.
        offset = self.model.config.pad_token_id + 1 if "roberta" in self.model.config.model_type else 0
        max_positions = int(self.model.config.max_position_embeddings) - offset
        self.max_length = min(int(self.tokenizer.model_max_length), max_positions)

    def score(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], *, idf: bool = False
    ) -> list[BertScore]:
        """Scores each clip against the reference with the highest F1.

        Args:
            predictions: One text per clip.
            references: One or more texts per clip.
            idf: Whether rare tokens weigh more; frequencies are counted in all given references.

        Returns:
            One score per clip; 1 for two empty texts, 0 if only one is empty.
        """
        weights = self._idf(references) if idf else None
        scores = []
        for clips in _batches(range(len(predictions)), max(1, self.batch_size // 2)):
            texts = sorted({normalize(text) for i in clips for text in (predictions[i], *references[i])}, key=len)
            vectors = {
                text: vector
                for batch in _batches(texts, self.batch_size)
                for text, vector in self._embed(batch, weights)
            }
            for i in clips:
                prediction = vectors[normalize(predictions[i])]
                compared = (_compare(prediction, vectors[normalize(text)]) for text in references[i])
                scores.append(max(compared, key=lambda score: score.f1))
        return scores

    def _embed(self, texts: Sequence[str], weights: dict[int, float] | None) -> Iterator[tuple[str, _Text]]:
        import torch

        inputs = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        special = inputs.pop("special_tokens_mask").bool()
        num_tokens = [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        with torch.inference_mode():
            # (texts, longest text, width)
            hidden = self.model(**inputs.to(self.device), output_hidden_states=True).hidden_states[self.layer]
        kept = (inputs["attention_mask"].bool() & ~special.to(self.device)).cpu()  # neither padding nor special tokens
        for i, text in enumerate(texts):
            ids = inputs["input_ids"][i].cpu()[kept[i]].tolist()
            weight = torch.tensor([1.0 if weights is None else weights.get(token, weights[-1]) for token in ids])
            yield text, _Text(_unit(hidden[i].float().cpu()[kept[i]]), weight, num_tokens[i] > self.max_length)

    def _idf(self, references: Sequence[Sequence[str]]) -> dict[int, float]:
        """Returns token id to weight; the key -1 has the weight of tokens that are in no reference."""
        texts = [normalize(text) for refs in references for text in refs]
        frequencies: Counter[int] = Counter()
        for batch in _batches(texts, 256):
            for ids in self.tokenizer(list(batch), truncation=True, max_length=self.max_length)["input_ids"]:
                frequencies.update(set(ids))
        return {token: math.log((len(texts) + 1) / (count + 1)) for token, count in (*frequencies.items(), (-1, 0))}


class _Text(NamedTuple):
    vectors: Tensor  # (tokens, width), unit length
    weights: Tensor  # (tokens,)
    is_truncated: bool


def _compare(prediction: _Text, reference: _Text) -> BertScore:
    is_truncated = prediction.is_truncated or reference.is_truncated
    if len(prediction.vectors) == 0 or len(reference.vectors) == 0:
        value = float(len(prediction.vectors) == len(reference.vectors))
        return BertScore(value, value, value, is_truncated)
    cosines = prediction.vectors @ reference.vectors.T  # (tokens of the prediction, tokens of the reference)
    precision = _weighted_mean(cosines.amax(1), prediction.weights)
    recall = _weighted_mean(cosines.amax(0), reference.weights)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return BertScore(precision, recall, f1, is_truncated)


def _weighted_mean(values: Tensor, weights: Tensor) -> float:
    # If there is only one reference, all its tokens are in all references and have weight 0; then all count the same.
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total > 0 else float(values.mean())


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _load(kind: Any, checkpoint: str, key: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(checkpoint, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{key}={checkpoint}: {kind.__name__} cannot load it ({first_line(error)})") from error
