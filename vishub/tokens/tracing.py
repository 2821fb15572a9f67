"""What happened to the tokens: recorded on request, composed over the blocks, and undone for dense prediction."""
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError
from vishub.tokens.functional import similarity, take_rows
from vishub.tokens.method import State

__all__ = ['Trace', 'restore', 'trace']


class Step(NamedTuple):
    """One reduction: the tokens that entered it, where they went, and what for."""
    before: torch.Tensor  # B, N, D
    move: torch.Tensor  # (B, N) int64 with -1 for pruned, or (B, N', N) float32
    after: torch.Tensor  # B, N', D
    importance: Optional[torch.Tensor]  # B, N


@dataclass
class Trace:
    """The way of the tokens through one forward. N_0 tokens entered the first block, N_l leave block l.

    Attributes:
        prefix: Prefix tokens.
        grid: Patches (rows, columns) at the input, without patch dropout.
        start: N_0.
        batch: Images.
        merges: Tokens merged or mixed, none was pruned.
        counts: Tokens in the MLP and behind the block, one pair a block that ran.
    """
    prefix: int
    grid: Tuple[int, int]
    start: int
    batch: int
    merges: bool
    counts: List[Tuple[int, int]] = field(default_factory=list)
    steps: Dict[int, Step] = field(default_factory=dict)
    token_sizes: List[Optional[torch.Tensor]] = field(default_factory=list)

    def add(self, layer: int, middle: int, end: int, state: State) -> None:
        """Note what a block did: its token counts, and its reduction if there was one."""
        self.counts.append((middle, end))
        self.token_sizes.append(state.size)
        if state.before is None:
            return
        if state.move is None:
            raise InputError(f'the method that reduced block {layer} cannot be recorded: it left State.move empty '
                             'although Seen.record was set')
        self.steps[layer] = Step(state.before, state.move, state.after, state.importance)

    def _layer(self, layer: int) -> int:
        depth = len(self.counts)
        if not -depth <= layer < depth:
            raise InputError(f'layer is {layer}; this trace has blocks 0..{depth - 1}')
        return layer % depth

    def _steps_to(self, layer: int) -> List[Step]:
        last = self._layer(layer)
        return [step for i, step in self.steps.items() if i <= last]

    def _device(self) -> Optional[torch.device]:
        return next((step.before.device for step in self.steps.values()), None)

    def assignment(self, layer: int = -1) -> torch.Tensor:
        """(B, N_0) int64: the token of block `layer` that each input token is in (most of it, if shared); -1 pruned."""
        where = torch.arange(self.start, device=self._device()).expand(self.batch, -1)
        for step in self._steps_to(layer):
            if step.move.is_floating_point():
                move = step.move.argmax(dim=1)
            else:
                move = step.move
            where = torch.where(where < 0, where, move.gather(1, where.clamp_min(0)))
        return where

    def matrix(self, layer: int = -1) -> torch.Tensor:
        """(B, N_l, N_0) float32: share of every input token (column) in every token of block `layer` (row)."""
        total = torch.eye(self.start, device=self._device()).expand(self.batch, -1, -1)
        for step in self._steps_to(layer):
            total = _columns(step) @ total
        return total

    def sizes(self, layer: int = -1) -> torch.Tensor:
        """(B, N_l) float32: input tokens that each token stands for; 1 where the method only prunes."""
        layer = self._layer(layer)
        size = self.token_sizes[layer]
        if size is None:
            return torch.ones(self.batch, self.counts[layer][1], device=self._device())
        return size

    def importance(self, layer: int = -1) -> Optional[torch.Tensor]:
        """(B, N_{l-1}) float32 scores by which block `layer` chose; None if it reduces nothing or has none."""
        step = self.steps.get(self._layer(layer))
        return None if step is None else step.importance


def _columns(step: Step) -> torch.Tensor:
    """(B, N', N) weights of a reduction; columns of pruned tokens are 0."""
    if step.move.is_floating_point():
        return step.move
    hot = F.one_hot(step.move.clamp_min(0), step.after.shape[1]) * (step.move >= 0).unsqueeze(-1)  # B, N, N'
    return hot.transpose(1, 2).float()


@contextmanager
def trace(model: nn.Module) -> Iterator[List[Trace]]:
    """Record every forward that this thread runs on a reduced model inside the `with`.

    Costs the memory of the tokens at every reducing block, and makes `torch.compile` compile anew; off by default.

    Yields:
        A list that gets one `Trace` a forward, in order.

    Raises:
        InputError: If the model is not reduced.
    """
    reduction = vars(model).get('_token_reduction')
    if reduction is None:
        raise InputError('trace: the model is not reduced; vishub.tokens.apply(model, method, ...) comes first')
    with reduction.recording() as traces:
        yield traces


def restore(
        tokens: torch.Tensor,
        trace: Trace,
        layer: int = -1,
        pruned: str = 'last',
        detail: bool = False,
) -> torch.Tensor:
    """Tokens of block `layer` back on all input positions, for dense prediction.

    A merged token goes to all its sources; of a shared one every input token gets its mixture, P^T y.

    Args:
        tokens: (B, N_l, D') tokens behind block `layer`.
        trace: Of the forward that made them.
        layer: The block.
        pruned: What a pruned token becomes: `last` (its value when it left; needs D' = D), `zero`, or `nearest`
            (restored value of the kept token that was most similar, by cosine, when it left). Merging prunes none.
        detail: Add what each merging lost: the difference between a token and its restored value at that place
            (needs D' = D). Keeps fine structure.

    Returns:
        (B, N_0, D').

    Raises:
        InputError: If shapes do not fit the trace, or `pruned` is unknown.
    """
    if pruned not in ('last', 'zero', 'nearest'):
        raise InputError(f"restore: pruned is {pruned!r}; it must be 'last', 'zero' or 'nearest'")
    layer = trace._layer(layer)
    if tokens.ndim != 3 or tokens.shape[:2] != (trace.batch, trace.counts[layer][1]):
        raise InputError(f'restore: tokens are {tuple(tokens.shape)}; block {layer} of this trace left '
                         f'({trace.batch}, {trace.counts[layer][1]}, D)')
    for step in reversed(trace._steps_to(layer)):
        tokens = _undo(tokens, step, 'nothing' if trace.merges else pruned, detail)
    return tokens


def _undo(tokens: torch.Tensor, step: Step, pruned: str, detail: bool) -> torch.Tensor:
    """(B, N', D') -> (B, N, D')."""
    same_width = tokens.shape[-1] == step.before.shape[-1]
    if (detail or pruned == 'last') and not same_width:
        raise InputError(f"restore: tokens are {tokens.shape[-1]} wide, the block's are {step.before.shape[-1]}; "
                         "detail and pruned='last' need the block's own width ('zero' and 'nearest' do not)")
    if step.move.is_floating_point():
        back = step.move.transpose(1, 2).to(tokens.dtype)  # B, N, N'
        out = back @ tokens
        return out + (step.before - back @ step.after).to(out.dtype) if detail else out
    gone = (step.move < 0).unsqueeze(-1)  # B, N, 1
    kept = step.move.clamp_min(0)
    if pruned == 'nearest':
        alike = similarity(step.before, step.after)  # where tokens are pruned, those that stay are unchanged
        kept = torch.where(step.move < 0, alike.argmax(dim=-1), step.move)
    out = take_rows(tokens, kept)
    if detail:
        out = out + (step.before - take_rows(step.after, kept)).to(out.dtype)
    if pruned == 'zero':
        return torch.where(gone, torch.zeros_like(out), out)
    if pruned == 'last':
        return torch.where(gone, step.before.to(out.dtype), out)
    return out
