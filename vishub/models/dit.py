"""DiT: Scalable Diffusion Models with Transformers

Paper: `Scalable Diffusion Models with Transformers` - https://arxiv.org/abs/2212.09748 (ICCV 2023)

@inproceedings{peebles2023scalable,
  title={Scalable Diffusion Models with Transformers},
  author={Peebles, William and Xie, Saining},
  booktitle={ICCV},
  year={2023}
}

Official code: https://github.com/facebookresearch/DiT. Code and weights are CC BY-NC 4.0, so nothing of it is copied
here: this file was written from a description of the architecture. Official checkpoints (XL/2 at 256 and 512 pixels,
and what its training writes) load through `checkpoint_filter_fn`.

A plain vision transformer that looks at a noisy picture, knows how noisy it is and what it should show, and says which
part of it is noise. What it knows becomes one vector c, and every block is shifted, scaled and gated by a linear
function of c that starts at zero (adaLN-Zero): a fresh model is the identity in every block, and its output is zero.
"""
import functools
import math
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from vishub.models.builder import build_model

__all__ = ['DiffusionTransformer', 'drop_labels', 'position_table', 'timestep_frequencies']


def position_table(
        height: int,
        width: int,
        dim: int,
        device: Optional[torch.device] = None,
        row_step: float = 1.,
        col_step: float = 1.,
) -> torch.Tensor:
    """Sines and cosines of the place of every token of a grid.

    A quarter of the channels each for sin and cos of the column, then of the row, both counted from 0 in steps of
    `col_step` and `row_step`, at the frequencies 10000^(-i / (dim / 4)).

    Returns:
        float32 (1, height * width, dim), rows first; computed in float64.

    Raises:
        ValueError: If dim is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f'embed_dim must be divisible by 4 (sines and cosines of rows and columns), got {dim}')
    frequencies = 10000. ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))
    rows = row_step * torch.arange(height, dtype=torch.float64, device=device)[:, None] * frequencies  # H, dim / 4
    cols = col_step * torch.arange(width, dtype=torch.float64, device=device)[:, None] * frequencies  # W, dim / 4
    rows = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, width, -1)
    cols = torch.cat([cols.sin(), cols.cos()], dim=1)[None].expand(height, -1, -1)
    return torch.cat([cols, rows], dim=2).reshape(1, height * width, dim).float()  # H, W, dim -> 1, N, dim


@functools.lru_cache(maxsize=16)
def cached_position_table(*arguments: Any) -> torch.Tensor:
    """`position_table`, made once for a grid and device."""
    with torch.inference_mode(False):  # whoever asks first may be sampling, who asks next may be training
        return position_table(*arguments)


def timestep_frequencies(t: torch.Tensor, dim: int = 256) -> torch.Tensor:
    """Timesteps (B,) -> float32 (B, dim): cosines, then sines, of t at the frequencies 10000^(-i / (dim / 2))."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def drop_labels(y: torch.Tensor, null_label: int, rate: float) -> torch.Tensor:
    """Replace each label of y (B,) by `null_label` with probability `rate`: so guidance learns what no label means."""
    return torch.where(torch.rand(y.shape, device=y.device) < rate, null_label, y)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Shift and scale all tokens of x (B, N, D) by those of their picture, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D), tokens row by row."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbed(nn.Module):
    """Timesteps (B,), fed as they are -> (B, D)."""

    def __init__(self, dim: int, num_frequencies: int = 256, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, dim, **dd), nn.SiLU(), nn.Linear(dim, dim, **dd))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(timestep_frequencies(t, self.num_frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    """Labels (B,) -> (B, D). The last row, `num_classes`, means 'no label'; it exists where labels are dropped.

    Args:
        num_classes: Classes.
        dim: Channels D.
        drop_rate: Probability with which training replaces a label by 'no label'.
    """

    def __init__(self, num_classes: int, dim: int, drop_rate: float, device=None, dtype=None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.embedding_table = nn.Embedding(num_classes + (drop_rate > 0.), dim, device=device, dtype=dtype)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if self.training and self.drop_rate > 0.:
            y = drop_labels(y, self.num_classes, self.drop_rate)
        return self.embedding_table(y)


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention. The token grid is not needed; it is taken so that attentions can be exchanged."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, grid_size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        batch_size, num_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch_size, num_tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B, N, 3, heads, d -> 3 of B, heads, N, d
        if self.training and x.device.type == 'cpu' and num_tokens <= 256:
            # On a CPU the gradient of the fused kernel takes half of a training step in bfloat16; this one step of
            # dit_small28 in 0.35 s instead of 0.50 s (64 pictures, one core).
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # B, heads, N, d -> B, N, D


class Mlp(nn.Module):
    """Two linears with a tanh-approximated GELU between them; as many channels out as in, by default."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: Optional[int] = None, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU(approximate='tanh')
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def adaptive(dim: int, num_vectors: int, **dd: Any) -> nn.Sequential:
    """Condition (B, D) -> the shifts, scales and gates that it asks for, (B, num_vectors * D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, num_vectors * dim, **dd))


class Block(nn.Module):
    """Transformer block with adaLN-Zero (section 3.2 of the paper)."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float,
            attn_layer: Callable[..., nn.Module],
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.attn = attn_layer(dim, num_heads, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.adaln = adaptive(dim, 6, **dd)

    def forward(
            self, x: torch.Tensor, c: torch.Tensor, grid_size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        """Tokens x (B, N, D) under the condition c (B, D); `grid_size` (rows, columns) with N = rows * columns."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), grid_size)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Tokens (B, N, D) and condition (B, D) -> the pixels of every patch, (B, N, p * p * C_out), channel fastest."""

    def __init__(self, dim: int, patch_size: int, out_chans: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_chans, **dd)
        self.adaln = adaptive(dim, 2, **dd)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaln(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiffusionTransformer(nn.Module):
    """DiT, a class-conditional denoiser.

    Input: noisy latents or pixels x, float (B, in_chans, H, W); timesteps t, (B,) in 0 .. 999; labels y, int64 (B,)
    in 0 .. num_classes, of which the last means 'no label'.
    Output: (B, 2 * in_chans, H, W) with `learn_sigma`: the predicted noise, then the raw variance channels (nominally
    in [-1, 1], nothing squashes them); else the noise alone.

    Args:
        img_size: Height and width of x (latents, not pixels of the decoded picture), or one number for both.
        in_chans: Channels of x.
        patch_size: Side p of a patch.
        embed_dim: Channels D of a token, divisible by 4 and by `num_heads`.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP over D.
        num_classes: Classes; 0 makes a model without labels.
        class_drop_rate: Probability with which training drops a label. 0 leaves out the 'no label' row, too.
        learn_sigma: Predict the variance channels, too.
        label_init_std: Standard deviation of the initial label table.
        dynamic_img_size: Accept any H and W divisible by p. Otherwise they must be `img_size`.
        attn_layer: Makes a block's attention from (dim, num_heads, device=, dtype=); called with (x, grid_size).
        block_layer: Makes a block from (dim, num_heads, mlp_ratio, attn_layer, device=, dtype=).
        final_layer: Makes the last layer from (dim, patch_size, out_chans, device=, dtype=).

    Raises:
        ValueError: If sizes do not fit each other (here), or an input has another shape or range (forward).
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 32,
            in_chans: int = 4,
            patch_size: int = 2,
            embed_dim: int = 1152,
            depth: int = 28,
            num_heads: int = 16,
            mlp_ratio: float = 4.,
            num_classes: int = 1000,
            class_drop_rate: float = 0.1,
            learn_sigma: bool = True,
            label_init_std: float = 0.02,
            dynamic_img_size: bool = False,
            attn_layer: Callable[..., nn.Module] = SoftmaxAttention,
            block_layer: Callable[..., nn.Module] = Block,
            final_layer: Callable[..., nn.Module] = FinalLayer,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f'embed_dim {embed_dim} is not divisible by num_heads {num_heads}')
        if not 0. <= class_drop_rate <= 1.:
            raise ValueError(f'class_drop_rate must be between 0 and 1, got {class_drop_rate}')
        self.img_size = to_2tuple(img_size)
        self.in_chans = in_chans
        self.out_chans = 2 * in_chans if learn_sigma else in_chans
        self.patch_size = patch_size
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_classes = num_classes
        self.class_drop_rate = class_drop_rate
        self.label_init_std = label_init_std
        self.learn_sigma = learn_sigma
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.grid_size = self.grid_of(*self.img_size)

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, **dd)
        # A buffer: official checkpoints store the table, and what they store is used.
        steps = self.position_steps(self.grid_size)
        self.register_buffer('pos_embed', position_table(*self.grid_size, embed_dim, device, *steps).to(dtype))
        self.time_embed = TimestepEmbed(embed_dim, **dd)
        self.label_embed = LabelEmbed(num_classes, embed_dim, class_drop_rate, **dd) if num_classes > 0 else None
        self.blocks = nn.ModuleList([
            block_layer(embed_dim, num_heads, mlp_ratio, attn_layer, **dd) for _ in range(depth)])
        self.final = final_layer(embed_dim, patch_size, self.out_chans, **dd)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f'blocks.{i}') for i in range(depth)]
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as the linear that it is
        nn.init.zeros_(self.patch_embed.proj.bias)
        for i in (0, 2):
            nn.init.normal_(self.time_embed.mlp[i].weight, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.embedding_table.weight, std=self.label_init_std)
        nn.init.zeros_(self.final.linear.weight)
        for module in self.modules():
            if isinstance(module, (Block, FinalLayer)):
                nn.init.zeros_(module.adaln[1].weight)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set() if self.label_embed is None else {'label_embed.embedding_table.weight'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^(?:patch|time|label)_embed', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> Optional[nn.Module]:
        return self.label_embed

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the label table by a new one (none for 0 classes)."""
        weight = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.label_embed = None
        if num_classes > 0:
            self.label_embed = LabelEmbed(
                num_classes, self.embed_dim, self.class_drop_rate, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(self.label_embed.embedding_table.weight, std=self.label_init_std)
            self.label_embed.train(self.training)

    def example_inputs(
            self, batch_size: int = 1, device: Optional[Union[str, torch.device]] = None,
    ) -> Tuple[torch.Tensor, ...]:
        """Arguments that `forward` takes, on the model's device by default: noise, timestep 500, class 0 if any."""
        device = self.pos_embed.device if device is None else device
        x = torch.randn(batch_size, self.in_chans, *self.img_size, device=device)
        t = torch.full((batch_size,), 500, device=device)
        y = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return (x, t) if self.label_embed is None else (x, t, y)

    def grid_of(self, height: int, width: int) -> Tuple[int, int]:
        """Rows and columns of tokens of an input.

        Raises:
            ValueError: If a side is not divisible by the patch.
        """
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f'height and width must be positive and divisible by the patch size {self.patch_size}, '
                f'got {height}x{width}')
        return height // self.patch_size, width // self.patch_size

    def check_input(self, x: torch.Tensor) -> Tuple[int, int]:
        """The token grid of x, or ValueError."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f'expected (B, {self.in_chans}, H, W) latents, got {list(x.shape)}')
        grid_size = self.grid_of(x.shape[2], x.shape[3])
        if grid_size != self.grid_size and not self.dynamic_img_size:
            raise ValueError(
                f'the model was built for {self.img_size[0]}x{self.img_size[1]}, got {x.shape[2]}x{x.shape[3]}: '
                'build it with that img_size or with dynamic_img_size=True')
        return grid_size

    def condition(
            self,
            t: Optional[Union[int, float, torch.Tensor]],
            y: Optional[torch.Tensor],
            batch_size: int,
    ) -> torch.Tensor:
        """What the model knows of each picture: its timestep and its label.

        Args:
            t: Timesteps (B,), or one for all, which is then embedded once.
            y: Labels, int64 (B,); None for a model without.
            batch_size: B.

        Returns:
            (B, D).

        Raises:
            ValueError: If t or y is missing, has another shape, or a label is out of range.
        """
        if t is None or (y is None and self.label_embed is not None):
            raise ValueError(
                f'{type(self).__name__} needs timesteps t and {"labels y" if self.label_embed else "no labels"} '
                f'beside x: call model(x, t{", y" if self.label_embed else ""})')
        if not torch.is_tensor(t) or t.ndim == 0:
            t = torch.as_tensor(t, device=self.pos_embed.device).reshape(1)
        elif t.shape != (batch_size,):
            raise ValueError(f't must be one timestep or ({batch_size},), got {list(t.shape)}')
        c = self.time_embed(t)
        if self.label_embed is None:
            if y is not None:
                raise ValueError('this model has no classes, but labels y were given')
            return c.expand(batch_size, -1)
        if y.shape != (batch_size,):
            raise ValueError(f'y must have the shape ({batch_size},), got {list(y.shape)}')
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f'y must hold whole numbers (int64), got {y.dtype}')
        # The values can only be looked at where there are any: neither while compiling nor on the meta device.
        if not torch.compiler.is_compiling() and not y.is_meta and batch_size > 0:
            low, high = (int(value) for value in torch.aminmax(y))
            last = self.label_embed.embedding_table.num_embeddings - 1
            if low < 0 or high > last:
                raise ValueError(f'labels y must lie in 0..{last}, got {low if low < 0 else high}')
        return c + self.label_embed(y)

    def position_steps(self, grid_size: Tuple[int, int]) -> Tuple[float, float]:
        """Distance of neighbouring rows and columns: a larger grid goes on counting, nothing is rescaled."""
        return 1., 1.

    def embed(self, x: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
        """(B, C, H, W) -> tokens with their positions, (B, N, D)."""
        if grid_size == self.grid_size:
            table = self.pos_embed
        else:
            # what tracing makes must not stay in the cache
            make = position_table if torch.compiler.is_compiling() else cached_position_table
            table = make(*grid_size, self.embed_dim, x.device, *self.position_steps(grid_size))
        return self.patch_embed(x) + table.to(self.pos_embed.dtype)

    def run_block(
            self, block: nn.Module, x: torch.Tensor, c: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, x, c, grid_size)
        return block(x, c, grid_size)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            t: Optional[Union[int, float, torch.Tensor]] = None,
            y: Optional[torch.Tensor] = None,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that also returns the tokens after chosen blocks.

        Args:
            x, t, y: As for `forward`.
            indices: Take the last n blocks if int, all if None, else these.
            norm: Apply the final layer's norm (without shift and scale) to the intermediates.
            stop_early: Stop after the last chosen block.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Return the list alone.

        Returns:
            The last tokens (B, N, D) and the chosen intermediates, each (B, D, H / p, W / p) or (B, N, D); or the
            latter alone.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        grid_size = self.check_input(x)
        c = self.condition(t, y, x.shape[0])
        x = self.embed(x, grid_size)
        intermediates = []
        for i, block in enumerate(self.blocks[:max_index + 1] if stop_early else self.blocks):
            x = self.run_block(block, x, c, grid_size)
            if i in take_indices:
                feature = self.final.norm(x) if norm else x
                if output_fmt == 'NCHW':
                    feature = feature.transpose(1, 2).unflatten(2, grid_size)  # B, N, D -> B, D, H / p, W / p
                intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def forward_features(
            self,
            x: torch.Tensor,
            t: Optional[Union[int, float, torch.Tensor]] = None,
            y: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """x (B, C, H, W), t (B,), y (B,) -> the tokens before the final layer, (B, N, D)."""
        grid_size = self.check_input(x)
        return self.forward_blocks(x, self.condition(t, y, x.shape[0]), grid_size)

    def forward_blocks(self, x: torch.Tensor, c: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
        x = self.embed(x, grid_size)
        for block in self.blocks:
            x = self.run_block(block, x, c, grid_size)
        return x

    def forward_head(
            self, x: torch.Tensor, c: torch.Tensor, grid_size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        """Tokens (B, N, D) and their `condition` (B, D) -> (B, C_out, H, W); the grid, if not that of `img_size`."""
        rows, cols = grid_size or self.grid_size
        if x.shape[1] != rows * cols:
            raise ValueError(f'token grid needed: {x.shape[1]} tokens are not {rows}x{cols}')
        x = self.final(x, c)
        x = x.reshape(-1, rows, cols, self.patch_size, self.patch_size, self.out_chans)
        # B, rows, cols, y in patch, x in patch, C -> B, C, rows, y, cols, x
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_chans, rows * self.patch_size, cols * self.patch_size)

    def forward(
            self,
            x: torch.Tensor,
            t: Optional[Union[int, float, torch.Tensor]] = None,
            y: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Predict the noise in x (and its variance), see the class.

        Args:
            x: Noisy latents or pixels, float (B, C, H, W).
            t: Timesteps (B,), whole or not; or one for all.
            y: Labels, int64 (B,).

        Returns:
            (B, C_out, H, W).
        """
        grid_size = self.check_input(x)
        c = self.condition(t, y, x.shape[0])
        return self.forward_head(self.forward_blocks(x, c, grid_size), c, grid_size)

    def forward_with_cfg(
            self,
            x: torch.Tensor,
            t: Union[int, float, torch.Tensor],
            y: torch.Tensor,
            cfg_scale: float,
            guide_channels: Optional[int] = None,
    ) -> torch.Tensor:
        """Classifier-free guidance of a doubled batch: unconditional + scale * (conditional - unconditional).

        The official code guides three channels, although latents have four (a known slip, DiT issue 41). The default
        keeps that, so that published figures can be reproduced; all other channels stay what each half predicts.

        Args:
            x: (2B, C, H, W), of which only the first half is read: both halves must see the same noise.
            t: Timesteps (2B,), or one for all.
            y: Labels (2B,): the wanted ones, then as many 'no label'.
            cfg_scale: Scale; 1 is no guidance.
            guide_channels: Noise channels to guide, from the first; None is the official min(3, C).

        Returns:
            (2B, C_out, H, W); the guided channels of both halves are equal.

        Raises:
            ValueError: If the batch is odd or guide_channels is not in 1 .. C.
        """
        if x.shape[0] % 2:
            raise ValueError(f'guidance needs a doubled batch (wanted labels, then no label), got {x.shape[0]}')
        if guide_channels is None:
            guide_channels = min(3, self.in_chans)
        if not 1 <= guide_channels <= self.in_chans:
            raise ValueError(f'guide_channels must lie in 1..{self.in_chans}, got {guide_channels}')
        half = x[:x.shape[0] // 2]
        output = self(torch.cat([half, half]), t, y)
        conditional, unconditional = output[:, :guide_channels].chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), output[:, guide_channels:]], dim=1)


# official prefix -> ours
_NAMES = {
    'x_embedder.': 'patch_embed.',
    't_embedder.': 'time_embed.',
    'y_embedder.': 'label_embed.',
    'final_layer.linear.': 'final.linear.',
    'final_layer.adaLN_modulation.': 'final.adaln.',
}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename an official checkpoint's entries to ours; a state dict of ours keeps its names.

    The position table of another grid is replaced by the model's own.

    Args:
        state_dict: Official or own state dict, bare or under 'ema' (taken first) or 'model', with or without the
            prefix 'module.' (distributed training).
        model: The model to load it into.
    """
    for key in ('ema', 'model', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    out = {}
    for name, value in state_dict.items():
        name = name[len('module.'):] if name.startswith('module.') else name
        for old, new in _NAMES.items():
            if name.startswith(old):
                name = new + name[len(old):]
        if name.startswith('blocks.'):
            name = name.replace('.adaLN_modulation.', '.adaln.')
        out[name] = value
    if 'pos_embed' in out and out['pos_embed'].shape != model.pos_embed.shape:
        out['pos_embed'] = model.pos_embed
    return out


def build_diffusion_model(model_cls: Type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """`build_model` for denoisers, which have no features of a picture alone."""
    if kwargs.pop('features_only', False):
        raise ValueError(
            f"features_only is not possible for '{variant}': it needs timesteps t and labels y beside the picture; "
            'use model.forward_intermediates(x, t, y)')
    return build_model(model_cls, variant, pretrained, **{'pretrained_filter_fn': checkpoint_filter_fn, **kwargs})


def _create_dit(variant: str, pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    return build_diffusion_model(DiffusionTransformer, variant, pretrained, default_cfgs=default_cfgs, **kwargs)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    # mean and std are of the pixels, before a VAE makes latents of them
    return {
        'num_classes': 1000, 'input_size': (4, 32, 32), 'fixed_input_size': True, 'pool_size': None,
        'crop_pct': 1.0, 'interpolation': 'bicubic', 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj', 'classifier': 'label_embed.embedding_table',
        'license': 'cc-by-nc-4.0', 'paper_ids': 'arXiv:2212.09748',
        'paper_name': 'Scalable Diffusion Models with Transformers',
        'origin_url': 'https://github.com/facebookresearch/DiT',
        **kwargs,
    }


_LATENT_64 = dict(input_size=(4, 64, 64))
SMALL28 = dict(num_classes=10, input_size=(1, 28, 28), mean=(0.5,), std=(0.5,), license='apache-2.0')
FASHION_MNIST = dict(SMALL28, label_names=(
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'))

# Official weights are not for commercial use and are never downloaded.
default_cfgs = generate_default_cfgs({
    'dit_s_2': _cfg(),
    'dit_s_4': _cfg(),
    'dit_s_8': _cfg(),
    'dit_b_2': _cfg(),
    'dit_b_4': _cfg(),
    'dit_b_8': _cfg(),
    'dit_l_2': _cfg(),
    'dit_l_4': _cfg(),
    'dit_l_8': _cfg(),
    'dit_xl_2': _cfg(),
    'dit_xl_4': _cfg(),
    'dit_xl_8': _cfg(),
    'dit_s_2_512': _cfg(**_LATENT_64),
    'dit_b_2_512': _cfg(**_LATENT_64),
    'dit_l_2_512': _cfg(**_LATENT_64),
    'dit_xl_2_512': _cfg(**_LATENT_64),
    'dit_small28': _cfg(**SMALL28),
    'dit_small28.fashion_mnist': _cfg(hf_hub_id='vishub/dit_small28.fashion_mnist', **FASHION_MNIST),
})

_S = dict(embed_dim=384, depth=12, num_heads=6)
_B = dict(embed_dim=768, depth=12, num_heads=12)
_L = dict(embed_dim=1024, depth=24, num_heads=16)
_XL = dict(embed_dim=1152, depth=28, num_heads=16)


@register_model
def dit_s_2(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_S, patch_size=2)
    return _create_dit('dit_s_2', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_s_4(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_S, patch_size=4)
    return _create_dit('dit_s_4', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_s_8(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_S, patch_size=8)
    return _create_dit('dit_s_8', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_b_2(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_B, patch_size=2)
    return _create_dit('dit_b_2', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_b_4(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_B, patch_size=4)
    return _create_dit('dit_b_4', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_b_8(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_B, patch_size=8)
    return _create_dit('dit_b_8', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_l_2(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_L, patch_size=2)
    return _create_dit('dit_l_2', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_l_4(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_L, patch_size=4)
    return _create_dit('dit_l_4', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_l_8(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_L, patch_size=8)
    return _create_dit('dit_l_8', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_xl_2(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_XL, patch_size=2)
    return _create_dit('dit_xl_2', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_xl_4(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_XL, patch_size=4)
    return _create_dit('dit_xl_4', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_xl_8(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_XL, patch_size=8)
    return _create_dit('dit_xl_8', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_s_2_512(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_S, img_size=64)
    return _create_dit('dit_s_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_b_2_512(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_B, img_size=64)
    return _create_dit('dit_b_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_l_2_512(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_L, img_size=64)
    return _create_dit('dit_l_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_xl_2_512(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    model_args = dict(_XL, img_size=64)
    return _create_dit('dit_xl_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def dit_small28(pretrained: bool = False, **kwargs: Any) -> DiffusionTransformer:
    """In pixel space, for grey 28-pixel pictures in [-1, 1]: 49 tokens of width 128."""
    # channels and classes come from the configuration, so that weights of other data can have others
    model_args = dict(img_size=28, patch_size=4, embed_dim=128, depth=6, num_heads=4, label_init_std=1.)
    return _create_dit('dit_small28', pretrained, **dict(model_args, **kwargs))
