"""Decoding steps as CUDA graphs: the host launches one graph per token instead of thousands of kernels.

A graph repeats the same kernels on the same memory, so a step must not synchronise, and its inputs and outputs keep
their addresses. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import nn

from vlmcap.errors import UserError, first_line

# Steps of a shape that run before it is captured, because libraries choose kernels and allocate workspaces at the first
# ones. They are ordinary steps, so none of their work is lost.
WARM_UP = 2
Step = Callable[[], None]


class Graphs(Protocol):
    """Captures steps as graphs; tests replace CUDA by a recorder.

    Attributes:
        is_broken: Whether a capture has failed, after which no other is tried.
    """

    is_broken: bool

    def warm_up(self, step: Step) -> None:
        """Runs a step eagerly before a later one of its shape is captured."""
        ...

    def capture(self, step: Step) -> Step:
        """Captures a step without running it and returns the function that replays it."""
        ...


class CudaGraphs:
    """CUDA graphs that share one memory pool, as no two run at a time.

    Args:
        device: GPU to capture on.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_broken = False
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        """Runs a step on the stream that captures later ones."""
        current = torch.cuda.current_stream(self.stream.device)
        # Each stream waits for the other, because the step reads and writes what both have computed.
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Step) -> Step:
        """Captures a step and returns the replay of its graph."""
        # Recording runs no kernel, so the caller replays the graph for this step too.
        graph = torch.cuda.CUDAGraph()
        # Data loading threads may allocate pinned memory meanwhile, which the mode "global" forbids.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


class CapturedSteps:
    """Runs steps and captures those whose shape recurs.

    Args:
        graphs: Captures the steps; None runs every step eagerly.
    """

    def __init__(self, graphs: Graphs | None) -> None:
        self.graphs = graphs
        self._replays: dict[Hashable, Step] = {}
        self._num_runs: Counter[Hashable] = Counter()

    def forget(self) -> None:
        """Drops all graphs; call it when memory that they work on is replaced."""
        self._replays.clear()
        self._num_runs.clear()

    def run(self, shape: Hashable, step: Step) -> None:
        """Runs a step, by its graph if there is one.

        Args:
            shape: Key that is equal for steps which launch the same kernels on the same memory.
            step: Function that runs the step eagerly.
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
        except RuntimeError as error:  # an operation synchronises, in a class or library not known to do so
            graphs.is_broken = True
            self.forget()
            print(
                "Captions are generated without CUDA graphs, as a decoding step could not be captured: "
                f"{first_line(error)}",
                file=sys.stderr,
                flush=True,
            )
            # A failed recording has computed nothing, so the step still has to run.
            step()
        else:
            self._replays[shape]()


def make_graphs(llm: nn.Module, wanted: bool | str, device: torch.device) -> Graphs | None:
    """Creates the capturer for the decoding steps of a language model; None if they run eagerly.

    Args:
        llm: Language model, with or without adapters.
        wanted: `evaluation.cuda_graphs`: true, false, or "auto", which is true on a GPU if the steps can be captured.
        device: Device that the language model runs on.

    Raises:
        UserError: Graphs are requested but not possible.
    """
    if wanted is False:
        return None
    reason = (
        "they need a CUDA device"
        if device.type != "cuda" or not torch.cuda.is_available()
        else uncapturable_reason(llm)
    )
    if not reason:
        return CudaGraphs(device)
    if wanted is True:
        raise UserError(f"evaluation.cuda_graphs=true is not possible, as {reason}; set evaluation.cuda_graphs=auto")
    if device.type == "cuda":
        print(f"Captions are generated without CUDA graphs, as {reason}.", file=sys.stderr, flush=True)
    return None


def uncapturable_reason(llm: nn.Module) -> str:
    """Returns why a decoding step of a language model cannot be captured; empty if it can.

    The 4-bit products of bitsandbytes 0.50 can: they launch their kernels on the current stream and do not synchronise
    (backends/cuda/ops.py).
    """
    from torch.distributed.tensor import DTensor

    for module in llm.modules():
        # Classes of transformers alone; `FusedExperts` of this package never waits.
        if type(module).__name__.endswith("Experts") and type(module).__module__.startswith("transformers."):
            return "transformers may wait for the number of tokens of each expert"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return "its layers are compiled (hardware.compile=true)"
        if type(module).__name__ == "Linear8bitLt":
            return "bitsandbytes searches each product with 8-bit weights for outliers, which the host waits for"
        weight = getattr(module, "weight", None)
        if isinstance(weight, DTensor):
            return "its weights are sharded over processes"
    return ""
