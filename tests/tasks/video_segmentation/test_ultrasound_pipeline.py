"""The pipeline and its result: masks at the frames' own size, areas, overlays, sound, files, and no patient in them."""
import csv
import gzip
import io
import json
import zipfile

import av
import nibabel
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pydicom.data import get_testdata_file

import vishub
from tests.tasks.video_files import packets, with_sound
from tests.tasks.video_segmentation.ultrasound_files import SECRETS, Dark, moving_square, write_dicom
from vishub import InputError
from vishub.models.astr import clip_indices
from vishub.tasks.video import read_video
from vishub.tasks.video_segmentation import pipeline as module
from vishub.tasks.video_segmentation.pipeline import VideoSegmentationPipeline


@pytest.fixture(scope='module')
def dark():
    return VideoSegmentationPipeline(Dark(), 'cpu')


def true_masks(count=6, **kwargs):
    return moving_square(count, **kwargs)[..., 0] < 100


def test_masks_have_the_size_of_the_frames(dark):
    result = dark(moving_square())
    assert result.masks.shape == (6, 64, 96) and result.masks.dtype == bool
    # scaled to 64 x 64 and back: the edge may move by a pixel
    for found, true in zip(result.masks, true_masks()):
        assert (found != true).sum() <= 40 and abs(int(found.sum()) - 256) <= 30
    assert np.array_equal(result.mask(3), result.masks[3])
    assert result.area_unit == 'pixels' and np.array_equal(result.areas, result.masks.sum((1, 2)))
    assert not result.warnings and len(result) == 6


def test_astr_frame_by_frame_and_as_batch():
    torch.manual_seed(0)
    pipe = VideoSegmentationPipeline(timm.create_model('astr_tiny'), 'cpu')
    frames = np.random.default_rng(0).integers(0, 255, (7, 50, 70, 3), dtype=np.uint8)
    x = pipe.prepared(list(frames))
    scaled = np.asarray(Image.fromarray(frames[2]).resize((64, 64), Image.Resampling.BILINEAR)) / 255
    expected = (scaled - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(x[2].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    with torch.no_grad():
        batch = torch.stack([x[clip_indices(n, 3, 7)] for n in range(7)])
        logits = F.interpolate(pipe.model(batch), size=(50, 70), mode='bilinear', align_corners=False)[:, 0].numpy()
    for chunk in (1, 3):
        streamed = np.concatenate(list(pipe.logits(frames, chunk)))
        np.testing.assert_allclose(streamed, logits, rtol=1e-3, atol=1e-2)
    sure = np.abs(logits) > 0.05
    assert np.array_equal(pipe(frames).masks[sure], logits[sure] > 0)


def test_which_frames(dark):
    whole = dark(moving_square(9))
    part = dark(moving_square(9), start=2, stride=3, count=2)
    assert np.array_equal(part.masks, whole.masks[[2, 5]]) and (part.first, part.stride) == (2, 3)
    said = []
    dark(moving_square(9), chunk=4, progress=lambda done, total: said.append((done, total)))
    assert said == [(0, 9), (4, 9), (8, 9), (9, 9)]
    two = dark([moving_square(3), moving_square(4)])
    assert [len(result) for result in two] == [3, 4]
    with pytest.raises(InputError, match='clip 2 of 2: the array has shape'):
        dark([moving_square(3), np.zeros(3)])


def test_one_frame_stands_for_its_own_context():
    torch.manual_seed(0)
    pipe = VideoSegmentationPipeline(timm.create_model('astr_tiny'), 'cpu')
    frame = moving_square(1)
    result = pipe([Image.fromarray(frame[0])])
    assert len(result) == 1 and 'its own context' in result.warnings[0]
    x = pipe.prepared([frame[0]])
    with torch.no_grad():
        logits = pipe.model(x[[0, 0, 0]][None])
    np.testing.assert_allclose(next(pipe.logits(frame))[0], F.interpolate(logits, (64, 96), mode='bilinear')[0, 0],
                               rtol=1e-3, atol=1e-2)
    assert result.plot().width > 600


def test_memory_does_not_grow_with_the_frames(dark, monkeypatch):
    monkeypatch.setattr(module, 'MAX_BYTES', 64 * 12 * 5)  # of five masks
    assert len(dark(moving_square(5, step=4))) == 5
    with pytest.raises(InputError, match='give count=5'):
        dark(moving_square(6, step=4))
    monkeypatch.undo()
    stills = dark(np.concatenate([moving_square()] * 20)).stills
    assert 12 <= len(stills) <= 24 and len(np.unique(np.diff([number for number, _ in stills]))) == 1


def test_scale_gives_square_centimetres(dark, tmp_path):
    path = write_dicom(tmp_path / 'a.dcm', moving_square(), regions=[(0, 0, 96, 64, 0.05, 0.04)], FrameTime='40')
    result = dark(path)
    assert result.area_unit == 'cm²'
    np.testing.assert_allclose(result.areas, result.masks.sum((1, 2)) * 0.002)
    assert result.areas[0] == pytest.approx(256 * 0.002, rel=0.1)
    assert 'cm²' in result.summary()[1] and 'Research use only' in result.summary()[2]
    rows = list(csv.reader(result.save(tmp_path / 'a.csv').read_text().splitlines()))
    assert rows[0] == ['frame', 'seconds', 'area_cm2'] and rows[2][:2] == ['1', '0.0400']
    image = nibabel.load(result.save(tmp_path / 'a.nii.gz'))
    assert image.shape == (96, 64, 1, 6) and image.header.get_xyzt_units() == ('mm', 'sec')
    np.testing.assert_allclose(image.header.get_zooms(), (0.4, 0.5, 1, 0.04), rtol=1e-5)
    assert np.array_equal(np.asarray(image.dataobj)[:, :, 0].transpose(2, 1, 0), result.masks)
    assert gzip.decompress((tmp_path / 'a.nii.gz').read_bytes())[:2] == b'\\\x01'  # 348, little-endian


def test_files(dark, tmp_path):
    result = dark(moving_square(), start=1)
    for suffix in result.suffixes:
        assert result.save(tmp_path / f'a{suffix}').stat().st_size > 50
    with zipfile.ZipFile(tmp_path / 'a.zip') as archive:
        assert archive.namelist() == [f'{number:06d}.png' for number in range(1, 6)]
        masks = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert('L')) for name in archive.namelist()]
    assert np.array_equal(np.stack(masks), result.masks * np.uint8(255))
    facts = json.loads((tmp_path / 'a.json').read_text())
    assert facts['first'] == 1 and facts['areas'] == result.areas.tolist() and 'not for diagnosis' in facts['notice']
    assert np.array_equal(np.load(result.save(tmp_path / 'a.npy')), result.masks)
    assert Image.open(result.save(tmp_path / 'a.gif')).n_frames == 5
    with pytest.raises(InputError, match='give a name that ends'):
        result.save(tmp_path / 'a.tar.gz')


def test_overlay_marks_the_lesion_and_nothing_else(dark, tmp_path):
    result = dark(moving_square(side=320, width=320))
    frames = [frame.pixels for frame in result.overlays()]
    inside, outside = frames[2][26:30, 30:34].reshape(-1, 3), frames[2][100:200, 100:200]
    assert (inside[:, 0] > inside[:, 2] + 20).all() and (outside == 200).all()
    edge = frames[2][20:36, 24:40].reshape(-1, 3)
    assert (edge == (255, 122, 48)).all(1).any()
    shown = list(read_video(result.save(tmp_path / 'a.mp4')))
    assert len(shown) == 6 and np.abs(shown[2].pixels.astype(int) - frames[2]).mean() < 4
    small = next(iter(dark(moving_square()).overlays()))
    assert small.pixels.shape == (192, 288, 3)  # enlarged, or nothing could be seen


def test_sound_and_times_are_carried_over(dark, tmp_path):
    source = with_sound(tmp_path / 'in.mp4', 'aac')
    result = dark(source)
    kept, given = packets(result.save(tmp_path / 'out.mp4')), packets(source)
    assert kept and kept == given[len(given) - len(kept):]
    times = [frame.time for frame in read_video(tmp_path / 'out.mp4')]
    assert times == pytest.approx([frame.time for frame in read_video(source)], abs=1e-3)
    with av.open(str(dark(source, start=2).save(tmp_path / 'part.mp4'))) as container:
        assert not container.streams.audio  # of another part of the clip


def test_no_patient_in_any_output(dark, tmp_path, capfd, caplog):
    path = write_dicom(tmp_path / 'a.dcm', moving_square(), regions=[(0, 0, 96, 64, 0.05, 0.05)])
    result = dark(path)
    outputs = [result.save(tmp_path / f'out{suffix}').read_bytes() for suffix in (*result.suffixes, '.nii', '.gif')]
    with zipfile.ZipFile(tmp_path / 'out.zip') as archive:
        outputs += [archive.read(name) for name in archive.namelist()]
    captured = capfd.readouterr()
    said = ' '.join([repr(result), *result.summary(), json.dumps(result.to_dict()), captured.out, captured.err,
                     caplog.text])
    for secret in SECRETS:
        assert secret in path.read_bytes().decode('latin1')
        assert secret not in said and not any(secret.encode() in output for output in outputs)


def test_real_clip(dark):
    result = dark(get_testdata_file('examples_ybr_color.dcm'), count=4)
    assert result.masks.shape == (4, 240, 320) and result.masks[:, 200:230, 150:160].all()  # black beside the sector
    assert 'larger picture' in result.warnings[0] and result.plot().size[0] > 600


def test_refusals(dark):
    for options in ({'start': -1}, {'stride': 0}, {'count': 0}, {'chunk': 0}):
        with pytest.raises(InputError, match='give start 0 or more'):
            dark(moving_square(), **options)
    with pytest.raises(InputError, match='has 6 frames, none from number 9'):
        dark(moving_square(), start=9)
    with pytest.raises(InputError, match='segments no clips'):
        VideoSegmentationPipeline(torch.nn.Identity(), 'cpu')
    with pytest.raises(InputError, match='lost its head'):
        VideoSegmentationPipeline(timm.create_model('astr_tiny', num_classes=0), 'cpu')
    with pytest.raises(InputError, match='3 maps'):
        VideoSegmentationPipeline(timm.create_model('astr_tiny', num_classes=3), 'cpu')
    broken = Dark()
    broken.weight.data.fill_(float('nan'))
    with pytest.raises(InputError, match='weights are damaged'):
        VideoSegmentationPipeline(broken, 'cpu')(moving_square())
    assert isinstance(vishub.pipeline('video_segmentation', Dark(), 'cpu'), VideoSegmentationPipeline)
