"""FaViT: Factorization Vision Transformer

Paper: `FaViT: Factorization Vision Transformer - Modeling Long Range Dependency with Local Window Cost`
    - https://arxiv.org/abs/2312.08614 (IEEE TNNLS 2023, https://doi.org/10.1109/TNNLS.2023.3342172)

@article{qin2023factorization,
  title={Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost},
  author={Qin, Haolin and Zhou, Daquan and Xu, Tingfa and Bian, Ziyang and Li, Jianan},
  journal={IEEE Transactions on Neural Networks and Learning Systems},
  year={2023}
}

Official code: https://github.com/q2479036243/FaViT. It has no licence file, so nothing of it is copied here: this file
was written from a description of the architecture. Its authors published no weights; checkpoints made with their code
load through `checkpoint_filter_fn`.

The pyramid is PVTv2's. What is new is the attention: channels are split into three groups, and every group lets each
token attend to few keys. The first attends to a strided summary of the whole map, the other two to one summary window
of 7x7 (dilated) samples, which is fused from all windows of the map. Long range at the cost of a window.
"""
import math
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from vishub.models.builder import build_model

__all__ = ['FactorizationVisionTransformer']


def tokens_to_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, N, C) -> (B, C, H, W). Contiguous tokens become a channels-last map without a copy."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


def map_to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C), the inverse of `tokens_to_map`."""
    return x.flatten(2).transpose(1, 2)


@torch.fx.wrap
def window_index(height: int, width: int, window_size: int, dilation: int, device: torch.device) -> torch.Tensor:
    """Which tokens the dilated windows of a map sample.

    The map is cut into square windows of side (window_size - 1) * dilation + 1, each sampled at window_size**2 places.
    Windows that stick out at the bottom or right mirror the map there (without repeating its edge). That is padding
    and unfolding as index arithmetic, so that one gather does both.

    Returns:
        Token indices, int64 of shape (P, L): P = window_size**2 places in a window, L windows, both row-major.
    """
    side = (window_size - 1) * dilation + 1
    offsets = torch.arange(window_size, device=device) * dilation
    # places within windows, windows -> row (column) of the map; h - 1 - |h - 1 - t| is t inside and mirrored beyond
    rows = offsets[:, None] + torch.arange((height + side - 1) // side, device=device) * side
    rows = height - 1 - (height - 1 - rows).abs()
    cols = offsets[:, None] + torch.arange((width + side - 1) // side, device=device) * side
    cols = width - 1 - (width - 1 - cols).abs()
    index = rows[:, None, :, None] * width + cols[None, :, None, :]  # place y, place x, window y, window x
    return index.flatten(2).flatten(0, 1)


@torch.fx.wrap
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Softmax attention of q (B, heads, N, d) to few keys (B, heads, P, d)."""
    # The fused CPU kernel's backward takes 2 to 7 times as long in bfloat16 as that of two plain products.
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == 'cpu' and k.shape[2] <= 64:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return F.dropout(weights.softmax(-1), dropout_p) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


@torch.fx.wrap
def depthwise_conv3x3(
        x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], training: bool) -> torch.Tensor:
    """Depthwise 3x3 convolution that keeps the size of its map."""
    # oneDNN's weight gradient for 2-pixel maps (64-pixel images) is 16 times faster if the padding is not its own.
    if training and x.shape[3] == 2 and x.device.type == 'cpu':
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), weight, bias, groups=x.shape[1])
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


@torch.fx.wrap
def check_image(x: torch.Tensor, in_chans: int, min_size: int, window_size: int) -> torch.Tensor:
    """Return `x`, or raise ValueError if it is not (B, in_chans, H, W) with H, W >= min_size."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f'FaViT expects an input of shape (B, {in_chans}, H, W), got {list(x.shape)}')
    height, width = x.shape[2], x.shape[3]
    if height < min_size or width < min_size:
        raise ValueError(
            f'FaViT needs inputs of at least {min_size}x{min_size} (got {height}x{width}): reflect padding to '
            f'{window_size}x{window_size} dilated windows is impossible below that')
    return x


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 convolution, `depthwise_conv3x3` as a module."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv3x3(x, self.weight, self.bias, self.training)


class Mlp(nn.Module):
    """Two linears with a depthwise 3x3 convolution between them, which is where positions come from."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        x = tokens_to_map(self.fc1(x), height, width)
        x = self.drop1(self.act(map_to_tokens(self.dwconv(x))))
        return self.drop2(self.fc2(x))


class PointDepthKv(nn.Module):
    """Source of the local keys and values: depthwise 3x3 convolution, then a 1x1 convolution kept as a linear.

    The linear works token by token, so the attention applies it after its gather where that leaves fewer tokens.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dw = DepthwiseConv(dim, **dd)
        self.pw = nn.Linear(dim, dim, **dd)


class LocalAttention(nn.Module):
    """Every token attends to one window of P = window_size**2 keys, fused from all L windows of the map.

    Args:
        dim: Channels of the group, divisible by `num_heads`.
        num_heads: Attention heads; d = dim // num_heads channels each.
        window_size: Samples along a window's side.
        pool_mode: 'official' averages runs of L entries of the flattened (window, channel) vector, which mixes
            neighbouring channels. The paper means to fuse windows, but this is what its figures were trained with.
            'window' is our variant that does average every channel over the windows.
        attn_drop: Dropout rate of the attention weights.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            pool_mode: str = 'official',
            attn_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.pool_windows = pool_mode == 'window'
        self.attn_drop = attn_drop
        # Both are shared by the heads. (One linear of their product was measured in inference: no gain.)
        self.mix = nn.Linear(self.head_dim, self.head_dim, **dd)
        self.kv = nn.Linear(self.head_dim, 2 * self.head_dim, **dd)
        self.lepe = DepthwiseConv(dim, **dd)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Fuse the windows: (B, P, heads, L, d) -> (B, P, heads, d)."""
        if self.pool_windows:
            return x.mean(3)
        batch_size, num_places, num_heads, num_windows, head_dim = x.shape
        return x.reshape(batch_size, num_places, num_heads, head_dim, num_windows).mean(-1)

    def forward(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Attend from q (B, heads, N, d) to the windows x (B, P, L, heads * d); returns (B, N, heads * d)."""
        batch_size, num_places, num_windows, dim = x.shape
        x = x.reshape(batch_size, num_places, num_windows, self.num_heads, self.head_dim).transpose(2, 3)
        k, v = self.kv(self.mix(self.pool(x))).chunk(2, dim=-1)  # B, P, heads, d
        v = v.reshape(batch_size, num_places, dim)
        v = v + map_to_tokens(self.lepe(tokens_to_map(v, self.window_size, self.window_size)))
        v = v.reshape(batch_size, num_places, self.num_heads, self.head_dim)
        x = attend(q, k.transpose(1, 2), v.transpose(1, 2), self.attn_drop if self.training else 0.)
        return x.transpose(1, 2).flatten(2)  # B, heads, N, d -> B, N, heads * d


class FactorizedAttention(nn.Module):
    """Factorization self-attention (FaSA): a global group of channels and one or two groups of local windows.

    Args:
        dim: Channels C; divisible by 16, or by 8 where `sr_ratio` is 1.
        num_heads: Heads of the local groups (the global group has one).
        sr_ratio: Stride of the global summary, and dilation of the second local group; 1 leaves that group out.
        window_size, pool_mode: See `LocalAttention`.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            sr_ratio: int,
            window_size: int = 7,
            pool_mode: str = 'official',
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim % (8 if sr_ratio == 1 else 16):
            raise ValueError(
                f'embed_dim {dim} must be divisible by {8 if sr_ratio == 1 else 16} (num_heads {num_heads}, '
                f'sr_ratio {sr_ratio})')
        self.global_dim = dim // 8
        self.local_dim = dim - self.global_dim
        # one group of 7/8 of the channels, or two of 7/16
        self.dilations = dilations_of(sr_ratio)
        self.group_dim = self.local_dim // len(self.dilations)
        if self.group_dim % num_heads:
            raise ValueError(
                f'embed_dim {dim} gives local groups of {self.group_dim} channels, which num_heads {num_heads} '
                'does not divide')
        self.num_heads = num_heads
        self.attn_drop = attn_drop

        self.q = nn.Linear(dim, dim, **dd)
        self.global_reduce = nn.Conv2d(self.global_dim, self.global_dim, sr_ratio, stride=sr_ratio, **dd)
        self.global_norm = nn.LayerNorm(self.global_dim, eps=1e-5, **dd)
        self.global_kv = nn.Linear(self.global_dim, 2 * self.global_dim, **dd)
        self.global_lepe = DepthwiseConv(self.global_dim, **dd)
        self.local_kv = PointDepthKv(self.local_dim, **dd)
        self.local = nn.ModuleList([
            LocalAttention(self.group_dim, num_heads, window_size, pool_mode, attn_drop, **dd)
            for _ in self.dilations])
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend_global(self, q: torch.Tensor, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Attend from q (B, N, c0) to the strided summary of x (B, N, c0)."""
        x = self.global_reduce(tokens_to_map(x, height, width))
        height, width = x.shape[2], x.shape[3]
        k, v = self.global_kv(self.global_norm(map_to_tokens(x))).chunk(2, dim=-1)
        v = v + map_to_tokens(self.global_lepe(tokens_to_map(v, height, width)))
        # one head: B, N, c0 -> B, 1, N, c0
        x = attend(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), self.attn_drop if self.training else 0.)
        return x.squeeze(1)

    def forward(self, x: torch.Tensor, height: int, width: int, indices: List[torch.Tensor]) -> torch.Tensor:
        """Attend within x (B, N, C), N = height * width; `indices` holds a `window_index` for every local group."""
        q_global, q_local = self.q(x).split([self.global_dim, self.local_dim], dim=-1)
        x_global, x_local = x.split([self.global_dim, self.local_dim], dim=-1)
        outputs = [self.attend_global(q_global, x_global, height, width)]

        # The queries are cut within every head, keys and values are not: group 1 gets the first part of all heads.
        q_local = q_local.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)  # B, heads, N, Cl / heads
        qs = q_local.chunk(len(self.local), dim=-1)
        x_local = map_to_tokens(self.local_kv.dw(tokens_to_map(x_local, height, width)))
        weights = self.local_kv.pw.weight.chunk(len(self.local))
        biases = self.local_kv.pw.bias.chunk(len(self.local))
        for i, attention in enumerate(self.local):
            # Samples of a dilated window are never more than the tokens, those of plain windows never fewer: gather
            # first, or project first.
            if i == 0:
                windows = F.linear(x_local, weights[i], biases[i]).index_select(1, indices[i].flatten())
            else:
                windows = F.linear(x_local.index_select(1, indices[i].flatten()), weights[i], biases[i])
            windows = windows.unflatten(1, indices[i].shape)  # B, P * L, c -> B, P, L, c
            outputs.append(attention(qs[i], windows))
        return self.proj_drop(self.proj(torch.cat(outputs, dim=-1)))


def dilations_of(sr_ratio: int) -> Tuple[int, ...]:
    """Dilation of the windows of every local group."""
    return (1,) if sr_ratio == 1 else (1, sr_ratio)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            sr_ratio: int,
            mlp_ratio: float = 4.,
            window_size: int = 7,
            pool_mode: str = 'official',
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = FactorizedAttention(
            dim, num_heads, sr_ratio, window_size, pool_mode, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, height: int, width: int, indices: List[torch.Tensor]) -> torch.Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), height, width, indices))
        x = x + self.drop_path2(self.mlp(self.norm2(x), height, width))
        return x


class OverlapPatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""

    def __init__(
            self, in_chans: int, embed_dim: int, kernel_size: int, stride: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride=stride, padding=kernel_size // 2, **dd)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        return tokens_to_map(self.norm(map_to_tokens(x)), x.shape[2], x.shape[3])


class Stage(nn.Module):
    """Downsampling, blocks and the LayerNorm that closes the stage; maps are NCHW in and out."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            depth: int,
            num_heads: int,
            sr_ratio: int,
            mlp_ratio: float,
            window_size: int,
            pool_mode: str,
            downsample: bool,
            proj_drop: float,
            attn_drop: float,
            drop_path: List[float],
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.window_size = window_size
        self.dilations = dilations_of(sr_ratio)
        self.grad_checkpointing = False
        if downsample:
            self.downsample = OverlapPatchEmbed(in_chans, dim, kernel_size=3, stride=2, **dd)
        else:
            self.downsample = nn.Identity()
        self.blocks = nn.ModuleList([
            Block(
                dim, num_heads, sr_ratio, mlp_ratio, window_size, pool_mode,
                proj_drop=proj_drop, attn_drop=attn_drop, drop_path=drop_path[j], **dd)
            for j in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        height, width = x.shape[2], x.shape[3]
        # Made anew for every call and shared by the blocks: a few microseconds, and no cache that threads, tracers
        # or changing image sizes could trip over.
        indices = [window_index(height, width, self.window_size, d, x.device) for d in self.dilations]
        x = map_to_tokens(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width, indices)
            else:
                x = block(x, height, width, indices)
        return tokens_to_map(self.norm(x), height, width)


class FactorizationVisionTransformer(nn.Module):
    """FaViT.

    Input: float (B, in_chans, H, W), normalised. H and W are free, not below `min_size`, and need not be equal.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: 'avg', or '' for no pooling (logits are then a map).
        embed_dims: Channels of every stage.
        depths: Blocks of every stage.
        num_heads: Attention heads of every stage.
        mlp_ratios: Hidden channels of the MLP over channels, of every stage.
        sr_ratios: Stride of the global summary of every stage; also the dilation of its second local group.
        window_size: Samples along the side of a local window (official: always 7).
        pool_mode: How local windows are fused, 'official' or 'window'; see `LocalAttention`.
        drop_rate: Dropout rate of the MLPs, the attention outputs and the classifier.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Stochastic depth, growing linearly over the blocks up to this rate.

    Raises:
        ValueError: If sizes do not fit each other (here), or the image is too small or of another shape (forward).
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Tuple[int, ...] = (64, 128, 256, 512),
            depths: Tuple[int, ...] = (2, 3, 18, 3),
            num_heads: Tuple[int, ...] = (1, 2, 4, 8),
            mlp_ratios: Tuple[float, ...] = (8., 6., 4., 4.),
            sr_ratios: Tuple[int, ...] = (8, 4, 2, 1),
            window_size: int = 7,
            pool_mode: str = 'official',
            drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        num_stages = len(embed_dims)
        for name, sizes in dict(
                depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios).items():
            if len(sizes) != num_stages:
                raise ValueError(f'{name} has {len(sizes)} entries, but there are {num_stages} embed_dims')
        if pool_mode not in ('official', 'window'):
            raise ValueError(f"pool_mode must be 'official' or 'window', not {pool_mode!r}")
        if window_size < 1:
            raise ValueError(f'window_size must be at least 1, not {window_size}')
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = checked_global_pool(global_pool)
        self.window_size = window_size
        self.min_size = min_image_size(sr_ratios, window_size)

        self.patch_embed = OverlapPatchEmbed(in_chans, embed_dims[0], kernel_size=7, stride=4, **dd)
        num_blocks = sum(depths)
        drop_path = [drop_path_rate * i / max(1, num_blocks - 1) for i in range(num_blocks)]
        stages = []
        self.feature_info = []
        for i in range(num_stages):
            first_block = sum(depths[:i])
            try:
                stages.append(Stage(
                    embed_dims[max(0, i - 1)],
                    embed_dims[i],
                    depth=depths[i],
                    num_heads=num_heads[i],
                    sr_ratio=sr_ratios[i],
                    mlp_ratio=mlp_ratios[i],
                    window_size=window_size,
                    pool_mode=pool_mode,
                    downsample=i > 0,
                    proj_drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[first_block:first_block + depths[i]],
                    **dd,
                ))
            except ValueError as error:
                raise ValueError(f'FaViT stage {i + 1}: {error}') from None
            self.feature_info.append(dict(num_chs=embed_dims[i], reduction=4 * 2 ** i, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, PointDepthKv):
                init_conv(module.pw, fan_out=module.pw.out_features)  # a 1x1 convolution by origin

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^patch_embed', blocks=r'^stages\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a new one (none for 0 classes), and the pooling where it is given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = checked_global_pool(global_pool)
        weight = self.patch_embed.proj.weight
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            init_weights(self.head)
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
        """Forward features that also returns the maps of chosen stages.

        Args:
            x: (B, in_chans, H, W).
            indices: Take the last n stages if int, all if None, else these.
            norm: Without effect: each stage ends in a LayerNorm that belongs to the trunk, so all maps are normed.
            stop_early: Stop after the last chosen stage.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list of maps alone.

        Returns:
            The last map and the chosen ones, each (B, C_i, h_i, w_i); or the latter alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"FaViT's intermediates are 'NCHW', not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]

        x = self.patch_embed(check_image(x, self.in_chans, self.min_size, self.window_size))
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what `forward_intermediates` does not need for `indices`; norms stay (see there)."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_end:  # the classifier is made for the last stage, so it goes with it
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 32), ceil(W / 32)), normed."""
        return self.stages(self.patch_embed(check_image(x, self.in_chans, self.min_size, self.window_size)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool, and classify unless `pre_logits`; without pooling the classifier serves every place of the map."""
        if self.global_pool == 'avg':
            x = x.mean((2, 3))
            x = self.head_drop(x)
            return x if pre_logits else self.head(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def checked_global_pool(global_pool: str) -> str:
    if global_pool not in ('avg', ''):
        raise ValueError(f"global_pool must be 'avg' or '', not {global_pool!r}")
    return global_pool


def min_image_size(sr_ratios: Tuple[int, ...], window_size: int) -> int:
    """Smallest image side: in every stage, mirroring must fill a window and the global summary must not be empty."""
    side = 1
    for sr_ratio in reversed(sr_ratios):
        window_side = (window_size - 1) * dilations_of(sr_ratio)[-1] + 1
        # the next stage's map has ceil(side / 2)
        side = max(2 * side - 1, window_side // 2 + 1, sr_ratio)
    return 4 * side - 3


def init_conv(module: nn.Module, fan_out: int) -> None:
    nn.init.normal_(module.weight, std=math.sqrt(2. / fan_out))
    nn.init.zeros_(module.bias)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        init_conv(module, fan_out=module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups)


# official name -> ours, within a block
_BLOCK_NAMES = {
    'attn.sr.': 'attn.global_reduce.',
    'attn.norm.': 'attn.global_norm.',
    'attn.kv_g.': 'attn.global_kv.',
    'attn.local_conv_g.': 'attn.global_lepe.',
    'attn.kv_l.depth_conv.': 'attn.local_kv.dw.',
    'attn.kv_l.point_conv.': 'attn.local_kv.pw.',
    'mlp.dwconv.dwconv.': 'mlp.dwconv.',
}
_GROUP_NAMES = {'fcs': 'mix', 'single_heads': 'kv', 'local_convs': 'lepe'}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename an official checkpoint's entries to ours; a state dict of ours passes unchanged.

    Args:
        state_dict: Official or own state dict, bare or under 'model' or 'state_dict', with or without the prefixes
            'module.' (distributed training) and 'backbone.' (detectors, whose other parts are dropped).
        model: The model to load it into.
    """
    for key in ('model', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    for prefix in ('module.', 'backbone.'):
        if any(name.startswith(prefix) for name in state_dict):
            state_dict = {name[len(prefix):]: v for name, v in state_dict.items() if name.startswith(prefix)}
    if 'patch_embed1.proj.weight' not in state_dict:
        return state_dict

    out = {}
    for name, value in state_dict.items():
        first, _, rest = name.partition('.')
        if first == 'patch_embed1':
            name = f'patch_embed.{rest}'
        elif first.startswith('patch_embed'):
            name = f'stages.{int(first[11:]) - 1}.downsample.{rest}'
        elif first.startswith('norm'):
            name = f'stages.{int(first[4:]) - 1}.norm.{rest}'
        elif first.startswith('block'):
            block, _, rest = rest.partition('.')
            for old, new in _BLOCK_NAMES.items():
                if rest.startswith(old):
                    rest = new + rest[len(old):]
            for old, new in _GROUP_NAMES.items():
                if rest.startswith(f'attn.{old}.'):  # attn.fcs.{group}.weight -> attn.local.{group}.mix.weight
                    group, _, leaf = rest[len(f'attn.{old}.'):].partition('.')
                    rest = f'attn.local.{group}.{new}.{leaf}'
            if rest == 'attn.local_kv.pw.weight':
                value = value.flatten(1)  # 1x1 convolution -> linear
            name = f'stages.{int(first[5:]) - 1}.blocks.{block}.{rest}'
        out[name] = value
    return out


def _create_favit(variant: str, pretrained: bool = False, **kwargs: Any) -> FactorizationVisionTransformer:
    model = build_model(
        FactorizationVisionTransformer,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        tag_args=tag_args,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **kwargs,
    )
    if isinstance(model, FactorizationVisionTransformer):
        # The smallest image follows from window_size and sr_ratios, which the table of configurations does not know.
        min_input_size = (model.in_chans, model.min_size, model.min_size)
        model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, min_input_size=min_input_size)
    return model


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'min_input_size': (3, 97, 97), 'pool_size': (7, 7),
        'fixed_input_size': False, 'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2312.08614',
        'paper_name': 'Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost',
        'origin_url': 'https://github.com/q2479036243/FaViT',
        **kwargs,
    }


# window_size 3; a tag's own size is the one that its weights were trained at last
_SMALL = dict(
    num_classes=10, input_size=(3, 64, 64), min_input_size=(3, 33, 33), pool_size=(2, 2), crop_pct=1.0)
# Mean and standard deviation as the training measured them; a test compares each tag with its weights' config.json.
_CIFAR10 = dict(
    **_SMALL,
    crop_mode='squash',
    mean=(0.4916, 0.4821, 0.4479),
    std=(0.2432, 0.2419, 0.2608),
    label_names=(
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
)
_FASHION_MNIST = dict(
    _SMALL,
    input_size=(1, 48, 48),
    min_input_size=(1, 33, 33),
    pool_size=(2, 2),
    crop_mode='squash',
    mean=(0.2874,),
    std=(0.3537,),
    label_names=(
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
)

# The authors published no weights: an architecture's plain entry has none, the tags are trained by this project.
default_cfgs = generate_default_cfgs({
    'favit_b0': _cfg(),
    'favit_b1': _cfg(),
    'favit_b2': _cfg(),
    'favit_b2.cifar10': _cfg(hf_hub_id='vishub/favit_b2.cifar10', **{**_CIFAR10, 'input_size': (3, 40, 40)}),
    'favit_b3': _cfg(),
    'favit_small64': _cfg(**_SMALL),
    'favit_small64.cifar10': _cfg(
        hf_hub_id='vishub/favit_small64.cifar10',
        **{**_CIFAR10, 'mean': (0.4935, 0.483, 0.4473), 'std': (0.2444, 0.2424, 0.2584)}),
    'favit_small64.fashion_mnist': _cfg(hf_hub_id='vishub/favit_small64.fashion_mnist', **_FASHION_MNIST),
})

# 224-pixel windows do not fit a 64-pixel image.
tag_args = {
    'favit_b2.cifar10': dict(window_size=3),
}


@register_model
def favit_b0(pretrained: bool = False, **kwargs: Any) -> FactorizationVisionTransformer:
    model_args = dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 6, 2))
    return _create_favit('favit_b0', pretrained, **dict(model_args, **kwargs))


@register_model
def favit_b1(pretrained: bool = False, **kwargs: Any) -> FactorizationVisionTransformer:
    model_args = dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 6, 2))
    return _create_favit('favit_b1', pretrained, **dict(model_args, **kwargs))


@register_model
def favit_b2(pretrained: bool = False, **kwargs: Any) -> FactorizationVisionTransformer:
    model_args = dict(embed_dims=(64, 128, 256, 512), depths=(2, 3, 18, 3))
    return _create_favit('favit_b2', pretrained, **dict(model_args, **kwargs))


@register_model
def favit_b3(pretrained: bool = False, **kwargs: Any) -> FactorizationVisionTransformer:
    model_args = dict(embed_dims=(96, 192, 384, 768), depths=(2, 3, 14, 3))
    return _create_favit('favit_b3', pretrained, **dict(model_args, **kwargs))


@register_model
def favit_small64(pretrained: bool = False, **kwargs: Any) -> FactorizationVisionTransformer:
    """For 64-pixel images: narrow, shallow, windows of 3x3."""
    model_args = dict(
        embed_dims=(32, 64, 128, 256), depths=(1, 1, 2, 1), mlp_ratios=(4., 4., 4., 4.), window_size=3)
    return _create_favit('favit_small64', pretrained, **dict(model_args, **kwargs))
