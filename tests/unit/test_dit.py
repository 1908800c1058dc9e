import math
from dataclasses import replace

import pytest
import torch

from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.layers import SelfAttention, TimestepEmbedding
from sora_lite.models.patch import patchify, token_grid, unpatchify
from sora_lite.models.rope import axis_split, rotate, rotation
from sora_lite.models.text import BEGIN, PAD, ByteTextEncoder, tokenize
from sora_lite.parallel.apply import apply_activation_checkpointing

TEXT = {"width": 16, "depth": 1, "heads": 2, "max_bytes": 12}


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


def test_starts_as_zero_and_the_identity() -> None:
    torch.manual_seed(0)
    model = VideoDiT(channels=4, width=24, depth=2, heads=2, num_classes=3, text=TEXT)
    latent, time, given = inputs()
    assert model(latent, time, given).abs().max() == 0
    x, condition = torch.randn(3, 18, 24), torch.randn(3, 24)
    features, real = model.text(given.text)
    rope = rotation((3, 2, 3), 12, 1e4, x.device)
    assert torch.equal(model.blocks[0](x, condition, rope, features, real[:, None, None]), x)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 4), (5, 2, 8), (3, 8, 2), (9, 6, 4)])
def test_one_model_takes_any_shape(shape: tuple[int, int, int]) -> None:
    latent, time, given = inputs(2, *shape)
    assert make()(latent, time, given).shape == latent.shape


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


def test_rope_equals_complex_rotation_and_is_relative() -> None:
    assert axis_split(128) == (44, 42, 42)  # as in Wan
    assert axis_split(64) == (24, 20, 20)
    grid, head = (4, 3, 5), 24
    cos, sin = rotation(grid, head, 10_000.0, torch.device("cpu"))
    x = torch.randn(1, 1, 60, head)
    positions = [(t, h, w) for t in range(4) for h in range(3) for w in range(5)]
    for n, position in enumerate(positions):
        angles = [
            p * 10_000.0 ** (-2 * i / d) for p, d in zip(position, axis_split(head), strict=True) for i in range(d // 2)
        ]
        turn = torch.polar(torch.ones(head // 2), torch.tensor(angles))
        expected = torch.view_as_real(torch.view_as_complex(x[0, 0, n].view(-1, 2)) * turn).flatten()
        torch.testing.assert_close(rotate(x, cos, sin)[0, 0, n], expected, rtol=1e-4, atol=1e-5)
    q, k = torch.randn(head), torch.randn(head)
    score = rotate(q.expand(1, 1, 60, head), cos, sin)[0, 0] @ rotate(k.expand(1, 1, 60, head), cos, sin)[0, 0].T
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


def test_size_of_the_papers_presets() -> None:
    """Without text and labels a block has 18 D^2 + 15 D parameters besides two RMS gains of a head's width."""
    with torch.device("meta"):
        for width, depth, heads in ((384, 12, 6), (1152, 28, 16)):
            model = VideoDiT(channels=4, width=width, depth=depth, heads=heads)
            block = sum(p.numel() for p in model.blocks[0].parameters())
            assert block == 18 * width**2 + 15 * width + 2 * (width // heads)
            assert len(model.blocks) == depth


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
