"""Latents that were made beforehand: exact, joined to the right clips only, and never a reason for other steps."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.numpy import load, save
from test_loader import ALONE, BATCH, SHAPE, flip_byte
from text_folders import save_t5
from tiny_inputs import Tiny, call, make_vae

from data_tools.cli import main as sora_data
from sora_lite.cli.compose import compose
from sora_lite.data import loader as loading
from sora_lite.data.batch import ClipBatch
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined, LatentReader, open_join
from sora_lite.data.loader import ClipLoader, ClipReader
from sora_lite.data.manifest import MANIFEST, Manifest
from sora_lite.data.remote import ReadCounts
from sora_lite.data.shards import DamagedSample, Sample, ShardWriter, clip_digits
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_vae
from sora_lite.generation.pipeline import to_float
from sora_lite.models.pretrained import FrozenTextEncoder
from sora_lite.training.inputs import make_rows
from sora_lite.training.objective_dit import DiTObjective

BUCKETS = "buckets=[{resolution: [32, 32], frames: 17}]"


def encode(shards: Path, out: Path, vae: Path, *more: str) -> int:
    return sora_data(["encode", str(shards), str(out), f"vae_from={vae}", BUCKETS, "workers=0", *more])


def joined(tiny: Tiny, index: Index, *folders: Path | None) -> Joined | None:
    expected = {"fingerprint": load_vae(tiny.vae)[1].vae_fingerprint}
    return open_join(index, folders, "train", content="latents", expected=expected)


@pytest.mark.parametrize("at_once", [1, 5, 39])
def test_a_latent_is_what_encoding_on_the_fly_gives(tiny: Tiny, latents: Path, at_once: int) -> None:
    """Whatever the batch: oneDNN's convolutions may round otherwise for another batch, by some ulp."""
    index = Index.load(tiny.shards, "train")
    raw, cached = ClipReader(index, cache_bytes=0), ClipReader(
        index, cache_bytes=0, latents=joined(tiny, index, latents)
    )  # fmt: skip
    vae, _ = load_vae(tiny.vae)
    for start in range(0, len(index), at_once):
        samples = range(start, min(start + at_once, len(index)))
        frames = torch.from_numpy(np.stack([raw.read(sample, SHAPE).pixels for sample in samples]))
        with torch.no_grad():
            posterior = vae.encode(to_float(frames))
        for sample, mean, logvar in zip(samples, posterior.mean, posterior.logvar, strict=True):
            clip = cached.read(sample, SHAPE)
            assert clip.latent is not None and clip.captions == raw.read(sample, SHAPE).captions
            torch.testing.assert_close(torch.from_numpy(clip.latent.mean), mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(clip.latent.logvar), logvar, rtol=1e-5, atol=1e-5)


def test_stock_webdataset_reads_them(tiny: Tiny, latents: Path) -> None:
    index = Index.load(tiny.shards, "train")
    found = {}
    for path in sorted(latents.glob("train-*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            found[sample["__key__"]] = load(sample["latent.safetensors"])
            assert json.loads(sample["json"])["frames"] == SHAPE[0]
    assert found.keys() == {index.key(sample) for sample in range(len(index))}
    assert {tuple(tensors["mean"].shape) for tensors in found.values()} == {(4, 5, 4, 4)}


# ------------------------------------------------------------------------------------------------ the same steps


def with_some(latents: Path, out: Path, kept: int) -> Path:
    """Latents of some clips only: the others stand as taken down."""
    shutil.copytree(latents, out, ignore=shutil.ignore_patterns(".cache"))
    manifest, index = Manifest.load(out), Index.load(latents, "train", content="latents")
    manifest.removed_keys = [index.key(sample) for sample in range(kept, len(index))]
    manifest.save(out)
    return out


def read(tiny: Tiny, shards: Path, made: Path | None) -> list[ClipBatch]:
    """Three steps."""
    index = open_index([shards], "train")
    loader = ClipLoader(
        index, [Row(shape=SHAPE, keep=1.0, batch=BATCH)],
        seed=5, block_shards=2, flip=False, rank=0, world_size=1, accumulation=1,
        workers=0, cache_bytes=0, pin=False, latents=joined(tiny, index, made),
    )  # fmt: skip
    return [batch for (batch,) in loader.steps(0, 3)]


def test_a_latent_of_another_rate_or_size_is_passed_over(tiny: Tiny, latents: Path) -> None:
    index = Index.load(tiny.shards, "train")
    found = LatentReader(joined(tiny, index, latents), ReadCounts())
    assert found.find(0, SHAPE, 8.0) == 0
    assert found.find(0, SHAPE, 16.0) is None and found.find(0, (13, 32, 32), 8.0) is None


def test_an_index_in_memory_joins_alike(tiny: Tiny, latents: Path) -> None:
    compiled, loaded = open_index([tiny.shards], "train"), Index.load(tiny.shards, "train")
    mine, theirs = joined(tiny, compiled, latents), joined(tiny, loaded, latents)
    assert mine is not None and theirs is not None and (mine.rows == theirs.rows).all() and (mine.rows >= 0).all()


def test_the_model_sees_the_same(tiny: Tiny, latents: Path, tmp_path: Path) -> None:
    """The draw from the posterior too, wherever video and latents stand in a batch."""
    config = compose("train", ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}"])
    objective = DiTObjective(config.model, config.diffusion, load_vae(tiny.vae)[0], seed=3, rank=ALONE)
    seeds = list(range(BATCH))
    some = with_some(latents, tmp_path / "some", 20)
    for raw, mixed in zip(read(tiny, tiny.shards, None), read(tiny, tiny.shards, some), strict=True):
        assert 0 < mixed.is_latent.sum() < BATCH
        torch.testing.assert_close(objective._latents(raw, seeds), objective._latents(mixed, seeds))


# ------------------------------------------------------------------------------------------------ refused


def test_other_latents_are_refused(tiny: Tiny, latents: Path, tmp_path: Path) -> None:
    index = Index.load(tiny.shards, "train")

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            joined(tiny, index, folder)

    other = tmp_path / "other"
    assert encode(tiny.shards, other, make_vae(tmp_path / "vae", tiny.shards, seed=1)) == 0
    refused(other, "was made with fingerprint")
    refused(tiny.shards, "holds clips, not latents; give it as data.shards")
    with pytest.raises(UserError, match="holds latents, not clips; give it as"):
        open_index([latents], "train")

    changed = Path(shutil.copytree(latents, tmp_path / "changed"))
    manifest = Manifest.load(changed)
    manifest.config_hash = "0" * 64
    manifest.save(changed)
    refused(changed, "was made of other clips")


def test_a_clip_of_the_same_key_and_other_content_is_refused(tiny: Tiny, latents: Path) -> None:
    index = Index.load(tiny.shards, "train")
    index.crc32c = index.crc32c + np.uint32(1)
    with pytest.raises(UserError, match=r"was made of another clip of this key \(39 such\)"):
        joined(tiny, index, latents)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.latents=l", "data.flip=true"], "data.flip: latents are of clips as they are"),
        (["data.latents=l", "data.shards=null", "data.sets=[{shards: s}]"], "data.latents: are those of data.shards"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose("train", ["experiment=tiny", "data.shards=s", "vae_from=v", *words])


def test_a_vae_is_trained_on_video(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train-vae", "experiment=tiny_vae", "data.shards=s", "data.latents=l") == 2
    assert "data.latents: a VAE is trained on video" in capsys.readouterr().err


def test_batches_of_the_model_alone_leave_the_encoder_out(
    tiny: Tiny, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And latents alone change no batch, since that would change the order."""
    rows = "data.buckets=[{resolution: [32, 32], frames: 17}, {resolution: [32, 32], frames: 1}]"
    words = ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", rows, "data.batch_tokens=8192"]

    def batches(*more: str) -> tuple[list[int], DiTObjective]:
        config = compose("train", [*words, "data.divisor=1", *more])
        objective = DiTObjective(config.model, config.diffusion, load_vae(tiny.vae)[0], seed=3, rank=ALONE)
        return [row.batch for row in make_rows(config.data, objective)], objective

    alone, objective = batches("data.batch_by=model_flops")
    clips = 8192 / objective.tokens(17, 32, 32)
    assert alone == [round(clips), round(clips * objective.flops(17, 32, 32) / objective.flops(1, 32, 32))]
    both, _ = batches("data.batch_by=flops")
    assert both == [round(clips), round(clips * objective.cost(17, 32, 32) / objective.cost(1, 32, 32))] != alone
    assert both == batches("data.batch_by=flops", f"data.latents={latents}")[0]
    for by in ("flops", "model_flops"):
        more = [f"data.latents={latents}", f"data.batch_by={by}", "run.steps=1", f"run.root={tmp_path}"]
        settings = [*words[:3], "data.buckets=[{resolution: [32, 32], frames: 17, batch: 8}]", *more, f"run.name={by}"]
        assert call("train", *settings) == 0
        assert ("model_flops leaves it out" in capsys.readouterr().out) == (by == "flops")


# ------------------------------------------------------------------------------------------------ encoding

KILLED = """
import os, signal, sys
from data_tools import encode
whole, left = encode.latent_sample, int(sys.argv[1])
def one(*args, **settings):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **settings)
encode.latent_sample = one
from data_tools.cli import main
sys.exit(main(sys.argv[2:]))
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_killed_and_gone_on_it_is_the_same_bytes(tiny: Tiny, latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["encode", str(tiny.shards), str(out), f"vae_from={tiny.vae}", BUCKETS]
    for left in (30, 42):  # within the first shard; within the second, were nothing kept
        done = subprocess.run([sys.executable, "-c", KILLED, str(left), *words, "workers=0"], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not (out / MANIFEST).exists()
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(made) == 1
    assert sora_data([*words, "workers=2"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items() >= made.items()
    assert content(out) == content(latents)
    assert not list((out / ".work").glob("attempt-*"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sora_data([*words, "workers=0"]) == 0  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_damaged_clips_are_named_and_counted(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(tiny.shards, tmp_path / "copy"))
    index = Index.load(copy, "train")
    flip_byte(index.shard_paths[0], int(index.media_offset[7] + 100))
    assert encode(copy, tmp_path / "out", tiny.vae) == 0
    shown = capsys.readouterr().out
    assert f"left out, as damaged: train-000000.tar: {index.key(7)}" in shown and "1 clips damaged" in shown
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.counts == {"clips_encoded": 47, "clips_in_no_bucket": 0, "clips_damaged": 1}
    cached = joined(tiny, index, tmp_path / "out")
    assert cached is not None and [i for i, row in enumerate(cached.rows) if row < 0] == [7]


def test_encoding_refuses_what_does_not_fit(
    tiny: Tiny, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(tiny.shards, latents, tiny.vae, "fps=8") == 2
    assert "holds what was made with another buckets" in capsys.readouterr().err
    assert encode(latents, tmp_path / "out", tiny.vae) == 2
    assert "holds latents, which cannot be encoded" in capsys.readouterr().err
    assert encode(tiny.shards, tmp_path / "out", tiny.vae, "buckets=[{resolution: [30, 32], frames: 17}]") == 2
    assert "buckets[0]: a clip of 17 frames, 30x32 does not fit" in capsys.readouterr().err
    assert encode(tiny.shards, tmp_path / "out", tiny.vae, "buckets=[{resolution: [32, 32], frames: 17, fps: -8}]") == 2
    assert "buckets[0].fps: must be above 0" in capsys.readouterr().err
    assert encode(tiny.shards, tmp_path / "out", tiny.vae, "buckets=[{resolution: [32, 32], frames: 33}]") == 2
    assert "nothing to encode: 0 clips encoded, 48 clips in no bucket" in capsys.readouterr().err
    assert encode(tiny.shards, tmp_path / "out", tiny.vae, "device=abacus") == 2
    assert "device=abacus" in capsys.readouterr().err
    assert not (tmp_path / "out" / MANIFEST).exists()


# ------------------------------------------------------------------------------------------------ training


def test_training_from_latents_decodes_nothing_and_learns_the_same(
    tiny: Tiny, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={tmp_path}"]
    assert call(*words, "run.name=raw", "run.sample_every=4") == 0

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("a clip was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "decode_planes", decode)
        assert call(*words, "run.name=cached", "run.sample_every=4", f"data.latents={latents}") == 0
    assert "come as latents: 39 of 39 samples in buckets" in capsys.readouterr().out
    raw, cached = (read_record(tmp_path / name / RECORD) for name in ("raw", "cached"))
    assert [line["from_latents"] for line in cached if "from_latents" in line] == [1.0] * 4
    for name in ("loss", "val_loss"):
        mine, theirs = ([line[name] for line in lines if name in line] for lines in (raw, cached))
        assert len(mine) >= 1 and mine == pytest.approx(theirs, rel=1e-5)
    assert call(*words, "run.name=cached", "run.steps=6") == 2  # not the run that it was
    assert "latents" in capsys.readouterr().err


def test_a_damaged_latent_is_replaced_and_named(tiny: Tiny, latents: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(latents, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache")))
    made = Index.load(copy, "train", content="latents")
    whole = read(tiny, tiny.shards, latents)
    victim = whole[0].keys[2]
    row = [made.key(i) for i in range(len(made))].index(victim)
    flip_byte(made.shard_paths[0], int(made.media_offset[row] + 200))
    found = read(tiny, tiny.shards, copy)
    assert [one.key for one in found[0].bad] == [victim] and "wrong checksum" in found[0].bad[0].reason
    kept = [i for i in range(BATCH) if i != 2]
    assert [found[0].keys[i] for i in kept] == [whole[0].keys[i] for i in kept] and found[0].keys[2] != victim


@pytest.mark.parametrize(
    "media",
    [b"rubbish", save({"mean": np.zeros((1, 2), np.float32)}), save({"mean": np.zeros(1), "logvar": np.zeros(1)})],
    ids=["no safetensors", "no logvar", "other shapes"],
)
def test_rubbish_in_a_latent_is_damage(tiny: Tiny, tmp_path: Path, media: bytes) -> None:
    index = Index.load(tiny.shards, "train")
    meta = ClipReader(index, cache_bytes=0).meta(0)
    made_of = clip_digits(int(index.crc32c[0]))
    with ShardWriter(tmp_path / "train-000000.tar", "train") as writer:
        writer.add(Sample(key=index.key(0), ext="latent.safetensors", media=media, meta=meta, made_of=made_of))
    manifest = Manifest(config_hash="", content="latents", shards=[writer.entry])
    made = Index.of([tmp_path], [manifest], "train", content="latents")
    with pytest.raises(DamagedSample):
        LatentReader(Joined(index=made, rows=np.zeros(1, np.int64)), ReadCounts()).read(0)


def test_captions_are_encoded_once(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_t5(tmp_path / "t5")
    words = ["encode", str(tiny.shards), str(tmp_path / "text"), f"text_from={folder}", "workers=0", "max_tokens=16"]
    assert sora_data(words) == 0
    assert "48 clips encoded, 0 clips without caption" in capsys.readouterr().out
    manifest, encoder = Manifest.load(tmp_path / "text"), FrozenTextEncoder(folder, max_tokens=16)
    assert (manifest.content, manifest.encoding["fingerprint"]) == ("text", encoder.fingerprint())
    index = Index.load(tiny.shards, "train")
    reader = ClipReader(index, cache_bytes=0)
    captions = {index.key(sample): reader.captions(sample) for sample in range(len(index))}
    for path in (tmp_path / "text").glob("train-*.tar"):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            text, expected = load(sample["text.safetensors"]), encoder(captions.pop(sample["__key__"]))
            np.testing.assert_array_equal(text["features"], expected.features.numpy())
            np.testing.assert_array_equal(text["mask"], expected.mask.numpy())
    assert not captions
    assert sora_data([*words, f"vae_from={tiny.vae}"]) == 2
    assert sora_data([*words[:-1], "max_tokens=8"]) == 2
    errors = capsys.readouterr().err
    assert "vae_from: name the VAE" in errors
    assert "holds what was made with another max_tokens" in errors
