"""A mixture of experts is loaded in 4 bits from every file layout, all of it packed, with the computed size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vlmcap.errors import UserError
from vlmcap.models.llm import experts_quantization
from vlmcap.models.llm.experts import fused_experts, pack_experts
from vlmcap.models.llm.experts_quantization import check_experts_packed, expert_quantization
from vlmcap.models.llm.load import keep_packing, load_language_model, quantization_config

IDS = torch.arange(40).view(2, 20)


def load(folder: Path, quantization: str = "4bit", dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    if quantization != "none":
        config = expert_quantization(folder, quantization_config(quantization, dtype))
        options |= {"quantization_config": config, "device_map": "cpu"}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values())
    keep_packing(model)
    return model.requires_grad_(False).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_every_weight_of_an_expert_is_in_four_bit(moe_folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model, plain = load(moe_folder), load(moe_folder, "none")
    check_experts_packed(model)
    layers = fused_experts(model)
    assert len(layers) == 3
    for layer, experts in enumerate(layers):
        stock = plain.model.layers[layer].mlp.experts
        for weight, full in ((experts.gate_up_proj, stock.gate_up_proj), (experts.down_proj, stock.down_proj)):
            assert weight.dtype == torch.uint8
            assert weight.numel() * 2 == full.numel()
            assert weight.quant_state.shape == full.shape
            assert weight.quant_state.nested
            assert torch.equal(weight.data, pack_experts(full.data).data)
    assert all(isinstance(layer.self_attn.q_proj, Linear4bit) for layer in model.model.layers)
    assert {p.dtype for name, p in model.named_parameters() if "mlp.gate." in name} == {torch.float32}  # the router


def test_outputs_equal_a_full_model_whose_weights_went_through_four_bit(moe_folder: Path) -> None:
    model, plain, rounded = load(moe_folder), load(moe_folder, "none"), load(moe_folder, "none")
    for name, parameter in rounded.named_parameters():
        if parameter.ndim == 3 or (parameter.ndim == 2 and "self_attn" in name):
            bits, state = quantize_4bit(parameter.data, compress_statistics=True, quant_type="nf4")
            parameter.data = dequantize_4bit(bits, state)
    torch.testing.assert_close(logits(model), logits(rounded), rtol=1e-5, atol=1e-5)
    # So what remains to the full model is the rounding and nothing else.
    torch.testing.assert_close(logits(model) - logits(plain), logits(rounded) - logits(plain), rtol=1e-4, atol=2e-5)
    assert 0.9 < torch.cosine_similarity(logits(model).flatten(), logits(plain).flatten(), dim=0) < 0.99999


def test_four_bit_with_arithmetic_in_bfloat16(moe_folder: Path) -> None:
    model = load(moe_folder, dtype=torch.bfloat16)
    assert {experts.compute_dtype for experts in fused_experts(model)} == {torch.bfloat16}
    assert torch.cosine_similarity(logits(model).float().flatten(), logits(load(moe_folder)).flatten(), dim=0) > 0.99


def test_the_files_hold_a_tensor_for_each_expert_in_several_shards(moe_folder: Path) -> None:
    index = json.loads((moe_folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = [
        f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        for expert in range(8)
        for part in ("gate", "up", "down")
    ]
    assert len({index[name] for name in names}) > 1  # a layer's experts lie across files


@pytest.mark.parametrize("is_sharded", [False, True])
def test_fused_files_load_alike(moe_folder: Path, tmp_path: Path, is_sharded: bool) -> None:
    plain = load(moe_folder, "none")
    shutil.copy(moe_folder / "config.json", tmp_path)
    weights = {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
    assert weights["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 128, 64)
    if is_sharded:
        files = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(weights)}
        for file in set(files.values()):
            save_file(
                {name: tensor for name, tensor in weights.items() if files[name] == file},
                tmp_path / file,
                {"format": "pt"},
            )
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load(tmp_path)), logits(load(moe_folder)))


def test_a_layer_is_gone_before_the_next_is_read(moe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StorageWeakRef] = []

    def pack(weight: Tensor) -> Any:
        assert all(earlier.expired() for earlier in seen)
        seen.append(StorageWeakRef(weight.untyped_storage()))
        return pack_experts(weight)

    monkeypatch.setattr(experts_quantization, "pack_experts", pack)
    load(moe_folder)
    assert len(seen) == 3 * 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.1.mlp.experts.", r"lacks 2 weights, first: model.layers.1.mlp.experts.down_proj"),
        ("layers.1.mlp.experts.3.", "could not be loaded"),
        ("layers.1.mlp.experts.3.down_proj", "could not be loaded"),
        ("layers.1.mlp.experts.3.gate_proj", "could not be loaded"),
    ],
)
def test_missing_experts_are_told(moe_folder: Path, tmp_path: Path, part: str, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(moe_folder, folder)
    for file in folder.glob("*.safetensors"):
        save_file(
            {name: tensor for name, tensor in load_file(file).items() if part not in name}, file, {"format": "pt"}
        )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if part not in name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        load_language_model(folder, dtype=torch.float32, quantization="4bit", attention="sdpa", device="cpu")


def test_stock_loading_is_what_the_check_catches(moe_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(
        moe_folder,
        dtype=torch.bfloat16,
        quantization_config=quantization_config("4bit", torch.bfloat16),
        device_map="cpu",
    )
    with pytest.raises(UserError, match=r"llm.quantization.*model.layers.0.mlp.experts"):
        check_experts_packed(stock)


def test_eight_bit_is_refused_for_experts_and_untouched_otherwise(moe_folder: Path, llm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.quantization=8bit"):
        expert_quantization(moe_folder, quantization_config("8bit", torch.float32))
    for kind in ("8bit", "4bit"):
        config = quantization_config(kind, torch.float32)
        assert expert_quantization(llm_folder, config).quant_method == "bitsandbytes"


def test_experts_of_another_make_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_hidden_layers": 1,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "layer_types": ["full_attention"]}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing that could be read")
    config = expert_quantization(tmp_path, quantization_config("4bit", torch.float32))
    with pytest.raises(UserError, match="does not support the experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")


def test_saving_packed_experts_is_refused(moe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load(moe_folder).save_pretrained(tmp_path)


def test_captions_with_cache_equal_those_without_and_a_batch_equals_its_rows(moe_folder: Path) -> None:
    model = load(moe_folder)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()
    cached, plain = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **options) for use in (True, False)
    )
    assert cached.shape == (2, 14)
    assert torch.equal(cached, plain)
    for row, start in ((0, 2), (1, 0)):
        alone = model.generate(
            input_ids=ids[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **options
        )
        assert torch.equal(alone[0], cached[row, start:])
