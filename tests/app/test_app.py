"""The demo without a browser: what its handlers say, what it keeps in memory, what it serves to whom."""
import importlib
import importlib.util
import logging
import re
import runpy
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict

import gradio as gr
import httpx
import pytest
from PIL import Image

from app.classify import classify, examples_for
from app.examples import EXAMPLES, FOLDER
from app.main import TABS, build_app, launch
from app.messages import error_sentence
from app.models import families_html, trained_models
from app.pipelines import PipelineCache
from app.upload import uploaded
from app.work import Stopped, Work
from vishub import InputError, catalog, cli
from vishub.cli import look


def run(upload: Any, model: str = 'favit_small64.colours', top_k: Any = 5, heatmap: bool = True) -> tuple:
    """The last state of the page."""
    return list(classify(upload, model, top_k, heatmap))[-1]


def upload_of(path: Path) -> Dict[str, str]:
    return {'path': str(path), 'orig_name': path.name}


@pytest.mark.parametrize('name, words', [
    ('text.png', 'is not a picture'),
    ('truncated.jpg', 'is damaged or incomplete'),
    ('empty.png', 'is empty'),
    ('huge.png', '900,000,000 pixels'),
])
def test_a_bad_upload_gives_one_sentence(served_weights, pictures, name, words):
    label, heatmap, facts, status, _ = run(upload_of(pictures[name]))
    assert 'role="alert"' in status and words in status and name in status
    assert str(pictures[name].parent) not in status, 'the user need not know where the server keeps files'
    assert 'Traceback' not in status
    assert (label, heatmap, facts) == (None, None, '')


@pytest.mark.parametrize('name, expected', [
    ('red.png', 'red'), ('blue.png', 'blue'), ('cmyk.jpg', 'red'), ('animated.gif', 'red'), ('sixteen.png', None),
])
def test_a_good_or_odd_upload_is_classified(served_weights, pictures, name, expected):
    label, heatmap, facts, status, _ = run(upload_of(pictures[name]))
    assert set(label) == {'red', 'blue'} and sum(label.values()) == pytest.approx(1, abs=1e-5)
    if expected:
        assert max(label, key=label.get) == expected
        assert f'{name}: {expected}' in status
    with Image.open(pictures[name]) as image:
        assert f'{image.width} × {image.height}' in facts
        assert heatmap.value is not None
    assert '1.57 M' in facts and re.search(r'\d+ ms', facts)
    assert ('frames' in status) == (name == 'animated.gif')


def test_heat_map_and_number_of_classes_are_options(served_weights, pictures):
    label, heatmap, *_ = run(upload_of(pictures['red.png']), top_k=1, heatmap=False)
    assert list(label) == ['red'] and heatmap is None


def test_no_picture_and_unknown_model_are_said(served_weights, pictures):
    assert 'Choose a picture' in run(None)[3]
    assert 'no model &#x27;resnet50&#x27;' in run(upload_of(pictures['red.png']), model='resnet50')[3]


def test_an_unforeseen_fault_is_logged_and_not_shown(served_weights, pictures, caplog):
    with caplog.at_level(logging.ERROR, logger='vishub.app'):
        status = run(upload_of(pictures['red.png']), top_k='five')[3]
    assert 'Something went wrong while classifying the picture' in status and 'TypeError' not in status
    assert 'TypeError' in caplog.text
    error = InputError("'/srv/x/a.png' is empty")
    assert error_sentence(error, 'reading', '/srv/x/a.png', 'a.png') == "'a.png' is empty."


def test_markup_in_a_file_name_stays_text(served_weights, pictures):
    status = run({'path': str(pictures['text.png']), 'orig_name': '<script>alert(1)</script>.png'})[3]
    assert '<script>' not in status and '&lt;script&gt;' in status


def test_an_upload_must_be_a_file():
    assert uploaded(None) is None
    assert uploaded({'path': '/cache/x.png', 'orig_name': None}) == ('/cache/x.png', 'x.png')
    with pytest.raises(InputError, match='not an uploaded file'):
        uploaded({'url': 'data:image/png;base64,AAAA'})


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago():
    loaded = []
    cache = PipelineCache(2, lambda task, model: loaded.append(model) or object())
    first = cache.get('t', 'a')
    cache.get('t', 'b')
    assert cache.get('t', 'a') is first
    cache.get('t', 'c')
    assert len(cache) == 2 and ('t', 'b') not in cache and ('t', 'a') in cache
    cache.get('t', 'b')
    assert loaded == ['a', 'b', 'c', 'b']
    with pytest.raises(ValueError):
        PipelineCache(0)


def test_the_cache_loads_once_for_many_threads_and_forgets_failures():
    loads = []

    def load(task: str, model: str) -> object:
        loads.append(model)
        time.sleep(0.05)
        if len(loads) == 1:
            raise InputError('first time fails')
        return object()

    cache = PipelineCache(2, load)
    with pytest.raises(InputError):
        cache.get('t', 'a')
    got = []
    threads = [threading.Thread(target=lambda: got.append(cache.get('t', 'a'))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 2 and len(set(map(id, got))) == 1


def test_work_tells_progress_and_returns():
    step = threading.Event()

    def function(progress):
        progress(1, 3)
        step.wait(5)
        return 'done'

    work = Work(function, poll_seconds=0.01)
    for state in work:
        if state == (1, 3):
            step.set()
    assert work.result() == 'done'
    failing = Work(lambda progress: 1 / 0, poll_seconds=0.01)
    list(failing)
    with pytest.raises(ZeroDivisionError):
        failing.result()


def test_work_stops_when_its_generator_is_closed():
    reports = []

    def function(progress):
        while True:
            time.sleep(0.01)
            progress(len(reports), 0)
            reports.append(1)

    work = Work(function, poll_seconds=0.01)
    updates = iter(work)
    next(updates)
    updates.close()  # what Gradio does when Stop is pressed
    with pytest.raises(Stopped):
        work.result()
    assert not work.is_running


def test_closing_classify_stops_its_work(served_weights, pictures, monkeypatch):
    stopped, started = threading.Event(), threading.Event()

    class Endless:
        def __call__(self, path, progress, **options):
            started.set()
            try:
                while True:
                    time.sleep(0.01)
                    progress(1, 100)
            except Stopped:
                stopped.set()
                raise

    monkeypatch.setattr('app.classify.PIPELINES', PipelineCache(1, lambda task, model: Endless()))
    page = classify(upload_of(pictures['red.png']), 'favit_small64.colours', 5, True)
    statuses = []
    while not any('Looking at red.png' in status for status in statuses):
        statuses.append(next(page)[3])
        assert len(statuses) < 100
    assert '<progress value="0.010">' in statuses[-1]
    page.close()
    assert started.is_set() and stopped.wait(5)


def test_examples_are_small_real_pictures_with_a_licence():
    lines = (FOLDER / 'README.md').read_text(encoding='utf-8').splitlines()
    for example in EXAMPLES:
        assert example.path.stat().st_size <= 100_000
        with Image.open(example.path) as image:
            image.load()
        row = next(line for line in lines if line.startswith(f'| `{example.file}` |'))
        assert re.search(r'\| (CC0-1\.0|CC-BY-2\.5|CC-BY-4\.0|MIT, copyright .+|public domain .+) \|$', row), row
    files = {path.name for path in FOLDER.iterdir() if path.suffix in ('.jpg', '.png')}
    assert files == {example.file for example in EXAMPLES}


def test_examples_suit_the_model(served_weights):
    assert examples_for(None) == list(EXAMPLES)
    model = next(row for row in trained_models('classification') if row.name.endswith('.colours'))
    assert model.label_names == ('blue', 'red')
    for tag in ('cifar10', 'fashion_mnist'):
        chosen = examples_for(type(model)(f'favit_b2.{tag}', '', (), ''))
        assert chosen and all(example.data == tag for example in chosen)


def test_the_default_model_of_a_task_comes_first(monkeypatch):
    monkeypatch.delenv('VISHUB_WEIGHTS', raising=False)
    names = [model.name for model in trained_models('volume_segmentation')]
    assert names[0] == 'mambaclinix_tiny.procedural' and 'mambaclinix_tiny.brats13' in names
    assert [model.in_chans for model in trained_models('volume_segmentation')][:2] == [1, 2]


def test_without_weights_the_page_says_so(monkeypatch):
    tabs = [importlib.import_module(f'app.{tab.id}') for tab in TABS if tab.id != 'models']
    for tab in tabs:
        monkeypatch.setattr(tab, 'trained_models', lambda task: [])
    config = build_app().get_config_file()
    shown = [str(part['props'].get('value')) for part in config['components']]
    for tab in tabs:
        assert any(tab.NO_MODELS in text for text in shown)
    assert not any(part['type'] == 'image' for part in config['components'])


def test_the_model_browser_shows_the_whole_catalogue_or_one_task():
    page = families_html()
    for family in catalog.families():
        assert f'https://arxiv.org/abs/{family.arxiv}' in page
    for row in catalog.architectures():
        assert f'<td>{row.name}</td>' in page
    for row in catalog.weights():
        assert row.name in page and f'{row.value:g}' in page and row.licence in page
    one = families_html('tracking')
    assert one.count('<article') == sum(family.task == 'tracking' for family in catalog.families())


@pytest.fixture(scope='module')
def address(tiny_weights):
    """A served page, without browser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('VISHUB_WEIGHTS', str(tiny_weights))
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        page = launch(port=port, block=False)
        yield f'http://127.0.0.1:{port}'
        page.close()


def test_only_its_own_files_are_served(address):
    root = Path(__file__).resolve().parents[2]
    for path in ('/etc/passwd', root / 'pyproject.toml', root / 'app' / 'main.py', f'{FOLDER}/../main.py'):
        assert httpx.get(f'{address}/gradio_api/file={path}').status_code in (403, 404), path


def _join(address: str, payload: Dict[str, Any]) -> str:
    """Send a picture as a browser would; the stream of answers as text."""
    config = httpx.get(f'{address}/config').json()
    index = next(row['id'] for row in config['dependencies'] if len(row['inputs']) == 4)
    data = {**payload, 'meta': {'_type': 'gradio.FileData'}}
    body = {'data': [data, 'favit_small64.colours', 5, True], 'fn_index': index, 'session_hash': 'test'}
    httpx.post(f'{address}/gradio_api/queue/join', json=body).raise_for_status()
    lines = []
    with httpx.stream('GET', f'{address}/gradio_api/queue/data', params={'session_hash': 'test'}, timeout=60) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if 'process_completed' in line:
                break
    return '\n'.join(lines)


def test_a_client_cannot_name_a_file_or_an_address(address, pictures):
    # A real picture that lies on the server but was not uploaded.
    for path in (str(FOLDER / 'cat.jpg'), '/etc/passwd', f'{address}/theme.css'):
        answer = _join(address, {'path': path})
        assert '"success":false' in answer.replace(' ', ''), answer
        assert '1.57 M' not in answer and 'Traceback' not in answer


def test_a_port_in_use_is_said_in_a_sentence(address):
    port = int(address.rpartition(':')[2])
    with pytest.raises(InputError, match=f'cannot serve at 127.0.0.1:{port} .*--port {port + 1}'):
        launch(port=port, block=False)
    with pytest.raises(InputError, match='70000 is not a port'):
        launch(port=70000, block=False)


def test_the_demo_verb_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(SystemExit) as leaving:
        cli.main(['demo'])
    assert leaving.value.code == 2
    assert "pip install 'vishub[app]'" in capsys.readouterr().err


def test_the_app_is_found_in_the_checkout():
    spec = importlib.util.find_spec('vishub._app')
    assert spec is None or spec.origin, 'a half made vishub._app would hide the checkout'
    assert look._import_demo().TABS[0].title == TABS[0].title


def test_the_folder_runs_as_a_file_as_in_a_space(monkeypatch):
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if Path(path or '.').resolve() != FOLDER.parents[1]])
    monkeypatch.setenv('GRADIO_SERVER_PORT', '0')  # refused before anything is served
    with pytest.raises(InputError, match='0 is not a port'):
        runpy.run_path(str(FOLDER.parent / '__main__.py'), run_name='__main__')


def test_nothing_is_sent_to_gradio():
    page = build_app()
    assert page.analytics_enabled is False
    assert isinstance(page, gr.Blocks)
