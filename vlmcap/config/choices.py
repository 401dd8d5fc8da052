"""Values that a key may take where there are only some."""

from __future__ import annotations

from enum import Enum


class EncoderFamily(Enum):
    """Which class reads the encoder's checkpoint."""

    clip = "clip"
    siglip = "siglip"


class ProjectorKind(Enum):
    """The map from vision width to language width."""

    linear = "linear"
    mlp = "mlp"


class Reducer(Enum):
    """What makes fewer visual tokens in front of the projector."""

    none = "none"
    pool = "pool"


class Temporal(Enum):
    """How frames learn of each other."""

    none = "none"
    position = "position"
    attention = "attention"


Quantization = Enum("Quantization", {"none": "none", "8bit": "8bit", "4bit": "4bit"})
Quantization.__doc__ = "How the frozen language model's weights are stored."


class Precision(Enum):
    """Arithmetic of training: mixed keeps the trained weights in float32."""

    fp32 = "32-true"
    bf16 = "bf16-mixed"
    fp16 = "16-mixed"


class Split(Enum):
    """Parts of a data set."""

    train = "train"
    val = "val"
    test = "test"


class LoggerKind(Enum):
    """Where metrics go beside `metrics.jsonl`, which is always written."""

    csv = "csv"
    wandb = "wandb"
