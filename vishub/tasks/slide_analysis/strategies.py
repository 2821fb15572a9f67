"""How a learner keeps what it knew: BuRo, the paper's rehearsal, and the baselines it is measured against.

Each adds a term to the loss of every step, and does something when a task ends. All train under the same loop, with
the same budget of regions where they keep any.
"""
import abc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.tasks.slide_analysis.buffer import ReplayBuffer
from vishub.tasks.slide_analysis.data import Item
from vishub.tasks.slide_analysis.features import SlideFeatures

__all__ = ['METHODS', 'Strategy', 'StrategyOptions', 'make_strategy']


@dataclass(frozen=True)
class StrategyOptions:
    """Attributes:
        capacity: Regions kept of all earlier slides together.
        bag: Fewest and most regions of a pseudo-slide (BuRo).
        replay_weight: Weight of each pseudo-slide's cross-entropy (the paper's alpha, 0.2).
        share: Of a slide's regions that are offered to the reservoir (BuRo).
        selection: `uniform`, or `attention`: the regions with the most attention (BuRo).
        ewc_weight: Of EWC's penalty.
    """
    capacity: int = 1100
    bag: Tuple[int, int] = (100, 249)
    replay_weight: float = 0.2
    share: float = 0.2
    selection: str = 'uniform'
    ewc_weight: float = 100.

    def __post_init__(self) -> None:
        if not 1 <= self.bag[0] <= self.bag[1]:
            raise InputError(f'bag is {self.bag[0]} to {self.bag[1]} regions: give 1 or more, the smaller number first')
        if self.selection not in ('uniform', 'attention'):
            raise InputError(f"selection is '{self.selection}': it is uniform or attention")
        if not 0 < self.share <= 1:
            raise InputError(f'share is {self.share}: it is above 0 and at most 1')


class Strategy:
    """Plain fine-tuning: nothing is kept. The others derive from it.

    Args:
        folder: Where its memory is kept, from task to task.
        options: See there.
        num_classes: Of all tasks so far.
    """

    name = 'finetune'

    def __init__(self, folder: Path, options: StrategyOptions, num_classes: int) -> None:
        self.folder, self.options = folder, options
        self.load(num_classes)

    def load(self, num_classes: int) -> None:
        """Read the memory of earlier tasks, if there is any."""

    def penalty(self, model: Any) -> Optional[torch.Tensor]:
        """What every step of a later task adds to the loss; randomness from torch's global generator."""
        return None

    def end_task(self, model: Any, name: str, number: int, items: Sequence[Item], seed: int) -> None:
        """Take from a finished task what later ones need, and store it. Doing it again changes nothing."""


class _Rehearsal(Strategy, abc.ABC):
    """What keeps a buffer; which part of a slide goes into it is each method's own."""

    def load(self, num_classes: int) -> None:
        self.path = self.folder / 'buffer.safetensors'
        if self.path.is_file():
            self.buffer = ReplayBuffer.load(self.path)
            if self.buffer.capacity < num_classes:
                raise InputError(
                    f'the buffer of {self.buffer.capacity} regions cannot hold one of each of {num_classes} classes')
        else:
            self.buffer = ReplayBuffer(self.options.capacity, num_classes)

    def end_task(self, model: Any, name: str, number: int, items: Sequence[Item], seed: int) -> None:
        if name in self.buffer.done:
            return
        rng = torch.Generator().manual_seed(seed * 1000 + number)
        for item in items:
            self.keep(model, item.load(), item.label, number, rng)
        self.buffer.done.append(name)
        self.buffer.save(self.path)

    @abc.abstractmethod
    def keep(self, model: Any, features: SlideFeatures, label: int, task: int, rng: torch.Generator) -> None:
        """Offer what belongs into the buffer of one slide."""

    def slide_logits(self, model: Any, patch: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
        """(1, K); the patch branch runs without gradient, for it gets none from a class."""
        device = next(model.parameters()).device
        return model(patch.to(device), region.to(device), return_similarity=False).logits


class BuRo(_Rehearsal):
    """Breakup and reorganise (section 3 of the paper; the values are those of the official code).

    When a task ends, ceil(share · N) regions of each of its slides with more than one are offered to the reservoir,
    drawn with replacement. A step picks an earlier task and, for each of its classes, a pseudo-slide.
    """

    name = 'buro'

    def keep(self, model: Any, features: SlideFeatures, label: int, task: int, rng: torch.Generator) -> None:
        count = math.ceil(self.options.share * len(features))
        if len(features) < 2:
            return
        if self.options.selection == 'attention':
            device = next(model.parameters()).device
            attention = model.rollout(features.patch.to(device), features.region.to(device)).region[0]
            chosen = attention.topk(count).indices.cpu()
        else:
            chosen = torch.randint(len(features), (count,), generator=rng)
        self.buffer.add_regions(features.patch[chosen], features.region[chosen], label, task, rng)

    def penalty(self, model: Any) -> Optional[torch.Tensor]:
        tasks = self.buffer.task.unique()
        if not len(tasks):
            return None
        task = tasks[int(torch.randint(len(tasks), (1,)))]
        low, high = self.options.bag
        size = int(torch.randint(low, high + 1, (1,)))
        losses = []
        for label in self.buffer.label[self.buffer.task == task].unique().tolist():
            slide = self.buffer.pseudo_slide(label, size)
            if slide is not None:
                losses.append(_cross_entropy(self.slide_logits(model, *slide), label))
        return self.options.replay_weight * torch.stack(losses).sum()


class ER(_Rehearsal):
    """Experience replay (Rolnick et al. 2019, arXiv:1811.11682): whole earlier slides, two a step, half weight each."""

    name = 'er'

    def keep(self, model: Any, features: SlideFeatures, label: int, task: int, rng: torch.Generator) -> None:
        with torch.no_grad():
            logits = self.slide_logits(model, features.patch, features.region)[0]
        self.buffer.add_slide(features.patch, features.region, label, task, logits, rng)

    def penalty(self, model: Any) -> Optional[torch.Tensor]:
        losses: List[torch.Tensor] = []
        for _ in range(2):
            stored = self.buffer.stored_slide()
            if stored is None:
                return None
            patch, region, label, _ = stored
            losses.append(0.5 * _cross_entropy(self.slide_logits(model, patch, region), label))
        return torch.stack(losses).sum()


class DERPlusPlus(ER):
    """DER++ (Buzzega et al. 2020, arXiv:2004.07211): one slide keeps its logits (0.1), one its class (0.5)."""

    name = 'derpp'

    def penalty(self, model: Any) -> Optional[torch.Tensor]:
        first, second = self.buffer.stored_slide(), self.buffer.stored_slide()
        if first is None or second is None:
            return None
        logits = self.slide_logits(model, first[0], first[1])[0]
        known = first[3].to(logits.device)  # classes that came later had no logits then
        return 0.1 * F.mse_loss(logits[:len(known)], known) \
            + 0.5 * _cross_entropy(self.slide_logits(model, second[0], second[1]), second[2])


class EWC(Strategy):
    """Online elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796; Schwarz et al. 2018).

    No data are kept: weights that mattered, by the diagonal of the empirical Fisher information of the class loss,
    are held where they were.
    """

    name = 'ewc'

    def load(self, num_classes: int) -> None:
        self.path = self.folder / 'ewc.safetensors'
        self.memory: Dict[str, torch.Tensor] = load_file(self.path) if self.path.is_file() else {}

    def penalty(self, model: Any) -> Optional[torch.Tensor]:
        if not self.memory:
            return None
        total = torch.zeros((), device=next(model.parameters()).device)
        for name, parameter in model.named_parameters():
            fisher, anchor = (self.memory[f'{kind}/{name}'].to(total.device) for kind in ('fisher', 'anchor'))
            known = parameter[:len(fisher)] if parameter.ndim else parameter  # a grown classifier has new rows
            total = total + (fisher * (known - anchor).square()).sum()
        return self.options.ewc_weight / 2 * total

    def end_task(self, model: Any, name: str, number: int, items: Sequence[Item], seed: int) -> None:
        if f'done/{name}' in self.memory:
            return
        device = next(model.parameters()).device
        fisher = {key: torch.zeros_like(parameter) for key, parameter in model.named_parameters()}
        for item in items:
            features = item.load()
            loss = _cross_entropy(
                model(features.patch.to(device), features.region.to(device), return_similarity=False).logits,
                item.label)
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for key, gradient in zip(parameters, gradients):
                if gradient is not None:
                    fisher[key] += gradient.square() / len(items)
        memory = {key: value for key, value in self.memory.items() if key.startswith('done/')}
        for key, parameter in model.named_parameters():
            earlier = self.memory.get(f'fisher/{key}')
            if earlier is not None:
                fisher[key][:len(earlier)] += earlier.to(device)
            memory[f'fisher/{key}'] = fisher[key].cpu().contiguous()
            memory[f'anchor/{key}'] = parameter.detach().cpu().clone()
        memory[f'done/{name}'] = torch.ones(1)
        self.memory = memory
        with atomic_path(self.path) as temporary:
            save_file(memory, temporary)


def _cross_entropy(logits: torch.Tensor, label: int) -> torch.Tensor:
    return F.cross_entropy(logits.float(), torch.tensor([label], device=logits.device))


_STRATEGIES: Tuple[Type[Strategy], ...] = (BuRo, ER, DERPlusPlus, EWC, Strategy)
# `joint` is no strategy but a sequence of one task that is all of them.
METHODS: Tuple[str, ...] = (*(kind.name for kind in _STRATEGIES), 'joint')


def make_strategy(method: str, folder: Path, options: StrategyOptions, num_classes: int) -> Strategy:
    """The strategy of that name.

    Raises:
        InputError: If there is none, or its memory in `folder` cannot be used.
    """
    if method not in METHODS:
        raise InputError(f"method '{method}' is unknown; choose one of {', '.join(METHODS)}")
    chosen: Callable[..., Strategy] = next((kind for kind in _STRATEGIES if kind.name == method), Strategy)
    return chosen(folder, options, num_classes)

