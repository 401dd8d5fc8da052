"""`python -m vlmcap.metrics` scores anyone's file, answers --help at once, and tells a mistake in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmcap.metrics import get_tokenizer, score_captions
from vlmcap.metrics.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PREDICTIONS = ["넓은 바다에 파도가 밀려온다.", "사람들이 길을\u2028걷는다.", ""]
REFERENCES = [["바다에 파도가 친다.", "바닷가에 파도가 밀려온다."], ["사람들이 해변을 걷는다."], ["해가 진다."]]
EXPECTED = score_captions(PREDICTIONS, REFERENCES)


def write(path: Path, content: object) -> str:
    """JSONL of a list, JSON of a dictionary, a text as it is."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8", newline="\n"
    )
    return str(path)


def rows(**extra: object) -> list[dict[str, object]]:
    pairs = enumerate(zip(PREDICTIONS, REFERENCES, strict=True))
    return [{"id": f"c{i}", "prediction": text, "references": refs, **extra} for i, (text, refs) in pairs]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    main([*arguments, "--json"])
    scores: dict[str, float] = json.loads(capsys.readouterr().out)["scores"]
    return scores


def test_our_own_prediction_files_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", rows(video="x.mp4", scores={"cider": 1.0}, tokenizer="char"))
    assert run(capsys, path) == pytest.approx(EXPECTED)
    wanted = run(capsys, path, "--metrics", "rouge_l,bleu_4", "--tokenizer", "char")
    assert wanted == pytest.approx(
        score_captions(PREDICTIONS, REFERENCES, tokenizer="char", metrics=["rouge_l", "bleu_4"])
    )
    assert run(capsys, path, "--backend", "pycocoevalcap") == pytest.approx(EXPECTED, rel=1e-9)


def test_the_table_names_the_tokeniser_and_the_cider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([write(tmp_path / "p.jsonl", rows())])
    lines = capsys.readouterr().out.splitlines()
    version = get_tokenizer("mecab_ko").version
    assert lines[0] == f"3 clips, 4 references, tokens by mecab_ko ({version})"
    cider = next(line for line in lines if "CIDEr (no length penalty)" in line)
    assert float(cider.split()[-1]) == pytest.approx(EXPECTED["cider"], abs=1e-4)
    main([write(tmp_path / "p.jsonl", rows()), "--json", "--tokenizer", "whitespace"])
    record = json.loads(capsys.readouterr().out)
    assert record["tokenizer"] == {"name": "whitespace", "version": "str.split"}
    assert (record["clips"], record["references"], record["backend"]) == (3, 4, "native")


def test_references_come_from_a_file_of_their_own_by_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(
        tmp_path / "p.jsonl", [{"id": f"c{i}", "prediction": text} for i, text in enumerate(PREDICTIONS)]
    )
    others = [{"id": row["id"], "references": row["references"]} for row in rows()]
    references = write(tmp_path / "r.jsonl", [*others[::-1], {"id": "more", "references": ["산"]}])
    main([predictions, "--references", references, "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scores"] == pytest.approx(EXPECTED)
    assert "1 clips with references have no prediction and are left out" in captured.err


@pytest.mark.parametrize("form", ["list", "object"])
def test_cocos_results_and_annotations(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [{"image_id": i, "caption": text, "id": 7} for i, text in enumerate(PREDICTIONS)]
    notes = [
        {"id": 10 * i + n, "image_id": i, "caption": text}
        for i, refs in enumerate(REFERENCES)
        for n, text in enumerate(refs)
    ]
    first = write(tmp_path / "results.json", json.dumps(results[::-1], indent=1 if form == "list" else None))
    content = {"info": {}, "images": [], "annotations": notes} if form == "object" else json.dumps(notes)
    scores = run(capsys, first, "--references", write(tmp_path / "annotations.json", content))
    assert scores == pytest.approx(EXPECTED)


def test_two_text_files_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(tmp_path / "hyp.txt", "\r\n".join(PREDICTIONS) + "\r\n")
    first = write(tmp_path / "ref.txt", "\n".join(refs[0] for refs in REFERENCES) + "\n")
    second = write(tmp_path / "ref2", f"{REFERENCES[0][1]}\n\n\n")
    assert run(capsys, predictions, "--references", first, second) == pytest.approx(EXPECTED)
    one_each = score_captions(PREDICTIONS, [refs[:1] for refs in REFERENCES])
    assert run(capsys, predictions, "--references", first) == pytest.approx(one_each)


def test_a_single_clip_is_legal_and_json_has_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([write(tmp_path / "p.jsonl", rows()[:1]), "--json"])
    captured = capsys.readouterr()
    scores = json.loads(captured.out)["scores"]
    assert scores["cider"] is None
    assert scores["bleu_1"] == pytest.approx(
        score_captions(PREDICTIONS[:1], REFERENCES[:1], metrics=["bleu_1"])["bleu_1"]
    )
    assert captured.err.count("NaN") == 1


def test_a_collapsed_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [{"prediction": "바다가 보인다.", "references": [f"글 {i}"]} for i in range(40)]
    main([write(tmp_path / "p.jsonl", same)])
    assert "Warning: " in capsys.readouterr().err
    main([write(tmp_path / "p.jsonl", rows())])
    assert capsys.readouterr().err == ""


MISTAKES: list[tuple[object, tuple[str, ...], str]] = [
    ([{"prediction": "a"}], (), "entry 1 has no references; name their file with --references"),
    ([{"text": "a"}], (), "p.jsonl: entry 1 has no key prediction .*its keys are text"),
    ('{"prediction": "a"\n', (), "p.jsonl, line 1 is not JSON"),
    ("[1, 2]\n", (), "entry 1 is not a JSON object"),
    ("", (), "There are no captions to score"),
    (rows() + rows(), (), "two predictions have the id c0"),
    ([{"prediction": None, "references": ["a"]}], (), "The prediction of clip 0 is None"),
    ([{"prediction": "a", "references": []}], (), "Clip 0 has no reference"),
    (rows(), ("--tokenizer", "korean"), "Unknown tokenizer 'korean'"),
    (rows(), ("--metrics", "cidre"), "Unknown metric 'cidre'"),
    (rows(), ("--backend", "coco"), "Unknown backend 'coco'"),
    (rows(), ("--references", "nowhere.jsonl"), "nowhere.jsonl cannot be read: No such file"),
]


@pytest.mark.parametrize(("content", "arguments", "told"), MISTAKES, ids=[told[:40] for _, _, told in MISTAKES])
def test_a_mistake_is_one_sentence_and_code_2(
    content: object, arguments: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "p.jsonl", content)
    with pytest.raises(SystemExit) as ended:
        main([path, *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert re.search(told, captured.err), captured.err


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, short = write(tmp_path / "hyp.txt", "a\nb\n"), write(tmp_path / "ref.txt", "a\n")
    other = write(tmp_path / "r.jsonl", [{"id": "z", "references": ["a"]}])
    binary = tmp_path / "b.txt"
    binary.write_bytes("바다".encode("cp949"))
    for arguments, told in (
        ([text, "--references", short], "1 lines but there are 2 predictions"),
        ([text, "--references", other], "the predictions have no ids"),
        ([write(tmp_path / "p.jsonl", rows()), "--references", other], "no references for the prediction with id c0"),
        ([text, "--references", other, other], "must all be text files"),
        ([str(binary), "--references", short], "not UTF-8"),
        ([str(tmp_path)], "cannot be read"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_help_answers_without_torch_or_an_analyser() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['metrics', '--help']\n"
        "try:\n    runpy.run_module('vlmcap.metrics', run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'lightning', 'torchmetrics', 'sacrebleu', 'mecab_ko', 'kiwipiepy', "
        "'pycocoevalcap'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--tokenizer" in done.stdout
    assert "cider_d" in done.stdout


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmcap.metrics", write(tmp_path / "p.jsonl", rows()), "--tokenizer", "korean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: Unknown tokenizer 'korean'")


def test_categories_are_scored_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_categories = [row | {"category": "바다" if index == 0 else None} for index, row in enumerate(rows())]
    path = write(tmp_path / "p.jsonl", with_categories)
    main([path, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert {name: row["clips"] for name, row in record["categories"].items()} == {"바다": 1, "": 2}
    main([path])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown[-3:]] == ["category", "바다", "(none)"]
    assert "CIDEr (no length penalty)" in shown[-3]
    assert shown[-2].split()[1] == f"{record['categories']['바다']['bleu_4']:.4f}"


def test_width_and_synonyms_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", [{"prediction": "해변까지 ３ｋｍ", "references": ["바닷가까지 3km"]}])
    same = write(tmp_path / "same.json", {"해변": ["바닷가"]})
    names = ("--metrics", "bleu_1,content_recall")
    assert run(capsys, path, *names)["content_recall"] < 1
    assert run(capsys, path, *names, "--synonyms", same)["content_recall"] > run(capsys, path, *names)["content_recall"]
    assert run(capsys, path, *names, "--normalize-fullwidth")["bleu_1"] > run(capsys, path, *names)["bleu_1"]
