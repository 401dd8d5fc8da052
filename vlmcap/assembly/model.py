"""A configuration's model: its parts joined, or a whole pretrained one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.components import (
    BaseCheckpoints,
    add_adapters,
    autocast_dtype,
    build_meta_encoder,
    build_meta_vlm,
    compile_blocks,
    load_encoder,
    load_llm,
    load_prompt_of,
    load_vlm,
    locate_base_checkpoints,
    loss_chunk_bytes,
    projector_sizes,
    train_encoder,
    vision_component,
)
from vlmcap.assembly.datasets import FeaturePlan, PathReader, grid_of_frames
from vlmcap.config import Batching, Config, Engine, EvaluationConfig, Reducer, TokenProjectorConfig
from vlmcap.config.checks import as_text
from vlmcap.config.kinds import maker_of
from vlmcap.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from vlmcap.assembly.features import Features
    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.models.decoding.settings import GenerationSettings
    from vlmcap.models.llm.prompt import PromptEncoder
    from vlmcap.models.projectors import Projector, ProjectorSizes
    from vlmcap.types import FrameTimes, GridTHW, VisualLayout


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known of a model before any of its weights are loaded: sizes, prompt, and where its visual tokens go.

    Attributes:
        feature_plan: Configuration, base checkpoints, and the vision encoder without its weights.
        prompt: The language model's tokenizer and the text around the visual tokens.
        projector: Sizes of the projector; None for a whole pretrained model, which brings its own.
        visual: A clip's size and times -> placeholders, and text between them; picklable.
        context: Positions of the language model.
    """

    feature_plan: FeaturePlan
    prompt: PromptEncoder
    projector: ProjectorSizes | None
    visual: VisualLayout
    context: int

    @property
    def config(self) -> Config:
        """As `prepare` returned it."""
        return self.feature_plan.config

    @property
    def grids(self) -> Sequence[GridTHW]:
        """Sizes in patches that a clip may have."""
        return self.feature_plan.meta_encoder.possible_grids(self.config.data.num_frames)


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model and what data needs to know of it.

    Attributes:
        captioner: The model.
        feature_plan: As in `ModelSpec`.
        visual: A clip's size and times -> placeholders, and text between them; picklable.
        num_visual_tokens: V, the most that a clip may have.
        features: Where the clips' features are; None where the captioner encodes frames.
    """

    captioner: VideoCaptioner
    feature_plan: FeaturePlan
    visual: VisualLayout
    num_visual_tokens: int
    features: Features | None = None

    @property
    def sources(self) -> BaseCheckpoints:
        """The frozen base checkpoints."""
        return self.feature_plan.sources

    @property
    def num_encoder_parameters(self) -> int:
        """Parameters of the encoder, loaded or not."""
        return sum(parameter.numel() for parameter in self.feature_plan.meta_encoder.parameters())


def describe_model(config: Config) -> ModelSpec:
    """Finds the base checkpoints of a configuration and refuses what does not fit together, before anything is loaded or encoded.

    Raises:
        UserError: A checkpoint is missing, or the parts do not fit.
    """
    from vlmcap.models.llm.attention import check_packing
    from vlmcap.models.llm.load import context_length, text_width
    from vlmcap.models.llm.prompt import VisualRun
    from vlmcap.models.projectors import check_projector, count_tokens

    sources = locate_base_checkpoints(config)
    part = "model" if config.is_pretrained_vlm else "llm"
    folder = sources.folders[part]
    if config.data.batching is Batching.packed:
        check_packing(folder, f"{part}={config.component_names[part]}")
    _check_decoding(config, folder, f"{part}={config.component_names[part]}")
    encoder = build_meta_encoder(config, sources.folders[vision_component(config)])
    grids, context = encoder.possible_grids(config.data.num_frames), context_length(folder)
    if config.is_pretrained_vlm:
        sizes, cached_meta_encoder = None, build_meta_vlm(config, folder)
        prompt = load_prompt_of(
            config,
            folder,
            visual_prefix=cached_meta_encoder.visual_prefix,
            visual_suffix=cached_meta_encoder.visual_suffix,
        )
        visual = VisualRun(cached_meta_encoder.num_tokens, grids[0])
    else:
        prompt = load_prompt_of(config, folder)
        sizes = projector_sizes(config, encoder, text_width(folder), len(prompt.question_ids))
        check_projector(config.projector, sizes)
        visual = VisualRun(partial(count_tokens, config.projector, sizes), grids[0])
    num_visual = check_context(config, visual, grids, prompt, context)
    feature_plan = FeaturePlan(config, sources, encoder, grid_of_frames(config, encoder), num_visual)
    return ModelSpec(feature_plan, prompt, sizes, visual, context)


def _check_decoding(config: Config, folder: Path, model: str) -> None:
    """`UserError` for settings of our own decoding where transformers writes the captions of a language model."""
    from vlmcap.models.decoding.engine import supports_native_engine
    from vlmcap.models.llm.load import language_config
    from vlmcap.models.llm.prompt import generation_config

    chosen, default = config.evaluation, EvaluationConfig()
    names = ("clips_per_slot", "speculate_ngram", "engine", "cuda_graphs") if chosen.engine is not Engine.vllm else ()
    key = next((name for name in names if getattr(chosen, name) != getattr(default, name)), None)
    is_known = maker_of("llm", config.llm.kind) is None
    if (
        key is not None
        and is_known
        and not supports_native_engine(language_config(folder)[0], generation_config(folder))
    ):
        raise UserError(
            f"evaluation.{key}={as_text(getattr(chosen, key))} changes nothing with {model}, whose captions "
            "transformers writes; "
            f"leave evaluation.{key} out"
        )


def assemble(
    spec: ModelSpec,
    features: Features | None = None,
    *,
    is_fresh: bool = True,
    llm: nn.Module | None = None,
    num_kept_layers: int = 0,
    is_meta: bool = False,
) -> Assembly:
    """Loads the weights of a model, its trained parts fresh or warm-started.

    Args:
        spec: As `describe_model` returned it.
        features: Stored features of the clips, with which the encoder is not loaded; None where frames will come.
        is_fresh: False where a checkpoint's weights will follow, so that `projector.checkpoint` need not be there any
            more.
        llm: Stands in for the language model where another program runs that; not for whole models.
        num_kept_layers: Last layers of the language model that are not recomputed although it is checkpointed.
        is_meta: Leaves frozen weights on the meta device, for a process that receives its shards of them from another.

    Raises:
        UserError: A part cannot be loaded, or the text between visual tokens does not fit into the context.
    """
    if spec.projector is None:
        return _assemble_vlm(spec, features, num_kept_layers)
    return _assemble_parts(spec, features, is_fresh, llm, num_kept_layers, is_meta)


def _assemble_parts(
    spec: ModelSpec,
    features: Features | None,
    is_fresh: bool,
    llm: nn.Module | None,
    num_kept_layers: int,
    is_meta: bool,
) -> Assembly:
    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.models.llm.prompt import VisualRun
    from vlmcap.models.projectors import build_projector, count_tokens
    from vlmcap.models.projectors.reducers import reduced_grid

    config, folders = spec.config, spec.feature_plan.sources.folders
    visual, settings, sizes = spec.visual, config.projector, spec.projector
    assert sizes is not None
    if features is not None and features.pool_size is not None and isinstance(settings, TokenProjectorConfig):
        from vlmcap.data.features.feature_dataset import pooled_grid

        # The pool has no weights, so a checkpoint fits both projectors, this one and the one that pools frames that are
        # encoded on the fly.
        frames, *side = pooled_grid(spec.grids[0], features.pool_size)
        sizes = dataclasses.replace(sizes, grid=reduced_grid(settings, sizes.grid))
        settings = dataclasses.replace(settings, reducer=Reducer.none)
        visual = VisualRun(partial(count_tokens, settings, sizes), (frames, side[0], side[1]))
    projector = build_projector(settings, sizes)
    if is_fresh and config.projector.checkpoint:
        warm_start(projector, config.projector.checkpoint)
    encoder = None
    if features is None:
        load = build_meta_encoder if is_meta else load_encoder
        encoder = load(config, folders["encoder"]).requires_grad_(False)
        train_encoder(config, encoder)
    if llm is None:
        llm = add_adapters(config, load_llm(config, folders["llm"], is_meta=is_meta), num_kept_layers)
    compile_blocks(config, llm)
    captioner = VideoCaptioner(
        encoder, projector, llm, spec.prompt, generation_settings(config), **captioner_options(spec, visual)
    )
    return Assembly(captioner, spec.feature_plan, visual, spec.feature_plan.num_visual_tokens, features)


def _assemble_vlm(spec: ModelSpec, features: Features | None, num_kept_layers: int) -> Assembly:
    from vlmcap.models.llm.prompt import VisualRun

    config = spec.config
    parts = load_vlm(config, spec.feature_plan.sources.folders["model"])
    visual = parts.visual_layout or VisualRun(parts.num_tokens, spec.grids[0])
    num_visual = check_context(
        config, visual, spec.grids, spec.prompt, spec.context
    )  # once more, with the text between visual tokens
    encoder = parts.encoder if features is None else None
    if encoder is not None:
        train_encoder(config, encoder)
    llm = add_adapters(config, parts.llm, num_kept_layers)
    compile_blocks(config, llm)
    options = captioner_options(spec, visual)
    captioner = parts.captioner_class(
        encoder, parts.projector, llm, spec.prompt, generation_settings(config), **options
    )
    return Assembly(captioner, spec.feature_plan, visual, num_visual, features)


def captioner_options(spec: ModelSpec, visual: VisualLayout) -> dict[str, Any]:
    """Arguments of a captioner beside its parts.

    Memory of its loss, arithmetic of its captions, and the reader of its files.
    """
    return {
        "loss_chunk_bytes": loss_chunk_bytes(spec.config),
        "autocast_dtype": autocast_dtype(spec.config),
        "reader": PathReader(spec.feature_plan, spec.prompt, visual),
    }


def warm_start(projector: Projector, checkpoint: str) -> None:
    """Puts the weights of an earlier projector into this one.

    Raises:
        UserError: There is none, or it does not fit.
    """
    from vlmcap.models.checkpoint import locate
    from vlmcap.models.projectors import load_projector_weights

    is_here = Path(checkpoint).exists()
    folder = (
        checkpoint if is_here else locate(checkpoint, None, key="projector.checkpoint", part="multi_modal_projector")
    )
    load_projector_weights(projector, folder)


def generation_settings(config: Config) -> GenerationSettings:
    """How captions are decoded."""
    from vlmcap.models.decoding.settings import GenerationSettings

    is_merged = config.evaluation.merge_adapters is True
    return GenerationSettings(
        config.llm.new_tokens, config.evaluation, config.data.eval_batch_size, is_merged=is_merged
    )


def check_context(
    config: Config, visual: VisualLayout, grids: Sequence[GridTHW], prompt: PromptEncoder, context: int
) -> int:
    """Visual tokens of the largest clip.

    `UserError` if they, the prompt and the longest caption exceed the model's positions.

    Args:
        config: Of the run.
        visual: Places of the visual tokens.
        grids: Sizes that a clip may have.
        prompt: Text around them.
        context: Positions of the language model.
    """
    latest = latest_times(config.data.num_frames)
    layouts = [visual(grid, latest) for grid in grids]
    num_visual = max(sum(part for part in layout if isinstance(part, int)) for layout in layouts)
    text = prompt.num_prompt_tokens + max(
        sum(len(part) for part in layout if not isinstance(part, int)) for layout in layouts
    )
    check_length(config, num_visual, text, context)
    return num_visual


def latest_times(num_frames: int) -> FrameTimes:
    """Times whose text in a prompt is at least as long as that of any clip's."""
    from vlmcap.data.decoding.container import DecodeLimits

    return (DecodeLimits().max_duration_s,) * num_frames


def check_length(config: Config, num_visual: int, text: int, context: int) -> None:
    """`UserError` if visual tokens, those of the text around them and the longest caption exceed the model's positions."""
    longest = max(config.llm.caption_tokens, config.llm.new_tokens)
    if num_visual + text + longest > context:
        name, mend = f"llm={config.llm.name}", "choose a projector that gives fewer tokens"
        if isinstance(config.projector, TokenProjectorConfig) and config.projector.reducer is Reducer.none:
            mend = "set projector.reducer=pool"
        if config.is_pretrained_vlm:
            name, mend = f"model={config.model.name}", "lower encoder.max_patches where frames keep their aspect ratio"
        raise UserError(
            f"{num_visual} visual tokens, {text} of the prompt and {longest} of the caption exceed the context of "
            f"{context} tokens "
            f"of {name}; lower data.num_frames, {mend}, or lower llm.max_caption_tokens and llm.max_new_tokens"
        )
