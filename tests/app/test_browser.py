"""The demo in a real browser: what a visitor does, and what he sees. Screenshots go to `artifacts/screenshots/`."""
import os
import socket
import threading
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.examples import FOLDER
from app.main import launch
from app.pipelines import PipelineCache
from app.work import Stopped

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group('browser')]  # one server and one browser

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / 'artifacts' / 'screenshots'
TRAINED = 'favit_small64.fashion_mnist'
BOOT = FOLDER / 'fashion-ankle-boot.png'
FLAGS = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
]
PATIENCE_MS = 180_000  # only a much loaded machine needs it


@pytest.fixture(scope='module')
def address(tiny_weights, tiny_vit) -> Iterator[str]:
    """The served page with the weights of the checkout and those that the tests made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('VISHUB_WEIGHTS', os.pathsep.join(map(str, (tiny_weights, tiny_vit))))
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        page = launch(port=port, block=False)
        yield f'http://127.0.0.1:{port}/'
        page.close()


@pytest.fixture(scope='module')
def browser(chromium) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """`visit(width, height, query)` opens the page. The test fails if it asks anybody else, or throws."""
    asked: List[str] = []
    errors: List[str] = []
    contexts = []

    def visit(width: int = 1280, height: int = 900, query: str = '') -> Page:
        contexts.append(browser.new_context(viewport={'width': width, 'height': height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on('request', lambda request: asked.append(request.url))
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.goto(address + query)
        expect(page.locator('#vh-picture')).to_be_visible(timeout=PATIENCE_MS)
        choose(page, 'favit_small64.colours')
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((address, 'data:', 'blob:'))] == [], 'the page works offline'
    assert errors == []


def choose(page: Page, choice: str, dropdown: str = '#vh-model') -> None:
    box = page.locator(f'{dropdown} input')
    if box.input_value() != choice:
        box.click()
        page.get_by_role('option', name=choice, exact=True).click()


def upload(page: Page, path: Path) -> None:
    remove = page.locator('#vh-picture').get_by_label('Remove Image')
    if remove.count():
        remove.click()
    page.locator('#vh-picture input[type=file]').set_input_files(path)


def expect_status(page: Page, text: str) -> None:
    expect(page.locator('#vh-status')).to_contain_text(text, timeout=PATIENCE_MS)


def keep(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f'{name}.png', full_page=True)


def fits(page: Page) -> bool:
    return page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')


def test_a_picture_gets_the_right_label_heat_map_and_facts(visit, pictures):
    page = visit()
    for name, label in [('red.png', 'red'), ('blue.png', 'blue')]:
        upload(page, pictures[name])
        expect_status(page, f'{name}: {label}')
        expect(page.locator('#vh-label h2, #vh-label .output-class').first).to_have_text(label)
    expect(page.locator('#vh-label')).to_contain_text('red')
    expect(page.locator('#vh-facts')).to_contain_text('1.57 M')
    expect(page.locator('#vh-facts')).to_contain_text('ms')
    heatmap = page.locator('#vh-heatmap img')
    expect(heatmap).to_be_visible()
    page.wait_for_function('document.querySelector("#vh-heatmap img").naturalWidth === 720')
    keep(page, 'desktop')


def test_bad_pictures_give_a_sentence_in_the_page(visit, pictures):
    page = visit()
    for name, words in [
        ('text.png', 'is not a picture'), ('truncated.jpg', 'is damaged'), ('empty.png', 'is empty'),
        ('huge.png', '900,000,000 pixels'),
    ]:
        upload(page, pictures[name])
        expect_status(page, f"'{name}'")
        alert = page.get_by_role('alert').filter(has_text=words)
        expect(alert).to_be_visible()
        expect(page.locator('#vh-label')).not_to_contain_text('%')
    assert 'Traceback' not in page.inner_text('body')
    keep(page, 'error')
    upload(page, pictures['red.png'])  # and the page goes on working
    expect_status(page, 'red.png: red')


def test_stop_ends_long_work(visit, pictures, monkeypatch):
    ended = threading.Event()

    class Endless:
        def __call__(self, path, progress, **options):
            try:
                for step in range(10_000):
                    time.sleep(0.02)
                    progress(step % 100, 100)
            except Stopped:
                ended.set()
                raise

    page = visit()
    expect(page.locator('#vh-stop')).to_be_disabled()
    monkeypatch.setattr('app.classify.PIPELINES', PipelineCache(1, lambda task, model: Endless()))
    upload(page, pictures['red.png'])
    expect_status(page, 'Looking at red.png')
    expect(page.locator('#vh-status progress')).to_be_visible()
    page.locator('#vh-stop').click()
    expect_status(page, 'Stopped.')
    expect(page.locator('#vh-stop')).to_be_disabled()
    assert ended.wait(30), 'the page says stopped, but the work goes on'


def test_an_example_is_one_click(visit):
    page = visit()
    page.locator('#vh-examples button').first.click()
    expect_status(page, 'firetruck.jpg: ')


def test_on_a_phone_in_the_dark(visit, pictures):
    page = visit(390, 844, '?__theme=dark')
    upload(page, pictures['red.png'])
    expect_status(page, 'red.png: red')
    assert fits(page), 'the page scrolls sideways'
    colour = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert max(map(int, colour.strip('rgba()').split(',')[:3])) < 60, colour
    keep(page, 'phone-dark')
    page.get_by_role('tab', name='Models').click()
    expect(page.locator('.vh-family').first).to_be_visible(timeout=PATIENCE_MS)
    assert fits(page), 'the model browser scrolls sideways'
    keep(page, 'phone-dark-models')


def test_the_model_browser_filters_by_task(visit):
    page = visit()
    page.get_by_role('tab', name='Models').click()
    families = page.locator('.vh-family h3')
    expect(families.filter(has_text='favit')).to_be_visible(timeout=PATIENCE_MS)
    keep(page, 'models')
    page.locator('#vh-task input').click()
    page.get_by_role('option', name='tracking', exact=True).click()
    expect(families).to_have_count(1)
    expect(families).to_contain_text('bactrack')


def test_a_trained_model_knows_a_real_picture(visit):
    page = visit()
    choose(page, TRAINED)
    page.locator('#vh-examples button').first.click()
    expect_status(page, 'fashion-ankle-boot.png: Ankle boot')
    keep(page, 'ankle-boot')


def open_tokens(page: Page) -> None:
    page.get_by_role('tab', name='Tokens').click()
    expect(page.locator('#vh-tokens-picture')).to_be_visible(timeout=PATIENCE_MS)
    choose(page, 'vit_mini_patch2_28.shapes', '#vh-tokens-model')


def reduce(page: Page, path: Path) -> None:
    remove = page.locator('#vh-tokens-picture').get_by_label('Remove Image')
    if remove.count():
        remove.click()
    page.locator('#vh-tokens-picture input[type=file]').set_input_files(path)


def expect_tokens(page: Page, text: str) -> None:
    expect(page.locator('#vh-tokens-status')).to_contain_text(text, timeout=PATIENCE_MS)


def test_the_slider_shows_the_tokens_block_by_block(visit):
    page = visit()
    open_tokens(page)
    reduce(page, BOOT)
    expect_tokens(page, 'fashion-ankle-boot.png at 65% of the MACs')
    shown = page.locator('#vh-tokens-blocks figure:visible')
    expect(shown).to_contain_text('Behind block 6 of 6')
    requests: List[str] = []
    page.on('request', lambda request: requests.append(request.url))
    slider = page.get_by_role('slider', name='Reducing block')
    slider.focus()
    left = []
    for block in (5, 4, 3, 2, 1):
        page.keyboard.press('ArrowLeft')
        expect(shown).to_contain_text(f'Behind block {block} of 6')
        left.append(int(shown.inner_text().split(': ')[1].split(' of')[0]))
    assert left == sorted(set(left)) and left[-1] < 196, 'fewer tokens with every block'
    page.keyboard.press('ArrowLeft')
    expect(shown).to_contain_text('At the input: 196 patches')
    assert page.evaluate('document.querySelector("#vh-tokens-blocks figure:not([hidden]) img").naturalWidth') == 476
    assert not [url for url in requests if not url.startswith('data:')], 'nothing is computed again'
    slider.fill('3')
    for words in ('MACs', 'Latency', 'ms', '\u2212'):
        expect(page.locator('#vh-tokens-numbers')).to_contain_text(words)
    expect(page.locator('#vh-tokens-classes .vh-bar')).to_have_count(6)
    keep(page, 'tokens')


def test_another_method_is_one_choice_and_a_bad_picture_one_sentence(visit, pictures):
    page = visit()
    open_tokens(page)
    reduce(page, BOOT)
    expect_tokens(page, 'of the MACs')
    choose(page, 'Zero-TPrune', '#vh-tokens-method')
    expect(page.locator('#vh-tokens-blocks')).to_contain_text('no token has it any more', timeout=PATIENCE_MS)
    expect(page.get_by_text('Tokens that matter little')).to_be_visible()
    reduce(page, pictures['text.png'])
    expect_tokens(page, "'text.png'")
    expect(page.locator('#vh-tokens-status').get_by_role('alert')).to_be_visible()
    expect(page.locator('#vh-tokens-blocks figure')).to_have_count(0)
    assert 'Traceback' not in page.inner_text('body')


def test_stop_ends_the_measuring(visit, monkeypatch):
    ended = threading.Event()

    def endless(pipe, path, method, budget, progress):
        try:
            for _ in range(10_000):
                time.sleep(0.02)
                progress(5, 23)
        except Stopped:
            ended.set()
            raise

    monkeypatch.setattr('app.tokens.compare', endless)
    page = visit()
    open_tokens(page)
    page.locator('#vh-tokens-examples button').first.click()
    expect_tokens(page, 'Measuring')
    page.locator('#vh-tokens-stop').click()
    expect_tokens(page, 'Stopped.')
    assert ended.wait(30), 'the page says stopped, but the work goes on'


def test_tokens_on_a_phone_in_the_dark(visit):
    page = visit(390, 844, '?__theme=dark')
    open_tokens(page)
    assert fits(page), 'the empty tab scrolls sideways'
    reduce(page, FOLDER / 'cat.jpg')
    expect_tokens(page, 'cat.jpg at 65% of the MACs')
    assert fits(page), 'the page scrolls sideways'
    keep(page, 'phone-dark-tokens')
