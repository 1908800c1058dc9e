"""A run starts from the weights of another: as they are, with another patch, and with conditions that are new."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_inputs import Tiny, call

from sora_lite.errors import UserError
from sora_lite.generation import export
from sora_lite.generation.export import load_transformer, read_contract
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.patch import patchify
from sora_lite.training.init_from import Row, start_from, table


def words(tiny: Tiny, root: Path, *more: str) -> list[str]:
    return ["train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}", *more]


@pytest.fixture(scope="module")
def source(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    assert call(*words(tiny, root, "optim.lr=0.1", "run.steps=3")) == 0
    assert call("export", f"run={root / 'tiny'}") == 0
    return root / "tiny"


def test_a_run_starts_where_another_ended(
    source: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(tiny, tmp_path, f"init_from={source}", "optim.lr=1e-12", "run.steps=1", "run.save_every=1")
    unfinished = tmp_path / "tiny" / "checkpoints" / "step_00000001.tmp-0000010badcafe"
    unfinished.mkdir(parents=True)  # as a run that was killed while it wrote its first checkpoint
    assert call(*given) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "tiny" / "init_from.json").read_text())
    assert f"{len(rows)} of {len(rows)} weights taken as they are" in said
    assert call("export", f"run={tmp_path / 'tiny'}", "weights=raw") == 0
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (tmp_path / "tiny", source))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)
    # going on is another thing: the source may be gone
    assert call(*words(tiny, tmp_path, "init_from=gone", "optim.lr=1e-12", "run.steps=2", "run.save_every=1")) == 0
    assert "init_from: not looked at" in capsys.readouterr().out
    assert call(*words(tiny, tmp_path, "init_from=gone", "run.name=other")) == 2
    assert "gone: no such folder" in capsys.readouterr().err


@pytest.fixture
def old(source: Path) -> VideoDiT:
    return load_transformer(source)[0]


def like(source: Path, **changes: Any) -> tuple[VideoDiT, dict[str, Any]]:
    """A new model like that of an export but for some arguments, and what a run would say of it."""
    contract = read_contract(source, "dit")[1]
    architecture = contract.architecture | changes
    torch.manual_seed(1)
    about = {"diffusion": contract.diffusion, "vae_fingerprint": contract.vae_fingerprint, "text_encoders": {}}
    return VideoDiT(**architecture).eval(), {"model": architecture} | about


def fates(rows: list[Row], fate: str) -> set[str]:
    return {row.name for row in rows if row.fate == fate}


LATENT, TIME = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
ASKED = Conditions(labels=torch.tensor([1, 2]), text=torch.ones(2, 3, dtype=torch.int64))


def test_new_conditions_change_nothing_at_first(source: Path, old: VideoDiT) -> None:
    more, state = like(source, frame_conditions=True)
    rows = start_from(source, "dit", more, state)
    assert fates(rows, "new") == {"embed_frames.weight"}
    assert fates(rows, "taken") == {row.name for row in rows} - {"embed_frames.weight"}
    assert torch.equal(old(LATENT, TIME, ASKED), more(LATENT, TIME, ASKED))


def test_new_pooled_text_changes_nothing_at_first_and_is_learned(source: Path) -> None:
    """In a model of labels, so that nothing else reads text."""
    labels, state = like(source, text=None)
    start_from(source, "dit", labels, state)
    more, state = like(source, text=None, pooled_features=12)
    start_from(source, "dit", more, state)
    asked = Conditions(labels=ASKED.labels, pooled=torch.randn(2, 12))
    assert torch.equal(labels(LATENT, TIME, Conditions(labels=ASKED.labels)), more(LATENT, TIME, asked))
    more(LATENT, TIME, asked).square().sum().backward()
    assert more.pool_text is not None and more.pool_text[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("modulation", ["per_block", "shared"])
@pytest.mark.parametrize("attention", ["cross", "joint"])
def test_new_blocks_change_nothing_at_first_and_are_learned(
    source: Path, tmp_path: Path, modulation: str, attention: str
) -> None:
    short, state = like(source, modulation=modulation, text_attention=attention)
    for parameter in short.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    contract = replace(read_contract(source, "dit")[1], architecture=state["model"])
    export.write(tmp_path, contract, short.state_dict())
    deep, state = like(source, modulation=modulation, text_attention=attention, depth=3)
    new = fates(start_from(tmp_path, "dit", deep, state), "new")
    # What the text of a last joint block does not have is new where the block is no longer the last.
    assert new and all(name.startswith(("blocks.2.", "blocks.1.text.")) for name in new)
    assert attention == "joint" or not any(".text." in name for name in new)
    out = deep(LATENT, TIME, ASKED)
    assert torch.equal(out, short(LATENT, TIME, ASKED))
    out.square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in deep.blocks[2].parameters())


def test_text_of_a_last_joint_block(source: Path, tmp_path: Path) -> None:
    """It has 2 of 6 parts, and is the last of a shallower model, too; of another width nothing of it fits."""
    deep, state = like(source, text_attention="joint", depth=3)
    for parameter in deep.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    contract = replace(read_contract(source, "dit")[1], architecture=state["model"])
    export.write(tmp_path, contract, deep.state_dict())
    short, state = like(source, text_attention="joint", depth=2)
    name = "blocks.1.text.modulation.linear.bias"
    rows = start_from(tmp_path, "dit", short, state)
    assert fates(rows, "resized") == {name, name.replace("bias", "weight")} and not fates(rows, "new")
    assert torch.equal(short.state_dict()[name], deep.state_dict()[name][: 2 * 48])
    export.write(tmp_path, replace(contract, architecture=state["model"]), short.state_dict())
    wide, state = like(source, text_attention="joint", depth=3, width=144)
    assert name in fates(start_from(tmp_path, "dit", wide, state), "new")


def test_patches_are_resized(source: Path, old: VideoDiT) -> None:
    wide, state = like(source, patch=[1, 4, 4])
    assert fates(start_from(source, "dit", wide, state), "resized") == {
        "embed.weight", "final.out.weight", "final.out.bias",
    }  # fmt: skip
    # a picture twice as large in patches twice as large gives the same tokens
    small = torch.randn(1, old.channels, 1, 2, 2)
    large = torch.nn.functional.interpolate(small[:, :, 0], size=(4, 4), mode="bilinear", antialias=True)[:, :, None]
    torch.testing.assert_close(
        wide.embed(patchify(large, (1, 4, 4))), old.embed(patchify(small, (1, 2, 2))), rtol=1e-4, atol=1e-4
    )


def test_patches_are_resized_in_time(source: Path, old: VideoDiT) -> None:
    """A clip at half speed in patches of two frames gives the same tokens, and predicts each frame twice."""
    longer, state = like(source, patch=[2, 2, 2])
    assert len(fates(start_from(source, "dit", longer, state), "resized")) == 3
    slow = LATENT.repeat_interleave(2, dim=2)
    torch.testing.assert_close(longer.embed(patchify(slow, (2, 2, 2))), old.embed(patchify(LATENT, (1, 2, 2))))
    expected = old(LATENT, TIME, ASKED).repeat_interleave(2, dim=2)
    torch.testing.assert_close(longer(slow, TIME, ASKED), expected, rtol=1e-4, atol=1e-4)


def test_patches_of_as_many_cells_are_resized_too_and_given_frames_with_them(source: Path, tmp_path: Path) -> None:
    given, state = like(source, frame_conditions=True)
    torch.nn.init.normal_(given.embed_frames.weight)
    _, contract = read_contract(source, "dit")
    export.write(tmp_path, replace(contract, architecture=state["model"]), given.state_dict())
    tall, state = like(source, frame_conditions=True, patch=[1, 4, 1])
    rows = start_from(tmp_path, "dit", tall, state)
    assert fates(rows, "resized") == {"embed.weight", "embed_frames.weight", "final.out.weight", "final.out.bias"}
    even = torch.ones(1, 5, 1, 4, 4)  # whatever its patch, a flat picture is the same sum
    torch.testing.assert_close(
        tall.embed_frames(patchify(even, (1, 4, 1)))[0, 0], given.embed_frames(patchify(even, (1, 2, 2)))[0, 0]
    )


def test_settings_that_no_shape_shows_are_named(source: Path) -> None:
    other, state = like(source, heads=4, gelu="tanh")
    other_vae = state | {"vae_fingerprint": "other", "diffusion": state["diffusion"] | {"shift": 3.0}}
    rows = start_from(source, "dit", other, other_vae)
    assert fates(rows, "differs") == {"model.heads", "model.gelu", "diffusion.shift", "vae_from"}
    said = table(rows)
    assert any("model.gelu: erf of the export, tanh here" in line for line in said)
    assert f"of {len(rows) - 4} weights" in said[0]


def test_weights_of_another_width_are_refused(source: Path) -> None:
    """Even where vectors such as the bias of the last layer happen to fit."""
    other, state = like(source, width=60, text=None)
    with pytest.raises(UserError, match="fits this model"):
        start_from(source, "dit", other, state)
