"""The Deblur tab without a browser: what it shows, what it gives to download, what it says when something is wrong."""
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

from app import deblur as tab
from app.main import build_app
from app.work import Stopped
from vishub.hub import save_folder
from vishub.tasks.deblurring.photo import Photo

NAME = 'deeprftv2_tiny.noise'


@pytest.fixture(scope='module')
def untrained(tmp_path_factory) -> Path:
    """A folder for VISHUB_WEIGHTS with an untrained small model."""
    root = tmp_path_factory.mktemp('deblurring')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('deeprftv2_tiny', depths=(1, 1, 1), num_columns=1, dim=8, kernel_dim=8)
    save_folder(model, root / NAME, metrics={}, card={})
    return root


@pytest.fixture
def served(untrained, monkeypatch) -> Path:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(untrained))
    return untrained


@pytest.fixture
def photo(tmp_path) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = 'Box'
    path = tmp_path / 'upload.webp'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path, exif=exif)
    return path


def states(path, model=NAME, strength=1., shake=0., seed=0):
    upload = {'path': str(path), 'orig_name': 'holiday.webp'}
    for state in tab.deblur(upload, model, strength, shake, seed):
        download = state[3]
        if getattr(download, 'value', None):  # before the folder behind it goes
            file = download.value['path']
            with Image.open(file) as image:
                yield state, (image.format, image.size, image.getexif().get(ExifTags.Base.Model), file)
        else:
            yield state, None


def test_sharpens(served, photo):
    (pictures, kernels, facts, _, status, _), downloaded = list(states(photo))[-1]
    before, after = pictures
    assert before.size == after.size == (56, 40) and before.tobytes() != after.tobytes()
    assert downloaded[:3] == ('WEBP', (56, 40), 'Box') and downloaded[3].endswith('holiday.sharp.webp')
    assert kernels.mode == 'RGB' and NAME in facts and 'holiday.webp: 56 x 40 pixels' in status
    assert 'dB' not in facts + status  # the truth is not known


def test_shakes_first(served, photo):
    (pictures, _, facts, _, status, _), _ = list(states(photo, shake=9))[-1]
    (unchanged, *_), _ = list(states(photo, shake=9, strength=0.))[-1]
    assert pictures[0].tobytes() == unchanged[0].tobytes()
    np.testing.assert_allclose(np.asarray(unchanged[1]), np.asarray(unchanged[0]), atol=1)
    with Image.open(photo) as given:
        assert np.abs(np.asarray(pictures[0], float) - np.asarray(given.convert('RGB'))).mean() > 5
    assert facts.count('dB') == 2 and 'the truth is known' in status


def test_shakes_grow_with_their_length():
    photo = Photo(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))
    errors = []
    for length in (1, 5, 20):
        moved, kernel = tab.shaken(photo, length, 3)
        errors.append(np.abs(moved.pixels[..., :3].astype(int) - photo.pixels[..., :3]).mean())
        assert np.array_equal(moved.pixels[..., 3], photo.pixels[..., 3])
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[-1]
    assert not np.array_equal(tab.shaken(photo, 9, 1)[1], tab.shaken(photo, 9, 2)[1])


def test_large_pictures_are_shown_smaller_and_given_whole(served, tmp_path, monkeypatch):
    monkeypatch.setattr(tab, '_SHOWN', (30, 30))
    path = tmp_path / 'upload.webp'
    Image.new('RGB', (64, 48)).save(path)
    (pictures, *_), downloaded = list(states(path))[-1]
    assert pictures[0].size == (30, 22) and downloaded[1] == (64, 48)


def test_errors_are_sentences(served, photo, tmp_path):
    empty = tmp_path / 'empty.webp'
    empty.write_bytes(b'')
    for path, model, words in (
            (empty, NAME, 'holiday.webp'), (photo, 'other', "There is no model 'other' here")):
        (pictures, kernels, _, _, status, _), downloaded = list(states(path, model))[-1]
        assert pictures is None and kernels is None and downloaded is None
        assert words in status.replace('&#x27;', "'") and 'vh-error' in status and str(tmp_path) not in status
    assert 'Choose a photograph' in next(tab.deblur(None, NAME, 1, 0, 0))[4]


def test_stop(served, photo, monkeypatch):
    started = threading.Event()

    def run(chosen, path, strength, shake, seed, progress):
        started.set()
        while True:
            progress(0, 3)
    monkeypatch.setattr(tab, '_run', run)
    generator = tab.deblur({'path': str(photo), 'orig_name': 'a.webp'}, NAME, 1, 0, 0)
    next(generator)
    started.wait(10)
    tab._RUNNING.stop(None)
    assert 'Stopped.' in list(generator)[-1][4]
    assert issubclass(Stopped, Exception)


def test_page(served):
    ids = [block.elem_id for block in build_app().blocks.values()]
    assert {'vh-deblur-picture', 'vh-deblur-slider', 'vh-deblur-shake', 'vh-deblur-download'} <= set(ids)
