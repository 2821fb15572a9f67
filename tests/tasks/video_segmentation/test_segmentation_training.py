"""Data, recipe and figures: what a model learns from, and how it is measured."""
import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.tasks.video_segmentation.ultrasound_files import Dark, moving_square
from vishub import InputError
from vishub.cli import app
from vishub.tasks.video_segmentation import data as module
from vishub.tasks.video_segmentation.data import PhantomClips, SegmentationData, TrainingClips, load_data, read_mask
from vishub.tasks.video_segmentation.geometry import Sector, find_sector, to_sector
from vishub.tasks.video_segmentation.metrics import compare_folders, evaluate, frame_figures, s_measure, update_card
from vishub.tasks.video_segmentation.training import VideoSegmentationRecipe
from vishub.training import TrainConfig, train


def write_videos(root, videos, values=255, suffix='.png'):
    """`image/<video>/<frame>` and `mask/…` of moving squares."""
    for number, name in enumerate(videos):
        for kind in ('image', 'mask'):
            (root / kind / name).mkdir(parents=True)
        frames = moving_square(4 + number)
        for place, frame in enumerate(frames):
            Image.fromarray(frame).save(root / 'image' / name / f'{place:03d}{suffix}')
            mask = (frame[..., 0] < 100).astype(np.uint8) * values
            Image.fromarray(mask).save(root / 'mask' / name / f'{place:03d}{suffix}')
    return root


# Data

def test_phantom_samples():
    clips = PhantomClips(5, 3, seed=0)
    sample = clips.sample(2, 64, epoch=1)
    assert {key: tuple(value.shape) for key, value in sample.items()} == {
        'frames': (3, 3, 64, 64), 'masks': (3, 64, 64), 'body': (3, 64, 64), 'sector': (2,)}
    assert (sample['body'] >= sample['masks']).all() and sample['body'].sum() > 1.3 * sample['masks'].float().sum()
    again, other = clips.sample(2, 64, epoch=1), clips.sample(2, 64, epoch=2)
    assert torch.equal(again['frames'], sample['frames']) and not torch.equal(other['frames'], sample['frames'])
    video = list(clips.videos())[2]
    fixed = clips.sample(2, 64)
    assert video.scored == [2]  # the last frame of the recording is frame 0 of the clip
    assert np.array_equal(fixed['frames'][0].permute(1, 2, 0).numpy(), video.frames[2])
    assert np.array_equal(fixed['masks'][2].numpy() > 0, video.masks[0])
    sector = PhantomClips(1, 2, 0, 'sector').sample(0, 64)
    assert sector['sector'].tolist() == pytest.approx([140, 0.2]) and (sector['frames'][0, 0, :4, :4] == 0).all()
    assert len(list(clips.videos(limit=3))) == 3


def test_folders_with_and_without_splits(tmp_path):
    plain = load_data(write_videos(tmp_path / 'a', ['v1', 'v2', 'v3']), 3)
    assert len(plain.train) == 4 + 5 and plain.test['frames'].num_videos() == 1 and not plain.val
    assert next(plain.test['frames'].videos()).name == 'v3'
    root = tmp_path / 'b'
    write_videos(root / 'train', [f'v{n:02d}' for n in range(11)])
    write_videos(root / 'train_aug', ['w'])
    write_videos(root / 'test', ['x'])
    own = load_data(root, 3, geometry='linear')
    assert own.train.num_videos() == 10 and own.val['linear'].num_videos() == 2 and own.train.geometry == 'linear'
    assert 'its own folder' in own.split
    sample = plain.train.sample(5, 64)  # frame 1 of the second video: after it 0, then the mirrored 3
    frames = moving_square(5)
    for place, number in enumerate((1, 0, 3)):
        expected = np.asarray(Image.fromarray(frames[number]).resize((64, 64), Image.Resampling.BILINEAR))
        assert np.array_equal(sample['frames'][place].permute(1, 2, 0).numpy(), expected)
    # 25 x 25 at the original size: 16 + 24 pixels, scaled like the rest
    wide = (sample['body'][0] > 127).numpy()
    assert wide.any(0).sum() == pytest.approx((16 + 24 - 4) * 64 / 96, abs=2) and wide.any(1).sum() == 40
    video = next(plain.test['frames'].videos())
    assert np.array_equal(video.masks, video.frames[..., 0] < 100) and list(video.scored) == list(range(6))


def test_masks_of_other_values(tmp_path):
    assert len(load_data(write_videos(tmp_path / 'ones', ['a', 'b'], values=1), 3).train) == 4
    grey = load_data(write_videos(tmp_path / 'grey', ['a', 'b'], values=90), 3)
    with pytest.raises(InputError, match='values up to 90.*soft'):
        grey.train.sample(0, 64)
    soft = load_data(tmp_path / 'grey', 3, soft=True)
    assert soft.train.sample(0, 64)['masks'].max() == 255
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / 'empty.png')
    assert not read_mask(tmp_path / 'empty.png').any()
    with pytest.raises(InputError, match='4 x 4 pixels, its frame 5 x 4'):
        read_mask(tmp_path / 'empty.png', (5, 4))


@pytest.mark.parametrize('break_it, message', [
    (lambda root: (root / 'mask/a/000.png').unlink(), 'has 4 frames and its masks 3, not of the same names: 000'),
    (lambda root: [path.rename(path.with_name(f'm{path.name}')) for path in sorted((root / 'mask/a').iterdir())],
     'not of the same names: 000, 001, 002 …'),
    (lambda root: (root / 'mask').rename(root / 'truth'), 'has no masks beside it'),
    (lambda root: (root / 'image').rename(root / 'pictures'), 'holds no frames with masks'),
])
def test_folders_that_do_not_fit(tmp_path, break_it, message):
    break_it(write_videos(tmp_path / 'data', ['a']))
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / 'data', 3)


def test_no_data(tmp_path):
    with pytest.raises(InputError, match='is no folder'):
        load_data(tmp_path / 'nowhere', 3)
    with pytest.raises(InputError, match='give linear or sector'):
        load_data('phantoms', 3, geometry='convex')


# Recipe

def test_prepare_converts_and_flips_whole_clips():
    recipe = VideoSegmentationRecipe('astr_tiny', 'phantoms', asma=1., num_clips=16)
    clips = TrainingClips(recipe.train_clips)
    samples = [clips[0, index, 64] for index in range(16)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    torch.manual_seed(0)
    clip, (mask, body) = recipe.prepare(batch, 64, training=True)
    assert clip.shape == (16, 3, 3, 64, 64) and mask.shape == (16, 1, 64, 64) and body.shape == (16, 2, 1, 64, 64)
    black = (clip * torch.tensor(recipe.cfg['std']).view(-1, 1, 1) + torch.tensor(recipe.cfg['mean']).view(-1, 1, 1))
    black = (black < 1e-4).all(2)  # B, T, H, W
    assert (black.float().mean((1, 2, 3)) > 0.2).all()  # all are sectors now
    assert torch.equal(black[:, 0], black[:, 1]) and torch.equal(black[:, 0], black[:, 2])  # in one way a clip
    assert len({int(count) for count in black[:, 0].sum((1, 2))}) > 8  # and each clip in another
    assert not (mask[:, 0].bool() & black[:, 0]).any() and set(mask.unique().tolist()) == {0., 1.}
    upright = black[:, 0, :5, 32].all(1)  # the inner arc is farther from its edge than the outer one
    assert 3 <= upright.sum() <= 13 and torch.equal(~upright, black[:, 0, -5:, 32].all(1))
    plain, (true, _) = recipe.prepare(batch, 64, training=False)
    assert torch.equal(true, batch['masks'][:, :1] / 255) and plain.std() > 0.3


def test_sectors_of_folders_are_unrolled(tmp_path):
    for kind in ('image', 'mask'):
        (tmp_path / kind).mkdir()
    sector, size = Sector(torch.tensor(120.), torch.tensor(0.25)), (125, 217)
    linear = torch.full((1, 1, 64, 64), 60.)
    linear[..., 30:40, 20:30] = 200.
    picture = to_sector(linear, sector, size=size)[0, 0].round().byte().numpy()
    mask = to_sector((linear == 200).float(), sector, 'nearest', size=size)[0, 0].bool().numpy()
    for number in range(2):
        Image.fromarray(np.pad(picture, ((0, 0), (20, 20)))).save(tmp_path / 'image' / f'{number}.png')
        Image.fromarray(np.pad(mask, ((0, 0), (20, 20)))).save(tmp_path / 'mask' / f'{number}.png')
    found, box = find_sector(np.repeat(np.pad(picture, ((0, 0), (20, 20)))[..., None], 3, 2))
    assert abs(float(found.angle) - 120) < 2 and abs(box[0] - 20) <= 2
    data = load_data(tmp_path, 2, geometry='sector')
    data = dataclasses.replace(data, train=data.test['sector'] if data.train is None else data.train)
    recipe = VideoSegmentationRecipe('astr_tiny', data, model_args={'clip_size': 2}, asma=1., vertical_flip=False)
    torch.manual_seed(1)
    sample = TrainingClips(recipe.train_clips)[0, 1, 64]
    clip, (true, _) = recipe.prepare({key: value[None] for key, value in sample.items()}, 64, training=True)
    rows, columns = torch.nonzero(true[0, 0] > 0.5, as_tuple=True)
    assert abs(rows.min() - 30) <= 2 and abs(rows.max() - 39) <= 2 and abs(columns.max() - columns.min() - 9) <= 3
    assert columns.min() in (*range(17, 24), *range(31, 38))  # flipped left to right or not


def test_without_a_geometry_nothing_is_converted(tmp_path):
    data = load_data(write_videos(tmp_path, ['a', 'b']), 3)
    recipe = VideoSegmentationRecipe('astr_tiny', data)
    assert recipe.asma == 0 and '--geometry' in recipe.remarks()[0]


def test_refused_recipes():
    for arguments, message in (
            (dict(model='favit_b0'), 'is for classification'), (dict(model_args={'clip_size': 1}), 'refuses'),
            (dict(asma=1.5), 'probability')):
        with pytest.raises(InputError, match=message):
            VideoSegmentationRecipe(**{'model': 'astr_tiny', 'data': 'phantoms', **arguments})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of few steps on few phantoms, with its data."""
    few = {name: PhantomClips(3, 3, 2, name) for name in ('linear', 'sector')}
    data = SegmentationData('procedural phantoms', 'phantoms', PhantomClips(24, 3, 0), few, few, 'few')
    output = tmp_path_factory.mktemp('run')
    config = TrainConfig(
        output=output, resolution=((64, 2),), batch_size=8, lr=2e-3, ema_decay=0., progress=False, device='cpu')
    return train(VideoSegmentationRecipe('astr_tiny', data, vertical_flip=False), config), data


def test_training_learns_and_stores(trained):
    result, data = trained
    rows = list(csv.DictReader(open(result.checkpoint.parent / 'log.csv')))  # noqa: SIM115
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss'])
    assert set(result.metrics) == {'dice', 'dice_linear', 'dice_sector'}
    folder = result.folder
    assert folder.name == 'astr_tiny.phantoms' and (folder / 'frames.png').is_file()
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['num_test'] == 6 and {'dice', 'iou', 'mae', 's_measure', 'dice_sector'} <= set(metrics['metrics'])
    assert metrics['peers'][0]['name'] == 'astr_tiny.phantoms without context'
    assert 'not for diagnosis' in (folder / 'README.md').read_text()
    assert 'no patient' in (folder / 'README.md').read_text()


def test_evaluation_of_stored_weights(trained, tmp_path, monkeypatch):
    result, data = trained
    report = evaluate([str(result.folder)], data)
    stored = json.loads((result.folder / 'metrics.json').read_text())
    assert report['metrics'] == stored['metrics'] and report['num_test'] == 6
    update_card(result.folder, report)
    monkeypatch.setattr(module, '_TEST_CLIPS', 2)
    said = CliRunner().invoke(app, [
        'evaluate', str(result.folder), '--data', 'phantoms', '--device', 'cpu', '--output', str(tmp_path / 'out')])
    assert said.exit_code == 0, said.output
    assert 'dice_sector' in said.output and (tmp_path / 'out' / 'geometry.png').is_file()
    assert json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['num_test'] == 4


def test_evaluation_scores_the_frames_that_count(tmp_path):
    data = load_data(write_videos(tmp_path, ['a', 'b']), 3)
    report = evaluate([Dark()], data)
    assert report['num_test'] == 5 and report['metrics']['dice'] > 0.9 and report['metrics']['mae'] < 0.05
    # a model that looks at each frame alone is the same without context
    assert report['peers'][0]['metrics'] == report['metrics']
    with pytest.raises(InputError, match='two models'):
        evaluate([Dark(), Dark()], data)


# Figures

def test_figures_of_a_frame():
    found, true = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    found[:4, :5], true[2:6, :5] = True, True
    figures = frame_figures(found, true)
    assert figures['dice'] == pytest.approx(2 * 10 / 40) and figures['iou'] == pytest.approx(10 / 30)
    assert figures['sensitivity'] == 0.5 and figures['specificity'] == pytest.approx(70 / 80)
    assert figures['accuracy'] == pytest.approx(0.8) and figures['mae'] == pytest.approx(0.2)
    nothing = np.zeros((10, 10), bool)
    empty = frame_figures(nothing, nothing)
    assert {empty[name] for name in ('dice', 'iou', 'sensitivity', 'specificity', 'accuracy', 's_measure')} == {1.}
    assert frame_figures(found, nothing)['dice'] == 0 and frame_figures(~nothing, ~nothing)['specificity'] == 1
    with pytest.raises(InputError, match='one shape'):
        frame_figures(found, true[:5])


def test_s_measure():
    true = np.zeros((12, 12), bool)
    true[3:8, 4:9] = True
    assert s_measure(true.astype(float), true) == pytest.approx(1, abs=1e-6)
    half = np.full((12, 12), 0.5)
    worse, better = s_measure(1. - true, true), s_measure(0.2 + 0.6 * true, true)
    assert worse < 0.1 < s_measure(half, true) < better < 1
    # by hand: objects of a constant 0.5 are 2 * 0.5 / (0.25 + 1) = 0.8; its quarters have no spread where the truth has
    part = [(true[a, b].size / true.size) for a in (slice(0, 6), slice(6, None)) for b in (slice(0, 7), slice(7, None))]
    assert s_measure(half, true) == pytest.approx(0.5 * 0.8 + 0.5 * 0 * sum(part), abs=1e-6)
    assert s_measure(np.full((4, 4), 0.3), np.zeros((4, 4), bool)) == pytest.approx(0.7)


def test_folders_of_masks(tmp_path):
    write_videos(tmp_path, ['a'])
    figures = compare_folders(tmp_path / 'mask', tmp_path / 'mask')
    assert figures['num_test'] == 4 and figures['metrics']['dice'] == figures['metrics']['iou'] == 1
    (tmp_path / 'mask/a/000.png').rename(tmp_path / 'mask/a/zero.png')
    with pytest.raises(InputError, match='same names'):
        compare_folders(tmp_path / 'mask', tmp_path / 'image')
