"""What is measured, and what `vlmcap caption` writes, is computed as in a run.

In the same modes and on like batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import vlmcap
from vlmcap.assembly.resolving import caption_counts
from vlmcap.measuring.measure import measure
from vlmcap.measuring.steps import NUM_STEPS, NUM_TIMED, ending_ids, step_captions
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.prompt import PromptEncoder
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.known_data import known_clips, planned
from vlmcap.training.run import evaluate, train
from vlmcap.types import Batch

Seen = list[dict[str, Any]]


def context_of(captioner: VideoCaptioner, batch: Batch) -> dict[str, Any]:
    """Everything that changes how the language model computes."""
    return {
        "labelled": batch.labels is not None,
        "training": captioner.llm.training,
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "type": torch.get_autocast_dtype("cpu"),
        "weight cache": torch.is_autocast_cache_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filled memory": torch.utils.deterministic.fill_uninitialized_memory,
        "mask": captioner.language_mask(batch) is not None,
        "weights": sorted({str(parameter.dtype) for parameter in captioner.parameters()}),
        "trained": sorted(
            {name.split(".")[0] for name, parameter in captioner.named_parameters() if parameter.requires_grad}
        ),
        "checkpointed": sum(
            bool(getattr(module, "gradient_checkpointing", False)) for module in captioner.llm.modules()
        ),
        "attention": captioner.llm.config._attn_implementation,
    }


@contextmanager
def watched() -> Iterator[Seen]:
    """The contexts in which prompts and captions were joined, with the labels of each row."""
    seen: Seen = []
    merge = VideoCaptioner.merge

    def watch(self: VideoCaptioner, batch: Batch, visual: torch.Tensor) -> torch.Tensor:
        labels = None if batch.labels is None else (batch.labels != -100).sum(1).tolist()
        if not isinstance(visual, FakeTensor):  # those are of the plan
            seen.append(context_of(self, batch) | {"rows": labels, "padded": bool((batch.attention_mask == 0).any())})
        return merge(self, batch, visual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoCaptioner, "merge", watch)
        yield seen


def distinct(seen: Seen) -> list[str]:
    """Each context once, without the lengths of its batch."""
    return sorted(
        {
            json.dumps({key: value for key, value in one.items() if key not in ("rows", "padded")}, default=str)
            for one in seen
        }
    )


@pytest.fixture(scope="module")
def overrides(
    siglip_folder: Path, llm_folder: Path, aihub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    folder = tmp_path_factory.mktemp("as-a-run")
    paths = [f"paths.cache_dir={folder / 'cache'}", f"data.root={aihub_root}"]
    parts = ["encoder=siglip2", "llm=qwen3_8b", f"encoder.checkpoint={siglip_folder}", f"llm.checkpoint={llm_folder}"]
    data = [
        "data=aihub",
        "hardware=cpu",
        "data.num_frames=2",
        "data.batch_size=2",
        "data.eval_batch_size=2",
        "data.num_workers=0",
    ]
    data += ["projector=mlp", "projector.frame_stack=1", "projector.temporal=none"]
    most = [
        "llm.max_caption_tokens=auto",
        "llm.max_new_tokens=6",
        "monitor=val/cider",
        "tuning=lora",
        "tuning.epochs=1",
    ]
    return [*paths, *parts, *data, *most, "hardware.precision=bf16", "hardware.gradient_checkpointing=true"]


@pytest.fixture(scope="module")
def seen_in_run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """The folder of a whole run, and what was seen while it trained and validated."""
    from vlmcap.compose import compose

    folder = tmp_path_factory.mktemp("runs") / "run"
    with watched() as seen:
        train(compose([*overrides, f"paths.output_dir={folder}"]))
    return folder, seen


def test_a_measured_step_is_one_of_a_run(overrides: list[str], seen_in_run: tuple[Path, Seen]) -> None:
    with watched() as seen:
        comparison = measure(overrides)
    assert distinct(seen) == distinct([one for one in seen_in_run[1] if not one["inference"]]), (
        "but for the scores at the end"
    )
    config = planned(overrides)
    known = {int(count) for count in caption_counts(config, [known_clips(config)["train"]])[0]}
    rows = [one["rows"] for one in seen if one["training"]]
    assert {length for row in rows for length in row} <= known, "captions are as long as those of the data"
    assert any(one["padded"] for one in seen if one["training"])
    assert max(max(row) for row in rows) == max(known)
    assert comparison.plan.clip_s > 0 and comparison.measured.clip_s > 0


def test_caption_computes_and_writes_as_evaluate_does(
    seen_in_run: tuple[Path, Seen], tmp_path: Path, aihub_root: Path
) -> None:
    from vlmcap.config_saved import saved_config
    from vlmcap.training.checkpoints.load import read_checkpoint

    checkpoint = seen_in_run[0] / "checkpoints" / "last.ckpt"
    written: list[list[list[int]]] = []
    decode = PromptEncoder.decode

    def keep(self: PromptEncoder, rows: list[list[int]]) -> list[str]:
        written.append([list(row) for row in rows])
        return decode(self, rows)

    with pytest.MonkeyPatch.context() as patch, watched() as evaluated:
        patch.setattr(PromptEncoder, "decode", keep)
        config = saved_config(
            read_checkpoint(checkpoint)["vlmcap"]["config"], {"paths.output_dir": str(tmp_path / "evaluation")}
        )
        evaluate(config, checkpoint)
    ids, rows = (
        list(written),
        [json.loads(line) for line in (tmp_path / "evaluation" / "predictions.jsonl").read_text().splitlines()],
    )
    written.clear()
    with pytest.MonkeyPatch.context() as patch, watched() as captioned:
        patch.setattr(PromptEncoder, "decode", keep)
        texts = vlmcap.load(checkpoint).caption([row["video"] for row in rows])
    assert written == ids
    assert texts == [row["prediction"] for row in rows]
    assert distinct(captioned) == distinct(evaluated)


def test_the_lengths_of_steps_are_those_of_the_data() -> None:
    lengths = CaptionLengths.of([5, 30, 7, 0, 12, 9, 80], 64)
    assert lengths.tokens == (5, 7, 9, 12, 30, 64)
    rows = step_captions(lengths, 3, 2, is_sorted=False)
    assert len(rows) == NUM_STEPS * 2
    assert rows[-2:] == [[64] * 3] * 2
    timed = [length for row in rows[2:-2] for length in row]
    assert sorted(timed) == sorted(lengths.spread(NUM_TIMED * 2 * 3)) == [5, 5, 7, 7, 9, 9, 12, 12, 30, 30, 64, 64]
    assert step_captions(lengths, 3, 2, is_sorted=True)[2:-2] == [[5, 5, 7], [7, 9, 9], [12, 12, 30], [30, 64, 64]]
    assert timed != sorted(timed), "clips of a shuffled batch differ in length"


def test_captions_end_at_different_tokens() -> None:
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 9, 10, 11, 12, 13], [1, 1, 1, 1, 1, 1, 1, 1]]
    ends = ending_ids(rows)
    lengths = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    assert lengths == [5, 6, 8], "a caption that repeats itself has no token to end at"
