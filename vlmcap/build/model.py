"""A configuration's model: its parts joined, or a whole pretrained one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.build.parts import (
    add_adapters,
    load_encoder,
    load_llm,
    load_prompt_of,
    load_whole,
    projector_spec,
    train_encoder,
)
from vlmcap.config import Config, Reducer
from vlmcap.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from vlmcap.models.captioner import GenerationSettings, VideoCaptioner
    from vlmcap.models.checkpoint import Fingerprint
    from vlmcap.models.llm.prompt import PromptEncoder
    from vlmcap.types import GridTHW, VisualLayout


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the frozen bases are, and what they hold: `encoder` and `llm`, or `model` where one brings both."""

    folders: dict[str, Path]
    bases: dict[str, Fingerprint]


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model and what data needs to know of it.

    Attributes:
        captioner: The model.
        sources: Of its frozen bases.
        transform: Frames as they are decoded -> frames as the encoder wants them; a picklable dataclass.
        grid_of: F, H and W of decoded frames -> a clip's size in patches, or None where all have the encoder's own.
        visual: A clip's size -> placeholders, and text between them; picklable.
        num_visual_tokens: V, the most that a clip may have.
        num_encoder_parameters: Of the encoder, which may be dropped when its features are on disk.
    """

    captioner: VideoCaptioner
    sources: Sources
    transform: Callable[[Tensor], Tensor]
    grid_of: Callable[[int, int, int], GridTHW | None]
    visual: VisualLayout
    num_visual_tokens: int
    num_encoder_parameters: int


def locate_sources(config: Config) -> Sources:
    """Finds the bases and takes their fingerprints.

    Raises:
        UserError: A checkpoint is not there.
    """
    from vlmcap.models.checkpoint import fingerprint, locate

    memo = Path(config.paths.cache_dir) / "fingerprints.json"
    folders: dict[str, Path] = {}
    bases: dict[str, Fingerprint] = {}
    for part in ("model",) if config.is_whole else ("encoder", "llm"):
        settings, wanted = getattr(config, part), "vision_" if part == "encoder" else None
        folders[part] = locate(settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate, part=wanted)
        bases[part] = fingerprint(folders[part], settings.checkpoint, memo, wanted)
    return Sources(folders, bases)


def assemble(config: Config, *, is_fresh: bool = True) -> Assembly:
    """The model of a configuration, its trained parts fresh or warm-started.

    Args:
        config: As `prepare` returned it.
        is_fresh: False where a checkpoint's weights will follow, so that `projector.checkpoint` need not be there any more.

    Raises:
        UserError: A part is missing or the parts do not fit.
    """
    sources = locate_sources(config)
    return _assemble_whole(config, sources) if config.is_whole else _assemble_parts(config, sources, is_fresh)


def _assemble_parts(config: Config, sources: Sources, is_fresh: bool) -> Assembly:
    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.models.checkpoint import locate
    from vlmcap.models.layout import VisualRun
    from vlmcap.models.llm.load import context_length, text_width
    from vlmcap.models.projectors import build_projector, load_projector_weights

    folder = sources.folders["llm"]
    encoder = load_encoder(config, sources.folders["encoder"])
    prompt = load_prompt_of(config, folder)
    spec = projector_spec(config, encoder, text_width(folder), len(prompt.question_ids))
    spec.check()
    grids = encoder.possible_grids(config.data.num_frames)
    visual = VisualRun(spec.num_tokens, grids[0])
    num_visual = check_context(config, visual, grids, prompt, context_length(folder))
    projector = build_projector(spec)
    if is_fresh and (start := config.projector.checkpoint):
        key = "projector.checkpoint"
        load_projector_weights(projector, start if Path(start).exists() else locate(start, None, key=key, part="multi_modal_projector"))
    train_encoder(config, encoder)
    llm = add_adapters(config, load_llm(config, folder))
    captioner = VideoCaptioner(encoder, projector, llm, prompt, generation_settings(config))
    return Assembly(captioner, sources, encoder.transform, encoder.transform.grid_thw, visual, num_visual, _count(encoder))


def _assemble_whole(config: Config, sources: Sources) -> Assembly:
    from vlmcap.models.layout import VisualRun
    from vlmcap.models.llm.load import context_length

    folder = sources.folders["model"]
    parts = load_whole(config, folder)
    prompt = load_prompt_of(config, folder, visual_prefix=parts.visual_prefix, visual_suffix=parts.visual_suffix)
    grids = parts.encoder.possible_grids(config.data.num_frames)
    visual = parts.visual_layout or VisualRun(parts.num_tokens, grids[0])
    num_visual = check_context(config, visual, grids, prompt, context_length(folder))
    train_encoder(config, parts.encoder)
    llm = add_adapters(config, parts.llm)
    captioner = parts.captioner_class(parts.encoder, parts.projector, llm, prompt, generation_settings(config))
    transform = parts.encoder.transform
    return Assembly(captioner, sources, transform, transform.grid_thw, visual, num_visual, _count(parts.encoder))


def generation_settings(config: Config) -> GenerationSettings:
    """How captions are decoded."""
    from vlmcap.models.captioner import GenerationSettings

    known = {field.name for field in dataclasses.fields(GenerationSettings)}
    chosen = {name: value for name, value in dataclasses.asdict(config.evaluation).items() if name in known}
    return GenerationSettings(config.llm.max_new_tokens, **chosen)


def check_context(config: Config, visual: VisualLayout, grids: Sequence[GridTHW], prompt: PromptEncoder, context: int) -> int:
    """Visual tokens of the largest clip; `UserError` if they, the prompt and the longest caption exceed the model's positions.

    Args:
        config: Of the run.
        visual: Places of the visual tokens.
        grids: Sizes that a clip may have.
        prompt: Text around them.
        context: Positions of the language model.
    """
    layouts = [visual(grid) for grid in grids]
    num_visual = max(sum(part for part in layout if isinstance(part, int)) for layout in layouts)
    text = prompt.num_prompt_tokens + max(sum(len(part) for part in layout if not isinstance(part, int)) for layout in layouts)
    longest = max(config.llm.max_caption_tokens, config.llm.max_new_tokens)
    if num_visual + text + longest > context:
        name, mend = f"llm={config.llm.name}", "choose a projector that gives fewer tokens"
        if config.projector.reducer is Reducer.none:
            mend = "set projector.reducer=pool"
        if config.is_whole:
            name, mend = f"model={config.model.name}", "lower encoder.max_patches where frames keep their aspect ratio"
        raise UserError(
            f"{num_visual} visual tokens, {text} of the prompt and {longest} of the caption exceed the context of {context} tokens "
            f"of {name}; lower data.num_frames, {mend}, or lower llm.max_caption_tokens and llm.max_new_tokens"
        )
    return num_visual


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
