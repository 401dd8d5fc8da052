"""A store of features: shards of one recipe in one folder, read by content of clips.

Legend: N clips, F frames, P patches a frame, Dv vision width.
"""

from __future__ import annotations

import json
import math
import mmap
import secrets
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmcap.data.features import index as indices
from vlmcap.data.features.content import UNREADABLE
from vlmcap.data.features.index import ShardFile, contains
from vlmcap.data.features.leases import Lease
from vlmcap.data.features.precision import ErrorSums, StorageError, dequantize, stored_type
from vlmcap.data.features.recipe import Recipe
from vlmcap.errors import UserError
from vlmcap.types import GridTHW

_MAX_OPEN = 64  # shards mapped at once


class FeatureStore:
    """Features by content hash, in the folder `root/recipe.key`; picklable, and safe to share with data workers and machines.

    Args:
        root: Folder of all stores; `fill_store` makes it.
        recipe: What the features depend on.
    """

    def __init__(self, root: str | Path, recipe: Recipe) -> None:
        self.root, self.recipe = Path(root), recipe
        self.folder = self.root / recipe.key
        self.broken: dict[str, str] = {}  # name of a shard that is ignored, and why
        self._index: indices.ShardIndex | None = None
        self._saved: indices.ShardIndex | None = None
        self._skipped: dict[bytes, str] = {}
        self._skipped_hashes, self._lost_hashes = np.empty(0, "S32"), np.empty(0, "S32")
        self._mapped = MappedShards(self.folder)
        self._lease = Lease(self.folder)

    def __getstate__(self) -> tuple[Path, Recipe]:
        return self.root, self.recipe

    def __setstate__(self, state: tuple[Path, Recipe]) -> None:
        FeatureStore.__init__(self, *state)

    @property
    def key(self) -> str:
        """Name of the folder."""
        return self.recipe.key

    @property
    def num_bytes(self) -> int:
        """Size of the shards together."""
        return sum(file.size for file in self._opened().files)

    @property
    def error(self) -> StorageError | None:
        """How far the features are from the encoder's, measured when they were written; None while there are none."""
        sums = ErrorSums()
        for file in self._opened().files:
            sums.add(file.errors)
        return sums.stated

    def __len__(self) -> int:
        return len(self._opened().hashes)

    def __contains__(self, content: object) -> bool:
        """Whether there are features of the clip with this content hash."""
        return isinstance(content, bytes) and self._opened().find(content) is not None

    def refresh(self) -> None:
        """Look at what other processes have written or removed since."""
        if self._index is None:
            self._index = self._saved = indices.load(self.folder)
        before = self._index
        self._index = indices.update(before, self.folder, self.broken, self.recipe.dtype)
        if self._index is not before or not self._skipped:
            self._skipped = self._index.skipped()
            self._skipped_hashes = np.array(sorted(self._skipped), "S32")
            self._lost_hashes = np.array(sorted(self._index.lost()), "S32")

    def missing(self, hashes: NDArray[np.bytes_], *, retry_lost: bool = False) -> NDArray[np.int64]:
        """Positions of the clips that have to be encoded, ascending; of several clips of the same content the first.

        Args:
            hashes: S32 (N,), from `content_hashes`. Clips that cannot be opened are not missing: they can never be there.
            retry_lost: Count clips whose decoder was lost (it took too long, or too much memory). Broken ones are known to have no
                features, and so are lost ones otherwise.
        """
        names, first = np.unique(hashes, return_index=True)
        is_missing = ~contains(self._opened().hashes, names) & (names != UNREADABLE)
        known = np.setdiff1d(self._skipped_hashes, self._lost_hashes) if retry_lost else self._skipped_hashes
        is_missing &= ~contains(known, names)
        return np.sort(first[is_missing]).astype(np.int64)

    def skipped(self, content: bytes) -> str | None:
        """Why a clip could not be read when the store was filled; None for one that has features or is not known."""
        return None if content in self else self._skipped.get(bytes(content))

    def shape(self, content: bytes) -> tuple[int, int, int]:
        """(F, P, Dv) of a clip; `KeyError` without features."""
        num_frames, num_patches, embed_dim = self._place(content)[1][1:4]
        return int(num_frames), int(num_patches), int(embed_dim)

    def grid_thw(self, content: bytes) -> GridTHW | None:
        """A clip's size in patches, None where it is the encoder's own; `KeyError` without features."""
        frames, height, width = self._place(content)[1][4:7]
        return (int(frames), int(height), int(width)) if frames else None

    def read(self, content: bytes) -> tuple[Tensor, GridTHW | None]:
        """Features (F, P, Dv) in memory of their own, as stored, or float16 out of int8; and the clip's size in patches.

        Raises:
            KeyError: There are no features of this clip.
            UserError: They have gone since the store was opened.
        """
        self._lease.renew()
        try:
            return self._read(content), self.grid_thw(content)
        except (OSError, ValueError):
            self._mapped.close()
            self.refresh()  # another machine may have written them again
        try:
            return self._read(content), self.grid_thw(content)
        except (KeyError, OSError, ValueError) as error:
            raise UserError(
                f"cached features have gone from {self.folder} while they were in use: start again to have them built again, and "
                "raise cache.max_gib if other runs share the folder"
            ) from error

    def make_folder(self) -> None:
        """The folder, with the recipe for people to read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.recipe.as_dict(), indent=1, ensure_ascii=False)
        path = self.folder / "recipe.json"
        if not path.is_file():
            partial = path.with_name(f".recipe.{secrets.token_hex(4)}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        self._lease.renew()

    def save_index(self) -> None:
        """Write the index if there is news, so that others open the store at once and share its memory."""
        self.refresh()
        if self._index is not self._saved:
            indices.save(self._opened(), self.folder)
            self._index = None
            self.refresh()

    def places(self) -> NDArray[np.int32]:
        """int32 (N, 7), a row a clip with features: number of the shard, F, P, Dv, and size in patches or zeros."""
        return self._opened().places

    def _opened(self) -> indices.ShardIndex:
        if self._index is None:
            self.refresh()
        assert self._index is not None
        return self._index

    def _place(self, content: bytes) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        opened = self._opened()
        row = opened.find(content)
        if row is None:
            raise KeyError(content)
        return opened.offsets[row], opened.places[row]

    def _read(self, content: bytes) -> Tensor:
        (start, scale_start), place = self._place(content)
        shape = self.shape(content)
        file = self._opened().files[int(place[0])]
        numbers = self._mapped.read(file, int(start), shape, stored_type(self.recipe.dtype))
        if self.recipe.dtype != "int8":
            return numbers
        return dequantize(numbers, self._mapped.read(file, int(scale_start), shape[:2], torch.float32))


class MappedShards:
    """The shards read last; a map stays valid after its file is evicted and in a fork.

    Args:
        folder: Of the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def read(self, file: ShardFile, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy of the tensor that begins at byte `start`.

        Raises:
            OSError: The shard cannot be opened.
            ValueError: It is not the one that the index knows.
        """
        mapped = self._map(file)
        size = math.prod(shape) * dtype.itemsize
        # A copy: features that are used for long must not keep the map of a whole shard alive.
        copy = np.frombuffer(mapped, np.uint8, size, start).copy()
        _forget(mapped, start, size)
        return torch.from_numpy(copy).view(dtype).reshape(shape)

    def close(self) -> None:
        """Forget all maps."""
        self._maps.clear()

    def _map(self, file: ShardFile) -> mmap.mmap:
        mapped = self._maps.pop(file.name, None)
        if mapped is None:
            with (self.folder / file.name).open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if len(mapped) != file.size:
                raise ValueError(f"{file.name} has changed")
            while len(self._maps) >= _MAX_OPEN:
                self._maps.popitem(last=False)
        self._maps[file.name] = mapped
        return mapped


def _forget(mapped: mmap.mmap, start: int, size: int) -> None:
    """Take the pages out of this process, not out of the system's cache: else they would count as memory of each worker that read them."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, start + size - first)
