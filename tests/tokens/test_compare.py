"""`tokens.compare` and `vishub tokens compare`: counts against a plain loop, files, and what is refused."""
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.tokens.small_models import small_model
from vishub import cli, tokens
from vishub.errors import InputError
from vishub.hub import save_folder
from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.classification.metrics import model_input, wilson_interval
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tokens import compare
from vishub.tokens.comparison import save_comparison

CLASSES = ('a', 'b', 'c')
SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=3)


def pictures(count, seed):
    generator = np.random.default_rng(seed)
    return ImageSet(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), generator.integers(0, 3, count))


def some_data(**splits):
    splits = {**dict(train=pictures(30, 0), val=pictures(10, 1), test=pictures(20, 2)), **splits}
    return ImageData('Noise', 'noise', CLASSES, **splits)


def random_vit(**sizes):
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', **{**SIZES, **sizes}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # as drawn by timm, all images get one class
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    model.pretrained_cfg = dict(
        architecture='vit_tiny_patch16_224', input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.,
        crop_mode='squash', interpolation='bicubic', num_classes=3, first_conv='patch_embed.proj',
        classifier='head', license='apache-2.0')
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights') / 'vit_tiny_patch16_224.noise'
    return save_folder(
        random_vit(), folder, metrics={}, card={}, model_args={k: v for k, v in SIZES.items() if k != 'num_classes'})


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    images = pictures(24, 5)
    for index in range(24):
        path = root / ('train', 'test')[index % 2] / CLASSES[index % 3] / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path)
    return root


def row_of(report, method, target=None, searched=False, tuned=False):
    return next(row for row in report['rows']
                if row['method'] == method and row['searched'] is searched and row['tuned'] is tuned
                and target in (None, row['target']))


def test_figures_are_those_of_a_plain_loop():
    model, data = random_vit(), some_data()
    report = compare(
        model, data, methods=['tome', 'zero_tprune'], targets=(1.0, 0.8, 0.5), batch_size=8, rounds=0)
    assert [(row['method'], row['target']) for row in report['rows']][0] == ('none', 1.)
    assert sorted((row['method'], row['target']) for row in report['rows'][1:]) == [
        ('tome', 0.5), ('tome', 0.8), ('zero_tprune', 0.5), ('zero_tprune', 0.8)]
    pipe = ClassificationPipeline(model)
    x = model_input(pipe, (data.test[i] for i in range(20)))
    with torch.inference_mode():
        wanted = model(x).argmax(1).numpy()
        with tokens.reduced(model, 'tome', macs=0.5):
            first, count = model(x).argmax(1).numpy(), tokens.macs(model)
    was_right, right = wanted == data.test.labels, first == data.test.labels
    base, row = report['rows'][0], row_of(report, 'tome', 0.5)
    assert base['correct'] == was_right.sum() and row['correct'] == right.sum()
    assert row['top1'] == pytest.approx(5 * right.sum())
    assert row['top1_ci95'] == pytest.approx([100 * bound for bound in wilson_interval(int(right.sum()), 20)], abs=1e-4)
    assert row['agreement'] == pytest.approx(100 * (first == wanted).mean())
    assert row['change'] == pytest.approx(row['top1'] - base['top1'])
    difference = right.astype(float) - was_right
    half = 100 * 1.959964 * difference.std() / math.sqrt(20)
    assert row['change_ci95'] == pytest.approx([row['change'] - half, row['change'] + half], abs=1e-4)
    assert (row['macs'], row['overhead']) == (count.total, count.overhead)
    assert row['macs_share'] == pytest.approx(count.total / report['macs'], abs=1e-5) and row['macs_share'] <= 0.5
    assert 'latency_ms' not in row
    assert tokens.config(model) is None and all(p.requires_grad for p in model.parameters())


def test_accuracy_depends_neither_on_batch_nor_on_company():
    alone = compare(random_vit(), some_data(), methods=['token_transforming'], batch_size=20, rounds=0)
    others = compare(random_vit(), some_data(), methods=['random', 'token_transforming'], batch_size=7, rounds=0)
    assert row_of(alone, 'token_transforming')['correct'] == row_of(others, 'token_transforming')['correct']
    again = compare(random_vit(), some_data(), methods=['random'], batch_size=7, rounds=0)
    assert row_of(again, 'random') == row_of(others, 'random')


def test_speeds_and_progress():
    told = []
    report = compare(random_vit(), some_data(), methods=['uniform'], targets=[0.5], batch_size=64, rounds=2,
                     progress=lambda *step: told.append(step))
    base, row = report['rows']
    assert base['latency_speedup'] == base['throughput_speedup'] == 1
    assert all(row[key] > 0 for key in ('latency_ms', 'throughput', 'latency_speedup', 'throughput_speedup'))
    for what in ('measuring accuracy', 'measuring speed'):
        steps = [(done, total) for name, done, total in told if name == what]
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]


def test_all_methods_by_default_and_pyra_with_the_reason():
    report = compare(random_vit(), some_data(), rounds=0)
    assert {row['method'] for row in report['rows']} == {'none', *tokens.methods()} - {'pyra'}
    assert any('PYRA is left out' in note for note in report['notes'])
    report = compare(random_vit(), some_data(), methods=['tome', 'pyra'], rounds=0)
    assert row_of(report, 'pyra')['correct'] == row_of(report, 'tome')['correct']
    assert any('PYRA is untrained' in note for note in report['notes'])


def test_what_a_model_does_not_allow_is_left_out_or_refused():
    model = random_vit(class_token=False, global_pool='avg')
    report = compare(model, some_data(), rounds=0)
    assert 'class_attention' not in {row['method'] for row in report['rows']}
    assert any(note.startswith('Class attention at 65 % is left out') for note in report['notes'])
    with pytest.raises(InputError, match='no class token'):
        compare(model, some_data(), methods=['class_attention'], rounds=0)


def test_searched_methods_stand_beside_their_defaults():
    report = compare(
        random_vit(), some_data(), methods=['tome', 'pyra'], targets=[0.7, 0.5], search_trials=3, rounds=0)
    assert [row['searched'] for row in report['rows']].count(True) == 2  # pyra is not searched
    for target in (0.7, 0.5):
        assert row_of(report, 'tome', target, searched=True)['macs_share'] <= target
    assert report['search_trials'] == 3


def test_tuned_methods_stand_beside_the_untrained(tmp_path):
    model, data = random_vit(), some_data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = compare(
        model, data, targets=[0.7], methods=['tome', 'pyra'], tune_steps=5, batch_size=10, rounds=0)
    assert [row['method'] for row in report['rows'] if row['tuned']].count('pyra') == 1
    plain, alike, gated = (
        row_of(report, 'tome'), row_of(report, 'tome', tuned=True), row_of(report, 'pyra', tuned=True))
    assert plain['macs'] == alike['macs'] == gated['macs'] and alike['config'] == plain['config']
    assert gated['overhead'] > alike['overhead']  # the gates
    assert plain['agreement'] != alike['agreement']  # it has learnt something
    assert not any('PYRA' in note for note in report['notes'])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_comparison(report, tmp_path)
    text = (tmp_path / f'tokens_accuracy_{report["data_tag"]}.md').read_text()
    assert 'PYRA, tuned' in text and 'Tuned: 5 steps of 10 training images' in text


def test_limit_takes_evenly_and_splits_are_told():
    data = some_data()
    report = compare(random_vit(), data, methods=['random'], limit=5, rounds=0)
    assert report['num_images'] == 5 and report['split'] == 'test split'
    chosen = data.test.take([0, 5, 10, 14, 19])
    same = compare(random_vit(), some_data(test=chosen), methods=['random'], rounds=0)
    assert same['rows'] == report['rows']
    assert compare(random_vit(), some_data(test=None), methods=['random'], rounds=0)['split'] == 'validation split'
    report = compare(random_vit(), some_data(test=None), methods=['random'], split='all', rounds=0)
    assert report['num_images'] == 40


@pytest.mark.parametrize('change,words', [
    (dict(methods=['tom']), "nearest: 'tome'"),
    (dict(methods=[]), 'no method is named'),
    (dict(targets=[0.5, 0]), r'target is 0; .*\(0, 1\]'),
    (dict(targets=[65]), 'for 65 % give 0.65'),
    (dict(targets=[0.001]), 'cannot be met'),
    (dict(targets=[float('nan')]), 'must be a number'),
    (dict(limit=0), 'limit is 0'),
    (dict(batch_size=0), 'batch_size is 0'),
    (dict(rounds=-1), 'rounds is -1'),
    (dict(split='training'), 'it is test, val or all'),
    (dict(split='all'), 'has a test split'),
    (dict(split='all', search_trials=2), 'apart from those that are measured'),
    (dict(tune_steps=-1), 'tune_steps is -1'),
    (dict(device='tpu9'), 'not a device'),
    (dict(data=some_data(val=None, test=None)), 'Noise has no val split'),
    (dict(data=ImageData('Two', 'two', ('a', 'b'), *[ImageSet(np.zeros((2, 32, 32, 3), np.uint8), [0, 1])] * 3)),
     'tells 3 classes apart, the data have 2'),
])
def test_refuses(change, words):
    arguments = {**dict(model=random_vit(), data=some_data(), methods=['tome'], rounds=0), **change}
    with pytest.raises(InputError, match=words):
        compare(**arguments)


def test_refuses_models():
    with pytest.raises(InputError, match='reduced by tome already'):
        compare(tokens.apply(random_vit(), 'tome', r=2), some_data(), rounds=0)
    with pytest.raises(InputError, match='no weights'):
        compare('revit_tiny_distilled_patch16_224', some_data(), rounds=0)
    with pytest.raises(InputError, match='no weights'):
        compare('vit_tiny_patch16_224', some_data(), rounds=0)  # the Hub is out of reach in tests
    with pytest.raises(InputError, match='does not say how to prepare'):
        compare(small_model('vit'), some_data(), rounds=0)
    convnet = timm.create_model('resnet10t', num_classes=3)
    with pytest.raises(InputError, match='cannot reduce'):
        compare(convnet, some_data(), rounds=0)
    damaged = random_vit()
    with torch.no_grad():
        damaged.head.bias[0] = float('nan')
    with pytest.raises(InputError, match='not finite'):
        compare(damaged, some_data(), methods=['tome'], rounds=0)


# -- the verb ---------------------------------------------------------------------------------------------------------

def run(*arguments):
    return CliRunner().invoke(cli.app, ['tokens', 'compare', *map(str, arguments)])


def test_verb_writes_table_json_and_plot(folder, image_folder, tmp_path):
    result = run(f'local-dir:{folder}', '--data', image_folder, '--methods', 'tome, random', '--targets', '1.0,0.8,0.5',
                 '--target', 0.65, '--output', tmp_path, '--rounds', 1, '--batch-size', 4, '--search', 2,
                 '--device', 'cpu')
    assert result.exit_code == 0, result.output
    assert 'Unreduced' in result.output and 'ToMe, searched' in result.output
    name = f'tokens_accuracy_{image_folder.name.replace("-", "_")}'
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{name}.json', f'{name}.md', f'{name}.png']
    report = json.loads((tmp_path / f'{name}.json').read_text())
    assert report['model'] == folder.name
    assert len(report['rows']) == 1 + 2 * 2 * 3 and report['num_images'] == 12
    table = [line for line in (tmp_path / f'{name}.md').read_text().splitlines() if line.startswith('|')]
    assert len(table) == 2 + len(report['rows']) and len({line.count('|') for line in table}) == 1
    for row, line in zip(report['rows'], table[2:]):
        assert f'{row["top1"]:.2f}' in line and f'{100 * row["macs_share"]:.1f}' in line
    with Image.open(tmp_path / f'{name}.png') as plot:
        assert plot.width > 1000 and len(plot.convert('RGB').getcolors(1 << 24)) > 50


def test_verb_prints_json_alone(folder, image_folder):
    result = run(f'local-dir:{folder}', '--data', image_folder, '--methods', 'uniform', '--limit', 3, '--rounds', 0,
                 '--json')
    report = json.loads(result.stdout)
    assert report['num_images'] == 3 and [row['target'] for row in report['rows']] == [1.0, 0.65]


@pytest.mark.parametrize('arguments,words', [
    (['--methods', 'zerotprune'], "nearest: 'zero_tprune'"),
    (['--target', '65'], 'give 0.65'),
    (['--targets', '0.5;0.3'], 'commas between'),
    (['--data', '/nowhere'], 'does not exist'),
    (['--output', '/dev/null/x'], 'cannot be written'),
])
def test_verb_answers_bad_input_in_one_sentence(folder, image_folder, arguments, words, capsys, monkeypatch):
    monkeypatch.delenv('VISHUB_DEBUG', raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main(['tokens', 'compare', f'local-dir:{folder}', '--data', str(image_folder), *arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and words in err and err.count('\n') == 1 and not out
