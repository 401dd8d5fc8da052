"""Draws docs/memory.png: planned memory of a training step of the four recommended combinations.

python benchmarks/memory/bars.py            writes the picture; needs matplotlib (pip install 'vlmcap[bench]')
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from vlmcap.compose import compose
from vlmcap.libraries import silence_libraries
from vlmcap.planning.hardware import GIB
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.plan import Plan

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "memory.png"
GPUS = ("t4", "l4", "a100", "h100")
ENDS = {  # in this order; what fits none is an activation
    "frozen weights": ("frozen weights", "quantisation state"),
    "trained weights, gradients, optimiser": ("trained weights", "gradients", "optimiser state"),
    "activations": (),
    "fragmentation, CUDA context": ("fragmentation",),
}
COLOURS = ("#4878a8", "#e0a44a", "#6aa56a", "#b9b9b9")


def shares(plan: Plan) -> dict[str, float]:
    """Returns GiB by kind."""
    found = dict.fromkeys(ENDS, 0.0)
    for name, size in plan.training.sizes.items():
        kind = next((kind for kind, ends in ENDS.items() if name.endswith(ends)), "activations")
        found[kind] += size / GIB
    found["fragmentation, CUDA context"] += plan.device.context_gib
    return found


def main() -> None:
    """Writes the picture."""
    silence_libraries()
    plans = {gpu: make_plan(compose([f"experiment=recommended_{gpu}", "data.root=unset"])) for gpu in GPUS}
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{gpu}: {plan.title}\n{plan.num_frames} frames, batch {plan.batch_size}" for gpu, plan in plans.items()]
    left = [0.0] * len(plans)
    for kind, colour in zip(ENDS, COLOURS, strict=True):
        sizes = [shares(plan)[kind] for plan in plans.values()]
        axes.barh(labels, sizes, left=left, label=kind, color=colour, height=0.6)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for row, (plan, end) in enumerate(zip(plans.values(), left, strict=True)):
        axes.text(end + 0.4, row, f"{end:.1f} of {plan.device.usable_gib:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="GiB at the fullest moment of a training step", xlim=(0, 1.18 * max(left)))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
