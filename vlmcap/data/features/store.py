"""A feature store: the shards of one recipe in one folder, read by the content hash of clips.

Legend: N clips, F frames, P patches per frame, Dv vision width.
"""

from __future__ import annotations

import contextlib
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
from vlmcap.data.features.content_hash import UNREADABLE
from vlmcap.data.features.index import ShardFile, contains
from vlmcap.data.features.leases import Lease
from vlmcap.data.features.precision import ErrorSums, StorageDeviation, dequantize, stored_type
from vlmcap.data.features.recipe import Recipe
from vlmcap.data.features.repair import repair_shard
from vlmcap.data.features.shards import BrokenFileError, DamagedEntryError, entry_checksum
from vlmcap.errors import UserError
from vlmcap.files import write_json
from vlmcap.types import FrameTimes, GridTHW

_MAX_OPEN = 64  # shards open at a time


class FeatureStore:
    """Features by content hash, in the folder `root/recipe.key`.

    A store is picklable, and safe to share with data workers and machines.

    Args:
        root: Folder of all stores; `fill_store` creates it.
        recipe: Everything that the features depend on.
    """

    def __init__(self, root: str | Path, recipe: Recipe) -> None:
        self.root, self.recipe = Path(root), recipe
        self.folder = self.root / recipe.key
        self.broken: dict[str, str] = {}  # name of an ignored shard to the reason
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
        """Total size of the shards."""
        return sum(file.size for file in self._opened().files)

    @property
    def deviation(self) -> StorageDeviation | None:
        """Deviation of the features from the encoder's, measured when they were written; None for an empty store."""
        sums = ErrorSums()
        for file in self._opened().files:
            sums.add(file.errors)
        return sums.deviation

    def __len__(self) -> int:
        return len(self._opened().hashes)

    def __contains__(self, content: object) -> bool:
        """Returns whether there are features of the clip with this content hash."""
        return isinstance(content, bytes) and self._opened().find(content) is not None

    def refresh(self) -> None:
        """Updates the index to what other processes have written or removed."""
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
        """Returns the ascending positions of the clips to encode; of clips with equal content only the first.

        Args:
            hashes: S32 (N,), from `content_hashes`. Clips that cannot be opened are never missing, since they can never
                be stored.
            retry_lost: Whether to include clips whose decoder was lost (it took too long, or too much memory). Broken
                clips are never included, as they are known to have no features.
        """
        names, first = np.unique(hashes, return_index=True)
        is_missing = ~contains(self._opened().hashes, names) & (names != UNREADABLE)
        # Lost clips are tried again, those that are broken for good are not.
        known = np.setdiff1d(self._skipped_hashes, self._lost_hashes) if retry_lost else self._skipped_hashes
        is_missing &= ~contains(known, names)
        return np.sort(first[is_missing]).astype(np.int64)

    def skipped(self, content: bytes) -> str | None:
        """Returns why a clip could not be read when the store was filled; None if it has features or is unknown."""
        return None if content in self else self._skipped.get(bytes(content))

    def shape(self, content: bytes) -> tuple[int, int, int]:
        """Returns (F, P, Dv) of a clip; raises `KeyError` if it has no features."""
        num_frames, num_patches, embed_dim = self._location(content)[1][1:4]
        return int(num_frames), int(num_patches), int(embed_dim)

    def grid_thw(self, content: bytes) -> GridTHW | None:
        """Returns a clip's size in patches, None if it has the encoder's; raises `KeyError` if it has no features."""
        frames, height, width = self._location(content)[1][4:7]
        return (int(frames), int(height), int(width)) if frames else None

    def times_s(self, content: bytes) -> FrameTimes | None:
        """Returns the times of a clip's frames, None if unknown; raises `KeyError` if it has no features."""
        row = self._row(content)
        times_s = self._opened().times_s[row]
        return tuple(times_s[~np.isnan(times_s)].tolist()) or None

    def read(self, content: bytes) -> tuple[Tensor, GridTHW | None]:
        """Returns the features (F, P, Dv) as stored, or float16 for int8, and the clip's size in patches.

        The tensor owns its memory. The checksum is verified when this process reads an entry for the first time.

        Raises:
            KeyError: The clip has no features.
            DamagedEntryError: The features differ from those that were written; `drop_damaged` removes them.
            UserError: The features have been removed since the store was opened.
        """
        self._lease.renew()
        try:
            return self._read(content), self.grid_thw(content)
        except (OSError, ValueError):
            # The open file may be an older one of the same name.
            self._shards.close()
            self.refresh()  # another machine may have written them again
        try:
            return self._read(content), self.grid_thw(content)
        except (KeyError, OSError, ValueError) as error:
            if self.skipped(content) is not None:  # another process has found them to be damaged
                raise DamagedEntryError(content.decode()) from error
            raise UserError(
                f"the features of a clip were removed from {self.folder} while they were in use; start again to "
                "encode them again, and raise cache.max_gib if other runs share the folder"
            ) from error

    def drop_damaged(self, content: bytes) -> None:
        """Removes the damaged entries of the shard that contains this clip.

        They count as skipped, and the next filling encodes them again. In a folder that is not writable they remain,
        and every process finds them damaged again.
        """
        with contextlib.suppress(KeyError, OSError, BrokenFileError):
            if not repair_shard(self.folder / self._opened().files[int(self._location(content)[1][0])].name):
                (self.folder / indices.FILE).unlink()  # the shard is valid, but not the one that the index describes
        self.refresh()

    def make_folder(self) -> None:
        """Creates the folder, with the recipe in a readable form."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "recipe.json"
        if not path.is_file():
            write_json(path, self.recipe.as_dict())
        self._lease.renew()

    def save_index(self) -> None:
        """Writes the index if it has changed, so that other processes open the store fast and share its memory."""
        self.refresh()
        if self._index is not self._saved:
            indices.save(self._opened(), self.folder)
            # Reloaded from the file, so that the arrays are mapped and shared with other processes.
            self._index = None
            self.refresh()

    def layouts(self) -> NDArray[np.int32]:
        """Returns int32 (N, 7) of all clips: number of the shard, F, P, Dv, and size in patches or zeros."""
        return self._opened().layouts

    def _opened(self) -> indices.ShardIndex:
        if self._index is None:
            self.refresh()
        assert self._index is not None
        return self._index

    def _location(self, content: bytes) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        row = self._row(content)
        return self._opened().offsets[row], self._opened().layouts[row]

    def _row(self, content: bytes) -> int:
        row = self._opened().find(content)
        if row is None:
            raise KeyError(content)
        return row

    def _read(self, content: bytes) -> Tensor:
        (start, scale_start), layout = self._location(content)
        shape, dtype = self.shape(content), stored_type(self.recipe.dtype)
        file = self._opened().files[int(layout[0])]
        buffers = [self._shards.read(file, int(start), math.prod(shape) * dtype.itemsize)]
        if self.recipe.dtype == "int8":
            buffers.append(self._shards.read(file, int(scale_start), math.prod(shape[:2]) * torch.float32.itemsize))
        self._verify(content, buffers)
        numbers = torch.from_numpy(buffers[0]).view(dtype).reshape(shape)  # bytes -> (F, P, Dv)
        if self.recipe.dtype != "int8":
            return numbers
        return dequantize(numbers, torch.from_numpy(buffers[1]).view(torch.float32).reshape(shape[:2]))

    def _verify(self, content: bytes, buffers: list[NDArray[np.uint8]]) -> None:
        opened = self._opened()
        row = opened.find(content)
        assert row is not None
        # An entry is checked at its first read in this process.
        if self._is_verified[row]:
            return
        times_s = self.times_s(content) or ()
        checksum = entry_checksum(content.decode(), self.shape(content), self.grid_thw(content), times_s, buffers)
        if checksum != opened.checksums[row]:
            raise DamagedEntryError(content.decode())
        self._is_verified[row] = True


class OpenShards:
    """The most recently read shards; an open one can be read after its file is evicted, and in a fork.

    They are read and not mapped: accessing a page of a file that was truncated or became unreadable would kill the
    process.

    Args:
        folder: Folder of the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def read(self, file: ShardFile, start: int, size: int) -> NDArray[np.uint8]:
        """Reads bytes `start` to `start + size`.

        Raises:
            OSError: The shard cannot be opened or read.
            ValueError: The shard is not the one in the index.
        """
        descriptor = self._open(file).fileno()
        content = np.empty(size, np.uint8)
        done = 0
        while done < size:  # the system reads at most 2 GiB at a time
            count = os.preadv(descriptor, [content[done:].data], start + done)
            if count == 0:
                raise ValueError(f"{file.name} is truncated")
            done += count
        return content

    def close(self) -> None:
        """Closes all shards."""
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
