"""The same model, clips, adapters and optimiser for the stock class and for this project; see step.py."""

from __future__ import annotations

import random
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmcap.config import LoraConfig, OptimConfig, Stage
from vlmcap.data.loading.collate import Collator
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.pretrained import load_pretrained
from vlmcap.training.module import CaptioningModule
from vlmcap.training.schedule import StagePlan
from vlmcap.types import Batch, Clip, Sample

VOCABULARY = 151_936
VIDEO_TOKEN, PAD_TOKEN = VOCABULARY - 1, 0
IMAGE_SIZE, PATCH, TOKENS_A_FRAME = 336, 14, 144  # 24 × 24 patches, averaged 2 × 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RANK, ALPHA, ADAPTER_RATE, PROJECTOR_RATE = 16, 32, 2e-4, 1e-4
CHUNK_BYTES = 128 * 2**20  # hardware.loss_chunk_mib
LANGUAGE_LINEARS = r".*language_model\.layers\..*_proj"


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA-NeXT-Video; caption tokens are those of the batch's clips, the end token among them."""

    captions: tuple[int, ...] = (450,)
    text_width: int = 512
    text_layers: int = 4
    num_frames: int = 8
    vision_width: int = 256
    vision_layers: int = 6


SHAPES = {"small": Shape(), "wide": Shape(text_width=1024), "batch": Shape(captions=(450, 380))}


@dataclass
class Words:
    """Stands in for a tokenizer: captions are numbers of random tokens."""

    prefix_ids: list[int] = field(default_factory=lambda: list(range(5, 10)))
    suffix_ids: list[int] = field(default_factory=lambda: list(range(20, 35)))
    question_ids: list[int] = field(default_factory=lambda: list(range(20, 30)))
    end_id: int = 1
    pad_id: int = PAD_TOKEN

    def encode_caption(self, text: str) -> list[int]:
        return random.Random(text).choices(range(50, VIDEO_TOKEN), k=int(text) - 1)


def save_model(shape: Shape, folder: Path) -> None:
    """Saves random weights of a shape in the hub's layout, and its clips' features like the cache, in float32."""
    from transformers import CLIPImageProcessor, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_width // 64,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": shape.text_width,
        "intermediate_size": 43 * shape.text_width // 16,  # as LLaMA's 11 008 to 4 096
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_width // 64,
        "num_key_value_heads": shape.text_width // 64,
        "max_position_embeddings": 8192,
    }
    torch.manual_seed(0)
    config = LlavaNextVideoConfig(
        vision_config=vision,
        text_config=text,
        video_token_index=VIDEO_TOKEN,
        image_token_index=VIDEO_TOKEN - 1,
        attn_implementation="sdpa",
    )
    LlavaNextVideoForConditionalGeneration(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE).save_pretrained(folder)
    encoder = load(folder).encoder
    with torch.no_grad():
        save_file({"features": encoder(make_frames(shape)).contiguous()}, folder / "features.st")


def load(folder: Path) -> Any:
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "quantization": "none",
        "attention": "sdpa",
        "device": "cpu",
        "max_patches": 1,
    }
    return load_pretrained("llava_next_video", folder, **options)


def make_frames(shape: Shape) -> Tensor:
    sizes = (len(shape.captions), shape.num_frames, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randint(0, 256, sizes, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def make_batch(shape: Shape, features: Tensor | None) -> Batch:
    """Makes the batch, with frames unless features are given."""
    frames = make_frames(shape) if features is None else None
    samples = []
    for i, tokens in enumerate(shape.captions):
        clip = Clip(str(i), f"{i}.mp4", (str(tokens),))
        part = {"frames": frames[i]} if frames is not None else {"features": features[i]}  # type: ignore[index]
        samples.append(Sample(clip, **part))
    return Collator(Words(), TOKENS_A_FRAME * shape.num_frames, max(shape.captions))(samples)


def make_stock(folder: Path, shape: Shape) -> tuple[Any, dict[str, Tensor]]:
    """Makes the stock class with peft's LoRA and a trained projector, and its inputs.

    Pixels are scaled and normalised in one step.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaNextVideoForConditionalGeneration

    model = LlavaNextVideoForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LANGUAGE_LINEARS))
    for name, parameter in adapted.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    set_adapters(adapted)
    batch = make_batch(shape, None)
    assert batch.frames is not None
    assert batch.labels is not None
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    inputs = {
        "input_ids": batch.input_ids.masked_fill(batch.visual_mask, VIDEO_TOKEN),
        "attention_mask": batch.attention_mask,
        "pixel_values_videos": (batch.frames.float() - mean) / std,
        "labels": batch.labels,
    }
    return adapted, inputs


def make_ours(folder: Path, shape: Shape, *, is_cached: bool, num_steps: int) -> tuple[CaptioningModule, Batch]:
    """Makes this project's module around the components of the same folder."""
    parts = load(folder)
    llm = add_lora(parts.llm, LoraConfig(rank=RANK, alpha=ALPHA))
    set_adapters(llm)
    encoder = None if is_cached else parts.encoder
    captioner = VideoCaptioner(
        encoder, parts.projector, llm, Words(), GenerationSettings(1), loss_chunk_bytes=CHUNK_BYTES
    )  # type: ignore[arg-type]
    stage = Stage(epochs=1, projector_lr=PROJECTOR_RATE, adapter_lr=ADAPTER_RATE, warmup_ratio=0.0, final_lr_ratio=1.0)
    skipped_log = SkippedClipLog(Path(tempfile.gettempdir()) / "vlmcap-no-clips.jsonl", 0.0, num_steps)
    plan, unit = StagePlan({"tune": stage}), sum(shape.captions)
    module = CaptioningModule(
        captioner, plan, OptimConfig(), identity={}, skipped_log=skipped_log, max_label_tokens=unit
    )
    features = load_file(folder / "features.st")["features"] if is_cached else None
    return module, make_batch(shape, features)


def set_adapters(model: nn.Module) -> None:
    """Initialises adapters from weights that depend only on the name of their layer."""
    count = 0
    for name, parameter in base_model(model).named_parameters():
        if "lora_A" in name:
            seed = zlib.crc32(name[name.index("layers.") :].encode())
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data = values / parameter.shape[1] ** 0.5
            count += 1
    assert count > 0


def count_flops(model: nn.Module, loss: Any) -> int:
    """Counts floating-point operations of matrix products in one forward and backward pass.

    PyTorch counts no attention on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def num_tokens(shape: Shape) -> list[int]:
    """Returns the sequence length of each clip."""
    prompt = len(Words().prefix_ids) + len(Words().suffix_ids) + TOKENS_A_FRAME * shape.num_frames
    return [prompt + caption for caption in shape.captions]


def attention_flops(shape: Shape, way: str) -> int:
    """Returns the operations of fused attention, two products in the forward and five in the backward pass.

    It skips half of them where the causal mask is the only one.
    """
    lengths = num_tokens(shape)
    share = 0.5 if len(set(lengths)) == 1 else 1.0  # padding needs a mask
    text = share * len(lengths) * 2 * max(lengths) ** 2 * shape.text_width * shape.text_layers * (2 + 5)
    patches = (IMAGE_SIZE // PATCH) ** 2 + 1
    layers = {"trainer": shape.vision_layers, "uncached": shape.vision_layers - 1, "cached": 0}[
        way
    ]  # we stop at the layer that is read
    return round(text + len(lengths) * shape.num_frames * 2 * patches**2 * shape.vision_width * layers * 2)
