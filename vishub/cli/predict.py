"""`vishub predict`."""
import ast
import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import typer

from vishub.cli.root import LOOK, app

if TYPE_CHECKING:
    from vishub.tasks.base import Pipeline


@app.command('predict', rich_help_panel=LOOK)
def predict(
        model: str = typer.Argument(..., help="Model name, e.g. favit_b2.cifar10; 'vishub list' shows them."),
        inputs: List[str] = typer.Argument(
            ..., metavar='INPUT...',
            help="What the model's task takes: pictures, folders of them, or patterns such as 'photos/**/*.jpg'."),
        option: List[str] = typer.Option(
            [], metavar='NAME=VALUE', help="Option of the task's pipeline, as in seed=3; repeatable."),
        output: Optional[Path] = typer.Option(
            None, help='Table (.jsonl, .parquet), or folder for NAME.prediction.json and NAME.prediction.png.'),
        as_json: bool = typer.Option(False, '--json', help='Print one JSON array and nothing else on stdout.'),
        device: Optional[str] = typer.Option(None, help='cpu, cuda, cuda:1 or mps; the best one here by default.'),
        top_k: Optional[int] = typer.Option(None, min=1, help='Of a classifier: how many classes; 5 by default.'),
        heatmap: bool = typer.Option(
            False, '--heatmap', help='Of a classifier: where the evidence for the first class lies.'),
        batch_size: int = typer.Option(32, min=1, help='For a table: pictures a forward pass.'),
        workers: Optional[int] = typer.Option(
            None, min=0, help='For a table: processes that decode; one less than there are cores by default.'),
        part_size: int = typer.Option(1024, min=1, help='For a table: files a part, which a kill costs at most.'),
) -> None:
    """Run a model on inputs: say what is in pictures, or whatever its task is.

    An input that cannot be used is reported on stderr in one sentence and the others go on; the exit code is then 1,
    or 2 if none could be used.

    A table may be of any number of pictures. The same command continues one that was stopped, even by kill -9; under
    torchrun or accelerate launch the processes share the work.
    """
    import vishub
    from vishub.tasks.batch import TABLE_SUFFIXES

    options = _options(option)
    options.update({} if top_k is None else {'top_k': top_k}, **({'heatmap': True} if heatmap else {}))
    if output is not None and output.suffix in TABLE_SUFFIXES and not output.is_dir():
        if as_json or heatmap:
            raise vishub.InputError(f"--json and --heatmap do not go into a table; leave them out, or '{output}'")
        _predict_table(
            model, inputs, output, device, batch_size=batch_size, workers=workers, part_size=part_size, **options)
        return
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise vishub.InputError('several processes can only share the work of a table: give --output results.jsonl')
    from vishub.tasks.batch import predict_files

    pipe = vishub.pipeline(model=model, device=device)
    _check_options(pipe, options)
    results = []  # for JSON only: pictures are large
    done = failed = 0
    for path, outcome in predict_files(pipe, inputs, output, **options):
        if isinstance(outcome, vishub.InputError):
            failed += 1
            typer.echo(f'vishub: {outcome}', err=True)
            continue
        done += 1
        if as_json:
            results.append(outcome.to_dict())
        for warning in outcome.warnings:
            typer.echo(f'vishub: {path}: {warning}', err=True)
        if not as_json:
            typer.echo(path)
            for line in outcome.summary():
                typer.echo(f'  {line}')
    if as_json:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
    if failed:
        raise typer.Exit(1 if done else 2)


def _options(words: List[str]) -> Dict[str, Any]:
    """`['seed=3', 'name=cat']` as `{'seed': 3, 'name': 'cat'}`: Python's literals, else text."""
    from vishub.errors import InputError

    options: Dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition('=')
        if not (equals and name.isidentifier()):
            raise InputError(f"--option '{word}' is not name=value, as in seed=3")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options


def _check_options(pipe: 'Pipeline', options: Dict[str, Any]) -> None:
    from vishub.errors import InputError

    first, *known = inspect.signature(pipe.__call__).parameters.values()  # the first is the input
    names = [parameter.name for parameter in known if parameter.name != 'progress']
    for name in options:
        if name not in names:
            raise InputError(f"{pipe.task} has no option '{name}'; it has {', '.join(names)}")


def _predict_table(model: str, inputs: List[str], output: Path, device: Optional[str], **options: Any) -> None:
    import itertools
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    import vishub
    from vishub.tasks.table import predict_table

    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        try:  # on the CPU, for only lists of parts are exchanged; a process may wait long for one with a slower share
            dist.init_process_group('gloo', timeout=timedelta(days=7))
        except ValueError as error:
            raise vishub.InputError(f'start several processes with torchrun or accelerate launch ({error})') from error
        if device is None and torch.cuda.is_available():
            device = f'cuda:{int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()}'
    try:
        report = predict_table(vishub.pipeline(model=model, device=device), inputs, output, **options)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if rank == 0:
        if report.skipped is not None:
            with open(report.skipped, encoding='ascii') as lines:
                for line in itertools.islice(lines, 10):
                    typer.echo(f'vishub: {json.loads(line)["error"]}', err=True)
            typer.echo(f'vishub: {report.num_skipped:,} skipped, all listed in {report.skipped}', err=True)
        now = report.num_rows + report.num_skipped - report.num_resumed
        before = f', {report.num_resumed:,} of them before' if report.num_resumed else ''
        typer.echo(
            f'{report.output}: {report.num_rows:,} pictures{before}, {report.seconds:.1f} s, '
            f'{now / report.seconds:.1f} files/s')
    # A launcher takes any code but 0 for a process that died, and may start all of them again.
    if report.num_skipped and (world == 1 or not report.num_rows):
        raise typer.Exit(1 if report.num_rows else 2)
