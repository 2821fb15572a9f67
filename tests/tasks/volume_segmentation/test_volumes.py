"""Scans and their geometry: NIfTI and NRRD in, masks out on the same voxels, and what is refused."""
import gzip

import nibabel
import numpy as np
import pytest
import torch

from tests.tasks.volume_segmentation.scans import SECRET, blob, oblique_affine
from vishub import InputError
from vishub.tasks.volume_segmentation.volumes import Grid, read_volume, write_nifti


def nifti(path, values, affine=None, kind=nibabel.Nifti1Image):
    nibabel.save(kind(values, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize('codes', ['RAS', 'LPS', 'PIR', 'SAL', 'IRP', 'ASR'])
def test_every_orientation_becomes_one(codes):
    """Voxels of one place in the patient meet at one place of the array, however the file is turned."""
    values, _ = blob((5, 6, 7))
    plain = Grid(values.shape, np.diag([1., 2, 3, 1]))
    turn = nibabel.orientations.axcodes2ornt(codes)
    image = nibabel.Nifti1Image(values, plain.affine).as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt('RAS'), turn))
    assert ''.join(nibabel.aff2axcodes(image.affine)) == codes
    grid = Grid(image.shape, image.affine)
    turned = np.asarray(image.dataobj)
    np.testing.assert_array_equal(grid.to_network(turned), values.transpose(2, 1, 0))
    np.testing.assert_array_equal(grid.to_file(grid.to_network(turned)), turned)
    assert grid.spacing == (3, 2, 1)
    np.testing.assert_allclose(grid.network_affine() @ [1, 2, 3, 1], plain.affine @ [3, 2, 1, 1], atol=1e-6)


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('kind', [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_oblique_anisotropic_left_handed_round_trip(tmp_path, suffix, kind):
    values, inside = blob((9, 8, 5))
    source = nifti(tmp_path / f'scan{suffix}', values, oblique_affine(), kind)
    volume = read_volume(source)
    assert volume.data.shape == (1, 5, 9, 8) and volume.spacing == pytest.approx((2.5, 0.7, 0.9))
    out = write_nifti(tmp_path / f'mask{suffix}', (volume.data[0] > 2).astype(np.uint8), volume.grid)
    mask, scan = nibabel.load(out), nibabel.load(source)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), inside)
    assert mask.shape == scan.shape and mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, scan.affine)  # bit by bit
    for name in ('qform_code', 'sform_code', 'xyzt_units', 'srow_x', 'quatern_b', 'pixdim'):
        np.testing.assert_array_equal(mask.header[name], scan.header[name])


def test_a_file_with_a_quaternion_alone_keeps_it(tmp_path):
    values, _ = blob((4, 5, 6))
    image = nibabel.Nifti1Image(values, None)
    angle = np.radians(30)
    affine = np.diag([-1., 1, 1, 1])
    affine[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (1.1, 1.3)
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    nibabel.save(image, tmp_path / 'scan.nii')
    grid = read_volume(tmp_path / 'scan.nii').grid
    write_nifti(tmp_path / 'mask.nii', np.ones((6, 5, 4), np.uint8), grid)
    mask, scan = nibabel.load(tmp_path / 'mask.nii'), nibabel.load(tmp_path / 'scan.nii')
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert int(mask.header['sform_code']) == 0 and int(mask.header['qform_code']) == 1


def test_nothing_but_geometry_is_taken_over(tmp_path):
    values, _ = blob((4, 5, 6))
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header['descrip'], image.header['db_name'] = SECRET, SECRET
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension('comment', SECRET.encode()))
    nibabel.save(image, tmp_path / 'scan.nii')
    write_nifti(tmp_path / 'mask.nii', np.ones((6, 5, 4), np.uint8), read_volume(tmp_path / 'scan.nii').grid)
    assert SECRET.encode() in (tmp_path / 'scan.nii').read_bytes()
    assert SECRET.encode() not in (tmp_path / 'mask.nii').read_bytes()


def test_scaled_integers_and_unknown_orientation(tmp_path):
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), None)
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / 'scan.nii')
    volume = read_volume(tmp_path / 'scan.nii')
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(
        np.sort(volume.data.ravel()), np.sort(np.asarray(nibabel.load(tmp_path / 'scan.nii').dataobj).ravel()))
    assert 'does not say how the patient lies' in volume.warnings[0]


def test_channels(tmp_path):
    values, _ = blob((4, 5, 6))
    four = nifti(tmp_path / 'four.nii', np.stack([values, -values], -1))
    with pytest.raises(InputError, match=r'four-dimensional, with 2 volumes: choose one, as in channel=0'):
        read_volume(four)
    with pytest.raises(InputError, match='channel is 2'):
        read_volume(four, channel=2)
    np.testing.assert_array_equal(read_volume(four, channel=1).data, -read_volume(four, channel=0).data)
    both = read_volume(four, channels=2).data
    assert both.shape == (2, 6, 5, 4)
    nifti(tmp_path / 'a_0000.nii.gz', values)
    nifti(tmp_path / 'a_0001.nii.gz', -values)
    np.testing.assert_array_equal(read_volume(tmp_path / 'a_0000.nii.gz', channels=2).data, both)
    np.testing.assert_array_equal(
        read_volume((tmp_path / 'a_0000.nii.gz', tmp_path / 'a_0001.nii.gz')).data, both)
    with pytest.raises(InputError, match='a_0002.nii.gz is not beside it'):
        read_volume(tmp_path / 'a_0000.nii.gz', channels=3)
    other = nifti(tmp_path / 'b.nii', values, np.diag([2., 1, 1, 1]))
    with pytest.raises(InputError, match='channel 2 lies on another grid'):
        read_volume([four, other], channel=0)
    one = nifti(tmp_path / 'one.nii', values[..., None])  # a fourth axis of one is none
    assert read_volume(one).data.shape == (1, 6, 5, 4)


def test_arrays_and_tensors():
    values, _ = blob((4, 5, 6))
    volume = read_volume(values, spacing=(3, 2, 1))
    assert volume.spacing == (3, 2, 1) and volume.grid.shape == (6, 5, 4)
    assert volume.grid.voxel_ml == pytest.approx(0.006)
    np.testing.assert_array_equal(volume.data[0], values)
    np.testing.assert_array_equal(read_volume(torch.from_numpy(values)).data[0], values)
    assert read_volume(volume) is volume
    for bad in (values[0], values.astype(complex), np.array([[['a']]])):
        with pytest.raises(InputError, match='no volume'):
            read_volume(bad)
    with pytest.raises(InputError, match='three positive lengths'):
        read_volume(values, spacing=(1, 0, 1))


@pytest.mark.parametrize('values, match', [
    (np.zeros((8, 8), np.float32), 'two-dimensional'),
    (np.zeros((8, 8, 1), np.float32), 'two-dimensional'),
    (np.zeros((8, 8, 4), np.float32), 'is 0 everywhere'),
    (np.full((8, 8, 4), 7, np.int16), 'is 7 everywhere'),
    (np.where(np.arange(256).reshape(8, 8, 4) == 5, np.nan, 1.).astype(np.float32), '1 voxels that are not finite'),
    (np.zeros((2, 2, 2, 2, 2), np.float32), 'has 5 axes'),
    (np.zeros((4, 4, 4), np.complex64), 'one real grey value'),
    (np.zeros((4, 4, 4), [('R', 'u1'), ('G', 'u1'), ('B', 'u1')]), 'one real grey value'),
])
def test_bad_nifti(tmp_path, values, match):
    with pytest.raises(InputError, match=match):
        read_volume(nifti(tmp_path / 'scan.nii', values))


def test_damaged_and_foreign_files(tmp_path):
    values, _ = blob((12, 12, 12))
    good = nifti(tmp_path / 'good.nii.gz', values).read_bytes()
    (tmp_path / 'cut.nii.gz').write_bytes(good[:len(good) // 2])
    (tmp_path / 'plain.nii').write_bytes(gzip.decompress(good)[:900])
    (tmp_path / 'text.nii').write_text('no scan')
    (tmp_path / 'notes.txt').write_text('no scan either')
    for name, match in (('cut.nii.gz', 'damaged'), ('plain.nii', 'damaged'), ('text.nii', 'cannot be read as NIfTI'),
                        ('notes.txt', 'is no volume'), ('none.nii', 'does not exist')):
        with pytest.raises(InputError, match=match):
            read_volume(tmp_path / name)
    for affine, match in ((np.diag([1., 1, 0, 1]), 'singular'), (np.diag([1., np.nan, 1, 1]), 'not finite')):
        with pytest.raises(InputError, match=match):
            Grid((2, 2, 2), affine)
    with pytest.raises(InputError, match='ends in .nii'):
        write_nifti(tmp_path / 'mask.tif', np.ones((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith('.')) == []


@pytest.mark.parametrize('encoding', ['raw', 'gzip'])
@pytest.mark.parametrize('endian', ['little', 'big'])
def test_nrrd(tmp_path, encoding, endian):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    body = values.astype('>i2' if endian == 'big' else '<i2').tobytes(order='F')
    head = (
        'NRRD0004\n# made by a test\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 3 4 5\n'
        f'space directions: (0.5,0,0) (0,-0.75,0) (0,0,2)\nkinds: domain domain domain\nendian: {endian}\n'
        f'encoding: {encoding}\nspace origin: (1,2,3)\n\n').encode()
    path = tmp_path / 'scan.nrrd'
    path.write_bytes(head + (gzip.compress(body) if encoding == 'gzip' else body))
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine, [[-0.5, 0, 0, -1], [0, 0.75, 0, -2], [0, 0, 2, 3], [0, 0, 0, 1]])
    # i runs to the left, so W is i backwards
    np.testing.assert_array_equal(volume.data[0], values.transpose(2, 1, 0)[:, :, ::-1])
    path.write_bytes(head + b'1234')
    with pytest.raises(InputError, match='cut off|damaged'):
        read_volume(path)
    for change, match in (((b'raw', b'bzip2') if encoding == 'raw' else (b'gzip', b'bzip2'), 'stored as bzip2'),
                          ((b'sizes: 3 4 5', b'sizes: 12 5'), '2 axes'), ((b'NRRD', b'NONE'), 'no NRRD file'),
                          ((b'kinds:', b'data file: x.raw\nkinds:'), 'in another file')):
        path.write_bytes(head.replace(*change) + body)
        with pytest.raises(InputError, match=match):
            read_volume(path)
