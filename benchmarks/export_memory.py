"""Memory of merging adapters into a Qwen3 with random weights: `python benchmarks/export_memory.py FOLDER`.

Prints the size of the weights, and the anonymous (RssAnon) and file-backed (RssFile) memory of the process after the
merge and after writing. Writes the base and the merged model below FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmcap.config import LoraConfig
from vlmcap.files import new_folder
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.merge import merged_model, save_merged

SIZES: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}  # of Qwen3-0.6B


def make_base(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).to(torch.bfloat16).save_pretrained(folder)


def resident() -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))}
    return ", ".join(f"{name} {kib * 1024 / 1e9:.2f} GB" for name, kib in sizes.items())


def main() -> None:
    folder = Path(sys.argv[1])
    base, output, weights = folder / "base", folder / "merged", {}
    if not base.is_dir():
        make_base(base)
        print("The base is written; run again to measure in a process that never held it.")
        return

    def adapt(model: nn.Module) -> nn.Module:
        adapted = add_lora(model, LoraConfig(rank=16, alpha=32))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
            if "lora_" in name:
                weights[f"captioner.llm.{name}"] = parameter.detach().clone()
        return adapted

    print(f"before: {resident()}")
    merged, difference = merged_model(base, weights, adapt=adapt, dtype=torch.bfloat16)
    print(f"merged: {resident()}; logits moved by {difference:.3f}")
    with new_folder(output) as partial:
        save_merged(merged, base, partial)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"written: {resident()}; weights {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
