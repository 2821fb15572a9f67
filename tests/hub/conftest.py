"""A small trained-looking model, saved; a catalogue that knows it; and a Hub on loopback for the real client."""
import json

import pytest
import timm
import torch
from huggingface_hub import close_session, constants
from sample_weights import METRICS, NAME

from tests.hub_server import HubServer, User
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that knows the token `hf_right`; files of 1 MB and more go through LFS, Xet is off."""
    with HubServer() as server:
        server.tokens['hf_right'] = User('me')
        server.tokens['hf_reader'] = User('guest', write=False)
        monkeypatch.setenv('HF_ENDPOINT', server.url)
        monkeypatch.setenv('HF_TOKEN', 'hf_right')
        monkeypatch.setenv('HF_HUB_OFFLINE', '0')
        # The client has read its own settings at import.
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url + '/{repo_id}/resolve/{revision}/{filename}')
        for name, value in (
                ('HF_HUB_OFFLINE', False), ('HF_HUB_DISABLE_XET', True),
                ('HF_HUB_CACHE', str(tmp_path / 'hub-cache')), ('HF_TOKEN_PATH', str(tmp_path / 'no-token')),
                ('HF_HUB_DOWNLOAD_TIMEOUT', 1), ('HF_HUB_ETAG_TIMEOUT', 1),
        ):
            monkeypatch.setattr(constants, name, value)
        close_session()
        yield server
        close_session()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between attempts take no time."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)
