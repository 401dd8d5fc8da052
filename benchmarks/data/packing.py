"""Speed and padding of a training step with shuffled batches, batches of similar length, and packed batches.

    python benchmarks/data/packing.py --output packing.json

A tiny Qwen3 (random weights, frozen, LoRA on all linear layers) learns from random features and captions whose lengths
are log-normal, short as those of public caption sets, or long. All three kinds of batches come from the batch plans of
training, hold at most the same number of tokens, and are timed in turns, forward and backward, on the same clips.
Only real tokens count; the share of padding is that of all positions in the batches. Writes JSON and prints a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vlmcap.config import LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.batches import BatchPlan, length_plan, packed_plan, shuffled_plan
from vlmcap.data.loading.collate import Collator
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.types import Batch, Clip, Sample

VOCABULARY = 4096
SETS = {
    "short captions, 16 visual tokens": (12, 16),
    "short captions, 128 visual tokens": (12, 128),
    "long captions, 128": (400, 128),
}


@dataclass
class Words:
    """Stands in for a tokenizer: captions are numbers of random tokens."""

    prefix_ids: list[int] = field(default_factory=lambda: list(range(5, 20)))
    suffix_ids: list[int] = field(default_factory=lambda: list(range(20, 40)))
    question_ids: list[int] = field(default_factory=lambda: list(range(20, 30)))
    end_id: int = 1
    pad_id: int = 0

    def encode_caption(self, text: str) -> list[int]:
        return random.Random(text).choices(range(50, VOCABULARY), k=int(text))


def make_captioner(num_visual: int, width: int, layers: int, device: str) -> VideoCaptioner:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
    )
    llm = transformers.Qwen3ForCausalLM(config).requires_grad_(False)
    adapted = add_lora(llm, LoraConfig(rank=8, alpha=16))
    projector = build_projector(
        MlpConfig(temporal=Temporal.none), ProjectorSizes(in_dim=64, out_dim=width, grid=(1, num_visual), num_frames=1)
    )
    words: Any = Words()
    return VideoCaptioner(None, projector, adapted, words, GenerationSettings(1)).to(device).train()


def batches_of(plan: BatchPlan, collator: Collator, samples: list[Sample]) -> list[Batch]:
    clips = plan.clips[plan.slots].tolist()
    bounds = plan.bounds.tolist()
    return [collator([samples[i] for i in clips[start:end]]) for start, end in pairwise(bounds)]


def make_kinds(num_clips: int, caption: int, num_visual: int, max_tokens: int, seed: int) -> dict[str, list[Batch]]:
    """Makes the batches of one epoch by kind."""
    rng = np.random.default_rng(seed)
    prompt: Any = Words()
    around = 1 + num_visual + len(prompt.prefix_ids) + len(prompt.suffix_ids)
    words = rng.lognormal(np.log(caption), 0.5, num_clips).clip(1, max_tokens - around).astype(np.int64)
    samples = [
        Sample(Clip(str(i), "", (str(n),)), features=torch.randn(1, num_visual, 64)) for i, n in enumerate(words)
    ]
    lengths = words + around
    rows = Collator(prompt, num_visual, 10_000)
    row = Collator(prompt, num_visual, 10_000, is_packed=True)
    return {
        "shuffled": batches_of(shuffled_plan(num_clips, max(1, int(max_tokens // lengths.max()))), rows, samples),
        "by_length": batches_of(length_plan(lengths, max_tokens=max_tokens), rows, samples),
        "packed": batches_of(packed_plan(lengths, max_tokens), row, samples),
    }


def seconds_of(captioner: VideoCaptioner, batches: list[Batch], device: str) -> float:
    start = time.perf_counter()
    for batch in batches:
        captioner(batch.to(device))[0].backward()
        captioner.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    caption, num_visual = SETS[name]
    kinds = make_kinds(args.clips, caption, num_visual, args.max_tokens, seed=0)
    captioner = make_captioner(num_visual, args.width, args.layers, args.device)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for batches in kinds.values():
        seconds_of(captioner, batches[:1], args.device)  # first calls pay for setting up
    for _ in range(args.repeats):
        for kind, batches in kinds.items():
            seconds[kind].append(seconds_of(captioner, batches, args.device))
    found = []
    for kind, batches in kinds.items():
        real = sum(int(batch.attention_mask.sum()) for batch in batches)
        places = sum(batch.input_ids.numel() for batch in batches)
        found.append(
            {
                "set": name,
                "batching": kind,
                "batches": len(batches),
                "padding": 1 - real / places,
                "tokens_per_s": real / statistics.median(seconds[kind]),
                "seconds": seconds[kind],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a batch, padding included")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    results = [result for name in SETS for result in measure(name, args)]
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": args.device}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    args.output.write_text(
        json.dumps({**machine, **versions, "settings": settings, "results": results}, indent=2) + "\n", encoding="utf-8"
    )
    print(f"{'set':36}{'batching':12}{'batches':>8}{'padding':>9}{'tokens/s':>10}{'ratio':>7}")
    for result in results:
        base = next(other for other in results if other["set"] == result["set"])["tokens_per_s"]
        print(
            f"{result['set']:36}{result['batching']:12}{result['batches']:8}{result['padding']:9.1%}"
            f"{result['tokens_per_s']:10.0f}{result['tokens_per_s'] / base:7.2f}"
        )


if __name__ == "__main__":
    main()
