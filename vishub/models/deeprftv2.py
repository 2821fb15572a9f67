"""DeepRFTv2: image deblurring that learns at the level of kernels

Paper: `DeepRFTv2: Kernel-level Learning for Image Deblurring` - https://arxiv.org/abs/2511.21132

@article{mao2025deeprftv2,
  title={DeepRFTv2: Kernel-level Learning for Image Deblurring},
  author={Mao, Xintian and Song, Haofei and Liu, Yin-Nian and Li, Qingli and Wang, Yan},
  journal={arXiv preprint arXiv:2511.21132},
  year={2025}
}

Official code: https://github.com/INVOKERer/DeepRFTv2. It has no licence file, so nothing of it is copied here: this
file was written from a description of the architecture. No download of its weights was found; checkpoints made with
the official code load through `checkpoint_filter_fn`.

Two U-Nets, one on the picture and one on half of it, sharpen it; behind each a Fourier Kernel Estimator reads the
U-Net's features in the frequency domain, estimates a transfer function for every channel, and filters them with it.
All this is a column, of which there are two; every level of a column adds to the same level of the column before:
state <- alpha * state + blocks(lower level). So a column can be undone, and training need not keep its activations.
A column is written as a list of such steps here (`Column.steps`), see `layers/reversible.py`.
"""
import math
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from vishub.models.builder import build_model
from vishub.models.layers.reversible import Step, run, run_reversible
from vishub.models.layers.selective_scan import reset_scan_parameters, selective_scan

__all__ = ['DeblurOutput', 'DeepRFTv2', 'half_size']

DIVISOR = 8
MIN_SIZE = 24


class DeblurOutput(NamedTuple):
    """All predictions, in training: for each column the U-Net's, then the kernel estimator's.

    Attributes:
        full: Pictures (B, 3, H, W); the last is the prediction.
        half: Pictures (B, 3, H / 2, W / 2).
    """
    full: List[torch.Tensor]
    half: List[torch.Tensor]


def half_size(image: torch.Tensor) -> torch.Tensor:
    """The pyramid's next level, (B, C, H, W) -> (B, C, H // 2, W // 2): binomial blur, then bilinear resizing."""
    weights = image.new_tensor([1., 4., 6., 4., 1.]) / 16
    kernel = torch.outer(weights, weights).expand(image.shape[1], 1, 5, 5)
    blurred = F.conv2d(F.pad(image, (2, 2, 2, 2), mode='reflect'), kernel, groups=image.shape[1])
    size = (image.shape[2] // 2, image.shape[3] // 2)
    return F.interpolate(blurred, size=size, mode='bilinear', align_corners=False)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W); a channels-last map is not copied."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv1x1(nn.Conv2d):
    """1x1 convolution, computed as a linear layer of channels-last maps, which on the CPU is several times faster."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_dim, out_dim, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def scaled(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`scale` (1, C', 1, 1) times the output, by way of the weights: one pass over the map less."""
        weight, bias = self.weight.flatten(1) * scale.view(-1, 1), self.bias * scale.flatten()
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class SelectiveScan2d(nn.Module):
    """The token mixer EVSS2D: one selective scan over the map, row by row, with a gate.

    The parameters of each step of the scan are smoothed along the sequence by a convolution that sees both sides.

    Args:
        dim: Channels d; the scan has E = 2 d.
        d_state: States N of a channel.
    """

    def __init__(self, dim: int, d_state: int = 8, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim, self.dt_rank, self.d_state = 2 * dim, math.ceil(dim / 16), d_state
        num_params = self.dt_rank + 2 * d_state
        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner_dim, inner_dim, 3, padding=1, groups=inner_dim, **dd)
        self.x_proj = nn.Linear(inner_dim, num_params, bias=False, **dd)
        self.x_conv = nn.Conv1d(num_params, num_params, 7, padding=3, groups=num_params, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner_dim, **dd)  # its bias goes into the scan's softplus
        self.A_log = nn.Parameter(torch.empty(inner_dim, d_state, **dd))
        self.D = nn.Parameter(torch.ones(inner_dim, **dd))
        self.out_norm = nn.LayerNorm(inner_dim, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)
        reset_scan_parameters(self.dt_proj, self.A_log)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same."""
        height, width = x.shape[2], x.shape[3]
        u, z = self.in_proj(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)  # B, H, W, E
        u = F.gelu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)  # B, L, E
        params = self.x_conv(self.x_proj(u).transpose(1, 2))  # B, R + 2 N, L
        dt, B, C = params.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        delta = F.linear(dt.transpose(1, 2), self.dt_proj.weight).transpose(1, 2)  # B, E, L
        A = -self.A_log.float().exp() if self.A_log.dtype != torch.float64 else -self.A_log.exp()
        y = selective_scan(
            u.transpose(1, 2), delta, A, B, C, self.D, delta_bias=self.dt_proj.bias, delta_softplus=True)
        y = self.out_norm(y.transpose(1, 2)) * F.gelu(z.flatten(1, 2))
        return self.out_proj(y).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class ScanBlock(nn.Module):
    """Block of the kernel branch: x + scan(norm(x))."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = LayerNorm2d(dim, **dd)
        self.attn = SelectiveScan2d(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(self.norm1(x))


def simple_gate(x: torch.Tensor) -> torch.Tensor:
    """First half of the channels times the second."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NafBlock(nn.Module):
    """NAFNet's block (Chen et al. 2022, arXiv:2204.04676): a convolution and a perceptron, gated and without
    nonlinearities.

    Args:
        dim: Channels.
        pool_size: Window height and width of the channel attention's mean; None takes the mean of the whole map.
    """

    def __init__(self, dim: int, pool_size: Optional[Tuple[int, int]] = None, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.pool_size = pool_size
        self.norm1 = LayerNorm2d(dim, **dd)
        self.conv1 = Conv1x1(dim, 2 * dim, **dd)
        self.conv2 = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, **dd)
        self.sca = Conv1x1(dim, dim, **dd)
        self.conv3 = Conv1x1(dim, dim, **dd)
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1, **dd))
        self.norm2 = LayerNorm2d(dim, **dd)
        self.conv4 = Conv1x1(dim, 2 * dim, **dd)
        self.conv5 = Conv1x1(dim, dim, **dd)
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1, **dd))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """The gated convolution s (B, C, H, W)."""
        return simple_gate(self.conv2(self.conv1(self.norm1(x))))

    def attended(self, s: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """s with channel attention, through a linear layer times `scale`."""
        mean = s.mean((2, 3), keepdim=True) if self.pool_size is None else box_mean(s, self.pool_size)
        return self.conv3.scaled(s * self.sca(mean), scale)

    def perceptron(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv5.scaled(simple_gate(self.conv4(self.norm2(x))), self.gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same."""
        return self.perceptron(x + self.attended(self.gated(x), self.beta))


def box_mean(x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Mean over a window around every place; places near the border take the nearest whole window's.

    A map not larger than the window has one mean, (B, C, 1, 1). By cumulative sums, so the window costs nothing.
    """
    if size[0] >= x.shape[2] and size[1] >= x.shape[3]:
        return x.mean((2, 3), keepdim=True)
    pads: List[int] = []
    mean = x.double()  # differences of long sums
    for axis, window in ((2, size[0]), (3, size[1])):
        length = x.shape[axis]
        window = min(window, length)
        sums = F.pad(mean.cumsum(axis), (0, 0, 1, 0) if axis == 2 else (1, 0))
        mean = (sums.narrow(axis, window, length - window + 1) - sums.narrow(axis, 0, length - window + 1)) / window
        missing = window - 1
        pads = [missing // 2, missing - missing // 2] + pads  # the last axis comes first
    return F.pad(mean.to(x.dtype), pads, mode='replicate')


class NafScanBlock(NafBlock):
    """NAF block with a selective scan beside the convolution (NAFEVS).

    It turns the whole map first, and does not turn it back: a transposition for an even `index` in the level, a turn
    by half for an odd one. So four blocks scan from four sides, and the fourth hands the map on as it came.
    """

    def __init__(
            self, dim: int, index: int, pool_size: Optional[Tuple[int, int]] = None, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, pool_size, **dd)
        self.index = index
        self.norm_mamba = LayerNorm2d(dim, **dd)
        self.attn = SelectiveScan2d(dim, **dd)
        self.lamb_l = nn.Parameter(torch.ones(1, dim, 1, 1, **dd))
        self.lamb_g = nn.Parameter(torch.zeros(1, dim, 1, 1, **dd))
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same turned: (B, C, W, H) for an even index."""
        x = x.transpose(2, 3) if self.index % 2 == 0 else x.flip(2, 3)
        s = self.gated(x)
        scanned = self.attn(self.norm_mamba(s))
        x = x + self.attended(s, self.beta * self.lamb_l) + self.beta * self.lamb_g * (self.alpha + 1) * scanned
        return self.perceptron(x)


class Level(nn.Module):
    """What one level adds to its state: (down), (fuse with another map), blocks, (up); and the state's factor `alpha`.

    Args:
        dim: Channels of the blocks.
        blocks: The blocks.
        down: Halve the map first, from dim / 2 channels.
        fuse: Take another map of `dim` channels in.
        up: Double the map at last, to dim / 2 channels.
    """

    def __init__(
            self,
            dim: int,
            blocks: Sequence[nn.Module],
            down: bool = False,
            fuse: bool = False,
            up: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1, dim // 2 if up else dim, 1, 1), 0.5, **dd))
        self.down = downsample(dim // 2, dim, **dd) if down else nn.Identity()
        self.fuse = Conv1x1(2 * dim, dim, **dd) if fuse else None
        self.blocks = nn.Sequential(*blocks)
        self.up = nn.Identity()
        if up:
            self.up = nn.Sequential(Conv1x1(dim, 2 * dim, bias=False, **dd), nn.PixelShuffle(2))

    def forward(self, x: torch.Tensor, other: Optional[torch.Tensor] = None) -> torch.Tensor:
        x = self.down(x)
        if self.fuse is not None:
            x = self.fuse(torch.cat([x, other], dim=1))
        return self.up(self.blocks(x))


def downsample(in_dim: int, out_dim: int, device=None, dtype=None) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 2, stride=2, bias=False, device=device, dtype=dtype)


class KernelEstimator(nn.Module):
    """The Fourier Kernel Estimator (FKE): features -> transfer functions -> filtered features -> a picture.

    The kernels' spectra go through a chain of levels with states k0..k3 of one size, H x (W / 2 + 1).

    Args:
        dim: Channels C of the features; each has a kernel of its own.
        kernel_dim: Channels K of the chain.
        depth: Blocks a level.
        first: Whether this is the first column, which has no previous states to take in.
    """
    num_levels = 4

    def __init__(self, dim: int, kernel_dim: int, depth: int, first: bool, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.to_kernel = Conv1x1(dim, kernel_dim, bias=False, **dd)
        self.to_feature = Conv1x1(dim, dim, bias=False, **dd)
        self.reduce = Conv1x1(2 * kernel_dim, kernel_dim, bias=False, **dd)
        self.levels = nn.ModuleList([
            Level(
                kernel_dim, [ScanBlock(kernel_dim, **dd) for _ in range(depth)],
                fuse=not first and level < self.num_levels - 1, **dd)
            for level in range(self.num_levels)])
        self.norm = LayerNorm2d(kernel_dim, **dd)
        self.to_transfer = Conv1x1(kernel_dim, 2 * dim, **dd)
        self.fuse = Conv1x1(2 * dim, dim, bias=False, **dd)
        self.head = nn.Conv2d(dim, 3, 3, padding=1, **dd)

    def spectrum(self, feature: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the chain's input (B, K, H, W / 2 + 1)."""
        spectrum = torch.fft.rfft2(as_real(self.to_kernel(feature)))
        return self.reduce(torch.cat([spectrum.real, spectrum.imag], dim=1))

    def transfer(self, state: torch.Tensor) -> torch.Tensor:
        """Last state (B, K, H, W / 2 + 1) -> transfer functions, complex (B, C, H, W / 2 + 1).

        They are free: not Hermitian in the first and last column, where the inverse transform takes what it can use.
        """
        real, imag = as_real(self.to_transfer(self.norm(state))).chunk(2, dim=1)
        return torch.complex(real, imag)

    def filtered(self, feature: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) with the filtered ones mixed in."""
        spectrum = torch.fft.rfft2(as_real(self.to_feature(feature)))
        x = torch.fft.irfft2(spectrum * self.transfer(state))
        return self.fuse(torch.cat([x, as_real(feature)], dim=1))

    def kernels(self, state: torch.Tensor, size: int = 65) -> torch.Tensor:
        """The filters in space, (B, C, size, size), their origin in the middle; smaller where the picture is."""
        kernels = torch.fft.fftshift(torch.fft.irfft2(self.transfer(state)), dim=(-2, -1))
        for axis in (2, 3):
            length = min(size, (kernels.shape[axis] - 1) // 2 * 2 + 1)
            kernels = kernels.narrow(axis, kernels.shape[axis] // 2 - length // 2, length)
        return kernels


def as_real(x: torch.Tensor) -> torch.Tensor:
    """`x` in a type that Fourier transforms know everywhere."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Column(nn.Module):
    """Two U-Nets and two kernel estimators. See the module's text; `steps` is the whole of it.

    Args:
        index: Its place; the first column takes no features in.
        dim, kernel_dim, depths, kernel_depth, block_types, mid_block_types: As in `DeepRFTv2`.
        pool_size: As `local_pool` there.
    """

    def __init__(
            self,
            index: int,
            dim: int,
            kernel_dim: int,
            depths: Tuple[int, ...],
            kernel_depth: int,
            block_types: Tuple[str, ...],
            mid_block_types: Tuple[str, ...],
            pool_size: Optional[int],
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.index = index
        dims = [dim, 2 * dim, 4 * dim]

        def blocks(level: int, block_type: str, mid: bool) -> List[nn.Module]:
            window = None
            if pool_size is not None:
                side = int(1.5 * (pool_size // 2 ** (level + mid)))
                window = (side, side)
            if block_type == 'naf':
                return [NafBlock(dims[level], window, **dd) for _ in range(depths[level])]
            return [NafScanBlock(dims[level], i, window, **dd) for i in range(depths[level])]

        def unet(types: Tuple[str, ...], mid: bool) -> Tuple[nn.ModuleList, nn.ModuleList]:
            encoder = [
                Level(dims[i], blocks(i, types[i], mid), down=i > 0, fuse=mid, **dd) for i in range(3)]
            decoder = [Level(dims[i], blocks(i, types[i], mid), up=i > 0, **dd) for i in (2, 1, 0)]
            return nn.ModuleList(encoder), nn.ModuleList(decoder)

        first = index == 0
        self.stem = nn.Conv2d(3, dim, 3, padding=1, bias=False, **dd)
        self.fuse = None if first else Conv1x1(2 * dim, dim, **dd)
        self.encoder, self.decoder = unet(block_types, mid=False)
        self.head = nn.Conv2d(dim, 3, 3, padding=1, **dd)
        self.kernel_estimator = KernelEstimator(dim, kernel_dim, kernel_depth, first, **dd)

        self.mid_stem = nn.Conv2d(3, dim, 3, padding=1, bias=False, **dd)
        self.mid_fuse = None if first else Conv1x1(2 * dim, dim, **dd)
        self.to_mid = nn.ModuleList([downsample(width, width, **dd) for width in dims])
        self.mid_encoder, self.mid_decoder = unet(mid_block_types, mid=True)
        self.mid_head = nn.Conv2d(dim, 3, 3, padding=1, **dd)
        self.mid_kernel_estimator = KernelEstimator(dim, kernel_dim, kernel_depth, first, **dd)
        self.from_mid = downsample(dim, 4 * dim, **dd)
        self.latent_fuse = Conv1x1(8 * dim, 4 * dim, **dd)

    def enter(self, image: torch.Tensor, feature: Optional[torch.Tensor] = None) -> torch.Tensor:
        """First level of the whole picture's encoder, with the features of the column before."""
        x = self.stem(image)
        return self.encoder[0](x if feature is None else self.fuse(torch.cat([x, feature], dim=1)))

    def mid_enter(
            self, image: torch.Tensor, other: torch.Tensor, feature: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The same of the half picture, which also takes in the whole one's level."""
        x = self.mid_stem(image)
        x = x if feature is None else self.mid_fuse(torch.cat([x, feature], dim=1))
        return self.mid_encoder[0](x, self.to_mid[0](other))

    def latent(self, feature: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The whole picture's latent state, with the half one's filtered features taken in."""
        return self.latent_fuse(torch.cat([self.from_mid(feature), latent], dim=1))

    def steps(self, emit: bool = True) -> List[Step]:
        """The column in steps, see `layers/reversible.py`.

        States, `full.` for the whole picture and `half.` for the half: 0, 1, 2 (the U-Net's levels at strides 1, 2, 4),
        out (the decoder's last), k0..k3 (the kernels' chain); `feature` is derived from these. The decoder overwrites
        the encoder's states, which the next column's encoder goes on from.

        Args:
            emit: Also give the four pictures, named `{full or half}.{column}.{unet or fke}`.
        """
        reads = ('half.image', 'full.0') if self.index == 0 else ('half.image', 'full.0', 'half.feature')
        steps = [*self.encode(), Step('update', 'half.0', self.mid_enter, reads, self.mid_encoder[0].alpha)]
        for i in (1, 2):
            level, to_mid = self.mid_encoder[i], self.to_mid[i]
            steps.append(Step(
                'update', f'half.{i}', lambda x, other, level=level, to_mid=to_mid: level(x, to_mid(other)),
                (f'half.{i - 1}', f'full.{i}'), level.alpha))
        steps += self.decode('half', self.mid_decoder, self.mid_head, self.mid_kernel_estimator, emit)
        steps.append(Step('replace', 'full.2', self.latent, ('half.feature', 'full.2')))
        steps += self.decode('full', self.decoder, self.head, self.kernel_estimator, emit)
        return steps

    def encode(self) -> List[Step]:
        """Encoder of the whole picture; a column begins with it."""
        reads = ('full.image',) if self.index == 0 else ('full.image', 'full.feature')
        return [
            Step('update', 'full.0', self.enter, reads, self.encoder[0].alpha),
            *(self.update(f'full.{i}', level, (f'full.{i - 1}',)) for i, level in enumerate(self.encoder) if i > 0),
        ]

    @staticmethod
    def update(target: str, level: Level, reads: Tuple[str, ...]) -> Step:
        return Step('update', target, level, reads, level.alpha)

    def decode(
            self, scale: str, decoder: nn.ModuleList, head: nn.Module, estimator: KernelEstimator, emit: bool,
    ) -> List[Step]:
        """Decoder and kernel estimator of one scale."""
        latent, middle, fine, out = (f'{scale}.{name}' for name in ('2', '1', '0', 'out'))
        chain = [f'{scale}.k{i}' for i in range(estimator.num_levels)]
        steps = [
            self.update(middle, decoder[0], (latent,)),
            self.update(fine, decoder[1], (middle,)),
            self.update(out, decoder[2], (fine,)),
        ]
        fused = self.index > 0
        steps.append(Step(
            'update', chain[0], lambda feature, *state: estimator.levels[0](estimator.spectrum(feature), *state),
            (out, chain[1]) if fused else (out,), estimator.levels[0].alpha))
        for i in range(1, estimator.num_levels):
            reads = (chain[i - 1], chain[i + 1]) if fused and i + 1 < estimator.num_levels else (chain[i - 1],)
            steps.append(self.update(chain[i], estimator.levels[i], reads))
        steps.append(Step('derive', f'{scale}.feature', estimator.filtered, (out, chain[-1])))
        if emit:
            image = f'{scale}.image'
            steps.append(Step('emit', f'{scale}.{self.index}.unet', lambda x, blurred: head(x) + blurred, (out, image)))
            steps.append(Step(
                'emit', f'{scale}.{self.index}.fke', lambda x, blurred: estimator.head(x) + blurred,
                (f'{scale}.feature', image)))
        return steps


class DeepRFTv2(nn.Module):
    """DeepRFTv2.

    Input: blurred RGB pictures, float (B, 3, H, W) in [0, 1], not normalised; H and W multiples of 8, at least 24.

    Args:
        dim: Channels C of the finest level; the others have 2 C and 4 C.
        kernel_dim: Channels K of the kernel estimators.
        depths: Blocks of the three levels.
        kernel_depth: Blocks of each of the kernel estimators' four levels.
        num_columns: Columns.
        block_types: `naf` or `nafevs` (with a selective scan) for each level, on the whole picture.
        mid_block_types: The same on the half picture.
        local_pool: Side in pixels of the crops that the model was trained on; the channel attention then takes means
            over windows of 1.5 times that size, not of the whole picture (for pictures much larger than the crops).
            The weights are the same. None for global means.
        in_chans: Must be 3.
        num_classes: Must be 0: the model has no classes.

    Raises:
        ValueError: If a size does not fit.
    """

    def __init__(
            self,
            dim: int = 48,
            kernel_dim: int = 48,
            depths: Tuple[int, ...] = (1, 4, 8),
            kernel_depth: int = 1,
            num_columns: int = 2,
            block_types: Tuple[str, ...] = ('naf', 'naf', 'naf'),
            mid_block_types: Tuple[str, ...] = ('naf', 'naf', 'naf'),
            local_pool: Optional[int] = None,
            in_chans: int = 3,
            num_classes: int = 0,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if in_chans != 3:
            raise ValueError(f'DeepRFTv2 deblurs RGB pictures: in_chans must be 3, not {in_chans}')
        if num_classes != 0:
            raise ValueError(f'DeepRFTv2 gives pictures and has no classes: num_classes must be 0, not {num_classes}')
        for name, value in dict(
                dim=dim, kernel_dim=kernel_dim, kernel_depth=kernel_depth, num_columns=num_columns).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, not {value}')
        for name, types in (('block_types', block_types), ('mid_block_types', mid_block_types)):
            if len(depths) != 3 or len(types) != 3 or min(depths) < 1:
                raise ValueError(f'there are three levels: depths {depths} and {name} {types} must have three entries')
            for depth, block_type in zip(depths, types):
                if block_type not in ('naf', 'nafevs'):
                    raise ValueError(f"{name} are 'naf' or 'nafevs', not {block_type!r}")
                if block_type == 'nafevs' and depth % 4:
                    raise ValueError(
                        f"each 'nafevs' block turns the map, and four bring it back: a level needs a multiple of 4 of "
                        f'them, not {depth}')
        self.in_chans, self.num_classes = 3, 0
        self.num_features = self.head_hidden_size = self.dim = dim
        self.kernel_dim, self.kernel_levels = kernel_dim, KernelEstimator.num_levels
        self.grad_checkpointing = False
        self.columns = nn.ModuleList([
            Column(
                i, dim, kernel_dim, depths, kernel_depth, block_types, mid_block_types, local_pool, **dd)
            for i in range(num_columns)])
        self.feature_info = [
            dict(num_chs=dim * 2 ** i, reduction=2 ** i, module=f'columns.{num_columns - 1}.encoder.{i}')
            for i in range(3)]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()  # the official recipe decays everything

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^columns\.\d+\.(?:mid_)?stem', blocks=r'^columns\.(\d+)(?!.*head)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep the states behind the last column alone, and undo the columns for the gradients.

        The same numbers up to rounding, for one more forward pass. (A column's latent map at a quarter of the size is
        kept too: the step that takes the half picture's features in cannot be undone.)
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> None:
        return None

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Raises ValueError, but for 0 classes and no pooling: there is nothing to reset."""
        if num_classes != 0 or global_pool:
            raise ValueError(
                f'DeepRFTv2 gives pictures and has no classes: reset_classifier takes 0 alone, not {num_classes}'
                + (f' with pooling {global_pool!r}' if global_pool else ''))

    # -- forward ------------------------------------------------------------------------------------------------------

    def _states(self, x: torch.Tensor, half: Optional[torch.Tensor]) -> Dict[str, torch.Tensor]:
        """The pictures, and all states zero."""
        check_image(x)
        half = half_size(x) if half is None else half
        if half.shape != (x.shape[0], 3, x.shape[2] // 2, x.shape[3] // 2):
            raise ValueError(f'half must be the picture at half its size, got {list(half.shape)} for {list(x.shape)}')
        states: Dict[str, torch.Tensor] = {}
        dtype = self.columns[0].stem.weight.dtype
        for scale, image in (('full', x), ('half', half)):
            (batch_size, _, height, width), dim = image.shape, self.dim
            states[f'{scale}.image'] = image.contiguous(memory_format=torch.channels_last)
            shapes = {
                **{str(i): (dim * 2 ** i, height // 2 ** i, width // 2 ** i) for i in range(3)},
                'out': (dim, height, width),
                **{f'k{i}': (self.kernel_dim, height, width // 2 + 1) for i in range(self.kernel_levels)},
            }
            for name, shape in shapes.items():
                states[f'{scale}.{name}'] = torch.zeros(
                    (batch_size, *shape), device=x.device, dtype=dtype).to(memory_format=torch.channels_last)
        return states

    def forward_all(self, x: torch.Tensor, half: Optional[torch.Tensor] = None) -> DeblurOutput:
        """All predictions, as in training; arguments as of `forward`."""
        states = self._states(x, half)
        steps = [step for column in self.columns for step in column.steps()]
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            emitted = run_reversible(steps, states, list(self.columns.parameters()))
        else:
            emitted = run(steps, states)
        return DeblurOutput(*(
            [emitted[f'{scale}.{i}.{part}'] for i in range(len(self.columns)) for part in ('unet', 'fke')]
            for scale in ('full', 'half')))

    def forward_states(
            self, x: torch.Tensor, half: Optional[torch.Tensor] = None) -> Dict[str, torch.Tensor]:
        """States behind the last column, see `Column.steps`; no head is run."""
        states = self._states(x, half)
        for column in self.columns:
            run(column.steps(emit=False), states)
        return states

    def forward_features(self, x: torch.Tensor, half: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Filtered features (B, C, H, W) behind the last kernel estimator; arguments as of `forward`."""
        return self.forward_states(x, half)['full.feature']

    def forward_head(self, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Filtered features and the blurred picture -> the sharp one."""
        return self.columns[-1].kernel_estimator.head(features) + x

    def forward(
            self,
            x: torch.Tensor,
            half: Optional[torch.Tensor] = None,
            return_kernels: bool = False,
    ) -> Union[torch.Tensor, DeblurOutput, Tuple[torch.Tensor, torch.Tensor]]:
        """Deblur.

        Args:
            x: (B, 3, H, W), floating point in [0, 1].
            half: The same at half the size, where it was made from a picture that `x` is a part of; by default
                `half_size(x)`.
            return_kernels: In evaluation, also return the last estimator's filters, (B, C, 65, 65) (or less, for small
                pictures), one for every channel of the features.

        Returns:
            In evaluation the sharp picture, the same shape, not clamped; in training `DeblurOutput`.

        Raises:
            ValueError: If the shape or the type is wrong.
        """
        if self.training:
            return self.forward_all(x, half)
        states = self.forward_states(x, half)
        image = self.forward_head(states['full.feature'], x)
        if return_kernels:
            estimator = self.columns[-1].kernel_estimator
            return image, estimator.kernels(states[f'full.k{estimator.num_levels - 1}'])
        return image

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that also returns maps of the last column's encoder of the whole picture.

        Args:
            x: (B, 3, H, W).
            indices: Take the last n levels if int, all if None, else these; at strides 1, 2, 4.
            norm: Without effect: there is no norm to apply.
            stop_early: Stop behind the last chosen level; implied by `intermediates_only`.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list of maps alone.

        Returns:
            The filtered features (the last chosen map with `stop_early`) and the maps; or the latter alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"DeepRFTv2's intermediates are 'NCHW', not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        states = self._states(x, None)
        for column in self.columns[:-1]:
            run(column.steps(emit=False), states)
        # the encoder comes first in a column's steps
        encoder = self.columns[-1].encode()[:max_index + 1]
        run(encoder, states)
        maps = [states[f'full.{i}'] for i in take_indices]
        if intermediates_only:
            return maps
        if stop_early:
            return maps[-1], maps
        run(self.columns[-1].steps(emit=False)[len(encoder):], states)
        return states['full.feature'], maps

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what `forward_intermediates(…, intermediates_only=True)` does not need for `indices`."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        for column in self.columns:
            column.head = column.mid_head = nn.Identity()
            column.kernel_estimator.head = column.mid_kernel_estimator.head = nn.Identity()
        last = self.columns[-1]
        last.encoder = last.encoder[:max_index + 1]
        for name in ('decoder', 'kernel_estimator', 'mid_stem', 'mid_fuse', 'to_mid', 'mid_encoder', 'mid_decoder',
                     'mid_kernel_estimator', 'from_mid', 'latent_fuse'):
            setattr(last, name, nn.Identity())
        return take_indices


@torch.fx.wrap
def check_image(x: torch.Tensor) -> None:
    """Raise ValueError if `x` is not (B, 3, H, W) of floating-point numbers with sides that the model can halve."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f'expected RGB (B, 3, H, W) in [0, 1], got shape {tuple(x.shape)}: convert grey or RGBA first')
    if not x.is_floating_point():
        raise ValueError(f'expected floating point numbers in [0, 1], got {x.dtype}: divide uint8 by 255 first')
    height, width = x.shape[2], x.shape[3]
    if height % DIVISOR or width % DIVISOR:
        raise ValueError(f'H and W must be multiples of {DIVISOR}, got {height}x{width}: pad, and crop the result')
    if height < MIN_SIZE or width < MIN_SIZE:
        raise ValueError(f'H and W must be at least {MIN_SIZE}, got {height}x{width}: pad, and crop the result')


# official name -> ours, outside the blocks; {0} is the column
_NAMES = {
    'patch_embed_maxs.{0}.proj': 'columns.{0}.stem',
    'patch_embed_mids.{0}.proj': 'columns.{0}.mid_stem',
    'patch_embed_maxs2.{0}': 'columns.{0}.fuse',
    'patch_embed_mids2.{0}': 'columns.{0}.mid_fuse',
    'down_max1.{0}.body.0': 'columns.{0}.to_mid.0',
    'down_max2.{0}.body.0': 'columns.{0}.to_mid.1',
    'down_max3.{0}.body.0': 'columns.{0}.to_mid.2',
    'down_mid2max.{0}.body.0': 'columns.{0}.from_mid',
    'fusd_max_2.{0}': 'columns.{0}.latent_fuse',
    'output_maxs.{0}': 'columns.{0}.head',
    'output_mids.{0}': 'columns.{0}.mid_head',
}
_PARTS = {
    'subnets_max': 'encoder', 'subnets_mid': 'mid_encoder', 'subdenets_max': 'decoder', 'subdenets_mid': 'mid_decoder',
    'kernel_estimator': 'kernel_estimator', 'mid_kernel_estimator': 'mid_kernel_estimator',
}
_ESTIMATOR_NAMES = {
    'feature_extract.intro_inp.0': 'to_kernel',
    'feature_extract.intro_deconv.0': 'to_feature',
    'intro.ending.0': 'reduce',
    'end_ker1.norm': 'norm',
    'end_ker1.ending.0': 'to_transfer',
    'deblur_feature1.0': 'fuse',
    'end_feature1.0': 'head',
}
_BLOCK_NAMES = {
    'sca.1.weight': 'sca.weight', 'sca.1.bias': 'sca.bias', 'attn.x_proj_weight': 'attn.x_proj.weight',
    'attn.dt_projs_weight': 'attn.dt_proj.weight', 'attn.dt_projs_bias': 'attn.dt_proj.bias',
    'attn.A_logs': 'attn.A_log', 'attn.Ds': 'attn.D',
}
_LEVEL_NAMES = {
    'fusion.down.0.body.0': 'down', 'fusion.up.0.body.0': 'up.0', 'fusion.concat_conv.0': 'fuse',
    'fusion.down.0': 'fuse',
}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename an official checkpoint's entries to ours; a state dict of ours passes unchanged.

    Args:
        state_dict: Official or own state dict, bare or under 'params' or 'state_dict', with or without 'module.'.
        model: The model to load it into.

    Raises:
        ValueError: If an entry of an official checkpoint is not known.
    """
    for key in ('params', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if any(name.startswith('module.') for name in state_dict):
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    if not any(name.startswith('global_model.') for name in state_dict):
        return state_dict
    return {
        _own_name(name.removeprefix('global_model.')): value.squeeze(0) if _has_axis_of_directions(name) else value
        for name, value in state_dict.items()}


def _has_axis_of_directions(name: str) -> bool:
    """Whether an official entry has a first axis for directions of the scan, of which there is one."""
    return name.endswith(('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias'))


def _own_name(name: str) -> str:
    part, column, rest = (name.split('.', 2) + ['', ''])[:3]
    prefix = f'columns.{column}.{_PARTS.get(part)}'
    if part in ('subnets_max', 'subnets_mid', 'subdenets_max', 'subdenets_mid'):
        own = _level_name(rest)
        if own is not None:
            return f'{prefix}.{own}'
    elif part in _PARTS:
        stem, _, leaf = rest.rpartition('.')
        if stem in _ESTIMATOR_NAMES:
            return f'{prefix}.{_ESTIMATOR_NAMES[stem]}.{leaf}'
        own = _level_name(rest.removeprefix('subnets_ker.'))
        if own is not None:
            return f'{prefix}.levels.{own}'
    else:
        stem, _, leaf = name.rpartition('.')
        for official, ours in _NAMES.items():
            if stem == official.format(column):
                return f'{ours.format(column)}.{leaf}'
    raise ValueError(f"'{name}' is not an entry of an official checkpoint")


def _level_name(rest: str) -> Optional[str]:
    """`alpha2`, `level2.blocks.3.conv1.bias` or `level2.fusion.….weight` -> ours."""
    if match := re.fullmatch(r'alpha(\d)', rest):
        return f'{match[1]}.alpha'
    match = re.fullmatch(r'level(\d)\.(.+)', rest)
    if match is None:
        return None
    if block := re.fullmatch(r'blocks\.(\d+)\.(.+)', match[2]):
        return f'{match[1]}.blocks.{block[1]}.{_BLOCK_NAMES.get(block[2], block[2])}'
    stem, _, leaf = match[2].rpartition('.')
    return f'{match[1]}.{_LEVEL_NAMES[stem]}.{leaf}' if stem in _LEVEL_NAMES else None


def _create_deeprftv2(variant: str, pretrained: bool = False, **kwargs: Any) -> DeepRFTv2:
    return build_model(
        DeepRFTv2,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', (0, 1, 2)), feature_cls='getter'),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 0, 'input_size': (3, 256, 256), 'min_input_size': (3, MIN_SIZE, MIN_SIZE), 'pool_size': None,
        'fixed_input_size': False, 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0., 0., 0.), 'std': (1., 1., 1.),
        'first_conv': tuple(f'columns.{i}.{stem}' for i in range(2) for stem in ('stem', 'mid_stem')),
        'classifier': None,
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2511.21132',
        'paper_name': 'DeepRFTv2: Kernel-level Learning for Image Deblurring',
        'origin_url': 'https://github.com/INVOKERer/DeepRFTv2',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'deeprftv2_s': _cfg(),
    'deeprftv2_b': _cfg(),
    'deeprftv2_tiny': _cfg(input_size=(3, 64, 64)),
    'deeprftv2_tiny.bsds500': _cfg(
        input_size=(3, 64, 64), hf_hub_id='vishub/deeprftv2_tiny.bsds500', license='other'),
})


@register_model
def deeprftv2_s(pretrained: bool = False, **kwargs: Any) -> DeepRFTv2:
    """DeepRFTv2-S, the defocus form: convolutions alone outside the kernel estimators."""
    return _create_deeprftv2('deeprftv2_s', pretrained, **kwargs)


@register_model
def deeprftv2_b(pretrained: bool = False, **kwargs: Any) -> DeepRFTv2:
    """DeepRFTv2-B, the motion form: selective scans on the two coarser levels of the whole picture."""
    model_args = dict(block_types=('naf', 'nafevs', 'nafevs'))
    return _create_deeprftv2('deeprftv2_b', pretrained, **dict(model_args, **kwargs))


@register_model
def deeprftv2_tiny(pretrained: bool = False, **kwargs: Any) -> DeepRFTv2:
    """Small enough to train on a CPU: a third of the width, half of the depth."""
    model_args = dict(dim=16, kernel_dim=16, depths=(1, 2, 4))
    return _create_deeprftv2('deeprftv2_tiny', pretrained, **dict(model_args, **kwargs))
