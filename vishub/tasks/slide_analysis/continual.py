"""What is measured of a learner of tasks in sequence: how well, and how much was lost on the way.

A matrix has a row after each task: R[t][k] is the score on task k after task t. Rows may be ragged: the entry beyond
the diagonal is the score on the next task before it was learnt, and earlier rows need no further ones.
"""
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from vishub.errors import InputError

__all__ = ['area_under_curve', 'backward_transfer', 'forgetting', 'forward_transfer', 'score_tasks']

Matrix = Sequence[Sequence[float]]


def backward_transfer(matrix: Matrix) -> float:
    """BWT: mean over the tasks but the last of R[T-1][k] - R[k][k]; negative where something was lost.

    Raises:
        InputError: If there are not two tasks.
    """
    last = _last(matrix)
    return float(np.mean([last[k] - matrix[k][k] for k in range(len(matrix) - 1)]))


def forgetting(matrix: Matrix) -> float:
    """Mean over the tasks but the last of (the best score ever, 0 where there was none) - R[T-1][k]; 0 is none."""
    last = _last(matrix)
    return float(np.mean([
        max(row[k] if k < len(row) else 0. for row in matrix) - last[k] for k in range(len(matrix) - 1)]))


def forward_transfer(matrix: Matrix, untrained: Sequence[float]) -> float:
    """FWT: mean over the tasks but the first of R[k-1][k] - the untrained network's score.

    Raises:
        InputError: If a score beyond the diagonal is missing, or there are not two tasks.
    """
    _last(matrix)
    if any(len(matrix[k - 1]) <= k for k in range(1, len(matrix))) or len(untrained) < len(matrix):
        raise InputError('forward transfer needs the score on each task before it was learnt, and the untrained one')
    return float(np.mean([matrix[k - 1][k] - untrained[k] for k in range(1, len(matrix))]))


def _last(matrix: Matrix) -> Sequence[float]:
    if len(matrix) < 2:
        raise InputError('transfer and forgetting need two tasks or more')
    return matrix[-1]


def area_under_curve(scores: Any, positive: Any) -> Optional[float]:
    """Area under the ROC curve: the chance that a positive has the higher score, ties counted half.

    Args:
        scores: (n,) floats.
        positive: (n,) bool.

    Returns:
        0 to 1; None where all are positive or none is.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    count, rest = int(positive.sum()), int((~positive).sum())
    if not count or not rest:
        return None
    values, place = np.unique(scores, return_inverse=True)
    heads = np.bincount(place, minlength=len(values))
    ranks = (np.cumsum(heads) - (heads - 1) / 2)[place]  # mean rank of equal scores
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))


def score_tasks(logits: Any, labels: Any, tasks: Sequence[Sequence[int]]) -> Dict[str, Any]:
    """Accuracy and AUC of each task, in both protocols.

    Args:
        logits: (n, K) of slides of any of the tasks.
        labels: (n,) class numbers.
        tasks: Class numbers of each task that has been seen (and, for the zero-shot score, of the next).

    Returns:
        Lists with one number a task: `acc` (class-incremental: the class is sought among all K), `masked`
        (task-incremental: among the task's own), `auc` (of the second class after masking; one-vs-rest mean where a
        task has more than two classes), `auc_open` (the same without masking); and `micro`, the pooled
        class-incremental accuracy, and `multi_auc`, one-vs-rest over all the classes of `tasks`, probabilities not
        renormalised. All 0 to 1; None for an AUC without both kinds.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    probabilities = _softmax(logits)
    found: Dict[str, Any] = {'acc': [], 'masked': [], 'auc': [], 'auc_open': []}
    for classes in tasks:
        chosen = np.isin(labels, classes)
        if not chosen.any():
            raise InputError(f'no slide of the classes {list(classes)} to measure on')
        own, truth = np.asarray(classes), labels[chosen]
        masked = _softmax(logits[chosen][:, own])
        found['acc'].append(float((logits[chosen].argmax(1) == truth).mean()))
        found['masked'].append(float((own[masked.argmax(1)] == truth).mean()))
        found['auc'].append(_mean_auc(masked, truth, own))
        found['auc_open'].append(_mean_auc(probabilities[chosen][:, own], truth, own))
    seen = np.array(sorted({label for classes in tasks for label in classes}))
    pooled = np.isin(labels, seen)
    found['micro'] = float((logits[pooled].argmax(1) == labels[pooled]).mean())
    found['multi_auc'] = _mean_auc(probabilities[pooled][:, seen], labels[pooled], seen, every=True)
    return found


def _mean_auc(
        probabilities: np.ndarray, truth: np.ndarray, classes: np.ndarray, every: bool = False) -> Optional[float]:
    """The second class's where there are two; else, or if `every`, the mean of each class against the rest."""
    columns = [1] if len(classes) == 2 and not every else range(len(classes))
    areas = [area_under_curve(probabilities[:, column], truth == classes[column]) for column in columns]
    known: List[float] = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
