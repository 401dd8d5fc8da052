"""A real headless Chromium for tests, driven over a pipe by its DevTools protocol.

Nothing to install beside the browser.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, a zero byte after each.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root, as in a container, has no other way
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--lang=en-US",
)


def find_chromium() -> str | None:
    """The browser: that of `CHROMIUM`, or the first that is on the path."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


NEEDS_BROWSER = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium found; install chromium, or name it in CHROMIUM"
)


class Browser:
    """A browser with a fresh profile and one page; a context manager that ends it."""

    def __init__(self, program: str, *, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self.events: list[dict[str, Any]] = []
        self._profile = tempfile.TemporaryDirectory(prefix="vlmcap-browser-", ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The protocol's pipe is file 3 (commands) and 4 (answers) of the browser.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        command = [
            "/bin/bash",
            "-c",
            shell,
            "bash",
            program,
            *_FLAGS,
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._number, self._session = b"", 0, ""
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser and removes its profile."""
        os.close(self._out)  # a browser whose pipe ends goes by itself
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        self._profile.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + self.timeout_s
        while True:
            answer = self._next(deadline_s, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found
            if "method" in answer:
                self.events.append(answer)

    def open(self, page: Path) -> None:
        """Loads a file; what happened before is forgotten."""
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        deadline_s = time.monotonic() + self.timeout_s
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(deadline_s, "loading"))

    def open_kept(self, page: Path, button: str, script: str, value: object, *, within_s: float = 10.0) -> None:
        """Loads a file, on which the choice of a button before is kept.

        A browser that has just started or is busy may lose what a page stores; the choice is then made again.

        Args:
            page: The file.
            button: Selector of the button, which changes from one value to the other.
            script: Expression of the value.
            value: The chosen one.
            within_s: Seconds within which the choice must be kept.

        Raises:
            AssertionError: It is not kept.
        """
        deadline_s = time.monotonic() + within_s
        self.open(page)
        while (found := self.run(script)) != value:
            assert time.monotonic() < deadline_s, f"{script} is {found!r}, not {value!r}"
            self.click(button)
            time.sleep(0.2)
            self.open(page)

    def right_edge(self, page: Path, width: int, selector: str) -> float:
        """How far a page and the elements of a selector reach to the right in a window of a width, in pixels."""
        self.show_as(width=width)
        self.open(page)
        edges = f"[...document.querySelectorAll({selector!r})].map((node) => node.getBoundingClientRect().right)"
        found: float = self.run(f"Math.max(document.documentElement.scrollWidth, ...{edges})")
        return found

    def run(self, script: str) -> Any:
        """The value of an expression, which may be a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"], ensure_ascii=False)[:2000])
        return answer["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """What the elements say."""
        found: list[str] = self.run(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")
        return found

    def click(self, selector: str, text: str = "") -> None:
        """Clicks the first element that fits and, with `text`, says just that."""
        self.run(
            f"[...document.querySelectorAll({selector!r})].find((node) => !{text!r} || node.textContent === "
            f"{text!r}).click()"
        )

    def write(self, selector: str, value: str) -> None:
        """Sets a field as typing or choosing does."""
        node = f"document.querySelector({selector!r})"
        self.run(
            f"{node}.value = {value!r}; {node}.dispatchEvent(new Event('input')); {node}.dispatchEvent(new "
            "Event('change'))"
        )

    def press(self, key: str, code: int) -> None:
        """One key, as a person presses it; `code` is its Windows key code."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def show_as(
        self,
        *,
        width: int,
        height: int = 900,
        scheme: str = "light",
        scale: float = 1.0,
        media: str = "",
        motion: str = "no-preference",
    ) -> None:
        """Size of the window, the system's colours, `print` or the screen, and whether the system asks to `reduce` motion."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def picture(self, *, whole: bool = False, clip: dict[str, float] | None = None) -> bytes:
        """A PNG of what is to be seen, of the whole page, or of a part (x, y, width, height in CSS pixels)."""
        part: dict[str, Any] = {"clip": clip | {"scale": 1}} if clip else {}
        answer = self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole or clip is not None, **part
        )
        return base64.b64decode(answer["data"])

    def errors(self) -> list[str]:
        """Uncaught exceptions, console errors and warnings, and what the browser itself complained of."""
        self.run("0")  # what was sent before is read now
        found = []
        for event in self.events:
            name, told = event["method"], event.get("params", {})
            is_error = name == "Runtime.exceptionThrown"
            is_error = is_error or (
                name == "Runtime.consoleAPICalled" and told["type"] in {"error", "warning", "assert"}
            )
            is_error = is_error or (name == "Log.entryAdded" and told["entry"]["level"] in {"error", "warning"})
            if is_error:
                found.append(json.dumps(told, ensure_ascii=False)[:1000])
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for, but those whose content stands in the address."""
        self.run("0")
        urls = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def _next(self, deadline_s: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer of the browser within {self.timeout_s:.0f} seconds: {waiting_for}")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended: {waiting_for}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message
