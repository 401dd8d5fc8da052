"""Where a checkpoint's files are, which content they hold, and single tensors out of them without reading the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.files import replacing

# Neither remote code nor pickles beside the weights, such as training_args.bin, are ever fetched.
_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFE, _PICKLED = "model*.safetensors", "pytorch_model*.bin"
_CONTENT = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
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


def locate(
    checkpoint: str, revision: str | None, *, key: str, gate: str | None = None, part: str | None = None, has_weights: bool = True
) -> Path:
    """The local folder of `checkpoint`, downloaded when it is a hub id; pickled weights only where there are no others.

    Args:
        checkpoint: Folder in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.
        key: Configuration key, for the error.
        gate: Licence that the hub wants accepted first.
        part: Text in the names of the wanted tensors, such as `vision_`; files of a whole model that hold none are not downloaded.
        has_weights: False downloads the small files alone: configuration, tokenizer, chat template.

    Raises:
        UserError: No such folder and no download.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; {key} must name a folder in Hugging Face layout or a hub id")
        return folder
    if checkpoint.startswith(("/", ".", "~")) or checkpoint.count("/") > 1:  # no hub id looks so
        raise UserError(f"{folder} does not exist; set {key} to a local folder in Hugging Face layout or a hub id")
    try:
        return _download(checkpoint, revision, part, has_weights)
    except Exception as error:  # the hub client raises a dozen kinds; to the user they are one
        licence = f", accept its licence there ({gate}) and log in with `hf auth login`" if gate else ""
        raise UserError(
            f"checkpoint '{checkpoint}' is neither a folder nor could it be downloaded ({type(error).__name__}): "
            f"set {key} to a local folder in Hugging Face layout, or connect to the hub{licence}"
        ) from error


def _download(checkpoint: str, revision: str | None, part: str | None, has_weights: bool) -> Path:
    """The folder of a snapshot, or of an earlier one where the hub cannot be reached."""
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

    try:
        names = list_repo_files(checkpoint, revision=revision)
    except Exception as unreachable:
        try:
            folder = Path(snapshot_download(checkpoint, revision=revision, local_files_only=True))
        except Exception:
            raise unreachable from None  # says more than that there is no snapshot
        listed = folder / _index_of(_SAFE)
        if has_weights and listed.is_file() and not all((folder / file).is_file() for file in _shards(listed, part or "")):
            raise unreachable from None  # another part of the same model was fetched
        return folder
    weights = [_weights_pattern(names)] if has_weights else []
    if weights and part is not None and (index := _index_of(weights[0])) in names:
        weights = _shards(Path(hf_hub_download(checkpoint, index, revision=revision)), part)
    return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=[*_PATTERNS, *weights]))


def _weights_pattern(names: Iterable[str]) -> str:
    """Which weights to take of a folder's files; a subfolder's, such as another format's, do not count."""
    return _SAFE if any(fnmatch(name, _SAFE) and "/" not in name for name in names) else _PICKLED


def _index_of(pattern: str) -> str:
    """Name of the file that says which weights stand where."""
    return f"{pattern.replace('*', '')}.index.json"


def _shards(index: Path, part: str) -> list[str]:
    """Files with a tensor that has `part` in its name; all files where none has, as in a checkpoint of the part alone."""
    files = weight_map(index)
    return sorted({file for tensor, file in files.items() if part in tensor} or set(files.values()))


def fingerprint(folder: Path, name: str, memo: Path | None = None, part: str | None = None, *, has_weights: bool = True) -> Fingerprint:
    """The identity of the files in `folder`.

    Args:
        folder: As `locate` returned it.
        name: The configured name.
        memo: JSON file that remembers hashes by path, size and time of change, as hashing 60 GB takes a minute.
        part: As for `locate`: the other files of a whole model do not count.
        has_weights: As for `locate`.
    """
    weights = [_SAFE if any(folder.glob(_SAFE)) else _PICKLED] if has_weights else []
    if weights and part is not None and (index := folder / _index_of(weights[0])).is_file():
        weights = _shards(index, part)
    files = sorted(file for pattern in (*weights, *_CONTENT) for file in folder.glob(pattern))
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
    with replacing(memo) as partial:
        partial.write_text(json.dumps(known, indent=1))


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, of a checkpoint in several files.

    Args:
        index: Its `*.index.json`.

    Raises:
        UserError: A file is not in the folder of the index.
    """
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if outside := next((file for file in files.values() if Path(file).name != file), None):
        raise UserError(f"{index} names {outside}, which is not in its own folder; take the checkpoint from another source")
    return files


def weight_files(folder: Path, name: str) -> dict[Path, list[str] | None]:
    """Files of weights with the names in them; None where only the file itself knows.

    Args:
        folder: Checkpoint in Hugging Face layout.
        name: Of the file where there is one alone, such as `model.safetensors`.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return {folder / name: None} if (folder / name).is_file() else {}
    files: dict[Path, list[str] | None] = {}
    for key, file in weight_map(index).items():
        keys = files.setdefault(folder / file, [])
        assert keys is not None
        keys.append(key)
    return files


def holding(files: dict[Path, list[str] | None], is_wanted: Callable[[str], bool]) -> list[Path]:
    """The files that hold, or may hold, a wanted tensor."""
    return [file for file, keys in files.items() if keys is None or any(map(is_wanted, keys))]


def read_safetensors(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Wanted tensors with their names; files that hold none of them are not opened, and where there are no files nothing comes."""
    from safetensors import safe_open

    for file in holding(weight_files(folder, "model.safetensors"), is_wanted):
        with safe_open(file, framework="pt") as tensors:
            yield from ((key, tensors.get_tensor(key)) for key in tensors.keys() if is_wanted(key))  # noqa: SIM118 - no mapping
