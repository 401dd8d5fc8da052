"""`vlmcap caption`: captions of video files, to the screen or into a file that grows clip by clip."""

from __future__ import annotations

import signal
import sys
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, TextIO

from vlmcap.cli.caption_file import CaptionFile
from vlmcap.config_saved import override_values
from vlmcap.errors import OutOfMemoryError, StoppedBySignal, UserError, first_line, is_out_of_memory
from vlmcap.terminal import progress_reporter
from vlmcap.types import Skipped

_DATA = ("num_frames", "sampling", "fps", "variable_frames", "decoder", "eval_batch_size", "num_workers", "is_isolated")
_SEARCH = (
    "engine",
    "cuda_graphs",
    "merge_adapters",
    "clips_per_slot",
    "speculate_ngram",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
# The settings of a checkpoint that captioning reads.
_READ = (
    *("model", "encoder", "projector", "llm", "tuning.lora", "hardware", "paths.cache_dir"),
    *(f"data.{name}" for name in (*_DATA, "decode_timeout_s", "decode_memory_gib")),
    *(f"evaluation.{name}" for name in (*_SEARCH, "do_sample", "temperature", "top_p", "top_k")),
)
_MAX_NAMED = 10  # endings, and files, of a sentence


def run(options: Namespace) -> None:
    """Captions the files, to the screen or into a file.

    Raises:
        UserError: A path or the checkpoint is wrong, the output cannot be written, or some files could not be read.
        StoppedBySignal: Ctrl-C or SIGTERM came while clips were captioned; what was done until then is in the output.
    """
    if options.resume and not options.output:
        raise UserError("--resume needs --output, the file to go on with")
    settings = override_values(options.overrides, program="vlmcap caption", read=_READ)
    found = find_videos([Path(path) for path in options.paths])
    for notice in found.notices():
        print(notice, file=sys.stderr)
    output = Path(options.output) if options.output else None
    rows = CaptionFile(output, found.all, is_resumed=options.resume) if output else None
    tally = _Tally(output)
    with _stopping_on_sigterm():
        _caption(options.checkpoint, settings, found, rows, tally)
    if tally.failed:
        video, reason = tally.failed[0]
        raise UserError(
            f"{len(tally.failed)} of {len(found.all)} files could not be read, first: {video} ({reason}); {tally}"
        )
    print(_printable(str(tally)), file=sys.stdout if rows else sys.stderr)


# --- which files ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What the paths of a command lead to.

    Attributes:
        videos: Paths, and addresses of members of archives; a path that was given as such may be that of any file.
        broken: Archives that cannot be read.
        other_endings: Number of files below folders by their endings, which are not those of videos.
        num_hidden: Number of hidden files and folders below folders.
        unreadable: Links that lead nowhere, and what else cannot be opened.
    """

    videos: list[str] = field(default_factory=list)
    broken: list[Skipped] = field(default_factory=list)
    other_endings: Counter[str] = field(default_factory=Counter)
    num_hidden: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        """Every path and address that gets a row."""
        return [*self.videos, *(archive.clip.video for archive in self.broken)]

    def notices(self) -> list[str]:
        """One sentence for each kind of files that are passed over."""
        notices = []
        if num := self.other_endings.total():
            files = "1 file with another ending was" if num == 1 else f"{num} files with other endings were"
            notices.append(f"{files} passed over: {_named([ending for ending, _ in self.other_endings.most_common()])}")
        if num := self.num_hidden:
            notices.append(f"{num} hidden {'file or folder was' if num == 1 else 'files or folders were'} passed over")
        if num := len(self.unreadable):
            entries = "entry that cannot be opened was" if num == 1 else "entries that cannot be opened were"
            notices.append(f"{num} {entries} passed over: {_named(self.unreadable)}")
        return notices


def find_videos(paths: Sequence[Path]) -> Found:
    """Files as given, and the videos below folders and in archives, sorted by path.

    Folders are walked as those of data sets are: archives count as folders, hidden files are left out, links are
    followed.

    Raises:
        UserError: A path is not there, or a folder holds no video.
    """
    from vlmcap.data.media.tree import is_archive

    found = Found()
    for path in paths:
        if path.is_dir() or (path.is_file() and is_archive(str(path))):
            _search(path, found)
        elif path.is_file():
            found.videos.append(str(path))
        else:
            raise UserError(f"{path} does not exist")
    return found


def _search(root: Path, found: Found) -> None:
    from vlmcap.data.media.tree import VIDEO_ENDINGS, Visit, list_files

    visit, own, videos = Visit(), Found(), []
    for file in list_files(str(root), "follow", visit):
        if isinstance(file, Skipped):
            own.broken.append(file)
        elif (ending := PurePosixPath(file.path).suffix.lower()) in VIDEO_ENDINGS:
            videos.append(file)
        else:
            own.other_endings[ending or "no ending"] += 1
    own.num_hidden, own.unreadable = visit.num_hidden, visit.unreadable
    if not videos and not own.broken:
        why = f"; {'; '.join(own.notices())}" if own.notices() else ""
        raise UserError(f"{root} holds no video ({', '.join(sorted(VIDEO_ENDINGS))}){why}")
    found.videos += [file.address for file in sorted(videos, key=lambda file: file.path.split("/"))]
    found.broken += own.broken
    found.other_endings += own.other_endings
    found.num_hidden += own.num_hidden
    found.unreadable += own.unreadable


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return _printable(", ".join(names[:_MAX_NAMED]) + more)


# --- captioning -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """How far the command came; as text, the last line that it prints."""

    output: Path | None
    captioned: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.captioned} captioned, {self.skipped} skipped, {len(self.failed)} failed"
        return counts if self.output is None else f"{counts}: {self.output}"


def _caption(checkpoint: str, settings: dict[str, Any], found: Found, rows: CaptionFile | None, tally: _Tally) -> None:
    """Captions what the output lacks, and counts it in `tally`."""
    videos = found.videos if rows is None else rows.left_of(found.videos)
    tally.skipped = len(found.videos) - len(videos)
    captions: Iterable[tuple[str | Path, str | Skipped]] = ()
    if videos:
        from vlmcap.training.checkpoints.load import load_captioner

        with progress_reporter("loading the model"):
            captions = load_captioner(checkpoint, settings).caption_files(videos)
    screen = sys.stdout  # while a bar is on the terminal, print writes to the bar's stream
    is_silent = not videos or (rows is None and screen.isatty())
    with nullcontext(_no_report) if is_silent else progress_reporter("captioning") as report, _saying_how_far(tally):
        for archive in found.broken:
            _put(archive.clip.video, archive, rows, tally, screen)
        for done, (video, caption) in enumerate(captions, 1):
            _put(str(video), caption, rows, tally, screen)
            report(done, len(videos))


def _put(video: str, caption: str | Skipped, rows: CaptionFile | None, tally: _Tally, screen: TextIO) -> None:
    """Writes a caption, or why there is none; in the tally only what was written counts."""
    if isinstance(caption, Skipped):
        if rows is not None:
            rows.add({"video": video, "error": caption.reason})
        tally.failed.append((video, caption.reason))
        return
    if rows is not None:
        rows.add({"video": video, "prediction": caption})
    else:
        print(_printable(f"{video}\t{caption}"), file=screen, flush=True)
    tally.captioned += 1


def _no_report(done: int, total: int | None) -> None:
    """Draws nothing."""


@contextmanager
def _saying_how_far(tally: _Tally) -> Iterator[None]:
    """Adds the tally to whatever ends the command early."""
    go_on = "" if tally.output is None else "; the same command with --resume goes on from there"
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedBySignal(f"Stopped by Ctrl-C: {tally}{go_on}", signal.SIGINT) from None
    except StoppedBySignal as stop:
        raise StoppedBySignal(f"Stopped by {signal.Signals(stop.number).name}: {tally}{go_on}", stop.number) from None
    except UserError as error:
        raise UserError(f"{error}; {tally}{go_on}") from error
    except Exception as error:
        if is_out_of_memory(error):
            why = f"memory ran out ({first_line(error)}): caption fewer clips at a time by data.eval_batch_size=1"
            raise OutOfMemoryError(f"{why}; {tally}{go_on}") from error
        print(f"{tally}{go_on}", file=sys.stderr)
        raise


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exception like Ctrl-C, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal("Stopped by SIGTERM.", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _printable(text: str) -> str:
    """The text with escapes in place of what no terminal can show."""
    return text.encode("utf-8", "backslashreplace").decode()
