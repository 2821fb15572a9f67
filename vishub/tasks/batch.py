"""Running a pipeline over files and folders: what `vishub predict` does. Tables of many files: `table.py` beside."""
import glob
import inspect
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Set, Tuple, Union

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vishub.errors import InputError
from vishub.tasks.base import Pipeline, Result
from vishub.tasks.images import walk_images

__all__ = ['TABLE_SUFFIXES', 'files_of', 'predict_files', 'progress_bar']

# An output that ends so is a table (`vishub/tasks/table.py`), any other a folder.
TABLE_SUFFIXES = ('.jsonl', '.parquet')


def files_of(inputs: Sequence[str]) -> Iterator[Union[str, InputError]]:
    """The files that inputs stand for, in order: a file itself, a folder the pictures in it and below, a glob
    (`photos/**/*.jpg`) what it matches. For an input that stands for nothing, the error that says so.

    A name that is no file, folder or glob is given as it is: decoding says what is wrong with it. Lazy, so that
    millions of files need no memory.
    """
    for item in inputs:
        if os.path.isdir(item):
            found: Iterator[str] = walk_images(item)
            fault = f"the folder '{item}' holds no pictures: give one with files such as .jpg, .png or .webp"
        elif glob.has_magic(item) and not os.path.lexists(item):
            # With ** a folder is matched besides what is in it; elsewhere it stands for its pictures.
            found = itertools.chain.from_iterable(
                [match] if os.path.isfile(match) else () if '**' in item else walk_images(match)
                for match in sorted(glob.iglob(item, recursive=True)))
            fault = f"'{item}' matches no file: give a path or a pattern such as 'photos/**/*.jpg'"
        else:
            yield item
            continue
        first = next(found, None)
        if first is None:
            yield InputError(fault)
            continue
        for path in itertools.chain([first], found):
            yield str(Path(path))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text('' if speed is None else f'{speed:,.1f}/s', style='progress.data.speed')


def progress_bar(**options: Any) -> Progress:
    """A bar on stderr with count, rate and remaining time, which goes away when done."""
    return Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, **options)


def predict_files(
        pipe: Pipeline,
        inputs: Sequence[str],
        output: Optional[Path] = None,
        **options: Any,
) -> Iterator[Tuple[str, Union[Result, InputError]]]:
    """Run `pipe` on files one after the other; a bad one does not stop the others.

    Work that takes longer than two seconds shows a progress bar on stderr, if that is a terminal: of the files, or of
    one file's own parts where the pipeline tells its progress.

    Args:
        pipe: The pipeline.
        inputs: Files, folders and globs, see `files_of`; as they are if the pipeline takes no pictures.
        output: Folder to which `NAME.prediction.json`, `NAME.prediction.png` and what else the result's `suffixes`
            name are written, each whole or not at all; a second input of the same name gets `NAME-2`. None to write
            nothing.
        **options: Passed to `pipe`.

    Yields:
        Path as given or found, and its result, or the error that says why there is none.

    Raises:
        InputError: If `output` cannot be a folder.
    """
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"'{output}' cannot be made a folder ({error.strerror}): give another") from error
    paths: List[str] = []
    for item in inputs:
        for path in files_of([item]) if pipe.takes_pictures else [item]:
            if isinstance(path, InputError):
                yield item, path
            else:
                paths.append(path)

    taken: Set[str] = set()
    start = time.monotonic()
    # rich may send what others print to its own console; but the results on stdout are not for stderr.
    parts = len(paths) == 1 and 'progress' in inspect.signature(pipe.__call__).parameters
    bar = progress_bar(
        redirect_stdout=sys.stdout.isatty(), disable=len(paths) < 2 and not parts or not sys.stderr.isatty())
    with bar:
        task = bar.add_task('Working' if parts else 'Pictures', total=len(paths), visible=False)
        if parts:
            options['progress'] = lambda done, total: bar.update(
                task, completed=done, total=total, visible=time.monotonic() - start > 2)
        for path in paths:
            outcome: Union[Result, InputError]
            try:
                outcome = result = pipe(path, **options)
            except InputError as error:
                outcome = error
            else:
                if output is not None:
                    _save(result, output, _stem(path), taken)
            if not parts:
                bar.update(task, advance=1, visible=time.monotonic() - start > 2)
            yield path, outcome


def _stem(path: Union[str, Path]) -> str:
    """Name of a file without its ending; that of `scan.nii.gz` is `.nii.gz`."""
    stem = Path(path).stem
    return stem[:-4] if str(path).lower().endswith('.nii.gz') else stem


def _save(result: Result, folder: Path, stem: str, taken: Set[str]) -> None:
    names = itertools.chain([stem], (f'{stem}-{number}' for number in itertools.count(2)))
    name = next(name for name in names if name.lower() not in taken)  # some file systems know no case
    taken.add(name.lower())
    # Never NAME.png: the folder may be the one that the pictures are in.
    for suffix in result.suffixes:
        result.save(folder / f'{name}.prediction{suffix}')
