"""The rule by which templates join and leave, with appearances that the test chooses."""
import numpy as np
import pytest
import torch

from vishub import InputError
from vishub.tasks.tracking.collection import Collection
from vishub.tasks.tracking.constants import TrackerConstants


class Network:
    """Templates are one pixel; its red is an angle in degrees, which is the appearance."""

    def __init__(self):
        self.projected, self.encoded = 0, []

    def project(self, crops):
        self.projected += 1
        return crops[:, :1].flatten(2).transpose(1, 2)

    def embed_appearance(self, tokens):
        angle = torch.deg2rad(tokens[0, 0].float())
        return torch.stack([angle.cos(), angle.sin()])

    def encode_templates(self, projected):
        self.encoded.append(projected[0, :, 0, 0].int().tolist())
        return projected


def looks(angle):
    return np.array([[[angle, 0, 0]]], np.uint8)


def collect(finds, update='collection', **constants):
    """Feed finds {frame: (reliability, angle)}; unlisted frames are unreliable. Gives collection and changed frames."""
    network = Network()
    def prepare(pixels):
        return torch.tensor(pixels).permute(2, 0, 1)[None].float()

    collection = Collection(network, prepare, update, TrackerConstants(**constants))
    collection.start(looks(0))
    changed = []
    for frame in range(1, max(finds) // 20 * 20 + 21):
        reliability, angle = finds.get(frame, (0.1, 99))
        if collection.offer(reliability, frame, lambda angle=angle: looks(angle)):
            changed.append(frame)
    return collection, network, changed


def angles(collection):
    return [int(template.pixels[0, 0, 0]) for template in collection.templates]


def test_a_new_appearance_joins_at_the_end_of_the_interval():
    collection, network, changed = collect({7: (0.8, 40)})
    assert changed == [20] and angles(collection) == [0, 40]
    assert collection.templates[1].frame == 7 and collection.templates[1].reliability == 0.8
    assert network.encoded == [[0], [0, 40]] and network.projected == 2


def test_the_most_reliable_find_of_an_interval_is_the_candidate():
    collection, network, _ = collect({3: (0.6, 30), 9: (0.9, 50), 15: (0.7, 70)})
    assert angles(collection) == [0, 50]
    assert network.projected == 2  # of the others the backbone was never run


def test_unreliable_stretches_change_nothing():
    collection, _, changed = collect({5: (0.5, 40), 30: (0.49, 60), 70: (0.2, 80)})
    assert changed == [] and angles(collection) == [0]


def test_a_known_appearance_replaces_a_later_template_if_it_is_more_reliable():
    collection, _, changed = collect({5: (0.7, 40), 25: (0.6, 50), 45: (0.8, 45)})  # cos 10 degrees is 0.985
    assert changed == [20, 60] and angles(collection) == [0, 45]


def test_the_initial_template_is_never_replaced():
    collection, _, changed = collect({5: (0.99, 10), 25: (0.99, 15)})
    assert changed == [] and angles(collection) == [0]


def test_the_oldest_later_template_leaves_when_all_slots_are_full():
    collection, _, changed = collect({5: (0.6, 40), 25: (0.6, 80), 45: (0.6, 120), 65: (0.6, 160), 85: (0.6, 200)})
    assert changed == [20, 40, 60, 80, 100] and angles(collection) == [0, 120, 160, 200]


def test_the_oldest_is_meant_by_its_frame_not_its_slot():
    # the template of frame 5 is renewed at frame 65; then that of frame 25 is the oldest
    collection, _, _ = collect(
        {5: (0.6, 40), 25: (0.6, 80), 45: (0.6, 120), 65: (0.9, 42), 85: (0.6, 200)})
    assert sorted(angles(collection)) == [0, 42, 120, 200]


def test_other_modes():
    finds = {5: (0.6, 10), 9: (0.9, 40), 15: (0.7, 70), 27: (0.6, 71)}
    collection, _, changed = collect(finds, update='latest')
    assert changed == [20, 40] and angles(collection) == [0, 71]  # the last reliable one, however familiar
    collection, network, changed = collect(finds, update='none')
    assert changed == [] and network.projected == 1
    assert angles(collect(finds, max_templates=1)[0]) == [0]


@pytest.mark.parametrize('options', [{'update': 'all'}, {'interval': 0}, {'max_templates': 0}])
def test_bad_options(options):
    with pytest.raises(InputError, match='it is one of collection|give 1 or more'):
        collect({1: (0.6, 40)}, **options)
