"""`VideoDiT` is the models that others published: outputs and gradients equal theirs, from their own weights.

References are diffusers' classes, and the paper's model written down here once more.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lite.models.adapters import (
    ENTRIES,
    architecture_of,
    check_positions,
    config_of,
    paper_architecture,
    to_ours,
    to_theirs,
)
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value."""


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


class PaperBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class PaperDiT(nn.Module):
    """Peebles & Xie's model from their text and figures 3 and 4, under the names of their published files."""

    def __init__(self, side: int, patch: int, channels: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patch, self.channels, self.heads = patch, channels, heads
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(PaperBlock(width) for _ in range(depth))
        out = nn.Linear(width, patch * patch * 2 * channels)
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict({"linear": out, "adaLN_modulation": modulation})
        tokens, quarter = side // patch, width // 4
        table = torch.zeros(tokens, tokens, width)
        omega = 10000.0 ** -(torch.arange(quarter).double() / quarter)
        for row in range(tokens):
            for column in range(tokens):
                c, r = column * omega, row * omega
                table[row, column] = torch.cat([c.sin(), c.cos(), r.sin(), r.cos()])
        self.pos_embed = nn.Parameter(table.view(1, -1, width), requires_grad=False)

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        rows = x.shape[2] // self.patch
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        angle = step[:, None].float() * 10000.0 ** -(torch.arange(128) / 128)
        condition = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], 1))
        condition = condition + self.y_embedder["embedding_table"](label)
        for block in self.blocks:
            parts = block.adaLN_modulation(condition)[:, None].chunk(6, -1)
            h = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + parts[1]) + parts[0]
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in block.attn["qkv"](h).chunk(3, -1)
            )
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            tokens = tokens + parts[2] * block.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
            h = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + parts[4]) + parts[3]
            tokens = tokens + parts[5] * block.mlp["fc2"](F.gelu(block.mlp["fc1"](h), approximate="tanh"))
        shift, scale = self.final_layer["adaLN_modulation"](condition)[:, None].chunk(2, -1)
        h = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        out = self.final_layer["linear"](h).view(len(x), rows, rows, self.patch, self.patch, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])


def paper(depth: int) -> tuple[PaperDiT, dict[str, Any], list[Tensor]]:
    model = PaperDiT(side=8, patch=2, channels=4, width=24, depth=depth, heads=3, classes=5)
    architecture = paper_architecture(model.state_dict(), heads=3)
    return model, architecture, [torch.randn(2, 4, 8, 8), torch.tensor([999, 3]), torch.tensor([5, 2])]


def dit(depth: int) -> tuple[Any, dict[str, Any], list[Tensor]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=depth, sample_size=8,
        num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    for block in model.transformer_blocks:  # as in the published weights, which have them once
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    return model, architecture_of("dit", model.config), paper(1)[2]


def latte(depth: int) -> tuple[Any, dict[str, Any], list[Tensor]]:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=depth, sample_size=8,
        patch_size=2, cross_attention_dim=24, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=10, video_length=3,
    ).eval()  # fmt: skip
    inputs = [torch.randn(2, 4, 3, 8, 8), torch.tensor([999, 3]), torch.randn(2, 5, 10)]
    return model, architecture_of("latte", model.config), inputs


def wan(depth: int) -> tuple[Any, dict[str, Any], list[Tensor]]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=10, ffn_dim=40,
        num_layers=depth, cross_attn_norm=True, eps=1e-6,
    ).eval()  # fmt: skip
    inputs = [torch.randn(2, 4, 3, 6, 8), torch.tensor([999.0, 31.5]), torch.randn(2, 5, 10)]
    return model, architecture_of("wan", model.config), inputs


KINDS = {"paper": paper, "dit": dit, "latte": latte, "wan": wan}
FULL_DEPTH = {"paper": 28, "dit": 28, "latte": 28, "wan": 30}


def ask_theirs(kind: str, model: Any, x: Tensor, step: Tensor, told: Tensor) -> Tensor:
    if kind == "paper":
        return model(x, step, told)
    if kind == "dit":
        return model(x, step, told).sample
    return model(x, timestep=step, encoder_hidden_states=told).sample


def ask_ours(kind: str, model: VideoDiT, x: Tensor, step: Tensor, told: Tensor) -> Tensor:
    given = Conditions(labels=told) if kind in ("paper", "dit") else Conditions(text=told)
    image = x.ndim == 4
    out = model(x.unsqueeze(2) if image else x, step.double() / 1000, given)
    return out.squeeze(2) if image else out


@pytest.mark.parametrize(
    ("kind", "depth"), [*((kind, 2) for kind in KINDS), *((kind, FULL_DEPTH[kind]) for kind in KINDS)]
)
def test_outputs_and_gradients_are_theirs(kind: str, depth: int) -> None:
    torch.manual_seed(0)
    theirs, architecture, inputs = KINDS[kind](depth)
    entries = ENTRIES[kind](architecture)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "pos_embed"}
    ours = VideoDiT(**architecture)
    ours.load_state_dict(to_ours(entries, weights))
    expected, out = ask_theirs(kind, theirs, *inputs), ask_ours(kind, ours, *inputs)
    assert out.shape == expected.shape and difference(out, expected) < TOLERANCE
    wanted = torch.randn_like(out)
    for prediction in (expected, out):
        (prediction - wanted).square().mean().backward()
    gradients = {name: one.grad for name, one in theirs.named_parameters(remove_duplicate=False) if one.requires_grad}
    gradients = to_ours(entries, gradients)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max()
        assert error <= TOLERANCE * max(gradients[name].abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_are_bitwise(kind: str) -> None:
    theirs, architecture, _ = KINDS[kind](3)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "pos_embed"}
    entries = ENTRIES[kind](architecture)
    ours = to_ours(entries, weights)
    again = to_theirs(entries, ours)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    twice = to_ours(entries, again)
    assert twice.keys() == ours.keys() and all(torch.equal(twice[name], ours[name]) for name in ours)
    assert {name: one.shape for name, one in VideoDiT(**architecture).state_dict().items()} == {
        name: one.shape for name, one in ours.items()
    }
    if kind != "paper":
        config = config_of(kind, architecture, (1 if kind == "dit" else 3, 8, 8))
        assert {key: value for key, value in config.items() if theirs.config.get(key, value) != value} in (
            {}, {"norm_eps": 1e-6}, {"patch_size": [1, 2, 2]},
        )  # fmt: skip
        assert architecture_of(kind, config) == architecture


def test_latte_reads_images_and_layers_without_biases() -> None:
    theirs, architecture, (x, step, text) = latte(1)
    bare = {name for name, _ in theirs.named_parameters() if name.endswith(("to_q.bias", "to_k.bias", "to_v.bias"))}
    for name in bare:
        nn.init.zeros_(theirs.get_parameter(name))
    weights = {name: one for name, one in theirs.state_dict().items() if name not in bare}
    ours = VideoDiT(**architecture)
    ours.load_state_dict(to_ours(ENTRIES["latte"](architecture), weights))
    still = x[:, :, :1]
    expected = ask_theirs("latte", theirs, still, step, text)
    assert difference(ask_ours("latte", ours, still, step, text), expected) < TOLERANCE


def test_wans_text_is_padded_to_512_with_zeros() -> None:
    theirs, architecture, (x, step, text) = wan(1)
    ours = VideoDiT(**architecture)
    ours.load_state_dict(to_ours(ENTRIES["wan"](architecture), theirs.state_dict()))
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    padded = F.pad(text * mask[..., None], (0, 0, 0, 507))
    expected = ask_theirs("wan", theirs, x, step, padded)
    assert difference(ours(x, step.double() / 1000, Conditions(text=text, text_mask=mask)), expected) < TOLERANCE


def test_what_is_another_model_is_refused() -> None:
    model, architecture, _ = wan(1)
    weights = model.state_dict()
    entries = ENTRIES["wan"](architecture)
    with pytest.raises(ValueError, match="lack proj_out"):
        to_ours(entries, {name: one for name, one in weights.items() if name != "proj_out.weight"})
    with pytest.raises(ValueError, match="have extra, which"):
        to_ours(entries, weights | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="image_dim=1280 is not supported"):
        architecture_of("wan", dict(model.config) | {"image_dim": 1280})
    with pytest.raises(ValueError, match="WanTransformer3DModel has qk_norm=full, this model head"):
        config_of("wan", architecture | {"qk_norm": "head"}, (3, 8, 8))
    untied = copy.deepcopy(dit(2)[0])
    untied.transformer_blocks[1].norm1.emb = copy.deepcopy(untied.transformer_blocks[0].norm1.emb)
    nn.init.normal_(untied.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    with pytest.raises(ValueError, match="differs from its copies"):
        to_ours(ENTRIES["dit"](architecture_of("dit", untied.config)), untied.state_dict())
    with pytest.raises(ValueError, match="heads"):
        paper_architecture(paper(1)[0].state_dict())
    with pytest.raises(ValueError, match="lack"):
        paper_architecture(weights)
    with pytest.raises(ValueError, match=r"patch_embedding.weight has patches of \[1, 2, 2\], not \[1, 1, 4\]"):
        to_ours(ENTRIES["wan"](architecture | {"patch": [1, 1, 4]}), weights)
    for kind in ("dit", "latte"):
        config = dict(KINDS[kind](1)[0].config)
        with pytest.raises(ValueError, match=r"norm_eps=0\.1 is not supported"):
            architecture_of(kind, config | {"norm_eps": 0.1})
        for key in ("num_layers", "sample_size", "num_attention_heads"):
            for value in (None, 0, "2", [8, 8]):
                with pytest.raises(ValueError, match=f"{key}=.* is no positive whole number"):
                    architecture_of(kind, config | {key: value})
        with pytest.raises(ValueError, match="is of squares, and the clips are of 8 x 16 cells"):
            config_of(kind, KINDS[kind](1)[1], (1, 8, 16))
    with pytest.raises(ValueError, match="is of stills, and the clips have 5 latent frames"):
        config_of("dit", KINDS["dit"](1)[1], (5, 8, 8))
    table = paper(1)[0].pos_embed
    width = table.shape[2]
    check_positions(table, width)
    for wrong, of_width in ((table + 0.01, width), (table, width + 4), (table[0], width), (table[:, :0], width)):
        with pytest.raises(ValueError, match="sines and cosines"):
            check_positions(wrong, of_width)
