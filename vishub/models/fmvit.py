"""FMViT (reconstruction)

A reconstruction of the multiple-frequency mixing vision transformer from its abstract and its published tables.

Paper: `FMViT: A multiple-frequency mixing Vision Transformer` - https://arxiv.org/abs/2311.05707
Repository of the authors: https://github.com/tany0699/FMViT (Apache-2.0; it holds neither code nor weights)

The authors never released code, so no claim of numerical parity with their model is made. What is reproduced: the
building ideas that the abstract names (mixing of low and high frequencies, gMLP, RLMHSA, CFB, all of them merged into
plain convolutions after training), the parameter and FLOP counts of all five published sizes, and the frame of the
parent design, Next-ViT (https://arxiv.org/abs/2207.05501). Widths, depths and the exact form of each block were
chosen so that those counts come out as published.

Every convolution trains as one or several branches, each with its own BatchNorm. `reparameterize()`, which
`timm.utils.reparameterize_model` finds, merges the branches into one convolution with a bias: the same function in
eval mode, with fewer parameters and operations.

This file was written from the description alone; it is licensed, like all of vishub, under Apache-2.0.
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, make_divisible, trunc_normal_, use_fused_attn
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from vishub.models.builder import build_model

__all__ = ['FMViT']


def merge_norm(weight: torch.Tensor, norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Kernel and bias of the one convolution that equals `norm` (in eval mode) after a convolution.

    With t = gamma / sqrt(var + eps) the kernel is W * t, per output channel, and the bias beta - mean * t. Half
    precision is merged in float32.

    Args:
        weight: Kernel of the convolution (out, in / groups, k, k); it has no bias.
        norm: BatchNorm over `out` channels.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = norm.weight.to(dtype) / torch.sqrt(norm.running_var.to(dtype) + norm.eps)
    return weight.to(dtype) * scale.view(-1, 1, 1, 1), norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale


class MergeableConv(nn.Module):
    """Base of the modules that train as branches with BatchNorm and are deployed as one convolution with a bias.

    A module gives `merged_kernel()`, the kernel and bias of the one convolution that equals it in eval mode, and
    `merge_into_conv(weight, bias)`, which replaces its branches by that convolution. Either form has an attribute
    `conv`, and `conv.bias` tells the deployed form: no training form has that parameter.
    """

    @property
    def is_merged(self) -> bool:
        return self.conv is not None and self.conv.bias is not None

    # torch.jit compiles properties unless told not to, and this one is no part of forward().
    __jit_unused_properties__ = ['is_merged']

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches into one convolution. Irreversible; a second call does nothing.

        Raises:
            RuntimeError: In training mode: the merged form equals the branches only in eval mode.
        """
        if self.is_merged:
            return
        if self.training:
            raise RuntimeError('fmvit: reparameterize() needs eval mode; call model.eval() first')
        self.merge_into_conv(*self.merged_kernel())

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # Without this the user would read a list of some hundred missing and unexpected keys.
        if any(key.startswith(prefix) for key in state_dict):
            is_merged = f'{prefix}conv.bias' in state_dict
            if self.is_merged and not is_merged:
                raise RuntimeError(
                    'fmvit: this checkpoint is in training form; load it before reparameterize() '
                    'or build with deploy=False'
                )
            if is_merged and not self.is_merged:
                raise RuntimeError(
                    'fmvit: this checkpoint is in deployed form; load it after reparameterize() '
                    'or build with deploy=True'
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> nn.Conv2d:
    """A convolution with this kernel and bias, and with the stride, place and type of `conv`."""
    out_chs, in_chs, kernel_size = weight.shape[0], weight.shape[1] * groups, weight.shape[2]
    merged = nn.Conv2d(
        in_chs,
        out_chs,
        kernel_size,
        stride=conv.stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=True,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    merged.weight.copy_(weight)
    merged.bias.copy_(bias)
    return merged.train(conv.training)


class ConvNorm(MergeableConv):
    """Convolution without bias, BatchNorm and, if asked for, ReLU. (B, in, H, W) -> (B, out, H / s, W / s)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            groups: int = 1,
            act: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        self.act = nn.ReLU() if act else nn.Identity()

    def merged_kernel(self) -> Tuple[torch.Tensor, torch.Tensor]:
        if self.is_merged:
            return self.conv.weight, self.conv.bias
        return merge_norm(self.conv.weight, self.bn)

    def merge_into_conv(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.conv = _conv_like(self.conv, weight, bias, groups=self.conv.groups)
        self.bn = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class MultiGroupConv(MergeableConv):
    """1x1 convolution as a sum of grouped ones ("convolutional multi-group reparameterisation", CMR).

    Training: sum over g of BN_g(Conv1x1(x, groups=g)). Deployed: one dense 1x1 convolution whose kernel is the sum
    of the branches' block-diagonal kernels.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        groups: The group counts; 1 must be among them and all must divide both widths. `(1,)` is a plain conv + BN.
    """

    def __init__(self, in_chs: int, out_chs: int, groups: Sequence[int] = (1, 2, 4), device=None, dtype=None):
        super().__init__()
        if 1 not in groups or any(g < 1 or in_chs % g or out_chs % g for g in groups):
            raise ValueError(
                f'fmvit: cmr_groups must contain 1 and divide every width '
                f'(got {tuple(groups)} for {in_chs} -> {out_chs} channels)'
            )
        self.branches = nn.ModuleList([
            ConvNorm(in_chs, out_chs, groups=g, device=device, dtype=dtype) for g in groups])
        self.conv = None

    def merged_kernel(self) -> Tuple[torch.Tensor, torch.Tensor]:
        kernel, bias = 0., 0.
        for branch in self.branches:
            branch_kernel, branch_bias = branch.merged_kernel()
            # out, in / g, 1, 1 -> g blocks (out / g, in / g) -> out, in, 1, 1
            blocks = branch_kernel[:, :, 0, 0].chunk(branch.conv.groups)
            kernel = kernel + torch.block_diag(*blocks)[:, :, None, None]
            bias = bias + branch_bias
        return kernel, bias

    def merge_into_conv(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.conv = _conv_like(self.branches[0].conv, weight, bias, groups=1)
        del self.branches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # An else branch rather than an early return: torch.jit then never looks at the branches that are gone.
        if self.conv is not None:
            return self.conv(x)
        else:
            outputs = [branch(x) for branch in self.branches]
            y = outputs[0]
            for other in outputs[1:]:
                y = y + other
            return y


class DepthwiseMixer(MergeableConv):
    """Depthwise token mixer: BN(3x3) + BN(1x1) + BN(identity), deployed as one depthwise 3x3. (B, C, H, W) kept."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv3x3 = ConvNorm(dim, dim, 3, groups=dim, **dd)
        self.conv1x1 = ConvNorm(dim, dim, 1, groups=dim, **dd)
        self.identity = nn.BatchNorm2d(dim, **dd)
        self.conv = None

    def merged_kernel(self) -> Tuple[torch.Tensor, torch.Tensor]:
        kernel, bias = self.conv3x3.merged_kernel()
        kernel1x1, bias1x1 = self.conv1x1.merged_kernel()
        kernel_id, bias_id = merge_norm(torch.ones_like(kernel1x1), self.identity)
        # The 1x1 kernels become the centre of a 3x3 one.
        return kernel + F.pad(kernel1x1 + kernel_id, (1, 1, 1, 1)), bias + bias1x1 + bias_id

    def merge_into_conv(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        conv = self.conv3x3.conv
        self.conv = _conv_like(conv, weight, bias, groups=conv.groups)
        del self.conv3x3, self.conv1x1, self.identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv is not None:
            return self.conv(x)
        else:
            return self.conv3x3(x) + self.conv1x1(x) + self.identity(x)


class GroupMlp(nn.Module):
    """gMLP: two multi-group 1x1 convolutions with a ReLU between. (B, C, H, W) kept."""

    def __init__(
            self,
            dim: int,
            mlp_ratio: float,
            cmr_groups: Sequence[int],
            drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        hidden_dim = make_divisible(dim * mlp_ratio, 32)
        self.fc1 = MultiGroupConv(dim, hidden_dim, cmr_groups, **dd)
        self.act = nn.ReLU()
        self.fc2 = MultiGroupConv(hidden_dim, dim, cmr_groups, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class LightAttention(nn.Module):
    """RLMHSA: multi-head attention whose keys and values are one shared projection of a pooled map.

    o = softmax(q kv^T / sqrt(head_dim)) kv for each head, with q, kv and the output projection mergeable.

    Args:
        dim: Width, a multiple of `head_dim`.
        sr_ratio: Keys and values come from the map average-pooled by this factor.
        head_dim: Channels of one head.
        cmr_groups: Group counts of the projections.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
    """
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            sr_ratio: int = 1,
            head_dim: int = 32,
            cmr_groups: Sequence[int] = (1, 2, 4),
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.scale = head_dim ** -0.5
        self.fused_attn = use_fused_attn()

        self.q = MultiGroupConv(dim, dim, cmr_groups, **dd)
        # Partial windows at the right and bottom edges are averages of what is there.
        self.pool = nn.AvgPool2d(sr_ratio, ceil_mode=True, count_include_pad=False) if sr_ratio > 1 else nn.Identity()
        self.kv = MultiGroupConv(dim, dim, cmr_groups, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = MultiGroupConv(dim, dim, cmr_groups, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        # B, C, h, w -> B, heads, h * w, head_dim
        q = self.q(x).reshape(B, self.num_heads, self.head_dim, -1).transpose(-2, -1)
        kv = self.kv(self.pool(x)).reshape(B, self.num_heads, self.head_dim, -1).transpose(-2, -1)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, kv, kv, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            attn = (q * self.scale) @ kv.transpose(-2, -1)  # B, heads, H * W, keys
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ kv

        x = x.transpose(-2, -1).reshape(B, C, H, W)
        return self.proj_drop(self.proj(x))


class PatchEmbed(nn.Module):
    """Halve the map (stride 2) and change the width, each only where needed. (B, in, H, W) -> (B, out, H/s, W/s)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, device=None, dtype=None):
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        needs_proj = stride == 2 or in_chs != out_chs
        self.proj = ConvNorm(in_chs, out_chs, device=device, dtype=dtype) if needs_proj else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pool(x))


class ConvFusionBlock(nn.Module):
    """CFB: depthwise mixer, then gMLP, each with a residual; BatchNorm sits inside the branches, nowhere else."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            mlp_ratio: float = 3.,
            cmr_groups: Sequence[int] = (1, 2, 4),
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_embed = PatchEmbed(in_chs, out_chs, stride, **dd)
        self.mixer = DepthwiseMixer(out_chs, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = GroupMlp(out_chs, mlp_ratio, cmr_groups, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path1(self.mixer(x))
        x = x + self.drop_path2(self.mlp(x))
        return x


class FrequencyMixBlock(nn.Module):
    """FMB: attention on a low-frequency band, a depthwise mixer on a high-frequency band made from it, gMLP on both.

    Args:
        in_chs: Input channels.
        out_chs: Output channels, split into a low band (`low_ratio`, rounded to a multiple of 32) and a high band.
        stride: 1 or 2.
        sr_ratio: Pooling factor of keys and values.
        head_dim: Channels of one head.
        low_ratio: Share of the low band.
        mlp_ratio: Hidden width of the gMLP over `out_chs`.
        cmr_groups: Group counts of the mergeable 1x1 convolutions.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after attention and after the gMLP.
        drop_path: Stochastic depth of the gMLP; half of it acts on either band.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            sr_ratio: int = 1,
            head_dim: int = 32,
            low_ratio: float = 0.5,
            mlp_ratio: float = 2.,
            cmr_groups: Sequence[int] = (1, 2, 4),
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        low_chs = make_divisible(out_chs * low_ratio, 32)
        high_chs = out_chs - low_chs
        if high_chs < 32 or low_chs % head_dim != 0:
            raise ValueError(
                f'width {out_chs} splits into {low_chs} low- and {high_chs} high-frequency channels; '
                f'the low band must be a multiple of head_dim={head_dim} and the high band at least 32'
            )
        self.patch_embed = PatchEmbed(in_chs, low_chs, stride, **dd)
        self.attn = LightAttention(
            low_chs,
            sr_ratio=sr_ratio,
            head_dim=head_dim,
            cmr_groups=cmr_groups,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.drop_path_low = DropPath(0.5 * drop_path) if drop_path > 0. else nn.Identity()
        self.proj = ConvNorm(low_chs, high_chs, **dd)
        self.mixer = DepthwiseMixer(high_chs, **dd)
        self.drop_path_high = DropPath(0.5 * drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = GroupMlp(out_chs, mlp_ratio, cmr_groups, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.patch_embed(x)
        low = low + self.drop_path_low(self.attn(low))
        high = self.proj(low)
        high = high + self.drop_path_high(self.mixer(high))
        x = torch.cat([low, high], dim=1)
        return x + self.drop_path(self.mlp(x))


def frequency_mix_indices(stage: int, depth: int) -> Tuple[int, ...]:
    """Which blocks of a stage are FMB (0-based): none in stage 0, evenly spaced in stage 2, the last one elsewhere."""
    if stage == 0:
        return ()
    if stage != 2:
        return (depth - 1,)
    count = max(1, depth // 5)
    period = depth // count
    return tuple(period * (i + 1) - 1 for i in range(count))


class FMViTStage(nn.Module):
    """One resolution: CFBs with FMBs at `frequency_mix_indices`. (B, in, H, W) -> (B, out, H / s, W / s)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int,
            is_mix: Sequence[bool],
            drop_path: Sequence[float],
            conv_mlp_ratio: float = 3.,
            mix_mlp_ratio: float = 2.,
            cmr_groups: Sequence[int] = (1, 2, 4),
            proj_drop: float = 0.,
            device=None,
            dtype=None,
            **mix_kwargs: Any,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grad_checkpointing = False
        blocks = []
        for i, mix in enumerate(is_mix):
            kwargs = dict(stride=stride if i == 0 else 1, cmr_groups=cmr_groups, proj_drop=proj_drop, **dd)
            if mix:
                blocks += [FrequencyMixBlock(
                    in_chs, out_chs, mlp_ratio=mix_mlp_ratio, drop_path=drop_path[i], **kwargs, **mix_kwargs)]
            else:
                blocks += [ConvFusionBlock(in_chs, out_chs, mlp_ratio=conv_mlp_ratio, drop_path=drop_path[i], **kwargs)]
            in_chs = out_chs
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


@torch.fx.wrap
def check_input_size(x: torch.Tensor) -> torch.Tensor:
    """Return the images (B, C, H, W), or raise ValueError if a side is shorter than 32: the last map needs a pixel."""
    height, width = x.shape[-2], x.shape[-1]
    if height < 32 or width < 32:
        raise ValueError(f'fmvit: input must be at least 32x32, got {height}x{width}')
    return x


class FMViT(nn.Module):
    """Multiple-frequency mixing vision transformer (reconstruction).

    Takes float images (B, in_chans, H, W) with any H, W >= 32 (RGB in 0..1, normalised with the ImageNet mean and
    standard deviation) and gives logits (B, num_classes). There is no position encoding.

    Args:
        in_chans: Number of input channels.
        num_classes: Number of classes, 0 for pooled features.
        global_pool: Pooling before the classifier.
        dims: Width of each of the four stages, which work at strides 4, 8, 16, 32.
        depths: Blocks of each stage.
        sr_ratios: Pooling factor of keys and values in each stage.
        head_dim: Channels of one attention head.
        low_ratio: Share of the low-frequency band in an FMB.
        conv_mlp_ratio: Hidden width of the gMLP in a CFB.
        mix_mlp_ratio: Hidden width of the gMLP in an FMB.
        cmr_groups: Group counts of the multi-group 1x1 convolutions; 1 must be among them.
        deploy: Build the merged form, one convolution with a bias for each set of branches.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention and gMLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        device: Where to make the parameters.
        dtype: Their type.

    Raises:
        ValueError: If the widths do not suit `cmr_groups`, `head_dim` or the split into bands.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            dims: Sequence[int] = (24, 64, 128, 256),
            depths: Sequence[int] = (2, 2, 5, 3),
            sr_ratios: Sequence[int] = (8, 4, 2, 1),
            head_dim: int = 32,
            low_ratio: float = 0.5,
            conv_mlp_ratio: float = 3.,
            mix_mlp_ratio: float = 2.,
            cmr_groups: Sequence[int] = (1, 2, 4),
            deploy: bool = False,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if not len(dims) == len(depths) == len(sr_ratios) == 4:
            raise ValueError(
                f'fmvit: dims, depths and sr_ratios need four values each, '
                f'got {tuple(dims)}, {tuple(depths)}, {tuple(sr_ratios)}'
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = dims[-1]
        self.feature_info = []

        stem_dim, narrow_dim = dims[0], max(dims[0] // 2, 16)
        self.stem = nn.Sequential(
            ConvNorm(in_chans, stem_dim, 3, stride=2, act=True, **dd),
            ConvNorm(stem_dim, narrow_dim, 3, act=True, **dd),
            ConvNorm(narrow_dim, stem_dim, 3, act=True, **dd),
            ConvNorm(stem_dim, stem_dim, 3, stride=2, act=True, **dd),
        )

        in_chs = stem_dim
        stages = []
        num_blocks, block_idx = sum(depths), 0
        for i, (dim, depth, sr_ratio) in enumerate(zip(dims, depths, sr_ratios)):
            mix_indices = frequency_mix_indices(i, depth)
            try:
                stage = FMViTStage(
                    in_chs,
                    dim,
                    stride=1 if i == 0 else 2,
                    is_mix=[j in mix_indices for j in range(depth)],
                    drop_path=[drop_path_rate * (block_idx + j) / max(num_blocks - 1, 1) for j in range(depth)],
                    conv_mlp_ratio=conv_mlp_ratio,
                    mix_mlp_ratio=mix_mlp_ratio,
                    cmr_groups=cmr_groups,
                    proj_drop=proj_drop_rate,
                    sr_ratio=sr_ratio,
                    head_dim=head_dim,
                    low_ratio=low_ratio,
                    attn_drop=attn_drop_rate,
                    **dd,
                )
            except ValueError as error:
                if str(error).startswith('fmvit'):
                    raise
                raise ValueError(f'fmvit: stage {i + 1} of dims={tuple(dims)}: {error}') from error
            stages += [stage]
            self.feature_info += [dict(num_chs=dim, reduction=4 * 2 ** i, module=f'stages.{i}')]
            in_chs = dim
            block_idx += depth
        self.stages = nn.Sequential(*stages)

        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head = head.to(**dd)  # timm 1.0.20's head takes no device itself
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

        self.apply(self._init_weights)
        if deploy:
            self.eval()
            self.reparameterize()
            self.train()

    @torch.jit.ignore
    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge all branches in place, for inference. Irreversible; a second call does nothing.

        Raises:
            RuntimeError: In training mode.
        """
        # The list is made first: merging an outer module removes inner ones, and those may be merged all the same.
        for module in [m for m in self.modules() if isinstance(m, MergeableConv)]:
            module.reparameterize()

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Images (B, in_chans, H, W), H and W at least 32.
            indices: Take the last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the last stage's map (it does not fit the others).
            stop_early: Stop iterating over stages when the last desired intermediate is hit.
            output_fmt: Shape of the intermediates, only 'NCHW'.
            intermediates_only: Only return the intermediates.

        Returns:
            The final features (B, C, H / 32, W / 32) and the intermediates, or the latter only.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"fmvit: output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        intermediates = []
        last_idx = len(self.stages) - 1
        x = self.stem(check_input_size(x))
        stages = self.stages[:max_index + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last_idx else x)

        if intermediates_only:
            return intermediates
        if i == last_idx:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the layers that the intermediates `indices` do not need, and return those indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        is_cut = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_norm or is_cut:
            self.norm = nn.Identity()  # its width is the last stage's
        if is_cut:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or is_cut:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(check_input_size(x))
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Accept checkpoints of this family, in training or deployed form, and refuse Next-ViT's, which look alike.

    There is no official layout: the authors published no weights. Loading refuses the form that is not the model's.

    Raises:
        ValueError: If the checkpoint is one of Next-ViT, in its authors' or in timm's layout.
    """
    if any(key.startswith(('features.', 'proj_head.')) or '.e_mhsa.' in key or '.mhca.' in key for key in state_dict):
        raise ValueError("fmvit: this is a Next-ViT checkpoint; load it into one of timm's nextvit_* models")
    return state_dict


def _create_fmvit(variant: str, pretrained: bool = False, **kwargs: Any) -> FMViT:
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3))
    return build_model(
        FMViT,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        # The getter goes through forward_intermediates() and so refuses too small an input, as the model does.
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'min_input_size': (3, 32, 32), 'pool_size': (7, 7),
        'crop_pct': 0.95, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0',
        'paper_name': 'FMViT: A multiple-frequency mixing Vision Transformer (reconstruction)',
        'paper_ids': 'arXiv:2311.05707',
        'origin_url': 'https://github.com/tany0699/FMViT',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'fmvit_nano': _cfg(num_classes=16, input_size=(3, 64, 64), pool_size=(2, 2)),
    'fmvit_nano.fashion_mnist': _cfg(
        hf_hub_id='vishub/fmvit_nano.fashion_mnist', num_classes=10, input_size=(1, 48, 48), min_input_size=(1, 32, 32),
        pool_size=(2, 2), crop_pct=1.0, crop_mode='squash', mean=(0.2874,), std=(0.3537,),
        label_names=(
            'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')),
    'fmvit_tiny': _cfg(),
    'fmvit_small': _cfg(),
    'fmvit_medium': _cfg(),
    'fmvit_base': _cfg(),
    'fmvit_large': _cfg(),
})


@register_model
def fmvit_nano(pretrained: bool = False, **kwargs: Any) -> FMViT:
    """Demonstration size for 64 x 64 pixels; not in the paper."""
    model_args = dict(dims=(24, 64, 96, 128), depths=(1, 2, 3, 1))
    return _create_fmvit('fmvit_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fmvit_tiny(pretrained: bool = False, **kwargs: Any) -> FMViT:
    model_args = dict(dims=(24, 64, 128, 256), depths=(2, 2, 5, 3))
    return _create_fmvit('fmvit_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fmvit_small(pretrained: bool = False, **kwargs: Any) -> FMViT:
    model_args = dict(dims=(32, 64, 192, 448), depths=(2, 2, 10, 3))
    return _create_fmvit('fmvit_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fmvit_medium(pretrained: bool = False, **kwargs: Any) -> FMViT:
    model_args = dict(dims=(48, 96, 288, 576), depths=(2, 2, 12, 3), drop_path_rate=0.1)
    return _create_fmvit('fmvit_medium', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fmvit_base(pretrained: bool = False, **kwargs: Any) -> FMViT:
    model_args = dict(dims=(64, 192, 384, 896), depths=(2, 2, 15, 2), drop_path_rate=0.1)
    return _create_fmvit('fmvit_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def fmvit_large(pretrained: bool = False, **kwargs: Any) -> FMViT:
    model_args = dict(dims=(96, 224, 480, 832), depths=(2, 3, 15, 3), drop_path_rate=0.2)
    return _create_fmvit('fmvit_large', pretrained=pretrained, **dict(model_args, **kwargs))
