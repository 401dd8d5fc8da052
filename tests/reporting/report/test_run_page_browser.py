"""The page of a single run in a headless Chromium: animation, highlighting, copying and layout."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tests.reporting.report.browser import NEEDS_BROWSER, Browser

pytestmark = [pytest.mark.browser, NEEDS_BROWSER]

SHOWN = (
    "[...document.querySelector('.film').children].filter((frame) => getComputedStyle(frame).display !== 'none').length"
)
PLACE = "[...document.querySelector('.film').children].findIndex((frame) => frame.classList.contains('now'))"
MOVES = f"new Promise((done) => {{ const first = {PLACE}; setTimeout(() => done({PLACE} !== first), 270); }})"


def test_every_section_is_there(run_browser: Browser) -> None:
    names = ["overview", "clips", "scores", "curves", "categories", "took", "next", "configuration"]
    assert run_browser.run("[...document.querySelectorAll('main > section')].map((node) => node.id)") == names
    assert run_browser.texts(".answer .lead")[0].startswith("Facts (mean) 0.")
    assert "A model that ignores the video reaches about 0." in run_browser.texts(".answer p")[1]
    assert len(run_browser.texts(".clip")) == 12
    assert run_browser.texts("#curves h3") == ["Loss", "Score during training", "Learning rates"]
    assert run_browser.run("document.querySelectorAll('#curves path').length") >= 3


def test_clips_play_and_stop(run_browser: Browser) -> None:
    assert run_browser.run("document.querySelectorAll('.film').length") == 3
    assert run_browser.run("document.querySelector('.film img').naturalWidth") == 96
    assert run_browser.run(SHOWN) == 1 and run_browser.run(MOVES)
    run_browser.click("#play", "Pause")
    assert run_browser.run(SHOWN) == 3, "some frames side by side"
    assert not run_browser.run(MOVES)
    run_browser.click("#play", "Play")
    assert run_browser.run(SHOWN) == 1 and run_browser.run(MOVES)
    run_browser.click("#language")
    assert run_browser.texts("#play") == ["멈춤"] and run_browser.run(MOVES)


def test_nothing_moves_where_the_system_asks_for_less_motion(run_browser: Browser, run_page_file: Path) -> None:
    run_browser.show_as(width=1280, motion="reduce")
    run_browser.open(run_page_file)
    assert run_browser.run(SHOWN) == 3 and not run_browser.run(MOVES)
    run_browser.click("#play", "Play")
    assert run_browser.run(MOVES), "unless the user wants it"


def test_facts_are_coloured(run_browser: Browser) -> None:
    right, wrong = run_browser.texts(".clip dd.said-of .right"), run_browser.texts(".clip dd.said-of .wrong")
    assert right and wrong
    first = "DATA.clips[0].captions[0]"
    texts = run_browser.run(f"{first}.marks.map(([start, end]) => [...{first}.text].slice(start, end).join(''))")
    assert run_browser.texts(".clip:first-child dd.said-of span") == texts
    assert len(run_browser.texts(".clip dd.other-video")) == 12 and run_browser.texts(".clip dd.other-video .wrong")
    assert "of 7 facts correct" in run_browser.texts(".clip header")[0]
    run_browser.write("#clips .controls select", "reference")
    assert run_browser.texts(".clip dd.said-of .same") and not run_browser.texts(".clip dd.said-of .wrong")
    run_browser.click("[role=tab]", "Worst")
    assert len(run_browser.texts(".clip")) == 4


def test_hostile_text_stays_text(run_browser: Browser) -> None:
    assert run_browser.run("window.broken") is None
    assert any("<img src=x onerror" in text for text in run_browser.texts(".clip dd"))
    assert run_browser.run("document.querySelectorAll('main img:not(.frames img), main script').length") == 0


def test_scores_have_explanations(run_browser: Browser) -> None:
    rows = run_browser.texts(".readings:first-of-type tbody tr[data-score='facts/direction'] *")
    assert rows[0].startswith("Fact: direction") and "A model that ignores the video reaches about 0." in rows[1]
    rows_of_scores = "[...document.querySelectorAll('#scores > .scroll tbody tr')]"
    unexplained = f"{rows_of_scores}.filter((row) => !row.querySelector('.reading').textContent).length"
    assert run_browser.run(unexplained) == 0
    assert run_browser.texts("#took tbody tr") == [
        "Peak memory11.5\u00a0GiB10.0\u00a0GiB",
        "Preparing clips, features and the model–20\u00a0s",
        "Training, including validation8\u00a0min 0\u00a0s9\u00a0min 10\u00a0s",
        "Scoring the best checkpoint–30\u00a0s",
        "Whole run–10\u00a0min",
    ]


def test_commands_are_copied(run_browser: Browser, one_run: Path) -> None:
    names = run_browser.run("[...document.querySelectorAll('#next .command')].map((node) => node.dataset.command)")
    assert names == ["caption", "evaluate", "resume", "sweep", "compare"]
    copied = (
        "new Promise((done) => { navigator.clipboard.writeText = (text) => { done(text); return Promise.resolve(); };"
    )
    copied += "document.querySelector('[data-command=compare] .copy').click(); })"
    assert run_browser.run(copied) == f"vlmcap report {one_run} multirun --output report"


def test_all_texts_are_in_korean(run_browser: Browser) -> None:
    selector = "button, h2, h3, th, .reading, .command-name, #took th, .clip dt, .answer p"
    english = set(run_browser.texts(selector))
    run_browser.click("#language")
    words = run_browser.run("Object.values(WORDS).filter((pair) => pair[0] !== pair[1]).map((pair) => pair[0])")
    assert set(run_browser.texts(selector)) & english & set(words) <= {"English"}
    assert "점수와 읽는 법" in run_browser.texts("h2")


@pytest.mark.parametrize("width", [360, 400, 768, 1280])
def test_nothing_is_wider_than_the_window(run_browser: Browser, width: int, run_page_file: Path) -> None:
    assert run_browser.right_edge(run_page_file, width, ".drawing svg, .film, .readings") <= width


def test_it_prints(run_browser: Browser) -> None:
    assert base64.b64decode(run_browser.send("Page.printToPDF", printBackground=True)["data"]).startswith(b"%PDF")
    run_browser.show_as(width=800, media="print")
    assert run_browser.run(SHOWN) == 3, "paper shows some frames side by side"
    assert run_browser.run("getComputedStyle(document.getElementById('play')).display") == "none"
    run_browser.show_as(width=1280)
