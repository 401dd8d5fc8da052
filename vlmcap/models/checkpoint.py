"""Where a checkpoint's files are, and which content they hold."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmcap.errors import UserError

# Weights as safetensors only: pickled weights and remote code are never fetched.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_CONTENT = (
    "*.safetensors",
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a frozen base is, so that another one is not taken for it.

    Attributes:
        name: Hub id or folder as configured.
        revision: Commit on the hub; empty for a folder.
        sha256: Over the content of weights, configuration, image processor, tokenizer and chat template.
    """

    name: str
    revision: str
    sha256: str

    def as_dict(self) -> dict[str, str]:
        """Plain data for a checkpoint."""
        return asdict(self)


def locate(checkpoint: str, revision: str | None, *, key: str, gate: str | None = None) -> Path:
    """The local folder of `checkpoint`, downloaded when it is a hub id.

    Args:
        checkpoint: Folder in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.
        key: Configuration key, for the error.
        gate: Licence that the hub wants accepted first.

    Raises:
        UserError: No such folder and no download.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; {key} must name a folder in Hugging Face layout or a hub id")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client raises a dozen kinds; to the user they are one
        licence = f" and accept its licence there first ({gate})" if gate else ""
        raise UserError(
            f"checkpoint '{checkpoint}' is neither a folder nor could it be downloaded ({type(error).__name__}): "
            f"set {key} to a local folder in Hugging Face layout, or connect to the hub{licence}"
        ) from error


def fingerprint(folder: Path, name: str, memo: Path | None = None) -> Fingerprint:
    """The identity of the files in `folder`.

    Args:
        folder: As `locate` returned it.
        name: The configured name.
        memo: JSON file that remembers hashes by path, size and time of change, as hashing 60 GB takes a minute.
    """
    files = sorted(file for pattern in _CONTENT for file in folder.glob(pattern))
    known = _read_memo(memo)
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        tag = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        known[tag] = known.get(tag) or _file_sha256(file)
        digest.update(f"{file.name}:{known[tag]}\n".encode())
    _write_memo(memo, known)
    revision = folder.name if folder.parent.name == "snapshots" else ""
    return Fingerprint(name, revision, digest.hexdigest())


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_memo(memo: Path | None) -> dict[str, str]:
    if memo is None or not memo.is_file():
        return {}
    try:
        known = json.loads(memo.read_text())
    except json.JSONDecodeError:
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path | None, known: dict[str, str]) -> None:
    if memo is None:
        return
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial = memo.with_name(f"{memo.name}.{os.getpid()}")
    partial.write_text(json.dumps(known, indent=1))
    partial.replace(memo)
