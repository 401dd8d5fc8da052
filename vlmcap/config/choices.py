"""Enumerations of the values that a key may take."""

from __future__ import annotations

from enum import Enum


class Queries(Enum):
    """Queries that attend to the visual features in `projector.kind=cross_attention`."""

    learned = "learned"
    prompt = "prompt"


class Reducer(Enum):
    """How the number of visual tokens is reduced before the projector."""

    none = "none"
    pool = "pool"
    resample = "resample"
    merge = "merge"
    saliency = "saliency"


class Temporal(Enum):
    """How information is exchanged between frames."""

    none = "none"
    position = "position"
    attention = "attention"
    local_global = "local_global"


class EncoderTuning(Enum):
    """Which weights of the encoder are trained."""

    none = "none"
    lora = "lora"
    full = "full"


Quantization = Enum("Quantization", {"none": "none", "8bit": "8bit", "4bit": "4bit"})
Quantization.__doc__ = "Storage of the frozen weights of the language model."


class Precision(Enum):
    """Precision of training; mixed precision keeps the trained weights in float32."""

    fp32 = "32-true"
    bf16 = "bf16-mixed"
    fp16 = "16-mixed"


class OptimKind(Enum):
    """Kind of AdamW: torch's default, fused into one kernel, or with an 8-bit state."""

    adamw = "adamw"
    adamw_fused = "adamw_fused"
    adamw_8bit = "adamw_8bit"


class Strategy(Enum):
    """What each process holds: the full model (DDP), or a shard of every weight (FSDP2)."""

    auto = "auto"
    ddp = "ddp"
    fsdp2 = "fsdp2"


class Split(Enum):
    """Splits of a data set."""

    train = "train"
    val = "val"
    test = "test"


class Sampling(Enum):
    """Which frames of a clip the model sees."""

    uniform = "uniform"
    fps = "fps"
    keyframe = "keyframe"
    adaptive = "adaptive"
    random = "random"


class Decoder(Enum):
    """Library that decodes videos; `auto` is torchcodec if it is installed and loads, else PyAV."""

    auto = "auto"
    pyav = "pyav"
    torchcodec = "torchcodec"


class Batching(Enum):
    """Which clips share a batch."""

    shuffled = "shuffled"
    by_length = "by_length"
    packed = "packed"


class EvaluationBackend(Enum):
    """Implementation of BLEU, CIDEr-D and ROUGE-L: this package's, or the reference package."""

    native = "native"
    pycocoevalcap = "pycocoevalcap"


class Enforce(Enum):
    """What `train.py` does with a configuration that does not fit on its GPU."""

    error = "error"
    warn = "warn"
    off = "off"


class VisualRelianceMode(Enum):
    """What is measured with exchanged videos: captions and label loss, or the label loss alone."""

    captions = "captions"
    loss = "loss"


class Engine(Enum):
    """Decoding engine: the native loop where possible (greedy, full attention), transformers' `generate`, or vLLM."""

    native = "native"
    hf = "hf"
    vllm = "vllm"
