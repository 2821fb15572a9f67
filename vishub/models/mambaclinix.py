"""MambaClinix: a U-Net for volumes, with gated convolutions on its fine levels and Mamba on its coarse ones

Paper: `MambaClinix: Hierarchical Gated Convolution and Mamba-Based U-Net for Enhanced 3D Medical Image Segmentation`
    - https://arxiv.org/abs/2409.12533

@article{bian2024mambaclinix,
  title={MambaClinix: Hierarchical Gated Convolution and Mamba-Based U-Net for Enhanced 3D Medical Image Segmentation},
  author={Bian, Chenyuan and others},
  journal={arXiv preprint arXiv:2409.12533},
  year={2024}
}

Official code: https://github.com/CYB08/MambaClinix-PyTorch (Apache-2.0). Nothing of it is copied here: this file was
written from a description of the architecture. Its authors published no weights; checkpoints made with their code
load through `checkpoint_filter_fn`.

A residual convolution at each stage, then a mixer: the first half of the stages, rounded up, has an HGCN block (hgConv
of rising order, and two convolutions), the others a Mamba layer over all voxels as one sequence. Where the paper's
figures differ from its code, this follows the code: the "gates" are additions, and the skips have no sigmoid.

Sizes, kernels and strides come from a plan of nnU-Net's, for which `arguments_of_plan` is the bridge.
"""
import contextlib
import dataclasses
import math
import re
from collections import OrderedDict
from typing import Any, ContextManager, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._pretrained import DefaultCfg
from torch import nn

from vishub.models.builder import build_model
from vishub.models.layers.selective_scan import reset_scan_parameters, selective_scan

__all__ = ['MambaClinix', 'arguments_of_plan']

Triple = Tuple[int, int, int]


def to_triple(value: Union[int, Sequence[int]]) -> Triple:
    """A number for each of D, H, W."""
    triple = (value,) * 3 if isinstance(value, int) else tuple(int(v) for v in value)
    if len(triple) != 3:
        raise ValueError(f'a volume has three axes, got {value}: MambaClinix has no 2-D form')
    return triple  # type: ignore[return-value]


def conv3d(in_dim: int, out_dim: int, kernel_size: Triple, stride: Triple = (1, 1, 1), **kwargs: Any) -> nn.Conv3d:
    """A convolution that keeps the size at stride 1, for odd kernels."""
    return nn.Conv3d(in_dim, out_dim, kernel_size, stride, padding=tuple((k - 1) // 2 for k in kernel_size), **kwargs)


class LayerNorm3d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, D, H, W)."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def instance_norm(dim: int, device=None, dtype=None) -> nn.InstanceNorm3d:
    return nn.InstanceNorm3d(dim, eps=1e-5, affine=True, device=device, dtype=dtype)


def leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.01)


class Stem(nn.Module):
    """Convolution, norm, LeakyReLU, at full size."""

    def __init__(self, in_chans: int, dim: int, kernel_size: Triple, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = conv3d(in_chans, dim, kernel_size, **dd)
        self.norm = instance_norm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return leaky(self.norm(self.conv(x)))


class Shortcut(nn.Module):
    """What a residual block adds, in the block's size and width: mean over the stride, 1^3 convolution, norm."""

    def __init__(self, in_dim: int, out_dim: int, stride: Triple, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.stride = stride
        self.conv = self.norm = nn.Identity()
        if in_dim != out_dim:
            self.conv = nn.Conv3d(in_dim, out_dim, 1, bias=False, **dd)
            self.norm = instance_norm(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if max(self.stride) > 1:
            half = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == 'cpu'  # which has no kernel for it
            x = F.avg_pool3d(x.float() if half else x, self.stride, self.stride).to(x.dtype)
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, LeakyReLU behind the sum."""

    def __init__(
            self, in_dim: int, out_dim: int, kernel_size: Triple, stride: Triple = (1, 1, 1), device=None, dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = conv3d(in_dim, out_dim, kernel_size, stride, **dd)
        self.norm1 = instance_norm(out_dim, **dd)
        self.conv2 = conv3d(out_dim, out_dim, kernel_size, **dd)
        self.norm2 = instance_norm(out_dim, **dd)
        self.skip = Shortcut(in_dim, out_dim, stride, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = leaky(self.norm1(self.conv1(x)))
        return leaky(self.norm2(self.conv2(y)) + self.skip(x))


class HgConv(nn.Module):
    """Recursive convolution of a given order: ever wider parts of a depthwise convolution are added one by one.

    Args:
        dim: Channels W, a multiple of 2**(order - 1).
        order: How many parts; part j has W / 2**(order - 1 - j) channels.
        kernel_size: Of the depthwise convolution.
    """

    def __init__(self, dim: int, order: int, kernel_size: Triple, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dims = [dim // 2 ** (order - 1 - j) for j in range(order)]
        total = sum(self.dims)
        self.proj_in = nn.Conv3d(dim, 2 * dim, 1, **dd)
        self.dwconv = conv3d(total, total, kernel_size, groups=total, **dd)
        self.reconv = nn.ModuleList([
            nn.Conv3d(self.dims[j], self.dims[j + 1], 1, **dd) for j in range(order - 1)])
        self.proj_out = nn.Conv3d(dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, W, D, H, W) -> the same."""
        base, rest = self.proj_in(x).split([self.dims[0], sum(self.dims)], dim=1)
        first, *others = self.dwconv(rest).split(self.dims, dim=1)
        x = base + first
        for conv, part in zip(self.reconv, others):
            x = conv(x) + part
        return self.proj_out(x)


class HgcnBlock(nn.Module):
    """Hierarchical gated convolution: hgConv at half width, then two convolutions back to full width.

    Args:
        dim: Channels C, even.
        order: See `HgConv`.
        kernel_size: Of all convolutions that are not 1^3.
        drop_path: Stochastic depth of each of the two branches.
    """

    def __init__(
            self, dim: int, order: int, kernel_size: Triple, drop_path: float = 0., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim = dim // 2
        self.proj = nn.Conv3d(dim, inner_dim, 1, **dd)
        self.norm1 = LayerNorm3d(inner_dim, **dd)
        self.hgconv = HgConv(inner_dim, order, kernel_size, **dd)
        self.gamma = nn.Parameter(torch.full((inner_dim,), 1e-6, **dd))
        self.norm2 = LayerNorm3d(inner_dim, **dd)
        self.conv1 = conv3d(inner_dim, dim, kernel_size, **dd)
        self.conv2 = conv3d(dim, dim, kernel_size, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> the same."""
        t = self.proj(x)
        t = t + self.drop_path1(self.gamma.view(-1, 1, 1, 1) * self.hgconv(self.norm1(t)))
        return x + self.drop_path2(self.conv2(leaky(self.conv1(self.norm2(t)))))


class Mamba(nn.Module):
    """Mamba's block (Gu & Dao 2023, arXiv:2312.00752, section 3.4) over a sequence, causal.

    Args:
        dim: Channels C; the scan has E = expand * C.
        d_state: States N of a channel.
        d_conv: Length of the causal convolution.
        expand: Width of the scan in multiples of `dim`.
    """

    def __init__(
            self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim, self.dt_rank, self.d_state = expand * dim, math.ceil(dim / 16), d_state
        self.in_proj = nn.Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.conv1d = nn.Conv1d(inner_dim, inner_dim, d_conv, padding=d_conv - 1, groups=inner_dim, **dd)
        self.x_proj = nn.Linear(inner_dim, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner_dim, **dd)  # its bias goes into the scan's softplus
        self.A_log = nn.Parameter(torch.empty(inner_dim, d_state, **dd))
        self.D = nn.Parameter(torch.ones(inner_dim, **dd))
        self.out_proj = nn.Linear(inner_dim, dim, bias=False, **dd)
        reset_scan_parameters(self.dt_proj, self.A_log)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> the same."""
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # B, E, L
        u = F.silu(self.conv1d(u)[..., :x.shape[1]])  # what is padded behind the end is cut off
        params = self.x_proj(u.transpose(1, 2))  # B, L, R + 2 N
        dt, B, C = params.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight).transpose(1, 2)  # B, E, L
        y = selective_scan(
            u, delta, -self.A_log.exp(), B.transpose(1, 2), C.transpose(1, 2), self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True)
        return self.out_proj(y.transpose(1, 2))


class MambaLayer(nn.Module):
    """Mamba over the voxels of a map as one sequence, W fastest: x + proj(norm(mamba(norm(x)))), with one norm.

    It computes in the type of its weights, whatever autocast says: the recurrence is too long for half precision.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mamba = Mamba(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> the same."""
        with without_autocast(x.device.type):
            tokens = x.to(self.norm.weight.dtype).flatten(2).transpose(1, 2)  # B, L, C
            tokens = self.proj(self.norm(self.mamba(self.norm(tokens))))
            return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def without_autocast(device_type: str) -> ContextManager[Any]:
    if not torch.amp.is_autocast_available(device_type):  # meta tensors have none to switch off
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class Stage(nn.Module):
    """Residual block, LayerNorm (in the last HGCN stage alone), mixer."""

    def __init__(self, res: nn.Module, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.res, self.norm, self.mixer = res, norm, mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.norm(self.res(x)))


class Fuse(nn.Module):
    """Residual block over two maps side by side; its 1^3 shortcut has a bias and no norm."""

    def __init__(self, dim: int, kernel_size: Triple, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = conv3d(2 * dim, dim, kernel_size, **dd)
        self.norm1 = instance_norm(dim, **dd)
        self.conv2 = conv3d(dim, dim, kernel_size, **dd)
        self.norm2 = instance_norm(dim, **dd)
        self.conv3 = nn.Conv3d(2 * dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, skip], dim=1)
        y = leaky(self.norm1(self.conv1(x)))
        return leaky(self.norm2(self.conv2(y)) + self.conv3(x))


class DecoderLevel(nn.Module):
    """One level up: the map from below at this level's size and width, fused with the encoder's.

    Args:
        low_dim: Channels below.
        dim: Channels of the encoder's map, and of the output.
        kernel_size: Of the encoder's stage.
        stride: Between the two levels.
        num_classes: Classes of the segmentation head; 0 for none.
    """

    def __init__(
            self, low_dim: int, dim: int, kernel_size: Triple, stride: Triple, num_classes: int, device=None,
            dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dim = dim
        self.stride = tuple(float(s) for s in stride)
        self.up = nn.Conv3d(low_dim, dim, 1, **dd)
        self.skip = ResidualBlock(dim, dim, kernel_size, **dd)
        self.fuse = Fuse(dim, kernel_size, **dd)
        self.seg_head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, **dd)

    def reset_classifier(self, num_classes: int, device=None, dtype=None) -> None:
        self.seg_head = nn.Identity()
        if num_classes:
            self.seg_head = nn.Conv3d(self.dim, num_classes, 1, device=device, dtype=dtype)
            init_weights(self.seg_head)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        # a 1^3 convolution and a repetition of voxels commute, and there are fewer voxels below
        x = F.interpolate(self.up(x), scale_factor=self.stride, mode='nearest')
        return self.fuse(x, self.skip(skip))


class MambaClinix(nn.Module):
    """MambaClinix.

    Args:
        features: Channels of each encoder stage; nnU-Net's rule is min(32 * 2**i, 320). The first ceil(n / 2) stages
            have an HGCN block of order i + 2, so half the channels must be divisible by 2**(i + 1) there.
        kernel_sizes: Kernel of each stage, one number or three for D, H, W; or one number for all.
        strides: Stride of each stage, likewise; the first must be 1. None takes 1, 2, 2, ….
        in_chans: Input channels, one a modality.
        num_classes: Classes K with the background; 0 for a model that gives features.
        patch_size: Size D, H, W of the patches that it was trained with, for who runs it over a volume.
        deep_supervision: In training return the logits of all decoder levels, finest first. Without it the heads of
            the coarser levels are there, but nothing trains them.
        drop_path_rate: Stochastic depth, rising linearly from 0 over all stages; HGCN blocks alone have it.

    Attributes:
        divisor: Every input size must be a multiple of these three.
        num_features: Channels of the coarsest map; `head_hidden_size` of the finest, which the head reads.

    Raises:
        ValueError: If the plan does not fit.
    """

    def __init__(
            self,
            features: Sequence[int] = (32, 64, 128, 256, 320, 320),
            kernel_sizes: Union[int, Sequence[Union[int, Sequence[int]]]] = 3,
            strides: Optional[Sequence[Union[int, Sequence[int]]]] = None,
            in_chans: int = 1,
            num_classes: int = 2,
            patch_size: Union[int, Sequence[int]] = (128, 128, 128),
            deep_supervision: bool = False,
            drop_path_rate: float = 0.5,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        n_stages = len(features)
        kernels = [to_triple(k) for k in ([kernel_sizes] * n_stages if isinstance(kernel_sizes, int) else kernel_sizes)]
        steps = [to_triple(s) for s in (strides if strides is not None else [1] + [2] * (n_stages - 1))]
        num_hgcn = math.ceil(n_stages / 2)
        _check_plan(features, kernels, steps, num_hgcn)
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f'in_chans must be at least 1 and num_classes at least 0, got {in_chans}, {num_classes}')
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.patch_size = to_triple(patch_size)
        self.deep_supervision = deep_supervision
        self.num_features, self.head_hidden_size = features[-1], features[0]
        self.grad_checkpointing = False

        self.stem = Stem(in_chans, features[0], kernels[0], **dd)
        rates = torch.linspace(0, drop_path_rate, n_stages, device='cpu').tolist()
        self.stages = nn.ModuleList()
        self.feature_info: List[Dict[str, Any]] = []
        reduction: Triple = (1, 1, 1)
        for i, (dim, kernel, stride) in enumerate(zip(features, kernels, steps)):
            mixer: nn.Module = MambaLayer(dim, **dd) if i >= num_hgcn else HgcnBlock(
                dim, order=i + 2, kernel_size=kernel, drop_path=rates[i], **dd)
            self.stages.append(Stage(
                ResidualBlock(features[max(i - 1, 0)], dim, kernel, stride, **dd),
                LayerNorm3d(dim, **dd) if i == num_hgcn - 1 else nn.Identity(),
                mixer,
            ))
            reduction = tuple(r * s for r, s in zip(reduction, stride))  # type: ignore[assignment]
            # timm wants one number a stage; `strides` has all three
            self.feature_info.append(
                dict(num_chs=dim, reduction=max(reduction), strides=reduction, module=f'stages.{i}'))
        self.divisor: Triple = reduction

        self.bottleneck = ResidualBlock(features[-1], features[-1], kernels[-1], **dd)
        self.decoder = nn.ModuleList([
            DecoderLevel(features[i + 1], features[i], kernels[i], steps[i + 1], num_classes, **dd)
            for i in reversed(range(n_stages - 1))])
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters that are kept out of weight decay: those of the recurrence."""
        return {name for name, _ in self.named_parameters() if name.endswith(('.A_log', '.D'))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that group parameters by depth; a block is a stage or a decoder level either way."""
        return dict(
            stem=r'^stem', blocks=r'^stages\.(\d+)', bottleneck=r'^bottleneck', decoder=r'^decoder\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep the activations between stages alone and compute the others again."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The finest level's head."""
        return self.decoder[-1].seg_head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """New heads on every level; 0 classes for none, after which the model gives its finest features.

        Raises:
            ValueError: If pooling is asked for: there is none.
        """
        if global_pool:
            raise ValueError(f'MambaClinix has a class for each voxel and no pooling, got global_pool={global_pool!r}')
        self.num_classes = num_classes
        weight = self.stem.conv.weight
        for level in self.decoder:
            level.reset_classifier(num_classes, device=weight.device, dtype=weight.dtype)

    def _check(self, x: torch.Tensor) -> None:
        """Raise ValueError if `x` is not a batch of volumes that this model can halve as often as it must."""
        if x.ndim != 5:
            raise ValueError(f'x must be (B, C, D, H, W), got {tuple(x.shape)}')
        if x.shape[1] != self.in_chans:
            raise ValueError(f'C must be in_chans={self.in_chans}, got {x.shape[1]} channels')
        if not x.is_floating_point():
            raise ValueError(f'x must be floating point, normalised; got {x.dtype}')
        size = tuple(x.shape[2:])
        if any(s % d for s, d in zip(size, self.divisor)) or 0 in size:
            wanted = tuple(max(1, math.ceil(s / d)) * d for s, d in zip(size, self.divisor))
            raise ValueError(f'spatial size {size} must be divisible by {self.divisor}: pad to {wanted}')

    def _run(self, module: nn.Module, *maps: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(module, *maps)
        return module(*maps)

    def forward_features(self, x: torch.Tensor) -> List[torch.Tensor]:
        """(B, C, D, H, W) -> the encoder's maps, one a stage, finest first: stage i (B, features_i, D / r, …)."""
        self._check(x)
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = self._run(stage, x)
            skips.append(x)
        return skips

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[List[torch.Tensor], List[torch.Tensor]]]:
        """Forward features that also returns chosen maps of the encoder.

        Args:
            x: (B, C, D, H, W).
            indices: Take the last n stages if int, all if None, else these.
            norm: Without effect: there is no closing norm.
            stop_early: Stop behind the last chosen stage.
            output_fmt: 'NCHW' or 'NCDHW', both (B, C, D, H, W).
            intermediates_only: Return the list of chosen maps alone.

        Returns:
            What `forward_features` gives (up to the last stage that ran) and the maps; or the latter alone.
        """
        if output_fmt not in ('NCHW', 'NCDHW'):
            raise ValueError(f"MambaClinix's intermediates have channels first ('NCHW'), not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self._check(x)
        x = self.stem(x)
        skips = []
        for stage in self.stages[:max_index + 1] if stop_early or intermediates_only else self.stages:
            x = self._run(stage, x)
            skips.append(x)
        intermediates = [skips[i] for i in take_indices]
        return intermediates if intermediates_only else (skips, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Optional[Union[int, List[int]]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what `forward_intermediates` does not need for `indices`; with the head, that is the decoder."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[:max_index + 1]
        if prune_head or max_index + 1 < len(self.feature_info):
            self.bottleneck, self.decoder = nn.Identity(), nn.ModuleList()
        return take_indices

    def forward_head(
            self, skips: List[torch.Tensor], pre_logits: bool = False) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Maps of the encoder -> logits, see `forward`; finest features (B, features_0, D, H, W) if `pre_logits`."""
        x = self._run(self.bottleneck, skips[-1])
        supervised = self.training and self.deep_supervision and not pre_logits
        logits = []
        for level, skip in zip(self.decoder, reversed(skips[:-1])):
            x = self._run(level, x, skip)
            if supervised:
                logits.append(level.seg_head(x))
        if supervised:
            return logits[::-1]
        return x if pre_logits else self.decoder[-1].seg_head(x)

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Class scores of every voxel.

        Args:
            x: (B, C, D, H, W), floating point, resampled to the plan's spacing and normalised as in training; sizes
                are multiples of `divisor`.

        Returns:
            Logits (B, K, D, H, W). In training with `deep_supervision` a list of n_stages - 1: index 0 is full
            resolution, index i that of encoder stage i.

        Raises:
            ValueError: If the shape does not fit.
        """
        return self.forward_head(self.forward_features(x))


def _check_plan(
        features: Sequence[int], kernels: Sequence[Triple], strides: Sequence[Triple], num_hgcn: int) -> None:
    n_stages = len(features)
    if n_stages < 3:
        raise ValueError(f'n_stages >= 3: MambaClinix needs at least three stages, got features {tuple(features)}')
    if len(kernels) != n_stages or len(strides) != n_stages:
        raise ValueError(
            f'{n_stages} stages need as many kernel sizes and strides, got {len(kernels)} and {len(strides)}')
    if any(k % 2 == 0 or k < 1 for kernel in kernels for k in kernel):
        raise ValueError(f'kernels must be odd, got {kernels}')
    if max(strides[0]) != 1 or min(min(stride) for stride in strides) < 1:
        raise ValueError(f'strides must be positive and those of the first stage 1, got {strides}')
    for i, dim in enumerate(features[:num_hgcn]):
        if dim < 1 or dim % 2 or (dim // 2) % 2 ** (i + 1):
            raise ValueError(
                f'features // 2 must be divisible by 2**(order-1) at stage {i}: {dim} // 2 is not by {2 ** (i + 1)}')


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity='leaky_relu')
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def arguments_of_plan(configuration: Mapping[str, Any]) -> Dict[str, Any]:
    """Constructor arguments for one configuration of nnU-Net's plans, as in `plans['configurations']['3d_fullres']`.

    Args:
        configuration: Of nnU-Net 2.1 (`conv_kernel_sizes`, `pool_op_kernel_sizes`, …), or of later versions, which
            have these facts under `architecture.arch_kwargs`.

    Raises:
        ValueError: If the configuration is two-dimensional or lacks an entry.
    """
    later = configuration.get('architecture', {}).get('arch_kwargs', {})
    try:
        kernels = later['kernel_sizes'] if later else configuration['conv_kernel_sizes']
        strides = later['strides'] if later else configuration['pool_op_kernel_sizes']
        if later:
            features = later['features_per_stage']
        else:
            base, most = configuration['UNet_base_num_features'], configuration['unet_max_num_features']
            features = [min(base * 2 ** i, most) for i in range(len(strides))]
        return dict(
            features=tuple(features),
            kernel_sizes=tuple(to_triple(k) for k in kernels),
            strides=tuple(to_triple(s) for s in strides),
            patch_size=to_triple(configuration['patch_size']),
        )
    except KeyError as error:
        raise ValueError(f'this is no configuration of an nnU-Net plan: it has no {error}') from error


# official name -> ours, within a stage's mixer
_MIXER_NAMES = {
    'transconv.conv': 'proj', 'lynorm1': 'norm1', 'gamma1': 'gamma', 'lynorm2': 'norm2',
    'conv1.conv': 'conv1', 'conv2.conv': 'conv2',
}
_LEVEL_NAMES = {'residual_blocks': 'skip', 'upsample_layers': 'up', 'stages': 'fuse', 'seg_layers': 'seg_head'}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename an official checkpoint's entries to ours; a state dict of ours passes unchanged.

    Args:
        state_dict: Official or own state dict, bare or under nnU-Net's 'network_weights', with or without 'module.'.
        model: The model to load it into.

    Raises:
        ValueError: If an entry of an official checkpoint is not known, or one that repeats another differs from it.
    """
    for key in ('network_weights', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if any(name.startswith('module.') for name in state_dict):
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    if not any(name.startswith('encoder.stem.convs.') for name in state_dict):
        return state_dict
    last_hgcn = math.ceil(len(model.stages) / 2) - 1
    # nnU-Net registers modules twice: each unit again in a sequence, and the whole encoder again in the decoder.
    out: Dict[str, torch.Tensor] = {}
    repeated = []
    for name, value in state_dict.items():
        original = re.sub(r'\.all_modules\.(\d)', lambda match: ('.conv', '.norm')[int(match[1])], name)
        original = original.removeprefix('decoder.') if original.startswith('decoder.encoder.') else original
        if original != name:
            repeated.append((name, original, value))
        elif not name.endswith('.skip_scale'):  # which nothing reads
            out[_own_name(name, last_hgcn)] = value
    for name, original, value in repeated:
        if not original.endswith('.skip_scale') and not torch.equal(out[_own_name(original, last_hgcn)], value):
            raise ValueError(f"'{name}' should repeat '{original}' and differs from it")
    return out


def _own_name(name: str, last_hgcn: int) -> str:
    stem, _, leaf = name.rpartition('.')
    leaf = {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf)  # of the official LayerNorm
    if stem == 'encoder.LayerNorm':
        return f'stages.{last_hgcn}.norm.{leaf}'
    if match := re.fullmatch(r'encoder\.stem\.convs\.0\.(conv|norm)', stem):
        return f'stem.{match[1]}.{leaf}'
    if match := re.fullmatch(r'encoder\.stages\.(\d+)\.blocks\.0\.(.+)', stem):
        return f'stages.{match[1]}.res.{_residual_name(match[2])}.{leaf}'
    if match := re.fullmatch(r'encoder\.encoder_layers\.(\d+)\.(.+)', name):
        return f'stages.{match[1]}.mixer.{_mixer_name(match[2])}'
    if match := re.fullmatch(r'decoder\.Init_Residual\.(.+)', stem):
        return f'bottleneck.{_residual_name(match[1])}.{leaf}'
    if match := re.fullmatch(r'decoder\.(\w+)\.(\d+)(?:\.(.+))?', stem):
        part = _LEVEL_NAMES.get(match[1])
        rest = {'skip': _residual_name(match[3] or ''), 'fuse': match[3]}.get(part or '')
        if part is not None:
            return '.'.join(filter(None, ('decoder', match[2], part, rest, leaf)))
    raise ValueError(f"'{name}' is not an entry of an official checkpoint")


def _residual_name(rest: str) -> str:
    """`conv1.norm` -> norm1, `conv2.conv` -> conv2, `skip.1.conv` -> skip.conv."""
    if match := re.fullmatch(r'conv(\d)\.(conv|norm)', rest):
        return f'{match[2]}{match[1]}'
    return re.sub(r'^skip\.\d\.', 'skip.', rest)


def _mixer_name(rest: str) -> str:
    stem, _, leaf = rest.rpartition('.')
    if not stem or stem in ('norm', 'proj') or stem.startswith('mamba'):  # a Mamba layer's names are ours
        return _MIXER_NAMES.get(rest, rest)
    leaf = {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf)
    stem = _MIXER_NAMES.get(stem) or stem.replace('hgConvs.', 'hgconv.')
    return f'{stem}.{leaf}'


def _create_mambaclinix(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaClinix:
    stored = kwargs.get('pretrained_cfg')
    if isinstance(stored, dict):
        # timm must not see them: an input has two axes for it, and it would adapt a convolution as if that had two
        kwargs['pretrained_cfg'] = {**stored, 'input_size': None, 'first_conv': None}
        if stored.get('input_size'):
            kwargs.setdefault('in_chans', stored['input_size'][0])
    model = build_model(
        MambaClinix,
        variant,
        pretrained,
        default_cfgs={variant: _without_input_size(default_cfgs[variant])},
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', None), feature_cls='getter'),
        tag_args=_TAG_ARGS,
        tag_cfgs=_TAG_CFGS,
        **kwargs,
    )
    if isinstance(model, MambaClinix):
        model.pretrained_cfg = model.default_cfg = dict(
            model.pretrained_cfg, input_size=(model.in_chans, *model.patch_size), first_conv='stem.conv',
            patch_size=model.patch_size, divisor=model.divisor)
    return model


def _without_input_size(default_cfg: DefaultCfg) -> DefaultCfg:
    return dataclasses.replace(default_cfg, cfgs=OrderedDict(
        (tag, dataclasses.replace(cfg, input_size=None, first_conv=None)) for tag, cfg in default_cfg.cfgs.items()))


def _cfg(n_stages: int, patch_size: Triple, **kwargs: Any) -> Dict[str, Any]:
    return {
        'input_size': (1, *patch_size), 'num_classes': 2, 'pool_size': None, 'fixed_input_size': False,
        'crop_pct': 1.0, 'interpolation': 'trilinear', 'mean': (0.,), 'std': (1.,),
        'classifier': tuple(f'decoder.{j}.seg_head' for j in range(n_stages - 1)),
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2409.12533',
        'paper_name': 'MambaClinix: Hierarchical Gated Convolution and Mamba-Based U-Net for Enhanced 3D Medical '
                      'Image Segmentation',
        'origin_url': 'https://github.com/CYB08/MambaClinix-PyTorch',
        **kwargs,
    }


# Arguments of tags whose model is another than the plain architecture, and how a volume is prepared for it (see
# `vishub/tasks/volume_segmentation/preprocessing.py`).
_TAG_ARGS: Dict[str, Dict[str, Any]] = {
    'mambaclinix_tiny.brats13': dict(in_chans=2),
}
_TAG_CFGS: Dict[str, Dict[str, Any]] = {
    'mambaclinix_tiny.procedural': {'preprocessing': {'intensity': 'zscore'}},
    'mambaclinix_tiny.brats13': {'preprocessing': {'intensity': 'zscore_nonzero', 'spacing': [2., 2., 2.]}},
}

# The authors published no weights.
default_cfgs = generate_default_cfgs({
    'mambaclinix_s5': _cfg(5, (96, 96, 96), min_input_size=(1, 32, 32, 32)),
    'mambaclinix_s6': _cfg(6, (128, 128, 128), min_input_size=(1, 64, 64, 64)),
    'mambaclinix_s7_aniso': _cfg(7, (48, 192, 192), min_input_size=(1, 32, 128, 128)),
    'mambaclinix_tiny': _cfg(4, (48, 48, 48), num_classes=3, min_input_size=(1, 16, 16, 16)),
    'mambaclinix_tiny.procedural': _cfg(
        4, (48, 48, 48), num_classes=3, min_input_size=(1, 16, 16, 16), hf_hub_id='vishub/mambaclinix_tiny.procedural',
        label_names=('background', 'organ', 'tubes')),
    'mambaclinix_tiny.brats13': _cfg(
        4, (48, 48, 48), input_size=(2, 48, 48, 48), num_classes=3, min_input_size=(1, 16, 16, 16),
        hf_hub_id='vishub/mambaclinix_tiny.brats13', license='cc-by-nc-sa-3.0',
        label_names=('background', 'oedema', 'core')),
})


@register_model
def mambaclinix_s5(pretrained: bool = False, **kwargs: Any) -> MambaClinix:
    """Five stages, for patches of 96^3."""
    model_args = dict(features=(32, 64, 128, 256, 320), patch_size=(96, 96, 96))
    return _create_mambaclinix('mambaclinix_s5', pretrained, **dict(model_args, **kwargs))


@register_model
def mambaclinix_s6(pretrained: bool = False, **kwargs: Any) -> MambaClinix:
    """Six stages, for patches of 128^3: nnU-Net's usual plan."""
    return _create_mambaclinix('mambaclinix_s6', pretrained, **kwargs)


@register_model
def mambaclinix_s7_aniso(pretrained: bool = False, **kwargs: Any) -> MambaClinix:
    """Seven stages for thick slices: two of the halvings, and the first kernel, leave the first axis alone."""
    flat = (1, 2, 2)
    model_args = dict(
        features=(32, 64, 128, 256, 320, 320, 320),
        kernel_sizes=((1, 3, 3), 3, 3, 3, 3, 3, 3),
        strides=(1, flat, 2, 2, 2, 2, flat),
        patch_size=(48, 192, 192),
    )
    return _create_mambaclinix('mambaclinix_s7_aniso', pretrained, **dict(model_args, **kwargs))


@register_model
def mambaclinix_tiny(pretrained: bool = False, **kwargs: Any) -> MambaClinix:
    """Small enough to train on a CPU: four stages of up to 64 channels, for patches of 48^3."""
    model_args = dict(features=(16, 32, 64, 64), patch_size=(48, 48, 48))
    return _create_mambaclinix('mambaclinix_tiny', pretrained, **dict(model_args, **kwargs))
