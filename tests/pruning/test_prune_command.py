"""`vishub prune`, from a folder of pictures and a trained model to smaller weights that timm loads."""
import contextlib
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vishub import cli
from vishub.hub import save_folder
from vishub.models.nvit import NViT
from vishub.pruning import as_nvit, count_macs, count_params
from vishub.tasks.classification.data import load_data
from vishub.tasks.classification.metrics import measure
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tasks.classification.training import to_input

SIDE = 16
# Neither order is the alphabetical one of the folders.
NAMES = ('rising', 'flat', 'steep', 'falling')
ANGLES = {'flat': 0., 'rising': 0.25, 'steep': 0.5, 'falling': 0.75}  # of half a turn
MEAN, STD = (0.45, 0.5, 0.55), (0.3, 0.25, 0.2)
SIZES = dict(img_size=SIDE, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4)
QUICK = ('--epochs', '3', '--batch-size', '16', '--interval', '1', '--groups-per-step', '3', '--device', 'cpu',
         '--no-progress')


def run(*arguments):
    """Run the command; give (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code, out.getvalue(), err.getvalue()


def write_pictures(root, per_class, seed):
    """Stripes in four directions over noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for name in NAMES:
        (root / name).mkdir(parents=True)
        angle = np.pi * ANGLES[name]
        for index in range(per_class):
            wave = np.sin(rows * np.cos(angle) + columns * np.sin(angle) + rng.uniform(0, 6.3))
            pixels = 128 + 60 * wave[..., None] + rng.normal(0, 20, (SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f'{index}.png')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Pictures in `stripes`, and a ViT trained on them in `vit.stripes`, whose classes have an order of their own."""
    root = tmp_path_factory.mktemp('prune')
    write_pictures(root / 'stripes' / 'train', 48, 0)
    write_pictures(root / 'stripes' / 'test', 16, 1)
    data = load_data(root / 'stripes')
    assert data.classes != NAMES
    images = torch.stack([torch.from_numpy(data.train[i].transpose(2, 0, 1).copy()) for i in range(len(data.train))])
    x = to_input(images, SIDE, MEAN, STD)
    y = torch.tensor([NAMES.index(data.classes[label]) for label in data.train.labels])
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        for chosen in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    save_folder(
        model.eval(), root / 'vit.stripes', metrics={}, card={'licence': 'mit'}, dtype=torch.float32, model_args=SIZES,
        pretrained_cfg=dict(
            input_size=(3, SIDE, SIDE), mean=MEAN, std=STD, crop_pct=1., interpolation='bicubic',
            label_names=list(NAMES)))
    return root


def top1(folder, place):
    data = load_data(place / 'stripes')
    return measure(ClassificationPipeline(f'local-dir:{folder}', 'cpu'), data.test, data.classes)['metrics']['top1']


@pytest.fixture(scope='module')
def pruned(place):
    """(report that `--json` printed, stderr) of a run."""
    code, out, err = run(
        'prune', f'local-dir:{place / "vit.stripes"}', '--data', place / 'stripes', '--output', place / 'out',
        '--target-flops', '0.5', '--json', *QUICK)
    assert code in (0, None), err
    return json.loads(out)


def test_folder_holds_the_smaller_model(place, pruned):
    folder = place / 'out' / 'nvit.stripes'
    assert pruned['folder'] == str(folder)
    assert sorted(path.name for path in (place / 'out').iterdir()) == ['nvit.stripes']  # nothing of the work is left
    assert {path.name for path in folder.iterdir()} == {
        'model.safetensors', 'config.json', 'metrics.json', 'README.md', 'pruning.json', 'pruning.md', 'pruning.png',
        'fine_tuning.csv'}
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    whole = as_nvit(timm.create_model(f'local-dir:{place / "vit.stripes"}', pretrained=True))
    assert type(model) is NViT and model.dims == pruned['dims_after'] != whole.dims
    assert pruned['macs'] == [count_macs(whole), count_macs(model)]
    assert pruned['params'] == [count_params(whole), count_params(model)]
    assert 0.35 < count_macs(model) / count_macs(whole) <= 0.5
    assert model.pretrained_cfg['label_names'] == list(NAMES)
    assert (tuple(model.pretrained_cfg['mean']), tuple(model.pretrained_cfg['std'])) == (MEAN, STD)
    assert len((folder / 'fine_tuning.csv').read_text().splitlines()) == 1 + 3


def test_reported_accuracies_are_those_of_the_models(place, pruned):
    accuracy = pruned['accuracy']
    assert accuracy['original'] == pytest.approx(top1(place / 'vit.stripes', place), abs=1e-3)
    assert accuracy['original'] > 90  # with the classes mixed up it would be near chance, 25
    assert accuracy['stored'] == pytest.approx(top1(place / 'out' / 'nvit.stripes', place), abs=1e-3)
    assert accuracy['stored'] > 75
    assert pruned['metrics']['top1'] == accuracy['stored']
    assert pruned['split'] == 'test split'


def test_files_agree_with_the_report(place, pruned):
    folder = place / 'out' / 'nvit.stripes'
    stored = json.loads((folder / 'pruning.json').read_text())
    assert stored == {key: pruned[key] for key in stored}
    assert stored['target'] == {'flops': 0.5} and stored['reached'] <= 0.5 and min(stored['seconds']) > 0
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert (metrics['data'], metrics['split'], metrics['num_test']) == ('stripes', 'test split', 64)
    recipe = metrics['training']['recipe']
    assert (recipe['target_flops'], recipe['pruning_batches'], recipe['lr']) == (0.5, stored['batches'], 1e-4)
    card = (folder / 'README.md').read_text()
    assert 'license: mit' in card  # the unpruned model's
    for fact in (f'{stored["accuracy"]["stored"]:.2f}', f'{stored["accuracy"]["dense"]:.2f}', 'vit.stripes',
                 f'{stored["params"][1]:,}', 'pruning.png'):
        assert fact in card, fact
    with Image.open(folder / 'pruning.png') as plot:
        assert plot.width > 800


def test_same_seed_same_weights_and_a_report_to_read(place, pruned):
    code, out, err = run(
        'prune', f'local-dir:{place / "vit.stripes"}', '--data', place / 'stripes', '--output', place / 'again',
        '--target-flops', '0.5', *QUICK)
    assert code in (0, None), err
    first, second = (
        json.loads((place / name / 'nvit.stripes' / 'metrics.json').read_text())['sha256'] for name in ('out', 'again'))
    assert first == second
    assert '| block |' in out and 'top-1 on the test split' in out
    assert f'{pruned["macs"][0]:,} → {pruned["macs"][1]:,}' in out


def test_latency_target_and_a_teacher(place, monkeypatch):
    """The table is measured on this device; a second model's answers and no soft ones teach."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(place / 'cache'))
    code, out, err = run(
        'prune', f'local-dir:{place / "vit.stripes"}', '--data', place / 'stripes', '--output', place / 'taught',
        '--target-latency', '0.9', '--teacher', f'local-dir:{place / "vit.stripes"}', '--labels-only', '--tag', 'fast',
        '--json', *QUICK)
    assert code in (0, None), err
    report = json.loads(out)
    assert report['target'] == {'latency': 0.9} and report['reached'] <= 0.9
    assert report['accuracy']['stored'] > 75
    assert report['folder'].endswith('nvit.fast')
    assert list((place / 'cache').rglob('*.json'))


def test_without_fine_tuning(place):
    code, out, err = run(
        'prune', f'local-dir:{place / "vit.stripes"}', '--data', place / 'stripes', '--output', place / 'raw',
        '--target-params', '0.8', '--max-images', '64', '--json', *QUICK, '--epochs', '0')
    assert code in (0, None), err
    report = json.loads(out)
    metrics = json.loads((place / 'raw' / 'nvit.stripes' / 'metrics.json').read_text())
    assert (metrics['training']['samples'], metrics['training']['epochs']) == (64, 0)
    assert report['accuracy']['stored'] == pytest.approx(report['accuracy']['dense'], abs=2)  # fp16 alone changed it


@pytest.mark.parametrize(('arguments', 'words'), [
    ((), 'give one of target_latency, target_flops, target_params (got none)'),
    (('--target-flops', '0.5', '--target-params', '0.5'), 'got target_flops, target_params'),
    (('--target-params', '0.01'), 'cannot be reached; with the last group of every kind left it is 0.'),
    (('--target-latency', '2'), 'between 0 and 1'),
    (('--target-flops', '0.5', '--batch-size', '1000'), '192 training images do not fill one batch of 1000'),
    (('--target-flops', '0.5', '--epochs', '-1'), 'epochs is -1'),
    (('--target-flops', '0.5', '--augmentation', 'much'), "augmentation 'much' is unknown"),
    (('--target-flops', '0.5', '--teacher', 'nonsense'), "nonsense'"),
    (('--target-flops', '0.5', '--data', 'nowhere'), "'nowhere' does not exist"),
])
def test_errors_are_one_sentence_and_leave_nothing(place, tmp_path, arguments, words):
    code, out, err = run(
        'prune', f'local-dir:{place / "vit.stripes"}', '--data', place / 'stripes', '--output', tmp_path / 'out',
        *QUICK, *arguments)
    assert (code, out) == (2, ''), err
    assert err.startswith('vishub: ') and err.count('\n') == 1
    assert words in err
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').iterdir())


def test_models_that_cannot_be_pruned_are_named(place, tmp_path):
    peer = timm.create_model('resnet10t', num_classes=4)
    save_folder(peer, tmp_path / 'resnet10t.x', metrics={}, card={})
    code, _, err = run(
        'prune', f'local-dir:{tmp_path / "resnet10t.x"}', '--data', place / 'stripes', '--output', tmp_path / 'out',
        '--target-flops', '0.5', *QUICK)
    assert code == 2 and 'ResNet is not supported' in err


def test_data_of_other_classes_are_refused(place, tmp_path):
    write_pictures(tmp_path / 'fewer', 2, 0)
    for file in (tmp_path / 'fewer' / 'flat').iterdir():
        file.unlink()
    (tmp_path / 'fewer' / 'flat').rmdir()
    code, _, err = run(
        'prune', f'local-dir:{place / "vit.stripes"}', '--data', tmp_path / 'fewer', '--output', tmp_path / 'out',
        '--target-flops', '0.5', *QUICK)
    assert code == 2 and 'tells 4 classes apart, the data have 3' in err


def test_unwritable_output_fails_before_anything_is_read(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    code, _, err = run('prune', 'no_model', '--data', 'no_data', '--output', tmp_path / 'file' / 'out',
                       '--target-flops', '0.5')
    assert code == 2 and 'cannot be written' in err
