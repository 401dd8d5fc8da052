"""Pretrained VLMs whose frames are squares of one size: a vision tower, a projector, and a causal language model.

Legend: B batch, F frames, P patches per frame, Dv vision width, V visual tokens per clip, Dl language width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.errors import UserError, first_line
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.encoders import EncoderOptions, VisionEncoder, build_encoder, load_encoder
from vlmcap.models.encoders.tower import read_config
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.pretrained.bidirectional import BidirectionalCaptioner
from vlmcap.models.pretrained.components import VlmComponents, load_remaining
from vlmcap.models.pretrained.families import LANGUAGE, TOWERS, family_of, model_class, parsed_config, part_name, sketch
from vlmcap.models.projectors.base import autocast_without_float16


class _Features(nn.Module):
    """Replaces the tower of a class and returns the features that the class passes to it as if they were pixels.

    Args:
        num_prefix: Number of CLS and register tokens, which the class drops.
    """

    def __init__(self, num_prefix: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        """(N, P, Dv, 1) -> output with every hidden state (N, prefix + P, Dv)."""
        # Zeros stand for the tokens that the class cuts off: (N, P, Dv) -> (N, prefix + P, Dv)
        features = F.pad(pixel_values.squeeze(-1), (0, 0, self.num_prefix, 0))
        return SimpleNamespace(last_hidden_state=features, hidden_states=_EveryLayer(features), pooler_output=None)


class _EveryLayer:
    """Hidden states of which only the requested layer exists."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __getitem__(self, layer: int) -> Tensor:
        return self.features


class ClassProjector(nn.Module):
    """Runs what a VLM computes between its tower and its language model, by the code of its class.

    Weights stay in float32 and the input is cast to it. Autocast is disabled for float16.

    Args:
        model: Base model of the class on the meta device; its tower and its language model are removed.
        encoder: Vision encoder, for the shape of its features.

    Raises:
        UserError: The class does not accept such features.
    """

    def __init__(self, model: Any, encoder: VisionEncoder) -> None:
        super().__init__()
        setattr(model, part_name(model, TOWERS), _Features(encoder.num_prefix_tokens))
        setattr(model, part_name(model, LANGUAGE), None)
        self.model = model.requires_grad_(True)
        shape = (encoder.num_patches, encoder.embed_dim)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                # One and two frames tell how many tokens a frame and how many a clip has.
                tokens = [self(torch.empty(1, frames, *shape, device="meta")) for frames in (1, 2)]
                # A backward pass on the meta device shows which weights affect the tokens.
                tokens[0].sum().backward()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"model.checkpoint is a {model.config.model_type} whose class does not accept the features of its own "
                f"vision tower ({first_line(error)}); use another checkpoint"
            ) from error
        one, two = (each.shape[1] for each in tokens)
        self.spec = FrameTokens(per_frame=two - one, per_clip=2 * one - two)
        for module in self.modules():  # weights that are used for images only would never get a gradient
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.grad is None:
                    setattr(module, name, None)
                parameter.grad = None

    def num_tokens(self, num_frames: int, num_patches: int, grid: tuple[int, int] | None = None) -> int:
        """Returns V for F frames, without running."""
        return self.spec(num_frames, grid)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None, prompt: Tensor | None = None) -> Tensor:
        """Projects features to visual tokens, (B, F, P, Dv) -> float32 (B, V, Dl)."""
        with autocast_without_float16(features):
            pixels = features.float().unsqueeze(-1)  # (B, F, P, Dv) -> (B, F, P, Dv, 1), with as many axes as pixels
            tokens: Any
            if hasattr(self.model, "get_video_features"):
                tokens = self.model.get_video_features(pixels, return_dict=True).pooler_output
            elif hasattr(self.model, "connector"):  # Idefics3 and SmolVLM leave out black frames before it
                tokens = self.model.connector(pixels.squeeze(-1).flatten(0, 1))
            else:
                # (B, F, P, Dv, 1) -> (B · F, P, Dv, 1): a class for images gets frames as a batch of images.
                tokens = self.model.get_image_features(pixels.flatten(0, 1), return_dict=True).pooler_output
        if not isinstance(tokens, Tensor):  # some classes return the frames one by one
            tokens = torch.stack(list(tokens))
        # (B, V, Dl) or (B · F, V / F, Dl) -> (B, V, Dl)
        visual: Tensor = tokens.float().reshape(len(features), -1, tokens.shape[-1])
        return visual


@dataclass(frozen=True, slots=True)
class FrameTokens:
    """Number of visual tokens of a clip; picklable for the data workers.

    Attributes:
        per_frame: Tokens of each frame.
        per_clip: Tokens of the clip besides them, such as the one that ends a video in LLaVA-OneVision.
    """

    per_frame: int
    per_clip: int

    def __call__(self, num_frames: int, grid: tuple[int, int] | None = None) -> int:
        """Returns V for F frames."""
        return num_frames * self.per_frame + self.per_clip


def load_frames(folder: Path, *, device: str, is_on_host: bool, **language: Any) -> VlmComponents:
    """Loads the components of a checkpoint; the arguments are those of `load_pretrained`.

    Raises:
        UserError: The folder holds an incomplete model, or one that joins several layers of its tower.
    """
    from transformers import AutoTokenizer

    config = read_config(folder)
    family = family_of(config["model_type"])
    if family.is_bidirectional:
        language["attention"] = _masked_attention(language["attention"])
    encoder = load_encoder(folder, vision_options(config, language["dtype"]), "cpu" if is_on_host else device)
    whole = sketch(config)
    # On the meta device: the projector is first probed there, and then gets its weights from the files.
    projector = _projector(whole, encoder)
    load_remaining(projector.model, whole, folder)
    projector.requires_grad_(True)
    llm = load_language_model(folder, device=device, is_on_host=is_on_host, **language)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if family.has_runs else None
    return _components(config["model_type"], encoder, projector, llm, tokenizer)


def build_frames(config: Mapping[str, Any], *, dtype: torch.dtype) -> VlmComponents:
    """Builds the components of a configuration on the meta device, without a layout for lack of a tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        encoder = build_encoder(config, vision_options(config, dtype))
        llm = AutoModelForCausalLM.from_config(parsed_config(config).get_text_config(), dtype=dtype)
    llm.requires_grad_(False).eval()
    return _components(config["model_type"], encoder, _projector(sketch(config), encoder), llm, None)


def _masked_attention(requested: str) -> str:
    """Returns an attention implementation that takes a mask of pairs of tokens.

    Raises:
        UserError: FlashAttention was requested, which takes none.
    """
    if "flash" in requested:
        raise UserError(
            f"llm.attention={requested} takes no mask of single tokens, which this model needs for its visual tokens; "
            "set llm.attention=sdpa"
        )
    return "sdpa" if requested == "auto" else requested


def vision_options(config: Mapping[str, Any], dtype: torch.dtype) -> EncoderOptions:
    """Returns the options of a checkpoint's vision tower.

    Raises:
        UserError: The model joins several layers of its tower.
    """
    layer = getattr(parsed_config(config), "vision_feature_layer", None)
    if layer is None:  # the class takes the output of its tower
        return EncoderOptions(feature_layer=-1, dtype=dtype, is_normed=True)
    if not isinstance(layer, int):
        raise UserError(
            f"model.checkpoint joins the layers {layer} of its vision tower, but only one layer is supported; use "
            "another checkpoint"
        )
    return EncoderOptions(feature_layer=layer, dtype=dtype)


def _projector(whole: Any, encoder: VisionEncoder) -> ClassProjector:
    strategy = getattr(whole.config, "vision_feature_select_strategy", None)
    if strategy == "full" and encoder.num_prefix_tokens:
        raise UserError(
            "model.checkpoint has vision_feature_select_strategy=full in its config.json and so gives CLS tokens to "
            "its language model, but only patches are supported; use another checkpoint"
        )
    return ClassProjector(whole.model, encoder)


def _components(
    model_type: str, encoder: VisionEncoder, projector: ClassProjector, llm: nn.Module, tokenizer: Any
) -> VlmComponents:
    family = family_of(model_type)
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    if family.is_bidirectional:
        make_masks = model_class(model_type).create_masks_for_generate
        captioner_class = partial(BidirectionalCaptioner, make_masks=make_masks)
    return VlmComponents(
        encoder,
        projector,
        llm,
        num_tokens=projector.spec,
        captioner_class=captioner_class,
        visual_prefix=family.prefix if family.has_runs else family.text.before,
        visual_suffix=family.text.after + family.text.end,
        run_text=family.text if family.has_runs else None,
        tokenizer=tokenizer,
    )
