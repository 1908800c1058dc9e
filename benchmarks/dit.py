"""A training step (forward and backward) of our default video DiT against diffusers' video transformers.

One thread, CPU time. All have one width, depth, number of heads and of tokens, and as many text tokens. They differ in
how many operations they make of that, so what is compared is operations per second: a forward pass counted three times,
since a backward pass is two of it. A large matrix product by MKL in the same process is 1.00.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from sora_lite.memory import keep_memory
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.text import tokenize
from sora_lite.training.metrics import count_flops

DEPTH, HEAD_WIDTH, CHANNELS, SIDE = 4, 64, 16, 32
TEXT_TOKENS, TEXT_WIDTH = 64, 128
SGEMM_SIDE = 1536
ROUNDS = 15


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """What all models have in common. A frame of a latent is 16 x 16 = 256 tokens."""

    width: int
    frames: int
    batch: int

    @property
    def heads(self) -> int:
        """Of attention."""
        return self.width // HEAD_WIDTH

    @property
    def tokens(self) -> int:
        """Of a sample."""
        return self.frames * SIDE * SIDE // 4

    def latent(self, device: torch.device) -> Tensor:
        """Fixed noise, B C T H W."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, CHANNELS, self.frames, SIDE, SIDE, generator=generator).to(device)

    def text(self, device: torch.device) -> Tensor:
        """Fixed text features, B M C_text."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(device)


SHAPES = [Shape(width=384, frames=5, batch=1), Shape(width=768, frames=1, batch=2)]
"""A clip, and two stills at another width."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Candidate:
    """A model, the list of its blocks, and its forward pass on fixed inputs that are made on a device."""

    model: nn.Module
    blocks: nn.ModuleList
    forward: Callable[[nn.Module, torch.device], Tensor]


def ours(shape: Shape) -> Candidate:
    """The default of `DiTConfig` in this depth: 3-D RoPE, QK-norm, bytes by cross-attention."""
    encoder = {"width": TEXT_WIDTH, "depth": 2, "heads": 4, "max_bytes": TEXT_TOKENS}
    model = VideoDiT(channels=CHANNELS, width=shape.width, depth=DEPTH, heads=shape.heads, text=encoder)
    prompt = tokenize(["x" * (TEXT_TOKENS - 1)] * shape.batch, TEXT_TOKENS)

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        return model(
            shape.latent(device), torch.full((shape.batch,), 0.5, device=device), Conditions(text=prompt.to(device))
        )

    return Candidate(model=model, blocks=model.blocks, forward=forward)


def wan(shape: Shape) -> Candidate:
    """Wan2.1's model."""
    model = WanTransformer3DModel(
        num_attention_heads=shape.heads, attention_head_dim=HEAD_WIDTH, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, ffn_dim=4 * shape.width, num_layers=DEPTH,
    )  # fmt: skip

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        return model(shape.latent(device), torch.full((shape.batch,), 500, device=device), shape.text(device)).sample

    return Candidate(model=model, blocks=model.blocks, forward=forward)


def ltx(shape: Shape) -> Candidate:
    """LTX-Video's model, which takes tokens."""
    model = LTXVideoTransformer3DModel(
        in_channels=4 * CHANNELS, out_channels=4 * CHANNELS, num_attention_heads=shape.heads, num_layers=DEPTH,
        attention_head_dim=HEAD_WIDTH, cross_attention_dim=shape.width, caption_channels=TEXT_WIDTH,
    )  # fmt: skip
    side = SIDE // 2

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        tokens = shape.latent(device).reshape(shape.batch, shape.tokens, 4 * CHANNELS)
        mask = torch.ones(shape.batch, TEXT_TOKENS, device=device)
        when = torch.full((shape.batch, 1), 500.0, device=device)
        return model(tokens, shape.text(device), when, mask, shape.frames, side, side).sample

    return Candidate(model=model, blocks=model.transformer_blocks, forward=forward)


def cogvideox(shape: Shape) -> Candidate:
    """CogVideoX's model, whose text goes along with the video."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=shape.heads, attention_head_dim=HEAD_WIDTH, in_channels=CHANNELS, out_channels=CHANNELS,
        text_embed_dim=TEXT_WIDTH, num_layers=DEPTH, sample_width=SIDE, sample_height=SIDE,
        sample_frames=4 * shape.frames - 3, max_text_seq_length=TEXT_TOKENS, use_rotary_positional_embeddings=True,
    )  # fmt: skip

    def forward(model: nn.Module, device: torch.device) -> Tensor:
        turn = (
            torch.ones(shape.tokens, HEAD_WIDTH, device=device),
            torch.zeros(shape.tokens, HEAD_WIDTH, device=device),
        )
        when = torch.full((shape.batch,), 500, device=device)
        return model(shape.latent(device).transpose(1, 2), shape.text(device), when, image_rotary_emb=turn).sample

    return Candidate(model=model, blocks=model.transformer_blocks, forward=forward)


MODELS = {"sora_lite": ours, "Wan": wan, "LTX-Video": ltx, "CogVideoX": cogvideox}


def step_flops(one: Candidate) -> int:
    """Of a training step: three forward passes, counted on the meta device, where the model stays."""
    meta = torch.device("meta")
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


def fastest(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of each, which take turns.

    Of each the fastest round speaks: what else a shared machine does only ever adds to the time.
    """
    seconds = dict.fromkeys(calls, math.inf)
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            end = time.process_time()
            if turn > 0:
                seconds[name] = min(seconds[name], end - start)
    return seconds


def table(shape: Shape) -> None:
    """Print the speeds at one shape."""
    flops = {name: step_flops(make(shape)) for name, make in MODELS.items()}
    candidates = {name: make(shape) for name, make in MODELS.items()}
    steps = {name: step_of(one) for name, one in candidates.items()}
    a = torch.randn(SGEMM_SIDE, SGEMM_SIDE)
    calls: dict[str, Callable[[], object]] = {"sgemm": lambda: a @ a, **steps}

    def speeds() -> dict[str, float]:
        seconds = fastest(calls)
        product = 2 * SGEMM_SIDE**3 / seconds["sgemm"]
        return {name: flops[name] / seconds[name] / product for name in MODELS}

    eager = speeds()
    torch.compiler.reset()  # for the models of another shape
    for one in candidates.values():
        for block in one.blocks:
            block.compile()
    compiled = speeds()
    what = f"width {shape.width}, {DEPTH} blocks, {shape.batch} x {shape.tokens:,} tokens, {TEXT_TOKENS} of text"
    print(f"training step, {what}; sgemm = 1.00")
    print(f"  {'':<14}{'GFLOP':>10}{'eager':>10}{'compiled':>10}")
    for name in MODELS:
        print(f"  {name:<14}{flops[name] / 1e9:>10.1f}{eager[name]:>10.3f}{compiled[name]:>10.3f}")
    for title, speed in (("eager", eager), ("compiled", compiled)):
        best = max(value for name, value in speed.items() if name != "sora_lite")
        print(
            f"  {title}: time per FLOP is {best / speed['sora_lite']:.3f} of the best of the others', "
            f"{speed['Wan'] / speed['sora_lite']:.3f} of Wan's"
        )


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()  # as training on CPUs does; else which of the models pays for fresh memory is left to chance
    for shape in SHAPES:
        table(shape)
