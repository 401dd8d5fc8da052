"""Captions decoded by vLLM: our encoder and projector make the prompt's embeddings, vLLM continues them.

Legend: B clips, S prompt tokens, Dl language width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.checkpoint import read_safetensors
from vlmcap.models.vllm.engine import VllmEngine, sampling_arguments
from vlmcap.types import Batch


class TokenEmbeddings(nn.Module):
    """The embeddings of a language model that runs elsewhere.

    Args:
        folder: In Hugging Face layout; of its weights, only the embeddings are read.
        dtype: Of the embeddings.

    Raises:
        UserError: The folder holds no embeddings under the name that its class gives them.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.table: nn.Module = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is self.table)
        found = dict(read_safetensors(folder, lambda key: key == f"{name}.weight"))
        if not found:
            raise UserError(
                f"{folder} holds no {name}.weight in its safetensors; write the folder with `vlmcap export`"
            )
        weight = next(iter(found.values())).to(dtype)
        self.table.weight = nn.Parameter(weight, requires_grad=False)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models have it."""
        return self.table


class VllmCaptioner(VideoCaptioner):
    """Captions of batches, their words by vLLM; there is no loss, as the language model is not here.

    Args:
        captioner: Encoder, projector and prompt, with `TokenEmbeddings` in the place of the language model.
        engine: vLLM.
    """

    def __init__(self, captioner: VideoCaptioner, engine: VllmEngine) -> None:
        super().__init__(captioner.encoder, captioner.projector, captioner.llm, captioner.prompt, captioner.generation)
        self.engine = engine
        self.sampling = sampling_arguments(self.generation, self.prompt.stop_ids)

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """Captions of a padded batch, in row order; the padding stays here."""
        embeddings = self.embed(batch)
        prompts = [rows[mask.bool()] for rows, mask in zip(embeddings, batch.attention_mask, strict=True)]
        return self.prompt.decode(self.engine.generate(prompts, self.sampling))
