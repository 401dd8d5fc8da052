"""Families of vision towers that need rules of their own, such as other tensor names or preprocessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmcap.models.encoders.base import Family
from vlmcap.models.encoders.preprocessing import Preprocessing
from vlmcap.models.encoders.siglip2_naflex import Siglip2Naflex

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Siglip(Family):
    """SigLIP, and SigLIP 2 at a fixed resolution (Tschannen et al., https://arxiv.org/abs/2502.14786).

    Features are taken before the final norm.
    """

    is_raw = True


class Dinov3(Family):
    """DINOv3 ViT of every size (Siméoni et al., https://arxiv.org/abs/2508.10104)."""

    preprocessing = Preprocessing(*_IMAGENET, "bilinear")  # its processor class needs torchvision

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Disables the random position augmentation of pre-training, which the class applies in training mode."""
        return {**values, "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}


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
    (r"\.ls([12])$", r".lambda_\1"),
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
        return tuple(name.replace(".qkv.", f".{part}_proj.") for part in "qkv")


_INTERNVIT = Internvit()
_FAMILIES: dict[str, Family] = {
    "siglip_vision_model": Siglip(),
    "siglip2_vision_model": Siglip2Naflex(),
    "dinov3_vit": Dinov3(),
    "internvl_vision": _INTERNVIT,
    _REMOTE: _INTERNVIT,
}


def family_of(model_type: str) -> Family:
    """Returns the rules for a type of tower; most types need none of their own."""
    return _FAMILIES.get(model_type, Family())
