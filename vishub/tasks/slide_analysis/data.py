"""Tasks to learn one after the other: which slides, of which classes, for training, validation and test."""
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.tasks.base import Progress
from vishub.tasks.slide_analysis.encoders import Encoder
from vishub.tasks.slide_analysis.features import FeatureCache, SlideFeatures, read_features
from vishub.tasks.slide_analysis.slides import is_slide_name, open_slide
from vishub.tasks.slide_analysis.tissue import Tiling
from vishub.training.recipe import SampleKey

__all__ = ['EncodedTask', 'SlideRow', 'SlideSet', 'SlideTask', 'encode_tasks', 'find_tasks', 'lesions_of', 'read_task']

SPLITS = ('train', 'val', 'test')
_FEATURES = ('.h5', '.hdf5', '.safetensors')


@dataclass(frozen=True)
class SlideRow:
    """A slide file (or a file of its features), its class, and its patient: slides of one stay in one fold."""
    path: str
    label: str
    case: str


@dataclass(frozen=True)
class SlideTask:
    """One task.

    Attributes:
        name: Of the folder or CSV.
        classes: In the order of their numbers.
        train, val, test: Slides; `val` may be empty.
    """
    name: str
    classes: Tuple[str, ...]
    train: Tuple[SlideRow, ...]
    val: Tuple[SlideRow, ...]
    test: Tuple[SlideRow, ...]


@dataclass(frozen=True)
class EncodedTask:
    """A task whose slides are encoded: (features, class number, original row) a slide, by split."""
    name: str
    classes: Tuple[str, ...]
    train: Tuple['Item', ...]
    val: Tuple['Item', ...]
    test: Tuple['Item', ...]


@dataclass(frozen=True)
class Item:
    """One encoded slide: file of features, number of the class over all tasks, the slide itself."""
    features: str
    label: int
    row: SlideRow

    def load(self) -> SlideFeatures:
        return read_features(self.features)


def read_task(
        path: Union[str, Path],
        fold: int = 0,
        folds: int = 5,
        seed: int = 0,
) -> SlideTask:
    """Read a task.

    Args:
        path: One of

            * a folder with `train/CLASS/…` and `test/CLASS/…`, perhaps `val/CLASS/…`;
            * a folder with `CLASS/…`, which is split into folds;
            * a CSV with the columns `path` (relative to it) or `slide_id`, `label`, and perhaps `case_id` and `split`
              (train, val, test); without `split` it is split into folds.

            Files are slides, or their features (.safetensors, or .h5 in the official layout).
        fold, folds: Which part of how many is the test part, where the data have no split of their own. Parts have
            equal shares of the classes, and no patient is in two.
        seed: Of the folds.

    Raises:
        InputError: If there is no such folder or file, it has no two classes, or a split is empty.
    """
    path = Path(path)
    if not 0 <= fold < folds:
        raise InputError(f'fold is {fold}: give 0 to {folds - 1}')
    if path.is_dir():
        splits = {name: _rows_of_folder(path / name) for name in SPLITS if (path / name).is_dir()}
        if not splits:
            rows = _rows_of_folder(path)
            splits = _split(rows, fold, folds, seed)
    elif path.suffix.lower() == '.csv':
        splits = _rows_of_csv(path, fold, folds, seed)
    else:
        raise InputError(f"task '{path}' is neither a folder of classes nor a .csv")
    for name in ('train', 'test'):
        if not splits.get(name):
            raise InputError(f"task '{path}' has no {name} slides: {_WANTED}")
    classes = tuple(sorted({row.label for rows in splits.values() for row in rows}))
    missing = [label for label in classes if label not in {row.label for row in splits['train']}]
    if len(classes) < 2 or missing:
        fault = f"has no training slides of class '{missing[0]}'" if missing else f'has one class, {classes[0]}'
        raise InputError(f"task '{path}' {fault}: {_WANTED}")
    return SlideTask(
        path.stem if path.suffix else path.name, classes,
        *(tuple(splits.get(name, ())) for name in SPLITS))


_WANTED = 'a task needs two classes or more, with slides for training and test of each'


def _rows_of_folder(folder: Path) -> List[SlideRow]:
    rows = []
    for inside in sorted(folder.iterdir()):
        if not inside.is_dir():
            continue
        for file in sorted(inside.iterdir()):
            if is_slide_name(file) or file.suffix.lower() in _FEATURES:
                rows.append(SlideRow(str(file), inside.name, file.stem))
    return rows


def _rows_of_csv(path: Path, fold: int, folds: int, seed: int) -> Dict[str, List[SlideRow]]:
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"task '{path}' cannot be read: {error}") from error
    splits: Dict[str, List[SlideRow]] = {}
    for number, record in enumerate(records, 2):
        name, label = record.get('path') or record.get('slide_id'), record.get('label')
        if not name or not label:
            raise InputError(f"task '{path}', line {number}: columns path (or slide_id) and label are needed")
        slide = path.parent / name
        if not slide.suffix:  # the official layout
            slide = path.parent / 'h5_files' / f'{name}.h5'
        split = record.get('split') or ''
        if split and split not in SPLITS:
            raise InputError(f"task '{path}', line {number}: split '{split}' is not train, val or test")
        splits.setdefault(split, []).append(SlideRow(str(slide), label, record.get('case_id') or slide.stem))
    if '' in splits:
        if len(splits) > 1:
            raise InputError(f"task '{path}': give a split in every line or in none")
        return _split(splits[''], fold, folds, seed)
    return splits


def _split(rows: Sequence[SlideRow], fold: int, folds: int, seed: int) -> Dict[str, List[SlideRow]]:
    """Test part and the rest; cases of each class are dealt out in turn, so that parts have equal shares."""
    part: Dict[str, int] = {}
    for label in sorted({row.label for row in rows}):
        cases = sorted({row.case for row in rows if row.label == label} - part.keys())
        order = np.random.default_rng([seed, len(cases)]).permutation(len(cases))
        part.update({cases[index]: place % folds for place, index in enumerate(order)})
    return {
        'train': [row for row in rows if part[row.case] != fold],
        'test': [row for row in rows if part[row.case] == fold]}


def find_tasks(path: Union[str, Path], names: Sequence[str], **options: Any) -> List[SlideTask]:
    """The tasks of these names in a folder that holds a folder (or CSV) for each.

    Raises:
        InputError: If one is missing; or as `read_task` says.
    """
    tasks = []
    for name in names:
        found = [place for place in (Path(path) / name, Path(path) / f'{name}.csv') if place.exists()]
        if not found:
            raise InputError(f"'{path}' has no task '{name}': a folder or CSV of that name is needed")
        tasks.append(read_task(found[0], **options))
    return tasks


def encode_tasks(
        tasks: Sequence[SlideTask],
        encoder: Optional[Encoder],
        cache: Optional[FeatureCache],
        tiling: Tiling,
        first_class: int = 0,
        splits: Sequence[str] = SPLITS,
        mpp: Optional[float] = None,
        skip_bad: bool = False,
        progress: Optional[Progress] = None,
) -> Tuple[List[EncodedTask], List[str]]:
    """Encode all slides, or find them encoded.

    Args:
        tasks: In the order in which they are learnt, which numbers their classes.
        encoder, cache: May be None where all files are features.
        tiling: How slides are cut.
        first_class: Number of the first class.
        splits: Which to encode; the others stay empty.
        mpp: Resolution of slides that say none.
        skip_bad: Leave slides out that cannot be used, rather than stop at the first.
        progress: Called with (slides done, slides in all).

    Returns:
        The tasks, and a sentence for each slide that was left out.

    Raises:
        InputError: If a class or task name comes twice, or a slide cannot be used.
    """
    _refuse_repeated(tasks)
    total, done = sum(len(getattr(task, split)) for task in tasks for split in splits), 0
    left_out: List[str] = []
    encoded = []
    for task in tasks:
        items: Dict[str, List[Item]] = {split: [] for split in SPLITS}
        for split in splits:
            for row in getattr(task, split):
                if progress is not None:
                    progress(done, total)
                done += 1
                try:
                    features = _encoded(row, encoder, cache, tiling, mpp)
                except InputError as error:
                    if not skip_bad:
                        raise
                    left_out.append(str(error))
                    continue
                items[split].append(Item(features, first_class + task.classes.index(row.label), row))
        first_class += len(task.classes)
        encoded.append(EncodedTask(task.name, task.classes, *(tuple(items[split]) for split in SPLITS)))
    if progress is not None:
        progress(total, total)
    return encoded, left_out


def _encoded(
        row: SlideRow, encoder: Optional[Encoder], cache: Optional[FeatureCache], tiling: Tiling, mpp: Optional[float],
) -> str:
    """File with the slide's features."""
    if Path(row.path).suffix.lower() in _FEATURES:
        read_features(row.path)  # says what is wrong with it now, not in the third epoch
        return row.path
    if encoder is None or cache is None:
        raise InputError(f"'{row.path}' is a slide: an encoder and a cache are needed")
    with open_slide(row.path, mpp=mpp) as slide:
        path = cache.path(slide, encoder, tiling)
        if not path.is_file():
            cache.get(slide, encoder, tiling)
    return str(path)


def _refuse_repeated(tasks: Sequence[SlideTask]) -> None:
    for kind, names in (
            ('task', [task.name for task in tasks]),
            ('class', [label for task in tasks for label in task.classes])):
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{kind} '{name}' comes twice: names must differ over all tasks")


class SlideSet(Dataset):
    """Training slides by `SampleKey`; features are read when asked for."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: SampleKey) -> Dict[str, Any]:
        epoch, index, _ = key
        features = self.items[index].load()
        return {'patch': features.patch, 'region': features.region, 'label': self.items[index].label, 'epoch': epoch}


def joined(tasks: Sequence[EncodedTask]) -> EncodedTask:
    """All tasks as one, for joint training."""
    return EncodedTask(
        '+'.join(task.name for task in tasks), tuple(label for task in tasks for label in task.classes),
        *(tuple(item for task in tasks for item in getattr(task, split)) for split in SPLITS))


def lesions_of(path: Union[str, Path]) -> Optional[List[Tuple[float, float, float, float]]]:
    """Boxes (left, top, right, bottom) of the annotations in the GeoJSON beside a slide; None if there is no such file.

    Raises:
        InputError: If the file is no GeoJSON of polygons.
    """
    file = Path(path).with_suffix('.geojson')
    if not file.is_file():
        return None
    try:
        content: Mapping[str, Any] = json.loads(file.read_text(encoding='utf-8'))
        boxes = []
        for feature in content['features']:
            points = np.array(feature['geometry']['coordinates'][0], dtype=float)
            boxes.append((*points.min(0).tolist(), *points.max(0).tolist()))
        return boxes
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"'{file}' is no GeoJSON of polygons: {error}") from error


def collate(batch: Sequence[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
    """Slides of different length as one batch with a mask."""
    most = max(len(sample['region']) for sample in batch)
    mask = torch.zeros(len(batch), most, dtype=torch.bool)
    first = batch[0]
    patch = first['patch'].new_zeros(len(batch), most, *first['patch'].shape[1:])
    region = first['region'].new_zeros(len(batch), most, first['region'].shape[1])
    for place, sample in enumerate(batch):
        count = len(sample['region'])
        patch[place, :count], region[place, :count], mask[place, :count] = sample['patch'], sample['region'], True
    return {'patch': patch, 'region': region, 'mask': mask,
            'label': torch.tensor([sample['label'] for sample in batch])}


def limited(tasks: Sequence[SlideTask], limit: Optional[int]) -> List[SlideTask]:
    """The tasks with at most so many test slides in all, spread over tasks and classes."""
    if limit is None:
        return list(tasks)
    most = max(1, limit // max(1, len(tasks)))
    chosen = []
    for task in tasks:
        indices = np.linspace(0, len(task.test) - 1, min(most, len(task.test))).round().astype(int)
        chosen.append(replace(task, test=tuple(task.test[index] for index in indices)))
    return chosen
