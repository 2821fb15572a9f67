"""The Ultrasound tab: what the listener says to good and bad clips, and the page in a browser."""
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pydicom.data import get_testdata_file

from app import ultrasound as tab
from app.main import launch
from vishub.hub import save_folder


@pytest.fixture(scope='module')
def segmenter(tmp_path_factory) -> Path:
    """A folder for VISHUB_WEIGHTS with an untrained ASTR."""
    root = tmp_path_factory.mktemp('segmenter')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('astr_tiny')
    save_folder(model, root / 'astr_tiny.untrained', metrics={}, card={}, dtype=torch.float32)
    return root


@pytest.fixture
def served(segmenter, monkeypatch) -> str:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(segmenter))
    return 'astr_tiny.untrained'


def last(path, model, start=0, stride=1):
    """The last thing that the listener says of a file, and the files it offers, by suffix."""
    said = None
    files = {}
    for said in tab.segment({'path': str(path), 'orig_name': Path(path).name}, model, start, stride):
        offered = said[4]
        if getattr(offered, 'value', None):
            files = {Path(file['path']).suffix: Path(file['path']).read_bytes() for file in offered.value}
    return said, files


def test_example(served):
    (clip, area, frames, facts, _, status, stop), files = last(tab.CLIPS[0], served)
    assert clip.visible and area.visible and frames.visible and stop.interactive is False
    assert 'phantom-linear-1.gif: a lesion is marked in' in status and 'Research use only' in status
    assert 'astr_tiny.untrained' in facts and '24 of 64 × 64' in facts
    assert sorted(files) == ['.csv', '.mp4', '.zip'] and files['.mp4'][4:8] == b'ftyp'
    assert files['.csv'].count(b'\n') == 25


def test_dicom_clip_and_options(served):
    (_, _, _, facts, _, status, _), files = last(get_testdata_file('examples_ybr_color.dcm'), served, 10, 5)
    assert '4 of 320 × 240' in facts and 'areas are in pixels' in status
    assert files['.csv'].startswith(b'frame,seconds,area_pixels\n10,0.3333,')


@pytest.mark.parametrize('name, sentence', [
    ('empty.npy', 'has no frames'),
    ('text.mp4', 'is not a video'),
    ('odd.npy', 'has shape 5 x 32'),
])
def test_bad_clips_get_one_sentence(served, tmp_path, name, sentence):
    path = tmp_path / name
    if name == 'text.mp4':
        path.write_text('none')
    else:
        np.save(path, np.zeros((5, 32) if name == 'odd.npy' else (0, 32, 32), np.uint8))
    said, files = last(path, served)
    assert sentence in said[5] and 'vh-error' in said[5]
    assert str(tmp_path) not in said[5] and not files and said[0] is None


def test_nothing_chosen_and_unknown_model(served):
    assert 'Choose a clip' in list(tab.segment(None, served, 0, 1))[-1][5]
    said, _ = last(tab.CLIPS[0], 'astr_giant.everything')
    assert 'There is no model' in said[5]


def test_examples_are_described_and_small():
    readme = (tab.CLIPS[0].parent / 'README.md').read_text(encoding='utf-8')
    assert all(path.name in readme and path.stat().st_size < 100_000 for path in tab.CLIPS)
    assert {path.name for path in tab.CLIPS} == {path.name for path in tab.CLIPS[0].parent.glob('*.gif')}


@pytest.mark.browser
@pytest.mark.xdist_group('browser')
def test_page_marks_an_example_and_answers_a_bad_file(chromium, segmenter, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    patience = 180_000
    (tmp_path / 'text.mp4').write_text('none')
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        patch.setenv('VISHUB_WEIGHTS', os.pathsep.join([str(segmenter)]))
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
            page.get_by_role('tab', name='Ultrasound').click()
            expect(page.locator('#vh-ultrasound-clip')).to_be_visible(timeout=patience)
            page.locator('#vh-ultrasound-clip input[type=file]').set_input_files(str(tmp_path / 'text.mp4'))
            expect(page.locator('#vh-ultrasound-status')).to_contain_text('is not a video', timeout=patience)
            page.locator('#vh-ultrasound-examples button').first.click()
            clip = page.locator('#vh-ultrasound-overlay video')
            expect(clip).to_be_visible(timeout=patience)
            page.wait_for_function(
                'document.querySelector("#vh-ultrasound-overlay video").videoWidth === 256', timeout=patience)
            expect(page.locator('#vh-ultrasound-area img')).to_be_visible(timeout=patience)
            expect(page.locator('#vh-ultrasound-status')).to_contain_text('Research use only', timeout=patience)
            assert page.evaluate('document.documentElement.scrollWidth') <= 390
            assert [url for url in asked if '127.0.0.1' not in url and not url.startswith(('data:', 'blob:'))] == []
            assert errors == []
            folder = Path(__file__).resolve().parents[2] / 'artifacts' / 'screenshots'
            folder.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(folder / 'ultrasound_phone.png'), full_page=True)
        finally:
            browser.close()
            served.close()
