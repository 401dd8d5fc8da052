"""Language models are loaded, quantised to 4 bits on the CPU, and adapted with only the adapters trainable."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.load import context_length, load_language_model, text_width


def load(folder: Path, quantization: str = "none", dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    return load_language_model(folder, dtype=dtype, quantization=quantization, attention=attention, device="cpu")


def with_lora(model: nn.Module, targets: str = "all-linear") -> Any:
    return add_lora(model, LoraConfig(rank=4, alpha=8, target_modules=targets))


def raw_bytes(model: nn.Module) -> dict[str, Tensor]:
    """Returns the stored frozen weights, including quantisation constants."""
    kept = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            kept[name] = parameter.detach().clone()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                kept[f"{name}.absmax"] = state.absmax.clone()
    return kept


def test_everything_is_frozen_and_in_evaluation_mode(llm_folder: Path) -> None:
    model = load(llm_folder, dtype=torch.bfloat16)
    assert not model.training
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16)}
    assert context_length(llm_folder) == 512


def test_four_bit_weights_are_really_four_bit(llm_folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    plain, model = load(llm_folder), load(llm_folder, "4bit")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
    assert set(linear) - quantised == {"lm_head"}
    for name in quantised:
        weight, full = linear[name].weight, plain.get_submodule(name).weight
        assert isinstance(weight, Params4bit)
        assert weight.dtype == torch.uint8
        assert weight.numel() * 2 == full.numel()
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested  # double quantisation
        assert weight.quant_state.dtype == torch.float32


def test_four_bit_logits_are_near_the_full_ones(llm_folder: Path) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        full, quantised = load(llm_folder)(input_ids=ids).logits, load(llm_folder, "4bit")(input_ids=ids).logits
    cosine = torch.cosine_similarity(full.flatten(), quantised.flatten(), dim=0)
    assert 0.9 < cosine < 0.99999


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_adapters_learn_and_the_base_stays_bit_identical(llm_folder: Path, quantization: str) -> None:
    torch.manual_seed(0)
    model = with_lora(load(llm_folder, quantization, torch.bfloat16))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    before = raw_bytes(model)
    ids = torch.randint(0, 300, (2, 12))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    after = raw_bytes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fresh_adapters_change_nothing(llm_folder: Path) -> None:
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = load(llm_folder)(input_ids=ids).logits
        adapted = with_lora(load(llm_folder))
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
        assert base_model(adapted).lm_head is adapted.base_model.model.lm_head


def test_all_linear_is_every_layer_but_the_head(llm_folder: Path) -> None:
    names = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, _ in with_lora(load(llm_folder)).named_parameters()
        if "lora_A" in name
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_chosen_modules(llm_folder: Path) -> None:
    names = [name for name, _ in with_lora(load(llm_folder), "q_proj, v_proj").named_parameters() if "lora_A" in name]
    assert len(names) == 4
    assert all(".q_proj." in name or ".v_proj." in name for name in names)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("query_proj", "query_proj"),
        ("q_proj,v_prj", "v_prj"),
        ("q_proj,input_layernorm", "input_layernorm"),
        ("lm_head", "lm_head"),
        ("q_proj,embed_tokens", "embed_tokens"),
        (" , ", "names no layer"),
    ],
)
def test_target_modules_that_do_not_do(llm_folder: Path, targets: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"tuning\.lora\.target_modules=.*{named}") as caught:
        with_lora(load(llm_folder), targets)
    assert named in str(caught.value)


def adapted_layers(model: nn.Module) -> set[str]:
    prefix = "base_model.model."
    return {name.split(".lora_A")[0].removeprefix(prefix) for name, _ in model.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_the_router_of_experts_gets_no_adapter(moe_folder: Path, quantization: str) -> None:
    """peft's own "all-linear" would adapt it if it is a linear layer."""
    adapted = with_lora(load(moe_folder, quantization))
    assert {name.rsplit(".", 1)[-1] for name in adapted_layers(adapted)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UserError, match="names gate, which is no adaptable layer"):
        with_lora(load(moe_folder), "q_proj,gate")


def test_a_router_that_is_a_linear_layer_is_known_by_its_outputs(moe_folder: Path) -> None:
    model = load(moe_folder)
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(64, 8, bias=False)
    assert not any("gate" in name for name in adapted_layers(with_lora(model)))
    dense = load(moe_folder)
    dense.model.layers[0].mlp.gate = nn.Linear(64, 96, bias=False)  # a gate of something else
    assert "model.layers.0.mlp.gate" in adapted_layers(with_lora(dense))


def test_experts_get_adapters_when_asked(moe_folder: Path, llm_folder: Path) -> None:
    model = add_lora(load(moe_folder, "4bit"), LoraConfig(rank=2, alpha=4, use_experts=True))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum(".experts." in name for name in trained) == 3 * 4  # layers, and two factors of two matrices
    assert adapted_layers(model) > {"model.layers.0.self_attn.q_proj"}
    with pytest.raises(UserError, match=r"tuning\.lora\.use_experts"):
        add_lora(load(llm_folder), LoraConfig(rank=2, alpha=4, use_experts=True))
    with pytest.raises(ValueError, match=r"tuning\.lora\.use_dora"):
        LoraConfig(rank=2, alpha=4, use_experts=True, use_dora=True)


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_every_kind_learns_and_comes_back(llm_folder: Path, quantization: str, kind: str) -> None:
    """Saved adapters loaded into a new model give bit-identical logits, also on 4-bit weights."""

    def build() -> Any:
        base = load(llm_folder, quantization)
        kinds = {"use_dora": kind == "dora", "use_rslora": kind == "rslora"}
        return add_lora(base, LoraConfig(rank=4, alpha=8, **kinds))

    torch.manual_seed(0)
    model, ids = build(), torch.arange(12)[None]
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert any("magnitude" in name for name in adapters) == (kind == "dora")
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, load(llm_folder, quantization)(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    saved = {name: p.detach().clone() for name, p in adapters.items()}
    fresh = build()
    missing, unexpected = fresh.load_state_dict(saved, strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


def test_rank_stabilised_scaling(llm_folder: Path) -> None:
    for use_rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        model: Any = add_lora(
            load(llm_folder), LoraConfig(rank=4, alpha=8, target_modules="q_proj", use_rslora=use_rslora)
        )
        assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scale


def test_base_model_of_a_bare_model_is_itself(llm_folder: Path) -> None:
    model = load(llm_folder)
    assert base_model(model) is model


def test_what_is_no_language_model(siglip_folder: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.checkpoint .* causal language model") as caught:
        load(siglip_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_gap_in_the_weights_is_refused(llm_folder: Path, tmp_path: Path, quantization: str) -> None:
    """transformers would initialise it randomly."""
    folder = shutil.copytree(llm_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, first: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, quantization)


def test_broken_weights_and_unknown_attention(llm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llm_folder, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"llm\.checkpoint"):
        load(folder)
    for attention in ("nonsense", "flash_attention_2"):  # the latter needs a GPU that is not there
        with pytest.raises(UserError, match=rf"llm\.attention={attention}"):
            load(llm_folder, attention=attention)


def whole_model(folder: Path) -> Any:
    """Saves LLaVA-NeXT-Video with random weights in the published layout."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(num_attention_heads=2, image_size=28, patch_size=14, **size),
            text_config=LlamaConfig(vocab_size=200, num_attention_heads=4, max_position_embeddings=64, **size),
            image_grid_pinpoints=[[28, 28]],
        )
    )
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_the_language_model_is_taken_out_of_a_whole_one(tmp_path: Path, quantization: str) -> None:
    whole = whole_model(tmp_path)
    part = load(tmp_path, quantization)
    assert type(part).__name__ == "LlamaForCausalLM"
    assert (context_length(tmp_path), text_width(tmp_path)) == (64, 64)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, logits = whole(input_ids=ids).logits, part(input_ids=ids).logits
    if quantization == "none":
        torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    else:
        assert torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.9


def test_a_gap_in_a_whole_model_is_refused(tmp_path: Path) -> None:
    whole_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("language_model.lm_head.weight") or name == "lm_head.weight"]
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, first: lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(("is_on_host", "place"), [(False, "meta"), (True, "cpu")])
def test_unquantised_weights_go_straight_to_the_device(llm_folder: Path, is_on_host: bool, place: str) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "quantization": "none", "attention": "sdpa"}
    model = load_language_model(llm_folder, device="meta", is_on_host=is_on_host, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {place}
