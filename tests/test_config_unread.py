"""Of every kind of every group, a key changes something or is refused in a sentence whose fix helps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from tests.test_settings import KEYS, leaves, other
from tests.thinned import thinned
from vlmcap.compose import compose, compose_node, to_config
from vlmcap.config import Config
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config.unread import default_at, unread_keys, value_at
from vlmcap.config_hash import _WITHOUT_EFFECT, config_hash
from vlmcap.config_unread import _SOURCES, check_single_run, check_training, unread_override
from vlmcap.errors import UserError

DATA = "data.root=data/clips"
# Kinds, and states of a kind, in which other keys are read than by default.
STATES: dict[str, list[str]] = {
    "default": [],
    "encoder": ["encoder=siglip2"],
    "any encoder": ["encoder=custom", "encoder.checkpoint=org/tower"],
    "naflex": ["encoder=siglip2_naflex", "llm=qwen3_4b"],
    "tiles": ["encoder=clip", "encoder.tiling=4", "projector.temporal=none", "projector.frame_stack=1"],
    "linear": ["projector=linear"],
    "attention": ["projector=mlp", "projector.temporal=attention"],
    "local and global": ["projector=pixel_shuffle", "projector.temporal=local_global"],
    "pooled": ["projector=mlp", "projector.reducer=pool", "cache.pooled=true"],
    "resampled": ["projector=cross_attention", "projector.reducer=resample"],
    "salient": ["projector=linear", "projector.reducer=saliency", "projector.frame_stack=1"],
    "merged": ["projector=perceiver", "projector.reducer=merge"],
    "prompt": ["projector=cross_attention", "projector.queries=prompt"],
    "abstractor": ["projector=c_abstractor"],
    "projector alone": ["tuning=projector_only"],
    "adapters": ["tuning=lora", "tuning.encoder=lora", "cache.enabled=false"],
    "full": ["tuning=full"],
    "full and encoder": ["tuning=full", "tuning.encoder=lora", "cache.enabled=false"],
    "no first stage": ["tuning.align_epochs=0"],
    "no second stage": ["tuning.align_epochs=2", "tuning.epochs=2"],
    "no adapters": ["tuning=lora", "tuning.adapter_lr=0"],
    **{
        f"data {name}": [f"data={name}", DATA]
        for name in ("aihub", "jsonl", "coco_ko", "nikl", "msrvtt", "vatex", "llava", "webdataset")
    },
    "fps": ["data.sampling=fps", "cache.enabled=false"],
    "augmented": ["data.augment.jitter=0.2", "data.augment.crop=0.1", "cache.enabled=auto", "cache.max_gib=3"],
    "drawn": ["data=jsonl", DATA, "data.splits.random=true"],
    "packed": ["data.batching=packed", "data.max_tokens_per_batch=4096"],
    "by length": ["data.batching=by_length"],
    "in this process": ["data.is_isolated=false"],
    "beams": ["evaluation.num_beams=4"],
    "sampling": ["evaluation.do_sample=true"],
    "transformers": ["evaluation.engine=hf"],
    "vllm": ["evaluation.engine=vllm"],
    "scores": ["evaluation.swap_videos=true", "evaluation.siglip_checkpoint=a/b", "evaluation.bert_checkpoint=c/d"],
    "a GPU": ["hardware=l4", "encoder=siglip2", "llm=qwen3_8b"],
    "an old GPU": ["hardware=t4", "encoder=clip", "llm=vicuna_7b"],
    "devices": ["hardware=l4", "hardware.devices=2", "trainer=ddp"],
    "shards": ["hardware=l4", "hardware.devices=2", "trainer=fsdp2", "llm.quantization=none"],
    "overfit": ["debug=overfit"],
    "short": ["debug=fast"],
    "a Qwen": ["model=qwen3_vl_8b", "hardware=l4"],
    "an EXAONE": ["model=exaone4_5_33b", "hardware=h100"],
    "a LLaVA": ["model=llava_next_video_7b", "hardware=l4"],
    "any model": ["model=custom", "model.checkpoint=org/model", "hardware=l4"],
    **{f"logger {name}": [f"logger={name}"] for name in ("wandb", "mlflow", "trackio", "tensorboard", "none")},
    "unsent": ["logger=wandb", "logger.log_checkpoints=none"],
    "watched": [
        "callbacks.profile.enabled=true",
        "callbacks.visual_reliance.enabled=true",
        "callbacks.early_stopping.enabled=true",
    ],
    "unguarded": ["callbacks.guard.enabled=false"],
    **{f"sweep {name}": [f"sweep={name}"] for name in ("optuna", "halving", "wandb")},
    "unpruned": ["sweep=optuna", "sweep.prune=false"],
    **{f"launcher {name}": [f"launcher={name}"] for name in ("joblib", "submitit", "ray")},
    "near": ["launcher=submitit", "launcher.is_local=true"],
    "a cluster": ["launcher=ray", "launcher.address=auto"],
}
PARTS = 5  # of the keys of a state, each a test of its own
# Values that are right beside others of the same state alone.
_OWN_VALUES = {
    "projector.num_queries": "16",
    "data.batching": "by_length",
    "llm.quantization": "8bit",
    "hardware.accelerator": "cpu",
    "launcher.setup": "[module load cuda]",
}
# Typed texts that mean nothing, and names that are labels.
_LABELS = ("name", "kind")


def changed_node(node: DictConfig, key: str, value: object) -> DictConfig:
    """A copy of a composed configuration with another value, as an override sets it."""
    copy = node.copy()
    OmegaConf.update(copy, key, value)
    return copy


def attempt(node: DictConfig) -> Config | str:
    """The configuration, or why there is none."""
    try:
        return to_config(node)
    except UserError as error:
        return str(error)


def refusal(node: DictConfig) -> str:
    return found if isinstance(found := attempt(node), str) else ""


def changes(node: DictConfig, base: Config) -> Iterator[tuple[str, object, DictConfig]]:
    """Each key of a configuration with another value, and the whole with it."""
    for key, owner, name in leaves(base):
        if name in _LABELS or key.startswith("llm.suggested."):  # not for the command line
            continue
        value = yaml.safe_load(_OWN_VALUES.get(key) or other(key, owner, name, value_at(base, key)))
        yield key, value, changed_node(node, key, value)


@pytest.mark.parametrize(
    ("state", "part"), thinned(itertools.product(STATES, range(PARTS)), lambda case: case == ("default", 0))
)
def test_a_key_is_refused_by_a_sentence_that_is_true_or_changes_the_run(state: str, part: int) -> None:
    node = compose_node(STATES[state])
    base = to_config(node)
    num_read = 0
    for key, value, changed in itertools.islice(changes(node, base), part, None, PARTS):
        config = attempt(changed)
        if not isinstance(config, str):
            is_same = config_hash(config) == config_hash(base)
            is_seen = key.startswith(_WITHOUT_EFFECT) or unread_override(changed, config, [f"{key}=x"])
            assert (
                not is_same
                or is_seen
                or value_at(config, key) == value_at(base, key)
                or key in SAME | CUT.get(state, set())
            ), f"{key}={value} has no effect"
            num_read += 1
        elif " has no effect " in config:
            idle = config.partition("=")[0]  # the key, or one of the state that the key leaves without a reader
            assert idle == key or any(override.startswith(f"{idle}=") for override in STATES[state]), config
            check_fix(changed, idle, config)
        else:
            assert key.rpartition(".")[2] in config or key.partition(".")[0] in config, f"{key}: {config}"
    assert num_read > 80 // PARTS


# Changed by the loop above to a value that comes to the same, or that only another program reads.
SAME = {
    "data.root",  # data=demo makes its own, and train.py refuses another
    "mode",
    "tuning.max_stage_epochs",  # longer than the stages are
    "hardware.attention",
    "model.use_outer_marks",
    "trainer.strategy",  # auto is ddp
    "evaluation.vllm_model",
}
# Stages are cut to two steps, whatever their epochs, so that debug=fast goes with any command.
CUT = {"short": {"tuning.epochs", "tuning.align_epochs"}}


def check_fix(node: DictConfig, key: str, sentence: str) -> None:
    """Whether a refusal is over once its fix is made."""
    assert f"leave {key} out" in sentence, sentence
    found = re.search(r"has no effect without ((?:[\w.]+=\S+ ?)+?)(?:;|$)", sentence)
    if found is None:
        return
    fixed = node
    for setting in found.group(1).split():
        name, _, value = setting.partition("=")
        fixed = changed_node(fixed, name, "some/model" if value == "…" else yaml.safe_load(value))
    left = refusal(fixed)
    assert not (left.startswith(f"{key}=") and " has no effect " in left), f"{sentence}\n  and with that: {left}"


@pytest.mark.slow
def test_every_kind_has_a_state() -> None:
    kinds = {
        (group, getattr(to_config(compose_node(given)), group).kind) for given in STATES.values() for group in SCHEMAS
    }
    wanted = {
        (group, kind)
        for group, found in SCHEMAS.items()
        for kind, schema in found.items()
        if schema.__module__.startswith("vlmcap")
    }
    assert wanted - kinds == {("model", "mrope")}, "as timed_mrope"


@pytest.mark.parametrize("state", thinned(STATES, lambda state: state == "default"))
def test_a_default_that_is_spelled_out_is_no_mistake(state: str) -> None:
    node = compose_node(STATES[state])
    config = to_config(node)
    for key in unread_keys(config):
        assert refusal(changed_node(node, key, value_at(config, key))) == ""
        assert unread_override(node, config, [f"{key}={default_at(config, key)}"]) == ""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["hardware.num_frames=4", "data.num_frames=8"],
            "hardware.num_frames=4 has no effect beside data.num_frames=8",
        ),
        (
            ["hardware.frame_stack=4", "projector=perceiver"],
            "hardware.frame_stack=4 has no effect beside projector.frame_stack=1",
        ),
        (
            ["hardware.frame_stack=4", "model=qwen3_vl_8b"],
            "hardware.frame_stack=4 has no effect with projector=native",
        ),
        (
            ["hardware.image_size=64", "encoder=siglip2_naflex"],
            "hardware.image_size=64 has no effect with encoder=siglip2_naflex",
        ),
        (
            ["hardware.quantization=8bit", "llm.quantization=none"],
            "hardware.quantization=8bit has no effect beside llm.quantization=none",
        ),
        (
            ["hardware.batch_size=4", "data.batching=packed", "data.max_tokens_per_batch=400"],
            "hardware.batch_size=4 has no effect",
        ),
        (
            ["data.batch_size=1", "data.batching=packed", "data.max_tokens_per_batch=400"],
            "data.batch_size=1 has no effect beside",
        ),
        (
            ["encoder=siglip2", "encoder.is_cached=true", "cache.enabled=false"],
            "encoder.is_cached=true has no effect beside",
        ),
        (["data.root=mine"], "data.root=mine has no effect in data=demo"),
        (["hardware.num_frames=8", "data.num_frames=8"], ""),
        (["hardware.frame_stack=1", "projector=perceiver"], ""),
        (["hardware.frame_stack=1", "model=qwen3_vl_8b"], ""),
        (["hardware=l4", "data.num_frames=4"], ""),
        (["data.root=unset"], ""),
        (["debug=overfit", "data.batching=packed", "data.max_tokens_per_batch=400"], ""),
    ],
)
def test_what_is_there_to_be_followed_needs_a_follower(overrides: list[str], expected: str) -> None:
    if not expected:
        compose(overrides)
        return
    with pytest.raises(UserError, match=f"^{re.escape(expected)}"):
        compose(overrides)


def test_every_value_of_the_hardware_is_read_or_followed() -> None:
    followed = {key for key in _SOURCES if key.startswith("hardware.")}
    assert followed <= {key for key, _, _ in KEYS}


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["sweep.budget_h=4"], "sweep.budget_h=4"),
        (["sweep=optuna", "sweep.n_trials=3"], "sweep.n_trials=3"),
        (["sweep=optuna"], "sweep=optuna"),
        (["launcher=basic", "launcher=joblib"], "launcher=joblib"),
        (["launcher=submitit", "++launcher.is_local=true"], "++launcher.is_local=true"),
        (["sweep=default", "launcher=basic", "sweep.resume=false"], ""),
    ],
    ids=["a key", "the last one first", "a group", "the group that counts", "with signs", "defaults"],
)
def test_a_single_run_refuses_what_a_sweep_reads(overrides: list[str], refused: str) -> None:
    config = compose(overrides)
    if not refused:
        check_single_run(overrides, config)
        return
    with pytest.raises(UserError, match=re.escape(f"{refused} has no effect without -m")):
        check_single_run(overrides, config)


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        (["data.split=val"], True),
        (["data.split=test"], False),
        (["data=coco_ko", "data.root=x", "data.split=test"], True),
        (["data=coco_ko", "data.root=x"], False),
        (["trainer.overfit=true", "evaluation.max_final_clips=3"], True),
        (["evaluation.max_final_clips=3"], False),
    ],
)
def test_training_refuses_what_evaluation_reads(overrides: list[str], is_refused: bool) -> None:
    config = compose(overrides)
    if not is_refused:
        check_training(overrides, config)
        return
    with pytest.raises(UserError, match=rf"{re.escape(overrides[-1])} has no effect"):
        check_training(overrides, config)
