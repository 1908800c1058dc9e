"""What `sora-lite data-preview` says is what a training run is given."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_latents import with_some
from text_folders import save_t5
from tiny_inputs import Tiny, call

from data_tools.cli import main as sora_data
from sora_lite.cli.compose import compose
from sora_lite.cli.data_preview import one_of
from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.generation.export import load_vae
from sora_lite.training.inputs import load_split, make_loader
from sora_lite.training.objective_dit import DiTObjective

BUCKETS = (
    "data.buckets=[{resolution: [32, 32], frames: 9, keep: 0.5, batch: 8}, {resolution: [16, 16], frames: 5, batch: 8}]"
)
SETTINGS = ["experiment=tiny", BUCKETS, "data.flip=true", "run.seed=3"]


def preview(capsys: pytest.CaptureFixture, tiny: Tiny, *words: str) -> list[dict]:
    capsys.readouterr()
    assert call("data-preview", *SETTINGS, f"data.shards={tiny.shards}", "preview.format=jsonl", *words) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_lines_are_what_training_sees(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    told = preview(capsys, tiny, f"vae_from={tiny.vae}", "preview.steps=5")
    config = compose("train", [*SETTINGS, f"data.shards={tiny.shards}", f"vae_from={tiny.vae}"])
    objective = DiTObjective(config.model, config.diffusion, load_vae(tiny.vae)[0], seed=3, rank=one_of(1))
    loader = make_loader(config, load_split(config.data, "train", one_of(1)), objective, one_of(1))
    for line, (batch,) in zip(told, loader.steps(0, 5), strict=True):
        samples = line["samples"]
        assert (line["step"], line["rank"], line["bucket"]) == (batch.step, 0, batch.bucket)
        assert [one["key"] for one in samples] == batch.keys and [one["caption"] for one in samples] == batch.captions
        assert [one["position"] for one in samples] == batch.positions.tolist()
        for one, view, clip in zip(samples, batch.views, batch.video, strict=True):
            assert (one["start"], one["flip"], one["crop"]) == (view.start, view.flip, list(view.crop))
            t, h, w = line["shape"]
            assert clip.shape == (3, t, h, w)
            if (h, w) == (32, 32):  # not scaled: the pixels can be looked up in the whole clip
                sample = int(batch.samples[batch.keys.index(one["key"])])
                whole = loader._dataset.reader.read(sample, (17, 32, 32)).frames[one["start"] : one["start"] + t]
                shown = whole[:, :, ::-1] if one["flip"] else whole
                assert torch.from_numpy(np.ascontiguousarray(shown)).permute(3, 0, 1, 2).equal(clip)
    flips = {one["flip"] for line in told for one in line["samples"]}
    assert flips == {True, False} and {line["bucket"] for line in told} == {0, 1}


def test_ranks_and_passes_share_a_step(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    alone = preview(capsys, tiny, "preview.steps=3", "preview.start=1")
    shared = preview(
        capsys, tiny, "preview.steps=3", "preview.start=1", "preview.world_size=2", "preview.accumulation=2"
    )
    assert [(line["step"], line["rank"]) for line in shared] == [(step, rank) for step in (1, 2, 3) for rank in (0, 1)]
    for line in alone:
        both = [one for other in shared if other["step"] == line["step"] for one in other["samples"]]
        assert {one["pass"] for one in both} == {0, 1} and len(both) == len(line["samples"])
        by_position = sorted(both, key=lambda one: one["position"])
        assert [one | {"pass": 0} for one in by_position] == line["samples"]


def test_what_was_made_beforehand_is_told_and_shown(
    tiny: Tiny, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Latents of some clips and features of some captions, in the places that training gives them."""
    some, encoder = with_some(latents, tmp_path / "some", 20), save_t5(tmp_path / "t5")
    words = [str(tiny.shards), str(tmp_path / "text"), f"text_from={encoder}", "max_tokens=16", "workers=0"]
    assert sora_data(["encode", *words]) == 0
    manifest, index = Manifest.load(tmp_path / "text"), Index.load(tmp_path / "text", "train", content="text")
    manifest.removed_keys = [index.key(0)]
    manifest.save(tmp_path / "text")
    model = ["model.text=null", "model.text_features=16", "model.text_tokens=16"]
    words = ["experiment=tiny", *model, f"data.shards={tiny.shards}", f"data.latents={some}", "run.seed=3"]
    words += [f"data.text={tmp_path / 'text'}", f"vae_from={tiny.vae}"]
    capsys.readouterr()
    given = [*words, f"text_from={encoder}"]
    assert call("data-preview", *given, "preview.format=jsonl", "preview.steps=5", "preview.world_size=2") == 0
    told = [one for line in capsys.readouterr().out.splitlines() for one in json.loads(line)["samples"]]
    made = Index.load(some, "train", content="latents")
    kept = {made.key(i) for i in range(len(made))}
    assert {one["key"] for one in told if one["latent"]} == kept & {one["key"] for one in told}
    assert {one["key"] for one in told if not one["text"]} == {index.key(0)}
    assert {one["latent"] for one in told} == {True, False}
    whole = ["preview.clips=8", f"preview.out={tmp_path / 'page'}"]
    assert call("data-preview", *given, *whole) == 0
    shown = np.asarray(Image.open(tmp_path / "page/bucket_0.png"))
    page = (tmp_path / "page/index.html").read_text()
    assert page.count("<td>True</td>") >= 8 and "come as latents: 20 of 39" in capsys.readouterr().out
    without = [word for word in given if not word.startswith("data.latents")]
    assert call("data-preview", *without, *whole, f"preview.out={tmp_path / 'other'}") == 0
    np.testing.assert_array_equal(shown, np.asarray(Image.open(tmp_path / "other/bucket_0.png")))
    assert call("data-preview", *words) == 2 and "text_from: names what data.text must" in capsys.readouterr().err
    assert call("data-preview", *[one for one in given if not one.startswith("vae_from")]) == 2
    assert "vae_from: names what data.latents must have been made with" in capsys.readouterr().err


def test_the_page_shows_every_bucket(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"data.shards={tiny.shards}", f"preview.out={tmp_path}", "preview.clips=5"]
    assert call("data-preview", *SETTINGS, *words) == 0
    page = (tmp_path / "index.html").read_text()
    for number, bucket in enumerate(("9 frames of 32x32", "5 frames of 16x16")):
        assert f"<h2>{bucket}</h2>" in page and Image.open(tmp_path / f"bucket_{number}.png").width > 100
    assert page.count("17 frames of 32x32 at 8 fps") == 10
    assert "9 frames of 32x32: " in capsys.readouterr().out


def test_what_cannot_be_shown_is_named(tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    words = ["data-preview", *SETTINGS, f"data.shards={tiny.shards}", "preview.format=jsonl"]
    for more, says in (
        (["preview.world_size=3"], "do not divide"),
        (["preview.world_size=0"], "preview.world_size: must be at least 1"),
        (["preview.wold_size=2"], "preview.world_size"),
        (["data.buckets=[{resolution: [30, 32], frames: 9}]"], "data.buckets[0]"),
        (["data.buckets=[{resolution: [32, 32], frames: 9}]", "data.batch_tokens=1"], "its batch would be 0"),
    ):
        assert call(*words, *more) == 2 and says in capsys.readouterr().err
