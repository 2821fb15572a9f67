"""PYRA: fine-tune few parameters of a frozen ViT while its tokens merge, with learned gates on what merges.

Paper: `PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation`, ECCV 2024 -
https://arxiv.org/abs/2403.09192
Official code: https://github.com/THU-MIG/PYRA (MIT, with parts derived from ToMe's CC-BY-NC code; none is part of this
hub). Built on `vishub.tokens.tome`. In each merging block, with X the tokens times their sizes, S the r source rows in
descending similarity and T the destination row of each:

    I = LayerNorm(S + T)    S <- S + S * 2 sigmoid(a^T I) * (2 sigmoid(I b^T) - 1)

before S is added into its destinations. The vector b starts at 0, hence the model at plain ToMe.
"""
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError
from vishub.tokens.functional import Plan, fold
from vishub.tokens.method import Layout, Seen, State, register_method, whole
from vishub.tokens.tome import ToMe

__all__ = [
    'PYRA', 'checkpoint_filter_fn', 'load_peft_state_dict', 'merge_lora', 'peft_state_dict', 'trainable_parameters',
]

# Published merging schedules, for 196 patches: (ViT-B, distilled DeiT-B, ViT-L).
_SCHEDULES = {
    'low': ([16] * 11 + [10], [16] * 6 + [10] * 6, [8] * 23 + [6]),
    'high': ([40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],) * 2 + (
        [20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1],),
}
_PATCHES = 196


def named_schedule(name: str, layout: Layout) -> List[int]:
    """`low` or `high`. Other depths and patch counts remove the same share at the same relative depth (ours)."""
    if name not in _SCHEDULES:
        raise InputError(f'r is {name!r}; the named schedules are: {", ".join(_SCHEDULES)}')
    base, distilled, large = _SCHEDULES[name]
    published = large if layout.depth > 18 else distilled if layout.class_tokens == 2 else base
    patches = layout.tokens - layout.prefix
    if len(published) == layout.depth and patches == _PATCHES:
        return list(published)
    gone, r = 0, []
    for layer in range(layout.depth):
        place = (layer + 1) * len(published) / layout.depth
        whole_blocks = int(place)
        removed = sum(published[:whole_blocks]) + (place - whole_blocks) * sum(published[whole_blocks:whole_blocks + 1])
        wanted = round(removed / _PATCHES * patches) - gone
        r.append(max(0, min(wanted, (patches - gone) // 2)))
        gone += r[-1]
    return r


class Adapter(nn.Module):
    """Bottleneck behind the MLP branch: z + W2 dropout(quick_gelu(W1 z)); starts as the identity."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return x + self.fc2(F.dropout(hidden * torch.sigmoid(1.702 * hidden), 0.1, self.training))


class PYRA(ToMe):
    """Modulated merging with low-rank adaptation of a frozen backbone.

    `apply` adds parameters and freezes all others; `remove` takes them away and gives back what required gradients.

    Options:
        r: As for ToMe, or `low` or `high`. No block may ask for more than half of its patch tokens: the vectors belong
            to a fixed number of pairs.
        prop_attn: Weight keys by size.
        lora: Rank of the update of every block's packed queries, keys and values; 0 for none. Starts at 0.
        adapter: Width of an adapter behind every MLP; 0 for none. Starts as the identity.
        train_head: Leave the classifier trainable.
    """
    name = 'pyra'
    options = dict(prop_attn=True, lora=8, adapter=0, train_head=True)

    def prepare_counts(self, config: Dict[str, Any]) -> None:
        if isinstance(config.get('r'), str):
            config = {**config, 'r': named_schedule(config['r'], self.layout)}
        super().prepare_counts(config)

    def check(self, model: nn.Module) -> None:
        whole(self.lora, 'lora', 0)
        whole(self.adapter, 'adapter', 0)
        if not isinstance(self.train_head, bool):
            raise InputError(f'train_head is {self.train_head!r}; it must be True or False')
        if not any(self.r):
            raise InputError('pyra modulates what merges, and r is 0 in every block; use plain LoRA without merging')
        if not (self.lora or self.adapter or self.train_head):
            raise InputError('lora=0, adapter=0 and train_head=False leave nothing to adapt to a task; '
                             'set one of them')
        if self.lora and any(getattr(block.attn, 'qkv', None) is None for block in model.blocks):
            raise InputError('lora needs queries, keys and values in one layer, and this model has three; '
                             'use lora=0 with adapter=')
        if self.layout.fixed:
            self.token_counts()

    def count(self, layer: int, tokens: int) -> int:
        r, patches = self.r[layer], tokens - self.layout.prefix
        if r > patches // 2:
            raise InputError(f'pyra: block {layer} gets {tokens} tokens and at most {patches // 2} of them can merge, '
                             f'not r={r}; its vectors fit exactly r pairs, so lower r there')
        return tokens - r

    def attach(self, model: nn.Module) -> None:
        self.required = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        for r, block in zip(self.r, model.blocks):
            like = next(block.parameters())
            place = dict(device=like.device, dtype=like.dtype)
            dim = model.embed_dim
            if r:
                block.pyra_a = nn.Parameter(torch.empty(r, 1, **place).uniform_(-1, 1))
                block.pyra_b = nn.Parameter(torch.zeros(1, dim, **place))
                block.pyra_norm = nn.LayerNorm(dim, eps=1e-5, **place)  # the backbone's is 1e-6
            if self.lora:
                block.attn.lora_a = nn.Linear(dim, self.lora, bias=False, **place)
                block.attn.lora_b = nn.Linear(self.lora, block.attn.qkv.out_features, bias=False, **place)
                nn.init.zeros_(block.attn.lora_b.weight)  # the official start is random by mistake
            if self.adapter:
                block.adapter = Adapter(dim, self.adapter).to(**place).train(block.training)  # it has dropout
        if self.train_head:
            for head in _heads(model):
                head.requires_grad_(True)

    def detach(self, model: nn.Module) -> None:
        for block in model.blocks:
            for owner, names in ((block, ('pyra_a', 'pyra_b', 'pyra_norm', 'adapter')),
                                 (block.attn, ('lora_a', 'lora_b'))):
                for name in names:
                    if hasattr(owner, name):
                        delattr(owner, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.required.get(name, True))  # a head may be new since

    def merge(self, x: torch.Tensor, plan: Plan, state: State, seen: Seen) -> Tuple[torch.Tensor, torch.Tensor]:
        block = seen.block

        def modulate(source: torch.Tensor, target: torch.Tensor, source_size: Optional[torch.Tensor],
                     target_size: Optional[torch.Tensor]) -> torch.Tensor:
            if source_size is None:
                info = block.pyra_norm(source + target)
            else:
                info = block.pyra_norm(source * source_size + target * target_size)
            channel = 2 * torch.sigmoid(block.pyra_a.t() @ info)  # B, 1, D in 0..2
            token = 2 * torch.sigmoid(info @ block.pyra_b.t()) - 1  # B, r, 1 in -1..1
            return source + source * channel * token

        return fold(x, plan, state.size, modulate)

    def overhead(self, layer: int, before: int, after: int, heads: int, head_dim: int, width: int) -> int:
        return super().overhead(layer, before, after, heads, head_dim, width) + 4 * (before - after) * width

    def config(self) -> Dict[str, Any]:
        return {**super().config(), 'lora': self.lora, 'adapter': self.adapter, 'train_head': self.train_head}


def _heads(model: nn.Module) -> Sequence[nn.Module]:
    head = model.get_classifier()
    return head if isinstance(head, tuple) else (head,)


def _is_ours(name: str) -> bool:
    """A parameter that PYRA added."""
    return any(part.startswith(('pyra_', 'lora_')) or part == 'adapter' for part in name.split('.'))


def _applied(model: nn.Module) -> PYRA:
    reduction = vars(model).get('_token_reduction')
    if reduction is None or not isinstance(reduction.method, PYRA):
        raise InputError("this needs a model with PYRA: vishub.tokens.apply(model, 'pyra', r=...) comes first")
    return reduction.method


def _trained(model: nn.Module) -> Iterator[Tuple[str, nn.Parameter]]:
    """What PYRA trains, by name: its own parameters and the head, if that was asked for."""
    train_head = _applied(model).train_head
    heads = {id(p) for head in _heads(model) for p in head.parameters()} if train_head else set()
    for name, parameter in model.named_parameters():
        if _is_ours(name) or id(parameter) in heads:
            yield name, parameter


def trainable_parameters(
        model: nn.Module,
        lr: float = 1e-3,
        pyra_lr: Optional[float] = None,
        weight_decay: float = 1e-4,
) -> List[Dict[str, Any]]:
    """Parameter groups for an optimiser, as the paper trains (AdamW).

    Args:
        model: With PYRA.
        lr: Of LoRA, adapters and head.
        pyra_lr: Of PYRA's vectors and norms, which the paper searches in 1e-5..3e-3; default `lr`. (The official
            script means to separate them but does not.)
        weight_decay: Of parameters with two or more dimensions; the others get none.
    """
    groups: Dict[Tuple[float, float], List[nn.Parameter]] = {}
    for name, parameter in _trained(model):
        rate = lr if pyra_lr is None or '.pyra_' not in name else pyra_lr
        groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.), []).append(parameter)
    return [dict(params=params, lr=rate, weight_decay=decay) for (rate, decay), params in groups.items()]


def peft_state_dict(model: nn.Module) -> Dict[str, torch.Tensor]:
    """What PYRA trained, and nothing of the backbone."""
    return {name: parameter.detach().clone() for name, parameter in _trained(model)}


def load_peft_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load what `peft_state_dict` gave, into a model with the same configuration.

    Raises:
        InputError: If names or shapes differ; nothing is loaded then.
    """
    own = dict(_trained(model))
    missing, foreign = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    if missing or foreign:
        examples = ', '.join(sorted(missing)[:3] + sorted(foreign)[:3])
        raise InputError(f'the state is of another configuration: {len(missing)} parameters are missing from it and '
                         f'{len(foreign)} are unknown here ({examples}); apply with the r, lora and adapter it has')
    for name, value in state_dict.items():
        if name.endswith('pyra_a') and len(value) != len(own[name]):
            raise InputError(f'{name} has {len(value)} rows, the schedule asks {len(own[name])}: another r')
        if value.shape != own[name].shape:
            raise InputError(f'{name} is {tuple(value.shape)}, the model has {tuple(own[name].shape)}')
    with torch.no_grad():
        for name, value in state_dict.items():
            own[name].copy_(value)


def merge_lora(model: nn.Module) -> nn.Module:
    """Add the low-rank updates to the weights they update, and drop them; PYRA's gates and adapters stay.

    Outputs are the same, the model is faster. The backbone's weights are then no longer the original ones, also after
    `remove`.
    """
    method = _applied(model)
    with torch.no_grad():
        for block in model.blocks:
            attn = block.attn
            if hasattr(attn, 'lora_a'):
                attn.qkv.weight += attn.lora_b.weight @ attn.lora_a.weight
                del attn.lora_a, attn.lora_b
    method.lora = 0
    return model


_OFFICIAL = {'.LoRA_a.': '.lora_a.', '.LoRA_b.': '.lora_b.', '.adapter.ln1.': '.adapter.fc1.',
             '.adapter.ln2.': '.adapter.fc2.'}


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Official PYRA checkpoint -> names of a model with PYRA applied."""
    del model  # names do not depend on it
    converted = {}
    for name, value in state_dict.get('model', state_dict).items():
        for official, ours in _OFFICIAL.items():
            name = name.replace(official, ours)
        converted[name] = value
    return converted


register_method('pyra', PYRA)
