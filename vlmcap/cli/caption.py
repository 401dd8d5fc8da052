"""`vlmcap caption`: captions video files and writes to the screen, or to a file that grows clip by clip."""

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
_MAX_NAMED = 10  # file names or endings listed in one sentence


def run(options: Namespace) -> None:
    """Captions the files.

    Raises:
        UserError: A path or the checkpoint is wrong, the output cannot be written, or some files could not be read.
        StoppedBySignal: Ctrl-C or SIGTERM stopped the command; the output holds the captions written until then.
    """
    if options.resume and not options.output:
        raise UserError("--resume needs --output, the file to continue")
    # A key that captioning does not read is refused, as in every command.
    settings = override_values(options.overrides, program="vlmcap caption", read=_READ)
    inputs = find_videos([Path(path) for path in options.paths])
    for notice in inputs.notices():
        print(notice, file=sys.stderr)
    output = Path(options.output) if options.output else None
    # The file is checked before the model is loaded, which takes minutes.
    file = CaptionFile(output, inputs.all, is_resumed=options.resume) if output else None
    counts = _Counts(output)
    with _stopping_on_sigterm():
        _caption(options.checkpoint, settings, inputs, file, counts)
    if counts.failed:
        video, reason = counts.failed[0]
        raise UserError(
            f"{len(counts.failed)} of {len(inputs.all)} files could not be read; the first is {video} ({reason}); "
            f"{counts}"
        )
    print(_printable(str(counts)), file=sys.stdout if file else sys.stderr)


# --- finding videos ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Inputs:
    """Files under the paths of a command.

    Attributes:
        videos: Paths, and addresses of archive members; a file given on the command line may have any ending.
        broken: Archives that cannot be read.
        other_endings: Number of files in folders by ending, for endings that are not those of videos.
        num_hidden: Number of hidden files and folders in folders.
        unreadable: Dangling links and other entries that cannot be opened.
    """

    videos: list[str] = field(default_factory=list)
    broken: list[Skipped] = field(default_factory=list)
    other_endings: Counter[str] = field(default_factory=Counter)
    num_hidden: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        """Every path and address that gets a line in the output."""
        return [*self.videos, *(archive.clip.video for archive in self.broken)]

    def notices(self) -> list[str]:
        """Returns one sentence for each kind of skipped files."""
        notices = []
        if num := self.other_endings.total():
            files = "1 file with another ending was" if num == 1 else f"{num} files with other endings were"
            notices.append(f"{files} skipped: {_listed([ending for ending, _ in self.other_endings.most_common()])}")
        if num := self.num_hidden:
            notices.append(f"{num} hidden {'file or folder was' if num == 1 else 'files or folders were'} skipped")
        if num := len(self.unreadable):
            entries = "entry that cannot be opened was" if num == 1 else "entries that cannot be opened were"
            notices.append(f"{num} {entries} skipped: {_listed(self.unreadable)}")
        return notices


def find_videos(paths: Sequence[Path]) -> Inputs:
    """Finds the given files, and the videos in given folders and archives, sorted by path.

    Folders are searched like those of data sets: archives count as folders, hidden files are skipped, and links are
    followed.

    Raises:
        UserError: A path does not exist, or a folder holds no video.
    """
    from vlmcap.data.media.tree import is_archive

    inputs = Inputs()
    for path in paths:
        # Folders and archives are searched; a single file is taken whatever its ending is.
        if path.is_dir() or (path.is_file() and is_archive(str(path))):
            _search(path, inputs)
        elif path.is_file():
            inputs.videos.append(str(path))
        else:
            raise UserError(f"{path} does not exist")
    return inputs


def _search(root: Path, inputs: Inputs) -> None:
    from vlmcap.data.media.tree import VIDEO_ENDINGS, WalkState, list_files

    # Collected apart, so that the message of an empty folder names only its own files.
    walk_state, here, videos = WalkState(), Inputs(), []
    for file in list_files(str(root), "follow", walk_state):
        if isinstance(file, Skipped):
            here.broken.append(file)
        elif (ending := PurePosixPath(file.path).suffix.lower()) in VIDEO_ENDINGS:
            videos.append(file)
        else:
            here.other_endings[ending or "no ending"] += 1
    here.num_hidden, here.unreadable = walk_state.num_hidden, walk_state.unreadable
    if not videos and not here.broken:
        why = f"; {'; '.join(here.notices())}" if here.notices() else ""
        raise UserError(f"{root} holds no video ({', '.join(sorted(VIDEO_ENDINGS))}){why}")
    # Sorted folder by folder: "a/2.mp4" comes before "a b/1.mp4".
    inputs.videos += [file.address for file in sorted(videos, key=lambda file: file.path.split("/"))]
    inputs.broken += here.broken
    inputs.other_endings += here.other_endings
    inputs.num_hidden += here.num_hidden
    inputs.unreadable += here.unreadable


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return _printable(", ".join(names[:_MAX_NAMED]) + more)


# --- captioning -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Counts:
    """Progress of the command; its text is the last line that the command prints."""

    output: Path | None
    captioned: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.captioned} captioned, {self.skipped} skipped, {len(self.failed)} failed"
        return counts if self.output is None else f"{counts}: {self.output}"


def _caption(
    checkpoint: str, settings: dict[str, Any], inputs: Inputs, file: CaptionFile | None, counts: _Counts
) -> None:
    """Captions the videos that have no caption in the output yet."""
    # 1. Leave out what the file has already.
    videos = inputs.videos if file is None else file.remaining(inputs.videos)
    counts.skipped = len(inputs.videos) - len(videos)
    captions: Iterable[tuple[str | Path, str | Skipped]] = ()
    # 2. Load the model only if there is something to caption.
    if videos:
        from vlmcap.training.checkpoints.load import load_captioner

        with progress_reporter("loading the model"):
            captions = load_captioner(checkpoint, settings).caption_files(videos)
    screen = sys.stdout  # a progress bar on the terminal replaces sys.stdout by its own stream
    is_silent = not videos or (file is None and screen.isatty())
    # 3. Caption. On a terminal without --output, captions themselves show the progress.
    with nullcontext(_no_report) if is_silent else progress_reporter("captioning") as report, _adding_counts(counts):
        # An archive that cannot be opened gets a line like a video that cannot be read.
        for archive in inputs.broken:
            _write_result(archive.clip.video, archive, file, counts, screen)
        for done, (video, caption) in enumerate(captions, 1):
            _write_result(str(video), caption, file, counts, screen)
            report(done, len(videos))


def _write_result(
    video: str, caption: str | Skipped, file: CaptionFile | None, counts: _Counts, screen: TextIO
) -> None:
    """Writes a caption, or the reason why there is none, and counts it after it has been written."""
    if isinstance(caption, Skipped):
        if file is not None:
            file.add({"video": video, "error": caption.reason})
        counts.failed.append((video, caption.reason))
        return
    if file is not None:
        file.add({"video": video, "prediction": caption})
    else:
        print(_printable(f"{video}\t{caption}"), file=screen, flush=True)
    counts.captioned += 1


def _no_report(done: int, total: int | None) -> None:
    """Reports no progress."""


@contextmanager
def _adding_counts(counts: _Counts) -> Iterator[None]:
    """Adds the counts to the message of any exception that ends the command early."""
    hint = "" if counts.output is None else "; the same command with --resume continues from there"
    try:
        yield
    except KeyboardInterrupt:
        # The trace of the interrupted code would hide the message.
        raise StoppedBySignal(f"Stopped by Ctrl-C: {counts}{hint}", signal.SIGINT) from None
    except StoppedBySignal as stop:
        raise StoppedBySignal(f"Stopped by {signal.Signals(stop.number).name}: {counts}{hint}", stop.number) from None
    except UserError as error:
        raise UserError(f"{error}; {counts}{hint}") from error
    except Exception as error:
        if is_out_of_memory(error):
            why = f"memory ran out ({first_line(error)}): caption fewer clips at a time with data.eval_batch_size=1"
            raise OutOfMemoryError(f"{why}; {counts}{hint}") from error
        print(f"{counts}{hint}", file=sys.stderr)
        raise


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, like Ctrl-C, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal("Stopped by SIGTERM.", number)

    # SIGTERM ends Python without running `finally`, so that half a line could be left.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _printable(text: str) -> str:
    """Escapes the surrogates of file names that are not UTF-8, which cannot be printed."""
    return text.encode("utf-8", "backslashreplace").decode()
