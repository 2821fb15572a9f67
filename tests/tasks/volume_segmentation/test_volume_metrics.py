"""Metrics by their definitions, and the rules for missing classes."""
import numpy as np
import pytest

from tests.tasks.volume_segmentation.scans import Threshold
from vishub import InputError
from vishub.tasks.volume_segmentation.data import ProceduralCases, load_data
from vishub.tasks.volume_segmentation.metrics import (
    best_thresholds,
    dice_of_classes,
    evaluate,
    measure_case,
    surface_figures,
)
from vishub.tasks.volume_segmentation.preprocessing import Preprocessing


def box(start, size=4, shape=(16, 16, 16)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def test_dice_and_missing_classes():
    truth, found = np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int)
    truth[0], found[0, :2], found[1, :2] = 1, 1, 1
    truth[3] = 2
    assert dice_of_classes(found, truth, 4) == [pytest.approx(0.5), 0., None]
    figures = measure_case(found, truth, (1, 1, 1), ('background', 'a', 'b', 'c'))
    assert figures['b'] == {'dice': 0., 'hd95': None, 'nsd': 0.}
    assert figures['c'] == {'dice': None, 'hd95': None, 'nsd': None}
    with pytest.raises(InputError, match='must be the same'):
        measure_case(found, truth[:2], (1, 1, 1), ('background', 'a'))


def test_distances_are_in_millimetres():
    same = surface_figures(box((4, 4, 4)), box((4, 4, 4)), (1, 1, 1))
    assert same == (0., 1.)
    moved = box((7, 4, 4))
    distance, surface = surface_figures(moved, box((4, 4, 4)), (1, 1, 1))
    assert distance == pytest.approx(3) and surface < 1
    far, _ = surface_figures(moved, box((4, 4, 4)), (2.5, 1, 1))
    assert far == pytest.approx(7.5)


def test_best_thresholds_part_what_can_be_parted():
    class Steps(ProceduralCases):
        def _make(self, index):
            case = super()._make(index)
            image = (case.label[None] * 2).astype(np.float32)
            return type(case)(case.name, image + np.random.default_rng(index).normal(0, 0.01, image.shape).astype(
                np.float32), case.label, case.spacing)

    cases = Steps(2, 24, 3, Preprocessing())
    thresholds = best_thresholds(cases, 3)
    case = cases[0]
    found = np.digitize(case.image[0], thresholds)
    assert np.mean(dice_of_classes(found, case.label, 3)) > 0.9
    with pytest.raises(InputError, match='too many'):
        best_thresholds(cases, 4)


def test_evaluate_refuses_other_classes():
    data = load_data('procedural', size=24)
    with pytest.raises(InputError, match='knows 2 classes'):
        evaluate([Threshold()], data)
    with pytest.raises(InputError, match='two models are called'):
        evaluate([Threshold(), Threshold()], data)
