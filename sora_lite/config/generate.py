"""Roots of the verbs that make clips, `sora-lite generate` and `evaluate`."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from omegaconf import MISSING

from sora_lite.config.train import FrameMode


class Sampler(Enum):
    """How noise becomes a generation. Euler, Heun, DPM-Solver++(2M) and DDIM serve every objective, DDPM those with a
    noise schedule."""

    euler = "euler"
    heun = "heun"
    dpmpp_2m = "dpmpp_2m"
    ddim = "ddim"
    ddpm = "ddpm"


class PositionScaling(StrEnum):
    """What to do about positions beyond those of training: nothing, linear interpolation, or NTK-aware scaling."""

    none = "none"
    linear = "linear"
    ntk = "ntk"


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How clips are drawn from a model."""

    sampler: Sampler = Sampler.euler
    """How noise becomes a generation."""
    steps: int = 25
    """Steps of the sampler; Heun calls the model twice in each."""
    eta: float = 0.0
    """Noise that DDIM adds in each step: 0 for none, 1 for as much as DDPM."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 is no guidance."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Times [least, greatest] at which the guidance holds; at others it is 1."""
    guidance_rescale: float = 0.0
    """How far, from 0 to 1, a guided prediction's spread is brought back to the unguided one's."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels, as the published DiT does 3 of 4; null guides all."""
    shift: float | None = None
    """Time shift of rectified flow's sampling; null takes that of training."""
    seed: int = 0
    """Seed of all noise; generation i uses its own draws, whatever the batch."""
    batch: int = 50
    """Generations made at a time; fewer where memory is short."""


@dataclass(kw_only=True, slots=True)
class ConditionConfig:
    """Pictures or clips that generations have to keep, at a clip's own rate and in the generation's size."""

    first: str | None = None
    """Picture (PNG, JPEG) or clip that generations begin with; of a clip its last `frames` frames."""
    last: str | None = None
    """Picture or clip that generations end with; of a clip its first `frames` frames."""
    frames: int = 5
    """How many frames of a clip are kept: 4k+1 for a VAE that compresses time by 4."""


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """`sora-lite generate`: make clips from an exported model."""

    model_from: str = MISSING
    """The trained DiT: an export (`sora-lite export`), or a run folder that holds one."""
    text_from: str | None = None
    """The frozen text encoder that the DiT was trained with, which its export names and does not hold."""
    pooled_from: str | None = None
    """Likewise the CLIP of a DiT with `model.pooled_features`."""
    out: str = "generations"
    """Folder for clips, contact sheet and page."""
    prompts: list[str] = field(default_factory=list)
    """Texts; for a model without text leave it empty and give labels."""
    labels: list[int] = field(default_factory=list)
    """Class labels from 0 on, one per prompt, or alone; empty for none."""
    negative_prompt: str = ""
    """What shall not be seen: guidance leads away from this text instead of from none."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """Frames that generations have to keep; then prompts and labels may be left out."""
    count: int = 1
    """Generations per prompt."""
    frames: int | None = None
    """Frames per clip; by default as in training (the first bucket)."""
    resolution: list[int] | None = None
    """[height, width]; by default as in training (the first bucket)."""
    fps: float | None = None
    """Frames per second of the files; by default as in training."""
    position_scaling: PositionScaling = PositionScaling.none
    """For clips larger than in training (the first bucket): how positions are brought into the trained range."""
    shards: str | None = None
    """Shards whose held-out clips the page shows beside the generations."""
    run: str | None = None
    """Run folder whose loss curve the page shows."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    threads: int | None = None
    """CPU threads for torch."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """`sora-lite evaluate`: measure a model of a labelled data set with classifiers trained on real clips."""

    model_from: str = MISSING
    """The trained DiT: an export (`sora-lite export`), or a run folder that holds one."""
    text_from: str | None = None
    """The frozen text encoder that the DiT was trained with, which its export names and does not hold."""
    pooled_from: str | None = None
    """Likewise the CLIP of a DiT with `model.pooled_features`."""
    shards: str = MISSING
    """Shards whose clips carry the attributes below; train clips train the judge, held-out clips test it."""
    out: str = MISSING
    """JSON file to write."""
    attributes: list[str] = field(default_factory=lambda: ["digit", "direction"])
    """Categorical columns of the data set that are asked for in prompts and recognised in generations."""
    count: int = 200
    """Generations, spread alike over all combinations of the attributes."""
    clips: int = 400
    """Held-out clips for the VAE's reconstruction figures."""
    frames: list[FrameMode] = field(default_factory=list)
    """Measure these ways of giving frames (of held-out clips) instead of generations from prompts alone."""
    judge_steps: int = 600
    """Training steps of each classifier."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    threads: int | None = None
    """CPU threads for torch."""
