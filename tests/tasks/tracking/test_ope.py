"""One-pass evaluation against the toolkits' own numbers."""
import json
from pathlib import Path

import numpy as np
import pytest

from vishub import InputError
from vishub.tasks.tracking.ope import PROTOCOLS, average_overlap, score, summarise

GOLDEN = json.loads(
    (Path(__file__).parents[2] / 'golden' / 'bactrack' / 'ope_metrics_small.json').read_text(encoding='utf-8'))


def boxes(rows):
    return np.array([[np.nan if value is None else value for value in row] for row in rows])


PAIRS = [(boxes(case['result']), boxes(case['truth'])) for case in GOLDEN['sequences']]


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_golden_figures(protocol):
    expected = GOLDEN['expected'][protocol]
    scores = [score(result, truth, protocol) for result, truth in PAIRS]
    figures = summarise(scores)
    assert figures['auc'] == pytest.approx(expected['auc'], abs=1e-12)
    assert figures['precision'] == pytest.approx(expected['precision_20'], abs=1e-12)
    assert figures['success_rate'] == pytest.approx(expected['success_rate_50'], abs=1e-12)
    for one, row in zip(scores, expected['per_sequence']):
        assert one.success.mean() == pytest.approx(row['auc'], abs=1e-12)
        assert one.precision[20] == pytest.approx(row['precision_20'], abs=1e-12)
    if protocol == 'pysot':
        assert figures['normalised_precision'] == pytest.approx(expected['normalised_precision_20'], abs=1e-12)
        assert figures['normalised_auc'] == pytest.approx(expected['normalised_precision_mean'], abs=1e-12)


def test_golden_average_overlap():
    expected = GOLDEN['expected']['got10k_ao']
    results, truths = zip(*PAIRS)
    found = average_overlap(results, truths, [tuple(expected['bound'])] * 3)
    assert found['ao'] == pytest.approx(expected['ao'], abs=1e-12)
    assert found['success_rate'] == pytest.approx(expected['sr_50'], abs=1e-12)
    # cover labels say the same as missing boxes
    covers = [np.isfinite(truth).all(1) * 8 for truth in truths]
    assert average_overlap(results, truths, [tuple(expected['bound'])] * 3, covers) == found


TRUTH = boxes([[10, 10, 20, 10], [12, 11, 20, 10], [14, 12, 20, 10], [None] * 4, [18, 14, 20, 10]])
RESULT = boxes([[10, 10, 20, 10], [12, 11, 20, 10], [19, 12, 20, 10], [0, 0, 5, 5], [50, 40, 10, 10]])


@pytest.mark.parametrize('protocol, auc, precision, rate', [
    ('got10k', 0.619048, 0.75, 0.75), ('pysot', 0.495238, 0.8, 0.6)])
def test_worked_example(protocol, auc, precision, rate):
    one = score(RESULT, TRUTH, protocol)
    figures = summarise([one])
    assert figures['auc'] == pytest.approx(auc, abs=1e-6) and figures['precision'] == precision
    assert figures['success_rate'] == pytest.approx(rate)
    np.testing.assert_allclose(one.overlaps, [1, 1, 0.6, np.nan, 0])
    if protocol == 'pysot':
        assert figures['normalised_precision'] == pytest.approx(0.6)


def test_first_frame_counts_as_correct():
    wrong = RESULT.copy()
    wrong[0] = [90, 90, 5, 5]
    assert np.array_equal(score(wrong, TRUTH).success, score(RESULT, TRUTH).success)


def test_pysot_takes_boxes_at_the_border_for_absent():
    truth = np.array([[5, 5, 4, 4], [-9, 5, 4, 4], [5, 5, 0, 4]], float)
    one = score(truth + [50, 0, 0, 0], truth, 'pysot')
    assert one.precision[0] == pytest.approx(2 / 3)  # first frame, and a centre that is not positive
    assert one.success[0] == pytest.approx(1 / 3)


def test_late_overlap_is_that_of_the_second_half():
    truth = np.tile([10., 10, 10, 10], (4, 1))
    result = truth.copy()
    result[3, 0] += 10
    assert summarise([score(result, truth)])['late_iou'] == pytest.approx(0.5)


@pytest.mark.parametrize('result, protocol, sentence', [
    (RESULT[:4], 'pysot', '4 boxes found for 5'),
    (RESULT, 'vot', 'pysot or got10k'),
    (np.where(np.arange(20).reshape(5, 4) == 7, np.inf, RESULT), 'pysot', 'not finite'),
])
def test_what_cannot_be_scored(result, protocol, sentence):
    with pytest.raises(InputError, match=sentence):
        score(result, TRUTH, protocol)
    with pytest.raises(InputError, match='no sequence'):
        summarise([])
