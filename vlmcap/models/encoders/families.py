"""What the general way does not know of some vision towers.

Names and values of other layouts, and rules that their publishers keep.
"""

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

    Features are not normed.
    """

    is_raw = True


class Dinov3(Family):
    """DINOv3 ViT of every size (Siméoni et al., https://arxiv.org/abs/2508.10104)."""

    preprocessing = Preprocessing(*_IMAGENET, "bilinear")  # the class of its processor needs torchvision

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the random positions of its pre-training, which its class adds in training mode."""
        return {**values, "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}


_REMOTE = "intern_vit_6b"  # the model type of InternViT's remote code, whatever the size

# The remote configuration's names and, as its class fills them in, values.
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

    BaseCheckpoints: Chen et al., https://arxiv.org/abs/2312.14238 and https://arxiv.org/abs/2412.05271.

    Weights come in two layouts: transformers' own, inside the `-hf` checkpoints, and that of the code which OpenGVLab's
    other checkpoints bring along. That code is never run: names and values are put into the words of transformers'
    class.
    """

    preprocessing = Preprocessing(
        *_IMAGENET
    )  # GotOcr2ImageProcessor, which its files name, has other values of its own

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """A remote configuration in transformers' words; dropout and the code's own switches are left out."""
        if values.get("model_type") != _REMOTE:
            return values
        renamed = {_CONFIG_NAMES.get(key, key): value for key, value in values.items()}
        kept = {key: renamed[key] for key in (*_REMOTE_DEFAULTS, "layer_scale_init_value") if key in renamed}
        return {"model_type": "internvl_vision"} | _REMOTE_DEFAULTS | kept

    def names(self, name: str) -> tuple[str, ...]:
        """Remote names in transformers' words; queries, keys and values are one tensor there."""
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
    """The rules for a type of tower; most types need none."""
    return _FAMILIES.get(model_type, Family())
