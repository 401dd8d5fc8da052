"""Checks of a run that need to know what training measures."""

from __future__ import annotations

from pathlib import Path

from vlmcap.config import Config, EncoderTuning, Engine, is_lower_better
from vlmcap.errors import UserError


def check_engine(config: Config) -> None:
    """`UserError` for an engine that cannot caption while weights change."""
    if config.evaluation.engine is Engine.vllm:
        raise UserError(
            "evaluation.engine=vllm is for evaluate.py, as vLLM holds merged weights and training changes them; leave it out here"
        )


def check_stages(config: Config) -> None:
    """`UserError` unless some stage trains something that there is."""
    stages = [stage for stage in config.tuning.stages.values() if stage.epochs]
    if not stages:
        raise UserError(f"tuning={config.tuning.name} has no epoch to train; set tuning.stages.<name>.epochs")
    tuned = config.tuning.encoder
    if tuned is not EncoderTuning.none and not any(stage.encoder_lr > 0 for stage in stages):
        raise UserError(
            f"tuning.encoder={tuned.name}, but no stage of tuning={config.tuning.name} trains the encoder; "
            "set tuning.stages.<name>.encoder_lr, or tuning.encoder=none"
        )
    if not config.tuning.use_lora and any(stage.adapter_lr > 0 for stage in stages):
        raise UserError("tuning.stages gives the adapters a learning rate, but tuning.use_lora=false; set it to true, or adapter_lr to 0")


def check_objective(config: Config) -> None:
    """`UserError` unless the metrics that are followed will be measured: `data.monitor` in the loop, `objective` there or at the end."""
    from vlmcap.metrics import METRIC_NAMES

    has_facts = config.data.is_demo or config.evaluation.facts is not None
    facts = ["facts/<fact>"] if has_facts else []
    at_end = ["content/<class>_recall", "category/<name>/cider"]
    at_end += ["swapped/cider"] if config.evaluation.swap_videos else []
    at_end += ["siglip/cosine"] if config.evaluation.siglip_checkpoint else []
    at_end += ["bertscore/f1"] if config.evaluation.bert_checkpoint else []
    grounding = config.callbacks.grounding
    drops = ["grounding/swapped/cider_drop"] if grounding.enabled else []
    at_end += drops
    _check_metric("objective", config.objective, ("val", "test"), ["loss", *METRIC_NAMES, *facts, *at_end])
    looped = ["loss", *METRIC_NAMES, *facts, *(drops if grounding.every_n_validations == 1 else [])]
    _check_metric("data.monitor", config.data.monitor, ("val",), looped)
    if early := config.callbacks.early_stopping.monitor:
        _check_metric("callbacks.early_stopping.monitor", early, ("val",), looped)
    if config.objective_mode not in ("min", "max"):
        raise UserError(f"objective_mode={config.objective_mode} must be min or max")
    if is_lower_better(config.objective) and config.objective_mode == "max":
        raise UserError(f"objective={config.objective} is better when it is lower; set objective_mode=min")


def check_facts(config: Config) -> None:
    """`UserError` where a metric that is followed is a fact that `evaluation.facts` does not have."""
    from vlmcap.metrics import FactLexicon

    keys = {"data.monitor": config.data.monitor, "callbacks.early_stopping.monitor": config.callbacks.early_stopping.monitor}
    wrong = {key: name for key, name in keys.items() if name and name.startswith("val/facts/")}
    if not wrong or config.evaluation.facts is None:
        return
    known = [*FactLexicon.from_json(Path(config.evaluation.facts)).phrases, "mean"]
    for key, name in wrong.items():
        if name.removeprefix("val/facts/") not in known:
            raise UserError(f"{key}={name} is not measured; choose val/facts/ and one of {', '.join(known)}")


def _check_metric(key: str, metric: str, splits: tuple[str, ...], examples: list[str]) -> None:
    """`UserError` unless `metric` is an example or of its group: which facts and categories there are, only the data says."""
    split, _, name = metric.partition("/")
    groups = tuple(example.partition("/")[0] + "/" for example in examples if "/" in example)
    if split not in splits or not (name in examples or name.startswith(groups)):
        raise UserError(f"{key}={metric} is not measured; choose {'/ or '.join(splits)}/ and one of {', '.join(examples)}")
