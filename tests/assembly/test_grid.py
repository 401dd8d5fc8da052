"""Every encoder with every projector and every language model, and every pretrained VLM.

Sizes are right on the meta device, or the combination is refused in one sentence; docs/combinations.json says which.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from itertools import cycle, islice
from typing import Any

import pytest
import torch

from tests.thinned import thinned
from tools.combinations import CHECKED, check_model, combination, published
from vlmcap.compose import compose
from vlmcap.config import Config, ProjectorConfig, Reducer
from vlmcap.config_files import group_choices
from vlmcap.config_unread import NO_DATA
from vlmcap.errors import UserError
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.planning.estimate.meta_models import PROMPT_TOKENS, cached_meta_encoder, planned_sizes, text_config
from vlmcap.planning.estimate.sizes import clip_sizes
from vlmcap.types import GridTHW

ENCODERS, PROJECTORS, LLMS = (published(group) for group in ("encoder", "projector", "llm"))
RECORDED: dict[str, Any] = json.loads(CHECKED.read_text(encoding="utf-8"))
ONE_OF_EACH = (
    "clip",
    "siglip2",
    "siglip2_naflex",
    "internvit_300m",
    "dinov3_s",
    "dinov3_hplus",
    "dinov3_convnext_l",
    "vjepa2_l",
    "videomae_b",
)  # every class with every kind of block

# (encoder, projector) -> part of the reason, which is the same for all language models.
REFUSALS: dict[tuple[str, str], str] = {
    ("siglip2", "pixel_shuffle"): "does not divide the grid of 27 × 27 patches",
    ("siglip2", "pixel_shuffle_linear"): "does not divide the grid of 27 × 27 patches",
    ("dinov3_convnext_l", "pixel_shuffle"): "does not divide the grid of 7 × 7 patches",
    ("dinov3_convnext_l", "pixel_shuffle_linear"): "does not divide the grid of 7 × 7 patches",
    ("siglip2_naflex", "pixel_shuffle"): "vary with the clip",
    ("siglip2_naflex", "pixel_shuffle_linear"): "vary with the clip",
}
KEY = re.compile(r"\b(encoder|projector|llm|model|data|tuning|hardware)(\.[a-z_]+)*=|\b(encoder|llm|data)\.[a-z_]+")
PROJECTED: dict[object, tuple[int, ...]] = {}


def check_cell(config: Config) -> None:
    """V and Dl as the projector gives them on the meta device; they must be what was stated."""
    stated, width = clip_sizes(config), int(text_config(config).hidden_size)
    sizes = planned_sizes(config, cached_meta_encoder(config))
    assert sizes is not None
    key = (repr(config.projector), sizes, stated.grid)
    if key not in PROJECTED:  # many language models share a width
        PROJECTED[key] = projected(config.projector, sizes, stated.grid)
    assert PROJECTED[key] == (1, stated.num_visual, width)


def projected(config: ProjectorConfig, sizes: ProjectorSizes, grid_thw: GridTHW) -> tuple[int, ...]:
    """Shape that comes out of a projector."""
    num_frames, height, width = grid_thw
    with torch.device("meta"):
        features = torch.empty(1, num_frames, height * width, sizes.in_dim)
        prompt = torch.empty(PROMPT_TOKENS // 2, sizes.out_dim)
        return tuple(build_projector(config, sizes)(features, grid=(height, width), prompt=prompt).shape)


def in_words(error: UserError) -> str:
    """The sentence of a refusal, which must be one and name a key."""
    text = str(error)
    assert "\n" not in text
    assert KEY.search(text), text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("encoder", thinned(ENCODERS, lambda encoder: encoder in ONE_OF_EACH))
def test_every_cell_fits_or_is_refused_in_words(encoder: str) -> None:
    wrong, refused = [], Counter[tuple[str, str]]()
    for projector in PROJECTORS:
        expected = REFUSALS.get((encoder, projector))
        for llm in LLMS:
            try:
                check_cell(combination(encoder, projector, llm))
                found = None
            except UserError as error:
                found = in_words(error)
                refused[projector, found] += 1
            if (found is None) != (expected is None) or (found and expected not in found):
                wrong.append(f"{encoder} + {projector} + {llm}: {found or 'fits'}")
    assert not wrong, "\n".join(wrong)
    recorded = [row for row in RECORDED["refused"] if row["encoder"] == encoder]
    assert {(row["projector"], row["reason"]): row["llms"] for row in recorded} == refused, (
        "run python -m tools.combinations"
    )


def test_the_record_has_every_name() -> None:
    assert RECORDED["counts"] == {"encoder": len(ENCODERS), "projector": len(PROJECTORS), "llm": len(LLMS)}
    assert list(RECORDED["models"]) == published("model"), "run python -m tools.combinations"


@pytest.mark.slow
@pytest.mark.parametrize("projector", thinned(group_choices("projector"), lambda name: name == "mlp"))
def test_every_pair_is_composed_or_refused_in_words(projector: str) -> None:
    """With each projector once every encoder and every language model, the demo's and those without a default too."""
    encoders, llms = group_choices("encoder"), group_choices("llm")
    count = max(len(encoders), len(llms))
    composed = 0
    for encoder, llm in islice(zip(cycle(encoders), cycle(llms), strict=False), count):
        try:
            config = compose([f"encoder={encoder}", f"projector={projector}", f"llm={llm}", NO_DATA])
            check_cell(config)
            composed += 1
        except UserError as error:
            in_words(error)
    assert (composed > count // 2) == (projector != "native")


@pytest.mark.slow
@pytest.mark.parametrize("name", published("model"))
def test_every_pretrained_vlm_fits_as_recorded(name: str) -> None:
    assert check_model(name) == RECORDED["models"][name]
    for part in ("encoder=clip", "projector=mlp", "llm=qwen3_8b"):
        with pytest.raises(UserError, match=f"brings its own .* {part} cannot be combined") as caught:
            compose([f"model={name}", part, NO_DATA])
        in_words(caught.value)


@pytest.mark.slow
def test_a_cell_put_together_by_parts_is_the_composed_one() -> None:
    for cell in (
        ("siglip2", "linear", "vicuna_7b"),
        ("dinov3_l", "cross_attention", "qwen3_14b"),
        ("clip", "mlp", "vicuna_7b"),
    ):
        names = (f"{group}={name}" for group, name in zip(("encoder", "projector", "llm"), cell, strict=True))
        expected = compose([*names, "hardware=l4"])
        # The output folder has the time in its name.
        assert dataclasses.replace(combination(*cell), paths=expected.paths) == expected


@pytest.mark.slow
def test_the_meta_device_holds_no_weights() -> None:
    encoder = cached_meta_encoder(combination("clip", "mlp", "qwen3_8b"))
    assert all(parameter.is_meta for parameter in encoder.parameters())


def test_without_pooling_the_frames_do_not_fit_vicuna() -> None:
    config = combination("clip", "mlp", "vicuna_7b")
    config = dataclasses.replace(config, projector=dataclasses.replace(config.projector, reducer=Reducer.none))
    with pytest.raises(
        UserError, match=r"4608 visual tokens.* exceed the context of 4096 tokens .*projector\.reducer=pool"
    ):
        check_cell(config)
