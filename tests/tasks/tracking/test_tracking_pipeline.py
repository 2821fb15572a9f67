"""From a video and a box to a result: every kind of input, what is saved, and what is refused."""
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vishub
from vishub import InputError
from vishub.tasks.tracking.pipeline import TrackingPipeline
from vishub.tasks.tracking.tracker import Tracker
from vishub.tasks.video import VideoWriter, read_video


@pytest.fixture(scope='module')
def pipe(network):
    return TrackingPipeline(network, 'cpu')


@pytest.fixture(scope='module')
def video(clip, tmp_path_factory):
    """An MP4 whose frames are 40 ms apart, but for a gap of half a second."""
    path = tmp_path_factory.mktemp('video') / 'clip.mp4'
    with VideoWriter(path, fps=25) as writer:
        for number, frame in enumerate(clip):
            writer.write(frame, 0.04 * number + (0.5 if number > 5 else 0))
    return path


@pytest.fixture(scope='module')
def result(pipe, video, scene):
    return pipe(video, box=scene.box(0), interval=4)


# ---- the tracker ----------------------------------------------------------------------------------------------------


def test_field_interface(weights, clip, scene):
    tracker = vishub.create_tracker(f'local-dir:{weights}', 'cpu', template_update='none')
    tracker.init(clip[0], tuple(scene.box(0)))
    box, score = tracker.update(clip[1])
    assert box.shape == (4,) and 0 <= score <= 1
    assert tracker.last.frame == 1 and tracker.last.confidence == score and np.array_equal(tracker.last.box, box)


def test_update_before_init(network, clip):
    with pytest.raises(RuntimeError, match='call init'):
        Tracker(network, 'cpu').update(clip[0])


def test_cached_templates_give_what_the_joint_forward_gives(network, clip, scene):
    from vishub.tasks.tracking.crops import box_in_frame, clip_box, crop, crop_side, mean_colour

    tracker = Tracker(network, 'cpu', template_update='none')
    tracker.init(clip[0], scene.box(0))
    template = tracker._prepare(tracker.collection.templates[0].pixels)[None]
    box = scene.box(0)
    for frame in clip[1:5]:
        found, _ = tracker.update(frame)
        centre, side = tuple(box[:2] + box[2:] / 2), crop_side(*box[2:], 4)
        with torch.inference_mode():
            output = network(template, tracker._prepare(crop(frame, centre, side, 96, mean_colour(clip[0]))))
        window = torch.from_numpy(np.outer(np.hanning(12), np.hanning(12))).ravel()
        best = int((0.51 * output.logits[0].softmax(-1)[:, 0] + 0.49 * window).argmax())
        box = clip_box(box_in_frame(output.boxes[0, best].numpy(), centre, side), 128, 128, 10)
        np.testing.assert_allclose(found, box, atol=1e-3)


class Seen(torch.nn.Module):
    """Heads that are sure of one token, whose box is the middle of the search crop, of a quarter of its side."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return self.values.expand(*x.shape[:2], -1).clone()


def test_a_still_target_is_not_moved(network, scene):
    """The whole way from crop to frame: a network that always says 'in the middle, a quarter' must keep the box."""
    import copy

    model = copy.deepcopy(network)
    model.reg_head = Seen(torch.tensor([0., 0., np.log(1 / 3), np.log(1 / 3)]))
    model.cls_head = Seen(torch.tensor([2., 0.]))
    tracker = Tracker(model, 'cpu', template_update='none')
    tracker.init(scene.frame(0), (50.3, 60.6, 20., 20.))
    for _ in range(10):
        box, score = tracker.update(scene.frame(0))
    np.testing.assert_allclose(box, [50.3, 60.6, 20, 20], atol=0.6)
    assert score == pytest.approx(torch.tensor([2., 0.]).softmax(0)[0].item())


@pytest.mark.parametrize('options, sentence', [
    ({'template_update': 'all'}, 'it is one of collection, latest, none'),
    ({'window_influence': 2}, 'window_influence is 2'),
    ({'min_size': 0}, 'min_size 0'),
])
def test_bad_tracker_options(network, options, sentence):
    with pytest.raises(InputError, match=sentence):
        Tracker(network, 'cpu', **options)
    with pytest.raises(InputError, match='Linear tracks nothing'):
        Tracker(torch.nn.Linear(1, 1), 'cpu')


def test_boxes_stay_near_frames_that_shrink(network, clip, scene):
    tracker = Tracker(network, 'cpu')
    tracker.init(clip[0], scene.box(0))
    for frame in (clip[1], clip[2][:40, :50], clip[3][:6, :5]):
        (x, y, w, h), _ = tracker.update(frame)
        height, width = frame.shape[:2]
        assert 0 <= x + w / 2 <= width and 0 <= y + h / 2 <= height and w <= max(width, 10) and h <= max(height, 10)


# ---- the pipeline ---------------------------------------------------------------------------------------------------


def test_times_of_the_video_are_kept(result, pipe):
    assert len(result) == 12 and result.frames.num_frames in (0, 12)
    np.testing.assert_allclose(np.diff(result.times), [0.04] * 5 + [0.54] + [0.04] * 5, atol=1e-3)
    assert result.size == (128, 128) and result.model == 'bactrack_tiny' and result.num_params == 523_975


def test_every_kind_of_input_gives_the_same_boxes(pipe, clip, scene, tmp_path):
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(tmp_path / f'{number:03d}.png')
    np.save(tmp_path / 'clip.npy', clip)
    box = scene.box(0)
    expected = pipe(clip, box=box, limit=4).boxes
    for given in (
            tmp_path, str(tmp_path / 'clip.npy'), list(clip), [Image.fromarray(frame) for frame in clip],
            torch.from_numpy(clip).permute(0, 3, 1, 2)):
        np.testing.assert_array_equal(pipe(given, box=box, limit=4).boxes, expected)


def test_file_objects_and_limit(pipe, video, result, scene):
    with open(video, 'rb') as file:
        other = pipe(file, box=scene.box(0), interval=4, limit=6)
    np.testing.assert_array_equal(other.boxes, result.boxes[:6])
    other = pipe(io.BytesIO(video.read_bytes()), box=scene.box(0), interval=4, limit=3)
    assert len(other) == 3 and other.source is None


def test_progress_and_cancelling(pipe, clip, scene):
    told = []
    pipe(clip, box=scene.box(0), progress=lambda done, total: told.append((done, total)))
    assert told == [(number, 12) for number in range(1, 13)]

    def stop(done, total):
        if done == 3:
            raise KeyError('stop')

    with pytest.raises(KeyError):
        pipe(clip, box=scene.box(0), progress=stop)


def test_numbers_of_a_result(result):
    facts = result.to_dict()
    json.dumps(facts)
    assert len(facts['frames']) == 12 and facts['frames'][0]['confidence'] == 1
    assert facts['templates'][0] == {'frame': 0, 'reliability': 1.0, 'in_use': True}
    assert facts['frames'][7]['time'] == pytest.approx(0.78, abs=1e-3)
    assert sum(row['changed'] for row in facts['frames']) == result.changed.sum()
    assert any('frames, ' in line for line in result.summary())


def test_saved_files(result, tmp_path):
    result.save(tmp_path / 'track.csv')
    with open(tmp_path / 'track.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and float(rows[3]['x']) == pytest.approx(result.boxes[3, 0], abs=1e-3)
    result.save(tmp_path / 'track.txt')
    np.testing.assert_allclose(np.loadtxt(tmp_path / 'track.txt', delimiter=','), result.boxes, atol=6e-4)
    result.save(tmp_path / 'track.png')
    assert Image.open(tmp_path / 'track.png').size[0] > 800
    with pytest.raises(InputError, match=r'\.mp4, \.csv, \.txt'):
        result.save(tmp_path / 'track.xyz')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['track.csv', 'track.png', 'track.txt']


def test_annotated_video(result, clip, tmp_path):
    drawn = list(read_video(result.save(tmp_path / 'track.mp4')))
    assert len(drawn) == 12
    np.testing.assert_allclose([frame.time for frame in drawn], result.times, atol=2e-3)
    assert drawn[4].pixels.shape == (128, 128, 3) and np.abs(drawn[4].pixels.astype(int) - clip[4]).max() > 60


@pytest.mark.parametrize('reliability, colour', [(0.9, (24, 128, 92)), (0.3, (214, 92, 36))])
def test_boxes_are_drawn_where_they_are(reliability, colour):
    from vishub.tasks.tracking.overlay import draw_box

    frame = np.zeros((200, 300, 3), np.uint8)
    drawn = draw_box(frame, np.array([100., 120., 60., 40.]), 0.5, reliability)
    assert not frame.any()
    for row, column in ((140, 100), (140, 160), (160, 130)):  # left, right, bottom; the label is above
        assert np.abs(drawn[row - 1:row + 2, column - 1:column + 2].astype(int) - colour).sum(2).min() < 12
    assert not drawn[125:155, 105:155].any() and not drawn[:, 200:].any()


def test_lost_targets_are_said(result):
    import dataclasses

    reliability = np.array([1.] * 8 + [0.2] * 4)
    lost = dataclasses.replace(result, reliability=reliability)
    assert lost.lost_from == 8 and 'from frame 8 on' in lost.summary()[-1]
    assert dataclasses.replace(result, reliability=reliability[::-1]).lost_from is None


def test_target_that_leaves_the_frame(pipe):
    frames = np.full((12, 60, 60, 3), 90, np.uint8)
    for number in range(12):
        frames[number, 20:36, max(0, 40 + 6 * number):56 + 6 * number] = 240
    result = pipe(frames, box=(40, 20, 16, 16))
    assert len(result) == 12 and np.isfinite(result.boxes).all()


def test_sizes_that_change(pipe, clip, scene, tmp_path):
    result = pipe([clip[0], clip[1][:100, :90], clip[2]], box=scene.box(0))
    assert '2 different sizes' in result.warnings[0]
    assert {frame.pixels.shape for frame in read_video(result.save(tmp_path / 'track.mp4'))} == {(128, 128, 3)}


def test_damaged_video_is_tracked_up_to_there(pipe, video, scene, tmp_path):
    content = video.read_bytes()
    (tmp_path / 'cut.mp4').write_bytes(content[:100])
    with pytest.raises(InputError, match='cut.mp4'):
        pipe(tmp_path / 'cut.mp4', box=scene.box(0))


def test_no_frame_is_kept(pipe):
    import weakref

    from vishub.tasks.tracking.pipeline import _Log
    from vishub.tasks.video import VideoFrame

    log, seen = _Log(pipe.tracker(interval=2, min_reliability=0.)), []
    for number in range(15):
        pixels = np.zeros((400, 600, 3), np.uint8)
        seen.append(weakref.ref(pixels))
        log.add(VideoFrame(pixels, None), (100 + number, 100, 50, 40))
        del pixels
    assert sum(frame() is not None for frame in seen) <= 1
    assert len(log._pictures) <= 12 and all(pixels.shape == (213, 320, 3) for _, pixels in log._pictures)


@pytest.mark.parametrize('make, sentence', [
    (lambda folder: folder / 'none.mp4', 'does not exist'),
    (lambda folder: folder, 'holds no pictures'),
    (lambda folder: b'', r'empty \(0 bytes\)'),
    (lambda folder: b'not a video at all', 'is not a video'),
    (lambda folder: np.zeros((0, 5, 5, 3), np.uint8), 'has no frames'),
    (lambda folder: np.zeros((1, 50, 50, 3), np.uint8), 'has one frame: there is nothing to follow'),
    (lambda folder: np.full((4, 50, 50, 3), 50, np.float32), r'frame 0 of the array: .*50'),
    (lambda folder: np.zeros((4, 50, 50, 4), np.uint8), 'shape 4 x 50 x 50 x 4'),
    (lambda folder: [], 'does not hold the frames of one clip'),
    (lambda folder: 7, 'cannot read a clip from a int'),
    (lambda folder: io.StringIO('text'), 'gives text, not bytes'),
])
def test_bad_videos(pipe, tmp_path, make, sentence):
    with pytest.raises(InputError, match=sentence):
        pipe(make(tmp_path), box=(1, 1, 20, 20))


def test_a_picture_is_no_video(pipe, tmp_path):
    Image.new('RGB', (40, 40)).save(tmp_path / 'still.png')
    with pytest.raises(InputError, match='has one frame: there is nothing to follow'):
        pipe(tmp_path / 'still.png', box=(1, 1, 20, 20))


@pytest.mark.parametrize('options, sentence', [
    ({}, 'give box=x,y,w,h'),
    ({'box': (200, 1, 5, 5)}, 'outside the frame of 128 x 128'),
    ({'box': (1, 1, 5, -5)}, 'positive size'),
    ({'box': (1, 1, 5, 5), 'limit': 1}, 'limit is 1'),
    ({'box': (1, 1, 5, 5), 'interval': 0}, 'give 1 or more'),
    ({'box': (1, 1, 5, 5), 'template_update': 'best'}, 'one of collection'),
])
def test_bad_options(pipe, clip, options, sentence):
    with pytest.raises(InputError, match=sentence):
        pipe(clip, **options)


def test_other_models_are_refused():
    import timm

    with pytest.raises(InputError, match='tracks nothing'):
        TrackingPipeline(timm.create_model('vit_mini_patch2_28'), 'cpu')
    assert isinstance(vishub.pipeline(model=timm.create_model('bactrack_tiny'), device='cpu'), TrackingPipeline)
