"""Writes run folders like those of `train.py`: synthetic captions with real configurations and scores."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmcap.compose import compose, to_plain, write_yaml
from vlmcap.demo.grammar import describe, draw_scene
from vlmcap.training.callbacks.scorer import Prediction, write_predictions
from vlmcap.types import Clip

CATEGORIES = ("바다", "도시", "숲")


def make_clips(
    count: int, *, split: str = "val", folder: Path | None = None, has_categories: bool = True
) -> list[Clip]:
    """Makes clips with Korean captions; in `folder`, the first three have real videos and the last a broken file."""
    rng = random.Random(f"clips of {split}")
    clips = []
    for index in range(count):
        name, category = f"{split}_{index:04d}", CATEGORIES[index % len(CATEGORIES)] if has_categories else ""
        video = Path("videos") / f"{name}.mp4" if folder is None else folder / f"{name}.mp4"
        clips.append(Clip(name, str(video), (describe(draw_scene(rng), rng),), category))
    if folder is not None:
        from vlmcap.data.decoding.video import write_video

        folder.mkdir(parents=True, exist_ok=True)
        for index, clip in enumerate(clips[:3]):
            frames = np.full((8, 72, 96, 3), 30 + 60 * index, np.uint8)
            frames[:, 20:40, 10 + 8 * index : 40] = np.arange(8, dtype=np.uint8)[:, None, None, None] * 25
            write_video(Path(clip.video), frames, fps=4)
        Path(clips[-1].video).write_bytes(b"no video")
    return clips


def make_predictions(clips: Sequence[Clip], quality: float, seed: int) -> list[Prediction]:
    """Makes a caption per clip in which each word is correct with probability `quality`, else from a random clip."""
    rng = random.Random(seed)
    words = [word for clip in clips for word in clip.captions[0].split()]
    return [
        Prediction(
            clip, " ".join(word if rng.random() < quality else rng.choice(words) for word in clip.captions[0].split())
        )
        for clip in clips
    ]


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(compose(overrides))
    return plain


def write_run(
    folder: Path,
    overrides: Sequence[str],
    *,
    quality: float = 0.6,
    seed: int = 0,
    clips: Mapping[str, Sequence[Clip]] | None = None,
    predictions: Mapping[str, Sequence[Prediction]] | None = None,
    status: Mapping[str, Any] | None = None,
    memory_gib: float = 10.0,
    seconds: float = 600.0,
    trained: int = 20_000_000,
    sweep: bool = True,
    has_summary: bool = True,
) -> Path:
    """Writes a run.

    Args:
        folder: Folder of the run.
        overrides: Overrides of `train.py`, without the seed.
        quality: Share of correct words in the captions.
        seed: Seed of the run and of the errors in its captions.
        clips: Clips by split; None for 30 of `val` and 30 of `test`.
        predictions: Predictions by split, in place of captions of the given quality.
        status: Content of `status.json`; None to omit the file.
        memory_gib: Peak memory.
        seconds: Duration of the run.
        trained: Number of trained parameters.
        sweep: Whether the folder is that of a sweep's job, with Hydra's files.
        has_summary: Whether the run finished.
    """
    from vlmcap.config import EvaluationConfig
    from vlmcap.training.callbacks.scorer import CaptionScorer, describe_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(_composed(tuple(overrides)))
    config["seed"], config["paths"]["output_dir"] = seed, str(folder)
    write_yaml(config, folder / "config.yaml")
    if sweep:
        (folder / ".hydra").mkdir(exist_ok=True)
        write_yaml([*overrides, f"seed={seed}"], folder / ".hydra" / "overrides.yaml")
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status, ensure_ascii=False), encoding="utf-8")
    if not has_summary:
        return folder
    scorer = CaptionScorer(EvaluationConfig(tokenizer="mecab_ko"))
    clips = clips or {split: make_clips(30, split=split) for split in ("val", "test")}
    scores: dict[str, float] = {}
    for number, (split, those) in enumerate(clips.items()):
        found = make_predictions(those, quality, 1000 * seed + number) if predictions is None else predictions[split]
        write_predictions(folder / "predictions" / f"{split}.jsonl", found, scorer.tokenizer)
        metrics = ("bleu_1", "bleu_4", "cider", "cider_d", "rouge_l", "distinct_ratio", "length_ratio")
        scores |= {f"{split}/{name}": value for name, value in scorer.score(found, metrics=metrics).items()}
        texts, captions = [one.text for one in found], [one.clip.captions for one in found]
        groups = scorer._by_category(texts, captions, [one.clip.category for one in found])
        scores |= {f"{split}/{name}": value for name, value in groups.items()}
    _write_metrics(folder, scores)
    summary = {
        "scores": scores,
        "tokenizer": describe_tokenizer(scorer.tokenizer),
        "seconds": {"prepare": 20.0, "fit": seconds - 50, "total": seconds},
        "peak_memory_gib": memory_gib,
        "parameters": {
            "encoder": {"parameters": 400_000_000, "trained": 0},
            "projector": {"parameters": trained, "trained": trained},
            "llm": {"parameters": 4_000_000_000, "trained": 0},
        },
        "steps": 40,
        "versions": {"vlmcap": "0.1.0"},
        "git_revision": "0123456789ab",
        "command": ["train.py", "-m", *overrides, "seed=0,1"] if sweep else ["train.py", *overrides, f"seed={seed}"],
    }
    (folder / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=2), encoding="utf-8")
    return folder


def write_one_run(folder: Path, videos: Path) -> Path:
    """Writes a run of the demo with facts, a plan and 12 test clips: three have videos, one has a hostile caption."""
    from tests.reporting.report.invented import HOSTILE
    from vlmcap.config import EvaluationConfig
    from vlmcap.demo.grammar import FACTS
    from vlmcap.training.callbacks.scorer import CaptionScorer

    videos.mkdir(parents=True)
    facts = videos / "facts.json"
    facts.write_text(json.dumps(FACTS, ensure_ascii=False), encoding="utf-8")
    clips = {split: make_clips(12, split=split, folder=videos / split) for split in ("val", "test")}
    predictions = {split: make_predictions(those, 0.7, 3) for split, those in clips.items()}
    predictions["test"][4] = Prediction(clips["test"][4], HOSTILE)
    overrides = ["monitor=val/facts/mean", f"evaluation.facts={facts}"]
    write_run(folder, overrides, clips=clips, predictions=predictions, sweep=False)
    scorer = CaptionScorer(EvaluationConfig(tokenizer="mecab_ko", facts=str(facts), swap_videos=True))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for split, those in predictions.items():
        summary["scores"] |= {f"{split}/{name}": value for name, value in scorer.score(those).items() if value == value}
    summary["plan"] = {"peak_gib": 11.5, "usable_gib": 22.0, "fit_s": 480.0}
    (folder / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")
    (folder / "checkpoints").mkdir()
    for name in ("best.ckpt", "last.ckpt"):
        (folder / "checkpoints" / name).touch()
    return folder


def _write_metrics(folder: Path, scores: Mapping[str, float]) -> None:
    """Writes `metrics.jsonl` like the logger: losses of 40 steps, two validations and the final scores."""
    records: list[dict[str, Any]] = []
    for step in range(2, 42, 2):
        records.append(
            {
                "step": step,
                "epoch": (step - 1) // 20,
                "train/loss": 4 / step**0.5,
                "train/lr_projector": 1e-3 / step,
                "train/tokens_per_s": 900.0,
            }
        )
        if step % 20 == 0:
            loop = {"val/cider": scores.get("val/cider", 0.0) * step / 45, "val/loss": 5 / step**0.5}
            records.append({"step": step, "epoch": (step - 1) // 20, **loop})
    records += [
        {"step": 40, "epoch": 2, **{key: v for key, v in scores.items() if key.startswith(split)}}
        for split in ("val", "test")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_sweep(root: Path, *, seeds: int = 2, num_clips: int = 30, videos: Path | None = None) -> Path:
    """Writes the folder of a sweep: two encoders by two projectors by seeds, and two jobs without a result.

    siglip2 + mlp is best; `quality` is 0.2 lower with clip and 0.1 lower with cross_attention. The job with a language
    model that is too large was refused by its plan, another one failed.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "multirun.yaml").write_text("hydra: {}\n", encoding="utf-8")
    clips = {split: make_clips(num_clips, split=split, folder=videos and videos / split) for split in ("val", "test")}
    number = 0
    for encoder, loss in (("siglip2", 0.0), ("clip", 0.2)):
        for projector, more in (("mlp", 0.0), ("cross_attention", 0.1)):
            for seed in range(seeds):
                write_run(
                    root / str(number),
                    [f"encoder={encoder}", f"projector={projector}", "llm=qwen3_4b", "hardware=l4"],
                    quality=0.85 - loss - more,
                    seed=seed,
                    clips=clips,
                    memory_gib=9 + 4 * (encoder == "siglip2"),
                    seconds=600.0 + 300 * (projector == "mlp") + 7 * seed,
                    trained=20_000_000 if projector == "mlp" else 50_000_000,
                    status={
                        "status": "finished",
                        "reason": "",
                        "error": None,
                        "overrides": [],
                        "plan": {"peak_gib": 11.5},
                    },
                )
                number += 1
    refused = {
        "status": "refused",
        "reason": "the plan needs 31.0 GiB of 22.0 GiB; set hardware=a100",
        "error": "UserError",
        "overrides": ["encoder=siglip2", "projector=mlp", "llm=qwen3_32b", "hardware=l4", "seed=0"],
        "plan": {"peak_gib": 31.0, "usable_gib": 22.0},
        "seconds": 4.0,
    }
    job = ["encoder=siglip2", "projector=mlp", "llm=qwen3_32b", "hardware=l4"]
    write_run(root / str(number), job, status=refused, has_summary=False)
    failed = {
        "status": "failed",
        "reason": "the loss became NaN at step 12",
        "error": "RuntimeError",
        "overrides": [],
        "seconds": 90.0,
    }
    job = ["encoder=clip", "projector=mlp", "llm=qwen3_4b", "hardware=l4"]
    write_run(root / str(number + 1), job, seed=seeds, status=failed, has_summary=False)
    return root
