"""Overrides as people type them.

What Hydra parses keeps its meaning, anything else is text, and other programs' keys name ours.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from vlmcap.compose import compose, compose_node
from vlmcap.config import Config, LlmConfig
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config_errors import _paths
from vlmcap.errors import UserError
from vlmcap.overrides import HINTS, foreign_key, quoted, read_overrides
from vlmcap.sweep_syntax import expand

PARSER = OverridesParser.create()
ALPHABET = [*"ab1 .,/:-+=~'\"\\()[]{}$#&;!?*@|<>%^`", "도심", "null", "true", "1e-3", "range(", "choice(", "${seed}"]


def text_of(override: str) -> object:
    return PARSER.parse_override(override).value()


@pytest.mark.parametrize("is_sweep", [False, True])
def test_what_hydra_parses_is_left_as_it_is_and_the_rest_becomes_parsable(is_sweep: bool) -> None:
    draw = random.Random(0)
    counts = {True: 0, False: 0}
    for _ in range(2000):
        value = "".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, 6)))
        typed = f"llm.prompt={value}"
        try:
            is_single = not PARSER.parse_override(typed).is_sweep_override()
            is_parsed = True
        except HydraException:
            is_single = is_parsed = False
        counts[is_parsed] += 1
        if is_parsed:
            if is_single or is_sweep:
                assert read_overrides([typed], is_sweep=is_sweep) == [typed]
            else:
                with pytest.raises(UserError, match="several values"):
                    read_overrides([typed])
        elif not is_sweep:
            (found,) = read_overrides([typed])
            PARSER.parse_override(found)
            if value[0] not in "[{~":
                assert text_of(found) == value.strip()
    assert min(counts.values()) > 300


@pytest.mark.parametrize(
    "text",
    [
        "/data/도심",
        "설명해",
        "설명.한국어",
        "out/epoch=1.ckpt",
        "/a (1)/b",
        "a#b",
        "a&b;c!",
        "it's",
        "c\\d'e",
        "도\\",
        "[도",
        "a(b)",
        "설명해, 자세히",
    ],
)
def test_paths_and_sentences_are_taken_as_they_are(text: str) -> None:
    assert compose_node([f"data.root={text}"]).data.root == text


def test_the_home_folder_and_lists() -> None:
    assert text_of(read_overrides(["data.root=~/aihub"])[0]) == str(Path.home() / "aihub")
    assert text_of(read_overrides(["x=~없음/a"])[0]) == "~없음/a"
    assert text_of(read_overrides(["x=[도심,b,'c,d']"])[0]) == ["도심", "b", text_of("x='c,d'")]
    assert text_of(read_overrides(["x={a: 도심, b: 1}"])[0]) == {"a": "도심", "b": 1}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("data.root=/a/도심,/b", ["/a/도심", "/b"]),
        ("data.root=choice(/a (1),도심)", ["/a (1)", "도심"]),
        ("data.root=sort(나 (1),'가,다')", ["가,다", "나 (1)"]),
        ("data.root=~/a,it's", [str(Path.home() / "a"), "it's"]),
        ("data.caption_key='가,나',다", ["가,나", "다"]),
    ],
)
def test_a_sweep_quotes_its_elements_one_by_one(typed: str, expected: list[str]) -> None:
    key = typed.partition("=")[0]
    jobs, swept = expand([typed])
    assert swept == [key]
    assert [text_of(job[0]) for job in jobs] == expected


@pytest.mark.parametrize("typed", ["encoder=clip,", "seed=range(a)", "seed=1,,2"])
def test_a_broken_sweep_is_one_sentence(typed: str) -> None:
    with pytest.raises(UserError, match="cannot be read as key=value") as caught:
        expand([typed])
    assert "\n" not in str(caught.value)


def test_several_values_without_m_are_answered_with_the_command() -> None:
    with pytest.raises(UserError, match=r"vlmcap train -m encoder=clip,siglip2$"):
        read_overrides(["encoder=clip,siglip2"], command="vlmcap train -m encoder=clip,siglip2")
    with pytest.raises(UserError) as caught:
        compose(["llm.prompt=a,b"])
    (literal,) = shlex.split(str(caught.value).rpartition(", write ")[2])
    assert compose([literal]).llm.prompt == text_of(literal)


@pytest.mark.parametrize("key", HINTS)
def test_a_key_of_another_program_names_one_of_ours(key: str) -> None:
    known, groups = {*_paths(Config)}, {"data", "optim", "encoder", "llm", "projector", "launcher", "sweep", "debug"}
    assert key not in known or key.startswith("llm.suggested.")  # which files have, and nobody types
    instead = HINTS[key][0]
    for override in instead.split():
        assert override.partition("=")[0] in known | groups
    hint = foreign_key(key if "=" in key else f"{key}=7")
    assert (instead if not instead.endswith("=") else f"{instead}7") in hint


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("+lr=1e-4", "tuning.adapter_lr=1e-4"),
        ("ckpt_path=a b.ckpt", "'checkpoint=a b.ckpt'"),
        ("hydra/sweeper=ax", "default, optuna"),
        ("hydra.sweeper.n_trials=9", "sweep.n_trials=9"),
        ("hydra.launcher.n_jobs=2", "launcher.n_jobs=2"),
        ("hydra.sweeper.study_name=x", "sweep.n_trials"),
    ],
)
def test_hints_carry_the_value(typed: str, expected: str) -> None:
    assert expected in foreign_key(typed)
    with pytest.raises(UserError):
        read_overrides([typed])


def test_hydras_own_plugins_are_left_alone() -> None:
    assert read_overrides(["hydra/launcher=basic", "hydra.sweeper.params=null"]) == [
        "hydra/launcher=basic",
        "hydra.sweeper.params=null",
    ]


def test_a_known_last_name_beats_a_similar_spelling() -> None:
    with pytest.raises(UserError, match=r"did you mean hardware\.precision"):
        compose(["trainer.precision=bf16"])


def test_nothing_chosen_is_the_default_or_one_sentence() -> None:
    folder = "paths.output_dir=x"
    assert compose(["experiment=null", "debug=null", folder]) == compose([folder])
    with pytest.raises(UserError, match=r"^encoder=null is the name of no component; choose one"):
        compose(["encoder=null"])


def test_quotes_survive_hydra() -> None:
    for text in ("a'b", "a\\", "a\\'b", "", "'", "\\\\"):
        assert text_of(f"x={quoted(text)}") == text


@pytest.mark.parametrize("tuning", ["two_stage", "lora", "full", "projector_only", "demo"])
def test_a_hint_names_a_key_that_what_is_chosen_beside_it_has(tuning: str) -> None:
    kinds = {"tuning": {"demo": "two_stage"}.get(tuning, tuning), "logger": "csv", "sweep": "grid", "launcher": "basic"}
    for key in HINTS:
        hint = foreign_key(key if "=" in key else f"{key}=7", [f"tuning={tuning}"])
        words = shlex.split(hint.partition(" here: set ")[2].partition(" (")[0])
        chosen = dict(kinds)
        for word in words:
            name, _, value = word.partition("=")
            group, dot, rest = name.partition(".")
            if not dot:
                chosen[group] = value
            elif group in chosen:
                schema = SCHEMAS[group].get(chosen[group], LlmConfig)  # llm=custom is of the kind that llm=tiny is
                assert rest.partition(".")[0] in {known.name for known in dataclasses.fields(schema)}, (
                    f"{key} with tuning={tuning}: {hint}"
                )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lr=1"], "set tuning.adapter_lr=1 ("),
        (["lr=1", "tuning=projector_only"], "set tuning.projector_lr=1"),
        (["tuning=full", "lr=1"], "set tuning.llm_lr=1"),
        (["lr=1", "tuning=mine"], "set tuning.adapter_lr=1 ("),
        (["lora_r=8", "tuning=projector_only"], "set tuning=lora tuning.lora.rank=8"),
        (["lora_r=8", "tuning=full"], "set tuning=lora tuning.lora.rank=8"),
        (["wandb.project=x"], "set logger=wandb logger.project=x"),
        (["wandb.project=x", "logger=trackio"], "set logger.project=x"),
        (["hydra.sweeper.n_trials=9"], "set sweep=optuna sweep.n_trials=9"),
        (["hydra.launcher.n_jobs=9", "launcher=ray"], "set launcher.n_jobs=9"),
        (["model_name=a/b"], "set llm=custom llm.checkpoint=a/b"),
        (["model_name=a/b", "llm=qwen3_8b"], "set llm.checkpoint=a/b"),
    ],
)
def test_hints_fit_the_command_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        read_overrides(arguments)
