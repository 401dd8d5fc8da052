"""Silence for what libraries say to developers."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silences what the libraries say to developers; our own lines say what a user needs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "httpx", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(lightning|torchdata)\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
