"""Scans and networks that the tests of this folder share."""
import datetime

import numpy as np
import torch
from torch import nn

SECRET = 'DOE^JANE'
PATIENT = {'PatientName': SECRET, 'PatientID': 'ID-4711', 'PatientBirthDate': '19700101'}


class Threshold(nn.Module):
    """What is brighter than 1 (after normalisation) is the organ; sees no further than a voxel."""

    def __init__(self, patch_size=(16, 16, 16), in_chans=1):
        super().__init__()
        self.patch_size, self.in_chans, self.num_classes, self.num_features = patch_size, in_chans, 2, 2
        self.scale = nn.Parameter(torch.tensor(10.))
        self.pretrained_cfg = {'architecture': 'threshold', 'label_names': ('background', 'organ')}

    def forward(self, x):
        level = self.scale * (x.mean(1, keepdim=True) - 1)
        return torch.cat([-level, level], dim=1)


def oblique_affine():
    """Turned, anisotropic, and left-handed: i runs forward and down, j to the left, k up."""
    angle = np.radians(20)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    axes = turn @ np.array([[0, -1, 0.], [1, 0, 0], [0, 0, 1]]) * np.array([0.7, 0.9, 2.5])
    axes[:, 2] *= -1  # the third axis downwards: a left hand
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (-31.5, 12.25, 77.)
    assert np.linalg.det(axes) < 0
    return affine


def blob(shape, seed=0):
    """Noise with a bright box in one corner, float32 (i, j, k), and where it is brighter."""
    values = np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)
    inside = np.zeros(shape, bool)
    inside[1:shape[0] // 3, 2:shape[1] // 2, 1:shape[2] // 2] = True
    values[inside] += 5
    return values, inside


def write_series(folder, values, affine=None, *, modality='MR', number=1, slope=1., intercept=0., **changes):
    """int16 (i, j, k) as a DICOM series, one file a slice, in an order that names do not tell. Returns the files."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([0.8, 0.6, 2., 1.]) if affine is None else affine
    lps = np.diag([-1., -1, 1, 1]) @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    series, files = generate_uid(), []
    for place in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.4', generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = folder / f'{(place * 7) % values.shape[2]:03}.dcm'
        head = FileDataset(str(file), {}, file_meta=meta, preamble=b'\0' * 128)
        head.SOPClassUID, head.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        head.SeriesInstanceUID, head.SeriesNumber, head.Modality = series, number, modality
        head.StudyDate = datetime.date(2020, 1, 2).strftime('%Y%m%d')
        for name, value in PATIENT.items():
            setattr(head, name, value)
        head.Rows, head.Columns = values.shape[1], values.shape[0]
        head.PixelSpacing = [float(lengths[1]), float(lengths[0])]
        head.ImageOrientationPatient = [*(lps[:3, 0] / lengths[0]), *(lps[:3, 1] / lengths[1])]
        head.ImagePositionPatient = list(lps[:3, 3] + place * lps[:3, 2])
        head.SamplesPerPixel, head.PhotometricInterpretation = 1, 'MONOCHROME2'
        head.BitsAllocated = head.BitsStored = 16
        head.HighBit, head.PixelRepresentation = 15, 1
        head.RescaleSlope, head.RescaleIntercept = slope, intercept
        for name, value in changes.items():
            setattr(head, name, value)
        head.PixelData = np.ascontiguousarray(values[:, :, place].T.astype('<i2')).tobytes()
        head.save_as(file, enforce_file_format=True)
        files.append(file)
    return files
