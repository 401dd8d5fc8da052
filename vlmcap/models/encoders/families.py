"""Families of vision towers that need rules of their own, such as other tensor names or preprocessing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmcap.models.encoders.base import Family
from vlmcap.models.encoders.layout import FinalNorm, Layout
from vlmcap.models.encoders.preprocessing import Preprocessing
from vlmcap.models.encoders.siglip2_naflex import Siglip2Naflex

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Siglip(Family):
    """SigLIP, and SigLIP 2 at a fixed resolution (Tschannen et al., https://arxiv.org/abs/2502.14786).

    Features are taken before the final norm.
    """

    is_raw = True


class Dinov2(Family):
    """DINOv2, with and without registers (Oquab et al., https://arxiv.org/abs/2304.07193)."""

    preprocessing = Preprocessing(*_IMAGENET, is_cropped=True, image_size=224, short_side=256)


class Radio(Family):
    """C-RADIO (Ranzinger et al., https://arxiv.org/abs/2312.06709), whose class normalises pixels in 0…1 itself."""

    preprocessing = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leaves out the values of remote code, as the native class does, whose defaults are C-RADIOv4-H."""
        return {"model_type": "radio"} if "auto_map" in values and "hidden_size" not in values else values


class Vjepa2(Family):
    """V-JEPA 2 (Assran et al., https://arxiv.org/abs/2506.09985)."""

    # Its processor class needs torchvision.
    preprocessing = Preprocessing(*_IMAGENET, "bilinear", is_cropped=True, image_size=256, short_side=292)


class Videomae(Family):
    """VideoMAE (Tong et al., https://arxiv.org/abs/2203.12602), whose class has positions for one length of clips."""

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Builds the class for the shortest clip, as it computes positions slowly."""
        # `max_frames` is a key of our own, which keeps the length that the class would have had.
        frames = {"num_frames": values.get("tubelet_size", 2), "max_frames": values.get("num_frames", 16)}
        return {**values, **frames}

    def positions(self, config: Any, grid: tuple[int, int]) -> Tensor:
        """Returns the sinusoids of the class, (1, T · P, Dv)."""
        positions = torch.arange(config.max_frames // config.tubelet_size * math.prod(grid), dtype=torch.float64)
        channels = torch.arange(config.hidden_size)
        angles = positions[:, None] / 10000 ** (channels // 2 * 2 / config.hidden_size).double()  # (T · P, Dv)
        return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()[None]


class Dinov3(Family):
    """DINOv3 ViT of every size (Siméoni et al., https://arxiv.org/abs/2508.10104)."""

    preprocessing = Preprocessing(*_IMAGENET, "bilinear")  # its processor class needs torchvision

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Disables the random position augmentation of pre-training, which the class applies in training mode."""
        return {**values, "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}


class Dinov3Convnext(Family):
    """DINOv3 ConvNeXt of every size, whose tokens are the mean of the last stage, and then its places in row order."""

    preprocessing = Dinov3.preprocessing

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Counts all stages as one block, as features of inner stages have other grids."""
        return {**values, "num_hidden_layers": 1}

    def layout(self, config: Any) -> Layout:
        """Returns the known layout: each stage halves the grid, after a first step of four pixels."""
        return Layout(
            2 ** (len(config.hidden_sizes) + 1),  # 4 · 2^(stages - 1) pixels per place
            num_prefix_tokens=1,
            embed_dim=int(config.hidden_sizes[-1]),
            is_any_size=True,
        )

    def final_norm(self, config: Any) -> FinalNorm | None:
        """Returns None, as only the last stage is usable."""


_REMOTE = "intern_vit_6b"  # the model type of InternViT's remote code, for all sizes

# Names in the remote configuration, and the default values of its class.
_CONFIG_NAMES = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "initializer_factor": "layer_scale_init_value",
}
_REMOTE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
    "use_qk_norm": True,
}
_TENSOR_NAMES = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),  # "encoder.layers.0.ls1" -> "encoder.layer.0.lambda_1"
)


class Internvit(Family):
    """InternViT-300M and InternViT-6B, the vision towers of InternVL.

    Sources: Chen et al., https://arxiv.org/abs/2312.14238 and https://arxiv.org/abs/2412.05271.

    Weights come in two layouts: that of transformers in the `-hf` checkpoints, and that of the remote code in
    OpenGVLab's other checkpoints. The remote code is never run: its names and values are translated to transformers'
    class.
    """

    # GotOcr2ImageProcessor, which its files name, has other defaults.
    preprocessing = Preprocessing(*_IMAGENET)

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translates a remote configuration, without dropout and the switches of the remote code."""
        if values.get("model_type") != _REMOTE:
            return values
        renamed = {_CONFIG_NAMES.get(key, key): value for key, value in values.items()}
        kept = {key: renamed[key] for key in (*_REMOTE_DEFAULTS, "layer_scale_init_value") if key in renamed}
        return {"model_type": "internvl_vision"} | _REMOTE_DEFAULTS | kept

    def names(self, name: str) -> tuple[str, ...]:
        """Translates remote names; queries, keys and values are stacked in one tensor there."""
        for pattern, replacement in _TENSOR_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." not in name:
            return (name,)
        # "….qkv.weight" -> "….q_proj.weight", "….k_proj.weight", "….v_proj.weight"
        return tuple(name.replace(".qkv.", f".{part}_proj.") for part in "qkv")


_INTERNVIT = Internvit()
_FAMILIES: dict[str, Family] = {
    "siglip_vision_model": Siglip(),
    "siglip2_vision_model": Siglip2Naflex(),
    "dinov2": Dinov2(),
    "dinov2_with_registers": Dinov2(),
    "dinov3_convnext": Dinov3Convnext(),
    "dinov3_vit": Dinov3(),
    "radio": Radio(),
    "videomae": Videomae(),
    "vjepa2": Vjepa2(),
    "internvl_vision": _INTERNVIT,
    _REMOTE: _INTERNVIT,
}


REMOTE_CLASSES = {"RADIOModel": "radio"}
"""Types of towers whose published `config.json` names a class of remote code only."""


def family_of(model_type: str) -> Family:
    """Returns the rules for a type of tower; most types need none of their own."""
    return _FAMILIES.get(model_type, Family())
