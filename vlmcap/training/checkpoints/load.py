"""Checkpoints of ours: read safely, and turned back into a captioner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.model import Assembly, assemble, describe_model
from vlmcap.assembly.parts import device_of, dtype_of
from vlmcap.assembly.sources import Sources
from vlmcap.compose import from_plain, to_config, to_plain
from vlmcap.config import Config, Engine, Precision
from vlmcap.errors import UserError, first_line
from vlmcap.libraries import quiet_libraries
from vlmcap.training.checkpoints.exported import is_export, read_export
from vlmcap.training.processes import single_process

if TYPE_CHECKING:
    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.types import Batch


def checkpoint_identity(config: Config, sources: Sources) -> dict[str, Any]:
    """What every checkpoint says of itself, as plain data."""
    return {"config": to_plain(config), "bases": {part: base.as_dict() for part, base in sources.bases.items()}}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's plain data and tensors; pickled code is refused. A folder of `vlmcap export` is read as one.

    Raises:
        UserError: No such file, or not a checkpoint of ours.
    """
    import pickle

    import torch

    file = Path(path)
    if is_export(file):
        return read_export(file)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        there = sorted(str(found) for found in {*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")})
        mend = f"there is {', '.join(there)}" if there else "give a .ckpt file under the checkpoints/ folder of a run"
        raise UserError(f"checkpoint {file} {'is a folder' if file.is_dir() else 'does not exist'}; {mend}")
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is no checkpoint that can be read safely: {first_line(error)}") from error
    if not isinstance(content, dict) or "vlmcap" not in content:
        raise UserError(f"{file} was not written by vlmcap's train.py; give a .ckpt file under the checkpoints/ folder of a run")
    return content


def load_weights(assembly: Assembly, content: Mapping[str, Any], config: Config) -> None:
    """Puts a checkpoint's trained weights into a model of the same configuration.

    Raises:
        UserError: The model is of another architecture or stands on another base.
    """
    from vlmcap.training.module import check_bases, check_weights, trained_parameters
    from vlmcap.training.schedule import StagePlan
    from vlmcap.training.sharding import load_whole_weights

    check_bases(content["vlmcap"]["bases"], checkpoint_identity(config, assembly.sources)["bases"])
    trained = trained_parameters(assembly.captioner, StagePlan(config.tuning.stages))
    check_weights(content["state_dict"], trained)
    own = {name.removeprefix("captioner."): tensor for name, tensor in content["state_dict"].items()}
    load_whole_weights(assembly.captioner, own)


def load_captioner(checkpoint: str | Path, overrides: Mapping[str, Any] | None = None) -> VideoCaptioner:
    """A captioner from a checkpoint alone, ready for `caption(paths)`.

    Args:
        checkpoint: File that train.py wrote.
        overrides: Dotted keys to values, such as {"llm.max_new_tokens": 200}.

    Raises:
        UserError: The checkpoint or one of its bases is missing or is another one.
    """
    quiet_libraries()
    content = read_checkpoint(checkpoint)
    config = single_process(to_config(from_plain(content["vlmcap"]["config"], overrides)))
    if config.evaluation.engine is Engine.vllm:
        raise UserError("evaluation.engine=vllm is for evaluate.py; leave it out here")
    assembly = assemble(describe_model(config), is_fresh=False)
    load_weights(assembly, content, config)
    captioner = assembly.captioner.to(device_of(config)).eval()
    captioner.prepare = path_batches(config, assembly)
    if config.hardware.precision is not Precision.fp32:
        captioner.autocast_dtype = dtype_of(config.hardware.precision)
    return captioner


def path_batches(config: Config, assembly: Assembly) -> Callable[[Sequence[Path]], Iterator[Batch]]:
    """A function from video files to batches of prompts on the model's device."""
    from torch.utils.data import DataLoader

    from vlmcap.assembly.data import prompt_batch_size
    from vlmcap.assembly.datasets import decoded_dataset
    from vlmcap.data.loading.collate import Collator
    from vlmcap.data.loading.worker_report import WorkerWatch, worker_options
    from vlmcap.types import Clip

    collator = Collator(assembly.captioner.prompt, assembly.visual, config.llm.max_caption_tokens, mode="generate")

    def batches(paths: Sequence[Path]) -> Iterator[Batch]:
        clips = [Clip(id=str(index), video=str(path), captions=()) for index, path in enumerate(paths)]
        dataset = decoded_dataset(config, assembly.transform, assembly.grid_of, clips)
        workers = max(0, min(config.data.num_workers, len(clips) - 1))
        watch = WorkerWatch()
        watched = watch.over(dataset, clips) if workers else dataset
        size = prompt_batch_size(config, assembly)
        options = worker_options(workers, size, config.data.decode_timeout_s)
        loader = DataLoader(watched, batch_size=size, collate_fn=collator, **options)
        with watch.naming_clips():
            for batch in loader:
                yield batch.to(assembly.captioner.device)

    return batches
