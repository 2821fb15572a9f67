"""Where a tracker's constants come from: the call, else the weights, else the field; and how a run chooses them."""
import copy

import numpy as np
import pytest

from vishub import InputError
from vishub.tasks.tracking import tracker as tracker_module
from vishub.tasks.tracking.constants import TrackerConstants, choose_constants
from vishub.tasks.tracking.tracker import Tracker


def test_call_before_weights_before_field(network):
    assert TrackerConstants.of(network, {}) == TrackerConstants() == TrackerConstants(4, 20, 0.5, 0.95, 0.49, 10.)
    model = copy.deepcopy(network)
    model.pretrained_cfg = {**network.pretrained_cfg, 'tracking': {'interval': 5, 'min_reliability': 0.3, 'later': 1}}
    assert TrackerConstants.of(model, {'interval': None}) == TrackerConstants(interval=5, min_reliability=0.3)
    assert Tracker(model, 'cpu', interval=7).constants == TrackerConstants(interval=7, min_reliability=0.3)


@pytest.mark.parametrize('options, sentence', [
    ({'interval': 0}, 'give 1 or more'), ({'max_templates': 0}, 'give 1 or more'),
    ({'window_influence': 1.5}, '0 to 1'),
    ({'min_size': 0.}, 'more than 0'), ({'intervals': 3}, "no option 'intervals': it has interval, max_similarity"),
])
def test_bad_constants(network, options, sentence):
    with pytest.raises(InputError, match=sentence):
        TrackerConstants.of(network, options)


class Video:
    """A target of 10 x 10 that does not move, unseen in its third frame."""

    def __len__(self):
        return 6

    def frame(self, number):
        return np.zeros((40, 40, 3), np.uint8)

    def box(self, number):
        return np.full(4, np.nan) if number == 2 else np.array([10., 10, 10, 10])


def test_each_choice_is_made_with_the_best_of_those_before(network, monkeypatch):
    seen = []

    class Guess:
        """Its box is wider the further the constants are from interval 5 and reliability 0.3."""

        def __init__(self, model, device, interval, min_reliability):
            seen.append((interval, min_reliability))
            self.width = 10 + abs(interval - 5) + 10 * abs(min_reliability - 0.3)

        def init(self, image, box):
            pass

        def update(self, image):
            return np.array([10, 10, self.width, 10]), 1.

    monkeypatch.setattr(tracker_module, 'Tracker', Guess)
    lines = []
    chosen, trials = choose_constants(
        network, [Video(), Video()], choices=(('interval', (20, 5, 10)), ('min_reliability', (0.5, 0.3))),
        report=lines.append)
    assert chosen == {'interval': 5, 'min_reliability': 0.3}
    assert seen[::2] == seen[1::2] == [(20, 0.5), (5, 0.5), (10, 0.5), (5, 0.3)]  # two videos
    assert [trial['overlap'] for trial in trials] == pytest.approx([10 / 27, 10 / 12, 10 / 17, 1], abs=1e-4)
    assert lines[0] == 'interval 5: overlap 0.8333 (so far 0.3704 with 20)' and len(lines) == 3
