"""Labelled images that are no folder of class folders: CSV files, and data sets of the Hugging Face Hub."""
import csv
import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.tasks.classification.data import ImageData, ImageSet, with_validation_of_each_class

__all__ = ['TablePicture', 'load_csv', 'load_hub_dataset']

HUB_PREFIX = 'hf:'
SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}


def load_csv(path: Path, in_chans: int, val_share: float) -> ImageData:
    """A CSV file with a header: `path,label` and, if there are given splits, `split` (`train`, `val`, `test`).

    A relative path starts at the CSV's folder and must stay inside it, links followed; an absolute one is taken as it
    is. Classes are sorted by name, or by value where all labels are whole numbers.

    Raises:
        InputError: If a column is missing, a file is missing or outside, or a line is incomplete; names the line.
    """
    rows: List[Tuple[Path, str, str]] = []
    root = path.parent.resolve()
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            missing = [name for name in ('path', 'label') if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"'{path}' has no column '{missing[0]}'; its first line must name path,label")
            for row in reader:
                rows.append(_read_row(row, f"line {reader.line_num} of '{path}'", root))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{path}' is not a readable CSV file: {error}") from error
    labels = {label for _, label, _ in rows}
    classes = sorted(labels, key=int) if all(map(_is_whole, labels)) else sorted(labels)
    number = {name: index for index, name in enumerate(classes)}
    sets: Dict[str, ImageSet] = {}
    for split in ('train', 'val', 'test'):
        of_split = [(file, number[label]) for file, label, where in rows if where == split]
        if of_split:
            sets[split] = ImageSet([f for f, _ in of_split], [label for _, label in of_split], in_chans)
    return _assemble(path.stem, classes, sets, val_share)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _read_row(row: Dict[str, Any], where: str, root: Path) -> Tuple[Path, str, str]:
    """(file, label, split) of a line."""
    name, label = (row['path'] or '').strip(), (row['label'] or '').strip()
    if not name or not label:
        raise InputError(f'{where} lacks a path or a label')
    split = SPLITS.get((row.get('split') or 'train').strip().lower())
    if split is None:
        raise InputError(f"{where} has the split '{row['split']}'; it is train, val or test")
    file = Path(name)
    if not file.is_absolute():
        file = root / file
        if not file.resolve().is_relative_to(root):
            raise InputError(f"{where} leads outside the folder '{root}': '{name}'; give an absolute path for that")
    if not file.is_file():
        raise InputError(f"{where} names a file that does not exist: '{name}'")
    return file, label, split


@dataclasses.dataclass(frozen=True)
class TablePicture:
    """A picture in a row of a Hub data set, read when it is needed."""

    table: Any
    column: str
    row: int

    def read(self) -> Any:
        """Its content, or the path of its file: both are for `decode_image`."""
        entry = self.table[self.row][self.column]
        return entry['bytes'] if entry['bytes'] is not None else entry['path']


def load_hub_dataset(name: str, in_chans: int, val_share: float) -> ImageData:
    """A data set of the Hugging Face Hub (`hf:org/name`) with a column of images and one of class labels.

    Its splits `train`, `validation` and `test` are used as they are; a test split without labels is left out.

    Raises:
        MissingExtraError: If the package `datasets` is not installed.
        InputError: If it cannot be loaded, or has no such columns.
    """
    datasets = import_extra('datasets', 'datasets')
    repository = name.removeprefix(HUB_PREFIX)
    try:
        tables = datasets.load_dataset(repository)
    except (OSError, ValueError, RuntimeError) as error:  # what the library raises for names, networks, formats
        raise InputError(f"data '{name}' cannot be loaded: {error}") from error
    if 'train' not in tables:
        raise InputError(f"data '{name}' has no split 'train'; it has {', '.join(tables)}")
    features = tables['train'].features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise InputError(
            f"data '{name}' needs a column of images and one of class labels; it has {', '.join(features)}")
    sets: Dict[str, ImageSet] = {}
    for split, kind in SPLITS.items():
        if split not in tables or kind in sets:
            continue
        table = tables[split]
        labels = np.asarray(table[label], dtype=np.int64)
        if split == 'test' and (labels < 0).any():  # kept secret
            continue
        encoded = table.cast_column(image, datasets.Image(decode=False))
        sets[kind] = ImageSet([TablePicture(encoded, image, row) for row in range(len(labels))], labels, in_chans)
    return _assemble(repository.split('/')[-1], list(features[label].names), sets, val_share)


def _assemble(name: str, classes: List[str], sets: Dict[str, ImageSet], val_share: float) -> ImageData:
    tag = ''.join(c if c.isalnum() else '_' for c in name.lower())
    if 'train' not in sets:
        raise InputError(f'{name} has no training images')
    if 'val' in sets:
        return ImageData(name, tag, tuple(classes), sets['train'], sets['val'], sets.get('test'))
    return with_validation_of_each_class(name, tag, classes, sets['train'], sets.get('test'), val_share)
