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
from typing import Any, ContextManager, Dict, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vishub.models.dit import DiffusionTransformer, build_diffusion_model, checkpoint_filter_fn

__all__ = ['LinearAttention', 'LinearDiffusionTransformer', 'checkpoint_filter_fn', 'inherit_from_dit']


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
    state_dict = {name: value for name, value in state_dict.items() if '.attn.' not in name}
    own = lit.state_dict()
    missing = [name for name in own if '.attn.' not in name and name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    unequal = [name for name in state_dict if name in own and state_dict[name].shape != own[name].shape]
    for what, names in (('lacks', missing), ('has no place for', unexpected), ('has another shape of', unequal)):
        if names:
            raise ValueError(f'the DiT does not fit this LiT: it {what} {names[0]} ({len(names)} entries in all)')
    lit.load_state_dict(state_dict, strict=False)


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

# No official weights were seen.
default_cfgs = generate_default_cfgs({
    'lit_s_2': _cfg(),
    'lit_b_2': _cfg(),
    'lit_l_2': _cfg(),
    'lit_xl_2': _cfg(),
    'lit_s_2_512': _cfg(**_LATENT_64),
    'lit_b_2_512': _cfg(**_LATENT_64),
    'lit_l_2_512': _cfg(**_LATENT_64),
    'lit_xl_2_512': _cfg(**_LATENT_64),
    'lit_small28': _cfg(num_classes=10, input_size=(1, 28, 28), mean=(0.5,), std=(0.5,)),
})

_S = dict(embed_dim=384, depth=12, num_heads=2)
_B = dict(embed_dim=768, depth=12, num_heads=3)
_L = dict(embed_dim=1024, depth=24, num_heads=4)
_XL = dict(embed_dim=1152, depth=28, num_heads=4)


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
    model_args = dict(
        img_size=28, in_chans=1, patch_size=4, embed_dim=128, depth=6, num_heads=1, num_classes=10, label_init_std=1.)
    return _create_lit('lit_small28', pretrained, **dict(model_args, **kwargs))
