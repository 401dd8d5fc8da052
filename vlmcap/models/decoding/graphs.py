"""The decoding step as a CUDA graph: the host launches one graph per token in place of thousands of kernels.

A graph repeats the same kernels on the same memory, so a step may wait for nothing, and its inputs and outputs stay
where they are.
See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import nn

from vlmcap.errors import UserError, first_line

# Steps of a shape that run before it is captured: libraries choose kernels and take workspaces at the first.
# They are steps like all others, so that none of their work is lost.
WARM_UP = 2
Step = Callable[[], None]


class Graphs(Protocol):
    """Makes graphs of steps; tests put a recorder in the place of CUDA.

    Attributes:
        is_broken: Whether a step could not be captured, after which none is tried.
    """

    is_broken: bool

    def warm_up(self, step: Step) -> None:
        """Runs a step as it is, where a later one of its shape will be captured."""
        ...

    def capture(self, step: Step) -> Step:
        """What runs a step again, or for the first time, as capturing runs none."""
        ...


class CudaGraphs:
    """CUDA's own graphs, which share one pool of memory, as no two run at a time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_broken = False
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        """Runs a step on the stream that later ones are captured on."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Step) -> Step:
        """The replay of a step's graph."""
        graph = torch.cuda.CUDAGraph()
        # Threads that read data may take pinned memory meanwhile, which the mode "global" forbids.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


class CapturedSteps:
    """Runs steps, each of a shape again and again, as graphs where there are any.

    Args:
        graphs: Makes graphs; None runs every step as it is.
    """

    def __init__(self, graphs: Graphs | None) -> None:
        self.graphs = graphs
        self._replays: dict[Hashable, Step] = {}
        self._num_runs: Counter[Hashable] = Counter()

    def forget(self) -> None:
        """Drops all graphs, as memory that they work on is replaced."""
        self._replays.clear()
        self._num_runs.clear()

    def run(self, shape: Hashable, step: Step) -> None:
        """Runs a step.

        Args:
            shape: Equal for steps that launch the same kernels on the same memory.
            step: Runs it as it is.
        """
        self._num_runs[shape] += 1
        if self.graphs is None or self.graphs.is_broken:
            step()
        elif shape in self._replays:
            self._replays[shape]()
        elif self._num_runs[shape] <= WARM_UP:
            self.graphs.warm_up(step)
        else:
            self._capture(self.graphs, shape, step)

    def _capture(self, graphs: Graphs, shape: Hashable, step: Step) -> None:
        try:
            self._replays[shape] = graphs.capture(step)
        except RuntimeError as error:  # an operation that waits, in a class or library that is not known to do so
            graphs.is_broken = True
            self.forget()
            print(
                f"Captions are written without CUDA graphs, as one could not be captured: {first_line(error)}",
                file=sys.stderr,
                flush=True,
            )
            step()
        else:
            self._replays[shape]()


def make_graphs(llm: nn.Module, wanted: bool | str, device: torch.device) -> Graphs | None:
    """What captures the decoding steps of a language model; None where they run as they are.

    Args:
        llm: The language model, with or without adapters.
        wanted: `evaluation.cuda_graphs`: true, false, or "auto", which is true on a GPU where nothing stands in the
            way.
        device: Where it runs.

    Raises:
        UserError: Graphs are asked for and cannot be had.
    """
    if wanted is False:
        return None
    reason = (
        "they need a CUDA device" if device.type != "cuda" or not torch.cuda.is_available() else capture_obstacle(llm)
    )
    if not reason:
        return CudaGraphs(device)
    if wanted is True:
        raise UserError(f"evaluation.cuda_graphs=true cannot be followed, as {reason}; set evaluation.cuda_graphs=auto")
    if device.type == "cuda":
        print(f"Captions are written without CUDA graphs, as {reason}.", file=sys.stderr, flush=True)
    return None


def capture_obstacle(llm: nn.Module) -> str:
    """Why a decoding step of a language model cannot be captured; empty if it can.

    bitsandbytes' 4-bit products launch their kernels on the current stream and wait for nothing, as of 0.50
    (backends/cuda/ops.py).
    """
    from torch.distributed.tensor import DTensor

    for module in llm.modules():
        if type(module).__name__.endswith("Experts") and type(module).__module__.startswith("transformers."):
            return "transformers may wait for the number of tokens of each expert"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return "its layers are compiled (hardware.compile=true)"
        if type(module).__name__ == "Linear8bitLt":
            return "bitsandbytes looks for outliers in each product with 8-bit weights, which the host waits for"
        weight = getattr(module, "weight", None)
        if isinstance(weight, DTensor):
            return "its weights are sharded over processes"
    return ""
