"""What was made of clips beforehand: latents and text features in shards of their own, joined to an index by key.

Shapes: C latent channels, t h w latent frames and cells; n captions of a clip, M text tokens, D features of a token,
P pooled features.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sora_lite.data.compiled import CHUNK, FORMAT, ColumnWriter, build, map_column, open_index
from sora_lite.data.index import Index, OpenShards, Origin
from sora_lite.data.manifest import ENCODED
from sora_lite.data.remote import Location, ReadCounts
from sora_lite.data.shards import DamagedSample, Sample, captions_of, clip_digits
from sora_lite.errors import UserError

WORDS = tuple(f"{what}_{part}" for what in ("text", "json") for part in ("offset", "size", "crc32c"))
"""Columns of an index that say where a sample's captions lie."""
_LAYOUTS = 1000
"""Most layouts that are remembered."""


@dataclass(kw_only=True, slots=True)
class Latent:
    """Posterior of a clip under a VAE, unnormalised: of its centre crop, from its first frame on, not mirrored.

    mean, logvar: float32 C t h w.
    """

    mean: np.ndarray
    logvar: np.ndarray

    def __post_init__(self) -> None:
        if self.mean.ndim != 4 or self.mean.shape != self.logvar.shape:
            raise ValueError(f"a latent of shapes {self.mean.shape} and {self.logvar.shape}")
        if self.mean.dtype != np.float32 or self.logvar.dtype != np.float32:
            raise ValueError(f"a latent of types {self.mean.dtype} and {self.logvar.dtype}, not float32")


@dataclass(kw_only=True, slots=True, frozen=True)
class CaptionFeatures:
    """What a frozen text encoder made of n captions.

    features: float32 n M D, zero at padding. mask: bool n M, True where a token is real; each caption has one. pooled:
    float32 n P, of encoders that pool.
    """

    features: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray | None = None

    def __post_init__(self) -> None:
        shapes = self.features.shape, self.mask.shape
        if self.features.ndim != 3 or shapes[1] != shapes[0][:2] or not len(self.mask) or not self.mask.any(1).all():
            raise ValueError(f"text features of shape {shapes[0]} with a mask of shape {shapes[1]}, or without a token")
        if self.pooled is not None and (self.pooled.ndim != 2 or len(self.pooled) != len(self.mask)):
            raise ValueError(f"text features of shape {shapes[0]} with pooled ones of shape {self.pooled.shape}")
        if self.mask.dtype != bool or any(
            one.dtype != np.float32 for one in (self.features, self.pooled) if one is not None
        ):
            raise ValueError("text features that are not float32, or a mask that is not bool")

    def __len__(self) -> int:
        return len(self.mask)

    def caption(self, number: int) -> "CaptionFeatures":
        """Those of one caption alone."""
        one = slice(number, number + 1)
        pooled = None if self.pooled is None else self.pooled[one]
        return CaptionFeatures(features=self.features[one], mask=self.mask[one], pooled=pooled)


class Members:
    """Reads the members of the samples of an index by offset. Forked processes may share it."""

    def __init__(self, index: Index) -> None:
        self.index, self.shards = index, OpenShards(index)
        self._layouts: dict[tuple[bytes, int], Layout] = {}
        """Of the safetensors seen, by header and size: encoded samples of one size have equal ones."""

    def media(self, sample: int) -> bytes:
        """The clip, still, latent or text. Raises DamagedSample unless it is as the index says."""
        index = self.index
        place = int(index.media_offset[sample]), int(index.media_size[sample]), int(index.crc32c[sample])
        return self.shards[int(index.shard[sample])].read(*place)

    def captions(self, sample: int) -> list[str]:
        """The sample's captions, as `shards.captions_of`."""
        row = {name: int(getattr(self.index, name)[sample]) for name in WORDS}
        return captions_of(self.shards[int(self.index.shard[sample])], row)

    def meta(self, sample: int) -> dict[str, Any]:
        """The sample's JSON, {} for none. Raises DamagedSample unless it is as the index says."""
        index = self.index
        if not index.json_size[sample]:
            return {}
        place = int(index.json_offset[sample]), int(index.json_size[sample]), int(index.json_crc32c[sample])
        return self.shards[int(index.shard[sample])].read_json(*place)

    def tensors(self, sample: int) -> dict[str, np.ndarray]:
        """The tensors of a latent or text, not to be written to. Raises DamagedSample unless it is safetensors."""
        content = self.media(sample)
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        try:
            if (header, len(content)) not in self._layouts:
                if len(self._layouts) == _LAYOUTS:
                    self._layouts.clear()
                self._layouts[header, len(content)] = _layout(header, content)
        except (SafetensorError, KeyError) as error:
            raise DamagedSample(f"{self.index.key(sample)}: is no safetensors ({error})") from None
        return {
            name: np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
            for name, (dtype, shape, start) in self._layouts[header, len(content)].items()
        }


Layout = dict[str, tuple[np.dtype, tuple[int, ...], int]]
"""The type, shape and first byte of each tensor of a safetensors file, by name."""


def _layout(header: bytes, content: bytes) -> Layout:
    """Layout of a safetensors file. Raises SafetensorError or KeyError as the library, which judges it, does."""
    tensors, described = load(content), json.loads(header[8:])
    return {
        name: (tensor.dtype, tensor.shape, len(header) + described[name]["data_offsets"][0])
        for name, tensor in tensors.items()
    }


@dataclass(kw_only=True, slots=True)
class Joined:
    """Encoded samples that belong to an index of N clips.

    index: of the encoded samples. rows: int64 N, which of them was made of each clip; -1 for none.
    """

    index: Index
    rows: np.ndarray

    def count(self, clips: np.ndarray, shape: tuple[int, int, int], fps: np.ndarray) -> int:
        """How many of these clips have an encoded sample of (T, H, W) and their fps."""
        found = 0
        for start in range(0, len(clips), CHUNK):
            part = slice(start, start + CHUNK)
            rows = self.rows[clips[part]]
            rates, rows = fps[part][rows >= 0], rows[rows >= 0]
            index = self.index
            sizes = np.stack([index.frames[rows], index.height[rows], index.width[rows]], axis=1)
            at_rate = (index.fps[rows] == rates) | (shape[0] == 1)
            found += int(((sizes == shape).all(axis=1) & at_rate).sum())
        return found

    def fingerprint(self) -> str:
        """SHA-256 over what is joined: equal if the encoded samples are."""
        return self.index.fingerprint()


class LatentReader:
    """Latents of the clips of an index."""

    def __init__(self, joined: Joined, counts: ReadCounts) -> None:
        self.index, self._joined, self._members = joined.index, joined, Members(joined.index)
        self._members.shards.counts = counts

    def find(self, clip: int, shape: tuple[int, int, int], fps: float) -> int | None:
        """Number of the latent of a clip at (T, H, W) and a rate, if there is one."""
        row, index = int(self._joined.rows[clip]), self.index
        if row < 0 or (int(index.frames[row]), int(index.height[row]), int(index.width[row])) != shape:
            return None
        return row if shape[0] == 1 or float(index.fps[row]) == fps else None

    def read(self, row: int) -> tuple[Latent, list[str]]:
        """A latent, and the captions of its clip. Raises DamagedSample."""
        tensors = self._members.tensors(row)
        try:
            return Latent(**tensors), self._members.captions(row)
        except (ValueError, TypeError) as error:
            raise DamagedSample(f"{self.index.key(row)}: {error}") from None


class CaptionReader:
    """Features of the captions of the clips of an index."""

    def __init__(self, joined: Joined, counts: ReadCounts) -> None:
        self.index, self._joined, self._members = joined.index, joined, Members(joined.index)
        self._members.shards.counts = counts

    def find(self, clip: int) -> int | None:
        """Number of the features of a clip's captions, if there are some."""
        row = int(self._joined.rows[clip])
        return None if row < 0 else row

    def read(self, row: int, captions: Sequence[str]) -> CaptionFeatures:
        """Features of a clip's captions, in their order.

        Raises:
            DamagedSample: they are not what the index says, or no features.
            UserError: they are of other captions.
        """
        key = self.index.key(row)
        if self._members.captions(row) != list(captions):
            raise UserError(
                f"{self.index.shard_paths[int(self.index.shard[row])]}: {key} holds features of other captions than "
                "the clip has now; encode them anew with `sora-data encode`"
            )
        try:
            made = CaptionFeatures(**self._members.tensors(row))
        except (ValueError, TypeError) as error:
            raise DamagedSample(f"{key}: {error}") from None
        if len(made) != len(captions):
            raise DamagedSample(f"{key}: has features of {len(made)} captions, not {len(captions)}")
        return made


def stack_features(rows: Sequence[CaptionFeatures | None]) -> dict[str, np.ndarray]:
    """`text`, `text_mask` and, of encoders that pool, `pooled` of B captions, zeros where one has none; {} for none."""
    made = [row for row in rows if row is not None]
    if not made:
        return {}
    tokens = max(row.mask.shape[1] for row in made)
    text = np.zeros((len(rows), tokens, made[0].features.shape[2]), np.float32)
    mask = np.zeros((len(rows), tokens), bool)
    stacked = {"text": text, "text_mask": mask}
    if made[0].pooled is not None:
        stacked["pooled"] = np.zeros((len(rows), made[0].pooled.shape[1]), np.float32)
    for number, row in enumerate(rows):
        if row is not None:
            text[number, : row.mask.shape[1]], mask[number, : row.mask.shape[1]] = row.features[0], row.mask[0]
            if row.pooled is not None:
                stacked["pooled"][number] = row.pooled[0]
    return stacked


def latent_sample(
    key: str, latent: Latent, meta: Mapping[str, Any], *, shape: tuple[int, int, int], fps: float, clip_crc32c: int
) -> Sample:
    """A latent as a sample of a shard. meta: the clip's own; shape, fps: of the clip as the VAE saw it."""
    frames, height, width = shape
    return Sample(
        key=key,
        ext=ENCODED["latents"],
        media=_save({"mean": latent.mean, "logvar": latent.logvar}),
        meta={**meta, "frames": frames, "height": height, "width": width, "fps": fps},
        made_of=clip_digits(clip_crc32c),
    )


def text_sample(key: str, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, clip_crc32c: int) -> Sample:
    """Features of a clip's n captions, in their order, as a sample of a shard. tensors: fields of `CaptionFeatures`."""
    made_of = clip_digits(clip_crc32c)
    return Sample(key=key, ext=ENCODED["text"], media=_save(tensors), meta={**meta}, made_of=made_of)


# ---------------------------------------------------------------------------------------------------- joining


def open_join(
    index: Index,
    folders: Sequence[Location | None],
    split: str,
    *,
    content: str,
    expected: Mapping[str, Any],
    cache: Path | None = None,
    check: bool = True,
) -> Joined | None:
    """Join what was made of an index's clips; compiled once, as the index itself is.

    Args:
        index: of the clips; remote shards are kept in its shard cache.
        folders: one for each data set of the index, None where nothing was made of it.
        split, cache, check: as for `compiled.open_index`.
        content: `latents` or `text`.
        expected: what `Manifest.encoding` must say, such as the fingerprint of the VAE.

    Returns:
        None if there is no folder.

    Raises:
        UserError: what is in a folder was made with something else, or of other clips.
    """
    given = [(number, folder) for number, folder in enumerate(folders) if folder is not None]
    if not given:
        return None
    encoded = open_index(
        [folder for _, folder in given],
        split,
        cache=cache,
        shard_cache=index.shard_cache,
        check=check,
        content=content,
    )
    for (number, folder), origin in zip(given, encoded.origins, strict=True):
        _require_origin(folder, origin, index.origins[number].config_hash, number, expected)
    sets = [number for number, _ in given]
    if index.folder is None:
        return Joined(index=encoded, rows=np.concatenate([np.empty(0, np.int64), *_match(index, encoded, sets)]))
    assert encoded.folder is not None
    name = hashlib.sha256(json.dumps([FORMAT, encoded.folder.name, sets]).encode()).hexdigest()[:16]
    folder = index.folder / f"join-{name}"
    if not folder.is_dir():
        build(folder, lambda partial: _write_rows(partial, index, encoded, sets))
    return Joined(index=encoded, rows=map_column(folder / "rows.npy"))


def _require_origin(folder: Location, origin: Origin, clips: str, data_set: int, expected: Mapping[str, Any]) -> None:
    """Raise UserError unless what is in a folder was made of the clips of these settings, with what is expected."""
    for name, value in expected.items():
        if origin.encoding.get(name) != value:
            raise UserError(
                f"{folder}: was made with {name} {_short(origin.encoding.get(name))}, not {_short(value)}; "
                "encode the clips anew with `sora-data encode`, or give what it was made with"
            )
    if origin.config_hash != clips:
        raise UserError(
            f"{folder}: was made of other clips (settings {_short(origin.config_hash)}, those of data set {data_set} "
            f"are {_short(clips)}); encode these with `sora-data encode`"
        )


def _write_rows(partial: Path, index: Index, encoded: Index, sets: Sequence[int]) -> None:
    with ColumnWriter(partial / "rows.npy", np.dtype(np.int64)) as writer:
        for part in _match(index, encoded, sets):
            writer.append(part)


def _match(index: Index, encoded: Index, sets: Sequence[int]) -> Iterator[np.ndarray]:
    """Pieces of `Joined.rows`. sets: for each data set of `encoded`, which one of the index it was made of."""
    ends, made = np.cumsum([0, *index.set_samples()]), np.cumsum([0, *encoded.set_samples()])
    for number in range(len(index.set_shards)):
        if number not in sets:
            yield np.full(ends[number + 1] - ends[number], -1, dtype=np.int64)
            continue
        part = sets.index(number)
        low, high = int(made[part]), int(made[part + 1])
        keys = encoded.keys[low:high]
        order = np.argsort(keys, kind="stable")
        for start in range(int(ends[number]), int(ends[number + 1]), CHUNK):
            chunk = slice(start, min(start + CHUNK, int(ends[number + 1])))
            rows = np.full(chunk.stop - start, -1, dtype=np.int64)
            if len(keys):
                wanted = index.keys[chunk]
                place = np.searchsorted(keys, wanted.astype(keys.dtype), sorter=order)
                row = order[np.minimum(place, len(keys) - 1)]
                found = keys[row] == wanted
                rows[found] = low + row[found]
                _refuse_others(index, encoded, np.arange(start, chunk.stop)[found], rows[found])
            yield rows


def _refuse_others(index: Index, encoded: Index, clips: np.ndarray, rows: np.ndarray) -> None:
    """Raise UserError for a row that was made of a clip with the same key and another content."""
    other = np.flatnonzero(index.crc32c[clips].astype("S10") != encoded.source[rows])
    if len(other):
        row = int(rows[other[0]])
        raise UserError(
            f"{encoded.shard_paths[int(encoded.shard[row])]}: {encoded.key(row)} was made of another clip of this key "
            f"({len(other)} such); encode the clips anew with `sora-data encode`"
        )


def _save(tensors: Mapping[str, np.ndarray]) -> bytes:
    # safetensors writes the memory behind an array as it lies there, whatever its strides say.
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def _short(value: Any) -> Any:
    """Hashes are told apart by their beginning."""
    return value[:12] if isinstance(value, str) else value
