"""A checkpoint's configuration with overrides: its own kinds count, and what only training reads is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_settings import KEYS, recorded_reads
from vlmcap.cli import caption
from vlmcap.compose import compose, to_plain
from vlmcap.config import Config
from vlmcap.config.unread import unread_keys
from vlmcap.config_saved import _READ, _READ_OF_LORA, _TRAINING_ONLY, override_values, saved_config
from vlmcap.errors import UserError
from vlmcap.training.checkpoints.load import read_checkpoint
from vlmcap.training.run import evaluate, train

MakeConfig = Callable[..., Config]


def saved(trained: list[str], overrides: list[str]) -> Config:
    """What `evaluate.py` makes of the overrides for the checkpoint of a run."""
    return saved_config(to_plain(compose(trained)), override_values(overrides))


@pytest.mark.parametrize(
    "override",
    [
        *(
            "tuning.epochs=3",
            "tuning.adapter_lr=1",
            "tuning.lora.dropout=0.5",
            "tuning=lora",
            "optim.weight_decay=1",
            "optim=adamw_fused",
        ),
        *(
            "trainer.max_steps=3",
            "trainer.requeue=true",
            "trainer=ddp",
            "data.batch_size=3",
            "data.augment.crop=0.1",
            "data.max_clips=3",
        ),
        *(
            "hardware.batch_size=3",
            "hardware.num_frames=3",
            "hardware.gradient_checkpointing=true",
            "hardware.devices=2",
        ),
        *(
            "evaluation.max_clips=3",
            "evaluation.every_n_epochs=3",
            "monitor=val/loss",
            "mode=min",
            "projector.checkpoint=x",
        ),
        *(
            "callbacks.guard.window=3",
            "callbacks.early_stopping.enabled=true",
            "sweep.budget_h=3",
            "launcher=joblib",
            "plan.enforce=off",
        ),
        *("experiment=recommended_l4", "debug=fast", "paths.overwrite=true"),
    ],
)
def test_what_only_training_reads_is_refused_by_name(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"^{re.escape(key)}\S* has no effect on a checkpoint, .*leave {re.escape(key)} out$"
    ):
        saved([], [override])


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.split=val"],
        ["evaluation.num_beams=3"],
        ["evaluation.max_final_clips=3"],
        ["data.split=train", "data.max_clips=3"],
        ["data=aihub", "data.root=clips"],
        ["hardware=l4"],
        ["tuning.lora.alpha=3"],
        ["callbacks.visual_reliance.enabled=true"],
        ["trainer.progress_bar=false"],
        ["tuning=demo", "tuning.epochs=18", "optim=adamw", "trainer.max_steps=-1", "data.batch_size=16"],
    ],
    ids=" ".join,
)
def test_what_an_evaluation_reads_or_the_checkpoint_has_is_taken(overrides: list[str]) -> None:
    assert isinstance(saved([], overrides), Config)


@pytest.mark.parametrize(
    ("trained", "override"),
    [
        (["data=jsonl", "data.root=a"], "data.annotations=test.jsonl"),
        (["encoder=siglip2_naflex", "llm=qwen3_4b"], "encoder.max_patches=64"),
        (["logger=wandb"], "logger.project=other"),
        (["model=qwen3_vl_8b"], "model.revision=main"),
        (["projector=perceiver"], "projector.num_queries=64"),
    ],
)
def test_the_keys_are_those_of_the_checkpoints_kinds(trained: list[str], override: str) -> None:
    key, _, value = override.partition("=")
    group, name = key.split(".")
    assert str(getattr(getattr(saved(trained, [override]), group), name)) == value
    with pytest.raises(UserError, match=rf"'{name}' is not a key of this {group}, only of {group}="):
        saved([], [override])


@pytest.mark.slow
def test_what_an_override_leaves_without_a_reader_is_as_if_it_had_not_been_set() -> None:
    sampled = ["evaluation.do_sample=true", "evaluation.top_k=5"]
    assert saved(sampled, ["evaluation.do_sample=false"]).evaluation.top_k == 50
    assert saved(["evaluation.clips_per_slot=8"], ["evaluation.num_beams=3"]).evaluation.clips_per_slot == 4
    assert saved(["evaluation.engine=hf"], ["evaluation.num_beams=3"]).evaluation.engine.name == "native"
    several = ["hardware=l4", "hardware.devices=2", "trainer=ddp", "encoder=siglip2", "llm=qwen3_4b"]
    assert saved(several, ["hardware=cpu"]).trainer.strategy.name == "auto"
    with pytest.raises(UserError, match=r"^evaluation\.top_k=7 has no effect without evaluation\.do_sample=true"):
        saved(sampled, ["evaluation.do_sample=false", "evaluation.top_k=7"])


def test_a_base_that_has_moved_has_no_revision() -> None:
    trained = ["encoder=siglip2", "encoder.revision=abc"]
    assert saved(trained, ["data.split=val"]).encoder.revision == "abc"
    moved = saved(trained, ["encoder.checkpoint=here/tower"]).encoder
    assert (moved.revision, moved.name) == (None, "siglip2")


@pytest.mark.parametrize(
    "override",
    ["data.root=x", "evaluation.tokenizer=char", "logger=wandb", "seed=3", "data.split=val", "cache.enabled=true"],
)
def test_captioning_refuses_what_it_does_not_read(override: str) -> None:
    with pytest.raises(UserError, match=r"has no effect in vlmcap caption; leave"):
        override_values([override], program="vlmcap caption", read=caption._READ)
    assert override_values(["evaluation.num_beams=3", "hardware=l4"], program="vlmcap caption", read=caption._READ)


def is_of_training(key: str) -> bool:
    return key.startswith(tuple(_TRAINING_ONLY)) and not key.startswith((*_READ, *_READ_OF_LORA))


@pytest.mark.slow
def test_an_evaluation_reads_what_it_takes(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "trainer.max_steps=1")
    train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = saved_config(read_checkpoint(checkpoint)["vlmcap"]["config"], {"paths.output_dir": str(tmp_path / "again")})
    with recorded_reads() as reads:
        evaluate(again, checkpoint)
    taken = [
        (key, owner, name) for key, owner, name in KEYS if not is_of_training(key) and key not in unread_keys(again)
    ]
    assert {key for key, owner, name in taken if (owner.__name__, name) not in reads} <= READ_ELSEWHERE
    assert len(taken) > 70


# Read where captions are scored by models, by programs around an evaluation, or of records; and what decides which demo
# it is.
READ_ELSEWHERE = {
    *(
        "model.name",
        "model.kind",
        "encoder.name",
        "encoder.license",
        "projector.name",
        "llm.name",
        "llm.license",
        "data.name",
        "data.kind",
    ),
    *(
        "llm.suggested.align_lr",
        "llm.suggested.projector_lr",
        "llm.suggested.adapter_lr",
        "llm.suggested.lora_dropout",
        "llm.suggested.reducer",
        "hardware.name",
    ),
    *(
        "data.max_clips",
        "data.decode_memory_gib",
        "data.demo.num_train",
        "data.demo.num_val",
        "data.demo.num_test",
        "data.demo.seed",
        "checkpoint",
    ),
}
