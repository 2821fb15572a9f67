"""Video files in and out: times, sound, turned frames, and what is wrong with a file."""
import av
import numpy as np
import pytest

from tests.tasks.video_files import grey, packets, sound_alone, with_sound
from vishub import InputError
from vishub.tasks.video import VideoWriter, read_video, video_info

TIMES = (0, 0.04, 0.12, 0.16, 0.5, 0.54)  # a phone in the dark


def sound_of(path):
    """Codec, loudness and seconds of the sound track; None without one."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray()[0].astype(np.float64) for frame in container.decode(stream)]
        samples = np.concatenate(frames)
        return stream.codec_context.name, samples.std() / max(abs(samples).max(), 1e-9), len(samples) / stream.rate


def test_pixels_and_uneven_times_come_back(tmp_path):
    path = tmp_path / 'a.mp4'
    with VideoWriter(path) as writer:
        for number, time in enumerate(TIMES):
            writer.write(grey(30 * number), time)
    frames = list(read_video(path))
    assert [frame.pixels.shape for frame in frames] == [(48, 64, 3)] * len(TIMES)
    np.testing.assert_allclose([frame.time for frame in frames], TIMES, atol=1e-3)
    np.testing.assert_allclose([frame.pixels.mean() for frame in frames], 30 * np.arange(6), atol=4)
    info = video_info(path)
    assert info.size == (64, 48) and info.num_frames == 6 and not info.has_sound


def test_without_times_the_rate_says(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4', fps=8) as writer:
        for level in (0, 100):
            writer.write(grey(level, 33, 65))  # odd sides
    frames = list(read_video(tmp_path / 'a.mp4'))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.125]) and frames[0].pixels.shape == (32, 64, 3)


def test_sound_that_fits_is_carried_over_byte_by_byte(tmp_path):
    source = with_sound(tmp_path / 'in.mp4', 'aac')
    assert video_info(source).has_sound
    with VideoWriter(tmp_path / 'out.mp4', sound_from=source) as writer:
        for frame in read_video(source):
            writer.write(frame.pixels, frame.time)
    assert not writer.warnings
    kept, given = packets(tmp_path / 'out.mp4'), packets(source)
    # the priming before the first picture is left out
    assert kept == given[len(given) - len(kept):] and len(given) - len(kept) <= 2


def test_other_sound_becomes_aac(tmp_path):
    source = with_sound(tmp_path / 'in.avi', 'pcm_s16le')
    with VideoWriter(tmp_path / 'out.mp4', fps=10, sound_from=source) as writer:
        for frame in read_video(source):
            writer.write(frame.pixels, frame.time)
    codec, loudness, seconds = sound_of(tmp_path / 'out.mp4')
    assert codec == 'aac' and loudness > 0.3 and seconds == pytest.approx(1, abs=0.3)


def test_silent_videos_stay_silent(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        writer.write(grey(1))
    with VideoWriter(tmp_path / 'b.mp4', sound_from=tmp_path / 'a.mp4') as writer:
        writer.write(grey(1))
    assert sound_of(tmp_path / 'b.mp4') is None and not writer.warnings


def test_after_an_error_there_is_no_file(tmp_path):
    with pytest.raises(InputError, match='frame 1 has 32 x 48 pixels, those before it 64 x 48'), \
            VideoWriter(tmp_path / 'a.mp4') as writer:
        writer.write(grey(1))
        writer.write(grey(1, width=32))
    assert not list(tmp_path.iterdir())


def test_what_is_no_video(tmp_path):
    (tmp_path / 'text.mp4').write_bytes(b'no video at all')
    sound_alone(tmp_path / 'tone.mp4')
    for name, message in (
            ('text.mp4', 'is not a video'), ('nowhere.mp4', 'does not exist'), ('tone.mp4', 'no picture, only audio')):
        with pytest.raises(InputError, match=message):
            list(read_video(tmp_path / name))
        with pytest.raises(InputError, match=message):
            video_info(tmp_path / name)
