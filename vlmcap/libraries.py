"""Libraries loaded at once, and silence for what they say to developers."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings

CUBLAS_WORKSPACE = ":4096:8"  # https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second is PyTorch's newer name


def set_cuda_variables() -> None:
    """Sets what PyTorch reads once per process, before it is imported; what the user has set stays.

    The CUDA allocator may grow its segments: batches differ in length, and segments of fixed sizes fragment. torchtune
    measured 16.4 GiB reserved without and 10.8 with expandable segments
    (https://github.com/pytorch/torchtune/issues/1185). The workspace of cuBLAS is one with which its products can be
    deterministic, as a later run of the process may ask for that.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)


def usable_processors() -> int:
    """The processors that this process may run on: fewer than the machine has under taskset, Slurm or in containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_expandable_segments() -> bool:
    """Whether a run started from here has a CUDA allocator whose segments grow."""
    chosen = [os.environ[name] for name in _ALLOCATOR_VARIABLES if name in os.environ]
    return not chosen or any("expandable_segments:true" in value.lower() for value in chosen)


def import_libraries(*, with_adapters: bool, with_training: bool = True) -> None:
    """Imports the heavy libraries without the collector of circles, which would search all that they define again and again.

    What they define stays for good, so later collections leave it out too. Only before anything else ran: what an
    earlier run left behind must not stay.

    Args:
        with_adapters: The run needs peft, which is a quarter of the time.
        with_training: It needs lightning, which a plan does not.
    """
    if ("lightning" if with_training else "torch") in sys.modules:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks when peft imports it
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
        gc.freeze()
        if was_on:
            gc.enable()


def silence_libraries() -> None:
    """Silences what the libraries say to developers; our own lines say what a user needs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "httpx", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(lightning|torchdata)\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Two workers are the default, and on one core they do no harm.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
