"""`vlmcap plan --grid`: composed as `train.py` composes, interpolated near the exact plan, readable at 80 columns."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.thinned import thinned
from vlmcap.cli import main
from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.planning.calibration import calibrated_device
from vlmcap.planning.estimate.memory_profiler import FastMemoryProfiler
from vlmcap.planning.grid import make_grid as grid_module
from vlmcap.planning.grid.grid_table import Cell, draw_grid, head, show_grid
from vlmcap.planning.grid.make_grid import GridConfigs, GridNames, cells, grid_names, make_grid
from vlmcap.planning.make_plan import make_plan

pytestmark = pytest.mark.usefixtures("store")

NO_DATA = "data.root=unset"
CONTEXT = "llm.max_caption_tokens=3800"  # more than Vicuna can hold
SMALL = GridNames(["t4", "a100"], ["dinov3_s", "siglip2"], ["exaone4_1_2b", "vicuna_7b"], [NO_DATA])


@pytest.mark.slow
def test_a_cell_is_composed_as_train_composes_it() -> None:
    configs = GridConfigs(SMALL)
    for hardware, encoder, llm in cells(SMALL):
        whole = compose([NO_DATA, f"hardware={hardware}", f"encoder={encoder}", f"llm={llm}"])
        found = configs.config(hardware, encoder, llm)
        assert found.data.eval_batch_size == 1, "the least that captions take"
        assert (
            dataclasses.replace(found, paths=whole.paths, data=dataclasses.replace(found.data, eval_batch_size=None))
            == whole
        )


def test_names_left_out_are_all_of_conf_but_the_small_ones() -> None:
    names = grid_names(["llm=qwen3_4b,qwen3_8b", "tuning.lora.rank=8"])
    assert names.llm == ["qwen3_4b", "qwen3_8b"]
    assert names.rest == ["tuning.lora.rank=8"]
    assert names.hardware[0] == "t4"
    assert not {"cpu", "tiny", "native"} & {*names.hardware, *names.encoder}


def test_a_pretrained_vlm_leaves_nothing_to_combine() -> None:
    with pytest.raises(UserError, match="--grid combines"):
        grid_names(["model=qwen3_vl_8b"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    thinned([[], ["hardware.gradient_checkpointing=false", "data.batch_size=2"]], bool),
    ids=["checkpointed", "plain"],
)
def test_interpolation_is_near_the_exact_plan(overrides: list[str]) -> None:
    config = compose([NO_DATA, "hardware=a100", "encoder=dinov3_s", "llm=exaone4_1_2b", *overrides])
    quick, exact = (
        make_plan(config, memory_profiler=FastMemoryProfiler(config, calibrated_device(config).has_flash)),
        make_plan(config),
    )
    assert quick.training_gib == pytest.approx(exact.training_gib, rel=0.02)
    assert quick.generation_gib == pytest.approx(exact.generation_gib, rel=0.02)


@pytest.mark.slow
def test_the_command_prints_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--grid", "hardware=a100", "encoder=dinov3_s", "llm=exaone4_1_2b,vicuna_7b", CONTEXT, "--json"])
    fits, impossible = json.loads(capsys.readouterr().out)
    assert fits["fits"]
    assert fits["peak_gib"] == max(fits["training_gib"], fits["generation_gib"])
    assert impossible["peak_gib"] is None
    assert "exceed the context of 4096 tokens" in impossible["error"]


@pytest.mark.slow
def test_a_bar_counts_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    @contextmanager
    def bar(_: str, total: int) -> Iterator[Callable[[], object]]:
        yield lambda: steps.append(total)

    monkeypatch.setattr(grid_module, "transient_bar", bar)
    found = make_grid(GridNames(["a100"], ["dinov3_s"], ["exaone4_1_2b"], [NO_DATA]), num_processes=1)
    assert len(found) == 1
    assert steps == [3, 3, 3]


def cell(encoder: str, llm: str, peak: float | None) -> Cell:
    return Cell("l4", encoder, llm, 22.0, peak, peak, "too long" if peak is None else "")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_keeps_to_the_width_and_reads_without_colour(width: int) -> None:
    llms = ["qwen3_8b", "hyperclovax_seed_1_5b", *(f"a_long_name_{index}" for index in range(12))]
    peaks = [14.1, 100.2, *[None] * 12]
    found = [cell("siglip2_naflex", llm, peak) for llm, peak in zip(llms, peaks, strict=True)]
    console = Console(file=io.StringIO(), width=width)
    show_grid(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert " 14.1" in text
    assert "✗100.2" in text
    assert "– llm=a_long_name_0: too long" in text
    assert "1 of 14 fit" in text


def test_heads_break_at_underscores() -> None:
    assert head("qwen3_30b_a3b") == ["qwen3", "30b_a3b"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw_grid([cell("clip", "qwen3_8b", 12.0), cell("clip", "vicuna_7b", None)], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
