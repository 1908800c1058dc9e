"""The whole configuration schema.

Each dataclass below is one node of the tree; each field's type, default and doc string stand together. YAML files under
`conf/` only hold named choices of these fields. `sora_lite.cli.compose` turns both into one of the root classes
(`TrainConfig`, `TrainVAEConfig`, ...); below the command line nobody sees anything but these dataclasses.

Rules that join several fields are checked by `check`, at compose time, before anything is built.
"""

import ast
import inspect
import math
import textwrap
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cache

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from sora_lite.errors import UserError

# ---------------------------------------------------------------------------------------------------- choices


class Schedule(Enum):
    """How the learning rate goes after the warm-up."""

    constant = "constant"
    cosine = "cosine"


class Precision(Enum):
    """Arithmetic of the trained model's forward and backward pass; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Offload(Enum):
    """Where the fp32 master weights and Adam's moments lie and are updated."""

    none = "none"
    """On the device that trains."""
    cpu = "cpu"
    """In the host's memory, by DeepSpeed's CPUAdam."""


class TimestepSampling(Enum):
    """Density from which training draws the time t in [0, 1]."""

    logit_normal = "logit_normal"
    uniform = "uniform"


class DiffusionObjective(Enum):
    """What the model predicts: noise - data on the straight path, the noise, or v = alpha noise - sigma data."""

    rectified_flow = "rectified_flow"
    epsilon = "epsilon"
    velocity = "velocity"


class NoiseSchedule(Enum):
    """Schedule of 1,000 steps for the objectives epsilon and velocity."""

    linear = "linear"
    cosine = "cosine"


class ShiftBy(Enum):
    """How the time shift of rectified flow depends on the number of tokens: not, with its square root (Stable
    Diffusion 3), or exponentially (FLUX.1)."""

    fixed = "fixed"
    sqrt = "sqrt"
    exponential = "exponential"


class Sampler(Enum):
    """How noise becomes a generation. Euler, Heun, DPM-Solver++(2M) and DDIM serve every objective, DDPM those with a
    noise schedule."""

    euler = "euler"
    heun = "heun"
    dpmpp_2m = "dpmpp_2m"
    ddim = "ddim"
    ddpm = "ddpm"


class SpikeAction(Enum):
    """What happens at a spike of loss or gradient norm: nothing, its update is left out, or the run goes back to its
    newest checkpoint and on behind the data of the spike."""

    ignore = "ignore"
    skip = "skip"
    rollback = "rollback"


class WandbMode(Enum):
    """Where the Weights & Biases view of a run goes. `auto` is online if a key is configured, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Decoder(Enum):
    """Library that decodes clips for training. `decord` (a package of its own) is used for mp4 clips that `sora-data`
    wrote, after a comparison with PyAV on the first of them. It takes a tenth less time for whole clips, a tenth
    to a fifth more for parts of them, and its colours are coarser: see `python -m benchmarks decoding`."""

    pyav = "pyav"
    decord = "decord"


class OnFailedSave(Enum):
    """What happens where a checkpoint cannot be written. `warn` trains on with the one before it."""

    stop = "stop"
    warn = "warn"


class OnDamage(Enum):
    """What happens where the newest checkpoint is damaged. `fall_back` goes on from the newest good one."""

    fall_back = "fall_back"
    stop = "stop"


class Positions(StrEnum):
    """How a token knows its place: rotary positions over (t, h, w), or fixed sines and cosines added to the tokens."""

    rope = "rope"
    sincos = "sincos"


class Attention(StrEnum):
    """Which tokens attend to each other: all; or in turn those of a frame and those of a place (Latte)."""

    full = "full"
    factorised = "factorised"


class QKNorm(StrEnum):
    """What the root mean square norm of queries and keys spans: a head, the full width (Wan), or nothing."""

    head = "head"
    full = "full"
    none = "none"


class Modulation(StrEnum):
    """adaLN-Zero with a layer in each block, or one shared layer with offsets in each block (PixArt, Wan)."""

    per_block = "per_block"
    shared = "shared"


class Gelu(StrEnum):
    """Exact GELU, or its tanh form (the paper, Wan), which is 4 times slower on CPUs."""

    erf = "erf"
    tanh = "tanh"


class TextAttention(StrEnum):
    """Text is read by cross-attention, or goes along with the video tokens in joint blocks (MMDiT)."""

    cross = "cross"
    joint = "joint"


class PositionScaling(StrEnum):
    """What to do about positions beyond those of training: nothing, linear interpolation, or NTK-aware scaling."""

    none = "none"
    linear = "linear"
    ntk = "ntk"


class Layout(StrEnum):
    """Files of an export: this project's, or those of diffusers (DiT, Latte and Wan models)."""

    sora_lite = "sora_lite"
    diffusers = "diffusers"


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


class BatchBy(Enum):
    """What the micro-steps of all buckets have alike, as near as whole batches come: tokens; FLOPs of the configured
    models (forward and backward, and the frozen VAE's encoder), so that steps take about the same time; or, for clips
    that come as latents, FLOPs of the trained model alone. It is said, not guessed from the data: batches are part of
    the order, which latents do not change."""

    tokens = "tokens"
    flops = "flops"
    model_flops = "model_flops"


class Format(Enum):
    """How a verb prints its table: for people or for machines."""

    table = "table"
    json = "json"


# ---------------------------------------------------------------------------------------------------- shared nodes


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What a run is called, how long it goes on, and when its side jobs happen. Steps are optimizer steps."""

    name: str = MISSING
    """Name of the run; its folder is `root`/`name`, so the same command always finds its own run again."""
    root: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seed of initial weights, data order and every draw in training."""
    steps: int = 10_000
    """Length of the whole run."""
    accept: list[str] = field(default_factory=list)
    """Settings that may differ from those of the checkpoint that the run goes on from, such as [data.sets.weight]."""
    log_every: int = 10
    """A line of metrics every so many steps."""
    save_every: int = 500
    """A kill costs at most so many steps: a checkpoint every so many, and one at the end; in the background every half
    of it, as the newest one may still be on its way."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep; with 2 or more there is another one where the newest is damaged."""
    keep_every: int = 0
    """Keep the checkpoints of steps that are multiples of this as well; 0 for none."""
    save_in_background: bool = True
    """Copy the state to memory and write it while training goes on: takes as much memory as a rank's part of it. A run
    that saves every step waits."""
    on_failed_save: OnFailedSave = OnFailedSave.stop
    """`stop` or `warn` where a checkpoint cannot be written; that at the end must be written with both."""
    on_damage: OnDamage = OnDamage.fall_back
    """`fall_back` or `stop` where the newest checkpoint is damaged."""
    take_over: bool = False
    """Take the run folder from a job that still holds it. That job then stops without saving."""
    validate_every: int = 500
    """Validation loss (EMA weights, fixed times and noise) every so many steps; 0 turns it off."""
    validation_samples: int = 64
    """How many held-out samples validation looks at."""
    sample_every: int = 0
    """Sample clips (or reconstructions) as a contact sheet every so many steps; 0 turns it off."""
    check_every: int = 500
    """Compare what all ranks hold a copy of (frozen weights; under ZeRO 0 the trained ones) every so many steps, and
    before each checkpoint; a rank that is off is named and the run stops."""
    watchdog_seconds: float = 600.0
    """Longest time without progress, after which the stacks of all ranks are written and the run ends."""
    deterministic: bool = False
    """Bit for bit the same on GPUs too, at a cost in speed; on CPUs it is so anyway."""


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Which updates are not made. Those from a loss or gradients that are not finite never are."""

    spikes: SpikeAction = SpikeAction.skip
    """What happens at a spike: a loss or gradient norm above mean + sigma * standard deviation of the window."""
    sigma: float = 10.0
    """How far above the mean a spike begins, in standard deviations."""
    window: int = 128
    """Updates that a value is compared with; until so many were made nothing is a spike."""
    max_skips: int = 16
    """Stop the run when more updates than this were left out within a window."""
    max_rollbacks: int = 3
    """Stop the run at a spike after so many rollbacks."""


@dataclass(kw_only=True, slots=True)
class BucketRule:
    """One row of the bucket table: clips of one size that are batched together."""

    resolution: list[int] = MISSING
    """[height, width] in pixels."""
    frames: int = MISSING
    """Frames per clip at its fps: 4k+1 for a VAE that compresses time by 4; 1 is a still image."""
    keep: float = 1.0
    """Fraction (chosen by key) of the fitting samples that go here; the others try the next row."""
    fps: float | None = None
    """Frames per second of these clips; by default `data.fps`."""
    batch: int | None = None
    """Samples in a global micro-step; by default from `data.batch_tokens` and `data.batch_by`."""


@dataclass(kw_only=True, slots=True)
class SetRule:
    """One of several data sets that are mixed."""

    shards: str = MISSING
    """Folder of shards with a manifest.json, as `sora-data run` writes it, or its URL."""
    latents: str | None = None
    """Its latents, as `sora-data encode` writes them, or their URL."""
    text: str | None = None
    """Features of its captions, as `sora-data encode` writes them, or their URL."""
    weight: float | None = None
    """How often its samples come, against the weights of the others; null, for all, goes by the number of samples."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which shards are read and how samples become batches."""

    shards: str | None = MISSING
    """Folder of shards with a manifest.json, as `sora-data run` writes it, or its URL; or give `data.sets`."""
    sets: list[SetRule] = field(default_factory=list)
    """Several data sets that are mixed, instead of `data.shards`."""
    latents: str | None = None
    """Latents of `data.shards` (each of a clip's beginning), as `sora-data encode` writes them, or their URL. Clips
    without one are decoded."""
    text: str | None = None
    """Features of the captions of `data.shards`, which `sora-data encode` wrote by `text_from`, or their URL. Captions
    without any are encoded in training."""
    image_ratio: float | None = None
    """Part of the samples that are stills (buckets of 1 frame), in (0, 1); null: as they come. Weights hold in both."""
    cache: str | None = None
    """Folder for the compiled index, which all ranks see; by default .cache in the (first) folder of shards, or, where
    that is a URL, in `shard_cache`."""
    shard_cache: str = "~/.cache/sora_lite"
    """Folder on a disk of each machine where shards behind URLs are kept; runs may share it."""
    shard_cache_gb: float = 64.0
    """What `shard_cache` may hold, in GiB: at least block_shards shards of each bucket and data set, and twice that to
    fetch ahead. What is in use stays, even above it."""
    io_timeout: float = 60.0
    """Seconds of silence, or of less than 1 MiB, after which a remote read is tried again."""
    io_retries: int = 6
    """How often in a row a read is tried again, with growing pauses, before the run stops."""
    fps: float | None = None
    """Frames per second that the model sees; null keeps each clip's own rate."""
    buckets: list[BucketRule] = MISSING
    """Bucket table. A sample goes to the first row that it is long enough for and that does not enlarge it by more than
    a quarter, nearest in aspect ratio. `sora-data buckets` proposes one."""
    batch_tokens: int = 32_768
    """Tokens (of a VAE: latent cells) in a global micro-step of the first row over all ranks; `batch_by` says what the
    others have in common with it. Rows may name a batch instead."""
    batch_by: BatchBy = BatchBy.tokens
    """What the batches of all rows have alike: tokens, flops (long clips then come in smaller batches), or model_flops
    (without the VAE's encoder, for clips that come as latents)."""
    divisor: int = 8
    """Batches are multiples of this, so that any rank count dividing it can run or resume the run."""
    block_shards: int = 8
    """Samples are shuffled fully within blocks of so many (shuffled) shards."""
    flip: bool = False
    """Mirror half of the clips left to right. Off where direction or writing carries meaning."""
    workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process."""
    worker_timeout: float = 900.0
    """Seconds that a batch is waited for before its decoding process counts as hanging and is started anew."""
    decoder: Decoder = Decoder.pyav
    """Library that decodes the clips."""
    cache_mb: int = 0
    """Memory per worker for decoded clips, in MiB. Worth it where the data set is small and seen many times."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the samples read so far was damaged and had to be replaced."""

    @property
    def folders(self) -> list[str]:
        """Folders of shards, one for each data set."""
        return [self.shards] if self.shards is not None else [one.shards for one in self.sets]

    @property
    def latent_folders(self) -> list[str | None]:
        """Folders of latents, one for each data set; None where there are none."""
        return [self.latents] if self.shards is not None else [one.latents for one in self.sets]

    @property
    def text_folders(self) -> list[str | None]:
        """Folders of text features, one for each data set; None where there are none."""
        return [self.text] if self.shards is not None else [one.text for one in self.sets]

    def key_of_all(self, what: str) -> str:
        """The key under which `latents` or `text` are given, without numbers of rows."""
        return f"data.{what}" if self.shards is not None else f"data.sets.{what}"

    def key_of(self, data_set: int, what: str = "shards") -> str:
        """The key under which the folder of a data set is given, or of what was made of it, such as `latents`."""
        return f"data.{what}" if self.shards is not None else f"data.sets[{data_set}].{what}"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its learning-rate schedule, clipping and the average of the weights."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon; 1e-15 is usual with QK-norm under bf16."""
    weight_decay: float = 0.0
    """Decoupled decay of weight matrices; norms, biases and embeddings are never decayed."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    schedule: Schedule = Schedule.constant
    """What follows the warm-up, until `run.steps`."""
    final_lr: float = 0.0
    """Fraction of `lr` that a cosine schedule ends on."""
    ema_decay: float = 0.9999
    """Largest decay of the averaged weights; at step n it is min(ema_decay, (1+n)/(10+n)). 0 turns it off."""
    ema_on_cpu: bool = False
    """Keep the averaged weights in the host's memory: 4 bytes a parameter less on GPUs, shared by the ranks of ZeRO."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How one step is laid out over processes. One process per GPU (or per CPU rank)."""

    zero_stage: int = 2
    """DeepSpeed ZeRO: 0 replicates all, 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    accumulation: int = 1
    """Forward and backward passes per micro-step and rank; does not change what a step holds, only memory."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    compile: bool = False
    """Run each block through torch.compile: faster, after some seconds at the start and at the first clips of a new
    size. Needs a C++ compiler."""
    precision: Precision = Precision.fp32
    """bf16 needs ZeRO 1 to 3."""
    offload: Offload = Offload.none
    """Where the optimizer's state lies; cpu needs ZeRO 1 to 3, g++ and, at the first start, some minutes to compile."""
    threads: int | None = None
    """CPU threads per rank for torch; null leaves torch's own choice."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """The views of a run. Its record is always `metrics.jsonl` in the run folder."""

    wandb: WandbMode = WandbMode.auto
    """Weights & Biases, written by rank 0."""
    project: str = "sora_lite"
    """W&B project."""
    peak_tflops: float | None = None
    """Peak of one device for MFU, in 1e12 FLOP/s; by default from a table of GPUs, else measured at start."""


@dataclass(kw_only=True, slots=True)
class QueueConfig:
    """What every job asks Slurm for. Null leaves the site's default."""

    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    memory: str | None = None
    """Memory per node, such as 200G."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it."""
    constraint: str | None = None
    """Node features, such as h100."""
    python: str | None = None
    """Python interpreter on the nodes; null uses the one that submits (a shared file system)."""


@dataclass(kw_only=True, slots=True)
class SlurmConfig(QueueConfig):
    """What `sora-lite submit` asks Slurm for."""

    nodes: int = 1
    """Number of nodes."""
    tasks_per_node: int = 1
    """Processes per node: one per GPU."""
    gpus_per_node: int = 0
    """GPUs per node; 0 for CPU nodes."""
    cpus_per_task: int = 1
    """Cores per process; count the decoding workers in."""


# ---------------------------------------------------------------------------------------------------- models


@dataclass(kw_only=True, slots=True)
class VAEConfig:
    """Architecture of the causal spatiotemporal VAE. Part of every VAE checkpoint."""

    latent_channels: int = 16
    """Channels of the latent."""
    patch: int = 2
    """Pixels of a side that are folded into channels before the first convolution (space to depth)."""
    widths: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Channels of each level, from fine to coarse."""
    strides: list[list[int]] = field(default_factory=lambda: [[2, 2], [2, 2]])
    """[time, space] factors (1 or 2) between one level and the next; with two 2s in time, T = 4k+1."""
    encoder_blocks: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Residual blocks of each level in the encoder, fine to coarse."""
    decoder_blocks: list[int] = field(default_factory=lambda: [2, 3, 3])
    """Residual blocks of each level in the decoder, fine to coarse."""


@dataclass(kw_only=True, slots=True)
class VAELossConfig:
    """Weights of the VAE's loss terms."""

    l1: float = 1.0
    """Mean absolute error of the pixels in [-1, 1]."""
    mse: float = 0.0
    """Mean squared error of the pixels in [-1, 1]."""
    kl: float = 1e-6
    """Kullback-Leibler divergence from the standard normal, mean over the latent's elements."""


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """Byte-level text encoder that is trained along with the DiT."""

    width: int = 128
    """Width of the encoder."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    max_bytes: int = 128
    """Longest prompt in UTF-8 bytes; longer ones are cut."""


@dataclass(kw_only=True, slots=True)
class DiTConfig:
    """Architecture of the video Diffusion Transformer. Part of every DiT checkpoint."""

    width: int = 384
    """Token width D."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads; width / heads must be even and at least 6."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, in token widths."""
    patch: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent cells (frames, height, width) in one token."""
    positions: Positions = Positions.rope
    """Rotary, or fixed sines and cosines: 2-D for a still image, 3-D for more frames."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    attention: Attention = Attention.full
    """Over all tokens, or factorised into frames and time."""
    qk_norm: QKNorm = QKNorm.head
    """Norm of queries and keys."""
    modulation: Modulation = Modulation.per_block
    """Where the layer is that turns time, label and pooled text into shifts, scales and gates."""
    gelu: Gelu = Gelu.erf
    """Activation of the MLPs."""
    num_classes: int = 0
    """Number of class labels; 0 for a model without labels."""
    text: TextConfig | None = field(default_factory=TextConfig)
    """Encoder over bytes, trained along; null for a model without it."""
    text_features: int = 0
    """Width of the features of the frozen text encoder `text_from` (T5: 4096), read instead of bytes; 0 for none."""
    text_tokens: int = 512
    """Tokens of its longest text; longer ones are cut."""
    pad_text: bool = False
    """Pad its texts with zeros to `text_tokens`, which are attended to (Wan); otherwise padding is masked."""
    text_attention: TextAttention = TextAttention.cross
    """How blocks read text."""
    cross_norm: bool = True
    """A layer norm before the cross-attention to text."""
    pooled_features: int = 0
    """Width of the pooled features of `pooled_from`, a CLIP (768), that join time and label; 0 for none."""
    learn_variance: bool = False
    """Predict twice the channels: the second half is the variance of the reverse step (with diffusion=ddpm)."""
    frame_conditions: bool = False
    """Read given frames: image to video, extension, interpolation."""
    time_frequencies: int = 128
    """Frequencies over which a time embedding falls to 1/10000: 128; 127 in diffusers' DiTTransformer2DModel."""


@dataclass(kw_only=True, slots=True)
class DiffusionConfig:
    """What the model learns to predict, how training draws times, and how often it drops conditions."""

    objective: DiffusionObjective = DiffusionObjective.rectified_flow
    """What the model predicts."""
    timesteps: TimestepSampling = TimestepSampling.logit_normal
    """Density of the training times; `uniform` for objectives with a noise schedule."""
    noise_schedule: NoiseSchedule = NoiseSchedule.linear
    """Noise schedule of epsilon and velocity; rectified flow has none."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise; with velocity alone."""
    vlb_weight: float = 0.001
    """Weight of the variational bound, summed over its 1,000 terms, for a model that learns its variance."""
    shift: float = 1.0
    """Time shift alpha of t' = alpha t / (1 + (alpha-1) t), for rectified flow; above 1 favours noise (many tokens)."""
    shift_by: ShiftBy = ShiftBy.fixed
    """How the shift depends on the tokens of a clip: fixed; sqrt: shift * sqrt(tokens / shift_tokens); exponential:
    shift * exp(shift_slope * (tokens - shift_tokens))."""
    shift_tokens: int = 256
    """Number of tokens at which the shift is `shift`."""
    shift_slope: float = 0.65 / 3840
    """Growth of the shift's logarithm per token, for `exponential`; by default that of FLUX.1."""
    condition_dropout: float = 0.1
    """Probability that all conditions are dropped together, for classifier-free guidance."""


# ---------------------------------------------------------------------------------------------------- roots


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
    """Class labels, one per prompt, or alone; empty for none."""
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


ROOTS: dict[str, type] = {
    "train": TrainConfig,
    "train_vae": TrainVAEConfig,
    "data_preview": DataPreviewConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "evaluate": EvaluateConfig,
    "inspect": InspectConfig,
    "checkpoint": CheckpointConfig,
    "scaling": ScalingConfig,
    "demo": DemoConfig,
}


def register() -> None:
    """Register every root schema with Hydra as `NAME_schema`; `conf/NAME.yaml` builds on it."""
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=f"{name}_schema", node=root)


@cache
def field_docs(node: type) -> dict[str, str]:
    """The doc string under each field of a dataclass of this file, by field name (its own fields, then its bases')."""
    docs: dict[str, str] = {}
    for cls in node.__mro__[:-1]:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs.setdefault(statement.target.id, inspect.cleandoc(str(following.value.value)))
    return docs


# ---------------------------------------------------------------------------------------------------- rules


def check(config: object) -> None:
    """Check the rules that join several fields.

    Raises:
        UserError: naming the key, what is wrong and what would be right.
    """
    if isinstance(config, BaseTrainConfig):
        _check_run(config)
    if isinstance(config, TrainConfig | InspectConfig):
        _check_dit(config.model)
    if isinstance(config, TrainConfig):
        _check_diffusion(config.diffusion, config.model.learn_variance)
        _check_frames(config)
        _check_lora(config)
        _check_text(config)
    if isinstance(config, DataPreviewConfig):
        _check_preview(config)
    if isinstance(config, GenerateConfig | EvaluateConfig):
        _check_sampling(config.sampling)
    if isinstance(config, EvaluateConfig):
        _require(FrameMode.random not in config.frames, "frames", "random is for training; take before or first_last")
    if isinstance(config, TrainVAEConfig):
        _require(not any(config.data.latent_folders), "data.latents", "a VAE is trained on video; leave them out")
        _require(not any(config.data.text_folders), "data.text", "a VAE reads no text; leave it out")
        _check_vae(config.vae, config.data.buckets)


def _require(holds: bool, key: str, message: str) -> None:
    if not holds:
        raise UserError(f"{key}: {message}")


def _check_run(config: BaseTrainConfig) -> None:
    run, data, optim, parallel = config.run, config.data, config.optim, config.parallel
    _require(bool(run.name) and "/" not in run.name, "run.name", f"{run.name!r} is no folder name; leave out slashes")
    for key in ("steps", "log_every", "save_every", "keep_last"):
        _require(getattr(run, key) >= 1, f"run.{key}", "must be at least 1")
    _require(run.check_every >= 1, "run.check_every", f"must be at least 1, not {run.check_every}")
    _require(run.watchdog_seconds > 0, "run.watchdog_seconds", f"must be above 0, not {run.watchdog_seconds}")
    _require(config.guard.window >= 2, "guard.window", f"must be at least 2, not {config.guard.window}")
    _require(config.guard.sigma > 0, "guard.sigma", f"must be above 0, not {config.guard.sigma}")
    for key in ("max_skips", "max_rollbacks"):
        _require(getattr(config.guard, key) >= 0, f"guard.{key}", "must be at least 0")
    for key in ("validate_every", "validation_samples", "sample_every", "keep_every"):
        _require(getattr(run, key) >= 0, f"run.{key}", "must be at least 0")
    _require(parallel.accumulation >= 1, "parallel.accumulation", f"must be at least 1, not {parallel.accumulation}")
    _require(optim.lr > 0, "optim.lr", f"must be above 0, not {optim.lr}")
    _require(optim.warmup_steps >= 0, "optim.warmup_steps", f"must be at least 0, not {optim.warmup_steps}")
    for key in ("batch_tokens", "divisor", "block_shards"):
        _require(getattr(data, key) >= 1, f"data.{key}", f"must be at least 1, not {getattr(data, key)}")
    _check_sets(data)
    _require(data.fps is None or data.fps > 0, "data.fps", f"must be above 0, or null, not {data.fps}")
    _require(data.workers >= 0, "data.workers", f"must be at least 0, not {data.workers}")
    _require(data.io_retries >= 0, "data.io_retries", f"must be at least 0, not {data.io_retries}")
    for key in ("shard_cache_gb", "io_timeout", "worker_timeout"):
        _require(getattr(data, key) > 0, f"data.{key}", f"must be above 0, not {getattr(data, key)}")
    _require(len(data.buckets) > 0, "data.buckets", "is empty; give at least one row {resolution: [H, W], frames: T}")
    for i, rule in enumerate(data.buckets):
        key = f"data.buckets[{i}]"
        _require(len(rule.resolution) == 2, f"{key}.resolution", f"must be [height, width], not {rule.resolution}")
        _require(min(rule.resolution) >= 1, f"{key}.resolution", f"must be at least 1 pixel, not {rule.resolution}")
        _require(rule.frames >= 1, f"{key}.frames", f"must be at least 1, not {rule.frames}")
        _require(rule.fps is None or rule.fps > 0, f"{key}.fps", f"must be above 0, or null, not {rule.fps}")
        _require(0 < rule.keep <= 1, f"{key}.keep", f"is a fraction in (0, 1], not {rule.keep}")
        if rule.batch is not None:
            _require(rule.batch >= 1, f"{key}.batch", f"must be at least 1, not {rule.batch}")
            _require(
                rule.batch % data.divisor == 0,
                f"{key}.batch",
                f"{rule.batch} is not a multiple of data.divisor={data.divisor}; change one of them",
            )
    _require(len(optim.betas) == 2, "optim.betas", f"needs two numbers, not {optim.betas}")
    _require(0 <= optim.ema_decay < 1, "optim.ema_decay", f"must lie in [0, 1), not {optim.ema_decay}")
    _require(parallel.zero_stage in (0, 1, 2, 3), "parallel.zero_stage", f"is 0, 1, 2 or 3, not {parallel.zero_stage}")
    _require(
        parallel.precision is Precision.fp32 or parallel.zero_stage > 0,
        "parallel.zero_stage",
        "0 has no fp32 master weights under bf16; take parallel.zero_stage=1",
    )
    _require(
        parallel.offload is Offload.none or parallel.zero_stage > 0,
        "parallel.zero_stage",
        "0 shards nothing that parallel.offload=cpu could take; take parallel.zero_stage=1, 2 or 3",
    )


def _check_sets(data: DataConfig) -> None:
    _require(
        (data.shards is None) != (not data.sets),
        "data.sets",
        "is given along with data.shards; leave one of them out"
        if data.sets
        else "is empty; name a folder by data.shards",
    )
    _require(
        data.latents is None or data.shards is not None,
        "data.latents",
        "are those of data.shards; with data.sets give each row its own latents",
    )
    _require(
        data.text is None or data.shards is not None,
        "data.text",
        "is of the captions of data.shards; with data.sets give each row its own text",
    )
    _require(
        not data.flip or not any(data.latent_folders),
        "data.flip",
        "latents are of clips as they are; set data.flip=false, or leave the latents out",
    )
    for i, row in enumerate(data.sets):
        key, weight = f"data.sets[{i}].weight", row.weight
        _require(
            (weight is None) == (data.sets[0].weight is None), key, "give every data set a weight, or none of them"
        )
        _require(
            weight is None or 0 < weight < math.inf, key, f"must be above 0, not {weight}; or leave the data set out"
        )
    ratio = data.image_ratio
    _require(
        ratio is None or 0 < ratio < 1,
        "data.image_ratio",
        f"lies in (0, 1), not {ratio}; for one kind alone take only its rows of data.buckets",
    )
    stills = sum(rule.frames == 1 for rule in data.buckets)
    _require(
        ratio is None or 0 < stills < len(data.buckets),
        "data.image_ratio",
        f"{ratio} needs rows of data.buckets with 1 frame and rows with more; add one, or set data.image_ratio=null",
    )


def _check_dit(model: DiTConfig) -> None:
    _require(model.width % model.heads == 0, "model.heads", f"{model.heads} does not divide model.width={model.width}")
    head = model.width // model.heads
    if model.positions is Positions.rope:
        _require(
            head % 2 == 0 and head >= 6, "model.heads", f"head width {head} must be even and at least 6 for 3-D RoPE"
        )
    else:
        _require(model.width % 4 == 0, "model.width", f"{model.width} must be a multiple of 4 for sines and cosines")
    if model.text is not None:
        text = model.text
        _require(text.width % text.heads == 0, "model.text.heads", f"{text.heads} does not divide {text.width}")
    _require(len(model.patch) == 3, "model.patch", f"must be [frames, height, width], not {model.patch}")
    features = model.text_features > 0 or model.pooled_features > 0
    _require(
        model.num_classes > 0 or model.text is not None or features,
        "model.num_classes",
        "the model has neither labels nor text; set model.num_classes, model.text or model.text_features",
    )
    _require(
        model.text is None or not features,
        "model.text_features",
        "and model.pooled_features are instead of the encoder over bytes; set model.text=null",
    )
    _require(model.text_tokens >= 1, "model.text_tokens", f"must be at least 1, not {model.text_tokens}")
    _require(not model.pad_text or model.text_features > 0, "model.pad_text", "needs model.text_features")
    if model.text_attention is TextAttention.joint:
        reads = model.text is not None or model.text_features > 0
        _require(reads, "model.text_attention", "joint needs text; set model.text or model.text_features")
        full = model.attention is Attention.full
        _require(full, "model.text_attention", "joint needs model.attention=full; factorised blocks take cross")
    even = model.attention is Attention.full or model.depth % 2 == 0
    _require(even, "model.depth", f"{model.depth} must be even: factorised blocks come in pairs of frame and time")
    _require(
        model.time_frequencies in (127, 128), "model.time_frequencies", f"is 127 or 128, not {model.time_frequencies}"
    )


def _check_diffusion(diffusion: DiffusionConfig, learn_variance: bool) -> None:
    name, straight = diffusion.objective.name, diffusion.objective is DiffusionObjective.rectified_flow
    dropout = diffusion.condition_dropout
    _require(0 <= dropout < 1, "diffusion.condition_dropout", f"must lie in [0, 1), not {dropout}")
    for key in ("shift", "shift_tokens"):
        value = getattr(diffusion, key)
        _require(value > 0, f"diffusion.{key}", f"must be above 0, not {value}")
    _require(diffusion.vlb_weight >= 0, "diffusion.vlb_weight", f"must be at least 0, not {diffusion.vlb_weight}")
    _require(
        not learn_variance or not straight,
        "model.learn_variance",
        "needs a noise schedule, and rectified_flow has none; take diffusion=ddpm, or model.learn_variance=false",
    )
    _require(
        not learn_variance or diffusion.vlb_weight > 0,
        "diffusion.vlb_weight",
        "0 would leave the variance of model.learn_variance untrained; take 0.001",
    )
    if straight:
        _require(
            not diffusion.zero_terminal_snr,
            "diffusion.zero_terminal_snr",
            "is for the objective velocity; rectified_flow ends in pure noise as it is",
        )
        return
    _require(
        diffusion.timesteps is TimestepSampling.uniform,
        "diffusion.timesteps",
        f"{diffusion.timesteps.name} is for rectified_flow; {name} draws its 1,000 steps alike: take uniform",
    )
    _require(
        diffusion.shift == 1 and diffusion.shift_by is ShiftBy.fixed,
        "diffusion.shift",
        f"moves the times of rectified_flow; {name} has a noise schedule instead: leave shift=1 and shift_by=fixed",
    )
    _require(
        not diffusion.zero_terminal_snr or diffusion.objective is DiffusionObjective.velocity,
        "diffusion.zero_terminal_snr",
        "needs the objective velocity: from pure noise epsilon says nothing about the data",
    )


def _check_sampling(sampling: SamplingConfig) -> None:
    for key in ("steps", "batch"):
        _require(getattr(sampling, key) >= 1, f"sampling.{key}", f"must be at least 1, not {getattr(sampling, key)}")
    _require(0 <= sampling.eta <= 1, "sampling.eta", f"must lie in [0, 1], not {sampling.eta}")
    _require(
        sampling.eta == 0 or sampling.sampler is Sampler.ddim,
        "sampling.eta",
        f"is for the sampler ddim; {sampling.sampler.name} adds "
        + ("the noise of its own variance" if sampling.sampler is Sampler.ddpm else "no noise"),
    )
    interval = sampling.guidance_interval
    _require(
        len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1,
        "sampling.guidance_interval",
        f"must be [least, greatest] time in [0, 1], not {interval}",
    )
    rescale, channels, shift = sampling.guidance_rescale, sampling.guidance_channels, sampling.shift
    _require(0 <= rescale <= 1, "sampling.guidance_rescale", f"must lie in [0, 1], not {rescale}")
    _require(
        channels is None or channels >= 1, "sampling.guidance_channels", f"must be at least 1, or null, not {channels}"
    )
    _require(shift is None or shift > 0, "sampling.shift", f"must be above 0, or null, not {shift}")


def _check_frames(config: TrainConfig) -> None:
    given, reads = any(rule.mode is not FrameMode.none for rule in config.frames), config.model.frame_conditions
    _require(
        reads or not given, "model.frame_conditions", "is false, but frames has rows that give frames; set it to true"
    )
    _require(
        not given or not any(config.data.latent_folders),
        "frames",
        "given frames are encoded alone, out of video; leave out the latents, or the frames",
    )
    _require(given or not reads, "frames", "has no row that gives frames; add one, or model.frame_conditions=false")
    for i, rule in enumerate(config.frames):
        _require(0 < rule.weight < math.inf, f"frames[{i}].weight", f"must be above 0, not {rule.weight}")


def _check_lora(config: TrainConfig) -> None:
    lora, rank = config.lora, config.lora.rank
    _require(rank >= 0, "lora.rank", f"must be at least 1, or 0 to train all weights, not {rank}")
    for key in ("alpha", "targets"):
        changed = getattr(lora, key) != getattr(LoraConfig(), key)
        _require(rank > 0 or not changed, f"lora.{key}", "is for adapters; set lora.rank, such as lora.rank=16")
    _require(lora.alpha is None or 0 < lora.alpha < math.inf, "lora.alpha", f"must be above 0, not {lora.alpha}")
    _require(
        rank == 0 or config.init_from is not None,
        "init_from",
        "is missing; adapters (lora.rank) are of a trained model: name an export, a run that holds one, or an import",
    )
    _require(len(lora.targets) > 0, "lora.targets", "is empty; name layers, such as [blocks.*]")


def _check_preview(config: DataPreviewConfig) -> None:
    for key, least in (("start", 0), ("clips", 1), ("steps", 1), ("world_size", 1), ("accumulation", 1)):
        _require(getattr(config.preview, key) >= least, f"preview.{key}", f"must be at least {least}")
    data = config.data
    for given, made, folders, source in (
        (config.vae_from, "latents", data.latent_folders, "vae_from"),
        (config.text_from, "text", data.text_folders, "text_from"),
    ):
        needs = f"names what {data.key_of_all(made)} must have been made with; give it as to `sora-lite train`"
        _require(bool(given) or not any(folders), source, needs)


def _check_text(config: TrainConfig) -> None:
    for key, name in (("text_from", "text_features"), ("pooled_from", "pooled_features")):
        folder, width = getattr(config, key), getattr(config.model, name)
        what = "T5, UMT5 or CLIP" if key == "text_from" else "CLIP"
        # data-preview needs one only where features were made beforehand (`_check_preview`).
        _require(
            folder is not None or width == 0 or isinstance(config, DataPreviewConfig),
            key,
            f"is null, but the model reads model.{name}={width}; name the folder of a {what}",
        )
        _require(
            folder is None or width > 0,
            key,
            f"model.{name} is 0, so the model reads nothing of it; leave it out, or set model.{name} to the encoder's "
            "width and model.text=null",
        )
    _require(
        config.model.text_features > 0 or not any(config.data.text_folders),
        config.data.key_of_all("text"),
        "model.text_features is 0, so the model reads no features of captions; leave them out",
    )


def _check_vae(vae: VAEConfig, buckets: list[BucketRule]) -> None:
    _require(
        len(vae.strides) == len(vae.widths) - 1 and all(len(s) == 2 and set(s) <= {1, 2} for s in vae.strides),
        "vae.strides",
        f"must be {len(vae.widths) - 1} pairs [time, space] of 1 or 2, one between each two of vae.widths",
    )
    for key in ("encoder_blocks", "decoder_blocks"):
        _require(len(getattr(vae, key)) == len(vae.widths), f"vae.{key}", "needs one number for each of vae.widths")
    time = math.prod(stride[0] for stride in vae.strides)
    space = vae.patch * math.prod(stride[1] for stride in vae.strides)
    for i, rule in enumerate(buckets):
        _require(
            rule.frames % time == 1 % time,
            f"data.buckets[{i}].frames",
            f"{rule.frames} is not of the form {time}k+1 that the VAE compresses; take "
            f"{(rule.frames - 1) // time * time + 1}",
        )
        _require(
            all(side % space == 0 for side in rule.resolution),
            f"data.buckets[{i}].resolution",
            f"{rule.resolution} must be multiples of {space}, the VAE's spatial factor",
        )
