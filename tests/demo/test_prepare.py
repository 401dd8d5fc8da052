"""The demo's tiny encoders: each family's class, trained once, except for the untrained one, equal for equal seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmcap.config import Config
from vlmcap.demo.prepare import TINY, TINY_ENCODERS, prepare
from vlmcap.models.encoders import EncoderOptions, load_encoder

OTHERS = [name for name in TINY_ENCODERS if name != TINY]
CLASSES = {
    "tiny": "CLIPVisionModel",
    "tiny_untrained": "CLIPVisionModel",
    "tiny_siglip2": "SiglipVisionModel",
    "tiny_dinov3": "DINOv3ViTModel",
    "tiny_internvit": "InternVLVisionModel",
    "tiny_vjepa2": "VJEPA2Model",
}


@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_a_tiny_encoder_is_its_familys_and_made_once(
    name: str, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = prepare(tiny_config(tmp_path, f"encoder={name}"))
    folder = Path(config.encoder.checkpoint)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare(tiny_config(tmp_path, f"encoder={name}")).encoder.checkpoint == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    options = EncoderOptions(config.encoder.feature_layer, torch.float32)
    encoder = load_encoder(folder, options)
    assert type(encoder.tower).__name__ == CLASSES[name]
    features = encoder(torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8))
    assert features.shape == (1, 1 if name == "tiny_vjepa2" else 2, 64, 96)
    assert features.isfinite().all()


def test_the_untrained_one_is_the_first_state_of_the_trained_one(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Two steps, as in the session's small demo, move most weights, and none by more than the sum of its rates."""
    folders = [
        Path(prepare(tiny_config(tmp_path, f"encoder={name}")).encoder.checkpoint)
        for name in ("tiny", "tiny_untrained")
    ]
    trained, untrained = (load_file(folder / "model.safetensors") for folder in folders)
    assert trained.keys() == untrained.keys()
    changes = [
        (trained[name] - untrained[name]).abs().max().item() for name in trained if trained[name].is_floating_point()
    ]
    assert 0 < max(changes) < 0.01


@pytest.mark.parametrize("name", OTHERS)
def test_folders_of_tiny_encoders_stand_apart(name: str, tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    other = prepare(tiny_config(tmp_path, f"encoder={name}")).encoder.checkpoint
    assert other != prepare(tiny_config(tmp_path)).encoder.checkpoint
