"""Bytes alive while tensors come and go."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmcap.planning.estimate.live_bytes import ROUNDING, CudaEmulationMode, LiveBytes, add_launches

KB4 = 1000 * 4 // ROUNDING * ROUNDING + ROUNDING  # 1000 float32, rounded up as the allocator does


def test_what_ends_is_taken_off() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first + 1
        assert live.snapshot() == {"other": 2 * KB4}
        del first
        assert live.snapshot() == {"other": KB4}
        del second
        assert live.snapshot() == {}
    assert live.peaks["start"] == {"other": 2 * KB4}


def test_views_and_changes_in_place_take_nothing() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(1000)
        half = whole[:500].view(5, 100)
        half.add_(1)
        assert live.snapshot() == {"other": KB4}


def test_segments_have_peaks_of_their_own_and_tags_tell_who_made_it() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        live.enter("work")
        live.tag = "heavy"
        torch.zeros(1000).add(1)
        live.enter("rest")
    assert live.peaks["work"] == {"other": KB4, "heavy": 2 * KB4}
    assert live.peaks["rest"] == {"other": KB4}
    assert len(kept) == 1000


def test_what_is_counted_elsewhere_is_left_out() -> None:
    weight = torch.zeros(1000)
    live = LiveBytes()
    live.exclude([weight])
    with live:
        weight.view(10, 100)
        weight.add_(1)
    assert live.snapshot() == {}


def test_fake_tensors_count_at_their_true_size() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        big = torch.empty(1 << 40, dtype=torch.uint8)
        assert live.snapshot().total() == 1 << 40
        del big
        assert live.snapshot().total() == 0


def test_arithmetic_of_products_is_counted() -> None:
    with LiveBytes() as live:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
        assert live.flops == 2 * 2 * 3 * 5
        ends = torch.tensor([4, 6], dtype=torch.int32)
        with CudaEmulationMode(live):
            out = torch.nn.functional.grouped_mm(torch.zeros(6, 4), torch.zeros(2, 4, 8), offs=ends)
    assert out.shape == (6, 8)
    assert live.flops == 2 * 2 * 3 * 5 + 2 * 6 * 4 * 8


def test_kernels_are_counted_and_views_are_none() -> None:
    with LiveBytes() as live:
        whole = torch.empty(10, 10)
        whole.view(100)[:50].unsqueeze(0).expand(3, 50).detach()
        assert live.launches == 0
        (whole @ whole.t()).add_(1).to(torch.float64)
        whole.exp()
        add_launches(3)
    assert live.launches == 7
    add_launches(1)
    assert live.launches == 7, "nothing is counted outside"
