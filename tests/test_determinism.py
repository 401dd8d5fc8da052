"""Deterministic mode is strict within its context, off while captions are written, and as it was before afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic as filling

from vlmcap.determinism import deterministic_kernels, fastest_kernels
from vlmcap.errors import UserError

State = tuple[bool, bool, bool, str | None]


def state() -> State:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        filling.fill_uninitialized_memory,
        os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
    )


OFF, STRICT = (False, False, True, None), (True, False, False, "1")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_mode_is_strict_inside_and_off_while_captions_are_written() -> None:
    with deterministic_kernels(True):
        assert state() == STRICT and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with fastest_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
        assert state() == STRICT
    assert state() == OFF and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_mode_that_is_not_wanted_changes_nothing() -> None:
    with deterministic_kernels(False):
        assert state() == OFF


def test_an_error_and_a_caller_of_its_own_mind_find_their_state_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.raises(ZeroDivisionError), deterministic_kernels(True), fastest_kernels():
        raise ZeroDivisionError
    assert state() == (True, True, True, None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "a value of the user's own stays"


def test_an_operation_without_such_a_kernel_is_named_with_the_key() -> None:
    values = torch.zeros(4)
    with (
        pytest.raises(UserError, match=r"operation put_ has no .*trainer\.deterministic=false"),
        deterministic_kernels(True),
    ):
        values.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
    with pytest.raises(RuntimeError, match="shape") as caught, deterministic_kernels(True):
        values @ torch.zeros(3, 3)
    assert not isinstance(caught.value, UserError)


def test_empty_memory_is_not_filled() -> None:
    with deterministic_kernels(True):
        torch.full((1 << 12,), 7.0)  # leaves its bytes behind
        assert not torch.empty(1 << 12).isnan().all()
