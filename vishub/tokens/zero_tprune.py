"""Zero-TPrune: prune tokens by page rank on the attention graph and by similarity, without training.

Paper: `Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers`,
CVPR 2024 - https://arxiv.org/abs/2305.17328
No official code is reachable. Formulas are the paper's as far as they are public; what had to be filled in is marked
`inferred` below and in `PRESETS`.
"""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn

from vishub.errors import InputError
from vishub.tokens.functional import filter_heads, page_rank, page_rank_start, similarity, take_rows
from vishub.tokens.method import Method, Seen, State, keep_tokens, number, register_method, whole, with_prefix

__all__ = ['PRESETS', 'Preset', 'ZeroTPrune']


@dataclass(frozen=True)
class Preset:
    """A setting of the paper.

    Attributes:
        config: For `apply`.
        published: Options whose values the paper states.
        inferred: Options it leaves open, filled in here; all others are defaults.
    """
    config: Dict[str, Any]
    published: Tuple[str, ...]
    inferred: Tuple[str, ...]


# Shares of DeiT-S's multiply-accumulates are published (-34.7 % and -13 %), and the bounds of the head filter. Which
# blocks prune, how many tokens each and how many of them as similar is not published for any model.
PRESETS: Dict[str, Preset] = {
    'main': Preset(dict(macs=0.653, vmin=0.01, vmax=0.7), ('macs', 'vmin', 'vmax'), ('layers', 'share', 'votes')),
    'light': Preset(dict(macs=0.87, vmin=0.01, vmax=0.7), ('macs', 'vmin', 'vmax'), ('layers', 'share', 'votes')),
}


class ZeroTPrune(Method):
    """Importance and similarity pruning behind a block.

    Options:
        preset: `main` or `light`, see `PRESETS`; instead of counts.
        similar: {block: tokens} pruned as similar to more important ones; instead of `share`.
        share: Share of each block's removals that goes as similar (inferred), at most half of the patches.
        votes: Page rank iterations of the importance stage: an int, {block: int}, or None for 30 in the first quarter
            of the blocks, 1 in the last, 5 between (published as ranges 30-50, 5-10, 1).
        boost: Class and distillation token start with sqrt(N) (published for the class token).
        vmin, vmax: Heads whose score variance over mean lies outside are left out; vmax=None for no upper bound.
        eir: Root mean square over heads; False for the mean.
        partition: Which patches may go as similar: `sequential-u` (the less important half, published as best),
            `sequential-i` (the more important half), `alternate` (every second rank), `random`.
        feature: What similarity is measured on: `key` (all heads side by side, inferred), `query`, `value`, `x`.
        metric: `cosine`, `dot`, `euclidean` or `manhattan`.
    """
    name = 'zero_tprune'
    place = 'end'
    needs = frozenset({'probs'})
    options = dict(similar=None, share=0.5, votes=None, boost=True, vmin=0.01, vmax=0.7, eir=True,
                   partition='sequential-u', feature='key', metric='cosine')
    choices = dict(share=(0., 0.25, 0.5, 0.75, 1.), votes=(None, 1, 5), boost=(True, False), vmax=(0.7, None),
                   partition=('sequential-u', 'sequential-i', 'alternate'), feature=('key', 'value', 'x'))

    @classmethod
    def expand(cls, config: Dict[str, Any]) -> Dict[str, Any]:
        if 'preset' not in config:
            return config
        rest = {key: value for key, value in config.items() if key != 'preset'}
        if config['preset'] not in PRESETS:
            raise InputError(f'preset is {config["preset"]!r}; there are: {", ".join(PRESETS)}')
        return {**PRESETS[config['preset']].config, **rest}

    def check(self, model: nn.Module) -> None:
        self.share = number(self.share, 'share', 0, 1)
        self.vmin = number(self.vmin, 'vmin', 0, 1e9)
        if self.vmax is not None:
            self.vmax = number(self.vmax, 'vmax', 0, 1e9)
            if self.vmin > self.vmax:
                raise InputError(f'vmin is {self.vmin} and vmax {self.vmax}; no head can pass: vmin must not be larger')
        for key in ('boost', 'eir'):
            if not isinstance(getattr(self, key), bool):
                raise InputError(f'{key} is {getattr(self, key)!r}; it must be True or False')
        for key, allowed in (
                ('partition', ('sequential-u', 'sequential-i', 'alternate', 'random')),
                ('feature', ('key', 'query', 'value', 'x')),
                ('metric', ('cosine', 'dot', 'euclidean', 'manhattan'))):
            if getattr(self, key) not in allowed:
                raise InputError(f'{key} is {getattr(self, key)!r}; it must be one of {", ".join(allowed)}')
        depth = self.layout.depth
        for key, low in (('votes', 1), ('similar', 0)):
            value = getattr(self, key)
            if isinstance(value, dict):
                for layer, entry in value.items():
                    whole(layer, f'a block index in {key}', 0, depth - 1)
                    whole(entry, f'{key}[{layer}]', low)
            elif value is not None:
                if key == 'similar':
                    raise InputError(f'similar is {value!r}; it must be a dict {{block: tokens}}')
                whole(value, key, low)
        before = self.layout.tokens
        for layer, after in enumerate(self.token_counts() if self.layout.fixed else ()):
            self.similar_count(layer, before, after)
            before = after

    def vote_count(self, layer: int) -> int:
        """Page rank iterations of the importance stage behind block `layer`."""
        if isinstance(self.votes, int):
            return self.votes
        if self.votes is not None and layer in self.votes:
            return self.votes[layer]
        depth = self.layout.depth
        return 30 if 4 * layer < depth else 1 if 4 * layer >= 3 * depth else 5

    def similar_count(self, layer: int, before: int, after: int) -> int:
        """Patches that go as similar when a block has to come down from `before` to `after` tokens."""
        patches, removed = before - self.layout.prefix, before - after
        if self.similar is None:
            return min(int(removed * self.share), patches // 2)
        count = self.similar.get(layer, 0)
        if count > patches // 2:
            raise InputError(f'similar[{layer}] is {count}; at most {patches // 2} of {patches} patch tokens can be '
                             'removed as similar')
        if count > removed:
            raise InputError(f'similar[{layer}] is {count}, but block {layer} removes {removed} tokens in all; '
                             f'lower it or tokens_after[{layer}]')
        return count

    def importance(self, seen: Seen, votes: int, mask: Optional[torch.Tensor] = None, gone: int = 0) -> torch.Tensor:
        """Page rank, head filter and aggregation: (B, N). `mask` (B, 1, N) as in `page_rank`, 0 for `gone` tokens."""
        N = seen.probs.shape[-1]
        start = page_rank_start(N, seen.class_tokens, self.boost, N - gone, seen.probs.device)
        scores = page_rank(seen.probs, votes, start, mask)
        return filter_heads(scores, seen.prefix, self.vmin, self.vmax, self.eir, N - gone - seen.prefix)

    def similar_patches(self, x: torch.Tensor, seen: Seen, importance: torch.Tensor, count: int) -> torch.Tensor:
        """Stage S: (B, count) positions among the patches of those most similar to one of the other part."""
        order = importance[:, seen.prefix:].argsort(dim=-1, descending=True, stable=True)
        n = order.shape[1]
        if self.partition == 'alternate':
            stay, go = order[:, ::2], order[:, 1::2]
        elif self.partition == 'sequential-i':
            go, stay = order[:, :n // 2], order[:, n // 2:]
        else:
            if self.partition == 'random':
                order = torch.rand(order.shape, device=order.device).argsort(dim=-1)
            stay, go = order[:, :n - n // 2], order[:, n - n // 2:]
        if self.feature == 'x':
            feature = x
        else:
            part = dict(key=seen.keys, query=seen.query, value=seen.value)[self.feature]
            feature = part.transpose(1, 2).flatten(2)  # B, H, N, d -> B, N, H * d
        go_rows, stay_rows = (take_rows(feature, part + seen.prefix) for part in (go, stay))
        alike = similarity(go_rows, stay_rows, self.metric).amax(dim=-1)
        first = alike.argsort(dim=-1, descending=True, stable=True)[:, :count]
        return go.gather(1, first)

    @torch.no_grad()
    def choose(self, x: torch.Tensor, seen: Seen) -> Tuple[torch.Tensor, torch.Tensor]:
        """Positions (B, count) of the tokens that stay, and the importance (B, N) they were ranked by."""
        before, prefix = x.shape[1], seen.prefix
        votes = self.vote_count(seen.layer)
        similar = self.similar_count(seen.layer, before, seen.count)
        if similar:
            gone = self.similar_patches(x, seen, self.importance(seen, 1), similar) + prefix
            mask = torch.ones(x.shape[:2], device=x.device).scatter_(1, gone, 0.)
            # What went as similar has no edges left: votes are cast on the graph of the others (inferred).
            importance = self.importance(seen, votes, mask.unsqueeze(1), similar)
            ranked = importance + (mask - 1)  # below all that stay
        else:
            importance = ranked = self.importance(seen, votes)
        order = ranked[:, prefix:].argsort(dim=-1, descending=True, stable=True)
        chosen = order[:, :seen.count - prefix].sort(dim=-1).values
        return with_prefix(chosen, prefix), importance

    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        keep, importance = self.choose(x, seen)
        return keep_tokens(x, state, keep, seen.record, importance)

    def overhead(self, layer: int, before: int, after: int, heads: int, head_dim: int, width: int) -> int:
        n, votes = before - self.layout.prefix, self.vote_count(layer)
        similar = self.similar_count(layer, before, after)
        ranks = votes + (1 if similar else 0)
        # Similar tokens are masked out of a graph of full size; its row sums cost one vote more.
        return (ranks + (1 if similar else 0)) * heads * before ** 2 + (
            ((n + 1) // 2) * (n // 2) * heads * head_dim if similar else 0)


register_method('zero_tprune', ZeroTPrune)
