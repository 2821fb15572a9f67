"""LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation

Paper: `LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation`
    - https://arxiv.org/abs/2501.12976 (ICCV 2025)

@inproceedings{wang2025lit,
  title={LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation},
  author={Wang, Jiahao and others},
  booktitle={ICCV},
  year={2025}
}

Official code: https://github.com/techmonsterwang/LiT. It could not be obtained, and no weights were seen: the attention
was written from a description of the paper's and is checked against a published listing of it. The number of heads is
reported for S/2 (2) and XL/2 (4), and our choice for B/2 (3) and L/2 (4).

DiT with another attention, and nothing else: softmax gives way to ReLU, so that the keys and values of all tokens fold
into one d x d matrix a head, and the cost grows linearly with the tokens. Few heads make that matrix large; a depthwise
convolution over the values brings back what such smooth attention loses, the look at one's neighbours.
"""
import contextlib
import functools
import math
from typing import Any, Callable, ContextManager, Dict, Mapping, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vishub.models.dit import (
    FASHION_MNIST,
    SMALL28,
    DiffusionTransformer,
    Mlp,
    build_diffusion_model,
    checkpoint_filter_fn,
    modulate,
)

__all__ = [
    'LinearAttention', 'LinearDiffusionTransformer', 'TextToImageTransformer', 'checkpoint_filter_fn',
    'inherit_from_dit', 'inherit_from_pixart', 'text_checkpoint_filter_fn',
]


def no_autocast(x: torch.Tensor) -> ContextManager:
    """Context in which products with x keep their precision; the meta device has no autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def relu_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Average of the values, weighted by the products of ReLU(q) + eps and ReLU(k) + eps; all of (B, heads, N, d).

    In float32 whatever comes in and whatever autocast says: sums over thousands of tokens overflow float16 and lose
    most of their digits in bfloat16.

    Returns:
        float32 (B, heads, N, d) (float64 where q is).
    """
    num_tokens, head_dim = q.shape[-2:]
    with no_autocast(q):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q = F.relu(q.to(dtype)) + eps
        k = (F.relu(k.to(dtype)) + eps) / num_tokens
        v = v.to(dtype)
        if num_tokens < head_dim:  # (q k^T) v is the cheaper order
            weights = q @ k.transpose(-2, -1)  # B, heads, N, N
            return (weights @ v) / (weights.sum(-1, keepdim=True) + eps)
        summary = k.transpose(-2, -1) @ v  # B, heads, d, d
        total = q @ k.sum(-2).unsqueeze(-1)  # B, heads, N, 1
        return (q @ summary) / (total + eps)


class LinearAttention(nn.Module):
    """ReLU linear attention with few heads, plus a depthwise convolution over the values.

    Args:
        dim: Channels D, divisible by `num_heads`.
        num_heads: Heads; d = D / num_heads channels each, consecutive.
        kernel_size: Side of the convolution, odd. One set of d filters serves all heads.

    Raises:
        ValueError: If the heads do not divide the channels or the kernel is even.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 5, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'dim {dim} is not divisible by num_heads {num_heads}')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, grid_size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        """Attend within x (B, N, D), the tokens of a grid of (rows, columns); by default a square one.

        Raises:
            ValueError: If N is not rows * columns.
        """
        num_tokens = x.shape[1]
        rows, cols = grid_size or (math.isqrt(num_tokens), math.isqrt(num_tokens))
        if rows * cols != num_tokens:
            raise ValueError(f'token grid needed: {num_tokens} tokens are not {rows}x{cols}')
        k, v = self.kv(x).chunk(2, dim=-1)
        # B, N, D -> B, heads, N, d
        heads = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), k, v))
        attended = relu_linear_attention(*heads).transpose(1, 2).flatten(2)  # -> B, N, D

        # All heads side by side, each with the same filters: tokens are a channels-last map, so nothing is permuted.
        v = v.transpose(1, 2).unflatten(2, (rows, cols))  # B, N, D -> B, D, rows, cols
        # In float32, as its sum with `attended`: on a CPU the gradient in bfloat16 takes up to 2.6 times as long.
        with no_autocast(x):
            local = F.conv2d(
                v.to(attended.dtype),
                self.dwc.weight.to(attended.dtype).repeat(self.num_heads, 1, 1, 1),
                self.dwc.bias.to(attended.dtype).repeat(self.num_heads),
                padding=self.dwc.padding,
                groups=v.shape[1],
            )
        return self.proj((attended + local.flatten(2).transpose(1, 2)).to(x.dtype))


class LinearDiffusionTransformer(DiffusionTransformer):
    """LiT: see `DiffusionTransformer` for inputs, outputs and the other arguments.

    Args:
        kernel_size: Side of the depthwise convolution over the values, odd.
    """

    def __init__(self, num_heads: int = 4, kernel_size: int = 5, **kwargs: Any) -> None:
        super().__init__(
            num_heads=num_heads, attn_layer=functools.partial(LinearAttention, kernel_size=kernel_size), **kwargs)


def inherit_from_dit(lit: LinearDiffusionTransformer, dit_state: Mapping[str, Any]) -> None:
    """Load all of a trained DiT but its attention into a LiT of the same size (section 3.3 of the paper), in place.

    The position table is taken only where the grids agree.

    Args:
        lit: The student.
        dit_state: State dict of the teacher, official or ours; see `checkpoint_filter_fn`.

    Raises:
        ValueError: If anything but the student's attention would be left as it was, or something fits nowhere.
    """
    state_dict = checkpoint_filter_fn(dict(dit_state), lit)
    _load_all_but(lit, {name: value for name, value in state_dict.items() if '.attn.' not in name}, ('.attn.',))


def _load_all_but(lit: nn.Module, state_dict: Mapping[str, torch.Tensor], own_alone: Tuple[str, ...]) -> None:
    """Load a teacher's entries; the student's whose names contain one of `own_alone` must be all that it lacks."""
    own = lit.state_dict()
    missing = [
        name for name in own if name not in state_dict and not any(part in name for part in own_alone)]
    unexpected = [name for name in state_dict if name not in own]
    unequal = [name for name in state_dict if name in own and state_dict[name].shape != own[name].shape]
    for what, names in (('lacks', missing), ('has no place for', unexpected), ('has another shape of', unequal)):
        if names:
            raise ValueError(f'the teacher does not fit this LiT: it {what} {names[0]} ({len(names)} entries in all)')
    lit.load_state_dict(state_dict, strict=False)


class CrossAttention(nn.Module):
    """Attention of picture tokens to the tokens of a caption."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim, **dd)
        self.kv_linear = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, captions: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """x (B, N, D), captions (B, L, D); mask bool (B, L) is False where the caption is padding -> (B, N, D)."""
        heads = (
            y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # B, N or L, D -> B, heads, N or L, d
            for y in (self.q_linear(x), *self.kv_linear(captions).chunk(2, dim=-1)))
        x = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask[:, None, None])
        return self.proj(x.transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """Block of PixArt: shifts, scales and gates are a table of its own plus what all blocks share (adaLN-single)."""

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
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim, **dd))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.attn = attn_layer(dim, num_heads, **dd)
        self.cross_attn = CrossAttention(dim, num_heads, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(
            self,
            x: torch.Tensor,
            c: 'TextCondition',
            grid_size: Optional[Tuple[int, int]] = None,
    ) -> torch.Tensor:
        """Tokens x (B, N, D) under the condition c."""
        table = self.scale_shift_table + c.shared  # B, 6, D
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), grid_size)
        x = x + self.cross_attn(x, c.captions, c.mask)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class TextFinalLayer(nn.Module):
    """As `dit.FinalLayer`, its shift and scale a table plus the embedded timestep."""

    def __init__(self, dim: int, patch_size: int, out_chans: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False, **dd)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_chans, **dd)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim, **dd))

    def forward(self, x: torch.Tensor, c: 'TextCondition') -> torch.Tensor:
        shift, scale = (self.scale_shift_table + c.timestep[:, None]).unbind(1)
        return self.linear(modulate(self.norm(x), shift, scale))


class TextCondition(NamedTuple):
    """What the text model knows of each picture.

    Attributes:
        timestep: (B, D).
        shared: Shifts, scales and gates that all blocks share, (B, 6, D).
        captions: (B, L, D).
        mask: bool (B, L), False at padding; None if there is none.
    """
    timestep: torch.Tensor
    shared: torch.Tensor
    captions: torch.Tensor
    mask: Optional[torch.Tensor]


class CaptionEmbed(nn.Module):
    """Features of a caption's tokens (B, L, caption_dim) -> (B, L, D); training drops whole captions.

    `y_embedding` (max_tokens, caption_dim) are the features of no caption. They are not trained.
    """

    def __init__(
            self, caption_dim: int, dim: int, max_tokens: int, drop_rate: float, device=None, dtype=None) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.y_proj = Mlp(caption_dim, dim, dim, device=device, dtype=dtype)
        empty = torch.randn(max_tokens, caption_dim, device=device, dtype=dtype) / caption_dim ** 0.5
        self.register_buffer('y_embedding', empty)

    def forward(self, captions: torch.Tensor) -> torch.Tensor:
        if self.training and self.drop_rate > 0.:
            drop = torch.rand(len(captions), 1, 1, device=captions.device) < self.drop_rate
            captions = torch.where(drop, self.y_embedding[:captions.shape[1]].to(captions.dtype), captions)
        return self.y_proj(captions)


class TextToImageTransformer(DiffusionTransformer):
    """LiT on the layout of PixArt-Sigma (arXiv:2403.04692): a denoiser that is told what to make by a text.

    Written from a description of PixArt-Sigma XL/2 with linear attention; the number of heads of the published LiT
    is not known, and no trained weights of it were found.

    Input: noisy latents x, float (B, in_chans, H, W); timesteps t, (B,); features of the caption's tokens y,
    (B, L, caption_dim) or (B, 1, L, caption_dim), L at most `max_tokens`; mask (B, L), 0 or False at padding.
    Output: (B, 2 * in_chans, H, W).

    Args:
        img_size, in_chans, patch_size, embed_dim, depth, num_heads, mlp_ratio, learn_sigma, dynamic_img_size: As for
            `DiffusionTransformer`. The heads are those of the cross-attention, too.
        kernel_size: Side of the depthwise convolution over the values, odd.
        caption_dim: Features of a token: 4096 of T5-XXL.
        max_tokens: Longest caption.
        caption_drop_rate: Probability with which training drops a caption.
        position_scale: Positions of any grid run from 0 to `img_size / patch_size / position_scale`: 1 at 512 px and
            2 at 1024 px, so that both see the same range.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 64,
            num_heads: int = 4,
            kernel_size: int = 5,
            caption_dim: int = 4096,
            max_tokens: int = 300,
            caption_drop_rate: float = 0.1,
            position_scale: float = 1.,
            num_classes: int = 0,
            embed_dim: int = 1152,
            device=None,
            dtype=None,
            **kwargs: Any,
    ) -> None:
        if num_classes:
            raise ValueError(f'a model of text has no classes: num_classes must be 0, got {num_classes}')
        dd = {'device': device, 'dtype': dtype}
        self.base_size = to_2tuple(img_size)[0] // kwargs.get('patch_size', 2)
        self.position_scale = position_scale
        self.caption_dim, self.max_tokens = caption_dim, max_tokens
        super().__init__(
            img_size=img_size, embed_dim=embed_dim, num_heads=num_heads, num_classes=0,
            attn_layer=functools.partial(LinearAttention, kernel_size=kernel_size), block_layer=TextBlock,
            final_layer=TextFinalLayer, **dd, **kwargs)
        self.time_block = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 6 * embed_dim, **dd))
        self.caption_embed = CaptionEmbed(caption_dim, embed_dim, max_tokens, caption_drop_rate, **dd)
        for linear in (self.time_block[1], self.caption_embed.y_proj.fc1, self.caption_embed.y_proj.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for block in self.blocks:
            nn.init.normal_(block.scale_shift_table, std=embed_dim ** -0.5)
            nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.normal_(self.final.scale_shift_table, std=embed_dim ** -0.5)

    def reset_classifier(self, num_classes: int) -> None:
        """It has none: anything but 0 classes is refused."""
        if num_classes:
            raise ValueError(f'a model of text has no classes: num_classes must be 0, got {num_classes}')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^(?:patch_embed|time_embed|time_block|caption_embed)', blocks=r'^blocks\.(\d+)')

    def position_steps(self, grid_size: Tuple[int, int]) -> Tuple[float, float]:
        rows, cols = grid_size
        span = self.base_size / self.position_scale
        return span / rows, span / cols

    def example_inputs(
            self, batch_size: int = 1, device: Optional[Union[str, torch.device]] = None,
    ) -> Tuple[torch.Tensor, ...]:
        """Arguments that `forward` takes, on the model's device by default: noise, timestep 500, a full caption."""
        x, t = super().example_inputs(batch_size, device)
        return x, t, torch.randn(batch_size, self.max_tokens, self.caption_dim, device=x.device)

    def text_condition(
            self,
            t: Optional[Union[int, float, torch.Tensor]],
            y: Optional[torch.Tensor],
            mask: Optional[torch.Tensor],
            batch_size: int,
    ) -> TextCondition:
        """As `condition`, of captions.

        Raises:
            ValueError: If t or y is missing, or t, y or mask has another shape.
        """
        if t is None or y is None:
            raise ValueError(
                f'{type(self).__name__} needs timesteps t and caption features y beside x: call model(x, t, y)')
        y = y[:, 0] if y.ndim == 4 and y.shape[1] == 1 else y
        if y.ndim != 3 or y.shape[0] != batch_size or y.shape[2] != self.caption_dim or y.shape[1] > self.max_tokens:
            raise ValueError(
                f'y must have the shape ({batch_size}, at most {self.max_tokens} tokens, {self.caption_dim}), '
                f'got {list(y.shape)}')
        if mask is not None:
            if mask.shape != y.shape[:2]:
                raise ValueError(f'mask must have the shape {list(y.shape[:2])}, got {list(mask.shape)}')
            mask = mask.bool()
        timestep = super().condition(t, None, batch_size)
        shared = self.time_block(timestep).unflatten(1, (6, -1))  # B, 6 D -> B, 6, D
        return TextCondition(timestep, shared, self.caption_embed(y), mask)

    def forward_features(  # type: ignore[override]  # a mask more
            self,
            x: torch.Tensor,
            t: Optional[Union[int, float, torch.Tensor]] = None,
            y: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The tokens before the final layer, (B, N, D)."""
        grid_size = self.check_input(x)
        return self.forward_blocks(x, self.text_condition(t, y, mask, len(x)), grid_size)  # type: ignore[arg-type]

    def condition(self, t: Any, y: Any, batch_size: int) -> Any:
        # `forward_intermediates` asks for it; there, captions have no padding
        return self.text_condition(t, y, None, batch_size)

    def forward(  # type: ignore[override]  # a mask more
            self,
            x: torch.Tensor,
            t: Optional[Union[int, float, torch.Tensor]] = None,
            y: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Predict the noise in x (and its variance), see the class."""
        grid_size = self.check_input(x)
        c: Any = self.text_condition(t, y, mask, len(x))
        return self.forward_head(self.forward_blocks(x, c, grid_size), c, grid_size)

    def forward_with_cfg(  # type: ignore[override]  # a mask more, and all noise channels
            self,
            x: torch.Tensor,
            t: Union[int, float, torch.Tensor],
            y: torch.Tensor,
            cfg_scale: float,
            mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Classifier-free guidance of all noise channels, as PixArt samples.

        Args:
            x: (B, C, H, W).
            t: Timesteps (B,), or one for all.
            y: Caption features (B, L, caption_dim); the features of no caption are run beside them.
            cfg_scale: Scale; 1 is no guidance.
            mask: (B, L); holds for 'no caption', too.

        Returns:
            (B, C_out, H, W); the variance is that of the caption.
        """
        y = y[:, 0] if y.ndim == 4 else y
        nothing = self.caption_embed.y_embedding[:y.shape[1]].to(y.dtype).expand_as(y)
        t = torch.cat([t, t]) if torch.is_tensor(t) and t.ndim else t
        output = self(
            torch.cat([x, x]), t, torch.cat([y, nothing]), None if mask is None else torch.cat([mask, mask]))
        conditional, unconditional = output.chunk(2)
        channels = self.in_chans
        guided = unconditional[:, :channels] + cfg_scale * (conditional - unconditional)[:, :channels]
        return torch.cat([guided, conditional[:, channels:]], dim=1)


_TEXT_NAMES = {
    'x_embedder.': 'patch_embed.',
    't_embedder.': 'time_embed.',
    't_block.': 'time_block.',
    'y_embedder.': 'caption_embed.',
    'final_layer.': 'final.',
}


def text_checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename the entries of a PixArt-Sigma checkpoint (its own names, not diffusers') to ours.

    The position table is the model's own: it follows from the sizes, and not all checkpoints have it.
    """
    for key in ('state_dict_ema', 'state_dict'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    out = {}
    for name, value in state_dict.items():
        for old, new in _TEXT_NAMES.items():
            if name.startswith(old):
                name = new + name[len(old):]
        out[name] = value
    out['pos_embed'] = model.pos_embed
    return out


def inherit_from_pixart(lit: TextToImageTransformer, state_dict: Mapping[str, Any]) -> None:
    """Load all of a trained PixArt-Sigma but the queries, keys and values of its self-attention, in place.

    The published LiT inherits the attention's output projection here, unlike the class-conditional one.

    Raises:
        ValueError: If anything but q, kv and dwc would be left as it was, or something fits nowhere.
    """
    renamed = text_checkpoint_filter_fn(dict(state_dict), lit)
    own_alone = tuple(f'.attn.{part}.' for part in ('q', 'kv', 'dwc'))
    _load_all_but(lit, {name: value for name, value in renamed.items() if '.attn.qkv.' not in name}, own_alone)


def _create_lit(variant: str, pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    return build_diffusion_model(LinearDiffusionTransformer, variant, pretrained, default_cfgs=default_cfgs, **kwargs)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (4, 32, 32), 'fixed_input_size': True, 'pool_size': None,
        'crop_pct': 1.0, 'interpolation': 'bicubic', 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj', 'classifier': 'label_embed.embedding_table',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2501.12976',
        'paper_name': 'LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation',
        'origin_url': 'https://github.com/techmonsterwang/LiT',
        **kwargs,
    }


_LATENT_64 = dict(input_size=(4, 64, 64))

# No official weights were seen. The tag is trained by this project.
default_cfgs = generate_default_cfgs({
    'lit_s_2': _cfg(),
    'lit_b_2': _cfg(),
    'lit_l_2': _cfg(),
    'lit_xl_2': _cfg(),
    'lit_s_2_512': _cfg(**_LATENT_64),
    'lit_b_2_512': _cfg(**_LATENT_64),
    'lit_l_2_512': _cfg(**_LATENT_64),
    'lit_xl_2_512': _cfg(**_LATENT_64),
    'lit_small28': _cfg(**SMALL28),
    'lit_small28.fashion_mnist': _cfg(hf_hub_id='vishub/lit_small28.fashion_mnist', **FASHION_MNIST),
    'lit_t2i_xl_2_512': _cfg(num_classes=0, classifier=None, **_LATENT_64),
    'lit_t2i_xl_2_1024': _cfg(num_classes=0, classifier=None, input_size=(4, 128, 128)),
})

_S = dict(embed_dim=384, depth=12, num_heads=2)
_B = dict(embed_dim=768, depth=12, num_heads=3)
_L = dict(embed_dim=1024, depth=24, num_heads=4)
_XL = dict(embed_dim=1152, depth=28, num_heads=4)


def _create_lit_t2i(variant: str, pretrained: bool = False, **kwargs: Any) -> TextToImageTransformer:
    return build_diffusion_model(
        TextToImageTransformer, variant, pretrained, default_cfgs=default_cfgs,
        pretrained_filter_fn=text_checkpoint_filter_fn, **kwargs)


@register_model
def lit_s_2(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    return _create_lit('lit_s_2', pretrained, **dict(_S, **kwargs))


@register_model
def lit_b_2(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    return _create_lit('lit_b_2', pretrained, **dict(_B, **kwargs))


@register_model
def lit_l_2(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    return _create_lit('lit_l_2', pretrained, **dict(_L, **kwargs))


@register_model
def lit_xl_2(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    return _create_lit('lit_xl_2', pretrained, **dict(_XL, **kwargs))


@register_model
def lit_s_2_512(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    model_args = dict(_S, img_size=64)
    return _create_lit('lit_s_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def lit_b_2_512(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    model_args = dict(_B, img_size=64)
    return _create_lit('lit_b_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def lit_l_2_512(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    model_args = dict(_L, img_size=64)
    return _create_lit('lit_l_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def lit_xl_2_512(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    model_args = dict(_XL, img_size=64)
    return _create_lit('lit_xl_2_512', pretrained, **dict(model_args, **kwargs))


@register_model
def lit_small28(pretrained: bool = False, **kwargs: Any) -> LinearDiffusionTransformer:
    """In pixel space, for grey 28-pixel pictures in [-1, 1]: 49 tokens of width 128."""
    # channels and classes come from the configuration, so that weights of other data can have others
    model_args = dict(img_size=28, patch_size=4, embed_dim=128, depth=6, num_heads=1, label_init_std=1.)
    return _create_lit('lit_small28', pretrained, **dict(model_args, **kwargs))


@register_model
def lit_t2i_xl_2_512(pretrained: bool = False, **kwargs: Any) -> TextToImageTransformer:
    """Told by a text, for latents of 512-pixel pictures."""
    return _create_lit_t2i('lit_t2i_xl_2_512', pretrained, **dict(dict(_XL, img_size=64), **kwargs))


@register_model
def lit_t2i_xl_2_1024(pretrained: bool = False, **kwargs: Any) -> TextToImageTransformer:
    """Told by a text, for latents of 1024-pixel pictures."""
    model_args = dict(_XL, img_size=128, position_scale=2.)
    return _create_lit_t2i('lit_t2i_xl_2_1024', pretrained, **dict(model_args, **kwargs))
