"""The recipe from a folder of pictures to weights that timm, the pipeline and `vishub evaluate` take."""
import csv
import json
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vishub import cli
from vishub.errors import InputError
from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.classification.metrics import measure
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tasks.classification.training import ClassificationRecipe, parse_model_args, to_input

COLOURS = {'amber': (200, 140, 30), 'blue': (40, 60, 180), 'green': (30, 150, 60), 'white': (225, 225, 230)}
SMALL = ('--model', 'favit_small64', '--model-arg', 'embed_dims=(16,32,64,128)', '--model-arg', 'depths=(1,1,1,1)')


def run(capsys, *arguments):
    """Run the command; give (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def write_pictures(root, per_class, side=40):
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = np.array(colour) + rng.normal(0, 30, (side, side + index % 5, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f'{index}.png')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """`vishub train` on a folder of coloured pictures: (exit code, stdout, stderr, folder of pictures, output)."""
    root = tmp_path_factory.mktemp('trained')
    write_pictures(root / 'Colour cards' / 'train', 16)
    write_pictures(root / 'Colour cards' / 'test', 5)
    capture = pytest.MonkeyPatch()
    import contextlib
    import io
    out, err = io.StringIO(), io.StringIO()
    with capture.context(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = None
        try:
            cli.main([
                'train', 'classification', *SMALL, '--data', str(root / 'Colour cards'), '--output', str(root / 'out'),
                '--resolution', '40:5,48:1', '--batch-size', '8', '--lr', '2e-3', '--ema-decay', '0.8',
                '--augmentation', 'light', '--device', 'cpu', '--no-progress', '--tag', 'colours'])
        except SystemExit as leaving:
            code = leaving.code
    return code, out.getvalue(), err.getvalue(), root / 'Colour cards', root / 'out'


def test_trains_better_than_chance(trained):
    code, out, err, _, output = trained
    assert code == 0, err
    folder = output / 'favit_small64.colours'
    assert out == f'weights and figures: {folder}\n'
    assert sorted(file.name for file in output.iterdir()) == [
        'augmentation.png', 'best.safetensors', 'checkpoint.safetensors', 'favit_small64.colours',
        'learning_curves.png', 'log.csv', 'training.log']
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['metrics']['top1_ci95'][0] > 25  # chance
    assert (metrics['data'], metrics['split'], metrics['num_test']) == ('Colour cards', 'test split', 20)
    assert metrics['training']['epochs'] == 6 and metrics['training']['samples'] == 60  # 16 - 1 of each class


def test_prints_a_line_an_epoch(trained):
    _, _, err, _, output = trained
    lines = err.splitlines()
    assert lines[0] == '60 samples, 6 epochs of 7 steps on cpu'
    assert len(lines) == 7, lines
    with open(output / 'log.csv', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    for number, (line, row) in enumerate(zip(lines[1:], rows, strict=True), start=1):
        side = 40 if number < 6 else 48
        loss, top1 = float(row['train_loss']), float(row['top1'])
        assert line.startswith(f'epoch {number}/6 at {side} px: loss {loss:.4f}, top1 {top1:.2f}, ')
        assert ('left' in line) == (number < 6)
    assert float(rows[-1]['train_loss']) < float(rows[0]['train_loss'])


def test_stored_weights_load_everywhere(trained):
    _, _, _, pictures, output = trained
    folder = output / 'favit_small64.colours'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert model.pretrained_cfg['input_size'] == (3, 48, 48)
    pipe = ClassificationPipeline(f'local-dir:{folder}', 'cpu')
    assert pipe.label_names == tuple(COLOURS)
    results = pipe(sorted((pictures / 'test').rglob('*.png')))
    right = [result.predictions[0].label == os.path.basename(os.path.dirname(result.source)) for result in results]
    recorded = json.loads((folder / 'metrics.json').read_text())['metrics']['top1']
    assert recorded == pytest.approx(100 * np.mean(right), abs=1e-3)
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config)(results[0].image)[None]
    with torch.inference_mode():
        assert model(x).softmax(-1).max().item() == pytest.approx(results[0].predictions[0].probability, abs=1e-4)


def test_finished_run_is_not_trained_again(trained, capsys):
    *_, pictures, output = trained
    code, out, err = run(
        capsys, 'train', 'classification', *SMALL, '--data', pictures, '--output', output, '--resolution', '40:5,48:1',
        '--batch-size', 8, '--lr', 2e-3, '--ema-decay', 0.8, '--augmentation', 'light', '--device', 'cpu',
        '--tag', 'colours')
    assert code == 0 and 'epoch' not in err and 'continuing from step 42 of 42' in err
    assert out == f'weights and figures: {output / "favit_small64.colours"}\n'


def test_fast_preparation_is_the_pipelines(trained):
    """Training prepares batches of tensors, the pipeline single PIL pictures: the model must see the same."""
    folder = trained[-1] / 'favit_small64.colours'
    pipe = ClassificationPipeline(f'local-dir:{folder}', 'cpu')
    cfg = pipe.model.pretrained_cfg
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    fast = to_input(torch.from_numpy(pixels).permute(2, 0, 1)[None], 48, cfg['mean'], cfg['std'])
    slow = pipe.transform(Image.fromarray(pixels))
    difference = (fast[0] - slow).abs() * torch.tensor(cfg['std']).view(3, 1, 1) * 255  # in grey levels
    # PIL rounds and clips to whole levels between its two passes: rounding everywhere, clipping in a few places
    assert difference.mean() < 0.5 and difference.quantile(0.95) < 1.5


# -- recipe -----------------------------------------------------------------------------------------------------------

def make_data(channels=3, classes=3, count=24, side=40):
    rng = np.random.default_rng(1)
    sets = [
        ImageSet(rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8), np.arange(n) % classes)
        for n in (count, classes, classes)]
    return ImageData('noise', 'noise', tuple('abcdefgh'[:classes]), *sets)


def test_grey_pictures():
    recipe = ClassificationRecipe(
        'favit_small64', make_data(channels=1), model_args={'embed_dims': (16, 32, 64, 128)}, mixup=0.)
    model = recipe.build_model()
    inputs, labels = recipe.prepare((torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.arange(4)), 40, training=True)
    assert inputs.shape == (4, 1, 40, 40) and labels.shape == (4,)
    assert model(inputs).shape == (4, 3)
    stored = recipe.stored_form(model, 'favit_small64', 40)
    assert stored.pretrained_cfg['input_size'] == (1, 40, 40) and len(stored.pretrained_cfg['mean']) == 1


def test_inputs_are_normalised_by_the_training_images():
    recipe = ClassificationRecipe('favit_small64', make_data(), mixup=0.)
    images = torch.from_numpy(recipe.data.train.images).permute(0, 3, 1, 2)
    inputs, _ = recipe.prepare((images, torch.zeros(len(images))), 40, training=False)
    assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-2)


def test_mixing_mixes_images_and_labels_alike():
    recipe = ClassificationRecipe('favit_small64', make_data(), mixup=1., label_smoothing=0.)
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 255)])
    inputs, shares = recipe.prepare((images, torch.tensor([0, 1])), 8, training=True)
    assert shares.shape == (2, 3) and torch.allclose(shares.sum(1), torch.ones(2))
    levels = inputs[:, 0, 0, 0] * recipe.std[0] + recipe.mean[0]  # 0 is class 0, 1 is class 1
    assert torch.allclose(levels, shares[:, 1], atol=1e-4) and 0 < float(shares[0, 1]) < 1
    _, labels = recipe.prepare((images, torch.tensor([0, 1])), 8, training=False)
    assert labels.tolist() == [0, 1]


def test_label_smoothing_is_applied_once():
    data = make_data()
    output = torch.tensor([[2., 0., 0.]])
    plain = ClassificationRecipe('favit_small64', data, mixup=0., label_smoothing=0.3)
    target = torch.tensor([0.8, 0.1, 0.1])
    assert plain.loss(output, torch.tensor([0])) == pytest.approx(float(-(target * output.log_softmax(1)).sum()))
    assert plain.loss(output, target[None]) == plain.loss(output, torch.tensor([0]))


def test_model_arguments():
    assert parse_model_args(['window_size=3', 'act_layer=gelu', 'depths=(1,2)', 'flag=True']) == {
        'window_size': 3, 'act_layer': 'gelu', 'depths': (1, 2), 'flag': True}
    for bad in ('window_size', '3=3', '=3'):
        with pytest.raises(InputError, match='not name=value'):
            parse_model_args([bad])


def test_measure_takes_a_model_that_was_never_stored():
    data = make_data()
    recipe = ClassificationRecipe('favit_small64', data)
    pipe = ClassificationPipeline(recipe.stored_form(recipe.build_model(), 'favit_small64', 40), 'cpu')
    assert measure(pipe, data.test, data.classes)['num_test'] == 3


# -- what is wrong is said before training ----------------------------------------------------------------------------

@pytest.mark.parametrize('changes,message', [
    ({'--data': 'nowhere'}, "data 'nowhere' does not exist"),
    ({'--data': 'empty'}, "'empty' has 0 class folders"),
    ({'--data': 'one'}, "'one' has 1 class folders"),
    ({'--data': 'corrupt'}, "green/3.png' is not a picture"),
    ({'--output': 'file/out'}, "'file/out' cannot be written"),
    ({'--model': 'favit_b9'}, 'favit_b'),
    ({'--model-arg': 'windows=3'}, 'refuses its arguments'),
    ({'--model-arg': 'window_size=0'}, 'window_size must be at least 1'),
    ({'--augmentation': 'strong'}, 'none, light, medium, heavy'),
    ({'--validate-on': 'train'}, 'val, test, none'),
    ({'--validate-on': 'test'}, 'no test split'),
    ({'--resolution': '40'}, 'side:epochs'),
    ({'--batch-size': '500'}, 'smaller batch'),
    ({'--amp': 'fp8'}, 'no, bf16, fp16'),
    ({'--opt': 'sgdd'}, 'sgdd'),
], ids=lambda value: ' '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else '')
def test_refused_before_training(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / 'good', 4)
    write_pictures(tmp_path / 'corrupt', 4)
    (tmp_path / 'corrupt' / 'green' / '3.png').write_text('no picture')
    (tmp_path / 'one' / 'a').mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('not a folder')
    monkeypatch.setattr('vishub.training.loop._Run.take_step', lambda *_: pytest.fail('training began'))
    options = {'--model': 'favit_small64', '--data': 'good', '--output': 'out', '--resolution': '40:1',
               '--batch-size': '4', '--device': 'cpu', **changes}
    code, out, err = run(capsys, 'train', 'classification', *(word for item in options.items() for word in item))
    assert code == 2 and message in err and out == ''
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / 'out' / 'favit_small64.good').exists()


# -- fine-tuning ------------------------------------------------------------------------------------------------------

def test_linear_probe_from_a_csv(trained, tmp_path, capsys):
    """Weights of four classes, probed for two: the head is new and said so, the rest stays as it was."""
    *_, pictures, output = trained
    lines = [
        f'{file},{"grey" if file.parent.name == "white" else "coloured"}'
        for file in sorted((pictures / 'train').rglob('*.png'))]
    (tmp_path / 'kinds.csv').write_text('\n'.join(['path,label', *lines]))
    folder = output / 'favit_small64.colours'
    code, out, err = run(
        capsys, 'train', 'classification', '--model', f'local-dir:{folder}', '--pretrained', '--linear-probe',
        '--class-weights', 'balanced', '--data', tmp_path / 'kinds.csv', '--output', tmp_path / 'out',
        '--resolution', '48:2', '--batch-size', 8, '--lr', 1e-2, '--device', 'cpu', '--no-progress')
    assert code == 0, err
    assert 'head re-initialised for 2 classes; the pretrained one told 4 apart' in err.splitlines()
    assert 'parameters are trained, the others are frozen' in err
    before = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    stored = out.strip().removeprefix('weights and figures: ')
    after = timm.create_model(f'local-dir:{stored}', pretrained=True).state_dict()
    for name, value in after.items():
        if not name.startswith('head'):
            assert torch.allclose(value.float(), before[name].float(), atol=1e-3, rtol=1e-3), name
    with Image.open(tmp_path / 'out' / 'augmentation.png') as picture:
        assert picture.size == (8 * 128, 4 * (128 + 14))


def test_frozen_patterns_reach_the_model():
    recipe = ClassificationRecipe(
        'favit_small64', make_data(), model_args={'embed_dims': (16, 32, 64, 128)}, freeze=['stages.0', 'stages.1'])
    model = recipe.build_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith(('stages.0.', 'stages.1.')) for name in trained)
    assert 'frozen' in recipe.remarks()[0]
    model.train()
    recipe.train_mode(model)
    assert not model.stages[0].training and model.stages[2].training


def test_balanced_weights_let_classes_count_alike():
    data = make_data()
    data.train.labels[:] = [0] * 18 + [1] * 4 + [2] * 2
    recipe = ClassificationRecipe('favit_small64', data, mixup=0., label_smoothing=0., class_weights='balanced')
    output = torch.tensor([[1., 0., 0.]]).repeat(24, 1)
    labels = torch.from_numpy(data.train.labels)
    each = -output[0].log_softmax(0)
    assert float(recipe.loss(output, labels)) == pytest.approx(float(each.mean()))  # one third each
    shares = torch.nn.functional.one_hot(labels, 3).float()
    assert float(recipe.loss(output, shares)) == pytest.approx(float(each.mean()))
    halves = [recipe.loss(output[part], labels[part]) for part in (slice(0, 12), slice(12, 24))]
    assert float(sum(halves) / 2) == pytest.approx(float(each.mean()))  # two processes


def test_preview_shows_what_the_model_gets():
    data = make_data(side=16)
    data.train.images[:] = 0
    data.train.images[data.train.labels == 1] = 255
    recipe = ClassificationRecipe('favit_small64', data, augmentation='none', mixup=0.)
    recipe.mean, recipe.std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    grid = np.asarray(recipe.preview(16))
    assert grid.shape == (3 * 142, 8 * 128, 3)  # 24 samples
    tiles = [grid[row * 142 + 80, column * 128 + 64].tolist() for row in range(3) for column in range(8)]
    assert sorted(map(tuple, tiles)) == [(0, 0, 0)] * 16 + [(255, 255, 255)] * 8


@pytest.mark.parametrize('options,message', [
    ({'class_weights': 'rare'}, 'it is balanced'), ({'freeze': ['stem'], 'linear_probe': True}, 'exclude each other')])
def test_refused_options(options, message):
    with pytest.raises(InputError, match=message):
        ClassificationRecipe('favit_small64', make_data(), **options)
