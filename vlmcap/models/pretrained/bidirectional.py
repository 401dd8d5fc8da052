"""Captioner for VLMs whose visual tokens attend to all tokens of their own run, such as Gemma 3.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import base_model
from vlmcap.types import Batch


class BidirectionalCaptioner(VideoCaptioner):
    """Captions video clips with a causal language model in which the tokens of a frame attend to each other.

    Args:
        *args: Positional arguments of `VideoCaptioner`.
        make_masks: The class's own function from token types, 1 for visual tokens, to the mask of each type of layer.
        **kwargs: Keyword arguments of `VideoCaptioner`.
    """

    has_plain_inputs = False

    def __init__(self, *args: Any, make_masks: Callable[..., dict[str, Tensor]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_masks = make_masks

    def language_inputs(self, batch: Batch, visual: Tensor) -> dict[str, Any]:
        """Returns the keyword arguments of the language model; for generation, without its masks for the prompt."""
        assert batch.position_ids is None, "check_packing refuses these language models"
        inputs = super().language_inputs(batch, visual)
        if batch.targets is not None:
            inputs["attention_mask"] = self._masks(batch, **inputs)
        return inputs

    def _masks(self, batch: Batch, **inputs: Any) -> dict[str, Tensor]:
        rows = len(inputs["inputs_embeds"]) // len(batch.input_ids)  # beams of a clip
        types = batch.visual_mask.long().repeat_interleave(rows, dim=0)  # (B, S) -> (B · beams, S)
        names = ("inputs_embeds", "attention_mask", "past_key_values", "position_ids")
        model: Any = base_model(self.llm)
        return self.make_masks(model.config, **{name: inputs.get(name) for name in names}, token_type_ids=types)

    def _generate_by_library(self, batch: Batch) -> list[list[int]]:
        with self._prompt_masks(batch):
            return super()._generate_by_library(batch)

    @contextmanager
    def _prompt_masks(self, batch: Batch) -> Iterator[None]:
        """Gives the masks to the first step of transformers' generation, which takes no masks but of real tokens."""
        length = batch.input_ids.shape[1]

        def add(_: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            is_prompt = inputs["inputs_embeds"] is not None and inputs["inputs_embeds"].shape[1] == length > 1
            return arguments, inputs | ({"attention_mask": self._masks(batch, **inputs)} if is_prompt else {})

        model: Any = base_model(self.llm)
        handle: torch.utils.hooks.RemovableHandle = model.model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
