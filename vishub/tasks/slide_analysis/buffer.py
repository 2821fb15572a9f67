"""What is kept of earlier tasks: BuRo's loose regions, or whole slides, on disk and never more than stated."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vishub.errors import InputError
from vishub.files import atomic_path

__all__ = ['ReplayBuffer']

_TENSORS = ('patch', 'region', 'label', 'task', 'slide', 'logits')


class ReplayBuffer:
    """Regions of earlier slides, float16, at most `capacity` of them.

    The paper's rehearsal breaks slides up: loose regions go into one reservoir for all tasks (`add_regions`), and
    regions of one class are reorganised into slides that never were (`pseudo_slide`). For the baselines whole slides
    stay together (`add_slide`, `stored_slide`); where the bound is passed, slides of the class with the most regions
    go.

    The file is replaced as a whole by `save`, so that a kill at any moment leaves the old buffer or the new one.

    Args:
        capacity: Regions.
        num_classes: Kept for the check that each class can have a place.

    Attributes:
        patch: (R, g, g, C) float16.
        region: (R, C) float16.
        label, task: int64 (R,).
        slide: int64 (R,), number of the slide that a region belongs to; -1 for loose ones.
        logits: (slides, K) float32, what the model said of each stored slide when it was stored; for DER++.
        seen: Loose regions that were offered so far.
        done: Tasks that have been added, so that a task is not added twice after a kill.

    Raises:
        InputError: If the capacity is less than the number of classes.
    """

    def __init__(self, capacity: int, num_classes: int = 1) -> None:
        if capacity < num_classes:
            raise InputError(f'a buffer of {capacity} regions cannot hold one of each of {num_classes} classes')
        self.capacity = capacity
        self.patch: torch.Tensor = torch.empty(0)
        self.region: torch.Tensor = torch.empty(0)
        self.label = torch.empty(0, dtype=torch.int64)
        self.task = torch.empty(0, dtype=torch.int64)
        self.slide = torch.empty(0, dtype=torch.int64)
        self.logits: torch.Tensor = torch.empty(0)
        self.seen = 0
        self.done: List[str] = []
        self._rows: Dict[Tuple[str, int], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.label)

    @property
    def nbytes(self) -> int:
        """Of all tensors; the file has a header of a few hundred more."""
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    def most_bytes(self, grid: int, width: int, num_classes: int) -> int:
        """The bound on disk: features of `capacity` regions, three numbers each, logits of as many slides, a header."""
        return self.capacity * ((grid ** 2 + 1) * width * 2 + 3 * 8 + num_classes * 4) + 4096

    # -- breakup ------------------------------------------------------------------------------------------------------

    def add_regions(
            self, patch: torch.Tensor, region: torch.Tensor, label: int, task: int, rng: torch.Generator,
    ) -> None:
        """Offer loose regions to the reservoir: the n-th offered stays with probability capacity / n.

        Args:
            patch, region: (n, g, g, C), (n, C).
            label, task: Numbers of class and task.
            rng: Decides what stays.
        """
        self._like(patch, region)
        slots: List[int] = []
        for _ in range(len(region)):
            slot = self.seen if self.seen < self.capacity else int(torch.randint(self.seen + 1, (1,), generator=rng))
            slots.append(slot)
            self.seen += 1
        for number, slot in enumerate(slots):
            if slot >= self.capacity:
                continue
            row = (patch[number:number + 1].half(), region[number:number + 1].half(), label, task)
            if slot < len(self):
                self.patch[slot], self.region[slot] = row[0][0], row[1][0]
                self.label[slot], self.task[slot] = label, task
            else:
                self._append(*row, slide=-1)
        self._rows.clear()

    # -- reorganise ---------------------------------------------------------------------------------------------------

    def pseudo_slide(self, label: int, count: int) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        """A slide of min(count, stored) regions of a class, drawn without replacement from torch's global generator.

        Returns:
            Patch (n, g, g, C) and region (n, C) features, float32; None if no region of the class is stored.
        """
        rows = self._of('label', label)
        if not len(rows):
            return None
        chosen = rows[torch.randperm(len(rows))[:count]]
        return self.patch[chosen].float(), self.region[chosen].float()

    # -- whole slides -------------------------------------------------------------------------------------------------

    def add_slide(
            self, patch: torch.Tensor, region: torch.Tensor, label: int, task: int, logits: torch.Tensor,
            rng: torch.Generator,
    ) -> None:
        """Store a whole slide; where there is too little room, others of the best filled class go.

        A slide with more regions than fit keeps a random part of them.
        """
        self._like(patch, region)
        if len(region) > self.capacity:
            chosen = torch.randperm(len(region), generator=rng)[:self.capacity]
            patch, region = patch[chosen], region[chosen]
        number = len(self.logits)
        known = self.logits.shape[1] if self.logits.ndim == 2 else len(logits)
        grown = torch.zeros(number, max(0, len(logits) - known))  # classes that came later
        earlier = self.logits if number else torch.empty(0, known)
        self.logits = torch.cat([torch.cat([earlier, grown], dim=1), logits.detach().float().cpu()[None]])
        self._append(patch.half(), region.half(), label, task, slide=number)
        while len(self) > self.capacity:
            newest = len(self.logits) - 1
            fullest = int(torch.bincount(self.label[self.slide != newest]).argmax())
            candidates = self.slide[(self.label == fullest) & (self.slide != newest)].unique()
            self._drop(int(candidates[int(torch.randint(len(candidates), (1,), generator=rng))]))
        self._rows.clear()

    def stored_slide(self) -> Optional[Tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]]:
        """One of the stored slides, each equally likely: patch, region, label, logits as they were stored."""
        if not len(self.logits):
            return None
        number = int(torch.randint(len(self.logits), (1,)))
        rows = self._of('slide', number)
        return self.patch[rows].float(), self.region[rows].float(), int(self.label[rows[0]]), self.logits[number]

    # -- disk ---------------------------------------------------------------------------------------------------------

    def save(self, path: Union[str, Path]) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        state = {'capacity': self.capacity, 'seen': self.seen, 'done': self.done}
        with atomic_path(path) as temporary:
            save_file(
                {name: getattr(self, name).contiguous() for name in _TENSORS}, temporary,
                metadata={'buffer': json.dumps(state)})

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ReplayBuffer':
        """Read what `save` wrote.

        Raises:
            InputError: If the file is damaged or no buffer.
        """
        try:
            with safe_open(str(path), framework='pt') as file:
                state: Dict[str, Any] = json.loads((file.metadata() or {})['buffer'])
                buffer = cls(state['capacity'])
                for name in _TENSORS:
                    setattr(buffer, name, file.get_tensor(name))
            buffer.seen, buffer.done = state['seen'], state['done']
        except InputError:
            raise
        except Exception as error:  # safetensors has errors of its own
            raise InputError(f"'{path}' is no buffer of replayed regions: {error}") from error
        return buffer

    def _of(self, kind: str, value: int) -> torch.Tensor:
        """Rows of a class or slide, remembered: looking through all of them at every step would take long."""
        if (kind, value) not in self._rows:
            self._rows[kind, value] = (getattr(self, kind) == value).nonzero()[:, 0]
        return self._rows[kind, value]

    def _like(self, patch: torch.Tensor, region: torch.Tensor) -> None:
        if not len(self):
            self.patch, self.region = patch[:0].half(), region[:0].half()
        elif patch.shape[1:] != self.patch.shape[1:] or region.shape[1:] != self.region.shape[1:]:
            raise InputError(
                f'the buffer holds features {tuple(self.patch.shape[1:])}, these are {tuple(patch.shape[1:])}: '
                'use the encoder and grid of the earlier tasks')

    def _append(self, patch: torch.Tensor, region: torch.Tensor, label: int, task: int, slide: int) -> None:
        self.patch, self.region = torch.cat([self.patch, patch]), torch.cat([self.region, region])
        for name, value in (('label', label), ('task', task), ('slide', slide)):
            setattr(self, name, torch.cat([getattr(self, name), torch.full((len(region),), value)]))

    def _drop(self, number: int) -> None:
        """Remove a slide; those behind it move up."""
        keep = self.slide != number
        for name in ('patch', 'region', 'label', 'task', 'slide'):
            setattr(self, name, getattr(self, name)[keep])
        self.slide = self.slide - (self.slide > number).long()
        self.logits = torch.cat([self.logits[:number], self.logits[number + 1:]])
