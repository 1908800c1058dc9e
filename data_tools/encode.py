"""`sora-data encode`: what a frozen model makes of every clip, once, in shards of its own that join the clips by key.

A unit of work is a shard of clips; what is made of it becomes a shard of the same name, with the split in it where
others wrote the clips, who may have had none. Its row in the table under
`OUT/.work` says that it is there whole, and the manifest, which comes last, makes all of them a data set. A shard is a
function of the clips and the settings, so it is the same bytes whoever makes it, and however often that was stopped.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from data_tools.config import Executor, WorkConfig, digest
from data_tools.job import locked
from data_tools.locations import printable
from data_tools.pool import Rows, Task, beat
from data_tools.state import Table, Unit, complete
from sora_lite.config import BucketRule
from sora_lite.data.buckets import Row, choose
from sora_lite.data.files import flush_folder
from sora_lite.data.index import Index, load_manifest
from sora_lite.data.joined import Latent, latent_sample, text_sample
from sora_lite.data.manifest import MANIFEST, Manifest, ShardEntry
from sora_lite.data.shards import NO_LABEL, DamagedSample, Sample, ShardWriter
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and other verbs do without it
    import torch

    from sora_lite.data.batch import Clip
    from sora_lite.data.loader import ClipReader
    from sora_lite.models.pretrained import FrozenTextEncoder
    from sora_lite.models.vae import CausalVAE

VERSION = 1
"""Raised when the same settings give other shards."""

SCHEMA = pa.schema(
    [
        ("entry", pa.struct([(name, pa.string()) for name in ("path", "sha256", "split", "index", "index_sha256")])),
        ("bytes", pa.int64()),
        ("samples", pa.int64()),
        ("left_out", pa.int64()),
        ("damaged", pa.list_(pa.string())),
    ]
)
"""What the table says of a shard that was made: its entry in the manifest, and what is not in it."""


@dataclass(kw_only=True, slots=True)
class EncodeConfig(WorkConfig):
    """`sora-data encode`."""

    vae_from: str | None = None
    """A trained VAE: an export, or a run folder that holds one. OUT becomes the latents of the clips."""
    text_from: str | None = None
    """Instead: a T5, UMT5 or CLIP folder that transformers has saved. OUT becomes the features of the captions."""
    max_tokens: int = 512
    """Tokens of a caption, at most, with `text_from`."""
    buckets: list[BucketRule] = field(default_factory=list)
    """Bucket table, as `data.buckets` in training: a clip is encoded at the size of its row. `batch` plays no part."""
    fps: float | None = None
    """Frames per second, as `data.fps` in training, for rows that name none; null keeps each clip's own rate."""
    batch: int | None = None
    """Clips that are encoded at a time; null takes as many as some GiB of activations allow."""
    device: str | None = None
    """Such as cpu or cuda; null takes a GPU if there is one."""
    stall_seconds: float = 600.0
    """A worker that shows no progress for so long is killed; a second time, its shard is given up."""

    def __post_init__(self) -> None:
        self.check_work()
        rules: list[tuple[bool, str, str]] = [
            (
                (self.vae_from is None) != (self.text_from is None),
                "vae_from",
                "name the VAE that encodes the clips or, by text_from, what encodes their captions, into a folder each",
            ),
            (
                self.vae_from is None or len(self.buckets) > 0,
                "buckets",
                "give at least one row '[{resolution: [H, W], frames: T}]'",
            ),
            (self.max_tokens >= 1, "max_tokens", f"must be at least 1, not {self.max_tokens}"),
            (self.fps is None or self.fps > 0, "fps", f"must be above 0, or null, not {self.fps}"),
            (self.batch is None or self.batch >= 1, "batch", f"must be at least 1, or null, not {self.batch}"),
        ]
        for i, row in enumerate(self.buckets):
            wrong = len(row.resolution) != 2 or min(row.resolution) < 1 or row.frames < 1 or not 0 < row.keep <= 1
            rules.append((row.fps is None or row.fps > 0, f"buckets[{i}].fps", f"must be above 0, not {row.fps}"))
            rules.append((not wrong, f"buckets[{i}]", "needs resolution: [H, W], frames: T and a keep in (0, 1]"))
        for holds, key, rule in rules:
            if not holds:
                raise UserError(f"{key}: {rule}.")

    @property
    def content(self) -> str:
        """What OUT becomes: `latents` or `text`."""
        return "text" if self.vae_from is None else "latents"

    @property
    def costly_units(self) -> bool:
        return True

    def rows(self) -> list[Row]:
        """The bucket table."""
        return [
            Row(
                shape=(rule.frames, rule.resolution[0], rule.resolution[1]),
                keep=rule.keep,
                batch=1,
                fps=rule.fps or self.fps,
            )
            for rule in self.buckets
        ]


# ------------------------------------------------------------------------------------------------------- the verb


def encode(folder: Path, out: Path, config: EncodeConfig) -> None:
    """Encode all clips of a data set into `out`; called again it goes on, and takes later shards in.

    Raises UserError if `out` holds something else, or if a setting or a shard is wrong.
    """
    clips = load_manifest(folder)
    if clips.content != "clips":
        raise UserError(f"{folder}: holds {clips.content}, which cannot be encoded; name a folder of clips.")
    encoding = text_encoding(config) if config.content == "text" else latent_encoding(config)
    with locked(out), locked(out / ".work"):
        if (out / MANIFEST).exists():
            _refuse_another(out, clips.config_hash, encoding)
        if config.executor is Executor.local:
            for leftover in (out / ".work").glob("attempt-*"):
                rmtree(leftover)
        name = digest([VERSION, encoding, config.batch, clips.config_hash])[:16]
        table = Table(out / ".work" / config.content / name, SCHEMA)
        units = [_unit(folder, out, clips, entry, config) for entry in clips.shards]
        if _device(config.device).type != "cpu":
            # The model on the device once; and a driver takes address space by hundreds of GiB.
            config = replace(config, workers=config.workers or 1, memory_mb=2**30)
        complete(table, config.content, work, units, config, "shard")
        rows = table.read()
        made = [rows[key] for unit in units for key in unit.keys]
        _refuse_failures(table, made)
        manifest = Manifest(config_hash=clips.config_hash, content=config.content, encoding=encoding)
        manifest.root = None if clips.root is None else "."
        manifest.counts = _count(made, "clips_in_no_bucket" if config.content == "latents" else "clips_without_caption")
        manifest.shards = [ShardEntry(bytes=row["bytes"], samples=row["samples"], **row["entry"]) for row in made]
        if manifest.counts["clips_encoded"] == 0:
            raise UserError(
                f"{folder}: nothing to encode: {_told(manifest)}; ask for other buckets, or of other clips."
            )
        manifest.save(out)
    for row in made:
        for reason in row["damaged"]:
            print(printable(f"left out, as damaged: {row['entry']['path']}: {reason}"))
    print(f"{out}: {_told(manifest)}")


def _told(manifest: Manifest) -> str:
    return ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in manifest.counts.items())


def latent_encoding(config: EncodeConfig) -> dict[str, Any]:
    """What latents are made with, for the manifest. Raises UserError if a clip size does not fit the VAE."""
    from sora_lite.generation.export import load_vae

    assert config.vae_from is not None
    vae, contract = load_vae(Path(config.vae_from))
    for i, row in enumerate(config.rows()):
        try:
            vae.latent_shape(*row.shape)
        except ValueError as error:
            raise UserError(f"buckets[{i}]: {error}; change its resolution or frames.") from None
    table = [[*row.shape, row.keep, row.fps] for row in config.rows()]
    return {"fingerprint": contract.vae_fingerprint, "vae": contract.run, "buckets": table}


def text_encoding(config: EncodeConfig) -> dict[str, Any]:
    """What text features are made with, for the manifest."""
    assert config.text_from is not None
    return _text_encoder(config.text_from, config.max_tokens, "cpu").identity


def _refuse_another(out: Path, config_hash: str, encoding: dict[str, Any]) -> None:
    manifest = Manifest.load(out)
    if (manifest.config_hash, manifest.encoding) != (config_hash, encoding):
        differing = [name for name in encoding if manifest.encoding.get(name) != encoding[name]] or ["clips"]
        raise UserError(
            f"{out}: holds what was made with another {differing[0]}; give the same, or name another folder."
        )


def _refuse_failures(table: Table, rows: Rows) -> None:
    """Raise UserError for a shard that could not be encoded, and let it be tried again."""
    if failed := [row for row in rows if row["reason"]]:
        table.forget({row["key"] for row in failed})
        shard, reason = failed[0]["key"].rpartition("-")[0], failed[0]["reason"]
        raise UserError(
            f"{shard}: cannot be encoded ({reason}), and {len(failed) - 1} other shards; mend this and try again."
        )


def _unit(folder: Path, out: Path, clips: Manifest, entry: ShardEntry, config: EncodeConfig) -> Unit:
    # A shard of others is in both splits, and may lie in a folder of its own.
    name = entry.path if clips.root is None else f"{entry.path.removesuffix('.tar')}.{entry.split}.tar"
    key = f"{name}-{entry.index_sha256[:16]}"  # the index says which keys the samples have, and their checksums
    task = {
        "key": key,
        "folder": str(folder.absolute()),
        "out": str(out.absolute()),
        "entry": asdict(entry),
        "name": name,
        "of_others": clips.root is not None,
        "content": config.content,
        "from": str(Path(config.vae_from or config.text_from or "").absolute()),
        "max_tokens": config.max_tokens,
        "buckets": [[*row.shape, row.keep, row.fps] for row in config.rows()],
        "batch": config.batch,
        "device": config.device,
    }
    return Unit(keys=[key], task=task)


def _count(rows: Rows, left_out: str) -> dict[str, int]:
    counts = Counter({"clips_encoded": 0, left_out: 0, "clips_damaged": 0})
    for row in rows:
        counts["clips_encoded"] += row["samples"]
        counts[left_out] += row["left_out"]
        counts["clips_damaged"] += len(row["damaged"])
    return dict(counts)


# -------------------------------------------------------------------------------------------------- one shard


def work(task: Task) -> Rows:
    """Encode one shard of clips -> its row, once the shard lies in its place."""
    from sora_lite.data.loader import ClipReader

    folder, out, entry = Path(task["folder"]), Path(task["out"]), ShardEntry(**task["entry"])
    clips, name = load_manifest(folder), PurePosixPath(task["name"])
    index = Index.of([folder], [replace(clips, shards=[entry])], entry.split)
    reader = ClipReader(index, cache_bytes=0)
    damaged: list[str] = []
    encoded = _latents(reader, task, damaged) if task["content"] == "latents" else _texts(reader, task, damaged)
    place = out / name.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="attempt-", dir=out / ".work") as attempt:
        with ShardWriter(Path(attempt) / name.name, entry.split) as writer:
            for sample in encoded:
                writer.add(sample)
        for path in (writer.index_path, writer.path):
            os.replace(path, place / path.name)
        flush_folder(place)
    made = asdict(writer.entry) | {"path": str(name), "index": str(name.parent / writer.index_path.name)}
    counts = {"bytes": made.pop("bytes"), "samples": made.pop("samples")}
    counts["left_out"] = len(index) - counts["samples"] - len(damaged)
    return [{"key": task["key"], "entry": made, **counts, "damaged": damaged}]


def _latents(reader: "ClipReader", task: Task, damaged: list[str]) -> Iterator[Sample]:
    """Latents of the clips that can be read, batch by batch; the reasons of the others go into `damaged`."""
    import torch

    from sora_lite.generation.pipeline import clips_at_once, to_float

    index, device = reader.index, _device(task["device"])
    vae = _vae(task["from"], str(device))
    rows = [Row(shape=(t, h, w), keep=keep, batch=1, fps=fps) for t, h, w, keep, fps in task["buckets"]]
    sizes = {"frames": index.frames, "height": index.height, "width": index.width, "own_fps": index.fps}
    chosen = choose(rows, keys=index.keys, **sizes)
    for number, row in enumerate(rows):
        samples = np.flatnonzero(chosen == number).tolist()
        at_once = task["batch"] or clips_at_once(*row.shape)
        for batch in _read_ahead(reader, samples, row, at_once, device):
            good = []
            for sample, future in batch:
                beat()
                try:
                    good.append((sample, future.result(), _meta(reader, sample, task)))
                except (DamagedSample, BadVideo) as error:
                    damaged.append(f"{index.key(sample)}: {error}")
            if not good:
                continue
            video = torch.from_numpy(np.stack([clip.pixels for _, clip, _ in good if clip.pixels is not None]))
            with torch.no_grad(), _one_thread(device):
                posterior = vae.encode(to_float(video.to(device)))
            mean, logvar = posterior.mean.float().cpu().numpy(), posterior.logvar.float().cpu().numpy()
            beat()
            for i, (sample, _, meta) in enumerate(good):
                rate = row.fps or float(index.fps[sample])
                latent = Latent(mean=mean[i], logvar=logvar[i])
                made_of = int(index.crc32c[sample])
                yield latent_sample(index.key(sample), latent, meta, shape=row.shape, fps=rate, clip_crc32c=made_of)


def _texts(reader: "ClipReader", task: Task, damaged: list[str]) -> Iterator[Sample]:
    """Features of all captions of the clips that have some; the reasons of those that cannot be read: `damaged`."""
    index, device = reader.index, _device(task["device"])
    encoder = _text_encoder(task["from"], task["max_tokens"], str(device))
    for sample in range(len(index)):
        beat()
        try:
            meta = _meta(reader, sample, task)
        except DamagedSample as error:
            damaged.append(f"{index.key(sample)}: {error}")
            continue
        if meta["captions"]:
            with _one_thread(device):
                text = encoder(meta["captions"])
            tensors = {"features": text.features, "mask": text.mask, "pooled": text.pooled}
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items() if tensor is not None}
            yield text_sample(index.key(sample), arrays, meta, clip_crc32c=int(index.crc32c[sample]))


def _meta(reader: "ClipReader", sample: int, task: Task) -> dict[str, Any]:
    """A clip's JSON, with its captions wherever they stand. Of a clip of others, whose JSON may hold anything under any
    name, just what the index knows."""
    captions, index = reader.captions(sample), reader.index
    if not task["of_others"]:
        return reader.meta(sample) | {"captions": captions}
    label = {} if index.label[sample] == NO_LABEL else {"label": int(index.label[sample])}
    sizes = {name: getattr(index, name)[sample].item() for name in ("frames", "height", "width", "fps")}
    source = {"sha256": index.source[sample].decode()}
    return {"key": index.key(sample), "captions": captions, "source": source, **sizes, **label}


def _read_ahead(
    reader: "ClipReader", samples: list[int], row: Row, at_once: int, device: "torch.device"
) -> "Iterator[list[tuple[int, Future[Clip]]]]":
    """Batches of clips being read; beside a GPU, all cores read the batch after the one that is in use."""
    parts = [samples[start : start + at_once] for start in range(0, len(samples), at_once)]
    with ThreadPoolExecutor(1 if device.type == "cpu" else os.cpu_count()) as pool:
        batches = []
        for part in parts:
            batches.append([(sample, pool.submit(reader.read, sample, row.shape, row.fps)) for sample in part])
            if len(batches) > 1:
                yield batches.pop(0)
        yield from batches


@contextmanager
def _one_thread(device: "torch.device") -> Iterator[None]:
    """On a CPU one thread computes: workers share the cores, and sums do not depend on how many there are."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _device(name: str | None) -> "torch.device":
    import torch

    from sora_lite.parallel.env import local_device

    try:
        return torch.device(name) if name else local_device()
    except RuntimeError as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}; take cpu or cuda.") from None


@lru_cache(maxsize=1)
def _vae(folder: str, device: str) -> "CausalVAE":
    from sora_lite.generation.export import load_vae

    vae, _ = load_vae(Path(folder))
    return vae.to(device)


@lru_cache(maxsize=1)
def _text_encoder(folder: str, max_tokens: int, device: str) -> "FrozenTextEncoder":
    from sora_lite.models.pretrained import FrozenTextEncoder

    return FrozenTextEncoder(Path(folder), max_tokens, device)
