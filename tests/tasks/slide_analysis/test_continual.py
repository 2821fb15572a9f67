"""Metrics of learning in sequence."""
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from vishub import InputError
from vishub.tasks.slide_analysis.continual import (
    area_under_curve,
    backward_transfer,
    forgetting,
    forward_transfer,
    score_tasks,
)


def reference_auc(positive, scores):
    return float(binary_auroc(torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(positive).long()))


# The worked example: what the official functions give.
ROWS = [[.9, .5], [.7, .8, .45], [.6, .85, .95, .4], [.65, .7, .9, .88]]
RANDOM = [.4, .5, .6, .3]


def test_worked_example():
    assert backward_transfer(ROWS) == pytest.approx(-0.13333, abs=1e-5)
    assert forgetting(ROWS) == pytest.approx(0.15)
    assert forward_transfer(ROWS, RANDOM) == pytest.approx(-0.016667, abs=1e-6)


def test_what_cannot_be_known():
    with pytest.raises(InputError, match='two tasks'):
        backward_transfer([[.9]])
    with pytest.raises(InputError, match='before it was learnt'):
        forward_transfer([[.9], [.8, .7]], RANDOM)


def test_area_under_curve():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 80) / 6, rng.random(80) < 0.3  # many ties
    assert area_under_curve(scores, positive) == pytest.approx(reference_auc(positive, scores))
    assert area_under_curve([1, 2], [True, True]) is None


def test_both_protocols():
    # task 0 = classes 0, 1; task 1 = classes 2, 3
    logits = torch.tensor([
        [3., 1, 0, 0],   # 0: right
        [0., 2, 9, 0],   # 1: another task's class wins, but within its own task it is right
        [0., 0, 2, 1],   # 2: right
        [0., 0, 2, 1],   # 3: wrong both ways
    ])
    found = score_tasks(logits, [0, 1, 2, 3], [[0, 1], [2, 3]])
    assert found['acc'] == [0.5, 0.5] and found['masked'] == [1.0, 0.5] and found['micro'] == 0.5
    assert found['auc'] == [1.0, 0.5]
    alone = score_tasks(logits, [0, 1, 2, 3], [[0, 1]])
    assert alone['acc'] == [0.5] and alone['micro'] == 0.5
    with pytest.raises(InputError, match='no slide of the classes'):
        score_tasks(logits[:2], [0, 1], [[0, 1], [2, 3]])


def test_areas_against_a_reference():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(60, 4)), np.arange(60) % 4
    found = score_tasks(logits, labels, [[0, 1], [2, 3]])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found['multi_auc'] == pytest.approx(np.mean([reference_auc(labels == c, p[:, c]) for c in range(4)]))
    own = labels >= 2
    assert found['auc_open'][1] == pytest.approx(reference_auc(labels[own] == 3, p[own, 3]))
    assert found['auc'][1] == pytest.approx(reference_auc(labels[own] == 3, p[own, 3] / (p[own, 2] + p[own, 3])))
