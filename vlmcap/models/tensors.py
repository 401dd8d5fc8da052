"""Single tensors out of a checkpoint's files, without reading the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from vlmcap.errors import UserError


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
