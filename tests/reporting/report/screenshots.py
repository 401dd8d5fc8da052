"""The pictures of docs/report, those of a report's page or that of a run's page.

python -m tests.reporting.report.screenshots report/index.html docs/report
python -m tests.reporting.report.screenshots outputs/first/index.html docs/report
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

from tests.reporting.report.browser import Browser, find_chromium

WIDTH = 1280
MOST_BYTES = 380_000  # larger pictures get few colours
NUM_COLOURS = 256
# Name, language, colours, first and last section, height at most in pixels.
PICTURES = (
    ("overview-light", "en", "light", "overview", "leaderboard", 1450),
    ("charts-dark-korean", "ko", "dark", "effects", "costs", 1500),
    ("captions", "en", "light", "clips", "clips", 1300),
)
RUN_PICTURES = (("run-korean", "ko", "light", "overview", "clips", 1180),)
_BOX = """(() => {{ const top = document.getElementById({first!r}).getBoundingClientRect().top + scrollY - 24;
  const end = document.getElementById({last!r}).getBoundingClientRect().bottom + scrollY + 24;
  return {{x: 0, y: top, width: {width}, height: Math.min({most}, end - top)}}; }})()"""


def main(page: Path, folder: Path) -> None:
    """Writes the pictures."""
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium found")
    folder.mkdir(parents=True, exist_ok=True)
    with Browser(program, timeout_s=120) as browser:
        browser.open(page)
        pictures = RUN_PICTURES if browser.run("IS_ONE_RUN") else PICTURES
        for name, language, theme, first, last, most in pictures:
            browser.show_as(width=WIDTH, height=1000)
            browser.open(page)
            browser.run(f"remembered('language', {language!r}); remembered('theme', {theme!r})")
            browser.open(page)
            box = browser.run(_BOX.format(first=first, last=last, width=WIDTH, most=most))
            content = BytesIO()
            picture = Image.open(BytesIO(browser.picture(clip=box))).convert("RGB")
            picture.save(content, "PNG", optimize=True)
            if len(content.getvalue()) > MOST_BYTES:
                content = BytesIO()
                picture.quantize(NUM_COLOURS, kmeans=2, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
            (folder / f"{name}.png").write_bytes(content.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
