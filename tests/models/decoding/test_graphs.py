"""Captured decoding steps, tested on a CPU.

A recorder of operations stands in for CUDA and repeats them on the same memory, as a graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.decoding.test_engine import NEW, RULES, STOPS, Calls, expected, make_model, meta_encoder, prompts
from vlmcap.config import EvaluationConfig, LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.decoding import engine
from vlmcap.models.decoding.engine import greedy_ids
from vlmcap.models.decoding.graphs import CudaGraphs, Graphs, make_graphs, uncapturable_reason
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora


class Recorder(TorchDispatchMode):
    """Records operations, and repeats them on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step waits for the host"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def repeat(self) -> None:
        """Repeats all operations in order, each into its original output."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            places = {tensor.data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if (
                    isinstance(old, Tensor)
                    and old.data_ptr() not in places
                    and not func.is_view
                    and old.data_ptr() != new.data_ptr()
                ):
                    old.copy_(new)


class RecordedGraphs:
    """Graphs of recorded operations.

    Recording runs a step, which CUDA's capturing does not, so the first replay is left out.
    """

    def __init__(self) -> None:
        self.num_warm_ups, self.captured, self.num_replays, self.is_broken = 0, 0, 0, False

    def warm_up(self, step: Callable[[], None]) -> None:
        self.num_warm_ups += 1
        step()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        recorder, runs = Recorder(), iter([True])
        with recorder:
            step()

        def replay() -> None:
            self.num_replays += 1
            if not next(runs, False):
                with torch.no_grad():
                    recorder.repeat()

        return replay


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shapes, and polls between them, in captions of twenty tokens."""
    monkeypatch.setattr(engine, "_BLOCK", 16)
    monkeypatch.setattr(engine, "POLL_EVERY", 3)


def adapted() -> nn.Module:
    model = add_lora(make_model("Qwen3"), LoraConfig(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "rules",
    [*RULES, {"speculate_ngram": 1}, {"speculate_ngram": 2, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}],
)
@pytest.mark.parametrize(
    "make", [lambda: make_model("Llama"), lambda: make_model("Qwen3"), adapted], ids=["Llama", "Qwen3", "adapted"]
)
def test_replayed_steps_write_the_captions_of_transformers(
    make: Callable[[], nn.Module], rules: dict[str, Any]
) -> None:
    model, graphs = make(), RecordedGraphs()
    settings = GenerationSettings(NEW, EvaluationConfig(**rules))
    plain = GenerationSettings(NEW, EvaluationConfig(**{**rules, "speculate_ngram": 0}))
    for num_slots in (3, 9):
        assert greedy_ids(model, prompts(), settings, STOPS, num_slots, graphs) == expected(model, prompts(), plain)
    assert graphs.num_replays > graphs.num_warm_ups + graphs.captured, "most steps must be replayed"


def test_shapes_are_few_and_a_graph_is_made_for_each() -> None:
    model, graphs = make_model("Qwen3"), RecordedGraphs()
    with Calls(model) as calls:
        greedy_ids(model, prompts(), GenerationSettings(60), (), 5, graphs)
    # Nine clips in five slots: steps of five, then of the remaining ones, rounded up to a power of two.
    assert {slots for slots, _ in calls.steps} == {5, 4}
    assert len(calls.steps) == graphs.num_warm_ups + graphs.captured
    assert graphs.captured == 10, "five widths for each"
    assert graphs.num_replays + graphs.num_warm_ups >= 2 * 59


def test_a_finished_caption_is_noticed_at_the_next_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions do not depend on how often the host polls."""
    model, settings = make_model("Llama"), GenerationSettings(NEW)
    polls: list[bool] = []
    take = engine._Decoder.take_finished
    monkeypatch.setattr(engine._Decoder, "take_finished", lambda self: polls.append(self._is_polled) or take(self))
    counts = {}
    for every in (1, 5, 50):
        monkeypatch.setattr(engine, "POLL_EVERY", every)
        polls.clear()
        assert greedy_ids(model, prompts(), settings, STOPS, 3, RecordedGraphs()) == expected(
            model, prompts(), settings
        )
        counts[every] = polls.count(False)
    assert counts[1] > 3 * counts[5] / 2 > counts[50]


def test_where_capturing_fails_steps_go_on_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(RecordedGraphs):
        def capture(self, step: Callable[[], None]) -> Callable[[], None]:
            self.captured += 1
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, settings, graphs = make_model("Qwen3"), GenerationSettings(NEW), Broken()
    for _ in range(2):
        assert greedy_ids(model, prompts(), settings, STOPS, 3, graphs) == expected(model, prompts(), settings)
    assert graphs.captured == 1, "it is not tried again"
    assert capsys.readouterr().err == (
        "Captions are generated without CUDA graphs, as a decoding step could not be captured: operation not "
        "permitted when stream is capturing\n"
    )


def test_obstacles_to_a_graph_are_named() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model: Any = meta_encoder("Llama")
    assert uncapturable_reason(model) == ""
    model.model.layers[0].mlp.up_proj = Linear4bit(16, 16, device="meta")
    assert uncapturable_reason(model) == ""
    model.model.layers[0].mlp.up_proj = Linear8bitLt(16, 16, device="meta")
    assert "8-bit" in uncapturable_reason(model)
    assert "expert" in uncapturable_reason(meta_encoder("Qwen3Moe"))
    compiled: Any = meta_encoder("Llama")
    compiled.model.layers[0].compile()
    assert "hardware.compile" in uncapturable_reason(compiled)


def test_graphs_are_asked_for_or_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cpu, cuda, model = torch.device("cpu"), torch.device("cuda:0"), meta_encoder("Llama")
    assert make_graphs(model, "auto", cpu) is None
    with pytest.raises(UserError, match=r"evaluation.cuda_graphs=true .* CUDA device; set evaluation.cuda_graphs=auto"):
        make_graphs(model, True, cpu)
    assert capsys.readouterr().err == "", "nobody expects graphs on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made: list[torch.device] = []
    monkeypatch.setattr(CudaGraphs, "__init__", lambda _, device: made.append(device))
    found: Graphs | None = make_graphs(model, "auto", cuda)
    assert isinstance(found, CudaGraphs) and made == [cuda]
    assert make_graphs(model, False, cuda) is None
    assert make_graphs(meta_encoder("Qwen3Moe"), "auto", cuda) is None
    assert (
        capsys.readouterr().err
        == "Captions are generated without CUDA graphs, as transformers may wait for the number of tokens of each "
        "expert.\n"
    )
