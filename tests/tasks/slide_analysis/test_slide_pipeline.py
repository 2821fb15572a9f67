"""A slide in, classes and heat out; and the figures of a network on slides."""
import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vishub
from vishub import InputError, MissingExtraError
from vishub.models import conslide
from vishub.tasks.slide_analysis.data import EncodedTask, Item, SlideRow
from vishub.tasks.slide_analysis.features import SlideFeatures
from vishub.tasks.slide_analysis.heatmap import scaled_heat
from vishub.tasks.slide_analysis.metrics import (
    evaluate,
    localisation,
    save_evaluation,
    sequence_figures,
    truth_of_regions,
    update_card,
)
from vishub.tasks.slide_analysis.pipeline import NOTICE, SlideAnalysisPipeline
from vishub.tasks.slide_analysis.procedural import ORGANS, write_pyramid
from vishub.tasks.slide_analysis.setting import SlideSetting


@pytest.fixture(scope='module')
def pipe(network_folder):
    return vishub.pipeline('slide_analysis', f'local-dir:{network_folder}', device='cpu')


@pytest.fixture(scope='module')
def result(pipe, slide_path):
    return pipe(slide_path)


def test_probabilities_in_both_protocols(result, pipe):
    assert list(result.probabilities) == [label for kind in ORGANS.values() for label in kind.classes]
    assert sum(result.probabilities.values()) == pytest.approx(1)
    for task, values in result.by_task.items():
        own = [result.probabilities[label] for label in values]
        assert list(values.values()) == pytest.approx([value / sum(own) for value in own], rel=1e-4), task
    assert result.predicted == max(result.probabilities, key=result.probabilities.get)
    assert 'texture_bank' in repr(result.encoder) and pipe.setting.tiling.patch_size == 16


def test_task_given(pipe, slide_path, result):
    given = pipe(slide_path, task='organ_c')
    assert given.predicted == max(result.by_task['organ_c'], key=result.by_task['organ_c'].get)
    assert 'organ_c given' in given.summary()[0]
    with pytest.raises(InputError, match="task is 'lung': this model knows organ_a"):
        pipe(slide_path, task='lung')


def test_heat_is_that_of_the_network(result, pipe, slide_path):
    assert result.region_heat.sum() == pytest.approx(1, abs=1e-5)
    assert result.patch_heat.sum((1, 2)) == pytest.approx(result.region_heat, abs=1e-5)
    gradient = pipe(slide_path, heat='grad', top_k=0)
    assert gradient.patch_heat.sum() == pytest.approx(1, abs=1e-4) and gradient.top_patches == []
    assert not np.allclose(gradient.patch_heat, result.patch_heat)
    best = result.top_patches[0]
    inside = np.where(result.patch_tissue > 0, result.patch_heat, 0)
    assert best.score == pytest.approx(inside.max()) and best.picture.shape == (16, 16, 3)
    assert [patch.score for patch in result.top_patches] == sorted((p.score for p in result.top_patches), reverse=True)


def test_overlay_changes_tissue_alone(result):
    painted = np.asarray(result.overlay(opacity=0.8)).astype(int)
    difference = np.abs(painted - result.overview).sum(2)
    grid = np.zeros(difference.shape, bool)
    side = result.region_size / result.downsample / 8
    for (x, y), tissue in zip(result.coords / result.downsample, result.patch_tissue):
        for row, column in np.argwhere(tissue > 0):
            grid[round(y + side * row):round(y + side * (row + 1)),
                 round(x + side * column):round(x + side * (column + 1))] = True
    assert (difference[~grid] == 0).all() and (difference[grid] > 0).mean() > 0.95
    assert np.array_equal(np.asarray(result.overlay(opacity=0)), result.overview)
    with pytest.raises(InputError, match='it is patch or region'):
        result.overlay(level='cell')
    with pytest.raises(InputError, match='it is 0 to 1'):
        result.overlay(opacity=2)


def test_scale_of_the_heat():
    heat = np.arange(400.).reshape(4, 10, 10)
    tissue = np.ones((4, 10, 10), bool)
    tissue[0] = False
    scaled = scaled_heat(heat, tissue)
    assert (scaled[0] == 0).all() and scaled[1:].min() == 0 and scaled.max() == 1
    assert scaled[2, 5, 0] == pytest.approx((250 - 102.99) / (396.01 - 102.99), abs=1e-4)


def test_geojson_is_qupaths(result):
    content = result.geojson()
    assert content['type'] == 'FeatureCollection'
    regions = [f for f in content['features'] if f['properties']['objectType'] == 'annotation']
    patches = [f for f in content['features'] if f['properties']['objectType'] == 'tile']
    assert len(regions) == len(result.coords) and len(patches) == min(1000, int((result.patch_tissue > 0).sum()))
    for feature in content['features']:
        assert feature['type'] == 'Feature' and feature['geometry']['type'] == 'Polygon'
        ring = feature['geometry']['coordinates'][0]
        assert len(ring) == 5 and ring[0] == ring[-1]
        assert feature['properties']['classification']['name'] == result.predicted
        assert all(0 <= value <= 255 for value in feature['properties']['classification']['color'])
    first = np.array(regions[0]['geometry']['coordinates'][0])
    assert first.min(0).tolist() == result.coords[0].tolist() and (np.ptp(first, axis=0) == 128).all()
    assert sum(f['properties']['measurements']['attention'] for f in regions) == pytest.approx(1, abs=1e-4)


def test_files(result, tmp_path):
    for suffix in (*result.suffixes, '.npz'):
        assert result.save(tmp_path / f'slide{suffix}').is_file()
    content = json.loads((tmp_path / 'slide.json').read_text())
    assert content['notice'] == NOTICE and content['num_regions'] == len(content['regions'])
    assert Image.open(tmp_path / 'slide.overlay.png').size == result.overview.shape[1::-1]
    assert json.loads((tmp_path / 'slide.geojson').read_text()) == json.loads(json.dumps(result.geojson()))
    assert np.array_equal(np.load(tmp_path / 'slide.npz')['patch_heat'], result.patch_heat)
    assert Image.open(tmp_path / 'slide.png').width > 1000
    assert NOTICE in result.summary()


def test_cache_progress_and_limit(pipe, slide_path, tmp_path, result):
    calls = []
    first = pipe(slide_path, cache=tmp_path, progress=lambda *a: calls.append(a))
    assert calls[0] == (0, len(result.coords)) and calls[-1] == (len(result.coords),) * 2
    again = pipe(slide_path, cache=tmp_path)
    assert again.seconds['encode'] == 0 < first.seconds['encode']
    assert again.probabilities == first.probabilities == result.probabilities
    assert len(pipe(slide_path, max_regions=2, top_k=0).coords) == 2


def test_lists_and_bad_slides(pipe, slide_path, tmp_path):
    assert pipe([]) == []
    (tmp_path / 'text.svs').write_text('none')
    with pytest.raises(InputError, match='slide 2 of 2: .*not a whole-slide image'):
        pipe([slide_path, tmp_path / 'text.svs'], max_regions=1, top_k=0)
    glass = write_pyramid(tmp_path / 'glass.tif', np.full((512, 512, 3), 243, np.uint8))
    with pytest.raises(InputError, match='has no tissue'):
        pipe(glass)
    with pytest.raises(InputError, match='given as a path'):
        pipe(np.zeros((8, 8, 3), np.uint8))
    for options, sentence in (
            ({'heat': 'magic'}, 'attention or grad'), ({'top_k': -1}, 'top_k is -1'),
            ({'max_regions': 0}, 'max_regions is 0'), ({'mpp': 0}, 'mpp is 0')):
        with pytest.raises(InputError, match=sentence):
            pipe(slide_path, **options)


def test_models_that_do_not_fit(slide_path):
    with pytest.raises(InputError, match='takes no features of slides'):
        SlideAnalysisPipeline(timm.create_model('resnet10t', num_classes=2), 'cpu')
    with pytest.raises(InputError, match='has no classifier'):
        SlideAnalysisPipeline(timm.create_model('conslide_hit_tiny', num_classes=0), 'cpu')
    bare = SlideAnalysisPipeline(timm.create_model('conslide_hit_tiny', num_classes=3), 'cpu')
    assert bare.setting.classes == ['class 0', 'class 1', 'class 2']
    with pytest.raises(InputError, match='does not say which encoder'):
        bare(slide_path)
    wide = SlideAnalysisPipeline(timm.create_model('conslide_hit_tiny', in_features=64), 'cpu')
    with pytest.raises(InputError, match='has 128 outputs.*built for 64-dimensional'):
        wide(slide_path, encoder='texture_bank')


def test_missing_opencv_is_named(pipe, slide_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    with pytest.raises(MissingExtraError, match=r'vishub\[slides\]'):
        pipe(slide_path)


def test_setting_is_what_the_registered_weights_say():
    cfg = conslide.default_cfgs['conslide_hit_tiny'].cfgs['procedural_he']
    setting = SlideSetting.of({'notes': cfg.notes}, 8)
    assert tuple(setting.classes) == cfg.label_names and list(setting.tasks) == list(ORGANS)
    assert {task: set(kind.classes) for task, kind in ORGANS.items()} == {
        task: set(labels) for task, labels in setting.tasks.items()}
    assert SlideSetting.of({'notes': (setting.note(),)}, 8) == setting
    assert setting.numbers('organ_b') == [2, 3]


# -- figures ----------------------------------------------------------------------------------------------------------

def test_truth_of_regions():
    features = SlideFeatures(
        torch.zeros(2, 4, 4, 1), torch.zeros(2, 1), np.array([[0, 0], [40, 0]]), 40., {})
    regions, patches = truth_of_regions(features, [(5, 0, 20, 10), (42, 30, 45, 33)])
    assert regions.tolist() == [True, False]  # the second lesion is too small a part
    assert patches[0].astype(int).tolist() == [[1, 1, 0, 0]] + [[0] * 4] * 3 and not patches[1].any()


def test_localisation_rewards_heat_on_lesions(features_tasks, tmp_path, pipe):
    """A lesion in one region of four: heat there is 1, heat elsewhere 0."""
    from safetensors.torch import save_file
    file = tmp_path / 'slide.safetensors'
    coords = torch.tensor([[0, 0], [128, 0], [0, 128], [128, 128]])
    save_file({'patch': torch.zeros(4, 8, 8, 128), 'region': torch.zeros(4, 128), 'coords': coords}, file,
              metadata={'size': '128.0'})
    square = [[140, 10], [200, 10], [200, 70], [140, 70], [140, 10]]
    (tmp_path / 'slide.geojson').write_text(json.dumps({'features': [{'geometry': {'coordinates': [square]}}]}))
    item = Item(str(file), 0, SlideRow(str(tmp_path / 'slide.svs'), 'rings', 'slide'))

    class Looks:
        def __init__(self, number):
            self.number = number

        def classify(self, features, heat='attention'):
            share = np.zeros(4)
            share[self.number] = 1
            return None, share, np.broadcast_to(share[:, None, None], (4, 8, 8))

    assert localisation(Looks(1), [item])['region_auc'] == 1
    assert localisation(Looks(1), [item])['patch_auc'] > 0.85
    assert localisation(Looks(0), [item])['region_auc'] < 0.5
    bare = Item(str(file), 0, SlideRow(str(tmp_path / 'other.svs'), 'rings', 'other'))
    assert localisation(Looks(1), [bare]) == {'region_auc': None, 'patch_auc': None, 'grad_auc': None}


def test_sequence_figures():
    rows = [[.9, .5], [.7, .8, .45], [.6, .85, .95, .4], [.65, .7, .9, .88]]
    sequence = {'scores': [{'acc': row, 'masked': row} for row in rows], 'untrained': {'acc': [.4, .5, .6, .3]}}
    found = sequence_figures(sequence)
    assert (found['bwt'], found['forgetting'], found['fwt'], found['masked_bwt']) == (-13.33, 15.0, -1.67, -13.33)
    assert found['acc'][0] == [90.0, 50.0] and 'masked_fwt' not in found


def test_evaluation_and_card(network_folder, tmp_path):
    from safetensors.torch import save_file
    generator = torch.Generator().manual_seed(0)
    tasks, label = [], 0
    for organ, kind in ORGANS.items():
        items = []
        for name in kind.classes:
            for number in range(2):
                file = tmp_path / f'{name}-{number}.safetensors'
                save_file({'patch': torch.randn(2, 8, 8, 128, generator=generator),
                           'region': torch.randn(2, 128, generator=generator),
                           'coords': torch.zeros(2, 2).long()}, file)
                items.append(Item(str(file), label, SlideRow(str(file), name, file.stem)))
            label += 1
        tasks.append(EncodedTask(organ, tuple(kind.classes), (), (), tuple(items)))
    report = evaluate([str(network_folder)], tasks, device='cpu')
    assert report['num_test'] == 16 and len(report['report']['tasks']) == 4 and report['peers'] == []
    metrics = report['metrics']
    low, high = metrics['acc_ci95']
    assert 0 <= low <= metrics['acc'] <= high <= 100 and 'region_auc' not in metrics
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert {path.name for path in save_evaluation(report, tmp_path / 'out')} == {'evaluation.json', 'tasks.png'}
    assert Image.open(tmp_path / 'out' / 'tasks.png').width > 800
    update_card(network_folder, report)
    assert f'{metrics["acc"]:.2f}' in (network_folder / 'README.md').read_text()
    with pytest.raises(InputError, match='knows no such task|knows'):
        evaluate([str(network_folder)], [EncodedTask('lung', ('a', 'b'), (), (), tasks[0].test)], device='cpu')
