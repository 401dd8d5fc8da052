"""Values that a key may take where there are only some."""

from __future__ import annotations

from enum import Enum


class Queries(Enum):
    """What attends to the visual features in `projector.kind=cross_attention`."""

    learned = "learned"
    prompt = "prompt"


class Reducer(Enum):
    """What makes fewer visual tokens in front of the projector."""

    none = "none"
    pool = "pool"
    resample = "resample"
    merge = "merge"
    saliency = "saliency"


class Temporal(Enum):
    """How frames learn of each other."""

    none = "none"
    position = "position"
    attention = "attention"
    local_global = "local_global"


class EncoderTuning(Enum):
    """What is trained of the encoder."""

    none = "none"
    lora = "lora"
    full = "full"


Quantization = Enum("Quantization", {"none": "none", "8bit": "8bit", "4bit": "4bit"})
Quantization.__doc__ = "How the frozen language model's weights are stored."


class Precision(Enum):
    """Arithmetic of training: mixed keeps the trained weights in float32."""

    fp32 = "32-true"
    bf16 = "bf16-mixed"
    fp16 = "16-mixed"


class OptimKind(Enum):
    """AdamW as torch has it, fused into one kernel, or with its state in 8 bits."""

    adamw = "adamw"
    adamw_fused = "adamw_fused"
    adamw_8bit = "adamw_8bit"


class Strategy(Enum):
    """What each process holds of the model: all of it (DDP), or a part of every weight (FSDP2)."""

    auto = "auto"
    ddp = "ddp"
    fsdp2 = "fsdp2"


class Split(Enum):
    """Parts of a data set."""

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
    """What reads video files; `auto` is torchcodec where it is installed and loads, else PyAV."""

    auto = "auto"
    pyav = "pyav"
    torchcodec = "torchcodec"


class Batching(Enum):
    """Which clips share a batch."""

    shuffled = "shuffled"
    by_length = "by_length"
    packed = "packed"


class EvaluationBackend(Enum):
    """Who computes BLEU, CIDEr-D and ROUGE-L of our tokens: we, or the reference package."""

    native = "native"
    pycocoevalcap = "pycocoevalcap"


class Enforce(Enum):
    """What `train.py` does about a configuration that its GPU cannot hold."""

    error = "error"
    warn = "warn"
    off = "off"


class VisualRelianceMode(Enum):
    """What is measured with exchanged videos: captions and the loss of the labels, or that loss alone."""

    captions = "captions"
    loss = "loss"


class Engine(Enum):
    """What decodes captions: our own loop where it can (greedy search, full attention), transformers' `generate`, or vLLM."""

    native = "native"
    hf = "hf"
    vllm = "vllm"
