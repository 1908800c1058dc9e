"""Roots of the other verbs: each has a handful of settings of its own."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from omegaconf import MISSING

from sora_lite.config.dit import DiTConfig
from sora_lite.config.parallel import Precision


class Format(Enum):
    """How a verb prints its table: for people or for machines."""

    table = "table"
    json = "json"


class Layout(StrEnum):
    """Files of an export: this project's, or those of diffusers (DiT, Latte and Wan models)."""

    sora_lite = "sora_lite"
    diffusers = "diffusers"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """`sora-lite export`: write a run's newest checkpoint as safetensors for inference."""

    run: str = MISSING
    """Run folder of train or train-vae; with layout=diffusers also an export or import."""
    out: str | None = None
    """Folder to write; by default RUN/export, or RUN/diffusers."""
    weights: str = "ema"
    """`ema` (the averaged weights) or `raw`."""
    layout: Layout = Layout.sora_lite
    """`diffusers` writes config.json and weights that diffusers reads; for DiT, Latte and Wan models."""
    init_from: str | None = None
    """Of a run that trained adapters (`lora.rank`): the weights that it started from, where they were moved."""


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """`sora-lite import`: weights that others published (DiT, Latte, Wan) as an export of this project."""

    weights_from: str = MISSING
    """A .pt file of the DiT paper's code, or a folder of diffusers with safetensors (a transformer, or a pipeline)."""
    out: str = MISSING
    """Folder to write."""
    heads: int | None = None
    """Attention heads of a .pt file, which does not tell them; known for the paper's sizes."""


@dataclass(kw_only=True, slots=True)
class InspectConfig:
    """`sora-lite inspect`: parameters, FLOPs and memory of a model on the meta device, without building it."""

    model: DiTConfig = field(default_factory=DiTConfig)
    latent: list[int] | None = None
    """Latent (channels, frames, height, width) of one clip; null takes [4, 1, 32, 32] (an image of 256 x 256) for
    models with labels alone, as in the DiT paper, and [16, 5, 32, 32] for others."""
    precision: Precision = Precision.bf16
    """Arithmetic for which memory is told."""
    format: Format = Format.table
    """`table` or `json`."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """`sora-lite checkpoint list|verify RUN`: what lies in a run's folder of checkpoints."""

    run: str = MISSING
    """Run folder of train or train-vae."""
    format: Format = Format.table
    """`table` or `json`."""


@dataclass(kw_only=True, slots=True)
class ScalingConfig:
    """`sora-lite scaling`: fit the validation loss of a sweep of model sizes against the FLOPs of their training."""

    runs: str = MISSING
    """Pattern of the sweep's run folders, such as 'runs/scaling_*'. The largest is held out and predicted."""
    out: str = "scaling"
    """Folder for scaling.png and scaling.json."""


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """`sora-lite demo`: the whole way on moving handwritten digits, from rendering to evaluation."""

    experiment: str = "demo"
    """`demo` (minutes), `moving_digits` or, with given frames, `moving_digits_frames` (up to an hour)."""
    root: str = "runs"
    """Folder for everything that it makes."""
    clips: int = 5000
    """Clips to render."""
    ranks: int = 2
    """Processes that train; with GPUs at most one per GPU."""
    threads: int | None = None
    """CPU threads for everything that is not trained on several ranks."""
