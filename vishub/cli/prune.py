"""`vishub prune`."""
import json
import sys
from pathlib import Path
from typing import Optional

import typer
from rich.console import Console

from vishub.cli.root import TRAIN, app


@app.command('prune', rich_help_panel=TRAIN)
def prune_command(
        model: str = typer.Argument(help='A trained ViT or DeiT: a name with weights, or local-dir:FOLDER.'),
        data: str = typer.Option(
            ..., help='Image folder, CSV (path,label), hf:org/name, CIFAR-10 or Fashion-MNIST folder, packed (.npz).'),
        output: Path = typer.Option(..., help='Folder in which nvit.TAG, the pruned weights, is made.'),
        target_latency: Optional[float] = typer.Option(None, help="Share of the blocks' time on this device, 0 to 1."),
        target_flops: Optional[float] = typer.Option(None, help='Multiply-accumulates: a share, 0 to 1, or a number.'),
        target_params: Optional[float] = typer.Option(None, help='Parameters: a share, 0 to 1, or a number.'),
        interval: int = typer.Option(20, help='Batches between two pruning steps.'),
        groups_per_step: Optional[int] = typer.Option(None, help='Groups of units a step; 1 % of all by default.'),
        prune_lr: float = typer.Option(1e-4, help='Learning rate while pruning; 0 leaves the weights as they are.'),
        latency_weight: float = typer.Option(5e-4, help='Reward of a saved cost; small models want less, as 2e-5.'),
        epochs: int = typer.Option(5, help='Epochs of fine-tuning; 0 for none.'),
        lr: float = typer.Option(1e-4, help='Peak learning rate of the fine-tuning.'),
        batch_size: int = typer.Option(128, help='Images a step.'),
        max_images: Optional[int] = typer.Option(None, help='Use at most so many training images, evenly spread.'),
        labels_only: bool = typer.Option(
            False, '--labels-only', help="Train on the labels alone, without the unpruned model's answers."),
        teacher: Optional[str] = typer.Option(
            None, help='A classifier of the same classes, whose top answers teach (the distillation head) too.'),
        augmentation: str = typer.Option('light', help='none, light, medium or heavy.'),
        amp: str = typer.Option('no', help='Of the fine-tuning: no, bf16 or fp16.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        seed: int = typer.Option(0, help='Seed of all randomness.'),
        device: Optional[str] = typer.Option(None, help='cpu, cuda or mps; the best one here by default.'),
        as_json: bool = typer.Option(False, '--json', help='Print the report as JSON and nothing else on stdout.'),
        progress: bool = typer.Option(True, help='Show progress bars.'),
) -> None:
    """Prune a trained vision transformer to a target, fine-tune it, and measure it before and after.

    Give one target. Writes OUTPUT/nvit.TAG/: weights that timm loads by local-dir:, model card, pruning.json,
    pruning.png (what is left of each block). The method is NViT's (arXiv 2110.04869).
    """
    import shlex

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vishub.pruning.classifier import ClassifierPruning, prune_classifier

    options = ClassifierPruning(
        target_latency=target_latency, target_flops=target_flops, target_params=target_params, interval=interval,
        groups_per_step=groups_per_step, latency_weight=latency_weight, prune_lr=prune_lr, epochs=epochs, lr=lr,
        batch_size=batch_size, max_images=max_images, labels_only=labels_only, teacher=teacher,
        augmentation=augmentation, amp=amp, tag=tag, seed=seed, device=device,
        command='vishub ' + shlex.join(sys.argv[1:]))
    columns = (TextColumn('{task.description}'), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bars:
        bar = bars.add_task('reading', total=None)

        def tell(what: str, share: float) -> None:
            if what == 'fine-tuning':  # has a bar of its own
                bars.stop()
            else:
                bars.start()
            bars.update(bar, description=what, completed=share, total=1)

        result = prune_classifier(model, data, output, options, progress=tell, show_training=progress)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
        return
    report = result.report
    typer.echo(report.table())
    accuracy = report.accuracy
    for name, (before, after), unit in (
            ('MACs', report.macs, ''), ('parameters', report.params, ''),
            ('a batch', [1000 * seconds for seconds in report.seconds], ' ms')):
        figures = (f'{value:,.2f}' if unit else f'{value:,}' for value in (before, after))
        typer.echo(f'{name}: {" → ".join(figures)}{unit} ({after / before:.3f})')
    typer.echo(
        f'top-1 on the {result.split}: {accuracy["original"]:.2f} % before, {accuracy["dense"]:.2f} % pruned, '
        f'{accuracy["stored"]:.2f} % {"fine-tuned" if epochs else "stored"}')
    typer.echo(f'weights and figures: {result.folder}')
