"""Every setting: its type, its default and its doc string stand together.

Each dataclass of this package is one node of the tree. YAML files under `conf/` only hold named choices of its fields.
`sora_lite.cli.compose` turns both into one of the root classes (`TrainConfig`, `TrainVAEConfig`, ...); below the
command line nobody sees anything but these dataclasses.

A module holds what is set together; all names are imported from here. What several fields have to do with each other
is checked by `check`, at compose time, before anything is built.
"""

from sora_lite.config.checks import check
from sora_lite.config.data import BatchBy, BucketRule, DataConfig, Decoder, SetRule
from sora_lite.config.diffusion import DiffusionConfig, DiffusionObjective, NoiseSchedule, ShiftBy, TimestepSampling
from sora_lite.config.dit import (
    Attention,
    DiTConfig,
    Gelu,
    Modulation,
    Positions,
    QKNorm,
    TextAttention,
    TextConfig,
    unread,
)
from sora_lite.config.generate import (
    ConditionConfig,
    EvaluateConfig,
    GenerateConfig,
    PositionScaling,
    Sampler,
    SamplingConfig,
)
from sora_lite.config.optim import OptimConfig, Schedule
from sora_lite.config.parallel import Offload, ParallelConfig, Precision
from sora_lite.config.roots import ROOTS, field_docs, register
from sora_lite.config.run import GuardConfig, LoggingConfig, OnDamage, OnFailedSave, RunConfig, SpikeAction, WandbMode
from sora_lite.config.slurm import QueueConfig, SlurmConfig
from sora_lite.config.train import (
    BaseTrainConfig,
    DataPreviewConfig,
    FrameMode,
    FrameRule,
    LoraConfig,
    PreviewConfig,
    PreviewFormat,
    TrainConfig,
    TrainVAEConfig,
)
from sora_lite.config.vae import VAEConfig, VAELossConfig
from sora_lite.config.verbs import (
    CheckpointConfig,
    DemoConfig,
    ExportConfig,
    Format,
    ImportConfig,
    InspectConfig,
    Layout,
    ScalingConfig,
)

__all__ = [
    "ROOTS",
    "Attention",
    "BaseTrainConfig",
    "BatchBy",
    "BucketRule",
    "CheckpointConfig",
    "ConditionConfig",
    "DataConfig",
    "DataPreviewConfig",
    "Decoder",
    "DemoConfig",
    "DiTConfig",
    "DiffusionConfig",
    "DiffusionObjective",
    "EvaluateConfig",
    "ExportConfig",
    "Format",
    "FrameMode",
    "FrameRule",
    "Gelu",
    "GenerateConfig",
    "GuardConfig",
    "ImportConfig",
    "InspectConfig",
    "Layout",
    "LoggingConfig",
    "LoraConfig",
    "Modulation",
    "NoiseSchedule",
    "Offload",
    "OnDamage",
    "OnFailedSave",
    "OptimConfig",
    "ParallelConfig",
    "PositionScaling",
    "Positions",
    "Precision",
    "PreviewConfig",
    "PreviewFormat",
    "QKNorm",
    "QueueConfig",
    "RunConfig",
    "Sampler",
    "SamplingConfig",
    "ScalingConfig",
    "Schedule",
    "SetRule",
    "ShiftBy",
    "SlurmConfig",
    "SpikeAction",
    "TextAttention",
    "TextConfig",
    "TimestepSampling",
    "TrainConfig",
    "TrainVAEConfig",
    "VAEConfig",
    "VAELossConfig",
    "WandbMode",
    "check",
    "field_docs",
    "register",
    "unread",
]
