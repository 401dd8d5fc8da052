"""A headless Chromium for tests, controlled through a pipe with its DevTools protocol; it needs only the browser.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each followed by a zero byte.
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
    "--no-sandbox",  # required for root, for instance in a container
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
    """Returns the browser named in `CHROMIUM`, or the first one on the path."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


NEEDS_BROWSER = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium found; install chromium, or name it in CHROMIUM"
)


class Browser:
    """A browser with a new profile and one page; as a context manager, it is closed at the end."""

    def __init__(self, program: str, *, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self.events: list[dict[str, Any]] = []
        self._profile = tempfile.TemporaryDirectory(prefix="vlmcap-browser-", ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads commands from file descriptor 3 and writes answers to 4.
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
        """Closes the browser and removes its profile."""
        os.close(self._out)  # the browser exits when its pipe is closed
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        self._profile.cleanup()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command of the protocol and returns its result."""
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
        """Loads a file and clears earlier events."""
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        deadline_s = time.monotonic() + self.timeout_s
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(deadline_s, "loading"))

    def open_kept(self, page: Path, button: str, script: str, value: object, *, within_s: float = 10.0) -> None:
        """Loads a file again and waits until it shows a setting that was chosen before.

        A browser that has just started or is busy may lose the stored setting, which is then chosen again.

        Args:
            page: File of the page.
            button: Selector of the button that toggles the setting.
            script: Expression of the setting.
            value: Expected value of the setting.
            within_s: Timeout in seconds.

        Raises:
            AssertionError: The setting is not kept.
        """
        deadline_s = time.monotonic() + within_s
        self.open(page)
        while (found := self.run(script)) != value:
            assert time.monotonic() < deadline_s, f"{script} is {found!r}, not {value!r}"
            self.click(button)
            time.sleep(0.2)
            self.open(page)

    def right_edge(self, page: Path, width: int, selector: str) -> float:
        """Returns the rightmost pixel of a page and of the selected elements in a window of the given width."""
        self.show_as(width=width)
        self.open(page)
        edges = f"[...document.querySelectorAll({selector!r})].map((node) => node.getBoundingClientRect().right)"
        found: float = self.run(f"Math.max(document.documentElement.scrollWidth, ...{edges})")
        return found

    def run(self, script: str) -> Any:
        """Returns the value of an expression, which may be a promise."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"], ensure_ascii=False)[:2000])
        return answer["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Returns the texts of the selected elements."""
        found: list[str] = self.run(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")
        return found

    def click(self, selector: str, text: str = "") -> None:
        """Clicks the first selected element, or the first one with the given text."""
        self.run(
            f"[...document.querySelectorAll({selector!r})].find((node) => !{text!r} || node.textContent === "
            f"{text!r}).click()"
        )

    def write(self, selector: str, value: str) -> None:
        """Sets the value of a field and fires the events of typing and choosing."""
        node = f"document.querySelector({selector!r})"
        self.run(
            f"{node}.value = {value!r}; {node}.dispatchEvent(new Event('input')); {node}.dispatchEvent(new "
            "Event('change'))"
        )

    def press(self, key: str, code: int) -> None:
        """Presses a key; `code` is its Windows key code."""
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
        """Emulates a window size, the system's colour scheme and motion preference, and `print` or screen media."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def picture(self, *, whole: bool = False, clip: dict[str, float] | None = None) -> bytes:
        """Returns a PNG of the viewport, of the whole page, or of a clip (x, y, width, height in CSS pixels)."""
        part: dict[str, Any] = {"clip": clip | {"scale": 1}} if clip else {}
        answer = self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole or clip is not None, **part
        )
        return base64.b64decode(answer["data"])

    def errors(self) -> list[str]:
        """Returns uncaught exceptions, and errors and warnings of the console and of the browser."""
        self.run("0")  # reads all pending events
        found = []
        for event in self.events:
            name, params = event["method"], event.get("params", {})
            is_error = name == "Runtime.exceptionThrown"
            is_error = is_error or (
                name == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}
            )
            is_error = is_error or (name == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"})
            if is_error:
                found.append(json.dumps(params, ensure_ascii=False)[:1000])
        return found

    def requests(self) -> list[str]:
        """Returns the requested addresses except data URLs."""
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
