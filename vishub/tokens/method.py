"""What a token reduction method is: its options, its counts, its step, and the table of methods.

A method is one object a model. It holds settings only: what changes from call to call travels in `State`, made fresh in
every forward, so that one model serves many threads.
"""
import abc
import difflib
import math
from typing import Any, ClassVar, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import torch
from torch import nn

from vishub.errors import InputError
from vishub.tokens.functional import take_rows

__all__ = ['Counts', 'Layout', 'Method', 'Seen', 'State', 'find_method', 'keep_tokens', 'methods', 'register_method']


class State(NamedTuple):
    """What a sequence carries from block to block beside its tokens. B images, N tokens.

    Attributes:
        size: (B, N) float32, input tokens that each token stands for; None while all are 1.
        index: (B, N) int64, for each token the input position whose rotary row or relative position it uses; None
            where the backbone has none of these, or no block has reduced yet.
        move: What this block's reduction did, only where it is recorded: (B, N before) int64, the new position of
            every old token, -1 if pruned; or (B, N, N before) float32, columns of weights.
        importance: (B, N before) float32 scores it went by, only where it is recorded and has any.
        before, after: (B, N before, D) and (B, N, D) tokens around it, only where it is recorded; the loop sets them.
    """
    size: Optional[torch.Tensor] = None
    index: Optional[torch.Tensor] = None
    move: Optional[torch.Tensor] = None
    importance: Optional[torch.Tensor] = None
    before: Optional[torch.Tensor] = None
    after: Optional[torch.Tensor] = None


class Seen(NamedTuple):
    """What a reducing block shows its method.

    Attributes:
        layer: Index of the block.
        count: Tokens wanted behind the reduction, prefix included.
        prefix: Prefix tokens.
        class_tokens: Those of them that are a class or distillation token (registers follow them).
        block: The block itself; methods with parameters keep them there.
        record: Somebody listens: fill `State.move` and `State.importance`.
        query, keys, value: (B, H, N, d) after bias and norms, before rotary embedding.
        class_row: (B, N) float32, attention of the first token averaged over heads; None unless needed.
        probs: (B, H, N, N) float32 attention probabilities; None unless needed.
    """
    layer: int
    count: int
    prefix: int
    class_tokens: int
    block: nn.Module
    record: bool
    query: torch.Tensor
    keys: torch.Tensor
    value: torch.Tensor
    class_row: Optional[torch.Tensor]
    probs: Optional[torch.Tensor]


class Layout(NamedTuple):
    """What a method may know of a model before it sees an image.

    Attributes:
        depth: Number of blocks.
        prefix: Prefix tokens.
        class_tokens: Those of them that are a class or distillation token.
        tokens: Tokens of the model's own image size, prefix included.
        fixed: The model takes that image size only.
    """
    depth: int
    prefix: int
    class_tokens: int
    tokens: int
    fixed: bool


def whole(value: Any, what: str, low: int = 0, high: Optional[int] = None) -> int:
    """`value` as int, or InputError that names it and the range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f'{low} or more' if high is None else f'in {low}..{high}'
        raise InputError(f'{what} is {value!r}; it must be an integer, {limits}')
    return value


def number(value: Any, what: str, low: float, high: float = math.inf, above: bool = False) -> float:
    """`value` as float in [low, high], or (low, high] with `above`; else InputError."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high or (above and value == low):
        raise InputError(f'{what} is {value!r}; it must be a number in {"(" if above else "["}{low}, {high}]')
    return float(value)


def _whole_keys(value: Any) -> Any:
    """{block: ...} as it was before JSON made strings of the block numbers."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: entry for key, entry in value.items()}


class Counts:
    """`tokens_after` or `keep`: how many tokens there are behind each reducing block.

    Args:
        layout: Of the model.
        tokens_after: {block: tokens, prefix included}.
        keep: {block: share of the patch tokens, in (0, 1], rounded up}.

    Raises:
        InputError: If a block does not exist, a count cannot be kept or grows with depth, or a share is out of range.
    """

    def __init__(
            self,
            layout: Layout,
            tokens_after: Optional[Mapping[int, int]] = None,
            keep: Optional[Mapping[int, float]] = None,
    ) -> None:
        if (tokens_after is None) == (keep is None):
            raise InputError('say how many tokens stay: either tokens_after={block: tokens}, '
                             'or keep={block: share of the patch tokens}, or macs=share')
        given = tokens_after if keep is None else keep
        name = 'tokens_after' if keep is None else 'keep'
        if not isinstance(given, Mapping):
            raise InputError(f'{name} is {given!r}; it must be a dict from block index to '
                             f'{"tokens" if keep is None else "share"}')
        self.prefix = layout.prefix
        self.tokens_after: Dict[int, int] = {}
        self.keep: Dict[int, float] = {}
        before = None
        for layer in given:
            whole(layer, f'a block index in {name}', 0, layout.depth - 1)
        for layer in sorted(given):
            if keep is not None:
                self.keep[layer] = number(keep[layer], f'keep[{layer}]', 0, 1, above=True)
                continue
            count = whole(tokens_after[layer], f'tokens_after[{layer}]', layout.prefix + 1)
            if before is not None and count > before[1]:
                raise InputError(f'tokens_after[{layer}] is {count}, but behind block {before[0]} only {before[1]} '
                                 'are left; counts cannot grow with depth')
            before = (layer, count)
            self.tokens_after[layer] = count

    def __call__(self, layer: int, tokens: int) -> int:
        """Tokens behind block `layer` when `tokens` enter it."""
        if layer in self.keep:
            # The tiny subtraction keeps 0.7 * 10 = 7.000000000000001 from counting as 8.
            return self.prefix + math.ceil((tokens - self.prefix) * self.keep[layer] - 1e-9)
        count = self.tokens_after.get(layer, tokens)
        if count > tokens:
            raise InputError(f'tokens_after[{layer}] is {count}, but only {tokens} tokens reach block {layer}; '
                             'use keep= for images of any size')
        return count

    def config(self) -> Dict[str, Any]:
        return {'keep': dict(self.keep)} if self.keep else {'tokens_after': dict(self.tokens_after)}


class Method(abc.ABC):
    """Base of all methods. A new one sets the class attributes and writes `reduce`.

    Attributes:
        needs: What a reducing block must show beside query, keys and value: `class_row` and/or `probs`. Only `probs`
            makes attention materialise its matrix, in the reducing blocks alone.
        place: `mid` (between attention and MLP) or `end` (behind the block).
        merges: Tokens stand for several input tokens: sizes are kept, average pooling weights by them.
        options: Names and defaults of the settings beside the counts. `prop_attn` among them adds log(size) to the
            logits of every key.
        choices: Options that `search` may change, and the values it tries.
    """
    name: ClassVar[str] = ''
    needs: FrozenSet[str] = frozenset()
    place: ClassVar[str] = 'end'
    merges: ClassVar[bool] = False
    options: ClassVar[Dict[str, Any]] = {}
    choices: ClassVar[Dict[str, Sequence[Any]]] = {}
    count_options: ClassVar[Tuple[str, ...]] = ('tokens_after', 'keep')

    prop_attn: bool = False

    @classmethod
    def default_layers(cls, depth: int) -> List[int]:
        """Blocks that `schedule` lets reduce: 1, 3, 6 and 9 of twelve, in proportion for other depths."""
        return sorted({min(round(depth * share / 12), depth - 1) for share in (1, 3, 6, 9)})

    @classmethod
    def expand(cls, config: Dict[str, Any]) -> Dict[str, Any]:
        """Replace shorthands (presets) by the options they stand for."""
        return config

    def prepare(self, model: nn.Module, config: Dict[str, Any], layout: Layout) -> None:
        """Read and check the configuration; nothing of the model is changed.

        Raises:
            InputError: On an unknown option or a value that cannot be used.
        """
        known = [*self.count_options, *self.options]
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" (nearest: '{near[0]}')" if near else ''
                raise InputError(f"{self.name} has no option '{key}'{hint}; it has: {', '.join([*known, 'macs'])}")
        config = {key: _whole_keys(value) for key, value in config.items()}
        self.layout = layout
        for key, default in self.options.items():
            setattr(self, key, config.get(key, default))
        if 'prop_attn' in self.options and not isinstance(self.prop_attn, bool):
            raise InputError(f'prop_attn is {self.prop_attn!r}; it must be True or False')
        self.prepare_counts({key: config[key] for key in self.count_options if key in config})
        self.check(model)

    def prepare_counts(self, config: Dict[str, Any]) -> None:
        """Read how many tokens stay."""
        self.counts = Counts(self.layout, **config)

    def check(self, model: nn.Module) -> None:  # noqa: B027, a method may need nothing here
        """Check the method's own options against each other and the model."""

    def attach(self, model: nn.Module) -> None:  # noqa: B027, a method may need nothing here
        """Add the method's parameters to the model, if it has any."""

    def detach(self, model: nn.Module) -> None:  # noqa: B027, a method may need nothing here
        """Take them away again."""

    def count(self, layer: int, tokens: int) -> int:
        """Tokens behind block `layer` when `tokens` enter it, prefix included."""
        return self.counts(layer, tokens)

    def token_counts(self, tokens: Optional[int] = None) -> List[int]:
        """Tokens behind every block when `tokens` (default: of the model's image size) enter the first."""
        tokens = self.layout.tokens if tokens is None else tokens
        counts = []
        for layer in range(self.layout.depth):
            tokens = self.count(layer, tokens)
            counts.append(tokens)
        return counts

    @abc.abstractmethod
    def reduce(self, x: torch.Tensor, state: State, seen: Seen) -> Tuple[torch.Tensor, State]:
        """(B, N, D) -> (B, seen.count, D), prefix tokens first and untouched, and the state that belongs to it."""

    def overhead(self, layer: int, before: int, after: int, heads: int, head_dim: int, width: int) -> int:
        """Multiply-accumulates of deciding (not of the tokens' own way) at a block that reduces `before` to `after`."""
        return 0

    def config(self) -> Dict[str, Any]:
        """Plain values that `apply` takes to do the same again."""
        return {**self.counts.config(), **{key: getattr(self, key) for key in self.options}}


def keep_tokens(
        x: torch.Tensor,
        state: State,
        keep: torch.Tensor,
        record: bool,
        importance: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, State]:
    """Prune: keep the rows `keep` (B, M), ascending positions with the prefix tokens among them."""
    move = None
    if record:
        B, M = keep.shape
        move = torch.full(x.shape[:2], -1, device=x.device, dtype=torch.int64)
        move.scatter_(1, keep, torch.arange(M, device=x.device).expand(B, M))
    size, index = state.size, state.index
    return take_rows(x, keep), State(
        size=None if size is None else size.gather(1, keep),
        index=None if index is None else index.gather(1, keep),
        move=move,
        importance=importance if record else None,
    )


def with_prefix(patches: torch.Tensor, prefix: int) -> torch.Tensor:
    """Positions among the patch tokens (B, M) -> positions among all tokens, prefix tokens in front."""
    front = torch.arange(prefix, device=patches.device).expand(patches.shape[0], prefix)
    return torch.cat([front, patches + prefix], dim=1)


_METHODS: Dict[str, Type[Method]] = {}


def register_method(name: str, cls: Type[Method]) -> None:
    """Make `apply(model, name, ...)` use `cls`.

    Raises:
        InputError: If the name is taken by another class, or `cls` lacks part of what a method is.
    """
    if _METHODS.get(name, cls) is not cls:
        raise InputError(f"a method '{name}' is registered already ({_METHODS[name].__qualname__})")
    missing = [part for part in ('prepare', 'needs', 'place', 'reduce') if not hasattr(cls, part)]
    if missing:
        raise InputError(f'{cls.__qualname__} is no token method: it lacks {", ".join(missing)}; '
                         'derive it from vishub.tokens.Method')
    if cls.place not in ('mid', 'end'):
        raise InputError(f"{cls.__qualname__}.place is {cls.place!r}; it must be 'mid' or 'end'")
    _METHODS[name] = cls


def methods() -> List[str]:
    """Names of the registered methods."""
    return sorted(_METHODS)


def find_method(name: str) -> Type[Method]:
    """The class of a method.

    Raises:
        InputError: If there is none; the message names the nearest and all others.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1, cutoff=0.4)
        hint = f" (nearest: '{near[0]}')" if near else ''
        raise InputError(f"no token method '{name}'{hint}; there are: {', '.join(methods())}")
    return _METHODS[name]
