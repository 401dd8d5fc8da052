"""What features cannot be kept of is refused in words, and `cache.enabled=auto` goes by what a run costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests import assembling
from vlmcap.assembly.cache_choice import num_visits
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.model import Assembly
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.training.run import train
from vlmcap.types import Batch


def assembled(config: Config) -> Assembly:
    return assembling.assembled(config, load_splits(config, list(Split)))


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["data.sampling=random"], ["data.sampling=random", "cache.enabled=true"]),
        (["data.augment.color=0.2"], ["data.augment.color=0.2", "cache.enabled=true"]),
        (["data.augment.crop=0.1"], ["data.augment.crop=0.1", "cache.enabled=true"]),
        (["data.augment.jitter=0.5"], ["data.augment.jitter=0.5", "cache.enabled=true"]),
        (["tuning.encoder=lora"], ["tuning.encoder=lora", "cache.enabled=true"]),
        (["cache.pooled=true", "projector.reducer=resample"], ["cache.pooled=true", "projector.reducer=resample"]),
        (["cache.enabled=perhaps"], ["cache.enabled must be true, false or auto, not perhaps"]),
    ],
)
def test_what_cannot_be_kept_is_refused_by_both_keys(overrides: list[str], keys: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(["cache.enabled=true", *overrides])
    assert all(key in str(caught.value) for key in keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["data.sampling=random", "tuning.encoder=lora"])
def test_auto_leaves_out_what_cannot_be_kept(
    override: str, real_path: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assembly = assembled(compose([*real_path, "cache.enabled=auto", override]))
    assert assembly.features is None
    assert assembly.captioner.encoder is not None
    lines = [line for line in capsys.readouterr().out.splitlines() if "auto" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"cache.enabled=auto: off, because {override} ")


def test_auto_is_decided_by_the_costs_of_this_run(real_path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Decoding costs more than reading 2 kB, so a hundred epochs pay; a full disk or a limit forbid it."""
    config = compose([*real_path, "cache.enabled=auto", "tuning.epochs=101"])
    assembly = assembled(config)
    assert assembly.features is not None
    assert "cache.enabled=auto: on, because " in capsys.readouterr().out
    limited = assembled(compose([*real_path, "cache.enabled=auto", "tuning.epochs=101", "cache.max_gib=1e-6"]))
    assert limited.features is None
    assert "cache.max_gib allows" in capsys.readouterr().out


def test_the_costs_count_every_epoch_and_evaluation() -> None:
    base = ["tuning.align_epochs=1", "tuning.epochs=4", "evaluation.every_n_epochs=2", "evaluation.max_clips=10"]
    sizes = {"train": 100, "val": 30, "test": 20}
    assert num_visits(compose(base), sizes) == 4 * 100 + 2 * 10 + 30 + 20
    steps = [*base, "trainer.max_steps=5", "data.batch_size=4", "trainer.accumulate_grad_batches=2"]
    assert num_visits(compose(steps), sizes) == 5 * 4 * 2 + 30 + 20
    assert num_visits(compose(base), {"test": 20}) == 20, "an evaluation is one pass"


def test_a_run_encodes_as_many_clips_as_are_counted(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "cache.enabled=false", "tuning.align_epochs=1", "tuning.epochs=2")
    encoded = 0
    encode = VideoCaptioner.encode

    def count(self: VideoCaptioner, batch: Batch) -> Tensor:
        nonlocal encoded
        encoded += len(batch) if batch.features is None else 0
        return encode(self, batch)

    monkeypatch.setattr(VideoCaptioner, "encode", count)
    train(config)
    sizes = {split: len(clips) for split, clips in load_splits(config, list(Split)).items()}
    assert set(sizes) == {"train", "val", "test"}
    assert encoded == num_visits(config, sizes)
