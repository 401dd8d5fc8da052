"""The page of a single run, a form of the report's page that is written to the run folder."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlmcap.errors import first_line
from vlmcap.files import write_text
from vlmcap.metrics import FactLexicon
from vlmcap.reporting.report.analysis import Wanted, analyse
from vlmcap.reporting.report.captions import mark_facts, shown_text
from vlmcap.reporting.report.folders import ReadYaml, RunFolder, read_run
from vlmcap.reporting.report.naming import group_name
from vlmcap.reporting.report.page import read_all_frames, report_page
from vlmcap.reporting.report.records import ClipRow, OtherVideo
from vlmcap.reporting.report.scoring import find_lexicon

PAGE_FILE = "index.html"
NUM_CLIPS = 12  # clips on the page
NUM_FRAMES = 12  # frames per clip, shown as an animation
HEIGHT = 112  # pixels; height of a frame
MAX_S = 30.0  # seconds to read the frames of all clips


def leave_page(folder: Path, read_yaml: ReadYaml, *, version: str) -> None:
    """Writes the page of a run that has ended and prints its path; if that fails, prints the reason.

    Args:
        folder: Folder of a run of `train.py` or `evaluate.py`.
        read_yaml: Function that reads a YAML file as plain data.
        version: Version of vlmcap.
    """
    try:
        write_text(folder / PAGE_FILE, run_page(folder, read_yaml, version=version))
    except Exception as error:  # the run is complete, so a problem with its page must not make it fail
        print(
            f"{folder / PAGE_FILE} was not written ({type(error).__name__}: {first_line(error)}); the run itself is "
            "complete.",
            flush=True,
        )
        return
    print(f"{folder / PAGE_FILE}: curves, scores, clips with captions, and the next commands", flush=True)


def run_page(folder: Path, read_yaml: ReadYaml, *, version: str) -> str:
    """Returns the page as HTML; the arguments are those of `leave_page`.

    Raises:
        UserError: The run has no scores.
    """
    run = read_run(folder, read_yaml)
    title = group_name(run, ())
    report = analyse([run], Wanted(_headline(run), title, NUM_CLIPS), version=version)
    clips = _with_other_videos(sorted(report.clips, key=lambda clip: clip.id), run, report.metric.partition("/")[0])
    report = dataclasses.replace(report, clips=clips, commands=next_commands(run, [clip.video for clip in clips]))
    return report_page(report, read_all_frames(clips, num_frames=NUM_FRAMES, height=HEIGHT, max_s=MAX_S))


def next_commands(run: RunFolder, videos: Sequence[str] = ()) -> dict[str, str]:
    """Returns the next commands after a run by purpose, relative to the folder in which the run was started.

    Args:
        run: The run; an evaluation cannot be resumed or swept.
        videos: Videos of clips; the first one on this computer is the example of the captioning command.
    """
    words = shlex.split(run.command)
    # In the way in which the run was started.
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
        # Without the program, which has two words: "python train.py" or "vlmcap train".
        rest = [word for word in words[2:] if not word.startswith("checkpoint=")]
        without_seed = [word for word in rest if not word.startswith("seed=")]
        commands["resume"] = [*words[:2], *rest, f"paths.output_dir={run.path}", "checkpoint=last"]
        commands["sweep"] = [*words[:2], "-m", *without_seed, "seed=0,1,2"]
        commands["compare"] = ["vlmcap", "report", str(run.path), "multirun", "--output", "report"]
    return {name: shlex.join(command) for name, command in commands.items()}


def _headline(run: RunFolder) -> str | None:
    """Returns the monitored metric on the test split, else on the validation split, or CIDEr; None without either."""
    split = next((split for split in ("test", "val") if split in run.predictions), "val")
    name = str(run.config.get("monitor") or "").partition("/")[2]
    return next((key for key in (f"{split}/{name}", f"{split}/cider") if key in run.scores), None)


def _with_other_videos(clips: Sequence[ClipRow], run: RunFolder, split: str) -> list[ClipRow]:
    """Adds to each clip the caption that the model generates from another clip's video.

    It is the one recorded by `callbacks=visual_reliance`, else the caption of the next clip. As the prompt is the same
    for all clips, the model's output depends only on the video, so this is what it generates from that video.
    """
    lexicon = find_lexicon([run])
    recorded = _read_visual_reliance(run.path / "predictions" / "visual_reliance" / f"{split}.jsonl")
    completed = []
    # Without a measurement of visual reliance, each clip is shown beside the caption of the next one.
    for clip, following in zip(clips, [*clips[1:], *clips[:1]], strict=True):
        other = recorded.get(clip.id) or ((following.id, following.captions[0].text) if following is not clip else None)
        completed.append(dataclasses.replace(clip, other=None if other is None else _other(*other, clip, lexicon)))
    return completed


def _other(name: str, text: str, clip: ClipRow, lexicon: FactLexicon | None) -> OtherVideo:
    return OtherVideo(name, shown_text(text, lexicon), mark_facts(text, clip.references[0], lexicon))


def _read_visual_reliance(path: Path) -> dict[str, tuple[str, str]]:
    """Returns the file name of the other video and its caption by clip id; empty if the file does not exist."""
    others: dict[str, tuple[str, str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError:
        return {}
    for line in lines:
        row = json.loads(line) if line.strip() else {}
        text = row.get("swapped", {}).get("prediction")
        if isinstance(text, str):
            # File name of a path on any system.
            others[str(row["id"])] = (re.split(r"[/\\]", str(row["swapped_video"]))[-1], text)
    return others
