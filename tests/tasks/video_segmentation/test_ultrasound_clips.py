"""Reading clips: every kind of source gives the same frames, DICOM keeps time and scale, bad ones get one sentence."""
import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import MPEG4HP41, JPEGLosslessSV1

from tests.tasks.video_files import sound_alone
from tests.tasks.video_segmentation.ultrasound_files import SECRETS, moving_square, write_dicom
from vishub import InputError
from vishub.tasks.clips import open_clip
from vishub.tasks.video import VideoWriter

REAL = get_testdata_file('examples_ybr_color.dcm')  # cardiac, 30 frames of 240 x 320, YBR, JPEG


def pixels(video):
    return np.stack([frame.pixels for frame in open_clip(video).frames()])


def test_every_kind_of_source(tmp_path):
    frames = moving_square()
    np.save(tmp_path / 'a.npy', frames)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / 'a.webp', save_all=True, append_images=pictures[1:], lossless=True, duration=40)
    (tmp_path / 'frames').mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / 'frames' / f'{number:02d}.png')
    write_dicom(tmp_path / 'a.dcm', frames)
    sources = [
        frames, torch.from_numpy(frames).permute(0, 3, 1, 2), frames.astype(np.float32) / 255, pictures,
        tmp_path / 'a.npy', str(tmp_path / 'a.webp'), tmp_path / 'frames', tmp_path / 'a.dcm',
        (tmp_path / 'a.dcm').read_bytes(), io.BytesIO((tmp_path / 'a.webp').read_bytes())]
    for source in sources:
        clip = open_clip(source)
        assert clip.num_frames == 6
        for _ in range(2):  # as often as wanted
            assert np.array_equal(np.stack([frame.pixels for frame in clip.frames()]), frames)
    assert np.array_equal(pixels(frames[..., 0]), frames)  # grey
    times = [frame.time for frame in open_clip(tmp_path / 'a.webp').frames()]
    assert times == pytest.approx([0.04 * n for n in range(6)])


def test_video_with_times(tmp_path):
    with VideoWriter(tmp_path / 'a.mp4') as writer:
        for frame, time in zip(moving_square(), (0, 0.04, 0.08, 0.2, 0.24, 0.5)):
            writer.write(frame, time)
    clip = open_clip(tmp_path / 'a.mp4')
    read = list(clip.frames())
    assert clip.num_frames == 6 and clip.sound is None
    assert [frame.time for frame in read] == pytest.approx([0, 0.04, 0.08, 0.2, 0.24, 0.5], abs=1e-3)
    assert np.abs(np.stack([frame.pixels for frame in read]).astype(int) - moving_square()).mean() < 4
    assert len(pixels((tmp_path / 'a.mp4').read_bytes())) == 6


# DICOM

def test_real_clip():
    clip = open_clip(REAL)
    frames = list(clip.frames())
    assert clip.num_frames == len(frames) == 30 and frames[0].pixels.shape == (240, 320, 3)
    assert [frame.time for frame in frames[:3]] == pytest.approx([0, 1 / 30, 2 / 30], abs=1e-4)
    # grey tissue: had YBR been taken for RGB, it would be green
    tissue = frames[0].pixels[60:180, 80:220].astype(int)
    assert np.abs(tissue[..., 0] - tissue[..., 1]).mean() < 3 and tissue.max() > 150
    # its regions are of the picture before it was halved
    assert clip.spacing is None and 'larger picture' in clip.warnings[0]


def test_scale_and_times(tmp_path):
    frames = moving_square()
    clip = open_clip(write_dicom(tmp_path / 'a.dcm', frames, regions=[(0, 0, 96, 64, 0.05, 0.04)], FrameTime='20'))
    assert clip.spacing == (0.05, 0.04) and not clip.warnings
    assert [frame.time for frame in clip.frames()] == pytest.approx([0.02 * n for n in range(6)])
    several = [(0, 0, 20, 20, 0.01, 0.01), (20, 0, 96, 64, 0.05, 0.05), (0, 30, 9, 60, 1., 1., 4)]
    clip = open_clip(write_dicom(tmp_path / 'b.dcm', frames, regions=several, FrameTimeVector=[0, 10, 30, 10, 10, 10]))
    assert clip.spacing == (0.05, 0.05) and 'different scale' in clip.warnings[0]
    assert [frame.time for frame in clip.frames()] == pytest.approx([0, 0.01, 0.04, 0.05, 0.06, 0.07])
    clip = open_clip(write_dicom(tmp_path / 'c.dcm', frames, PixelSpacing=[0.5, 0.4], CineRate='25', Modality='CT'))
    assert clip.spacing == pytest.approx((0.05, 0.04)) and 'modality CT' in clip.warnings[0]
    assert next(iter(list(clip.frames())[1:])).time == pytest.approx(0.04)
    clip = open_clip(write_dicom(tmp_path / 'd.dcm', frames, regions=[(0, 0, 96, 64, 0., 0.04)]))
    assert clip.spacing is None and 'not positive' in clip.warnings[0]


def test_grey_and_sixteen_bits(tmp_path):
    grey = moving_square()[..., 0]
    for kind, expected in (('MONOCHROME2', grey), ('MONOCHROME1', 255 - grey)):
        path = write_dicom(tmp_path / 'a.dcm', grey, photometric=kind)
        assert np.array_equal(pixels(path)[..., 1], expected)
    path = write_dicom(tmp_path / 'a.dcm', grey.astype(np.uint16) * 16, photometric='MONOCHROME2', BitsStored=12,
                       HighBit=11)
    assert np.array_equal(pixels(path)[..., 2], grey)


def test_mpeg_stream_in_a_dicom_file(tmp_path):
    from pydicom.encaps import encapsulate

    frames = moving_square()
    buffer = io.BytesIO()
    with av.open(buffer, 'w', format='mpegts') as container:
        stream = container.add_stream('libx264', rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())
    content = buffer.getvalue()
    path = write_dicom(tmp_path / 'a.dcm', frames, PixelData=encapsulate([content + b'\0' * (len(content) % 2)]))
    import pydicom
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = MPEG4HP41
    dataset['PixelData'].VR = 'OB'
    dataset['PixelData'].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    found = pixels(path)
    assert found.shape == frames.shape and np.abs(found.astype(int) - frames).mean() < 4


# Bad input

def test_dicom_that_cannot_be_read(tmp_path, monkeypatch):
    frames = moving_square()
    path = write_dicom(tmp_path / 'a.dcm', frames, syntax=JPEGLosslessSV1)
    from pydicom.pixels import get_decoder
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), '_available', {})
    with pytest.raises(InputError, match='JPEG Lossless.* pip install pylibjpeg pylibjpeg-libjpeg'):
        open_clip(path)
    encrypted = write_dicom(tmp_path / 'b.dcm', frames)
    import pydicom
    dataset = pydicom.dcmread(encrypted)
    for name in ('PixelData', 'Rows', 'Columns'):
        delattr(dataset, name)
    dataset.EncryptedAttributesSequence = [pydicom.Dataset()]
    dataset.save_as(encrypted)
    with pytest.raises(InputError, match='encrypted'):
        open_clip(encrypted)
    cut = tmp_path / 'c.dcm'
    cut.write_bytes(Path(REAL).read_bytes()[:90_000])
    warnings = []
    try:
        count = len(list(open_clip(cut).frames(warnings)))
        assert 0 < count < 30 and 'damaged behind frame' in warnings[0]
    except InputError as error:
        assert 'damaged' in str(error) or 'no DICOM' in str(error)


def test_nothing_of_the_patient_is_said(tmp_path, recwarn, caplog, capfd):
    frames = moving_square()
    path = write_dicom(tmp_path / 'a.dcm', frames)
    content = path.read_bytes()
    # what pydicom itself would quote: a name where a number belongs
    for number, broken in enumerate((content.replace(b'Mustermann^Erika', b'Mustermann\x81Erika'), content[:600],
                                     content.replace(b'ISO', b'no '), content[:-5000])):
        bad = tmp_path / f'{number}.dcm'
        bad.write_bytes(broken)
        said = []
        try:
            clip = open_clip(bad)
            list(clip.frames(said))
            said += [clip.name, *clip.warnings]
        except InputError as error:
            said.append(str(error))
        captured = capfd.readouterr()
        everything = ' '.join([*said, *map(str, recwarn), caplog.text, captured.out, captured.err])
        assert not [secret for secret in SECRETS if secret in everything]


@pytest.mark.parametrize('make, message', [
    (lambda folder: folder / 'nowhere.mp4', 'does not exist'),
    (lambda folder: folder, 'holds no pictures'),
    (lambda folder: b'', '0 bytes'),
    (lambda folder: b'no video at all', 'is not a video'),
    (lambda folder: np.zeros((0, 8, 8)), 'has no frames'),
    (lambda folder: np.zeros((3, 8)), 'has shape 3 x 8'),
    (lambda folder: np.zeros((3, 8, 8, 5)), 'has shape'),
    (lambda folder: np.full((3, 8, 8), 7.), 'values 7..7'),
    (lambda folder: [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)],
     'changes its size at frame 1 from 8 x 8 to 8 x 9'),
    (lambda folder: [3, 4], 'does not hold the frames'),
    (lambda folder: 7, 'cannot read a clip from a int'),
])
def test_what_is_no_clip(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        list(open_clip(make(tmp_path)).frames())


def test_videos_without_picture_and_broken_ones(tmp_path):
    with pytest.raises(InputError, match='no picture, only audio'):
        open_clip(sound_alone(tmp_path / 'tone.mp4'))
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), dtype=np.uint8)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / 'a.gif', save_all=True, append_images=pictures[1:])
    content = (tmp_path / 'a.gif').read_bytes()
    warnings = []
    read = list(open_clip(content[:len(content) // 2]).frames(warnings))
    assert 0 < len(read) < 12
    assert warnings == [f'The clip is damaged behind frame {len(read)}; those before it were used.']
