"""A store of features: shards of one recipe in one folder, read by content of clips.

Legend: N clips, F frames, P patches a frame, Dv vision width.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

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
from vlmcap.data.features.repair import repair_shard
from vlmcap.data.features.shards import BrokenFileError, DamagedEntryError, entry_checksum
from vlmcap.errors import UserError
from vlmcap.files import replacing
from vlmcap.types import FrameTimes, GridTHW

_MAX_OPEN = 64  # shards at once


class FeatureStore:
    """Features by content hash, in the folder `root/recipe.key`.

    Picklable, and safe to share with data workers and machines.

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
        self._is_verified = np.empty(0, bool)  # by row of the index
        self._shards = OpenShards(self.folder)
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
        if self._index is not before or len(self._is_verified) != len(self._index.hashes):
            self._is_verified = np.zeros(len(self._index.hashes), bool)
        if self._index is not before or not self._skipped:
            self._skipped = self._index.skipped()
            self._skipped_hashes = np.array(sorted(self._skipped), "S32")
            self._lost_hashes = np.array(sorted(self._index.lost()), "S32")

    def missing(self, hashes: NDArray[np.bytes_], *, retry_lost: bool = False) -> NDArray[np.int64]:
        """Positions of the clips that have to be encoded, ascending; of several clips of the same content the first.

        Args:
            hashes: S32 (N,), from `content_hashes`. Clips that cannot be opened are not missing: they can never be
                there.
            retry_lost: Count clips whose decoder was lost (it took too long, or too much memory). Broken ones are known
                to have no features, and so are lost ones otherwise.
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

    def times_s(self, content: bytes) -> FrameTimes | None:
        """When a clip's frames are shown, None where nobody knew; `KeyError` without features."""
        row = self._row(content)
        times_s = self._opened().times_s[row]
        return tuple(times_s[~np.isnan(times_s)].tolist()) or None

    def read(self, content: bytes) -> tuple[Tensor, GridTHW | None]:
        """Features (F, P, Dv) in memory of their own, as stored, or float16 out of int8.

        And the clip's size in patches.

        The first time that this process reads an entry, its checksum is compared.

        Raises:
            KeyError: There are no features of this clip.
            DamagedEntryError: They are not those that were written; `drop_damaged` removes them.
            UserError: They have gone since the store was opened.
        """
        self._lease.renew()
        try:
            return self._read(content), self.grid_thw(content)
        except (OSError, ValueError):
            self._shards.close()
            self.refresh()  # another machine may have written them again
        try:
            return self._read(content), self.grid_thw(content)
        except (KeyError, OSError, ValueError) as error:
            if self.skipped(content) is not None:  # another process has found them damaged
                raise DamagedEntryError(content.decode()) from error
            raise UserError(
                f"cached features have gone from {self.folder} while they were in use: start again to have them built "
                "again, and "
                "raise cache.max_gib if other runs share the folder"
            ) from error

    def drop_damaged(self, content: bytes) -> None:
        """Remove the damaged entries of the shard that this clip is in.

        They count as skipped, and the next filling encodes them again.

        A folder that cannot be written keeps them; they are found damaged again by every process.
        """
        with contextlib.suppress(KeyError, OSError, BrokenFileError):
            if not repair_shard(self.folder / self._opened().files[int(self._place(content)[1][0])].name):
                (self.folder / indices.FILE).unlink()  # the shard is sound, but is not the one that the index means
        self.refresh()

    def make_folder(self) -> None:
        """The folder, with the recipe for people to read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.recipe.as_dict(), indent=1, ensure_ascii=False)
        path = self.folder / "recipe.json"
        if not path.is_file():
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
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
        row = self._row(content)
        return self._opened().offsets[row], self._opened().places[row]

    def _row(self, content: bytes) -> int:
        row = self._opened().find(content)
        if row is None:
            raise KeyError(content)
        return row

    def _read(self, content: bytes) -> Tensor:
        (start, scale_start), place = self._place(content)
        shape, dtype = self.shape(content), stored_type(self.recipe.dtype)
        file = self._opened().files[int(place[0])]
        parts = [self._shards.read(file, int(start), math.prod(shape) * dtype.itemsize)]
        if self.recipe.dtype == "int8":
            parts.append(self._shards.read(file, int(scale_start), math.prod(shape[:2]) * torch.float32.itemsize))
        self._verify(content, parts)
        numbers = torch.from_numpy(parts[0]).view(dtype).reshape(shape)
        return (
            dequantize(numbers, torch.from_numpy(parts[1]).view(torch.float32).reshape(shape[:2]))
            if len(parts) == 2
            else numbers
        )

    def _verify(self, content: bytes, parts: list[NDArray[np.uint8]]) -> None:
        opened = self._opened()
        row = opened.find(content)
        assert row is not None
        if self._is_verified[row]:
            return
        times_s = self.times_s(content) or ()
        if (
            entry_checksum(content.decode(), self.shape(content), self.grid_thw(content), times_s, parts)
            != opened.checksums[row]
        ):
            raise DamagedEntryError(content.decode())
        self._is_verified[row] = True


class OpenShards:
    """The shards read last; an open one can be read after its file is evicted and in a fork.

    They are read and not mapped: a page of a file that is cut off or cannot be read meanwhile would kill the process.

    Args:
        folder: Of the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def read(self, file: ShardFile, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes `start` to `start + size`.

        Raises:
            OSError: The shard cannot be opened or read.
            ValueError: It is not the one that the index knows.
        """
        descriptor = self._open(file).fileno()
        content = np.empty(size, np.uint8)
        done = 0
        while done < size:  # the system gives 2 GiB at a time
            count = os.preadv(descriptor, [content[done:].data], start + done)
            if count == 0:
                raise ValueError(f"{file.name} has been cut off")
            done += count
        return content

    def close(self) -> None:
        """Forget all shards."""
        self._files.clear()

    def _open(self, file: ShardFile) -> BinaryIO:
        opened = self._files.pop(file.name, None)
        if opened is None:
            opened = (self.folder / file.name).open("rb", buffering=0)
            if os.fstat(opened.fileno()).st_size != file.size:
                raise ValueError(f"{file.name} has changed")
            while len(self._files) >= _MAX_OPEN:
                self._files.popitem(last=False)
        self._files[file.name] = opened
        return opened
