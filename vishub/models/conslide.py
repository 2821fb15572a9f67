"""ConSlide's HIT: a hierarchical interaction transformer over the regions and patches of a whole slide.

Paper: `ConSlide: Asynchronous Hierarchical Interaction Transformer with Breakup-Reorganize Rehearsal for Continual
Whole Slide Image Analysis` - https://arxiv.org/abs/2308.13324 (ICCV 2023)

Official code: https://github.com/HKU-MedAI/ConSlide. That repository carries no licence, so nothing is taken from it:
this file was written from a description of the architecture, and reproduces outputs and gradients of the official
class `HIT` on converted state dicts. Licence of this file: Apache-2.0. The official class builds 41.4 M parameters
(8 classes), of which its forward uses 10.0 M; only those exist here.

The input is not an image but precomputed features of one slide: N regions, each a grid of patch embeddings and one
embedding at a coarser scale. There is no position encoding: the order of the regions does not matter.

In every block a patch branch attends within each region, and a region branch attends among the regions and a class
token. The patches of a region are pooled to one token, which is averaged into the region's token *without gradient*:
the class loss trains the class token, the region branch and the head; the patch branch learns only from the similarity
loss, which asks that regions be as similar to each other at one scale as at the other. That is the asynchronous
updating of the paper.

Ours, and not in the official code: batches of slides of different length, one-region slides, other grids than 8 x 8,
the patch branch without gradients where no similarity is asked for (same numbers, less memory), attention at patch
level.

Citation:
    @inproceedings{huang2023conslide,
        title={ConSlide: Asynchronous Hierarchical Interaction Transformer with Breakup-Reorganize Rehearsal for
            Continual Whole Slide Image Analysis},
        author={Huang, Yanyan and Zhao, Weiqin and Wang, Shujun and Fu, Yu and Jiang, Yuming and Yu, Lequan},
        booktitle={ICCV}, year={2023}
    }
"""
import re
from typing import Any, Dict, Final, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_, use_fused_attn
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn

from vishub.models.builder import build_model

__all__ = ['AttentionMaps', 'ConSlide', 'ConSlideOutput', 'Rollout', 'attention_rollout', 'mean_similarity_loss']

_POOL_KERNEL = 4  # also the smallest grid


class ConSlideOutput(NamedTuple):
    """What the model gives, in the official order. B is 1 for a slide that came without a batch dimension.

    Attributes:
        logits: (B, num_classes); the class features (B, dim) of a model without classifier.
        probabilities: Their softmax; None without classifier.
        predicted: Index of the largest, int64 (B,), or a scalar for one slide; None without classifier.
        region_attention: (B, N) float32, `Rollout.region`; None unless asked for.
        sim_loss: Squared differences of the similarities at the two scales, summed over the blocks: (N, N) for one
            slide, (B, N, N) for a batch, float32, 0 where a region is padding. None unless asked for.
    """
    logits: torch.Tensor
    probabilities: Optional[torch.Tensor]
    predicted: Optional[torch.Tensor]
    region_attention: Optional[torch.Tensor]
    sim_loss: Optional[torch.Tensor]


class AttentionMaps(NamedTuple):
    """Softmax weights of every block, first block first.

    Attributes:
        patch: (T, heads, L, L) each, L patches of each of the T regions; the regions of all slides one after the
            other, padding left out.
        region: (B, heads, N + 1, N + 1) each; the class token is the first.
    """
    patch: List[torch.Tensor]
    region: List[torch.Tensor]


class Rollout(NamedTuple):
    """Where a slide's prediction comes from; all float32, without gradient, 0 where a region is padding.

    Attributes:
        region: (B, N), row of the class token in the rollout over the blocks. Its own column is dropped and the rest
            is not renormalised, as in the official code: the sum is less than 1.
        patch: (B, N, g, g), rollout of the patch attention within each region, mean over the queries: sums to 1 a
            region.
        heat_map: (B, N, g, g), share of the region (`region` divided by its sum) times the attention that its patches
            receive in the last block (mean over heads and queries): sums to 1 a slide.

    For one slide without a batch dimension `patch` and `heat_map` are (N, g, g), and `region` is (1, N).
    """
    region: torch.Tensor
    patch: torch.Tensor
    heat_map: torch.Tensor


def attention_rollout(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention rollout: the product of the blocks' attention, residual connections counted.

    Each step is the mean over the heads plus the identity, its rows divided by their sums; later blocks stand left.

    Args:
        maps: (B, heads, L, L) a block, first block first.

    Returns:
        (B, L, L) float32, rows sum to 1.
    """
    result = None
    for attn in maps:
        step = attn.float().mean(1)
        step = step + torch.eye(step.shape[-1], device=step.device)
        step = step / step.sum(-1, keepdim=True)
        result = step if result is None else step @ result
    return result


def region_similarity(x: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Products of all pairs of regions, after one shift and one scale for all values of a slide.

    Args:
        x: (B, N, D).
        mask: (B, N) bool, True for regions; the others count for nothing.

    Returns:
        (B, N, N) `z zᵀ` with z = (x - mean) / std, both scalars a slide, std unbiased; 0 at padding. At least float32:
        the products are of the order of D, and their differences are squared.

    Raises:
        ValueError: If all values of a slide are the same.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if mask is None:
            std, mean = torch.std_mean(x, dim=(1, 2), keepdim=True)
            z = x - mean
        else:
            valid = mask[:, :, None]
            count = valid.sum((1, 2), keepdim=True) * x.shape[2]
            mean = (x * valid).sum((1, 2), keepdim=True) / count
            z = (x - mean) * valid
            std = (z.square().sum((1, 2), keepdim=True) / (count - 1)).sqrt()
        if _can_look_at(x) and not std.all():
            raise ValueError('features are constant: their similarity is not defined')
        z = z / std
        return z @ z.transpose(1, 2)


def mean_similarity_loss(sim_loss: torch.Tensor, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The scalar that is trained on: mean over the pairs of a slide, then over the slides.

    Args:
        sim_loss: `ConSlideOutput.sim_loss`, (N, N) or (B, N, N).
        mask: (B, N) bool, True for regions, as the model was given it.
    """
    if mask is None:
        return sim_loss.mean()
    return (sim_loss.sum((1, 2)) / mask.sum(1).square()).mean()


def _can_look_at(x: torch.Tensor) -> bool:
    """Whether values may decide what happens next: not on the meta device, not while the model is captured."""
    return x.device.type != 'meta' and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _unpack(x: torch.Tensor, mask: Optional[torch.Tensor], batch_size: int) -> torch.Tensor:
    """Regions of all slides one after the other (T, ...) -> (B, N, ...), zeros at padding."""
    if mask is None:
        return x.unflatten(0, (batch_size, -1))
    padded = x.new_zeros(*mask.shape, *x.shape[1:])
    padded[mask] = x
    return padded


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries and keys and one for values."""
    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qkv_bias: bool = False,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.fused_attn = use_fused_attn()

        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
            self,
            x: torch.Tensor,
            mask: Optional[torch.Tensor] = None,
            return_attention: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """x (B, L, C), mask (B, L) bool of the keys or None -> (B, L, C), weights (B, heads, L, L) if asked for."""
        B, L, C = x.shape
        # B, L, 2C -> 2, B, heads, L, C / heads
        q, k = self.qk(x).reshape(B, L, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).reshape(B, L, self.num_heads, self.head_dim).transpose(1, 2)
        if mask is not None:
            mask = mask[:, None, None, :]

        attn = None
        if self.fused_attn and not return_attention:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            if mask is not None:
                attn = attn.masked_fill(~mask, float('-inf'))
            attn = attn.softmax(dim=-1)
            x = self.attn_drop(attn) @ v
        x = x.transpose(1, 2).reshape(B, L, C)  # B, heads, L, C / heads -> B, L, C
        return self.proj_drop(self.proj(x)), attn


class PatchPool(nn.Module):
    """The patches of each region to one token: convolution, LayerNorm, mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, _POOL_KERNEL)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, grid_size: int) -> torch.Tensor:
        """(T, g * g, C) -> (T, C)."""
        x = x.transpose(1, 2).unflatten(2, (grid_size, grid_size))  # T, L, C -> T, C, g, g
        x = self.conv(x).permute(0, 2, 3, 1)  # T, C, g - 3, g - 3 -> T, g - 3, g - 3, C
        return self.norm(x).mean((1, 2))


class HitBlock(nn.Module):
    """Patch branch, pooling, interaction, region branch."""

    def __init__(
            self,
            dim: int,
            patch_heads: int,
            region_heads: int,
            mlp_ratio: float = 2.,
            qkv_bias: bool = False,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.patch_norm1 = nn.LayerNorm(dim)
        self.patch_attn = Attention(dim, patch_heads, qkv_bias, attn_drop, proj_drop)
        self.patch_norm2 = nn.LayerNorm(dim)
        self.patch_mlp = Mlp(dim, hidden_dim, drop=proj_drop)
        self.pool = PatchPool(dim)
        self.region_norm1 = nn.LayerNorm(dim)
        self.region_attn = Attention(dim, region_heads, qkv_bias, attn_drop, proj_drop)
        self.region_norm2 = nn.LayerNorm(dim)
        self.region_mlp = Mlp(dim, hidden_dim, drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(
            self,
            p: torch.Tensor,
            t: torch.Tensor,
            mask: Optional[torch.Tensor],
            grid_size: int,
            train_patches: bool,
            stop_gradient: bool,
            return_attention: bool,
    ) -> Tuple[torch.Tensor, ...]:
        """One block.

        Args:
            p: Patch tokens (T, L, C) of the T regions that are no padding, L = grid_size * grid_size.
            t: Class token and region tokens (B, N + 1, C).
            mask: (B, N) bool, True at the T regions, or None if there is no padding.
            grid_size: Patches a side.
            train_patches: Whether gradients of the patch branch are wanted by anybody.
            stop_gradient: The asynchronous updating: the region branch sends no gradient to the patch branch.
            return_attention: Also give the softmax weights.

        Returns:
            p, t, the pooled regions (B, N, C), and the weights of patch and region attention or two None.
        """
        B = t.shape[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_patches):
            update, patch_attn = self.patch_attn(self.patch_norm1(p), None, return_attention)
            p = p + self.drop_path(update)
            p = p + self.drop_path(self.patch_mlp(self.patch_norm2(p)))
            pooled = _unpack(self.pool(p, grid_size), mask, B)

        seen = pooled.detach() if stop_gradient else pooled
        t = torch.cat([t[:, :1], (t[:, 1:] + seen) / 2], dim=1)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)  # the class token
        update, region_attn = self.region_attn(self.region_norm1(t), mask, return_attention)
        t = t + self.drop_path(update)
        t = t + self.drop_path(self.region_mlp(self.region_norm2(t)))
        return p, t, pooled, patch_attn, region_attn


class ConSlide(nn.Module):
    """Hierarchical interaction transformer, from features of a slide to its class.

    Every method that takes features takes either one slide,

    * `patch_features` (N, g, g, in_features), N >= 1 regions, each a row-major grid of g x g patches, g >= 4,
    * `region_features` (N, in_features), the same regions in the same order,

    or a batch of slides (B, N, g, g, in_features) and (B, N, in_features) with a `mask` (B, N), bool, True for regions
    and False for padding, or no mask if there is no padding. Padding is not computed; what stands there does not
    matter. Features are floats, not normalised. The two may also come as a pair in the first argument.

    All of them raise ValueError for features of another form, without regions, or not finite (which is looked at in
    eager mode only).

    Args:
        num_classes: Classes, of all tasks of a continual training together; 0 for no classifier.
        in_features: Width of the features, of both scales.
        dim: Width of the tokens, a multiple of both numbers of heads.
        depth: Number of blocks.
        patch_heads: Heads of the patch attention.
        region_heads: Heads of the region attention.
        mlp_ratio: Hidden width of the MLPs, relative to `dim`.
        qkv_bias: Bias of queries, keys and values.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of the outputs of attention and MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
    """

    def __init__(
            self,
            num_classes: int = 8,
            in_features: int = 768,
            dim: int = 384,
            depth: int = 2,
            patch_heads: int = 2,
            region_heads: int = 2,
            mlp_ratio: float = 2.,
            qkv_bias: bool = False,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
    ) -> None:
        super().__init__()
        if min(in_features, dim, depth, patch_heads, region_heads) < 1:
            raise ValueError(
                'in_features, dim, depth, patch_heads and region_heads must be positive, got '
                f'{(in_features, dim, depth, patch_heads, region_heads)}')
        if dim % patch_heads or dim % region_heads:
            raise ValueError(
                f'dim ({dim}) must be a multiple of patch_heads ({patch_heads}) and region_heads ({region_heads})')
        self.num_classes = num_classes
        self.in_features = in_features
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.grad_checkpointing = False

        self.patch_embed = nn.Linear(in_features, dim)
        self.region_embed = nn.Linear(in_features, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            HitBlock(
                dim,
                patch_heads,
                region_heads,
                mlp_ratio,
                qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()

        # As in the official code, the embeddings and the pooling keep torch's own initialisation.
        trunc_normal_(self.cls_token, std=0.02)
        self.blocks.apply(_init_linear)
        self.head.apply(_init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay should leave alone."""
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that sort parameters into layers (layer-wise learning rate decay)."""
        return dict(
            stem=r'^cls_token|patch_embed|region_embed',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, keep: bool = True) -> None:
        """New classifier for `num_classes` (0: none).

        Args:
            num_classes: Number of classes.
            keep: Copy the rows of the classes that old and new classifier both have: what a new task needs.
        """
        old = self.head
        place = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
        self.head = nn.Linear(self.num_features, num_classes, **place) if num_classes > 0 else nn.Identity()
        self.head.apply(_init_linear)
        if keep and isinstance(old, nn.Linear) and num_classes > 0:
            kept = min(num_classes, self.num_classes)
            with torch.no_grad():
                self.head.weight[:kept] = old.weight[:kept]
                self.head.bias[:kept] = old.bias[:kept]
        self.head.train(self.training)
        self.num_classes = num_classes

    def example_inputs(self, num_regions: int = 1, grid_size: int = 8) -> Tuple[torch.Tensor, torch.Tensor]:
        """Arguments of the right form (zeros), on the model's device: one slide of `num_regions` regions."""
        place = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
        return (
            torch.zeros(num_regions, grid_size, grid_size, self.in_features, **place),
            torch.zeros(num_regions, self.in_features, **place),
        )

    def _check(
            self,
            patch_features: Any,
            region_features: Optional[torch.Tensor],
            mask: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], bool]:
        """Features as a batch (B, N, g, g, C) and (B, N, C), the mask, and whether they came as one slide."""
        if region_features is None and isinstance(patch_features, (list, tuple)) and len(patch_features) == 2:
            patch_features, region_features = patch_features
        if not torch.is_tensor(patch_features) or not torch.is_tensor(region_features):
            raise ValueError('expected patch features (N, 8, 8, C) and region features (N, C), two tensors')
        patch_shape, region_shape = tuple(patch_features.shape), tuple(region_features.shape)
        got = f'got {patch_shape} and {region_shape}'
        is_slide = len(patch_shape) == 4
        if (
                len(patch_shape) not in (4, 5)
                or len(region_shape) != len(patch_shape) - 2
                or patch_shape[-2] != patch_shape[-3]
        ):
            raise ValueError(
                'expected patch features (N, 8, 8, C) and region features (N, C), '
                f'or both with a batch in front, {got}')
        if patch_shape[:-3] != region_shape[:-1]:
            raise ValueError(f'both feature tensors must describe the same regions, {got}')
        if patch_shape[-1] != self.in_features or region_shape[-1] != self.in_features:
            raise ValueError(
                f'this model was built for {self.in_features}-dimensional features; use an encoder with '
                f'{self.in_features} outputs{" (e.g. convnext_small)" if self.in_features == 768 else ""}, {got}')
        if 0 in patch_shape[:-3]:
            raise ValueError(f'slide has no tissue regions, {got}')
        if patch_shape[-2] < _POOL_KERNEL:
            raise ValueError(f'regions need a grid of at least {_POOL_KERNEL} x {_POOL_KERNEL} patches, {got}')
        if is_slide:
            if mask is not None:
                raise ValueError('a mask belongs to a batch of slides: drop the regions of one slide instead')
            patch_features, region_features = patch_features[None], region_features[None]
        if mask is not None and (mask.dtype != torch.bool or mask.shape != region_features.shape[:2]):
            raise ValueError(
                f'mask must be bool {tuple(region_features.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}')

        if _can_look_at(patch_features):
            if mask is not None and not mask.any(1).all():
                raise ValueError(f'slide has no tissue regions: no. {int(mask.any(1).int().argmin())} of the batch')
            bad = ~(patch_features.isfinite().flatten(2).all(2) & region_features.isfinite().all(2))
            bad = bad if mask is None else bad & mask
            if bad.any():
                slide, region = bad.nonzero()[0].tolist()
                where = f'region {region}' if is_slide else f'region {region} of slide {slide}'
                raise ValueError(f'features must be finite: {where} has NaN or infinite ones')
        return patch_features, region_features, mask, is_slide

    def _embed(
            self,
            patch_features: torch.Tensor,
            region_features: torch.Tensor,
            mask: Optional[torch.Tensor],
            train_patches: bool,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Checked features -> patch tokens of all regions (T, L, C) and region tokens (B, N, C)."""
        x = patch_features.flatten(2, 3)  # B, N, g, g, F -> B, N, L, F
        x = x.flatten(0, 1) if mask is None else x[mask]  # T, L, F
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_patches):
            p = F.relu(self.patch_embed(x))
        if mask is not None:
            region_features = region_features.masked_fill(~mask[:, :, None], 0.)  # NaN times zero would be NaN
        return p, F.relu(self.region_embed(region_features))

    def _interact(
            self,
            p: torch.Tensor,
            r: torch.Tensor,
            mask: Optional[torch.Tensor],
            grid_size: int,
            return_similarity: bool = False,
            return_attention: bool = False,
            stop_gradient: bool = True,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], AttentionMaps]:
        """Embedded tokens -> normalised tokens (B, N + 1, C), similarity loss (B, N, N) or None, maps or empty lists.

        The patch branch runs without gradients where nobody wants them: that is without the similarity loss, unless
        the stop-gradient is lifted.
        """
        train_patches = return_similarity or not stop_gradient
        similarity = region_similarity(r, mask) if return_similarity else None
        sim_loss = None
        maps = AttentionMaps([], [])
        t = torch.cat([self.cls_token.expand(r.shape[0], -1, -1), r], dim=1)
        for block in self.blocks:
            args = (p, t, mask, grid_size, train_patches, stop_gradient, return_attention)
            if self.grad_checkpointing and torch.is_grad_enabled():
                p, t, pooled, patch_attn, region_attn = checkpoint(block, *args)
            else:
                p, t, pooled, patch_attn, region_attn = block(*args)
            if similarity is not None:
                difference = (region_similarity(pooled, mask) - similarity).square()
                sim_loss = difference if sim_loss is None else sim_loss + difference
            if return_attention:
                maps.patch.append(patch_attn)
                maps.region.append(region_attn)
        return self.norm(t), sim_loss, maps

    def forward_features(
            self,
            patch_features: Union[torch.Tensor, Sequence[torch.Tensor]],
            region_features: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Features -> normalised class token and region tokens (B, N + 1, dim); the class token is the first."""
        patch_features, region_features, mask, _ = self._check(patch_features, region_features, mask)
        p, r = self._embed(patch_features, region_features, mask, train_patches=False)
        return self._interact(p, r, mask, patch_features.shape[-2])[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, N + 1, dim) -> logits (B, num_classes), or the class token before the classifier (B, dim)."""
        x = self.head_drop(x[:, 0])
        return x if pre_logits else self.head(x)

    def forward_attention(
            self,
            patch_features: Union[torch.Tensor, Sequence[torch.Tensor]],
            region_features: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
    ) -> AttentionMaps:
        """Features -> softmax weights of both attentions in every block."""
        patch_features, region_features, mask, _ = self._check(patch_features, region_features, mask)
        p, r = self._embed(patch_features, region_features, mask, train_patches=False)
        return self._interact(p, r, mask, patch_features.shape[-2], return_attention=True)[2]

    @torch.no_grad()
    def rollout(
            self,
            patch_features: Union[torch.Tensor, Sequence[torch.Tensor]],
            region_features: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
    ) -> Rollout:
        """Features -> attention at region and at patch level, to be painted on the slide."""
        patch_features, region_features, mask, is_slide = self._check(patch_features, region_features, mask)
        batch_size, grid_size = region_features.shape[0], patch_features.shape[-2]
        maps = self.forward_attention(patch_features, region_features, mask)

        def to_grid(x: torch.Tensor) -> torch.Tensor:  # T, L -> B, N, g, g
            return _unpack(x, mask, batch_size).unflatten(2, (grid_size, grid_size))

        region = attention_rollout(maps.region)[:, 0, 1:]
        patch = to_grid(attention_rollout(maps.patch).mean(1))
        share = region / region.sum(1, keepdim=True)
        heat_map = share[:, :, None, None] * to_grid(maps.patch[-1].float().mean((1, 2)))
        return Rollout(region, patch[0], heat_map[0]) if is_slide else Rollout(region, patch, heat_map)

    def patch_saliency(
            self,
            patch_features: Union[torch.Tensor, Sequence[torch.Tensor]],
            region_features: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
            class_index: Optional[int] = None,
    ) -> torch.Tensor:
        """Gradient times patch embedding: how much each patch moves the logit of a class.

        For this the stop-gradient between the branches is lifted. Parameters get no gradient.

        Args:
            patch_features: See the class.
            region_features: See the class.
            mask: See the class.
            class_index: Class asked about; the predicted one if None.

        Returns:
            |gradient * embedding| summed over the channels: (N, g, g), or (B, N, g, g) for a batch.
        """
        patch_features, region_features, mask, is_slide = self._check(patch_features, region_features, mask)
        grid_size = patch_features.shape[-2]
        with torch.inference_mode(False):
            with torch.no_grad():
                p, r = self._embed(patch_features, region_features, mask, train_patches=False)
            with torch.enable_grad():
                p = p.detach().requires_grad_()
                logits = self.forward_head(self._interact(p, r, mask, grid_size, stop_gradient=False)[0])
                chosen = logits.amax(1) if class_index is None else logits[:, class_index]
                gradient, = torch.autograd.grad(chosen.sum(), p)
            saliency = (gradient * p.detach()).abs().sum(2)  # T, L
            saliency = _unpack(saliency, mask, len(logits)).unflatten(2, (grid_size, grid_size))
        return saliency[0] if is_slide else saliency

    def forward(
            self,
            patch_features: Union[torch.Tensor, Sequence[torch.Tensor]],
            region_features: Optional[torch.Tensor] = None,
            mask: Optional[torch.Tensor] = None,
            return_attention: bool = False,
            return_similarity: Optional[bool] = None,
    ) -> ConSlideOutput:
        """Classify one slide or a batch of them.

        Args:
            patch_features: See the class.
            region_features: See the class.
            mask: See the class.
            return_attention: Give `region_attention`.
            return_similarity: Give `sim_loss`; by default in training only. Without it (replay, evaluation) the patch
                branch runs without gradients: it would get none.

        Returns:
            See `ConSlideOutput`.
        """
        if return_similarity is None:
            return_similarity = self.training
        patch_features, region_features, mask, is_slide = self._check(patch_features, region_features, mask)
        p, r = self._embed(patch_features, region_features, mask, train_patches=return_similarity)
        x, sim_loss, maps = self._interact(
            p, r, mask, patch_features.shape[-2], return_similarity, return_attention)
        logits = self.forward_head(x)
        probabilities = predicted = region_attention = None
        if self.num_classes > 0:
            probabilities = logits.softmax(dim=-1)
            predicted = logits.argmax(dim=-1)
            predicted = predicted[0] if is_slide else predicted
        if return_attention:
            region_attention = attention_rollout([attn.detach() for attn in maps.region])[:, 0, 1:]
        if sim_loss is not None and is_slide:
            sim_loss = sim_loss[0]
        return ConSlideOutput(logits, probabilities, predicted, region_attention, sim_loss)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Official names of what the forward uses ...
_OFFICIAL_NAMES = (
    (r'^fc1\.0\.', 'patch_embed.'),
    (r'^fc2\.0\.', 'region_embed.'),
    (r'^(blocks\.\d+)\.inner_(norm1|norm2|attn|mlp)\.', r'\1.patch_\2.'),
    (r'^(blocks\.\d+)\.outer_(norm1|norm2|attn|mlp)\.', r'\1.region_\2.'),
    (r'^(blocks\.\d+)\.convpool\.', r'\1.pool.'),
)
# ... and of what it never uses, three quarters of all parameters.
_UNUSED = re.compile(
    r'cls_token_inner|cls_token_outer|(proj_norm1|proj|proj_norm2|skimpre|convpool)\..+'
    r'|blocks\.\d+\.(proj_norm1\..+|proj\.weight|proj_norm2\..+|projector\..+|bn\..+)')
_OURS = re.compile(
    r'cls_token|((patch_embed|region_embed|norm|head)'
    r'|blocks\.\d+\.((patch|region)_(norm1|norm2|attn\.(qk|v|proj)|mlp\.fc[12])|pool\.(conv|norm)))\.(weight|bias)')


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert an official checkpoint to this file's names, without the parameters that are never used.

    Args:
        state_dict: State dict of the official network, or of its whole continual learner (prefix `net.`), or either
            under `state_dict` or `model`. A state dict with this file's names is taken as it is.
        model: The model to load into (not looked at).

    Returns:
        State dict for `model.load_state_dict`.

    Raises:
        ValueError: If a name belongs neither to the official network nor to this one.
    """
    for key in ('state_dict', 'model'):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    renamed = {}
    for name, value in state_dict.items():
        key = name[len('net.'):] if name.startswith('net.') else name
        if _UNUSED.fullmatch(key):
            continue
        for pattern, replacement in _OFFICIAL_NAMES:
            key = re.sub(pattern, replacement, key)
        if not _OURS.fullmatch(key):
            raise ValueError(f"'{name}' is no parameter of ConSlide's network")
        renamed[key] = value
    return renamed


def _create_conslide(variant: str, pretrained: bool = False, **kwargs: Any) -> ConSlide:
    if kwargs.pop('features_only', False):
        raise ValueError(f'{variant} has no feature maps: features_only is for models of images')
    if kwargs.pop('in_chans', None) is not None:
        raise ValueError(f'{variant} takes features and not images: in_features sets their width, there is no in_chans')
    return build_model(
        ConSlide,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=('in_chans',),  # timm would take it from input_size
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        # patches a side (twice) and width of the features
        'num_classes': 8, 'input_size': (8, 8, 768), 'pool_size': None,
        'crop_pct': None, 'interpolation': None, 'mean': None, 'std': None,
        'first_conv': None, 'classifier': 'head',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2308.13324',
        'paper_name': 'ConSlide: Asynchronous Hierarchical Interaction Transformer with Breakup-Reorganize Rehearsal '
                      'for Continual Whole Slide Image Analysis',
        'origin_url': 'https://github.com/HKU-MedAI/ConSlide',
        **kwargs,
    }


# What the weights were trained with besides the network; `vishub/tasks/slide_analysis/setting.py` reads the note.
_PROCEDURAL_HE = dict(
    input_size=(8, 8, 128),
    label_names=('rings', 'rows', 'clumps', 'lakes', 'dust', 'giants', 'pale', 'spindles'),
    notes=(
        'vishub.slide_analysis: {"tasks": {"organ_a": ["rings", "rows"], "organ_b": ["clumps", "lakes"], '
        '"organ_c": ["dust", "giants"], "organ_d": ["pale", "spindles"]}, "encoder": "texture_bank", '
        '"encoder_size": 32, "tiling": {"patch_size": 16, "grid": 8, "mpp": 0.5, "min_tissue": 0.05, '
        '"max_regions": null}}',),
)

default_cfgs = generate_default_cfgs({
    'conslide_hit': _cfg(),
    'conslide_hit_tiny': _cfg(input_size=(8, 8, 128)),
    'conslide_hit_tiny.procedural_he': _cfg(hf_hub_id='vishub/conslide_hit_tiny.procedural_he', **_PROCEDURAL_HE),
    'conslide_hit_tiny.procedural_he_no_replay': _cfg(
        hf_hub_id='vishub/conslide_hit_tiny.procedural_he_no_replay', **_PROCEDURAL_HE),
})


@register_model
def conslide_hit(pretrained: bool = False, **kwargs: Any) -> ConSlide:
    """The paper's: 768-d features (e.g. ConvNeXt), 10.0 M parameters, 4.8 G MACs for 16 regions."""
    return _create_conslide('conslide_hit', pretrained=pretrained, **kwargs)


@register_model
def conslide_hit_tiny(pretrained: bool = False, **kwargs: Any) -> ConSlide:
    """A small one of ours for 128-d features, 0.3 M parameters."""
    model_args = dict(in_features=128, dim=64)
    return _create_conslide('conslide_hit_tiny', pretrained=pretrained, **dict(model_args, **kwargs))
