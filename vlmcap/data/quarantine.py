"""The ledger of clips that could not be used."""

from __future__ import annotations

import json
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.types import Skipped


class Ledger:
    """A JSON-lines file that names each unusable clip once, and the limit of how many there may be.

    A resumed run goes on with the same file without repeating lines, but only what this process saw counts against the limit: the
    clips of earlier lines may have been repaired since.

    Args:
        path: The file, one object {id, video, reason} a line; made with its folder at the first bad clip.
        max_bad_fraction: Share of the clips, 0 to 1, that may be unusable.
        num_clips: Number of clips that the share refers to.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float, num_clips: int) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.num_clips = num_clips
        self._bad: dict[str, Skipped] = {}
        self._written = _read_ids(self.path)

    def __len__(self) -> int:
        return len(self._bad)

    def add(self, skipped: Skipped) -> None:
        """Note a clip; again for the same clip does nothing."""
        clip = skipped.clip
        self._bad.setdefault(clip.id, skipped)
        if clip.id in self._written:
            return
        self._written.add(clip.id)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"id": clip.id, "video": str(clip.video), "reason": skipped.reason}, ensure_ascii=False)
        with self.path.open("ab") as file:  # one write a line, so that lines of several processes do not mix
            file.write(f"{line}\n".encode())

    def check(self) -> None:
        """Nothing, as long as few enough clips are bad.

        Raises:
            UserError: More than `max_bad_fraction` of the clips are.
        """
        if len(self._bad) <= self.max_bad_fraction * self.num_clips:
            return
        first = next(iter(self._bad.values()))
        raise UserError(
            f"{len(self._bad)} of {self.num_clips} clips cannot be used, more than data.max_bad_fraction={self.max_bad_fraction} allows; "
            f"first: {first.clip.id} ({first.reason}); {self.path} lists them: repair or remove them, or raise data.max_bad_fraction"
        )


def _read_ids(path: Path) -> set[str]:
    """Ids on the lines of an earlier run; a line torn by a kill is passed over."""
    ids: set[str] = set()
    if not path.is_file():
        return ids
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            ids.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError):
            continue
    return ids
