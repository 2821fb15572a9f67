"""Reading clips: every kind of source, and what is wrong with bad ones."""
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vishub import InputError
from vishub.tasks.video_prediction.clips import _fit_video_frame as fit_video_frame
from vishub.tasks.video_prediction.clips import centre_crop, read_clip

GREY = (1, 16, 16)


@pytest.fixture
def frames():
    """uint8 (12, 16, 16): a column of light that moves to the right."""
    clip = np.zeros((12, 16, 16), np.uint8)
    for number in range(12):
        clip[number, :, number:number + 3] = 200
    return clip


def as_gif(frames, durations):
    pictures = [Image.fromarray(frame).convert('RGB') for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, 'GIF', save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def write_video(path, frames, times=None, rate=25):
    """Lossless colour video; `times` in milliseconds where frames are not evenly spaced."""
    from fractions import Fraction

    import av
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('ffv1', rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], 'bgr0'
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, 2), 'rgb24').reformat(format='bgr0')
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 1000)
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_arrays_and_tensors_of_any_layout_are_one_clip(frames, tmp_path):
    expected = frames[:, None].astype(np.float32) / 255
    np.save(tmp_path / 'clip.npy', frames)
    rgb = np.repeat(frames[..., None], 3, axis=-1)
    for video in (
            frames, frames[:, None], torch.from_numpy(frames), expected, torch.from_numpy(expected).double(),
            tmp_path / 'clip.npy', str(tmp_path / 'clip.npy')):
        clip = read_clip(video, GREY, 12)
        assert clip.frames.dtype == np.float32 and clip.times is None
        np.testing.assert_allclose(clip.frames, expected, atol=1e-6)
    for video in (rgb, [Image.fromarray(frame) for frame in rgb], list(frames)):
        np.testing.assert_allclose(read_clip(video, GREY, 12).frames, expected, atol=1 / 255)
    assert np.allclose(read_clip(frames, (3, 16, 16), 12).frames, expected.repeat(3, 1))


def test_which_frames(frames):
    def chosen(**options):
        clip = read_clip(frames, GREY, **options)
        return clip.first, [int(frame[0, 0].argmax()) for frame in clip.frames]

    assert chosen(count=3) == (0, [0, 1, 2])
    assert chosen(count=3, start=4, stride=2) == (4, [4, 6, 8])
    assert chosen(count=50, start=9) == (9, [9, 10, 11])
    assert chosen(count=2, start=-3) == (9, [9, 10])
    assert chosen(count=9, start=-6, stride=3) == (6, [6, 9])
    with pytest.raises(InputError, match='has 12 frames, none from number 12 on'):
        chosen(count=1, start=12)
    with pytest.raises(InputError, match='12 frames'):
        chosen(count=1, start=-13)


def test_animation_keeps_its_times(frames, tmp_path):
    content = as_gif(frames, [40] * 5 + [120] * 7)
    (tmp_path / 'clip.gif').write_bytes(content)
    clip = read_clip(tmp_path / 'clip.gif', GREY, 12)
    np.testing.assert_allclose(clip.frames, frames[:, None] / 255, atol=0.02)
    np.testing.assert_allclose(clip.times[:7], [0, .04, .08, .12, .16, .2, .32])
    assert len(clip.warnings) == 1 and '40 to 120 ms apart' in clip.warnings[0]
    with open(tmp_path / 'clip.gif', 'rb') as file:
        assert len(read_clip(file, GREY, 3).frames) == 3
    assert read_clip(content, GREY, 4).warnings == ()


def test_folder_of_frames_sorted_by_name(frames, tmp_path):
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f'{number:03}.png')
    np.testing.assert_allclose(read_clip(tmp_path, GREY, 12).frames, frames[:, None] / 255, atol=1e-6)
    Image.new('L', (20, 16)).save(tmp_path / '006.png')
    with pytest.raises(InputError, match='changes its size at frame 6 from 16 x 16 to 20 x 16'):
        read_clip(tmp_path, GREY, 12)


def test_video_with_steady_and_varying_rate(frames, tmp_path):
    steady = read_clip(write_video(tmp_path / 'steady.mkv', frames), GREY, 12)
    np.testing.assert_allclose(steady.frames, frames[:, None] / 255, atol=0.01)
    np.testing.assert_allclose(steady.times, np.arange(12) / 25, atol=1e-3)
    assert steady.warnings == ()
    times = [0, 40, 80, 200, 240, 280, 320, 360, 500, 540, 580, 620]
    varying = read_clip(write_video(tmp_path / 'varying.mkv', frames, times), GREY, 12)
    np.testing.assert_allclose(varying.times, np.array(times) / 1000, atol=2e-3)
    assert '40 to 140 ms apart' in varying.warnings[0]


def test_4k_video_needs_the_memory_of_a_frame_or_two(tmp_path):
    import resource

    import av
    path = tmp_path / 'wide.avi'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mjpeg', rate=25)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, 'yuvj420p'
        for number in range(16):
            picture = av.VideoFrame(3840, 2160, 'yuvj420p')
            for plane, value in zip(picture.planes, (0, 128, 128)):
                pixels = np.full((plane.height, plane.line_size), value, np.uint8)
                if value == 0:
                    pixels[:, 1200:1800] = 10 * number
                plane.update(pixels.tobytes())
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    read_clip(path, GREY, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clip = read_clip(path, GREY, 16)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1024 if sys.platform == 'linux' else 1)
    assert clip.frames.shape == (16, 1, 16, 16)
    assert grown < 150e6  # all frames together have 200 MB as they are decoded, 400 MB in RGB
    # the middle 2160 columns in 16: light from 1200 to 1800 is columns (1200 - 840) / 135 = 2.7 to 7.1
    np.testing.assert_allclose(clip.frames[:, 0, 8, 5], np.arange(16) * 10 / 255, atol=0.02)
    assert clip.frames[:, 0, 8, 9:].max() < 0.02


def test_lying_frames_of_phones_are_turned_upright():
    import av
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[:, 300:] = 255  # lies on its left side: the right end belongs at the top

    class Lying:
        """A decoded frame with a display matrix, which PyAV cannot write."""
        frame = av.VideoFrame.from_ndarray(pixels, 'rgb24')
        width, height, rotation = 400, 200, 90  # counter-clockwise
        reformat, to_image = frame.reformat, frame.to_image

    upright = fit_video_frame(Lying(), (1, 32, 16))
    assert upright[0, :8].min() > 0.9 and upright[0, 9:].max() < 0.1


def test_damaged_end_is_left_out_with_a_warning(frames, tmp_path):
    path = write_video(tmp_path / 'clip.mkv', np.random.default_rng(0).integers(0, 255, (12, 64, 64)).astype(np.uint8))
    content = path.read_bytes()
    (tmp_path / 'cut.mkv').write_bytes(content[:len(content) // 2])
    clip = read_clip(tmp_path / 'cut.mkv', GREY, 12)
    assert 0 < len(clip.frames) < 12


def test_crop_keeps_the_shape():
    assert centre_crop(200, 100, (32, 32)) == (50, 0, 150, 100)
    assert centre_crop(100, 200, (64, 32)) == (0, 75, 100, 125)


def test_odd_sizes_are_cropped_and_scaled():
    wide = np.zeros((2, 40, 80), np.uint8)
    wide[:, :, 20:60] = 255  # exactly what the crop keeps
    assert read_clip(wide, GREY, 2).frames.min() > 0.99
    assert read_clip(wide[..., None].repeat(3, -1), GREY, 2).frames.min() > 0.99


def test_measurements_are_taken_as_they_are():
    grid = np.random.default_rng(0).normal(280, 20, (5, 2, 16, 16))
    clip = read_clip(grid, (2, 16, 16), 5, picture=False)
    np.testing.assert_allclose(clip.frames, grid, rtol=1e-6)
    with pytest.raises(InputError, match=r'on a grid of 16 x 32'):
        read_clip(grid, (2, 16, 32), 5, picture=False)
    with pytest.raises(InputError, match='floating point'):
        read_clip(grid.astype(np.uint8), (2, 16, 16), 5, picture=False)


@pytest.mark.parametrize('video, sentence', [
    (np.zeros((0, 16, 16), np.uint8), 'has no frames'),
    ([], 'holds no frames'),
    (np.zeros((4, 16), np.uint8), 'has shape 4 x 16'),
    (np.zeros((4, 16, 16, 7), np.uint8), 'has shape 4 x 16 x 16 x 7'),
    (np.zeros((4, 16, 16), np.int64), 'int64'),
    (np.full((4, 16, 16), np.nan), 'not finite'),
    (np.full((4, 16, 16), 200.), 'divide by 255'),
    (np.full((4, 16, 16), -3.), r'scale them to 0\.\.1'),
    (b'', 'empty'),
    (7, 'cannot read a clip from a int'),
    ('nowhere.mp4', "'nowhere.mp4' does not exist"),
])
def test_bad_input_is_named(video, sentence):
    with pytest.raises(InputError, match=sentence):
        read_clip(video, GREY, 4)


def test_bad_files_are_named(tmp_path):
    (tmp_path / 'bad.npy').write_bytes(b'no array')
    with pytest.raises(InputError, match='bad.npy.*no array'):
        read_clip(tmp_path / 'bad.npy', GREY, 4)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='holds no pictures'):
        read_clip(tmp_path / 'empty', GREY, 4)
    (tmp_path / 'text.mp4').write_text('this is no video')
    with pytest.raises(InputError, match='text.mp4.*is not a video'):
        read_clip(tmp_path / 'text.mp4', GREY, 4)


def test_too_much_at_once_is_refused(frames):
    with pytest.raises(InputError, match='MB: ask for at most'):
        read_clip(frames, (3, 1024, 1024), 10_000)
