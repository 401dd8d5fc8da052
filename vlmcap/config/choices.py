"""Values that a key may take where there are only some."""

from __future__ import annotations

from enum import Enum


class ModelKind(Enum):
    """Parts joined by us, or a whole pretrained model's class."""

    assembled = "assembled"
    llava_next_video = "llava_next_video"
    qwen2_vl = "qwen2_vl"
    qwen2_5_vl = "qwen2_5_vl"
    qwen3_vl = "qwen3_vl"


class ProjectorKind(Enum):
    """The map from vision width to language width; `own` is that of a whole model."""

    linear = "linear"
    mlp = "mlp"
    cross_attention = "cross_attention"
    perceiver = "perceiver"
    c_abstractor = "c_abstractor"
    pixel_shuffle = "pixel_shuffle"
    own = "own"


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


class DataFormat(Enum):
    """Layout of a data set on disk; each has a reader of its own under vlmcap/data/formats/."""

    aihub = "aihub"
    jsonl = "jsonl"
    coco_ko = "coco_ko"
    nikl = "nikl"
    msrvtt = "msrvtt"
    vatex = "vatex"
    llava = "llava"
    webdataset = "webdataset"


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
    """What `train.py` does about a configuration that its card cannot hold."""

    error = "error"
    warn = "warn"
    off = "off"


class GroundingMode(Enum):
    """What is measured with exchanged videos: captions and the loss of the labels, or that loss alone."""

    captions = "captions"
    loss = "loss"


class Engine(Enum):
    """What decodes captions: our own loop where it can (greedy search, full attention), transformers' `generate`, or vLLM."""

    own = "own"
    hf = "hf"
    vllm = "vllm"


class LoggerKind(Enum):
    """Where metrics go beside `metrics.jsonl`, which is always written."""

    csv = "csv"
    wandb = "wandb"
    tensorboard = "tensorboard"
    mlflow = "mlflow"
    trackio = "trackio"
    none = "none"
