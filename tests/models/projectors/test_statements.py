"""Every combination states its number of tokens, or is refused with an explanation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.projectors.settings import settings_of
from vlmcap.config import ProjectorConfig, TokenProjectorConfig
from vlmcap.errors import UserError
from vlmcap.models.projectors import Projector, ProjectorSizes, build_projector, check_projector, count_tokens
from vlmcap.models.projectors.projector import _inner_dim

Make = Callable[..., tuple[ProjectorConfig, ProjectorSizes]]

KINDS = {
    "linear": {},
    "mlp": {},
    "cross_attention": {},
    "prompt": {"kind": "cross_attention", "queries": "prompt"},
    "perceiver": {},
    "c_abstractor": {},
    "pixel_shuffle": {},
}
REDUCERS = ("none", "pool", "resample", "merge", "saliency")
TEMPORAL = ("none", "position", "attention", "local_global")


def run(config: ProjectorConfig, sizes: ProjectorSizes, num_frames: int, grid: tuple[int, int]) -> torch.Tensor:
    features = torch.ones(2, num_frames, grid[0] * grid[1], sizes.in_dim)
    tokens: torch.Tensor = build_projector(config, sizes)(features, grid=grid, prompt=torch.ones(5, sizes.out_dim))
    return tokens


def is_refused(kind: str, reducer: str, temporal: str, frame_stack: int) -> bool:
    """The excluded combinations, written independently of the code."""
    if reducer in ("merge", "saliency"):
        return frame_stack > 1 or kind in ("c_abstractor", "pixel_shuffle") or temporal == "attention"
    return temporal == "attention" and kind in ("perceiver", "prompt")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_gives_the_stated_tokens_or_is_refused(kind: str, spec_of: Make) -> None:
    refused = 0
    for reducer, temporal, frame_stack in itertools.product(REDUCERS, TEMPORAL, (1, 2)):
        options = {"kind": kind, **KINDS[kind], "reducer": reducer, "temporal": temporal, "frame_stack": frame_stack}
        spec = spec_of(**options, grid=(8, 4))
        if is_refused(kind, reducer, temporal, frame_stack):
            refused += 1
            with pytest.raises(UserError):
                check_projector(*spec)
            continue
        check_projector(*spec)
        for num_frames, grid in ((4, (8, 4)), (3, (4, 4)), (1, (4, 4))):
            tokens = run(*spec, num_frames, grid)
            assert tokens.shape == (2, count_tokens(*spec, num_frames, grid), 8), options
            assert tokens.dtype == torch.float32
    assert 0 < refused < 40


@torch.no_grad()
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stated_tokens_are_the_real_ones(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(KINDS)))
    grid = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    stack = data.draw(st.integers(1, 3))
    options: dict[str, Any] = {"kind": kind, **KINDS[kind]}
    sizes = ProjectorSizes(data.draw(st.integers(1, 20)), 8, grid, num_frames=6, num_prompt_tokens=5)
    if kind == "pixel_shuffle":
        options["shuffle"] = data.draw(st.integers(1, 3))
    config = settings_of(
        num_heads=data.draw(st.integers(1, 3)),
        num_queries=data.draw(st.integers(1, 4)) ** 2,
        num_layers=2,
        reducer=data.draw(st.sampled_from(REDUCERS)),
        pool_size=data.draw(st.integers(1, 4)),
        resample_size=data.draw(st.integers(1, 6)),
        keep_ratio=data.draw(st.floats(0.01, 1)),
        frame_stack=stack,
        temporal=data.draw(st.sampled_from(TEMPORAL)),
        window=data.draw(st.integers(1, 40)),
        num_global=data.draw(st.integers(0, 3)),
        **options,
    )
    num_frames = stack * data.draw(st.integers(1, 6 // stack))
    other = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    try:
        check_projector(config, sizes)
        stated = count_tokens(config, sizes, num_frames, other)
    except UserError as error:
        assert "\n" not in str(error)
        assert "projector" in str(error)
        return
    assert run(config, sizes, num_frames, other).shape == (2, stated, 8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 8 * 729),
        ({"reducer": "pool"}, 8 * 196),
        ({"reducer": "pool", "pool_size": 3, "frame_stack": 4}, 2 * 81),
        ({"reducer": "resample"}, 8 * 144),
        ({"reducer": "merge"}, 8 * 183),
        ({"reducer": "merge", "grid": (27, 100), "keep_ratio": 0.07}, 8 * 189),
        ({"reducer": "saliency"}, 1458),
        ({"reducer": "saliency", "keep_ratio": 1e-6}, 8),
        ({"kind": "cross_attention"}, 8 * 64),
        ({"kind": "cross_attention", "reducer": "saliency"}, 8 * 64),
        ({"kind": "cross_attention", "queries": "prompt", "num_prompt_tokens": 23}, 23),
        ({"kind": "perceiver"}, 64),
        ({"kind": "c_abstractor", "num_queries": 144}, 8 * 144),
        ({"kind": "pixel_shuffle", "shuffle": 3}, 8 * 81),
        ({"kind": "pixel_shuffle", "reducer": "pool"}, 8 * 49),
    ],
)
def test_tokens_of_siglip_2(options: dict[str, Any], expected: int) -> None:
    settings = {name: value for name, value in options.items() if name not in ("grid", "num_prompt_tokens")}
    config = settings_of(**{"kind": "mlp", "num_queries": 64} | settings)
    sizes = ProjectorSizes(1152, 4096, options.get("grid", (27, 27)), 8, options.get("num_prompt_tokens"))
    assert count_tokens(config, sizes, 8) == expected
    with torch.device("meta"):
        projector = Projector(config, sizes)
    assert projector.num_tokens(8, math.prod(sizes.grid)) == expected
    with pytest.raises(AssertionError):
        projector.num_tokens(8, 728)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temporal", TEMPORAL)
def test_the_defaults_fit_every_encoder_of_the_tables(kind: str, temporal: str) -> None:
    for width in (96, 384, 768, 1024, 1152, 1280, 3200, 4096):
        options = {"kind": kind, **KINDS[kind], "temporal": temporal}
        config, sizes = settings_of(**options), ProjectorSizes(width, 5120, (16, 16), num_frames=8, num_prompt_tokens=9)
        if not is_refused(kind, "none", temporal, 1):
            check_projector(config, sizes)
        assert isinstance(config, TokenProjectorConfig)
        assert _inner_dim(config, width) == width


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 0}, r"projector\.depth must be at least 1, not 0"),
        ({"window": -1}, r"projector\.window must be at least 1"),
        ({"keep_ratio": 0.0}, r"projector\.keep_ratio must be above 0"),
        ({"keep_ratio": 1.5}, r"projector\.keep_ratio must be above 0"),
        ({"num_global": -1}, r"projector\.num_global must not be negative"),
        ({"hidden_dim": 0}, r"projector\.hidden_dim must be at least 1"),
        (
            {"kind": "perceiver", "hidden_dim": 9},
            r"projector\.hidden_dim=9 is not a multiple of projector\.num_heads \(2\); .*hidden_dim=10 or",
        ),
        ({"temporal": "local_global", "hidden_dim": 6}, r"even width \(4\); set projector\.hidden_dim=8 or null"),
        ({"kind": "cross_attention", "queries": "prompt", "num_prompt_tokens": 0}, r"set llm\.prompt"),
        ({"kind": "cross_attention", "queries": "prompt", "num_prompt_tokens": None}, r"set llm\.prompt"),
        ({"kind": "c_abstractor", "num_queries": 140}, r"projector\.num_queries=140 is not a square .* set it to 144"),
        ({"frame_stack": 3}, r"projector\.frame_stack=3 does not divide data\.num_frames=4"),
        ({"kind": "pixel_shuffle", "grid": (27, 27)}, r"set encoder\.image_size to the size of 28 × 28 patches"),
        (
            {"kind": "pixel_shuffle", "grid": (16, 17), "shuffle": 4},
            r"encoder\.image_size to the size of 16 × 16 patches",
        ),
        ({"kind": "pixel_shuffle", "reducer": "pool", "grid": (26, 26)}, r"pooled 2 × 2; .* of 27 × 27 patches"),
        ({"kind": "pixel_shuffle", "reducer": "resample", "resample_size": 13}, r"set projector\.resample_size=14"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options: dict[str, Any], words: str, spec_of: Make) -> None:
    with pytest.raises(ValueError, match=words) as error:
        build_projector(*spec_of(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("side", "pool", "shuffle"), list(itertools.product((5, 26, 27, 29), (1, 2, 3), (2, 3, 4))))
def test_the_proposed_size_works_and_is_the_nearest(side: int, pool: int, shuffle: int, spec_of: Make) -> None:
    options = {"reducer": "pool", "pool_size": pool, "shuffle": shuffle}

    def works(size: int) -> bool:
        return math.ceil(size / pool) % shuffle == 0

    if works(side):
        check_projector(*spec_of("pixel_shuffle", **options, grid=(side, side)))
        return
    with pytest.raises(UserError) as error:
        check_projector(*spec_of("pixel_shuffle", **options, grid=(side, side)))
    proposed = int(str(error.value).split("the size of ")[1].split()[0])
    check_projector(*spec_of("pixel_shuffle", **options, grid=(proposed, proposed)))
    assert not any(works(size) for size in range(side - abs(proposed - side) + 1, side + abs(proposed - side)))


def test_a_clip_of_another_grid_is_refused_too(spec_of: Make) -> None:
    """If grids vary, only some of them may be indivisible."""
    with pytest.raises(UserError, match="4 × 6 patches"):
        count_tokens(*spec_of("pixel_shuffle"), 4, (3, 6))
