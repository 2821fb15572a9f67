"""Choosing where a method reduces, and its own constants, on a few hundred calibration images.

    found = tokens.search(model, loader, 'zero_tprune', macs=0.6)
    tokens.apply(model, **found.config)

A Monte-Carlo search, as Zero-TPrune has it (arXiv 2305.17328, section 4), for every method: layer sets and shares are
drawn that meet the budget, then the best of them is changed step by step. No gradients, and no labels unless asked for.
"""
import copy
import json
import math
import random
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError
from vishub.tokens.cost import counter, macs, schedule
from vishub.tokens.method import Method, find_method, number, whole
from vishub.tokens.reduced import config, reduced

__all__ = ['SearchResult', 'Trial', 'search']

Batch = Union[torch.Tensor, Sequence[torch.Tensor]]  # images, or images and labels
_PROPOSALS = 200  # drawn for one trial before the search holds that nothing new is left


@dataclass(frozen=True)
class Trial:
    """One configuration and what it did on the calibration images.

    Attributes:
        config: `method` and all that `apply` takes with it.
        origin: `default` (what `apply(model, method, macs=...)` does), `drawn` or `changed` (from the best so far).
        macs: Share of the unreduced model's multiply-accumulates, overhead apart.
        overhead: What deciding adds, as a share of the same.
        agreement: Share of the images with the unreduced model's first class, 0 to 1.
        divergence: Mean Kullback-Leibler divergence from the unreduced model's probabilities, in nats.
        accuracy: Share of the images with the right first class; None without labels.
    """
    config: Dict[str, Any]
    origin: str
    macs: float
    overhead: float
    agreement: float
    divergence: float
    accuracy: Optional[float]


@dataclass(frozen=True)
class SearchResult:
    """What a search found. The figures are those of the images it chose by: expect a little less on others.

    Attributes:
        config: The best configuration: `apply(model, **result.config)`.
        best: Its trial.
        trials: All of them in the order tried; the first is the method's default.
        score: What they were ranked by: `agreement` or `accuracy`.
        num_images: Calibration images.
    """
    config: Dict[str, Any]
    best: Trial
    trials: Tuple[Trial, ...]
    score: str
    num_images: int

    def to_dict(self) -> Dict[str, Any]:
        """Plain values for `json.dumps`; `apply` takes the `config` also as it comes back from JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """The trials as a Markdown table, best first, the default marked."""
        lines = [
            '| Trial | MACs % | overhead % | agreement % | divergence | accuracy % | configuration |',
            '|---|---|---|---|---|---|---|',
        ]
        for place in sorted(range(len(self.trials)), key=lambda i: _rank(self.trials[i], self.score), reverse=True):
            trial = self.trials[place]
            accuracy = '–' if trial.accuracy is None else f'{100 * trial.accuracy:.1f}'
            lines.append(
                f'| {place} ({trial.origin}) | {100 * trial.macs:.1f} | {100 * trial.overhead:.1f} | '
                f'{100 * trial.agreement:.1f} | {trial.divergence:.4f} | {accuracy} | `{json.dumps(trial.config)}` |')
        return '\n'.join(lines) + '\n'


class _Point(NamedTuple):
    """A place in the search space: block -> exponent of the common share it keeps (None: the method's default
    schedule), and options that differ from the method's defaults."""
    exponents: Optional[Mapping[int, float]]
    options: Mapping[str, Any]


def search(
        model: nn.Module,
        loader: Iterable[Batch],
        method: str = 'tome',
        macs: float = 0.6,
        *,
        trials: int = 32,
        score: str = 'agreement',
        max_images: int = 512,
        options: Optional[Mapping[str, Any]] = None,
        seed: int = 0,
        progress: Union[bool, Callable[[int, int], None]] = True,
) -> SearchResult:
    """Pick the blocks that reduce, how much each does, and the method's options in `Method.choices`.

    The method's default takes part as trial 0, so the result is at least as good on the calibration images. The same
    arguments give the same result on the same machine. The model is as before afterwards.

    Args:
        model: As for `apply`, not reduced, with trained weights.
        loader: Batches of normalised images (B, C, H, W), or of (images, labels (B,)). Read once, up to `max_images`.
        method: A method without parameters of its own.
        macs: Share of the full multiply-accumulates, in (0, 1], overhead apart; no trial has more.
        trials: Configurations to try, 1 or more; each costs one pass over the calibration images. Fewer are tried
            where there are no more.
        score: `agreement` with the unreduced model's first class, or `accuracy` where the loader gives labels. Equal
            scores are told apart by the divergence from the unreduced model's probabilities.
        max_images: Calibration images that are kept in memory.
        options: Options of the method that are to stay as given.
        seed: Of the draws, and of methods that draw.
        progress: True for a bar on stderr, False for none, or a function told (trials done, trials in all).

    Raises:
        InputError: If an argument cannot be used, the budget cannot be met, or the model's outputs are not finite.
    """
    cls = _searchable(model, method)
    number(macs, 'macs', 0, 1, above=True)
    whole(trials, 'trials', 1)
    whole(max_images, 'max_images', 1)
    if score not in ('agreement', 'accuracy'):
        raise InputError(f"score is {score!r}; it must be 'agreement' or 'accuracy'")
    fixed = dict(options or {})
    with _quiet(model, seed):
        space = _Space(model, method, cls, macs, fixed)
        images, labels = _calibration(loader, max_images)
        if score == 'accuracy' and labels is None:
            raise InputError("score='accuracy' needs a loader that gives (images, labels)")
        judge = _Judge(model, images, labels, seed)
        done: List[Trial] = []
        best: List[Tuple[Trial, _Point]] = []  # of those so far, the last is the best
        with _bar(progress, trials) as advance:
            for origin, settings, point in _proposals(space, trials, random.Random(seed), best):
                trial = judge(origin, settings)
                if not best or _rank(trial, score) > _rank(best[-1][0], score):
                    best.append((trial, point))
                done.append(trial)
                advance(len(done))
    found = best[-1][0]
    return SearchResult(found.config, found, tuple(done), score, sum(map(len, images)))


def _rank(trial: Trial, score: str) -> Tuple[float, float]:
    return getattr(trial, score), -trial.divergence


def _searchable(model: nn.Module, method: str) -> type:
    cls = find_method(method)
    if config(model) is not None:
        raise InputError(f'search: the model is reduced by {config(model)["method"]} already; tokens.remove(model) '
                         'comes first, since the unreduced model is the measure')
    if cls.attach is not Method.attach:
        raise InputError(f"search: {method} has parameters that are trained for one schedule; search with 'tome' and "
                         f'train {method} with the r that it finds')
    if not {'tokens_after', 'r'} & set(cls.count_options):
        raise InputError(f'search: {method} takes neither tokens_after= nor r=, so no schedule can be tried')
    return cls


@contextmanager
def _quiet(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, the caller's random numbers untouched, and no warning a trial."""
    training = [module.training for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == 'cuda' else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            torch.manual_seed(seed)
            model.eval()
            yield
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode


@contextmanager
def _bar(progress: Union[bool, Callable[[int, int], None]], trials: int) -> Iterator[Callable[[int], None]]:
    if callable(progress):
        yield lambda done: progress(done, trials)
        return
    from rich.console import Console
    from rich.progress import Progress
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not progress or not console.is_terminal) as bars:
        bar = bars.add_task('searching', total=trials)
        yield lambda done: bars.update(bar, completed=done)


def _calibration(loader: Iterable[Batch], most: int) -> Tuple[List[torch.Tensor], Optional[List[torch.Tensor]]]:
    """Up to `most` images in batches, and their labels if all batches have them."""
    images: List[torch.Tensor] = []
    labels: List[torch.Tensor] = []
    left = most
    for batch in loader:
        pair = [batch] if isinstance(batch, torch.Tensor) else list(batch)[:2]
        if not pair or not all(isinstance(part, torch.Tensor) for part in pair) or pair[0].ndim != 4:
            raise InputError('search: the loader must give tensors of images (B, C, H, W), or (images, labels)')
        if len(pair) == 2 and pair[1].shape != pair[0].shape[:1]:
            raise InputError(f'search: labels are {tuple(pair[1].shape)} for {len(pair[0])} images; '
                             'they must be class indices, one an image')
        pair = [part[:left] for part in pair]
        if len(pair[0]):
            images.append(pair[0])
            labels += pair[1:]
        left -= len(pair[0])
        if left <= 0:
            break
    if not images:
        raise InputError('search: the loader gave no images')
    return images, labels if len(labels) == len(images) else None


class _Judge:
    """Runs configurations on the calibration images, against the unreduced model."""

    def __init__(
            self,
            model: nn.Module,
            images: List[torch.Tensor],
            labels: Optional[List[torch.Tensor]],
            seed: int,
    ) -> None:
        self.model, self.images, self.seed = model, images, seed
        self.full = macs(model).total
        self.reference = self.outputs()
        if not self.reference.isfinite().all():
            raise InputError("search: the unreduced model's outputs are not finite; its weights or the images are bad")
        self.labels = None if labels is None else torch.cat(labels).to(self.reference.device)

    def outputs(self) -> torch.Tensor:
        """(N, K) float32 logits."""
        device = next(self.model.parameters()).device
        torch.manual_seed(self.seed)  # methods that draw: the same draws in every trial
        return torch.cat([self.model(batch.to(device)).float() for batch in self.images])

    def __call__(self, origin: str, settings: Dict[str, Any]) -> Trial:
        with reduced(self.model, **settings):
            count, logits, chosen = macs(self.model), self.outputs(), config(self.model)
        first, wanted = logits.argmax(dim=1), self.reference.argmax(dim=1)
        divergence = F.kl_div(
            logits.log_softmax(dim=1), self.reference.log_softmax(dim=1), log_target=True, reduction='batchmean')
        return Trial(
            config=copy.deepcopy(chosen),
            origin=origin,
            macs=count.total / self.full,
            overhead=count.overhead / self.full,
            agreement=(first == wanted).double().mean().item(),
            divergence=divergence.item(),
            accuracy=None if self.labels is None else (first == self.labels).double().mean().item(),
        )


class _Space:
    """What may be tried: points, and the settings that each of them stands for at the budget."""

    def __init__(self, model: nn.Module, method: str, cls: type, budget: float, fixed: Dict[str, Any]) -> None:
        self.method, self.cls, self.budget = method, cls, budget
        self.default = schedule(model, method, macs=budget, **fixed)  # says so if the budget cannot be met
        self.fixed = fixed
        self.layout, self.cost = counter(model, cls.place)
        self.limit = budget * self.cost([self.layout.tokens] * self.layout.depth)
        self.choices = {key: list(values) for key, values in cls.choices.items() if key not in fixed}
        # What leaves behind the last block saves nothing.
        self.layers = list(range(self.layout.depth - (cls.place == 'end'))) or [0]

    def settings(self, point: _Point) -> Optional[Dict[str, Any]]:
        """Arguments of `apply`; None if no share meets the budget."""
        counted = self.default if point.exponents is None else self.solve(point.exponents)
        if counted is None:
            return None
        # Spelled out, so that a default and its name are not tried as two.
        options = {**{key: self.cls.options[key] for key in self.choices}, **self.fixed, **point.options}
        return {'method': self.method, **options, **counted}

    def solve(self, exponents: Mapping[int, float]) -> Optional[Dict[str, Any]]:
        """The largest common share s for which keeping s ** exponent of the patches in each block meets the budget."""
        low, high = 1e-6, 1.
        if self.cost(self.counts(exponents, high)) <= self.limit:
            low = high
        elif self.cost(self.counts(exponents, low)) > self.limit:
            return None
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(self.counts(exponents, middle)) <= self.limit else (low, middle)
        counts = self.counts(exponents, low)
        before = [self.layout.tokens, *counts[:-1]]
        if 'r' in self.cls.count_options:
            return {'r': [b - c for b, c in zip(before, counts)]}
        return {'tokens_after': {layer: c for layer, (b, c) in enumerate(zip(before, counts)) if c < b}}

    def counts(self, exponents: Mapping[int, float], share: float) -> List[int]:
        """Tokens behind every block."""
        patches, counts = self.layout.tokens - self.layout.prefix, []
        for layer in range(self.layout.depth):
            if layer in exponents:
                # Merging pairs up, so at most half can go.
                least = patches - patches // 2 if 'r' in self.cls.count_options else 1
                patches = max(least, math.ceil(patches * share ** exponents[layer] - 1e-9))
            counts.append(patches + self.layout.prefix)
        return counts

    def draw(self, dice: random.Random) -> _Point:
        """Any blocks, any emphasis on early or late ones, and in half of the draws other options."""
        exponents = None
        if dice.random() < 0.75:
            some = sorted(dice.sample(self.layers, dice.randint(min(2, len(self.layers)), len(self.layers))))
            tilt = dice.uniform(-1.5, 1.5)
            middle = (self.layers[0] + self.layers[-1]) / 2
            span = max(len(self.layers), 1)
            exponents = {layer: math.exp(tilt * (layer - middle) / span + dice.gauss(0, 0.3)) for layer in some}
        options = {}
        if exponents is None or dice.random() < 0.5:
            options = {key: dice.choice(values) for key, values in self.choices.items()}
        return _Point(exponents, options)

    def change(self, point: _Point, dice: random.Random) -> _Point:
        """A neighbour: another value of one option, or one block more, fewer, moved, or with another share."""
        if self.choices and dice.random() < 0.5:
            key = dice.choice(sorted(self.choices))
            return point._replace(options={**point.options, key: dice.choice(self.choices[key])})
        if point.exponents is None:
            return point._replace(exponents=self.draw_near_default(dice))
        exponents = dict(point.exponents)
        layer = dice.choice(sorted(exponents))
        others = [other for other in self.layers if other not in exponents]
        step = dice.choice(['scale', 'scale', 'add', 'drop', 'move'])
        if step == 'add' and others:
            exponents[dice.choice(others)] = exponents[layer]
        elif step == 'drop' and len(exponents) > 1:
            del exponents[layer]
        elif step == 'move' and others:
            nearest = min(others, key=lambda other: (abs(other - layer), other))
            exponents[nearest] = exponents.pop(layer)
        else:
            exponents[layer] *= math.exp(dice.gauss(0, 0.5))
        return point._replace(exponents=dict(sorted(exponents.items())))

    def draw_near_default(self, dice: random.Random) -> Dict[int, float]:
        """The default blocks, with emphasis on early or late ones."""
        layers = [layer for layer in self.cls.default_layers(self.layout.depth) if layer in self.layers]
        tilt = dice.uniform(-1.5, 1.5)
        return {layer: math.exp(tilt * place / max(len(layers) - 1, 1)) for place, layer in enumerate(layers)}


def _proposals(
        space: _Space,
        trials: int,
        dice: random.Random,
        best: List[Tuple[Trial, _Point]],
) -> Iterator[Tuple[str, Dict[str, Any], _Point]]:
    """The default, draws until a third of the trials is done, then changes of the best so far; none twice.

    `best` is filled by the caller while this runs.
    """
    start = _Point(None, {})
    settings = space.settings(start)
    yield 'default', settings, start
    seen, tried = {json.dumps(settings, sort_keys=True)}, 1
    for _ in range(_PROPOSALS * trials):
        if tried == trials:
            return
        origin = 'drawn' if tried < max(2, trials / 3) else 'changed'
        point = space.draw(dice) if origin == 'drawn' else space.change(best[-1][1], dice)
        settings = space.settings(point)
        if settings is None or json.dumps(settings, sort_keys=True) in seen:
            continue
        seen.add(json.dumps(settings, sort_keys=True))
        tried += 1
        yield origin, settings, point
