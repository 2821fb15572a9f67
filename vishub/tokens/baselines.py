"""What every method has to beat at the same counts: chance, a regular grid, and the class token's attention."""
from typing import Tuple

import torch
from torch import nn

from vishub.errors import InputError
from vishub.tokens.method import Method, Seen, State, keep_tokens, register_method, with_prefix

__all__ = ['ClassAttention', 'Random', 'Uniform']


class Random(Method):
    """Keep patch tokens drawn anew in every forward, from torch's global generator (`torch.manual_seed`)."""
    name = 'random'

    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        B, N = x.shape[:2]
        draw = torch.rand(B, N - seen.prefix, device=x.device)
        chosen = draw.topk(seen.count - seen.prefix, dim=-1, sorted=False).indices.sort(dim=-1).values
        return keep_tokens(x, state, with_prefix(chosen, seen.prefix), seen.record)


class Uniform(Method):
    """Keep patch tokens at equal distances in the order of the sequence."""
    name = 'uniform'

    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        B, N = x.shape[:2]
        wanted = seen.count - seen.prefix
        # The middle of each of `wanted` equal stretches: (2 i + 1) n / (2 wanted), rounded down.
        steps = torch.arange(wanted, device=x.device) * 2 + 1
        chosen = torch.div(steps * (N - seen.prefix), 2 * wanted, rounding_mode='floor').expand(B, wanted)
        return keep_tokens(x, state, with_prefix(chosen, seen.prefix), seen.record)


class ClassAttention(Method):
    """Keep the patch tokens that the class token attends to most, averaged over heads.

    The selection of EViT (ICLR 2022, arXiv 2202.07800, section 3.2), between attention and MLP; the tokens that go are
    dropped, not fused. Equal attention: the earlier token stays.
    """
    name = 'class_attention'
    place = 'mid'
    needs = frozenset({'class_row'})

    def check(self, model: nn.Module) -> None:
        if self.layout.class_tokens == 0:
            raise InputError("class_attention goes by the class token's attention, and this model has no class token; "
                             "'zero_tprune' and 'tome' do without one")

    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        scores = seen.class_row[:, seen.prefix:]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        chosen = order[:, :seen.count - seen.prefix].sort(dim=-1).values
        return keep_tokens(x, state, with_prefix(chosen, seen.prefix), seen.record, seen.class_row)

    def overhead(self, layer: int, before: int, after: int, heads: int, head_dim: int, width: int) -> int:
        return heads * before * head_dim


register_method('random', Random)
register_method('uniform', Uniform)
register_method('class_attention', ClassAttention)
