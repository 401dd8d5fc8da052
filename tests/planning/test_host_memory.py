"""Memory of the host: the plan against running processes, limits of containers, and hosts that are too small."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.errors import DoesNotFitError
from vlmcap.planning import hardware
from vlmcap.planning import make_plan as plan_module
from vlmcap.planning.hardware import GIB, detect_cpu
from vlmcap.planning.host_memory import DECODER_BYTES, PROCESS_BYTES, WORKER_BYTES, pinned_bytes
from vlmcap.planning.make_plan import enforce_plan, make_plan
from vlmcap.training.objects import Run

pytestmark = pytest.mark.usefixtures("store")

ROOT = Path(__file__).resolve().parents[2]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


@pytest.mark.slow
def test_workers_and_their_decoders_are_as_many_and_as_large_as_planned(
    real_path: list[str], make_run: Callable[[Config], Run]
) -> None:
    """Counted in the second epoch, with the validation loaders still alive."""
    config = compose([*real_path, "data.num_workers=1", "cache.enabled=false", "tuning=lora", "tuning.epochs=2"])
    run, found = make_run(config), list[list[int]]()

    class Count(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                workers = [child for child in children(os.getpid()) if children(child)]
                found.extend([private_bytes(worker), *map(private_bytes, children(worker))] for worker in workers)

    run.trainer.callbacks.append(Count())  # type: ignore[attr-defined]
    run.trainer.fit(run.module, datamodule=run.data)
    host = make_plan(config).host.sizes
    assert len(found) * WORKER_BYTES == host["data workers"] == 2 * WORKER_BYTES
    assert host["decoding"] > 2 * DECODER_BYTES
    for worker, *decoders in found:
        assert 0.1 * WORKER_BYTES < worker < 1.2 * WORKER_BYTES, "it grows with the clips that it has read"
        assert len(decoders) == 1
        assert 0.1 * DECODER_BYTES < decoders[0] < 1.2 * DECODER_BYTES, "these frames are tiny"


_SCRIPT = """
import sys
from pathlib import Path
from vlmcap.measuring.memory_use import resident_bytes
from vlmcap.libraries import import_libraries
import_libraries(with_adapters=True)
import bitsandbytes, torch, transformers
import vlmcap.training.run, vlmcap.training.module
from vlmcap.models.encoders import EncoderOptions, load_encoder
if sys.argv[1:]:
    options = EncoderOptions(feature_layer=-1, dtype=torch.bfloat16, attention="sdpa")
    load_encoder(Path(sys.argv[1]), options)
    before = resident_bytes("RssAnon")
    kept = load_encoder(Path(sys.argv[2]), options)
    print(resident_bytes("RssAnon") - before)
else:
    print(resident_bytes("VmRSS"))
"""


def measured(*arguments: str) -> float:
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _SCRIPT, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True, timeout=300)
    return float(result.stdout.split()[-1])


@pytest.mark.slow
def test_a_process_is_as_large_as_planned() -> None:
    assert measured() == pytest.approx(PROCESS_BYTES, rel=0.3)


@pytest.mark.slow
def test_an_encoder_passes_through_the_host_once(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    small = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    large = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=6, image_size=64, patch_size=16)
    for name, settings in (("small", small), ("large", large)):
        CLIPVisionModel(settings).save_pretrained(tmp_path / name)
    size = 2 * sum(parameter.numel() for parameter in CLIPVisionModel(large).parameters())
    assert measured(str(tmp_path / "small"), str(tmp_path / "large")) == pytest.approx(size, rel=0.1)


@pytest.mark.slow
def test_inputs_in_host_memory_are_as_large_as_planned() -> None:
    from tests.planning.trial import Trial, build_trial
    from vlmcap.models.llm import layers
    from vlmcap.models.llm.layers import checkpoint_layers
    from vlmcap.planning.estimate.memory_profiler import MemoryProfiler

    depth, rows, length, width = 3, 2, 40, 128
    llm: Any = build_trial(Trial("qwen3", width=width), depth).train()
    checkpoint_layers(llm, is_offloaded=True)
    moved: dict[int, int] = {}

    class Counting(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(self.pack, lambda tensor: tensor)

        @staticmethod
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            moved[id(tensor)] = tensor.numel() * tensor.element_size()
            return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "save_on_cpu", Counting)
        hidden = torch.randn(rows, length, width, requires_grad=True)
        output = llm(inputs_embeds=hidden, use_cache=False).logits
        expected = depth * rows * length * width * 4
        assert sum(moved.values()) == expected
        output.sum().backward()
    config = compose(
        ["data.root=unset", "encoder=clip", "llm=qwen3_4b", "hardware=l4", "hardware.offload_checkpoints=true"]
    )
    memory_profiler = MemoryProfiler(config, True)
    tokens = 2 * (memory_profiler.sizes.num_visual + 32 + 768)
    assert memory_profiler.checkpoint_bytes(2, 768) == tokens * 2560 * 2
    assert make_plan(config).host.sizes["offloaded checkpoints"] == 36 * pinned_bytes(
        memory_profiler.checkpoint_bytes(1, 768)
    )


def test_locked_memory_comes_in_powers_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 4096, 4097, 3 * 2**20)] == [0, 1, 4096, 8192, 4 * 2**20]


@pytest.mark.parametrize(
    ("lines", "files", "total_gib", "free_gib"),
    [
        ("0::/box/inner\n", {"box/memory.max": 16, "box/memory.current": 6, "box/inner/memory.max": "max"}, 16.0, 10.0),
        ("0::/box\n", {"box/memory.max": "max"}, 64.0, 40.0),
        (
            "4:memory:/job\n0::/\n",
            {"memory/job/memory.limit_in_bytes": 8, "memory/job/memory.usage_in_bytes": 1},
            8.0,
            7.0,
        ),
        ("0::/box\n", {"box/memory.max": 128, "box/memory.current": 1}, 64.0, 40.0),
    ],
    ids=["a limit above", "none", "version 1", "more than there is"],
)
def test_a_container_s_limit_is_the_machine_s_memory(
    lines: str,
    files: dict[str, Any],
    total_gib: float,
    free_gib: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(size if isinstance(size, str) else size * GIB))
    read = Path.read_text
    kib = GIB // 1024
    known = {"/proc/meminfo": f"MemTotal: {64 * kib} kB\nMemAvailable: {40 * kib} kB\n", "/proc/self/cgroup": lines}
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: known.get(str(self)) or read(self, *a, **k))
    present = detect_cpu()
    assert (present.total_gib, present.free_gib) == (total_gib, free_gib)


def test_a_host_that_is_too_small_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.root=unset", "encoder=clip", "llm=qwen3_8b", "hardware=l4", "data.num_workers=64"]
    present = detect_cpu()
    small = type(present)(present.name, 15.6, 10.0, "cpu")
    monkeypatch.setattr(plan_module, "detect_cpu", lambda: small)
    with pytest.raises(
        DoesNotFitError,
        match=r"the host needs \d+\.\d GiB of memory while validating, .* of it for .* machine has 15\.6; lower data",
    ) as caught:
        enforce_plan(compose(overrides))
    assert caught.value.peak_gib > caught.value.usable_gib == 15.6
    enforce_plan(compose([*overrides, "plan.enforce=warn"]))
    assert "Warning: the host needs" in capsys.readouterr().out
    enforce_plan(compose(["data.root=unset", "encoder=clip", "llm=qwen3_8b", "hardware=l4"]))
    assert capsys.readouterr().out == ""
