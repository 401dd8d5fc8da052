"""Names: of runs, by the few keys that they differ in, and of scores, by which they are compared."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlmcap.errors import UserError
from vlmcap.metrics import METRIC_LABELS
from vlmcap.reporting.report.data import Value
from vlmcap.reporting.report.folders import RunFolder

_PARTS = ("model", "encoder", "projector", "llm")
_GROUPS = (*_PARTS, "tuning", "hardware", "data", "optim", "evaluation", "trainer", "callbacks")
_ABSENT = {"native", "assembled"}  # the part of a whole model, and the absence of one
_NO_MATTER = (
    "seed",
    "monitor",
    "mode",
    "checkpoint",
    "paths.",
    "logger.",
    "callbacks.profile",
    "sweep.",
    "launcher.",
    "plan.",
    "cache.max_gib",
    "hardware.num_workers",
    "data.num_workers",
    "trainer.progress_bar",
    "trainer.log_every_n_steps",
)
"""Keys, and beginnings of keys, that say where, how often or how watched a run is, and not what comes out."""
_LOWER = ("loss", "self_bleu", "repetition_rate")  # ends of names; of all others more is better
_BESIDE = ("cider", "bleu_4", "rouge_l", "meteor_ko", "content_f1", "facts/mean", "distinct_ratio")


def comparable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what does not change the result; files under the cache folder are named from there."""
    cache = str(config.get("paths.cache_dir") or "")
    return {
        key: value.replace(cache, "${paths.cache_dir}") if cache and isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith(_NO_MATTER)
    }


def find_factors(runs: Sequence[RunFolder]) -> list[str]:
    """The keys whose values tell all configurations apart, whatever the seed.

    First come groups of files (`encoder` for `encoder.name`), then keys that somebody typed. What else differs is left
    out where these decide it, as `llm.max_new_tokens` is by `llm`, and is a factor of its own where they do not.

    Args:
        runs: With their configurations; those without one say nothing.
    """
    configs = [comparable_config(run.config) for run in runs if run.config]
    differing = _differing(configs)
    groups = [group for group in _GROUPS if f"{group}.name" in differing]
    chosen = [f"{group}.name" for group in groups]
    typed = [key for key in dict.fromkeys(key for run in runs for key in map(_key, run.overrides)) if key in differing]
    for key in [*typed, *sorted(differing)]:
        belongs = key.split(".")[0] in groups or key not in typed
        if key not in chosen and not (belongs and _decides(configs, chosen, key)):
            chosen.append(key)
    return [key.removesuffix(".name") if key.removesuffix(".name") in groups else key for key in chosen]


def factor_values(run: RunFolder, factors: Sequence[str]) -> dict[str, Value]:
    """The value of each factor; None where the configuration does not say it."""
    config = comparable_config(run.config)
    return {factor: _plain(config.get(f"{factor}.name" if factor in _GROUPS else factor)) for factor in factors}


def group_name(run: RunFolder, factors: Sequence[str]) -> str:
    """Such as `siglip2 + mlp, rank=8`.

    Parts by their names, other keys with as much of the key as tells it from the others.
    """
    values = factor_values(run, factors)
    if not run.config:
        return run.path.name
    parts = [str(value) for factor, value in values.items() if factor in _PARTS and value not in (None, *_ABSENT)]
    others = [
        _labelled(factor, value, factors)
        for factor, value in values.items()
        if factor not in _PARTS and value is not None
    ]
    if not parts and not others:
        parts = [str(name) for part in _PARTS if (name := run.config.get(f"{part}.name")) not in (None, *_ABSENT)]
    return ", ".join([" + ".join(parts), *others] if parts else others) or run.path.name


def short_ids(contents: Sequence[str], letter: str) -> dict[str, str]:
    """A letter and a few hexadecimal digits for each content, the same for the same content, as few as tell these apart."""
    digests = {content: hashlib.sha256(content.encode()).hexdigest() for content in contents}
    length = next(n for n in range(4, 65) if len({digest[:n] for digest in digests.values()}) == len(digests))
    return {content: letter + digest[:length] for content, digest in digests.items()}


def seed_of(run: RunFolder) -> int | None:
    """The seed, None where it is not known."""
    seed = run.config.get("seed")
    return seed if isinstance(seed, int) else None


def choose_metric(runs: Sequence[RunFolder], asked: str | None) -> str:
    """The metric that was asked for, else what the runs monitored, else CIDEr of the split that most have.

    Raises:
        UserError: No run has the metric, or any score at all.
    """
    counts = Counter(name for run in runs for name in run.scores)
    if not counts:
        told = next((f"; the first one: {run.reason}" for run in runs if run.reason), "")
        raise UserError(f"none of the {len(runs)} runs has a score yet{told}")
    if asked is not None:
        if asked not in counts:
            known = ", ".join(sorted(name for name in counts if "category/" not in name and "swapped" not in name)[:40])
            raise UserError(f"--metric {asked} is in none of the runs; choose one of {known}")
        return asked
    objectives = Counter(str(run.config["monitor"]) for run in runs if run.config.get("monitor") in counts)
    wanted = [*(name for name, _ in objectives.most_common(1)), "val/cider", "test/cider"]
    return max([name for name in wanted if name in counts] or [next(iter(counts))], key=lambda name: counts[name])


def is_higher_better(metric: str) -> bool:
    """Whether more of it is better."""
    return not metric.endswith(_LOWER)


def metric_label(metric: str) -> str:
    """For people: `val/cider` is "val: CIDEr (no length penalty)"."""
    split, _, name = metric.partition("/")
    return f"{split}: {METRIC_LABELS.get(name, name.replace('/', ', ').replace('_', ' '))}"


def columns(metric: str, runs: Sequence[RunFolder]) -> list[str]:
    """The metric, the usual ones of its split, and the metric itself and CIDEr of the other split, as far as any run has them."""
    split, _, name = metric.partition("/")
    other = {"val": "test", "test": "val"}.get(split, "")
    wanted = [metric, *(f"{split}/{one}" for one in _BESIDE), f"{other}/{name}", f"{other}/cider"]
    known = {key for run in runs for key in run.scores}
    return [key for key in dict.fromkeys(wanted) if key in known]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """Keys of which two configurations have different values, in the order of the configuration.

    One that lacks a key does not count.
    """
    first: dict[str, str] = {}
    differing: dict[str, None] = {}
    for config in configs:
        for key, value in config.items():
            if first.setdefault(key, _text(value)) != _text(value):
                differing[key] = None
    return differing


def _decides(configs: Sequence[Mapping[str, Any]], chosen: Sequence[str], key: str) -> bool:
    """Whether configurations that agree in the chosen keys agree in this one."""
    known: dict[tuple[str, ...], str] = {}
    for config in configs:
        if key in config:
            place = tuple(_text(config.get(one)) for one in chosen)
            if known.setdefault(place, _text(config[key])) != _text(config[key]):
                return False
    return True


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _plain(value: Any) -> Value:
    return value if value is None or isinstance(value, str | int | float | bool) else _text(value)


def _labelled(factor: str, value: Value, factors: Sequence[str]) -> str:
    if factor in _GROUPS:
        return str(value)
    words = factor.split(".")
    ends = [other.split(".") for other in factors if other != factor]
    length = next((n for n in range(1, len(words)) if all(other[-n:] != words[-n:] for other in ends)), len(words))
    return f"{'.'.join(words[-length:])}={f'{value:g}' if isinstance(value, float) else value}"
