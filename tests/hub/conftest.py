"""A small trained-looking model, saved, and a catalogue that knows it."""
import json

import pytest
import timm
import torch
from sample_weights import METRICS, NAME

from vishub import catalog
from vishub.hub import find, save_folder


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
    """A folder as training leaves it, and the model that is in it."""
    torch.manual_seed(1)
    model = timm.create_model(NAME).eval()
    card = {'datasets': ['cifar10'], 'limits': ['Pictures of 32 pixels.'], 'licence': 'apache-2.0'}
    return save_folder(model, tmp_path_factory.mktemp('weights') / NAME, metrics=METRICS, card=card), model


@pytest.fixture
def catalogued(saved, monkeypatch):
    """The catalogue has that model's row, and neither checkout nor wheel has its file."""
    metrics = json.loads((saved[0] / 'metrics.json').read_text())
    row = catalog.Weight(
        NAME, 'CIFAR-10 (JPEG)', 'top1', 12.5, metrics['sha256'], metrics['size'], 'apache-2.0')
    monkeypatch.setattr(catalog, '_WEIGHTS', (row,))
    monkeypatch.setattr(find, '_roots', lambda: [])
    return row
