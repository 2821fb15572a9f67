"""The Predict tab: what the listener says to good and bad clips, and the page in a browser."""
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from app import predict as tab
from app.main import launch
from vishub.hub import save_folder


@pytest.fixture(scope='module')
def predictor(tmp_path_factory) -> Path:
    """A folder for VISHUB_WEIGHTS with an untrained PredFormer."""
    root = tmp_path_factory.mktemp('predictor')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('predformer_tiny', embed_dim=16, num_heads=2, head_dim=8, n_layers=1)
    save_folder(model, root / 'predformer_tiny.untrained', metrics={}, card={})
    return root


@pytest.fixture
def served(predictor, monkeypatch) -> str:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(predictor))
    return 'predformer_tiny.untrained'


def last(path, model, horizon=8, start=0, stride=1):
    """The last thing that the listener says of a file, and the files it offers, by suffix."""
    said = None
    files = {}
    for said in tab.predict({'path': str(path), 'orig_name': Path(path).name}, model, horizon, start, stride):
        offered = said[4]
        if getattr(offered, 'value', None):
            files = {Path(file['path']).suffix: Path(file['path']).read_bytes() for file in offered.value}
    return said, files


def test_example_with_truth(served):
    (animation, errors, frames, facts, _, status, stop), files = last(tab.CLIPS[0], served, horizon=16)
    assert 'data:image/gif;base64,' in animation and 'beside the true ones' in animation
    assert errors.visible and frames.visible and stop.interactive is False
    assert '16 frames predicted from 8' in status and 'of the last given frame, copied' in status
    assert 'predformer_tiny.untrained' in facts and '32 × 32' in facts
    assert sorted(files) == ['.gif', '.json', '.npy'] and files['.gif'].startswith(b'GIF89a')


def test_end_of_a_clip_has_no_truth(served, tmp_path):
    np.save(tmp_path / 'clip.npy', np.zeros((8, 40, 30), np.uint8))
    (animation, errors, _, _, _, status, _), _ = last(tmp_path / 'clip.npy', served)
    assert 'no truth to compare with' in status and not errors.visible
    assert 'beside the true ones' not in animation


@pytest.mark.parametrize('name, sentence', [
    ('still.png', 'has 1 frame; a still picture does not tell what moves'),
    ('short.npy', 'has 5 frames; the model needs 8'),
    ('empty.npy', 'has no frames'),
    ('text.npy', 'is no array'),
])
def test_bad_clips_get_one_sentence(served, tmp_path, name, sentence):
    path = tmp_path / name
    if name == 'still.png':
        Image.new('L', (32, 32)).save(path)
    elif name == 'text.npy':
        path.write_text('none')
    else:
        np.save(path, np.zeros((5 if name == 'short.npy' else 0, 32, 32), np.uint8))
    said, files = last(path, served)
    assert sentence in said[5] and 'vh-error' in said[5]
    assert str(tmp_path) not in said[5] and not files and said[0] == ''


def test_nothing_chosen_and_unknown_model(served):
    assert 'Choose a clip' in list(tab.predict(None, served, 8, 0, 1))[-1][5]
    said, _ = last(tab.CLIPS[0], 'predformer_giant.everything')
    assert 'There is no model' in said[5]


def test_examples_come_with_their_licence():
    readme = (tab.CLIPS[0].parent / 'README.md').read_text(encoding='utf-8')
    assert 'CC-BY-SA-3.0' in readme
    assert {path.name for path in tab.CLIPS} == {path.name for path in tab.CLIPS[0].parent.glob('*.gif')}
    assert all(path.stat().st_size < 100_000 for path in tab.CLIPS)


@pytest.mark.browser
@pytest.mark.xdist_group('browser')
def test_page_plays_an_example_and_answers_a_bad_file(chromium, predictor, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    patience = 180_000
    Image.new('L', (32, 32)).save(tmp_path / 'still.png')
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        patch.setenv('VISHUB_WEIGHTS', os.pathsep.join([str(predictor)]))
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        served = launch(port=port, block=False)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=['--headless', '--no-sandbox', '--disable-gpu'])
        try:
            page = browser.new_context(viewport={'width': 390, 'height': 900}).new_page()
            page.set_default_timeout(patience)
            asked, errors = [], []
            page.on('request', lambda request: asked.append(request.url))
            page.on('pageerror', lambda error: errors.append(str(error)))
            page.goto(f'http://127.0.0.1:{port}/')
            page.get_by_role('tab', name='Predict').click()
            page.locator('#vh-predict-clip input[type=file]').set_input_files(str(tmp_path / 'still.png'))
            expect(page.locator('#vh-predict-status')).to_contain_text('a still picture', timeout=patience)
            page.locator('#vh-predict-examples button').first.click()
            animation = page.locator('#vh-predict-animation img')
            expect(animation).to_be_visible(timeout=patience)
            assert animation.evaluate('image => image.naturalWidth') > 300
            expect(page.locator('#vh-predict-errors img')).to_be_visible(timeout=patience)
            assert page.evaluate('document.documentElement.scrollWidth') <= 390
            assert [url for url in asked if '127.0.0.1' not in url and not url.startswith(('data:', 'blob:'))] == []
            assert errors == []
            folder = Path(__file__).resolve().parents[2] / 'artifacts' / 'screenshots'
            folder.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(folder / 'predict_phone.png'), full_page=True)
        finally:
            browser.close()
            served.close()
