"""A configuration's model: its parts joined, or a whole pretrained one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.build.activation_budget import num_kept_layers
from vlmcap.build.checks import check_length
from vlmcap.build.features import FeaturePlan, Features, grid_of_frames, prepare_features
from vlmcap.build.parts import (
    add_adapters,
    compile_blocks,
    load_encoder,
    load_llm,
    load_prompt_of,
    load_whole,
    loss_chunk_bytes,
    projector_spec,
    sketch_encoder,
    sketch_whole,
    train_encoder,
)
from vlmcap.build.processes import is_hollow
from vlmcap.build.sources import Sources, locate_sources
from vlmcap.config import Batching, Config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from vlmcap.models.captioner import GenerationSettings, VideoCaptioner
    from vlmcap.models.llm.prompt import PromptEncoder
    from vlmcap.models.projectors import Projector
    from vlmcap.types import Clip, GridTHW, VisualLayout


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
        num_encoder_parameters: Of the encoder, loaded or not.
        features: Where the clips' features are; None where the captioner encodes frames.
    """

    captioner: VideoCaptioner
    sources: Sources
    transform: Callable[[Tensor], Tensor]
    grid_of: Callable[[int, int, int], GridTHW | None]
    visual: VisualLayout
    num_visual_tokens: int
    num_encoder_parameters: int
    features: Features | None = None


def assemble(
    config: Config, clips: Mapping[str, Sequence[Clip]] | None = None, *, is_fresh: bool = True, llm: nn.Module | None = None
) -> Assembly:
    """The model of a configuration, its trained parts fresh or warm-started.

    Everything that can be refused is refused before clips are encoded, and they are encoded before the language model is loaded, so that
    the two never share the memory.

    Args:
        config: As `prepare` returned it.
        clips: Split name to clips, whose features will be read where the cache is on, and are made here where they are missing; None
            where frames will come, so that the encoder is needed.
        is_fresh: False where a checkpoint's weights will follow, so that `projector.checkpoint` need not be there any more.
        llm: Stands in for the language model where another program runs that; not for whole models.

    Raises:
        UserError: A part is missing or the parts do not fit.
    """
    from vlmcap.models.llm.packing import check_packing

    sources = locate_sources(config)
    if config.data.batching is Batching.packed:
        part = "model" if config.is_whole else "llm"
        check_packing(sources.folders[part], f"{part}={config.part_names[part]}")
    return _assemble_whole(config, sources, clips) if config.is_whole else _assemble_parts(config, sources, clips, is_fresh, llm)


def _assemble_parts(
    config: Config, sources: Sources, clips: Mapping[str, Sequence[Clip]] | None, is_fresh: bool, llm: nn.Module | None
) -> Assembly:
    from vlmcap.data.features.pooled import pooled_grid
    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.models.layout import VisualRun
    from vlmcap.models.llm.load import context_length, text_width
    from vlmcap.models.projectors import build_projector

    folder = sources.folders["llm"]
    sketch = sketch_encoder(config, sources.folders["encoder"])
    prompt = load_prompt_of(config, folder)
    spec = projector_spec(config, sketch, text_width(folder), len(prompt.question_ids))
    spec.check()
    grids = sketch.possible_grids(config.data.num_frames)
    visual = VisualRun(spec.num_tokens, grids[0])
    num_visual = check_context(config, visual, grids, prompt, context_length(folder))
    grid_of = grid_of_frames(config, sketch)
    features = _features(FeaturePlan(config, sources, sketch, grid_of, num_visual), clips)
    if features is not None and features.pool_size is not None:
        # The pool has no weights, so a checkpoint fits both projectors, this one and the one that pools frames that are encoded on the fly.
        frames, *side = pooled_grid(grids[0], features.pool_size)
        spec = dataclasses.replace(spec, grid=spec.reduced_grid(spec.grid), reducer="none")
        visual = VisualRun(spec.num_tokens, (frames, side[0], side[1]))
    projector = build_projector(spec)
    if is_fresh and config.projector.checkpoint:
        warm_start(projector, config.projector.checkpoint)
    encoder = None
    if features is None:
        load = sketch_encoder if is_hollow(config) else load_encoder
        encoder = load(config, sources.folders["encoder"]).requires_grad_(False)
        train_encoder(config, encoder)
    llm = llm if llm is not None else add_adapters(config, load_llm(config, folder), num_kept_layers(config))
    compile_blocks(config, llm)
    captioner = VideoCaptioner(encoder, projector, llm, prompt, generation_settings(config))
    captioner.loss_chunk_bytes = loss_chunk_bytes(config)
    return Assembly(captioner, sources, sketch.transform, grid_of, visual, num_visual, _count(sketch), features)


def _assemble_whole(config: Config, sources: Sources, clips: Mapping[str, Sequence[Clip]] | None) -> Assembly:
    from vlmcap.models.layout import VisualRun
    from vlmcap.models.llm.load import context_length

    folder = sources.folders["model"]
    sketch, outline, context = sketch_encoder(config, folder), sketch_whole(config, folder), context_length(folder)
    prompt = load_prompt_of(config, folder, visual_prefix=outline.visual_prefix, visual_suffix=outline.visual_suffix)
    grids = sketch.possible_grids(config.data.num_frames)
    num_visual = check_context(config, VisualRun(outline.num_tokens, grids[0]), grids, prompt, context)
    grid_of = grid_of_frames(config, sketch)
    features = _features(FeaturePlan(config, sources, sketch, grid_of, num_visual), clips)
    parts = load_whole(config, folder)
    visual = parts.visual_layout or VisualRun(parts.num_tokens, grids[0])
    num_visual = check_context(config, visual, grids, prompt, context)  # once more, with the text between visual tokens
    encoder = parts.encoder if features is None else None
    if encoder is not None:
        train_encoder(config, encoder)
    llm = add_adapters(config, parts.llm, num_kept_layers(config))
    compile_blocks(config, llm)
    captioner = parts.captioner_class(encoder, parts.projector, llm, prompt, generation_settings(config))
    captioner.loss_chunk_bytes = loss_chunk_bytes(config)
    return Assembly(captioner, sources, sketch.transform, grid_of, visual, num_visual, _count(sketch), features)


def _features(plan: FeaturePlan, clips: Mapping[str, Sequence[Clip]] | None) -> Features | None:
    return None if clips is None else prepare_features(plan, clips)


def warm_start(projector: Projector, checkpoint: str) -> None:
    """Puts the weights of an earlier projector into this one.

    Raises:
        UserError: There is none, or it does not fit.
    """
    from vlmcap.models.checkpoint import locate
    from vlmcap.models.projectors import load_projector_weights

    is_here = Path(checkpoint).exists()
    folder = checkpoint if is_here else locate(checkpoint, None, key="projector.checkpoint", part="multi_modal_projector")
    load_projector_weights(projector, folder)


def generation_settings(config: Config) -> GenerationSettings:
    """How captions are decoded."""
    from vlmcap.models.captioner import GenerationSettings

    known = {field.name for field in dataclasses.fields(GenerationSettings)}
    chosen = {name: value for name, value in dataclasses.asdict(config.evaluation).items() if name in known}
    chosen |= {"engine": config.evaluation.engine.value, "num_rows": config.data.eval_batch_size}
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
    check_length(config, num_visual, text, context)
    return num_visual


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
