"""Attention is FlashAttention if it runs, otherwise SDPA, with repeated keys if needed, and eager only on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.models.llm import attention
from vlmcap.models.llm.attention import REPEATED, check_attention, choose_attention, needs_repeated_keys
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.pretrained import load_pretrained

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the GPU's compute capability and the installed packages."""

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
def test_what_auto_takes(
    machine: Any, capability: tuple[int, int], installed: bool, device: str, dtype: torch.dtype, chosen: str
) -> None:
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
        with pytest.raises(
            UserError, match=f"llm.attention={name} needs .*{reason}.*; set llm.attention=auto"
        ) as caught:
            choose_attention(name, device, dtype)
        assert "\n" not in str(caught.value)


def test_names(machine: Any) -> None:
    machine()
    for name in ("sdpa", "eager", "flash_attention_2"):
        assert choose_attention(name, "cuda:0", BF16) == name
    with pytest.raises(UserError, match=r"llm\.attention=nonsense is not one of auto, sdpa, sdpa_repeated, eager"):
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
        with pytest.raises(
            UserError, match=r"llm\.attention=sdpa is not supported by OnlySlow; set llm\.attention=eager"
        ):
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
    with pytest.raises(UserError, match=r"llm\.attention=sdpa was requested, but transformers uses eager"):
        check_attention(model, "sdpa")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Sets the GPU's compute capability."""
    return lambda capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """Records, for each SDPA call, whether it groups queries, the query heads and the key heads."""
    seen: list[tuple[bool, int, int]] = []
    original = F.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append((bool(named.get("enable_gqa")), query.shape[1], key.shape[1]))
        return original(query, key, *rest, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    return seen


def load(folder: Path, attention: str) -> Any:
    return load_language_model(folder, dtype=FP32, quantization="none", attention=attention, device="cpu")


@pytest.mark.parametrize("mask", ["none", "padded", "packed"])
def test_logits_and_gradients_are_those_of_sdpa(
    llm_folder: Path, mask: str, calls: list[tuple[bool, int, int]]
) -> None:
    ids = torch.randint(5, 60, (2 if mask == "padded" else 1, 12), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Tensor] = {}
    if mask == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, 7:] = 0
    if mask == "packed":
        inputs["position_ids"] = torch.tensor([[*range(5), *range(7)]])
    results = []
    for chosen in ("sdpa", REPEATED):
        model = load(llm_folder, chosen)
        assert model.config.num_attention_heads > model.config.num_key_value_heads
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        calls.clear()
        logits = model(inputs_embeds=embeddings, **inputs, use_cache=False).logits
        assert len(calls) == model.config.num_hidden_layers
        is_grouped = chosen == "sdpa" and mask == "none"
        assert {grouped for grouped, _, _ in calls} == {is_grouped}
        assert {heads == keys for _, heads, keys in calls} == {not is_grouped}
        logits.logsumexp(-1).sum().backward()
        results.append((logits.detach(), embeddings.grad))
    for own, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_captions_are_those_of_sdpa(llm_folder: Path) -> None:
    ids = torch.tensor([[1, 9, 7, 30]])
    said = [
        load(llm_folder, name).generate(ids, max_new_tokens=8, do_sample=False).tolist() for name in ("sdpa", REPEATED)
    ]
    assert said[0] == said[1]
    assert len(said[0][0]) > 6


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_a_whole_model_runs_it_in_both_parts(kind: str, qwen_folders: dict[str, Path]) -> None:
    options: dict[str, Any] = {"dtype": FP32, "quantization": "none", "device": "cpu", "max_patches": 64}
    found = []
    for chosen in ("sdpa", REPEATED):
        llm: Any = load_pretrained(qwen_folders[kind], attention=chosen, **options).llm
        check_attention(llm, chosen)
        with torch.no_grad():
            found.append(llm(input_ids=torch.arange(5, 20)[None], use_cache=False).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("capability", "is_needed"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_where_it_is_needed(
    gpu: Callable[[tuple[int, int]], None], capability: tuple[int, int], is_needed: bool
) -> None:
    from transformers import Qwen3ForCausalLM

    gpu(capability)
    assert needs_repeated_keys("cuda:0") == is_needed
    assert not needs_repeated_keys("cpu")
    for requested in ("sdpa", "auto"):
        assert choose_attention(requested, "cuda:0", FP16, Qwen3ForCausalLM) == (REPEATED if is_needed else "sdpa")
        assert choose_attention(requested, "cpu", FP32, Qwen3ForCausalLM) == "sdpa"
    assert choose_attention("sdpa", "cuda:0", FP16) == "sdpa"  # nobody knows whether the model would run it
    assert choose_attention("eager", "cuda:0", FP16, Qwen3ForCausalLM) == "eager"


class OwnAttention:
    _supports_sdpa = True
    _supports_flash_attn = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False


def test_a_class_with_its_own_attention_keeps_it(gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu((7, 5))
    assert choose_attention("sdpa", "cuda:0", FP16, OwnAttention) == "sdpa"
    with pytest.raises(
        UserError, match=r"llm\.attention=sdpa_repeated is not supported by OwnAttention; set llm\.attention=eager"
    ):
        choose_attention(REPEATED, "cuda:0", FP16, OwnAttention)


@pytest.mark.gpu
def test_the_memory_efficient_kernel_runs_on_repeated_keys() -> None:
    """The kernel groups no queries on any GPU: with only it enabled, "sdpa" fails and "sdpa_repeated" works."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vlmcap.models.llm.attention import repeated_keys_attention

    query, key = (torch.randn(1, heads, 64, 32, device="cuda", dtype=FP16) for heads in (8, 2))
    expected = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).transpose(1, 2)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        repeated, _ = repeated_keys_attention(torch.nn.Identity(), query, key, key, None)
    torch.testing.assert_close(repeated, expected, atol=2e-3, rtol=2e-3)
