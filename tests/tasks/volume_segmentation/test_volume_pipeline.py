"""The pipeline, its results and meshes, on a network whose answer is known for every voxel."""
import json
import struct

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import vishub
from tests.tasks.volume_segmentation.scans import Threshold, blob, oblique_affine
from vishub import InputError
from vishub.tasks.volume_segmentation import mesh
from vishub.tasks.volume_segmentation.picture import busiest, plane_picture
from vishub.tasks.volume_segmentation.pipeline import VolumeSegmentationPipeline


@pytest.fixture
def scan(tmp_path):
    values, inside = blob((22, 19, 15))
    nibabel.save(nibabel.Nifti1Image(values, oblique_affine()), tmp_path / 'scan.nii.gz')
    return tmp_path / 'scan.nii.gz', inside


def test_mask_in_the_scans_own_geometry(scan, tmp_path):
    path, inside = scan
    result = VolumeSegmentationPipeline(Threshold())(path)
    out = nibabel.load(result.save(tmp_path / 'mask.nii.gz'))
    source = nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(out.dataobj), inside)
    np.testing.assert_array_equal(out.affine, source.affine)
    assert out.shape == source.shape
    np.testing.assert_array_equal(result.mask_in_file_order(), inside)
    voxel = 0.7 * 0.9 * 2.5 / 1000
    assert result.volumes_ml == {'organ': pytest.approx(inside.sum() * voxel, rel=1e-6)}
    facts = result.to_dict()
    assert json.loads(json.dumps(facts)) == facts and facts['research_only'] is True
    assert facts['classes'][0]['voxels'] == inside.sum() and facts['shape'] == [22, 19, 15]
    assert 'For research only' in result.summary()[-1] and result.source == str(path)


def test_resampling_there_and_back(scan):
    path, inside = scan
    model = Threshold()
    model.pretrained_cfg['preprocessing'] = {'intensity': 'zscore', 'spacing': [1.2, 0.8, 0.8]}
    result = VolumeSegmentationPipeline(model)(path)
    assert result.mask.shape == (15, 22, 19)
    found = result.mask_in_file_order() > 0
    assert 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.9


def test_probabilities_mirrors_and_lists(scan, tmp_path):
    path, inside = scan
    pipe = VolumeSegmentationPipeline(Threshold())
    steps = []
    result = pipe(path, probabilities=True, mirror=True, overlap=0.25, batch_size=3,
                  progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 1
    assert result.probabilities.shape == (2, *result.mask.shape) and result.probabilities.dtype == np.float16
    np.testing.assert_allclose(result.probabilities.sum(0), 1, atol=2e-3)
    np.testing.assert_array_equal(result.probabilities.argmax(0), result.mask)
    image = nibabel.load(result.save_probabilities(tmp_path / 'p.nii.gz'))
    assert image.shape == (22, 19, 15, 2)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., 1] > 0.5, inside)
    two = pipe([path, blob((20, 20, 20))[0]])
    assert len(two) == 2 and two[0].volumes_ml == result.volumes_ml
    with pytest.raises(InputError, match='volume 2 of 2: .*constant|volume 2 of 2: .* everywhere'):
        pipe([path, np.zeros((20, 20, 20), np.float32)])
    with pytest.raises(InputError, match='probabilities=True'):
        two[0].save_probabilities(tmp_path / 'q.nii')


def test_two_channels(scan, tmp_path):
    path, inside = scan
    pipe = VolumeSegmentationPipeline(Threshold(in_chans=2))
    result = pipe((path, path))
    np.testing.assert_array_equal(result.mask_in_file_order(), inside)
    with pytest.raises(InputError, match='has 1 channel.*takes 2: give a tuple'):
        pipe(path)


def test_what_cannot_be_used(scan):
    path, _ = scan
    pipe = VolumeSegmentationPipeline(Threshold())
    for options, match in (({'overlap': 1.}, 'overlap is 1'), ({'batch_size': 0}, 'batch_size is 0')):
        with pytest.raises(InputError, match=match):
            pipe(path, **options)
    with pytest.raises(InputError, match='segments no volumes'):
        VolumeSegmentationPipeline(torch.nn.Linear(2, 2))
    import timm
    model = timm.create_model('mambaclinix_tiny', features=(4, 8, 16), num_classes=0)
    with pytest.raises(InputError, match='lost its heads'):
        VolumeSegmentationPipeline(model)
    damaged = Threshold()
    with torch.no_grad():
        damaged.scale.fill_(float('nan'))
    with pytest.raises(InputError, match='not finite'):
        VolumeSegmentationPipeline(damaged)(path)
    with pytest.raises(InputError, match='cannot save a mask'):
        pipe(path).save('mask.tif')


def test_a_network_of_ours_whatever_the_size():
    import timm
    torch.manual_seed(0)
    model = timm.create_model('mambaclinix_tiny', features=(4, 8, 16), patch_size=16, num_classes=2)
    result = vishub.pipeline('volume_segmentation', model)(np.random.default_rng(0).normal(size=(9, 21, 18)))
    assert result.mask.shape == (9, 21, 18) and result.label_names == ('background', 'class 1')


def test_pictures(scan, tmp_path):
    path, inside = scan
    result = VolumeSegmentationPipeline(Threshold())(path)
    sheet = Image.open(result.save(tmp_path / 'sheet.png'))
    assert sheet.mode == 'RGB' and sheet.width > 900
    # one bright voxel, high, in front, on the patient's right: upper left, as radiologists look
    grey, mask = np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8)
    grey[7, 7, 7], mask[7, 7, 7] = 255, 1
    for axis, corner in ((0, (0, 0)), (1, (0, 0)), (2, (0, 7))):
        picture = np.asarray(plane_picture(grey, mask, axis, 7, (1, 1, 1), opacity=0., side=8))
        assert picture[corner].tolist() == [255] * 3 and picture.sum() == 3 * 255
    assert plane_picture(grey, mask, 1, 7, (2, 1, 1), side=160).size == (80, 160)
    assert busiest(mask, 0) == 7 and busiest(0 * mask, 0) == 4


def test_meshes(tmp_path):
    """A ball of radius 6 voxels: its surface, in millimetres, turned outward whichever hand the grid has."""
    axes = np.meshgrid(*(np.arange(20),) * 3, indexing='ij')
    ball = (sum((axis - 9.5) ** 2 for axis in axes) <= 36).astype(np.uint8)
    for sense in (1, -1):
        affine = np.diag([2., 2., 2. * sense, 1.])
        affine[:3, 3] = (10, 20, 30)
        part, = mesh.surfaces(ball, affine, ['organ'], [(255, 0, 0)])
        centre = affine @ [9.5, 9.5, 9.5, 1]
        radii = np.linalg.norm(part.vertices - centre[:3], axis=1)
        assert radii.min() > 11 and radii.max() < 13.5
        a, b, c = (part.vertices[part.faces[:, corner]] for corner in range(3))
        outward = ((a + b + c) / 3 - centre[:3])
        assert (np.einsum('ij,ij->i', np.cross(b - a, c - a), outward) > 0).all()
        volume = np.einsum('ij,ij->i', a, np.cross(b, c)).sum() / 6000
        assert volume == pytest.approx(ball.sum() * 8 / 1000, rel=0.1)
    content = mesh.glb([part])
    magic, version, length = struct.unpack('<III', content[:12])
    size, kind = struct.unpack('<II', content[12:20])
    document = json.loads(content[20:20 + size])
    assert (magic, version, length) == (0x46546C67, 2, len(content)) and kind == 0x4E4F534A
    assert [a['count'] for a in document['accessors']] == [len(part.vertices)] * 2 + [3 * len(part.faces)]
    assert document['buffers'][0]['byteLength'] == len(content) - 28 - size
    assert len(mesh.stl([part])) == 84 + 50 * len(part.faces)
    text = mesh.obj([part, part]).decode().splitlines()
    last = max(int(word) for line in text if line.startswith('f') for word in line.split()[1:])
    assert last == 2 * len(part.vertices)
    assert mesh.surfaces(0 * ball, np.eye(4), ['organ'], [(0, 0, 0)]) == []
    assert json.loads(mesh.glb([])[20:])['nodes'] == [] and len(mesh.stl([])) == 84
