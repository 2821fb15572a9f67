"""`vishub list`, `vishub info`, `vishub demo`."""
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Optional

import typer
from rich.console import Console
from rich.table import Table

from vishub.cli.root import LOOK, app


@app.command('list', rich_help_panel=LOOK)
def list_command(
        task: Optional[str] = typer.Option(None, help='Only models for this task, e.g. classification.'),
        pretrained: bool = typer.Option(False, '--pretrained', help='Only models that have trained weights.'),
        as_json: bool = typer.Option(False, '--json', help='Print a JSON list.'),
        markdown: bool = typer.Option(
            False, '--markdown', help='Print tables as README has them: models, or --pretrained weights and peers.'),
) -> None:
    """List the models: what each is for, its default input, and the weights it has with their main figure."""
    from vishub.listing import figure, markdown_table, model_rows, peers_table, weights_table

    if markdown:
        typer.echo(f'{weights_table()}\n{peers_table()}' if pretrained else markdown_table(), nl=False)
        return
    rows = model_rows(task, pretrained)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, header_style='bold', pad_edge=False)
    longest = max((len(row['name']) for row in rows), default=0)
    for column in ('Model', 'Task', 'Input', 'Weights'):
        # a name that is cut cannot be typed
        table.add_column(column, no_wrap=column != 'Task', min_width=longest if column == 'Model' else None)
    for row in rows:
        weights = [f'.{weight["name"].partition(".")[2]} {figure(weight)}' for weight in row['weights']]
        table.add_row(
            row['name'], row['task'], 'x'.join(map(str, row['input'])), '\n'.join(weights) or '–')
    Console(highlight=False, markup=False).print(table)
    typer.echo(f'{len(rows)} models. More about one: vishub info MODEL')


@app.command('info', rich_help_panel=LOOK)
def info_command(
        model: str = typer.Argument(
            help='A model, e.g. favit_b2, weights, e.g. favit_b2.cifar10, or a Hub repository, hf-hub:ORG/NAME[@REV].'),
        as_json: bool = typer.Option(False, '--json', help='Print a JSON object.'),
) -> None:
    """Show one model: size, multiply-accumulates, input, paper, licence, and its weights with their figures."""
    if model.startswith('hf-hub:'):
        _show_repository(model, as_json)
        return
    from vishub.listing import figure, model_info

    info = model_info(model)
    if as_json:
        typer.echo(json.dumps(info, indent=2))
        return
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style='bold', no_wrap=True)
    facts.add_column(overflow='fold')
    repository = f'https://github.com/{info["repository"]}' if info['repository'] else 'none'
    for name, value in (
            ('Model', info['name']),
            ('Task', info['task']),
            ('Input', 'x'.join(map(str, info['input']))),
            ('Parameters', f'{info["num_params"]:,}'),
            ('MACs', f'{info["macs"] / 1e9:.3f} G at that input'),
            ('Paper', f'{info["paper"]} (https://arxiv.org/abs/{info["arxiv"]})'),
            ('Official code', f'{repository} ({info["code_licence"]})'),
            ('Notes', info['notes']),
    ):
        facts.add_row(name, value)
    for weight in info['weights']:
        lines = [
            f'{figure(weight)} on {weight["data"]}, {weight["size"] / 1e6:.1f} MB, {weight["licence"]}',
            f'SHA-256 {weight["sha256"]}',
            weight['folder'] or f'Hub: {weight["hub_id"]}',
        ]
        facts.add_row(weight['name'], '\n'.join(lines))
    if not info['weights']:
        facts.add_row('Weights', 'none')
    Console(highlight=False, markup=False).print(facts)


def _show_repository(hub_id: str, as_json: bool) -> None:
    from vishub.hub.download import repository_info

    info = repository_info(hub_id)
    if as_json:
        typer.echo(json.dumps(info, indent=2))
        return
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style='bold', no_wrap=True)
    facts.add_column(overflow='fold')
    figures = {key: value for key, value in (info['metrics'] or {}).items() if isinstance(value, (int, float))}
    for name, value in (
            ('Repository', f'{info["repository"]} ({"private" if info["private"] else "public"})'),
            ('Commit', f'{info["revision"]}, {info["last_modified"] or "date unknown"}'),
            ('Model', info['architecture']),
            ('Input', info['input'] and 'x'.join(map(str, info['input']))),
            ('Classes', info['num_classes']),
            ('Parameters', info['num_params'] and f'{info["num_params"]:,}'),
            ('Licence', info['licence']),
            ('Data', info['data']),
            ('Figures', ', '.join(f'{key} {value:g}' for key, value in figures.items())),
            ('SHA-256', info['sha256']),
            ('Files', '\n'.join(f'{path} {size:,} bytes' for path, size in info['files'].items())),
    ):
        facts.add_row(name, str(value) if value else '–')
    Console(highlight=False, markup=False).print(facts)


@app.command('demo', rich_help_panel=LOOK)
def demo(
        host: str = typer.Option('127.0.0.1', help='Address to listen at; 0.0.0.0 for all of this machine.'),
        port: int = typer.Option(7860, help='Port to listen at.'),
        open_browser: bool = typer.Option(False, '--open/--no-open', help='Open the page in your browser.'),
) -> None:
    """Serve the demo page: try the models on your own pictures. Set VISHUB_WEIGHTS to folders of your own weights."""
    from vishub.errors import import_extra

    import_extra('gradio', 'app')
    _import_demo().launch(host=host, port=port, open_browser=open_browser)


def _import_demo() -> ModuleType:
    """The demo's main module: `vishub._app` of the wheel, or the folder `app/` of the checkout under that name."""
    name = 'vishub._app'
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        folder = Path(__file__).resolve().parents[2] / 'app'
        spec = importlib.util.spec_from_file_location(
            name, folder / '__init__.py', submodule_search_locations=[str(folder)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f'{name}.main')
