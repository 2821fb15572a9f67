"""Predictions for any number of files, as one table: what `vishub predict … --output results.jsonl` does.

The life of a run, on disk beside the table, in `results.jsonl.parts/`:

    inputs.jsonl     the files, one JSON string a line, listed once: the run is about these, whatever happens to folders
    run.json         model, options and the size of a part: who continues must want the same
    00000012.jsonl   the rows of part 12, whole or not there at all

Part 12 is lines 12 * part_size and on of inputs.jsonl, whoever computes it. So a run that was killed goes on with the
parts that are missing, with as many processes as there are then, and no row is lost or there twice. When no part is
missing, the table is put together, appears under its name in one step, and the folder goes.

Decoding happens in worker processes, which know no model; neither the list of files nor the results are ever in memory.
"""
import itertools
import json
import os
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.tasks.base import Pipeline
from vishub.tasks.batch import TABLE_SUFFIXES, files_of, progress_bar
from vishub.training.processes import on_main, rank_and_world

__all__ = ['TableReport', 'predict_table']

# (number of the part, path)
_Place = Tuple[int, str]
# number of the part, B x C x H x W of the good ones, and for every file what is known of it or its fault
_Batch = Tuple[int, Optional[torch.Tensor], List[Tuple[str, Any, Optional[str]]]]

# Rows that say why a file was skipped begin so, and no others do: they can be told apart without parsing.
_SKIPPED = b'{"error"'


@dataclass(frozen=True)
class TableReport:
    """What a run has made.

    Attributes:
        output: The table.
        skipped: JSON lines `{"error", "source"}` of the files that could not be used; None if there are none.
        num_rows: Rows in the table.
        num_skipped: Files skipped.
        num_resumed: Of all these files, those that were already done when the run started.
        seconds: What this run took, without loading the model.
    """
    output: Path
    skipped: Optional[Path]
    num_rows: int
    num_skipped: int
    num_resumed: int
    seconds: float


def predict_table(
        pipe: Pipeline,
        inputs: Sequence[str],
        output: Path,
        batch_size: int = 32,
        workers: Optional[int] = None,
        part_size: int = 1024,
        **options: Any,
) -> TableReport:
    """Run `pipe` on many files and write one row for each; continues a run that was stopped, even by kill -9.

    In a process group (torchrun, accelerate launch) every process computes its share of the parts, on machines that
    share the folder, and all return the same report.

    Args:
        pipe: A pipeline whose task writes tables (`Pipeline.preparer`).
        inputs: Files, folders and globs, see `files_of`.
        output: Table to write, `.jsonl` or `.parquet`; in the order of the inputs. A file that cannot be used is
            listed in `NAME.skipped.jsonl` beside it instead.
        batch_size: Pictures a forward pass.
        workers: Processes that decode; None for one less than there are cores (at most 8). 0 decodes in between.
        part_size: Files a part: what a kill costs at most, for each process. A run that goes on keeps its own.
        **options: Passed to `pipe.rows`, e.g. top_k.

    Raises:
        InputError: If an input stands for no file, the table is there already, its parts are of another run, it
            cannot be written, or the task writes no tables.
        MissingExtraError: If `.parquet` is asked for and pyarrow is not installed.
    """
    if output.suffix not in TABLE_SUFFIXES:
        raise InputError(f"cannot write a table to '{output}': give a name that ends in .jsonl or .parquet")
    if batch_size < 1 or part_size < 1 or (workers or 0) < 0:
        raise InputError('batch_size and part_size must be 1 or more, workers 0 or more')
    if output.suffix == '.parquet':
        import_extra('pyarrow', 'parquet')
    preparer = pipe.preparer()
    start = time.monotonic()
    folder = output.with_name(f'{output.name}.parts')
    wanted = {
        'model': pipe.name, 'weights': _fingerprint(pipe.model), 'options': options, 'inputs': list(inputs),
        'folder': os.getcwd(),
    }
    run, missing = on_main(lambda: _open(folder, output, wanted, part_size))
    rank, world = rank_and_world()
    mine = missing[rank::world]
    num_mine = sum(_files_in(run, part) for part in mine)
    resumed = run['num_files'] - sum(_files_in(run, part) for part in missing)

    loader: DataLoader = DataLoader(
        _Decoded(preparer),
        batch_sampler=_places(folder / 'inputs.jsonl', mine, run['part_size'], batch_size),
        collate_fn=_collate,
        num_workers=_default_workers(num_mine, batch_size) if workers is None else workers,
        pin_memory=pipe.device.type == 'cuda',
    )
    with progress_bar(disable=rank > 0 or not sys.stderr.isatty()) as bar:
        task = bar.add_task('Pictures' if world == 1 else f'Pictures, process 1 of {world}', total=num_mine)
        for part, batches in itertools.groupby(loader, key=lambda batch: batch[0]):
            rows: List[Dict[str, Any]] = []
            for batch in batches:
                rows += _rows(pipe, batch, options)
                bar.update(task, advance=len(batch[2]))
            with atomic_path(_part(folder, part)) as path:
                path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows), encoding='ascii')
    if world > 1:
        dist.barrier()
    num_rows, num_skipped = on_main(lambda: _finish(folder, output, run))
    skipped = _skipped_path(output) if num_skipped else None
    return TableReport(output, skipped, num_rows, num_skipped, resumed, time.monotonic() - start)


def _open(folder: Path, output: Path, wanted: Dict[str, Any], part_size: int) -> Tuple[Dict[str, Any], List[int]]:
    """The run on disk, new or found, and the numbers of the parts that it lacks. Called by one process only."""
    try:
        if (folder / 'run.json').exists():
            run = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
            # through JSON, as the stored ones went
            changed = [key for key, value in json.loads(json.dumps(wanted)).items() if run.get(key) != value]
            if changed:
                raise InputError(
                    f"'{folder}' holds parts of another run (other {', '.join(changed)}): "
                    'give another output, or delete that folder')
        elif output.exists():
            raise InputError(f"'{output}' is there already: give another output, or delete it")
        else:
            num_files = _list_files(wanted['inputs'], folder / 'inputs.jsonl')
            run = {**wanted, 'part_size': part_size, 'num_files': num_files}
            with atomic_path(folder / 'run.json') as path:
                path.write_text(json.dumps(run, indent=2) + '\n', encoding='utf-8')
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written ({error.strerror}): give another output") from error
    number = -(-run['num_files'] // run['part_size'])
    done = {file.name for file in folder.glob('[0-9]*.jsonl')}
    return run, [part for part in range(number) if _part(folder, part).name not in done]


def _list_files(inputs: Sequence[str], path: Path) -> int:
    number = 0
    try:
        with atomic_path(path) as temporary, open(temporary, 'w', encoding='ascii') as file:
            for item in files_of(inputs):
                if isinstance(item, InputError):
                    raise item
                file.write(json.dumps(item) + '\n')  # quoted: a name may have line breaks, or bytes that are no text
                number += 1
    except InputError:
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
        raise
    return number


def _places(inputs: Path, parts: Sequence[int], part_size: int, batch_size: int) -> Iterator[List[_Place]]:
    """The files of the given parts (rising numbers), a batch at a time; no batch goes over the end of its part."""
    with open(inputs, encoding='ascii') as lines:
        position = 0
        for part in parts:
            start = part * part_size
            mine = itertools.islice(lines, start - position, start - position + part_size)
            position = start + part_size
            while batch := [(part, json.loads(line)) for line in itertools.islice(mine, batch_size)]:
                yield batch


class _Decoded(Dataset):
    """Decodes what it is asked for; the sampler says what. Lives in the worker processes."""

    def __init__(self, preparer: Callable[[str], Any]) -> None:
        self.preparer = preparer

    def __getitem__(self, place: _Place) -> Tuple[_Place, Optional[torch.Tensor], Any, Optional[str]]:
        try:
            return place, *self.preparer(place[1]), None
        except InputError as error:
            return place, None, None, str(error)


def _collate(items: List[Tuple[_Place, Optional[torch.Tensor], Any, Optional[str]]]) -> _Batch:
    tensors = [tensor for _, tensor, _, _ in items if tensor is not None]
    files = [(path, facts, fault) for (_, path), _, facts, fault in items]
    return items[0][0][0], torch.stack(tensors) if tensors else None, files


def _rows(pipe: Pipeline, batch: _Batch, options: Dict[str, Any]) -> List[Dict[str, Any]]:
    """A row for each file of the batch, in order: predictions, or the error."""
    _, tensor, files = batch
    good = [facts for _, facts, fault in files if fault is None]
    predicted = iter(pipe.rows(tensor, good, **options) if tensor is not None else ())
    return [next(predicted) if fault is None else {'error': fault, 'source': path} for path, _, fault in files]


def _finish(folder: Path, output: Path, run: Dict[str, Any]) -> Tuple[int, int]:
    """Put the parts together; the table appears whole. Returns how many rows it has and how many files were skipped."""
    parts = [_part(folder, part) for part in range(-(-run['num_files'] // run['part_size']))]
    num_skipped = sum(line.startswith(_SKIPPED) for line in _lines(parts))
    if num_skipped:
        with atomic_path(_skipped_path(output)) as path, open(path, 'wb') as file:
            file.writelines(line for line in _lines(parts) if line.startswith(_SKIPPED))
    with atomic_path(output) as path:
        if output.suffix == '.parquet':
            num_rows = _write_parquet(parts, path)
        else:
            with open(path, 'wb') as file:
                num_rows = _write_lines(parts, file)
    # Renamed first: a kill while it is deleted must not leave half a run to go on with.
    old = folder.with_name(f'{folder.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)
    return num_rows, num_skipped


def _lines(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with open(part, 'rb') as file:
            yield from file


def _write_lines(parts: Sequence[Path], file: BinaryIO) -> int:
    number = 0
    for line in _lines(parts):
        if not line.startswith(_SKIPPED):
            file.write(line)
            number += 1
    return number


def _write_parquet(parts: Sequence[Path], path: Path) -> int:
    """One row group a part, so that memory holds one part at a time."""
    pa = import_extra('pyarrow', 'parquet')
    parquet = import_extra('pyarrow.parquet', 'parquet')
    prediction = pa.struct([('label', pa.string()), ('index', pa.int32()), ('probability', pa.float32())])
    # rows of classification, the one task that writes tables so far
    schema = pa.schema([
        ('source', pa.string()), ('model', pa.string()), ('width', pa.int32()), ('height', pa.int32()),
        ('predictions', pa.list_(prediction)), ('warnings', pa.list_(pa.string()))])
    number = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            rows = [json.loads(line) for line in _lines([part]) if not line.startswith(_SKIPPED)]
            for row in rows:  # Parquet's strings are UTF-8; a file's name need not be
                row['source'] = os.fsencode(row['source']).decode('utf-8', 'backslashreplace')
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
            number += len(rows)
    return number


def _part(folder: Path, part: int) -> Path:
    return folder / f'{part:08}.jsonl'


def _skipped_path(output: Path) -> Path:
    return output.with_name(f'{output.stem}.skipped.jsonl')


def _files_in(run: Dict[str, Any], part: int) -> int:
    return min(run['part_size'], run['num_files'] - part * run['part_size'])


def _default_workers(num_files: int, batch_size: int) -> int:
    """One less than this process's cores, which run the model; none where starting them costs more than it gains."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    cores //= int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return 0 if num_files <= batch_size else max(0, min(8, cores - 1))


def _fingerprint(model: torch.nn.Module) -> int:
    """CRC-32 of all weights: parts of two trainings must not end up in one table."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc
