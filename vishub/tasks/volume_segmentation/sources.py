"""Data sets of files: nnU-Net's raw layout, and BraTS 2013 as DeepMedic's examples hand it out."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from vishub.errors import InputError
from vishub.tasks.volume_segmentation.data import StoredCases, VolumeData
from vishub.tasks.volume_segmentation.preprocessing import Preprocessing, foreground_statistics
from vishub.tasks.volume_segmentation.volumes import read_volume

__all__ = ['load_brats', 'load_nnunet']

Files = Tuple[str, Tuple[Path, ...], Path]  # name, channels, labels

# DeepMedic's numbers -> ours: 2 is oedema, the others belong to the tumour's core
_BRATS_CLASSES = {0: 0, 1: 2, 2: 1, 3: 2, 4: 2}
_BRATS_CHANNELS = ('Flair', 'T1c')


def load_nnunet(
        folder: Path,
        spacing: Optional[Sequence[float]],
        intensity: Optional[str],
        preprocessing: Optional[Preprocessing],
) -> VolumeData:
    """A folder in nnU-Net's raw layout. Every fifth training case is for validation; `labelsTs` is the test split.

    Raises:
        InputError: If dataset.json is damaged, a file is missing, or classes are regions, which are not trained here.
    """
    try:
        facts = json.loads((folder / 'dataset.json').read_text(encoding='utf-8'))
        names = facts.get('channel_names') or facts['modality']
        channels = tuple(str(names[str(number)]) for number in range(len(names)))
        labels = {str(name): value for name, value in facts['labels'].items()}
        if all(isinstance(value, str) for value in labels.values()):  # number -> name, as the first nnU-Net had it
            labels = {name: int(number) for number, name in labels.items()}
        ending = facts.get('file_ending', '.nii.gz')
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"'{folder / 'dataset.json'}' is no description of an nnU-Net data set: {error!r}") from error
    if any(isinstance(value, (list, tuple)) for value in labels.values()):
        raise InputError(f"the classes of '{folder.name}' are regions that overlap: give one label a voxel")
    labels.pop('ignore', None)
    ordered = sorted(labels.items(), key=lambda item: item[1])
    if [value for _, value in ordered] != list(range(len(ordered))) or len(ordered) < 2:
        raise InputError(f"the labels of '{folder.name}' are {sorted(labels.values())}: they must be 0, 1, 2 … in turn")
    train = _nnunet_cases(folder, 'imagesTr', 'labelsTr', ending, len(channels))
    if not train:
        raise InputError(f"'{folder}' has no training volumes: there is no labelsTr/*{ending}")
    test = _nnunet_cases(folder, 'imagesTs', 'labelsTs', ending, len(channels))
    val = train[4::5]
    train = [case for case in train if case not in val]
    if preprocessing is None:
        ct = intensity == 'ct' or intensity is None and channels[0].upper() == 'CT'
        grid = tuple(spacing) if spacing else _median_spacing(train)
        extra = _ct_figures(train) if ct else {}
        preprocessing = Preprocessing(
            'ct' if ct else intensity or 'zscore', grid, **extra)  # type: ignore[arg-type]
    name = folder.name.partition('_')[2] or folder.name
    return VolumeData(
        name=name, tag=''.join(c if c.isalnum() else '_' for c in name.lower()),
        labels=tuple(label for label, _ in ordered), channels=channels,
        train=StoredCases(train, preprocessing), val=StoredCases(val, preprocessing) if val else None,
        test=StoredCases(test, preprocessing) if test else None, preprocessing=preprocessing,
        split='imagesTs with labelsTs' if test else '')


def _nnunet_cases(folder: Path, images: str, labels: str, ending: str, channels: int) -> List[Files]:
    cases = []
    for label in sorted((folder / labels).glob(f'*{ending}')):
        name = label.name[:-len(ending)]
        files = tuple(folder / images / f'{name}_{number:04}{ending}' for number in range(channels))
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise InputError(f"'{missing}' is missing, for which there is '{label}'")
        cases.append((name, files, label))
    return cases


def load_brats(
        folder: Path, spacing: Optional[Sequence[float]], preprocessing: Optional[Preprocessing]) -> VolumeData:
    """BraTS 2013 from DeepMedic's examples: Flair and T1c of six patients, cut out of the skull and z-scored.

    `train` and `validation` are trained on (two of four patients cannot be spared to choose a model by), `test` is the
    test split. Classes: oedema, and the tumour's core (necrosis, enhancing and other core).
    """
    preprocessing = preprocessing or Preprocessing(
        'zscore_nonzero', tuple(spacing) if spacing else (2., 2., 2.))  # type: ignore[arg-type]

    def cases(*splits: str) -> List[Files]:
        found = []
        for split in splits:
            for patient in sorted(path for path in (folder / split).glob('*') if path.is_dir()):
                files = tuple(patient / f'{channel}_subtrMeanDivStd.nii.gz' for channel in _BRATS_CHANNELS)
                found.append((patient.name, files, patient / 'OTMultiClass.nii.gz'))
        return found

    train, test = cases('train', 'validation'), cases('test')
    missing = next((file for _, files, label in train + test for file in (*files, label) if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"'{missing}' is missing")
    return VolumeData(
        name='BraTS 2013 (6 patients)', tag='brats13', labels=('background', 'oedema', 'core'),
        channels=_BRATS_CHANNELS, train=StoredCases(train, preprocessing, _BRATS_CLASSES), val=None,
        test=StoredCases(test, preprocessing, _BRATS_CLASSES) if test else None, preprocessing=preprocessing,
        split=f'{len(test)} patients that were not trained on', licence='cc-by-nc-sa-3.0',
        terms=(
            'The training data, and so these weights, are CC BY-NC-SA 3.0 (CH): not for commercial use, and to be '
            'shared under the same terms. BraTS 2013, by way of github.com/deepmedic/deepmedic.',
            f'It has seen {len(train)} patients. That shows that the way from scan to mask works, and no more.',
        ))


def _median_spacing(cases: Sequence[Files]) -> Tuple[float, float, float]:
    spacings = [read_volume(files[0], constant=True).spacing for _, files, _ in cases]
    return tuple(float(v) for v in np.median(spacings, axis=0).round(4))  # type: ignore[return-value]


def _ct_figures(cases: Sequence[Files]) -> Dict[str, Any]:
    """Grey values of all training foregrounds, at most 10,000 of each volume, as nnU-Net samples them."""
    stored = StoredCases(cases, Preprocessing())
    values = []
    for index in range(len(stored)):
        found = stored.foreground(index)
        values.append(np.random.default_rng(index).permutation(found)[:10_000])
    return foreground_statistics(np.concatenate(values))
