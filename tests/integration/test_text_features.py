"""Text features made beforehand: whose they are, which caption's, on any number of ranks; and what is refused."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loader import ALONE, BATCH, SHAPE, flip_byte
from text_folders import save_clip, save_t5, with_captions
from tiny_inputs import Plain, Tiny, call

from data_tools.cli import main as sora_data
from sora_lite.cli.compose import compose
from sora_lite.data.batch import ClipBatch
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.joined import CaptionReader, Joined, Members, open_join, text_sample
from sora_lite.data.loader import ClipLoader
from sora_lite.data.manifest import Manifest
from sora_lite.data.remote import ReadCounts
from sora_lite.data.shards import DamagedSample, Sample, ShardWriter, clip_digits
from sora_lite.errors import UserError
from sora_lite.generation.export import load_vae
from sora_lite.generation.text import open_encoders
from sora_lite.models.pretrained import FrozenTextEncoder
from sora_lite.training.objective_dit import DiTObjective

READS = ["model.text=null", "model.text_features=16", "model.text_tokens=16"]


def encode(shards: Path, out: Path, encoder: Path, *more: str) -> Path:
    assert (
        sora_data(["encode", str(shards), str(out), f"text_from={encoder}", "max_tokens=16", "workers=0", *more]) == 0
    )
    return out


@pytest.fixture(scope="module")
def clips(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_captions(tiny.shards, tmp_path_factory.mktemp("clips") / "shards")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def features(clips: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(clips, tmp_path_factory.mktemp("features") / "text", encoder)


def join(index: Index, features: Path, encoder: Path) -> Joined:
    same = {name: FrozenTextEncoder(encoder, 16).identity[name] for name in ("max_tokens", "fingerprint")}
    joined = open_join(index, [features], "train", content="text", expected=same)
    assert joined is not None
    return joined


def read(clips: Path, joined: Joined | None, *, world_size: int = 1, workers: int = 0) -> list[list[ClipBatch]]:
    """All ranks' batches of the first steps."""
    ranks = []
    for rank in range(world_size):
        loader = ClipLoader(
            open_index([clips], "train"), [Row(shape=SHAPE, keep=1.0, batch=BATCH)],
            seed=5, block_shards=2, flip=True, rank=rank, world_size=world_size, accumulation=1,
            workers=workers, cache_bytes=2**20, pin=False, text=joined,
        )  # fmt: skip
        ranks.append([batch for (batch,) in loader.steps(0, 10)])
    return [list(step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_each_sample_comes_with_the_features_of_its_caption(
    clips: Path, encoder: Path, features: Path, world_size: int, workers: int
) -> None:
    """Of the very caption that is drawn, whoever reads it; twice over the data, so also from the memory of clips."""
    joined, reference = join(open_index([clips], "train"), features, encoder), FrozenTextEncoder(encoder, 16)
    plain, seen = read(clips, None), set()
    for step, (whole,) in zip(read(clips, joined, world_size=world_size, workers=workers), plain, strict=True):
        assert [caption for batch in step for caption in batch.captions] == whole.captions
        for batch in step:
            for row, caption in enumerate(batch.captions):
                seen.add(caption)
                if batch.text is None:
                    assert not any(batch.captions)
                    continue
                count = int(batch.text_mask[row].sum())
                assert (count > 0) == bool(caption) and not batch.text[row, count:].any()
                if caption:
                    expected = reference([caption])
                    assert count == expected.mask.sum()
                    torch.testing.assert_close(batch.text[row, :count], expected.features[0, :count])
                    torch.testing.assert_close(batch.pooled[row], expected.pooled[0])
    assert {"", "a dog"} < seen and len({len(caption.split()) for caption in seen}) > 3


@pytest.mark.parametrize("of", ["the same encoder", "another encoder"])
def test_the_model_is_told_the_same(
    tiny: Tiny, clips: Path, encoder: Path, features: Path, tmp_path: Path, of: str
) -> None:
    """Whether all, some or none of a batch were encoded beforehand; pooled text comes of the same encoder or not."""
    pools = save_clip(tmp_path / "pools", seed=1) if of == "another encoder" else None
    given = [*READS, "model.pooled_features=16", f"text_from={encoder}", f"vae_from={tiny.vae}"]
    given += [f"pooled_from={pools or encoder}"]
    config = compose("train", ["experiment=tiny", f"data.shards={clips}", *given])
    encoders = open_encoders(config, asdict(config.model), ALONE.device, {})
    objective = DiTObjective(config.model, config.diffusion, load_vae(tiny.vae)[0], encoders, seed=3, rank=ALONE)
    for parameter in objective.module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    index = open_index([clips], "train")
    joined = join(index, features, encoder)
    half = replace(joined, rows=np.where(np.arange(len(index)) % 8 < 4, joined.rows, -1))
    kinds = [read(clips, one) for one in (None, joined, half)]
    for (raw,), (made,), (mixed,) in zip(*kinds, strict=True):
        assert raw.text is None and 0 < mixed.text_mask.any(1).sum() < made.text_mask.any(1).sum() < BATCH
        with torch.no_grad():
            losses = [objective.loss(Plain(objective.module), batch).each for batch in (raw, made, mixed)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(losses[2], losses[0], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ refused


def test_features_of_another_encoder_are_refused(clips: Path, encoder: Path, features: Path, tmp_path: Path) -> None:
    index = Index.load(clips, "train")
    other = save_clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"text: was made with fingerprint \w{12}, not \w{12}; encode the clips anew"):
        join(index, features, other)
    short = encode(clips, tmp_path / "short", encoder, "max_tokens=8")
    with pytest.raises(UserError, match=r"short: was made with max_tokens 8, not 16"):
        join(index, short, encoder)


def test_features_of_other_captions_are_refused(tiny: Tiny, clips: Path, encoder: Path, features: Path) -> None:
    """The clips are the same to the byte; what is said of them is not."""
    index = Index.load(tiny.shards, "train")
    joined = join(Index.load(clips, "train"), features, encoder)
    captions = Members(index).captions(2)
    reader = CaptionReader(joined, ReadCounts())
    with pytest.raises(UserError, match="holds features of other captions than the clip has now; encode them anew"):
        reader.read(reader.find(2), captions)
    with pytest.raises(UserError, match="holds features of other captions"):
        read(tiny.shards, joined)


def test_damaged_features_are_replaced_and_named(clips: Path, encoder: Path, features: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(features, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache")))
    index, made = open_index([clips], "train"), Index.load(copy, "train", content="text")
    whole = read(clips, join(index, features, encoder))[0][0]
    place = next(row for row, caption in enumerate(whole.captions) if caption)
    row = [made.key(i) for i in range(len(made))].index(whole.keys[place])
    flip_byte(made.shard_paths[0], int(made.media_offset[row] + 200))
    found = read(clips, join(index, copy, encoder))[0][0]
    assert [one.key for one in found.bad] == [whole.keys[place]] and "wrong checksum" in found.bad[0].reason
    kept = [i for i in range(BATCH) if i != place]
    assert [found.keys[i] for i in kept] == [whole.keys[i] for i in kept] and found.keys[place] != whole.keys[place]


FLOATS, BOOLS = np.zeros((1, 2, 3), np.float32), np.ones((1, 2), bool)


@pytest.mark.parametrize(
    "tensors",
    [
        {"mean": FLOATS},
        {"features": FLOATS},
        {"features": FLOATS, "mask": BOOLS[:, :1]},
        {"features": FLOATS, "mask": ~BOOLS},
        {"features": FLOATS, "mask": BOOLS.astype(np.int64)},
        {"features": FLOATS.astype(np.float64), "mask": BOOLS},
        {"features": FLOATS, "mask": BOOLS, "pooled": FLOATS},
        {"features": FLOATS.repeat(2, 0), "mask": BOOLS.repeat(2, 0)},
        None,
    ],
    ids=["other names", "no mask", "shapes", "no token", "integers", "doubles", "pooled", "two for one", "rubbish"],
)
def test_rubbish_in_features_is_damage(tiny: Tiny, tmp_path: Path, tensors: dict[str, np.ndarray] | None) -> None:
    members = Members(Index.load(tiny.shards, "train"))
    key, made_of = members.index.key(0), int(members.index.crc32c[0])
    sample = text_sample(key, tensors or {}, members.meta(0), clip_crc32c=made_of)
    if tensors is None:
        sample = Sample(key=key, ext=sample.ext, media=b"rubbish", meta=sample.meta, made_of=clip_digits(made_of))
    with ShardWriter(tmp_path / "train-000000.tar", "train") as writer:
        writer.add(sample)
    manifest = Manifest(config_hash="", content="text", shards=[writer.entry])
    made = Index.of([tmp_path], [manifest], "train", content="text")
    with pytest.raises(DamagedSample):
        CaptionReader(Joined(index=made, rows=np.zeros(1, np.int64)), ReadCounts()).read(0, members.captions(0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.text=t"], r"data\.text: model\.text_features is 0, so the model reads no features of captions"),
        (["data.shards=null", "data.sets=[{shards: s, text: t}]"], r"data\.sets\.text: model\.text_features is 0"),
        (
            ["data.text=t", "data.shards=null", "data.sets=[{shards: s}]"],
            "data.text: is of the captions of data.shards",
        ),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose("train", ["experiment=tiny", "data.shards=s", "vae_from=v", *words])


def test_a_vae_reads_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train-vae", "experiment=tiny_vae", "data.shards=s", "data.text=t") == 2
    assert "data.text: a VAE reads no text" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_features(
    tiny: Tiny, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folders may be moved; others, or none, are a change that is refused by name until it is accepted."""
    encoder = save_t5(tmp_path / "t5")
    made = encode(clips, tmp_path / "text", encoder)
    run = ["train", "experiment=tiny", *READS, f"vae_from={tiny.vae}", f"text_from={encoder}", f"run.root={tmp_path}"]
    assert call(*run, f"data.shards={clips}", f"data.text={made}", "run.steps=2") == 0
    assert "come with text features: 29 of 39 samples in buckets; the captions of the others" in capsys.readouterr().out
    moved = shutil.move(made, tmp_path / "moved")
    assert call(*run, f"data.shards={clips}", f"data.text={moved}", "run.steps=3") == 0
    assert call(*run, f"data.shards={clips}", "run.steps=4") == 2
    assert "data.text leads to another one" in capsys.readouterr().err
    assert call(*run, f"data.shards={clips}", "run.steps=4", "run.accept=[data.text]") == 0
    sets = f"data.sets=[{{shards: {clips}, text: {moved}}}]"
    assert call(*run, "data.shards=null", sets, "run.name=sets", "run.steps=1") == 0
