"""Adapters by the command line: trained, gone on with, exported alone and merged."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_folders import save_t5
from tiny_inputs import Tiny, call
from tiny_models import WAN, make_dit, tiny_wan

from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation import export as exports
from sora_lite.generation.export import load_dit, load_transformer, read_contract
from sora_lite.models.conditions import Conditions
from sora_lite.training import restore, store

peft = pytest.importorskip("peft")


def words(tiny: Tiny, base: Path, root: Path, *more: str) -> list[str]:
    return [
        "train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}",
        f"init_from={base}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dit(tmp_path_factory.mktemp("base") / "dit", tiny, seed=0)


@pytest.fixture(scope="module")
def root(base: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, named tiny."""
    root = tmp_path_factory.mktemp("runs")
    assert call(*words(tiny, base, root, "lora.rank=2", "lora.alpha=4", "optim.lr=0.05")) == 0
    return root


def test_a_run_trains_and_saves_adapters_alone(root: Path, base: Path) -> None:
    path = store.latest(root / "tiny/checkpoints")
    assert path is not None
    held, state = restore.read_full(path, "raw")
    module, _ = load_transformer(base)
    layers = [n for n, m in module.named_modules() if n.startswith("blocks.") and isinstance(m, torch.nn.Linear)]
    assert held.keys() == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    assert state["extra"]["objective"]["lora"]["sha256"] == read_contract(base, "dit")[1].sha256
    losses = [line["loss"] for line in read_record(root / "tiny" / RECORD) if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_export_is_merged_and_the_adapter_lies_beside_it(
    root: Path, base: Path, tmp_path: Path, weights: str
) -> None:
    before = load_file(base / "model.safetensors")
    assert call("export", f"run={root / 'tiny'}", f"out={tmp_path}", f"weights={weights}") == 0
    merged, _, contract = load_dit(tmp_path)
    assert contract.base == read_contract(base, "dit")[1].sha256 != contract.sha256
    start, _, of_base = load_dit(base)
    assert of_base.base is None
    for name, tensor in merged.state_dict().items():
        trained = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
        assert torch.equal(tensor, before[name]) != trained, name
    latent, time = torch.randn(2, merged.channels, 5, 4, 4), torch.tensor([0.3, 0.8])
    given = Conditions(labels=torch.tensor([1, 2]), text=torch.ones(2, 3, dtype=torch.int64))
    expected, was = merged(latent, time, given), start(latent, time, given)
    assert (expected - was).abs().max() > 1e-2 * was.abs().max()
    loaded = peft.PeftModel.from_pretrained(start, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(latent, time, given), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="adapters are read with the export around them"):
        read_contract(tmp_path / "adapter", "dit")
    exports.write(tmp_path, of_base, start.state_dict())  # another model in the same place
    assert not (tmp_path / "adapter").exists()


def test_what_an_export_is_for_works_on_a_merged_one(root: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert call("export", f"run={root / 'tiny'}", f"out={tmp_path / 'merged'}") == 0
    given = ["prompts=[a]", f"out={tmp_path / 'clips'}", "sampling.steps=2"]
    assert call("generate", f"model_from={tmp_path / 'merged'}", "labels=[3]", *given) == 0
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1
    assert call(*words(tiny, tmp_path / "merged", tmp_path, "lora.rank=1", "run.steps=1")) == 0  # adapters on adapters


def test_a_run_goes_on_with_its_own_base_alone(
    root: Path, base: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "tiny", tmp_path / "runs/tiny")
    moved = shutil.copytree(base, tmp_path / "moved")
    other = make_dit(tmp_path / "other", tiny, seed=1)

    def go_on(base: Path, *more: str) -> int:
        given = words(tiny, base, tmp_path / "runs", "lora.rank=2", "lora.alpha=4", "optim.lr=0.05", "run.steps=5")
        return call(*given, *more)

    assert go_on(other) == 2
    assert "init_from leads to another one" in capsys.readouterr().err
    assert go_on(base, "lora.rank=3") == 2
    assert "lora.rank was 2, is 3" in capsys.readouterr().err
    assert go_on(tmp_path / "gone") == 2
    assert f"{tmp_path / 'gone'}: no such folder" in capsys.readouterr().err
    assert go_on(moved) == 0
    said = capsys.readouterr().out
    assert "goes on from step 4" in said and "parameters train, beside" in said
    shutil.rmtree(moved)
    assert call("export", f"run={tmp_path / 'runs/tiny'}") == 2
    assert f"{moved}: no such folder" in capsys.readouterr().err
    assert call("export", f"run={tmp_path / 'runs/tiny'}", f"init_from={other}") == 2
    assert "holds other weights than those that the adapters were trained on" in capsys.readouterr().err
    assert call("export", f"run={tmp_path / 'runs/tiny'}", f"init_from={base}") == 0


def test_settings_that_do_not_go_together(
    base: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, says in (
        (["lora.rank=2", "init_from=null"], "init_from: is missing"),
        (["lora.rank=-1"], "lora.rank: must be at least 1"),
        (["lora.rank=0", "lora.alpha=3"], "lora.alpha: is for adapters; set lora.rank"),
        (["lora.targets=[blocks.*.mlp.0]"], "lora.targets: is for adapters; set lora.rank"),
        (["lora.rank=1000"], "lora.rank: 1000 is above the full rank of every layer, at most 48"),
        (["lora.rank=2", "lora.targets=[]"], "lora.targets: is empty"),
        (["lora.rank=2", "lora.alpha=0"], "lora.alpha: must be above 0"),
        (["lora.rank=2", "lora.targets=[blocks.*.mpl.0]"], "lora.targets: blocks.*.mpl.0 is no linear layer"),
        (["lora.rank=2", "model.heads=4"], "heads is 2, not 4"),
        (["lora.rank=2", "model.width=36"], "width is 48, not 36"),
        (["lora.rnk=2"], "the nearest is lora.rank"),
    ):
        assert call(*words(tiny, base, tmp_path, *more)) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wan_of_diffusers_learns_and_goes_back(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder of diffusers to one, by the commands that a user would give."""
    diffusers = pytest.importorskip("diffusers")
    tiny_wan(text=16).save_pretrained(tmp_path / "wan")
    save_t5(tmp_path / "umt5", umt5=True)
    assert call("import", f"weights_from={tmp_path / 'wan'}", f"out={tmp_path / 'base'}") == 0
    before = (tmp_path / "base/model.safetensors").read_bytes()
    given = [
        *words(tiny, tmp_path / "base", tmp_path, "lora.rank=4", *WAN), f"text_from={tmp_path / 'umt5'}",
        "optim.lr=0.02", "run.steps=16", "run.save_every=10", "run.validate_every=1",
    ]  # fmt: skip
    assert call(*given) == 0
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "base/model.safetensors").values())
    per_block = 4 * ((24 + 72) + (24 + 24) + (24 + 24) + (24 + 48) + (24 + 24) + (24 + 40) + (40 + 24))
    says = (
        f"lora: {2 * per_block:,} parameters train, beside {count:,} frozen ones of {tmp_path / 'base'}: rank 4 on 14 "
    )
    assert says in capsys.readouterr().out
    validated = [line["val_loss"] for line in read_record(tmp_path / "tiny" / RECORD) if "val_loss" in line]
    assert validated[-1] < 0.9 * validated[0]
    assert (tmp_path / "base/model.safetensors").read_bytes() == before

    files = sorted((tmp_path / "base").rglob("*"))
    assert call("export", f"run={tmp_path / 'tiny'}", f"out={tmp_path / 'base'}") == 2
    assert "is what the adapters stand on" in capsys.readouterr().err
    assert (tmp_path / "base/model.safetensors").read_bytes() == before
    assert sorted((tmp_path / "base").rglob("*")) == files
    assert call("export", f"run={tmp_path / 'tiny'}", "layout=diffusers") == 0
    assert not (tmp_path / "tiny/export").exists()
    assert call("export", f"run={tmp_path / 'tiny'}") == 0
    x, text, step = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 7, 16), torch.tensor([500.0, 20.0])
    base, merged, loaded = (
        diffusers.WanTransformer3DModel.from_pretrained(folder).eval()
        for folder in (tmp_path / "wan", tmp_path / "tiny/diffusers", tmp_path / "wan")
    )
    loaded.load_lora_adapter(str(tmp_path / "tiny/diffusers"), weight_name="pytorch_lora_weights.safetensors")
    start, expected, out = (one(x, step, text).sample for one in (base, merged, loaded))
    assert (expected - start).abs().max() > 1e-2 * start.abs().max()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    ours = load_transformer(tmp_path / "tiny")[0](x, step / 1000, Conditions(text=text))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    generate = [f"text_from={tmp_path / 'umt5'}", "prompts=[a]", "sampling.steps=2", f"out={tmp_path / 'clips'}"]
    assert call("generate", f"model_from={tmp_path / 'tiny'}", *generate) == 0
