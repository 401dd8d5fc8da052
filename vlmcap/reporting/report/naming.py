"""Names runs by the few keys in which they differ, and chooses and labels the metrics of a report."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlmcap.errors import UserError
from vlmcap.metrics import METRIC_LABELS
from vlmcap.reporting.report.folders import RunFolder
from vlmcap.reporting.report.records import Value

_COMPONENTS = ("model", "encoder", "projector", "llm")
_GROUPS = (*_COMPONENTS, "tuning", "hardware", "data", "optim", "evaluation", "trainer", "callbacks")
_ABSENT = {"native", "assembled"}  # a component of a pretrained VLM, and a model that is not one
_IGNORED = (
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
"""Keys and prefixes of keys that do not change the result of a run, apart from the seed."""
_LOWER_IS_BETTER = ("loss", "self_bleu", "repetition_rate")  # suffixes of metric names
_USUAL = ("cider", "bleu_4", "rouge_l", "meteor_ko", "content_f1", "facts/mean", "distinct_ratio")


def comparable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the keys that do not change the result, and replaces the cache folder in paths by a placeholder."""
    # Files of the demo are in the cache folder, which differs between computers.
    cache = str(config.get("paths.cache_dir") or "")
    return {
        key: value.replace(cache, "${paths.cache_dir}") if cache and isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith(_IGNORED)
    }


def find_factors(runs: Sequence[RunFolder]) -> list[str]:
    """Finds the keys whose values distinguish all configurations, ignoring the seed.

    Groups of YAML files come first (`encoder` for `encoder.name`), then keys that were given as overrides. Any other
    differing key is dropped if these determine its value, as `llm` determines `llm.max_new_tokens`, and is a factor
    otherwise.

    Args:
        runs: Runs; those without a configuration are ignored.
    """
    # 1. Keys with more than one value.
    configs = [comparable_config(run.config) for run in runs if run.config]
    differing = _differing(configs)
    # 2. Choices of groups first, such as encoder=siglip2, as they say most.
    groups = [group for group in _GROUPS if f"{group}.name" in differing]
    chosen = [f"{group}.name" for group in groups]
    # 3. Keys that somebody has typed, unless the choices so far decide them already; the other keys come last.
    typed = [key for key in dict.fromkeys(key for run in runs for key in map(_key, run.overrides)) if key in differing]
    # A group's own keys, and keys that nobody typed, are factors only if those chosen so far do not determine them.
    for key in [*typed, *sorted(differing)]:
        may_follow = key.split(".")[0] in groups or key not in typed
        if key not in chosen and not (may_follow and _is_determined(configs, chosen, key)):
            chosen.append(key)
    return [key.removesuffix(".name") if key.removesuffix(".name") in groups else key for key in chosen]


def factor_values(run: RunFolder, factors: Sequence[str]) -> dict[str, Value]:
    """Returns the value of each factor; None if the configuration does not contain it."""
    config = comparable_config(run.config)
    return {factor: _plain(config.get(f"{factor}.name" if factor in _GROUPS else factor)) for factor in factors}


def group_name(run: RunFolder, factors: Sequence[str]) -> str:
    """Returns a name such as `siglip2 + mlp, rank=8`: names of components, and other keys in their shortest form."""
    values = factor_values(run, factors)
    if not run.config:
        return run.path.name
    names = [str(value) for factor, value in values.items() if factor in _COMPONENTS and value not in (None, *_ABSENT)]
    others = [
        _labelled(factor, value, factors)
        for factor, value in values.items()
        if factor not in _COMPONENTS and value is not None
    ]
    # A single configuration differs from nothing, so its components name it.
    if not names and not others:
        configured = [run.config.get(f"{component}.name") for component in _COMPONENTS]
        names = [str(name) for name in configured if name not in (None, *_ABSENT)]
    return ", ".join([" + ".join(names), *others] if names else others) or run.path.name


def short_ids(contents: Sequence[str], letter: str) -> dict[str, str]:
    """Returns an id for each content: a letter and the fewest hexadecimal digits of its hash that make it unique."""
    digests = {content: hashlib.sha256(content.encode()).hexdigest() for content in contents}
    # From four digits on, as many as keep the ids apart.
    length = next(n for n in range(4, 65) if len({digest[:n] for digest in digests.values()}) == len(digests))
    return {content: letter + digest[:length] for content, digest in digests.items()}


def seed_of(run: RunFolder) -> int | None:
    """Returns the seed of a run; None if it is not known."""
    seed = run.config.get("seed")
    return seed if isinstance(seed, int) else None


def choose_metric(runs: Sequence[RunFolder], asked: str | None) -> str:
    """Chooses the given metric, else the one that most runs monitored, else CIDEr on the split that most runs have.

    Raises:
        UserError: No run has the metric, or no run has any score.
    """
    counts = Counter(name for run in runs for name in run.scores)
    if not counts:
        reason = next((f"; the first one with a reason says: {run.reason}" for run in runs if run.reason), "")
        raise UserError(f"none of the {len(runs)} runs has a score yet{reason}")
    if asked is not None:
        if asked not in counts:
            known = ", ".join(sorted(name for name in counts if "category/" not in name and "swapped" not in name)[:40])
            raise UserError(f"no run has the metric --metric {asked}; choose one of {known}")
        return asked
    objectives = Counter(str(run.config["monitor"]) for run in runs if run.config.get("monitor") in counts)
    # Of these, the one that most runs have.
    wanted = [*(name for name, _ in objectives.most_common(1)), "val/cider", "test/cider"]
    return max([name for name in wanted if name in counts] or [next(iter(counts))], key=lambda name: counts[name])


def is_higher_better(metric: str) -> bool:
    """Returns whether higher values of a metric are better."""
    return not metric.endswith(_LOWER_IS_BETTER)


def metric_label(metric: str) -> str:
    """Returns the readable name of a metric: "val: CIDEr (no length penalty)" for `val/cider`."""
    split, _, name = metric.partition("/")
    return f"{split}: {METRIC_LABELS.get(name, name.replace('/', ', ').replace('_', ' '))}"


def columns(metric: str, runs: Sequence[RunFolder]) -> list[str]:
    """Returns the metrics of the leaderboard: the given one and the usual ones, also from the other split if known."""
    split, _, name = metric.partition("/")
    other = {"val": "test", "test": "val"}.get(split, "")
    wanted = [metric, *(f"{split}/{usual}" for usual in _USUAL), f"{other}/{name}", f"{other}/cider"]
    known = {key for run in runs for key in run.scores}
    return [key for key in dict.fromkeys(wanted) if key in known]


def _key(override: str) -> str:
    # "+encoder@first=siglip2" -> "encoder"
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    """Returns the keys with different values in at least two of the configurations that have the key, in order."""
    first: dict[str, str] = {}
    differing: dict[str, None] = {}
    for config in configs:
        for key, value in config.items():
            # Compared with the first configuration that has the key.
            if first.setdefault(key, _text(value)) != _text(value):
                differing[key] = None
    return differing


def _is_determined(configs: Sequence[Mapping[str, Any]], chosen: Sequence[str], key: str) -> bool:
    """Returns whether configurations that agree in the chosen keys also agree in this key."""
    known: dict[tuple[str, ...], str] = {}
    for config in configs:
        if key in config:
            # The same values of the chosen keys with two values of this key: it is not determined.
            settings = tuple(_text(config.get(one)) for one in chosen)
            if known.setdefault(settings, _text(config[key])) != _text(config[key]):
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
    # The fewest last words that no other factor ends with: "rank" for "tuning.lora.rank".
    length = next((n for n in range(1, len(words)) if all(other[-n:] != words[-n:] for other in ends)), len(words))
    return f"{'.'.join(words[-length:])}={f'{value:g}' if isinstance(value, float) else value}"
