"""A local hub that serves folders by the routes that huggingface_hub calls, and simulates failures of the real one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_aVerySecretTokenOfThisTest"  # must appear in no output
_RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
# Status, X-Error-Code and X-Error-Message of refusals.
REFUSALS = {
    "gated, no account": (401, "GatedRepo", "Access to model is restricted. You must be authenticated to access it."),
    "gated, no access": (403, "GatedRepo", "Access to model is restricted and you are not in the authorized list."),
    "no repository": (404, "RepoNotFound", "Repository not found"),
    "bad token": (401, "", "Invalid credentials in Authorization header"),
    "forbidden": (403, "", "Fine-grained token has no such permission"),
    "busy": (429, "", "Too many requests"),
    "out of order": (503, "", "Service unavailable"),
}
# Others: "reset" ends the connection at once, "cut" in the middle of a body and at each later try, "cut once" heals,
# "hang" never answers, "no hub" answers like a proxy's page.


@dataclass
class Repository:
    """Folders by the name of their revision; a commit is named by a hash of its files."""

    revisions: dict[str, Path]
    fault: str = ""
    faulty: str = ""  # text in the names of the files that are affected by the fault

    def commits(self) -> dict[str, Path]:
        return {commit_of(folder): folder for folder in self.revisions.values()}

    def find(self, revision: str) -> Path | None:
        return self.revisions.get(revision) or self.commits().get(revision)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def commit_of(folder: Path) -> str:
    return hashlib.sha1(b"".join(name.encode() + (folder / name).read_bytes() for name in files_of(folder))).hexdigest()


@dataclass
class Hub:
    """The repositories, and the requests for them.

    Attributes:
        endpoint: As HF_ENDPOINT has it.
        repositories: By id.
        log: Method and path of each request.
        tokens: Authorization headers that came.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    ending: threading.Event = field(default_factory=threading.Event)

    def add(self, checkpoint: str, folder: Path, **revisions: Path) -> Repository:
        """Publishes a folder as `main`, and others as branches."""
        self.repositories[checkpoint] = Repository({"main": folder, **revisions})
        return self.repositories[checkpoint]

    def fetched(self, checkpoint: str = "") -> set[str]:
        """Names of files whose content was requested."""
        paths = (_RESOLVE.fullmatch(path) for method, path in self.log if method == "GET")
        return {found["file"] for found in paths if found and checkpoint in ("", found["id"])}

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables of a program that uses this hub."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        times = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return kept | times | proxies | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}


class Handler(BaseHTTPRequestHandler):
    """Handles one request; HEAD answers like GET without the content."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        self.hub.tokens.update(filter(None, [self.headers.get("Authorization")]))
        if found := _RESOLVE.fullmatch(path):
            self._resolve(found["id"], found["revision"], found["file"])
        elif found := _INFO.fullmatch(path):
            self._info(found["id"], found["revision"] or "main")
        else:
            self._refuse(404, "", "Not found")

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        content = b"{}"
        self._answer(status, content, {"X-Error-Code": code, "X-Error-Message": message, **headers})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _folder(self, checkpoint: str, revision: str, file: str) -> Path | None:
        """Returns the requested folder; None if the request has been answered."""
        repository = self.hub.repositories.get(checkpoint)
        fault = repository.fault if repository and repository.faulty in file else ""
        # The hub lists the files of a gated model to everyone.
        if fault in REFUSALS and not ("gated" in fault and not file):
            self._refuse(*REFUSALS[fault])
        elif repository is None:
            self._refuse(*REFUSALS["no repository"])
        elif fault == "hang":
            self.hub.ending.wait(60)
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault == "no hub":
            self._answer(200, b"<html>log in to this network</html>", {})
        elif (folder := repository.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return folder
        return None

    def _reset(self) -> None:
        """Resets the connection, like a broken network."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _info(self, checkpoint: str, revision: str) -> None:
        if (folder := self._folder(checkpoint, revision, "")) is None:
            return
        siblings = [{"rfilename": name} for name in files_of(folder)]
        values = {
            "id": checkpoint,
            "sha": commit_of(folder),
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _resolve(self, checkpoint: str, revision: str, name: str) -> None:
        if (folder := self._folder(checkpoint, revision, name)) is None:
            return
        commit = {"X-Repo-Commit": commit_of(folder)}
        if not (folder / name).is_file():
            self._refuse(404, "EntryNotFound", "Entry not found", **commit)
            return
        content = (folder / name).read_bytes()
        headers = commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        repository = self.hub.repositories[checkpoint]
        if self.command == "GET" and repository.fault.startswith("cut") and repository.faulty in name:
            self._cut(repository, content, headers)
        elif start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(start[1])
            total = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            self._answer(206, content[first:], headers | total)
        else:
            self._answer(200, content, headers)

    def _cut(self, repository: Repository, content: bytes, headers: dict[str, str]) -> None:
        """Sends half of the announced bytes, then nothing, unless the fault heals."""
        if self.headers.get("Range"):
            self._reset()
            return
        if repository.fault == "cut once":
            repository.fault = ""
        self._answer(200, content[: len(content) // 2], headers | {"Content-Length": str(len(content))})
        self.close_connection = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub, reached by programs of their own through `hub.environment`."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    state.ending.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def hub_here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub in the place of the real one for this process; the cache of downloads is empty, and no wait is long."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, close_session

    from vlmcap.planning.estimate import meta_models

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.5)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
    for module in (file_download, _http):  # between two tries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    close_session()
    meta_models._fetch_config.cache_clear()
    yield hub
    meta_models._fetch_config.cache_clear()
    with suppress(RuntimeError):
        close_session()
