"""Checkpoints of a configuration without the training: adapters and projector as after some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.assembling import assembled
from vlmcap.config import Config
from vlmcap.training.checkpoints.load import checkpoint_identity, trained_parameters
from vlmcap.training.schedule import StagePlan


def write_checkpoint(config: Config, path: Path) -> Any:
    """Writes what train.py would, but for the optimiser, and returns the captioner whose weights these are."""
    torch.manual_seed(1)
    assembly = assembled(config)
    captioner: Any = assembly.captioner.eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
            elif name.startswith("projector.") and parameter.ndim == 2:
                parameter.mul_(10)  # captions then depend on the video
    trained = trained_parameters(captioner, StagePlan(config.tuning.stages))
    state = {f"captioner.{name}": p.detach().clone() for part in trained.values() for name, p in part.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"state_dict": state, "global_step": 3, "vlmcap": checkpoint_identity(config, assembly.base_checkpoints)}, path
    )
    return captioner
