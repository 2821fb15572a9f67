"""One-pass evaluation: how well boxes found from the first frame on agree with the true ones.

Boxes are x, y, w, h, continuous; the centre is x + (w - 1) / 2, y + (h - 1) / 2, as in the toolkits. The first frame
counts as correct. All figures are means over frames first, then over sequences.

Two protocols differ where the target is absent (its true box is not finite). `got10k`: such frames are left out.
`pysot` (aerial toolkits, and STARK): they stay in the denominator, as failures for success and, because their error is
set to -1, as hits for precision; published figures of UAV sets follow it. There a frame also counts as absent for
precision if its true centre is not positive on both axes, and for success if its true width or height is not.
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from vishub.errors import InputError
from vishub.tasks.tracking.crops import iou

__all__ = [
    'NORMALISED', 'PIXELS', 'PROTOCOLS', 'THRESHOLDS', 'Scores', 'average_overlap', 'score', 'summarise']

PROTOCOLS = ('pysot', 'got10k')
THRESHOLDS = np.linspace(0, 1, 21)  # of overlap
PIXELS = np.arange(51)  # of centre distance
NORMALISED = np.arange(51) / 100  # of centre distance in multiples of the target's size


class Scores(NamedTuple):
    """Curves of one sequence.

    Attributes:
        name: Of the sequence.
        success: Share of frames whose overlap is above each of `THRESHOLDS`, (21,).
        precision: Share of frames whose centre is within each of `PIXELS`, (51,).
        normalised: The same for distances divided by the true width and height, within each of `NORMALISED`.
        overlaps: IoU of each frame, NaN where the target is absent.
        num_frames: Frames that count.
    """
    name: str
    success: np.ndarray
    precision: np.ndarray
    normalised: np.ndarray
    overlaps: np.ndarray
    num_frames: int


def score(result: np.ndarray, truth: np.ndarray, protocol: str = 'pysot', name: str = '') -> Scores:
    """The curves of one sequence.

    Args:
        result: Boxes found (N, 4); the first is replaced by the true one.
        truth: True boxes (N, 4), NaN where the target is absent.
        protocol: See above.
        name: Of the sequence, for messages.

    Raises:
        InputError: If the numbers of boxes differ, a found box is not finite, or the protocol is unknown.
    """
    result, truth = np.array(result, np.float64), np.asarray(truth, np.float64)
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is '{protocol}': it is {' or '.join(PROTOCOLS)}")
    if result.shape != truth.shape or result.ndim != 2 or result.shape[1] != 4:
        raise InputError(
            f'{name or "the sequence"} has {len(result)} boxes found for {len(truth)} true ones: they must be as many, '
            'four numbers each')
    if not np.isfinite(result[1:]).all():
        raise InputError(f'{name or "the sequence"} has a found box that is not finite')
    result[0] = truth[0]
    seen = np.isfinite(truth).all(1)
    overlaps = iou(result, truth)
    with np.errstate(invalid='ignore', divide='ignore'):
        apart = (result[:, :2] + (result[:, 2:] - 1) / 2) - (truth[:, :2] + (truth[:, 2:] - 1) / 2)
        distance = np.sqrt((apart ** 2).sum(1))
        relative = np.sqrt(((apart / truth[:, 2:]) ** 2).sum(1))
    if protocol == 'got10k':
        overlaps_, distance, relative = overlaps[seen], distance[seen], relative[seen]
    else:
        centre = truth[:, :2] + (truth[:, 2:] - 1) / 2
        overlaps_ = np.where(seen & (truth[:, 2:] > 0).all(1), overlaps, -1)
        located = seen & (centre > 0).all(1)
        distance, relative = np.where(located, distance, -1), np.where(located, relative, -1)
    if not len(overlaps_):
        raise InputError(f'{name or "the sequence"} shows its target in no frame')
    return Scores(
        name=name,
        success=(overlaps_[:, None] > THRESHOLDS).mean(0),
        precision=(distance[:, None] <= PIXELS).mean(0),
        normalised=(relative[:, None] <= NORMALISED).mean(0),
        overlaps=np.where(seen, overlaps, np.nan),
        num_frames=len(overlaps_),
    )


def summarise(scores: Sequence[Scores], radius: int = 20) -> Dict[str, float]:
    """Means over sequences, from 0 to 1.

    Args:
        scores: One a sequence.
        radius: Pixels within which precision counts a centre as hit.

    Returns:
        `auc` (mean of the success curve), `precision`, `success_rate` (overlap above 0.5), `normalised_precision` (at
        0.2), `normalised_auc` (mean of that curve, as LaSOT and TrackingNet report it), and `late_iou` (mean overlap
        in the second half of the frames).
    """
    if not scores:
        raise InputError('no sequence was measured')
    success, precision, normalised = (
        np.mean([getattr(one, name) for one in scores], axis=0) for name in ('success', 'precision', 'normalised'))
    late = [np.nanmean(one.overlaps[len(one.overlaps) // 2:]) for one in scores
            if np.isfinite(one.overlaps[len(one.overlaps) // 2:]).any()]
    return {
        'auc': float(success.mean()),
        'precision': float(precision[radius]),
        'success_rate': float(success[10]),
        'normalised_precision': float(normalised[20]),
        'normalised_auc': float(normalised.mean()),
        'late_iou': float(np.mean(late)) if late else float('nan'),
    }


def average_overlap(
        results: Sequence[np.ndarray],
        truths: Sequence[np.ndarray],
        bounds: Sequence[Tuple[int, int]],
        covers: Optional[Sequence[Any]] = None,
) -> Dict[str, float]:
    """GOT-10k's AO and SR: over the frames of all sequences together, without the first of each.

    The server's mAO is a mean over classes and needs labels that are not public.

    Args:
        results, truths: Boxes (N, 4) of each sequence.
        bounds: Width and height of its frames, to which both boxes are clipped.
        covers: How much of the target can be seen in each frame; those of 0 are left out. By default, frames without
            a true box count as such.

    Returns:
        `ao`, and `success_rate` (overlap above 0.5).
    """
    pooled: List[np.ndarray] = []
    for place, (result, truth, bound) in enumerate(zip(results, truths, bounds)):
        truth = np.asarray(truth, np.float64)
        seen = np.isfinite(truth).all(1)
        if covers is not None and covers[place] is not None:
            seen &= np.asarray(covers[place]) > 0
        overlap = iou(_clipped(np.asarray(result, np.float64), bound), _clipped(truth, bound))
        pooled.append(overlap[1:][seen[1:]])
    overlaps = np.concatenate(pooled) if pooled else np.zeros(0)
    if not len(overlaps):
        raise InputError('no frame shows its target')
    return {'ao': float(overlaps.mean()), 'success_rate': float((overlaps > 0.5).mean())}


def _clipped(boxes: np.ndarray, bound: Tuple[int, int]) -> np.ndarray:
    low = np.clip(boxes[:, :2], 0, bound)
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, bound)
    return np.concatenate([low, high - low], axis=1)
