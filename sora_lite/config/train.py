"""Roots of the verbs that train, and of `sora-lite data-preview`, which shows what they would see."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from sora_lite.config.data import DataConfig
from sora_lite.config.diffusion import DiffusionConfig
from sora_lite.config.dit import DiTConfig
from sora_lite.config.optim import OptimConfig
from sora_lite.config.parallel import ParallelConfig
from sora_lite.config.run import GuardConfig, LoggingConfig, RunConfig
from sora_lite.config.slurm import SlurmConfig
from sora_lite.config.vae import VAEConfig, VAELossConfig


@dataclass(kw_only=True, slots=True)
class BaseTrainConfig:
    """What training a VAE and training a DiT have in common."""

    init_from: str | None = None
    """Start from these weights: an export, or a run folder that holds one. A run that has a checkpoint goes on from
    that instead; adapters (`lora.rank`) need these weights at every start."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(kw_only=True, slots=True)
class TrainVAEConfig(BaseTrainConfig):
    """`sora-lite train-vae`: train the causal VAE."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): they are trained, and the weights of `init_from` stay as they are."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead. Needs `init_from`, with a model of the same architecture."""
    alpha: float | None = None
    """What an adapter adds is scaled by alpha / rank; null takes alpha = rank, a scale of 1."""
    targets: list[str] = field(default_factory=lambda: ["blocks.*"])
    """Which linear layers get an adapter: patterns of their names with * for anything, such as
    [blocks.*.attention.qkv,blocks.*.cross.*]; by default all in the blocks."""


class FrameMode(Enum):
    """Which frames of a clip are given, and the others made: none (text only), the first (image to video), the last,
    both, those before (extension forward), those after (extension backward), or any."""

    none = "none"
    first = "first"
    last = "last"
    first_last = "first_last"
    before = "before"
    after = "after"
    random = "random"


@dataclass(kw_only=True, slots=True)
class FrameRule:
    """One row of the ratios by which training gives frames."""

    mode: FrameMode = MISSING
    """Which frames are given."""
    weight: float = 1.0
    """How often, against the other rows."""


@dataclass(kw_only=True, slots=True)
class TrainConfig(BaseTrainConfig):
    """`sora-lite train`: train the video DiT."""

    vae_from: str = MISSING
    """The trained VAE: an export (`sora-lite export`), or a run folder that holds one."""
    text_from: str | None = None
    """The frozen text encoder of a model with `model.text_features`: a folder of T5, UMT5 or CLIP that transformers has
    saved, or a pipeline of diffusers."""
    pooled_from: str | None = None
    """The CLIP of a model with `model.pooled_features`; it may be the same as `text_from`."""
    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    frames: list[FrameRule] = field(default_factory=list)
    """How often which frames of a clip are given; needs `model.frame_conditions`, and clips as video."""
    lora: LoraConfig = field(default_factory=LoraConfig)


class PreviewFormat(Enum):
    """What `data-preview` gives: contact sheets and a page, or a line of JSON for each step and rank."""

    page = "page"
    jsonl = "jsonl"


@dataclass(kw_only=True, slots=True)
class PreviewConfig:
    """What `data-preview` shows of the data."""

    format: PreviewFormat = PreviewFormat.page
    """`page`: contact sheets of each bucket and index.html. `jsonl`: what each rank sees in each step, on stdout."""
    out: str = "preview"
    """Folder for sheets and page."""
    clips: int = 12
    """For page: clips of each bucket."""
    start: int = 0
    """The first step that is looked at."""
    steps: int = 4
    """For jsonl: steps."""
    world_size: int = 1
    """For jsonl: ranks that share a step."""
    accumulation: int = 1
    """For jsonl: passes in which each rank takes its part of a step."""


@dataclass(kw_only=True, slots=True)
class DataPreviewConfig(TrainConfig):
    """`sora-lite data-preview`: what `sora-lite train` with the same settings would see."""

    vae_from: str = ""
    """The trained VAE, whose factors count the tokens of a clip; empty takes the usual 4 x 8 x 8 compression. Latents
    must be its."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
