"""Checks of a training run before anything is built or loaded, and the checkpoint that it resumes from."""

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
from vlmcap.training.schedule import COMPONENTS, StagePlan, peak_rate

if TYPE_CHECKING:
    import lightning as L

    from vlmcap.types import Clip

_EXAMPLE = "lightning.pytorch.callbacks.LearningRateMonitor"


def check_run(config: Config, resumed: Path | None) -> None:
    """Runs every check that needs only the configuration.

    Args:
        config: Run configuration.
        resumed: Checkpoint that the run resumes from.

    Raises:
        UserError: A check fails.
    """
    # From the cheapest check to those that ask libraries and the driver.
    check_engine(config)
    check_stages(config)
    check_monitor(config)
    # The other processes may start after the first one has written into the folder.
    if is_main(config):
        check_folder(config, resumed)
    device_of(config)  # raises if the GPU is missing
    check_strategy(config)
    extra_callbacks(config)
    check_launch(config)


def check_engine(config: Config) -> None:
    """Raises a `UserError` for an engine that cannot caption while the weights change."""
    if config.evaluation.engine is Engine.vllm:
        raise UserError(
            "evaluation.engine=vllm works in evaluate.py only, because vLLM holds merged weights that training would "
            "change; leave it out here"
        )


def check_stages(config: Config) -> None:
    """Raises a `UserError` unless every stage trains at least one component."""
    named = {name: stage for name, stage in config.tuning.stages.items() if stage.epochs}
    stages = [*named.values()]
    if not stages:
        raise UserError(f"tuning={config.tuning.name} has no epoch to train; set tuning.epochs")
    for name, stage in named.items():
        if not any(peak_rate(stage, component) > 0 for component in COMPONENTS):
            # The learning rates of a single stage and of the last of two are `tuning.projector_lr` and its siblings.
            is_first_of_two = name == "align" and len(config.tuning.stages) > 1
            raise UserError(
                f"the stage {name} of tuning={config.tuning.name} trains nothing, because all its learning rates are "
                f"0; set {'tuning.align_lr' if is_first_of_two else 'tuning.projector_lr'} above 0"
            )
    tuned = config.tuning.encoder_tuning
    if tuned is not EncoderTuning.none and not any(stage.encoder_lr > 0 for stage in stages):
        raise UserError(
            f"tuning.encoder={tuned.name} has no effect, because tuning.encoder_lr is 0; set tuning.encoder_lr above "
            "0, or set tuning.encoder=none"
        )


def check_monitor(config: Config) -> None:
    """Raises a `UserError` unless the validations of the training loop measure `monitor`."""
    from vlmcap.metrics import METRIC_NAMES
    from vlmcap.metrics.user_metrics import user_metrics

    has_facts = config.data.is_demo or config.evaluation.facts is not None
    visual_reliance = config.callbacks.visual_reliance
    # `facts/<fact>` stands for any fact; `check_facts` looks at the name later, when the demo has written its facts.
    measured = ["loss", *METRIC_NAMES, *user_metrics(), *(["facts/<fact>"] if has_facts else [])]
    if visual_reliance.enabled and visual_reliance.every_n_validations == 1:
        measured.append("visual_reliance/swapped/cider_drop")
    split, _, name = config.monitor.partition("/")
    # "facts/", "visual_reliance/": any name in such a group is accepted here.
    groups = tuple(example.partition("/")[0] + "/" for example in measured if "/" in example)
    if split != "val" or not (name in measured or name.startswith(groups)):
        raise UserError(
            f"monitor={config.monitor} is not measured while training; choose val/ and one of {', '.join(measured)}"
        )


def check_facts(config: Config) -> None:
    """Raises a `UserError` if the monitored metric is a fact that `evaluation.facts` does not define."""
    from vlmcap.metrics import FactLexicon

    if not config.monitor.startswith("val/facts/") or config.evaluation.facts is None:
        return
    known = [*FactLexicon.from_json(Path(config.evaluation.facts)).phrases, "mean"]
    if config.monitor.removeprefix("val/facts/") not in known:
        raise UserError(f"monitor={config.monitor} is not measured; choose val/facts/ and one of {', '.join(known)}")


def check_monitored_clips(config: Config, clips: Mapping[str, Sequence[Clip]]) -> None:
    """Raises a `UserError` if the monitored metric can have no value with the validation clips."""
    count = min(len(clips["val"]), config.evaluation.max_clips)
    if count < 2 and _compares_clips(config.monitor):
        raise UserError(
            f"monitor={config.monitor} compares clips with one another, but validation uses {count} clip; provide more "
            f"(evaluation.max_clips is {config.evaluation.max_clips}), or set monitor=val/loss"
        )


def _compares_clips(metric: str) -> bool:
    """Returns whether a metric needs two clips: CIDEr for its document frequencies, swapped scores for the exchange."""
    words = metric.split("/")[1:]
    return words in (["cider"], ["cider_d"]) or words[0] in ("swapped", "permuted", "visual_reliance")


def check_resume_position(held: Mapping[str, Any], config: Config) -> None:
    """Raises a `UserError` unless the run's stages and accumulation can continue from the checkpoint's position.

    Args:
        held: The entry `vlmcap` of the checkpoint, which `CaptioningModule` wrote.
        config: Configuration of the run that resumes.
    """
    position, before, steps = held["position"], held["plan"], config.trainer.accumulate_grad_batches
    # A position inside an epoch counts micro-batches, which only make whole optimiser steps with the same accumulation.
    if position["batches"] and before["accumulate"] != steps:
        raise UserError(
            f"the checkpoint was saved inside an epoch with trainer.accumulate_grad_batches={before['accumulate']}, "
            f"which cannot continue with {steps}; resume with the same value, or from a checkpoint at the end of an "
            "epoch"
        )
    # Epochs that have not begun may change, so that a finished run can be continued with more of them.
    num_begun = position["epoch"] + bool(position["batches"])
    trained, planned = before["stages"][:num_begun], StagePlan(config.tuning.stages).stage_names()[:num_begun]
    if trained != planned:
        raise UserError(
            f"the checkpoint has trained {_epochs(trained)}, but tuning now begins with {_epochs(planned)}; keep the "
            "epochs of the stages that have begun, lengthen the last of them, or start a new run"
        )


def _epochs(names: Sequence[str]) -> str:
    """Formats stage names, one per epoch, such as "epochs align: 1, tune: 2"."""
    return "epochs " + (", ".join(f"{name}: {count}" for name, count in Counter(names).items()) or "none")


def check_strategy(config: Config) -> None:
    """Raises a `UserError` for missing devices, and for settings that the strategy does not support."""
    import torch

    chosen, devices = config.trainer.strategy, config.hardware.devices
    if config.hardware.accelerator != "cpu" and torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise UserError(
            f"hardware.devices={devices}, but this machine has {torch.cuda.device_count()}; lower hardware.devices"
        )
    if chosen is Strategy.fsdp2:
        _check_fsdp2(config)


def _check_fsdp2(config: Config) -> None:
    # bitsandbytes keeps the scales of a packed weight in a state beside the tensor, which `fully_shard` does not cut.
    if config.llm.quantization is not Quantization["none"]:
        raise UserError(
            f"trainer=fsdp2 cannot shard the packed weights of llm.quantization={config.llm.quantization.name}; set "
            "llm.quantization=none, or trainer=ddp"
        )
    if config.hardware.precision is Precision.fp16:
        raise UserError(
            "trainer=fsdp2 has no gradient scaler for hardware.precision=fp16; set hardware.precision=bf16 or fp32, "
            "or trainer=ddp"
        )
    if config.optim.kind is not OptimKind.adamw:
        raise UserError(
            f"trainer=fsdp2 shards the optimiser state, which optim={config.optim.kind.name} does not support; set "
            "optim=adamw"
        )
    if uses_expert_adapters(config):
        raise UserError(
            "trainer=fsdp2 does not shard adapters on experts; set tuning.lora.use_experts=false, or trainer=ddp"
        )
    if config.hardware.offload_checkpoints:
        raise UserError(
            "trainer=fsdp2 does not support hardware.offload_checkpoints=true; set hardware.offload_checkpoints=false"
        )


def extra_callbacks(config: Config) -> list[L.Callback]:
    """Builds the callbacks of `callbacks.extra`.

    Raises:
        UserError: An entry cannot be built, is not a Lightning callback, or does not work with the strategy.
    """
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import Callback, WeightAveraging

    callbacks: list[L.Callback] = []
    for entry in config.callbacks.extra:
        target = entry.get("_target_")
        try:
            callback = instantiate(entry, _convert_="all")
        # Hydra wraps what the constructor raises; its cause is the message that helps.
        except (HydraException, TypeError, ValueError) as error:
            cause = first_line(error.__cause__ or error)
            raise UserError(
                f"callbacks.extra: {target} cannot be built ({cause}); check its dotted name and its arguments"
            ) from error
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks.extra: {target or entry} is not a Lightning callback; give each entry a _target_ such as "
                f"{_EXAMPLE}"
            )
        if isinstance(callback, WeightAveraging) and config.trainer.strategy is Strategy.fsdp2:
            raise UserError(
                f"callbacks.extra: {target} cannot average the shards of trainer=fsdp2; leave it out, or set "
                "trainer=ddp"
            )
        callbacks.append(callback)
    return callbacks


def check_launch(config: Config) -> None:
    """Raises a `UserError` if processes of torchrun or Slurm would choose different folders, or run a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    # Lightning starts its children with LOCAL_RANK but without the launchers' variables; `launch_command` has given
    is_lightning_child = "LOCAL_RANK" in os.environ and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()
    if (
        num_processes(config) == 1
        or is_lightning_child
        or not HydraConfig.initialized()
        or not _is_started_by_launcher()
    ):
        return
    hydra: Any = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        raise UserError(
            "torchrun and srun start a single run, but -m starts several; leave -m out, or start the sweep without "
            "torchrun or srun"
        )
    given = [*hydra.overrides.task, *hydra.overrides.hydra]
    if not any(override.startswith(("paths.output_dir=", "hydra.run.dir=")) for override in given):
        raise UserError(
            "each process of torchrun or srun would name its run folder by its own clock; set paths.output_dir"
        )


def _is_started_by_launcher() -> bool:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return "TORCHELASTIC_RUN_ID" in os.environ or SLURMEnvironment.detect()


def check_folder(config: Config, resumed: Path | None) -> None:
    """Raises a `UserError` if the folder holds another run, unless this run resumes or may overwrite it."""
    folder = Path(config.paths.output_dir)
    if resumed is not None or config.paths.overwrite:
        return
    existing = next(
        (path for path in (folder / "summary.json", folder / "checkpoints" / "last.ckpt") if path.is_file()), None
    )
    if existing is not None:
        raise UserError(
            f"paths.output_dir={folder} already holds a run ({existing.relative_to(folder)}); choose another folder, "
            "resume that run with checkpoint=last, or set paths.overwrite=true"
        )


def find_resume_checkpoint(config: Config) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run.

    With `trainer.requeue=true`, a run resumes from the `last.ckpt` of its folder by itself.

    Raises:
        UserError: The configured checkpoint does not exist.
    """
    last = Path(config.paths.output_dir) / "checkpoints" / "last.ckpt"
    if config.checkpoint is None:
        # A requeued job has the same command as the first start, so `last.ckpt` alone says that there is something to
        # resume.
        return last if config.trainer.requeue and last.is_file() else None
    path = last if config.checkpoint == "last" else Path(config.checkpoint)
    if not path.is_file():
        raise UserError(
            f"checkpoint={config.checkpoint}: {path} does not exist; set paths.output_dir to the folder of the run to "
            "resume"
        )
    return path
