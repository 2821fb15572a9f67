"""Data sets, patches, and a run from the command line to an evaluated folder."""
import json

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vishub
import vishub.tasks.volume_segmentation.data as data_module
from tests.tasks.volume_segmentation.scans import oblique_affine
from vishub import InputError
from vishub.cli import app
from vishub.tasks.volume_segmentation.data import ProceduralCases, TrainingPatches, load_data
from vishub.tasks.volume_segmentation.metrics import evaluate, update_card
from vishub.tasks.volume_segmentation.preprocessing import Preprocessing
from vishub.tasks.volume_segmentation.procedural import procedural_volume
from vishub.tasks.volume_segmentation.training import VolumeSegmentationRecipe


@pytest.fixture
def nnunet(tmp_path):
    """Six training and two test cases of two channels, turned and anisotropic, in nnU-Net's raw layout."""
    root = tmp_path / 'Dataset007_Made'
    facts = {'channel_names': {'0': 'CT', '1': 'other'}, 'labels': {'background': 0, 'organ': 1, 'tubes': 2},
             'numTraining': 6, 'file_ending': '.nii.gz'}
    for folder, count in (('Tr', 6), ('Ts', 2)):
        (root / f'images{folder}').mkdir(parents=True)
        (root / f'labels{folder}').mkdir()
        for number in range(count):
            image, label = procedural_volume(20, (len(folder), number, ord(folder[1])))
            for channel in range(2):
                nibabel.save(nibabel.Nifti1Image(image * (1 - 2 * channel), oblique_affine()),
                             root / f'images{folder}' / f'c{number}_{channel:04}.nii.gz')
            nibabel.save(nibabel.Nifti1Image(label, oblique_affine()), root / f'labels{folder}' / f'c{number}.nii.gz')
    (root / 'dataset.json').write_text(json.dumps(facts))
    return root


def test_nnunet_layout(nnunet):
    data = load_data(nnunet)
    assert (data.name, data.tag, data.labels, data.channels) == (
        'Made', 'made', ('background', 'organ', 'tubes'), ('CT', 'other'))
    assert [len(cases) for cases in (data.train, data.val, data.test)] == [5, 1, 2]
    assert data.preprocessing.intensity == 'ct' and data.preprocessing.spacing == pytest.approx((2.5, 0.7, 0.9))
    assert 0.3 < data.preprocessing.mean < 1
    case = data.train[0]
    assert case.image.shape == (2, 20, 20, 20) and case.label.max() == 2
    assert data.train[0] is case  # kept
    coarse = load_data(nnunet, spacing=(5, 1.4, 1.8), intensity='zscore').train[0]
    assert coarse.image.shape == (2, 10, 10, 10) == (2, *coarse.label.shape)
    assert coarse.spacing == pytest.approx((5, 1.4, 1.8))


def test_damaged_data_sets(nnunet, tmp_path):
    def change(**facts):
        description = json.loads((nnunet / 'dataset.json').read_text())
        (nnunet / 'dataset.json').write_text(json.dumps({**description, **facts}))

    label = nnunet / 'labelsTr' / 'c0.nii.gz'
    nibabel.save(nibabel.Nifti1Image(np.full((20, 20, 20), 9, np.uint8), oblique_affine()), label)
    cases = load_data(nnunet, intensity='zscore').train
    cases.mapping = {0: 0, 1: 1, 2: 2}
    with pytest.raises(InputError, match=r'hold \[9\]'):
        cases[0]
    nibabel.save(nibabel.Nifti1Image(np.ones((20, 20, 20), np.uint8), np.eye(4)), label)
    with pytest.raises(InputError, match='on another grid'):
        cases[0]
    (nnunet / 'imagesTr' / 'c1_0001.nii.gz').unlink()
    with pytest.raises(InputError, match='c1_0001.nii.gz.* is missing'):
        load_data(nnunet)
    change(labels={'background': 0, 'whole': [1, 2]})
    with pytest.raises(InputError, match='regions that overlap'):
        load_data(nnunet)
    change(labels={'background': 0, 'organ': 3})
    with pytest.raises(InputError, match='in turn'):
        load_data(nnunet)
    (nnunet / 'dataset.json').write_text('{}')
    with pytest.raises(InputError, match='no description'):
        load_data(nnunet)
    for path, match in ((tmp_path, 'is no data set'), (tmp_path / 'none', 'does not exist')):
        with pytest.raises(InputError, match=match):
            load_data(path)


def test_brats_layout(tmp_path):
    for split in ('train', 'validation', 'test'):
        folder = tmp_path / split / 'pat'
        folder.mkdir(parents=True)
        image, label = procedural_volume(16, (1, 2))
        for channel in ('Flair', 'T1c'):
            nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / f'{channel}_subtrMeanDivStd.nii.gz')
        nibabel.save(nibabel.Nifti1Image(np.array([0, 2, 4], np.uint8)[label], np.eye(4)),
                     folder / 'OTMultiClass.nii.gz')
    data = load_data(tmp_path, spacing=(1, 1, 1))
    assert (len(data.train), data.val, len(data.test)) == (2, None, 1)
    np.testing.assert_array_equal(np.unique(data.test[0].label), [0, 1, 2])
    assert data.licence == 'cc-by-nc-sa-3.0' and 'not for commercial use' in data.terms[0]


def test_patches_are_functions_of_their_key():
    cases = ProceduralCases(3, 24, 5, Preprocessing())
    patches = TrainingPatches(cases, (16, 16, 16), 10, (8, 8, 8), seed=1)
    image, label = patches[2, 3, 16]
    assert image.shape == (1, 16, 16, 16) and image.dtype == torch.float32
    assert label.shape == (16, 16, 16) and label.dtype == torch.uint8
    again = TrainingPatches(ProceduralCases(3, 24, 5, Preprocessing()), (16, 16, 16), 10, (8, 8, 8), seed=1)
    again[0, 0, 16]  # what was asked for before does not matter
    for one, other in zip(again[2, 3, 16], (image, label)):
        assert torch.equal(one, other)
    assert not torch.equal(patches[3, 3, 16][0], image)
    assert patches[0, 0, 8][0].shape == (1, 8, 8, 8) and patches[0, 0, 32][0].shape == (1, 32, 32, 32)
    aniso = TrainingPatches(cases, (8, 32, 32), 10, (4, 8, 8))
    assert aniso.size(32) == (8, 32, 32) and aniso.size(16) == (4, 16, 16)
    shares = [float((TrainingPatches(cases, (8,) * 3, 99, (8,) * 3, augmented=False)[0, i, 8][1] > 0).float().mean())
              for i in range(60)]
    everywhere = np.mean([(cases[i].label > 0).mean() for i in range(3)])
    assert np.mean(shares) > 1.3 * everywhere  # a third is centred on foreground


def test_command_line_trains_resumes_evaluates_and_predicts(tmp_path, monkeypatch):
    for name, count in (('_TRAIN', 3), ('_VAL', 1), ('_TEST', 2)):
        monkeypatch.setattr(data_module, name, count)
    run = CliRunner()

    def call(*words):
        result = run.invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    words = ['train', 'volume_segmentation', '--model', 'mambaclinix_tiny', '--data', 'procedural', '--size', 24,
             '--output', tmp_path / 'run', '--resolution', '16:2', '--samples', 4, '--regions', '2,2,2',
             '--device', 'cpu', '--no-progress', '--model-arg', 'features=(4, 8, 16)', '--validate-every', 1]
    call(*words)
    folder = tmp_path / 'run' / 'mambaclinix_tiny.procedural'
    told = json.loads((folder / 'metrics.json').read_text())
    assert told['num_test'] == 2 and told['training']['recipe']['regions'] == [2, 2, 2]
    assert {'dice', 'dice_organ', 'dice_tubes'} <= set(told['metrics'])
    assert [peer['name'] for peer in told['peers']] == ['best thresholds']
    card = (folder / 'README.md').read_text()
    assert 'no medical device' in card and 'segmentation.png' in card and 'organ, tubes' in card
    assert 'weights and figures' in call(*words)  # nothing left to do

    pipe = vishub.pipeline(model=f'local-dir:{folder}')
    assert pipe.task == 'volume_segmentation' and pipe.patch_size == (16, 16, 16)
    assert pipe.label_names == ('background', 'organ', 'tubes') and pipe.preprocessing == Preprocessing()
    data = load_data('procedural', size=24)
    assert evaluate([f'local-dir:{folder}'], data)['metrics'] == told['metrics']
    with pytest.raises(InputError, match='belong elsewhere'):
        update_card(folder, {**evaluate([f'local-dir:{folder}'], data, limit=1), 'data': 'another'})

    report = json.loads(call('evaluate', folder, '--data', 'procedural', '--limit', 1, '--json', '--device', 'cpu',
                             '--output', tmp_path / 'eval'))
    assert report['num_test'] == 1 and (tmp_path / 'eval' / 'evaluation.json').stat().st_size
    image, _ = procedural_volume(24, (2, 0))
    nibabel.save(nibabel.Nifti1Image(image, oblique_affine()), tmp_path / 'scan.nii.gz')
    results = json.loads(call(
        'predict', f'local-dir:{folder}', tmp_path / 'scan.nii.gz', '--option', 'mirror=True', '--json',
        '--output', tmp_path / 'out'))
    assert results[0]['shape'] == [24, 24, 24]
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        f'scan.prediction{suffix}' for suffix in ('.glb', '.json', '.nii.gz', '.png')]


def test_recipe_says_what_it_cannot_use():
    with pytest.raises(InputError, match='three positive numbers'):
        VolumeSegmentationRecipe('mambaclinix_tiny', 'procedural', regions=(4, 4))
    with pytest.raises(InputError, match='segments no volumes'):
        VolumeSegmentationRecipe('favit_small64', 'procedural')
    with pytest.raises(InputError, match='refuses its arguments'):
        VolumeSegmentationRecipe('mambaclinix_tiny', 'procedural', model_args={'features': (4, 8)})
    recipe = VolumeSegmentationRecipe('mambaclinix_tiny', 'procedural', size=32, model_args={'features': (4, 8, 16)})
    assert recipe.build_model().deep_supervision and recipe.preview(16).size == (8 * 16, 32)
