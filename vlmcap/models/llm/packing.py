"""Language models that keep apart the clips of a packed row."""

from __future__ import annotations

from pathlib import Path

from vlmcap.errors import UserError

# Names of transformers' configurations. In these classes, every layer that looks at other tokens is attention, full or in a window, and
# transformers derives its mask from positions that start anew. Recurrent layers and convolutions have no mask to derive.
PACKABLE = ("exaone4", "hyperclovax", "llama", "qwen2", "qwen3", "qwen3_moe")


def check_packing(folder: Path, name: str) -> None:
    """Nothing, if clips of one row do not see each other in the model of a checkpoint; reads its configuration alone.

    Args:
        folder: Checkpoint in Hugging Face layout, of a language model or of a whole model that is taken apart into one.
        name: Of the model, as the user chose it, such as "llm=qwen3_8b".

    Raises:
        UserError: It is not known to keep them apart.
    """
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().model_type
    if model_type not in PACKABLE:
        raise UserError(
            f"data.batching=packed puts several clips in one row, which {name} ({model_type}) is not known to keep apart; "
            "set data.batching=by_length"
        )
