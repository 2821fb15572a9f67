"""What can be removed from a vision transformer, and what goes with it.

Five kinds of units (NViT, CVPR 2023): a channel of the residual stream (`EMB`, one set for the whole model), and per
block a head, a query/key channel (`QK`), a value channel (`V`) and a hidden unit of the MLP. Query/key and value
channels are shared by all heads of a block, so that the heads stay rectangular. A unit is removed with everything
that reads or writes it: those are the dependency groups below.

A timm model is first rewritten as an `NViT` with equal blocks, which computes the same function. Everything after
that knows only the NViT.
"""
import copy
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vishub.errors import InputError
from vishub.models.nvit import NViT, uniform_dims

__all__ = ['BLOCK_KINDS', 'Key', 'Structure', 'as_nvit', 'nvit_args']

BLOCK_KINDS = ('head', 'QK', 'V', 'MLP')
Key = Tuple[str, int]  # (kind, block); the embedding, which has no block, is ('EMB', 0)
EMB: Key = ('EMB', 0)

# Divisors of the summed weight * gradient, as in the official engine.
_DIVISOR = {'head': 12.0, 'QK': 2.0, 'V': 2.0, 'MLP': 1.0}

_ACTIVATIONS = {'GELU': 'gelu', 'GELUTanh': 'gelu_tanh', 'QuickGELU': 'quick_gelu', 'ReLU': 'relu', 'SiLU': 'silu'}


def _activation_name(activation: nn.Module) -> Optional[str]:
    if isinstance(activation, nn.GELU) and getattr(activation, 'approximate', 'none') == 'tanh':
        return 'gelu_tanh'
    return _ACTIVATIONS.get(type(activation).__name__)


def _why_unsupported(model: nn.Module) -> Optional[str]:
    """The reason why this model cannot be pruned, or None."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return 'only timm VisionTransformer, its distilled DeiT form and NViT have the structure that is pruned'
    if model.pos_embed is None:
        return 'it has no absolute position embedding'
    if model.attn_pool is not None or model.global_pool not in ('', 'avg', 'token'):
        return f'its pooling ({model.global_pool}) is not token or avg'
    if getattr(model, 'pool_include_prefix', False):
        return 'its pooling includes the prefix tokens'
    norms = [module for module in (model.norm, model.fc_norm) if not isinstance(module, nn.Identity)]
    if len(norms) != 1 or not isinstance(norms[0], nn.LayerNorm):
        return 'it has no final layer norm'
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        return 'its patch embedding is not a plain convolution'
    patch_height, patch_width = model.patch_embed.patch_size
    if patch_height != patch_width:
        return 'its patches are not square'
    for block in model.blocks:
        if type(block) is not Block:
            return f'its blocks are {type(block).__name__} (parallel, post-norm and windowed blocks are not covered)'
        if type(block.attn) is not Attention:
            return f'its attention is {type(block.attn).__name__}'
        if not isinstance(block.attn.q_norm, nn.Identity) or not isinstance(block.attn.k_norm, nn.Identity):
            return 'queries and keys are normalised (q_norm, k_norm)'
        if not isinstance(getattr(block.attn, 'norm', nn.Identity()), nn.Identity) \
                or getattr(block.attn, 'gate', None) is not None:
            return 'its attention output is normalised or gated'
        if type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
            return f'its MLP is {type(block.mlp).__name__} (gated and normalised MLPs are not covered)'
        if not isinstance(block.norm1, nn.LayerNorm) or block.norm1.weight is None:
            return 'its norms are not layer norms with weights'
        if _activation_name(block.mlp.act) is None:
            return f'its activation {type(block.mlp.act).__name__} is not known'
        output_layers = (block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        if len({layer.bias is None for layer in output_layers}) > 1:
            return 'only some of its output layers have biases'
    return None


def nvit_args(model: nn.Module) -> Dict[str, Any]:
    """Constructor arguments of the `NViT` that computes what `model` (an NViT or a supported timm ViT) does.

    They are plain values (JSON). Dropout rates are left out.
    """
    block = model.blocks[0]
    if isinstance(model, NViT):
        dims, scale = model.dims, block.attn.scale
        token_scale = block.attn.token_scale is not None
    else:
        attn, hidden = block.attn, block.mlp.fc1.out_features
        dims = uniform_dims(model.embed_dim, len(model.blocks), attn.num_heads, attn.head_dim, hidden)
        scale, token_scale = attn.scale, False
    init_values = float(block.ls1.gamma.detach().mean()) if hasattr(block.ls1, 'gamma') else None
    return dict(
        img_size=list(model.patch_embed.img_size),
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        dims=copy.deepcopy(dims),
        attn_scale=float(scale),
        distilled=isinstance(model, VisionTransformerDistilled) or getattr(model, 'dist_token', None) is not None,
        token_scale=token_scale,
        class_token=model.cls_token is not None,
        reg_tokens=int(model.num_reg_tokens),
        no_embed_class=model.no_embed_class,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        fc_norm=isinstance(model.norm, nn.Identity),
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        init_values=init_values,
        norm_eps=block.norm1.eps,
        act_layer=_activation_name(block.mlp.act),
        dynamic_img_size=bool(model.dynamic_img_size),
    )


def _place(source: nn.Module) -> Dict[str, Any]:
    parameter = next(source.parameters())
    return dict(device=parameter.device, dtype=parameter.dtype)


def as_nvit(model: nn.Module) -> NViT:
    """A copy of a timm ViT (or NViT) as an NViT: same function, same mode, sizes written block by block.

    Raises:
        InputError: If the model has parts that the pruning rules do not cover.
    """
    if isinstance(model, NViT):
        return copy.deepcopy(model)
    reason = _why_unsupported(model)
    if reason:
        raise InputError(f'prune: {type(model).__name__} is not supported: {reason}')
    nvit = NViT(**nvit_args(model)).to(**_place(model))
    nvit.load_state_dict(model.state_dict())
    nvit.train(model.training)
    nvit.pretrained_cfg = copy.deepcopy(getattr(model, 'pretrained_cfg', {}))
    return nvit


class Structure:
    """The prunable units of an NViT: which are alive, what each weighs, how to silence and how to remove them.

    Args:
        model: The model; its weights are changed by `zero_dead`.

    Attributes:
        alive: {(kind, block): bool tensor, one entry a unit}.
    """

    def __init__(self, model: NViT) -> None:
        self.model = model
        dims, device = model.dims, model.pos_embed.device
        self.alive: Dict[Key, torch.Tensor] = {EMB: torch.ones(dims['EMB'], dtype=torch.bool, device=device)}
        for kind in BLOCK_KINDS:
            for index, size in enumerate(dims[kind]):
                self.alive[kind, index] = torch.ones(size, dtype=torch.bool, device=device)

    @staticmethod
    def dims_of(alive: Dict[Key, torch.Tensor]) -> Dict[str, Any]:
        """Sizes that remain when only the `alive` units are kept."""
        depth = sum(kind == 'head' for kind, _ in alive)
        return dict(
            EMB=int(alive[EMB].sum()),
            **{kind: [int(alive[kind, index].sum()) for index in range(depth)] for kind in BLOCK_KINDS})

    @property
    def dims(self) -> Dict[str, Any]:
        """Sizes that remain now."""
        return self.dims_of(self.alive)

    def _qkv_rows(self, index: int, rows: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(2hq + hv, ...) -> queries (h, q, ...), keys (h, q, ...), values (h, v, ...) as views."""
        attn = self.model.blocks[index].attn
        heads, qk_width = attn.num_heads, attn.num_heads * attn.qk_dim
        q, k, v = rows.split([qk_width, qk_width, heads * attn.v_dim])
        return q.unflatten(0, (heads, -1)), k.unflatten(0, (heads, -1)), v.unflatten(0, (heads, -1))

    @torch.no_grad()
    def saliency(self) -> Dict[Key, torch.Tensor]:
        """Second-order cost of removing each unit, from the gradients now in `.grad`: (sum of w * g / divisor) ** 2.

        With the Hessian taken as the mean of g g^T, zeroing a structure S of a trained model costs
        (sum over S of g w) ** 2 up to a factor. Non-finite values count as 0.

        Raises:
            InputError: If a weight has no gradient (no backward pass, or frozen).
        """
        model = self.model

        def products(parameter: Optional[torch.Tensor]) -> torch.Tensor:
            if parameter is None:
                return torch.zeros((), device=model.pos_embed.device)
            if parameter.grad is None:
                raise InputError('prune: a weight has no gradient; every weight of the model must be trainable')
            return (parameter * parameter.grad).float()

        patch = model.patch_embed.proj
        embedding = products(patch.weight).sum(dim=(1, 2, 3)) + products(patch.bias)
        sums: Dict[Key, torch.Tensor] = {}
        for index, block in enumerate(model.blocks):
            qkv_weight, proj = products(block.attn.qkv.weight), block.attn.proj
            fc1_weight = products(block.mlp.fc1.weight)
            embedding = embedding + qkv_weight.sum(0) + fc1_weight.sum(0)
            embedding = embedding + products(proj.weight).sum(1) + products(proj.bias)
            embedding = embedding + products(block.mlp.fc2.weight).sum(1) + products(block.mlp.fc2.bias)
            q, k, v = self._qkv_rows(index, qkv_weight.sum(1) + products(block.attn.qkv.bias))
            sums['head', index] = q.sum(1) + k.sum(1) + v.sum(1)
            sums['QK', index] = q.sum(0)  # the keys would give the same sum
            sums['V', index] = v.sum(0)
            sums['MLP', index] = fc1_weight.sum(1) + products(block.mlp.fc1.bias)
        # The official divisor of the embedding is 12, the depth of DeiT.
        saliency = {EMB: (embedding / len(model.blocks)) ** 2}
        saliency.update({key: (value / _DIVISOR[key[0]]) ** 2 for key, value in sums.items()})
        return {key: torch.nan_to_num(value, nan=0., posinf=0., neginf=0.) for key, value in saliency.items()}

    def _attention_masks(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Kept rows of the qkv layer and kept columns of the projection, as bool vectors."""
        head = self.alive['head', index][:, None]
        qk = (head & self.alive['QK', index]).flatten()  # h, q -> h * q
        v = (head & self.alive['V', index]).flatten()  # h, v -> h * v
        return torch.cat([qk, qk, v]), v

    def _dependencies(self) -> List[Tuple[Optional[torch.Tensor], int, torch.Tensor]]:
        """All (parameter, axis, kept positions along it): the dependency groups, seen from the parameters."""
        model, emb = self.model, self.alive[EMB]
        out: List[Tuple[Optional[torch.Tensor], int, torch.Tensor]] = [
            (model.patch_embed.proj.weight, 0, emb), (model.patch_embed.proj.bias, 0, emb), (model.pos_embed, 2, emb)]
        out += [(token, 2, emb) for token in (model.cls_token, model.dist_token, model.reg_token)]
        norms = [model.norm_pre, model.norm, model.fc_norm]
        for index, block in enumerate(model.blocks):
            rows, columns = self._attention_masks(index)
            hidden = self.alive['MLP', index]
            norms += [block.norm1, block.norm2]
            out += [
                (block.attn.qkv.weight, 0, rows), (block.attn.qkv.bias, 0, rows), (block.attn.qkv.weight, 1, emb),
                (block.attn.proj.weight, 1, columns), (block.attn.proj.weight, 0, emb), (block.attn.proj.bias, 0, emb),
                (block.mlp.fc1.weight, 0, hidden), (block.mlp.fc1.bias, 0, hidden), (block.mlp.fc1.weight, 1, emb),
                (block.mlp.fc2.weight, 1, hidden), (block.mlp.fc2.weight, 0, emb), (block.mlp.fc2.bias, 0, emb),
            ]
            out += [(scale.gamma, 0, emb) for scale in (block.ls1, block.ls2) if hasattr(scale, 'gamma')]
        for norm in norms:
            if isinstance(norm, nn.LayerNorm):
                out += [(norm.weight, 0, emb), (norm.bias, 0, emb)]
        out += [(head.weight, 1, emb) for head in (model.head, model.head_dist) if isinstance(head, nn.Linear)]
        return out

    @torch.no_grad()
    def zero_dead(self) -> None:
        """Silence the dead units in place. Call it again after every optimizer step."""
        for parameter, axis, kept in self._dependencies():
            if parameter is not None and not bool(kept.all()):
                shape = [1] * parameter.ndim
                shape[axis] = -1
                parameter.mul_(kept.view(shape))

    @torch.no_grad()
    def dense(self) -> NViT:
        """The smaller model of the alive units, in the same mode and place.

        Removing heads, query/key, value and MLP units is exact. Removing embedding channels is not: layer norm then
        averages over the kept channels only.
        """
        args = nvit_args(self.model)
        args['dims'] = self.dims
        smaller = NViT(**args).to(**_place(self.model))
        kept: Dict[int, torch.Tensor] = {}
        for parameter, axis, mask in self._dependencies():
            if parameter is not None:
                value = kept.get(id(parameter), parameter)
                kept[id(parameter)] = value.index_select(axis, mask.nonzero().flatten())
        smaller.load_state_dict({
            name: kept.get(id(parameter), parameter) for name, parameter in self.model.named_parameters()})
        smaller.train(self.model.training)
        smaller.pretrained_cfg = copy.deepcopy(getattr(self.model, 'pretrained_cfg', {}))
        return smaller
