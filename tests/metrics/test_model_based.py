"""Model-based scores through the real classes at tiny size, random weights saved to folders.

Batches change nothing, equal texts give 1.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmcap.config import EvaluationConfig
from vlmcap.metrics.model_based import BertScore, BertScorer, SiglipScorer
from vlmcap.training.callbacks.scorer import model_scores

WORDS = ["바다", "에", "파도", "가", "친다", "사람", "이", "걷는다", "산", "보인다", "높은", ".", "빨간"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SHAPE, "vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 0}
CAPTIONS = ["바다 에 파도 가 친다 .", "사람 이 걷는다 . 높은 산 이 보인다 .", "산 ."]
REFERENCES = [["파도 가 친다 ."], ["사람 이 바다 에 보인다 .", "높은 산 ."], ["빨간 산 이 보인다 ."]]


def save(model: Any, folder: Path, seed: int) -> str:
    """With noise in every tensor, so that no constant start hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In the layout of SigLIP 2's checkpoints of a fixed resolution."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    vision = {**SHAPE, "image_size": 28, "patch_size": 14}
    folder = tmp_path_factory.mktemp("siglip")
    SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2).save_pretrained(folder)
    _word_tokenizer({"<pad>": 0, "<unk>": 1, "<eos>": 2}, "<pad>", "$A <eos>", [("<eos>", 2)]).save_pretrained(folder)
    return save(SiglipModel(SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=vision)), folder, 1)


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In the layout of SigLIP 2's checkpoints of any aspect."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    vision = {**SHAPE, "patch_size": 14, "num_patches": 16}
    folder = tmp_path_factory.mktemp("naflex")
    Siglip2ImageProcessorPil(patch_size=14, max_num_patches=16).save_pretrained(folder)
    _word_tokenizer({"<pad>": 0, "<unk>": 1, "<eos>": 2}, "<pad>", "$A <eos>", [("<eos>", 2)]).save_pretrained(folder)
    return save(
        Siglip2Model(Siglip2Config(text_config={**TEXT, "projection_size": 32}, vision_config=vision)), folder, 2
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    _word_tokenizer(special, "[PAD]", "[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)]).save_pretrained(folder)
    return save(BertModel(BertConfig(**TEXT)), folder, 3)


def _word_tokenizer(special: dict[str, int], pad: str, template: str, added: list[tuple[str, int]]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    unknown = list(special)[1]
    vocabulary = special | {word: len(special) + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if "[CLS]" in special else {"eos_token": "<eos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, pad_token=pad, model_max_length=16, **named
    )


def make_frames(height: int = 36, width: int = 48) -> list[list[np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(0)
    return [
        [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)] for count in (3, 1, 2)
    ]


# --- SigLIP -----------------------------------------------------------------------------------------------------------


def test_siglip_equals_the_models_own_logits(siglip: str) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    model, tokenizer = SiglipModel.from_pretrained(siglip).eval(), AutoTokenizer.from_pretrained(siglip)
    frames = make_frames()
    pixels = AutoImageProcessor.from_pretrained(siglip)(images=frames[1], return_tensors="pt")["pixel_values"]
    sentences = ["사람 이 걷는다 .", "높은 산 이 보인다 ."]
    ids = tokenizer(sentences, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
        cosines = (logits - model.logit_bias) / model.logit_scale.exp()
    score = SiglipScorer(siglip).score(frames, CAPTIONS)[1]
    assert score.cosine == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert score.probability == pytest.approx(float(logits.sigmoid().mean()), abs=1e-5)
    assert -1 <= score.cosine <= 1
    assert score.truncated_ratio == 0


@pytest.mark.parametrize("family", ["siglip", "naflex"])
def test_batches_change_no_image_text_score(family: str, request: pytest.FixtureRequest) -> None:
    checkpoint, frames = request.getfixturevalue(family), make_frames()
    together = SiglipScorer(checkpoint, batch_size=16).score(frames, CAPTIONS)
    single = SiglipScorer(checkpoint, batch_size=1).score(frames, CAPTIONS)
    for one, other in zip(together, single, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert len({round(score.cosine, 4) for score in together}) == 3
    means = [SiglipScorer(checkpoint).score([[frame]], CAPTIONS[:1])[0].cosine for frame in frames[0]]
    assert together[0].cosine == pytest.approx(sum(means) / 3, abs=1e-5), "a mean over frames"


def test_checkpoints_in_half_precision_are_scored_in_float32(siglip: str, bert: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    for name, checkpoint in (("siglip", siglip), ("bert", bert)):
        shutil.copytree(checkpoint, tmp_path / name)
        AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    low, full = (SiglipScorer(path).score(make_frames(), CAPTIONS) for path in (str(tmp_path / "siglip"), siglip))
    assert [score.cosine for score in low] == pytest.approx([score.cosine for score in full], abs=0.05)
    for score in BertScorer(str(tmp_path / "bert")).score(CAPTIONS, [[text] for text in CAPTIONS]):
        assert score.f1 == pytest.approx(1, abs=1e-6)


def test_a_sentence_that_is_cut_is_counted(siglip: str) -> None:
    caption = f"산 이 보인다 . {'바다 ' * 20}."
    assert SiglipScorer(siglip).score(make_frames()[:1], [caption])[0].truncated_ratio == 0.5


def test_an_empty_caption_fits_nothing(siglip: str) -> None:
    score = SiglipScorer(siglip).score(make_frames()[:1], [" \n"])[0]
    assert math.isnan(score.cosine)


def test_what_siglip_cannot_score_is_told(siglip: str, bert: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a bert model; give one of SigLIP or SigLIP 2"):
        SiglipScorer(bert)
    with pytest.raises(ValueError, match=r"siglip_checkpoint=.*: AutoModel cannot load it") as told:
        SiglipScorer(str(tmp_path))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="Clip 0 has no frame"):
        SiglipScorer(siglip).score([[]], ["산"])


# --- BERTScore --------------------------------------------------------------------------------------------------------


def test_identical_texts_give_one_and_others_less(bert: str) -> None:
    scorer = BertScorer(bert)
    for idf in (False, True):
        for score in scorer.score(CAPTIONS, [[text] for text in CAPTIONS], idf=idf):
            assert score == pytest.approx((1, 1, 1, False), abs=1e-6)
        for score in scorer.score(CAPTIONS, REFERENCES, idf=idf):
            assert score.f1 < 0.999
    # What normalization makes equal is equal.
    assert scorer.score(["바다\u200b\u2028에"], [["바다 에"]])[0].f1 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("idf", "layer"), [(False, 2), (True, 2), (False, 1)])
def test_bertscore_equals_torchmetrics(bert: str, idf: bool, layer: int) -> None:
    from torchmetrics.functional.text import bert_score

    # From short to long on both sides: torchmetrics 1.9 sorts each side by length and puts it back by the same
    # permutation instead of its inverse, so of texts in another order it compares each prediction with another clip's
    # reference.
    texts = ["산 .", "바다 에 파도", "사람 이 걷는다 . 산"]
    references = ["파도 .", "산 이 보인다", "높은 산 이 걷는다 ."]
    expected = bert_score(
        texts, references, model_name_or_path=bert, num_layers=layer, idf=idf, max_length=16, truncation=True
    )
    scores = BertScorer(bert, layer=layer).score(texts, [[text] for text in references], idf=idf)
    for name in ("precision", "recall", "f1"):
        assert [getattr(score, name) for score in scores] == pytest.approx(expected[name].tolist(), abs=1e-5), name
    order = [1, 2, 0]
    moved = BertScorer(bert, layer=layer).score([texts[i] for i in order], [[references[i]] for i in order], idf=idf)
    assert np.array(moved) == pytest.approx(np.array([scores[i] for i in order]), abs=1e-6)


def test_batches_change_no_bertscore(bert: str) -> None:
    for idf in (False, True):
        together, single = (BertScorer(bert, batch_size=size).score(CAPTIONS, REFERENCES, idf=idf) for size in (16, 1))
        assert np.array(together) == pytest.approx(np.array(single), abs=1e-5)


def test_the_best_reference_counts_and_sides_are_told_apart(bert: str) -> None:
    scorer = BertScorer(bert)
    each = [scorer.score(CAPTIONS[1:2], [[text]])[0] for text in REFERENCES[1]]
    assert scorer.score(CAPTIONS[1:2], REFERENCES[1:2])[0] == pytest.approx(max(each, key=lambda score: score.f1))
    one, other = scorer.score(["산", "산 이 보인다"], [["산 이 보인다"], ["산"]])
    assert (one.precision, one.recall) == pytest.approx((other.recall, other.precision))
    assert one.precision != pytest.approx(one.recall)


def test_idf_and_layer_change_the_score(bert: str) -> None:
    def scores(layer: int | None, idf: bool) -> float:
        return BertScorer(bert, layer=layer).score(CAPTIONS, REFERENCES, idf=idf)[0].f1

    assert scores(None, False) == scores(2, False)
    assert len({round(scores(layer, idf), 5) for layer in (0, 1, 2) for idf in (False, True)}) == 6
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"bert_layer={layer} .* has the layers 0 to 2"):
            BertScorer(bert, layer=layer)


def test_empty_and_long_texts(bert: str) -> None:
    scorer = BertScorer(bert)
    texts: Sequence[str] = ["", "산", "", "바다 " * 30]
    scores = scorer.score(texts, [["산"], [""], [""], ["산"]])
    assert scores[:3] == [BertScore(0, 0, 0), BertScore(0, 0, 0), BertScore(1, 1, 1)]
    assert scores[3].is_truncated
    with pytest.raises(ValueError, match=r"bert_checkpoint=nowhere/at-all: AutoModel cannot load it"):
        BertScorer("nowhere/at-all")


# --- in an evaluation -------------------------------------------------------------------------------------------------


def test_an_evaluation_has_them_where_checkpoints_are_named(siglip: str, bert: str, tmp_path: Path) -> None:
    from vlmcap.data.decoding.video import write_video

    assert model_scores(EvaluationConfig(), [], [], []) == {}
    videos = [tmp_path / f"{index}.mp4" for index in range(3)]
    for index, video in enumerate(videos):
        write_video(video, np.full((6, 32, 32, 3), 80 * index, dtype=np.uint8), fps=6)
    config = EvaluationConfig(
        siglip_checkpoint=siglip, siglip_frames=2, bert_checkpoint=bert, bert_layer=1, bert_idf=True
    )
    scores = model_scores(config, videos, CAPTIONS, REFERENCES)
    assert list(scores) == [
        *(f"siglip/{name}" for name in ("cosine", "probability", "truncated_ratio")),
        *(f"bertscore/{name}" for name in ("precision", "recall", "f1", "truncated_ratio")),
    ]
    expected = [score.f1 for score in BertScorer(bert, layer=1).score(CAPTIONS, REFERENCES, idf=True)]
    assert scores["bertscore/f1"] == pytest.approx(sum(expected) / 3)
    silent = model_scores(EvaluationConfig(siglip_checkpoint=siglip), videos, ["", "", ""], REFERENCES)
    assert silent["siglip/cosine"] == 0
