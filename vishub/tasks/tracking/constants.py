"""The constants of a tracker: those of the field, and a choice among others on validation videos.

How often a collection should take a new template in depends on how fast targets change their looks, and how reliable
a find must be depends on the discriminator; so a training run chooses, and the weights carry what it chose
(`tracking` in their config). Trackers of the field do the same by hand, for each benchmark.
"""
import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from vishub.errors import InputError
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.tracking.crops import iou

__all__ = ['CHOICES', 'TrackerConstants', 'choose_constants']

# What is tried, in this order, each with the best of those before; the field's own value comes first.
CHOICES: Tuple[Tuple[str, Tuple[float, ...]], ...] = (
    ('interval', (20, 10, 5)),
    ('min_reliability', (0.5, 0.3, 0.7)),
    ('window_influence', (0.49, 0.7)),
    ('max_similarity', (0.95, 0.9, 0.98)),
)


@dataclasses.dataclass(frozen=True)
class TrackerConstants:
    """What a tracker goes by.

    Attributes:
        max_templates: Templates at most, the initial one among them; MixFormer has three later ones on aerial videos.
        interval: Frames between updates of the collection; MixFormer's for aerial videos.
        min_reliability: Finds must be above it to become templates, 0 to 1; that of STARK and MixFormer.
        max_similarity: From here on two templates look the same, 0 to 1; ours.
        window_influence: Share of the Hann window in the score of a place, 0 to 1; TransT's.
        min_size: Least width and height of a box in pixels; TransT's and TCTrack's. Many aerial targets are smaller.

    Raises:
        InputError: If one is out of range.
    """
    max_templates: int = 4
    interval: int = 20
    min_reliability: float = 0.5
    max_similarity: float = 0.95
    window_influence: float = 0.49
    min_size: float = 10.

    def __post_init__(self) -> None:
        if self.max_templates < 1 or self.interval < 1:
            raise InputError(f'max_templates is {self.max_templates} and interval {self.interval}: give 1 or more')
        if not 0 <= self.window_influence <= 1 or self.min_size <= 0:
            raise InputError(
                f'window_influence is {self.window_influence}, min_size {self.min_size}: give 0 to 1, and more than 0')

    @classmethod
    def of(cls, model: nn.Module, given: Mapping[str, Any]) -> 'TrackerConstants':
        """What is given (None stands for nothing); else what the weights carry; else the field's."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise InputError(f"a tracker has no option '{unknown[0]}': it has {', '.join(sorted(known))}")
        carried = pretrained_cfg_of(model).get('tracking') or {}
        return cls(**{
            **{name: value for name, value in carried.items() if name in known},
            **{name: value for name, value in given.items() if value is not None}})


def choose_constants(
        model: Any,
        videos: Sequence[Any],
        device: Any = None,
        choices: Sequence[Tuple[str, Sequence[float]]] = CHOICES,
        most_frames: int = 160,
        report: Optional[Callable[[str], None]] = None,
) -> Tuple[Dict[str, float], List[Dict[str, float]]]:
    """Choose one constant after the other by the mean overlap of the boxes with the true ones.

    Args:
        model: The network, with its discriminator.
        videos: Validation videos, see `data.Video`; frames without a true box do not count.
        device: See `Tracker`.
        choices: Names and values to try; the first value of each stands unless another is better.
        most_frames: Of a video, from its beginning.
        report: Called with a line for each trial.

    Returns:
        The chosen value of each name; and the trials, each its values and the `overlap` they reached, 0 to 1.
    """
    from vishub.tasks.tracking.tracker import Tracker  # it imports this module

    def overlap(constants: Mapping[str, Any]) -> float:
        found = []
        for video in videos:
            tracker = Tracker(model, device, **constants)
            tracker.init(video.frame(0), video.box(0))
            for number in range(1, min(len(video), most_frames)):
                box, _ = tracker.update(video.frame(number))
                found.append(float(iou(box, video.box(number))))
        return float(np.nanmean(found))

    chosen: Dict[str, float] = {name: values[0] for name, values in choices}
    trials: List[Dict[str, float]] = []
    training = model.training
    with torch.inference_mode():
        best = overlap(chosen)
        trials.append({**chosen, 'overlap': round(best, 4)})
        for name, values in choices:
            for value in values[1:]:
                trial = {**chosen, name: value}
                reached = overlap(trial)
                trials.append({**trial, 'overlap': round(reached, 4)})
                if report is not None:
                    report(f'{name} {value:g}: overlap {reached:.4f} (so far {best:.4f} with {chosen[name]:g})')
                if reached > best:
                    best, chosen = reached, trial
    model.train(training)
    return chosen, trials
