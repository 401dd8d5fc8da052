"""Captions state every fact of their scene once, in correct Korean."""

from __future__ import annotations

import random
import re
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.demo.grammar import FACTS, describe, draw_scene, with_particle
from vlmcap.metrics import FactLexicon

LEXICON = FactLexicon.from_dict(FACTS)


@pytest.mark.parametrize(
    ("noun", "particles", "expected"),
    [
        ("바다", "이/가", "바다가"),
        ("도심", "이/가", "도심이"),
        ("드론", "은/는", "드론은"),
        ("갈매기", "은/는", "갈매기는"),
        ("궁궐", "을/를", "궁궐을"),
        ("바다", "을/를", "바다를"),
        ("왼쪽", "으로/로", "왼쪽으로"),
        ("바다", "으로/로", "바다로"),
        ("궁궐", "으로/로", "궁궐로"),
        ("들판", "으로/로", "들판으로"),
    ],
)
def test_particles_follow_the_final_sound(noun: str, particles: str, expected: str) -> None:
    assert with_particle(noun, particles) == expected


@pytest.mark.parametrize("noun", ["UFO", "장면 3", "바다."])
def test_a_noun_without_hangul_at_its_end_is_refused(noun: str) -> None:
    with pytest.raises(ValueError, match="Hangul"):
        with_particle(noun, "이/가")


@given(st.integers(0, 2**32))
def test_a_caption_states_each_fact_of_its_scene_once(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng)
    caption = describe(scene, rng)
    assert LEXICON.extract(caption) == asdict(scene)
    for fact, phrases in LEXICON.phrases.items():
        if fact not in (
            "weather",
            "direction",
        ):  # their phrases overlap each other: 비 내리는 아침, 왼쪽에서 오른쪽으로
            assert sum(caption.count(phrase) for phrase in phrases) == 1, fact


@given(st.integers(0, 2**32))
def test_a_caption_has_two_to_four_sentences_and_no_wrong_particle(seed: int) -> None:
    rng = random.Random(seed)
    caption = describe(draw_scene(rng), rng)
    assert 2 <= len(re.findall(r"다\.(?: |$)", caption)) <= 4
    assert caption.endswith("다.")
    assert "  " not in caption
    for place in FACTS["place"]:
        for pair in ("이/가", "을/를"):
            right = with_particle(place, pair)
            (wrong,) = {place + particle for particle in pair.split("/")} - {right}
            assert f" {wrong} " not in caption
    for thing in FACTS["object"]:
        for pair in ("이/가", "은/는"):
            (wrong,) = {thing + particle for particle in pair.split("/")} - {with_particle(thing, pair)}
            assert f" {wrong} " not in caption


def test_every_value_and_many_phrasings_are_drawn() -> None:
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(400)]
    for fact, values in FACTS.items():
        assert {asdict(scene)[fact] for scene in scenes} == set(values)
    assert len({describe(scenes[0], random.Random(seed)) for seed in range(200)}) > 20


def test_facts_are_drawn_independently() -> None:
    rng = random.Random(1)
    scenes = [draw_scene(rng) for _ in range(6000)]
    for place in FACTS["place"]:
        share = sum(s.place == place and s.direction == "왼쪽" for s in scenes) / len(scenes)
        assert share == pytest.approx(1 / 12, abs=0.02)
