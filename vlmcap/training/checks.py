"""What a training run refuses before anything is made or loaded, and the checkpoint that it resumes from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.components import device_of, uses_expert_adapters
from vlmcap.config import Config, EncoderTuning, Engine, OptimKind, Precision, Quantization, Strategy
from vlmcap.errors import UserError, first_line
from vlmcap.training.processes import is_main, num_processes
from vlmcap.training.schedule import PARTS, StagePlan, peak_rate

if TYPE_CHECKING:
    import lightning as L

    from vlmcap.types import Clip

_EXAMPLE = "lightning.pytorch.callbacks.LearningRateMonitor"


def check_run(config: Config, resumed: Path | None) -> None:
    """Runs every check that needs nothing but the configuration.

    Args:
        config: Run configuration.
        resumed: Checkpoint that the run resumes from.

    Raises:
        UserError: One of them fails.
    """
    check_engine(config)
    check_stages(config)
    check_monitor(config)
    if is_main(config):
        check_folder(config, resumed)
    device_of(config)  # a missing GPU is reported
    check_strategy(config)
    extra_callbacks(config)
    check_launch(config)


def check_engine(config: Config) -> None:
    """`UserError` for an engine that cannot caption while weights change."""
    if config.evaluation.engine is Engine.vllm:
        raise UserError(
            "evaluation.engine=vllm is for evaluate.py, as vLLM holds merged weights and training changes them; leave "
            "it out here"
        )


def check_stages(config: Config) -> None:
    """`UserError` unless every stage trains something that there is."""
    named = {name: stage for name, stage in config.tuning.stages.items() if stage.epochs}
    stages = [*named.values()]
    if not stages:
        raise UserError(f"tuning={config.tuning.name} has no epoch to train; set tuning.epochs")
    for name, stage in named.items():
        if not any(peak_rate(stage, part) > 0 for part in PARTS):
            raise UserError(
                f"the stage {name} of tuning={config.tuning.name} trains nothing, as all its learning rates are 0; "
                f"set {'tuning.align_lr' if name == 'align' and len(config.tuning.stages) > 1 else 'tuning.projector_lr'} above 0"
            )
    tuned = config.tuning.encoder_tuning
    if tuned is not EncoderTuning.none and not any(stage.encoder_lr > 0 for stage in stages):
        raise UserError(
            f"tuning.encoder={tuned.name}, but nothing trains the encoder; set tuning.encoder_lr, or "
            "tuning.encoder=none"
        )


def check_monitor(config: Config) -> None:
    """`UserError` unless `monitor` will be measured in the validations of the loop."""
    from vlmcap.metrics import METRIC_NAMES
    from vlmcap.metrics.user_metrics import user_metrics

    has_facts = config.data.is_demo or config.evaluation.facts is not None
    visual_reliance = config.callbacks.visual_reliance
    looped = ["loss", *METRIC_NAMES, *user_metrics(), *(["facts/<fact>"] if has_facts else [])]
    looped += (
        ["visual_reliance/swapped/cider_drop"]
        if visual_reliance.enabled and visual_reliance.every_n_validations == 1
        else []
    )
    split, _, name = config.monitor.partition("/")
    groups = tuple(example.partition("/")[0] + "/" for example in looped if "/" in example)
    if split != "val" or not (name in looped or name.startswith(groups)):
        raise UserError(
            f"monitor={config.monitor} is not measured while training; choose val/ and one of {', '.join(looped)}"
        )


def check_facts(config: Config) -> None:
    """`UserError` where the monitored metric is a fact that `evaluation.facts` does not have."""
    from vlmcap.metrics import FactLexicon

    if not config.monitor.startswith("val/facts/") or config.evaluation.facts is None:
        return
    known = [*FactLexicon.from_json(Path(config.evaluation.facts)).phrases, "mean"]
    if config.monitor.removeprefix("val/facts/") not in known:
        raise UserError(f"monitor={config.monitor} is not measured; choose val/facts/ and one of {', '.join(known)}")


def check_followed(config: Config, clips: Mapping[str, Sequence[Clip]]) -> None:
    """`UserError` where the monitored metric can have no value with the clips that there are."""
    count = min(len(clips["val"]), config.evaluation.max_clips)
    if count < 2 and _compares_clips(config.monitor):
        raise UserError(
            f"monitor={config.monitor} compares clips with one another, and val has {count} clip for it; give more "
            f"(evaluation.max_clips is {config.evaluation.max_clips}), or set monitor=val/loss"
        )


def _compares_clips(metric: str) -> bool:
    """Whether a metric needs two clips, as CIDEr does, whose weights are how few clips have an n-gram, or an exchange of videos."""
    words = metric.split("/")[1:]
    return words in (["cider"], ["cider_d"]) or words[0] in ("swapped", "permuted", "visual_reliance")


def check_position(held: Mapping[str, Any], config: Config) -> None:
    """`UserError` unless the stages and the accumulation of a run can go on where its checkpoint stands.

    Args:
        held: What the module added to the checkpoint.
        config: Configuration of the run that resumes.
    """
    position, before, steps = held["position"], held["plan"], config.trainer.accumulate_grad_batches
    if position["batches"] and before["accumulate"] != steps:
        raise UserError(
            f"the checkpoint stands inside an epoch of trainer.accumulate_grad_batches={before['accumulate']}, where "
            f"{steps} cannot go "
            "on; resume with the same number, or from a checkpoint at the end of an epoch"
        )
    num_begun = position["epoch"] + bool(position["batches"])
    trained, asked = before["stages"][:num_begun], StagePlan(config.tuning.stages).stage_names()[:num_begun]
    if trained != asked:
        raise UserError(
            f"the checkpoint has trained {_epochs(trained)}, but tuning now begins with {_epochs(asked)}; keep the "
            "epochs of "
            "stages that have begun, or lengthen the last of them, or start a new run"
        )


def _epochs(names: Sequence[str]) -> str:
    """Such as "epochs align: 1, tune: 2"."""
    return "epochs " + (", ".join(f"{name}: {count}" for name, count in Counter(names).items()) or "none")


def check_strategy(config: Config) -> None:
    """`UserError` for devices that are not there, and for what the strategy cannot do."""
    import torch

    chosen, devices = config.trainer.strategy, config.hardware.devices
    if config.hardware.accelerator != "cpu" and torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise UserError(
            f"hardware.devices={devices}, but this machine has {torch.cuda.device_count()}; lower it to that"
        )
    if chosen is Strategy.fsdp2:
        _check_fsdp2(config)


def _check_fsdp2(config: Config) -> None:
    if config.llm.quantization is not Quantization["none"]:
        raise UserError(
            f"trainer=fsdp2 cuts weights into shards, which llm.quantization={config.llm.quantization.name} packs "
            "into blocks of its own; "
            "set llm.quantization=none, or trainer=ddp"
        )
    if config.hardware.precision is Precision.fp16:
        raise UserError(
            "trainer=fsdp2 has no scaler for hardware.precision=fp16; set hardware.precision=bf16 or fp32, or "
            "trainer=ddp"
        )
    if config.optim.kind is not OptimKind.adamw:
        raise UserError(
            f"trainer=fsdp2 keeps the optimiser's state in shards, which optim={config.optim.kind.name} cannot; set "
            "optim=adamw"
        )
    if uses_expert_adapters(config):
        raise UserError(
            "trainer=fsdp2 does not cut adapters on experts; set tuning.lora.use_experts=false, or trainer=ddp"
        )
    if config.hardware.offload_checkpoints:
        raise UserError("trainer=fsdp2 was not tried with hardware.offload_checkpoints=true; set it to false")


def extra_callbacks(config: Config) -> list[L.Callback]:
    """The callbacks of `callbacks.extra`.

    Raises:
        UserError: One of them cannot be made, is no callback of Lightning, or does not work with the strategy.
    """
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import Callback, WeightAveraging

    callbacks: list[L.Callback] = []
    for entry in config.callbacks.extra:
        target = entry.get("_target_")
        try:
            made = instantiate(entry, _convert_="all")
        except (HydraException, TypeError, ValueError) as error:
            cause = first_line(error.__cause__ or error)
            raise UserError(
                f"callbacks.extra: {target} cannot be made ({cause}); check its dotted name and its arguments"
            ) from error
        if not isinstance(made, Callback):
            raise UserError(
                f"callbacks.extra: {target or entry} is no callback; give each entry a _target_ such as {_EXAMPLE}"
            )
        if isinstance(made, WeightAveraging) and config.trainer.strategy is Strategy.fsdp2:
            raise UserError(
                f"callbacks.extra: {target} cannot average the shards of trainer=fsdp2; leave it out, or set "
                "trainer=ddp"
            )
        callbacks.append(made)
    return callbacks


def check_launch(config: Config) -> None:
    """`UserError` where processes that torchrun or Slurm started would name different folders, or run a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    is_ours = "LOCAL_RANK" in os.environ and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()
    if num_processes(config) == 1 or is_ours or not HydraConfig.initialized() or not _is_started_elsewhere():
        return
    hydra: Any = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        raise UserError(
            "torchrun and srun start one run, and -m starts many; leave -m out, or start the sweep without them"
        )
    given = [*hydra.overrides.task, *hydra.overrides.hydra]
    if not any(override.startswith(("paths.output_dir=", "hydra.run.dir=")) for override in given):
        raise UserError(
            "processes that torchrun or srun started would each name their folder by the clock; set paths.output_dir"
        )


def _is_started_elsewhere() -> bool:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return "TORCHELASTIC_RUN_ID" in os.environ or SLURMEnvironment.detect()


def check_folder(config: Config, resumed: Path | None) -> None:
    """`UserError` for a folder that holds a run already, unless this one resumes it or may take its place."""
    folder = Path(config.paths.output_dir)
    if resumed is not None or config.paths.overwrite:
        return
    found = next(
        (path for path in (folder / "summary.json", folder / "checkpoints" / "last.ckpt") if path.is_file()), None
    )
    if found is not None:
        raise UserError(
            f"paths.output_dir={folder} holds a run already ({found.relative_to(folder)}): choose another folder, "
            "resume that run with "
            "checkpoint=last, or set paths.overwrite=true"
        )


def find_resume(config: Config) -> Path | None:
    """The checkpoint to resume from, if any.

    With `trainer.requeue=true` the folder's last one is taken without being asked for.

    Raises:
        UserError: It is not there.
    """
    last = Path(config.paths.output_dir) / "checkpoints" / "last.ckpt"
    if config.checkpoint is None:
        return last if config.trainer.requeue and last.is_file() else None
    path = last if config.checkpoint == "last" else Path(config.checkpoint)
    if not path.is_file():
        raise UserError(
            f"checkpoint={config.checkpoint}: {path} does not exist; set paths.output_dir to the folder of the run to "
            "resume"
        )
    return path
