"""ToMe: merge the most similar tokens in every block, without training.

Paper: `Token Merging: Your ViT But Faster`, ICLR 2023 - https://arxiv.org/abs/2210.09461
Official code: https://github.com/facebookresearch/ToMe (CC-BY-NC 4.0; no part of this hub).
"""
import warnings
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from torch import nn

from vishub.errors import InputError
from vishub.tokens.functional import Plan, bipartite_matching, merge, sum_heads
from vishub.tokens.method import Method, Seen, State, number, register_method, whole

__all__ = ['ToMe', 'merge_schedule']


def merge_schedule(r: Union[int, Tuple[int, float], Sequence[int]], depth: int) -> List[int]:
    """Tokens to merge in every block.

    Args:
        r: An int: the same in every block. A tuple (r, inflection): changing linearly with the mean r, from 2r down
            to 0 at inflection -1, from 0 up to 2r at 1. A list: as it is, filled up with zeros.
        depth: Blocks.

    Raises:
        InputError: On negative or fractional counts, an inflection outside [-1, 1], or a list longer than `depth`.
    """
    if isinstance(r, int) and not isinstance(r, bool):
        return [whole(r, 'r')] * depth
    if isinstance(r, tuple) and len(r) == 2:
        mean, inflection = whole(r[0], 'r'), number(r[1], 'the inflection of r', -1, 1)
        low = int(mean * (1 - inflection))
        step = (2 * mean - 2 * low) / (depth - 1) if depth > 1 else 0
        return [int(low + step * i) for i in range(depth)]
    if isinstance(r, (list, tuple)):
        if len(r) > depth:
            raise InputError(f'r has {len(r)} entries, but the model only has {depth} blocks')
        return [whole(entry, f'r[{i}]') for i, entry in enumerate(r)] + [0] * (depth - len(r))
    raise InputError(f'r is {r!r}; it must be an integer, (integer, inflection) or a list of integers')


class ToMe(Method):
    """Token merging.

    Options:
        r: See `merge_schedule`; more than half of a block's patch tokens is clamped to half.
        prop_attn: Weight keys by size. Advised for supervised weights and whatever was trained with merging; False for
            MAE weights off the shelf.
    """
    name = 'tome'
    place = 'mid'
    merges = True
    options = {'prop_attn': True}
    choices = {'prop_attn': (True, False)}
    count_options = ('r',)

    @classmethod
    def default_layers(cls, depth: int) -> List[int]:
        """Every block."""
        return list(range(depth))

    def prepare_counts(self, config: Dict[str, Any]) -> None:
        if 'r' not in config:
            raise InputError(f'{self.name}: say how many tokens merge in every block, r=, or macs=share')
        self.r = merge_schedule(config['r'], self.layout.depth)

    def check(self, model: nn.Module) -> None:
        tokens = self.layout.tokens
        for layer, r in enumerate(self.r):
            left = self.count(layer, tokens)
            if tokens - left < r:
                warnings.warn(f'{self.name}: block {layer} has {tokens - self.layout.prefix} patch tokens; '
                              f'{tokens - left} of them merge, not r={r}', stacklevel=4)
                return
            tokens = left

    def count(self, layer: int, tokens: int) -> int:
        return tokens - min(self.r[layer], (tokens - self.layout.prefix) // 2)

    def merge(self, x: torch.Tensor, plan: Plan, state: State, seen: Seen) -> Tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, M, D) and sizes (B, M) after the plan."""
        return merge(x, plan, state.size)

    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        with torch.no_grad():
            plan = bipartite_matching(sum_heads(seen.keys), x.shape[1] - seen.count, seen.prefix)
        x, size = self.merge(x, plan, state, seen)
        return x, State(
            size=size,
            index=None if state.index is None else state.index.gather(1, plan.keep),
            move=plan.assignment() if seen.record else None,
        )

    def overhead(self, layer: int, before: int, after: int, heads: int, head_dim: int, width: int) -> int:
        return ((before + 1) // 2) * (before // 2) * head_dim

    def config(self) -> Dict[str, Any]:
        return {'r': list(self.r), 'prop_attn': self.prop_attn}


register_method('tome', ToMe)
