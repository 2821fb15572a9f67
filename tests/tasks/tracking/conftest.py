"""An untrained tracker in a tiny network, and what several tests draw."""
import numpy as np
import pytest
import timm
import torch

import vishub  # noqa: F401
from vishub.hub import save_folder
from vishub.tasks.tracking.scenes import NoiseTextures, Scene


@pytest.fixture(scope='session')
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model('bactrack_tiny').eval()


@pytest.fixture(scope='session')
def weights(network, tmp_path_factory):
    """Folder of the untrained network's weights."""
    return save_folder(network, tmp_path_factory.mktemp('weights') / 'bactrack_tiny.untrained', metrics={}, card={})


@pytest.fixture(scope='session')
def scene():
    return Scene(NoiseTextures(), (1, 2, 3), length=12)


@pytest.fixture(scope='session')
def clip(scene):
    """uint8 (12, 128, 128, 3)."""
    return np.stack([scene.frame(number) for number in range(len(scene))])
