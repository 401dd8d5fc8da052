"""A trained model put together for captions: its language model here, or in vLLM."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.components import dtype_of
from vlmcap.assembly.features import prepare_features
from vlmcap.assembly.model import Assembly, assemble, describe_model, generation_settings
from vlmcap.config import Config, Engine
from vlmcap.errors import UserError
from vlmcap.planning.make_plan import with_caption_plan
from vlmcap.training.checkpoints.export import as_exported
from vlmcap.training.checkpoints.load import is_export, load_weights, read_checkpoint, read_export, read_origin

if TYPE_CHECKING:
    from vlmcap.types import Clip


def assemble_trained(config: Config, checkpoint: Path, clips: Mapping[str, Sequence[Clip]]) -> tuple[Config, Assembly]:
    """The model of a checkpoint with its trained weights, and the configuration that it then has.

    Args:
        config: Of the checkpoint, with overrides.
        checkpoint: File of a run, or folder of `vlmcap export`.
        clips: Split name to clips, whose features are prepared.

    Raises:
        UserError: A part is missing, does not fit, or cannot be had in vLLM.
    """
    if config.evaluation.engine is Engine.vllm:
        return _assemble_on_vllm(config, checkpoint, clips)
    spec = describe_model(with_caption_plan(config))
    assembly = assemble(spec, prepare_features(spec.feature_plan, clips), is_fresh=False)
    load_weights(assembly, read_checkpoint(checkpoint), config)
    return config, assembly


def _assemble_on_vllm(config: Config, checkpoint: Path, clips: Mapping[str, Sequence[Clip]]) -> tuple[Config, Assembly]:
    """Encoder and projector here, the merged language model in vLLM, which is started when the clips are encoded."""
    import torch

    from vlmcap.models.vllm.captioner import TokenEmbeddings, VllmCaptioner
    from vlmcap.models.vllm.engine import check_vllm, engine_arguments, sampling_arguments, start_engine

    if config.is_pretrained_vlm:
        raise UserError(
            f"evaluation.engine=vllm takes prompts of embeddings, which are not all that model={config.model.name} "
            "needs; "
            "set evaluation.engine=native, or serve the folder of `vlmcap export` by vLLM itself"
        )
    sampling_arguments(generation_settings(config), [])  # refuses before anything is loaded
    check_vllm(config.evaluation.vllm_python)
    folder = merged_folder(config, checkpoint)
    config = as_exported(config, folder)
    dtype = dtype_of(config.hardware.precision)
    spec = describe_model(with_caption_plan(config))
    features = prepare_features(spec.feature_plan, clips)
    assembly = assemble(spec, features, is_fresh=False, llm=TokenEmbeddings(folder, dtype))
    load_weights(assembly, read_export(folder), config)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what encoding left is vLLM's
    arguments = engine_arguments(
        folder,
        config.evaluation,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=assembly.num_visual_tokens + assembly.captioner.prompt.num_prompt_tokens + config.llm.new_tokens,
        seed=config.seed,
    )
    engine = start_engine(arguments, config.evaluation.vllm_python)
    return config, dataclasses.replace(assembly, captioner=VllmCaptioner(assembly.captioner, engine))


def merged_folder(config: Config, checkpoint: Path) -> Path:
    """The exported folder of a checkpoint.

    That of `evaluation.vllm_model`, or one under `paths.cache_dir`, made on first use.

    Raises:
        UserError: The folder is of another checkpoint, or cannot be made.
    """
    from vlmcap.data.get_or_create import get_or_create
    from vlmcap.training.checkpoints.export import checkpoint_sha256, write_export

    given = config.evaluation.vllm_model
    if is_export(checkpoint):
        if given is not None and Path(given).resolve() != checkpoint.resolve():
            raise UserError(
                f"evaluation.vllm_model={given} is not the checkpoint {checkpoint}; leave evaluation.vllm_model out"
            )
        return checkpoint
    content = read_checkpoint(checkpoint)
    sha256 = checkpoint_sha256(checkpoint)
    if given is not None:
        _check_export(Path(given), checkpoint, sha256)
        return Path(given)
    dtype = dtype_of(config.hardware.precision)
    # The template is in the folder too, and may have been given on the command line.
    template = hashlib.sha256((config.llm.chat_template or "").encode()).hexdigest()
    name = f"{sha256[:16]}-{template[:8]}-{str(dtype).removeprefix('torch.')}"

    def make(target: Path) -> Any:
        return write_export(config, content, checkpoint, target, dtype=dtype)

    return get_or_create(Path(config.paths.cache_dir) / "exports" / name, make)


def _check_export(folder: Path, checkpoint: Path, sha256: str) -> None:
    """`UserError` unless the folder is an export of the checkpoint."""
    if not is_export(folder):
        raise UserError(
            f"evaluation.vllm_model={folder} is no folder of `vlmcap export`; name one, or leave it out to make one"
        )
    origin = read_origin(folder)
    if origin["checkpoint_sha256"] != sha256:
        raise UserError(
            f"evaluation.vllm_model={folder} was exported from {origin['checkpoint']}, which is another checkpoint "
            f"than {checkpoint}; "
            "name the folder of this one, or leave it out to make one"
        )
