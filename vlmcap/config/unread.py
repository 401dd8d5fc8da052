"""Settings that change nothing beside the others, each refused with a sentence that says why.

One that passed would mislead a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from vlmcap.config.checks import as_text
from vlmcap.config.choices import EncoderTuning, Engine, Precision, Strategy
from vlmcap.config.model import LlavaNextVideoConfig, Qwen2VlConfig, Qwen3VlConfig, Qwen25VlConfig
from vlmcap.config.projector import NativeProjectorConfig
from vlmcap.config.tuning import FullConfig, TwoStageConfig

Run = Any
"""A `Config`, whose module needs this one."""


class UnreadError(ValueError):
    """A setting that changes nothing.

    Args:
        key: Dotted key.
        default: Value that stands for "not set".
        sentence: What is wrong and how to fix it.
    """

    def __init__(self, key: str, default: Any, sentence: str) -> None:
        super().__init__(sentence)
        self.key, self.default = key, default


@dataclass(frozen=True, slots=True)
class _Rule:
    """Keys that are read only beside certain values of other groups.

    Attributes:
        keys: Dotted keys, or beginnings that end with a dot.
        is_read: The run's configuration -> whether they are read.
        why: What follows "changes nothing", with `{key}` for the key; it ends with the fix.
        setting: In place of `why`, the one setting of another group without which nothing reads them.
    """

    keys: tuple[str, ...]
    is_read: Callable[[Run], bool]
    why: str = ""
    setting: str = ""


_LORA = "tuning.lora."
_GENERATED = ("evaluation.clips_per_slot", "evaluation.speculate_ngram", "evaluation.engine", "evaluation.cuda_graphs")
_SECOND_STAGE = ("tuning.projector_lr", "tuning.adapter_lr", "tuning.encoder", "tuning.encoder_lr", _LORA)


def _has_encoder_lora(run: Run) -> bool:
    return run.tuning.encoder_tuning is EncoderTuning.lora


def _has_second_stage(run: Run) -> bool:
    return not isinstance(run.tuning, TwoStageConfig) or run.tuning.epochs > run.tuning.align_epochs


def _is_one_process(run: Run) -> bool:
    return bool(run.hardware.devices * run.trainer.num_nodes == 1)


_RULES = (
    _Rule(
        ("data.batch_size",),
        lambda run: run.data.max_tokens_per_batch is None,
        "beside data.max_tokens_per_batch, which says how large batches are; leave {key} out, or set "
        "data.max_tokens_per_batch=null",
    ),
    _Rule(
        ("trainer.shrink_on_oom",),
        lambda run: run.data.batch_size > 1 and run.data.max_tokens_per_batch is None,
        "where no batch can shrink; set data.batch_size above 1 without data.max_tokens_per_batch, or leave {key} out",
    ),
    _Rule(
        ("trainer.shrink_on_oom",),
        _is_one_process,
        "with several processes, as one alone may start again; set hardware.devices=1 and trainer.num_nodes=1, or "
        "leave {key} out",
    ),
    _Rule(
        ("trainer.strategy",),
        lambda run: run.trainer.strategy is Strategy.fsdp2 or not _is_one_process(run),
        "with one process; set hardware.devices or trainer.num_nodes above 1, or leave {key} out",
    ),
    _Rule(
        ("plan.enforce",),
        lambda run: run.hardware.accelerator != "cpu" and run.trainer.strategy is not Strategy.fsdp2,
        "on a CPU and with trainer=fsdp2, where a run is not planned; leave {key} out",
    ),
    _Rule(
        ("hardware.offload_checkpoints",),
        lambda run: run.hardware.accelerator != "cpu",
        "on a CPU, whose memory is the host's; leave {key} out",
    ),
    _Rule(
        ("callbacks.guard.fp16_skips",),
        lambda run: run.hardware.precision is Precision.fp16,
        setting="hardware.precision=fp16",
    ),
    _Rule(
        _GENERATED,
        lambda run: (
            run.evaluation.engine is Engine.vllm
            or not isinstance(run.model, Qwen2VlConfig | Qwen25VlConfig | Qwen3VlConfig)
        ),
        "in a Qwen-VL model, whose captions transformers writes; leave {key} out",
    ),
    _Rule(
        ("evaluation.merge_adapters",),
        lambda run: run.tuning.use_lora and run.llm.quantization.value == "none",
        "without adapters on unquantised weights; set tuning=lora and llm.quantization=none as well, or leave {key} "
        "out",
    ),
    _Rule(
        ("evaluation.cuda_graphs",),
        lambda run: run.hardware.accelerator != "cpu",
        "on a CPU; leave {key} out",
    ),
    _Rule(
        ("encoder.max_patches",),
        lambda run: not isinstance(run.model, LlavaNextVideoConfig),
        "in LLaVA-NeXT-Video, whose frames have one size; leave {key} out",
    ),
    _Rule(
        ("projector.checkpoint",),
        lambda run: not isinstance(run.projector, NativeProjectorConfig),
        "in a pretrained VLM, which brings its own projector; leave {key} out",
    ),
    _Rule(
        ("tuning.align_lr",),
        lambda run: not isinstance(run.tuning, TwoStageConfig) or run.tuning.align_epochs > 0,
        "without a first stage; set tuning.align_epochs to at least 1, or leave {key} out",
    ),
    _Rule(
        _SECOND_STAGE,
        _has_second_stage,
        "without a second stage; set tuning.epochs above tuning.align_epochs, or leave {key} out",
    ),
    _Rule(
        (_LORA,),
        lambda run: not isinstance(run.tuning, FullConfig) or _has_encoder_lora(run),
        "in tuning=full without tuning.encoder=lora; set that as well, or leave {key} out",
    ),
    _Rule(
        (f"{_LORA}target_modules", f"{_LORA}use_experts"),
        lambda run: not isinstance(run.tuning, FullConfig),
        "in tuning=full, where adapters are on the encoder alone and on all its linear layers; leave {key} out",
    ),
    _Rule(
        (_LORA,),
        lambda run: getattr(run.tuning, "adapter_lr", 1.0) > 0 or _has_encoder_lora(run),
        "where tuning.adapter_lr=0 trains no adapter; set tuning.adapter_lr above 0, or leave {key} out",
    ),
)


def check_unread(run: Run) -> None:
    """Raises an `UnreadError` for a value that is not the default although nothing reads it."""
    for path, owner, known in _leaves("", run):
        why = _why_unread(run, path, owner, known)
        if why is None:
            continue
        value, default = getattr(owner, known.name), _default(run, known)
        # The schema's own value stands for "not set" too, as in the one clip a batch of debug=overfit.
        if value not in (default, known.default):
            raise UnreadError(path, default, f"{path}={as_text(value)} changes nothing {why.format(key=path)}")


def unread_keys(run: Run, *, that_follow: bool = False) -> dict[str, str]:
    """The keys that nothing reads beside the other values, and why, whatever their own values are.

    Args:
        run: The run's configuration.
        that_follow: Whether only keys count that follow others, and so have values of many kinds although they are not
            set.
    """
    leaves = [leaf for leaf in _leaves("", run) if not that_follow or "follows" in leaf[2].metadata]
    found = {path: _why_unread(run, path, owner, known) for path, owner, known in leaves}
    return {path: why.format(key=path) for path, why in found.items() if why is not None}


def _why_unread(run: Run, path: str, owner: Any, known: Field[Any]) -> str | None:
    """What follows "changes nothing"; None where something reads the field."""
    rule = next((rule for rule in _RULES if _is_meant(path, rule.keys) and not rule.is_read(run)), None)
    if rule is not None and rule.why:  # what another group rules out, no setting of its own group would help
        return rule.why
    needed = [] if rule is None else [rule.setting]
    if (is_read := known.metadata.get("is_read")) is not None and not is_read(owner):
        group = path.rpartition(".")[0]
        needed = [*(f"{group}.{one}" for one in known.metadata["setting"].split()), *needed]
    return f"without {' '.join(needed)}; set that as well, or leave {{key}} out" if needed else None


def _is_meant(path: str, keys: tuple[str, ...]) -> bool:
    return any(path.startswith(key) if key.endswith(".") else path == key for key in keys)


def _default(run: Run, known: Field[Any]) -> Any:
    """The value that the field has when it is not set."""
    source = known.metadata.get("follows", "").removeprefix("${").removesuffix("}")
    if source and "${" not in source and "}" not in source:
        return value_at(run, source)
    factory: Any = known.default_factory
    return factory() if known.default is MISSING else known.default


def default_at(run: Run, key: str) -> Any:
    """The value that a dotted key has when it is not set; None where there is no such key."""
    return next((_default(run, known) for path, _, known in _leaves("", run) if path == key), None)


def value_at(run: Run, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    value = run
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _leaves(prefix: str, values: Any) -> Iterator[tuple[str, Any, Field[Any]]]:
    """Dotted key, dataclass and field of every value below a dataclass."""
    for known in fields(values):
        value, path = getattr(values, known.name), f"{prefix}{known.name}"
        if is_dataclass(value) and not isinstance(value, type):
            yield from _leaves(f"{path}.", value)
        else:
            yield path, values, known
