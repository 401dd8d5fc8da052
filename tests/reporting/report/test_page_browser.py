"""The page in a headless Chromium: interaction."""

from __future__ import annotations

import pytest

from tests.reporting.report.browser import NEEDS_BROWSER, Browser
from tests.reporting.report.invented import HOSTILE

pytestmark = [pytest.mark.browser, NEEDS_BROWSER]


def order(browser: Browser) -> list[str]:
    found: list[str] = browser.run("[...document.querySelectorAll('.board tbody tr')].map((row) => row.dataset.id)")
    return found


def test_every_section_is_there(browser: Browser) -> None:
    names = ["overview", "leaderboard", "effects", "curves", "costs", "categories", "clips", "configuration"]
    assert browser.run("[...document.querySelectorAll('main > section')].map((node) => node.id)") == names
    assert browser.run(
        "[...document.querySelectorAll('#bar nav a')].every((link) => "
        "document.querySelector(link.getAttribute('href')))"
    )
    assert "siglip2 + mlp is the best of 3 configurations." in browser.texts(".answer")[0]
    assert "Not significantly different on this data: dinov3 + mlp" in browser.texts(".answer")[0]


def test_hostile_text_stays_text(browser: Browser) -> None:
    assert browser.run("window.broken") is None
    assert browser.run("document.querySelectorAll('main img:not(.frames img), main script').length") == 0
    assert f"encoders {HOSTILE}" in browser.texts("h1")
    browser.click("[role=tab]", "All")
    assert any("onerror" in text for text in browser.texts(".clip dd"))


def test_the_leaderboard_sorts_by_every_column(browser: Browser) -> None:
    assert order(browser) == ["g0", "g1", "g2", "gx"]
    keys = browser.run("[...document.querySelectorAll('.board thead button')].map((node) => node.dataset.sort)")
    assert {
        "rank",
        "name",
        "score",
        "difference",
        "p",
        "cost:peak_memory_gib",
        "score:val/bleu_4",
        "factor:encoder",
    } <= set(keys)
    for key in keys:
        browser.click(f'[data-sort="{key}"]')
        first = order(browser)
        assert sorted(first) == ["g0", "g1", "g2", "gx"]
        assert browser.run("document.querySelector('th[aria-sort] button').dataset.sort") == key
        browser.click(f'[data-sort="{key}"]')
        assert browser.run("document.querySelectorAll('th[aria-sort]').length") == 1
    browser.click('[data-sort="factor:encoder"]')
    assert order(browser) == ["g2", "gx", "g1", "g0"]
    browser.click('[data-sort="score"]')
    assert order(browser) == ["g0", "g1", "g2", "gx"]
    browser.click('[data-sort="score"]')
    assert order(browser) == ["g2", "g1", "g0", "gx"], "missing scores are last in both directions"


def test_a_heading_sorts_by_keyboard_and_keeps_the_focus(browser: Browser) -> None:
    browser.run("document.querySelector('[data-sort=name]').focus()")
    browser.press("Enter", 13)
    assert order(browser)[0] in {"g2", "gx"}
    assert browser.run("document.activeElement.dataset.sort") == "name"


def test_the_leaderboard_filters_by_text_and_by_factor(browser: Browser) -> None:
    browser.write("#leaderboard input[type=search]", "DINO")
    assert order(browser) == ["g1"]
    browser.write("#leaderboard input[type=search]", "failed")
    assert order(browser) == ["gx"]
    browser.write("#leaderboard input[type=search]", "no such")
    assert "No row matches the filter." in browser.texts(".board tbody")[0]
    browser.write("#leaderboard input[type=search]", "")
    browser.write("#leaderboard select", '"clip"')
    assert order(browser) == ["g2", "gx"]


def test_verdicts(browser: Browser) -> None:
    verdicts = browser.texts(".board td.verdict")
    assert verdicts[:3] == [
        "Best score.",
        "No significant difference over these clips and seeds.",
        "Significantly worse.",
    ]
    assert browser.texts(".board tbody tr:nth-child(3) td.number")[1] == "< 0.001"
    assert browser.run("document.querySelectorAll('.board svg.bar rect').length") == 5, (
        "three intervals, two of differences"
    )


def test_runs_are_shown_one_by_one(browser: Browser) -> None:
    browser.click(".choice button", "By run")
    assert order(browser) == ["r00", "r01", "r10", "r11", "r20", "r21", "rx0"]
    assert len(browser.texts(".badge.collapsed")) == 2, "in the table and above it"


def test_problems_are_listed(browser: Browser) -> None:
    rows = browser.texts(".troubles tbody tr")
    assert len(rows) == 2
    assert "all captions are alike" in rows[0]
    assert "failed" in rows[1]
    assert "the loss became NaN <img" in rows[1]
    assert "12.5\u00a0GiB" in rows[1]


def test_frames_are_shown_and_missing_ones_reported(browser: Browser) -> None:
    browser.click("[role=tab]", "All")
    sizes = browser.run("[...document.querySelectorAll('.frames img')].map((picture) => picture.naturalWidth)")
    assert len(sizes) == 12, "four frames of three clips"
    assert min(sizes) > 100
    assert sum("there is no such file" in text for text in browser.texts(".no-picture")) == 5


def test_clips_are_chosen_searched_and_grow(browser: Browser) -> None:
    assert len(browser.texts(".clip")) == 6
    assert browser.run("document.querySelector('.clip').dataset.clip") == "clip_000"
    browser.click("[role=tab]", "Best")
    assert browser.run("document.querySelector('.clip').dataset.clip") == "clip_021"
    browser.click("[role=tab]", "All")
    assert len(browser.texts(".clip")) == 8
    browser.click("button.more")
    assert len(browser.texts(".clip")) == 16
    browser.write("#clips input[type=search]", "클립013")
    assert browser.run("[...document.querySelectorAll('.clip')].map((node) => node.dataset.clip)") == ["clip_013"]


def test_tabs_move_by_arrows(browser: Browser) -> None:
    browser.run("document.querySelector('[role=tab]').focus()")
    browser.press("ArrowRight", 39)
    assert browser.run("document.activeElement.textContent") == "Best"
    assert browser.run("document.querySelector('[aria-selected=true]').textContent") == "Best"


def test_words_are_coloured(browser: Browser) -> None:
    browser.click("[role=tab]", "All")
    browser.write("#clips input[type=search]", "클립013")
    assert browser.texts(".clip dd:nth-of-type(3) .same") == ["연", "천천히", "움직인다."]
    assert browser.texts(".clip dd:nth-of-type(3) .near") == ["하늘에"], "for 하늘에서"
    assert browser.texts(".clip dd:nth-of-type(3) .other") == ["파란", "0", "개가", "클립013"]
    assert browser.texts(".clip dd.reference .missed")[:2] == ["빨간", "하나가"]
    browser.write("#clips .controls select", "runs")
    assert browser.texts(".clip dd:nth-of-type(3) .only") == ["0"]
    browser.write("#clips .controls select", "none")
    assert browser.run("document.querySelectorAll('.clip dd span').length") == 0


def test_runs_are_picked(browser: Browser) -> None:
    shown = "document.querySelectorAll('.clip:first-child dt:not(.reference)').length"
    assert browser.run(shown) == 3, "one of each configuration"
    browser.click(".picker button", "All")
    assert browser.run(shown) == 6
    browser.click(".picker input")
    assert browser.run(shown) == 5


def test_curves_show_values(browser: Browser) -> None:
    browser.run("document.querySelector('svg.curves').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.run(
        "(() => { const b = document.querySelector('svg.curves').getBoundingClientRect(); return [b.left, b.top]; })()"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 900, y=box[1] + 100)
    assert not browser.run("document.getElementById('tip').hidden")
    assert "siglip2 + mlp, seed 0" in browser.texts("#tip")[0]
    lines = browser.run("document.querySelectorAll('svg.curves > g > path').length")
    browser.click(".legend button")
    assert browser.run("document.querySelectorAll('svg.curves > g > path').length") == lines - 2
    browser.run("document.querySelector('svg.curves').focus()")
    browser.press("ArrowLeft", 37)
    assert "step" in browser.texts("#tip")[0]


def test_the_front_is_drawn_and_points_have_tooltips(browser: Browser) -> None:
    assert browser.run("document.querySelectorAll('#costs path.front').length") == 3
    browser.run("document.querySelector('#costs .point').focus()")
    assert "siglip2 + mlp" in browser.texts("#tip")[0]
    browser.press("Escape", 27)
    assert browser.run("document.getElementById('tip').hidden")


def test_configurations_are_compared_and_commands_copied(browser: Browser) -> None:
    assert browser.texts(".config tbody th") == ["encoder.name"]
    assert browser.texts(".config tbody td") == ["siglip2", "dinov3"]
    browser.click("#configuration input[type=checkbox]")
    assert browser.texts(".config tbody th") == ["data.root", "encoder.name", "llm.layers", "seed"]
    browser.write("#configuration input[type=search]", "LLM")
    assert browser.texts(".config tbody th") == ["llm.layers"]
    copied = "new Promise((done) => { document.addEventListener('copy', "
    copied += "() => done(String(document.activeElement.value)), {once: true});"
    copied += "navigator.clipboard.writeText = (text) => { done(text); return Promise.resolve(); };"
    copied += "document.querySelector('.command .copy').click(); })"
    assert browser.run(copied) == "python train.py encoder=siglip2 seed=0"
    assert (
        browser.run(
            "new Promise((done) => setTimeout(() => done(document.querySelector('.command .copy').textContent), 50))"
        )
        == "Copied"
    )
    assert len(browser.texts("#configuration details .command")) == 7
