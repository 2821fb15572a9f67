"""What a reduced model costs, counted from its layers without running it, and counts that meet a budget.

Multiply-accumulates, as in the papers (which call them FLOPs): convolution, linear layers and the two products of
attention. Norms, activations and pooling by average are not counted. What deciding costs is kept apart (`overhead`).
"""
import operator
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import nn

from vishub.errors import InputError
from vishub.tokens.backbones import Backbone, backbone_of
from vishub.tokens.method import Counts, Layout, Method, find_method, number, whole

__all__ = ['Macs', 'counter', 'macs', 'schedule']


class Macs(NamedTuple):
    """Multiply-accumulates for one image.

    Attributes:
        total: Patch embedding, blocks and head, without overhead.
        per_block: Of every block.
        tokens_mid: Tokens in every block's MLP.
        tokens_end: Tokens behind every block.
        overhead: What deciding which tokens to merge or prune adds.
    """
    total: int
    per_block: List[int]
    tokens_mid: List[int]
    tokens_end: List[int]
    overhead: int


class _Price(NamedTuple):
    """One block: linear layers of attention and of the rest (a token), products of attention (a pair of tokens)."""
    attn: int
    mlp: int
    pair: int


def _linear(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _prices(model: nn.Module, backbone: Backbone) -> List[_Price]:
    prices = []
    for block in model.blocks:
        heads, query, value = backbone.heads(block)
        attn = _linear(block.attn)
        prices.append(_Price(attn, _linear(block) - attn, heads * (query + value)))
    return prices


def _stem(model: nn.Module, patches: int) -> int:
    proj = getattr(model.patch_embed, 'proj', None)
    if not isinstance(proj, (nn.Conv2d, nn.Linear)) or hasattr(model.patch_embed, 'backbone'):
        raise InputError(f'macs: cannot count a {type(model.patch_embed).__qualname__}; '
                         'only a patch embedding of one convolution is known')
    return proj.weight.numel() * patches


def _head(model: nn.Module, tokens: int) -> int:
    heads = (getattr(model, name, None) for name in ('head', 'head_dist'))
    total = sum(_linear(head) for head in heads if head is not None)
    pool = getattr(model, 'attn_pool', None)
    if pool is not None:
        if not getattr(model, 'pool_include_prefix', True):
            tokens -= model.num_prefix_tokens
        rest = _linear(pool) - _linear(pool.kv)  # query, output and MLP see the latent tokens only
        total += _linear(pool.kv) * tokens + pool.latent_len * (rest + 2 * pool.kv.in_features * tokens)
    return total


def _blocks(prices: Sequence[_Price], tokens: int, counts: Sequence[int], place: str) -> List[int]:
    """Cost of every block when `counts` tokens leave them and `tokens` enter the first."""
    costs = []
    for price, count in zip(prices, counts):
        middle = count if place == 'mid' else tokens
        costs.append(price.attn * tokens + price.pair * tokens ** 2 + price.mlp * middle)
        tokens = count
    return costs


def _of(model: nn.Module) -> Tuple[Optional[Method], Backbone, Layout]:
    reduction = vars(model).get('_token_reduction')
    if reduction is not None:
        return reduction.method, reduction.backbone, reduction.backbone.layout(model)  # the size may be new since
    backbone = backbone_of(model, type(model))
    return None, backbone, backbone.layout(model)


def _patches(model: nn.Module, layout: Layout, input_size: Union[int, Sequence[int], None]) -> int:
    if input_size is None:
        return layout.tokens - layout.prefix
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    patch = model.patch_embed.patch_size
    if len(size) != 2 or any(side < p for side, p in zip(size, patch)):
        raise InputError(f'macs: input_size is {input_size!r}; it must be (height, width), at least one patch {patch}')
    rows, columns = model.patch_embed.dynamic_feat_size(size)
    return rows * columns


def macs(model: nn.Module, input_size: Union[int, Sequence[int], None] = None) -> Macs:
    """Count a model, reduced or not, without running it.

    Args:
        model: As for `apply`.
        input_size: Image (height, width), (channels, height, width) or one side; default the model's own.

    Raises:
        InputError: If the model is none of the supported ones, or the size does not hold a patch.
    """
    method, backbone, layout = _of(model)
    patches = _patches(model, layout, input_size)
    tokens = patches + layout.prefix
    counts = [tokens] * len(model.blocks) if method is None else method.token_counts(tokens)[:len(model.blocks)]
    place = 'end' if method is None else method.place
    per_block = _blocks(_prices(model, backbone), tokens, counts, place)
    entering = [tokens, *counts[:-1]]
    overhead = 0
    for layer, (before, after) in enumerate(zip(entering, counts)):
        if after != before:
            heads, query, _ = backbone.heads(model.blocks[layer])
            overhead += method.overhead(layer, before, after, heads, query, model.embed_dim)
    total = _stem(model, patches) + sum(per_block) + _head(model, counts[-1])
    return Macs(total, per_block, list(counts) if place == 'mid' else entering, list(counts), overhead)


def counter(model: nn.Module, place: str) -> Tuple[Layout, Callable[[Sequence[int]], int]]:
    """The model's layout, and a function from tokens behind every block to its multiply-accumulates without overhead.

    Args:
        model: As for `apply`.
        place: `mid` or `end`, where in a block its tokens become fewer.
    """
    _, backbone, layout = _of(model)
    prices = _prices(model, backbone)
    stem = _stem(model, layout.tokens - layout.prefix)

    def cost(counts: Sequence[int]) -> int:
        return stem + sum(_blocks(prices, layout.tokens, counts, place)) + _head(model, counts[-1])

    return layout, cost


def schedule(
        model: nn.Module,
        method: str,
        macs: Optional[float] = None,
        tokens_after: Optional[int] = None,
        layers: Optional[Sequence[int]] = None,
        **options: Any,
) -> Dict[str, Any]:
    """The largest counts that meet a budget: an equal share of patches kept, or equally many merged, in each layer.

    Args:
        model: As for `apply`; its own image size counts.
        method: Name of the method.
        macs: Share of the full model's multiply-accumulates, in (0, 1]; overhead not included.
        tokens_after: Instead of `macs`: tokens that may be left behind the last block.
        layers: Blocks that reduce; default the method's.
        options: The method's other options, which `apply` takes; they change no counts.

    Returns:
        `dict(tokens_after={block: tokens})`, or `dict(r=[...])` for merging methods: for `apply`.

    Raises:
        InputError: If the budget is out of range or cannot be met; the message names what can.
    """
    cls = find_method(method)
    layout, cost = counter(model, cls.place)
    if (macs is None) == (tokens_after is None):
        raise InputError('schedule: give either macs=share or tokens_after=tokens behind the last block')
    for name in ('tokens_after', 'keep', 'r'):
        if name in options:
            raise InputError(f'{name}= says how many tokens stay already; leave out macs=')
    layers = sorted(set(cls.default_layers(layout.depth) if layers is None else layers))
    for layer in layers:
        whole(layer, 'a block index in layers', 0, layout.depth - 1)
    full = cost([layout.tokens] * layout.depth)
    if macs is not None:
        limit, measure = number(macs, 'macs', 0, 1, above=True) * full, cost
    else:
        limit = whole(tokens_after, 'tokens_after', layout.prefix + 1, layout.tokens)
        measure = operator.itemgetter(-1)
    solve = _solve_merging if 'r' in cls.count_options else _solve_keeping
    found, least = solve(layout, layers, measure, limit)
    if found is None:
        least = f'macs={least / full:.3f}' if macs is not None else f'tokens_after={least}'
        asked = f'macs={macs}' if macs is not None else f'tokens_after={tokens_after}'
        raise InputError(f'schedule: {asked} cannot be met by {method} in blocks {layers}; {least} can')
    return found


Measure = Callable[[Sequence[int]], int]


def _solve_keeping(layout: Layout, layers: Sequence[int], measure: Measure, limit: float,
                   ) -> Tuple[Optional[Dict[str, Any]], int]:
    """Largest share of patches kept in each layer; None and the least measure if even one patch each is too much."""
    def counts(share: float) -> List[int]:
        rule = Counts(layout, keep={layer: share for layer in layers})
        tokens, out = layout.tokens, []
        for layer in range(layout.depth):
            tokens = rule(layer, tokens)
            out.append(tokens)
        return out

    low, high = 1e-6, 1.
    if measure(counts(low)) > limit:
        return None, measure(counts(low))
    if measure(counts(high)) <= limit:
        low = high
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if measure(counts(middle)) <= limit else (low, middle)
    solution = counts(low)
    return {'tokens_after': {layer: solution[layer] for layer in layers}}, measure(solution)


def _solve_merging(layout: Layout, layers: Sequence[int], measure: Measure, limit: float,
                   ) -> Tuple[Optional[Dict[str, Any]], int]:
    """Fewest tokens merged in all, spread evenly over the layers, the earlier ones first."""
    def merged(total: int) -> Tuple[List[int], List[int]]:
        tokens, r, counts = layout.tokens, [0] * layout.depth, []
        for layer in range(layout.depth):
            if layer in layers:
                place = layers.index(layer)
                wanted = total // len(layers) + (place < total % len(layers))
                r[layer] = min(wanted, (tokens - layout.prefix) // 2)
                tokens -= r[layer]
            counts.append(tokens)
        return r, counts

    low, high = 0, len(layers) * ((layout.tokens - layout.prefix) // 2)
    least = measure(merged(high)[1])
    if least > limit:
        return None, least
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(merged(middle)[1]) <= limit else (middle + 1, high)
    return {'r': merged(low)[0]}, measure(merged(low)[1])
