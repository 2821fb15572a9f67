"""A convolutional video predictor to compare with, after SimVP (Gao et al. 2022, arXiv:2206.05099; 2023, 2211.12509).

Written from the papers' description, in the smallest form that keeps the idea: convolutions encode each frame, blocks
of gated large-kernel attention mix all frames as channels of one picture, convolutions decode, with a skip connection
from the first layer. It is a peer for benchmarks, not one of vishub's models; "SimVP-like", never "SimVP".
"""
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['PEERS', 'SimvpLike']

# widths with which the peer has about as many parameters as PredFormer has for the same data
PEERS: Dict[str, Dict[str, Any]] = {
    'tiny': dict(num_frames=8, in_chans=1, img_size=(32, 32), frame_dim=16, dim=136, depth=4),
    'taxibj': dict(num_frames=4, in_chans=2, img_size=(32, 32), frame_dim=32, dim=300, depth=7),
    'mmnist': dict(num_frames=10, in_chans=1, img_size=(64, 64), frame_dim=64, dim=504, depth=8),
}


class FrameBlock(nn.Sequential):
    """Convolution, group norm, SiLU; halves the side with `stride=2`, doubles it with `up`."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, up: bool = False) -> None:
        super().__init__(
            nn.Conv2d(in_chans, out_chans * 4 if up else out_chans, 3, stride, padding=1),
            nn.PixelShuffle(2) if up else nn.Identity(),
            nn.GroupNorm(2, out_chans), nn.SiLU())


class MixBlock(nn.Module):
    """Gated attention of large kernels, and a two-layer perceptron, over all frames at once."""

    def __init__(self, dim: int, mlp_ratio: float = 4.) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.proj_in, self.proj_out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        # 5 x 5, then 7 x 7 with holes: together 23 x 23
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)
        self.gate = nn.Conv2d(dim, 2 * dim, 1)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, h, w) -> the same."""
        y = F.gelu(self.proj_in(self.norm1(x)))
        attention, gate = self.gate(self.far(self.near(y))).chunk(2, dim=1)
        x = x + self.proj_out(attention * gate.sigmoid())
        return x + self.mlp(self.norm2(x))


class SimvpLike(nn.Module):
    """T frames in, the next T out, all at once.

    Args:
        num_frames: T.
        in_chans: Channels C of a frame.
        img_size: H, W of a frame, multiples of 4.
        frame_dim: Channels of an encoded frame.
        dim: Channels of the mixed frames.
        depth: Blocks that mix.
    """

    def __init__(
            self, num_frames: int, in_chans: int, img_size: Tuple[int, int], frame_dim: int, dim: int, depth: int,
    ) -> None:
        super().__init__()
        self.num_frames, self.in_chans, self.img_size, self.num_classes = num_frames, in_chans, tuple(img_size), 0
        self.pretrained_cfg = {'architecture': 'simvp_like'}
        d = frame_dim
        self.first = FrameBlock(in_chans, d)
        self.encoder = nn.Sequential(FrameBlock(d, d, stride=2), FrameBlock(d, d), FrameBlock(d, d, stride=2))
        self.mix = nn.Sequential(
            nn.Conv2d(num_frames * d, dim, 1), *(MixBlock(dim) for _ in range(depth)),
            nn.Conv2d(dim, num_frames * d, 1))
        self.decoder = nn.Sequential(FrameBlock(d, d, up=True), FrameBlock(d, d), FrameBlock(d, d, up=True))
        self.last = nn.Sequential(FrameBlock(2 * d, d), nn.Conv2d(d, in_chans, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C, H, W) -> the same shape, the frames that follow."""
        batch = x.shape[0]
        skip = self.first(x.flatten(0, 1))  # B * T, d, H, W
        x = self.encoder(skip)  # B * T, d, h, w
        x = x + self.mix(x.unflatten(0, (batch, -1)).flatten(1, 2)).unflatten(1, (self.num_frames, -1)).flatten(0, 1)
        return self.last(torch.cat([self.decoder(x), skip], dim=1)).unflatten(0, (batch, -1))
