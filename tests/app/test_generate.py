"""The Generate tab without a browser: what it shows, and what it says when something is wrong."""
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from app import generate as tab
from app.main import build_app
from app.work import Stopped
from tests.models.test_dit import randomised
from vishub.hub import save_folder

NAMES = ('boot', 'bag', '<i>hat</i>')
STUDENT, TEACHER = 'lit_small28.shapes', 'dit_small28.shapes'


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    """A folder for VISHUB_WEIGHTS with a tiny LiT and a tiny DiT that were not trained."""
    root = tmp_path_factory.mktemp('generators')
    for name in (STUDENT, TEACHER):
        model = randomised(timm.create_model(name.partition('.')[0], depth=1, num_classes=3))
        save_folder(model, root / name, metrics={}, card={}, pretrained_cfg=dict(label_names=NAMES, num_classes=3))
    return root


@pytest.fixture
def served(weights, monkeypatch):
    monkeypatch.setenv('VISHUB_WEIGHTS', str(weights))


def pages(model=STUDENT, label='bag', seed=3, count=2, steps=3, guidance=2, solver='dpm++'):
    return list(tab.generate(model, label, seed, count, steps, guidance, solver))


def said(page) -> str:
    return page[4]


def test_pictures_gif_and_facts(served):
    preview, gallery, gif, facts, status, stop = pages()[-1]
    assert isinstance(preview, Image.Image) and preview.mode == 'RGB'
    assert gallery.visible and gif.visible and not stop.interactive
    path = gif.value['path'] if isinstance(gif.value, dict) else gif.value
    with Image.open(path) as moving:
        assert moving.format == 'GIF' and moving.n_frames == 3
    assert '2 picture(s) of bag, seeds 3 to 4' in status and STUDENT in facts and 'local-dir' not in facts
    again = pages()[-1][0]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(preview))
    assert not np.array_equal(np.asarray(pages(seed=4)[-1][0]), np.asarray(preview))


def test_it_shows_the_pictures_while_they_come(served, monkeypatch):
    class Slow(tab.Work):
        def __init__(self, function):
            super().__init__(function, poll_seconds=0.001)

    monkeypatch.setattr(tab, 'Work', Slow)
    seen = pages(steps=20)
    live = [page[0] for page in seen[:-1] if isinstance(page[0], Image.Image)]
    assert live and any('of 20' in said(page) for page in seen)
    assert all(page[5].interactive for page in seen[:-1])


def test_models_side_by_side(served):
    preview, gallery, gif, facts, status, _ = list(tab.compare('boot', 0, 2, 3, 1, 'ddpm'))[-1]
    assert isinstance(preview, Image.Image) and preview.width > 2 * 224
    assert STUDENT in facts and TEACHER in facts and 'Seconds' in facts
    assert not gallery.visible and not gif.visible and '2 models' in status


@pytest.mark.parametrize('wrong, words', [
    (dict(model='lit_s_2.none'), 'There is no model'),
    (dict(label='cat'), 'is no class'),
    (dict(seed=None), 'The seed is None'),
    (dict(seed=1.5), 'The seed is 1.5'),
    (dict(seed=-1), 'seed is -1'),
    (dict(count=40), 'at most 16'),
    (dict(count='many'), 'number of pictures is many'),
    (dict(steps=1), '2 to 1000'),
    (dict(steps=30, solver='ddim'), 'divisor of 1000, as 25'),
    (dict(guidance=-1), 'guidance_scale is -1'),
])
def test_one_sentence_says_what_is_wrong(served, wrong, words):
    last = pages(**wrong)[-1]
    assert 'vh-error' in said(last) and words in said(last)
    assert last[0] is None and not last[1].visible


def test_stopping_ends_the_work(served, monkeypatch):
    class Impatient(tab.Work):
        def result(self):
            self.stop()
            super().result()
            raise Stopped

    monkeypatch.setattr(tab, 'Work', Impatient)
    assert 'Stopped.' in said(pages()[-1])


def test_without_weights_the_tab_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tab, 'trained_models', lambda task: [])
    page = build_app()
    assert any(tab.NO_MODELS in str(getattr(block, 'value', '')) for block in page.blocks.values())


def test_the_page_has_the_tab(served):
    ids = {getattr(block, 'elem_id', None) for block in build_app().blocks.values()}
    assert {'vh-gen-class', 'vh-gen-run', 'vh-gen-compare', 'vh-gen-stop', 'vh-gen-preview'} <= ids
