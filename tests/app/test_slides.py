"""The Slides tab: what the listener says to good and bad slides, and the page in a browser."""
import socket
from pathlib import Path

import numpy as np
import pytest

from app import slides as tab
from app.main import launch
from vishub.tasks.slide_analysis.procedural import write_pyramid

MODEL = 'conslide_hit_tiny.procedural_he'


def last(path, model=MODEL, task=tab.UNKNOWN, mpp=0, most=200):
    """All that the listener says of a file, and the suffixes of the files it offers."""
    said, offered = [], set()
    for said_now in tab.analyse({'path': str(path), 'orig_name': Path(path).name}, model, task, mpp, most):
        said.append(said_now)
        files = said_now[4]
        if getattr(files, 'value', None):
            offered = {'.' + Path(file['path']).name.partition('.')[2] for file in files.value}
    return said, offered


def test_example_is_recognised_and_compared():
    said, offered = last(tab.SLIDES[0])
    viewer, bars, patches, facts, _, status, stop = said[-1]
    assert 'rows, ' in status and 'among all 8 classes' in status and 'research only' in status
    assert viewer.count('data-layer') >= 3 and 'data:image/png;base64,' in viewer and 'Opacity' in viewer
    assert 'What if it had been fine-tuned without' in bars and bars.count('organ_') == 8
    # without replay the first organ is forgotten: the answer is a class of the last one
    assert 'With replay of earlier slides: <span>rows</span>' in bars
    assert any(f'without: <span>{label}</span>' in bars for label in ('pale', 'spindles'))
    assert patches.visible and stop.interactive is False and MODEL in facts
    assert offered == {'.overlay.png', '.geojson', '.json'}


def test_task_given_and_few_regions():
    said, _ = last(tab.SLIDES[1], task='organ_d', most=2)
    assert 'of organ_d' in said[-1][5] and '<dd>2, tissue' in said[-1][3]


@pytest.mark.parametrize('name, sentence', [
    ('text.svs', 'is not a whole-slide image'),
    ('glass.tif', 'has no tissue'),
    ('unknown.tif', 'says no resolution'),
])
def test_bad_slides_get_one_sentence(tmp_path, name, sentence):
    path = tmp_path / name
    if name == 'text.svs':
        path.write_text('none')
    else:
        write_pyramid(path, np.full((400, 400, 3), 243, np.uint8), mpp=None if 'unknown' in name else 0.5)
    said, offered = last(path)
    assert sentence in said[-1][5] and 'vh-error' in said[-1][5]
    assert str(tmp_path) not in said[-1][5] and not offered and said[-1][0] == ''


def test_nothing_chosen_and_unknown_model():
    assert 'Choose a slide' in list(tab.analyse(None, MODEL, tab.UNKNOWN, 0, 200))[-1][5]
    assert 'There is no model' in last(tab.SLIDES[0], model='conslide_giant.everything')[0][-1][5]


def test_examples_are_small_and_have_pictures():
    readme = (tab.SLIDES[0].parent / 'README.md').read_text(encoding='utf-8')
    for path in tab.SLIDES:
        assert path.stat().st_size < 300_000 and path.with_suffix('.jpg').is_file() and path.name in readme
    assert 'no known copyright restrictions' in readme


@pytest.mark.browser
@pytest.mark.xdist_group('browser')
def test_page_analyses_an_example_and_answers_a_bad_file(chromium, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    patience = 180_000
    (tmp_path / 'text.svs').write_text('none')
    with sync_playwright() as playwright:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        served = launch(port=port, block=False)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=['--headless', '--no-sandbox', '--disable-gpu'])
        try:
            folder = Path(__file__).resolve().parents[2] / 'artifacts' / 'screenshots'
            folder.mkdir(parents=True, exist_ok=True)
            for width, name in ((390, 'slides_phone.png'), (1280, 'slides.png')):
                page = browser.new_context(viewport={'width': width, 'height': 900}).new_page()
                page.set_default_timeout(patience)
                asked, errors = [], []
                page.on('request', lambda request, asked=asked: asked.append(request.url))
                page.on('pageerror', lambda error, errors=errors: errors.append(str(error)))
                page.goto(f'http://127.0.0.1:{port}/')
                page.get_by_role('tab', name='Slides').click()
                page.locator('#vh-slides-file input[type=file]').set_input_files(str(tmp_path / 'text.svs'))
                expect(page.locator('#vh-slides-status')).to_contain_text('not a whole-slide image', timeout=patience)
                page.locator('#vh-slides-examples button').first.click()
                heat = page.locator('#vh-slides-viewer img[data-layer=patches]')
                expect(heat).to_be_visible(timeout=patience)
                page.locator('#vh-slides-viewer input[type=range]').fill('20')
                assert float(heat.evaluate('image => image.style.opacity')) == 0.2
                page.locator('#vh-slides-viewer input[value=tissue]').check()
                expect(heat).to_be_hidden()
                page.locator('#vh-slides-viewer input[value=patches]').check()
                page.locator('#vh-slides-viewer input[type=range]').fill('60')
                expect(page.locator('#vh-slides-bars')).to_contain_text('What if')
                assert page.evaluate('document.documentElement.scrollWidth') <= width
                assert [url for url in asked if '127.0.0.1' not in url and not url.startswith(('data:', 'blob:'))] == []
                assert errors == []
                page.screenshot(path=str(folder / name), full_page=True)
        finally:
            browser.close()
            served.close()
