"""How long a run goes on, when its side jobs happen, which updates it leaves out, and its views."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class OnFailedSave(Enum):
    """What happens where a checkpoint cannot be written. `warn` trains on with the one before it."""

    stop = "stop"
    warn = "warn"


class OnDamage(Enum):
    """What happens where the newest checkpoint is damaged. `fall_back` goes on from the newest good one."""

    fall_back = "fall_back"
    stop = "stop"


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
    watchdog_seconds: float = 300.0
    """Longest time without progress (a step begun, a forward pass, a checkpoint waited for), after which the stacks of
    all ranks are written and the run ends. NCCL gives up after 600 s, and says less."""
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
class LoggingConfig:
    """The views of a run. Its record is always `metrics.jsonl` in the run folder."""

    wandb: WandbMode = WandbMode.auto
    """Weights & Biases, written by rank 0."""
    project: str = "sora_lite"
    """W&B project."""
    peak_tflops: float | None = None
    """Peak of one device for MFU, in 1e12 FLOP/s; by default from a table of GPUs, else measured at start."""
