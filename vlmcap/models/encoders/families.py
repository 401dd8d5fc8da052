"""The families of vision encoders, each a class of transformers: a class and a line here, and a YAML file under `conf/encoder/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmcap.models.encoders.base import Family
from vlmcap.models.encoders.preprocessing import Preprocessing
from vlmcap.models.encoders.siglip2_naflex import Siglip2Naflex


class Clip(Family):
    """CLIP's vision tower (Radford et al., https://arxiv.org/abs/2103.00020), that of LLaVA's checkpoints included."""

    model_type = "clip_vision_model"
    preprocessing = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), is_cropped=True)
    final_norm = "post_layernorm"
    interpolates_on_request = True

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS."""
        return 1


class Siglip(Family):
    """SigLIP, and SigLIP 2 at a fixed resolution (Tschannen et al., https://arxiv.org/abs/2502.14786); it has no CLS token."""

    model_type = "siglip_vision_model"
    preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    final_norm = "post_layernorm"
    interpolates_on_request = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the pooling head."""
        return {**values, "vision_use_head": False}


class Dinov3(Family):
    """DINOv3 ViT of every size (Siméoni et al., https://arxiv.org/abs/2508.10104).

    Positions are rotary, so any multiple of the patch will do.
    """

    model_type = "dinov3_vit"
    preprocessing = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    final_norm = "norm"
    is_normed = True
    is_rotary = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the random positions of its pre-training, which its class adds in training mode."""
        return {**values, "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}

    def names(self, name: str) -> tuple[str, ...]:
        """Files have the blocks at the top, the class has them one level down."""
        return (re.sub(r"^(?:model\.)?layer\.", "model.layer.", name),)

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS and registers."""
        return 1 + int(config.num_register_tokens)


_REMOTE = "intern_vit_6b"  # the model type of InternViT's remote code, whatever the size

# The remote configuration's names and, as its class fills them in, values.
_CONFIG_NAMES = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "initializer_factor": "layer_scale_init_value"}
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

    Weights come in two layouts: transformers' own, inside the `-hf` checkpoints, and that of the code which OpenGVLab's other checkpoints
    bring along. That code is never run: names and values are put into the words of transformers' class.
    """

    model_type = "internvl_vision"
    other_model_types = (_REMOTE,)
    preprocessing = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    final_norm = "layernorm"
    is_normed = True

    def config_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """A remote configuration in transformers' words; dropout and the code's own switches are left out."""
        if values.get("model_type") != _REMOTE:
            return values
        renamed = {_CONFIG_NAMES.get(key, key): value for key, value in values.items()}
        kept = {key: renamed[key] for key in (*_REMOTE_DEFAULTS, "layer_scale_init_value") if key in renamed}
        return _REMOTE_DEFAULTS | kept

    def names(self, name: str) -> tuple[str, ...]:
        """Remote names in transformers' words; queries, keys and values are one tensor there."""
        for pattern, replacement in _TENSOR_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." not in name:
            return (name,)
        return tuple(name.replace(".qkv.", f".{part}_proj.") for part in "qkv")

    def num_prefix_tokens(self, config: Any) -> int:
        """CLS."""
        return 1


FAMILIES: dict[str, Family] = {
    "clip": Clip(),
    "siglip": Siglip(),
    "siglip2_naflex": Siglip2Naflex(),
    "dinov3": Dinov3(),
    "internvit": Internvit(),
}
