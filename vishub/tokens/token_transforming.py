"""Token Transforming: each token that stays takes from many, each that goes gives to many; without training.

Paper: `Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer
Acceleration`, 2025 - https://arxiv.org/abs/2506.05709
Published is the idea, Y = W X with a dense W, and that it needs no training. Which tokens stay, how W is formed, where
and in how many blocks is not; all of that is ours and marked so.
"""
import warnings
from typing import List, Tuple

import torch
from torch import nn

from vishub.errors import InputError
from vishub.tokens.functional import similarity, spread, sum_heads, take_rows, transform_matrix
from vishub.tokens.method import Method, Seen, State, number, register_method, whole, with_prefix

__all__ = ['TokenTransforming']


class TokenTransforming(Method):
    """Many-to-many token compression between attention and MLP.

    Options (ours):
        tau: Temperature of the weights, 0 or more; 0 merges every token into its most similar anchor.
        targets: Anchors a token may go to.
        prop_attn: Weight keys by size.
        anchors: Which patch tokens stay: `class` (largest attention of the class token), `mean` (largest mean attention
            of all tokens; materialises the matrix in the reducing blocks; models without a class token get this),
            `norm` (largest L2 norm).
    """
    name = 'token_transforming'
    place = 'mid'
    merges = True
    options = dict(tau=0.1, targets=4, prop_attn=True, anchors='class')
    # Not anchors='mean': its attention matrix costs time that the budget does not count.
    choices = dict(tau=(0., 0.05, 0.1, 0.2, 0.5), targets=(1, 2, 4, 8, 16), prop_attn=(True, False),
                   anchors=('class', 'norm'))

    @classmethod
    def default_layers(cls, depth: int) -> List[int]:
        """Every block from the second to the third from the end (ours): many small steps beat few big ones."""
        return list(range(1, depth - 2)) or [0]

    def check(self, model: nn.Module) -> None:
        self.tau = number(self.tau, 'tau', 0, 1e6)
        self.targets = whole(self.targets, 'targets', 1)
        needs = {'class': {'class_row'}, 'mean': {'probs'}, 'norm': set()}
        if self.anchors not in needs:
            raise InputError(f"anchors is {self.anchors!r}; it must be 'class', 'mean' or 'norm'")
        if self.anchors == 'class' and self.layout.class_tokens == 0:
            warnings.warn("token_transforming: this model has no class token; anchors='mean' instead of 'class'",
                          stacklevel=4)
            self.anchors = 'mean'
        self.needs = frozenset(needs[self.anchors])

    def importance(self, x: torch.Tensor, seen: Seen) -> torch.Tensor:
        """(B, N) float32 scores that anchors are chosen by."""
        if self.anchors == 'class':
            return seen.class_row
        if self.anchors == 'mean':
            return seen.probs.mean(dim=(1, 2))
        return x.float().norm(dim=-1)

    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        prefix = seen.prefix
        with torch.no_grad():
            importance = self.importance(x, seen)
            order = importance[:, prefix:].argsort(dim=-1, descending=True, stable=True)
            keep = with_prefix(order[:, :seen.count - prefix].sort(dim=-1).values, prefix)  # B, prefix + M
            anchors = keep[:, prefix:]
            rest = order[:, seen.count - prefix:] + prefix  # B, n - M
            metric = sum_heads(seen.keys)  # B, N, d
            # Both in the memory order in which each token that goes looks through the anchors.
            similar = similarity(take_rows(metric, rest), take_rows(metric, anchors)).transpose(1, 2)  # B, M, n - M
            # Prefix tokens take nothing.
            onto = transform_matrix(similar, anchors, self.tau, self.targets, own=False, prefix=prefix)
        y, size = spread(x, keep, rest, onto, state.size)
        return y, State(
            size=size,
            index=None if state.index is None else state.index.gather(1, keep),
            move=_all_columns(onto[:, prefix:], anchors, rest, prefix) if seen.record else None,
            importance=importance if seen.record else None,
        )

    def overhead(self, layer: int, before: int, after: int, heads: int, head_dim: int, width: int) -> int:
        patches, anchors = before - self.layout.prefix, after - self.layout.prefix
        choice = {'class': heads * before * head_dim, 'mean': 0, 'norm': before * width}[self.anchors]
        # Similarities, and the product with the tokens that go; anchors keep themselves.
        return choice + anchors * (patches - anchors) * (head_dim + width)


def _all_columns(columns: torch.Tensor, anchors: torch.Tensor, rest: torch.Tensor, prefix: int) -> torch.Tensor:
    """Columns of the tokens that go (B, M, n - M) -> of all (B, prefix + M, prefix + n); the others keep themselves.

    `anchors` and `rest` are positions among all tokens.
    """
    B, M = anchors.shape
    stay = torch.eye(M, device=columns.device).expand(B, M, M)
    order = torch.cat([anchors, rest], dim=1).unsqueeze(1).expand(B, M, -1)
    out = columns.new_zeros(B, prefix + M, prefix + order.shape[-1])
    out.diagonal(dim1=1, dim2=2)[:, :prefix] = 1
    out[:, prefix:].scatter_(2, order, torch.cat([stay, columns], dim=2))
    return out


register_method('token_transforming', TokenTransforming)
