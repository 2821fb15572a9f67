"""Stored data sets: the published files of Moving MNIST's test, TaxiBJ and WeatherBench, and folders of videos."""
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from vishub.errors import InputError
from vishub.tasks.images import SUFFIXES
from vishub.tasks.video_prediction.clips import MAX_BYTES, read_clip
from vishub.tasks.video_prediction.data import StoredClips, VideoData

__all__ = ['find_weather', 'find_videos', 'load_moving_mnist_test', 'load_taxibj', 'load_videos', 'load_weather']

_VIDEO_SUFFIXES = ('.avi', '.gif', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.webp')
_YEAR = re.compile(r'(?<!\d)(?:19|20)\d\d(?!\d)')
_TRAIN_YEARS, _VAL_YEARS, _TEST_YEARS = range(2010, 2016), (2016,), (2017, 2018)


def load_moving_mnist_test(path: Path, frame: Tuple[int, int, int], num_frames: int) -> VideoData:
    """The published test clips, `mnist_test_seq.npy`: uint8 (20, 10000, 64, 64), frames first.

    Raises:
        InputError: If the file is not of this kind, its clips are shorter than `num_frames`, or another size than the
            model's.
    """
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"'{path}' is no array in the .npy format ({error})") from error
    if array.ndim != 4 or array.dtype != np.uint8:
        raise InputError(
            f"'{path}' has shape {array.shape} of {array.dtype}; Moving MNIST's test file is uint8 (frames, clips, "
            'height, width)')
    if len(array) < num_frames:
        raise InputError(f"the clips of '{path}' have {len(array)} frames; {num_frames} are needed, given and future")
    if (1, *array.shape[2:]) != frame:
        raise InputError(
            f"'{path}' has grey frames of {array.shape[2]} x {array.shape[3]}; the model takes "
            f'{frame[0]} x {frame[1]} x {frame[2]} (channels, height, width)')
    clips = array.transpose(1, 0, 2, 3)[:, :, None]  # N, T, 1, H, W, still mapped
    return VideoData(
        name='Moving MNIST', tag='moving_mnist', train=None, test=StoredClips(clips, num_frames, stride=len(array)),
        split='the published file' if array.shape[1] == 10_000 else f"'{path.name}'")


def load_taxibj(path: Path, num_frames: int) -> VideoData:
    """TaxiBJ as OpenSTL packs it: `.npz` with X_train, Y_train, X_test, Y_test, each (N, 4, 2, 32, 32) in [-1, 1].

    Values become (x + 1) / 2. The last tenth of the training clips, in the order of time, validates; it shares some
    half hours with the clips just before it, as the published splits do.

    Raises:
        InputError: If an array is missing or of another shape, or the clips have another length.
    """
    arrays: Dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ('X_train', 'Y_train', 'X_test', 'Y_test'):
                if name not in file:
                    raise InputError(f"'{path}' has no array {name}: it is not TaxiBJ as OpenSTL packs it")
                arrays[name] = file[name]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"'{path}' cannot be read: {error}") from error
    clips = {}
    for split in ('train', 'test'):
        x, y = arrays[f'X_{split}'], arrays[f'Y_{split}']
        if x.ndim != 5 or len(x) != len(y) or x.shape[2:] != y.shape[2:]:
            raise InputError(f"X_{split} and Y_{split} of '{path}' have shapes {x.shape} and {y.shape}")
        if x.shape[1] + y.shape[1] < num_frames or 2 * x.shape[1] < num_frames:
            raise InputError(
                f"the clips of '{path}' have {x.shape[1]} + {y.shape[1]} frames; the model needs {num_frames} in all")
        clips[split] = (np.concatenate([x, y], axis=1).astype(np.float32) + 1) / 2
    held = max(1, len(clips['train']) // 10)

    def stored(array: np.ndarray) -> StoredClips:
        return StoredClips(array, num_frames, stride=array.shape[1])

    return VideoData(
        name='TaxiBJ', tag='taxibj', train=stored(clips['train'][:-held]), val=stored(clips['train'][-held:]),
        test=stored(clips['test']), split='the published one')


def find_weather(folder: Path) -> Dict[int, Path]:
    """WeatherBench's files in a folder by year: `2m_temperature_2016_5.625deg.nc`, or arrays such as `2016.npy`."""
    found = {}
    for file in sorted(folder.iterdir()):
        year = _YEAR.search(file.name)
        if year and file.suffix in ('.nc', '.npy') and file.is_file():
            found[int(year[0])] = file
    return found


def load_weather(files: Dict[int, Path], num_frames: int) -> VideoData:
    """WeatherBench (Rasp et al. 2020) by the split of OpenSTL: 2010 to 2015 train, 2016 validates, 2017 and 2018 test.

    Args:
        files: Hourly grids (hours, 32, 64) of one variable by year, netCDF or npy.
        num_frames: Length of a clip, in hours.

    Raises:
        InputError: If there is neither a training nor a test year, a file is damaged, or grids differ.
    """
    def read(years: Sequence[int]) -> List[np.ndarray]:
        return [_hours(files[year]) for year in years if year in files]

    train, val, test = read(_TRAIN_YEARS), read(_VAL_YEARS), read(_TEST_YEARS)
    grids = {array.shape[1:] for array in (*train, *val, *test)}
    if not train and not test:
        raise InputError(f'there are the years {", ".join(map(str, files))}; 2010 to 2015 train, 2017 and 2018 test')
    if len(grids) > 1:
        raise InputError(f'the grids differ: {", ".join(map(str, sorted(grids)))}')
    mean, std = 0., 1.
    if train:  # year by year: all at once would need twice the memory
        count = sum(array.size for array in train)
        mean = sum(float(array.sum(dtype=np.float64)) for array in train) / count
        std = (sum(float(np.square(array - mean, dtype=np.float64).sum()) for array in train) / count) ** 0.5

    def clips(years: List[np.ndarray]) -> Any:
        return StoredClips(years, num_frames) if years else None

    return VideoData(
        name='WeatherBench', tag='weatherbench', train=clips(train), val=clips(val), test=clips(test),
        mean=(mean,), std=(std,), metrics=('mse', 'mae', 'rmse'), per_pixel=True,
        split='2017 and 2018' if train else 'the years given')


def _hours(file: Path) -> np.ndarray:
    """One year as float32 (hours, 1, height, width)."""
    try:
        if file.suffix == '.npy':
            values = np.load(file, allow_pickle=False)
        else:
            values = _netcdf(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"'{file}' cannot be read: {error}") from error
    values = np.asarray(values, np.float32)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3:
        raise InputError(f"'{file}' has shape {values.shape}: give (hours, height, width)")
    if not np.isfinite(values).all():
        raise InputError(f"'{file}' has values that are not finite")
    return values[:, None]


def _netcdf(file: Path) -> np.ndarray:
    try:
        import xarray
    except ImportError as error:
        raise InputError(
            f"reading '{file.name}' needs xarray and a netCDF reader: pip install xarray netCDF4, or save the years as "
            '.npy') from error
    with xarray.open_dataset(file) as content:
        names = [str(name) for name, variable in content.data_vars.items() if 'time' in variable.dims]
        if len(names) != 1:
            raise InputError(f"'{file}' has the variables {', '.join(names) or 'none'} over time: give one variable")
        variable = content[names[0]]
        return variable.transpose('time', ...).values


def find_videos(folder: Path) -> List[Path]:
    """Videos in a folder and below, sorted, and the folders below it that hold frames; hidden ones left out."""
    found: List[Path] = []
    frames: List[Path] = []
    for path in sorted(folder.rglob('*')):
        if any(part.startswith('.') for part in path.relative_to(folder).parts):
            continue
        suffix = path.suffix.lower()
        if path.is_file() and suffix in _VIDEO_SUFFIXES:
            found.append(path)
        elif path.is_file() and suffix in SUFFIXES and path.parent != folder and path.parent not in frames:
            frames.append(path.parent)
    return sorted(found + frames)


def load_videos(folder: Path, frame: Tuple[int, int, int], num_frames: int, stride: int = 1) -> VideoData:
    """Plain videos: folders `train`, and `val` and `test` where there are any; else all videos, split by time.

    Without such folders the first 70 % of each video train, the next 10 % validate, the last 20 % test; no clip crosses
    these borders, but the scenes are the same.

    Args:
        folder: Where videos lie, or folders of frames.
        frame: C, H, W that they are cropped and scaled to. All are decoded once and kept in memory as uint8.
        num_frames: Length of a clip.
        stride: Take every so manieth frame.

    Raises:
        InputError: If a video cannot be read, or there is none long enough.
    """
    parts: Dict[str, List[np.ndarray]] = {'train': [], 'val': [], 'test': []}
    room = MAX_BYTES * 4
    by_folder = (folder / 'train').is_dir()
    for split in parts if by_folder else ('',):
        for path in find_videos(folder / split) if (folder / split).is_dir() else ():
            clip = read_clip(path, frame, MAX_BYTES // (4 * int(np.prod(frame))), stride=stride)
            pixels = np.round(255 * clip.frames).astype(np.uint8)
            room -= pixels.nbytes
            if room < 0:
                raise InputError(
                    f"the videos of '{folder}' need more than {4 * MAX_BYTES >> 30} GB in memory: take fewer, a larger "
                    'stride or smaller frames')
            if split:
                parts[split].append(pixels)
            else:
                first, second = round(0.7 * len(pixels)), round(0.8 * len(pixels))
                for name, piece in zip(parts, (pixels[:first], pixels[first:second], pixels[second:])):
                    parts[name].append(piece)
    stored = {name: StoredClips(videos, num_frames) if videos else None for name, videos in parts.items()}
    train, val, test = (clips if clips is not None and len(clips) else None for clips in stored.values())
    if train is None and val is None and test is None:
        raise InputError(f"no video of '{folder}' has {num_frames} frames at stride {stride}, given and future ones")
    return VideoData(
        name=f'videos of {folder.name}', tag=re.sub(r'\W+', '_', folder.name.lower()), split='of its own folder'
        if by_folder else 'the last 20 % of each video', train=train, val=val, test=test)
