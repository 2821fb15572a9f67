"""Classification: names, probabilities, heat maps that point at the evidence, and the command line around them."""
import json
import threading

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vishub
from vishub import cli
from vishub.errors import InputError
from vishub.tasks.classification.pipeline import ClassificationPipeline, class_activation_map

NAMES = ('cat', 'dog', 'house', 'tree')


def noise(width=80, height=60, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def blob(width, height, x, y, radius=12):
    """White disc at (x, y) on black."""
    rows, columns = np.mgrid[:height, :width]
    inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius ** 2
    return Image.fromarray(np.repeat((inside * 255).astype(np.uint8)[..., None], 3, axis=2))


class Brightness(nn.Module):
    """Class 1 is the mean brightness, class 0 its opposite: the evidence for 1 is just where the picture is bright."""

    def __init__(self, size=(64, 64), in_chans=3, patch=8, crop_pct=1.0, crop_mode='center'):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 1, patch, patch, bias=False)
        self.head = nn.Linear(1, 2)
        nn.init.constant_(self.stem.weight, 1 / self.stem.weight.numel())
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.], [1.]]))
            self.head.bias.copy_(torch.tensor([0.01, 0.]))
        self.num_classes = 2
        self.pretrained_cfg = {
            'input_size': (in_chans, *size), 'mean': (0.,) * in_chans, 'std': (1.,) * in_chans, 'crop_pct': crop_pct,
            'crop_mode': crop_mode, 'interpolation': 'bilinear', 'label_names': ['dark', 'bright']}

    def forward_intermediates(self, x):
        x = self.stem(x)
        return x, [x]

    def forward_head(self, x):
        return self.head(x.mean(dim=(2, 3)))

    def forward(self, x):
        return self.forward_head(self.stem(x))


@pytest.fixture(scope='module')
def vit():
    torch.manual_seed(1)
    model = timm.create_model('test_vit', num_classes=4)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': NAMES}
    nn.init.normal_(model.head.weight, std=0.5)
    return ClassificationPipeline(model, device='cpu')


# -- scores and names -------------------------------------------------------------------------------------------------

def test_probabilities_are_those_of_timm_s_own_recipe(vit):
    image = noise()
    config = timm.data.resolve_model_data_config(vit.model)
    x = timm.data.create_transform(**config, is_training=False)(image)[None]
    with torch.no_grad():
        expected = vit.model(x).softmax(-1)[0]
    result = vit(image, top_k=3)
    assert [p.index for p in result.predictions] == expected.topk(3).indices.tolist()
    assert [p.probability for p in result.predictions] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-6)
    assert all(p.label == NAMES[p.index] for p in result.predictions)
    assert result.heatmap is None and result.heatmap_index is None and result.warnings == ()
    assert result.image.size == image.size and result.latency_ms > 0
    assert result.num_params == sum(p.numel() for p in vit.model.parameters())
    assert sum(p.probability for p in vit(image, top_k=100).predictions) == pytest.approx(1)


def test_label_names():
    model = timm.create_model('test_vit')
    assert ClassificationPipeline(model, 'cpu').label(0) == 'tench, Tinca tinca'
    assert ClassificationPipeline(timm.create_model('test_vit', num_classes=9), 'cpu').label(7) == 'class 7'
    # Names of another head are not this head's.
    model = timm.create_model('test_vit', num_classes=9)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': NAMES}
    assert ClassificationPipeline(model, 'cpu').label(0) == 'class 0'


def test_batches_equal_singles(vit, tmp_path):
    images = [noise(seed=seed, width=50 + 30 * seed) for seed in range(5)]
    path = tmp_path / 'a.png'
    images[2].save(path)
    seen = []
    many = vit([*images[:2], path, *images[3:]], heatmap=True, batch_size=2,
               progress=lambda *state: seen.append(state))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert many[2].source == str(path) and many[0].source is None
    for image, one in zip(images, many):
        single = vit(image, heatmap=True)
        assert [p.index for p in single.predictions] == [p.index for p in one.predictions]
        assert [p.probability for p in single.predictions] == pytest.approx(
            [p.probability for p in one.predictions], abs=1e-5)
        assert one.heatmap.shape == (image.height, image.width)
        np.testing.assert_allclose(one.heatmap, single.heatmap, atol=1e-3)
    assert vit([]) == []


def test_heat_map_changes_no_score_and_leaves_no_trace(vit):
    plain, explained = vit(noise()), vit(noise(), heatmap=True)
    assert plain.predictions == explained.predictions
    assert all(p.grad is None for p in vit.model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in vit.model.modules())


def test_threads_share_a_pipeline(vit):
    images = [noise(seed=seed) for seed in range(4)]
    expected = [vit(image, heatmap=True) for image in images]
    results = [None] * 4

    def work(n):
        results[n] = vit(images[n], heatmap=True)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(results, expected):
        assert [p.index for p in one.predictions] == [p.index for p in other.predictions]
        np.testing.assert_allclose(one.heatmap, other.heatmap, atol=1e-4)


def test_grey_model_gets_grey_whatever_its_configuration_says():
    pipe = ClassificationPipeline(Brightness(in_chans=1), 'cpu')
    pure_red = Image.new('RGB', (64, 64), (255, 0, 0))
    score = pipe(pure_red).predictions[0].probability
    # Luma of red is 76 of 255; the two scores are -x + 0.01 and x.
    assert score == pytest.approx(torch.sigmoid(torch.tensor(2 * 76 / 255 - 0.01)).item(), abs=1e-4)
    # Its pretrained_cfg goes on saying (3, 160, 160).
    adapted = timm.create_model('test_vit', in_chans=1, img_size=64, dynamic_img_size=False, num_classes=2)
    pipe = ClassificationPipeline(adapted, 'cpu')
    assert pipe.input_size == (1, 64, 64) and len(pipe(pure_red).predictions) == 2


def test_local_dir(tmp_path, vit):
    timm.models.save_for_hf(
        vit.model, tmp_path, model_config={'num_classes': 4, 'label_names': list(NAMES)}, safe_serialization=True)
    pipe = vishub.pipeline(model=f'local-dir:{tmp_path}', device='cpu')
    ours, theirs = pipe(noise()).predictions, vit(noise()).predictions
    assert [p.label for p in ours] == [p.label for p in theirs]
    assert [p.probability for p in ours] == pytest.approx([p.probability for p in theirs])


# -- heat maps --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('x, y', [(16, 16), (48, 16), (16, 48), (48, 48)])
def test_heat_map_peaks_where_the_evidence_lies(x, y):
    result = ClassificationPipeline(Brightness(), 'cpu')(blob(64, 64, x, y), heatmap=True)
    assert result.predictions[0].label == 'bright'
    assert result.heatmap.shape == (64, 64) and result.heatmap.dtype == np.float32
    assert result.heatmap.min() >= 0 and 0.9 < result.heatmap.max() <= 1
    rows, columns = np.mgrid[:64, :64]
    total = result.heatmap.sum()
    assert (result.heatmap * columns).sum() / total == pytest.approx(x - 0.5, abs=1)
    assert (result.heatmap * rows).sum() / total == pytest.approx(y - 0.5, abs=1)
    assert result.to_dict()['heatmap']['index'] == 1


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [1.0, 0.8])
@pytest.mark.parametrize('width, height, x, y', [(200, 120, 100, 40), (90, 150, 30, 85), (37, 30, 20, 12)])
def test_heat_map_lies_over_the_picture_as_it_was(size, crop_mode, crop_pct, width, height, x, y):
    """The centre of gravity of a disc's map is the disc's, whatever was scaled, squashed, padded or cut away."""
    pipe = ClassificationPipeline(Brightness(size, patch=2, crop_mode=crop_mode, crop_pct=crop_pct), 'cpu')
    result = pipe(blob(width, height, x, y, radius=6), heatmap=True, heatmap_index=1)
    assert result.heatmap.shape == (height, width)
    rows, columns = np.mgrid[:height, :width]
    total = result.heatmap.sum()
    cell = 2 * max(width / size[1], height / size[0]) / crop_pct  # pixels of the picture that a feature covers
    assert abs((result.heatmap * columns).sum() / total - x) < 0.5 * cell
    assert abs((result.heatmap * rows).sum() / total - y) < 0.5 * cell


def test_heat_map_is_zero_outside_the_crop():
    white = Image.new('RGB', (128, 64), 'white')
    heat = ClassificationPipeline(Brightness(), 'cpu')(white, heatmap=True).heatmap
    assert (heat[:, :32] == 0).all() and (heat[:, 96:] == 0).all() and heat[:, 33:95] == pytest.approx(1)
    heat = ClassificationPipeline(Brightness(crop_pct=0.5), 'cpu')(white, heatmap=True).heatmap
    assert heat[17:47, 49:79] == pytest.approx(1) and heat.sum() == pytest.approx(32 * 32, rel=0.1)


def test_exif_rotation_turns_picture_and_heat_map(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees to be upright
    path = tmp_path / 'phone.png'
    blob(120, 90, 20, 45).save(path, exif=exif)
    result = ClassificationPipeline(Brightness(crop_mode='squash'), 'cpu')(path, heatmap=True)
    assert result.image.size == (90, 120) and result.heatmap.shape == (120, 90)
    x, y = result.to_dict()['heatmap']['peak']
    assert abs(x - 45) < 12 and abs(y - 20) < 12
    assert result.image.getpixel((45, 20)) == (255, 255, 255)


def test_nothing_speaks_for_the_class():
    result = ClassificationPipeline(Brightness(), 'cpu')(noise(64, 64), heatmap=True, heatmap_index=0)
    assert result.heatmap_index == 0 and (result.heatmap == 0).all()


@pytest.mark.parametrize('name', ['test_vit', 'test_vit3', 'test_resnet', 'test_convnext', 'test_maxvit', 'favit_b0'])
def test_heat_map_of_every_kind_of_model(name):
    """Class token and pooled transformers, convolutions, windows: the map is there, and follows the picture."""
    torch.manual_seed(0)
    pipe = ClassificationPipeline(timm.create_model(name, num_classes=4), 'cpu')
    nn.init.normal_(pipe.model.get_classifier().weight)
    side = pipe.input_size[-1]
    maps = [pipe(noise(side, side, seed), heatmap=True).heatmap for seed in range(2)]
    for heat in maps:
        assert heat.shape == (side, side) and np.isfinite(heat).all() and heat.min() >= 0 and 0 < heat.max() <= 1
    assert np.abs(maps[0] - maps[1]).max() > 0.01


def test_map_of_a_pooled_linear_classifier_is_the_class_activation_map():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4).eval().requires_grad_(False)
    x = torch.rand(2, 3, 160, 160)
    features = model.forward_features(x)  # 2, C, h, w
    cam = torch.einsum('bchw,c->bhw', features, model.get_classifier().weight[3]).relu()
    expected = cam / cam.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(class_activation_map(model, x, torch.tensor([3, 3])), expected, atol=1e-4, rtol=1e-4)


def test_class_token_map_is_the_gradient_at_the_block_before():
    """The same from a forward hook, which the pipeline itself does without."""
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=4).eval()
    nn.init.normal_(model.head.weight)
    x, kept = torch.rand(1, 3, 160, 160), []
    handle = model.blocks[-1].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    score = model(x)[0, 2]
    handle.remove()
    slope, = torch.autograd.grad(score, kept[0])
    weight = slope[:, 1:].mean(dim=1, keepdim=True)  # 1, 1, C
    expected = (kept[0] * weight).sum(-1)[:, 1:].relu().unflatten(1, (10, 10)).detach()
    torch.testing.assert_close(
        class_activation_map(model, x, torch.tensor([2])), expected / expected.max(), atol=1e-4, rtol=1e-3)


def test_model_without_feature_maps_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    model.pretrained_cfg = {'input_size': (3, 8, 8), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'label_names': NAMES}
    result = ClassificationPipeline(model, 'cpu')(noise(), heatmap=True)
    assert result.heatmap is None and 'no heat map' in result.warnings[0] and len(result.predictions) == 4


# -- what is refused --------------------------------------------------------------------------------------------------

def test_bad_models():
    with pytest.raises(InputError, match='pretrained_cfg'):
        ClassificationPipeline(nn.Linear(3, 2))
    with pytest.raises(InputError, match='no classes'):
        ClassificationPipeline(timm.create_model('test_vit', num_classes=0))
    with pytest.raises(InputError, match='5 channels'):
        ClassificationPipeline(timm.create_model('test_vit', in_chans=5))
    model = Brightness()
    model.head.weight.data.fill_(float('nan'))
    with pytest.raises(InputError, match='not finite'):
        ClassificationPipeline(model, 'cpu')(noise())


def test_bad_calls(vit, tmp_path):
    with pytest.raises(InputError, match='top_k is 0'):
        vit(noise(), top_k=0)
    with pytest.raises(InputError, match='0 to 3'):
        vit(noise(), heatmap=True, heatmap_index=4)
    with pytest.raises(InputError, match='batch_size'):
        vit(noise(), batch_size=0)
    with pytest.raises(InputError, match='image 2 of 3: .*none.png'):
        vit([noise(), tmp_path / 'none.png', noise()])
    with pytest.raises(InputError, match='too long and thin'):
        vit(np.zeros((1, 500), np.uint8))
    assert vit(np.zeros((5, 500), np.uint8)).image.size == (500, 5)


# -- drawing and saving -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('width, height', [(80, 60), (3, 200), (200, 3), (1, 1)])
def test_plot_shows_picture_and_bars(vit, width, height):
    result = vit(Image.new('RGB', (width, height), (0, 200, 0)), heatmap=True)
    plot = result.plot()
    plain = vit(Image.new('RGB', (width, height), (0, 200, 0))).plot()
    assert plot.mode == 'RGB' and plot.width > plain.width
    colours = {colour for _, colour in plain.getcolors(1 << 20)}
    assert (0, 200, 0) in colours and (46, 98, 217) in colours  # the picture, and the first bar


def test_bars_are_as_long_as_the_probabilities():
    result = ClassificationPipeline(Brightness(), 'cpu')(Image.new('RGB', (64, 64), 'white'))
    pixels = np.asarray(result.plot()).astype(int)
    accent = np.abs(pixels - (46, 98, 217)).sum(-1) == 0
    assert accent.any(axis=0).sum() == pytest.approx(480 * result.predictions[0].probability, abs=3)


def test_to_dict_is_json_and_saved(vit, tmp_path):
    path = tmp_path / 'a.png'
    noise().save(path)
    result = vit(path, heatmap=True)
    saved = json.loads(result.save(tmp_path / 'out' / 'a.json').read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert saved['source'] == str(path) and (saved['width'], saved['height']) == (80, 60)
    assert [p['label'] for p in saved['predictions']] == [p.label for p in result.predictions]
    x, y = saved['heatmap']['peak']
    assert result.heatmap[y, x] == result.heatmap.max()
    with Image.open(result.save(tmp_path / 'out' / 'a.png')) as image:
        assert image.size == result.plot().size


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def weights(vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    timm.models.save_for_hf(
        vit.model, folder, model_config={'num_classes': 4, 'label_names': list(NAMES)}, safe_serialization=True)
    return f'local-dir:{folder}'


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main(['predict', *map(str, arguments), '--device', 'cpu'])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_predict_prints_labels(weights, capsys, tmp_path):
    noise().save(tmp_path / 'a.png')
    code, out, err = command(capsys, weights, tmp_path / 'a.png', '--top-k', 2)
    assert code == 0 and err == ''
    lines = out.splitlines()
    assert lines[0] == str(tmp_path / 'a.png') and len(lines) == 3
    assert '%' in lines[1] and lines[1].split()[-1] in NAMES


def test_predict_goes_on_after_bad_files(weights, capsys, tmp_path):
    folder, output = tmp_path / 'in', tmp_path / 'out'
    (folder / 'sub').mkdir(parents=True)
    noise().save(folder / 'a.png')
    noise(seed=1).save(folder / 'sub' / 'a.jpg')
    (folder / 'b.png').write_text('no picture')
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    code, out, err = command(capsys, weights, folder, tmp_path / 'none.jpg', '--json', '--heatmap', '--output', output)
    results = json.loads(out)
    assert code == 1 and [r['source'] for r in results] == [str(folder / 'a.png'), str(folder / 'sub' / 'a.jpg')]
    assert all(r['heatmap'] for r in results)
    assert len(err.splitlines()) == 2 and 'b.png' in err and 'none.jpg' in err and 'Traceback' not in err
    assert sorted(path.name for path in output.iterdir()) == [
        'a-2.prediction.json', 'a-2.prediction.png', 'a.prediction.json', 'a.prediction.png']
    assert json.loads((output / 'a.prediction.json').read_text()) == results[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before


def test_predict_fails_when_nothing_can_be_used(weights, capsys, tmp_path):
    (tmp_path / 'b.png').touch()
    (tmp_path / 'empty').mkdir()
    code, out, err = command(capsys, weights, tmp_path / 'b.png', tmp_path / 'empty', '--json')
    assert code == 2 and json.loads(out) == []
    assert len(err.splitlines()) == 2 and '0 bytes' in err and 'no pictures' in err


def test_predict_says_in_one_sentence_what_cannot_be(weights, capsys, tmp_path):
    noise().save(tmp_path / 'a.png')
    for arguments, word in [
        (['favit_b00', tmp_path / 'a.png'], 'favit_b0'),
        ([f'local-dir:{tmp_path}', tmp_path / 'a.png'], 'config.json'),
        ([weights, tmp_path / 'a.png', '--output', tmp_path / 'a.png'], 'folder'),
    ]:
        code, out, err = command(capsys, *arguments)
        assert code == 2 and out == '' and word in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']
