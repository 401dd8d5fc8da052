"""Whole vision-language models with random weights in the hub's layout."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
    # windows of 2 × 2 merged patches, so that some are cut at the edge of the test's frames
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
}
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]
VISION["qwen3_5"] = {name: value for name, value in VISION["qwen3_vl"].items() if name != "deepstack_visual_indexes"}
_WINDOWED = {name: value for name, value in VISION["qwen2_5_vl"].items() if name != "tokens_per_second"}
VISION["exaone4_5"] = _WINDOWED | {"num_key_value_heads": 1}
VISION["hyperclovax_vision_v2"] = _WINDOWED | {"model_type": "qwen2_5_vl_vision", "out_hidden_size": 48}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # so that greedy captions depend on what comes before them
}


# What the language models of some kinds have besides `TEXT`.
EXTRAS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"head_dim": 16},
    "qwen3_vl_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "qwen3_5": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "exaone4_5": {
        "model_type": "exaone4",
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "hyperclovax_vision_v2": {"model_type": "hyperclovax", "logits_scaling": 0.5, "embedding_multiplier": 1.5},
}


def rope(kind: str) -> dict[str, Any]:
    """mRoPE over the 8 frequencies of a head, 4 of them in Qwen3.5; plain RoPE without it."""
    if kind in ("exaone4_5", "hyperclovax_vision_v2"):
        return {"rope_type": "default", "rope_theta": 1e4}
    if kind == "qwen3_5":
        return rope("qwen3_vl") | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    if kind.startswith("qwen3_vl"):
        return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


@pytest.fixture(scope="session")
def qwen_tokenizer(tokenizer: Any) -> Any:
    """The house tokenizer with the marks of Qwen-VL."""
    marked = copy.deepcopy(tokenizer)
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    marks += ["<vision>", "</vision>", "<|video_start|>", "<|video_end|>"]  # of EXAONE and HyperCLOVA X
    marked.add_special_tokens({"additional_special_tokens": marks})
    return marked


@pytest.fixture(scope="session")
def qwen_folders(qwen_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind."""
    from transformers import GenerationConfig

    from vlmcap.models.pretrained.families import model_class

    folders = {}
    mark = qwen_tokenizer.convert_tokens_to_ids
    tokens = {f"{name}_token_id": mark(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    tokens |= {f"{name}_token_id": mark(f"<|{name}_pad|>") for name in ("image", "video")}
    for seed, kind in enumerate(VISION):
        found = model_class(kind)
        text = TEXT | {"vocab_size": len(qwen_tokenizer), "rope_parameters": rope(kind)}
        text |= EXTRAS.get(kind, {})
        vision = VISION[kind] | {"spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2}
        torch.manual_seed(seed)
        model = found(found.config_class(vision_config=vision, text_config=text, **tokens))
        stops = [qwen_tokenizer.eos_token_id, qwen_tokenizer.pad_token_id]
        model.generation_config = GenerationConfig(eos_token_id=stops, do_sample=True, temperature=0.1, top_k=1)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        qwen_tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def qwen_processors(qwen_tokenizer: Any) -> dict[str, Any]:
    """Returns transformers' processors for preprocessed frames, as only preprocessing needs torchvision."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    classes = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
        "qwen3_vl_moe": transformers.Qwen3VLProcessor,
        "qwen3_5": transformers.Qwen3VLProcessor,
        "exaone4_5": transformers.Exaone4_5_Processor,
        "hyperclovax_vision_v2": transformers.Exaone4_5_Processor,
    }
    as_it_is = {
        name: False for name in ("do_resize", "do_convert_rgb", "do_rescale", "do_normalize", "do_sample_frames")
    }
    processors = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None
        )  # it looks through torchvision's
        for kind, processor_class in classes.items():
            # Its patches are those of the older classes too, which do not import without torchvision.
            videos = Qwen3VLVideoProcessor(
                patch_size=VISION[kind]["patch_size"], cap_pixels_per_frame=False, **as_it_is
            )
            processors[kind] = processor_class(Qwen2VLImageProcessorPil(), qwen_tokenizer, videos)
    return processors


@pytest.fixture(scope="session")
def llava_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT-Video: CLIP at 56 × 56 pixels (16 patches), pooled to 4 tokens a frame, LLaMA."""
    from transformers import CLIPImageProcessor, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    folder = tmp_path_factory.mktemp("llava_next_video")
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 16,
        "initializer_range": 0.2,
    }
    size = len(tokenizer) + 2
    text = {"model_type": "llama", "vocab_size": size, "eos_token_id": tokenizer.eos_token_id, **TEXT}
    torch.manual_seed(7)
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config=text, video_token_index=size - 2, image_token_index=size - 1
    )
    LlavaNextVideoForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56).save_pretrained(folder)
    return folder


SIDE = 56  # pixels of a frame of 4 × 4 patches
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
MARKS = ("<image>", "<video>", "<img>", "</img>", "<fake_token_around_image>", "<global-img>")
MARKS += ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<begin_of_image>", "<end_of_image>")
MARKS += ("<start_of_image>", "<end_of_image>")
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
    "initializer_range": 0.2,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
QWEN2, QWEN3 = {"model_type": "qwen2", **TEXT}, {"model_type": "qwen3", "head_dim": 16, **TEXT}
LLAMA = {"model_type": "llama", **TEXT}
COHERE2 = {"model_type": "cohere2", "sliding_window": 64, "logit_scale": 0.5, **TEXT}
COHERE2 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16, "head_dim": 16, **TEXT}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
JANUS = TOWER | {"projection_dim": 64, "num_image_tokens": 16, "mlp_ratio": 1.5}
VQ = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "double_latent": False,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "projection_dim": 16,
    "num_patches": 8,
    "image_token_embed_dim": 16,
}
INTERNVIT = {"model_type": "internvl_vision", **TOWER, "image_size": [SIDE] * 2, "patch_size": [14] * 2}
# Model type, sections of the configuration, and visual tokens per frame and per clip.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "internvl": ("internvl", {"vision_config": INTERNVIT, "text_config": QWEN3}, 4, 0),
    "llava": ("llava", {"vision_config": CLIP, "text_config": QWEN2}, 16, 0),
    "llava_onevision": ("llava_onevision", {"vision_config": SIGLIP, "text_config": QWEN2}, 4, 1),
    "varco_vision_2": (
        "llava_onevision",
        {
            "vision_config": SIGLIP,
            "text_config": QWEN3 | {"tie_word_embeddings": True},
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": True,
        },
        4,
        1,
    ),
    "aya_vision": ("aya_vision", {"vision_config": SIGLIP, "text_config": COHERE2}, 4, 0),
    "cohere2_vision": ("cohere2_vision", {"vision_config": SIGLIP, "text_config": COHERE2}, 4, 0),
    "deepseek_vl": ("deepseek_vl", {"vision_config": SIGLIP, "text_config": LLAMA}, 16, 0),
    "gemma3": (
        "gemma3",
        {"vision_config": SIGLIP, "text_config": GEMMA3, "mm_tokens_per_image": 4, "tie_word_embeddings": False},
        4,
        0,
    ),
    "idefics3": ("idefics3", {"vision_config": TOWER, "text_config": LLAMA, "scale_factor": 2}, 4, 0),
    "janus": ("janus", {"vision_config": JANUS, "text_config": LLAMA, "vq_config": VQ}, 16, 0),
    "smolvlm": ("smolvlm", {"vision_config": TOWER, "text_config": LLAMA, "scale_factor": 4}, 1, 0),
}


@pytest.fixture(scope="session")
def frames_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from a name in `CASES` to the folder of a VLM with frames of one size."""
    from vlmcap.models.pretrained.families import model_class

    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": list(MARKS)})
    image, video = marked.convert_tokens_to_ids(["<image>", "<video>"])

    @functools.cache
    def make(name: str) -> Path:
        kind, sections, _, _ = copy.deepcopy(CASES[name])
        folder = tmp_path_factory.mktemp(name)
        sections["text_config"] |= {"vocab_size": len(marked), "eos_token_id": marked.eos_token_id}
        torch.manual_seed(5)
        found = model_class(kind)
        model = found(found.config_class(**sections, image_token_id=image, video_token_id=video))
        for parameter in model.parameters():
            if not parameter.any():  # some classes begin with a projector of zeros, which hides the frames
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        marked.save_pretrained(folder)
        processor = {"image_mean": MEAN, "image_std": STD, "resample": 3, "size": {"height": SIDE, "width": SIDE}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return make
