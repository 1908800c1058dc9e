"""Causal spatiotemporal layers for video autoencoders.

Output frame t depends on input frames up to t only, so the first frame stands alone and an image is a one-frame video.
A 3-D convolution is factorised into a spatial 3x3 and a temporal 3x1x1 one ((2+1)-D): both run as 2-D convolutions over
channels-last frames, which CPUs and GPUs have fast kernels for.

Shapes: B batch, T frames, C channels, H W cells. Tensors are B T C H W, with C innermost in memory.
"""

import torch
from torch import Tensor, nn


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame. x: B T C H W -> B T C' H' W'."""
    y = layer(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return y.unflatten(0, x.shape[:2])


class ChannelNorm(nn.Module):
    """RMS normalisation over the channels of each cell, with a gain.

    Statistics over time would let the future leak into the past; over space they would tie the result to the frame's
    size. Over channels they do neither.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # B T C H W
        return self.norm(x.movedim(2, -1)).movedim(-1, 2)


class TemporalConv(nn.Module):
    """Causal convolution over three frames: y_t = W [x_{t-2}, x_{t-1}, x_t]; the first frame is repeated before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # B T C H W
        past = torch.cat([x[:, :1], x[:, :1], x], dim=1)  # B T+2 C H W
        frames = x.shape[1]
        window = torch.cat([past[:, i : i + frames] for i in range(3)], dim=2)  # B T 3C H W
        return per_frame(self.mix, window)


class ResBlock(nn.Module):
    """Residual block: space, then time. The last convolution starts at zero, so the block starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_space = ChannelNorm(channels)
        self.space = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_time = ChannelNorm(channels)
        self.time = TemporalConv(channels)
        nn.init.zeros_(self.time.mix.weight)
        nn.init.zeros_(self.time.mix.bias)

    def forward(self, x: Tensor) -> Tensor:  # B T C H W
        h = per_frame(self.space, nn.functional.silu(self.norm_space(x)))
        return x + self.time(nn.functional.silu(self.norm_time(h)))


class Down(nn.Module):
    """Halve time and/or space. In time, frame 0 is paired with itself and frames 2k-1, 2k with each other."""

    def __init__(self, channels: int, out_channels: int, *, time: int, space: int) -> None:
        super().__init__()
        self.time = time
        self.fold = nn.Conv2d(channels * time, out_channels, space, stride=space)

    def forward(self, x: Tensor) -> Tensor:  # B T C H W, T odd if time is halved
        if self.time == 2:
            x = torch.cat([x[:, :1], x], dim=1)  # B T+1 C H W
            x = torch.cat([x[:, 0::2], x[:, 1::2]], dim=2)  # B (T+1)/2 2C H W
        return per_frame(self.fold, x)


class Up(nn.Module):
    """Double time and/or space: the mirror of `Down`. In time, frame k becomes frames 2k-1, 2k, and frame -1 is cut."""

    def __init__(self, channels: int, out_channels: int, *, time: int, space: int) -> None:
        super().__init__()
        self.time = time
        self.unfold = nn.Conv2d(channels, out_channels * time * space * space, 1)
        self.shuffle = nn.PixelShuffle(space)

    def forward(self, x: Tensor) -> Tensor:  # B T C H W
        y = self.shuffle(self.unfold(x.flatten(0, 1).contiguous(memory_format=torch.channels_last)))
        y = y.unflatten(0, x.shape[:2])  # B T time*C' H' W'
        if self.time == 2:
            y = y.unflatten(2, (2, -1)).flatten(1, 2)[:, 1:]  # B 2T-1 C' H' W'
        return y
