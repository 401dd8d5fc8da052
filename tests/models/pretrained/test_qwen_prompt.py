"""Qwen3-VL's prompt matches transformers' processor token by token.

And the seconds of Qwen2.5-VL's temporal patches.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.thinned import thinned
from vlmcap.config import LlmConfig
from vlmcap.data.loading.collate import Collator
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import load_pretrained
from vlmcap.models.pretrained.components import FrameRuns
from vlmcap.models.pretrained.families import FAMILIES
from vlmcap.models.pretrained.qwen_captioner import QwenVLCaptioner
from vlmcap.models.pretrained.qwen_vision import MergerSpec
from vlmcap.types import Clip, FrameTimes, Sample

OPTIONS: dict[str, Any] = {
    "dtype": torch.float32,
    "quantization": "none",
    "attention": "sdpa",
    "device": "cpu",
    "max_patches": 64,
}
# Frames per second of a file, and the frames of it that are taken: evenly, unevenly, an odd number, and some twice.
TAKEN = (
    (25.0, (93, 281, 468, 656)),
    (30000 / 1001, (0, 1, 2, 899, 1798, 2000)),
    (10.0, (1, 4, 7)),
    (24.0, (5,)),
    (8.0, (0, 0, 1, 1, 2, 2, 3, 3)),
    (2.0, (2, 86_400)),
)
SIZES = ((64, 96), (128, 64), (64, 64), (32, 256))  # pixels, whole merged patches
QUESTIONS = ("설명해 주세요.", "What happens at <2.0 seconds>?", "영상의 첫 장면과 마지막 장면은 어떻게 다른가요?", "1")
SYSTEMS = (None, "당신은 영상을 설명하는 도우미입니다.")


@pytest.mark.parametrize("use_outer_marks", [True, False])
@pytest.mark.parametrize(
    "number", thinned(range(24), lambda number: number % 5 < 2)
)  # every rate, size, question and system in these
def test_prompts_are_the_processors(
    number: int,
    use_outer_marks: bool,
    qwen_folders: dict[str, Path],
    qwen_processors: dict[str, Any],
    qwen_tokenizer: Any,
) -> None:
    from transformers.video_utils import VideoMetadata

    (rate, taken), (height, width) = TAKEN[number % 6], SIZES[number // 6]
    system, question = SYSTEMS[number % 2], QUESTIONS[number % 4]
    parts = load_pretrained(qwen_folders["qwen3_vl"], use_outer_marks=use_outer_marks, **OPTIONS)
    frames = torch.randint(0, 256, (len(taken), 3, height, width), dtype=torch.uint8)
    marks = {"visual_prefix": parts.visual_prefix, "visual_suffix": parts.visual_suffix}
    prompt = load_prompt(qwen_folders["qwen3_vl"], LlmConfig(prompt=question, system_prompt=system), **marks)
    transform = parts.encoder.transform
    sample = Sample(
        Clip("a", "a.mp4", ()),
        frames=transform(frames),
        grid_thw=transform.grid_thw(*frames.shape[:1], *frames.shape[2:]),
        times_s=tuple(index / rate for index in taken),
    )
    layout = parts.layout((1, *parts.encoder.grid))
    batch = pickle.loads(pickle.dumps(Collator(prompt, layout, 8, "generate")))([sample])
    ours = batch.input_ids.masked_fill(batch.visual_mask, qwen_tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    # The older form is that of a processor that takes the pair around the placeholder with it.
    video = "<|vision_start|><|video_pad|><|vision_end|>" if use_outer_marks else "<|video_pad|>"
    turns = [{"role": "system", "content": system}] if system else []
    text = qwen_tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": video + question}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    metadata = VideoMetadata(total_num_frames=taken[-1] + 1, fps=rate, frames_indices=list(taken))
    expected = qwen_processors["qwen3_vl"](
        text=[text], videos=[frames.float()], video_metadata=[metadata], return_tensors="pt"
    )
    assert ours.tolist() == expected["input_ids"].tolist()


def layout_text(tokenizer: Any, num_steps: int, times_s: FrameTimes | None) -> str:
    layout = FrameRuns(MergerSpec(2, (8, 8)).num_tokens, FAMILIES["qwen3_vl"].text, tokenizer, 2, (1, 8, 8))
    runs = layout((num_steps, 4, 6), times_s)
    assert [run for run in runs if isinstance(run, int)] == [6] * num_steps
    return "".join(tokenizer.decode(run) for run in runs if not isinstance(run, int))


def test_the_time_of_a_patch_is_the_middle_of_its_frames(qwen_tokenizer: Any) -> None:
    text = layout_text(qwen_tokenizer, 2, (0.5, 1.5, 20.0, 21.0))
    assert text == "<1.0 seconds><|vision_start|><|vision_end|><20.5 seconds><|vision_start|>"


def test_clips_without_a_clock_count_as_taken_at_two_a_second(qwen_tokenizer: Any) -> None:
    assert layout_text(qwen_tokenizer, 2, None) == layout_text(qwen_tokenizer, 2, (0.0, 0.5, 1.0, 1.5))


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        (None, 1.0),
        ((0.0,), 0.0),
        ((0.0, 0.5, 1.0, 1.5), 1.0),
        ((1.875, 5.625, 9.375, 13.125, 16.875, 20.625, 24.375, 28.125), 7.5),  # 8 of 30 seconds
        ((0.0, 1.0, 9.0), 9.0),  # uneven: on average
        ((2.0, 2.0, 2.0, 2.0), 0.0),
    ],
)
def test_seconds_per_patch(times_s: FrameTimes | None, expected: float, qwen_folders: dict[str, Path]) -> None:
    parts = load_pretrained(qwen_folders["qwen2_5_vl"], **OPTIONS)
    prompt = load_prompt(qwen_folders["qwen2_5_vl"], LlmConfig(prompt=""))
    captioner = parts.captioner_class(parts.encoder, parts.projector, parts.llm, prompt, None)
    assert isinstance(captioner, QwenVLCaptioner)
    assert captioner.seconds_per_patch(times_s) == expected
