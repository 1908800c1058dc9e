"""Latents and text features of shards that others wrote: joined by their keys and checksums, whatever the keys hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.numpy import load
from test_loader import flip_byte
from test_shards_of_others import sora_data, write_tar
from text_folders import save_t5
from tiny_inputs import Tiny, call

from sora_lite.data import loader as loading
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined, LatentReader, Members, open_join
from sora_lite.data.loader import ClipLoader, ClipReader
from sora_lite.data.manifest import Manifest
from sora_lite.data.remote import ReadCounts
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_vae
from sora_lite.generation.pipeline import to_float
from sora_lite.models.pretrained import FrozenTextEncoder

SHAPE = (17, 32, 32)
BUCKETS = "buckets=[{resolution: [32, 32], frames: 17}]"


@pytest.fixture(scope="module")
def written(tiny_mp4s: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index of shards by webdataset's own writer, whose keys no file of ours may have as a name."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "theirs").mkdir()
    with webdataset.ShardWriter(str(folder / "theirs/%04d.tar"), maxcount=10, verbose=0) as writer:
        for i, clip in enumerate(tiny_mp4s):
            writer.write({"__key__": f"../set.v1/clip é {i:03d}", "mp4": clip, "txt": f"the digit {i}", "cls": i % 10})
    assert sora_data("index", folder / "theirs", folder / "index", "validation_fraction=0.3", "workers=0") == 0
    return folder / "index"


@pytest.fixture(scope="module")
def made(tiny: Tiny, written: Path) -> Path:
    out = written.parent / "latents"
    assert sora_data("encode", written, out, f"vae_from={tiny.vae}", BUCKETS, "workers=0") == 0
    return out


def join(clips: Path, made: Path, content: str = "latents", split: str = "train") -> Joined:
    joined = open_join(open_index([clips], split), [made], split, content=content, expected={})
    assert joined is not None
    return joined


@pytest.mark.parametrize("split", ["train", "validation"])
def test_latents_are_those_of_the_clips(tiny: Tiny, written: Path, made: Path, split: str) -> None:
    index, joined = Index.load(written, split), join(written, made, split=split)
    reader, latents = ClipReader(index, cache_bytes=0), LatentReader(joined, ReadCounts())
    assert len(index) > 0 and (joined.rows >= 0).all()
    assert [joined.index.key(int(row)) for row in joined.rows] == [index.key(i) for i in range(len(index))]
    video = torch.from_numpy(np.stack([reader.read(i, SHAPE).frames for i in range(len(index))]))
    with torch.no_grad():
        posterior = load_vae(tiny.vae)[0].encode(to_float(video.permute(0, 4, 1, 2, 3)))
    for i, mean in enumerate(posterior.mean):
        row = latents.find(i, SHAPE, float(index.fps[i]))
        assert row is not None
        latent, captions = latents.read(row)
        torch.testing.assert_close(torch.from_numpy(latent.mean), mean, rtol=1e-5, atol=1e-5)
        assert captions == reader.captions(i) and joined.index.label[row] == index.label[i]


def test_stock_webdataset_reads_them_and_no_name_leads_out(written: Path, made: Path) -> None:
    found = {}
    for path in sorted(made.glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            assert len(sample["__key__"]) == 32 and sample["__key__"].isalnum()
            meta = json.loads(sample["json"])
            found[meta["key"]] = load(sample["latent.safetensors"])["mean"].shape
    keys = {
        one.key(i) for split in ("train", "validation") for one in [Index.load(written, split)] for i in range(len(one))
    }
    assert found == dict.fromkeys(keys, (4, 5, 4, 4)) and len(keys) == 24
    assert sora_data("verify", made, "workers=0") == 0


def test_a_flipped_byte_is_found(written: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a verification; and in training it costs one sample, which is counted for the shard of latents."""
    index, clips = Index.load(made, "train", content="latents"), open_index([written], "train")
    loader = ClipLoader(
        clips, [Row(shape=SHAPE, keep=1.0, batch=8)], seed=1, block_shards=1, flip=False, rank=0, world_size=1,
        accumulation=1, workers=0, cache_bytes=0, pin=False, latents=join(written, made),
    )  # fmt: skip
    whole = [batch for (batch,) in loader.steps(0, 2)]
    place = int(index.media_offset[0]) + 300
    path = index.shard_paths[0]
    content = path.read_bytes()
    flip_byte(path, place)
    assert sora_data("verify", made, "workers=0") == 2
    found = [batch for (batch,) in loader.steps(0, 2)]
    path.write_bytes(content)
    shown = capsys.readouterr().out
    assert "SHA-256 differs" in shown and "wrong checksum" in shown
    (bad,) = [one for batch in found for one in batch.bad]
    assert bad.key == index.key(0) and bad.shard == path.name == "0000.train.tar" and "wrong checksum" in bad.reason
    for step, (one, other) in enumerate(zip(found, whole, strict=True)):
        kept = [i for i in range(8) if (step, i) != (bad.step, bad.position)]
        assert [one.keys[i] for i in kept] == [other.keys[i] for i in kept]
        assert one.mean is not None and other.mean is not None and one.mean[kept].equal(other.mean[kept])


def test_training_from_them_decodes_nothing(
    tiny: Tiny, written: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "experiment=tiny", f"data.shards={written}", f"vae_from={tiny.vae}", f"run.root={tmp_path}"]
    words += ["run.validation_samples=2"]
    assert call(*words, "run.name=raw") == 0
    monkeypatch.setattr(loading, "decode_planes", None)
    assert call(*words, "run.name=made", f"data.latents={made}") == 0
    raw, cached = (
        [one["loss"] for one in read_record(tmp_path / n / RECORD) if "loss" in one] for n in ("raw", "made")
    )
    assert cached == pytest.approx(raw, rel=1e-5) and len(raw) == 4


def test_the_layout_of_video2dataset_grows(
    tiny: Tiny, tiny_mp4s: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shards number alike, so that keys change when a second one comes; what they were made of decides."""
    folder, latents, text = tmp_path / "v2d", tmp_path / "latents", tmp_path / "text"
    encoder = save_t5(tmp_path / "t5")

    def write(shard: int, some: list[bytes]) -> None:
        members = []
        for i, clip in enumerate(some):
            fields = {"url": f"https://a/{shard}-{i}.mp4", "caption": f"a dog {i}", "source": 3, "label": 2}
            members += [(f"{i:05d}.mp4", clip), (f"{i:05d}.json", json.dumps(fields).encode())]
        write_tar(folder / f"part/{shard:05d}.tar", members)
        assert sora_data("index", folder, "validation_fraction=0", "workers=0") == 0

    def encode() -> None:
        assert sora_data("encode", folder, latents, f"vae_from={tiny.vae}", BUCKETS, "workers=0") == 0
        assert sora_data("encode", folder, text, f"text_from={encoder}", "max_tokens=16", "workers=0") == 0

    write(0, tiny_mp4s[:4])
    encode()
    assert (join(folder, latents).rows >= 0).all()
    write(1, tiny_mp4s[4:9])
    assert (join(folder, latents).rows < 0).all()  # 00000 is called part/00000/00000 now
    encode()
    index = Index.load(folder, "train")
    assert index.key(0) == "part/00000/00000" and len(index) == 9
    assert Manifest.load(latents).counts == {"clips_encoded": 9, "clips_in_no_bucket": 0, "clips_damaged": 0}
    assert (join(folder, latents).rows >= 0).all() and (join(folder, latents).index.label == 2).all()
    joined = join(folder, text, "text")
    for i, row in enumerate(joined.rows.tolist()):
        features = FrozenTextEncoder(encoder, 16)([f"a dog {i if i < 4 else i - 4}"]).features
        np.testing.assert_array_equal(Members(joined.index).tensors(row)["features"], features.numpy())
    write(1, tiny_mp4s[5:10])  # the same keys, other clips
    assert sora_data("verify", folder, "workers=0") == 0
    with pytest.raises(UserError, match=r"was made of another clip of this key \(5 such\)"):
        join(folder, latents)
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*.tar")}
    encode()
    after = {path: path.stat().st_mtime_ns for path in latents.rglob("*.tar")}
    assert (join(folder, latents).rows >= 0).all() and [path.name for path in after if before[path] != after[path]] == [
        "00001.train.tar"
    ]
