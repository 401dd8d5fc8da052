"""Whole reports of synthetic runs: ranks, tests, excluded runs, clips, files and the command."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.reporting.report.run_folders import make_clips, make_predictions, write_run
from vlmcap import cli
from vlmcap.compose import read_yaml
from vlmcap.demo.grammar import FACTS
from vlmcap.errors import UserError
from vlmcap.metrics import score_captions
from vlmcap.reporting.report.analysis import Wanted, analyse
from vlmcap.reporting.report.folders import find_runs, read_run
from vlmcap.reporting.report.records import Report
from vlmcap.reporting.report.tables import conclusion, leaderboard_csv, report_markdown
from vlmcap.training.callbacks.scorer import Prediction

JOB = ["llm=qwen3_4b", "hardware=l4"]


def report_of(*folders: Path, **wanted: object) -> Report:
    runs = [read_run(path, read_yaml) for path in find_runs(folders)]
    return analyse(runs, Wanted(**wanted), version="0.1.0")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(sweep: Path) -> Report:
    return report_of(sweep)


def names(report: Report, ids: Sequence[str]) -> list[str]:
    return [{group.id: group.name for group in report.groups}[name] for name in ids]


def test_the_leaderboard(report: Report) -> None:
    assert (report.metric, report.num_clips, report.clip_metric) == ("val/cider", 30, "cider")
    assert report.factors == ["encoder", "projector", "llm"]
    best, *others = report.groups
    assert best.name == "siglip2 + mlp + qwen3_4b"
    assert (best.is_best, best.is_tied, best.difference, best.seeds) == (True, True, None, [0, 1])
    runs = {run.id: run for run in report.runs}
    assert best.scores["val/cider"] == pytest.approx(sum(runs[name].scores["val/cider"] for name in best.runs) / 2)
    assert best.over == "clips and seeds"
    compared = [group for group in others if group.difference is not None]
    assert len(compared) == 3
    for group in compared:
        assert group.difference is not None
        assert group.difference.value == pytest.approx(group.scores["val/cider"] - best.scores["val/cider"])
        assert group.difference.low is not None
        assert group.difference.low < group.difference.value < 0
    scores = [group.scores["val/cider"] for group in report.groups[:4]]
    assert scores == sorted(scores, reverse=True)
    assert others[-1].name == "siglip2 + mlp + qwen3_32b"
    assert others[-1].scores == {}


def test_runs_without_a_result_are_last(report: Report) -> None:
    assert [run.status for run in report.runs] == ["finished"] * 8 + ["refused", "failed"]
    assert report.runs[0].name.startswith("siglip2 + mlp + qwen3_4b, seed ")
    # The failed one has the configuration of a group, and is counted there without a score.
    group = next(group for group in report.groups if report.runs[-1].id in group.runs)
    assert len(group.runs) == 3
    assert len(group.seeds) == 2


def test_effects_fronts_and_categories(report: Report) -> None:
    effects = {effect.factor: effect for effect in report.effects}
    assert effects.keys() == {"encoder", "projector"}  # the second language model has no score
    assert all(effect.is_matched and effect.num_combinations == 2 for effect in effects.values())
    assert [level.value for level in effects["encoder"].levels] == ["siglip2", "clip"]
    fronts = {front.cost: names(report, front.groups) for front in report.fronts}
    assert fronts["peak_memory_gib"] == ["clip + mlp + qwen3_4b", "siglip2 + mlp + qwen3_4b"]
    assert fronts["seconds"] == ["siglip2 + cross_attention + qwen3_4b", "siglip2 + mlp + qwen3_4b"]
    assert fronts["trained"] == ["siglip2 + mlp + qwen3_4b"]
    assert {category.name: category.num_clips for category in report.categories} == {"바다": 10, "도시": 10, "숲": 10}
    run = report.runs[0]
    assert report.categories[0].scores[run.id]["cider"] == run.scores[f"val/category/{report.categories[0].name}/cider"]


def test_clips(report: Report) -> None:
    assert {reason for clip in report.clips for reason in clip.chosen} == {"worst", "best", "different", "random"}
    for clip in report.clips:
        assert [caption.run for caption in clip.captions] == [run.id for run in report.runs[:8]]
        scores = [caption.scores["cider"] for caption in clip.captions]
        assert clip.score == pytest.approx(sum(scores) / 8)
        assert clip.spread == pytest.approx(max(scores) - min(scores))
        assert clip.category
        assert clip.references
    assert max((clip.score for clip in report.clips), default=0) == next(
        clip.score for clip in report.clips if "best" in clip.chosen
    )


def test_fewer_clips(sweep: Path) -> None:
    few = report_of(sweep, clips=4, metric="test/cider")
    assert len(few.clips) <= 4
    assert all(clip.id.startswith("test_") for clip in few.clips)
    assert few.clips[0].chosen[0] == "worst"
    assert report_of(sweep, clips=0).clips == []


def test_reports_of_the_same_runs_are_equal(sweep: Path, report: Report) -> None:
    again = report_of(sweep).plain()
    assert json.dumps(again | {"created": ""}, allow_nan=False) == json.dumps(
        report.plain() | {"created": ""}, allow_nan=False
    )


def test_scores_that_are_computed_from_the_texts(sweep: Path) -> None:
    found = report_of(sweep, metric="val/bleu_4")
    assert "val/bleu_4" in found.groups[0].intervals
    assert found.groups[0].over == "clips and seeds"
    assert found.runs[0].warnings == []  # the computed scores are those of the run's summary


def test_a_score_that_is_not_of_clips(sweep: Path) -> None:
    found = report_of(sweep, metric="val/length_ratio")
    assert found.groups[0].over == "seeds"
    assert found.groups[1].difference is not None


def test_runs_with_other_clips_or_tokenizers_are_not_compared(sweep: Path, tmp_path: Path) -> None:
    fewer = write_run(tmp_path / "fewer", ["encoder=clip", *JOB], clips={"val": make_clips(20)}, quality=0.99)
    other = shutil.copytree(sweep / "0", tmp_path / "other")
    lines = (
        (other / "predictions" / "val.jsonl")
        .read_text("utf-8")
        .replace('"tokenizer": "mecab_ko', '"tokenizer": "whitespace')
    )
    (other / "predictions" / "val.jsonl").write_text(lines, "utf-8")
    bare = shutil.copytree(sweep / "1", tmp_path / "bare")
    shutil.rmtree(bare / "predictions")
    found = report_of(sweep, fewer, other, bare)
    runs = {Path(run.folder).name: run for run in found.runs}
    assert "its 20 clips differ from the 30 clips of most runs" in runs["fewer"].not_compared
    assert "it was scored with whitespace" in runs["other"].not_compared
    assert "--tokenizer mecab_ko" in runs["other"].not_compared
    assert "captions are missing" in runs["bare"].not_compared
    assert found.runs[0].name.startswith("siglip2 + mlp")  # 0.99 on other clips is not comparable
    assert [clip.captions for clip in found.clips if any(c.run == runs["fewer"].id for c in clip.captions)] == []
    assert any("Runs with val/cider that are not compared: 3." in note.en for note in found.notes)
    again = report_of(sweep, other, tokenizer="mecab_ko")
    assert "scored with" not in {Path(run.folder).name: run for run in again.runs}["other"].not_compared


def test_a_repeated_run_is_no_second_seed(sweep: Path, tmp_path: Path) -> None:
    for name in ("0", "2"):
        shutil.copytree(sweep / name, tmp_path / name)
    shutil.copytree(sweep / "0", tmp_path / "again")
    found = report_of(tmp_path)
    assert [group.seeds for group in found.groups] == [[0], [0]]
    assert [group.over for group in found.groups] == ["clips", "clips"]
    repeated = next(run for run in found.runs if run.not_compared)
    assert f"the configuration and the seed of {tmp_path / '0'}" in repeated.not_compared
    assert Path(repeated.folder).name == "again"


def test_scoring_again_with_another_tokenizer(sweep: Path) -> None:
    found = report_of(sweep, tokenizer="char")
    run = next(run for run in found.runs if Path(run.folder).name == "0")
    rows = [json.loads(line) for line in (sweep / "0" / "predictions" / "val.jsonl").read_text("utf-8").splitlines()]
    texts, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    assert run.scores["val/cider"] == pytest.approx(
        score_captions(texts, references, tokenizer="char", metrics=["cider"])["cider"]
    )
    assert found.tokenizer.startswith("char")


def test_captions_that_do_not_belong_to_the_scores(sweep: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sweep / "0", tmp_path / "mixed")
    shutil.copy(sweep / "7" / "predictions" / "val.jsonl", folder / "predictions" / "val.jsonl")
    (run,) = report_of(folder).runs
    assert any("for its captions; the latter is used here" in warning for warning in run.warnings)


def test_collapsed_captions_cause_a_warning(tmp_path: Path) -> None:
    clips = {"val": make_clips(12)}
    predictions = {"val": [Prediction(clip, "바다가 보인다.") for clip in clips["val"]]}
    write_run(tmp_path / "a", ["encoder=clip", *JOB], clips=clips, predictions=predictions)
    write_run(tmp_path / "b", ["encoder=siglip2", *JOB], clips=clips)
    found = report_of(tmp_path)
    collapsed = {run.name: run.is_collapsed for run in found.runs}
    assert collapsed == {"siglip2": False, "clip": True}
    assert "The captions have collapsed" in next(run for run in found.runs if run.is_collapsed).warnings[0]
    assert "The captions have collapsed" in report_markdown(found)


def test_facts_have_intervals_if_the_lexicon_exists(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(FACTS, ensure_ascii=False), "utf-8")
    clips = {"val": make_clips(15, has_categories=False)}
    for name, quality in (("a", 0.9), ("b", 0.5)):
        folder = write_run(
            tmp_path / name, [f"encoder={'clip' if name == 'a' else 'siglip2'}", *JOB], clips=clips, quality=quality
        )
        text = (folder / "config.yaml").read_text("utf-8")
        (folder / "config.yaml").write_text(
            text.replace("  facts: null", f"  facts: {tmp_path / 'facts.json'}"), "utf-8"
        )
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        summary["scores"]["val/facts/mean"] = 0.5
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    found = report_of(tmp_path, metric="val/facts/mean")
    assert [group.name for group in found.groups] == ["clip", "siglip2"]
    assert found.groups[0].over == "clips"
    assert found.runs[0].scores["val/facts/mean"] > 0.7
    assert found.categories == []


def test_a_single_run_and_runs_without_any_score(sweep: Path, tmp_path: Path) -> None:
    found = report_of(sweep / "0")
    assert conclusion(found).startswith("siglip2 + mlp + qwen3_4b is best by val/cider")
    assert "nothing to compare it with" in conclusion(found)
    assert found.effects == found.fronts == []
    shutil.copytree(sweep / "8", tmp_path / "8")
    with pytest.raises(UserError, match=r"none of the 1 runs has a score yet; .*says: the plan needs 31"):
        report_of(tmp_path)


def test_csv(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(leaderboard_csv(report))))
    assert len(rows) == 10
    first, run = rows[0], report.runs[0]
    assert (first["id"], first["encoder"], first["seed"], first["status"]) == (
        run.id,
        "siglip2",
        str(run.seed),
        "finished",
    )
    assert float(first["val/cider"]) == run.scores["val/cider"]
    assert (float(first["val/cider/low"]), float(first["val/cider/high"])) == run.intervals["val/cider"]
    assert float(first["group/score"]) == report.groups[0].scores["val/cider"]
    assert first["command"] == run.command
    assert rows[8]["reason"].startswith("the plan needs")
    assert rows[8]["val/cider"] == ""


def test_markdown(report: Report) -> None:
    text = report_markdown(report)
    assert "| **siglip2 + mlp + qwen3_4b** | 2 |" in text
    assert "## Effect of projector" in text
    assert "refused | the plan needs 31.0 GiB" in text
    assert "python train.py encoder=clip projector=mlp" in text
    lengths = {
        line.count("|") for line in text.split("## Leaderboard")[1].split("##")[0].splitlines() if line.startswith("|")
    }
    assert len(lengths) == 1


@pytest.mark.slow
def test_the_command(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "report"
    cli.main(["report", str(sweep), "--output", str(output), "--title", "비교", "--clips", "4"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"{output / 'index.html'}: 10 runs. siglip2 + mlp + qwen3_4b is best by val/cider: ")
    assert (output / "report.md").read_text("utf-8").startswith("# 비교")
    for name in ("leaderboard", "pareto", "curves"):
        with Image.open(output / f"{name}.png") as picture:
            assert picture.width > 500
    page = (output / "index.html").read_text("utf-8")
    assert "<title>비교</title>" in page
    assert "siglip2 + mlp + qwen3_4b" in page
    assert not list(output.glob(".*"))
    cli.main(["report", str(sweep), "--output", str(output)])  # again, over the existing files


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["missing"], "missing is not a folder"),
        (["{sweep}", "--metric", "val/cidr"], "no run has the metric --metric val/cidr"),
        (["{sweep}", "--clips", "-1"], "--clips must be 0 or more"),
        (["{sweep}", "--output", "{file}"], "cannot be created"),
        (["{sweep}", "--tokenizer", "mecab"], "Unknown tokenizer 'mecab'"),
    ],
)
def test_mistakes(
    sweep: Path, tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = [argument.format(sweep=sweep, file=tmp_path / "file") for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *given, *([] if "--output" in given else ["--output", str(tmp_path / "report")])])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_names_with_letters_that_no_font_has_are_not_drawn(monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    from vlmcap.reporting.report import pictures

    monkeypatch.setattr(pictures, "_KOREAN_FONTS", ())
    pictures._families.cache_clear()
    pictures._drawable.cache_clear()
    group = report.groups[0]
    assert pictures._label(group) == group.name
    object.__setattr__(
        korean := type(group)(**{key: getattr(group, key) for key in group.__slots__}), "name", "인코더 비교"
    )
    assert pictures._label(korean) == group.id
    monkeypatch.undo()
    pictures._families.cache_clear()
    pictures._drawable.cache_clear()


def test_predictions_of_quality_1_are_the_references() -> None:
    clips = make_clips(10)
    assert [row.text for row in make_predictions(clips, 1.0, 0)] == [clip.captions[0] for clip in clips]
