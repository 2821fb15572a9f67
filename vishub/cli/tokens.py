"""`vishub tokens compare`."""
import json
import sys
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console
from rich.table import Table

from vishub.cli.root import tokens_app


@tokens_app.command('compare')
def tokens_compare(
        model: str = typer.Argument(help='Model with weights: a name of timm, vishub/NAME, or local-dir:FOLDER.'),
        data: Path = typer.Option(..., help='Image folder, CIFAR-10 or Fashion-MNIST folder, packed CIFAR-10 (.npz).'),
        methods: Optional[str] = typer.Option(
            None, help='Methods with commas between, as in tome,random; all that need no training by default.'),
        target: Optional[float] = typer.Option(None, help="Share of the model's multiply-accumulates [default: 0.65]."),
        targets: Optional[str] = typer.Option(None, help='Several shares for the plot, as in 1.0,0.8,0.65,0.5,0.35.'),
        search: int = typer.Option(
            0, min=0, help="Also search each method's schedule and options on training images with so many trials."),
        tune_steps: int = typer.Option(
            0, min=0, help='Also train PYRA (and ToMe alike, without gates) on training images for so many steps.'),
        split: Optional[str] = typer.Option(None, help='test, val or all; the test split by default, else val.'),
        limit: Optional[int] = typer.Option(None, help='At most so many images, evenly spread.'),
        output: Optional[Path] = typer.Option(None, help='Folder for tokens_accuracy_DATA.md, .json and .png.'),
        as_json: bool = typer.Option(False, '--json', help='Print the report as JSON and nothing else on stdout.'),
        batch_size: int = typer.Option(64, help='Images a forward pass.'),
        rounds: int = typer.Option(7, help='Timed rounds; 0 measures no speed.'),
        seed: int = typer.Option(0, help='Seed of random methods and the search.'),
        device: Optional[str] = typer.Option(None, help='cpu, cuda, cuda:1 or mps; the best one here by default.'),
) -> None:
    """Compare token reduction methods at equal multiply-accumulates: accuracy, latency and throughput."""
    import shlex

    from rich.progress import Progress

    from vishub.errors import InputError, import_extra
    from vishub.tasks.classification.data import load_data
    from vishub.tokens.compare import compare
    from vishub.tokens.comparison import comparison_cells, save_comparison
    from vishub.tokens.method import find_method
    from vishub.training.loop import rehearse

    chosen = None if methods is None else [name.strip() for name in methods.split(',') if name.strip()]
    for name in chosen or ():
        find_method(name)  # before data are read
    try:
        shares = [float(share) for share in (targets or '').split(',') if share.strip()]
    except ValueError as error:
        raise InputError(f"--targets is '{targets}'; give shares in (0, 1] with commas between, as 0.8,0.5") from error
    if target is not None or not shares:
        shares.append(0.65 if target is None else target)
    if output is not None:
        import_extra('matplotlib', 'train')  # for the plot, hours before it is drawn
        rehearse(output)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task('reading', total=None)
        report = compare(
            model, load_data(data), methods=chosen, targets=shares, split=split, limit=limit, batch_size=batch_size,
            rounds=rounds, search_trials=search, tune_steps=tune_steps, device=device, seed=seed,
            progress=lambda what, done, total: bars.update(bar, description=what, completed=done, total=total))
    if output is not None:
        save_comparison(report, output, 'vishub ' + shlex.join(sys.argv[1:]))
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    typer.echo(f'{report["model"]} on {report["data"]}, {report["split"]}, {report["num_images"]:,} images')
    head, body = comparison_cells(report)
    table = Table(box=None, header_style='bold', pad_edge=False)
    for column in head:
        table.add_column(column, overflow='fold', justify='left' if column == 'Method' else 'right')
    for row, cells in zip(report['rows'], body):
        table.add_row(*cells, style='bold' if row['method'] == 'none' else None)
    # into a file as wide as the table wants
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)
    for note in report['notes']:
        typer.echo(note)
    if output is not None:
        typer.echo(f'written: {output}')
