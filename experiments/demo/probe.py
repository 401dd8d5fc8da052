"""Where the demo loses the direction of motion: ridge probes on the encoder's patches and on the projector's tokens.

python experiments/demo/probe.py read outputs/…/checkpoints/best.ckpt …    probe finished runs
python experiments/demo/probe.py tell seed=0 …                            train with features that state the direction

The probes are linear and fitted on the training clips. What they read on the test clips, the language model could read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmcap.assembly.clips import load_splits
from vlmcap.config import Split
from vlmcap.config_saved import saved_config
from vlmcap.libraries import import_libraries, silence_libraries
from vlmcap.training.checkpoints.load import read_checkpoint
from vlmcap.training.checkpoints.trained import assemble_trained

if TYPE_CHECKING:
    from vlmcap.types import Clip

_RIDGES = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5)
_STATED = (
    2.0  # what `tell` adds to or takes from the first channel of every patch; features have a deviation of about 1
)


def main(arguments: Sequence[str]) -> None:
    """Runs the subcommand."""
    if arguments[:1] == ["tell"]:
        tell(arguments[1:])
    elif arguments[:1] == ["read"] and arguments[1:]:
        read([Path(name) for name in arguments[1:]])
    else:
        sys.exit(__doc__)


def read(checkpoints: Sequence[Path]) -> None:
    """Prints per run how many test clips each probe, and the captions, state the right direction for."""
    silence_libraries()
    import_libraries(with_adapters=True)
    print("| run | patches, all | patches, one direction | tokens, untrained | tokens, all | tokens, mean | captions |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for checkpoint in checkpoints:
        run = checkpoint.parents[1]
        captions = json.loads((run / "summary.json").read_text(encoding="utf-8"))["scores"]["test/facts/direction"]
        probes = " | ".join(f"{share:.3f}" for share in probe(checkpoint))
        print(f"| {run.name} | {probes} | {captions:.3f} |", flush=True)


@torch.no_grad()
def probe(checkpoint: Path) -> list[float]:
    """Test accuracy of each probe of the direction, in the order of the table's columns."""
    config = saved_config(read_checkpoint(checkpoint)["vlmcap"]["config"])
    clips = load_splits(config, [Split.train, Split.test])
    config, assembly = assemble_trained(config, checkpoint, clips)
    assert assembly.features is not None
    labels = [torch.tensor([direction(clip) for clip in clips[split]]) for split in ("train", "test")]
    features = [
        torch.stack([_features(sample) for sample in assembly.features.dataset(clips[split])])
        for split in ("train", "test")
    ]
    projector = assembly.captioner.projector
    tokens = [torch.cat([projector(part) for part in part_of.split(64)]) for part_of in features]  # (N, V, Dl)
    torch.manual_seed(0)
    for module in projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    untrained = [torch.cat([projector(part) for part in part_of.split(64)]) for part_of in features]
    rows, columns = projector.sizes.grid
    halves = [_halves(part.unflatten(2, (rows, columns))) for part in features]
    inputs = (
        [part.flatten(1) for part in features],
        halves,
        [part.flatten(1) for part in untrained],
        [part.flatten(1) for part in tokens],
        [part.mean(1) for part in tokens],
    )
    return [ridge_accuracy(*pair, *labels) for pair in inputs]


def direction(clip: Clip) -> float:
    """1 for a clip whose object moves to the right, -1 for one to the left."""
    assert clip.video is not None
    label = Path(clip.video).parents[1] / "labels" / f"{Path(clip.video).stem}.json"
    return 1.0 if json.loads(label.read_text(encoding="utf-8"))["facts"]["direction"] == "오른쪽" else -1.0


def _features(sample: Any) -> Tensor:
    features: Tensor = sample.features
    return features.float()


def _halves(grid: Tensor) -> Tensor:
    """Right minus left half of the first frame, minus the same of the last, (N, F, h, w, Dv) -> (N, Dv).

    One direction of Dv, the same for every place, then says where the object goes.
    """
    middle = grid.shape[3] // 2
    sides = grid[:, :, :, middle:].mean((2, 3)) - grid[:, :, :, :middle].mean((2, 3))  # (N, F, Dv)
    return sides[:, 0] - sides[:, -1]


def ridge_accuracy(inputs: Tensor, held_out: Tensor, labels: Tensor, answers: Tensor) -> float:
    """Accuracy on `held_out` of ridge regression, its strength chosen on the last fifth of the training clips."""
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-6
    inputs, held_out = (inputs - mean) / deviation, (held_out - mean) / deviation
    num_fitted = len(inputs) * 4 // 5
    fitted, chosen = inputs[:num_fitted], inputs[num_fitted:]
    gram = fitted @ fitted.T
    scores = []
    for ridge in _RIDGES:
        weights = fitted.T @ torch.linalg.solve(gram + ridge * torch.eye(num_fitted), labels[:num_fitted])
        scores.append((_accuracy(chosen @ weights, labels[num_fitted:]), _accuracy(held_out @ weights, answers)))
    return max(scores, key=lambda pair: pair[0])[1]


def _accuracy(values: Tensor, answers: Tensor) -> float:
    return float((values.sign() == answers).float().mean())


def tell(overrides: Sequence[str]) -> None:
    """Trains the demo with the true direction added to every patch, which bounds what the language model can read."""
    from vlmcap.cli.train import main as train
    from vlmcap.data.features.feature_dataset import FeatureDataset
    from vlmcap.program import run_program

    read_stored = FeatureDataset.__getitem__

    def stating(self: Any, key: Any) -> Any:
        sample = read_stored(self, key)
        features = sample.features.clone()
        features[..., 0] += _STATED * direction(sample.clip)
        return dataclasses.replace(sample, features=features)

    FeatureDataset.__getitem__ = stating  # type: ignore[method-assign]
    sys.argv = ["train.py", *overrides]
    run_program(train, "train")


if __name__ == "__main__":
    main(sys.argv[1:])
