"""The Track tab: what its listeners say to clicks, good and bad videos, and the page in a browser."""
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from app import track as tab
from app.main import launch
from vishub.hub import save_folder
from vishub.tasks.clips import open_clip


@pytest.fixture(scope='module')
def follower(tmp_path_factory) -> Path:
    """A folder for VISHUB_WEIGHTS with an untrained tracker."""
    root = tmp_path_factory.mktemp('follower')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('bactrack_tiny', depth=1)
    save_folder(model, root / 'bactrack_tiny.untrained', metrics={}, card={})
    return root


@pytest.fixture
def served(follower, monkeypatch) -> str:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(follower))
    monkeypatch.setattr(tab, 'MOST_FRAMES', 6)
    return 'bactrack_tiny.untrained'


def upload(path):
    return {'path': str(path), 'orig_name': Path(path).name}


def last(path, box, model, update='collection'):
    """The last thing that the listener says of a file, and the files it offers, by suffix."""
    said = None
    files = {}
    for said in tab.track(upload(path), box, model, update, 10):
        if getattr(said[4], 'value', None):
            files = {Path(file['path']).suffix: Path(file['path']).read_bytes() for file in said[4].value}
    return said, files


def test_example(served):
    clip = tab.CLIPS[0]
    said, files = last(clip.path, ', '.join(map(str, clip.box)), served)
    _, scores, templates, facts, _, status, stop = said
    assert set(files) == {'.mp4', '.csv', '.json'} and scores.visible and templates.visible
    assert 'Only the first 6 frames' in status and stop.interactive is False
    assert 'bactrack_tiny.untrained' in facts and '6 of 192 × 192' in facts


def test_boxes_of_the_examples_are_in_their_first_frames():
    """The target of a generated scene stands out from what surrounds it."""
    for clip in tab.CLIPS:
        shown, corners, box, status = tab.first_frame(upload(clip.path))
        assert box == ', '.join(map(str, clip.box)) and corners == [] and 'vh-error' not in status
        pixels, scale = shown
        assert scale == 1 and pixels.shape == (192, 192, 3)
        stored = np.asarray(Image.open(clip.path.with_suffix('.png')).convert('RGB')).astype(int)
        assert np.abs(stored - pixels).mean() < 6
        assert clip.path.stat().st_size < 120_000
        x, y, w, h = clip.box
        inside, around = stored[y + 3:y + h - 3, x + 3:x + w - 3], np.concatenate(
            [stored[y + 3:y + h - 3, max(x - 3, 0):x], stored[y + 3:y + h - 3, x + w:x + w + 3]], axis=1)
        assert np.abs(inside.mean((0, 1)) - around.mean((0, 1))).max() > 15


def test_two_clicks_are_a_box():
    shown = (np.zeros((40, 60, 3), np.uint8), 2.5)
    corners, box = tab.click(shown, [], (30, 8))
    assert corners == [(30, 8)] and box == ''
    corners, box = tab.click(shown, corners, (10, 20))
    assert box == '25, 20, 50, 30'
    assert tab.click(shown, corners, (5, 5)) == ([(5, 5)], '')  # the third begins anew
    picture = tab.drawn(shown, corners, box)
    assert picture.visible
    assert tab.drawn(None, [], '').visible is False


def test_large_frames_are_shown_small(tmp_path):
    np.save(tmp_path / 'large.npy', np.zeros((2, 900, 1440, 3), np.uint8))
    (pixels, scale), *_ = tab.first_frame(upload(tmp_path / 'large.npy'))
    assert pixels.shape == (450, 720, 3) and scale == 2


@pytest.mark.parametrize('box, sentence', [
    ('', 'Mark the target first'),
    ('1, 2, 3', 'Mark the target first'),
    ('a, b, c, d', 'Mark the target first'),
    ('500, 10, 20, 20', 'outside the frame of 192 x 192'),
    ('5, 5, 0, 20', 'positive size'),
])
def test_bad_boxes_get_one_sentence(served, box, sentence):
    said, _ = last(tab.CLIPS[0].path, box, served)
    assert sentence in said[5] and 'vh-error' in said[5] and said[0] is None


def test_bad_videos_get_one_sentence(served, tmp_path):
    Image.new('RGB', (30, 30)).save(tmp_path / 'still.png')
    (tmp_path / 'text.mp4').write_text('no video')
    for name, sentence in (('still.png', 'has one frame'), ('text.mp4', 'is not a video')):
        _, _, _, status = tab.first_frame(upload(tmp_path / name))
        said, _ = last(tmp_path / name, '1, 1, 20, 20', served)
        for text in (status, said[5]):
            assert sentence in text and 'vh-error' in text and str(tmp_path) not in text
    assert 'Choose a video' in list(tab.track(None, '', served, 'none', 10))[-1][5]
    assert 'There is no model' in last(tab.CLIPS[0].path, '1, 1, 20, 20', 'bactrack_giant.all')[0][5]


def test_examples_come_with_their_licence():
    readme = (tab.CLIPS[0].path.parent / 'README.md').read_text(encoding='utf-8')
    assert 'CC0-1.0' in readme
    assert {clip.path.name for clip in tab.CLIPS} == {path.name for path in tab.CLIPS[0].path.parent.glob('*.mp4')}
    assert all(sum(1 for _ in open_clip(clip.path).read()) == 120 for clip in tab.CLIPS)


@pytest.mark.browser
@pytest.mark.xdist_group('browser')
def test_page_tracks_a_box_drawn_with_the_mouse(chromium, follower):
    from playwright.sync_api import expect, sync_playwright

    patience = 180_000
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        patch.setenv('VISHUB_WEIGHTS', os.pathsep.join([str(follower)]))
        patch.setattr(tab, 'MOST_FRAMES', 6)
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        served = launch(port=port, block=False)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=['--headless', '--no-sandbox', '--disable-gpu'])
        try:
            page = browser.new_context(viewport={'width': 1280, 'height': 1000}).new_page()
            page.set_default_timeout(patience)
            errors = []
            page.on('pageerror', lambda error: errors.append(str(error)))
            page.goto(f'http://127.0.0.1:{port}/')
            page.get_by_role('tab', name='Track').click()
            page.locator('#vh-track-clip input[type=file]').set_input_files(str(tab.CLIPS[1].path))
            first = page.locator('#vh-track-first img')
            expect(first).to_be_visible(timeout=patience)
            box = page.locator('#vh-track-box input, #vh-track-box textarea').first
            expect(box).to_have_value(', '.join(map(str, tab.CLIPS[1].box)), timeout=patience)
            place = first.bounding_box()
            side = min(place['width'], place['height'])  # the picture is square, and may have margins
            left, top = place['x'] + (place['width'] - side) / 2, place['y'] + (place['height'] - side) / 2
            for x, y in ((60, 90), (100, 120)):
                page.mouse.click(left + x / 192 * side, top + y / 192 * side)
                page.wait_for_timeout(1500)
            x, y, w, h = (int(word) for word in box.input_value().split(','))
            assert abs(x - 60) < 4 and abs(y - 90) < 4 and abs(w - 40) < 4 and abs(h - 30) < 4
            page.locator('#vh-track-run').click()
            expect(page.locator('#vh-track-status')).to_contain_text('6 frames', timeout=patience)
            expect(page.locator('#vh-track-video video')).to_be_visible(timeout=patience)
            expect(page.locator('#vh-track-templates img').first).to_be_visible(timeout=patience)
            assert not errors
        finally:
            browser.close()
            served.close()
