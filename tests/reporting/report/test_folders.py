"""Run folders that are complete, broken, unfinished, refused, or written by other programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlmcap.compose import read_yaml
from vlmcap.errors import UserError
from vlmcap.reporting.report.captions import read_captions
from vlmcap.reporting.report.folders import MAX_POINTS, RunFolder, find_runs, read_curves, read_run


def copied(sweep: Path, folder: Path, number: int = 0) -> Path:
    shutil.copytree(sweep / str(number), folder)
    return folder


def read(folder: Path) -> RunFolder:
    return read_run(folder, read_yaml)


def test_runs_are_found_below_a_sweep_in_order(sweep: Path, tmp_path: Path) -> None:
    found = find_runs([sweep.parent, sweep / "3"])
    assert [path.name for path in found] == [str(number) for number in range(10)]
    (tmp_path / "10" / "checkpoints").mkdir(parents=True)
    (tmp_path / "9").mkdir()
    for path in (
        tmp_path / "10" / "summary.json",
        tmp_path / "9" / "metrics.jsonl",
        tmp_path / "10" / "checkpoints" / "summary.json",
    ):
        path.write_text("{}")
    assert [path.name for path in find_runs([tmp_path])] == ["9", "10"]


def test_links_in_a_circle_end(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(sweep / "0")
    (tmp_path / "runs" / "up").symlink_to(tmp_path)
    assert [path.name for path in find_runs([tmp_path])] == ["first"]


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing is not a folder"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path])


def test_a_complete_run(sweep: Path) -> None:
    run = read(sweep / "0")
    assert (run.status, run.reason, run.warnings) == ("finished", "", [])
    assert run.config["encoder.name"] == "siglip2"
    assert run.config["tuning.lora.rank"] == 16
    assert run.scores["val/cider"] > 1
    assert (run.seconds["total"], run.peak_memory_gib, run.planned_gib) == (900.0, 13.0, 11.5)
    assert run.parameters == {"total": 4_420_000_000, "trained": 20_000_000}
    assert run.command == "python train.py encoder=siglip2 projector=mlp llm=qwen3_4b hardware=l4 seed=0"
    assert run.predictions.keys() == {"val", "test"}
    assert len(run.curve["train/loss"]) == 20
    assert [step for step, _ in run.curve["val/cider"]] == [
        20,
        40,
    ]  # not the score at the end, which is of the best checkpoint
    assert "test/cider" not in run.curve


def test_refused_and_failed_jobs(sweep: Path) -> None:
    refused, failed = read(sweep / "8"), read(sweep / "9")
    assert (refused.status, refused.planned_gib) == ("refused", 31.0)
    assert "hardware=a100" in refused.reason
    assert "llm=qwen3_32b" in refused.command
    assert (failed.status, failed.seconds) == ("failed", {"total": 90.0})


def test_a_run_that_was_killed(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path / "run")
    for name in ("summary.json", "status.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "predictions")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: text.rindex("{") + 20])
    run = read(folder)
    assert (run.status, run.scores, run.predictions) == ("unfinished", {}, {})
    assert run.curve["train/loss"]
    assert run.warnings == ["Skipped lines of metrics.jsonl that cannot be read: 1."]
    assert run.command == "python train.py encoder=siglip2 projector=mlp llm=qwen3_4b hardware=l4 seed=0"


def test_broken_files_become_warnings(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path / "run")
    (folder / "summary.json").write_text('{"scores": {"val/ci')
    (folder / "config.yaml").write_text("encoder: [unclosed")
    (folder / "status.json").write_text("[]")
    run = read(folder)
    assert run.status == "unfinished"
    assert {warning.split()[0] for warning in run.warnings} == {"summary.json", "config.yaml", "status.json"}


def test_hydras_own_configuration_stands_in(sweep: Path, tmp_path: Path) -> None:
    folder = copied(sweep, tmp_path / "run")
    (folder / "config.yaml").unlink()
    (folder / ".hydra" / "config.yaml").write_text(
        "encoder: {name: clip, image_size: '${hardware.image_size}'}\nseed: 3\n"
    )
    assert read(folder).config == {"encoder.name": "clip", "seed": 3}


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(
        '{"scores": {"a": 1, "b": null, "c": NaN, "d": true, "e": "x"}, "parameters": 3, "seconds": []}'
    )
    run = read(tmp_path)
    assert (run.scores, run.parameters, run.seconds, run.command) == ({"a": 1.0}, {}, {}, "python train.py")


def test_what_evaluate_leaves(sweep: Path, tmp_path: Path) -> None:
    shutil.copy(sweep / "0" / "predictions" / "test.jsonl", tmp_path / "predictions.jsonl")
    shutil.copy(sweep / "0" / "config.yaml", tmp_path / "evaluation.yaml")
    (tmp_path / "metrics.json").write_text(
        json.dumps({"checkpoint": "runs/a b/best.ckpt", "tokenizer": "mecab_ko (1)", "test/cider": 2.5})
    )
    run = read(find_runs([tmp_path])[0])
    assert (run.status, run.scores, run.tokenizer) == ("finished", {"test/cider": 2.5}, "mecab_ko (1)")
    assert run.predictions.keys() == {"test"}
    assert run.config["encoder.name"] == "siglip2"
    assert run.command == "python evaluate.py 'checkpoint=runs/a b/best.ckpt'"


def test_a_single_run_is_repeated_by_its_command_in_another_folder(tmp_path: Path) -> None:
    command = ["train.py", "llm.prompt=영상을 설명해 주세요.", "paths.output_dir=runs/1"]
    (tmp_path / "summary.json").write_text(json.dumps({"scores": {}, "command": command}))
    assert read(tmp_path).command == "python train.py 'llm.prompt=영상을 설명해 주세요.'"


def test_a_job_is_repeated_without_what_is_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"scores": {}, "command": ["train.py", "-m", "seed=0,1"]}))
    overrides = ["launcher=joblib", "seed=0", "sweep.folder=multirun/first", "sweep=optuna"]
    (tmp_path / "status.json").write_text(json.dumps({"status": "finished", "overrides": overrides}))
    assert read(tmp_path).command == "python train.py seed=0"


def test_long_courses_are_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": step, "train/loss": 1 / step, "train/lr_x": 1, "train/tokens_per_s": 9}) + "\n"
            for step in range(1, 1001)
        )
    )
    curves = read_curves(path, [])
    assert curves.keys() == {"train/loss", "train/lr_x"}
    assert len(curves["train/loss"]) <= MAX_POINTS + 1
    assert curves["train/loss"][0][0] == 1
    assert curves["train/loss"][-1] == (1000, 0.001)


def test_captions_with_broken_and_repeated_lines(tmp_path: Path) -> None:
    row = {
        "id": "b",
        "video": "b.mp4",
        "prediction": "바다",
        "references": ["바다이다"],
        "scores": {"cider": 1.0, "rouge_l": None},
    }
    lines = [
        json.dumps(row),
        json.dumps(row | {"id": "a", "references": "한 문장", "scores": {"cider": 2.0, "rouge_l": 0.5}}),
        json.dumps(row | {"prediction": "산", "scores": {"cider": 3.0}}),
        json.dumps(row | {"prediction": None}),
        json.dumps(row | {"references": []}),
        "[1, 2",
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(lines), encoding="utf-8")
    warnings: list[str] = []
    captions = read_captions(tmp_path / "val.jsonl", warnings, {})
    assert captions is not None
    assert (captions.ids, captions.texts, captions.references) == (
        ["a", "b"],
        ["바다", "산"],
        [["한 문장"], ["바다이다"]],
    )
    assert {name: values.tolist() for name, values in captions.scores.items()} == {"cider": [2.0, 3.0]}
    assert warnings == [
        "Skipped lines of val.jsonl that cannot be read: 3.",
        "Clips that val.jsonl contains more than once; the last line counts: 1.",
    ]
    (tmp_path / "empty.jsonl").touch()
    assert read_captions(tmp_path / "empty.jsonl", warnings, {}) is None
    assert read_captions(tmp_path / "missing.jsonl", warnings, {}) is None
