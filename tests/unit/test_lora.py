"""Adapters against peft's own, on a Wan model that diffusers has saved."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_inputs import call
from tiny_models import tiny_wan
from torch import Tensor, nn

from sora_lite.config import LoraConfig
from sora_lite.errors import UserError
from sora_lite.generation.export import load_transformer, read_contract, write
from sora_lite.generation.layouts import write_folder
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.lora import Adapters, linear_layers
from sora_lite.training.lora import adapt

peft = pytest.importorskip("peft")
WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

PER_BLOCK = ["attention.qkv", "attention.out", "mlp.0", "mlp.2", "cross.q", "cross.kv", "cross.out"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan, imported."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan().save_pretrained(folder / "theirs")
    assert call("import", f"weights_from={folder / 'theirs'}", f"out={folder / 'ours'}") == 0
    return folder / "ours"


def adapted(wan: Path, **settings: object) -> tuple[nn.Module, Adapters]:
    """A new model with adapters on the weights of `wan`."""
    architecture = read_contract(wan, "dit")[1].architecture
    torch.manual_seed(1)
    module = VideoDiT(**architecture)
    return module, adapt(module, architecture, LoraConfig(**settings), str(wan)).adapters


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def output(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 3, 4, 6, generator=draw), torch.randn(2, 7, 10, generator=draw)
    with torch.no_grad():
        return model(x, torch.tensor([0.5, 0.02]), Conditions(text=text))


def test_adapters_start_as_nothing(wan: Path) -> None:
    base, _ = load_transformer(wan)
    module, adapters = adapted(wan, rank=3)
    assert torch.equal(output(module), output(base))
    assert adapters.layers == [f"blocks.{block}.{layer}" for block in range(2) for layer in PER_BLOCK]
    sides = {f"{layer}.lora_{side}.default.weight" for layer in adapters.layers for side in "AB"}
    assert trained(module).keys() == sides, "all else is frozen"
    assert all((trained(module)[name] == 0).all() == ("lora_B" in name) for name in sides)
    again, _ = adapted(wan, rank=3)
    assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in trained(module).items())


def test_merged_and_saved_adapters_are_the_trained_ones(wan: Path, tmp_path: Path) -> None:
    base, _ = load_transformer(wan)
    module, adapters = adapted(wan, rank=3, alpha=4.5, targets=["blocks.*.attention.*", "blocks.1.mlp.0", "text.mlp.2"])
    for parameter in trained(module).values():
        nn.init.normal_(parameter, std=0.1)
    expected = output(module)
    assert (expected - output(base)).abs().max() > 1e-2

    merged, weights = load_transformer(wan)[0], adapters.merge(base.state_dict(), trained(module))
    merged.load_state_dict(weights)
    torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(weights[name], tensor)}
    assert changed == {f"{layer}.weight" for layer in adapters.layers}

    adapters.write(tmp_path, trained(module), str(wan))
    loaded = peft.PeftModel.from_pretrained(load_transformer(wan)[0], str(tmp_path))
    torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(loaded.merge_and_unload()), output(merged), rtol=1e-5, atol=1e-5)

    injected = load_transformer(wan)[0]
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(tmp_path)), injected)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
    result = peft.set_peft_model_state_dict(injected, state)
    assert not result.unexpected_keys
    assert torch.equal(output(injected), expected)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 4.5, str(wan))


def test_diffusers_takes_the_adapters_onto_the_base(wan: Path, tmp_path: Path) -> None:
    """All linear layers that there are: fused ones, the patches, which are a convolution there, and the embedders."""
    module, adapters = adapted(wan, rank=3, alpha=4.5, targets=["*"])
    for parameter in trained(module).values():
        nn.init.normal_(parameter, std=0.1)
    contract = replace(read_contract(wan, "dit")[1], base="of the import")
    write(tmp_path / "merged", contract, adapters.merge(load_transformer(wan)[0].state_dict(), trained(module)))
    adapters.write(tmp_path / "merged/adapter", trained(module), str(wan))
    write_folder(tmp_path / "merged", tmp_path / "theirs")

    draw = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 3, 4, 6, generator=draw), torch.randn(2, 7, 10, generator=draw)
    base, merged = tiny_wan(), WanTransformer3DModel.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        start = base(x, timestep=torch.tensor([500.0, 20.0]), encoder_hidden_states=text).sample
        base.load_lora_adapter(str(tmp_path / "theirs"), weight_name="pytorch_lora_weights.safetensors")
        loaded, all_of_it = (
            one.eval()(x, timestep=torch.tensor([500.0, 20.0]), encoder_hidden_states=text).sample
            for one in (base, merged)
        )
    assert (loaded - start).abs().max() > 0.1
    torch.testing.assert_close(loaded, all_of_it, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(loaded, output(module), rtol=1e-5, atol=2e-5)
    (tmp_path / "merged/adapter/adapter_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="merged/adapter: holds no adapters that can be read"):
        write_folder(tmp_path / "merged", tmp_path / "theirs")


def test_names_of_layers() -> None:
    model = VideoDiT(channels=2, width=24, depth=3, heads=2, text={"width": 16, "depth": 2, "heads": 2, "max_bytes": 8})
    everything = linear_layers(model, ["*"])
    assert {"embed", "final.out", "text.blocks.0.mlp.0"} <= set(everything)
    in_blocks = linear_layers(model, ["blocks.*"])
    assert in_blocks == [name for name in everything if name.startswith("blocks.")]
    assert linear_layers(model, ["blocks.2.mlp.*", "blocks.0.mlp.0"]) == [
        "blocks.0.mlp.0",
        "blocks.2.mlp.0",
        "blocks.2.mlp.2",
    ]
    # names that end alike are not taken along
    Adapters(rank=1, alpha=1, layers=["blocks.0.mlp.0"]).inject(model)
    assert trained(model).keys() == {f"blocks.0.mlp.0.lora_{side}.default.weight" for side in "AB"}
    for pattern in ("mlp.0", "blocks.*.norm_mlp", "blocks.7.*", "embed_label", ""):
        with pytest.raises(
            ValueError, match=r"is no linear layer of this model; there are embed, .*blocks\.\*\.mlp\.0"
        ):
            linear_layers(model, ["embed", pattern])


def test_what_does_not_fit_is_refused(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = read_contract(wan, "dit")[1].architecture
    with pytest.raises(UserError, match=r"lora\.targets: blocks\.\*\.atention\.\* is no linear layer"):
        adapted(wan, rank=2, targets=["blocks.*.atention.*"])
    for change, says in (
        ({"heads": 4}, "heads is 2, not 4"),  # which no shape tells
        ({"rope_theta": 100.0}, "rope_theta is 10000.0, not 100.0"),
        ({"width": 36}, "width is 24, not 36"),
        ({"mlp_ratio": 4.0}, "size mismatch"),
        ({"depth": 3}, "depth is 2, not 3"),
    ):
        other = architecture | change
        with pytest.raises(UserError, match=f"init_from: adapters need the very model of {wan}.*{says}"):
            adapt(VideoDiT(**other), other, LoraConfig(rank=2), str(wan))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapters need peft.*pip install 'sora_lite\[lora\]'"):
        adapted(wan, rank=2)
