"""The chunked loss equals that of all logits at once, in value and gradients, for every supported class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.compose import compose
from vlmcap.config import LlmConfig, LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator, flat_indices
from vlmcap.errors import UserError
from vlmcap.models import captioner as captioner_module
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.chunked_loss import UNSCALED, can_chunk, chunked_cross_entropy, labels_per_chunk
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.prompt import VisualRun, load_prompt
from vlmcap.models.pretrained import load_pretrained
from vlmcap.models.projectors import ProjectorSizes, build_projector, count_tokens
from vlmcap.types import Batch, Clip, Sample

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
}
QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
CAPTIONS = ("푸른 바다 위로 아침 해가 천천히 떠오른다.", "산이다.", "눈 내리는 밤의 궁궐이 조용하다.")
Make = Callable[..., VideoCaptioner]


@pytest.fixture
def make(llm_folder: Path) -> Make:
    """Builds a captioner around a tiny language model with non-zero adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    prompt = load_prompt(llm_folder, LlmConfig(prompt="설명해 주세요."))

    def build(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> VideoCaptioner:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, vocab_size=len(prompt.tokenizer), **(SIZES | OPTIONS.get(kind, {}) | options)
        )
        llm = (
            AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
            .eval()
            .requires_grad_(False)
        )
        adapted = add_lora(llm, LoraConfig(rank=4, alpha=8))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        projector = build_projector(
            MlpConfig(temporal=Temporal.none), ProjectorSizes(in_dim=8, out_dim=64, grid=(1, 2), num_frames=2)
        )
        return VideoCaptioner(None, projector, adapted, prompt, GenerationSettings(4)).eval()

    return build


def batch_of(captioner: VideoCaptioner, *, is_packed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    items = [
        Sample(
            Clip(str(i), f"{i}.mp4", (text,)), features=torch.randn(2, 2, 8, generator=generator), grid_thw=(2, 1, 2)
        )
        for i, text in enumerate(CAPTIONS)
    ]
    return Collator(
        captioner.prompt,
        VisualRun(partial(count_tokens, captioner.projector.config, captioner.projector.sizes), (2, 1, 2)),
        200,
        is_packed=is_packed,
    )(items)


def chunk_bytes(captioner: VideoCaptioner, rows: int = 4) -> int:
    return 4 * rows * int(base_model(captioner.llm).lm_head.out_features)  # type: ignore[union-attr,arg-type]


def loss_and_gradients(captioner: VideoCaptioner, batch: Batch, scale: float = 1.0) -> tuple[float, list[Tensor]]:
    weights = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    loss, count = captioner(batch)
    assert count == batch.num_label_tokens
    return loss.item(), [gradient / scale for gradient in torch.autograd.grad(loss * scale, weights)]


def both(captioner: VideoCaptioner, batch: Batch, spy: list[int], scale: float = 1.0) -> tuple[Any, Any]:
    plain = loss_and_gradients(captioner, batch, scale)
    assert not spy
    captioner.loss_chunk_bytes = chunk_bytes(captioner)
    chunked = loss_and_gradients(captioner, batch, scale)
    assert spy == [4], "the chunked loss was not taken"
    return chunked, plain


def assert_alike(chunked: Any, plain: Any, *, loss: float = 1e-5, gradient: float = 1e-5) -> None:
    assert chunked[0] == pytest.approx(plain[0], rel=loss)
    assert len(plain[1]) > 4
    for own, expected in zip(chunked[1], plain[1], strict=True):
        assert float(expected.norm()) > 0
        assert float((own - expected).norm()) <= gradient * float(expected.norm())


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the rows per chunk of each chunked loss."""
    seen: list[int] = []

    def note(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int) -> Tensor:
        seen.append(chunk_rows)
        return chunked_cross_entropy(hidden, weight, labels, chunk_rows)

    monkeypatch.setattr(captioner_module, "chunked_cross_entropy", note)
    return seen


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_loss_and_gradients_are_those_of_all_logits(kind: str, is_packed: bool, make: Make, spy: list[int]) -> None:
    captioner = make(kind)
    assert_alike(*both(captioner, batch_of(captioner, is_packed=is_packed), spy))


def test_every_class_on_the_list_is_tried() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    from vlmcap.models.pretrained.families import model_class

    assert {NAMES[kind] for kind in OPTIONS} | {model_class(kind).__name__ for kind in QWEN_VL} == UNSCALED


def test_a_head_tied_to_the_embedding(make: Make, spy: list[int]) -> None:
    captioner = make("qwen3", tie_word_embeddings=True)
    assert_alike(*both(captioner, batch_of(captioner), spy))


def test_labels_anywhere_and_rows_without_any(make: Make, spy: list[int]) -> None:
    captioner = make("qwen3")
    batch = batch_of(captioner)
    labels = batch.labels
    assert labels is not None
    labels[1] = -100
    labels[0, 1::3] = -100
    labels[2, 1:4] = batch.input_ids[2, 1:4]
    batch = replace(batch, **flat_indices(batch.visual_mask, labels))
    assert_alike(*both(captioner, batch, spy))


def test_without_gradients_and_with_gradient_checkpointing(make: Make, spy: list[int]) -> None:
    captioner = make("qwen3")
    batch = batch_of(captioner)
    expected = float(captioner(batch)[0])
    captioner.loss_chunk_bytes = chunk_bytes(captioner)
    with torch.no_grad():
        loss, _ = captioner(batch)
    assert spy == [4]
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    spy.clear()
    captioner.loss_chunk_bytes = None
    base_model(captioner.train().llm).gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )  # type: ignore[operator]
    assert_alike(*both(captioner, batch, spy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("weights", ["half", "single"])
def test_in_half_precision_as_autocast_has_it(dtype: torch.dtype, weights: str, make: Make, spy: list[int]) -> None:
    """Gradients are rounded to the dtype in both ways, so they may differ by a few units in the last place."""
    captioner = make("qwen3", dtype if weights == "half" else torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        chunked, plain = both(captioner, batch_of(captioner), spy, scale=1.0 if dtype is torch.bfloat16 else 64.0)
    assert_alike(chunked, plain, gradient=4 * torch.finfo(dtype).eps)


def exact_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    double = hidden.double().requires_grad_()
    F.cross_entropy(F.linear(double, weight.double()), labels, reduction="sum").backward()
    assert double.grad is not None
    return double.grad


@pytest.mark.parametrize("factor", [2.0**-12, 1.0, 2.0**12], ids=["small", "one", "large"])
def test_float16_gradients_do_not_vanish_in_a_large_vocabulary(factor: float) -> None:
    """Probabilities of 50 000 nearly equal logits are 2e-5, below the smallest normal float16 number.

    Some of the words here are far below it.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator).half()
    weight = (torch.randn(50_000, 32, generator=generator) * 0.3).half()
    labels = torch.randint(0, 50_000, (6,), generator=generator)
    expected = exact_gradient(hidden, weight, labels)
    leaf = hidden.clone().requires_grad_()
    (chunked_cross_entropy(leaf, weight, labels, 4) * factor).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert float((leaf.grad.double() / factor - expected).norm()) <= 3e-3 * float(expected.norm())


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    hidden, weight, labels = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.tensor([0, 10, 3, 3, 7])
    for rows in (1, 2, 5, 100):
        (chunked_cross_entropy(hidden, weight, labels, rows) / 7 * 3).backward()
        assert hidden.grad is not None
        torch.testing.assert_close(
            hidden.grad.double(), exact_gradient(hidden.detach(), weight, labels) / 7 * 3, atol=1e-5, rtol=1e-5
        )
        hidden.grad = None
    empty = chunked_cross_entropy(hidden[:0], weight, labels[:0], 4)
    empty.backward()
    assert float(empty) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("kind", QWEN_VL)
def test_whole_models(kind: str, qwen_folders: dict[str, Path], spy: list[int]) -> None:
    folder, sizes = qwen_folders[kind], ((84, 112), (128, 56), (84, 112))
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "quantization": "none",
        "attention": "sdpa",
        "device": "cpu",
        "max_patches": 64,
    }
    parts = load_pretrained(folder, **options)
    around = {"visual_prefix": parts.visual_prefix, "visual_suffix": parts.visual_suffix}
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."), **around)
    llm = add_lora(parts.llm, LoraConfig(rank=4, alpha=8))
    captioner = parts.captioner_class(
        parts.encoder, parts.projector, llm, prompt, GenerationSettings(max_new_tokens=4)
    ).eval()
    items = []
    for i, (text, size) in enumerate(zip(CAPTIONS, sizes, strict=True)):
        frames = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        grid = parts.encoder.transform.grid_thw(4, *size)
        items.append(Sample(Clip(str(i), f"{i}.mp4", (text,)), frames=parts.encoder.transform(frames), grid_thw=grid))
    batch = Collator(prompt, parts.layout((2, *parts.encoder.grid)), 200)(items)
    captioner.requires_grad_(False)
    for name, parameter in captioner.named_parameters():
        if "lora_B" in name or name.startswith("projector"):
            parameter.requires_grad_(True)
    assert_alike(*both(captioner, batch, spy))


def test_other_heads_keep_the_plain_way(make: Make, llm_folder: Path, spy: list[int]) -> None:
    scaled = make("hyperclovax", logits_scaling=0.125)
    trained = make("qwen3")
    base_model(trained.llm).lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    hooked = make("qwen3")
    base_model(hooked.llm).lm_head.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    biased = make("qwen3")
    base_model(biased.llm).lm_head = nn.Linear(64, len(biased.prompt.tokenizer)).requires_grad_(False)
    other = make("qwen3")
    base_model(other.llm).lm_head = type("Own", (nn.Linear,), {})(
        64, len(other.prompt.tokenizer), bias=False
    ).requires_grad_(False)
    for captioner in (scaled, trained, hooked, biased, other):
        batch = batch_of(captioner)
        expected = loss_and_gradients(captioner, batch)
        captioner.loss_chunk_bytes = chunk_bytes(captioner)
        assert loss_and_gradients(captioner, batch)[0] == expected[0]
    assert not spy
    assert can_chunk(
        load_language_model(llm_folder, dtype=torch.float32, quantization="4bit", attention="sdpa", device="cpu")
    )


def test_logits_that_fit_are_had_at_once(make: Make, spy: list[int]) -> None:
    captioner = make("qwen3")
    batch = batch_of(captioner)
    captioner.loss_chunk_bytes = chunk_bytes(captioner, batch.num_label_tokens)
    captioner(batch)
    assert not spy
    captioner.loss_chunk_bytes -= 1
    captioner(batch)
    assert spy == [batch.num_label_tokens - 1]


def test_a_chunk_stays_in_its_budget() -> None:
    assert labels_per_chunk(151_936, 128 * 2**20) == 220
    assert labels_per_chunk(151_936, 1) == 1


def test_no_tensor_of_all_logits_is_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    hidden, weight, labels = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8), torch.randint(0, 1000, (64,))
    with Watch():
        chunked_cross_entropy(hidden, weight, labels, 10).backward()
    assert max(sizes) == 10 * 1000


def test_the_key(tmp_path: Path) -> None:
    from vlmcap.assembly.model import loss_chunk_bytes

    assert loss_chunk_bytes(compose(["paths.output_dir=out"])) == 128 * 2**20
    assert loss_chunk_bytes(compose(["paths.output_dir=out", "hardware.loss_chunk_mib=null"])) is None
    with pytest.raises(UserError, match=r"hardware\.loss_chunk_mib must be at least 1, or null"):
        compose(["paths.output_dir=out", "hardware.loss_chunk_mib=0"])
