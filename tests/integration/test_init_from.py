"""A run starts from the weights of another: as they are, with another patch, and with conditions that are new."""

import json
from pathlib import Path

import pytest
import torch
from tiny_inputs import Tiny, call

from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.training.init_from import start_from


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


def test_new_conditions_change_nothing_at_first_and_patches_are_resized(source: Path) -> None:
    from sora_lite.generation.export import load_dit

    old, _, contract = load_dit(source)
    torch.manual_seed(1)
    more = VideoDiT(**(contract.architecture | {"frame_conditions": True}))
    rows = {row.name: row for row in start_from(source, "dit", more, tuple(contract.architecture["patch"]))}
    assert rows["embed_frames.weight"].fate == "new" and all(
        row.fate == "taken" for name, row in rows.items() if name != "embed_frames.weight"
    )
    latent, time = torch.randn(2, old.channels, 2, 4, 4), torch.tensor([0.3, 0.8])
    conditions = Conditions(labels=torch.tensor([1, 2]), text=torch.ones(2, 3, dtype=torch.int64))
    assert torch.equal(old(latent, time, conditions), more.eval()(latent, time, conditions))

    wide = VideoDiT(**(contract.architecture | {"patch": [1, 4, 4]}))
    fates = {row.name: row.fate for row in start_from(source, "dit", wide, (1, 4, 4))}
    assert {name for name, fate in fates.items() if fate == "resized"} == {
        "embed.weight", "final.out.weight", "final.out.bias",
    }  # fmt: skip
    # a picture twice as large in patches twice as large gives the same tokens
    small = torch.randn(1, old.channels, 1, 2, 2)
    from sora_lite.models.patch import patchify

    large = torch.nn.functional.interpolate(small[:, :, 0], size=(4, 4), mode="bilinear", antialias=True)[:, :, None]
    torch.testing.assert_close(
        wide.embed(patchify(large, (1, 4, 4))), old.embed(patchify(small, (1, 2, 2))), rtol=1e-4, atol=1e-4
    )
