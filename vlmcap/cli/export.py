"""`vlmcap export`: writes a fine-tuned model as a folder that transformers and vLLM load."""

from __future__ import annotations

from argparse import Namespace


def run(options: Namespace) -> None:
    """Writes the folder and prints how to load it.

    Raises:
        UserError: The output is in use, or the checkpoint or its base checkpoint cannot be used.
    """
    from vlmcap.config_saved import override_values
    from vlmcap.training.checkpoints.export import describe_export, export

    overrides = override_values(options.overrides)
    exported = export(
        options.checkpoint, options.output, dtype=options.dtype, device=options.device, overrides=overrides
    )
    print(describe_export(exported))
