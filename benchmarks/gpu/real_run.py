"""Runs train.py as users do, on small models and generated images.

Runs are repeated, killed, resumed, evaluated, captioned and exported.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import limits
from benchmarks.gpu.counting import watching_host
from benchmarks.gpu.pytest_checks import ROOT
from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Report
from benchmarks.gpu.words import use_words_for_morphemes
from vlmcap.compose import compose
from vlmcap.demo.grammar import describe, draw_scene

_PATIENCE_S = 40.0  # for the first checkpoint of a run that is killed
_SIDE, _NUM_FRAMES = 64, 2
_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def bf16(report: Report, place: Place) -> None:
    """Runs as on an L4: bf16, 4 bits, gradient checkpointing."""
    _run(report, place, ["hardware=l4"])


def fp16(report: Report, place: Place) -> None:
    """Runs as on a T4, but unquantised: fp16 and loss scaling.

    A rehearsal uses bf16, as CPUs have no fp16 layer norm.
    """
    precision = ["hardware.precision=bf16"] if place.is_tiny else []
    _run(report, place, ["hardware=t4", "llm.quantization=none", *precision])


def _run(report: Report, place: Place, chosen: Sequence[str]) -> None:
    from vlmcap.training.run import train

    use_words_for_morphemes()
    # 1. A run that is killed starts first, beside the first whole one.
    overrides = [*chosen, *_overrides(place)]
    killed = _start(place, overrides, "killed")
    try:
        with watching_host() as host:
            train(compose([*overrides, _into(place, "straight")]))
        report.add("train", "host memory grown, GiB", host.grown_gib)
        _kill(killed, place.folder / "killed")
    finally:
        if killed.poll() is None:
            killed.kill()
        killed.wait()
    # 2. The same seed again, and the killed run to its end.
    straight = _losses(place, "straight")
    report.add("train", "steps", len(straight))
    train(compose([*overrides, _into(place, "again")]))
    report.add(
        "the same seed again", "losses that differ", _num_different(straight, _losses(place, "again")), limits.SAME
    )
    train(compose([*overrides, _into(place, "killed"), "checkpoint=last"]))
    report.add(
        "killed and resumed", "losses that differ", _num_different(straight, _losses(place, "killed")), limits.SAME
    )
    # 3. What is done with a checkpoint.
    checkpoint = place.folder / "straight" / "checkpoints" / "best.ckpt"
    _evaluate(report, place, checkpoint)
    _caption(report, place, checkpoint)


def _evaluate(report: Report, place: Place, checkpoint: Path) -> None:
    from vlmcap.config_saved import saved_config
    from vlmcap.training.checkpoints.load import read_checkpoint
    from vlmcap.training.run import evaluate

    plain = read_checkpoint(checkpoint)["vlmcap"]["config"]
    evaluate(saved_config(plain, {"paths.output_dir": str(place.folder / "evaluated")}), checkpoint)
    expected = _lines(place.folder / "straight" / "predictions" / "test.jsonl")
    found = _lines(place.folder / "evaluated" / "predictions.jsonl")
    report.add("evaluate", "share of captions that are the run's", _share(expected, found), limits.ALL)


def _caption(report: Report, place: Place, checkpoint: Path) -> None:
    import vlmcap
    from vlmcap.training.checkpoints.export import export

    rows = _lines(place.folder / "straight" / "predictions" / "test.jsonl")
    videos, expected = [row["video"] for row in rows], [row["prediction"] for row in rows]
    captions = vlmcap.load(checkpoint).caption(videos)
    report.add("caption", "share of captions that are the run's", _share(expected, captions), limits.ALL)
    exported = export(checkpoint, place.folder / "export", device="cuda:0" if place.device == "cuda" else "cpu")
    report.add("export", "difference of logits by the merge", exported.difference)
    merged = vlmcap.load(exported.folder).caption(videos)
    report.add("export", "clips captioned", len(merged) / len(videos), limits.ALL)
    report.add("export", "share of captions that are the run's", _share(expected, merged))


# --- the run that is killed -------------------------------------------------------------------------------------------


def _start(place: Place, overrides: Sequence[str], name: str) -> subprocess.Popen[bytes]:
    log = (place.folder / f"{name}.log").open("wb")
    command = [sys.executable, "-m", "benchmarks.gpu.words", "train.py", *overrides, _into(place, name)]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _kill(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kills the process as soon as it has a checkpoint.

    Raises:
        RuntimeError: It ended before that, or took too long.
    """
    end = time.monotonic() + _PATIENCE_S
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        if process.poll() is not None or time.monotonic() > end:
            log = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(
                f"the run that was to be killed wrote no checkpoint: {log[-1] if log else 'it printed nothing'}"
            )
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _losses(place: Place, name: str) -> dict[int, float]:
    rows = _lines(place.folder / name / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def _num_different(expected: dict[int, float], found: dict[int, float]) -> int:
    return sum(expected.get(step) != found.get(step) for step in expected.keys() | found.keys())


def _share(expected: Sequence[Any], found: Sequence[Any]) -> float:
    return sum(map(_is_equal, expected, found)) / max(len(expected), len(found), 1)


def _is_equal(first: Any, second: Any) -> bool:
    return bool(
        (first["prediction"] if isinstance(first, dict) else first)
        == (second["prediction"] if isinstance(second, dict) else second)
    )


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what it trains on ------------------------------------------------------------------------------------------------


def _into(place: Place, name: str) -> str:
    return f"paths.output_dir={place.folder / name}"


def _overrides(place: Place) -> list[str]:
    """Returns overrides of a run of a few dozen steps; images need no PyAV, and words no mecab-ko."""
    counts = {"train": 6, "val": 2, "test": 2} if place.is_tiny else {"train": 24, "val": 6, "test": 6}
    root, captions = _make_clips(place.folder / "clips", counts)
    vision, language = _make_bases(place.folder / "bases", captions)
    return [
        "encoder=siglip2",
        "llm=qwen3_8b",
        "data=jsonl",
        f"hardware.accelerator={place.accelerator}",
        f"encoder.checkpoint={vision}",
        f"llm.checkpoint={language}",
        f"data.root={root}",
        f"data.num_frames={_NUM_FRAMES}",
        "data.batch_size=2",
        "data.eval_batch_size=2",
        f"data.num_workers={0 if place.is_tiny else 2}",
        "projector.frame_stack=1",
        "projector.reducer=none",
        "projector.temporal=none",
        "llm.max_caption_tokens=96",
        "llm.max_new_tokens=6",
        "evaluation.tokenizer=whitespace",
        "tuning.align_epochs=1",
        f"tuning.epochs={2 if place.is_tiny else 3}",
        "tuning.lora.dropout=0.1",  # so that random states count
        "trainer.accumulate_grad_batches=1",
        "trainer.log_every_n_steps=1",
        "trainer.checkpoint_every_n_steps=2",
        "trainer.deterministic=true",
        f"paths.cache_dir={place.folder / 'cache'}",
    ]


def _make_clips(folder: Path, counts: dict[str, int]) -> tuple[Path, list[str]]:
    """Makes animated PNGs of the demo's scenes with their captions, in a JSON-lines file per split."""
    from PIL import Image

    from vlmcap.demo.render import render

    folder.mkdir(parents=True)
    rng, captions = random.Random(0), []
    for split, count in counts.items():
        lines = []
        for index in range(count):
            scene = draw_scene(rng)
            frames = [Image.fromarray(frame).resize((_SIDE, _SIDE)) for frame in render(scene, index)[:_NUM_FRAMES]]
            name = f"{split}{index}.png"
            frames[0].save(folder / name, save_all=True, append_images=frames[1:])
            captions.append(describe(scene, rng))
            lines.append(json.dumps({"video": name, "caption": captions[-1]}, ensure_ascii=False))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, captions


def _make_bases(folder: Path, captions: Sequence[str]) -> tuple[Path, Path]:
    """Makes a SigLIP tower and a Qwen3 with random weights and a tokenizer, in Hugging Face layout."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from vlmcap.demo.tiny_llm import train_tokenizer

    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(**_SHAPE, image_size=56, patch_size=14))
    tower.save_pretrained(folder / "vision")
    tokenizer = train_tokenizer(captions, "영상을 설명해 주세요.")
    values = {"num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.2}
    llm: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **(_SHAPE | values)))
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    llm.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    llm.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return folder / "vision", folder / "language"
