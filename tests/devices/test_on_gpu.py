"""Loss, gradients and captions of every part on a GPU are those of the CPU.

The acceptance run (benchmarks/gpu) shows the figures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.gpu import limits
from tests.conftest import write_aihub
from tests.devices.test_devices import CASES, overrides_of, step_and_captions  # noqa: F401 - one is a fixture
from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.training.checkpoints.load import trained_parameters
from vlmcap.training.objects import Run

DEVICE = torch.device(os.environ.get("VLMCAP_TEST_DEVICE", "cuda"))  # another one rehearses this file
HALF = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def _write_png(path: Path, frames: NDArray[np.uint8]) -> None:
    first, *others = map(Image.fromarray, frames)
    first.save(path, format="PNG", save_all=True, append_images=others)


@pytest.fixture(scope="session")
def aihub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in AI Hub's layout that are read without PyAV.

    Animated PNGs, as what a file is stands in its first bytes.
    """
    root = tmp_path_factory.mktemp("aihub-images")
    write_aihub(root, _write_png)
    return root


def gradients_of(run: Run) -> dict[str, Tensor]:
    return {
        name: parameter.grad.detach().float().cpu()
        for part in run.module.trained.values()
        for name, parameter in part.items()
        if parameter.grad is not None
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    squares = [(found[name] - value).double().square().sum() for name, value in expected.items()]
    norms = [value.double().square().sum() for value in expected.values()]
    return float((torch.stack(squares).sum() / torch.stack(norms).sum()).sqrt())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, "fp16"])
def test_loss_gradients_and_captions_are_those_of_the_cpu(
    name: str,
    overrides_of: Callable[[list[str]], list[str]],  # noqa: F811
    make_run: Callable[[Config], Run],
    record_property: Callable[[str, Any], None],
) -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    overrides = CASES[name][0] if name in CASES else []
    run = make_run(compose(overrides_of([*overrides, "evaluation.tokenizer=whitespace"])))  # which needs no mecab-ko
    captioner = run.module.captioner
    expected, reference = step_and_captions(run, torch.device("cpu"), Counter()), gradients_of(run)
    for parameter in captioner.parameters():
        parameter.grad = None
    captioner.to(DEVICE)
    run.module.trained = trained_parameters(captioner, run.module.plan)
    if name in HALF:
        run.trainer.strategy.precision_plugin = MixedPrecision(HALF[name], DEVICE.type)  # type: ignore[arg-type]
    found = step_and_captions(run, DEVICE, Counter())
    loss = abs(found.numbers[0] / expected.numbers[0] - 1)
    gradients = distance(gradients_of(run), reference)
    same = sum(one == other for one, other in zip(found.captions, expected.captions, strict=True)) / len(
        expected.captions
    )
    for key, value in (("loss", loss), ("gradients", gradients), ("captions", same)):
        record_property(key, value)
    if name in HALF:
        record_property("is_half", True)
    bounds = (limits.HALF_LOSS, limits.HALF_GRADIENTS) if name in HALF else (limits.LOSS, limits.GRADIENTS)
    assert bounds[0].distance(loss) == 0, f"the losses differ by {loss:.2g}"
    assert bounds[1].distance(gradients) == 0, f"the gradients differ by {gradients:.2g}"
    assert same == 1 or name in HALF, "the captions differ"
