"""The pruning engine: saliency averaged over batches, groups ranked over the whole model, the lowest ones removed."""
import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch

from vishub.models.nvit import NViT
from vishub.pruning.cost import BlockCost, block_costs, cost_per_unit
from vishub.pruning.structure import BLOCK_KINDS, Key, Structure

__all__ = ['GROUP_SIZES', 'Pruner', 'Schedule', 'smallest_dims']

# Units that go together, so that the sizes stay friendly to the hardware.
GROUP_SIZES = {'EMB': 16, 'head': 2, 'QK': 8, 'V': 8, 'MLP': 16}

Alive = Dict[Key, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How fast units go.

    Attributes:
        interval: Batches between two pruning steps.
        groups_per_step: Groups that each pruning step adds to the pruned ones; None for 1 % of all groups.
        max_groups: Never more groups than this in all; None for no limit.
        momentum: Weight of the past in the running saliency.
        max_epochs: Passes over the loader after which the target counts as missed.
    """
    interval: int = 20
    groups_per_step: Optional[int] = None
    max_groups: Optional[int] = None
    momentum: float = 0.9
    max_epochs: int = 50

    @classmethod
    def paper(cls) -> 'Schedule':
        """The schedule of the official run on DeiT-B: 2 groups (32 units) every 100 steps."""
        return cls(interval=100, groups_per_step=2, max_groups=2437)


def _smallest(size: int, group: int) -> int:
    """What is left of `size` units when all groups but the last, which may be short, are gone."""
    return size % group or min(size, group)


def smallest_dims(dims: Mapping[str, Any]) -> Dict[str, Any]:
    """The sizes below which pruning cannot go: the last group of every kind stays."""
    return dict(
        EMB=_smallest(dims['EMB'], GROUP_SIZES['EMB']),
        **{kind: [_smallest(size, GROUP_SIZES[kind]) for size in dims[kind]] for kind in BLOCK_KINDS})


class Pruner:
    """Prunes an NViT in place (dead units become zeros) step by step.

    A training loop calls `accumulate` after every backward pass, `structure.zero_dead` after every optimizer step, and
    `step` every now and then; `structure.dense` gives the smaller model at any time.

    Args:
        model: The model.
        cost: Cost of a block; saving it is rewarded.
        latency_weight: Weight of the reward, for costs as a share of the unpruned model's (the official 5e-4 per
            second on a model of about 1 s is about 5e-4 here). 0 ranks by saliency alone.
        schedule: `interval` and `max_epochs` are for the caller, the rest is used here.
        saliency: What a unit is worth, (units of the model) -> {(kind, block): value per unit}; by default the
            Hessian-aware one. Peers are measured with others.

    Raises:
        ValueError: If `latency_weight` is negative.
    """

    def __init__(
            self,
            model: NViT,
            cost: BlockCost,
            latency_weight: float = 5e-4,
            schedule: Optional[Schedule] = None,
            saliency: Callable[[Structure], Dict[Key, torch.Tensor]] = Structure.saliency,
    ) -> None:
        if latency_weight < 0:
            raise ValueError(f'prune: latency_weight must not be negative (got {latency_weight})')
        self.structure = Structure(model)
        self.cost = cost
        self.original_cost = sum(block_costs(cost, model.dims))
        self.latency_weight = latency_weight
        self.schedule = schedule or Schedule()
        self.saliency = saliency
        self.steps_done = 0
        self._sum: Dict[Key, torch.Tensor] = {}
        self._batches = 0
        self._running: Dict[Key, torch.Tensor] = {}
        self._ranked: Dict[Key, torch.Tensor] = {}  # the saliency that the last step went by

    @property
    def relative_cost(self) -> float:
        """Cost of all blocks now as a share of the unpruned model's."""
        return sum(block_costs(self.cost, self.structure.dims)) / self.original_cost

    def accumulate(self) -> None:
        """Add the saliency of the weights and gradients now in place."""
        for key, value in self.saliency(self.structure).items():
            self._sum[key] = self._sum[key] + value if key in self._sum else value
        self._batches += 1

    def _update_running(self) -> None:
        momentum = self.schedule.momentum
        for key, value in self._sum.items():
            mean = value / self._batches
            if key in self._running:
                mean = momentum * self._running[key] + (1 - momentum) * mean
            self._running[key] = mean
        self._sum, self._batches = {}, 0
        self._ranked = dict(self._running)

    def _groups(self) -> Dict[Key, List[Tuple[float, torch.Tensor]]]:
        """Per (kind, block): (value, unit indices) of every group, lowest units first.

        A group is a run of neighbours in the ranking, not in the weight; its value is the sum of its scores.
        """
        saved = cost_per_unit(self.cost, self.structure.dims)
        out = {}
        for key, alive in self.structure.alive.items():
            reward = self.latency_weight * saved[key] / self.original_cost
            score = (self._running[key].double() * alive - reward).cpu()
            # Dead units first, even where a living one has no saliency at all.
            order = torch.argsort(score, stable=True)
            order = order[torch.argsort(alive.cpu()[order].int(), stable=True)]
            out[key] = [(float(score[run].sum()), run) for run in order.split(GROUP_SIZES[key[0]])]
        return out

    def _kill(self, groups: Mapping[Key, List[Tuple[float, torch.Tensor]]], threshold: float) -> Alive:
        """What stays alive when every group of value `threshold` or less goes, the last of each kind excepted."""
        survivors = {}
        for key, runs in groups.items():
            alive = self.structure.alive[key].clone()
            killed = 0
            for value, run in runs:
                if killed >= len(runs) - 1:
                    break
                if value <= threshold:
                    alive[run.to(alive.device)] = False
                    killed += 1
            survivors[key] = alive
        return survivors

    def step(self, reached: Optional[Callable[[Dict[str, Any]], bool]] = None) -> None:
        """One pruning step.

        Args:
            reached: Tells whether sizes meet the target. If the whole step does, only as much of it is done as the
                target needs.
        """
        self._update_running()
        groups = self._groups()
        values = sorted(value for runs in groups.values() for value, _ in runs)
        per_step = self.schedule.groups_per_step or max(1, round(len(values) / 100))
        limit = self.schedule.max_groups or len(values)
        index = max(0, min(len(values), self.steps_done * per_step, limit) - 1)
        survivors = self._kill(groups, values[index])
        if reached is not None and reached(Structure.dims_of(survivors)):
            low, high = 0, index  # the smallest index that reaches the target
            while low < high:
                middle = (low + high) // 2
                if reached(Structure.dims_of(self._kill(groups, values[middle]))):
                    high = middle
                else:
                    low = middle + 1
            survivors = self._kill(groups, values[high])
        self.structure.alive = survivors
        self.structure.zero_dead()
        self.steps_done += 1
        if self.steps_done == 1:  # the first step comes before the distillation loss: forget its scale
            self._running = {key: torch.zeros_like(value) for key, value in self._running.items()}

    def round_sizes(self) -> None:
        """Remove the lowest units beyond a multiple of the group size (sizes that were odd from the start).

        Heads are left alone, and so is what would fall below one group.
        """
        for key, alive in self.structure.alive.items():
            size, group = int(alive.sum()), GROUP_SIZES[key[0]]
            if key[0] != 'head' and size > group and size % group:
                saliency = self._ranked[key].masked_fill(~alive, float('inf'))
                alive[torch.argsort(saliency, stable=True)[:size % group]] = False
        self.structure.zero_dead()
