"""Imports heavy libraries quickly, and silences their messages to developers."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings

CUBLAS_WORKSPACE = ":4096:8"  # https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second is the newer name


def set_cuda_variables() -> None:
    """Sets environment variables that PyTorch reads once per process, unless the user has set them.

    Expandable segments of the CUDA allocator avoid fragmentation by batches of different lengths. torchtune measured
    16.4 GiB of reserved memory without and 10.8 GiB with them (https://github.com/pytorch/torchtune/issues/1185). The
    cuBLAS workspace allows deterministic products, which a later run of the process may need.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)


def usable_processors() -> int:
    """Returns the number of processors that this process may use: under Slurm or in a container not all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_expandable_segments() -> bool:
    """Returns whether a run of this process uses expandable segments of the CUDA allocator."""
    chosen = [os.environ[name] for name in _ALLOCATOR_VARIABLES if name in os.environ]
    return not chosen or any("expandable_segments:true" in value.lower() for value in chosen)


def import_libraries(*, with_adapters: bool, with_training: bool = True) -> None:
    """Imports the heavy libraries with garbage collection turned off, which saves repeated scans of their objects.

    These objects live until the end of the process, so later collections skip them too. Does nothing if the libraries
    are imported already, as the garbage of an earlier run must not be kept.

    Args:
        with_adapters: Whether to import peft, which takes a quarter of the time.
        with_training: Whether to import lightning, which a plan does not need.
    """
    if ("lightning" if with_training else "torch") in sys.modules:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # logs when peft imports it
    was_on = gc.isenabled()
    gc.disable()
    try:
        if with_training:
            import lightning  # noqa: F401
            import transformers
        else:
            import transformers.modeling_utils  # noqa: F401

        if with_adapters:
            import peft  # noqa: F401
    finally:
        # Later collections then skip the objects of the libraries, which live until the end.
        gc.freeze()
        if was_on:
            gc.enable()


def silence_libraries() -> None:
    """Silences messages of libraries to developers; this package prints what a user needs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "httpx", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(lightning|torchdata)\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Two workers are the default, and on one core they do no harm.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
