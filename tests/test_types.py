"""Records that parts hand each other."""

from __future__ import annotations

import pytest
import torch

from vlmcap.types import select_entries


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16, torch.uint8])
def test_rows_keep_their_type_under_autocast(dtype: torch.dtype) -> None:
    values = torch.arange(12).view(3, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = select_entries(values, [2, 0])
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype is dtype
    assert torch.equal(found, values[[2, 0]])
