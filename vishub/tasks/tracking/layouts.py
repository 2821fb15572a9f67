"""Folders of sequences with boxes, in the layouts that the field's benchmarks come in.

Nothing is downloaded; these sets cannot be had by a package client. Told apart by the files that only one of them has.
"""
import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from vishub.errors import InputError
from vishub.tasks.images import SUFFIXES, decode_image

__all__ = [
    'LAYOUTS', 'Layout', 'StoredSequence', 'detect', 'holds_photos', 'load_benchmark', 'read_boxes',
    'read_sequences',
]

_EXPECTED = 'UAV123, UAV20L, UAV123@10fps, UAVTrack112, DTB70, OTB, GOT-10k, LaSOT, VOT, PySOT JSON'
# OTB's sequences of which the boxes are those of a part of the frames: first and last frame number
_OTB_RANGES = {
    'David': (300, 770), 'Football1': (1, 74), 'Freeman3': (1, 460), 'Freeman4': (1, 283), 'Diving': (1, 215)}


@dataclasses.dataclass(frozen=True)
class StoredSequence:
    """A stored sequence.

    Attributes:
        name: Of the sequence.
        files: Its frames.
        boxes: x, y, w, h, float64 (N, 4); NaN where the target is absent. Of GOT-10k's test split one row, which is
            followed by NaN.
        cover: How much of the target can be seen (GOT-10k: 0 to 8), (N,); None where the layout does not tell.
        measured: Whether there is a true box for more than the first frame.
    """
    name: str
    files: Tuple[Path, ...]
    boxes: np.ndarray
    cover: Optional[np.ndarray] = None
    measured: bool = True

    def __len__(self) -> int:
        return len(self.files)

    def box(self, number: int) -> np.ndarray:
        return self.boxes[number]

    def frame(self, number: int) -> np.ndarray:
        """uint8 (H, W, 3).

        Raises:
            InputError: If the file is missing or is no picture.
        """
        return np.asarray(decode_image(self.files[number]).image)


class Layout(NamedTuple):
    """Attributes:
        name: As the field calls it.
        is_here: Whether a folder is of this layout.
        read: (folder) -> its sequences; faults that concern one sequence alone are `_Missing`.
        protocol: See `ope`.
    """
    name: str
    is_here: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Any]]
    protocol: str = 'pysot'


class _Missing(NamedTuple):
    """A sequence that is left out, and why."""
    warning: str


def read_boxes(file: Path) -> np.ndarray:
    """Boxes of a text file, float64 (N, 4): a line each, numbers parted by commas, tabs or spaces, NaN for absent.

    Raises:
        InputError: If a line is not four numbers.
    """
    rows = []
    try:
        lines = file.read_text(encoding='ascii').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' cannot be read as boxes ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = [float(word) for word in re.split(r'[,\s]+', line.strip())]
        except ValueError:
            row = []
        if len(row) != 4:
            raise InputError(f"'{file}', line {number}: '{line.strip()[:60]}' is not x, y, w, h")
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, 4)


def detect(folder: Path) -> Optional[Layout]:
    """The layout of a folder, or of a PySOT JSON file; None if it is no known one."""
    return next((layout for layout in LAYOUTS if layout.is_here(Path(folder))), None)


def holds_photos(folder: Path) -> bool:
    """Whether there are pictures in a folder, or one below it."""
    return any(_pictures(place) for place in (folder, *_folders(folder)))


def read_sequences(folder: Union[str, Path]) -> Tuple[Layout, List[StoredSequence], Tuple[str, ...]]:
    """The layout of a folder, its sequences, and what was left out.

    A sequence without frames, without boxes, or absent from its first frame is left out with a warning.

    Raises:
        InputError: If the layout is unknown, a frame is missing or no picture, numbers of frames and boxes differ, or
            nothing is left.
    """
    folder = Path(folder)
    layout = detect(folder)
    if layout is None:
        raise InputError(f"no known layout found in '{folder}'; expected one of {_EXPECTED}")
    sequences, warnings = [], []
    for found in layout.read(folder):
        if not isinstance(found, _Missing):
            found = _checked(found)
        if isinstance(found, _Missing):
            warnings.append(found.warning)
        else:
            sequences.append(found)
    if not sequences:
        raise InputError(f"'{folder}' ({layout.name}) has no sequence that can be used: {' '.join(warnings)}")
    return layout, sequences, tuple(warnings)


def load_benchmark(folder: Path, num_samples: int) -> Any:
    """A benchmark as `TrackingData`; GOT-10k's and LaSOT's train split can be trained on."""
    from vishub.tasks.tracking.data import StoredVideos, TrackingData

    layout, sequences, warnings = read_sequences(folder)
    train = val = None
    if layout.name in ('GOT-10k', 'LaSOT'):
        splits: Dict[str, List[StoredSequence]] = {'train': [], 'val': [], 'test': []}
        for sequence in sequences:
            if sequence.measured:  # GOT-10k's test split is not: its truth is on the server
                split = sequence.name.partition('/')[0]
                splits[split if split in splits else 'train'].append(sequence)
        train = StoredVideos(splits['train'], num_samples) if splits['train'] else None
        val = StoredVideos(splits['val'], len(splits['val'])) if splits['val'] else None
        sequences = splits['test'] or splits['val'] or splits['train'] or sequences
    name = folder.stem if folder.is_file() else folder.resolve().name
    return TrackingData(
        name=f'{layout.name} ({name})', tag=re.sub(r'\W+', '_', layout.name.lower()), train=train, val=val,
        test=sequences, protocol=layout.protocol, layout=layout.name, split=f'{len(sequences)} sequences',
        warnings=warnings)


def _checked(sequence: StoredSequence) -> Union[StoredSequence, _Missing]:
    if not sequence.files:
        return _Missing(f"'{sequence.name}' has no frames and was left out.")
    if not len(sequence.boxes):
        return _Missing(f"'{sequence.name}' has no boxes and was left out.")
    for file in sequence.files:
        if not file.is_file():
            raise InputError(f"frame '{file}' of sequence '{sequence.name}' is missing")
    frames, boxes = len(sequence.files), len(sequence.boxes)
    if boxes == 1 and frames > 1 and not sequence.measured:
        rest = np.full((frames - 1, 4), np.nan)
        sequence = dataclasses.replace(sequence, boxes=np.concatenate([sequence.boxes, rest]))
    elif boxes != frames:
        raise InputError(f"sequence '{sequence.name}' has {frames} frames and {boxes} boxes: they must be as many")
    if not np.isfinite(sequence.boxes[0]).all() or (sequence.boxes[0, 2:] <= 0).any():
        return _Missing(f"'{sequence.name}' has no true box in its first frame and was left out.")
    return sequence


# -- the layouts ------------------------------------------------------------------------------------------------------

def _pictures(folder: Path) -> Tuple[Path, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != '.'))


def _folders(folder: Path) -> List[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir() and place.name[0] != '.') \
        if folder.is_dir() else []


def _numbered(folder: Path, first: int, last: int, digits: int) -> Tuple[Path, ...]:
    return tuple(folder / f'{number:0{digits}d}.jpg' for number in range(first, last + 1))


def _uav_table(folder: Path) -> Dict[str, Dict[str, Any]]:
    """Frame ranges of UAV123 and UAV20L: they cannot be derived from the folder, and come with the package got10k."""
    places = [folder / 'uav123.json']
    package = importlib.util.find_spec('got10k')
    if package is not None and package.submodule_search_locations:
        places += [Path(place) / 'datasets' / 'uav123.json' for place in package.submodule_search_locations]
    for place in places:
        if place.is_file():
            return json.loads(place.read_text(encoding='utf-8'))
    raise InputError(
        f"'{folder}' needs the table of its frame ranges: pip install got10k, or put that package's "
        'datasets/uav123.json (MIT) into the folder')


def _read_uav(version: str) -> Callable[[Path], Iterator[Any]]:
    def read(folder: Path) -> Iterator[Any]:
        table = _uav_table(folder)[version]
        for file in sorted((folder / 'anno' / version).glob('*.txt')):
            row = table.get(file.stem)
            frames = folder / 'data_seq' / 'UAV123' / row['folder_name'] if row else None
            if row is None or frames is None or not frames.is_dir():
                yield _Missing(f"'{file.stem}' has no {'entry in uav123.json' if row is None else 'frames'} and was "
                               'left out.')
            else:
                yield StoredSequence(
                    file.stem, _numbered(frames, row['start_frame'], row['end_frame'], 6), read_boxes(file))
    return read


def _read_flat(annotations: str) -> Callable[[Path], Iterator[Any]]:
    """UAV123@10fps and UAVTrack112: boxes in anno/NAME.txt, frames in data_seq/NAME/."""
    def read(folder: Path) -> Iterator[Any]:
        for file in sorted((folder / annotations).glob('*.txt')):
            yield StoredSequence(file.stem, _pictures(folder / 'data_seq' / file.stem), read_boxes(file))
    return read


def _read_dtb(folder: Path) -> Iterator[Any]:
    for place in _folders(folder):
        if (place / 'groundtruth_rect.txt').is_file():
            yield StoredSequence(place.name, _pictures(place / 'img'), read_boxes(place / 'groundtruth_rect.txt'))


def _read_otb(folder: Path) -> Iterator[Any]:
    for place in _folders(folder):
        files = sorted(place.glob('groundtruth_rect*.txt'))
        files = [file for file in files if file.read_text(encoding='ascii').strip()]
        frames = _pictures(place / 'img')
        if place.name in _OTB_RANGES:
            first, last = _OTB_RANGES[place.name]
            frames = tuple(file for file in frames if file.stem.isdigit() and first <= int(file.stem) <= last)
        for number, file in enumerate(files, 1):
            name = place.name if len(files) == 1 else f'{place.name}.{number}'
            yield StoredSequence(name, frames, read_boxes(file))


def _got_splits(folder: Path) -> List[Path]:
    """The folders with a list.txt: of the splits, or the folder itself if it is a split."""
    return [place for place in (folder, *(folder / split for split in ('train', 'val', 'test')))
            if (place / 'list.txt').is_file()]


def _is_got(folder: Path) -> bool:
    return any(
        (place / name / 'groundtruth.txt').is_file() for place in _got_splits(folder) for name in _listed(place)[:3])


def _listed(folder: Path) -> List[str]:
    return [name.strip() for name in (folder / 'list.txt').read_text(encoding='utf-8').splitlines() if name.strip()]


def _read_got(folder: Path) -> Iterator[Any]:
    for split in _got_splits(folder):
        for name in _listed(split):
            place = split / name
            full = name if split == folder else f'{split.name}/{name}'
            if not (place / 'groundtruth.txt').is_file():
                yield _Missing(f"'{full}' is not there and was left out.")
                continue
            boxes = read_boxes(place / 'groundtruth.txt')
            cover = place / 'cover.label'
            absent = place / 'absence.label'
            if absent.is_file() and len(boxes) > 1:
                gone = np.array(absent.read_text(encoding='ascii').split(), int) > 0
                if len(gone) == len(boxes):
                    boxes = np.where(gone[:, None], np.nan, boxes)
            yield StoredSequence(
                full, _pictures(place), boxes,
                cover=np.array(cover.read_text(encoding='ascii').split(), float) if cover.is_file() else None,
                measured=len(boxes) > 1)


def _lasot_folders(folder: Path) -> List[Path]:
    """CLASS/CLASS-NUMBER/, or CLASS-NUMBER/ themselves, each with groundtruth.txt and img/."""
    return [place for parent in (folder, *_folders(folder)) for place in _folders(parent)
            if (place / 'groundtruth.txt').is_file() and (place / 'img').is_dir()]


def _read_lasot(folder: Path) -> Iterator[Any]:
    for place in _lasot_folders(folder):
        boxes = read_boxes(place / 'groundtruth.txt')
        gone = np.zeros(len(boxes), bool)
        for label in ('full_occlusion.txt', 'out_of_view.txt'):
            if (place / label).is_file():
                flags = re.split(r'[,\s]+', (place / label).read_text(encoding='ascii').strip())
                if len(flags) == len(boxes):
                    gone |= np.array(flags, int) > 0
        yield StoredSequence(place.name, _pictures(place / 'img'), np.where(gone[:, None], np.nan, boxes))


def _is_vot_sequence(place: Path) -> bool:
    """By its files; or, in the old form, by polygons or masks in place of boxes."""
    truth = place / 'groundtruth.txt'
    if not truth.is_file():
        return False
    first = truth.read_text(encoding='ascii').partition('\n')[0]
    return (place / 'sequence').is_file() or (place / 'color').is_dir() or first[:1] == 'm' or first.count(',') > 3


def _vot_boxes(file: Path, name: str) -> Union[np.ndarray, _Missing]:
    """Rectangles as they are, polygons as the box around them."""
    rows: List[List[float]] = []
    for line in file.read_text(encoding='ascii').splitlines():
        if line.startswith('m'):
            return _Missing(f"'{name}' has masks in place of boxes and was left out.")
        values = [float(word) for word in line.replace('\t', ',').split(',') if word.strip()]
        if len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = values[0::2], values[1::2]
            values = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        if len(values) != 4:
            raise InputError(f"'{file}': '{line[:60]}' is neither a box nor a polygon")
        rows.append(values)
    return np.array(rows, np.float64).reshape(-1, 4)


def _is_vot(folder: Path) -> bool:
    return (folder / 'list.txt').is_file() and any(_is_vot_sequence(folder / name) for name in _listed(folder)[:3])


def _read_vot(folder: Path) -> Iterator[Any]:
    for name in _listed(folder):
        place = folder / name
        if not (place / 'groundtruth.txt').is_file():
            yield _Missing(f"'{name}' is not there and was left out.")
            continue
        boxes = _vot_boxes(place / 'groundtruth.txt', name)
        frames = place / 'color' if (place / 'color').is_dir() else place
        yield boxes if isinstance(boxes, _Missing) else StoredSequence(name, _pictures(frames), boxes)


def _pysot_files(folder: Path) -> Iterable[Path]:
    return [folder] if folder.is_file() and folder.suffix == '.json' else sorted(folder.glob('*.json'))


def _pysot_rows(folder: Path) -> Dict[str, Dict[str, Any]]:
    for file in _pysot_files(folder):
        try:
            content = json.loads(file.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            continue
        rows = list(content.values()) if isinstance(content, dict) else []
        if rows and all(isinstance(row, dict) and {'img_names', 'gt_rect'} <= row.keys() for row in rows):
            return content
    return {}


def _read_pysot(folder: Path) -> Iterator[Any]:
    root = folder.parent if folder.is_file() else folder
    for name, row in _pysot_rows(folder).items():
        boxes = [values if len(values) == 4 else [np.nan] * 4 for values in row['gt_rect']]
        yield StoredSequence(
            name, tuple(root / file for file in row['img_names']), np.array(boxes, np.float64).reshape(-1, 4))


def _has(folder: Path, pattern: str) -> bool:
    return folder.is_dir() and next(folder.glob(pattern), None) is not None


# In the order in which they are looked for: what only one of them has comes first.
LAYOUTS: Sequence[Layout] = (
    Layout('UAV123', lambda f: _has(f, 'anno/UAV123/*.txt'), _read_uav('UAV123')),
    Layout('UAV20L', lambda f: _has(f, 'anno/UAV20L/*.txt'), _read_uav('UAV20L')),
    Layout('UAVTrack112', lambda f: _has(f, 'anno_l/*.txt') and _has(f, 'anno/*.txt'), _read_flat('anno')),
    Layout('UAVTrack112_L', lambda f: _has(f, 'anno_l/*.txt'), _read_flat('anno_l')),
    # the two cannot be told apart, and need not be
    Layout('UAV123@10fps', lambda f: _has(f, 'anno/*.txt') and _has(f, 'data_seq'), _read_flat('anno')),
    Layout('VOT', _is_vot, _read_vot),
    Layout('GOT-10k', lambda f: f.is_dir() and _is_got(f), _read_got, 'got10k'),
    Layout('LaSOT', lambda f: bool(_lasot_folders(f)), _read_lasot),
    Layout('OTB', lambda f: _has(f, '*/groundtruth_rect.*.txt') or any(
        _has(f, f'{name}/groundtruth_rect*.txt') for name in (*_OTB_RANGES, 'Basketball', 'CarScale')), _read_otb),
    Layout('DTB70', lambda f: _has(f, '*/groundtruth_rect.txt'), _read_dtb),
    Layout('PySOT JSON', lambda f: f.exists() and bool(_pysot_rows(f)), _read_pysot),
)
