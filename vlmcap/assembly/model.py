"""Assembles the model of a configuration from its components, or loads a pretrained VLM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.base_checkpoints import BaseCheckpoints, locate_base_checkpoints
from vlmcap.assembly.components import (
    add_adapters,
    autocast_dtype,
    compile_blocks,
    load_encoder,
    load_llm,
    load_prompt_of,
    load_vlm,
    loss_chunk_bytes,
    projector_sizes,
    train_encoder,
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
    """Description of a model before its weights are loaded: sizes, prompt, and positions of visual tokens.

    Attributes:
        feature_plan: Configuration, base checkpoints, and the vision encoder on the meta device.
        prompt: Tokenizer of the language model, and the text around the visual tokens.
        projector: Sizes of the projector; None for a pretrained VLM, which brings its projector.
        visual: Function from a clip's size and times to its placeholders and the text between them; picklable.
        context: Context length of the language model in tokens.
    """

    feature_plan: FeaturePlan
    prompt: PromptEncoder
    projector: ProjectorSizes | None
    visual: VisualLayout
    context: int

    @property
    def config(self) -> Config:
        """Run configuration, as `prepare` returned it."""
        return self.feature_plan.config

    @property
    def grids(self) -> Sequence[GridTHW]:
        """Possible sizes of a clip in patches."""
        return self.feature_plan.meta_encoder.possible_grids(self.config.data.num_frames)


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model, and what the data module needs to know about it.

    Attributes:
        captioner: The model.
        feature_plan: See `ModelSpec`.
        visual: Function from a clip's size and times to its placeholders and the text between them; picklable.
        num_visual_tokens: V, the largest number of visual tokens of a clip.
        features: Stored features of the clips; None if the captioner encodes frames.
    """

    captioner: VideoCaptioner
    feature_plan: FeaturePlan
    visual: VisualLayout
    num_visual_tokens: int
    features: Features | None = None

    @property
    def base_checkpoints(self) -> BaseCheckpoints:
        """The frozen base checkpoints."""
        return self.feature_plan.base_checkpoints

    @property
    def num_encoder_parameters(self) -> int:
        """Number of parameters of the encoder, which need not be loaded."""
        return sum(parameter.numel() for parameter in self.feature_plan.meta_encoder.parameters())


def describe_model(config: Config) -> ModelSpec:
    """Finds the base checkpoints, and checks that the components fit together, before weights are loaded.

    Raises:
        UserError: A checkpoint is missing, or the components do not fit together.
    """
    from vlmcap.models.llm.attention import check_packing
    from vlmcap.models.llm.load import context_length, text_width
    from vlmcap.models.llm.prompt import VisualRun
    from vlmcap.models.projectors import check_projector, count_tokens

    base_checkpoints = locate_base_checkpoints(config)
    # 1. Find the checkpoints, and check what their configuration files alone decide.
    group = "model" if config.is_pretrained_vlm else "llm"
    folder, name = base_checkpoints.folders[group], f"{group}={config.component_names[group]}"
    if config.data.batching is Batching.packed:
        check_packing(folder, name, is_vlm=config.is_pretrained_vlm)
    _check_decoding(config, folder, name)
    # 2. Build the encoder on the meta device, which knows the possible patch grids of a clip.
    encoder = load_encoder(config, base_checkpoints.folders, is_meta=True)
    grids, context = encoder.possible_grids(config.data.num_frames), context_length(folder)
    # 3. Prompt and visual tokens: a pretrained VLM brings the text around them, otherwise the projector gives a plain
    # run.
    if config.is_pretrained_vlm:
        sizes, meta_vlm = None, load_vlm(config, folder, is_meta=True)
        prompt = load_prompt_of(
            config, folder, visual_prefix=meta_vlm.visual_prefix, visual_suffix=meta_vlm.visual_suffix
        )
        # The layout without a tokenizer counts no text between frames; `_assemble_vlm` checks the context again.
        visual = meta_vlm.layout(grids[0])
    else:
        prompt = load_prompt_of(config, folder)
        sizes = projector_sizes(config, encoder, text_width(folder), len(prompt.question_ids))
        check_projector(config.projector, sizes)
        visual = VisualRun(partial(count_tokens, config.projector, sizes), grids[0])
    # 4. Check that the largest clip with the longest caption fits into the context.
    num_visual = check_context(config, visual, grids, prompt, context)
    feature_plan = FeaturePlan(config, base_checkpoints, encoder, grid_of_frames(config, encoder), num_visual)
    return ModelSpec(feature_plan, prompt, sizes, visual, context)


def _check_decoding(config: Config, folder: Path, model: str) -> None:
    """Raises a `UserError` for settings of the native loop if transformers must generate the captions."""
    from vlmcap.models.decoding.engine import supports_native_engine
    from vlmcap.models.llm.load import language_config
    from vlmcap.models.llm.prompt import generation_config

    chosen, default = config.evaluation, EvaluationConfig()
    # Settings of the native loop. They have no effect on `generate`, which runs architectures that the loop does not
    # know.
    names = ("clips_per_slot", "speculate_ngram", "engine", "cuda_graphs") if chosen.engine is not Engine.vllm else ()
    key = next((name for name in names if getattr(chosen, name) != getattr(default, name)), None)
    # The language model of a plugin has no folder in Hugging Face layout that could be inspected.
    is_known = maker_of("llm", config.llm.kind) is None
    if (
        key is not None
        and is_known
        and not supports_native_engine(language_config(folder)[0], generation_config(folder))
    ):
        raise UserError(
            f"evaluation.{key}={as_text(getattr(chosen, key))} has no effect with {model}, whose captions are "
            f"generated by transformers; leave evaluation.{key} out"
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
    """Loads the weights of a model.

    Args:
        spec: Result of `describe_model`.
        features: Stored features of the clips, with which the encoder is not loaded; None if frames are encoded.
        is_fresh: Whether the trained components start fresh, from `projector.checkpoint` if it is set. False if the
            weights of a checkpoint will be loaded, for which `projector.checkpoint` need not exist any more.
        llm: Replacement of the language model if another program runs it; not supported for a pretrained VLM.
        num_kept_layers: Last layers of the language model that gradient checkpointing does not recompute.
        is_meta: Whether to leave frozen weights on the meta device, in a process that receives shards from another.

    Raises:
        UserError: A component cannot be loaded, or the text between visual tokens exceeds the context.
    """
    if spec.projector is None:
        return _assemble_vlm(spec, features, num_kept_layers)
    return _assemble_components(spec, features, is_fresh, llm, num_kept_layers, is_meta)


def _assemble_components(
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

    config, folders = spec.config, spec.feature_plan.base_checkpoints.folders
    visual, settings, sizes = spec.visual, config.projector, spec.projector
    assert sizes is not None
    if features is not None and features.pool_size is not None and isinstance(settings, TokenProjectorConfig):
        from vlmcap.data.features.feature_dataset import pooled_grid

        # The features are pooled already. Pooling has no weights, so a checkpoint fits a projector with and without it.
        frames, *side = pooled_grid(spec.grids[0], features.pool_size)
        sizes = dataclasses.replace(sizes, grid=reduced_grid(settings, sizes.grid))
        settings = dataclasses.replace(settings, reducer=Reducer.none)
        visual = VisualRun(partial(count_tokens, settings, sizes), (frames, side[0], side[1]))
    # 1. Projector.
    projector = build_projector(settings, sizes)
    if is_fresh and config.projector.checkpoint:
        warm_start(projector, config.projector.checkpoint)
    # 2. Encoder, which stays on disk if the features are stored.
    encoder = None
    if features is None:
        encoder = load_encoder(config, folders, is_meta=is_meta).requires_grad_(False)
        train_encoder(config, encoder)
    # 3. Language model; a measurement or an engine may bring another one.
    if llm is None:
        llm = add_adapters(config, load_llm(config, folders["llm"], is_meta=is_meta), num_kept_layers)
    compile_blocks(config, llm)
    captioner = VideoCaptioner(
        encoder, projector, llm, spec.prompt, generation_settings(config), **captioner_options(spec, visual)
    )
    return Assembly(captioner, spec.feature_plan, visual, spec.feature_plan.num_visual_tokens, features)


def _assemble_vlm(spec: ModelSpec, features: Features | None, num_kept_layers: int) -> Assembly:
    config = spec.config
    vlm = load_vlm(config, spec.feature_plan.base_checkpoints.folders["model"])
    visual = vlm.layout(spec.grids[0])
    # Checked again, because only the tokenizer gives the text between visual tokens.
    num_visual = check_context(config, visual, spec.grids, spec.prompt, spec.context)
    encoder = vlm.encoder if features is None else None
    if encoder is not None:
        train_encoder(config, encoder)
    llm = add_adapters(config, vlm.llm, num_kept_layers)
    compile_blocks(config, llm)
    options = captioner_options(spec, visual)
    captioner = vlm.captioner_class(encoder, vlm.projector, llm, spec.prompt, generation_settings(config), **options)
    return Assembly(captioner, spec.feature_plan, visual, num_visual, features)


def captioner_options(spec: ModelSpec, visual: VisualLayout) -> dict[str, Any]:
    """Returns the arguments of a captioner besides its components."""
    return {
        "loss_chunk_bytes": loss_chunk_bytes(spec.config),
        "autocast_dtype": autocast_dtype(spec.config),
        "reader": PathReader(spec.feature_plan, spec.prompt, visual),
    }


def warm_start(projector: Projector, checkpoint: str) -> None:
    """Loads the weights of an earlier projector.

    Raises:
        UserError: The checkpoint does not exist, or does not fit.
    """
    from vlmcap.models.checkpoint import locate
    from vlmcap.models.projectors import load_projector_weights

    # A folder or a weight file on this machine, else a hub id of a LLaVA model with a projector.
    is_here = Path(checkpoint).exists()
    folder = (
        checkpoint
        if is_here
        else locate(checkpoint, None, key="projector.checkpoint", tensor_filter="multi_modal_projector")
    )
    load_projector_weights(projector, folder)


def generation_settings(config: Config) -> GenerationSettings:
    """Returns the settings of decoding."""
    from vlmcap.models.decoding.settings import GenerationSettings

    is_merged = config.evaluation.merge_adapters is True
    return GenerationSettings(
        config.llm.new_tokens, config.evaluation, config.data.eval_batch_size, is_merged=is_merged
    )


def check_context(
    config: Config, visual: VisualLayout, grids: Sequence[GridTHW], prompt: PromptEncoder, context: int
) -> int:
    """Checks that the largest clip, the prompt and the longest caption fit into the context.

    Args:
        config: Run configuration.
        visual: Layout of the visual tokens.
        grids: Possible sizes of a clip in patches.
        prompt: Encoder of the text around the visual tokens.
        context: Context length of the language model in tokens.

    Returns:
        Number of visual tokens of the largest clip.

    Raises:
        UserError: They do not fit.
    """
    latest = latest_times(config.data.num_frames)
    layouts = [visual(grid, latest) for grid in grids]
    # A layout mixes numbers of placeholders with lists of token ids, such as the timestamp between two frames.
    num_visual = max(sum(run for run in layout if isinstance(run, int)) for layout in layouts)
    text = prompt.num_prompt_tokens + max(
        sum(len(run) for run in layout if not isinstance(run, int)) for layout in layouts
    )
    check_length(config, num_visual, text, context)
    return num_visual


def latest_times(num_frames: int) -> FrameTimes:
    """Returns frame times whose text in a prompt is at least as long as that of any clip."""
    from vlmcap.data.decoding.container import DecodeLimits

    return (DecodeLimits().max_duration_s,) * num_frames


def check_length(config: Config, num_visual: int, text: int, context: int) -> None:
    """Raises a `UserError` if visual tokens, prompt tokens and the longest caption exceed the context."""
    longest = max(config.llm.caption_tokens, config.llm.new_tokens)
    if num_visual + text + longest > context:
        name, hint = f"llm={config.llm.name}", "choose a projector that gives fewer tokens"
        if isinstance(config.projector, TokenProjectorConfig) and config.projector.reducer is Reducer.none:
            hint = "set projector.reducer=pool"
        if config.is_pretrained_vlm:
            name, hint = f"model={config.model.name}", "lower encoder.max_patches if frames keep their aspect ratio"
        raise UserError(
            f"{num_visual} visual tokens, {text} of the prompt and {longest} of the caption exceed the context of "
            f"{context} tokens of {name}; lower data.num_frames, {hint}, or lower llm.max_caption_tokens and "
            "llm.max_new_tokens"
        )
