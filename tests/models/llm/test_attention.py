"""FlashAttention where it runs, the fused kernel else, the slow one only when asked for by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.errors import UserError
from vlmcap.models.llm import attention
from vlmcap.models.llm.attention import check_attention, choose_attention
from vlmcap.models.llm.load import load_language_model

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the card's compute capability and which packages are there."""

    def set_up(capability: tuple[int, int] = (8, 0), *, installed: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "_is_installed", lambda name: installed)

    return set_up


@pytest.mark.parametrize(
    ("capability", "installed", "device", "dtype", "chosen"),
    [
        ((8, 0), True, "cuda:0", BF16, "flash_attention_2"),
        ((9, 0), True, "cuda:0", FP16, "flash_attention_2"),
        ((7, 5), True, "cuda:0", FP16, "sdpa"),  # T4
        ((8, 0), False, "cuda:0", BF16, "sdpa"),
        ((8, 0), True, "cuda:0", FP32, "sdpa"),
        ((8, 0), True, "cpu", BF16, "sdpa"),
    ],
)
def test_what_auto_takes(machine: Any, capability: tuple[int, int], installed: bool, device: str, dtype: torch.dtype, chosen: str) -> None:
    machine(capability, installed=installed)
    assert choose_attention("auto", device, dtype) == chosen


@pytest.mark.parametrize(
    ("capability", "installed", "device", "dtype", "reason"),
    [
        ((7, 5), True, "cuda:0", FP16, "compute capability 8.0"),
        ((8, 0), False, "cuda:0", BF16, "package flash-attn"),
        ((8, 0), True, "cuda:0", FP32, "hardware.precision=bf16"),
        ((8, 0), True, "cpu", BF16, "CUDA device"),
    ],
)
def test_what_was_asked_for_by_name_is_refused_in_words(
    machine: Any, capability: tuple[int, int], installed: bool, device: str, dtype: torch.dtype, reason: str
) -> None:
    machine(capability, installed=installed)
    for name in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(UserError, match=f"llm.attention={name} needs .*{reason}.*; set llm.attention=auto") as caught:
            choose_attention(name, device, dtype)
        assert "\n" not in str(caught.value)


def test_names(machine: Any) -> None:
    machine()
    for name in ("sdpa", "eager", "flash_attention_2"):
        assert choose_attention(name, "cuda:0", BF16) == name
    with pytest.raises(UserError, match=r"llm\.attention=nonsense is none of auto, sdpa, sdpa_repeated, eager"):
        choose_attention("nonsense", "cpu", FP32)


def test_the_package_is_asked_for_and_not_the_hub() -> None:
    assert not attention._is_installed("flash_attention_2")
    assert not attention._is_installed("flash_attention_3")


class OnlySlow:
    _supports_sdpa = False
    _supports_flash_attn = False


class NoFlash:
    _supports_sdpa = True
    _supports_flash_attn = False


def test_a_class_without_the_fused_kernel_is_not_slow_in_silence(machine: Any) -> None:
    machine()
    for name in ("auto", "sdpa"):
        with pytest.raises(UserError, match=r"llm\.attention=sdpa is not supported by OnlySlow; set llm\.attention=eager"):
            choose_attention(name, "cpu", FP32, OnlySlow)
    assert choose_attention("eager", "cpu", FP32, OnlySlow) == "eager"
    assert choose_attention("auto", "cuda:0", BF16, NoFlash) == "sdpa"
    with pytest.raises(UserError, match="not supported by NoFlash"):
        choose_attention("flash_attention_2", "cuda:0", BF16, NoFlash)


@pytest.mark.parametrize(("requested", "chosen"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_the_loaded_model_runs_what_was_chosen(llm_folder: Path, requested: str, chosen: str) -> None:
    model: Any = load_language_model(llm_folder, dtype=FP32, quantization="none", attention=requested, device="cpu")
    assert model.config._attn_implementation == chosen


def test_a_model_class_is_looked_at_before_its_weights(llm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3ForCausalLM

    monkeypatch.setattr(Qwen3ForCausalLM, "_supports_sdpa", False)
    monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="not supported by Qwen3ForCausalLM"):
        load_language_model(llm_folder, dtype=FP32, quantization="none", attention="auto", device="cpu")


def test_a_silent_exchange_is_noticed(llm_folder: Path) -> None:
    model: Any = load_language_model(llm_folder, dtype=FP32, quantization="none", attention="eager", device="cpu")
    with pytest.raises(UserError, match=r"llm\.attention=sdpa was asked for, but transformers runs eager"):
        check_attention(model, "sdpa")
