"""The page that one run leaves in its folder: the report's page in a form for one run."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlmcap.errors import first_line
from vlmcap.files import replacing
from vlmcap.metrics import FactLexicon
from vlmcap.reporting.report.analysis import Wanted, analyse
from vlmcap.reporting.report.captions import mark_facts, shown_text
from vlmcap.reporting.report.data import ClipRow, OtherVideo, Report
from vlmcap.reporting.report.folders import ReadYaml, RunFolder, read_run
from vlmcap.reporting.report.naming import group_name
from vlmcap.reporting.report.page import pictures_of, report_page
from vlmcap.reporting.report.scoring import find_lexicon

FILE = "index.html"
NUM_CLIPS = 12
NUM_FRAMES = 12  # of a clip, which plays
HEIGHT = 112  # of its picture, in pixels
MAX_S = 30.0  # for reading all of them


def leave_page(folder: Path, read_yaml: ReadYaml, *, version: str) -> None:
    """Writes the page of a run that has ended, and prints where it is.

    If that fails, a line says why and the run loses nothing.

    Args:
        folder: Folder of a run of `train.py` or `evaluate.py`.
        read_yaml: Function that reads a YAML file as plain data.
        version: Version of vlmcap.
    """
    try:
        page = run_page(folder, read_yaml, version=version)
        with replacing(folder / FILE) as partial:
            partial.write_text(page, encoding="utf-8")
    except Exception as error:  # whatever it is, the run is over and its results are written
        print(
            f"{folder / FILE} was not written ({type(error).__name__}: {first_line(error)}); the run itself is "
            "complete.",
            flush=True,
        )
        return
    print(f"{folder / FILE}: curves, scores, clips with their captions, and the commands to go on", flush=True)


def run_page(folder: Path, read_yaml: ReadYaml, *, version: str) -> str:
    """The page as HTML; arguments as of `leave_page`.

    Raises:
        UserError: The run has no scores.
    """
    run = read_run(folder, read_yaml)
    title = group_name(run, ())
    report = analyse([run], Wanted(_headline(run), title, NUM_CLIPS), version=version)
    clips = _with_other_videos(sorted(report.clips, key=lambda clip: clip.id), run, _split(report))
    report = dataclasses.replace(report, clips=clips, commands=next_commands(run, [clip.video for clip in clips]))
    return report_page(report, pictures_of(clips, num_frames=NUM_FRAMES, height=HEIGHT, max_s=MAX_S))


def next_commands(run: RunFolder, videos: Sequence[str] = ()) -> dict[str, str]:
    """The commands to go on from a run, by purpose, each as it is typed in the folder that the run was started in.

    Args:
        run: The run, of which an evaluation can neither be resumed nor swept.
        videos: Files that may be captioned, the first of which is taken.
    """
    words = shlex.split(run.command)
    program = ["vlmcap"] if words[:1] == ["vlmcap"] else ["python"]
    commands: dict[str, list[str]] = {}
    if run.checkpoint:
        video = next((video for video in videos if "://" not in video), "clip.mp4")
        evaluate = [*program, "evaluate"] if program == ["vlmcap"] else [*program, "evaluate.py"]
        commands["caption"] = ["vlmcap", "caption", video, "--checkpoint", run.checkpoint]
        commands["evaluate"] = [
            *evaluate,
            f"checkpoint={run.checkpoint}",
            "data.split=test",
            "evaluation.swap_videos=true",
        ]
    if (run.path / "checkpoints" / "last.ckpt").is_file() and len(words) > 1:
        rest = [word for word in words[2:] if not word.startswith("checkpoint=")]
        own = [word for word in rest if not word.startswith("seed=")]
        commands["resume"] = [*words[:2], *rest, f"paths.output_dir={run.path}", "checkpoint=last"]
        commands["sweep"] = [*words[:2], "-m", *own, "seed=0,1,2"]
        commands["compare"] = ["vlmcap", "report", str(run.path), "multirun", "--output", "report"]
    return {name: shlex.join(command) for name, command in commands.items()}


def _headline(run: RunFolder) -> str | None:
    """The monitored score on the split that is kept for the end, or CIDEr there; None where it has neither."""
    split = next((split for split in ("test", "val") if split in run.predictions), "val")
    name = str(run.config.get("monitor") or "").partition("/")[2]
    return next((key for key in (f"{split}/{name}", f"{split}/cider") if key in run.scores), None)


def _split(report: Report) -> str:
    return report.metric.partition("/")[0]


def _with_other_videos(clips: Sequence[ClipRow], run: RunFolder, split: str) -> list[ClipRow]:
    """The clips with what was said of another clip's video.

    As `callbacks=visual_reliance` saw it, else the caption of the next clip here.

    Nothing but the video tells the model of a clip, as the prompt is the same for all, so the caption of the next clip
    is what the model says when it gets that clip's video.
    """
    lexicon, seen = (
        find_lexicon([run]),
        _read_visual_reliance(run.path / "predictions" / "visual_reliance" / f"{split}.jsonl"),
    )
    found = []
    for clip, following in zip(clips, [*clips[1:], *clips[:1]], strict=True):
        other = seen.get(clip.id) or ((following.id, following.captions[0].text) if following is not clip else None)
        found.append(dataclasses.replace(clip, other=None if other is None else _other(*other, clip, lexicon)))
    return found


def _other(name: str, text: str, clip: ClipRow, lexicon: FactLexicon | None) -> OtherVideo:
    return OtherVideo(name, shown_text(text, lexicon), mark_facts(text, clip.references[0], lexicon))


def _read_visual_reliance(path: Path) -> dict[str, tuple[str, str]]:
    """Clip to the file of the other video and what was said of it.

    Empty where no captions of other videos were written.
    """
    found: dict[str, tuple[str, str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError:
        return {}
    for line in lines:
        row = json.loads(line) if line.strip() else {}
        text = row.get("swapped", {}).get("prediction")
        if isinstance(text, str):
            found[str(row["id"])] = (re.split(r"[/\\]", str(row["swapped_video"]))[-1], text)
    return found
