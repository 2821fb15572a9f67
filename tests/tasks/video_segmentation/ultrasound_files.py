"""What the tests of this task share: a model that marks what is dark, and DICOM files."""
import numpy as np
import pydicom
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from torch import nn

PATIENT = 'Mustermann^Erika'
SECRETS = (PATIENT, 'Mustermann', '4711-0815', '19640812', 'Klinik am Park', 'Dr^Muster')


class Dark(nn.Module):
    """Marks pixels darker than 100 of 255, frame by frame, as ASTR would be called."""
    clip_size, num_classes = 3, 1

    def __init__(self, side=64):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.pretrained_cfg = {'architecture': 'dark', 'input_size': (3, side, side), 'mean': (0.,) * 3,
                               'std': (1.,) * 3}
        self.chunks = []

    def stream(self, frames):
        for chunk in frames:
            self.chunks.append(len(chunk))
            yield self.weight * (100 / 255 - chunk.mean(1, keepdim=True))


def moving_square(count=6, side=64, width=96, step=8):
    """Bright uint8 frames (count, side, width, 3) with a dark square of 16 pixels that moves to the right."""
    frames = np.full((count, side, width, 3), 200, np.uint8)
    for number in range(count):
        frames[number, 20:36, 8 + step * number:24 + step * number] = 20
    return frames


def write_dicom(path, frames, *, regions=(), syntax=None, photometric='RGB', **entries):
    """An ultrasound file with the given frames, uint8 (n, H, W, 3) or (n, H, W), and a patient."""
    dataset = Dataset()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = PATIENT, '4711-0815', '19640812'
    dataset.InstitutionName, dataset.ReferringPhysicianName = 'Klinik am Park', 'Dr^Muster'
    dataset.SOPClassUID, dataset.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.3.1', generate_uid()
    dataset.Modality = 'US'
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
    dataset.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    dataset.PhotometricInterpretation = photometric
    if frames.ndim == 4:
        dataset.PlanarConfiguration = 0
    bits = frames.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits, bits - 1, 0
    dataset.PixelData = frames.tobytes()
    if regions:
        dataset.SequenceOfUltrasoundRegions = [region(*values) for values in regions]
    for name, value in entries.items():
        setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset['PixelData'].VR = 'OB'
        dataset.PixelData = pydicom.encaps.encapsulate([frame.tobytes()[:64] for frame in frames])
    dataset.save_as(path, enforce_file_format=True)
    return path


def region(left, top, right, bottom, delta_y, delta_x, units=3):
    values = Dataset()
    values.RegionSpatialFormat, values.RegionDataType, values.RegionFlags = 1, 1, 0
    values.RegionLocationMinX0, values.RegionLocationMinY0 = left, top
    values.RegionLocationMaxX1, values.RegionLocationMaxY1 = right, bottom
    values.PhysicalUnitsXDirection = values.PhysicalUnitsYDirection = units
    values.PhysicalDeltaX, values.PhysicalDeltaY = delta_x, delta_y
    return values
