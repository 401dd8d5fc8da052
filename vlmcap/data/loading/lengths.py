"""Number of tokens per clip, counted with the real tokenizer in several processes and cached on disk."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmcap.data.arrays import load_arrays, save_arrays
from vlmcap.libraries import usable_processors
from vlmcap.types import Clip

CHUNK = 4096  # clips per task of a process
_CLIPS_PER_PROCESS = 50_000  # fewer are counted faster than a process imports the tokenizer
_MAX_PROCESSES = 8
_CHUNK_TIMEOUT_S = 300.0  # a chunk takes about a second

Encode = Callable[[str], Sequence[int]]

_encode: Encode | None = None  # set in the processes of the pool


def caption_lengths(
    clips: Sequence[Clip], encode: Encode, *, folder: Path, fingerprint: str, num_processes: int | None = None
) -> NDArray[np.int32]:
    """Counts the tokens of each clip's first caption, end token included, (N,); 0 where there is nothing to learn from.

    Args:
        clips: Clips, read in slices and never copied.
        encode: Function from a caption to its tokens without the end token; picklable.
        folder: Folder of the cached counts, in a file named by captions and tokenizer.
        fingerprint: Fingerprint of the tokenizer and of what `encode` adds; if it changes, captions are counted again.
        num_processes: Number of processes; 1 counts in this process, None chooses by the number of clips.
    """
    path = folder / f"lengths-{_captions_key(clips, fingerprint)}.npz"
    saved = load_arrays(path)
    if saved is not None and "lengths" in saved:
        return saved["lengths"]
    counts = list(_counts(clips, encode, _process_count(len(clips)) if num_processes is None else num_processes))
    lengths = np.concatenate(counts) if counts else np.empty(0, dtype=np.int32)
    save_arrays(path, lengths=lengths)
    return lengths


def sequence_lengths(
    captions: NDArray[np.int32], *, max_caption_tokens: int, prompt_tokens: int, visual_tokens: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the number of tokens of each clip's sequence in a training batch, (N,).

    Args:
        captions: Caption lengths from `caption_lengths`.
        max_caption_tokens: Length to which longer captions are truncated.
        prompt_tokens: Number of text tokens before the caption.
        visual_tokens: Number of visual tokens per clip, text between them included, or (N,) numbers; where they vary
            and are unknown, the largest possible number.
    """
    # Longer captions are truncated.
    return np.minimum(captions, max_caption_tokens).astype(np.int64) + prompt_tokens + visual_tokens


def _counts(clips: Sequence[Clip], encode: Encode, num_processes: int) -> Iterator[NDArray[np.int32]]:
    starts = range(0, len(clips), CHUNK)
    if num_processes < 2:
        yield from (count_tokens(clips[start : start + CHUNK], encode) for start in starts)
        return
    # Spawned, since this process has threads and perhaps a GPU. The pool ends its processes when the block ends.
    with multiprocessing.get_context("spawn").Pool(num_processes, _start_process, (encode,)) as pool:
        results = [(start, pool.apply_async(_count_in_process, (clips[start : start + CHUNK],))) for start in starts]
        for start, result in results:
            try:
                yield result.get(_CHUNK_TIMEOUT_S)
            except multiprocessing.TimeoutError:  # the process hangs or was killed, which a pool does not report
                yield count_tokens(clips[start : start + CHUNK], encode)


def count_tokens(clips: Sequence[Clip], encode: Encode) -> NDArray[np.int32]:
    """Counts the tokens of each first caption, end token included; 0 for empty ones."""
    counts = (len(encode(clip.captions[0])) if clip.captions else 0 for clip in clips)
    return np.fromiter((count + 1 if count else 0 for count in counts), dtype=np.int32, count=len(clips))


def _start_process(encode: Encode) -> None:
    global _encode
    _encode = encode


def _count_in_process(clips: Sequence[Clip]) -> NDArray[np.int32]:
    assert _encode is not None
    return count_tokens(clips, _encode)


def _process_count(num_clips: int) -> int:
    return max(1, min(num_clips // _CLIPS_PER_PROCESS, usable_processors(), _MAX_PROCESSES))


def _captions_key(clips: Sequence[Clip], fingerprint: str) -> str:
    content = hashlib.sha256(fingerprint.encode())
    for clip in clips:
        caption = clip.captions[0].encode(errors="surrogatepass") if clip.captions else b""
        content.update(b"%d:" % len(caption) + caption)  # the length keeps neighbouring captions apart
    return content.hexdigest()[:16]
