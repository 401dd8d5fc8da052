"""Exports a fine-tuned model with merged adapters to a folder in Hugging Face layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vlmcap
from vlmcap.assembly.components import dtype_of, load_prompt_of, lora_of
from vlmcap.assembly.model import generation_settings
from vlmcap.compose import to_plain, write_yaml
from vlmcap.config import Config, EncoderTuning, EncoderTuningConfig, FullConfig, LoraConfig, Quantization
from vlmcap.config_saved import saved_config
from vlmcap.errors import UserError, first_line
from vlmcap.files import new_folder
from vlmcap.libraries import silence_libraries
from vlmcap.locks import CLAIMS, claimed
from vlmcap.terminal import progress_reporter
from vlmcap.training.checkpoints.load import (
    EXPORT_COMPONENTS,
    EXPORT_CONFIG,
    EXPORT_FOLDER,
    EXPORT_ORIGIN,
    check_base_checkpoints,
    is_export,
    read_checkpoint,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = ("bfloat16", "float16", "float32")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_SAMPLING = (  # keys of the base model's file that the run's settings replace
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "num_beams",
    "length_penalty",
    "max_length",
)


@dataclass(frozen=True, slots=True)
class Exported:
    """Result of an export.

    Attributes:
        folder: Exported folder in Hugging Face layout.
        class_name: Class of the model in transformers.
        num_bytes: Size of all files in bytes.
        dtype: Dtype of the weights.
        difference: Difference of the logits before and after the merge; see `merged_model`.
    """

    folder: Path
    class_name: str
    num_bytes: int
    dtype: str
    difference: float


def export(
    checkpoint: str | Path,
    output: Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    overrides: Mapping[str, Any] | None = None,
) -> Exported:
    """Exports the model of a checkpoint; the output folder appears only when it is complete.

    Args:
        checkpoint: Checkpoint file that train.py wrote.
        output: Folder that does not exist or is empty.
        dtype: Dtype of the weights, one of `DTYPES`; None uses the precision of the run.
        device: Device on which adapters are merged, such as "cuda:0"; it must hold the unquantised language model.
        overrides: Values that replace those of the checkpoint's configuration, by dotted key.

    Raises:
        UserError: The output is in use, the checkpoint or its base checkpoint cannot be used, or the merge changes the
            predictions of the model.
    """
    silence_libraries()
    # Checked before the lock, for a quick answer, and again inside, when another export may have finished.
    check_output(output)
    if is_export(Path(checkpoint)):
        raise UserError(
            f"--checkpoint {checkpoint} is an exported folder already; copy it, or pass the .ckpt file of a run"
        )
    content = read_checkpoint(checkpoint)
    config = saved_config(content["vlmcap"]["config"], overrides)
    # The lock is beside the output folder, which must not exist before it is complete.
    with claimed(
        output.absolute().parent / CLAIMS / output.name,
        f"--output {output} is being written",
        "wait for it, or name a new folder",
    ):
        check_output(output)
        return write_export(
            config, content, Path(checkpoint), output, dtype=_dtype(dtype, config), device=_device(device)
        )


def write_export(
    config: Config,
    content: Mapping[str, Any],
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Exported:
    """Exports the model of a checkpoint that was read already; see `export`.

    Args:
        config: Configuration of the run, with the present locations of its base checkpoints.
        content: Content of the checkpoint.
        checkpoint: Checkpoint file.
        output: Folder that does not exist or is empty.
        dtype: Dtype of the weights.
        device: Device on which adapters are merged.

    Raises:
        UserError: See `export`.
    """
    if config.is_pretrained_vlm and config.tuning.encoder_tuning is not EncoderTuning.none:
        raise UserError(
            f"model={config.model.name} was trained with tuning.encoder={config.tuning.encoder_tuning.name}, and the "
            "trained encoder of a pretrained VLM cannot be exported; caption with the checkpoint itself"
        )
    # 1. Merge the adapters into the base checkpoint.
    folder = _base_folder(config, content)
    _report(f"reading {folder}")
    model, difference = _merge(config, folder, content["state_dict"], dtype, device)
    # 2. Write model, tokenizer, settings and projector; the folder gets its name when it is complete.
    output.parent.mkdir(parents=True, exist_ok=True)
    origin = _origin(checkpoint, content, str(dtype).removeprefix("torch."), difference)
    # Size in the dtype of the export, before the disk is filled.
    _report(f"writing {_gigabytes(sum(p.numel() * p.element_size() for p in model.parameters()))} to {output}")
    try:
        with progress_reporter("writing the model"), new_folder(output) as partial:
            _write(partial, model, config, folder, content["state_dict"], origin)
    except OSError as error:
        raise UserError(f"--output {output} could not be written: {first_line(error)}") from error
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return Exported(output, type(model).__name__, size, origin["dtype"], difference)


def describe_export(exported: Exported) -> str:
    """Returns the final message: the folder, its size, and how to load it."""
    is_language = exported.class_name.endswith("ForCausalLM")
    loader = "AutoModelForCausalLM" if is_language else exported.class_name
    return (
        f"{exported.class_name}, {_gigabytes(exported.num_bytes)} in {exported.dtype}: {exported.folder}\n"
        f"Load it with transformers.{loader}.from_pretrained({str(exported.folder)!r}) or `vllm serve "
        f"{exported.folder}`; "
        f"caption with `vlmcap caption PATH --checkpoint {exported.folder}`."
    )


def check_output(output: Path) -> None:
    """Raises a `UserError` unless the output folder does not exist or is empty."""
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; name a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a new folder")


def as_exported(config: Config, folder: Path) -> Config:
    """Returns the configuration of a run with the exported model as its base checkpoint.

    The adapters of the language model are merged into its weights, so the configuration trains nothing of it.

    Args:
        config: Configuration of the run.
        folder: Exported folder.
    """
    component = "model" if config.is_pretrained_vlm else "llm"
    before = config.tuning
    # The merged weights are frozen in the exported model, so that only the projector counts as trained.
    tuning = FullConfig(before.name, epochs=before.num_epochs, projector_lr=before.projector_lr, llm_lr=0.0)
    if isinstance(before, EncoderTuningConfig):
        # Only the adapters of the encoder remain, which are on all its linear layers.
        is_adapted, default = before.encoder is EncoderTuning.lora, LoraConfig()
        lora = (
            dataclasses.replace(before.lora, target_modules=default.target_modules, use_experts=False)
            if is_adapted
            else default
        )
        tuning = dataclasses.replace(tuning, encoder=before.encoder, encoder_lr=before.encoder_lr, lora=lora)
    changed = dataclasses.replace(
        config, tuning=tuning, llm=dataclasses.replace(config.llm, quantization=Quantization["none"])
    )
    base = dataclasses.replace(getattr(changed, component), checkpoint=str(folder), revision=None)
    return dataclasses.replace(changed, **{component: base})


def checkpoint_sha256(checkpoint: Path) -> str:
    """Returns the SHA-256 of a checkpoint file."""
    with checkpoint.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dtype(name: str | None, config: Config) -> torch.dtype:
    import torch

    if name is None:
        return dtype_of(config.hardware.precision)
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is unknown; choose one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(name: str) -> str:
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; pass cpu or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name} needs a CUDA device, but there is none; leave --device out to merge on the CPU"
        )
    return name


def _base_folder(config: Config, content: Mapping[str, Any]) -> Path:
    """Returns the folder of the base checkpoint, after checking that it is the one that the run was trained on."""
    from vlmcap.models.checkpoint import fingerprint, locate

    component = "model" if config.is_pretrained_vlm else "llm"
    settings = getattr(config, component)
    folder = locate(settings.checkpoint, settings.revision, key=f"{component}.checkpoint", gate=settings.gate)
    base = fingerprint(folder, settings.checkpoint, Path(config.paths.cache_dir) / "fingerprints.json")
    # Weights of another base would merge without an error, and give nonsense.
    check_base_checkpoints({component: content["vlmcap"]["base_checkpoints"][component]}, {component: base.as_dict()})
    return folder


def _merge(
    config: Config, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> tuple[Any, float]:
    from vlmcap.models.llm.adapt import add_lora
    from vlmcap.models.llm.merge import merged_model
    from vlmcap.models.pretrained.merged import merged_pretrained

    # Untrained adapters are in no checkpoint and have no effect.
    is_adapted = config.tuning.use_lora and any(
        stage.adapter_lr > 0 and stage.epochs for stage in config.tuning.stages.values()
    )
    adapt: Callable[[nn.Module], nn.Module] | None = (
        (lambda model: add_lora(model, lora_of(config))) if is_adapted else None
    )
    with progress_reporter("merging layers") as progress:
        settings: dict[str, Any] = {"adapt": adapt, "dtype": dtype, "device": device, "progress": progress}
        if config.is_pretrained_vlm:
            return merged_pretrained(folder, weights, **settings)
        return merged_model(folder, weights, **settings)


def _write(
    folder: Path, model: Any, config: Config, base: Path, weights: Mapping[str, Tensor], origin: Mapping[str, Any]
) -> None:
    from vlmcap.models.llm.merge import save_merged

    save_merged(model, base, folder, _PROCESSOR if config.is_pretrained_vlm else ())
    # vLLM and other programs may still read the file with transformers 4.
    _add_transformers4_keys(folder / "config.json")
    _write_generation(folder, config, base)
    if config.llm.chat_template:
        (folder / "chat_template.jinja").write_text(config.llm.chat_template, encoding="utf-8")
    write_components(folder, config, weights, origin)


def write_components(folder: Path, config: Config, weights: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
    """Writes projector, trained encoder weights, configuration and origin into a subfolder of the export."""
    from safetensors.torch import save_file

    beside = folder / EXPORT_FOLDER
    beside.mkdir()
    for component in EXPORT_COMPONENTS:
        prefix = f"captioner.{component}."
        component_weights = {
            name.removeprefix(prefix): tensor.contiguous()
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        if component_weights:
            save_file(component_weights, beside / f"{component}.safetensors")
    # "." stands for the folder itself, which may be moved; `read_export` fills in the real one.
    write_yaml(to_plain(as_exported(config, Path("."))), beside / EXPORT_CONFIG)
    (beside / EXPORT_ORIGIN).write_text(json.dumps(origin, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _add_transformers4_keys(file: Path) -> None:
    """Adds `rope_theta` at the place where transformers 4 reads it; otherwise it would silently use 10 000."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for section in (values, values.get("text_config") or {}):
        rope = section.get("rope_parameters") or {}
        if "rope_theta" in rope:
            section["rope_theta"] = rope["rope_theta"]
            # transformers 4 keeps scaled rotary embeddings, such as YaRN, in a key of their own.
            if rope.get("rope_type", "default") != "default":
                section["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_generation(folder: Path, config: Config, base: Path) -> None:
    """Writes generation settings that stop at the end of captions and decode like the evaluation of the run."""
    file = folder / "generation_config.json"
    prompt = load_prompt_of(config, base)
    settings = generation_settings(config)
    values = json.loads(file.read_text(encoding="utf-8"))
    # Everything of the base model that is about sampling goes, and the settings of the evaluation replace it.
    values = {name: value for name, value in values.items() if name not in _SAMPLING}
    chosen = {name: value for name, value in settings.as_arguments().items() if value is not None}
    chosen |= {
        "repetition_penalty": settings.rules.repetition_penalty,
        "eos_token_id": prompt.stop_ids,
        "pad_token_id": prompt.pad_id,
    }
    file.write_text(json.dumps(values | chosen, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _origin(checkpoint: Path, content: Mapping[str, Any], dtype: str, difference: float) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": checkpoint_sha256(checkpoint),
        "step": int(content["global_step"]),
        "base_checkpoints": content["vlmcap"]["base_checkpoints"],
        "plugins": content["vlmcap"].get("plugins", {}),
        "dtype": dtype,
        "logit_difference": difference,
        "vlmcap": vlmcap.__version__,
    }


def _report(text: str) -> None:
    print(f"export: {text}", file=sys.stderr, flush=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
