"""The page in a headless Chromium: languages, themes, widths and print."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.reporting.report.browser import NEEDS_BROWSER, Browser

pytestmark = [pytest.mark.browser, NEEDS_BROWSER]


def test_all_texts_are_in_korean_and_the_language_is_remembered(browser: Browser, page_file: Path) -> None:
    english = set(browser.texts("button, h2, h3, th, .facts span, td.verdict, .muted"))
    browser.click("#language")
    assert browser.run("document.documentElement.lang") == "ko"
    assert browser.run("document.activeElement.id") == "language"
    assert "순위표" in browser.texts("h2")
    assert "이 클립과 시드에서는 유의한 차이가 없습니다." in browser.texts("td.verdict")
    assert browser.texts(".notes li") == ["구간은 클립 선택을 고려합니다."]
    words = browser.run("Object.values(WORDS).filter((pair) => pair[0] !== pair[1]).map((pair) => pair[0])")
    left = set(browser.texts("button, h2, h3, th, .facts span, td.verdict, .muted")) & english
    assert left & set(words) == {"English"} & left
    browser.open_kept(page_file, "#language", "document.documentElement.lang", "ko")
    browser.click("#language")
    assert browser.run("document.documentElement.lang") == "en"


def test_dark_and_light(browser: Browser, page_file: Path) -> None:
    theme = "document.documentElement.dataset.theme"
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert light == "rgb(255, 255, 255)"
    browser.show_as(width=1280, scheme="dark")
    browser.run(
        f"new Promise((done) => {{ const look = () => ({theme} === 'dark' ? done() : setTimeout(look, 20)); look(); }})"
    )
    assert browser.run(theme) == "dark", "as the system is"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    browser.click("#theme")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == light
    browser.open_kept(page_file, "#theme", theme, "light")  # the chosen theme, although the system is dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Browser, scheme: str) -> None:
    """WCAG 2.1 asks for a contrast of 4.5."""
    browser.run(f"setTheme({scheme!r})")
    pairs = [
        ("text", "back"),
        ("muted", "back"),
        ("muted", "raised"),
        ("text", "tint"),
        ("accent", "tint"),
        ("same", "back"),
    ]
    pairs += [
        ("other", "other-back"),
        ("only", "only-back"),
        ("shared", "shared-back"),
        ("text", "warn-back"),
        ("bad", "warn-back"),
    ]
    script = "((name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim())"
    for front, back in pairs:
        one, other = (luminance(browser.run(f"{script}({name!r})")) for name in (front, back))
        contrast = (max(one, other) + 0.05) / (min(one, other) + 0.05)
        assert contrast >= 4.5, f"{front} on {back}: {contrast:.2f}"


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2.1 defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(browser: Browser, width: int, page_file: Path) -> None:
    assert browser.right_edge(page_file, width, ".drawing svg") <= width


def test_every_control_has_a_name(browser: Browser) -> None:
    script = """[...document.querySelectorAll('button, select, input, a, svg[role=img], [tabindex="0"][role]')]
      .filter((node) => !(node.textContent.trim() || node.getAttribute('aria-label')
        || node.closest('label')?.textContent.trim()))
      .map((node) => node.outerHTML.slice(0, 120))"""
    assert browser.run(script) == []


def test_it_prints(browser: Browser) -> None:
    browser.run("setTheme('dark')")
    content = base64.b64decode(browser.send("Page.printToPDF", printBackground=True)["data"])
    assert content.startswith(b"%PDF")
    browser.show_as(width=800, media="print")
    picture = Image.open(BytesIO(browser.picture())).convert("RGB")
    assert picture.getpixel((2, 2)) == (255, 255, 255), "print is on white in both themes"
    assert browser.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
    browser.show_as(width=1280)
