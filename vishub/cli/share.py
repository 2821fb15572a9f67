"""`vishub convert`, `vishub publish`, `vishub download`."""
import json
from pathlib import Path
from typing import Optional

import typer

from vishub.cli.root import SHARE, app


@app.command('convert', rich_help_panel=SHARE)
def convert_command(
        name: str = typer.Argument(help='Family (favit: the shapes tell the variant) or model (favit_b2).'),
        checkpoint: Path = typer.Argument(help='Official checkpoint: .pth, .pt or .safetensors.'),
        output: Path = typer.Option(..., help='New folder of weights, e.g. favit_b2.official.'),
) -> None:
    """Turn an official checkpoint into a folder of safetensors that timm loads (local-dir:FOLDER).

    The file is read as data: one that would run code is refused.
    """
    from vishub.hub.convert import convert

    done = convert(name, checkpoint, output)
    classes = f', {done.num_classes} classes' if done.num_classes else ''
    taken = f' (entry {done.entry})' if done.entry else ''
    typer.echo(f'{done.architecture}{classes}{taken}: {done.folder}')
    typer.echo(f'licence of the weights: {done.licence}')


@app.command('publish', rich_help_panel=SHARE)
def publish_command(
        folder: Optional[Path] = typer.Argument(None, metavar='[DIR]', help='A weights folder.'),
        repo: Optional[str] = typer.Option(None, metavar='ORG/NAME', help='Hub repository; made if it is not there.'),
        everything: bool = typer.Option(False, '--all', help='Publish every folder of weights/, and the demo Space.'),
        org: str = typer.Option('vishub', help='With --all: organisation or user to publish to.'),
        private: bool = typer.Option(False, '--private', help='Make the repository a private one.'),
        revision: Optional[str] = typer.Option(None, help='Branch to commit to; main by default.'),
        dry_run: bool = typer.Option(False, '--dry-run', help='Check everything and say what would be sent.'),
        as_json: bool = typer.Option(False, '--json', help='Print a JSON list and nothing else on stdout.'),
) -> None:
    """Publish weights to the Hugging Face Hub, with a model card; only what is new or different is sent.

    Needs a token that may write (HF_TOKEN, or `hf auth login`); HF_ENDPOINT names another Hub. After a kill, the same
    command goes on.
    """
    from vishub.errors import InputError
    from vishub.hub.publish import publish, publish_all

    if everything and (folder or repo or revision):
        raise InputError('--all publishes every folder of weights/ to --org: leave DIR, --repo and --revision out')
    if not everything and not (folder and repo):
        raise InputError('say what to publish where: vishub publish DIR --repo ORG/NAME, or vishub publish --all')
    done = publish_all(org, private=private, dry_run=dry_run) if everything else (
        publish(path, repo, private=private, revision=revision, dry_run=dry_run) for path in [folder])
    results = []
    for result in done:
        results.append(result.to_dict())
        if as_json:
            continue
        what = 'would send' if dry_run else 'sent'
        typer.echo(
            f'{result.url}: {what} {len(result.uploaded)} files, {result.size / 1e6:.1f} MB; '
            f'{len(result.unchanged)} unchanged{"" if result.compared else " (the Hub was not asked)"}')
        if dry_run:
            for path in result.uploaded:
                typer.echo(f'  {path}')
    if as_json:
        typer.echo(json.dumps(results, indent=2))


@app.command('download', rich_help_panel=SHARE)
def download_command(
        name: str = typer.Argument(help='Weights, e.g. favit_b2.cifar10, or a Hub repository, hf-hub:ORG/NAME[@REV].'),
        output: Optional[Path] = typer.Option(
            None, help='Folder in which the folder of weights is made; the Hub cache by default.'),
) -> None:
    """Fetch weights with card and figures, verify them, and print the folder they lie in."""
    from vishub.hub.download import download

    typer.echo(download(name, output))
