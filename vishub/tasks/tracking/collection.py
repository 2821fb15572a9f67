"""The appearance collection: which templates of the target a tracker keeps.

The paper's own constants are not public; those here stand in `constants.py`.
"""
from typing import Callable, List, NamedTuple, Optional

import numpy as np
import torch

from vishub.errors import InputError
from vishub.models.bactrack import BACTrack, TemplateCache
from vishub.tasks.tracking.constants import TrackerConstants

__all__ = ['UPDATES', 'Collection', 'Template']

# collection: the spec's rule below; latest: one later slot, the last reliable find; none: the first template alone
UPDATES = ('collection', 'latest', 'none')


class Template(NamedTuple):
    """One appearance of the target.

    Attributes:
        pixels: Its crop, uint8 (h, w, 3).
        frame: Number of the frame that it was cut from.
        reliability: Of the box, 0 to 1; 1 for the initial one.
        tokens: Projected tokens (Nz, d), before codes: its backbone runs once.
        appearance: Unit vector (d,).
    """
    pixels: np.ndarray
    frame: int
    reliability: float
    tokens: torch.Tensor
    appearance: torch.Tensor


class _Candidate(NamedTuple):
    reliability: float
    pixels: np.ndarray
    frame: int


class Collection:
    """Slot 0 is the initial template and stays; up to `max_templates - 1` later ones come and go.

    Between two updates the find with the highest reliability above `min_reliability` is kept as candidate. At an
    update it is compared with all members: one that looks like a later member (similarity of at least
    `max_similarity`) replaces it if it is more reliable, and is dropped otherwise; a new appearance is appended, or
    replaces the oldest later member. Unreliable stretches therefore never change the collection.

    Args:
        model: Network.
        prepare: Crops uint8 (h, w, 3) -> what the network takes, (1, 3, h, w).
        update: One of `UPDATES`.
        constants: `max_templates`, `interval`, `min_reliability` and `max_similarity` are used; None for the field's.

    Attributes:
        templates: The members, the initial one first.
        cache: What the network knows of them.

    Raises:
        InputError: If there is no such update.
    """

    def __init__(
            self,
            model: BACTrack,
            prepare: Callable[[np.ndarray], torch.Tensor],
            update: str = 'collection',
            constants: Optional[TrackerConstants] = None,
    ):
        if update not in UPDATES:
            raise InputError(f"template_update is '{update}': it is one of {', '.join(UPDATES)}")
        self._model, self._prepare = model, prepare
        self.update, self.constants = update, constants or TrackerConstants()
        self.templates: List[Template] = []
        self._best: Optional[_Candidate] = None
        self._cache: Optional[TemplateCache] = None

    @property
    def cache(self) -> TemplateCache:
        assert self._cache is not None, 'start comes first'
        return self._cache

    def start(self, pixels: np.ndarray) -> None:
        """Begin with the initial template alone."""
        self.templates, self._best = [self._template(_Candidate(1., pixels, 0))], None
        self._rebuild()

    def offer(self, reliability: float, frame: int, cut: Callable[[], np.ndarray]) -> bool:
        """Tell of a find, and update where it is time.

        Args:
            reliability: Of its box.
            frame: Its number; the initial one is 0.
            cut: Gives its template crop, where that is wanted.

        Returns:
            Whether the collection changed.
        """
        if self.update == 'none' or self.constants.max_templates == 1:
            return False
        better = self._best is None or reliability > self._best.reliability or self.update == 'latest'
        if reliability > self.constants.min_reliability and better:
            self._best = _Candidate(reliability, cut(), frame)
        if frame % self.constants.interval or self._best is None:
            return False
        candidate, self._best = self._template(self._best), None
        changed = self._replace_latest(candidate) if self.update == 'latest' else self._join(candidate)
        if changed:
            self._rebuild()
        return changed

    def _replace_latest(self, candidate: Template) -> bool:
        self.templates[1:] = [candidate]
        return True

    def _join(self, candidate: Template) -> bool:
        similarity = [float(member.appearance @ candidate.appearance) for member in self.templates]
        nearest = int(np.argmax(similarity))
        if similarity[nearest] >= self.constants.max_similarity:  # nothing new
            if nearest == 0 or candidate.reliability <= self.templates[nearest].reliability:
                return False
            self.templates[nearest] = candidate
        else:
            if len(self.templates) == self.constants.max_templates:
                oldest = min(range(1, len(self.templates)), key=lambda place: self.templates[place].frame)
                del self.templates[oldest]
            self.templates.append(candidate)
        return True

    def _template(self, candidate: _Candidate) -> Template:
        with torch.inference_mode():
            tokens = self._model.project(self._prepare(candidate.pixels))[0]
            appearance = self._model.embed_appearance(tokens)
        return Template(candidate.pixels, candidate.frame, candidate.reliability, tokens, appearance)

    def _rebuild(self) -> None:
        with torch.inference_mode():
            self._cache = self._model.encode_templates(
                torch.stack([member.tokens for member in self.templates])[None])
