"""The arithmetic of token reduction on plain tensors: no model, no state, no host synchronisation.

Shapes: B images, N tokens of which the first `prefix` (class, distillation, registers) never merge or leave, D width,
H heads, d head width. Similarities, importance and sizes are float32 whatever the tokens are. Indices are int64.

Sources: ToMe, ICLR 2023 (arXiv 2210.09461) sections 3.1-3.2; Zero-TPrune, CVPR 2024 (arXiv 2305.17328) section 3;
Token Transforming (arXiv 2506.05709), of which only the idea is published and the concrete form is ours.
"""
import math
from contextlib import nullcontext
from typing import Callable, ContextManager, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from vishub.errors import InputError

__all__ = [
    'Plan', 'bipartite_matching', 'filter_heads', 'fold', 'merge', 'merge_sizes', 'page_rank', 'page_rank_start',
    'similarity', 'spread', 'sum_heads', 'take_rows', 'transform', 'transform_matrix', 'unmerge',
]


def full_precision(x: torch.Tensor) -> ContextManager:
    """Similarities decide which tokens go: keep autocast from computing them in half precision."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # the meta device has no autocast to ask for
        return nullcontext()
    return torch.autocast(device, enabled=False)


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of (B, N, ...) by (B, M) int64 -> (B, M, ...).

    One flat `index_select` copies whole rows, where `gather` would move single elements.
    """
    rows = _flat(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, rows).view(*index.shape, *x.shape[2:])


def _flat(index: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, M) positions in sequences of `rows` tokens -> (B * M) positions in all of them laid end to end."""
    start = torch.arange(0, index.shape[0] * rows, rows, device=index.device)
    return (index + start.unsqueeze(1)).flatten()


def sum_heads(keys: torch.Tensor) -> torch.Tensor:
    """(B, H, N, d) -> (B, N, d) float32: points where the mean over heads does."""
    if keys.is_cuda:
        return keys.sum(dim=1, dtype=torch.float32)
    # On the CPU head after head is a third faster than the reduction, which is built for long rows.
    first, *others = keys.unbind(dim=1)
    return sum(others, first.float())


class Plan(NamedTuple):
    """Which tokens merge into which, N -> M = N - r.

    Attributes:
        keep: (B, M) old positions of the tokens that stay, in their new order (prefix tokens first).
        source: (B, r) old positions of the tokens that merge away, most similar pair first.
        target: (B, r) new positions of their destinations; several sources may share one.
    """
    keep: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor

    def assignment(self) -> torch.Tensor:
        """(B, N) int64: for every old token the new token it is in."""
        B, M = self.keep.shape
        out = self.keep.new_empty(B, M + self.source.shape[1])
        out.scatter_(1, self.keep, torch.arange(M, device=out.device).expand(B, M))
        return out.scatter_(1, self.source, self.target)


def bipartite_matching(metric: torch.Tensor, r: int, prefix: int = 1) -> Plan:
    """Bipartite soft matching (ToMe, section 3.1): the r most similar pairs between even and odd positions.

    Args:
        metric: (B, N, d) what similarity is measured on (cosine), usually the keys averaged over heads. A vector of
            norm 0 is similar to nothing (cosine 0).
        r: Tokens to merge away; more than half of the patch tokens is clamped to half.
        prefix: Leading tokens that neither merge nor receive.

    Returns:
        The plan. Order of the tokens that stay: prefix, unmerged even positions, all odd positions. Without prefix
        tokens the unmerged even positions come in order of similarity, as in the official code.

    Raises:
        InputError: If r is negative or `prefix` exceeds N.
    """
    B, N = metric.shape[:2]
    if r < 0:
        raise InputError(f'bipartite_matching: r is {r}; it must be 0 or more')
    if not 0 <= prefix <= N:
        raise InputError(f'bipartite_matching: prefix is {prefix}; it must be in 0..{N}')
    r = min(r, (N - prefix) // 2)
    positions = torch.arange(N, device=metric.device)
    if r == 0:
        none = positions.new_empty(B, 0)
        return Plan(positions.expand(B, N), none, none)
    # Parity counts from the class token. Slicing the prefix off here protects it without masks of -inf.
    even = positions[prefix + prefix % 2::2]
    odd = positions[prefix + 1 - prefix % 2::2]
    with torch.no_grad(), full_precision(metric):
        metric = metric.float()
        unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        scores = torch.bmm(unit[:, prefix + prefix % 2::2], unit[:, prefix + 1 - prefix % 2::2].transpose(1, 2))
        best, partner = scores.max(dim=-1)  # B, even
        order = best.argsort(dim=-1, descending=True, stable=True)
        ranked = even[order]
        source, stay = ranked[:, :r], ranked[:, r:]
        if prefix:
            stay = stay.sort(dim=-1).values
        keep = torch.cat([positions[:prefix].expand(B, -1), stay, odd.expand(B, -1)], dim=1)
        target = partner.gather(1, order[:, :r]) + (prefix + stay.shape[1])
        return Plan(keep, source, target)


def merge_sizes(plan: Plan, size: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Sizes (B, N) float32 (None: all 1) -> (B, M): a destination grows by its sources."""
    if size is None:
        kept = torch.ones(plan.keep.shape, device=plan.keep.device)
        return kept.scatter_add_(1, plan.target, torch.ones(plan.target.shape, device=plan.keep.device))
    return size.gather(1, plan.keep).scatter_add_(1, plan.target, size.gather(1, plan.source))


# (source rows, destination rows, size of the sources (B * r, 1), size of the destinations) -> source rows, see `fold`
Modulate = Callable[[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]], torch.Tensor]


def fold(
        x: torch.Tensor,
        plan: Plan,
        size: Optional[torch.Tensor] = None,
        modulate: Optional[Modulate] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Average the sources into their destinations, touching no row but the destinations.

    Args:
        x: (B, N, D) tokens.
        plan: Of `bipartite_matching`.
        size: (B, N) float32, or None for all 1.
        modulate: Changes the sources before they are added: called with their rows and those of their destinations
            (B, r, D), and the sizes of both (B, r, 1) or None; returns (B, r, D). A source counts with its own size.

    Returns:
        Tokens (B, M, D) and sizes (B, M).
    """
    shape = (*plan.target.shape, -1)  # B, r, D
    kept = take_rows(x, plan.keep)
    target = _flat(plan.target, kept.shape[1])
    rows = kept.flatten(0, 1)  # a view: what is added here is added to `kept`
    source = take_rows(x, plan.source)
    old = rows.index_select(0, target).view(shape)  # destinations before any merging
    new_size = merge_sizes(plan, size)
    share = new_size.gather(1, plan.target).reciprocal()  # B, r
    if size is not None:
        source_size = size.gather(1, plan.source)
        share = share * source_size
    if modulate is not None and size is not None:
        old_size = size.gather(1, plan.keep.gather(1, plan.target))
        source = modulate(source, old, source_size.unsqueeze(-1).to(x.dtype), old_size.unsqueeze(-1).to(x.dtype))
    elif modulate is not None:
        source = modulate(source, old, None, None)
    # (size_b b + sum size_s s) / new = b + sum size_s (s - b) / new: one addition a source, also where they share b.
    delta = (source - old) * share.unsqueeze(-1).to(x.dtype)
    rows.index_add_(0, target, delta.flatten(0, 1).to(rows.dtype))
    return kept, new_size


def merge(
        x: torch.Tensor,
        plan: Plan,
        size: Optional[torch.Tensor] = None,
        mode: str = 'mean',
        backend: str = 'scatter',
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Merge tokens by a plan.

    Args:
        x: (B, N, D).
        plan: Of `bipartite_matching`.
        size: (B, N) float32 tokens that each token stands for; None for 1 each. Weights of the mean.
        mode: `mean` (weighted by size, the destination included), `sum` or `amax` (both ignore size).
        backend: `scatter`, or `matmul` for runtimes without scatter (mode `mean` only).

    Returns:
        Tokens (B, M, D) and their sizes (B, M) float32.

    Raises:
        InputError: On an unknown mode or backend.
    """
    if mode not in ('mean', 'sum', 'amax') or backend not in ('scatter', 'matmul'):
        raise InputError(f"merge: mode is 'mean', 'sum' or 'amax' and backend 'scatter' or 'matmul', "
                         f'not {mode!r} and {backend!r}')
    if backend == 'matmul':
        if mode != 'mean':
            raise InputError(f"merge: backend 'matmul' computes the mean only, not {mode!r}")
        N = x.shape[1]
        weight = F.one_hot(plan.assignment(), plan.keep.shape[1]).transpose(1, 2).float()  # B, M, N
        if size is not None:
            weight = weight * size.unsqueeze(1)
        new_size = weight @ x.new_ones(N, 1, dtype=torch.float32)  # B, M, 1
        return (weight / new_size).to(x.dtype) @ x, new_size.squeeze(-1)
    if mode == 'mean':
        return fold(x, plan, size)
    index = plan.target.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    merged = take_rows(x, plan.keep).scatter_reduce(1, index, take_rows(x, plan.source), reduce=mode)
    return merged, merge_sizes(plan, size)


def unmerge(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(B, M, D) -> (B, N, D): every old position gets a copy of the token it was merged into."""
    return take_rows(x, plan.assignment())


def page_rank_start(
        tokens: int,
        class_tokens: int,
        boost: bool = True,
        present: Optional[int] = None,
        device: Union[str, torch.device, None] = None,
) -> torch.Tensor:
    """First scores of weighted page rank: 1 a token, sqrt(N) a class-like token (`boost`), over their sum.

    Args:
        tokens: N.
        class_tokens: Leading tokens that are boosted.
        boost: False gives all tokens the same score.
        present: How many of the tokens take part in a vote with a mask: N under the root, and what the sum is over.

    Returns:
        (N,) float32; the scores of those present sum to 1.
    """
    present = tokens if present is None else present
    weight = math.sqrt(present) if boost else 1.
    total = present + class_tokens * (weight - 1)
    start = torch.full((tokens,), 1 / total, device=device)
    start[:class_tokens] = weight / total
    return start


def page_rank(
        attn: torch.Tensor,
        iterations: int,
        start: Optional[torch.Tensor] = None,
        mask: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Weighted page rank (Zero-TPrune, section 3.2): `iterations` votes s <- s A, no damping.

    Args:
        attn: (..., N, N) attention probabilities, rows (queries) sum to 1.
        iterations: Votes, 1 or more.
        start: (..., N) first scores, those inside the mask sum to 1; None for equal ones.
        mask: (..., N) 0/1 float32: vote on the graph of these tokens alone, its rows renormalised. Exact, and without
            a copy of the matrix.

    Returns:
        (..., N) float32 scores that sum to 1; 0 outside the mask.

    Raises:
        InputError: If `iterations` is below 1.
    """
    if iterations < 1:
        raise InputError(f'page_rank: iterations is {iterations}; at least one vote is needed')
    N = attn.shape[-1]
    with full_precision(attn):
        if start is None:
            start = attn.new_ones(N, dtype=torch.float32) if mask is None else mask
            start = start / start.sum(-1, keepdim=True)
        matrix = attn.float().reshape(-1, N, N)
        score = start.expand(attn.shape[:-1]).reshape(-1, 1, N)  # a row times the matrix streams the matrix's rows
        if mask is None:
            return _vote(score, None, matrix, iterations, attn.shape[:-1])
        mask = mask.expand(attn.shape[:-1]).reshape(-1, 1, N)
        row_sum = torch.bmm(mask, matrix.transpose(1, 2))  # what of each row stays inside
        # A row that looks at nobody inside has no vote to give; the floor only avoids 0 / 0.
        give = mask / row_sum.clamp_min(torch.finfo(torch.float32).tiny)
        return _vote(score, give, matrix, iterations, attn.shape[:-1]) * mask.view(attn.shape[:-1])


def _vote(
        score: torch.Tensor,
        give: Optional[torch.Tensor],
        matrix: torch.Tensor,
        iterations: int,
        shape: Sequence[int],
) -> torch.Tensor:
    """Scores (G, 1, N) after the votes of G graphs (G, N, N), as `shape` (..., N); `give` (G, 1, N) scales what a token
    has to give."""
    heads = shape[-2] if len(shape) > 1 else 1
    if iterations < 4 or matrix.is_cuda or torch.compiler.is_compiling():
        for _ in range(iterations):
            score = torch.bmm(score if give is None else score * give, matrix)
        return score.view(shape)
    # All votes of one head after the other: its graphs stay in the CPU's cache, which halves the time of many votes.
    parts = []
    for head in range(heads):
        graphs, part = matrix[head::heads], score[head::heads]
        giving = None if give is None else give[head::heads]
        for _ in range(iterations):
            part = torch.bmm(part if giving is None else part * giving, graphs)
        parts.append(part)
    return torch.stack(parts, dim=1).view(shape)


def filter_heads(
        scores: torch.Tensor,
        prefix: int,
        vmin: float = 0.01,
        vmax: Optional[float] = 0.7,
        eir: bool = True,
        present: Optional[int] = None,
) -> torch.Tensor:
    """Head filter and aggregation (Zero-TPrune, sections 3.2.2 and 3.2.3).

    A head counts if the population variance of its patch scores, divided by their mean, is in [vmin, vmax]; the
    division is inferred (scores that sum to 1 cannot reach the published thresholds without it). An image that loses
    all heads uses all.

    Args:
        scores: (B, H, N) page ranks.
        prefix: Leading tokens left out of the variance.
        vmin, vmax: Bounds; None for no upper bound.
        eir: Root mean square over the heads that count ("emphasising informative region"); False for their mean.
        present: How many patch tokens take part, the others having score 0; default all N - prefix.

    Returns:
        (B, N) importance.
    """
    count = scores.shape[-1] - prefix if present is None else present
    squares = scores.square()
    # mean(s^2) / mean(s)^2 - 1, in sums, to which scores of 0 add nothing
    variance = (count * squares[..., prefix:].sum(-1) / scores[..., prefix:].sum(-1).square() - 1).clamp_min_(0)
    use = variance >= vmin
    if vmax is not None:
        use = use & (variance <= vmax)
    use = (use | ~use.any(dim=1, keepdim=True)).unsqueeze(-1)  # B, H, 1
    heads = use.sum(dim=1)  # B, 1
    if eir:
        return ((squares * use).sum(dim=1) / heads).sqrt()
    return (scores * use).sum(dim=1) / heads


def similarity(a: torch.Tensor, b: torch.Tensor, metric: str = 'cosine') -> torch.Tensor:
    """Similarity of rows, (B, I, d) and (B, J, d) -> (B, I, J) float32, larger is more alike.

    Args:
        metric: `cosine`, `dot`, `euclidean` or `manhattan` (negated distances).
    """
    with full_precision(a):
        a, b = a.float(), b.float()
        if metric == 'cosine':
            # Dividing the products, of which there are fewer than features; a row of norm 0 is similar to nothing.
            norms = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1).unsqueeze(1)
            return torch.bmm(a, b.transpose(1, 2)) / norms.clamp_min(torch.finfo(torch.float32).tiny)
        if metric == 'dot':
            return a @ b.transpose(1, 2)
        if metric == 'euclidean':
            return -torch.cdist(a, b)
        if metric == 'manhattan':
            return -torch.cdist(a, b, p=1.)
    raise InputError(f"similarity: metric is 'cosine', 'dot', 'euclidean' or 'manhattan', not {metric!r}")


def transform_matrix(
        similar: torch.Tensor,
        anchors: torch.Tensor,
        tau: float = 0.1,
        targets: int = 4,
        own: bool = True,
        prefix: int = 0,
) -> torch.Tensor:
    """Column weights of token transforming: how much of every token each anchor takes.

    Args:
        similar: (B, M, n) similarity of the anchors with all patch tokens.
        anchors: (B, M) int64 positions of the anchors among the n.
        tau: Temperature; 0 gives every token to its most similar anchor alone.
        targets: Anchors a token may go to; more than M is clipped.
        own: An anchor's own column is one-hot on itself.
        prefix: Rows of zeros to put in front, for tokens that take nothing.

    Returns:
        P (B, prefix + M, n) float32, columns sum to 1. A view of a tensor with the n in front.

    Raises:
        InputError: If tau is negative, not finite, or targets below 1.
    """
    if not 0 <= tau < math.inf:
        raise InputError(f'transform_matrix: tau is {tau}; it must be 0 or more')
    if targets < 1:
        raise InputError(f'transform_matrix: targets is {targets}; a token needs at least 1')
    B, M, n = similar.shape
    targets = 1 if tau == 0 else min(targets, M)
    best = similar.transpose(1, 2).topk(targets, dim=-1)  # B, n, K
    weight = (best.values / tau).softmax(dim=-1) if tau > 0 else torch.ones_like(best.values)
    columns = torch.zeros(B, n, prefix + M, device=similar.device, dtype=weight.dtype)
    columns.scatter_(2, best.indices + prefix if prefix else best.indices, weight)
    if own:
        identity = torch.eye(prefix + M, device=similar.device, dtype=weight.dtype)[prefix:].expand(B, -1, -1)
        columns = columns.scatter(1, anchors.unsqueeze(-1).expand_as(identity), identity)
    return columns.transpose(1, 2)


def spread(
        x: torch.Tensor,
        anchors: torch.Tensor,
        rest: torch.Tensor,
        columns: torch.Tensor,
        size: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`transform` where anchors keep themselves, so that only the columns of the others have to be multiplied.

    Args:
        x: (B, N, D).
        anchors, rest: (B, M) and (B, R) int64 positions of the tokens that stay and of those that go.
        columns: (B, M, R) weights of the tokens in `rest`; columns sum to 1.
        size: (B, N); None for all 1.

    Returns:
        (B, M, D) and (B, M) float32.
    """
    with full_precision(x):
        weight = columns if size is None else columns * size.gather(1, rest).unsqueeze(1)
        own = torch.ones(anchors.shape, device=x.device) if size is None else size.gather(1, anchors)
        new_size = own + weight.sum(dim=-1)
        share = (weight / new_size.unsqueeze(-1)).to(x.dtype)
        kept = take_rows(x, anchors).mul_((own / new_size).unsqueeze(-1).to(x.dtype))
        return kept.baddbmm_(share, take_rows(x, rest)), new_size


def transform(
        x: torch.Tensor,
        columns: torch.Tensor,
        size: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Y = W X with W_ij = P_ij m_j / m'_i, and the new sizes m'_i = sum_j P_ij m_j.

    Args:
        x: (B, n, D).
        columns: P (B, M, n) of `transform_matrix`.
        size: (B, n) m; None for all 1.

    Returns:
        (B, M, D) and (B, M) float32.
    """
    with full_precision(x):
        weight = columns if size is None else columns * size.unsqueeze(1)
        new_size = weight.sum(dim=-1)
        return (weight / new_size.unsqueeze(-1)).to(x.dtype) @ x, new_size
