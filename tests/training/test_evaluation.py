"""Captions are scored as one corpus, each clip once, and exchanging predictions is exchanging videos."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from vlmcap.config import Config, EvaluationBackend, EvaluationConfig, Split
from vlmcap.errors import UserError
from vlmcap.metrics import fact_accuracy, get_tokenizer, score_captions
from vlmcap.metrics.__main__ import main as score_file
from vlmcap.metrics.torchmetrics import CaptionScore
from vlmcap.training.callbacks.evaluation import gather
from vlmcap.training.callbacks.scorer import CaptionScorer, Prediction, describe_tokenizer, write_predictions
from vlmcap.training.objects import Run
from vlmcap.training.run import test as run_test
from vlmcap.types import Batch, Clip

MakeConfig = Callable[..., Config]
MakeRun = Callable[[Config], Run]
Read = Callable[[Batch], list[str]]


def read_frames(clips: Sequence[Clip], run: Run) -> Read:
    """Stands for a model that has learned: it says of each video the first two sentences of that video's caption."""
    known = {}
    for clip, sample in zip(clips, run.data.make_dataset(clips), strict=True):  # type: ignore[call-overload]
        known[sample.frames.numpy().tobytes()] = ". ".join(clip.captions[0].split(". ")[:2])

    def generate(batch: Batch) -> list[str]:
        assert batch.frames is not None
        return [known[frames.cpu().numpy().tobytes()] for frames in batch.frames]

    return generate


def decoding_run(tiny_config: MakeConfig, make_run: MakeRun, folder: Path, *overrides: str) -> Run:
    return make_run(tiny_config(folder, "cache.enabled=false", *overrides))


def test_the_corpus_is_scored_once_whatever_the_batches(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    scores = []
    for size in (3, 8):
        run = decoding_run(tiny_config, make_run, tmp_path / str(size), f"data.eval_batch_size={size}")
        clips = run.data.clips["test"]
        generate = read_frames(clips, run)
        run.module.captioner.generate = generate  # type: ignore[method-assign]
        scores.append(run_test(run, Split.test))
    assert scores[0] == scores[1]
    texts = [row.text for row in run.evaluation.predictions]
    expected = score_captions(texts, [clip.captions for clip in clips])
    assert {name: scores[0][f"test/{name}"] for name in expected} == pytest.approx(expected, nan_ok=True)
    batches = [clips[:3], clips[3:6], clips[6:]]
    means = [
        score_captions(texts[3 * i : 3 * i + 3], [clip.captions for clip in rows])["cider"]
        for i, rows in enumerate(batches)
    ]
    assert abs(mean(means) - expected["cider"]) > 0.01, "a mean over batches would be another number"


@pytest.mark.slow
def test_exchanged_predictions_score_as_exchanged_videos(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    run = decoding_run(tiny_config, make_run, tmp_path, "evaluation.swap_videos=true", "evaluation.swap_shifts=7")
    clips = sorted(run.data.clips["test"], key=lambda clip: clip.id)
    run.module.captioner.generate = read_frames(clips, run)  # type: ignore[method-assign]
    claimed = run_test(run, Split.test)
    lexicon = run.evaluation.scorer.lexicon
    assert lexicon is not None
    captioned = []
    for shift in range(1, 8):
        exchanged = [replace(clip, video=clips[(index + shift) % 8].video) for index, clip in enumerate(clips)]
        texts = caption(run, exchanged)
        references = [clip.captions for clip in clips]
        facts = {f"facts/{name}": value for name, value in fact_accuracy(texts, references, lexicon).items()}
        captioned.append(score_captions(texts, references) | facts)
    for name in ("bleu_4", "cider", "cider_d", "rouge_l", "facts/place", "facts/direction", "facts/mean"):
        assert claimed[f"test/swapped/{name}"] == pytest.approx(mean(scores[name] for scores in captioned)), name
    assert claimed["test/cider"] > 3 * claimed["test/swapped/cider"]
    # Over all shifts the swapped accuracy is the expectation of chance exactly.
    assert claimed["test/swapped/facts/place"] == pytest.approx(claimed["test/permuted/facts/place"])


def test_the_model_says_the_same_of_a_video_under_any_name(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    run = decoding_run(tiny_config, make_run, tmp_path, "llm.max_new_tokens=12", "projector=mlp", "seed=1")
    with torch.no_grad():  # an untrained projector says too little for the model to tell videos apart
        for parameter in run.module.captioner.projector.parameters():
            parameter.mul_(8)
    clips = run.data.clips["test"]
    exchanged = [replace(clip, video=clips[(index + 3) % 8].video) for index, clip in enumerate(clips)]
    texts, swapped = caption(run, clips), caption(run, exchanged)
    assert swapped == texts[3:] + texts[:3]
    assert len(set(texts)) > 2


def caption(run: Run, clips: Sequence[Clip]) -> list[str]:
    run.module.captioner.eval()
    dataset = run.data.make_dataset(clips)
    samples = [dataset[index] for index in range(len(clips))]
    batches = [run.data.prompt_collator(samples[start : start + 5]) for start in (0, 5)]
    return [text for batch in batches for text in run.module.captioner.generate(batch)]


def test_prediction_files_hold_what_was_said_of_each_clip(straight_run: Path) -> None:
    names = {path.name for path in (straight_run / "predictions").iterdir()}
    assert names == {"val-epoch=00.jsonl", "val-epoch=01.jsonl", "val.jsonl", "test.jsonl"}
    rows = [
        json.loads(line)
        for line in (straight_run / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["id"] for row in rows] == [f"test_{index:05d}" for index in range(8)]
    for row in rows:
        assert list(row) == ["id", "video", "prediction", "references", "scores", "tokenizer"]
        assert row["tokenizer"] == f"mecab_ko ({get_tokenizer('mecab_ko').version})"
        assert Path(row["video"]).is_file()
        assert all(isinstance(text, str) and text for text in row["references"])
        assert {"bleu_4", "rouge_l"} <= set(row["scores"])


def test_the_command_says_of_a_prediction_file_what_the_run_said(
    straight_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((straight_run / "summary.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    score_file([str(straight_run / "predictions" / "test.jsonl"), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["clips"] == 8
    for name in ("bleu_4", "cider", "rouge_l", "meteor", "chrf"):
        assert record["scores"][name] == pytest.approx(summary["scores"][f"test/{name}"]), name


def test_scores_of_the_loop_and_of_facts_are_logged(straight_run: Path) -> None:
    rows = [json.loads(line) for line in (straight_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [row for row in rows if "val/loss" in row]
    assert [(row["step"], row["epoch"]) for row in validations] == [(4, 0), (8, 1)]
    for name in ("bleu_1", "bleu_4", "cider", "cider_d", "rouge_l", "distinct_ratio", "facts/mean", "facts/direction"):
        assert all(f"val/{name}" in row for row in validations), name
    assert all(row["val/is_collapsed"] in (0.0, 1.0) for row in validations)
    assert all(0 < row["val/loss"] < 10 for row in validations)


def test_the_validation_loss_is_a_mean_over_label_tokens(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(
        tiny_config(tmp_path, "data.eval_batch_size=3", "llm.max_caption_tokens=96", "evaluation.max_clips=7")
    )
    run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    clips = run.data.clips["val"][:7]
    dataset = run.data.make_dataset(clips)
    loss, count = run.module.captioner.eval()(run.data.train_collator([dataset[index] for index in range(7)]))
    assert len(run.evaluation.predictions) == 7
    assert run.evaluation.scores["val/loss"] == pytest.approx(float(loss) / count, rel=1e-5)
    found = {name: value.item() for name, value in run.trainer.callback_metrics.items()}
    assert found == run.evaluation.scores, "any callback of Lightning finds the very values that are logged"


def test_validation_reads_and_encodes_each_clip_once(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    settings = (
        "data.eval_batch_size=3",
        "evaluation.max_clips=7",
        "evaluation.clips_per_slot=2",
        "cache.enabled=false",
    )
    run = make_run(tiny_config(tmp_path, *settings))
    captioner, seen = run.module.captioner, {"encoded": 0, "read": 0}
    encoder, decoded = captioner.encoder, run.data.make_dataset
    assert encoder is not None
    encoder.register_forward_pre_hook(lambda _, inputs: seen.update(encoded=seen["encoded"] + len(inputs[0])))

    class Counted:
        def __init__(self, clips: Sequence[Clip]) -> None:
            self.inner = decoded(clips)

        def __len__(self) -> int:
            return len(self.inner)  # type: ignore[arg-type]

        def __getitem__(self, index: int) -> Any:
            seen["read"] += 1
            return self.inner[index]

    run.data.make_dataset = Counted  # type: ignore[assignment]
    run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert seen == {"encoded": 7, "read": 7}
    texts = {row.clip.id: row.text for row in run.evaluation.predictions}
    clips = run.data.clips["val"][:7]
    assert texts == dict(zip((clip.id for clip in clips), caption(run, clips), strict=True)), "those of frames"


def test_a_collapsed_model_is_told(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tiny_config(tmp_path))
    run.module.captioner.generate = lambda batch: ["바다가 보인다."] * len(batch)  # type: ignore[method-assign]
    scores = run_test(run, Split.test)
    assert scores["test/distinct_ratio"] == 1 / 8
    printed = capsys.readouterr().out
    assert printed.count("Warning: test: The captions have collapsed: only 12% of 8 are distinct") == 1
    run.module.captioner.generate = lambda batch: [clip.id for clip in batch.clips]  # type: ignore[method-assign]
    assert run_test(run, Split.test)["test/distinct_ratio"] == 1
    assert "collapsed" not in capsys.readouterr().out


def make_predictions(names: Sequence[int]) -> list[Prediction]:
    return [Prediction(Clip(f"{name:03d}", f"{name}.mp4", (f"글 {name}",)), f"말 {name}") for name in names]


ALL = tuple(row.clip for row in make_predictions([3, 9, 8, 7, 6, 5, 4, 2, 1, 0]))  # not all of them are captioned


def keep(predictions: Sequence[Prediction]) -> CaptionScore:
    captions = CaptionScore()
    for row in predictions:
        captions.update([row.text], [row.clip.captions], [row.clip.id])
    return captions


def test_one_process_gathers_its_own_sorted() -> None:
    assert gather(keep(make_predictions([2, 0, 1])), ALL) == make_predictions([0, 1, 2])
    assert gather(keep([]), ALL) == []


GATHER = """
import sys
import torch.distributed as dist
from tests.training.test_evaluation import ALL, keep, make_predictions
from vlmcap.training.callbacks.evaluation import gather

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=1, world_size=2)
rows = make_predictions([1, 3, 8])
print([(row.clip.id, row.text, row.clip.captions) for row in gather(keep(rows), ALL)])
print(len(gather(keep([]), ALL)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_gather_each_clip_once(tmp_path: Path) -> None:
    import torch.distributed as dist

    meeting, root = tmp_path / "meeting", Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", GATHER, str(meeting)]
    other = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=0, world_size=2, timeout=timedelta(seconds=240)
        )
        mine = gather(keep(make_predictions([0, 2, 4, 6, 8])), ALL)  # uneven, and clip 8 twice
        without_other = gather(keep(make_predictions([0, 2])), ALL)  # the other has no clip at all
        dist.destroy_process_group()
        printed = other.communicate(timeout=60)[0].splitlines()
    finally:
        other.kill()
    assert mine == make_predictions([0, 1, 2, 3, 4, 6, 8])
    assert without_other == make_predictions([0, 2])
    assert printed == [str([(row.clip.id, row.text, row.clip.captions) for row in mine]), "2"]


def test_a_prediction_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "predictions" / "val.jsonl"
    write_predictions(target, make_predictions([0, 1]), get_tokenizer("char"))
    before = target.read_text(encoding="utf-8")

    def fail(*_: object, **__: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="no space"):
        write_predictions(target, make_predictions([2]), get_tokenizer("char"))
    assert target.read_text(encoding="utf-8") == before


def test_without_facts_or_swapping_only_the_text_is_scored() -> None:
    scores = CaptionScorer(EvaluationConfig(tokenizer="char")).score(make_predictions(range(4)))
    assert "cider" in scores
    assert not [name for name in scores if name.startswith(("facts/", "swapped/", "permuted/"))]


def test_clips_with_a_category_are_scored_by_it_too(tmp_path: Path) -> None:
    rows = make_predictions(range(5))
    rows = [
        replace(row, clip=replace(row.clip, category="바다" if index < 3 else "")) for index, row in enumerate(rows)
    ]
    scorer = CaptionScorer(EvaluationConfig(tokenizer="char"))
    scores = scorer.score(rows)
    assert (scores["category/바다/clips"], scores["category/(none)/clips"]) == (3, 2)
    means = [scores["category/바다/rouge_l"] * 3, scores["category/(none)/rouge_l"] * 2]
    assert sum(means) / 5 == pytest.approx(scores["rouge_l"], abs=1e-12)
    assert not [name for name in scorer.score(rows, metrics=("bleu_4",)) if name.startswith("category/")]
    write_predictions(tmp_path / "p.jsonl", rows, scorer.tokenizer)
    written = [
        json.loads(line).get("category") for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert written == ["바다", "바다", "바다", None, None]


def test_synonyms_and_width_reach_the_scores(tmp_path: Path) -> None:
    rows = [Prediction(Clip("a", "a.mp4", ("바닷가가 보인다. 3km",)), "해변이 보인다. ３ｋｍ")]
    plain = CaptionScorer(EvaluationConfig()).score(rows)
    same = tmp_path / "same.json"
    same.write_text('{"해변": ["바닷가"]}', encoding="utf-8")
    scorer = CaptionScorer(EvaluationConfig(synonyms=str(same), normalize_fullwidth=True))
    folded = scorer.score(rows)
    assert folded["content_recall"] > plain["content_recall"]
    assert folded["content/noun_recall"] > plain["content/noun_recall"]
    assert folded["bleu_1"] > plain["bleu_1"]
    assert "full-width normalized" in describe_tokenizer(scorer.tokenizer)
    same.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"same\.json must be an object of words"):
        CaptionScorer(EvaluationConfig(synonyms=str(same)))


@pytest.mark.parametrize("metrics", [None, ("bleu_4", "cider", "cider_d")])
def test_the_reference_packages_scorers_may_stand_in(
    metrics: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycocoevalcap.cider.cider import Cider

    config = EvaluationConfig(
        tokenizer="char", backend=EvaluationBackend.pycocoevalcap, swap_videos=True, swap_shifts=2
    )
    native = CaptionScorer(replace(config, backend=EvaluationBackend.native)).score(
        make_predictions(range(6)), metrics=metrics
    )
    assert CaptionScorer(config).score(make_predictions(range(6)), metrics=metrics) == pytest.approx(
        native, rel=1e-9, abs=1e-9, nan_ok=True
    )
    monkeypatch.setattr(Cider, "compute_score", lambda self, truth, results: (5.0, []))
    scores = CaptionScorer(config).score(make_predictions(range(6)), metrics=metrics)
    assert scores["cider_d"] == 5.0
    assert scores["cider"] == pytest.approx(native["cider"])
    assert metrics is not None or scores["swapped/cider_d"] == 5.0


def test_evaluation_settings_are_composed_and_checked() -> None:
    from vlmcap.compose import compose

    config = compose(
        ["evaluation.backend=pycocoevalcap", "evaluation.bert_checkpoint=klue/bert-base", "evaluation.bert_layer=9"]
    )
    assert config.evaluation.backend is EvaluationBackend.pycocoevalcap
    assert (config.evaluation.bert_checkpoint, config.evaluation.bert_layer, config.evaluation.siglip_checkpoint) == (
        "klue/bert-base",
        9,
        None,
    )
    for override in ("evaluation.backend=coco", "evaluation.siglip_frames=0", "evaluation.bert_checkpoint=''"):
        with pytest.raises(ValueError, match=override.split("=")[0].replace(".", r"\.")):
            compose([override])
