"""Assembles a trained model for captioning, with its language model in this process or in vLLM."""

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
    """Assembles the model of a checkpoint with its trained weights.

    Args:
        config: Configuration of the checkpoint, with overrides.
        checkpoint: Checkpoint file of a run, or folder of `vlmcap export`.
        clips: Clips of each split, whose features are prepared.

    Returns:
        The configuration of the assembled model, which differs from `config` in vLLM, and the model.

    Raises:
        UserError: A component is missing, does not fit, or is not supported in vLLM.
    """
    if config.evaluation.engine is Engine.vllm:
        return _assemble_on_vllm(config, checkpoint, clips)
    spec = describe_model(with_caption_plan(config))
    assembly = assemble(spec, prepare_features(spec.feature_plan, clips), is_fresh=False)
    load_weights(assembly, read_checkpoint(checkpoint), config)
    return config, assembly


def _assemble_on_vllm(config: Config, checkpoint: Path, clips: Mapping[str, Sequence[Clip]]) -> tuple[Config, Assembly]:
    """Assembles encoder and projector here, and starts the merged language model in vLLM after clips are encoded."""
    import torch

    from vlmcap.models.vllm.captioner import TokenEmbeddings, VllmCaptioner
    from vlmcap.models.vllm.engine import check_vllm, engine_arguments, sampling_arguments, start_engine

    if config.is_pretrained_vlm:
        raise UserError(
            f"evaluation.engine=vllm passes prompts as embeddings, which are not enough for model={config.model.name}; "
            "set evaluation.engine=native, or serve the folder of `vlmcap export` with vLLM itself"
        )
    sampling_arguments(generation_settings(config), [])  # raises before anything is loaded
    check_vllm(config.evaluation.vllm_python)
    # 1. Merge the adapters, as vLLM reads a folder in Hugging Face layout.
    folder = merged_folder(config, checkpoint)
    # From here on, the exported folder is the base checkpoint, without adapters.
    config = as_exported(config, folder)
    # 2. Encode the clips, with an encoder and a projector in this process and only the embeddings of the LLM.
    dtype = dtype_of(config.hardware.precision)
    spec = describe_model(with_caption_plan(config))
    features = prepare_features(spec.feature_plan, clips)
    assembly = assemble(spec, features, is_fresh=False, llm=TokenEmbeddings(folder, dtype))
    load_weights(assembly, read_export(folder), config)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # returns the memory of encoding, which vLLM needs
    # 3. Start vLLM in the memory that is left.
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
    """Returns the exported folder of a checkpoint: `evaluation.vllm_model`, or a cached one in `paths.cache_dir`.

    Raises:
        UserError: The folder belongs to another checkpoint, or cannot be written.
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
    # The folder also holds the chat template, which the command line may have changed.
    template = hashlib.sha256((config.llm.chat_template or "").encode()).hexdigest()
    # One folder for each checkpoint, template and dtype.
    name = f"{sha256[:16]}-{template[:8]}-{str(dtype).removeprefix('torch.')}"

    def make(target: Path) -> Any:
        return write_export(config, content, checkpoint, target, dtype=dtype)

    return get_or_create(Path(config.paths.cache_dir) / "exports" / name, make)


def _check_export(folder: Path, checkpoint: Path, sha256: str) -> None:
    """Raises a `UserError` unless the folder is an export of the checkpoint."""
    if not is_export(folder):
        raise UserError(
            f"evaluation.vllm_model={folder} was not written by `vlmcap export`; give an exported folder, or leave it "
            "out to export one"
        )
    origin = read_origin(folder)
    # The hash decides, because a run folder may have moved.
    if origin["checkpoint_sha256"] != sha256:
        raise UserError(
            f"evaluation.vllm_model={folder} was exported from a different checkpoint ({origin['checkpoint']} with "
            f"SHA-256 {origin['checkpoint_sha256'][:12]}) than {checkpoint} (SHA-256 {sha256[:12]}); give the folder "
            "of this checkpoint, or leave it out to export one"
        )
