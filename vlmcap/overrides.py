"""Reads overrides as users type them: quotes values that Hydra cannot parse, and explains keys of other programs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from vlmcap.config.kinds import SCHEMAS
from vlmcap.config_joined import check_names
from vlmcap.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_RATES = (
    "this is the rate of the adapters; tuning.projector_lr is that of the projector, and tuning.align_lr that of the "
    "first stage of two_stage"
)
_EPOCHS = "of these, tuning.align_epochs are the first stage of tuning=two_stage"
_QUANTIZATION = "llm.quantization"

# Keys of Lightning, Hydra, transformers and lightning-hydra-template, with the override to use instead and a note. If
# the override ends in "=", the typed value is appended. A key whose last name exists here, such as `trainer.precision`,
# needs no entry.
HINTS: dict[str, tuple[str, str]] = {
    name: (instead, more)
    for names, instead, more in (
        (
            "lr learning_rate base_lr optim.lr optim.learning_rate optimizer.lr optimizer.learning_rate trainer.lr "
            "trainer.learning_rate model.lr model.learning_rate tuning.lr tuning.learning_rate tuning.lora.lr train.lr "
            "train.learning_rate llm.lr llm.adapter_lr model.adapter_lr llm.suggested.adapter_lr",
            "tuning.adapter_lr=",
            _RATES,
        ),
        (
            "epochs max_epochs num_epochs n_epochs num_train_epochs trainer.epochs trainer.max_epochs "
            "trainer.num_epochs trainer.num_train_epochs train.epochs train.max_epochs training.epochs "
            "tuning.max_epochs data.epochs optim.epochs data.tune_epochs",
            "tuning.epochs=",
            _EPOCHS,
        ),
        ("llm.projector_lr model.projector_lr llm.suggested.projector_lr projector.lr", "tuning.projector_lr=", ""),
        ("llm.align_lr model.align_lr llm.suggested.align_lr", "tuning.align_lr=", ""),
        ("llm.suggested.reducer llm.reducer", "projector.reducer=", ""),
        ("data.align_epochs", "tuning.align_epochs=", ""),
        ("warmup_ratio optim.warmup_ratio trainer.warmup_ratio", "tuning.warmup_ratio=", ""),
        ("objective metric data.monitor callbacks.early_stopping.monitor trainer.monitor", "monitor=", ""),
        ("objective_mode callbacks.early_stopping.mode", "mode=", ""),
        ("data.format", "data=", ""),
        (
            "data.eval_every_n_epochs trainer.check_val_every_n_epoch check_val_every_n_epoch",
            "evaluation.every_n_epochs=",
            "",
        ),
        (
            "batch_size bs train_batch_size per_device_train_batch_size trainer.batch_size "
            "trainer.per_device_train_batch_size train.batch_size training.batch_size data.train_batch_size data.bs "
            "dataloader.batch_size datamodule.batch_size",
            "data.batch_size=",
            "",
        ),
        (
            "eval_batch_size val_batch_size per_device_eval_batch_size trainer.eval_batch_size data.val_batch_size",
            "data.eval_batch_size=",
            "",
        ),
        (
            "ckpt ckpt_path checkpoint_path resume resume_from resume_from_checkpoint trainer.ckpt_path "
            "trainer.checkpoint trainer.resume trainer.resume_from_checkpoint model.ckpt_path paths.checkpoint "
            "paths.ckpt_path",
            "checkpoint=",
            "",
        ),
        (
            "num_frames n_frames nframes frames data.frames data.n_frames encoder.num_frames model.num_frames",
            "data.num_frames=",
            "",
        ),
        (
            "output_dir out_dir output save_dir log_dir run_dir default_root_dir trainer.default_root_dir "
            "trainer.output_dir trainer.save_dir paths.output paths.out_dir paths.log_dir paths.root_dir "
            "logger.save_dir",
            "paths.output_dir=",
            "",
        ),
        ("cache_dir", "paths.cache_dir=", ""),
        (
            "data_dir data_root data_path root dataset_path data.dir data.path data.data_dir paths.data_dir "
            "paths.data_root",
            "data.root=",
            "",
        ),
        ("dataset datamodule", "data=", ""),
        ("optimizer", "optim=", ""),
        ("vision_encoder vision_tower image_encoder", "encoder=", ""),
        ("language_model lm llm_name", "llm=", ""),
        ("connector adapter mm_projector", "projector=", ""),
        ("model_name_or_path model_name model_id model.name_or_path llm.name_or_path llm.path", "llm.checkpoint=", ""),
        (
            "gradient_accumulation_steps trainer.gradient_accumulation_steps accumulation_steps grad_accum",
            "trainer.accumulate_grad_batches=",
            "",
        ),
        ("fast_dev_run trainer.fast_dev_run", "debug=fast", "two steps of everything"),
        ("overfit_batches trainer.overfit_batches", "debug=overfit", "data.max_clips is the number of clips"),
        ("limit_train_batches trainer.limit_train_batches", "data.max_clips=", "clips, not batches"),
        ("limit_val_batches trainer.limit_val_batches", "evaluation.max_clips=", "clips, not batches"),
        ("limit_test_batches trainer.limit_test_batches", "evaluation.max_final_clips=", "clips, not batches"),
        ("gradient_clip_val trainer.gradient_clip_val max_grad_norm clip_grad grad_clip", "optim.max_grad_norm=", ""),
        ("gpus num_gpus n_gpus trainer.gpus num_processes nproc_per_node", "hardware.devices=", ""),
        ("nodes nnodes trainer.nodes", "trainer.num_nodes=", ""),
        ("lora_r lora.r lora.rank tuning.lora.r tuning.lora_r tuning.rank", "tuning.lora.rank=", ""),
        ("lora_alpha lora.alpha tuning.lora.lora_alpha tuning.lora_alpha", "tuning.lora.alpha=", ""),
        ("lora_dropout lora.dropout tuning.lora.lora_dropout", "tuning.lora.dropout=", ""),
        ("load_in_4bit llm.load_in_4bit", f"{_QUANTIZATION}=4bit", ""),
        ("load_in_8bit llm.load_in_8bit", f"{_QUANTIZATION}=8bit", ""),
        ("bf16 trainer.bf16", "hardware.precision=bf16", ""),
        ("fp16 trainer.fp16", "hardware.precision=fp16", ""),
        ("random_seed trainer.seed", "seed=", ""),
        ("project_name wandb.project", "logger.project=", ""),
        ("hydra/launcher=joblib", "launcher=joblib", ""),
        ("hydra/launcher=submitit_slurm hydra/launcher=submitit", "launcher=submitit", ""),
        ("hydra/launcher=submitit_local", "launcher=submitit launcher.is_local=true", ""),
        ("hydra/launcher=ray hydra/launcher=ray_aws", "launcher=ray", ""),
        ("hydra/launcher", "launcher=", "one of basic, joblib, submitit and ray"),
        ("hydra/sweeper=optuna", "sweep=optuna", ""),
        ("hydra/sweeper", "sweep=", "one of default, optuna, halving and wandb"),
    )
    for name in names.split()
}
_PLUGINS = {"hydra.sweeper.": "sweep", "hydra.launcher.": "launcher"}  # keys of Hydra's own plugins
# Choices of conf/train.yaml.
_DEFAULT_KINDS = {"tuning": "two_stage", "logger": "csv", "sweep": "grid", "launcher": "basic", "llm": "tiny"}
_KINDS_OF_FILES = {"default": "grid", "demo": "two_stage"}  # files whose name is not their kind
# Learning rates to suggest if a kind of tuning lacks the typed one.
_LIKE = {"adapter_lr": ("llm_lr", "projector_lr"), "align_lr": ("projector_lr",)}
_NOTHING = ("experiment=null", "debug=null")  # the defaults, which Hydra does not accept as overrides
_LEFT_TO_HYDRA = ("hydra/launcher=basic", "hydra/sweeper=basic")  # accepted by Hydra itself


def read_overrides(arguments: Sequence[str], *, is_sweep: bool = False, command: str = "") -> list[str]:
    """Returns overrides in Hydra's grammar; values that Hydra cannot parse are quoted as text.

    Args:
        arguments: Overrides as typed, such as `data.root=~/도심 (1)`.
        is_sweep: Whether several values are allowed; elements of `a,b` and `choice(a,b)` are then quoted one by one.
        command: Command line with `-m`, which allows several values; empty if there is none.

    Raises:
        UserError: A key belongs to another program, or a key has several values outside of a sweep.
    """
    arguments = [argument for argument in arguments if argument not in _NOTHING]
    for argument in arguments:
        if hint := foreign_key(argument, arguments):
            raise UserError(hint)
        key, _, value = argument.partition("=")
        if key == "encoder":
            check_names(value)
        if f"{key_of(key)}.".startswith("encoder.join."):
            raise UserError(
                f"{key} cannot be set on the command line; set encoder=[NAME,NAME], and change values of the second "
                "encoder in its own file under conf/encoder/"
            )
        if key in SCHEMAS and value in ("null", ""):
            raise UserError(
                f"{key}={value} is the name of no component; choose one that `python train.py --help` lists, or leave "
                f"{key} out"
            )
    texts = [_in_grammar(argument, is_sweep=is_sweep) for argument in arguments]
    for argument, text in zip(arguments, texts, strict=True):
        override = _parsed(text)
        if not is_sweep and override is not None and override.is_sweep_override():
            raise UserError(_several_values(argument, override, command))
    return texts


def key_of(override: str) -> str:
    """Returns the key of an override, without the prefixes `+` and `~` and without a package."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def foreign_key(override: str, beside: Sequence[str] = ()) -> str:
    """Returns a sentence that names the key to use for one of Lightning, Hydra or transformers; "" for any other key.

    Args:
        override: Override as typed.
        beside: The other overrides, whose choices the key must fit.
    """
    key, _, value = override.lstrip("+~").partition("=")
    key = key.partition("@")[0]
    if f"{key}={value}" in _LEFT_TO_HYDRA:
        return ""
    # 1. The key to use instead, by the table or by the prefix of a plugin of Hydra.
    instead, more = HINTS.get(f"{key}={value}") or HINTS.get(key) or ("", "")
    for prefix, group in _PLUGINS.items():
        name = key.removeprefix(prefix)
        if name != key and name.partition(".")[0] not in ("_target_", "params", "max_batch_size"):
            names = sorted({field.name for schema in SCHEMAS[group].values() for field in fields(schema)} - {"kind"})
            instead = (
                f"{group}.{name}=" if name in names else f"one of {', '.join(f'{group}.{known}' for known in names)}"
            )
    if not instead:
        return ""
    # 2. The same for the chosen kinds, which may lack that key.
    fitting, choice = _fitting(instead, beside)
    override = shell_quoted(fitting + value) if fitting.endswith("=") else fitting
    more = more if fitting == instead and not choice else ""
    return f"there is no key '{key}' here: set {choice}{override}{f' ({more})' if more else ''}"


def _fitting(instead: str, beside: Sequence[str]) -> tuple[str, str]:
    """Returns the key that fits the chosen kinds, and a choice to prepend if the chosen kind has no such key."""
    group, dot, name = instead.removesuffix("=").partition(".")
    if not dot or not instead.endswith("=") or group not in _DEFAULT_KINDS:
        return instead, ""
    chosen = _DEFAULT_KINDS[group]
    for override in beside:
        if key_of(override) == group:
            chosen = override.partition("=")[2]
    if group == "llm":  # the tiny model's file has settings that do not suit another checkpoint
        return instead, "llm=custom " if chosen == _DEFAULT_KINDS[group] and name == "checkpoint" else ""
    if (kind := SCHEMAS[group].get(_KINDS_OF_FILES.get(chosen, chosen))) is None:  # a file of the user
        return instead, ""
    for one in (name, *_LIKE.get(name, ())):
        if one.partition(".")[0] in (field.name for field in fields(kind)) and not (
            one.startswith("lora.") and chosen == "full"
        ):
            return f"{group}.{one}=", ""
    able = (
        other
        for other, schema in SCHEMAS[group].items()
        if name.partition(".")[0] in (field.name for field in fields(schema))
    )
    preferred = {"tuning.lora": "lora", "logger.project": "wandb"}.get(f"{group}.{name.partition('.')[0]}") or next(
        able
    )
    return instead, f"{group}={preferred} "


def quoted(text: object) -> str:
    """Quotes a value, and escapes quotes and backslashes for Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(str(text), Quote.single).with_quotes()


def sweep_values(override: Override) -> list[str]:
    """Returns the values of a sweep in the form of an override; quotes that Hydra has dropped are restored."""
    # Characters that Hydra's grammar escapes, such as "a\,b".
    escaped = re.compile(r"\\([\\()\[\]{}:=, \t])")
    values = override.sweep_string_iterator()
    return [value if not value or _is_value(value) else quoted(escaped.sub(r"\1", value)) for value in values]


def shell_quoted(argument: str) -> str:
    """Quotes an argument for a shell, in double quotes if it contains single ones."""
    # In double quotes, shells still interpret these characters.
    return f'"{argument}"' if "'" in argument and not re.search(r'["$`\\!]', argument) else shlex.quote(argument)


@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _parsed(override: str) -> Override | None:
    """Parses an override with Hydra; returns None if that fails."""
    from hydra.errors import HydraException

    try:
        parsed: Override = _parser().parse_override(override)
    except HydraException:
        return None
    return parsed


def _is_value(text: str) -> bool:
    return bool(text.strip()) and _parsed(f"key={text}") is not None


def _in_grammar(override: str, *, is_sweep: bool) -> str:
    """Returns the override with its value quoted if Hydra cannot parse it."""
    key, equals, value = override.partition("=")
    if not equals or not value.strip() or _is_value(value):
        return override
    if is_sweep:
        elements = _elements(value, _quoted_sweep)
        return f"{key}={','.join(elements)}" if all(elements) else override  # Hydra reports an empty element
    return f"{key}={_quoted_value(value)}"


def _elements(text: str, element: Callable[[str], str]) -> list[str]:
    """Splits text at commas outside of quotes, brackets and calls, and applies `element` to what cannot be parsed."""
    # Pieces are joined until they are a value or close what they open: "[1" and "2]" are one element.
    pieces, elements = text.split(","), []
    start = 0
    while start < len(pieces):
        ends = range(start + 1, len(pieces) + 1)
        one = (
            (end, element_text)
            for end in ends
            if _is_value(element_text := ",".join(pieces[start:end])) or _is_closed(element_text)
        )
        end, chosen = next(one, (start + 1, pieces[start]))
        elements.append(chosen if _is_value(chosen) else element(chosen) if chosen.strip() else "")
        start = end
    return elements


# The beginning of "[1,2]", "{a: 1}" or "choice(1,2)".
_OPENED = re.compile(r"\s*(\[|\{|(?:choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool)\()")
_CLOSING = {"[": "]", "{": "}", "(": ")"}


def _is_closed(text: str) -> bool:
    """Returns whether the text is a complete list, dictionary or call of one of Hydra's functions."""
    opened = _OPENED.match(text)
    if opened is None:
        return False
    opening = opened.group(1)[-1]
    closing = _CLOSING[opening]
    return text.rstrip().endswith(closing) and text.count(opening) == text.count(closing)


def _quoted_sweep(text: str) -> str:
    """Quotes an element of a sweep; of a call such as `choice(…)`, the arguments are quoted."""
    opened = _OPENED.match(text)
    if opened is None or not opened.group(1).endswith("(") or not _is_closed(text):
        return _quoted_value(text)
    elements = ",".join(_elements(text[opened.end() : text.rindex(")")], _quoted_sweep))
    # Hydra drops the quotes of values inside choice(), but not of the same values without it.
    call = elements if opened.group(1) == "choice(" else f"{opened.group(0)}{elements})"
    return call if _parsed(f"key={call}") else text  # Hydra reports what is wrong with the call


def _quoted_value(text: str) -> str:
    """Quotes the elements of a list or dictionary, or the full text; a leading `~` becomes the home folder."""
    text = text.strip()
    if text[:1] in ("[", "{") and _is_closed(text):
        inner = _elements(text[1:-1], _quoted_value if text[0] == "[" else _quoted_pair)
        if _is_value(collection := f"{text[0]}{','.join(inner)}{text[-1]}"):
            return collection
    return quoted(os.path.expanduser(text) if text.startswith("~") else text)


def _quoted_pair(text: str) -> str:
    """Quotes the value of `key: value` in a dictionary."""
    key, colon, value = text.partition(":")
    return f"{key}{colon}{value if _is_value(value) else _quoted_value(value)}"


def _several_values(typed: str, override: Override, command: str) -> str:
    key, _, value = typed.partition("=")
    hint = (
        f"add -m to run one after another: {command}"
        if command
        else "give it one value, or use `vlmcap train -m` to run several"
    )
    is_list = getattr(override.value(), "simple_form", False) and "." in key
    single = f"; for one value with a comma, write {shell_quoted(f'{key}={quoted(value)}')}" if is_list else ""
    return f"{typed} has several values; {hint}{single}"
