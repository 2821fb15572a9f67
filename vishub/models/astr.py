"""ASTR: adaptive sparse-context transformer, lesion segmentation in ultrasound video

Paper: `Towards a Benchmark for Colorectal Cancer Segmentation in Endorectal Ultrasound Videos: Dataset and Model
Development` - https://arxiv.org/abs/2408.10067

@inproceedings{jiang2024astr,
  title={Towards a Benchmark for Colorectal Cancer Segmentation in Endorectal Ultrasound Videos: Dataset and Model
    Development},
  author={Jiang, Yuncheng and others},
  booktitle={Medical Image Computing and Computer Assisted Intervention},
  year={2024}
}

Official code: https://github.com/yuncheng97/ASTR, Apache-2.0; this file was written from a description of it. The one
published checkpoint has no stated licence and its data are for non-commercial research, so neither comes with vishub.

One frame of a video is segmented; T - 1 earlier frames are its context. Every frame goes through a backbone and a
fusion of its three coarser levels. A coarse map of each earlier frame says where a lesion may be, and only tokens from
there are kept; the frame itself attends to them. What a frame gives does not depend on its role, so a video costs one
backbone pass a frame (`ASTR.stream`).

Research use only: no model of this file is a medical device.
"""
import re
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Attention
from torch import nn

from vishub.models.builder import build_model

__all__ = ['ASTR', 'clip_indices']

_STRIDES = [4, 8, 16, 32]
_EPS = 1e-5  # of every LayerNorm


def clip_indices(frame: int, clip_size: int, num_frames: int) -> List[int]:
    """The frames of a clip: the one to segment, then the one before it, the one before that …

    Before the beginning a video is mirrored (frame -1 is that many frames later), behind its end the last one stays.

    Args:
        frame: The frame to segment, 0 .. num_frames - 1.
        clip_size: Frames T of a clip.
        num_frames: Frames of the video.
    """
    indices = [frame - lag if frame >= lag else frame + lag for lag in range(clip_size)]
    return [min(index, num_frames - 1) for index in indices]


class FrameMaps(NamedTuple):
    """What every frame gives, whatever its role.

    Attributes:
        fused: Levels of stride 8, 16 and 32 in one map (N, D, H / 8, W / 8).
        x1, x2: The backbone's maps of stride 4 and 8.
    """
    fused: torch.Tensor
    x1: torch.Tensor
    x2: torch.Tensor


def conv_norm_act(
        in_dim: int, out_dim: int, kernel_size: int = 3, stride: int = 1, bias: bool = True, device=None, dtype=None,
) -> nn.Sequential:
    """Convolution that keeps the size (or divides it by `stride`), batch norm, ReLU."""
    dd = {'device': device, 'dtype': dtype}
    return nn.Sequential(
        nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, bias=bias, **dd),
        nn.BatchNorm2d(out_dim, **dd),
        nn.ReLU(inplace=True),
    )


class TinyBackbone(nn.Module):
    """Nine small convolutions: maps of 24, 48, 96, 128 channels at strides 4, 8, 16, 32."""
    dims = (24, 48, 96, 128)

    def __init__(self, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.stem = nn.Sequential(conv_norm_act(3, 16, stride=2, bias=False, **dd),
                                  conv_norm_act(16, self.dims[0], stride=2, bias=False, **dd))
        stages = [conv_norm_act(self.dims[0], self.dims[0], bias=False, **dd)]
        for in_dim, dim in zip(self.dims, self.dims[1:]):
            stages.append(nn.Sequential(conv_norm_act(in_dim, dim, stride=2, bias=False, **dd),
                                        conv_norm_act(dim, dim, bias=False, **dd)))
        self.stages = nn.ModuleList(stages)
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = checkpoint(stage, x) if self.grad_checkpointing and self.training else stage(x)
            maps.append(x)
        return maps


def create_backbone(name: str, pretrained: bool, device=None, dtype=None) -> Tuple[nn.Module, List[int], List[int]]:
    """A backbone, the places of its maps of stride 4, 8, 16, 32, and their channels.

    Args:
        name: 'tiny' for `TinyBackbone`, or any model of timm's that has maps at these strides.
        pretrained: Load timm's weights.

    Raises:
        ValueError: If it has no such maps.
    """
    if name == 'tiny':
        if pretrained:
            raise ValueError("the backbone 'tiny' has no weights of its own: pretrained_backbone must be False")
        return TinyBackbone(device, dtype), [0, 1, 2, 3], list(TinyBackbone.dims)
    args = {'drop_path_rate': 0.1} if name.startswith('pvt') else {}
    with torch.device(device or torch.get_default_device()):
        backbone = timm.create_model(name, pretrained=pretrained, features_only=True, **args).to(dtype)
    strides, dims = backbone.feature_info.reduction(), backbone.feature_info.channels()
    if not set(_STRIDES) <= set(strides):
        raise ValueError(f'a backbone needs maps at strides 4, 8, 16 and 32; {name} has them at {strides}')
    levels = [strides.index(stride) for stride in _STRIDES]
    return backbone, levels, [dims[level] for level in levels]


class Fusion(nn.Module):
    """The levels of stride 8, 16, 32, reduced to E channels, multiplied into each other and joined: D = 3E channels."""

    def __init__(self, in_dims: List[int], dim: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.level2 = conv_norm_act(in_dims[0], dim, 1, bias=False, **dd)
        self.level3 = conv_norm_act(in_dims[1], dim, 1, bias=False, **dd)
        self.level4 = conv_norm_act(in_dims[2], dim, 1, bias=False, **dd)

    def forward(self, x2: torch.Tensor, x3: torch.Tensor, x4: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w), (N, C', h / 2, w / 2), (N, C'', h / 4, w / 4) -> (N, D, h, w)."""
        size = x2.shape[2:]
        a = self.level2(x2)
        b = resize(self.level3(x3), size)
        c = resize(self.level4(x4), size)
        return torch.cat([c, b * c, a * b * c], dim=1)


class ContextBlock(nn.Module):
    """One lag's own weights: where in the frame a lesion may be, and what lies around each position.

    Args:
        dim: Channels D.
        window: Side of the pooling, 2 ** lag.
    """

    def __init__(self, dim: int, window: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.window = window
        self.coarse_map = nn.Sequential(
            *conv_norm_act(dim, dim, bias=False, **dd), nn.Conv2d(dim, 1, 1, **dd))
        self.pool_proj = conv_norm_act(2 * dim, dim, 1, **dd)
        self.conv = conv_norm_act(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(B, D, h, w) -> logits (B, 1, h, w), and the surroundings (B, D, h, w)."""
        pooled = torch.cat([F.avg_pool2d(x, self.window), F.max_pool2d(x, self.window)], dim=1)
        return self.coarse_map(x), resize(self.conv(self.pool_proj(pooled)), x.shape[2:])


class SparseContext(nn.Module):
    """Tokens of the earlier frames that may belong to a lesion."""

    def __init__(self, dim: int, clip_size: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.lags = nn.ModuleList([ContextBlock(dim, 2 ** lag, **dd) for lag in range(1, clip_size)])
        self.merge = nn.Conv2d(2 * dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Earlier frames (B, T - 1, D, h, w), the nearest first.

        Returns:
            Tokens (B, n, D) that were kept, frame by frame and row by row, as many as the sample with most of them
            has, but at least one; which of them count, bool (B, n); coarse maps (B, T - 1, 1, h, w), logits.
        """
        maps, tokens = [], []
        for block, frame in zip(self.lags, x.unbind(1)):
            coarse, around = block(frame)
            maps.append(coarse)
            tokens.append(self.merge(torch.cat([frame, around], dim=1)).flatten(2))  # B, D, h * w
        body_maps = torch.stack(maps, dim=1)
        all_tokens = torch.cat(tokens, dim=2).transpose(1, 2)  # B, (T - 1) * h * w, D
        # A hard choice: the maps learn from their own loss alone.
        return (*_selected(all_tokens, body_maps.flatten(1) > 0), body_maps)


def _selected(tokens: torch.Tensor, keep: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L, D) where `keep` (B, L), moved to the front in their order and cut to the longest sample."""
    if keep.is_meta or torch.compiler.is_compiling():  # their number may not decide what happens next: all stay
        return tokens, keep
    longest = max(int(keep.sum(1).max()), 1)
    order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    return tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2])), keep.gather(1, order)


class Block(nn.Module):
    """Self-attention block: a dense convolution in place of position codes, attention, MLP; all residual."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 2., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.attn = Attention(dim, num_heads, qkv_bias=True, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) -> the same."""
        size = x.shape[2:]
        x = (x + self.pos(x)).flatten(2).transpose(1, 2)  # B, D, h, w -> B, N, D
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).unflatten(2, size)


class CrossAttention(nn.Module):
    """Multi-head attention of a frame's tokens to the context.

    Args:
        head_layout: 'official' for the order in which the official code reads the heads' results (B, heads, N, d): as
            rows of D values without bringing the heads beside the channels. Its checkpoints were trained so.
            'standard' brings them there.
    """

    def __init__(
            self, dim: int, num_heads: int, head_layout: str = 'official', device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.head_layout = head_layout
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, context: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """x (B, N, D), context (B, n, D), valid (B, n) bool -> (B, N, D); a sample without context gets the bias."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # B, heads, N, d
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        some = valid.any(dim=1)
        # Attention to nothing would be NaN. Such a sample looks at one token, and what it sees is taken as zero.
        valid = torch.cat([valid[:, :1] | ~some[:, None], valid[:, 1:]], dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        out = out * some[:, None, None, None]
        if self.head_layout == 'standard':
            out = out.transpose(1, 2)
        return self.proj(out.reshape(x.shape))


class CrossBlock(nn.Module):
    """As `Block`, but the attention is to the context."""

    def __init__(
            self, dim: int, num_heads: int, head_layout: str, mlp_ratio: float = 2., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm_q = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.norm_kv = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.attn = CrossAttention(dim, num_heads, head_layout, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: torch.Tensor, context: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """x (B, D, h, w), context (B, n, D), valid (B, n) bool -> (B, D, h, w)."""
        size = x.shape[2:]
        x = (x + self.pos(x)).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm_q(x), self.norm_kv(context), valid)
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).unflatten(2, size)


class DecoderBlock(nn.Module):
    """Doubles the size unless it is the first, takes a map of the backbone in, and convolves twice."""

    def __init__(self, in_dim: int, dim: int, up: bool, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.up = up
        self.conv1 = conv_norm_act(in_dim, dim, **dd)
        self.conv2 = conv_norm_act(dim, dim, **dd)

    def forward(self, x: torch.Tensor, skip: Optional[torch.Tensor] = None) -> torch.Tensor:
        x = up2(x) if self.up else x
        x = x if skip is None else torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class ASTR(nn.Module):
    """Adaptive sparse-context transformer.

    Args:
        backbone: Model of timm's with maps at strides 4, 8, 16, 32, or 'tiny'.
        pretrained_backbone: Start from timm's weights of it.
        clip_size: Frames T of a clip, at least 2.
        embed_dim: Channels E of each level in the fusion; tokens have D = 3E.
        depth: Self-attention blocks.
        num_heads: Heads, of which D must be a multiple.
        num_classes: Maps of logits; one for lesions. More are an extension of ours.
        in_chans: 3: frames are RGB.
        decoder_dims: Channels of the decoder at strides 8, 4 and 2; C, C/2, C/4 by default, with C of the backbone's
            finest map.
        head_layout: See `CrossAttention`.

    Raises:
        ValueError: If a size does not fit.
    """

    def __init__(
            self,
            backbone: str = 'res2net50d',
            pretrained_backbone: bool = False,
            clip_size: int = 3,
            embed_dim: int = 64,
            depth: int = 12,
            num_heads: int = 8,
            num_classes: int = 1,
            in_chans: int = 3,
            decoder_dims: Optional[Tuple[int, int, int]] = None,
            head_layout: str = 'official',
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if clip_size < 2:
            raise ValueError(f'clip_size must be at least 2 (the frame and one before it), not {clip_size}')
        if head_layout not in ('official', 'standard'):
            raise ValueError(f"head_layout is 'official' or 'standard', not {head_layout!r}")
        if in_chans != 3:
            raise ValueError(f'ASTR takes RGB frames: in_chans must be 3, not {in_chans}; repeat a grey channel')
        dim = 3 * embed_dim
        if depth < 1 or dim % num_heads:
            raise ValueError(
                f'depth must be at least 1, and 3 * embed_dim a multiple of num_heads; got depth {depth}, embed_dim '
                f'{embed_dim}, num_heads {num_heads}')
        self.clip_size = self.num_frames = clip_size
        self.num_classes = num_classes
        self.embed_dim = dim
        self.grad_checkpointing = False
        # PVT v2 reduces its finest keys by convolutions of 8 positions
        self.min_size = 32 if backbone.startswith('pvt') else 8

        self.backbone, self.levels, dims = create_backbone(backbone, pretrained_backbone, **dd)
        c1, c2, c3 = decoder_dims or (dims[0], dims[0] // 2, dims[0] // 4)
        self.num_features = self.head_hidden_size = c3
        self.fusion = Fusion(dims[1:], embed_dim, **dd)
        self.context = SparseContext(dim, clip_size, **dd)
        self.key_conv = conv_norm_act(dim, dim, **dd)
        self.blocks = nn.ModuleList([Block(dim, num_heads, **dd) for _ in range(depth)])
        self.cross = CrossBlock(dim, num_heads, head_layout, **dd)
        self.decoder = nn.ModuleList([
            DecoderBlock(3 * dim + dims[1], c1, up=False, **dd),
            DecoderBlock(c1 + dims[0], c2, up=True, **dd),
            DecoderBlock(c2, c3, up=True, **dd),
        ])
        self.head = nn.Conv2d(c3, num_classes, 1, **dd) if num_classes > 0 else nn.Identity()
        self.feature_info = [dict(num_chs=dim, reduction=8, module=f'blocks.{i}') for i in range(depth)]
        for name, module in self.named_children():
            if name != 'backbone' or backbone == 'tiny':
                module.apply(init_weights)

    # -- timm's methods -----------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()  # the official recipe decays everything

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^backbone',
            blocks=[(r'^fusion|^context|^key_conv', (-1,)), (r'^blocks\.(\d+)', None), (r'^cross', (99998,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's stages and the self-attention blocks in the backward pass."""
        self.grad_checkpointing = enable
        backbone: Any = self.backbone
        backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new head of `num_classes` maps; 0 removes it, so that the model gives the decoder's features."""
        if global_pool:
            raise ValueError(f'ASTR gives maps: nothing is pooled, by {global_pool!r} or otherwise')
        self.num_classes = num_classes
        weight = self.decoder[-1].conv2[0].weight
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Conv2d(self.num_features, num_classes, 1, device=weight.device, dtype=weight.dtype)
            init_weights(self.head)

    def example_inputs(self, batch_size: int = 1) -> Tuple[torch.Tensor]:
        """Blank clips (B, T, 3, H, W) of the default size, on the model's device."""
        cfg: Any = getattr(self, 'pretrained_cfg', {})
        size = cfg.get('input_size', (3, 352, 352))[1:]
        return (self.context.merge.weight.new_zeros(batch_size, self.clip_size, 3, *size),)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward_frames(self, x: torch.Tensor) -> FrameMaps:
        """Frames (N, 3, H, W), each for itself."""
        maps = self.backbone(x)
        x1, x2, x3, x4 = (maps[level] for level in self.levels)
        return FrameMaps(self.fusion(x2, x3, x4), x1, x2)

    def forward_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Fused map of the frame to segment (B, D, h, w) -> the map behind each block."""
        x = self.key_conv(x)
        for number, block in enumerate(self.blocks):
            out = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
            x = out if number == 0 else x + out  # a second residual around residual blocks: maps grow twofold a block
            yield x

    def forward_context(
            self, fused: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Segment one frame of each sample.

        Args:
            fused: Fused maps of the frame and the earlier ones (B, T, D, h, w).
            x1, x2: Finer maps of the frame alone, (B, C1, 2h, 2w) and (B, C2, h, w).

        Returns:
            The decoder's features (B, C, 4h, 4w), and the coarse maps (B, T - 1, 1, h, w).
        """
        key = fused[:, 0]
        for x in self.forward_blocks(key):
            local = x
        tokens, valid, body_maps = self.context(fused[:, 1:])
        x = torch.cat([self.cross(local, tokens, valid), local, key], dim=1)
        for block, skip in zip(self.decoder, (x2, x1, None)):
            x = block(x, skip)
        return x, body_maps

    def _features(self, clip: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        check_clip(clip, self.clip_size, self.min_size)
        shape = clip.shape[:2]
        maps = FrameMaps(*(x.unflatten(0, shape) for x in self.forward_frames(clip.flatten(0, 1))))
        return self.forward_context(maps.fused, maps.x1[:, 0], maps.x2[:, 0])

    def forward_features(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip (B, T, 3, H, W) -> features (B, C, H / 2, W / 2) behind the decoder."""
        return self._features(clip)[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features (B, C, H / 2, W / 2) -> logits (B, 1, H, W); unchanged if `pre_logits` or without a head."""
        if pre_logits or isinstance(self.head, nn.Identity):
            return x
        return up2(self.head(x))

    def forward(
            self,
            clip: torch.Tensor,
            return_maps: bool = False,
            pad: bool = False,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Segment frame 0 of each clip.

        Args:
            clip: (B, T, 3, H, W), floating point, normalised; frame 0 is the one to segment, frame i the i-th before
                it. At least 2 frames and at most `clip_size`; H and W multiples of 8.
            return_maps: Also give the coarse maps, as always in training.
            pad: Take any H and W: repeat the last column and row up to a multiple of 8, and crop the logits.

        Returns:
            Logits (B, num_classes, H, W), before the sigmoid; in training, or with `return_maps`, also the coarse
            maps of the earlier frames (B, T - 1, 1, H / 8, W / 8), logits too.

        Raises:
            ValueError: If the clip is of another form, or too small.
        """
        size = clip.shape[-2:]
        if pad and clip.ndim == 5:
            missing = (0, -size[1] % 8, 0, -size[0] % 8)
            clip = F.pad(clip.flatten(0, 1), missing, mode='replicate').unflatten(0, clip.shape[:2])
        features, body_maps = self._features(clip)
        logits = self.forward_head(features)
        if pad and not isinstance(self.head, nn.Identity):
            logits = logits[..., :size[0], :size[1]]
        return (logits, body_maps) if self.training or return_maps else logits

    def forward_intermediates(
            self,
            clip: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """The maps (B, D, H / 8, W / 8) of frame 0 behind chosen self-attention blocks, in timm's way.

        Args:
            clip: See `forward`.
            indices: Take the last n blocks if int, all if None, else these.
            norm: Without effect: there is no norm to apply.
            stop_early: Stop behind the last chosen block; implied by `intermediates_only`.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list of maps alone.

        Returns:
            The decoder's features (the last chosen map with `stop_early`) and the maps; or the latter alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"ASTR's intermediates are 'NCHW', not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        check_clip(clip, self.clip_size, self.min_size)
        maps = []
        for number, x in enumerate(self.forward_blocks(self.forward_frames(clip[:, 0]).fused)):
            if number in take_indices:
                maps.append(x)
            if number == max_index:
                break
        if intermediates_only:
            return maps
        return maps[-1] if stop_early else self.forward_features(clip), maps

    @torch.no_grad()
    def stream(self, frames: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Segment every frame of a video, each frame through the backbone once.

        The same logits as `forward` gives for the clips that `clip_indices` names. The first T - 1 frames wait for
        later ones, which stand for those before the beginning. At most 2T - 1 frames and a chunk are kept.

        Args:
            frames: Chunks (n, 3, H, W) of the video in order, n >= 1, normalised, on the model's device. Chunks of
                one frame need least memory, longer ones keep a GPU busy.

        Yields:
            Logits (m, num_classes, H, W) of the next m >= 1 frames. All together there are as many as frames.

        Raises:
            ValueError: If the model is in training mode (batch norm would mix frames), or a frame does not fit.
        """
        if self.training:
            raise ValueError('stream() is for evaluation: call model.eval() first')
        fused: Dict[int, torch.Tensor] = {}  # of frames that are still context of others
        skips: Dict[int, Tuple[torch.Tensor, torch.Tensor]] = {}  # of frames that were not segmented yet
        count = done = 0
        lags = self.clip_size - 1

        def segmented(last: int) -> torch.Tensor:
            nonlocal done
            batch = range(done, last)
            context = torch.stack([
                torch.stack([fused[i] for i in clip_indices(frame, self.clip_size, count)]) for frame in batch])
            x1, x2 = (torch.stack(maps) for maps in zip(*(skips.pop(frame) for frame in batch)))
            done = last
            for frame in [frame for frame in fused if frame < done - lags]:
                del fused[frame]
            return self.forward_head(self.forward_context(context, x1, x2)[0])

        for chunk in frames:
            check_clip(chunk[:, None].expand(-1, self.clip_size, -1, -1, -1), self.clip_size, self.min_size)
            for maps in zip(*self.forward_frames(chunk)):
                fused[count], skips[count] = maps[0], maps[1:]
                count += 1
            # a frame with fewer than `lags` before it is mirrored, and needs those behind it
            ready = count if count >= 2 * lags else max(done, min(count - lags, lags))
            if ready > done:
                yield segmented(ready)
        if count > done:
            yield segmented(count)


def check_clip(clip: torch.Tensor, clip_size: int, min_size: int) -> None:
    """Raise ValueError if `clip` is not what `ASTR.forward` takes."""
    if clip.ndim != 5 or clip.shape[2] != 3:
        raise ValueError(
            f'expected a clip (B, T, 3, H, W), frame 0 is the one to segment; got shape {tuple(clip.shape)}')
    if not clip.is_floating_point():
        raise ValueError(f'expected a floating point clip; scale and normalise uint8 frames first (it is {clip.dtype})')
    num_frames, height, width = clip.shape[1], clip.shape[3], clip.shape[4]
    if num_frames < 2:
        raise ValueError('needs at least one auxiliary frame; repeat the frame for a single image')
    if num_frames > clip_size:
        raise ValueError(f'model was built for at most {clip_size} frames, got {num_frames}')
    if height % 8 or width % 8:
        raise ValueError(f'height and width must be multiples of 8, got {height} x {width}: resize, or give pad=True')
    least = max(8 * 2 ** (num_frames - 1), min_size)
    if min(height, width) < least:
        raise ValueError(
            f'clip too small for the pooling window: {num_frames} frames need at least {least} x {least} pixels, got '
            f'{height} x {width}')


def resize(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


def up2(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2., mode='bilinear', align_corners=True)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# official name -> ours, the first that fits
_NAMES = (
    (r'backbone\.patch_embed1\.', 'backbone.patch_embed.'),
    (r'backbone\.patch_embed([234])\.', lambda m: f'backbone.stages_{int(m[1]) - 1}.downsample.'),
    (r'backbone\.block(\d)\.(\d+)\.', lambda m: f'backbone.stages_{int(m[1]) - 1}.blocks.{m[2]}.'),
    (r'backbone\.norm(\d)\.', lambda m: f'backbone.stages_{int(m[1]) - 1}.norm.'),
    (r'fusion\.linear(\d)\.', r'fusion.level\1.'),
    (r'pool\.(\d+)\.projector\.', r'context.lags.\1.pool_proj.'),
    (r'conv\.0\.', 'key_conv.'),
    (r'conv\.(\d+)\.', lambda m: f'context.lags.{int(m[1]) - 1}.conv.'),
    (r'body_attention\.(\d+)\.', r'context.lags.\1.coarse_map.'),
    (r'projector\.', 'context.merge.'),
    (r'local_attention\.(\d+)\.pos_embed\.', r'blocks.\1.pos.'),
    (r'local_attention\.(\d+)\.', r'blocks.\1.'),
    (r'global_attention\.pos_embed\.', 'cross.pos.'),
    (r'global_attention\.norm12\.', 'cross.norm_kv.'),
    (r'global_attention\.norm1\.', 'cross.norm_q.'),
    (r'global_attention\.', 'cross.'),
    (r'segmentation_head\.0\.', 'head.'),
)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename an official checkpoint's entries to ours; a state dict of ours passes unchanged.

    Args:
        state_dict: Official or own state dict, bare or under 'state_dict' or 'model', with or without the prefix
            'module.' of distributed training.
        model: The model to load it into.
    """
    for key in ('state_dict', 'model'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if any(name.startswith('module.') for name in state_dict):
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    if 'fusion.linear2.0.weight' in state_dict:
        state_dict = {_own_name(name): value for name, value in state_dict.items()}
    return state_dict


def _own_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        new, count = re.subn(f'^{pattern}', replacement, name)
        if count:
            return new.replace('.mlp.dwconv.dwconv.', '.mlp.dwconv.')
    return name


def _create_astr(variant: str, pretrained: bool = False, **kwargs: Any) -> ASTR:
    if kwargs.pop('features_only', False):
        raise ValueError(f'{variant} takes clips: take the features from .backbone, or use forward_intermediates')
    if pretrained:
        kwargs['pretrained_backbone'] = False  # they come with the rest
    model = build_model(
        ASTR,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )
    model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, num_frames=model.clip_size)
    return model


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1, 'input_size': (3, 352, 352), 'min_input_size': (3, 32, 32), 'pool_size': None,
        'fixed_input_size': False, 'crop_pct': 1.0, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'classifier': 'head',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2408.10067',
        'paper_name': 'Towards a Benchmark for Colorectal Cancer Segmentation in Endorectal Ultrasound Videos',
        'origin_url': 'https://github.com/yuncheng97/ASTR',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'astr_res2net50': _cfg(first_conv='backbone.conv1.0'),
    'astr_pvt_v2_b2': _cfg(first_conv='backbone.patch_embed.proj'),
    'astr_tiny': _cfg(input_size=(3, 64, 64), first_conv='backbone.stem.0.0'),
    'astr_tiny.phantoms': _cfg(
        hf_hub_id='vishub/astr_tiny.phantoms', input_size=(3, 64, 64), first_conv='backbone.stem.0.0'),
})


@register_model
def astr_res2net50(pretrained: bool = False, **kwargs: Any) -> ASTR:
    """The official default."""
    return _create_astr('astr_res2net50', pretrained, **dict(dict(backbone='res2net50d'), **kwargs))


@register_model
def astr_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> ASTR:
    """With a pyramid transformer as backbone."""
    return _create_astr('astr_pvt_v2_b2', pretrained, **dict(dict(backbone='pvt_v2_b2'), **kwargs))


@register_model
def astr_tiny(pretrained: bool = False, **kwargs: Any) -> ASTR:
    """Small enough to train on a CPU: 64 pixels, three blocks of width 48, nine convolutions as backbone."""
    model_args = dict(backbone='tiny', embed_dim=16, depth=3, num_heads=4, decoder_dims=(32, 24, 16))
    return _create_astr('astr_tiny', pretrained, **dict(model_args, **kwargs))
