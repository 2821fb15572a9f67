"""`vishub evaluate`."""
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import typer
from rich.console import Console
from rich.table import Table

from vishub.cli.root import TRAIN, app


@app.command('evaluate', rich_help_panel=TRAIN)
def evaluate_command(
        model: str = typer.Argument(help='Name, e.g. favit_b2.cifar10, or folder of weights.'),
        data: str = typer.Option(
            ..., help="Data of the model's task; of a classifier: image folder, CSV (path,label), hf:org/name, "
            'CIFAR-10 or Fashion-MNIST folder, packed (.npz).'),
        split: str = typer.Option('test', help='Of a classifier: test or val.'),
        peer: List[str] = typer.Option([], help='Another model, measured on the same data; repeatable.'),
        limit: Optional[int] = typer.Option(None, min=1, help='Not of a classifier: measure at most so many samples.'),
        robust: bool = typer.Option(
            False, '--robustness', help='Of a classifier: also under noise, blur, contrast and occlusion.'),
        robustness_images: int = typer.Option(2000, min=1, help='Evenly spread images that robustness is measured on.'),
        output: Optional[Path] = typer.Option(
            None, help='Folder for evaluation.json and plots (of a classifier: confusion, calibration, robustness).'),
        write_card: bool = typer.Option(
            False, '--update-card', help="Write the figures into the weights folder's metrics.json and README.md."),
        as_json: bool = typer.Option(False, '--json', help='Print the report as JSON and nothing else on stdout.'),
        batch_size: Optional[int] = typer.Option(
            None, min=1, help="Samples a forward pass; the task's own choice by default."),
        seed: int = typer.Option(0, help='Seed of what is random, such as corruptions.'),
        device: Optional[str] = typer.Option(None, help='cpu, cuda, cuda:1 or mps; the best one here by default.'),
) -> None:
    """Measure a model on data, and peers beside it, as its task's field measures.

    Of a classifier: accuracy, calibration, each class; if asked, robustness.
    """
    from rich.progress import Progress

    from vishub.errors import InputError
    from vishub.hub.find import weights_folder
    from vishub.tasks.base import pipeline_class, task_of
    from vishub.training.loop import rehearse

    task = task_of(model)
    pipeline_class(task)  # says so if the task has none yet
    evaluation = importlib.import_module(f'vishub.tasks.{task}.metrics')
    folder = weights_folder(model)
    if write_card and folder is None:
        raise InputError(f"'{model}' has no folder here whose card could be written")
    for place in filter(None, (output, folder if write_card else None)):
        rehearse(place)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task('measuring', total=None)
        options: Dict[str, Any] = {} if batch_size is None else {'batch_size': batch_size}
        source: Any = data
        if task == 'classification':
            from vishub.tasks.classification.data import load_data

            source = load_data(data)
            options.update(split=split, robustness_images=robustness_images if robust else 0)
        else:
            options.update(limit=limit)
        report = evaluation.evaluate(
            [model, *peer], source, seed=seed, device=device,
            progress=lambda done, total: bars.update(bar, completed=done, total=total), **options)
    if output is not None:
        evaluation.save_evaluation(report, output)
    if write_card:
        evaluation.update_card(folder, report)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    unit = 'images' if task == 'classification' else 'samples'
    typer.echo(f'{report["data"]}, {report["split"]}, {report["num_test"]:,} {unit}')
    # into a file as wide as the names want
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(_classifier_table(report) if task == 'classification' else _table(report))
    if 'robustness' in report:
        console.print(_robustness_table(report['robustness']))
    for place in filter(None, (output, folder if write_card else None)):
        typer.echo(f'written: {place}')


def _rows(report: Dict[str, Any]) -> List[Dict[str, Any]]:
    return [{**report, 'name': report['model']}, *report.get('peers', [])]


def _table(report: Dict[str, Any]) -> Table:
    """Any task's report: a column for each of the model's figures that is one number."""
    names = [name for name, value in report['metrics'].items() if isinstance(value, (int, float))]
    table = Table(box=None, header_style='bold', pad_edge=False)
    for column in ('Model', 'Parameters', *names):
        table.add_column(column, overflow='fold', justify='left' if column == 'Model' else 'right')
    for row in _rows(report):
        figures = (row['metrics'].get(name) for name in names)
        size = row.get('num_params')
        table.add_row(
            row['name'], '–' if size is None else f'{size:,}',
            *('–' if figure is None else f'{figure:,.5g}' for figure in figures))
    return table


def _classifier_table(report: Dict[str, Any]) -> Table:
    table = Table(box=None, header_style='bold', pad_edge=False)
    for column in ('Model', 'Parameters', 'Top-1 %', '95 % interval', 'Top-5 %', 'ECE'):
        table.add_column(column, overflow='fold', justify='left' if column == 'Model' else 'right')
    for row in _rows(report):
        figures = row['metrics']
        low, high = figures['top1_ci95']
        table.add_row(
            row['name'], f'{row["num_params"]:,}', f'{figures["top1"]:.2f}', f'{low:.2f} to {high:.2f}',
            f'{figures["top5"]:.2f}' if 'top5' in figures else '–', f'{figures["ece"]:.4f}')
    return table


def _robustness_table(measured: Dict[str, Any]) -> Table:
    table = Table(
        title=f'Top-1 % by severity, {measured["num_images"]:,} images', title_justify='left', box=None,
        header_style='bold', pad_edge=False)
    table.add_column('Model', overflow='fold')
    table.add_column('Corruption')
    for severity in measured['severities']:
        table.add_column(str(severity) if severity else 'clean', justify='right')
    for name, kinds in measured['models'].items():
        for kind, values in kinds.items():
            table.add_row(name, kind, *(f'{value:.1f}' for value in values))
    return table
