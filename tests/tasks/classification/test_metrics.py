"""Metrics against values worked out by hand, corruptions, and `vishub evaluate` from weights to card."""
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vishub import cli
from vishub.errors import InputError, WeightsNotFoundError
from vishub.files import sha256
from vishub.hub import save_folder
from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.classification.metrics import (
    CORRUPTIONS,
    SEVERITIES,
    calibration_bins,
    class_report,
    classification_metrics,
    corrupt,
    evaluate,
    measure,
    plot_calibration,
    plot_robustness,
    predict_logits,
    robustness,
    update_card,
    wilson_interval,
)
from vishub.tasks.classification.pipeline import ClassificationPipeline

# -- known values -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('correct,total,low,high', [
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (29, 29, 0.8830, 1.0),
])
def test_wilson_interval(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float32).log()


def test_accuracy_and_calibration():
    # confidences 0.9, 0.9, 0.9, 0.6, all for class 0; right: two of the first three and the last
    logits = logits_of([0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.6, 0.4])
    metrics = classification_metrics(logits, [0, 0, 1, 0])
    assert metrics['top1'] == 75 and 'top5' not in metrics
    # bins of a fifteenth: 3/4 |2/3 - 0.9| + 1/4 |1 - 0.6|
    assert metrics['ece'] == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.4, abs=1e-5)
    assert metrics['nll'] == pytest.approx(-np.log([0.9, 0.9, 0.1, 0.6]).mean(), abs=1e-5)
    assert metrics['top1_ci95'] == [round(100 * bound, 2) for bound in wilson_interval(3, 4)]


def test_top5():
    logits = torch.arange(7.).repeat(4, 1)  # best first: 6, 5, 4, 3, 2
    metrics = classification_metrics(logits, [6, 2, 1, 0])
    assert (metrics['top1'], metrics['top5']) == (25, 50)


def test_class_report():
    # true 0 0 0 1 1 2, predicted 0 0 1 1 1 1
    report = class_report(torch.eye(4)[[0, 0, 1, 1, 1, 1]], [0, 0, 0, 1, 1, 2], ('a', 'b', 'c', 'd'))
    assert report['confusion'] == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert report['classes'] == {
        'a': {'precision': 1.0, 'recall': 0.6667, 'f1': 0.8, 'support': 3},
        'b': {'precision': 0.5, 'recall': 1.0, 'f1': 0.6667, 'support': 2},
        'c': {'precision': 0.0, 'recall': 0.0, 'f1': 0.0, 'support': 1},
        'd': {'precision': 0.0, 'recall': 0.0, 'f1': 0.0, 'support': 0},
    }


# -- corruption -------------------------------------------------------------------------------------------------------

def picture(channels=3, height=32, width=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize('kind', CORRUPTIONS)
@pytest.mark.parametrize('channels', [1, 3])
def test_corruption_grows_with_severity_and_repeats(kind, channels):
    image = picture(channels)
    before = image.clone()
    damage = []
    for severity in SEVERITIES:
        corrupted = corrupt(image, kind, severity, seed=(0, 3))
        assert corrupted.dtype == torch.uint8 and corrupted.shape == image.shape
        assert torch.equal(corrupted, corrupt(image, kind, severity, seed=(0, 3)))
        damage.append(float((corrupted.float() - image.float()).square().mean()))
    assert damage[0] == 0 and all(low < high for low, high in zip(damage, damage[1:]))
    assert torch.equal(image, before)  # not changed in place
    random = not torch.equal(corrupt(image, kind, 3, seed=(0, 3)), corrupt(image, kind, 3, seed=(0, 4)))
    assert random == (kind in ('noise', 'occlusion'))


def test_corruptions_have_the_stated_strength():
    grey = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    noise = corrupt(grey, 'noise', 3).float() / 255
    assert float(noise.std()) == pytest.approx(0.12, rel=0.02)
    white = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    hole = (corrupt(white, 'occlusion', 4) != 255).float()
    assert float(hole.mean()) == pytest.approx(0.30, abs=0.01)
    image = picture()
    assert float(corrupt(image, 'contrast', 2).float().std() / image.float().std()) == pytest.approx(0.5, rel=0.01)


def test_unknown_corruption():
    for kind, severity in (('fog', 1), ('noise', 6), ('noise', -1)):
        with pytest.raises(InputError, match='noise, blur, contrast, occlusion at 0 to 5'):
            corrupt(picture(), kind, severity)


def test_logits_do_not_depend_on_the_batches():
    images = ImageSet(np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8), range(7))
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
    options = dict(prepare=lambda batch: torch.stack(list(batch)) / 255, corruption=('noise', 2), seed=5)
    seen = []
    whole = predict_logits(model, images, **options, advance=seen.append)
    parts = predict_logits(model, images, **options, batch_size=3, advance=seen.append)
    assert torch.allclose(whole, parts, atol=1e-6) and seen == [7, 3, 3, 1]


# -- models -----------------------------------------------------------------------------------------------------------

CLASSES = ('dark', 'bright')


class Brightness(nn.Module):
    """Tells dark from bright pictures; right on all of them unless they are damaged."""

    def __init__(self, label_names=CLASSES):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[-1.], [1.]]))
        self.num_classes = 2
        self.pretrained_cfg = {
            'architecture': 'brightness', 'input_size': (3, 16, 16), 'mean': (0.5,) * 3, 'std': (0.5,) * 3,
            'crop_pct': 1.0, 'crop_mode': 'squash', 'interpolation': 'bicubic', 'label_names': label_names}

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] @ self.weight.T


def bright_and_dark(count=12, test=True):
    """Grey levels 100 and 156 in turn; 2 x 2 of the 16 x 16 pixels are the other extreme."""
    labels = np.arange(count) % 2
    images = np.full((count, 16, 16, 3), 100, dtype=np.uint8)
    images[labels == 1] = 156
    images[labels == 0, :2, :2] = 255
    images[labels == 1, :2, :2] = 0
    split = ImageSet(images, labels)
    return ImageData('grey levels', 'grey', CLASSES, split, split, split if test else None)


def test_measure():
    data = bright_and_dark()
    measured = measure(ClassificationPipeline(Brightness()), data.test, CLASSES)
    assert measured['num_test'] == 12 and measured['metrics']['top1'] == 100
    assert measured['report']['confusion'] == [[6, 0], [0, 6]]


def test_classes_are_matched_by_name():
    data = bright_and_dark()
    turned = ImageData('turned', 'turned', ('bright', 'dark'), ImageSet(data.train.images, 1 - data.train.labels))
    assert measure(ClassificationPipeline(Brightness()), turned.train, turned.classes)['metrics']['top1'] == 100
    # a model that names other things, as ImageNet's do beside folders of numbers, is matched by place
    pipe = ClassificationPipeline(Brightness(('night', 'day')))
    assert measure(pipe, data.test, CLASSES)['metrics']['top1'] == 100
    assert measure(pipe, turned.train, turned.classes)['metrics']['top1'] == 0
    with pytest.raises(InputError, match="does not know the class 'bright'; it knows dark, light"):
        measure(ClassificationPipeline(Brightness(('dark', 'light'))), data.test, CLASSES)
    with pytest.raises(InputError, match='2 classes apart, the data have 3'):
        measure(pipe, data.test, ('a', 'b', 'c'))


def test_damaged_weights_are_noticed():
    model = Brightness()
    model.weight.data[0] = float('nan')
    with pytest.raises(InputError, match='not finite'):
        measure(ClassificationPipeline(model), bright_and_dark().test, CLASSES)


def test_robustness():
    data = bright_and_dark(count=40)
    pipe = ClassificationPipeline(Brightness())
    seen = []
    table = robustness(pipe, data.test, CLASSES, batch_size=15, advance=seen.append)
    assert list(table) == list(CORRUPTIONS) and sum(seen) == 40 * (1 + 4 * 5)
    assert all(len(values) == len(SEVERITIES) and values[0] == 100 for values in table.values())
    assert table['contrast'] == [100] * 6  # keeps the mean
    assert table == robustness(pipe, data.test, CLASSES, batch_size=40)


def test_plot_robustness(tmp_path):
    measured = {'severities': [0, 1], 'models': {name: {'noise': [9, 5], 'blur': [9, 7]} for name in ('one', 'other')}}
    plot_robustness(measured, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.width > 1000 and len(image.convert('L').getcolors()) > 2


def test_calibration_bins_are_those_of_the_error(tmp_path):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (400, 4))).float()
    labels = np.where(rng.random(400) < 0.6, logits.argmax(1).numpy(), rng.integers(0, 4, 400))
    table = calibration_bins(logits, labels)
    assert len(table) == 15 and sum(row['count'] for row in table) == 400
    filled = [row for row in table if row['count']]
    assert all(row['low'] < row['confidence'] <= row['high'] for row in filled)
    error = sum(row['count'] * abs(row['accuracy'] - row['confidence']) for row in filled) / 400
    ece = classification_metrics(logits, labels)['ece']
    assert error == pytest.approx(ece, abs=1e-4) and ece > 0.05
    certain = calibration_bins(torch.tensor([[100., 0.], [100., 0.]]), [0, 1])
    assert certain[-1] == {
        'low': pytest.approx(14 / 15, abs=1e-5), 'high': 1., 'count': 2, 'confidence': 1., 'accuracy': 0.5}
    assert certain[0]['count'] == 0 and certain[0]['accuracy'] is None
    plot_calibration(table, ece, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.height > 500 and len(image.convert('L').getcolors()) > 2


# -- vishub evaluate --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    """Two folders of weights, as training leaves them, and a folder of pictures with a test split."""
    root = tmp_path_factory.mktemp('stored')
    rng = np.random.default_rng(0)
    for split, count in (('train', 2), ('test', 6)):
        for label, name in enumerate(('cat', 'dog')):
            (root / 'pets' / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128, (24, 20, 3), dtype=np.uint8) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / 'pets' / split / name / f'{index}.png')
    torch.manual_seed(0)
    for name, names, wall_s, arguments in (
            ('favit_small64.pets', ['dog', 'cat'], 60.0, {'embed_dims': [16, 32, 64, 128]}),
            ('favit_small64.other', ['cat', 'dog'], 90.0, {'depths': [1, 1, 1, 1]})):
        model = timm.create_model('favit_small64', num_classes=2, **arguments)
        model.pretrained_cfg = {
            **model.default_cfg, 'input_size': (3, 48, 48), 'num_classes': 2, 'label_names': names}
        metrics = {
            'data': 'pets', 'split': 'test split', 'num_test': 12, 'metrics': {'top1': 1.25},
            'training': {'command': 'vishub train …', 'seed': 0, 'epochs': 1, 'wall_s': wall_s, 'hardware': 'abacus'}}
        save_folder(model, root / name, metrics=metrics, card={'limits': ['Pets only.']}, model_args=arguments)
    return root


def run(capsys, *arguments):
    """Run the command; give (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_evaluate_writes_report_plots_and_card(stored, tmp_path, capsys):
    folder = stored / 'favit_small64.pets'
    before = sha256(folder / 'model.safetensors')
    code, out, err = run(
        capsys, 'evaluate', folder, '--data', stored / 'pets', '--robustness', '--robustness-images', 4,
        '--peer', stored / 'favit_small64.other', '--output', tmp_path / 'out', '--update-card', '--json',
        '--device', 'cpu')
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((tmp_path / 'out' / 'evaluation.json').read_text()) == report
    assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == [
        'calibration.png', 'confusion.png', 'evaluation.json', 'robustness.png']

    # the same figure as the pipeline, picture by picture
    pipe = ClassificationPipeline(f'local-dir:{folder}', 'cpu')
    right = [
        pipe(file).predictions[0].label == file.parent.name
        for file in sorted((stored / 'pets' / 'test').rglob('*.png'))]
    assert report['num_test'] == len(right) == 12
    assert report['metrics']['top1'] == pytest.approx(100 * sum(right) / 12, abs=1e-3)
    peer, = report['peers']
    assert peer['name'] == 'favit_small64.other with depths=[1, 1, 1, 1]' and peer['wall_s'] == 90
    assert peer['num_params'] > report['num_params'] and set(peer) == {
        'name', 'num_params', 'input_size', 'metrics', 'wall_s', 'epochs'}
    assert report['robustness']['num_images'] == 4
    assert list(report['robustness']['models']) == ['favit_small64.pets', peer['name']]

    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['sha256'] == before == sha256(folder / 'model.safetensors')
    assert metrics['metrics'] == report['metrics'] and metrics['training']['wall_s'] == 60
    assert metrics['card'] == {'limits': ['Pets only.'], 'robustness_plot': 'robustness.png'}
    card = (folder / 'README.md').read_text()
    low, high = report['metrics']['top1_ci95']
    for line in (
            f'| Top-1 accuracy (%) | {report["metrics"]["top1"]:.2f} | {low:.2f} to {high:.2f} |',
            '| favit_small64.other with depths',
            '## Peers under the same budget',
            '4 evenly spread images of the test split', '| Model | Corruption | clean | severity 1 |',
            '![Top-1 accuracy (%) under corruption](robustness.png)', 'Pets only.'):
        assert line in card
    assert (folder / 'robustness.png').is_file()
    report['peers'][0]['epochs'] = 2  # another budget than the model's
    update_card(folder, report)
    assert '## Peers on the same data' in (folder / 'README.md').read_text()


def test_evaluate_prints_a_table(stored, capsys):
    code, out, err = run(
        capsys, 'evaluate', f'local-dir:{stored / "favit_small64.other"}', '--data', stored / 'pets')
    assert code == 0, err
    assert 'pets, test split, 12 images' in out and 'favit_small64.other' in out


@pytest.mark.parametrize('arguments,message', [
    (('favit_small64.pets', '--data', 'nowhere'), "data 'nowhere' does not exist"),
    (('favit_small64.pets', '--data', 'pets', '--split', 'val'), 'pets has no val split'),
    (('favit_small64.pets', '--data', 'pets', '--split', 'train'), 'it is test or val'),
    (('favit_small64.pets', '--data', 'pets', '--peer', 'favit_small64.pets'), 'two are the same'),
    (('favit_small64.pets', '--data', 'pets', '--output', 'file/out'), "'file/out' cannot be written"),
    (('favit_b9', '--data', 'pets'), 'favit_b9'),
    (('favit_b9', '--data', 'pets', '--update-card'), "'favit_b9' has no folder here"),
])
def test_evaluate_refuses(stored, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(stored)
    (stored / 'file').write_text('not a folder')
    code, out, err = run(capsys, 'evaluate', *arguments)
    assert code == 2 and message in err and err.strip().count('\n') == 0 and out == ''


def test_card_takes_only_its_own_figures(stored, tmp_path):
    folder = stored / 'favit_small64.other'
    data = bright_and_dark(test=False)
    report = {'split': 'validation split', 'data': 'pets'}
    with pytest.raises(InputError, match='not of the validation split'):
        update_card(folder, report)
    with pytest.raises(InputError, match='was trained on pets'):
        update_card(folder, {'split': 'test split', 'data': data.name})
    with pytest.raises(InputError, match='no test split'):
        evaluate([str(folder)], data)
    weights = folder / 'model.safetensors'
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(WeightsNotFoundError, match='damaged'):
            update_card(folder, {'split': 'test split', 'data': 'pets'})
    finally:
        weights.write_bytes(content)
    with pytest.raises(InputError, match='no metrics.json'):
        update_card(tmp_path, report)
