"""Locates the files of a base checkpoint, fingerprints them, and reads single tensors from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.models.hub import cached_folder, fetch_file, fetch_files, hub_error, list_files

# Neither remote code nor pickle files other than weights, such as training_args.bin, are ever downloaded.
_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
_SAFE, _PICKLED = "model*.safetensors", "pytorch_model*.bin"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
VISION = "vision_"  # in the names of a vision tower's tensors in a pretrained VLM
_CONTENT = ("config.json", *_PROCESSORS, *_TOKENIZERS, "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a base checkpoint, by which a changed one is noticed.

    Attributes:
        name: Hub id or folder as configured.
        revision: Commit on the hub; empty for a folder.
        sha256: Hash of the content of weights, configuration, image processor, tokenizer and chat template.
    """

    name: str
    revision: str
    sha256: str

    def as_dict(self) -> dict[str, str]:
        """Returns the fingerprint as plain data for a checkpoint."""
        return asdict(self)


def locate(
    checkpoint: str,
    revision: str | None,
    *,
    key: str,
    gate: str | None = None,
    tensor_filter: str | None = None,
    has_weights: bool = True,
) -> Path:
    """Returns the local folder of a checkpoint, after downloading it if it is a hub id.

    Pickled weights are downloaded only if there are no safetensors.

    Args:
        checkpoint: Folder in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.
        key: Configuration key, for the error message.
        gate: License that must be accepted on the hub.
        tensor_filter: Text in the names of the required tensors, such as `VISION`; files of a pretrained VLM without
            such a tensor are not downloaded.
        has_weights: False downloads only the small files: configuration, tokenizer, chat template.

    Raises:
        UserError: There is no such folder, or the download failed; `hub_error` explains each kind of failure.
    """
    if (folder := _local_folder(checkpoint, revision, key)) is not None:
        return folder
    try:
        return _download(checkpoint, revision, tensor_filter, has_weights)
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error, checkpoint, revision, key=key, gate=gate) from error


def locate_description(
    checkpoint: str, revision: str | None, *, key: str, gate: str | None = None, has_processor: bool = False
) -> Path:
    """Returns a folder with the small files that describe a checkpoint, after downloading only these.

    Args:
        checkpoint: Folder in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.
        key: Configuration key, for the error message.
        gate: License that must be accepted on the hub.
        has_processor: Whether to download an encoder's image processor besides `config.json`.

    Raises:
        UserError: As for `locate`; a `HubUnreachableError` if the hub does not answer.
    """
    if (folder := _local_folder(checkpoint, revision, key)) is not None:
        return folder
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        folder = fetch_file(checkpoint, "config.json", revision).parent
        for name in _PROCESSORS if has_processor else ():
            with suppress(RemoteEntryNotFoundError):  # a checkpoint has one or two of them
                fetch_file(checkpoint, name, folder.name)
    except Exception as error:
        if folder is None and (folder := cached_folder(checkpoint, revision)) is not None:
            return folder
        raise hub_error(error, checkpoint, revision, key=key, gate=gate) from error
    return folder


def is_present(checkpoint: str, revision: str | None, tensor_filter: str | None = None) -> bool:
    """Returns whether a checkpoint is completely on this machine; the hub is not asked.

    Args:
        checkpoint: Folder in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.
        tensor_filter: As for `locate`.
    """
    return (
        Path(checkpoint).expanduser().is_dir()
        or _find_cached(checkpoint, revision, tensor_filter, has_weights=True) is not None
    )


def _local_folder(checkpoint: str, revision: str | None, key: str) -> Path | None:
    """Returns the folder that a name refers to; None for a hub id."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; {key} must name a folder in Hugging Face layout or a hub id")
        if revision is not None:
            name = f"{key.rpartition('.')[0]}.revision"
            raise UserError(
                f"{name}={revision} has no effect, as {key}={checkpoint} is a folder, not a hub id; leave {name} out"
            )
        return folder
    if checkpoint.startswith(("/", ".", "~")) or checkpoint.count("/") > 1:  # not a hub id
        raise UserError(f"{folder} does not exist; set {key} to a local folder in Hugging Face layout or a hub id")
    return None


def _download(checkpoint: str, revision: str | None, tensor_filter: str | None, has_weights: bool) -> Path:
    """Downloads a snapshot and returns its folder; falls back to a cached one if the hub cannot be reached."""
    # 1. One small file shows whether the checkpoint may be read, and resolves the revision to a commit.
    try:
        folder = fetch_file(checkpoint, "config.json", revision).parent
        names = list_files(checkpoint, folder.name)
    except Exception:
        if (cached := _find_cached(checkpoint, revision, tensor_filter, has_weights)) is not None:
            return cached
        raise

    # 2. The small files come first: if the weights are complete later, so is the rest.
    fetch_files(checkpoint, _matching(names, _PATTERNS), folder.name)

    # 3. Weights; of a pretrained VLM only the files with the required tensors.
    weights = [_weights_pattern(names)] if has_weights else []
    if weights and tensor_filter is not None and (index := folder / _index_of(weights[0])).is_file():
        weights = _shards(index, tensor_filter)
    fetch_files(checkpoint, _matching(names, weights), folder.name)
    return folder


def _find_cached(checkpoint: str, revision: str | None, tensor_filter: str | None, has_weights: bool) -> Path | None:
    """Returns the cached snapshot if it is complete.

    It may be incomplete because a plan downloads only the configuration, and because downloads break off.
    """
    folder = cached_folder(checkpoint, revision)
    if folder is None:
        return None
    if not has_weights:
        return folder if any((folder / name).is_file() for name in (*_TOKENIZERS, "vocab.json")) else None
    for pattern in (_SAFE, _PICKLED):
        if (folder / pattern.replace("*", "")).is_file():
            return folder
        if (index := folder / _index_of(pattern)).is_file() and all(
            (folder / file).is_file() for file in _shards(index, tensor_filter or "")
        ):
            return folder
    return None


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _weights_pattern(names: Iterable[str]) -> str:
    """Returns the pattern of the weight files to use; files in subfolders, such as another format's, do not count."""
    return _SAFE if any(fnmatch(name, _SAFE) and "/" not in name for name in names) else _PICKLED


def _index_of(pattern: str) -> str:
    """Returns the name of the index file that maps tensors to weight files."""
    return f"{pattern.replace('*', '')}.index.json"


def _shards(index: Path, tensor_filter: str) -> list[str]:
    """Returns the files with tensors that have `tensor_filter` in their name, or all files if no tensor has."""
    files = weight_map(index)
    return sorted({file for tensor, file in files.items() if tensor_filter in tensor} or set(files.values()))


def fingerprint(
    folder: Path,
    name: str,
    hash_file: Path | None = None,
    tensor_filter: str | None = None,
    *,
    has_weights: bool = True,
) -> Fingerprint:
    """Computes the fingerprint of the files in `folder`.

    Args:
        folder: Folder that `locate` returned.
        name: Configured name.
        hash_file: JSON file that caches hashes by path, size and modification time, as hashing 60 GB takes a minute.
        tensor_filter: As for `locate`; other files of a pretrained VLM do not count.
        has_weights: As for `locate`.
    """
    weights = [_SAFE if any(folder.glob(_SAFE)) else _PICKLED] if has_weights else []
    if weights and tensor_filter is not None and (index := folder / _index_of(weights[0])).is_file():
        weights = _shards(index, tensor_filter)
    files = sorted(file for pattern in (*weights, *_CONTENT) for file in folder.glob(pattern))
    known = _read_hashes(hash_file)
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        tag = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        known[tag] = known.get(tag) or _file_sha256(file)
        digest.update(f"{file.name}:{known[tag]}\n".encode())
    _write_hashes(hash_file, known)
    revision = folder.name if folder.parent.name == "snapshots" else ""
    return Fingerprint(name, revision, digest.hexdigest())


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_hashes(hash_file: Path | None) -> dict[str, str]:
    if hash_file is None or not hash_file.is_file():
        return {}
    try:
        known = json.loads(hash_file.read_text())
    except json.JSONDecodeError:
        return {}
    return known if isinstance(known, dict) else {}


def _write_hashes(hash_file: Path | None, known: dict[str, str]) -> None:
    if hash_file is None:
        return
    hash_file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(hash_file) as partial:
        partial.write_text(json.dumps(known, indent=1))


def weight_map(index: Path) -> dict[str, str]:
    """Reads the map from tensor names to file names of a sharded checkpoint.

    Args:
        index: Its `*.index.json`.

    Raises:
        UserError: The index names a file outside its own folder.
    """
    files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if outside := next((file for file in files.values() if Path(file).name != file), None):
        raise UserError(
            f"{index} names {outside}, which is outside its own folder; download the checkpoint from another source"
        )
    return files


def weight_files(folder: Path, name: str) -> dict[Path, list[str] | None]:
    """Returns the weight files with the names of their tensors; None instead of names if there is no index.

    Args:
        folder: Checkpoint in Hugging Face layout.
        name: Name of the file of an unsharded checkpoint, such as `model.safetensors`.
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
    """Returns the files that hold, or may hold, a wanted tensor."""
    return [file for file, keys in files.items() if keys is None or any(map(is_wanted, keys))]


def read_safetensors(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and values of wanted tensors; files without any of them are not opened."""
    from safetensors import safe_open

    for file in holding(weight_files(folder, "model.safetensors"), is_wanted):
        with safe_open(file, framework="pt") as tensors:
            yield from ((key, tensors.get_tensor(key)) for key in tensors.keys() if is_wanted(key))  # noqa: SIM118 - no mapping
