"""`vlmcap caption`: captions of video files."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.files import replacing

_VIDEO_ENDINGS = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v"}


def run(options: Namespace) -> None:
    """Captions of the files, to the screen or into a file.

    Raises:
        UserError: A path, a file or the checkpoint does not do.
    """
    videos = find_videos([Path(path) for path in options.paths])
    output = Path(options.output) if options.output else None
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: the folder {output.parent} does not exist")
    from vlmcap.terminal import progress_reporter
    from vlmcap.training.checkpoints.load import load_captioner

    with progress_reporter("loading the model"):
        captioner = load_captioner(options.checkpoint, read_settings(options.set))
    captions: list[tuple[Path, str]] = []
    failed: list[tuple[Path, str]] = []
    with progress_reporter("captioning") as report:
        for done, (video, caption) in enumerate(captioner.caption_files(videos), 1):
            if isinstance(caption, str):
                captions.append((video, caption))
            else:
                failed.append((video, caption.reason))
            report(done, len(videos))
    _write(captions, output)
    if failed:
        video, reason = failed[0]
        raise UserError(f"{len(failed)} of {len(videos)} files could not be read, first: {video} ({reason})")


def read_settings(settings: Sequence[str]) -> dict[str, str]:
    """Keys to values of `--set KEY=VALUE`; `UserError` for one that is none."""
    values = dict(setting.partition("=")[::2] for setting in settings)
    for setting in settings:
        if "=" not in setting:
            raise UserError(f"--set {setting} is not KEY=VALUE")
    return values


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and the video files below folders, sorted.

    Raises:
        UserError: A path is not there, or a folder holds no video.
    """
    videos: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _VIDEO_ENDINGS and file.is_file())
            if not found:
                raise UserError(f"{path} holds no video ({', '.join(sorted(_VIDEO_ENDINGS))})")
            videos += found
        elif path.is_file():
            videos.append(path)
        else:
            raise UserError(f"{path} does not exist")
    return videos


def _write(captions: Sequence[tuple[Path, str]], output: Path | None) -> None:
    if output is None:
        for video, caption in captions:
            print(f"{video}\t{caption}")
        return
    lines = [json.dumps({"video": str(video), "prediction": caption}, ensure_ascii=False) for video, caption in captions]
    with replacing(output) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(captions)} captions: {output}")
