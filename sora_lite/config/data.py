"""Which shards are read, and how their samples become batches."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class BatchBy(Enum):
    """What the micro-steps of all buckets have alike, as near as whole batches come: tokens; FLOPs of the configured
    models (forward and backward, and the frozen VAE's encoder), so that steps take about the same time; or, for clips
    that come as latents, FLOPs of the trained model alone. It is said, not guessed from the data: batches are part of
    the order, which latents do not change."""

    tokens = "tokens"
    flops = "flops"
    model_flops = "model_flops"


class Decoder(Enum):
    """Library that decodes clips for training. `decord` (a package of its own) is used for mp4 clips that `sora-data`
    wrote, after a comparison with PyAV on the first of them. It takes as long for whole clips, a tenth more where
    a rate passes frames over, and its colours are coarser: see `python -m benchmarks loading`."""

    pyav = "pyav"
    decord = "decord"


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
    io_timeout: float = 20.0
    """Seconds of silence, or of less than 1 MiB, after which a remote read is tried again."""
    io_retries: int = 6
    """How often in a row a read is tried again, with growing pauses, before the run stops."""
    fps: float | None = None
    """Frames per second that the model sees; null keeps each clip's own rate."""
    buckets: list[BucketRule] = MISSING
    """Bucket table. Of the rows that a sample is long enough for it goes to one that enlarges it by at most a quarter,
    if there is one, and of these to the nearest in aspect ratio. `sora-data buckets` proposes a table."""
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
    worker_timeout: float = 240.0
    """Seconds that a batch is waited for before its decoding process counts as hanging and is started anew: longer than
    all tries of a remote read, and below `run.watchdog_seconds`."""
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
