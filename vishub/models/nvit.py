"""NViT and ReViT: vision transformers whose every block has its own sizes.

Paper: `Global Vision Transformer Pruning with Hessian-Aware Saliency`, CVPR 2023 - https://arxiv.org/abs/2110.04869
(first version: `NViT: Vision Transformer Compression and Parameter Redistribution`)
Official code: https://github.com/NVlabs/NViT (NVIDIA Source Code License-NC; its weights are CC BY-NC-SA 4.0). Neither
code nor weights are part of this hub. This file was written from a description of the architecture; it reads the
official checkpoints when a user supplies them.

A block of a plain ViT has four sizes that follow from the embedding: heads, query/key size, value size and MLP width.
Here each block states its own, and only the embedding is shared, because the residual stream joins all blocks:

* NViT models are pruned from a trained ViT (`vishub.pruning`), so their sizes come with their checkpoint;
* ReViT models are trained from scratch with the sizes that pruning was seen to prefer (`revit_dims`).

The sizes travel as one dictionary, `dims`, in the words of the official checkpoints: `EMB` (int) and `head`, `QK`, `V`
(both per head), `MLP`, one entry a block.
"""
from typing import Any, Dict, Final, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
    get_act_layer,
    resample_abs_pos_embed,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import nn

from vishub.models.builder import build_model

__all__ = ['NViT', 'check_dims', 'official_dims', 'revit_dims', 'uniform_dims']

Dims = Mapping[str, Union[int, Sequence[int]]]

_BLOCK_KINDS = ('head', 'QK', 'V', 'MLP')


def check_dims(dims: Dims) -> Dict[str, Any]:
    """The same sizes with plain ints and lists (what JSON can hold), after a check.

    Raises:
        ValueError: If an entry is missing, the lists differ in length, or a size is below 1.
    """
    missing = [kind for kind in ('EMB',) + _BLOCK_KINDS if kind not in dims]
    if missing:
        raise ValueError(f'nvit: dims needs EMB, head, QK, V and MLP; {", ".join(missing)} missing')
    sizes = {kind: [int(size) for size in dims[kind]] for kind in _BLOCK_KINDS}
    lengths = {kind: len(sizes[kind]) for kind in _BLOCK_KINDS}
    if len(set(lengths.values())) != 1 or not lengths['head']:
        raise ValueError(f'nvit: head, QK, V and MLP must each have one entry per block (got {lengths})')
    for kind in _BLOCK_KINDS:
        for index, size in enumerate(sizes[kind]):
            if size < 1:
                raise ValueError(f'nvit: block {index} has size {size} in {kind}; sizes must be at least 1')
    if int(dims['EMB']) < 1:
        raise ValueError(f'nvit: EMB is {dims["EMB"]}; it must be at least 1')
    return dict(EMB=int(dims['EMB']), **sizes)


def uniform_dims(embed_dim: int, depth: int, num_heads: int, head_dim: int, mlp_dim: int) -> Dict[str, Any]:
    """`dims` of a plain ViT, where all blocks are alike (what pruning starts from)."""
    return check_dims(dict(
        EMB=embed_dim, head=[num_heads] * depth, QK=[head_dim] * depth, V=[head_dim] * depth, MLP=[mlp_dim] * depth))


def revit_dims(embed_dim: int) -> Dict[str, Any]:
    """`dims` of a 12-block ReViT by the published rule, with the embedding size as the only knob.

    The first and last block get many heads; the middle six twice the heads, query size and MLP width of their
    neighbours; the value size stays 64 while the query size shrinks.

    Raises:
        ValueError: If `embed_dim` is 100 or less: the rule then rounds the number of heads to 0.
    """
    heads = round(0.005 * embed_dim)
    query = round(0.05 * embed_dim / 8)
    if heads < 1 or query < 1:
        raise ValueError(f'nvit: the ReViT rule needs an embedding size above 100 (got {embed_dim})')
    return check_dims(dict(
        EMB=embed_dim,
        head=[10] + [2 * heads] * 2 + [4 * heads] * 6 + [2 * heads] * 2 + [10],
        QK=[16 * query] + [8 * query] * 2 + [16 * query] * 6 + [8 * query] * 2 + [16 * query],
        V=[64] * 12,
        MLP=[3 * embed_dim] * 3 + [6 * embed_dim] * 6 + [3 * embed_dim] * 3,
    ))


class Attention(nn.Module):
    """Multi-head attention whose query/key size and value size need not follow from the embedding.

    Args:
        dim: Embedding size E.
        num_heads: Heads h.
        qk_dim: Query and key size of a head, q.
        v_dim: Value size of a head, v.
        scale: Factor on the logits. It stays that of the unpruned model (64 ** -0.5) whatever `qk_dim` is.
        scale_grid: Patch grid (rows, columns). If given, queries, keys and values are multiplied by a learnable
            scale per token (N, 1) after the bias, as in the official models.
        num_prefix_tokens: Tokens before the patches, which keep their scale when the grid is resampled.
    """
    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qk_dim: int,
            v_dim: int,
            scale: float,
            qkv_bias: bool = True,
            proj_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            scale_grid: Optional[Tuple[int, int]] = None,
            num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.v_dim = v_dim
        self.scale = scale
        self.scale_grid = scale_grid
        self.num_prefix_tokens = num_prefix_tokens
        self.fused_attn = use_fused_attn()

        # Output rows: queries, keys, values; head-major within each (head slow, channel fast).
        self.qkv = nn.Linear(dim, num_heads * (2 * qk_dim + v_dim), bias=qkv_bias)
        self.token_scale = None
        if scale_grid is not None:
            self.token_scale = nn.Parameter(torch.ones(scale_grid[0] * scale_grid[1] + num_prefix_tokens, 1))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * v_dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, grid_size: Optional[List[int]] = None) -> torch.Tensor:
        """(B, N, E) -> (B, N, E). `grid_size` (rows, columns) resamples the token scale, as the position embedding."""
        B, N, _ = x.shape
        qkv = self.qkv(x)
        if self.token_scale is not None:
            token_scale = self.token_scale.unsqueeze(0)  # 1, N, 1
            if grid_size is not None:
                token_scale = resample_abs_pos_embed(
                    token_scale,
                    new_size=grid_size,
                    old_size=self.scale_grid,
                    num_prefix_tokens=self.num_prefix_tokens,
                )
            qkv = qkv * token_scale.to(qkv.dtype)
        qk_width = self.num_heads * self.qk_dim
        q, k, v = qkv.split([qk_width, qk_width, self.num_heads * self.v_dim], dim=-1)
        q = q.reshape(B, N, self.num_heads, self.qk_dim).transpose(1, 2)  # B, heads, N, q
        k = k.reshape(B, N, self.num_heads, self.qk_dim).transpose(1, 2)  # B, heads, N, q
        v = v.reshape(B, N, self.num_heads, self.v_dim).transpose(1, 2)  # B, heads, N, v

        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q, k, v, dropout_p=self.attn_drop.p if self.training else 0., scale=self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v

        x = x.transpose(1, 2).reshape(B, N, self.num_heads * self.v_dim)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    """Pre-norm transformer block with sizes of its own; drop path and optional layer scale on both branches."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qk_dim: int,
            v_dim: int,
            mlp_dim: int,
            scale: float,
            qkv_bias: bool = True,
            proj_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            init_values: Optional[float] = None,
            norm_eps: float = 1e-6,
            act_layer: Type[nn.Module] = nn.GELU,
            scale_grid: Optional[Tuple[int, int]] = None,
            num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(
            dim,
            num_heads,
            qk_dim,
            v_dim,
            scale,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            scale_grid=scale_grid,
            num_prefix_tokens=num_prefix_tokens,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_features=mlp_dim, act_layer=act_layer, bias=proj_bias, drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, grid_size: Optional[List[int]] = None) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid_size)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class NViT(nn.Module):
    """A vision transformer whose sizes are given block by block.

    Without the distillation token it is also the general form of a plain timm ViT: any `VisionTransformer` that
    `vishub.pruning` accepts is the special case of equal blocks.

    Args:
        img_size: Input size in pixels.
        patch_size: Patch size in pixels.
        in_chans: Input channels.
        num_classes: Classes; 0 leaves the heads out.
        global_pool: `token`, `avg` (patches only) or `` (no pooling).
        dims: Sizes of the embedding and of every block, see the top of this file.
        attn_scale: Factor on the attention logits: head size ** -0.5 of the model before pruning.
        distilled: Second token and head (DeiT); logits are then the mean of both heads.
        token_scale: Learnable scale per token on queries, keys and values (official models have it).
        class_token: Use a class token.
        reg_tokens: Number of register tokens.
        no_embed_class: Position embedding for the patches only.
        pre_norm: Norm between embedding and blocks; the patch embedding then has no bias.
        fc_norm: Norm after pooling instead of before.
        qkv_bias, proj_bias: Biases of the attention input, and of its output and the MLP.
        init_values: Initial layer scale, or None for none.
        norm_eps: Epsilon of all norms.
        act_layer: timm's name of the activation.
        dynamic_img_size: Accept any input size that the patch size divides, resampling position embedding and
            token scale (bicubic, antialiased).
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: Dropout rates, 0..1.

    Shapes:
        input: (B, in_chans, H, W) float, normalised by the mean and std of `pretrained_cfg`.
        output: (B, num_classes); a pair of them in train mode after `set_distilled_training()`.

    Raises:
        ValueError: If `dims` is not usable.
    """
    dynamic_img_size: Final[bool]

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: int = 16,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            dims: Optional[Dims] = None,
            attn_scale: float = 64 ** -0.5,
            distilled: bool = True,
            token_scale: bool = True,
            class_token: bool = True,
            reg_tokens: int = 0,
            no_embed_class: bool = False,
            pre_norm: bool = False,
            fc_norm: Optional[bool] = None,
            qkv_bias: bool = True,
            proj_bias: bool = True,
            init_values: Optional[float] = None,
            norm_eps: float = 1e-6,
            act_layer: str = 'gelu',
            dynamic_img_size: bool = False,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
    ) -> None:
        super().__init__()
        if dims is None:
            raise ValueError('nvit: pass dims= (EMB, head, QK, V, MLP); an NViT has no sizes of its own')
        dims = check_dims(dims)
        self._check_pool(global_pool, class_token)
        if distilled and (reg_tokens or not class_token):
            raise ValueError('nvit: a distilled model has exactly two prefix tokens, class and distillation')
        embed_dim, depth = dims['EMB'], len(dims['head'])
        self.dims = dims
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.distilled = distilled
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + int(distilled) + reg_tokens
        self.no_embed_class = no_embed_class
        self.num_embed_prefix = 0 if no_embed_class else self.num_prefix_tokens
        self.dynamic_img_size = dynamic_img_size
        self.distilled_training = False
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            strict_img_size=not dynamic_img_size,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.patch_embed.num_patches + self.num_embed_prefix, embed_dim))
        self.pos_drop = nn.Dropout(p=pos_drop_rate)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()

        drop_paths = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()  # stochastic depth decay rule
        self.blocks = nn.Sequential(*[
            Block(
                embed_dim,
                num_heads,
                qk_dim,
                v_dim,
                mlp_dim,
                scale=attn_scale,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                drop_path=drop_path,
                init_values=init_values,
                norm_eps=norm_eps,
                act_layer=get_act_layer(act_layer),
                scale_grid=self.patch_embed.grid_size if token_scale else None,
                num_prefix_tokens=self.num_prefix_tokens,
            )
            for num_heads, qk_dim, v_dim, mlp_dim, drop_path
            in zip(dims['head'], dims['QK'], dims['V'], dims['MLP'], drop_paths)])
        self.feature_info = [
            dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=patch_size) for i in range(depth)]
        fc_norm = global_pool == 'avg' if fc_norm is None else fc_norm
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(embed_dim, eps=norm_eps)

        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head()
        self.head_dist = self._make_head() if distilled else None

        self.init_weights()

    @staticmethod
    def _check_pool(global_pool: str, class_token: bool) -> None:
        if global_pool not in ('', 'avg', 'token') or (global_pool == 'token' and not class_token):
            raise ValueError(
                f"nvit: global_pool must be 'token' (with a class token), 'avg' or '' (got {global_pool!r})")

    def _make_head(self) -> nn.Module:
        return nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal (0.02) for linear layers, tokens and position embedding, zero for biases."""
        for tensor in (self.cls_token, self.dist_token, self.reg_token, self.pos_embed):
            if tensor is not None:
                trunc_normal_(tensor, std=.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay should leave alone."""
        leaves = ('pos_embed', 'cls_token', 'dist_token', 'reg_token', 'token_scale')
        return {name for name, _ in self.named_parameters() if name.endswith(leaves)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that sort parameters into layers (layer-wise learning rate decay)."""
        return dict(
            stem=r'^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Give the logits of both heads as a pair in train mode."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Union[nn.Module, Tuple[nn.Module, nn.Module]]:
        """The head, or both heads (class, distillation) of a distilled model."""
        return (self.head, self.head_dist) if self.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """New heads for `num_classes` (0: none), and optionally another pooling."""
        if global_pool is not None:
            self._check_pool(global_pool, self.has_class_token)
            self.global_pool = global_pool
        self.num_classes = num_classes
        place = dict(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        self.head = self._make_head().to(**place)
        if self.distilled:
            self.head_dist = self._make_head().to(**place)
        for module in (self.head, self.head_dist):
            if module is not None:
                module.train(self.training)
                module.apply(self._init_weights)

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[int] = None,
    ) -> None:
        """Change the input size (pixels) and/or the patch size, resampling what depends on them."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        new_grid = self.patch_embed.grid_size
        if new_grid == old_grid:
            return
        self.pos_embed = nn.Parameter(resample_abs_pos_embed(
            self.pos_embed.detach(), new_grid, old_grid, num_prefix_tokens=self.num_embed_prefix))
        for block in self.blocks:
            if block.attn.token_scale is not None:
                block.attn.token_scale = nn.Parameter(resample_abs_pos_embed(
                    block.attn.token_scale.detach()[None], new_grid, old_grid,
                    num_prefix_tokens=self.num_prefix_tokens)[0])
                block.attn.scale_grid = new_grid

    def _pos_embed(self, x: torch.Tensor, grid_size: Optional[List[int]]) -> torch.Tensor:
        """(B, patches, E) -> (B, N, E): prefix tokens in front, position embedding added."""
        pos_embed = self.pos_embed
        if grid_size is not None:
            pos_embed = resample_abs_pos_embed(
                pos_embed,
                new_size=grid_size,
                old_size=self.patch_embed.grid_size,
                num_prefix_tokens=self.num_embed_prefix,
            )
        if self.no_embed_class:
            x = x + pos_embed
        tokens = []
        if self.cls_token is not None:
            tokens.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.dist_token is not None:
            tokens.append(self.dist_token.expand(x.shape[0], -1, -1))
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(x.shape[0], -1, -1))
        tokens.append(x)
        x = torch.cat(tokens, dim=1)
        if not self.no_embed_class:
            x = x + pos_embed
        return self.pos_drop(x)

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[List[int]]]:
        """Image -> tokens before the first block, and the grid (rows, columns) if it may differ from the built one."""
        grid_size: Optional[List[int]] = None
        if self.dynamic_img_size:
            height, width = x.shape[-2:]
            patch_height, patch_width = self.patch_embed.patch_size
            grid_size = [height // patch_height, width // patch_width]
        x = self.patch_embed(x)
        x = self.norm_pre(self._pos_embed(x, grid_size))
        return x, grid_size

    @torch.jit.ignore
    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Features after chosen blocks.

        Args:
            x: Images (B, C, H, W).
            indices: The last n blocks if an int, all if None, these if a sequence.
            return_prefix_tokens: Give each intermediate as a pair (patch tokens, prefix tokens (B, P, E)).
            norm: Apply the final norm to each intermediate.
            stop_early: Do not run the blocks after the last one asked for.
            output_fmt: `NCHW` (B, E, H/16, W/16) or `NLC` (B, patches, E).
            intermediates_only: Leave out the final features.

        Returns:
            (final features, intermediates), or the intermediates alone.
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        B, _, height, width = x.shape
        x, grid_size = self._embed(x)
        blocks = self.blocks[:max_index + 1] if stop_early else self.blocks
        taken = []
        for i, block in enumerate(blocks):
            x = checkpoint(block, x, grid_size) if self.grad_checkpointing else block(x, grid_size)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        prefixes = [y[:, :self.num_prefix_tokens] for y in taken]
        intermediates = [y[:, self.num_prefix_tokens:] for y in taken]
        if output_fmt == 'NCHW':
            rows, columns = self.patch_embed.dynamic_feat_size((height, width))
            intermediates = [  # B, N, E -> B, E, rows, columns
                y.reshape(B, rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefixes))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop the blocks after the last one asked for, and on request the final norm and the heads."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]
        self.dims = {k: v if k == 'EMB' else v[:max_index + 1] for k, v in self.dims.items()}
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> all tokens after the final norm, (B, N, E)."""
        x, grid_size = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid_size)
            else:
                x = block(x, grid_size)
        return self.norm(x)

    def pool(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(B, N, E) -> what the class head and what the distillation head read, (B, E) each ((B, N, E) unpooled)."""
        x_dist = x
        if self.global_pool == 'token':
            x_dist = x[:, 1] if self.distilled else x[:, 0]
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x_dist = x[:, self.num_prefix_tokens:].mean(dim=1)
        return self.head_drop(self.fc_norm(x)), self.head_drop(self.fc_norm(x_dist))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, N, E) -> logits (B, classes); with `pre_logits` the pooled features (B, E)."""
        x, x_dist = self.pool(x)
        if self.head_dist is None:
            return x if pre_logits else self.head(x)
        if pre_logits:
            return (x + x_dist) / 2
        x, x_dist = self.head(x), self.head_dist(x_dist)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return x, x_dist
        return (x + x_dist) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def official_dims(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """The sizes that an official checkpoint file states under `dim`.

    Raises:
        ValueError: If there is no such entry. Embedding, MLP and total attention widths could be read from the
            tensors, the number of heads could not.
    """
    if 'dim' not in checkpoint:
        raise ValueError("nvit: this checkpoint has no 'dim' entry; pass dims= (heads can not be inferred)")
    return check_dims(checkpoint['dim'])


def _flatten_prunable(weight: torch.Tensor, bias: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Official multi-head layer (channel, E, head), (channel, head) -> rows (head * channel, E), (head * channel)."""
    channels, dim, heads = weight.shape
    return weight.permute(2, 0, 1).reshape(heads * channels, dim), bias.t().reshape(-1)


def _convert_attention(state_dict: Dict[str, torch.Tensor], prefix: str) -> Dict[str, torch.Tensor]:
    """The official tensors of one attention -> ours. Works for the dense and the prunable official class."""
    weights, biases = [], []
    head_mask = state_dict.get(f'{prefix}qkv.head_mask.weight')
    for name in 'QKV':
        weight, bias = state_dict[f'{prefix}qkv.{name}.weight'], state_dict[f'{prefix}qkv.{name}.bias']
        if weight.ndim == 3:
            weight, bias = _flatten_prunable(weight, bias)
        if head_mask is not None:  # a factor on the outputs of a head: the same as on its rows
            mask = head_mask.reshape(-1).repeat_interleave(len(weight) // head_mask.numel())
            weight, bias = weight * mask[:, None], bias * mask
        weights.append(weight)
        biases.append(bias)
    converted = {'qkv.weight': torch.cat(weights), 'qkv.bias': torch.cat(biases)}
    if f'{prefix}qkv.token_mask' in state_dict:
        converted['token_scale'] = state_dict[f'{prefix}qkv.token_mask']
    if f'{prefix}proj.proj.weight' in state_dict:
        converted['proj.weight'] = state_dict[f'{prefix}proj.proj.weight']
        converted['proj.bias'] = state_dict[f'{prefix}proj.proj.bias']
    else:
        weight = state_dict[f'{prefix}proj.weight']  # E, channel, head -> E, head * channel
        converted['proj.weight'] = weight.permute(0, 2, 1).reshape(weight.shape[0], -1)
        converted['proj.bias'] = state_dict[f'{prefix}proj.bias']
    return {f'{prefix}{name}': tensor for name, tensor in converted.items()}


def _resample_tokens(tensor: torch.Tensor, model: 'NViT', num_prefix_tokens: int) -> torch.Tensor:
    """(1, N, C) of a square grid -> the model's grid; as it is where the number of tokens agrees."""
    if tensor.shape[1] == model.patch_embed.num_patches + num_prefix_tokens:
        return tensor
    return resample_abs_pos_embed(tensor, model.patch_embed.grid_size, num_prefix_tokens=num_prefix_tokens)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: NViT) -> Dict[str, torch.Tensor]:
    """Turn an official (dense or prunable) or a timm DeiT/ViT state dict into ours.

    A token scale that the checkpoint lacks becomes 1. One that the model lacks is dropped where it is 1 everywhere,
    and folded into nothing otherwise: the model must then be built with `token_scale=True`.

    Raises:
        ValueError: If the sizes of the checkpoint are not those of the model (names the first key and both shapes),
            or it has token scales that the model cannot hold.
    """
    state_dict = dict(state_dict.get('model', state_dict))
    attentions = sorted({key.partition('qkv.')[0] for key in state_dict if key.endswith('.qkv.Q.weight')})
    out = {
        key: tensor for key, tensor in state_dict.items()
        if not any(key.startswith(prefix) for prefix in attentions)}
    for prefix in attentions:
        out.update(_convert_attention(state_dict, prefix))

    patch = model.patch_embed.proj
    weight = out.get('patch_embed.proj.weight')
    if weight is not None and weight.shape[2:] == (1, 1) and patch.kernel_size != (1, 1):
        # Official patches are (row, column, colour) vectors that go through a 1x1 convolution.
        height, width = patch.kernel_size
        out['patch_embed.proj.weight'] = weight.reshape(len(weight), height, width, -1).permute(0, 3, 1, 2)
    if 'pos_embed' in out:
        out['pos_embed'] = _resample_tokens(out['pos_embed'], model, model.num_embed_prefix)

    for index, block in enumerate(model.blocks):
        key = f'blocks.{index}.attn.token_scale'
        if block.attn.token_scale is None:
            scale = out.pop(key, None)
            if scale is not None and not bool((scale == 1).all()):
                raise ValueError(f'nvit: the checkpoint has token scales ({key}); build with token_scale=True')
        elif key in out:
            out[key] = _resample_tokens(out[key][None], model, model.num_prefix_tokens)[0]
        else:
            out[key] = torch.ones_like(block.attn.token_scale)

    for key, own in model.state_dict().items():
        # Heads and the first layer may differ on purpose: timm adapts those itself.
        if key in out and not key.startswith(('head', 'patch_embed.')) and out[key].shape != own.shape:
            raise ValueError(
                f'nvit: dims do not match the checkpoint: {key} is {tuple(out[key].shape)} there and '
                f'{tuple(own.shape)} in the model')
    return out


def _create_nvit(variant: str, pretrained: bool = False, **kwargs: Any) -> NViT:
    out_indices = kwargs.pop('out_indices', 3)
    return build_model(
        NViT,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        tag_args=tag_args,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': ('head', 'head_dist'),
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2110.04869', 'origin_url': 'https://github.com/NVlabs/NViT',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'revit_tiny_distilled_patch16_224': _cfg(),
    'revit_small_distilled_patch16_224': _cfg(),
    'nvit_distilled_patch16_224': _cfg(),
    'nvit': _cfg(input_size=(3, 32, 32), num_classes=10, crop_pct=1.0, classifier='head'),
    # Pruned from a vit_mini_patch2_28 trained on Fashion-MNIST at patch 4.
    'nvit.fashion_mnist': _cfg(
        hf_hub_id='vishub/nvit.fashion_mnist', input_size=(1, 28, 28), num_classes=10, crop_pct=1.0,
        crop_mode='squash', interpolation='bicubic', mean=(0.2874,), std=(0.3537,), classifier='head',
        label_names=(
            'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')),
})

# The sizes of a pruned model belong to its weights, so they come with the tag. The plain `nvit` is an unpruned one.
tag_args = {
    'nvit': dict(
        img_size=32, patch_size=4, distilled=False, token_scale=False, attn_scale=32 ** -0.5,
        dims=uniform_dims(128, depth=6, num_heads=4, head_dim=32, mlp_dim=512)),
    'nvit.fashion_mnist': dict(
        patch_size=4, attn_scale=0.1767766952966369, distilled=False, token_scale=False, fc_norm=False,
        dims=dict(
            EMB=96,
            head=[3, 3, 3, 1, 3, 3, 3, 3, 3, 3, 3, 3],
            QK=[32, 32, 32, 8, 32, 32, 32, 32, 32, 24, 32, 32],
            V=[32, 32, 32, 16, 32, 32, 32, 32, 32, 32, 32, 32],
            MLP=[384, 144, 32, 16, 16, 16, 48, 32, 48, 64, 112, 176],
        )),
}


@register_model
def revit_tiny_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> NViT:
    """ReViT-T: the sizes of DeiT-T redistributed, 5.3 M parameters, 1.14 GMACs."""
    model_args = dict(dims=revit_dims(176))
    return _create_nvit('revit_tiny_distilled_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def revit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> NViT:
    """ReViT-S: the sizes of DeiT-S redistributed, 23.1 M parameters, 4.71 GMACs."""
    model_args = dict(dims=revit_dims(384))
    return _create_nvit('revit_small_distilled_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def nvit_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> NViT:
    """NViT with the sizes in `dims`; without it the distilled DeiT-B that the paper prunes from."""
    model_args = dict(dims=uniform_dims(768, depth=12, num_heads=12, head_dim=64, mlp_dim=3072))
    return _create_nvit('nvit_distilled_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def nvit(pretrained: bool = False, **kwargs: Any) -> NViT:
    """What `vishub.pruning` exports, sizes and tokens in its arguments; without them a small unpruned ViT (32 px)."""
    return _create_nvit('nvit', pretrained, **kwargs)
