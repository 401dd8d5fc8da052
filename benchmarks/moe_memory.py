"""Memory of a mixture of experts in 4 bits: transformers with bitsandbytes against vlmcap.

    python benchmarks/moe_memory.py [--layers 16] [--experts 32]

Each loads the same synthetic Qwen3-MoE checkpoint on the CPU in a separate process, then runs one training step with
LoRA on attention and gradient checkpointing. Resident memory is counted after the imports. "anonymous" memory cannot be
reclaimed; the rest are pages of the checkpoint's files, which the kernel drops when memory is short. Freed memory goes
back to the kernel immediately (MALLOC_MMAP_THRESHOLD_), as otherwise the C library's allocator would be measured; that
takes time, so the seconds are upper bounds. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

MB = 1e6


def main() -> None:
    arguments = parse()
    if arguments.loader:
        print(json.dumps(measure(arguments.loader, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = save_checkpoint(folder, arguments.layers, arguments.experts)
        print(f"{count / 1e6:.0f} M parameters, {count * 2 / MB:.0f} MB in bfloat16; all figures in MB but the seconds")
        rows = []
        for loader in ("stock", "vlmcap"):
            command = [sys.executable, __file__, "--loader", loader, "--folder", name]
            done = subprocess.run(
                command,
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    width = max(len(key) for key in rows[0])
    for key in rows[0]:
        print(f"{key:{width}}  " + "  ".join(f"{row[key]:>10}" for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--loader", choices=["stock", "vlmcap"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def save_checkpoint(folder: Path, layers: int, experts: int) -> int:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.numel() for parameter in model.parameters())


def measure(loader: str, folder: Path) -> dict[str, str]:
    import bitsandbytes  # noqa: F401 - imports are no part of the figures
    import peft  # noqa: F401
    import transformers  # noqa: F401

    with Peak() as loading:
        model = load(loader, folder)
    sizes = parameter_bytes(model)
    with Peak() as step:
        train_step(model)
    kinds = {str(kind).removeprefix("torch."): size for kind, size in sizes.items()}
    figures = {
        "loader": loader,
        "parameters in bfloat16": kinds.get("bfloat16", 0) / MB,
        "parameters in 4 bit": kinds.get("uint8", 0) / MB,
        "their scales": sizes["scales"] / MB,
        "parameters": sum(sizes.values()) / MB,
        "peak while loading": loading.resident / MB,
        "peak while loading, anonymous": loading.anonymous / MB,
        "loading, s": loading.seconds,
        "training step, anonymous, above the start": step.anonymous / MB,
        "training step, s": step.seconds,
    }
    return {key: value if isinstance(value, str) else f"{value:.1f}" for key, value in figures.items()}


def load(loader: str, folder: Path) -> Any:
    from vlmcap.models.llm.load import load_language_model, quantization_config

    if loader == "vlmcap":
        return load_language_model(folder, dtype=torch.bfloat16, quantization="4bit", attention="sdpa", device="cpu")
    from transformers import AutoModelForCausalLM

    config = quantization_config("4bit", torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


def parameter_bytes(model: Any) -> Counter[Any]:
    sizes: Counter[Any] = Counter(scales=0)
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.nbytes
        if state := getattr(parameter, "quant_state", None):
            sizes["scales"] += state.absmax.nbytes + state.state2.absmax.nbytes
    return sizes


def train_step(model: Any) -> None:
    from vlmcap.config import LoraConfig
    from vlmcap.models.llm.adapt import add_lora

    model.requires_grad_(False)
    adapted = add_lora(model, LoraConfig(rank=8, alpha=16, target_modules="q_proj,v_proj")).train()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 4096, (1, 128), generator=torch.Generator().manual_seed(0))
    adapted(input_ids=ids, labels=ids).loss.backward()


class Peak:
    """Samples the most bytes above the start every millisecond, and measures seconds."""

    def __enter__(self) -> Peak:
        self.start = resident_bytes()
        self.resident = self.anonymous = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        self.started_at = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started_at
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.stop.wait(0.001):
            resident, anonymous = resident_bytes()
            self.resident = max(self.resident, resident - self.start[0])
            self.anonymous = max(self.anonymous, anonymous - self.start[1])


def resident_bytes() -> tuple[int, int]:
    """Returns resident and anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
    }
    return values["VmRSS"], values["RssAnon"]


if __name__ == "__main__":
    main()
