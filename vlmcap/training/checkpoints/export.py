"""A fine-tuned model as a plain folder in Hugging Face layout, its adapters merged."""

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
    EXPORT_CONFIG,
    EXPORT_FOLDER,
    EXPORT_ORIGIN,
    EXPORT_PARTS,
    check_base_checkpoints,
    is_export,
    read_checkpoint,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = ("bfloat16", "float16", "float32")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_SAMPLING = (
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
    """What was written.

    Attributes:
        folder: In Hugging Face layout.
        class_name: Of the model, in transformers.
        num_bytes: Of all files.
        dtype: Of the weights.
        difference: Of the logits before and after the merge, as `merge` gives it.
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
    """Writes the model of a checkpoint, whole or not at all.

    Args:
        checkpoint: File that train.py wrote.
        output: A folder that does not exist or is empty.
        dtype: Of the weights, one of `DTYPES`; None is that of the run's arithmetic.
        device: Where adapters are merged, such as "cuda:0"; it has to hold the unquantised language model.
        overrides: Dotted keys to values over the checkpoint's configuration.

    Raises:
        UserError: The output is in use, the checkpoint or its base does not do, or the merge changes what the model
            says.
    """
    silence_libraries()
    check_output(output)
    if is_export(Path(checkpoint)):
        raise UserError(
            f"--checkpoint {checkpoint} is an exported folder already; copy it, or give the .ckpt file of a run"
        )
    content = read_checkpoint(checkpoint)
    config = saved_config(content["vlmcap"]["config"], overrides)
    # The claim lies beside the folder, which appears whole.
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
    """Writes the model of a checkpoint that was read already; see `export`.

    Args:
        config: Of the run, its bases where they are now.
        content: Of the checkpoint.
        checkpoint: Its file.
        output: A folder that does not exist or is empty.
        dtype: Of the weights.
        device: Where adapters are merged.

    Raises:
        UserError: As for `export`.
    """
    if config.is_pretrained_vlm and config.tuning.encoder_tuning is not EncoderTuning.none:
        raise UserError(
            f"model={config.model.name} was trained with tuning.encoder={config.tuning.encoder_tuning.name}, and a "
            "trained encoder "
            "cannot be put back into a whole model's folder; caption with the checkpoint itself"
        )
    folder = _base(config, content)
    _say(f"reading {folder}")
    model, difference = _merged(config, folder, content["state_dict"], dtype, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    origin = _origin(checkpoint, content, str(dtype).removeprefix("torch."), difference)
    _say(f"writing {_gigabytes(sum(p.numel() * p.element_size() for p in model.parameters()))} to {output}")
    try:
        with progress_reporter("writing the model"), new_folder(output) as partial:
            _write(partial, model, config, folder, content["state_dict"], origin)
    except OSError as error:
        raise UserError(f"--output {output} could not be written: {first_line(error)}") from error
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return Exported(output, type(model).__name__, size, origin["dtype"], difference)


def tell(exported: Exported) -> str:
    """What the user is told at the end: the folder, its size, and how it is loaded."""
    is_language = exported.class_name.endswith("ForCausalLM")
    loader = "AutoModelForCausalLM" if is_language else exported.class_name
    return (
        f"{exported.class_name}, {_gigabytes(exported.num_bytes)} in {exported.dtype}: {exported.folder}\n"
        f"Load it by transformers.{loader}.from_pretrained({str(exported.folder)!r}) or `vllm serve "
        f"{exported.folder}`; "
        f"caption by `vlmcap caption PATH --checkpoint {exported.folder}`."
    )


def check_output(output: Path) -> None:
    """`UserError` unless the folder can be written: it is not there, or empty."""
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; name a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a new folder")


def as_exported(config: Config, folder: Path) -> Config:
    """The run's configuration on the exported model.

    Its adapters are in the weights, and nothing more is trained of the language model.

    Args:
        config: Of the run.
        folder: Of the exported model, which takes the place of the base.
    """
    part = "model" if config.is_pretrained_vlm else "llm"
    before = config.tuning
    tuning = FullConfig(before.name, epochs=before.num_epochs, projector_lr=before.projector_lr, llm_lr=0.0)
    if isinstance(before, EncoderTuningConfig):
        # The adapters of the encoder alone are left, which are on all its layers.
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
    base = dataclasses.replace(getattr(changed, part), checkpoint=str(folder), revision=None)
    return dataclasses.replace(changed, **{part: base})


def checkpoint_sha256(checkpoint: Path) -> str:
    """Of the file's content."""
    with checkpoint.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dtype(name: str | None, config: Config) -> torch.dtype:
    import torch

    if name is None:
        return dtype_of(config.hardware.precision)
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is none of {', '.join(DTYPES)}; give one of them")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(name: str) -> str:
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; give cpu or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} needs a CUDA device and there is none; leave it out to merge on the CPU")
    return name


def _base(config: Config, content: Mapping[str, Any]) -> Path:
    """The folder of the language model, or of the whole one; it is the one that the run was trained on."""
    from vlmcap.models.checkpoint import fingerprint, locate

    part = "model" if config.is_pretrained_vlm else "llm"
    settings = getattr(config, part)
    folder = locate(settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate)
    base = fingerprint(folder, settings.checkpoint, Path(config.paths.cache_dir) / "fingerprints.json")
    check_base_checkpoints({part: content["vlmcap"]["bases"][part]}, {part: base.as_dict()})
    return folder


def _merged(
    config: Config, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> tuple[Any, float]:
    from vlmcap.models.llm.adapt import add_lora
    from vlmcap.models.llm.merge import merged_model
    from vlmcap.models.pretrained.merged import merged_pretrained

    # Adapters that no stage trained are in no checkpoint, and change nothing.
    is_adapted = config.tuning.use_lora and any(
        stage.adapter_lr > 0 and stage.epochs for stage in config.tuning.stages.values()
    )
    adapt: Callable[[nn.Module], nn.Module] | None = (
        (lambda model: add_lora(model, lora_of(config))) if is_adapted else None
    )
    with progress_reporter("merging layers") as progress:
        settings: dict[str, Any] = {"adapt": adapt, "dtype": dtype, "device": device, "progress": progress}
        if config.is_pretrained_vlm:
            return merged_pretrained(config.model.kind, folder, weights, **settings)
        return merged_model(folder, weights, **settings)


def _write(
    folder: Path, model: Any, config: Config, base: Path, weights: Mapping[str, Tensor], origin: Mapping[str, Any]
) -> None:
    from vlmcap.models.llm.merge import save_merged

    save_merged(model, base, folder, _PROCESSOR if config.is_pretrained_vlm else ())
    _write_older_names(folder / "config.json")
    _write_generation(folder, config, base)
    if config.llm.chat_template:
        (folder / "chat_template.jinja").write_text(config.llm.chat_template, encoding="utf-8")
    write_parts(folder, config, weights, origin)


def write_parts(folder: Path, config: Config, weights: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
    """Writes projector, trained encoder weights, configuration and origin into a new folder of an export."""
    from safetensors.torch import save_file

    beside = folder / EXPORT_FOLDER
    beside.mkdir()
    for part in EXPORT_PARTS:
        prefix = f"captioner.{part}."
        own = {
            name.removeprefix(prefix): tensor.contiguous()
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        if own:
            save_file(own, beside / f"{part}.safetensors")
    write_yaml(to_plain(as_exported(config, Path("."))), beside / EXPORT_CONFIG)
    (beside / EXPORT_ORIGIN).write_text(json.dumps(origin, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_older_names(file: Path) -> None:
    """Says the base of rotary positions as transformers 4 reads it too: there it would silently be 10 000."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for part in (values, values.get("text_config") or {}):
        rope = part.get("rope_parameters") or {}
        if "rope_theta" in rope:
            part["rope_theta"] = rope["rope_theta"]
            if rope.get("rope_type", "default") != "default":
                part["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_generation(folder: Path, config: Config, base: Path) -> None:
    """Makes the generation settings stop where captions end, and decode as the run's evaluation does."""
    file, prompt, settings = (
        folder / "generation_config.json",
        load_prompt_of(config, base),
        generation_settings(config),
    )
    values = json.loads(file.read_text(encoding="utf-8"))
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
        "bases": content["vlmcap"]["bases"],
        "plugins": content["vlmcap"].get("plugins", {}),
        "dtype": dtype,
        "logit_difference": difference,
        "vlmcap": vlmcap.__version__,
    }


def _say(text: str) -> None:
    print(f"export: {text}", file=sys.stderr, flush=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
