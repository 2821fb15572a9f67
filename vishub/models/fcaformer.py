"""FcaFormer: a hybrid of convolution and attention whose blocks hand a few tokens forward to all later blocks.

Paper: `Fcaformer: Forward Cross Attention in Hybrid Vision Transformer` - https://arxiv.org/abs/2211.07198
(ICCV 2023; its first version called the network CabViT)

Official code: https://github.com/hkzhang-git/FcaFormer. That repository carries no licence, so nothing is taken from
it: this file was written from a description of the architecture, and reproduces the outputs of the official
classes `FcaFormer` and `FcaFormer_SH_512` (commit 7dcd8e0) on converted state dicts. Licence of this file: Apache-2.0.

Stages 1 and 2 are ConvNeXt blocks. Stages 3 and 4 are attention blocks, and each of them also condenses its map
with a strided depthwise convolution to `m = ceil(h / 4) * ceil(w / 4)` *cross tokens*, which all later blocks of the
stage add to their keys and values, calibrated by learned factors: the forward cross attention.

Where paper and code disagree, the code is followed: a LayerNorm comes after the learned factors (and nearly cancels
a positive factor), the MLP has a LayerNorm of its own after `norm2`, cross keys carry a learned bias, and in the
dense form padding is not masked and cross tokens stay with the number of their window although windows shift.

Citation:
    @inproceedings{zhang2023fcaformer,
        title={FcaFormer: Forward Cross Attention in Hybrid Vision Transformer},
        author={Zhang, Haokui and Hu, Wenze and Wang, Xiaoyu},
        booktitle={ICCV}, year={2023}
    }
"""
import math
import re
from typing import Any, Dict, Final, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    Mlp,
    SelectAdaptivePool2d,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.utils import reparameterize_model
from torch import nn

from vishub.models.builder import build_model

__all__ = ['FcaFormer']

# A cached attention bias larger than this many elements (64 MB in float32) costs more memory than it saves time.
_MAX_CACHED_BIAS = 2 ** 24


def fold_conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold a batch norm in eval mode into the convolution before it.

    Args:
        conv: Convolution, with or without bias.
        norm: Batch norm over its output channels; its running statistics are used.

    Returns:
        One convolution with bias, on the device and in the dtype of `conv`.
    """
    with torch.no_grad():
        # Statistics of a half-precision model are combined in float32, and rounded once.
        scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
        shift = norm.bias.float() - norm.running_mean.float() * scale
        if conv.bias is not None:
            shift = shift + conv.bias.float() * scale
        folded = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        folded.weight.copy_(conv.weight.float() * scale[:, None, None, None])
        folded.bias.copy_(shift)
    return folded.train(conv.training)


def resize_token_maps(maps: torch.Tensor, old_size: Tuple[int, int], new_size: Tuple[int, int]) -> torch.Tensor:
    """Resize values that belong to the tokens of one or more row-major grids (bicubic).

    The official code has no such conversion; this is an extension of ours.

    Args:
        maps: (..., k * old_h * old_w), k grids one after the other.
        old_size: Height and width of each grid.
        new_size: Height and width wanted.

    Returns:
        (..., k * new_h * new_w), in the dtype of `maps`.
    """
    if old_size == new_size:
        return maps
    grids = maps.detach().float().reshape(-1, 1, old_size[0], old_size[1])
    grids = F.interpolate(grids, size=new_size, mode='bicubic', align_corners=False)
    return grids.reshape(maps.shape[:-1] + (-1,)).to(maps.dtype)


@torch.fx.wrap
def check_images(x: torch.Tensor, in_chans: int, fixed_size: Optional[Tuple[int, int]]) -> torch.Tensor:
    """Return `x`, or raise ValueError if it is not (B, in_chans, H, W), or not of `fixed_size` where that is given."""
    if x.ndim != 4:
        raise ValueError(f'expected a batch of images (B, {in_chans}, H, W), got {x.ndim} dimensions')
    if x.shape[1] != in_chans:
        raise ValueError(f'expected {in_chans} input channels, got {x.shape[1]}')
    if fixed_size is not None and (x.shape[2] != fixed_size[0] or x.shape[3] != fixed_size[1]):
        raise ValueError(
            f'input {x.shape[2]}x{x.shape[3]} does not match model img_size ({fixed_size[0]}, {fixed_size[1]})')
    return x


@torch.fx.wrap
def offset_index(height: int, width: int, device: torch.device) -> torch.Tensor:
    """|dy| * width + |dx| of every pair of the N = height * width tokens of a map (row-major), int64 (N * N,)."""
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    dy = (y[:, None] - y[None, :]).abs()
    dx = (x[:, None] - x[None, :]).abs()
    return (dy[:, None, :, None] * width + dx[None, :, None, :]).flatten()


def cross_grid(resolution: Tuple[int, int]) -> Tuple[int, int]:
    """Height and width of the cross tokens that a map of `resolution` (height, width) is condensed to."""
    return math.ceil(resolution[0] / 4), math.ceil(resolution[1] / 4)


@torch.fx.wrap
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Softmax attention of q (B, heads, N, d) to k and v (B, heads, M, d) with a bias (1, heads, N, M)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)


@torch.fx.wrap
def condense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Depthwise 7x7 convolution with stride 4 of x (B, C, h, w), with that part of `weight` that meets the map."""
    h, w = x.shape[2], x.shape[3]
    padding = [3, 3]
    if h <= 3:
        weight, padding[0] = weight[:, :, 3:3 + h], 0
    if w <= 3:
        weight, padding[1] = weight[:, :, :, 3:3 + w], 0
    return F.conv2d(x, weight, None, [4, 4], padding, [1, 1], x.shape[1])


class Stem(nn.Module):
    """Two convolutions with stride 2, (B, in_chans, H, W) -> (B, dim, H / 4, W / 4)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def fuse(self) -> 'Stem':
        """Fold both batch norms, in place."""
        if isinstance(self.bn1, nn.BatchNorm2d):
            self.conv1, self.bn1 = fold_conv_norm(self.conv1, self.bn1), nn.Identity()
            self.conv2, self.bn2 = fold_conv_norm(self.conv2, self.bn2), nn.Identity()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Depthwise convolutions and LayerNorm both want channels last. One copy of the small input keeps every later
        # NCHW <-> NHWC <-> tokens change a free view.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.act(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Downsample(nn.Module):
    """Point-wise, depthwise (stride 2), point-wise: (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def fuse(self) -> 'Downsample':
        """Fold the three batch norms, in place."""
        if isinstance(self.bn1, nn.BatchNorm2d):
            self.conv1, self.bn1 = fold_conv_norm(self.conv1, self.bn1), nn.Identity()
            self.conv2, self.bn2 = fold_conv_norm(self.conv2, self.bn2), nn.Identity()
            self.conv3, self.bn3 = fold_conv_norm(self.conv3, self.bn3), nn.Identity()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block, NCHW in and out."""

    def __init__(
            self,
            dim: int,
            mlp_ratio: float = 4.,
            drop_path: float = 0.,
            layer_scale_init_value: float = 1e-6,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value))
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # B, C, H, W -> B, H, W, C
        y = self.mlp(self.norm(y)) * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class FcaAttention(nn.Module):
    """Multi-head attention of a map's tokens to themselves and to the cross tokens of earlier blocks.

    Args:
        dim: Channels, a multiple of `num_heads`.
        num_heads: Heads.
        resolution: Height and width of the map, N = height * width tokens.
        num_cross: Number of cross tokens.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
    """
    fused_attn: Final[bool]
    _bias_cache: Optional[Tuple[List[torch.Tensor], torch.Tensor]]  # copies of the tables, their bias
    # The cache belongs to eager mode; torch.jit.script must not look at it.
    __jit_ignored_attributes__: List[str] = ['_bias_cache']

    def __init__(
            self,
            dim: int,
            num_heads: int,
            resolution: Tuple[int, int],
            num_cross: int = 0,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.height, self.width = resolution
        self.num_cross = num_cross
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_bias = nn.Parameter(torch.zeros(num_heads, self.height * self.width))
        self.cross_bias = nn.Parameter(torch.zeros(1, num_heads, 1, num_cross)) if num_cross else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self._bias_cache = None

    def set_resolution(self, resolution: Tuple[int, int]) -> None:
        """Resize the bias tables to a map of `resolution` (height, width)."""
        old = (self.height, self.width)
        self.rel_bias = nn.Parameter(resize_token_maps(self.rel_bias, old, resolution))
        if self.cross_bias is not None:
            self.cross_bias = nn.Parameter(
                resize_token_maps(self.cross_bias, cross_grid(old), cross_grid(resolution)))
            self.num_cross = self.cross_bias.shape[-1]
        self.height, self.width = resolution

    def build_bias(self) -> torch.Tensor:
        """Bias of every query and key, (1, heads, N, N + num_cross).

        Between two tokens it is `rel_bias[head, |dy| * w + |dx|]`, for a cross token it is the same for all queries.
        """
        h, w = self.height, self.width
        index = offset_index(h, w, self.rel_bias.device)
        # index_select is several times faster than indexing, forward and backward.
        bias = self.rel_bias.index_select(1, index).view(1, self.num_heads, h * w, h * w)
        if self.cross_bias is not None:
            bias = torch.cat([bias, self.cross_bias.expand(-1, -1, h * w, -1)], dim=-1)
        return bias

    @torch.jit.unused
    def cached_bias(self) -> torch.Tensor:
        """`build_bias()`, kept in eager inference on the CPU for as long as the tables hold the same values."""
        size = self.num_heads * (self.height * self.width) * (self.height * self.width + self.num_cross)
        if (
                torch.is_grad_enabled()
                or isinstance(self.rel_bias, torch.fx.Proxy)
                or torch.compiler.is_compiling()
                or torch.jit.is_tracing()
                # Looking at values would make the host wait for the device.
                or self.rel_bias.device.type != 'cpu'
                or size > _MAX_CACHED_BIAS
        ):
            return self.build_bias()
        # The tables are small: comparing them is almost free, and sees writes that no version counter sees.
        tables = [self.rel_bias] if self.cross_bias is None else [self.rel_bias, self.cross_bias]
        cache = self._bias_cache
        if cache is None or not all(
                kept.dtype == table.dtype and torch.equal(kept, table) for kept, table in zip(cache[0], tables)):
            # A tensor made under inference_mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                cache = ([table.clone() for table in tables], self.build_bias())
            self._bias_cache = cache
        return cache[1]

    def forward(self, x: torch.Tensor, cross: Optional[torch.Tensor] = None) -> torch.Tensor:
        """x (B, N, C), cross (B, num_cross, C) or None -> (B, N, C)."""
        B, N, C = x.shape
        if cross is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            # Cross tokens ask nothing: the rows of q are left out. Concatenated before the projection, keys and
            # values need one copy of the tokens instead of one copy each.
            keys = torch.cat([x, cross], dim=1)  # B, N + num_cross, C
            q = F.linear(x, self.qkv.weight[:C], self.qkv.bias[:C])
            k, v = F.linear(keys, self.qkv.weight[C:], self.qkv.bias[C:]).chunk(2, dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # B, N, C -> B, heads, N, C / heads
        k = k.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        if torch.jit.is_scripting():
            bias = self.build_bias()
        else:
            bias = self.cached_bias()
        bias = bias.to(q.dtype)

        if self.fused_attn:
            x = attend(q, k, v, bias, self.attn_drop.p if self.training else 0.)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1) + bias
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)  # B, heads, N, C / heads -> B, N, C
        return self.proj_drop(self.proj(x))


class NormMlp(nn.Module):
    """MLP with a LayerNorm of its own in front."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop1(self.act(self.fc1(self.norm(x))))
        return self.drop2(self.fc2(x))


class LocalConv(nn.Module):
    """Depthwise 3x3 convolution and batch norm, without residual and without activation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def fuse(self) -> 'LocalConv':
        """Fold the batch norm, in place."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fold_conv_norm(self.conv, self.bn), nn.Identity()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class CrossConv(nn.Conv2d):
    """Depthwise 7x7 convolution with stride 4 that condenses a map (B, C, h, w) to cross tokens (B, C, h / 4, w / 4).

    On a side of at most 3 pixels only a part of the kernel meets the map; just that part is used, which gives the same
    numbers. The whole kernel must not be: for such maps oneDNN's bfloat16 gradient of the weights (channels last, as of
    torch 2.14) reads memory that nobody wrote.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 7, stride=4, padding=3, groups=dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return condense(x, self.weight)


class FcaBlock(nn.Module):
    """Attention with cross tokens, local convolution, MLP.

    Args:
        dim: Channels.
        num_heads: Heads.
        resolution: Height and width of the map (or of a window).
        num_past: Number of earlier blocks whose cross tokens it attends to.
        makes_cross: Whether it makes cross tokens for later blocks.
        mlp_ratio: Hidden width of the MLP relative to `dim`.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the attention's output and in the MLP.
        drop_path: Rate of stochastic depth.
        layer_scale_init_value: Start value of the residual branches' scales.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            resolution: Tuple[int, int],
            num_past: int = 0,
            makes_cross: bool = True,
            mlp_ratio: float = 4.,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            layer_scale_init_value: float = 1e-6,
    ) -> None:
        super().__init__()
        self.height, self.width = resolution
        num_cross = num_past * math.prod(cross_grid(resolution))

        self.norm1 = nn.LayerNorm(dim)
        self.cross_scale = nn.Parameter(torch.ones(1, num_cross, 1)) if num_cross else None
        self.cross_norm = nn.LayerNorm(dim) if num_cross else None
        self.attn = FcaAttention(dim, num_heads, resolution, num_cross, attn_drop=attn_drop, proj_drop=proj_drop)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init_value))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

        self.cross_conv = CrossConv(dim) if makes_cross else None
        self.local = LocalConv(dim)

        self.norm2 = nn.LayerNorm(dim)
        self.mlp = NormMlp(dim, int(mlp_ratio * dim), drop=proj_drop)
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init_value))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def set_resolution(self, resolution: Tuple[int, int]) -> None:
        """Resize everything that belongs to single tokens to a map of `resolution` (height, width)."""
        if self.cross_scale is not None:
            old = cross_grid((self.height, self.width))
            scale = resize_token_maps(self.cross_scale.transpose(1, 2), old, cross_grid(resolution))
            self.cross_scale = nn.Parameter(scale.transpose(1, 2).contiguous())
        self.attn.set_resolution(resolution)
        self.height, self.width = resolution

    def forward(
            self,
            x: torch.Tensor,
            cross: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """x (B, N, C), cross (B, num_past * m, C), oldest block first -> x (B, N, C), new cross tokens (B, m, C)."""
        B, N, C = x.shape
        if self.cross_norm is not None and self.cross_scale is not None:
            assert cross is not None, 'this block needs the cross tokens of the blocks before it'
            cross = self.cross_norm(cross * self.cross_scale)
        else:
            cross = None
        x = x + self.drop_path1(self.gamma1 * self.attn(self.norm1(x), cross))

        x = x.transpose(1, 2).unflatten(2, (self.height, self.width))  # B, N, C -> B, C, h, w (a view)
        # Cross tokens are taken before the local convolution.
        new_cross: Optional[torch.Tensor] = None
        if self.cross_conv is not None:
            new_cross = self.cross_conv(x).flatten(2).transpose(1, 2)  # B, C, h / 4, w / 4 -> B, m, C
        x = self.local(x).flatten(2).transpose(1, 2)  # B, C, h, w -> B, N, C

        x = x + self.drop_path2(self.gamma2 * self.mlp(self.norm2(x)))
        return x, new_cross


class ConvNeXtStage(nn.Module):
    """Down-sampling (but in the first stage) and ConvNeXt blocks, NCHW in and out."""

    def __init__(
            self,
            in_dim: int,
            dim: int,
            depth: int,
            mlp_ratio: float,
            drop_path: List[float],
            layer_scale_init_value: float,
            downsample: bool = True,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = Downsample(in_dim, dim) if downsample else nn.Identity()
        self.blocks = nn.ModuleList([
            ConvNeXtBlock(dim, mlp_ratio, drop_path=drop_path[i], layer_scale_init_value=layer_scale_init_value)
            for i in range(depth)
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class FcaStage(nn.Module):
    """Down-sampling and FcaFormer blocks, NCHW in and out, on the whole map or on windows.

    Args:
        in_dim: Channels of the stage before.
        dim: Channels.
        depth: Number of blocks.
        num_heads: Heads.
        resolution: Height and width of the map, or of the windows.
        windowed: Cut the map, of any size, to windows of `resolution`.
        cab_max_d: From how many earlier blocks cross tokens are used at most; None: all.
        cross_tokens: False leaves the forward cross attention out (for ablations).
        mlp_ratio, attn_drop, proj_drop, layer_scale_init_value: As in `FcaBlock`.
        drop_path: Rate of stochastic depth, one a block.
    """

    def __init__(
            self,
            in_dim: int,
            dim: int,
            depth: int,
            num_heads: int,
            resolution: Tuple[int, int],
            windowed: bool,
            cab_max_d: Optional[int],
            cross_tokens: bool,
            mlp_ratio: float,
            attn_drop: float,
            proj_drop: float,
            drop_path: List[float],
            layer_scale_init_value: float,
    ) -> None:
        super().__init__()
        self.height, self.width = resolution
        self.windowed = windowed
        self.grad_checkpointing = False
        max_past = 0 if not cross_tokens else depth if cab_max_d is None else cab_max_d
        self.max_past = max(max_past, 1)  # how many cross tokens the loop hands on; without any there are none to hand

        self.downsample = Downsample(in_dim, dim)
        self.blocks = nn.ModuleList([
            FcaBlock(
                dim,
                num_heads,
                resolution,
                num_past=min(i, max_past),
                makes_cross=cross_tokens and i < depth - 1,
                mlp_ratio=mlp_ratio,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                drop_path=drop_path[i],
                layer_scale_init_value=layer_scale_init_value,
            )
            for i in range(depth)
        ])

    def set_resolution(self, resolution: Tuple[int, int]) -> None:
        """Resize the blocks to a map of `resolution` (height, width)."""
        for block in self.blocks:
            block.set_resolution(resolution)
        self.height, self.width = resolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)  # B, C, H, W -> B, H, W, C
        B, H, W, C = x.shape
        h, w = self.height, self.width
        pad_h, pad_w = (h - H % h) % h, (w - W % w) % w
        rows, cols = (H + pad_h) // h, (W + pad_w) // w
        if not self.windowed:
            pad_h, pad_w, rows, cols = 0, 0, 1, 1

        cross: List[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            # Windows shift by the padding: it is left and top in even blocks, right and bottom in odd ones.
            top, left = (pad_h, pad_w) if i % 2 == 0 else (0, 0)
            if pad_h > 0 or pad_w > 0:
                x = F.pad(x, (0, 0, left, pad_w - left, top, pad_h - top))
            # B, rows * h, cols * w, C -> B * rows * cols, h * w, C
            x = x.reshape(B, rows, h, cols, w, C).transpose(2, 3).reshape(B * rows * cols, h * w, C)

            past = torch.cat(cross[-self.max_past:], dim=1) if len(cross) > 0 else None
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, new_cross = checkpoint(block, x, past)
            else:
                x, new_cross = block(x, past)
            if new_cross is not None:
                cross.append(new_cross)

            x = x.reshape(B, rows, cols, h, w, C).transpose(2, 3).reshape(B, rows * h, cols * w, C)
            if pad_h > 0 or pad_w > 0:
                x = x[:, top:top + H, left:left + W]
        return x.permute(0, 3, 1, 2)  # B, H, W, C -> B, C, H, W


class ClassifierHead(nn.Module):
    """Pool, LayerNorm, dropout, linear; without pooling a map of logits, (B, num_classes, h, w)."""

    def __init__(self, dim: int, num_classes: int, pool_type: str = 'avg', drop_rate: float = 0.) -> None:
        super().__init__()
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        is_map = self.global_pool.pool_type == ''
        if is_map:
            x = x.permute(0, 2, 3, 1)
        x = self.drop(self.norm(x))
        if not pre_logits:
            x = self.fc(x)
        return x.permute(0, 3, 1, 2) if is_map else x


class FcaFormer(nn.Module):
    """FcaFormer (arXiv 2211.07198; stem, stages and head as in the official code).

    Input: (B, in_chans, H, W) float, normalised with the mean and deviation of the pretrained_cfg. Without windows H
    and W must equal `img_size`; with `window_size` any size will do. Output: logits (B, num_classes).

    Args:
        img_size: Height and width of the input, multiples of 32. Not used with `window_size`.
        in_chans: Channels of the input.
        num_classes: Number of classes; 0: the pooled and normalised features, (B, embed_dims[-1]).
        global_pool: 'avg', or '' for a map of logits (or features), (B, num_classes, H / 32, W / 32).
        embed_dims: Channels of the four stages.
        depths: Blocks of the four stages.
        num_heads: Heads of the four stages; 0 in the first two, which have no attention.
        mlp_ratio: Hidden width of every MLP relative to its channels.
        cab_max_d: From how many earlier blocks cross tokens are used at most; None: from all.
        cross_tokens: False leaves the forward cross attention out, for ablations.
        window_size: Side of the windows of stages 3 and 4, in tokens: the dense form. (14, 7) loads weights of
            `img_size` 224 unchanged.
        out_dims: The official dense backbone's projections: intermediate features of stage k are given through a
            1x1 convolution to `out_dims[k]` channels and a LayerNorm. Logits are not touched by them.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of the attention's output and in the MLP, stages 3 and 4.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth, growing linearly from 0 over all blocks.
        layer_scale_init_value: Start value of the residual branches' scales (official: 1e-6).
        head_init_scale: Factor on the initial weights of the classifier.

    Raises:
        ValueError: If sizes do not fit together; the message names them.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Tuple[int, ...] = (64, 128, 192, 320),
            depths: Tuple[int, ...] = (2, 2, 6, 2),
            num_heads: Tuple[int, ...] = (0, 0, 6, 10),
            mlp_ratio: float = 4.,
            cab_max_d: Optional[int] = 12,
            cross_tokens: bool = True,
            window_size: Optional[Tuple[int, int]] = None,
            out_dims: Optional[Tuple[int, ...]] = None,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.1,
            layer_scale_init_value: float = 1e-6,
            head_init_scale: float = 1.,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dims, depths, num_heads, cab_max_d, window_size, out_dims)
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.drop_rate = drop_rate
        self.head_init_scale = head_init_scale
        self.global_pool = global_pool
        self.windowed = window_size is not None
        self.img_size = self._checked_img_size(img_size)
        self.fixed_size: Optional[Tuple[int, int]] = None if self.windowed else self.img_size

        if window_size is not None:
            resolutions = [(window_size[0], window_size[0]), (window_size[1], window_size[1])]
        else:
            resolutions = self._resolutions(self.img_size)
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]

        self.stem = Stem(in_chans, embed_dims[0])
        stages = []
        self.feature_info = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            stage_rates = rates[sum(depths[:i]):sum(depths[:i + 1])]
            if i < 2:
                stages.append(ConvNeXtStage(
                    embed_dims[max(i - 1, 0)],
                    dim,
                    depth,
                    mlp_ratio=mlp_ratio,
                    drop_path=stage_rates,
                    layer_scale_init_value=layer_scale_init_value,
                    downsample=i > 0,
                ))
            else:
                stages.append(FcaStage(
                    embed_dims[i - 1],
                    dim,
                    depth,
                    num_heads[i],
                    resolutions[i - 2],
                    windowed=self.windowed,
                    cab_max_d=cab_max_d,
                    cross_tokens=cross_tokens,
                    mlp_ratio=mlp_ratio,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    drop_path=stage_rates,
                    layer_scale_init_value=layer_scale_init_value,
                ))
            num_chs = dim if out_dims is None else out_dims[i]
            self.feature_info.append(dict(num_chs=num_chs, reduction=4 * 2 ** i, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)

        self.out_convs, self.out_norms = None, None
        if out_dims is not None:
            self.out_convs = nn.ModuleList([
                nn.Conv2d(dim, out_dim, 1, bias=False) for dim, out_dim in zip(embed_dims, out_dims)])
            self.out_norms = nn.ModuleList([LayerNorm2d(out_dim, eps=1e-6) for out_dim in out_dims])

        self.head = ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(self._init_weights)
        self._scale_classifier()

    @staticmethod
    def _init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def _scale_classifier(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            with torch.no_grad():
                self.head.fc.weight.mul_(self.head_init_scale)
                self.head.fc.bias.mul_(self.head_init_scale)

    def _checked_img_size(self, img_size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
        height, width = to_2tuple(img_size)
        if not self.windowed and (height < 32 or width < 32 or height % 32 or width % 32):
            raise ValueError(f'img_size ({height}, {width}) must be multiples of 32')
        return height, width

    @staticmethod
    def _resolutions(img_size: Tuple[int, int]) -> List[Tuple[int, int]]:
        """Height and width of the maps of stages 3 and 4."""
        return [(img_size[0] // stride, img_size[1] // stride) for stride in (16, 32)]

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Resize the model to another input size; biases and factors of tokens are resized bicubically.

        Args:
            img_size: Height and width, multiples of 32.

        Raises:
            ValueError: If the model has windows (it takes any size as it is) or the size does not fit.
        """
        if self.windowed:
            raise ValueError('a model with window_size takes any input size; set_input_size has no meaning for it')
        self.img_size = self.fixed_size = self._checked_img_size(img_size)
        for stage, resolution in zip(self.stages[2:], self._resolutions(self.img_size)):
            stage.set_resolution(resolution)

    def fuse(self) -> 'FcaFormer':
        """Fold every batch norm into the convolution before it, in place, for inference. Returns the model.

        `timm.utils.reparameterize_model(model)` does the same to a copy.
        """
        return reparameterize_model(self, inplace=True)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        # The official recipe decays the tables of biases and factors, which have more than one dimension.
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
            ],  # head and out_convs, which nothing matches, become the last group
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier (and the pooling, 'avg' or '', where given)."""
        if global_pool is not None:
            if global_pool not in ('avg', ''):
                raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
            self.head.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.num_classes = num_classes
        self.head.fc = nn.Identity()
        if num_classes > 0:
            weight = self.stem.conv1.weight
            self.head.fc = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            self._init_weights(self.head.fc)
            self._scale_classifier()
        self.head.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features and the maps of the stages on the way, each before the next down-sampling.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Last n stages if int, all if None, else the stages of these numbers.
            norm: Of no effect: the network has one norm at its end, and it follows the pooling.
            stop_early: Stop after the last stage that is asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            The final features (B, embed_dims[-1], H / 32, W / 32) and the list of maps at strides 4, 8, 16, 32
            (through the projections to `out_dims` where the model has them); or that list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(check_images(x, self.in_chans, self.fixed_size))
        stages = self.stages[:max_index + 1] if stop_early or intermediates_only else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                if self.out_convs is not None and self.out_norms is not None:
                    intermediates.append(self.out_norms[i](self.out_convs[i](x)))
                else:
                    intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the stages of these indices do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if self.out_convs is not None and self.out_norms is not None:
            self.out_convs = self.out_convs[:max_index + 1]
            self.out_norms = self.out_norms[:max_index + 1]
        if prune_norm or prune_end:
            self.head.norm = nn.Identity()
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, embed_dims[-1], H / 32, W / 32)."""
        x = check_images(x, self.in_chans, self.fixed_size)
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Final map -> logits (B, num_classes), or the pooled and normalised features before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _check_sizes(
        embed_dims: Tuple[int, ...],
        depths: Tuple[int, ...],
        num_heads: Tuple[int, ...],
        cab_max_d: Optional[int],
        window_size: Optional[Tuple[int, int]],
        out_dims: Optional[Tuple[int, ...]],
) -> None:
    """Raise ValueError, naming the values, where they do not make an FcaFormer."""
    for name, values in (
            ('embed_dims', embed_dims), ('depths', depths), ('num_heads', num_heads), ('out_dims', out_dims)):
        if values is not None and len(values) != 4:
            raise ValueError(f'{name} must have 4 entries, one a stage, got {tuple(values)}')
    if min(embed_dims) < 1 or embed_dims[0] % 2:
        raise ValueError(f'embed_dims must be positive and embed_dims[0] even, got {tuple(embed_dims)}')
    if min(depths) < 1:
        raise ValueError(f'depths must be at least 1, got {tuple(depths)}')
    if num_heads[0] or num_heads[1]:
        raise ValueError(f'num_heads of the two convolutional stages must be 0, got {tuple(num_heads)}')
    for i in (2, 3):
        if num_heads[i] < 1 or embed_dims[i] % num_heads[i]:
            raise ValueError(
                f'embed_dims[{i}] ({embed_dims[i]}) must be a multiple of num_heads[{i}] ({num_heads[i]})')
    if cab_max_d is not None and cab_max_d < 1:
        raise ValueError(f'cab_max_d must be at least 1 or None (no limit), got {cab_max_d}')
    if window_size is not None and (len(to_2tuple(window_size)) != 2 or min(to_2tuple(window_size)) < 1):
        raise ValueError(f'window_size must be two positive sizes, of stages 3 and 4, got {window_size}')


# Official names of the whole network (stages down-sample at their end there, at their start here) ...
_MODEL_NAMES = (
    (r'^patch_embed\.seq\.0\.c\.', r'stem.conv1.'),
    (r'^patch_embed\.seq\.0\.bn\.', r'stem.bn1.'),
    (r'^patch_embed\.seq\.2\.c\.', r'stem.conv2.'),
    (r'^patch_embed\.seq\.2\.bn\.', r'stem.bn2.'),
    (r'^norm_head\.', r'head.norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^head(\d)\.', r'out_convs.\1.'),
    (r'^norm(\d)\.', r'out_norms.\1.'),
)
# ... and those inside a block.
_BLOCK_NAMES = (
    (r'(^|\.)dwconv\.', r'\1conv_dw.'),
    (r'(^|\.)pwconv([12])\.', r'\1mlp.fc\2.'),
    (r'(^|\.)gamma_([12])$', r'\1gamma\2'),
    (r'(^|\.)dw_conv\.', r'\1cross_conv.'),
    (r'(^|\.)s_token_bias$', r'\1attn.cross_bias'),
    (r'(^|\.)s_norm\.', r'\1cross_norm.'),
    (r'(^|\.)s_scale_factors$', r'\1cross_scale'),
    (r'(^|\.)attention_biases$', r'\1attn.rel_bias'),
    (r'(^|\.)(qkv|proj)\.', r'\1attn.\2.'),
    (r'(^|\.)local_conv\.c\.', r'\1local.conv.'),
    (r'(^|\.)local_conv\.bn\.', r'\1local.bn.'),
)


def _stage_name(name: str) -> str:
    match = re.match(r'^layer_(\d+)\.downsample\.conv(\d)\.(c|bn)\.(.*)$', name)
    if match:
        stage, number, kind, leaf = match.groups()
        return f'stages.{int(stage) + 1}.downsample.{"conv" if kind == "c" else "bn"}{number}.{leaf}'
    return re.sub(r'^layer_(\d+)\.', r'stages.\1.', name)


def _resize_tables(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Fit the tables of tokens to the model's input size, in place (an extension of ours)."""
    for name, module in model.named_modules():
        key = f'{name}.attn.rel_bias' if name else 'attn.rel_bias'
        if not isinstance(module, FcaBlock) or key not in state_dict:
            continue
        new = (module.height, module.width)
        size = state_dict[key].shape[-1]
        if size == new[0] * new[1]:
            continue
        side = math.isqrt(size)
        if side * side != size:
            raise ValueError(
                f'{key} has {size} entries, which is no square map: build the model with the img_size of the '
                'checkpoint, load it, then call set_input_size')
        old = (side, side)
        prefix = key[:-len('attn.rel_bias')]
        state_dict[key] = resize_token_maps(state_dict[key], old, new)
        if f'{prefix}attn.cross_bias' in state_dict:
            bias, scale = state_dict[f'{prefix}attn.cross_bias'], state_dict[f'{prefix}cross_scale']
            state_dict[f'{prefix}attn.cross_bias'] = resize_token_maps(bias, cross_grid(old), cross_grid(new))
            state_dict[f'{prefix}cross_scale'] = resize_token_maps(
                scale.transpose(1, 2), cross_grid(old), cross_grid(new)).transpose(1, 2).contiguous()


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert an official checkpoint (classifier, dense backbone, or one block) to this file's names.

    Args:
        state_dict: The trainer's dictionary (`model_ema`, `model`, `module` or `state_dict`) or the bare state dict.
            A state dict with this file's names is taken as it is.
        model: The model to load into. Tables of tokens are resized to its input size where they differ.

    Returns:
        State dict for `model.load_state_dict`.
    """
    for key in ('model_ema', 'model', 'module', 'state_dict'):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    if any(key.startswith('backbone.') for key in state_dict):
        state_dict = {key[len('backbone.'):]: v for key, v in state_dict.items() if key.startswith('backbone.')}
    state_dict = {key: v for key, v in state_dict.items() if not key.endswith('attention_bias_idxs')}

    is_model = any(key.startswith('layer_') for key in state_dict)
    is_block = 'attention_biases' in state_dict
    if is_model or is_block:
        renamed = {}
        for key, value in state_dict.items():
            if is_model:
                for pattern, replacement in _MODEL_NAMES:
                    key = re.sub(pattern, replacement, key)
                key = _stage_name(key)
            if is_block or key.startswith('stages.'):
                for pattern, replacement in _BLOCK_NAMES:
                    key = re.sub(pattern, replacement, key)
            renamed[key] = value
        state_dict = renamed
    _resize_tables(state_dict, model)
    return state_dict


def _create_fcaformer(variant: str, pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    return build_model(
        FcaFormer,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'fixed_input_size': True, 'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1', 'classifier': 'head.fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2211.07198',
        'paper_name': 'Fcaformer: Forward Cross Attention in Hybrid Vision Transformer',
        'origin_url': 'https://github.com/hkzhang-git/FcaFormer',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'fcaformer_l1': _cfg(),
    # The authors' ImageNet weights of L2 lie on a share and carry no licence: they may not be redistributed.
    'fcaformer_l2': _cfg(),
    'fcaformer_l3': _cfg(),
    'fcaformer_l4': _cfg(),
    'fcaformer_dense_l2': _cfg(fixed_input_size=False, min_input_size=(3, 32, 32)),
    'fcaformer_small64': _cfg(num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    'fcaformer_small64.fashion_mnist': _cfg(
        hf_hub_id='vishub/fcaformer_small64.fashion_mnist', num_classes=10, input_size=(1, 64, 64), pool_size=(2, 2),
        crop_pct=1.0, crop_mode='squash', mean=(0.2874,), std=(0.3537,),
        label_names=(
            'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')),
})


@register_model
def fcaformer_l1(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L1, 6.2 M parameters, 1.4 G MACs at 224."""
    model_args = dict(
        embed_dims=(64, 128, 192, 320), depths=(2, 2, 6, 2), num_heads=(0, 0, 6, 10), drop_path_rate=0.)
    return _create_fcaformer('fcaformer_l1', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fcaformer_l2(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L2, 16.3 M parameters, 3.6 G MACs at 224."""
    model_args = dict(
        embed_dims=(96, 192, 320, 480), depths=(2, 2, 7, 2), num_heads=(0, 0, 10, 15), drop_path_rate=0.1)
    return _create_fcaformer('fcaformer_l2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fcaformer_l3(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L3, 27.9 M parameters, 6.7 G MACs at 224."""
    model_args = dict(
        embed_dims=(96, 192, 320, 512), depths=(3, 6, 12, 3), num_heads=(0, 0, 10, 16), drop_path_rate=0.2)
    return _create_fcaformer('fcaformer_l3', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fcaformer_l4(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L4, 65.6 M parameters, 14.5 G MACs at 224."""
    model_args = dict(
        embed_dims=(128, 256, 512, 768), depths=(3, 6, 12, 3), num_heads=(0, 0, 16, 24), drop_path_rate=0.4)
    return _create_fcaformer('fcaformer_l4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fcaformer_dense_l2(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """The dense backbone: L2 on windows, any input size; features_only gives the four official maps."""
    model_args = dict(
        embed_dims=(96, 192, 320, 480), depths=(2, 2, 7, 2), num_heads=(0, 0, 10, 15), drop_path_rate=0.1,
        window_size=(14, 7), out_dims=(96, 192, 384, 768), cab_max_d=None)
    return _create_fcaformer('fcaformer_dense_l2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fcaformer_small64(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """A small one for images of 64 pixels, 1.9 M parameters, 26 M MACs."""
    model_args = dict(
        embed_dims=(32, 64, 128, 192), depths=(1, 1, 4, 2), num_heads=(0, 0, 4, 6), drop_path_rate=0.,
        layer_scale_init_value=0.1)
    return _create_fcaformer('fcaformer_small64', pretrained=pretrained, **dict(model_args, **kwargs))
