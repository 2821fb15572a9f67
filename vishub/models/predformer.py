"""PredFormer: video prediction transformers without recurrence or convolution

Paper: `Video Prediction Transformers without Recurrence or Convolution` - https://arxiv.org/abs/2410.04733

@article{tang2024predformer,
  title={Video Prediction Transformers without Recurrence or Convolution},
  author={Tang, Yujin and others},
  journal={arXiv preprint arXiv:2410.04733},
  year={2024}
}

Official code: https://github.com/yyyujintang/PredFormer. It has no licence file, so nothing of it is copied here: this
file was written from a description of the architecture. Its authors published no weights; checkpoints made with their
code load through `checkpoint_filter_fn`.

T frames in, the next T frames out, in one pass: frames become patches, patches tokens, and gated transformer blocks
attend along space, along time, or along both. The nine arrangements differ only in the order of these axes, which is a
string of letters here (see `ARRANGEMENTS`). More than T frames come from feeding predictions back (`predict`).
"""
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from vishub.models.builder import build_model

__all__ = ['PredFormer']


class Arrangement(NamedTuple):
    """One order of attention.

    Attributes:
        axes: Axis along which each unit of a layer attends: s (space), t (time), j (both jointly).
        interleaved: `n_layers` layers of these units; else one layer, whose units have `n_layers` blocks each.
        official: What the official code calls each unit.
    """
    axes: str
    interleaved: bool
    official: Tuple[str, ...]


_ST = ('st_space_transformer', 'st_temporal_transformer')
_TS = ('ts_temporal_transformer', 'ts_space_transformer')
ARRANGEMENTS = {
    'full': Arrangement('j', False, ('space_temporal_transformer',)),
    'fac_st': Arrangement('st', False, ('space_transformer', 'temporal_transformer')),
    'fac_ts': Arrangement('ts', False, ('temporal_transformer', 'space_transformer')),
    'binary_st': Arrangement('st', True, _ST),
    'binary_ts': Arrangement('ts', True, _TS),
    'triplet_sts': Arrangement(
        'sts', True, ('space_transformer_first', 'temporal_transformer', 'space_transformer_second')),
    'triplet_tst': Arrangement(
        'tst', True, ('temporal_transformer_first', 'space_transformer', 'temporal_transformer_second')),
    'quad_tsst': Arrangement('tsst', True, _TS + _ST),
    'quad_stts': Arrangement('stts', True, _ST + _TS),
}


def position_encoding(length: int, dim: int) -> torch.Tensor:
    """Sinusoids (length, dim), float32: sine in even channels, cosine in odd ones, wavelengths up to 10000 * 2 pi."""
    # The angle is rounded to float32 before its sine is taken: official checkpoints were trained with that.
    channel = torch.arange(dim, dtype=torch.float64, device='cpu')
    wavelength = 10000 ** (2 * (channel // 2) / dim)
    position = torch.arange(length, dtype=torch.float64, device='cpu')
    angle = (position[:, None] / wavelength).float()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


class PatchEmbed(nn.Module):
    """Each frame's patches, flattened with the channel fastest, through one linear layer."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_chans * patch_size ** 2, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C, H, W) -> (B, T, N, dim), the N = H / p * W / p patches row by row."""
        p = self.patch_size
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B, T, C, h, p, w, p
        return self.proj(x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3))


class Attention(nn.Module):
    """Multi-head self-attention; dropout acts on its output only."""

    def __init__(
            self, dim: int, num_heads: int, head_dim: int, proj_drop: float = 0., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        inner_dim = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner_dim, bias=False, **dd)
        single = num_heads == 1 and head_dim == dim  # one head of full width has no output layer
        self.proj = nn.Identity() if single else nn.Linear(inner_dim, dim, **dd)
        self.proj_drop = nn.Identity() if single else nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if q.dtype == torch.bfloat16 and q.device.type == 'cpu' and torch.is_grad_enabled():
            # Fused attention's way back is slow in bfloat16 on a CPU: a training step of predformer_tiny, batch 16,
            # took 0.18 s with it and takes 0.12 s without (one thread of a Xeon with AMX).
            with torch.autocast('cpu', enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # B, heads, L, head_dim
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SwiGlu(nn.Module):
    """Gated two-layer perceptron: fc2(SiLU(g) * x), where one product, fc1, gives both the gate g and x."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, **dd)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.drop1(F.silu(gate) * x)))


class Block(nn.Module):
    """Gated transformer block: attention and SwiGLU, both pre-norm."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            head_dim: int,
            mlp_ratio: float = 4.,
            drop: float = 0.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = Attention(dim, num_heads, head_dim, proj_drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = SwiGlu(dim, int(dim * mlp_ratio), drop, **dd)
        # one draw a row: a frame's patches, or a patch's frames, are dropped together
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Unit(nn.Module):
    """Blocks that attend along one axis, and a LayerNorm after the residual stream.

    A unit along time returns a transposed view, in which the patches come first in memory. The next unit along time
    finds its rows there without a copy; only a change of axis moves data.

    Args:
        axis: s (space), t (time), or j (both jointly).
        depth: Number of blocks.
        dim: Channels.
        **block_args: See `Block`.
    """

    def __init__(self, axis: str, depth: int, dim: int, **block_args: Any) -> None:
        super().__init__()
        self.axis = axis
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList([Block(dim, **block_args) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, device=block_args.get('device'), dtype=block_args.get('dtype'))

    def forward(self, x: torch.Tensor, block: Optional[int] = None) -> torch.Tensor:
        """(B, T, N, dim) -> the same; of one `block` alone where that is given (the norm goes with the last)."""
        num_frames, num_patches = x.shape[1], x.shape[2]
        if self.axis == 'j':
            x = x.flatten(1, 2)  # B, T * N, dim
        elif self.axis == 't':
            x = x.transpose(1, 2).flatten(0, 1)  # B * N, T, dim
        else:
            x = x.flatten(0, 1)  # B * T, N, dim
        for module in self.blocks if block is None else self.blocks[block:block + 1]:
            if self.grad_checkpointing and self.training:
                x = checkpoint(module, x)
            else:
                x = module(x)
        if block is None or block == len(self.blocks) - 1:
            x = self.norm(x)
        if self.axis == 'j':
            return x.unflatten(1, (num_frames, num_patches))
        if self.axis == 't':
            return x.unflatten(0, (-1, num_patches)).transpose(1, 2)
        return x.unflatten(0, (-1, num_frames))


class Layer(nn.Module):
    """One unit for each letter of `axes`, one after the other.

    Args:
        axes: See `Arrangement`.
        depth: Blocks a unit.
        skip: Add the input to the output.
        **unit_args: See `Unit`.
    """

    def __init__(self, axes: str, depth: int, skip: bool = False, **unit_args: Any) -> None:
        super().__init__()
        self.skip = skip
        self.units = nn.ModuleList([Unit(axis, depth, **unit_args) for axis in axes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, N, dim) -> the same."""
        shortcut = x
        for unit in self.units:
            x = unit(x)
        return x + shortcut if self.skip else x


class PredFormer(nn.Module):
    """PredFormer.

    Args:
        arrangement: Order of attention, one of `ARRANGEMENTS`.
        n_layers: Layers of interleaved arrangements (binary, triplet, quad); blocks a unit of `full` and `fac_*`.
        img_size: Height and width H, W of a frame, or one side; multiples of `patch_size`.
        num_frames: Frames T, of the input and of the output.
        in_chans: Channels C of a frame.
        num_classes: Must be 0: the model has no classes. Its head gives C * p**2 values a token.
        patch_size: Side p of a patch.
        embed_dim: Channels d of a token; even.
        num_heads, head_dim: Attention heads, and channels of each.
        mlp_ratio: Hidden width of the SwiGLU, in multiples of `embed_dim`.
        depth: Blocks a unit of interleaved arrangements.
        layer_skip: Add each layer's input to its output (the paper does so for Human3.6M's triplets).
        legacy_token_order: For `fac_st` alone: leave the tokens in patch-major order at the head, which reads them as
            frame-major. That is what the official code does, so its checkpoints need it; the paper means otherwise.
        drop_rate: Dropout within the SwiGLU and of its output.
        proj_drop_rate: Dropout of the attention's output ("attention dropout" of the official code).
        drop_path_rate: Stochastic depth, the same for every block.

    Attributes:
        num_features: Channels d of a token.
        grid_size: Patches h, w of a frame.

    Raises:
        ValueError: If a size does not fit.
    """

    def __init__(
            self,
            arrangement: str = 'quad_tsst',
            n_layers: int = 6,
            img_size: Union[int, Tuple[int, int]] = (64, 64),
            num_frames: int = 10,
            in_chans: int = 1,
            num_classes: int = 0,
            patch_size: int = 8,
            embed_dim: int = 256,
            num_heads: int = 8,
            head_dim: int = 32,
            mlp_ratio: float = 4.,
            depth: int = 1,
            layer_skip: bool = False,
            legacy_token_order: bool = False,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f'unknown arrangement {arrangement!r}; there are: {", ".join(ARRANGEMENTS)}')
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(f'embed_dim must be even and positive (sine and cosine come in pairs), not {embed_dim}')
        for name, value in dict(
                n_layers=n_layers, in_chans=in_chans, patch_size=patch_size, num_heads=num_heads, head_dim=head_dim,
                depth=depth).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, not {value}')
        if legacy_token_order and arrangement != 'fac_st':
            raise ValueError(f"legacy_token_order is a quirk of 'fac_st'; {arrangement!r} has none")
        if num_classes != 0:
            raise ValueError(f'PredFormer predicts frames and has no classes: num_classes must be 0, not {num_classes}')
        self.arrangement = arrangement
        self.in_chans = in_chans
        self.num_classes = 0
        self.patch_size = patch_size
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.legacy_token_order = legacy_token_order

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, **dd)
        axes, interleaved, _ = ARRANGEMENTS[arrangement]
        self.layers = nn.ModuleList([
            Layer(
                axes,
                depth=depth if interleaved else n_layers,
                skip=layer_skip,
                dim=embed_dim,
                num_heads=num_heads,
                head_dim=head_dim,
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                proj_drop=proj_drop_rate,
                drop_path=drop_path_rate,
                **dd,
            )
            for _ in range(n_layers if interleaved else 1)])
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.head = nn.Linear(embed_dim, in_chans * patch_size ** 2, **dd)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=module) for module, _ in self._steps()]
        self.img_size, self.num_frames = (0, 0), 0
        self.set_input_size(img_size, num_frames)

        self.layers.apply(init_weights)  # patch embedding and head keep PyTorch's own initialisation

    @property
    def grid_size(self) -> Tuple[int, int]:
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            num_frames: Optional[int] = None,
    ) -> None:
        """Make the model one for other clips. No weight depends on their size, only the position encoding does.

        The encoding counts over time and space together, so another number of patches moves every frame's codes.

        Args:
            img_size: Height and width of a frame, or one side; as it is if None.
            num_frames: Frames; as it is if None.

        Raises:
            ValueError: If a side is not a positive multiple of the patch size, or there is no frame.
        """
        height, width = self.img_size if img_size is None else to_2tuple(img_size)
        num_frames = self.num_frames if num_frames is None else num_frames
        for name, side in (('height', height), ('width', width)):
            if side < 1 or side % self.patch_size:
                raise ValueError(f'image {name} must be divisible by the patch size {self.patch_size}, but is {side}')
        if num_frames < 1:
            raise ValueError(f'num_frames must be at least 1, not {num_frames}')
        self.img_size, self.num_frames = (height, width), num_frames
        weight = self.norm.weight if isinstance(self.norm, nn.LayerNorm) else self.patch_embed.proj.weight
        num_patches = self.grid_size[0] * self.grid_size[1]
        encoding = position_encoding(num_frames * num_patches, self.embed_dim).to(weight.device, weight.dtype)
        self.register_buffer('pos_embed', encoding.unflatten(0, (num_frames, num_patches)), persistent=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()  # the official recipe decays everything

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^patch_embed', blocks=r'^layers\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for layer in self.layers:
            for unit in layer.units:
                unit.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Remove the head for 0 classes, so that the model gives tokens (B, T, N, d).

        Raises:
            ValueError: For any other number, or any pooling: the head's width is that of a patch.
        """
        if num_classes != 0 or global_pool:
            raise ValueError(
                f'PredFormer predicts frames and has no classes: reset_classifier takes 0 alone (no head), '
                f'not {num_classes}' + (f' with pooling {global_pool!r}' if global_pool else ''))
        self.head = nn.Identity()

    def example_inputs(self) -> Tuple[torch.Tensor]:
        """One blank clip (1, T, C, H, W) on the model's device."""
        return (self.pos_embed.new_zeros(1, self.num_frames, self.in_chans, *self.img_size),)

    def _steps(self) -> List[Tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
        """The encoder in steps, each with its module's name: layers, or the units of a factorised model, or the blocks
        of the full one. All take and give (B, T, N, d)."""
        if ARRANGEMENTS[self.arrangement].interleaved:
            return [(f'layers.{i}', layer) for i, layer in enumerate(self.layers)]
        units = self.layers[0].units
        if self.arrangement != 'full':
            return [(f'layers.0.units.{k}', unit) for k, unit in enumerate(units)]

        def step(block: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: units[0](x, block)
        return [(f'layers.0.units.0.blocks.{j}', step(j)) for j in range(len(units[0].blocks))]

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'BTCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that also returns the maps of chosen steps: the layers of interleaved arrangements, the
        units of `fac_*`, the blocks of `full`.

        Args:
            x: (B, T, C, H, W).
            indices: Take the last n steps if int, all if None, else these.
            norm: Apply the head's LayerNorm to the maps.
            stop_early: Stop after the last chosen step.
            output_fmt: 'BTCHW' for maps (B, T, d, h, w), 'NCHW' for (B * T, d, h, w), as image models give them.
            intermediates_only: Return the list of maps alone.

        Returns:
            What `forward_features` gives (of the last step that ran) and the maps; or the latter alone.
        """
        if output_fmt not in ('BTCHW', 'NCHW'):
            raise ValueError(f"PredFormer's intermediates are 'BTCHW' or 'NCHW', not {output_fmt!r}")
        steps = self._steps()
        take_indices, max_index = feature_take_indices(len(steps), indices)
        if stop_early:
            steps = steps[:max_index + 1]

        x = self._embed(x)
        intermediates = []
        for i, (_, step) in enumerate(steps):
            x = step(x)
            if i in take_indices:
                feature_map = self.norm(x) if norm else x
                feature_map = feature_map.transpose(2, 3).unflatten(3, self.grid_size)  # B, T, d, h, w
                intermediates.append(feature_map.flatten(0, 1) if output_fmt == 'NCHW' else feature_map)
        if intermediates_only:
            return intermediates
        return self._ordered(x), intermediates

    def prune_intermediate_layers(
            self,
            indices: Optional[Union[int, List[int]]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what `forward_intermediates` does not need for `indices`."""
        steps = self._steps()
        take_indices, max_index = feature_take_indices(len(steps), indices)
        if max_index < len(steps) - 1:
            if ARRANGEMENTS[self.arrangement].interleaved:
                self.layers = self.layers[:max_index + 1]
            elif self.arrangement == 'full':
                unit = self.layers[0].units[0]
                unit.blocks = unit.blocks[:max_index + 1]
                unit.norm = nn.Identity()  # it belongs to the last block
            else:
                self.layers[0].units = self.layers[0].units[:max_index + 1]
                self.legacy_token_order = False
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take_indices

    def _check(self, x: torch.Tensor) -> None:
        """Raise ValueError if `x` is not a floating-point clip of the configured size."""
        if x.ndim != 5:
            raise ValueError(
                f'PredFormer expects (batch, frames, channels, height, width), got shape {tuple(x.shape)}')
        _, num_frames, channels, height, width = x.shape
        if not x.is_floating_point():
            raise ValueError(
                f'expected a floating point video; scale uint8 frames to [0, 1] first (the input is {x.dtype})')
        if num_frames != self.num_frames:
            raise ValueError(
                f'expected {self.num_frames} frames, got {num_frames}; use num_frames={num_frames} or set_input_size')
        if channels != self.in_chans:
            raise ValueError(f'expected {self.in_chans} channels, got {channels}; use in_chans={channels}')
        if (height, width) != self.img_size:
            raise ValueError(
                f'expected frames of height, width {self.img_size}, got {(height, width)}; '
                f'use img_size={(height, width)} or set_input_size')

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Clip (B, T, C, H, W) -> tokens (B, T, N, d) with their positions."""
        self._check(x)
        return self.patch_embed(x) + self.pos_embed

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, N, d) in the order in which the head is to read them."""
        if self.legacy_token_order:  # patch-major tokens, read as if they were frame-major
            return x.transpose(1, 2).flatten(1, 2).unflatten(1, x.shape[1:3])
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Clip (B, T, C, H, W) -> tokens (B, T, N, d) after the encoder, before the head's norm."""
        x = self._embed(x)
        for layer in self.layers:
            x = layer(x)
        return self._ordered(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, T, N, d) -> frames (B, T, C, H, W); normed tokens if `pre_logits` or the head was removed."""
        x = self.norm(x)
        if pre_logits or isinstance(self.head, nn.Identity):
            return x
        p = self.patch_size
        x = self.head(x).unflatten(3, (self.in_chans, p, p)).unflatten(2, self.grid_size)  # B, T, h, w, C, p, p
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The T frames that follow the given T.

        Args:
            x: (B, T, C, H, W), floating point, in the value range of the training data ([0, 1] for images).

        Returns:
            The same shape. Values are not clipped.

        Raises:
            ValueError: If the shape is not the configured one, or the values are integers.
        """
        return self.forward_head(self.forward_features(x))

    def predict(self, x: torch.Tensor, n_future: int) -> torch.Tensor:
        """The next `n_future` frames; where these are more than T, predictions are fed back as they are.

        Args:
            x: (B, T, C, H, W), as for `forward`.
            n_future: How many frames, at least 1.

        Returns:
            (B, n_future, C, H, W).

        Raises:
            ValueError: If `n_future` is less than 1, the head was removed, or the input is bad.
        """
        if n_future < 1:
            raise ValueError(f'n_future must be at least 1, not {n_future}')
        if isinstance(self.head, nn.Identity):
            raise ValueError('the head of this model was removed, so it gives tokens and no frames')
        predicted = []
        for _ in range(-(-n_future // self.num_frames)):
            x = self(x)
            predicted.append(x)
        return torch.cat(predicted, dim=1)[:, :n_future]


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# official name -> ours, within a block
_BLOCK_NAMES = {
    '0.norm': 'norm1',
    '0.fn.to_qkv': 'attn.qkv',
    '0.fn.to_out.0': 'attn.proj',
    '1.norm': 'norm2',
    '1.fn.fc1_g': 'mlp.fc1_g',
    '1.fn.fc1_x': 'mlp.fc1_x',
    '1.fn.fc2': 'mlp.fc2',
}
_NAMES = {'to_patch_embedding.1': 'patch_embed.proj', 'mlp_head.0': 'norm', 'mlp_head.1': 'head'}
_UNIT_NAME = re.compile(r'(?:blocks\.(?P<layer>\d+)\.)?(?P<unit>\w+_transformer\w*)\.(?P<rest>.+)')


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename an official checkpoint's entries to ours; a state dict of ours passes unchanged.

    A checkpoint of `fac_st` that the official code trained needs a model with `legacy_token_order=True`.

    Args:
        state_dict: Official or own state dict, bare or under 'state_dict', with or without the prefix 'module.'.
        model: The model to load it into. Its arrangement decides how official names are read: some arrangements
            share theirs.

    Raises:
        ValueError: If the checkpoint has units that the model's arrangement has not, or is for another number of
            channels or patch size.
    """
    if isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    if any(name.startswith('module.') for name in state_dict):
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    if 'to_patch_embedding.1.weight' in state_dict:
        state_dict = _packed({_own_name(name, model.arrangement): value for name, value in state_dict.items()})
    width, expected = state_dict['patch_embed.proj.weight'].shape[1], model.patch_embed.proj.in_features
    if width != expected:
        raise ValueError(
            f'the checkpoint embeds patches of {width} values, the model patches of {expected} (in_chans '
            f'{model.in_chans}, patch_size {model.patch_size}): they must have the same channels and patch size')
    return state_dict


def _own_name(name: str, arrangement: str) -> str:
    """Official name -> ours, with the SwiGLU's two linears still apart."""
    stem, _, leaf = name.rpartition('.')
    if stem in _NAMES:
        return f'{_NAMES[stem]}.{leaf}'
    match = _UNIT_NAME.fullmatch(stem)
    _, interleaved, official = ARRANGEMENTS[arrangement]
    if match is None or match['unit'] not in official or interleaved != (match['layer'] is not None):
        raise ValueError(f"'{name}' is not an entry of an official checkpoint of the arrangement {arrangement!r}")
    unit = f'layers.{match["layer"] or 0}.units.{official.index(match["unit"])}'
    if match['rest'] == 'norm':
        return f'{unit}.norm.{leaf}'
    _, block, rest = match['rest'].split('.', 2)  # layers.{block}.{rest}
    return f'{unit}.blocks.{block}.{_BLOCK_NAMES[rest]}.{leaf}'


def _packed(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Join the SwiGLU's gate and value, fc1_g and fc1_x, to the one linear fc1."""
    out = {}
    for name, value in state_dict.items():
        if '.mlp.fc1_g.' in name:
            value = torch.cat([value, state_dict[name.replace('.fc1_g.', '.fc1_x.')]])
            name = name.replace('.fc1_g.', '.fc1.')
        if '.mlp.fc1_x.' not in name:
            out[name] = value
    return out


def _create_predformer(variant: str, pretrained: bool = False, **kwargs: Any) -> PredFormer:
    if isinstance(kwargs.get('pretrained_cfg'), dict):
        # timm would adapt it to other channels as if it were a convolution (old versions to any number but 3)
        kwargs['pretrained_cfg'] = {k: v for k, v in kwargs['pretrained_cfg'].items() if k != 'first_conv'}
    num_classes = kwargs.pop('num_classes', None)
    if num_classes:
        raise ValueError(f'{variant} predicts frames and has no classes: num_classes must be 0, not {num_classes}')
    model = build_model(
        PredFormer,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', None), feature_cls='getter'),
        **kwargs,
    )
    if isinstance(model, PredFormer):
        model.pretrained_cfg = model.default_cfg = dict(
            model.pretrained_cfg, first_conv='patch_embed.proj', num_frames=model.num_frames)
        if num_classes == 0:  # asked for by name, which is timm's way to ask for a model without a head
            model.reset_classifier(0)
    return model


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    channels = kwargs['input_size'][0]
    return {
        'num_classes': 0, 'pool_size': None, 'fixed_input_size': True, 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.,) * channels, 'std': (1.,) * channels,
        'classifier': 'head',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2410.04733',
        'paper_name': 'Video Prediction Transformers without Recurrence or Convolution',
        'origin_url': 'https://github.com/yyyujintang/PredFormer',
        **kwargs,
    }


# The paper's data sets: shape of a frame, blocks in all (three out of eight do not divide: triplets have two layers
# there, as in the paper's tables), and the rest.
_PRESETS: Dict[str, Tuple[Tuple[int, int, int], int, Dict[str, Any]]] = {
    'mmnist': ((1, 64, 64), 24, dict(num_frames=10, patch_size=8)),
    'taxibj': ((2, 32, 32), 8, dict(
        num_frames=4, patch_size=4, drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)),
    'weather': ((1, 32, 64), 8, dict(
        num_frames=12, patch_size=4, mlp_ratio=2., drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.25)),
    'human': ((3, 256, 256), 12, dict(
        num_frames=4, patch_size=8, drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)),
}

# The authors published no weights.
default_cfgs = generate_default_cfgs({
    **{f'predformer_{arrangement}_{data}': _cfg(input_size=input_size)
       for data, (input_size, _, _) in _PRESETS.items() for arrangement in ARRANGEMENTS},
    'predformer_tiny': _cfg(input_size=(1, 32, 32)),
    'predformer_tiny.moving_mnist': _cfg(input_size=(1, 32, 32), hf_hub_id='vishub/predformer_tiny.moving_mnist'),
})


def _register(arrangement: str, data: str) -> None:
    """Register `predformer_{arrangement}_{data}` with timm."""
    name = f'predformer_{arrangement}_{data}'
    _, num_blocks, preset = _PRESETS[data]
    model_args = dict(
        preset,
        arrangement=arrangement,
        n_layers=num_blocks // len(ARRANGEMENTS[arrangement].axes),
        # the paper adds it for stable training (the released code has it commented out)
        layer_skip=data == 'human' and arrangement.startswith('triplet'),
    )

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> PredFormer:
        return _create_predformer(name, pretrained, **dict(model_args, **kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    globals()[name] = register_model(entrypoint)


for _data in _PRESETS:
    for _arrangement in ARRANGEMENTS:
        _register(_arrangement, _data)


@register_model
def predformer_tiny(pretrained: bool = False, **kwargs: Any) -> PredFormer:
    """Small enough to train on a CPU: 8 frames of 32 pixels, 6 blocks of width 128; any other `arrangement` by name."""
    model_args = dict(
        arrangement='triplet_tst', n_layers=2, num_frames=8, patch_size=8, embed_dim=128, num_heads=4, mlp_ratio=2.)
    return _create_predformer('predformer_tiny', pretrained, **dict(model_args, **kwargs))
