"""One explicit block step a backbone family: what timm's blocks compute, with the tokens' state passed along.

Each `step` below mirrors the forward of one block class, attention written out, because reduction happens between
attention and MLP and needs its keys. With reduction off it computes what the block itself computes. Forward hooks on
blocks and attention modules do not run (the step calls what is inside them); hooks on their layers do.
"""
import abc
from typing import Any, FrozenSet, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, apply_rot_embed_cat, resample_abs_pos_embed
from timm.models import beit, deit, eva, vision_transformer
from torch import nn

from vishub.errors import InputError
from vishub.models import nvit
from vishub.tokens.functional import full_precision, take_rows
from vishub.tokens.method import Layout, Method, Seen, State

__all__ = ['Backbone', 'backbone_of']


class Task(NamedTuple):
    """What one block has to do: `count` tokens at `place`, None where nothing is reduced."""
    layer: int
    count: Optional[int]
    method: Method
    layout: Layout
    positional: bool
    record: bool

    @property
    def needs(self) -> FrozenSet[str]:
        return frozenset() if self.count is None else self.method.needs


class Heads(NamedTuple):
    """Sizes of one block's attention: heads, width of a query, of a value."""
    heads: int
    query: int
    value: int


def attend(
        attn: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor],
        needs: FrozenSet[str],
) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Attention as the block has it, and what a method needs to see of it.

    Args:
        attn: The block's attention (scale, dropout, fused or not).
        q, k, v: (B, H, N, d).
        bias: Added to the logits, broadcast to (B, H, N, N); None for none.

    Returns:
        Output (B, H, N, d_v), class row (B, N) or None, probabilities (B, H, N, N) float32 or None.
    """
    dropout = attn.attn_drop.p if attn.training else 0.
    class_row = None
    if bias is not None:
        bias = bias.to(q.dtype)
    if 'probs' in needs:
        # Page rank multiplies this matrix with itself many times over: float32, whatever the model runs in.
        with full_precision(q):
            B, H, N, _ = q.shape
            rows, columns = (part.float().reshape(B * H, N, -1) for part in (q, k))
            if bias is None:
                logits = torch.baddbmm(rows.new_empty(1, 1, 1), rows, columns.mT, beta=0, alpha=attn.scale)
            else:
                bias = bias.float().expand(B, H, -1, -1).reshape(B * H, -1, N)
                logits = torch.baddbmm(bias, rows, columns.mT, alpha=attn.scale)
            probs = logits.softmax(dim=-1)  # B * H, N, N
        out = torch.bmm(F.dropout(probs, dropout, attn.training).to(v.dtype), v.reshape(B * H, N, -1))
        probs = probs.view(B, H, N, N)
        return out.view(B, H, N, -1), probs[:, :, 0].mean(dim=1) if 'class_row' in needs else None, probs
    if 'class_row' in needs:
        with full_precision(q):
            row = _first_row(q[:, :, 0].float() * attn.scale, k.float())  # B, H, N
            row = row if bias is None else row + bias[..., 0, :].float()
            class_row = row.softmax(dim=-1).mean(dim=1)
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        probs = (logits if bias is None else logits + bias).softmax(dim=-1)
        out = attn.attn_drop(probs) @ v
    return out, class_row, None


def _first_row(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Products of one query a head (B, H, d) with all keys (B, H, N, d) -> (B, H, N).

    With the heads' queries on the diagonal of one matrix, the keys are read where they lie, side by side in the packed
    projection; a product head by head would copy them first.
    """
    diagonal = torch.diag_embed(q.transpose(1, 2)).transpose(1, 2).flatten(1, 2)  # B, d, H, H -> B, H * d, H
    return torch.bmm(k.transpose(1, 2).flatten(2), diagonal).transpose(1, 2)


def packed_qkv(attn: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """(B, N, D) -> the packed projection, with the biases of Eva and Beit and the LoRA branch of PYRA."""
    q_bias = getattr(attn, 'q_bias', None)
    if q_bias is None:
        qkv = attn.qkv(y)
    else:
        bias = torch.cat((q_bias, attn.k_bias, attn.v_bias))
        qkv = attn.qkv(y) + bias if attn.qkv_bias_separate else F.linear(y, attn.qkv.weight, bias)
    if hasattr(attn, 'lora_a'):
        qkv = qkv + attn.lora_b(attn.lora_a(F.dropout(y, 0.1, attn.training)))
    return qkv


def size_bias(method: Method, state: State, bias: Optional[torch.Tensor] = None) -> Optional[torch.Tensor]:
    """Proportional attention (ToMe, eq. 1): log(size) of every key on top of the block's own bias."""
    if not method.prop_attn or state.size is None:
        return bias
    sizes = state.size.log()[:, None, None, :]  # B, 1, 1, N
    return sizes if bias is None else bias + sizes


def reduce_at(
        place: str,
        task: Task,
        block: nn.Module,
        x: torch.Tensor,
        state: State,
        seen: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]],
) -> Tuple[torch.Tensor, State]:
    """Let the method work, if this block reduces and `place` is the method's."""
    if task.count is None or task.method.place != place:
        return x, state
    if task.positional and state.index is None:
        state = state._replace(index=torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
    layout = task.layout
    reduced, state = task.method.reduce(x, state, Seen(
        task.layer, task.count, layout.prefix, layout.class_tokens, block, task.record, *seen))
    return reduced, state._replace(before=x, after=reduced) if task.record else state


def adapter_of(block: nn.Module, branch: torch.Tensor) -> torch.Tensor:
    """PYRA's adapter behind the MLP branch, where there is one."""
    return block.adapter(branch) if hasattr(block, 'adapter') else branch


def take_rope(rope: Optional[torch.Tensor], index: Optional[torch.Tensor], prefix: int) -> Optional[torch.Tensor]:
    """Rotary rows of the tokens that are left, from (N, 2d), (H, N, 2d), or per image (B, 1 or H, N, 2d)."""
    if rope is None or index is None:
        return rope
    index = index[:, prefix:] - prefix  # prefix tokens are not rotated
    if rope.ndim == 2:
        return rope[index].unsqueeze(1)  # B, 1, N', 2d
    if rope.ndim == 3:
        return rope[:, index].transpose(0, 1)  # H, B, N', 2d -> B, H, N', 2d
    return rope.gather(2, index[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))


def rotate(x: torch.Tensor, rope: torch.Tensor, prefix: int, half: bool) -> torch.Tensor:
    """Rotate all but the prefix tokens of (B, H, N, d)."""
    options = dict(half=True) if half else {}
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)


def relative_bias(holder: nn.Module, index: torch.Tensor) -> torch.Tensor:
    """Relative position bias between the tokens that are left: index (B, N) -> (B, H, N, N)."""
    pairs = holder.relative_position_index[index.unsqueeze(2), index.unsqueeze(1)]  # B, N, N
    return holder.relative_position_bias_table[pairs].permute(0, 3, 1, 2).contiguous()


class Backbone(abc.ABC):
    """What the loop must know of a family. `shared` is what all blocks of one call share: rotary rows, bias, grid."""
    model_types: Tuple[type, ...] = ()
    block_types: Tuple[type, ...] = ()
    attn_types: Tuple[type, ...] = ()

    def refusal(self, model: nn.Module) -> Optional[str]:
        """Why this model cannot be reduced, or None."""
        for i, block in enumerate(model.blocks):
            if type(block) not in self.block_types:
                return (f'block {i} is a {type(block).__module__}.{type(block).__qualname__}; '
                        f'only {_names(self.block_types)} is written out here')
            if type(block.attn) not in self.attn_types:
                return (f'the attention of block {i} is a {type(block.attn).__qualname__}; '
                        f'only {_names(self.attn_types)} is written out here')
        return None

    def layout(self, model: nn.Module) -> Layout:
        prefix = model.num_prefix_tokens
        fixed = not getattr(model, 'dynamic_img_size', False)
        tokens = model.patch_embed.num_patches + prefix
        return Layout(len(model.blocks), prefix, self.class_tokens(model), tokens, fixed)

    def class_tokens(self, model: nn.Module) -> int:
        return sum(getattr(model, name, None) is not None for name in ('cls_token', 'dist_token'))

    def positional(self, model: nn.Module) -> bool:
        """Blocks use positions, so that tokens must remember theirs."""
        return False

    @abc.abstractmethod
    def embed(self, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, Any]:
        """Images (B, C, H, W) -> tokens before the first block (B, N, D), and what the blocks share."""

    @abc.abstractmethod
    def step(self, model: nn.Module, x: torch.Tensor, state: State, shared: Any, task: Task,
             ) -> Tuple[torch.Tensor, State]:
        """Block `task.layer`: (B, N, D) -> (B, N', D)."""

    def heads(self, block: nn.Module) -> Heads:
        attn = block.attn
        width = attn.proj.in_features // attn.num_heads
        return Heads(attn.num_heads, width, width)


class ViT(Backbone):
    """timm's VisionTransformer with `Block`: vit, deit (distilled too), deit3, dinov2, CLIP and SigLIP towers."""
    model_types = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled)
    block_types = (vision_transformer.Block,)
    attn_types = (vision_transformer.Attention,)

    def embed(self, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, None]:
        x = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(model.patch_drop(x)), None

    def step(self, model: nn.Module, x: torch.Tensor, state: State, shared: None, task: Task,
             ) -> Tuple[torch.Tensor, State]:
        block = model.blocks[task.layer]
        attn = block.attn
        B, N, _ = x.shape
        y = block.norm1(x)
        # B, N, 3 * H * d -> 3, B, H, N, d
        q, k, v = packed_qkv(attn, y).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        out, class_row, probs = attend(attn, q, k, v, size_bias(task.method, state), task.needs)
        out = attn.norm(out.transpose(1, 2).reshape(B, N, -1))
        if getattr(attn, 'gate', None) is not None:
            out = out * attn.gate(y).sigmoid()
        x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
        seen = (q, k, v, class_row, probs)
        x, state = reduce_at('mid', task, block, x, state, seen)
        x = x + adapter_of(block, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))
        return reduce_at('end', task, block, x, state, seen)


class Eva(Backbone):
    """timm's Eva with `EvaBlock`: eva, eva02, and the rotary ViTs built on it."""
    model_types = (eva.Eva,)
    block_types = (eva.EvaBlock,)
    attn_types = tuple(getattr(eva, name) for name in ('EvaAttention', 'AttentionRope'))

    def positional(self, model: nn.Module) -> bool:
        return model.rope is not None

    def embed(self, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        x, rope = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(x), rope

    def step(self, model: nn.Module, x: torch.Tensor, state: State, shared: Optional[torch.Tensor], task: Task,
             ) -> Tuple[torch.Tensor, State]:
        block = model.blocks[task.layer]
        attn = block.attn
        B, N, _ = x.shape
        y = block.norm1(x)
        if attn.qkv is not None:
            q, k, v = packed_qkv(attn, y).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            head_dim = attn.proj.in_features // attn.num_heads
            q, k, v = (
                layer(y).unflatten(2, (-1, head_dim)).transpose(1, 2)  # B, heads (fewer for k, v if grouped), N, d
                for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, keys = attn.q_norm(q), attn.k_norm(k)
        query, k, value = q, keys, v
        rope = shared[task.layer] if shared is not None and model.rope_mixed else shared
        rope = take_rope(rope, state.index, model.num_prefix_tokens)
        if rope is not None:
            half = getattr(attn, 'rotate_half', False)
            q = rotate(q, rope, attn.num_prefix_tokens, half).type_as(v)
            k = rotate(k, rope, attn.num_prefix_tokens, half).type_as(v)
        groups = attn.num_heads // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out, class_row, probs = attend(attn, q, k, v, size_bias(task.method, state), task.needs)
        out = attn.norm(out.transpose(1, 2).reshape(B, N, -1))
        if getattr(attn, 'gate', None) is not None:
            out = out * attn.gate(y).sigmoid()
        out = attn.proj_drop(attn.proj(out))
        x = x + block.drop_path1(out if block.gamma_1 is None else block.gamma_1 * out)
        seen = (query, keys, value, class_row, probs)
        x, state = reduce_at('mid', task, block, x, state, seen)
        out = block.mlp(block.norm2(x))
        x = x + adapter_of(block, block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out))
        return reduce_at('end', task, block, x, state, seen)


class Beit(Backbone):
    """timm's Beit: relative position bias, one a block or one for all."""
    model_types = (beit.Beit,)
    block_types = (beit.Block,)
    attn_types = (beit.Attention,)

    def positional(self, model: nn.Module) -> bool:
        return model.rel_pos_bias is not None or any(
            block.attn.relative_position_bias_table is not None for block in model.blocks)

    def embed(self, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        x = model.patch_embed(images)
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        return model.pos_drop(x), model.rel_pos_bias() if model.rel_pos_bias is not None else None

    def step(self, model: nn.Module, x: torch.Tensor, state: State, shared: Optional[torch.Tensor], task: Task,
             ) -> Tuple[torch.Tensor, State]:
        block = model.blocks[task.layer]
        attn = block.attn
        B, N, _ = x.shape
        q, k, v = packed_qkv(attn, block.norm1(x)).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if attn.relative_position_bias_table is not None:
            bias = attn._get_rel_pos_bias() if state.index is None else relative_bias(attn, state.index)
        if shared is not None:
            common = shared if state.index is None else relative_bias(model.rel_pos_bias, state.index)
            bias = common if bias is None else bias + common
        out, class_row, probs = attend(attn, q, k, v, size_bias(task.method, state, bias), task.needs)
        out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(B, N, -1)))
        x = x + block.drop_path1(out if block.gamma_1 is None else block.gamma_1 * out)
        seen = (q, k, v, class_row, probs)
        x, state = reduce_at('mid', task, block, x, state, seen)
        out = block.mlp(block.norm2(x))
        x = x + adapter_of(block, block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out))
        return reduce_at('end', task, block, x, state, seen)


class PrunedViT(Backbone):
    """Our NViT: sizes of its own in every block, and a learnable scale per position on queries, keys and values."""
    model_types = (nvit.NViT,)
    block_types = (nvit.Block,)
    attn_types = (nvit.Attention,)

    def positional(self, model: nn.Module) -> bool:
        return any(block.attn.token_scale is not None for block in model.blocks)

    def embed(self, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[List[int]]]:
        return model._embed(images)

    def step(self, model: nn.Module, x: torch.Tensor, state: State, shared: Optional[List[int]], task: Task,
             ) -> Tuple[torch.Tensor, State]:
        block = model.blocks[task.layer]
        attn = block.attn
        B, N, _ = x.shape
        qkv = packed_qkv(attn, block.norm1(x))
        if attn.token_scale is not None:
            scale = attn.token_scale.unsqueeze(0)  # 1, N, 1
            if shared is not None:
                scale = resample_abs_pos_embed(
                    scale, new_size=shared, old_size=attn.scale_grid, num_prefix_tokens=attn.num_prefix_tokens)
            if state.index is not None:
                scale = take_rows(scale.expand(B, -1, -1), state.index)
            qkv = qkv * scale.to(qkv.dtype)
        qk_width = attn.num_heads * attn.qk_dim
        q, k, v = (
            part.reshape(B, N, attn.num_heads, -1).transpose(1, 2)
            for part in qkv.split([qk_width, qk_width, attn.num_heads * attn.v_dim], dim=-1))
        out, class_row, probs = attend(attn, q, k, v, size_bias(task.method, state), task.needs)
        out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(B, N, -1)))
        x = x + block.drop_path1(block.ls1(out))
        seen = (q, k, v, class_row, probs)
        x, state = reduce_at('mid', task, block, x, state, seen)
        x = x + adapter_of(block, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))
        return reduce_at('end', task, block, x, state, seen)

    def heads(self, block: nn.Module) -> Heads:
        return Heads(block.attn.num_heads, block.attn.qk_dim, block.attn.v_dim)


_BACKBONES = (ViT(), Eva(), Beit(), PrunedViT())


def _names(types: Tuple[type, ...]) -> str:
    return ' or '.join(dict.fromkeys(cls.__qualname__ for cls in types))


def backbone_of(model: nn.Module, model_type: type) -> Backbone:
    """The family of a model.

    Args:
        model: The model.
        model_type: Its class before any reduction.

    Raises:
        InputError: If no family fits, or one does but for a part that is not written out here; the message says which.
    """
    name = f'{model_type.__module__}.{model_type.__qualname__}'
    for backbone in _BACKBONES:
        if not issubclass(model_type, backbone.model_types):
            continue
        base = next(cls for cls in model_type.__mro__ if cls in backbone.model_types)
        changed = [part for part in ('forward', 'forward_features', 'forward_intermediates', 'forward_head', 'pool')
                   if getattr(model_type, part, None) is not getattr(base, part, None) or part in vars(model)]
        if changed:
            raise InputError(f'cannot reduce {name}: it has its own {", ".join(changed)} (another patch?), '
                             f'which the loop over the blocks of {base.__qualname__} would bypass')
        reason = backbone.refusal(model)
        if reason:
            raise InputError(f'cannot reduce {name}: {reason}')
        pool = getattr(model, 'attn_pool', None)
        if pool is not None and type(pool) is not AttentionPoolLatent:
            raise InputError(f'cannot reduce {name}: its pooling is a {type(pool).__qualname__}; attention pooling by '
                             'AttentionPoolLatent, class token and averages are supported')
        return backbone
    known = ', '.join(dict.fromkeys(cls.__qualname__ for backbone in _BACKBONES for cls in backbone.model_types))
    raise InputError(f'cannot reduce {name}: it is none of the plain vision transformers {known}. Windowed, '
                     'hierarchical and convolutional models need their tokens on a grid')
