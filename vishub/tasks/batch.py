"""Running a pipeline over files and folders: what `vishub predict` does."""
import itertools
import sys
import time
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Set, Tuple, Union

from rich.console import Console
from rich.progress import Progress

from vishub.errors import InputError
from vishub.tasks.base import Pipeline, Result
from vishub.tasks.images import images_in

__all__ = ['predict_files']


def predict_files(
        pipe: Pipeline,
        inputs: Sequence[str],
        output: Optional[Path] = None,
        **options: Any,
) -> Iterator[Tuple[str, Union[Result, InputError]]]:
    """Run `pipe` on files one after the other; a bad one does not stop the others.

    Work that takes longer than two seconds shows a progress bar on stderr, if that is a terminal.

    Args:
        pipe: The pipeline.
        inputs: Files and folders. A folder stands for the pictures in it and below.
        output: Folder to which `NAME.prediction.json` and `NAME.prediction.png` are written, each whole or not at
            all; a second picture of the same name gets `NAME-2`. None to write nothing.
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
        if not Path(item).is_dir():
            paths.append(item)
            continue
        try:
            paths += map(str, images_in(item))
        except InputError as error:
            yield item, error

    taken: Set[str] = set()
    start = time.monotonic()
    # rich may send what others print to its own console; but the results on stdout are not for stderr.
    bar = Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(),
        disable=len(paths) < 2 or not sys.stderr.isatty())
    with bar:
        task = bar.add_task('Pictures', total=len(paths), visible=False)
        for path in paths:
            outcome: Union[Result, InputError]
            try:
                outcome = result = pipe(path, **options)
            except InputError as error:
                outcome = error
            else:
                if output is not None:
                    _save(result, output, Path(path).stem, taken)
            bar.update(task, advance=1, visible=time.monotonic() - start > 2)
            yield path, outcome


def _save(result: Result, folder: Path, stem: str, taken: Set[str]) -> None:
    names = itertools.chain([stem], (f'{stem}-{number}' for number in itertools.count(2)))
    name = next(name for name in names if name.lower() not in taken)  # some file systems know no case
    taken.add(name.lower())
    # Never NAME.png: the folder may be the one that the pictures are in.
    result.save(folder / f'{name}.prediction.png')
    result.save(folder / f'{name}.prediction.json')
