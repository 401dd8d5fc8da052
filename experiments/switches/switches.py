"""What each switch of training buys: planned memory and arithmetic of one combination, one switch changed at a time.

python experiments/switches/switches.py    write README.md's table to stdout
"""

from __future__ import annotations

from vlmcap.compose import compose
from vlmcap.libraries import silence_libraries
from vlmcap.planning.make_plan import make_plan

BASE = ("data.root=unset", "encoder=siglip2", "llm=qwen3_8b", "hardware=l4")
SWITCHES: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "all logits at once": ("hardware.loss_chunk_mib=null",),
    "no layer computed again": ("hardware.gradient_checkpointing=false",),
    "inputs of layers in host memory": ("hardware.offload_checkpoints=true",),
    "activations within 6 GiB": ("hardware.activation_budget_gib=6",),
    "activations within 9 GiB": ("hardware.activation_budget_gib=9",),
    "features stored": ("cache.enabled=true",),
    "AdamW fused": ("optim=adamw_fused",),
    "AdamW in 8 bits": ("optim=adamw_8bit",),
    "weights in 16 bits": ("llm.quantization=none",),
    "weights in 8 bits": ("llm.quantization=8bit",),
    "adapters of rank 64": ("tuning.lora.rank=64", "tuning.lora.alpha=128"),
    "patches averaged 2 × 2": ("projector.reducer=pool",),
    "averaged, all logits at once": ("projector.reducer=pool", "hardware.loss_chunk_mib=null"),
    "averaged, activations within 9 GiB": ("projector.reducer=pool", "hardware.activation_budget_gib=9"),
    "batch of 4": ("data.batch_size=4",),
    "batch of 4, all logits at once": ("data.batch_size=4", "hardware.loss_chunk_mib=null"),
}


def main() -> None:
    """Prints a line a switch."""
    silence_libraries()
    print("| switch | overrides | training GiB | of it activations | TFLOP a clip | layers kept |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, overrides in SWITCHES.items():
        plan = make_plan(compose([*BASE, *overrides]))
        keys = " ".join(f"`{override}`" for override in overrides) or "–"
        kept = plan.num_kept or "–"
        print(
            f"| {name} | {keys} | {plan.training_gib:.1f} | {plan.activations_gib:.1f} | {plan.flops / 1e12:.0f} | "
            f"{kept} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
