"""The Tokens tab without a browser: what it compares, what it shows, what it says when something is wrong."""
import base64
import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from app import tokens as tab
from app.examples import EXAMPLES
from app.main import build_app
from app.pipelines import PipelineCache
from app.work import Stopped
from vishub import InputError, tokens
from vishub.tasks.classification.pipeline import ClassificationPipeline

NAME = 'vit_mini_patch2_28.shapes'
BOOT = next(example.path for example in EXAMPLES if example.file == 'fashion-ankle-boot.png')
PATCHES = 14 * 14


@pytest.fixture
def served_vit(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('VISHUB_WEIGHTS', str(tiny_vit))
    return tiny_vit / NAME


@pytest.fixture(scope='module')
def pipe(tiny_vit: Path) -> ClassificationPipeline:
    return ClassificationPipeline(f'local-dir:{tiny_vit / NAME}', 'cpu')


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tab, '_RUNS', 3)
    yield


def run(path: Path, model: str = NAME, method: str = 'tome', budget: Any = 0.65) -> tuple:
    """The last state of the page: blocks, classes, numbers, status, Stop button."""
    return list(tab.reduce_tokens({'path': str(path), 'orig_name': path.name}, model, method, budget))[-1]


def test_only_vision_transformers_with_weights_are_offered(served_vit, tiny_weights, monkeypatch):
    assert NAME in [model.name for model in tab.reducible()]
    monkeypatch.setenv('VISHUB_WEIGHTS', str(tiny_weights))
    assert not any(model.name.startswith('favit') for model in tab.reducible())


def test_all_registered_methods_are_offered_and_explained():
    choices = dict(map(reversed, tab.method_choices()))
    assert set(choices) == set(tokens.methods()) and set(tab.METHODS) <= set(choices)
    for name in choices:
        assert re.search(r'>\w[^<]+\.<', tab._explanation(name)), name


@pytest.mark.parametrize('method', ['tome', 'token_transforming', 'zero_tprune', 'class_attention', 'uniform'])
def test_before_and_after_are_what_the_models_say(pipe, few_runs, method):
    result = tab.compare(pipe, str(BOOT), method, 0.6)

    with Image.open(BOOT) as image:
        pixels = torch.from_numpy(np.array(image)).float() / 255
    batch = (pixels[None, None] - 0.5) / 0.5  # 28 x 28 already: nothing to scale or crop
    model = timm.create_model(f'local-dir:{pipe.name.removeprefix("local-dir:")}', pretrained=True).eval()
    for which, said in (('full', result.before), ('reduced', result.after)):
        if which == 'reduced':
            tokens.apply(model, method, macs=0.6)
        with torch.inference_mode():
            expected = model(batch)[0].softmax(-1)
        assert {p.index: p.probability for p in said.predictions} == pytest.approx(
            dict(enumerate(expected.tolist())), abs=1e-5)
    assert result.before.predictions != result.after.predictions

    assert result.macs[1] == tokens.macs(model).total <= 0.6 * result.macs[0]
    assert result.macs[0] == tokens.macs(tokens.remove(model)).total
    assert result.merges == (method in ('tome', 'token_transforming'))
    assert result.patches[0] == PATCHES > result.patches[1] > 0
    assert all(ms > 0 for ms in result.latency_ms) and result.runs == 3


def test_the_shared_model_stays_as_it_is(pipe, few_runs):
    before = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}
    for method in ('pyra', 'tome'):
        tab.compare(pipe, str(BOOT), method, 0.6)
    assert tokens.config(pipe.model) is None
    after = pipe.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in pipe.model.parameters()), 'PYRA freezes its own copy only'


def test_steps_show_what_is_left_behind_every_reducing_block(pipe, few_runs):
    steps = tab.compare(pipe, str(BOOT), 'uniform', 0.5).steps
    layers = tokens.schedule(pipe.model, 'uniform', macs=0.5)['tokens_after']
    assert [step.caption for step in steps[1:]] == [
        f'Behind block {layer + 1} of 6: {count - 1} of {PATCHES} patch tokens left'
        for layer, count in layers.items()]
    # Enlarged as it is, and each pruned patch differs from the input, each kept one does not.
    whole = np.array(steps[0].image)
    with Image.open(BOOT) as image:
        np.testing.assert_array_equal(whole[8::17, 8::17, 0], np.array(image))
    for step, count in zip(steps[1:], layers.values()):
        side = step.image.width // 14
        changed = (np.array(step.image) != whole).any(axis=2).reshape(14, side, 14, side).any(axis=(1, 3))
        assert changed.sum() == PATCHES - (count - 1), 'black patches too: they are hatched'


def test_a_colour_photograph_is_shown_as_the_grey_crop_that_the_model_sees(pipe, few_runs, tmp_path):
    Image.new('RGB', (300, 200), (200, 30, 30)).save(tmp_path / 'red.png')
    image = tab.compare(pipe, str(tmp_path / 'red.png'), 'random', 0.8).steps[0].image
    left, top, right, bottom = pipe.prepare(Image.new('RGB', (300, 200)))[1]
    assert image.width / image.height == pytest.approx((right - left) / (bottom - top), rel=0.05)
    pixels = np.array(image)
    assert (pixels[..., 0] == pixels[..., 1]).all() and pixels.std() == 0


def test_the_page_has_the_pictures_the_bars_and_the_numbers(served_vit, few_runs):
    blocks, classes, numbers, status, _ = run(BOOT)
    figures = re.findall(r'<figure( hidden)?><img src="data:image/webp;base64,([^"]+)"', blocks)
    assert len(figures) == 7, 'the input and six blocks of ToMe'
    assert [hidden for hidden, _ in figures] == [' hidden'] * 6 + [''], 'the last one is shown first'
    for _, data in figures:
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (476, 476)
    assert f'max="{len(figures) - 1}"' in blocks and 'share a token' in blocks and 'dropped' not in blocks
    assert classes.count('<tr>') == 4 and classes.count('vh-bar') == 6
    assert '<i>hat</i>' not in classes and '&lt;i&gt;hat&lt;/i&gt;' in classes
    assert re.search(r'MACs</th><td>\d+ M</td><td>\d+(\.\d)? M</td><td>\u22123[56]%', numbers), numbers
    assert re.search(r'Latency</th><td>\d+\.\d ms</td><td>\d+\.\d ms</td><td>\d+\.\d\d× (faster|slower)', numbers)
    assert 'median of 3 runs' in numbers and BOOT.name in status and 'of the MACs' in status
    assert 'dropped' in run(BOOT, method='zero_tprune')[0]


def test_a_full_budget_reduces_nothing(served_vit, few_runs):
    blocks, _, numbers, status, _ = run(BOOT, budget=1.0)
    assert 'every token stays' in blocks and 'type="range"' not in blocks
    assert 'the same' in numbers and 'at 100% of the MACs' in status
    assert 'PYRA needs tokens to merge' in run(BOOT, method='pyra', budget=1.0)[3]


@pytest.mark.parametrize('change, words', [
    (dict(path='text.png'), 'is not a picture'),
    (dict(path='truncated.jpg'), 'is damaged or incomplete'),
    (dict(model='favit_small64.colours'), 'no model &#x27;favit_small64.colours&#x27;'),
    (dict(method='tomee'), 'nearest: &#x27;tome&#x27;'),
    (dict(budget=0.01), 'cannot be met by tome'),
    (dict(budget=-1), 'macs is -1'),
    (dict(method=['tome']), 'Something went wrong while reducing the tokens'),
])
def test_what_is_wrong_is_said_in_one_sentence(served_vit, pictures, change, words):
    path = pictures[change.pop('path', 'red.png')]
    blocks, classes, numbers, status, _ = run(path, **change)
    assert 'role="alert"' in status and words in status
    assert 'Traceback' not in status and str(path.parent) not in status
    assert (blocks, classes, numbers) == (tab._EMPTY, '', '')


def test_no_picture_is_asked_for(served_vit):
    assert 'Choose a picture' in list(tab.reduce_tokens(None, NAME, 'tome', 0.65))[-1][3]


def test_closing_the_page_stops_the_measuring(served_vit, monkeypatch):
    stopped = threading.Event()

    def endless(pipe, path, method, budget, progress):
        try:
            while True:
                time.sleep(0.01)
                progress(3, 23)
        except Stopped:
            stopped.set()
            raise

    monkeypatch.setattr(tab, 'PIPELINES', PipelineCache(1, lambda task, model: object()))
    monkeypatch.setattr(tab, 'compare', endless)
    page = tab.reduce_tokens({'path': str(BOOT)}, NAME, 'tome', 0.65)
    statuses = []
    while not any('Measuring' in status for status in statuses):
        statuses.append(next(page)[3])
        assert len(statuses) < 100
    page.close()
    assert stopped.wait(5)


def test_stop_is_heard_between_two_runs(pipe, monkeypatch):
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        tab.compare(pipe, str(BOOT), 'tome', 0.65, progress)
    assert seen == [(done, tab._RUNS + 2) for done in range(5)]


def test_slow_models_are_content_with_fewer_runs(monkeypatch):
    monkeypatch.setattr(tab, '_SECONDS', 0.0)
    calls = []

    def model(name):
        def call(batch):
            calls.append(name)
            return batch
        return call

    latency, runs = tab._latencies((model('full'), model('less')), torch.zeros(1), lambda done: None)
    assert runs == tab._FEWEST_RUNS and len(latency) == 2
    assert calls[:6] == ['full', 'less', 'less', 'full', 'full', 'less'], 'in turns, each first every other time'


def test_without_a_trained_vit_the_tab_says_so(monkeypatch):
    monkeypatch.setattr(tab, 'trained_models', lambda task: [])
    config = json.dumps(build_app().get_config_file(), default=str)
    assert tab.NO_MODELS in config and 'vh-tokens-picture' not in config


def test_with_one_the_tab_is_there(served_vit):
    config = json.dumps(build_app().get_config_file(), default=str)
    assert tab.NO_MODELS not in config and 'vh-tokens-picture' in config and NAME in config


def test_a_vit_that_comes_into_the_folder_is_offered_without_a_change_of_code(served_vit):
    model = next(model for model in tab.reducible() if model.name == NAME)
    assert model.source == f'local-dir:{served_vit}' and model.label_names == ('boot', 'bag', '<i>hat</i>')
    with pytest.raises(InputError, match='no model'):
        tab.choose('vit_mini_patch2_28.other', tab.reducible())
