"""LLaVA-NeXT-Video as a pretrained VLM and assembled from its folder matches transformers' class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmcap.config import LlmConfig, MlpConfig, Reducer, Temporal
from vlmcap.data.loading.collate import Collator
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.llm.load import load_language_model, text_width
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import load_pretrained
from vlmcap.models.projectors import ProjectorSizes, build_projector, load_projector_weights
from vlmcap.types import Batch, Clip, Sample

FRAMES = 2
CAPTIONS = ("푸른 바다 위로 아침 해가 천천히 떠오른다.", "산이다.")
LANGUAGE = {"dtype": torch.float32, "quantization": "none", "attention": "sdpa", "device": "cpu"}


def whole(folder: Path) -> VideoCaptioner:
    """`model=llava_next_video_7b`."""
    parts = load_pretrained(folder, max_patches=1, **LANGUAGE)  # type: ignore[arg-type]
    return joined(parts.encoder, parts.projector, parts.llm, folder)


def assembled(folder: Path) -> VideoCaptioner:
    """`encoder=clip projector=mlp projector.reducer=pool`, with all three checkpoints naming one folder."""
    encoder = load_encoder(folder, EncoderOptions(feature_layer=-2, dtype=torch.float32))
    projector = build_projector(
        MlpConfig(temporal=Temporal.none, reducer=Reducer.pool),
        ProjectorSizes(encoder.embed_dim, text_width(folder), encoder.grid, num_frames=FRAMES),
    )
    load_projector_weights(projector, folder)
    return joined(encoder, projector, load_language_model(folder, **LANGUAGE), folder)  # type: ignore[arg-type]


def joined(encoder: Any, projector: Any, llm: Any, folder: Path) -> VideoCaptioner:
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."))
    return VideoCaptioner(encoder, projector, llm, prompt, GenerationSettings(max_new_tokens=8)).eval()


@pytest.fixture(scope="module", params=["as saved", "as published"])
def folder(request: pytest.FixtureRequest, llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names of the vision tower have one more level in the published checkpoint than in files of transformers 5."""
    if request.param == "as saved":
        return llava_folder
    copy = shutil.copytree(llava_folder, tmp_path_factory.mktemp("published") / "copy")
    weights = load_file(copy / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): weight for name, weight in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import LlavaNextVideoForConditionalGeneration

    model, loading = LlavaNextVideoForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    return model.eval()


def batch_of(captioner: VideoCaptioner, mode: str = "train") -> Batch:
    frames = torch.randint(
        0, 256, (2, FRAMES, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    samples = [Sample(Clip(str(i), Path(f"{i}.mp4"), (text,)), frames=frames[i]) for i, text in enumerate(CAPTIONS)]
    return Collator(captioner.prompt, FRAMES * 4, 200, mode=mode)(samples)  # type: ignore[arg-type]


def reference_inputs(reference: Any, batch: Batch) -> dict[str, Tensor]:
    """Scales and normalises pixels in one step, like transformers' tensor processors.

    Its PIL processors take two steps; the last bit that this costs the pixels comes out as 2e-5 in these logits.
    """
    assert batch.frames is not None
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1) * 255
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255
    return {
        "input_ids": batch.input_ids.masked_fill(batch.visual_mask, reference.config.video_token_index),
        "attention_mask": batch.attention_mask,
        "pixel_values_videos": (batch.frames.float() - mean) / std,
    }


@pytest.mark.parametrize("make", [whole, assembled])
@torch.no_grad()
def test_logits_are_the_references(
    make: Callable[[Path], VideoCaptioner], folder: Path, reference: Any, record_property: Callable[[str, object], None]
) -> None:
    captioner = make(folder)
    batch = batch_of(captioner)
    llm: Any = captioner.llm
    ours = llm.lm_head(
        llm.model(**captioner.language_inputs(batch, captioner.visual_tokens(batch)), use_cache=False).last_hidden_state
    )
    expected = reference(**reference_inputs(reference, batch)).logits
    real = batch.attention_mask.bool()
    record_property("parity:model:llava_next_video", (ours - expected)[real].abs().max().item())
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-5)
    assert batch.frames is not None
    inverted = replace(batch, frames=255 - batch.frames)
    other = llm(**captioner.language_inputs(inverted, captioner.visual_tokens(inverted))).logits
    assert (other - expected)[real].abs().max() > 0.1  # or parity would say nothing


@pytest.mark.parametrize("make", [whole, assembled])
@torch.no_grad()
def test_loss_and_captions_are_the_references(
    make: Callable[[Path], VideoCaptioner], folder: Path, reference: Any
) -> None:
    captioner = make(folder)
    train, ask = batch_of(captioner), batch_of(captioner, "generate")
    loss, count = captioner(train)
    assert (loss / count).item() == pytest.approx(
        reference(**reference_inputs(reference, train), labels=train.labels).loss.item(), rel=1e-5
    )
    stop = {"eos_token_id": captioner.prompt.stop_ids, "pad_token_id": captioner.prompt.pad_id}
    ids = reference.generate(**reference_inputs(reference, ask), **captioner.generation.as_arguments(), **stop)
    texts = captioner.generate(ask)
    assert texts == captioner.prompt.decode(ids[:, ask.input_ids.shape[1] :].tolist())
    assert texts[0] != texts[1]


def test_only_the_projector_is_trained_and_sizes_are_stated(folder: Path) -> None:
    parts = load_pretrained(folder, max_patches=1, **LANGUAGE)  # type: ignore[arg-type]
    captioner = joined(parts.encoder, parts.projector, parts.llm, folder)
    names = [name for name, _ in captioner.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(captioner.parameters()))
    assert {name.split(".")[0] for name, parameter in captioner.named_parameters() if parameter.requires_grad} == {
        "projector"
    }
    assert parts.layout((FRAMES, *parts.encoder.grid))(None, None) == (FRAMES * 4,)
    loss, _ = captioner(batch_of(captioner))
    loss.backward()
    assert all(parameter.grad is not None for parameter in captioner.projector.parameters())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy=full"),
        ("vision_feature_layer", [-2, -3], "joins the layers"),
    ],
)
def test_other_features_are_refused(key: str, value: Any, message: str, llava_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message) as caught:
        whole(folder)
    assert "\n" not in str(caught.value)
