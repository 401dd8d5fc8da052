"""Every setting that may be made: its name, type, unit and check. The YAML files under `conf/` give the values.

The first default of each YAML file is one of these schemas, so a typo or a wrong type ends before anything is loaded. Checks that look
at one group stand in its `__post_init__`, those across groups in `Config`.
"""

from __future__ import annotations

from vlmcap.config.callbacks import CallbacksConfig, EarlyStoppingConfig, GuardConfig, ProfileConfig
from vlmcap.config.choices import (
    Batching,
    DataFormat,
    Decoder,
    EncoderTuning,
    Enforce,
    Engine,
    EvaluationBackend,
    GroundingMode,
    LoggerKind,
    ModelKind,
    OptimKind,
    Precision,
    ProjectorKind,
    Quantization,
    Queries,
    Reducer,
    Sampling,
    Split,
    Strategy,
    Temporal,
)
from vlmcap.config.data import AugmentConfig, CacheConfig, DataConfig, DemoConfig, SplitConfig
from vlmcap.config.grounding import GroundingConfig
from vlmcap.config.model import EncoderConfig, LlmConfig, LoraConfig, ModelConfig, ProjectorConfig, StageConfig, TuningConfig
from vlmcap.config.run import (
    Config,
    EvaluationConfig,
    HardwareConfig,
    LoggedCheckpoint,
    LoggerConfig,
    PathsConfig,
    PlanConfig,
    is_lower_better,
)
from vlmcap.config.sweep import LauncherConfig, LauncherKind, Sampler, Scaled, SweepConfig, SweepKind
from vlmcap.config.trainer import OptimConfig, TrainerConfig

__all__ = [
    "AugmentConfig",
    "Batching",
    "CacheConfig",
    "CallbacksConfig",
    "Config",
    "DataConfig",
    "DataFormat",
    "Decoder",
    "DemoConfig",
    "EarlyStoppingConfig",
    "EncoderConfig",
    "EncoderTuning",
    "Enforce",
    "Engine",
    "EvaluationBackend",
    "EvaluationConfig",
    "GroundingConfig",
    "GroundingMode",
    "GuardConfig",
    "HardwareConfig",
    "LauncherConfig",
    "LauncherKind",
    "LlmConfig",
    "LoggedCheckpoint",
    "LoggerConfig",
    "LoggerKind",
    "LoraConfig",
    "ModelConfig",
    "ModelKind",
    "OptimConfig",
    "OptimKind",
    "PathsConfig",
    "PlanConfig",
    "Precision",
    "ProfileConfig",
    "ProjectorConfig",
    "ProjectorKind",
    "Quantization",
    "Queries",
    "Reducer",
    "Sampler",
    "Sampling",
    "Scaled",
    "Split",
    "SplitConfig",
    "StageConfig",
    "Strategy",
    "SweepConfig",
    "SweepKind",
    "Temporal",
    "TrainerConfig",
    "TuningConfig",
    "is_lower_better",
]
