"""Every encoder with every projector and every language model.

Sizes are right on the meta device, or the pair is refused in words.

Nothing is downloaded or allocated: encoders are built once each from their known configurations, and language models
only say their width and context.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.thinned import thinned
from vlmcap.assembly.components import encoder_options, projector_sizes
from vlmcap.assembly.model import check_context
from vlmcap.compose import CUSTOM, compose
from vlmcap.config import Config, EncoderConfig, LinearConfig, LlmConfig, ProjectorConfig, Reducer, TuningConfig
from vlmcap.config_files import config_dir
from vlmcap.demo.prepare import TINY_ENCODERS
from vlmcap.errors import UserError
from vlmcap.models.encoders import VisionEncoder, build_encoder
from vlmcap.models.known import known_model_config
from vlmcap.models.llm.prompt import VisualRun
from vlmcap.models.projectors import ProjectorSizes, build_projector, check_projector, count_tokens
from vlmcap.types import GridTHW

PROMPT_TOKENS = 40  # of a chat template with a question, generously


@dataclasses.dataclass(frozen=True)
class FakePrompt:
    """A prompt of which only the length counts."""

    num_prompt_tokens: int = PROMPT_TOKENS


def names(group: str) -> list[str]:
    files = (Path(config_dir()) / group).glob("*.yaml")
    names = (file.stem for file in files)
    return sorted(
        name for name in names if name not in ("native", CUSTOM, *TINY_ENCODERS)
    )  # no published checkpoint; the demo runs them


ENCODERS, PROJECTORS, LLMS = names("encoder"), names("projector"), names("llm")
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

# (encoder, projector, language model) -> part of the reason; "*" stands for all.
REFUSALS: dict[tuple[str, str, str], str] = {
    ("siglip2", "pixel_shuffle", "*"): "does not divide the grid of 27 × 27 patches",
    ("siglip2", "pixel_shuffle_linear", "*"): "does not divide the grid of 27 × 27 patches",
    ("dinov3_convnext_l", "pixel_shuffle", "*"): "does not divide the grid of 7 × 7 patches",
    ("dinov3_convnext_l", "pixel_shuffle_linear", "*"): "does not divide the grid of 7 × 7 patches",
    ("siglip2_naflex", "pixel_shuffle", "*"): "vary with the clip",
    ("siglip2_naflex", "pixel_shuffle_linear", "*"): "vary with the clip",
}


def expected_refusal(*cell: str) -> str | None:
    for pattern, reason in REFUSALS.items():
        if all(want in ("*", have) for want, have in zip(pattern, cell, strict=True)):
            return reason
    return None


@dataclasses.dataclass(frozen=True)
class Parts:
    """Settings of every part, by name, and those that are common to all cells."""

    common: Config
    encoders: dict[str, EncoderConfig]
    projectors: dict[str, ProjectorConfig]
    llms: dict[str, LlmConfig]


def composed(encoder: str, projector: str, llm: str) -> Config:
    return compose([f"encoder={encoder}", f"projector={projector}", f"llm={llm}", "hardware=l4"])


@cache
def parts() -> Parts:
    """Some of each kind at once: composing each of a thousand cells would take minutes."""
    turns = range(max(len(ENCODERS), len(PROJECTORS), len(LLMS)))
    chosen = [tuple(kind[turn % len(kind)] for kind in (ENCODERS, PROJECTORS, LLMS)) for turn in turns]
    configs = [composed(*names) for names in chosen]
    return Parts(
        configs[0],
        {config.encoder.name: config.encoder for config in configs},
        {config.projector.name: config.projector for config in configs},
        {config.llm.name: config.llm for config in configs},
    )


@cache
def encoder_of(name: str) -> VisionEncoder:
    config = cell_config(name, "mlp", "qwen3_8b")
    with torch.device("meta"):
        return build_encoder(known_model_config(config.encoder.checkpoint), encoder_options(config))


@cache
def text_config(name: str) -> Any:
    return known_model_config(parts().llms[name].checkpoint).get_text_config()


def cell_config(encoder: str, projector: str, llm: str) -> Config:
    """Puts together by parts; what one part reads of another is put right."""
    found = parts()
    chosen, language = found.projectors[projector], found.llms[llm]
    reads_reducer = isinstance(chosen, LinearConfig)
    return dataclasses.replace(
        found.common,
        encoder=found.encoders[encoder],
        projector=dataclasses.replace(chosen, reducer=language.suggested.reducer) if reads_reducer else chosen,
        llm=language,
        tuning=composed_tuning(llm),
    )


@cache
def composed_tuning(llm: str) -> TuningConfig:
    """The learning rates follow the language model."""
    suggested, tuning = parts().llms[llm].suggested, parts().common.tuning
    rates = {name: getattr(suggested, name) for name in ("align_lr", "projector_lr", "adapter_lr")}
    return dataclasses.replace(tuning, **rates)


PROJECTED: dict[object, tuple[int, ...]] = {}


def check_cell(config: Config, encoder: VisionEncoder, text: Any) -> None:
    """V and Dl as the projector gives them on the meta device; they must be what was stated."""
    sizes = projector_sizes(config, encoder, text.hidden_size, PROMPT_TOKENS)
    check_projector(config.projector, sizes)
    grids = encoder.possible_grids(config.data.num_frames)
    count = partial(count_tokens, config.projector, sizes)
    visual = VisualRun(count, grids[0])
    stated = check_context(config, visual, grids, FakePrompt(), text.max_position_embeddings)  # type: ignore[arg-type]
    largest = max(grids, key=lambda grid: count(grid[0], (grid[1], grid[2])))
    key = (repr(config.projector), sizes, largest)
    if key not in PROJECTED:  # many language models share a width
        PROJECTED[key] = projected(config.projector, sizes, largest)
    assert PROJECTED[key] == (1, stated, text.hidden_size)


def projected(config: ProjectorConfig, sizes: ProjectorSizes, grid_thw: GridTHW) -> tuple[int, ...]:
    """Shape that comes out of a projector."""
    num_frames, height, width = grid_thw
    with torch.device("meta"):
        features = torch.empty(1, num_frames, height * width, sizes.in_dim)
        prompt = torch.empty(PROMPT_TOKENS, sizes.out_dim)
        return tuple(build_projector(config, sizes)(features, grid=(height, width), prompt=prompt).shape)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", thinned(ENCODERS, lambda encoder: encoder in ONE_OF_EACH))
def test_every_cell_fits_or_is_refused_in_words(encoder: str) -> None:
    built, wrong = encoder_of(encoder), []
    for projector in PROJECTORS:
        for llm in LLMS:
            expected = expected_refusal(encoder, projector, llm)
            try:
                check_cell(cell_config(encoder, projector, llm), built, text_config(llm))
                found = None
            except UserError as error:
                found = str(error)
                assert "\n" not in found
            if (found is None) != (expected is None) or (found and expected not in found):
                wrong.append(f"{encoder} + {projector} + {llm}: {found or 'fits'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_cell_put_together_by_parts_is_the_composed_one() -> None:
    for cell in (
        ("siglip2", "linear", "vicuna_7b"),
        ("dinov3_l", "cross_attention", "qwen3_14b"),
        ("clip", "mlp", "vicuna_7b"),
    ):
        expected = composed(*cell)
        assert (
            dataclasses.replace(cell_config(*cell), paths=expected.paths) == expected
        )  # the output folder has the time in its name


@pytest.mark.slow
def test_the_meta_device_holds_no_weights() -> None:
    assert all(parameter.is_meta for parameter in encoder_of("clip").parameters())


def test_without_pooling_the_frames_do_not_fit_vicuna() -> None:
    config = cell_config("clip", "mlp", "vicuna_7b")
    config = dataclasses.replace(config, projector=dataclasses.replace(config.projector, reducer=Reducer.none))
    with pytest.raises(
        UserError, match=r"4608 visual tokens.* exceed the context of 4096 tokens .*projector\.reducer=pool"
    ):
        check_cell(config, encoder_of("clip"), text_config("vicuna_7b"))
