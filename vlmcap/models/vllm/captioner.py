"""A captioner that decodes with vLLM from the prompt embeddings that encoder and projector give.

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
    """The token embeddings of a language model that runs elsewhere.

    Args:
        folder: Language model in Hugging Face layout, of which only the embeddings are read.
        dtype: Dtype of the embeddings.

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
        tensors = dict(read_safetensors(folder, lambda key: key == f"{name}.weight"))
        if not tensors:
            raise UserError(
                f"{folder} holds no {name}.weight in its safetensors; write the folder with `vlmcap export`"
            )
        weight = next(iter(tensors.values())).to(dtype)
        self.table.weight = nn.Parameter(weight, requires_grad=False)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embeddings, like the method of transformers' models."""
        return self.table


class VllmCaptioner(VideoCaptioner):
    """Captions batches with vLLM; there is no loss, as the language model is not in this process.

    Args:
        captioner: Captioner with `TokenEmbeddings` as its language model.
        engine: vLLM engine.
    """

    def __init__(self, captioner: VideoCaptioner, engine: VllmEngine) -> None:
        super().__init__(captioner.encoder, captioner.projector, captioner.llm, captioner.prompt, captioner.generation)
        self.engine = engine
        self.sampling = sampling_arguments(self.generation, self.prompt.stop_ids)

    @torch.no_grad()
    def generate(self, batch: Batch) -> list[str]:
        """Captions the clips of a padded batch, in order; padding is removed from the prompts."""
        embeddings = self.embed(batch)
        prompts = [rows[mask.bool()] for rows, mask in zip(embeddings, batch.attention_mask, strict=True)]
        return self.prompt.decode(self.engine.generate(prompts, self.sampling))
