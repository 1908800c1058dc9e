"""Models that read a frozen text encoder: trained, gone on with, exported and generated from."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_loader import ALONE
from text_folders import save_clip, save_t5
from tiny_inputs import Plain, Tiny, call

from sora_lite.cli.compose import compose
from sora_lite.config import GenerateConfig, TrainConfig
from sora_lite.data.batch import ClipBatch
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_vae, read_contract
from sora_lite.generation.text import open_encoders
from sora_lite.models.conditions import Conditions
from sora_lite.models.pretrained import FrozenTextEncoder
from sora_lite.training.inputs import load_split, make_loader
from sora_lite.training.objective_dit import DiTObjective
from sora_lite.training.replicas import ReplicaCheck

T5 = ["model.text=null", "model.text_features=16", "model.text_tokens=16"]
CLIP = [*T5, "model.pooled_features=16"]
BOTH = [*CLIP, "model.text_attention=joint"]
WAN = [*T5, "model.pad_text=true", "model.num_classes=0", "model.qk_norm=full", "model.modulation=shared"]
KINDS = {"t5": T5, "clip": CLIP, "t5 and clip": BOTH, "wan": WAN}
ENCODERS = {"t5": ("t5", None), "clip": ("clip", "clip"), "t5 and clip": ("t5", "clip"), "wan": ("umt5", None)}
"""Encoders of features and of pooled features, by kind of model."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {"t5": save_t5(root / "t5"), "clip": save_clip(root / "clip"), "umt5": save_t5(root / "umt5", umt5=True)}


def named(kind: str, folders: dict[str, Path]) -> list[str]:
    """The settings that name the encoders of a kind of model."""
    given = zip(("text_from", "pooled_from"), ENCODERS[kind], strict=True)
    return [f"{key}={folders[name]}" for key, name in given if name is not None]


def words(tiny: Tiny, *more: str) -> list[str]:
    return ["experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", *more]


def configured(tiny: Tiny, kind: str, folders: dict[str, Path], *more: str) -> TrainConfig:
    return compose("train", words(tiny, *KINDS[kind], *named(kind, folders), *more))


def build(config: TrainConfig) -> DiTObjective:
    torch.manual_seed(0)
    vae = load_vae(Path(config.vae_from))[0]
    encoders = open_encoders(config, asdict(config.model), ALONE.device, {})
    objective = DiTObjective(config.model, config.diffusion, vae, encoders, seed=3, rank=ALONE)
    for parameter in objective.module.parameters():  # at the start text is gated off
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return objective


def first_batch(config: TrainConfig, objective: DiTObjective) -> ClipBatch:
    ((batch,),) = make_loader(config, load_split(config.data, "train", ALONE), objective, ALONE).steps(0, 1)
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_the_whole_way(
    kind: str, tiny: Tiny, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, gone on with, exported, generated from and evaluated; the export names the encoder and wants it."""
    more = ["run.sample_every=4", f"run.root={tmp_path}", *named(kind, folders)]
    assert call("train", *words(tiny, *KINDS[kind], *more, "run.steps=2")) == 0
    assert call("train", *words(tiny, *KINDS[kind], *more)) == 0
    assert (tmp_path / "tiny/samples/step_00000004.png").is_file()
    losses = [line["loss"] for line in read_record(tmp_path / "tiny" / RECORD) if "loss" in line]
    assert len(losses) == 4
    assert call("export", f"run={tmp_path / 'tiny'}") == 0
    contract = read_contract(tmp_path / "tiny", "dit")[1]
    identities = {name: FrozenTextEncoder(folders[name], 16).identity for name in set(ENCODERS[kind]) - {None}}
    given = zip(("text_from", "pooled_from"), ENCODERS[kind], strict=True)
    assert contract.text_encoders == {key: identities[name] for key, name in given if name is not None}
    asked = ["generate", f"model_from={tmp_path / 'tiny'}", "prompts=['a dog',zero]", "sampling.steps=2"]
    asked += ["negative_prompt=left", f"out={tmp_path / 'clips'}"]
    assert call(*asked, *named(kind, folders)) == 0
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2
    assert call(
        "evaluate", f"model_from={tmp_path / 'tiny'}", f"shards={tiny.shards}", f"out={tmp_path / 'figures.json'}",
        "attributes=[digit]", "count=2", "clips=2", "judge_steps=1", "sampling.steps=1", *named(kind, folders),
    ) == 0  # fmt: skip
    assert json.loads((tmp_path / "figures.json").read_text())["generations"] == 2
    for key, name in contract.text_encoders.items():
        others = [word for word in named(kind, folders) if not word.startswith(key)]
        capsys.readouterr()
        assert call(*asked, *others) == 2
        missing = (
            f"{key}: the model reads {key.removesuffix('_from')}_features of {name['encoder']} with at most 16 tokens"
        )
        assert missing in capsys.readouterr().err
        other = (save_clip if name["encoder"] == "clip" else save_t5)(tmp_path / f"other_{key}", seed=1)
        assert call(*asked, *others, f"{key}={other}") == 2
        error = capsys.readouterr().err
        assert f"{key}: {other} is not the encoder that the model was trained with" in error
        assert name["fingerprint"][:12] in error and FrozenTextEncoder(other, 16).fingerprint()[:12] in error


def test_another_encoder_or_none_does_not_go_on(
    tiny: Tiny, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = words(tiny, *T5, f"run.root={tmp_path}", "run.validate_every=0")
    assert call("train", *run, f"text_from={folders['t5']}", "run.steps=2") == 0
    moved = shutil.copytree(folders["t5"], tmp_path / "moved")
    assert call("train", *run, f"text_from={moved}", "run.steps=3") == 0  # what it leads to is the same
    capsys.readouterr()
    other = save_t5(tmp_path / "other", seed=1)
    assert call("train", *run, f"text_from={other}") == 2
    assert "text_from leads to another one" in capsys.readouterr().err
    assert call("train", *run, f"text_from={other}", "run.accept=[text_from]") == 0


def test_text_is_read_and_dropped_as_the_empty_prompt(tiny: Tiny, folders: dict[str, Path]) -> None:
    """Each stream by a draw of its own; what is left out is what the encoder makes of no text."""
    config = configured(tiny, "clip", folders, "diffusion.condition_dropout=0.5")
    objective = build(config)
    batch = first_batch(config, objective)
    told, seeds = objective.conditions(batch), list(range(400))
    encoder = objective.encoders["text_from"]
    assert objective.encoders["pooled_from"] is encoder  # the same folder is loaded once
    expected, null = encoder(batch.captions), encoder([""])
    torch.testing.assert_close(told.text, expected.features, rtol=1e-5, atol=1e-5)
    assert told.text_mask.equal(expected.mask)
    torch.testing.assert_close(told.pooled, expected.pooled, rtol=1e-5, atol=1e-5)
    many = told.rows([0] * len(seeds))
    dropped = objective.dropped(many, seeds)
    gone = {
        "labels": dropped.labels == config.model.num_classes,
        "text": dropped.text_mask.sum(1) == 1,
        "pooled": (dropped.pooled - null.pooled).abs().amax(1) < 1e-6,
    }
    kept = 0.5 ** (1 / 3)
    for name, rows in gone.items():
        assert rows.float().mean() == pytest.approx(kept, abs=0.06), name
    assert torch.stack(list(gone.values())).all(0).float().mean() == pytest.approx(0.5, abs=0.07)
    torch.testing.assert_close(dropped.text[gone["text"]][:, :1], null.features.expand(int(gone["text"].sum()), -1, -1))
    assert not dropped.text[gone["text"]][:, 1:].any()
    assert dropped.text[~gone["text"]].equal(many.text[~gone["text"]])
    assert dropped.pooled[~gone["pooled"]].equal(many.pooled[~gone["pooled"]])


def test_the_encoder_is_watched_like_all_that_is_frozen(tiny: Tiny, folders: dict[str, Path]) -> None:
    """It is no part of what is trained, and a bit of it that changes in memory ends the run."""
    objective = build(configured(tiny, "t5", folders))
    trained = {parameter.data_ptr() for parameter in objective.module.parameters()}
    assert not any(parameter.data_ptr() in trained for parameter in objective.encoders["text_from"].parameters())
    check = ReplicaCheck(ALONE, objective.frozen(), {}, {})
    check.check({})
    next(objective.encoders["text_from"].parameters()).data.flatten()[3] += 1e-6
    with pytest.raises(UserError, match="the frozen weights in memory changed"):
        check.check({})


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_token_never_changes_the_loss(kind: str, tiny: Tiny, folders: dict[str, Path]) -> None:
    """Neither that it is there nor what is in it, whoever else is in the batch."""
    config = configured(tiny, kind, folders)
    objective = build(config)
    batch = first_batch(config, objective)

    def losses() -> torch.Tensor:
        with torch.no_grad():
            return objective.loss(Plain(objective.module), batch).each

    plain, read = losses(), objective.reader

    def padded(prompts: list[str]) -> Conditions:
        told = read(prompts)
        text = torch.nn.functional.pad(told.text, (0, 0, 0, 3), value=7.0)
        mask = torch.nn.functional.pad(told.text_mask, (0, 3))
        return replace(told, text=torch.where(mask[..., None], text, 1e3 * torch.randn_like(text)), text_mask=mask)

    objective.reader = padded
    torch.testing.assert_close(losses(), plain, rtol=1e-6, atol=1e-6)
    objective.reader = lambda prompts: read([f"{prompt} dog" for prompt in prompts])
    assert (losses() - plain).abs().max() > 1e-4  # the text is heard


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (T5, r"text_from: is null, but the model reads model\.text_features=16; name the folder of a T5, UMT5 or CLIP"),
        ([*CLIP, "text_from=t5"], r"pooled_from: is null, but the model reads model\.pooled_features=16; .* a CLIP$"),
        (["text_from=t5"], r"text_from: model\.text_features is 0, so the model reads nothing of it; leave it out, or"),
        ([*T5, "text_from=t5", "pooled_from=clip"], r"pooled_from: model\.pooled_features is 0"),
        ([*T5, "text_from=t5", "model.text_tokens=0"], "model.text_tokens: must be at least 1"),
        (["model.pad_text=true"], "model.pad_text: needs model.text_features"),
        (["model.text_tokens=7"], "model.text_tokens: is for frozen text encoders"),
        (["model.text_attention=joint", "model.cross_norm=false"], "model.cross_norm: is for cross-attention"),
        (["model.positions=sincos", "model.rope_theta=5"], "model.rope_theta: is for model.positions=rope"),
    ],
)
def test_settings_that_do_not_go_together(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose("train", ["experiment=tiny", "data.shards=s", "vae_from=v", *more])


def test_an_encoder_that_is_not_the_models(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(match: str, *, text: Path | None, pooled: Path | None = None, **changes: int) -> None:
        reads = {"text_features": 16, "pooled_features": 0, "text_tokens": 16} | changes
        given = {"text_from": text and str(text), "pooled_from": pooled and str(pooled)}
        with pytest.raises(UserError, match=match):
            open_encoders(GenerateConfig(model_from="run", **given), reads, ALONE.device, {})

    wide, clip, t5 = save_t5(tmp_path / "wide", width=24), folders["clip"], folders["t5"]
    refused(r"wide gives features 24 wide, and model\.text_features=16; .* set model\.text_features=24", text=wide)
    refused(r"clip gives features 16 wide, and model\.pooled_features=8", text=t5, pooled=clip, pooled_features=8)
    refused(r"pooled_from: .*t5 has no pooled features", text=t5, pooled=t5, pooled_features=16)
    refused("none: no such folder", text=tmp_path / "none")
    refused("text_from: the model has no text_features; leave .*t5 out", text=t5, text_features=0)


def test_a_preview_needs_no_encoder(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = words(tiny, *T5, "preview.format=jsonl", "preview.steps=1")
    assert call("data-preview", *shown) == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["caption"]
