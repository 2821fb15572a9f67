"""How generated pictures are judged."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.models.test_dit import randomised
from vishub import InputError
from vishub.hub import save_folder
from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.generation import metrics
from vishub.tasks.generation.metrics import (
    Judge,
    Statistics,
    compare_to_real,
    default_judge,
    evaluate,
    feature_statistics,
    frechet_distance,
    save_evaluation,
    statistics,
    update_card,
)

NAMES = ('dark', 'light')


def squares(count, seed, scatter=20):
    """Grey pictures 28x28 of two classes: dark and light."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    level = np.where(labels, 190, 50)[:, None, None, None]
    return ImageSet((level + rng.integers(-scatter, scatter, (count, 28, 28, 1))).astype(np.uint8), labels)


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    """A small ViT whose head was fitted to tell dark from light."""
    folder = tmp_path_factory.mktemp('judge') / 'vit_mini_patch2_28.squares'
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model('vit_mini_patch2_28', depth=2, in_chans=1, num_classes=2).eval()
    train = squares(40, seed=1)
    x = (torch.from_numpy(train.images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        y = torch.from_numpy(train.labels).float() * 2 - 1
        centred = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        solution = torch.linalg.lstsq(centred, y[:, None]).solution[:, 0]
        model.head.weight.copy_(torch.stack([-solution[:-1], solution[:-1]]))
        model.head.bias.copy_(torch.stack([-solution[-1], solution[-1]]))
    config = dict(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,), label_names=NAMES, num_classes=2)
    save_folder(model, folder, metrics={}, card={}, dtype=torch.float32, pretrained_cfg=config)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
    """Weights of a tiny LiT that was not trained."""
    folder = tmp_path_factory.mktemp('generator') / 'lit_small28.squares'
    model = randomised(timm.create_model('lit_small28', depth=1, num_classes=2))
    config = dict(label_names=NAMES, num_classes=2)
    save_folder(model, folder, metrics={'data': 'squares'}, card={}, pretrained_cfg=config)
    return folder


def data():
    return ImageData('squares', 'squares', NAMES, squares(30, 2), squares(10, 3), squares(40, 4))


# ---- Fréchet distance -------------------------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    one = Statistics(np.zeros(2), np.diag([1., 4.]))
    other = Statistics(np.array([3., 4.]), np.diag([9., 1.]))
    # diagonal: |m|^2 + sum (s1 - s2)^2
    assert frechet_distance(one, other) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])  # turning both changes nothing
    turned = [Statistics(turn @ s.mean, turn @ s.covariance @ turn.T) for s in (one, other)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(one, other))


def test_frechet_distance_of_few_pictures():
    rng = np.random.default_rng(0)
    few, many = (statistics(rng.standard_normal((count, 8))) for count in (5, 20_000))  # five: a singular covariance
    assert np.isfinite(frechet_distance(few, many)) and frechet_distance(few, many) > 0.5
    assert frechet_distance(statistics(rng.standard_normal((20_000, 8))), many) < 0.02
    with pytest.raises(InputError, match='at least 2'):
        statistics(np.zeros((1, 8)))


# ---- judge ------------------------------------------------------------------------------------------------------


def test_the_judge_knows_the_classes_in_any_order(judge):
    test = squares(20, seed=9)
    pictures = [test[index] for index in range(20)]
    judged, features = Judge(judge, NAMES, 'cpu')(pictures)
    np.testing.assert_array_equal(judged, test.labels)
    assert features.shape[0] == 20 and features.shape[1] > 2
    np.testing.assert_array_equal(Judge(judge, NAMES[::-1], 'cpu')(pictures)[0], 1 - test.labels)
    with pytest.raises(InputError, match="does not know the class 'green'"):
        Judge(judge, ('dark', 'green'), 'cpu')


def test_good_pictures_score_better_than_bad_ones(judge):
    looks = Judge(judge, NAMES, 'cpu')
    real = feature_statistics(looks, squares(60, seed=5))
    good, noise = squares(60, seed=6), np.random.default_rng(0).integers(0, 255, (60, 28, 28, 1)).astype(np.uint8)
    figures = compare_to_real(looks, list(good.images), good.labels, real)
    assert figures['agreement'] == 100.
    assert figures['frechet'] < 0.2 * compare_to_real(looks, list(noise), good.labels, real)['frechet']
    # half of them called by the other name
    swapped = np.where(np.arange(60) < 30, 1 - good.labels, good.labels)
    assert compare_to_real(looks, list(good.images), swapped, real)['agreement'] == 50.


def test_the_best_classifier_of_the_data_judges():
    assert default_judge('fashion_mnist').endswith('.fashion_mnist')
    with pytest.raises(InputError, match="no classifier of 'squares'"):
        default_judge('squares')


# ---- report and card --------------------------------------------------------------------------------------------


def test_evaluate_and_card(judge, generator, tmp_path):
    told = []
    report = evaluate(
        [str(generator)], data(), limit=5, device='cpu', judge=judge, num_inference_steps=2, seed=3,
        progress=lambda done, total: told.append((done, total)))
    assert report['model'] == 'lit_small28.squares' and report['data'] == 'squares'
    assert report['num_test'] == 6 and told == [(3, 6), (6, 6)]  # as many of each class
    figures = report['metrics']
    low, high = figures['agreement_ci95']
    assert 0 <= low <= figures['agreement'] <= high <= 100 and figures['frechet'] > 0
    assert sum(report['report']['classes'].values()) / 2 == pytest.approx(figures['agreement'], abs=0.01)
    real = report['report']['real']
    assert real['agreement'] == 100 and real['frechet'] < figures['frechet']
    assert 'fid' not in figures

    written = save_evaluation(report, tmp_path)
    assert [path.name for path in written] == ['evaluation.json', 'agreement.png']
    assert json.loads(written[0].read_text()) == report

    update_card(generator, report)
    card = (generator / 'README.md').read_text()
    assert '![Samples of each class, not chosen](samples.png)' in card and "vishub.pipeline('generation'" in card
    assert 'Class agreement (%)' in card and 'no FID' in card
    with Image.open(generator / 'samples.png') as sheet:
        assert sheet.width > 500 and sheet.height > 50
    stored = json.loads((generator / 'metrics.json').read_text())
    assert stored['metrics'] == figures and stored['report']['judge'] == Path(judge.removeprefix('local-dir:')).name
    with pytest.raises(InputError, match='belong elsewhere'):
        update_card(generator, {**report, 'data': 'circles'})


def test_evaluate_refuses(judge, generator, monkeypatch):
    options = dict(device='cpu', judge=judge, num_inference_steps=2, limit=4)
    without_test = ImageData('squares', 'squares', NAMES, squares(10, 1))
    with pytest.raises(InputError, match='no test split'):
        evaluate([str(generator)], without_test, **options)
    with pytest.raises(InputError, match='two models are called'):
        evaluate([str(generator)] * 2, data(), **options)
    three = ImageData('three', 'three', ('a', 'b', 'c'), squares(10, 1), None, squares(10, 1))
    with pytest.raises(InputError, match='2 classes, three has 3'):
        evaluate([str(generator)], three, **options)
    monkeypatch.setenv(metrics.INCEPTION_VARIABLE, '/nowhere/inception.pth')
    with pytest.raises(InputError, match='no file'):
        evaluate([str(generator)], data(), **options)


def test_inception_distance(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    # The published weights are no part of any package: random ones, of the same network, go through the same file.
    with monkeypatch.context() as patch:
        patch.setattr(inception.FeatureExtractorInceptionV3, 'load_state_dict', lambda *args: None)
        patch.setattr(inception, 'load_state_dict_from_url', lambda *args, **kwargs: {})
        torch.manual_seed(0)
        network = inception.FeatureExtractorInceptionV3('inception', ['2048'])
    torch.save(network.state_dict(), tmp_path / 'inception.pth')
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    here = torch.device('cpu')

    def distance(other):
        return metrics.inception_distance(tmp_path / 'inception.pth', pictures, other, here)

    assert distance(pictures) == 0 < distance(pictures // 4)  # tiny: a random network hardly tells pictures apart

    torch.save({'Conv2d_1a_3x3.conv.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(InputError, match="not torch-fidelity's Inception"):
        metrics.inception_distance(tmp_path / 'other.pth', pictures, pictures, here)

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'it ran',)

    torch.save({'fc.bias': Trap()}, tmp_path / 'trap.pth')
    with pytest.raises(InputError, match='is refused'):
        metrics.inception_distance(tmp_path / 'trap.pth', pictures, pictures, here)
    assert not (tmp_path / 'it ran').exists()
