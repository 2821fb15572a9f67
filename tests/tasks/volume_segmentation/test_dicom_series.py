"""DICOM series: order, geometry and grey values, what is refused, and that patients stay unnamed."""
import logging
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest

from tests.tasks.volume_segmentation.scans import PATIENT, Threshold, blob, oblique_affine, write_series
from vishub import InputError
from vishub.tasks.volume_segmentation.pipeline import VolumeSegmentationPipeline
from vishub.tasks.volume_segmentation.volumes import read_volume, write_nifti


@pytest.fixture
def values():
    return (100 * blob((7, 6, 5))[0]).astype(np.int16)


@pytest.mark.parametrize('affine', [None, oblique_affine()])
def test_series_as_a_folder_and_as_a_zip(tmp_path, values, affine):
    """Not square pixels, slices in any order, a rescale, an oblique and left-handed stack."""
    files = write_series(tmp_path / 'scan', values, affine, modality='CT', slope=2., intercept=-1000.)
    (tmp_path / 'scan' / 'notes.txt').write_text('not DICOM')
    volume = read_volume(tmp_path / 'scan')
    wanted = np.diag([0.8, 0.6, 2., 1.]) if affine is None else affine
    stored = volume.affine  # a left-handed stack is read from its other end
    ends = [np.allclose(stored @ [0, 0, k, 1], wanted @ [0, 0, 0, 1], atol=1e-4) for k in (0, values.shape[2] - 1)]
    assert any(ends) and volume.modality == 'CT' and volume.grid.shape == values.shape
    assert volume.grid.file_spacing == pytest.approx(np.linalg.norm(wanted[:3, :3], axis=0), rel=1e-5)
    out = write_nifti(tmp_path / 'scan.nii', volume.data[0], volume.grid)
    image = nibabel.load(out)
    for index in np.ndindex(values.shape):  # each voxel is where it was
        place = np.linalg.inv(image.affine) @ wanted @ [*index, 1]
        assert image.dataobj[tuple(np.round(place[:3]).astype(int))] == pytest.approx(2 * values[index] - 1000)
        if index[0] > 1:
            break
    with zipfile.ZipFile(tmp_path / 'scan.zip', 'w') as archive:
        for file in files:
            archive.write(file, f'a/b/{file.name}')
    again = read_volume(tmp_path / 'scan.zip')
    np.testing.assert_array_equal(again.data, volume.data)
    np.testing.assert_array_equal(again.affine, volume.affine)


def test_missing_slices_mixed_series_and_others(tmp_path, values):
    folder = tmp_path / 'scan'
    files = write_series(folder, values)
    files[2].unlink()
    with pytest.raises(InputError, match=r'between images 2 and 3 of 4 there are 4.00 mm instead of 2.00'):
        read_volume(folder)
    write_series(folder, values)
    write_series(folder / 'second', values + 1, number=9)
    with pytest.raises(InputError, match=r'mixes 2 series: choose one, as in series=9; there are 1 \(MR, 5 images\)'):
        read_volume(folder)
    np.testing.assert_array_equal(
        read_volume(folder, series=9).data, read_volume(folder, series=1).data + 1)
    with pytest.raises(InputError, match='no series of number 3; there are 1, 9'):
        read_volume(folder, series=3)

    for name, changes, match in (
            ('colour', {'PhotometricInterpretation': 'RGB'}, 'RGB pictures'),
            ('nowhere', {'ImagePositionPatient': None}, 'do not say where they lie'),
            ('cine', {'NumberOfFrames': 3}, 'cine or a stack'),
            ('same', {'ImagePositionPatient': [0., 0., 0.]}, 'several images at one place'),
    ):
        write_series(tmp_path / name, values, **changes)
        with pytest.raises(InputError, match=match):
            read_volume(tmp_path / name)
    files = write_series(tmp_path / 'turned', values)
    head = pydicom.dcmread(files[0])
    head.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    head.save_as(files[0])
    with pytest.raises(InputError, match='turned against each other'):
        read_volume(tmp_path / 'turned')
    write_series(tmp_path / 'one', values[:, :, :1])
    with pytest.raises(InputError, match='has one image'):
        read_volume(tmp_path / 'one')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='holds no DICOM images'):
        read_volume(tmp_path / 'empty')
    (tmp_path / 'bad.zip').write_bytes(b'PK')
    with pytest.raises(InputError, match='is no zip'):
        read_volume(tmp_path / 'bad.zip')


def test_compressed_encrypted_and_damaged(tmp_path, values):
    for name, syntax, match in (
            ('jpegls', '1.2.840.10008.1.2.4.80', 'JPEG-LS.* pip install pylibjpeg pylibjpeg-libjpeg'),
            ('htj2k', '1.2.840.10008.1.2.4.201', 'pip install pylibjpeg pylibjpeg-openjpeg'),
            ('mpeg', '1.2.840.10008.1.2.4.100', 'export the series without compression'),
    ):
        for file in write_series(tmp_path / name, values):
            content = file.read_bytes()  # only the name of the syntax is changed: nothing gets as far as the voxels
            old = b'1.2.840.10008.1.2.1\0'
            start = content.index(old)
            new = syntax.encode() + b'\0' * (len(syntax) % 2)
            header = content[:start - 2] + len(new).to_bytes(2, 'little') + new + content[start + len(old):]
            group = header.index(b'\x02\0\0\0UL\x04\0') + 8
            length = int.from_bytes(header[group:group + 4], 'little') + len(new) - len(old)
            file.write_bytes(header[:group] + length.to_bytes(4, 'little') + header[group + 4:])
        with pytest.raises(InputError, match=match):
            read_volume(tmp_path / name)
    files = write_series(tmp_path / 'encrypted', values)
    for file in files:
        head = pydicom.dcmread(file)
        head.EncryptedAttributesSequence = [pydicom.Dataset()]
        head.save_as(file)
    with pytest.raises(InputError, match='is encrypted'):
        read_volume(tmp_path / 'encrypted')
    files = write_series(tmp_path / 'cut', values)
    files[1].write_bytes(files[1].read_bytes()[:-20])
    with pytest.raises(InputError, match='damaged'):
        read_volume(tmp_path / 'cut')


def test_low_is_bright(tmp_path, values):
    write_series(tmp_path / 'plain', values)
    write_series(tmp_path / 'inverted', values, PhotometricInterpretation='MONOCHROME1')
    plain, inverted = (read_volume(tmp_path / name).data for name in ('plain', 'inverted'))
    np.testing.assert_allclose(inverted, plain.max() + plain.min() - plain)


def test_multi_frame_file(tmp_path, values):
    file = write_series(tmp_path / 'single', values)[0]
    head = pydicom.dcmread(file)
    places = [pydicom.dcmread(f).ImagePositionPatient for f in sorted((tmp_path / 'single').iterdir())]
    places.sort(key=lambda place: place[2])
    order = [3, 0, 4, 1, 2]  # frames need not be in order
    shared, frames = pydicom.Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [pydicom.Dataset()], [pydicom.Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = head.PixelSpacing
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = head.ImageOrientationPatient
    for place in order:
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = [pydicom.Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = places[place]
        frames.append(frame)
    for name in ('PixelSpacing', 'ImageOrientationPatient', 'ImagePositionPatient'):
        delattr(head, name)
    head.SharedFunctionalGroupsSequence, head.PerFrameFunctionalGroupsSequence = [shared], frames
    head.NumberOfFrames = len(frames)
    head.PixelData = np.ascontiguousarray(values[:, :, order].transpose(2, 1, 0).astype('<i2')).tobytes()
    head.save_as(tmp_path / 'many.dcm')
    many, single = read_volume(tmp_path / 'many.dcm'), read_volume(tmp_path / 'single')
    np.testing.assert_array_equal(many.data, single.data)
    np.testing.assert_allclose(many.affine, single.affine)


def test_patients_stay_unnamed(tmp_path, values, caplog):
    write_series(tmp_path / 'scan', np.tile(values, (3, 3, 4)))
    with caplog.at_level(logging.DEBUG):
        result = VolumeSegmentationPipeline(Threshold())(tmp_path / 'scan')
    said = [repr(result), str(result.to_dict()), *result.summary(), *(record.getMessage() for record in caplog.records)]
    outputs = [result.save(tmp_path / f'mask{suffix}') for suffix in ('.nii', '.glb', '.stl', '.obj', '.json', '.png')]
    for secret in PATIENT.values():
        assert not any(secret in text for text in said)
        assert not any(secret.encode() in path.read_bytes() for path in outputs)
