"""A training step (forward and backward) of our default video DiT against diffusers' video transformers.

One thread, CPU time. All have one width, depth, number of heads and of tokens, and as many text tokens. They differ in
how many operations they make of that, so what is compared is operations per second: a forward pass counted three times,
since a backward pass is two of it. A large matrix product in the same process is 1.00.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.text import tokenize
from sora_lite.training.metrics import count_flops

WIDTH, HEADS, DEPTH, CHANNELS = 384, 6, 4, 16
FRAMES, SIDE = 5, 32
"""Of the latent: 5 x 16 x 16 = 1,280 tokens."""
TEXT_TOKENS, TEXT_WIDTH = 64, 128
SGEMM_SIDE = 1536
ROUNDS = 5


@dataclass(kw_only=True, slots=True, frozen=True)
class Candidate:
    """A model, the list of its blocks, and its forward pass on fixed inputs that are made on a device."""

    model: nn.Module
    blocks: nn.ModuleList
    forward: Callable[[nn.Module, torch.device], Tensor]


def latent(device: torch.device) -> Tensor:
    """Fixed noise, 1 C T H W."""
    return torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)


def text(device: torch.device) -> Tensor:
    """Fixed text features, 1 M C_text."""
    return torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


def ours() -> Candidate:
    """The default of `DiTConfig` in this depth: 3-D RoPE, QK-norm, bytes by cross-attention."""
    encoder = {"width": TEXT_WIDTH, "depth": 2, "heads": 4, "max_bytes": TEXT_TOKENS}
    model = VideoDiT(channels=CHANNELS, width=WIDTH, depth=DEPTH, heads=HEADS, text=encoder)
    prompt = tokenize(["x" * (TEXT_TOKENS - 1)], TEXT_TOKENS)

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        return model(latent(device), torch.full((1,), 0.5, device=device), Conditions(text=prompt.to(device)))

    return Candidate(model=model, blocks=model.blocks, forward=forward)


def wan() -> Candidate:
    """Wan2.1's model."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, ffn_dim=4 * WIDTH, num_layers=DEPTH,
    )  # fmt: skip

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        return model(latent(device), torch.full((1,), 500, device=device), text(device)).sample

    return Candidate(model=model, blocks=model.blocks, forward=forward)


def ltx() -> Candidate:
    """LTX-Video's model, which takes tokens."""
    model = LTXVideoTransformer3DModel(
        in_channels=4 * CHANNELS, out_channels=4 * CHANNELS, num_attention_heads=HEADS, num_layers=DEPTH,
        attention_head_dim=WIDTH // HEADS, cross_attention_dim=WIDTH, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    side = SIDE // 2

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        tokens = latent(device).reshape(1, FRAMES * side * side, 4 * CHANNELS)
        mask = torch.ones(1, TEXT_TOKENS, device=device)
        when = torch.full((1, 1), 500.0, device=device)
        return model(tokens, text(device), when, mask, FRAMES, side, side).sample

    return Candidate(model=model, blocks=model.transformer_blocks, forward=forward)


def cogvideox() -> Candidate:
    """CogVideoX's model, whose text goes along with the video."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=CHANNELS,
        text_embed_dim=TEXT_WIDTH, num_layers=DEPTH, sample_width=SIDE, sample_height=SIDE,
        sample_frames=4 * FRAMES - 3, max_text_seq_length=TEXT_TOKENS, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    tokens = FRAMES * SIDE * SIDE // 4

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        turn = torch.ones(tokens, WIDTH // HEADS, device=device), torch.zeros(tokens, WIDTH // HEADS, device=device)
        when = torch.full((1,), 500, device=device)
        return model(latent(device).transpose(1, 2), text(device), when, image_rotary_emb=turn).sample

    return Candidate(model=model, blocks=model.transformer_blocks, forward=forward)


MODELS = {"sora_lite": ours, "Wan": wan, "LTX-Video": ltx, "CogVideoX": cogvideox}


def step_flops(make: Callable[[], Candidate]) -> int:
    """Of a training step: three forward passes, counted on the meta device."""
    meta = torch.device("meta")
    one = make()
    model = one.model.to(meta)
    return 3 * count_flops(lambda: one.forward(model, meta))


def step_of(one: Candidate) -> Callable[[], None]:
    """A call of forward and backward."""
    device = torch.device("cpu")

    def step() -> None:
        one.forward(one.model, device).square().mean().backward()
        for parameter in one.model.parameters():
            parameter.grad = None

    return step


def speeds(candidates: dict[str, Callable[[], None]], flops: dict[str, int]) -> dict[str, float]:
    """Operations per CPU second of each, as a fraction of a matrix product's, which takes a turn before each of them.

    The neighbour in time sees the same state of a shared machine; the median over the rounds speaks.
    """
    a = torch.randn(SGEMM_SIDE, SGEMM_SIDE)
    product = 2 * SGEMM_SIDE**3
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(ROUNDS + 1):
        for name, call in candidates.items():
            start = time.process_time()
            a @ a
            middle = time.process_time()
            call()
            end = time.process_time()
            if turn > 0:
                found[name].append(flops[name] / (end - middle) / (product / (middle - start)))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flops = {name: step_flops(make) for name, make in MODELS.items()}
    candidates = {name: make() for name, make in MODELS.items()}
    tokens = FRAMES * SIDE * SIDE // 4
    print(f"training step, width {WIDTH}, {DEPTH} blocks, {tokens:,} tokens, {TEXT_TOKENS} of text; sgemm = 1.00")
    print(f"  {'':<14}{'GFLOP':>10}{'eager':>10}{'compiled':>10}")
    eager = speeds({name: step_of(one) for name, one in candidates.items()}, flops)
    for one in candidates.values():
        for block in one.blocks:
            block.compile()
    compiled = speeds({name: step_of(one) for name, one in candidates.items()}, flops)
    for name in MODELS:
        print(f"  {name:<14}{flops[name] / 1e9:>10.1f}{eager[name]:>10.3f}{compiled[name]:>10.3f}")
    for title, speed in (("eager", eager), ("compiled", compiled)):
        best = max(value for name, value in speed.items() if name != "sora_lite")
        print(
            f"  {title}: time per FLOP is {best / speed['sora_lite']:.3f} of the best of the others', "
            f"{speed['Wan'] / speed['sora_lite']:.3f} of Wan's"
        )
