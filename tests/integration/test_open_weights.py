"""Published weights in and out by the command line, and what `inspect` says of the models."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_folders import save_t5
from tiny_inputs import Tiny, call
from tiny_models import tiny_wan
from torch import Tensor, nn

from sora_lite.cli.compose import compose
from sora_lite.cli.inspect import inspect_model
from sora_lite.generation.export import load_dit, load_transformer
from sora_lite.models.conditions import Conditions

diffusers = pytest.importorskip("diffusers")

PAPERS_TABLE = {
    "s_2": (33, 6.06), "s_4": (33, 1.41), "s_8": (33, 0.36), "b_2": (130, 23.01), "b_4": (130, 5.56),
    "b_8": (131, 1.42), "l_2": (458, 80.71), "l_4": (458, 19.70), "l_8": (459, 5.01), "xl_2": (675, 118.64),
    "xl_4": (675, 29.05), "xl_8": (676, 7.39),
}  # fmt: skip
"""Parameters in millions and Gflops (multiply-adds at 256 x 256) of table 4 in arXiv 2212.09748."""


@pytest.mark.parametrize("size", PAPERS_TABLE)
def test_sizes_and_work_are_the_papers(size: str) -> None:
    facts = inspect_model(compose("inspect", [f"model=dit_{size}"]))
    parameters, gflops = PAPERS_TABLE[size]
    assert round(facts["parameters"] / 1e6) == parameters
    assert facts["gflops"] == pytest.approx(gflops, abs=0.0065)  # B/4 is cut in the table, the others are rounded


def test_wan_has_the_size_of_wan() -> None:
    for name, parameters in (("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)):
        with torch.device("meta"):
            heads, depth, ffn = (12, 30, 8960) if name == "wan_1_3b" else (40, 40, 13824)
            theirs = diffusers.WanTransformer3DModel(num_attention_heads=heads, num_layers=depth, ffn_dim=ffn)
        assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters
        assert inspect_model(compose("inspect", [f"model={name}"]))["parameters"] == parameters


def test_memory_follows_from_what_is_kept(capsys: pytest.CaptureFixture) -> None:
    facts = inspect_model(compose("inspect", ["model=video_s", "precision=fp32"]))
    p = facts["parameters"]
    assert (facts["weights_bytes"], facts["gradients_bytes"], facts["optimizer_bytes"]) == (4 * p, 4 * p, 8 * p)
    half = inspect_model(compose("inspect", ["model=video_s"]))
    assert (half["weights_bytes"], half["optimizer_bytes"]) == (2 * p, 12 * p)
    more = inspect_model(compose("inspect", ["model=video_s", "precision=fp32", "model.depth=24"]))
    tokens, width = 1280, 384
    per_block = (more["activations_per_clip_bytes"] - facts["activations_per_clip_bytes"]) / 12 / (4 * tokens * width)
    # In widths of a token: norms, q, k, v, what attention gives, the MLP's 4 + 4; and cross-attention.
    assert 14 < per_block < 34
    assert call("inspect", "model=dit_xl_2", "format=json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"] == 674_834_720 and round(printed["gflops"], 2) == 118.64
    assert call("inspect", "model=wan_1_3b") == 0
    assert "GiB" in (told := capsys.readouterr().out) and "assumes one process" in told


def contents(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("form", ["folder", "shards", "pipeline"])
def test_wan_in_and_out(tmp_path: Path, form: str) -> None:
    """From a folder of diffusers, whole or in pieces, to an export, and back to the very same weights."""
    theirs = tiny_wan()
    source = tmp_path / "wan"
    inner = source / "transformer" if form == "pipeline" else source
    theirs.save_pretrained(inner, max_shard_size="20KB" if form == "shards" else "10GB")
    assert (len(list(inner.glob("*.safetensors"))) > 1) == (form == "shards")
    assert call("import", f"weights_from={source}", f"out={tmp_path / 'ours'}") == 0
    ours, contract = load_transformer(tmp_path / "ours")
    assert contract.vae_fingerprint is None and contract.weights == "imported"
    x, text = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 7, 10)
    expected = theirs(x, timestep=torch.tensor([500.0, 20.0]), encoder_hidden_states=text).sample
    out = ours(x, torch.tensor([0.5, 0.02]), Conditions(text=text))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert call("export", f"run={tmp_path / 'ours'}", "layout=diffusers", f"out={tmp_path / 'back'}") == 0
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "back")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert call("import", f"weights_from={tmp_path / 'back'}", f"out={tmp_path / 'twice'}") == 0
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()
    # an index of pieces would go on leading to them
    over = call("export", f"run={tmp_path / 'ours'}", "layout=diffusers", f"out={inner}")
    assert over == (2 if form == "shards" else 0)


def test_training_goes_on_from_wan(tiny: Tiny, tmp_path: Path) -> None:
    """A pipeline of diffusers gives the transformer and the text encoder; the run is exported for diffusers again."""
    pipeline = tmp_path / "pipeline"
    tiny_wan(text=16).save_pretrained(pipeline / "transformer")
    save_t5(pipeline / "text_encoder", umt5=True)
    (pipeline / "tokenizer").mkdir()
    for path in [*(pipeline / "text_encoder").glob("tokenizer*"), *(pipeline / "text_encoder").glob("special*")]:
        path.rename(pipeline / "tokenizer" / path.name)
    assert call("import", f"weights_from={pipeline}", f"out={tmp_path / 'wan'}") == 0
    model = ["model=wan_1_3b", "model.width=24", "model.depth=2", "model.heads=2", "model.text_features=16"]
    run = [*model, "model.mlp_ratio=1.6666666666666667", "model.num_classes=0", f"text_from={pipeline}", "run.steps=1"]
    words = ["train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={tmp_path}"]
    assert call(*words, *run, f"init_from={tmp_path / 'wan'}") == 0
    taken = json.loads((tmp_path / "tiny/init_from.json").read_text())
    # Wan's times are shifted by 5, and its VAE is another; a run is told.
    assert {row["name"] for row in taken if row["fate"] != "taken"} == {"diffusion.shift", "vae_from"}
    assert call("export", f"run={tmp_path / 'tiny'}", "layout=diffusers") == 0
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "tiny/diffusers")
    moved = [
        not torch.equal(tensor, again.state_dict()[name]) for name, tensor in tiny_wan(text=16).state_dict().items()
    ]
    assert any(moved)
    assert call("export", f"run={tmp_path / 'tiny'}") == 0
    made = f"out={tmp_path / 'clips'}"
    asked = ["generate", f"model_from={tmp_path / 'tiny'}", "prompts=[a dog]", "sampling.steps=1", made]
    assert call(*asked, f"text_from={pipeline}") == 0


def test_a_latte_that_was_trained_here(tiny: Tiny, tmp_path: Path) -> None:
    """Its description is of latents, however the VAE compresses."""
    text = save_t5(tmp_path / "t5")
    words = {
        "positions": "sincos", "qk_norm": "none", "gelu": "tanh", "attention": "factorised", "modulation": "shared",
        "cross_norm": "false", "text": "null", "num_classes": 0, "text_features": 16, "text_tokens": 16,
    }  # fmt: skip
    model = [f"model.{key}={value}" for key, value in words.items()]
    run = [f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={tmp_path}", f"text_from={text}"]
    assert call("train", "experiment=tiny", "run.steps=1", "run.validate_every=0", *run, *model) == 0
    assert call("export", f"run={tmp_path / 'tiny'}", "layout=diffusers") == 0
    assert call("export", f"run={tmp_path / 'tiny'}") == 0
    theirs = diffusers.LatteTransformer3DModel.from_pretrained(tmp_path / "tiny/diffusers").eval()
    ours, vae, contract = load_dit(tmp_path / "tiny")
    shape = vae.latent_shape(*contract.clip)
    assert (theirs.config.video_length, theirs.config.sample_size) == (shape[1], shape[2])
    x, features = torch.randn(2, *shape), torch.randn(2, 5, 16)
    expected = ours(x, torch.tensor([0.5, 0.02], dtype=torch.float64), Conditions(text=features))
    out = theirs(x, timestep=torch.tensor([500, 20]), encoder_hidden_states=features).sample
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * max(1e-3, expected.abs().max().item()))


def test_dit_in_and_out(tmp_path: Path) -> None:
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()  # fmt: skip
    theirs.transformer_blocks[1].norm1.emb = theirs.transformer_blocks[0].norm1.emb
    theirs.save_pretrained(tmp_path / "dit", safe_serialization=False)
    assert call("import", f"weights_from={tmp_path / 'dit'}", f"out={tmp_path / 'no'}") == 2  # not safetensors
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(weights, tmp_path / "dit/diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert call("import", f"weights_from={tmp_path / 'dit'}", f"out={tmp_path / 'ours'}") == 0
    assert load_transformer(tmp_path / "ours")[1].clip == [1, 64, 64]
    assert call("export", f"run={tmp_path / 'ours'}", "layout=diffusers", f"out={tmp_path / 'back'}") == 0
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back").eval()
    x, step, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 990]), torch.tensor([5, 1])
    assert torch.equal(again(x, step, label).sample, theirs(x, step, label).sample)
    back = contents(tmp_path / "back")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_file_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A `.pt` file with the names of the published ones; one that is more than tensors runs nothing."""
    from sora_lite.models.adapters import paper_entries, to_theirs
    from sora_lite.models.dit import VideoDiT
    from sora_lite.models.positions import sincos

    torch.manual_seed(0)
    with torch.device("cpu"):
        architecture = {
            "channels": 4, "width": 384, "depth": 1, "heads": 6, "num_classes": 3, "positions": "sincos",
            "qk_norm": "none", "gelu": "tanh", "learn_variance": True,
        }  # fmt: skip
        model = VideoDiT(**architecture, patch=(1, 2, 2))
    nn.init.normal_(model.final.out.weight)
    table = sincos((1, 16, 16), 384, torch.device("cpu"))[0][None]
    published = to_theirs(paper_entries(architecture | {"patch": [1, 2, 2]}), model.state_dict()) | {"pos_embed": table}
    assert {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.adaLN_modulation.1.bias"} <= set(
        published
    )
    torch.save(published, tmp_path / "dit.pt")
    assert call("import", f"weights_from={tmp_path / 'dit.pt'}", f"out={tmp_path / 'ours'}") == 0
    ours, contract = load_transformer(tmp_path / "ours")
    assert contract.clip == [1, 256, 256]
    x, given = torch.randn(1, 4, 1, 32, 32), Conditions(labels=torch.tensor([3]))
    time = torch.tensor([0.999], dtype=torch.float64)
    assert torch.equal(ours(x, time, given), model(x, time, given))

    # A checkpoint of the paper's training: averaged weights beside others, the optimizer's and plain arguments.
    raw = {name: tensor + 1 for name, tensor in published.items()}
    torch.save({"model": raw, "ema": published, "opt": {"step": 3}, "args": Namespace(lr=1e-4)}, tmp_path / "run.pt")
    assert call("import", f"weights_from={tmp_path / 'run.pt'}", f"out={tmp_path / 'averaged'}") == 0
    assert (tmp_path / "averaged/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()

    torch.save({name: tensor.bfloat16() for name, tensor in published.items()}, tmp_path / "half.pt")
    assert call("import", f"weights_from={tmp_path / 'half.pt'}", f"out={tmp_path / 'half'}") == 0

    capsys.readouterr()
    kernel = "x_embedder.proj.weight"
    for name, saved, says in (
        ("code.pt", published | {"a": Path("a")}, "pathlib"),
        ("list.pt", [published], "holds a list"),
        ("nested.pt", {"weights": published}, "state_dict() alone"),
        ("moved.pt", published | {"pos_embed": table + 0.1}, "sines and cosines"),
        ("other.pt", {"a": torch.zeros(1)}, "not those of the paper's DiT"),
        ("flat.pt", {kernel: published[kernel].flatten(1)}, "other names or shapes"),
        ("short.pt", published | {"blocks.0.mlp.fc2.bias": torch.zeros(3)}, "mlp.2.bias (our name) is [3]"),
    ):
        torch.save(saved, tmp_path / name)
        assert call("import", f"weights_from={tmp_path / name}", f"out={tmp_path / 'no'}") == 2
        error = capsys.readouterr().err
        assert says in error and name in error and error.count("\n") == 1
    assert call("import", f"weights_from={tmp_path / 'dit.pt'}", f"out={tmp_path / 'no'}", "heads=7") == 2
    assert "heads of a DiT of width 384 is not 7; set heads" in capsys.readouterr().err
    for rubbish in (b"rubbish", b""):
        (tmp_path / "dit.pt").write_bytes(rubbish)
        assert call("import", f"weights_from={tmp_path / 'dit.pt'}", f"out={tmp_path / 'no'}") == 2
        assert "is damaged, or no .pt file" in capsys.readouterr().err
    assert call("import", f"weights_from={tmp_path / 'absent.pt'}", f"out={tmp_path / 'no'}") == 2
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_wan().save_pretrained(tmp_path / "wan")
    config = json.loads((tmp_path / "wan/config.json").read_text())
    for change, says in (
        ({"_class_name": "UNet"}, "cannot be imported"),
        ({"image_dim": 5}, "image_dim=5 is not supported"),
        ({"num_layers": None}, "config.json: lacks 'num_layers'"),
        ({"num_layers": 3}, "the weights lack blocks.2."),
        ({"attention_head_dim": 0}, "config.json: is of no model"),
        ({"patch_size": 2}, "config.json: is of no model"),
        ({"ffn_dim": 48}, "and should be [48"),
        ({"_class_name": "LatteTransformer3DModel"}, "config.json"),
    ):
        changed = {key: value for key, value in (config | change).items() if value is not None}
        (tmp_path / "wan/config.json").write_text(json.dumps(changed))
        assert call("import", f"weights_from={tmp_path / 'wan'}", f"out={tmp_path / 'no'}") == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    (tmp_path / "wan/config.json").write_text(json.dumps(config))
    assert call("generate", f"model_from={tmp_path / 'wan'}", "prompts=[a]", f"out={tmp_path / 'clips'}") == 2
    assert f"`sora-lite import weights_from={tmp_path / 'wan'} out=...`" in capsys.readouterr().err
    assert call("train", "experiment=tiny", "data.shards=none", f"vae_from={tmp_path / 'wan'}") == 2
    assert "VAEs of others are not read" in capsys.readouterr().err
    assert call("import", f"weights_from={tmp_path / 'wan'}", f"out={tmp_path / 'no'}", "heads=2") == 2
    assert "heads: is for a .pt file" in capsys.readouterr().err
    weights = load_file(tmp_path / "wan/diffusion_pytorch_model.safetensors")
    spoilt = weights | {"proj_out.bias": weights["proj_out.bias"] + math.nan}
    save_file(spoilt, tmp_path / "wan/diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert call("import", f"weights_from={tmp_path / 'wan'}", f"out={tmp_path / 'no'}") == 2
    assert "final.out.bias (our name) holds numbers that are not finite" in capsys.readouterr().err
    save_file(weights, tmp_path / "wan/diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert call("import", f"weights_from={tmp_path / 'wan'}", f"out={tmp_path / 'ours'}") == 0
    assert call("generate", f"model_from={tmp_path / 'ours'}", "prompts=[a]", f"out={tmp_path / 'clips'}") == 2
    assert "its VAE is none of this project" in capsys.readouterr().err
