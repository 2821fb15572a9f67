"""The pipeline: rollout, truth, times, what it writes, and bad input."""
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vishub
from vishub import InputError
from vishub.tasks.video_prediction.moving_digits import moving_digits
from vishub.tasks.video_prediction.pipeline import VideoPredictionPipeline, frame_errors


class Shift(nn.Module):
    """Predicts T = 3 frames, each the last given one moved by one more pixel to the right."""

    num_frames, in_chans, img_size, num_classes = 3, 1, (16, 16), 0

    def forward(self, x):
        return torch.stack([x[:, -1].roll(ahead, -1) for ahead in (1, 2, 3)], 1)


class Warmer(nn.Module):
    """Adds one standard deviation an hour, in the normalised scale."""

    num_frames, in_chans, img_size, num_classes = 3, 1, (16, 16), 0
    pretrained_cfg = {'mean': (280.,), 'std': (20.,)}

    def forward(self, x):
        return x[:, -1:] + torch.arange(1, 4).view(1, 3, 1, 1, 1)


@pytest.fixture
def pipe():
    return VideoPredictionPipeline(Shift())


@pytest.fixture
def clip():
    """uint8 (12, 16, 16), a line that goes one pixel to the right a frame."""
    frames = np.zeros((12, 16, 16), np.uint8)
    for number in range(12):
        frames[number, :, number] = 255
    return frames


def test_rollout_is_the_models_own():
    model = timm.create_model('predformer_tiny', embed_dim=32, num_heads=2).eval()
    items = np.random.default_rng(0).integers(0, 256, (4, 14, 14)).astype(np.uint8)
    clip = moving_digits(items, 32, 30, 2, seed=(0,))
    pipe = vishub.pipeline(model=model)
    assert isinstance(pipe, VideoPredictionPipeline) and pipe.name == 'predformer_tiny'
    for horizon in (3, 8, 20):
        result = pipe(clip, horizon=horizon)
        given = torch.from_numpy(clip[None, :8]).float() / 255
        with torch.no_grad():
            expected = model.predict(given, horizon)[0]
        torch.testing.assert_close(torch.from_numpy(result.predicted), expected)
        assert result.truth.shape == result.predicted.shape


def test_truth_and_errors(pipe, clip):
    result = pipe(clip, horizon=9)
    assert len(result.given) == 3 and len(result.truth) == 9
    assert max(result.errors['predicted']) == 0
    # a column of 16 pixels is where it should not be, another is missing
    assert result.errors['copied'] == [32.] * 9
    half = pipe(clip, horizon=12, start=2)
    assert len(half.predicted) == 12 and len(half.truth) == 7 and len(half.errors['copied']) == 7
    end = pipe(clip, start=-3)
    assert end.truth is None and end.errors is None and end.first == 9
    assert [int(frame[0, 0].argmax()) for frame in end.predicted] == [12, 13, 14]


def test_stride(pipe, clip):
    result = pipe(clip, start=1, stride=2)
    assert [int(frame[0, 0].argmax()) for frame in result.given] == [1, 3, 5]


def test_measurements_come_back_in_their_own_unit():
    pipe = VideoPredictionPipeline(Warmer())
    assert not pipe.picture
    result = pipe(np.full((5, 16, 16), 290.), horizon=4)
    np.testing.assert_allclose(result.predicted[:, 0, 0, 0], [310, 330, 350, 370], rtol=1e-6)
    assert result.errors['copied'] == [0, 0]
    assert result.plot().size[0] > 400
    with pytest.raises(InputError, match='floating point'):
        pipe(np.full((5, 16, 16), 29, np.uint8))


def test_list_gives_the_same_results_one_by_one(pipe, clip):
    reports = []
    several = pipe([clip, clip[3:], clip[:5]], horizon=4, batch_size=2, progress=lambda *at: reports.append(at))
    assert [len(result.truth) for result in several] == [4, 4, 2]
    for result, alone in zip(several, (clip, clip[3:], clip[:5])):
        assert np.array_equal(result.predicted, pipe(alone, horizon=4).predicted)
    assert reports == [(0, 12), (6, 12), (8, 12), (11, 12), (12, 12)]
    assert pipe([]) == []
    with pytest.raises(InputError, match='clip 2 of 2: .*2 frames'):
        pipe([clip, clip[:2]])


def test_progress_can_stop_the_work(pipe, clip):
    class Enough(Exception):
        pass

    def stop(done, total):
        if done:
            raise Enough

    with pytest.raises(Enough):
        pipe(clip, horizon=100, progress=stop)


def test_times_go_on_at_the_clips_pace(pipe, clip, tmp_path):
    pictures = [Image.fromarray(frame) for frame in clip[:5]]
    pictures[0].save(tmp_path / 'clip.gif', save_all=True, append_images=pictures[1:], duration=50)
    result = pipe(tmp_path / 'clip.gif', horizon=6)
    np.testing.assert_allclose(result.times, np.arange(9) * 0.05)
    assert result.frame_ms == 50 and len(result.truth) == 2 and result.source.endswith('clip.gif')


def test_writes_every_kind_whole(pipe, clip, tmp_path):
    result = pipe(clip, horizon=5)
    for suffix in result.suffixes:
        assert result.save(tmp_path / f'new/out{suffix}').stat().st_size > 0
    told = json.loads((tmp_path / 'new/out.json').read_text())
    assert told['num_given'] == 3 and told['num_predicted'] == 5 and told['errors']['predicted'] == [0.] * 5
    assert np.array_equal(np.load(tmp_path / 'new/out.npy'), result.predicted)
    with Image.open(tmp_path / 'new/out.gif') as animation:
        assert animation.n_frames == 8
        animation.seek(7)
        shown = np.asarray(animation.convert('RGB')).astype(int)
    # both panels of the last frame: the line is at column 7 of 16, scaled by 16
    bright = np.flatnonzero(shown[100:200].mean((0, 2)) > 200)
    panels = [bright[(bright > 16 + 7 * 16) & (bright < 16 + 8 * 16)],
              bright[(bright > 32 + 256 + 7 * 16) & (bright < 32 + 256 + 8 * 16)]]
    assert all(len(columns) >= 14 for columns in panels)
    assert any('squared error' in line for line in result.summary())
    with pytest.raises(InputError, match=r'\.gif'):
        result.save(tmp_path / 'out.txt')
    again = pipe(result.save(tmp_path / 'out.mp4'))
    assert len(again.given) == 3


def test_plot_without_truth_and_of_colours(clip):
    colours = Shift()
    colours.in_chans = 3
    result = VideoPredictionPipeline(colours)(np.repeat(clip[..., None], 3, -1), start=-3, horizon=40)
    assert result.pixels(result.predicted).shape == (40, 16, 16, 3)
    assert result.plot().mode == 'RGB' and result.plot_errors() is None
    assert len(result.animation()) == 43


@pytest.mark.parametrize('video, options, sentence', [
    (np.zeros((1, 16, 16), np.uint8), {}, 'has 1 frame; a still picture does not tell what moves'),
    (np.zeros((2, 16, 16), np.uint8), {}, 'has 2 frames; .* needs 3'),
    (np.zeros((9, 16, 16), np.uint8), {'stride': 5}, 'has 2 frames, every 5th taken'),
    (np.zeros((9, 16, 16), np.uint8), {'start': 7}, 'has 2 frames from frame 7 on'),
    (np.zeros((9, 16, 16), np.uint8), {'horizon': 0}, 'horizon is 0'),
    (np.zeros((9, 16, 16), np.uint8), {'horizon': 10 ** 8}, 'give at most'),
    (np.zeros((9, 16, 16), np.uint8), {'batch_size': 0}, 'batch_size is 0'),
    (np.zeros((0, 16, 16), np.uint8), {}, 'no frames'),
])
def test_bad_input_is_named(pipe, video, options, sentence):
    with pytest.raises(InputError, match=sentence):
        pipe(video, **options)


def test_models_that_predict_no_frames_are_refused():
    with pytest.raises(InputError, match='predicts no frames'):
        VideoPredictionPipeline(nn.Linear(2, 2))
    with pytest.raises(InputError, match='lost its head'):
        VideoPredictionPipeline(timm.create_model('predformer_tiny', embed_dim=32, num_classes=0))


def test_damaged_weights_are_noticed(clip):
    class Broken(Shift):
        def forward(self, x):
            return x * float('nan')

    with pytest.raises(InputError, match='not finite'):
        VideoPredictionPipeline(Broken())(clip)


def test_frame_errors_are_sums():
    assert frame_errors(np.zeros((2, 3, 4, 5), np.float32), np.full((2, 3, 4, 5), 2, np.float32)) == [240., 240.]
