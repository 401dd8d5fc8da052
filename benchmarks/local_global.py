"""Time and memory of attention over all tokens of a clip: dense, masked to windows, and `temporal=local_global`.

    python benchmarks/local_global.py --output experiments/local_global

One forward and backward pass per length and kind, all three in one run: `dense` is full self-attention by PyTorch's
fused kernel, `masked` gives what `local_global` gives, from one mask over all pairs. Memory is the peak of what the
pass holds beyond its inputs: on CUDA the allocator's count, elsewhere the sum of live tensors (without what a kernel
allocates internally). The fused kernel stores no score matrix, so memory of dense attention without a mask is linear,
and only its time is quadratic. Writes local_global.json, .md, and .png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmcap.models.projectors.temporal import windowed_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the peak bytes of live tensors that operations created."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.seen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        size = self.seen[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def attentions(window: int, num_global: int, heads: int, width: int, device: str) -> dict[str, Attention]:
    """Returns the three kinds by name; each maps query, key and value (1, H, V, d) to (1, H, V, d)."""
    summary = [torch.randn(1, heads, num_global, width, device=device) for _ in range(2)]

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(query.shape[2], device=device)
        mask = F.pad((places[:, None] - places).abs() <= window, (num_global, 0), value=True)
        keys, values = (torch.cat(pair, dim=2) for pair in ((summary[0], key), (summary[1], value)))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    return {
        "dense": F.scaled_dot_product_attention,
        "masked": masked,
        "local_global": lambda query, key, value: windowed_attention(query, key, value, summary[0], summary[1], window),
    }


def measure(attend: Attention, shape: tuple[int, int, int, int], repeats: int, device: str) -> dict[str, float]:
    """Returns median seconds and peak MiB of a forward and backward pass."""
    parts = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    is_cuda = device == "cuda"

    def run() -> None:
        torch.autograd.grad(attend(*parts).sum(), parts)
        if is_cuda:
            torch.cuda.synchronize()

    gc.collect()
    if is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            run()
        peak = live.peak
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mib": peak / MIB}


def table(rows: list[dict[str, Any]], kinds: list[str]) -> str:
    """Formats a Markdown table with a row per length."""
    heads = ["V", *(f"{kind} s" for kind in kinds), *(f"{kind} MiB" for kind in kinds)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for row in rows:
        cells = [
            str(row["num_tokens"]),
            *(f"{row[kind]['seconds']:.3f}" for kind in kinds),
            *(f"{row[kind]['peak_mib']:.1f}" for kind in kinds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], kinds: list[str], file: Path) -> None:
    """Plots both measures against the length on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (measured, label) in zip(
        axes, (("seconds", "seconds, forward and backward"), ("peak_mib", "peak memory, MiB")), strict=True
    ):
        for kind in kinds:
            axis.loglog(
                [row["num_tokens"] for row in rows], [row[kind][measured] for row in rows], marker="o", label=kind
            )
        axis.set(xlabel="visual tokens V", ylabel=label)
        axis.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--num-global", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/local_global"))
    options = parser.parse_args()
    torch.manual_seed(0)
    kinds = attentions(options.window, options.num_global, options.heads, options.head_width, options.device)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        shape = (1, options.heads, length, options.head_width)
        rows.append(
            {"num_tokens": length}
            | {kind: measure(attend, shape, options.repeats, options.device) for kind, attend in kinds.items()}
        )
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    head = (
        f"Window {options.window}, {options.num_global} global tokens, {options.heads} heads of {options.head_width}, "
        "float32, "
        f"torch {torch.__version__}, {where} ({os.cpu_count()} cores), median of {options.repeats}.\n\n"
    )
    text = head + table(rows, list(kinds))
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "local_global.md").write_text(text + "\n", encoding="utf-8")
    (options.output / "local_global.json").write_text(
        json.dumps({"settings": head.strip(), "rows": rows}, indent=1), encoding="utf-8"
    )
    if importlib.util.find_spec("matplotlib"):
        plot(rows, list(kinds), options.output / "local_global.png")
    else:
        print("\nmatplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
