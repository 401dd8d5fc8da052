"""Members of archives behind a real HTTP server: one range each, and never other bytes."""

from __future__ import annotations

import http.server
import os
import re
import signal
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest

from vlmcap.data.media import MediaError, archive_cache, member_address, open_media, stat_media

CONTENT = np.random.default_rng(0).bytes(100_000)


def write_archives(folder: Path) -> None:
    (folder / "영상.mp4").write_bytes(CONTENT)
    (folder / "front.txt").write_text("in front")
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", method) as archive:
            archive.write(folder / "front.txt", "front.txt")
            archive.write(folder / "영상.mp4", "영상.mp4")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "front.txt", "front.txt")
        tar.add(folder / "영상.mp4", "영상.mp4")


@pytest.fixture(autouse=True)
def fresh_indices() -> None:
    archive_cache._indices.clear()


class _RangeServer(http.server.SimpleHTTPRequestHandler):
    """A file server; `is_deaf` ignores ranges, as simple servers do."""

    is_deaf = False
    ranges: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and not self.is_deaf:
            type(self).ranges.append(wanted[0])
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[_RangeServer]]]:
    class Handler(_RangeServer):
        ranges: ClassVar[list[str]] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as running:
        Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", Handler
        running.shutdown()


@pytest.mark.parametrize("name", ["deflated.zip", "stored.zip", "a.tar"])
def test_a_member_on_a_real_server_is_one_range(
    tmp_path: Path, server: tuple[str, type[_RangeServer]], name: str
) -> None:
    write_archives(tmp_path)
    url, handler = server
    address = member_address(f"{url}/{name}", "영상.mp4")
    assert stat_media(address).size == len(CONTENT)
    handler.ranges.clear()
    assert open_media(address).read() == CONTENT
    assert len(handler.ranges) == 1


@pytest.mark.parametrize("name", ["deflated.zip", "stored.zip", "a.tar"])
def test_a_server_that_ignores_ranges_never_gives_other_bytes(
    tmp_path: Path, server: tuple[str, type[_RangeServer]], name: str
) -> None:
    write_archives(tmp_path)
    url, handler = server
    address = member_address(f"{url}/{name}", "영상.mp4")
    stat_media(address)
    handler.is_deaf = True
    with pytest.raises(MediaError):
        open_media(address)


def test_a_forked_process_reads_on(tmp_path: Path, server: tuple[str, type[_RangeServer]]) -> None:
    write_archives(tmp_path)
    address = member_address(f"{server[0]}/a.tar", "영상.mp4")
    assert open_media(address).read() == CONTENT  # the connections and the thread of this process are now there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
        child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if open_media(address).read() == CONTENT else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert open_media(address).read() == CONTENT
