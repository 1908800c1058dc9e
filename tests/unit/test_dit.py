import functools
import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.layers import SelfAttention, TimestepEmbedding
from sora_lite.models.patch import patchify, token_grid, unpatchify
from sora_lite.models.positions import Scaling, axis_split, rotate, rotation, sincos
from sora_lite.models.text import BEGIN, PAD, ByteTextEncoder, tokenize
from sora_lite.parallel.apply import apply_activation_checkpointing

TEXT = {"width": 16, "depth": 1, "heads": 2, "max_bytes": 12}
FEATURES = {"text": None, "text_features": 10}
PAPER = {"text": None, "positions": "sincos", "qk_norm": "none", "gelu": "tanh", "learn_variance": True}
WAN = {
    **FEATURES,
    "num_classes": 0,
    "text_tokens": 5,
    "pad_text": True,
    "qk_norm": "full",
    "modulation": "shared",
    "gelu": "tanh",
}
LATTE = {**FEATURES, "num_classes": 0, "positions": "sincos", "attention": "factorised", "qk_norm": "none",
         "modulation": "shared", "gelu": "tanh", "cross_norm": False}  # fmt: skip
MODELS = {
    "ours": {},
    "paper": PAPER,
    "wan": WAN,
    "latte": LATTE,
    "factorised": {"attention": "factorised"},
    "joint": {"text_attention": "joint"},
    "joint, features": {**FEATURES, "text_attention": "joint", "modulation": "shared", "pooled_features": 7},
    "frames": {"frame_conditions": True},
}
"""Kinds of model, by the arguments in which they differ from ours."""


def make(**changes) -> VideoDiT:
    torch.manual_seed(0)
    arguments = {"channels": 4, "width": 24, "depth": 2, "heads": 2, "num_classes": 3, "text": TEXT} | changes
    model = VideoDiT(**arguments).eval()
    for parameter in model.parameters():  # at the start everything is gated off
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 3, frames: int = 3, height: int = 4, width: int = 6):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 4, frames, height, width, generator=generator),
        torch.rand(batch, generator=generator),
        Conditions(labels=torch.arange(batch) % 4, text=tokenize(["a cat", "", "two dogs run"][:batch], 12)),
    )


def conditions_for(model: VideoDiT, batch: int = 3, frames: int = 3) -> Conditions:
    """Conditions for whatever a model reads; the texts of a batch are 3, 0, 4, ... tokens long."""
    generator = torch.Generator().manual_seed(2)
    given: dict[str, torch.Tensor] = {}
    if model.num_classes:
        given["labels"] = torch.arange(batch) % 4
    if isinstance(model.text, ByteTextEncoder):
        given["text"] = tokenize(["a cat", "", "two dogs run"][:batch], 12)
    elif model.text is not None:
        given["text"] = torch.randn(batch, 4, 10, generator=generator)
        given["text_mask"] = torch.arange(4) < torch.tensor([3, 0, 4])[:batch, None]
    if model.pooled_features:
        given["pooled"] = torch.randn(batch, 7, generator=generator)
    if model.embed_frames is not None:
        given["frames"] = torch.randn(batch, 4, frames, 4, 6, generator=generator)
        given["frame_mask"] = (torch.arange(frames) == 0).float().view(1, 1, -1, 1, 1).repeat(batch, 1, 1, 1, 1)
    return Conditions(**given)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_starts_at_zero_and_all_of_it_learns(kind: str) -> None:
    torch.manual_seed(0)
    fresh = VideoDiT(
        **{"channels": 4, "width": 24, "depth": 4, "heads": 2, "num_classes": 3, "text": TEXT} | MODELS[kind]
    )
    latent, time, _ = inputs()
    assert fresh(latent, time, conditions_for(fresh)).abs().max() == 0
    model = make(depth=4, **MODELS[kind])
    given = conditions_for(model)
    out = model(latent, time, given)
    assert out.shape == (3, 8 if kind == "paper" else 4, 3, 4, 6)
    out.square().mean().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not still
    # What a joint block's last text queries ask, nobody hears; all else moves the prediction.
    deaf = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert all(name.startswith("blocks.3.text.attention.norm_q") for name in deaf)


@pytest.mark.parametrize("kind", MODELS)
def test_samples_do_not_mix(kind: str) -> None:
    """A permuted batch gives permuted predictions."""
    model = make(**MODELS[kind])
    latent, time, _ = inputs()
    given, order = conditions_for(model), torch.tensor([2, 0, 1])
    out = model(latent, time, given)
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    permuted = Conditions(**{name: None if value is None else value[order] for name, value in values.items()})
    torch.testing.assert_close(model(latent[order], time[order], permuted), out[order], rtol=1e-4, atol=1e-5)
    assert (out[0] - out[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["wan", "latte", "joint, features"])
def test_padding_of_features_changes_nothing(kind: str) -> None:
    """Neither how much there is, nor what is in it; not even for a text without a token."""
    model = make(**MODELS[kind])
    latent, time, _ = inputs()
    given = conditions_for(model)
    out = model(latent, time, given)
    noise = torch.where(given.text_mask[..., None], given.text, 1e3 * torch.randn_like(given.text))
    torch.testing.assert_close(model(latent, time, replace(given, text=noise)), out, rtol=1e-5, atol=1e-5)
    more = replace(
        given, text=torch.nn.functional.pad(noise, (0, 0, 0, 1), value=7.0),
        text_mask=torch.nn.functional.pad(given.text_mask, (0, 1)),
    )  # fmt: skip
    torch.testing.assert_close(model(latent, time, more), out, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(out).all()
    changed = model(latent, time, replace(given, text=given.text + given.text_mask[..., None] * 0.5))
    difference = (changed - out).abs().flatten(1).amax(1)
    assert difference[0] > 1e-4 and difference[2] > 1e-4 and difference[1] < 1e-5
    silent = replace(given, text_mask=torch.zeros_like(given.text_mask))
    none = replace(given, text=given.text[:, :0], text_mask=given.text_mask[:, :0])
    torch.testing.assert_close(model(latent, time, none), model(latent, time, silent), rtol=1e-5, atol=1e-5)
    if kind == "wan":
        with pytest.raises(ValueError, match="at most 5"):
            model(latent, time, more.cat(replace(more, text=torch.randn(3, 6, 10), text_mask=torch.ones(3, 6).bool())))


def test_features_come_in_any_precision() -> None:
    """Encoders give fp32; under bf16 the model's own layers decide."""
    model = make(**MODELS["joint, features"])
    latent, time, _ = inputs()
    given = conditions_for(model)
    expected = model(latent, time, given)
    out = model.bfloat16()(latent.bfloat16(), time, given)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_given_frames_start_without_effect_and_none_is_zero() -> None:
    torch.manual_seed(0)
    model = VideoDiT(channels=4, width=24, depth=1, heads=2, num_classes=3, text=None, frame_conditions=True)
    assert model.embed_frames.weight.abs().max() == 0
    model = make(frame_conditions=True)
    latent, time, _ = inputs()
    given = conditions_for(model)
    nothing = replace(given, frames=torch.zeros_like(latent), frame_mask=torch.zeros(3, 1, 3, 1, 1))
    without = model(latent, time, replace(given, frames=None, frame_mask=None))
    assert torch.equal(model(latent, time, nothing), without)
    assert (model(latent, time, given) - without).abs().max() > 1e-3
    # That a frame is given counts, also where it is all zeros.
    black = model(latent, time, replace(nothing, frame_mask=given.frame_mask))
    assert (black - without).abs().max() > 1e-3


def test_what_the_model_reads_must_be_there() -> None:
    latent, time, given = inputs()
    for missing in ("labels", "text"):
        with pytest.raises(ValueError, match=f"reads `{missing}`"):
            make()(latent, time, replace(given, **{missing: None}))
    with pytest.raises(ValueError, match="joint"):
        make(text_attention="joint", text=None)
    with pytest.raises(ValueError, match="not both"):
        make(text_features=3)
    with pytest.raises(ValueError, match="7 wide"):
        model = make(**WAN)
        model(latent, time, Conditions(text=torch.zeros(3, 2, 7), text_mask=torch.ones(3, 2).bool()))


def test_starts_as_zero_and_the_identity() -> None:
    torch.manual_seed(0)
    model = VideoDiT(channels=4, width=24, depth=2, heads=2, num_classes=3, text=TEXT)
    latent, time, given = inputs()
    assert model(latent, time, given).abs().max() == 0
    x, condition = torch.randn(3, 18, 24), torch.randn(3, 24)
    features, real = model.text(given.text)
    rope = rotation((3, 2, 3), 12, 1e4, x.device)
    assert torch.equal(model.blocks[0](x, condition, rope, (3, 2, 3), features, real[:, None, None]), x)


def test_the_papers_initialisation() -> None:
    """Uniform (Xavier) but for what the paper's code excepts; zeros where nothing is to start."""
    torch.manual_seed(0)
    model = VideoDiT(**{"channels": 4, "width": 192, "depth": 2, "heads": 3, "num_classes": 1000} | PAPER)
    for name, parameter in model.named_parameters():
        fan_out, fan_in = parameter.shape if parameter.ndim == 2 else (0, 0)
        if "modulation" in name or name.startswith("final.out") or (name.endswith("bias") and name != "embed.bias"):
            assert parameter.abs().max() == 0, name
            continue
        bound = 16**-0.5 if name == "embed.bias" else math.sqrt(6 / max(fan_in + fan_out, 1))
        if name.startswith(("embed_label", "embed_time")):  # normal
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
        else:
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert 0.9 * bound < parameter.abs().max() <= bound, name


@pytest.mark.parametrize("kind", ["ours", "factorised", "latte", "joint"])
def test_one_model_trains_on_many_shapes(kind: str) -> None:
    """Clips of 1, 5, 17 and 33 frames (1, 2, 5 and 9 latent frames) at 4 aspect ratios, in turns."""
    model = make(**MODELS[kind])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shapes = list(itertools.product((1, 2, 5, 9), ((4, 4), (2, 8), (8, 2), (4, 6))))
    first: dict = {}
    for _ in range(12):
        for frames, (height, width) in shapes:
            latent, time, _ = inputs(2, frames, height, width)
            out = model(latent, time, conditions_for(model, 2, frames))
            loss = (out - latent).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            first.setdefault((frames, height, width), loss.item())
            assert loss.item() < 10
    with torch.no_grad():
        for shape, before in first.items():
            latent, time, _ = inputs(2, *shape)
            assert (model(latent, time, conditions_for(model, 2, shape[0])) - latent).square().mean() < 0.6 * before


@pytest.mark.parametrize("kind", ["factorised", "latte"])
def test_factorised_attention_reaches_all_tokens_in_two_blocks(kind: str) -> None:
    """One block within a frame, one along time: after the first a frame has seen itself only."""
    model = make(depth=2, **MODELS[kind])
    latent, time, _ = inputs(1)
    given = conditions_for(model, 1)
    changed = latent.clone()
    changed[:, :, 0, :2, :2] += 1  # one token
    seen = []
    model.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    one, other = model(latent, time, given), model(changed, time, given)
    frames = (seen[0] - seen[1]).abs().amax(-1).view(3, 6) > 1e-6
    assert frames.tolist() == [[True] * 6, [False] * 6, [False] * 6]
    assert ((one - other).abs().amax(1) > 0).all()


def test_positions_beyond_training_are_brought_back() -> None:
    plain = functools.partial(rotation, head_width=24, theta=1e4, device=torch.device("cpu"))
    trained, larger = (2, 4, 4), (2, 8, 12)
    linear = plain(larger, scaling=Scaling(method="linear", grid=trained)).view(2, 8, 12, 12, 2)
    inside = plain(trained).view(2, 4, 4, 12, 2)
    torch.testing.assert_close(linear[:, ::2, ::3], inside)  # every second row and third column is a trained place
    turns = plain(larger, scaling=Scaling(method="ntk", grid=trained))
    angle = torch.view_as_complex(turns).angle().view(2, 8, 12, 12)
    assert angle[0, 1, 0, 4].item() == pytest.approx(1.0)  # the first frequency of rows is as before
    lowest = 1e4 ** (-6 / 8)  # the last one of four is divided by the factor, 2
    assert angle[0, 1, 0, 7].item() == pytest.approx(lowest / 2, rel=1e-5)
    for method in ("linear", "ntk"):  # nothing changes within what was trained
        assert torch.equal(plain((1, 3, 4), scaling=Scaling(method=method, grid=trained)), plain((1, 3, 4)))
    place, _ = sincos((1, 8, 4), 16, torch.device("cpu"), Scaling(method="linear", grid=(1, 4, 4)))
    torch.testing.assert_close(place.view(8, 4, 16)[::2], sincos((1, 4, 4), 16, torch.device("cpu"))[0].view(4, 4, 16))


def test_rope_makes_the_model_blind_to_where_everything_is_shifted() -> None:
    """Attention by differences of positions: rotating all tokens by the same offset changes no prediction."""
    model = make()
    latent, time, given = inputs()
    out = model(latent, time, given)
    whole = rotation((5, 4, 7), 12, 1e4, torch.device("cpu"))
    shifted = whole.view(5, 4, 7, 6, 2)[2:, 2:, 4:].reshape(-1, 6, 2)  # a grid of 3, 2, 3
    model._place = lambda x, grid: (x, shifted, None)
    torch.testing.assert_close(model(latent, time, given), out, rtol=1e-4, atol=1e-5)
    model._place = lambda x, grid: (x, shifted[torch.randperm(18)], None)
    assert (model(latent, time, given) - out).abs().max() > 1e-4


def test_every_condition_matters_and_samples_do_not_mix() -> None:
    model = make()
    latent, time, given = inputs()
    out = model(latent, time, given)
    for changed in (
        model(latent + 0.1, time, given),
        model(latent, time + 0.1, given),
        model(latent, time, replace(given, labels=(given.labels + 1) % 4)),
        model(latent, time, replace(given, text=tokenize(["a bat", "x", "two dogs sit"], 12))),
    ):
        assert ((changed - out).abs().flatten(1).max(1).values > 1e-4).all()
    order = torch.tensor([2, 0, 1])
    permuted = Conditions(labels=given.labels[order], text=given.text[order])
    torch.testing.assert_close(model(latent[order], time[order], permuted), out[order])


def test_padding_of_text_changes_nothing() -> None:
    model = make()
    latent, time, given = inputs()
    cat = Conditions(labels=given.labels[:1], text=tokenize(["a cat"], 12))
    alone = model(latent[:1], time[:1], cat)
    together = model(latent, time, given)[:1]
    assert given.text.shape[1] > cat.text.shape[1]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_tokenize() -> None:
    assert tokenize(["ab", ""], 8).tolist() == [[BEGIN, 2 + 97, 2 + 98], [BEGIN, PAD, PAD]]
    assert tokenize(["é" * 9], 4).shape == (1, 5)
    with torch.no_grad():
        features, mask = ByteTextEncoder(**TEXT)(tokenize(["", "ab"], 12))
    assert features.shape == (2, 3, 16)
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_patches_invert_and_follow_frames_then_rows() -> None:
    latent = torch.arange(2 * 3 * 4 * 6.0).view(1, 2, 3, 4, 6)
    grid = token_grid((3, 4, 6), (1, 2, 2))
    tokens = patchify(latent, (1, 2, 2))
    assert grid == (3, 2, 3)
    assert tokens.shape == (1, 18, 8)
    # token 4 is frame 0, row 1, column 1; its features are the cells (row by row), channels innermost
    assert tokens[0, 4].tolist() == latent[0, :, 0, 2:4, 2:4].permute(1, 2, 0).flatten().tolist()
    assert torch.equal(unpatchify(tokens, grid, (1, 2, 2)), latent)
    with pytest.raises(ValueError, match="do not divide"):
        token_grid((3, 4, 5), (1, 2, 2))


def test_rope_turns_pairs_of_channels_and_is_relative() -> None:
    assert axis_split(128) == (44, 42, 42)  # as in Wan
    assert axis_split(64) == (24, 20, 20)
    grid, head = (4, 3, 5), 24
    turns = rotation(grid, head, 10_000.0, torch.device("cpu"))
    x = torch.randn(1, 60, 1, head)
    positions = [(t, h, w) for t in range(4) for h in range(3) for w in range(5)]
    for n, position in enumerate(positions):
        angles = [
            p * 10_000.0 ** (-2 * i / d) for p, d in zip(position, axis_split(head), strict=True) for i in range(d // 2)
        ]
        cos, sin = torch.tensor(angles).cos(), torch.tensor(angles).sin()
        even, odd = x[0, n, 0, 0::2], x[0, n, 0, 1::2]
        expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten()
        torch.testing.assert_close(rotate(x, turns)[0, n, 0], expected, rtol=1e-4, atol=1e-5)
    q, k = torch.randn(head), torch.randn(head)
    score = rotate(q.expand(1, 60, 1, head), turns)[0, :, 0] @ rotate(k.expand(1, 60, 1, head), turns)[0, :, 0].T
    a, b = positions.index((0, 1, 2)), positions.index((1, 0, 4))
    c, d = positions.index((2, 2, 0)), positions.index((3, 1, 2))  # the same difference, elsewhere
    torch.testing.assert_close(score[a, b], score[c, d], rtol=1e-4, atol=1e-4)


def test_attention_equals_torchs_own_without_norm_and_rope() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(24, 3)
    ours.norm_q, ours.norm_k = torch.nn.Identity(), torch.nn.Identity()
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 7, 24)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    expected, _ = theirs(x, x, x, key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask=mask[:, None, None]), expected, rtol=1e-4, atol=1e-5)


def test_time_embedding_is_the_papers_on_thousandths() -> None:
    embedding = TimestepEmbedding(8)
    seen = []
    embedding.mlp = torch.nn.Sequential(torch.nn.Linear(256, 1))
    embedding.mlp[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    embedding(torch.tensor([0.25]))
    assert seen[0][0, 0].item() == pytest.approx(math.cos(250.0), abs=1e-4)
    assert seen[0][0, 128 + 64].item() == pytest.approx(math.sin(250.0 * 10_000**-0.5), abs=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    latent, time, given = inputs()
    gradients = []
    for recompute in (False, True):
        model = make()
        if recompute:
            apply_activation_checkpointing(model)
        model(latent, time, given).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name
