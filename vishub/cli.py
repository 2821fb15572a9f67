"""The `vishub` command. Every verb is a thin call into the packages; heavy imports happen inside the verb.

Exit codes: 0 done, 1 a fault in vishub (with a traceback), 2 something the user can put right (one sentence).
"""
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Optional, Sequence

import typer
from rich.console import Console
from rich.table import Table

__all__ = ['app', 'main']

# Headings of `vishub --help`.
_LOOK = 'Look at models and run them'
_TRAIN = 'Train, measure, make smaller'
_SHARE = 'Weights from and for others'

app = typer.Typer(
    name='vishub',
    help='A hub of vision models for PyTorch: look at them, run them, train and shrink them, share the weights.',
    epilog='Errors are one sentence; set VISHUB_DEBUG=1 for the traceback.',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode='rich',
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)


@app.callback()
def _vishub() -> None:
    # Keeps the verbs verbs: typer would make a lone one the whole command.
    pass


@app.command('list', rich_help_panel=_LOOK)
def list_command(
        task: Optional[str] = typer.Option(None, help='Only models for this task, e.g. classification.'),
        pretrained: bool = typer.Option(False, '--pretrained', help='Only models that have trained weights.'),
        as_json: bool = typer.Option(False, '--json', help='Print a JSON list.'),
        markdown: bool = typer.Option(False, '--markdown', help='Print the table of all models as README has it.'),
) -> None:
    """List the models: what each is for, its default input, and the weights it has with their main figure."""
    from vishub.listing import figure, markdown_table, model_rows

    if markdown:
        typer.echo(markdown_table(), nl=False)
        return
    rows = model_rows(task, pretrained)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, header_style='bold', pad_edge=False)
    for column in ('Model', 'Task', 'Input', 'Weights'):
        table.add_column(column, no_wrap=column != 'Task')
    for row in rows:
        weights = [f'.{weight["name"].partition(".")[2]} {figure(weight)}' for weight in row['weights']]
        table.add_row(
            row['name'], row['task'], 'x'.join(map(str, row['input'])), '\n'.join(weights) or '–')
    Console(highlight=False, markup=False).print(table)
    typer.echo(f'{len(rows)} models. More about one: vishub info MODEL')


@app.command('info', rich_help_panel=_LOOK)
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


train_app = typer.Typer(no_args_is_help=True, help='Train a model on your data.')
app.add_typer(train_app, name='train', rich_help_panel=_TRAIN)


@train_app.command('classification')
def train_classification(
        model: str = typer.Option(..., help='Model name, e.g. favit_b2; any model of timm will do.'),
        data: str = typer.Option(
            ..., help='Image folder, CSV (path,label), hf:org/name, CIFAR-10 or Fashion-MNIST folder, packed (.npz).'),
        output: Path = typer.Option(..., help='Folder for the checkpoint, the logs and the finished weights.'),
        resolution: str = typer.Option('64:10', help='side:epochs, one after the other, as in 40:6,64:4.'),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in window_size=3; repeatable.'),
        pretrained: bool = typer.Option(
            False, '--pretrained', help='Start from trained weights; a head for other classes starts anew.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        batch_size: int = typer.Option(128, help='Images a process and forward pass.'),
        grad_accum: int = typer.Option(1, help='Forward passes an optimizer step.'),
        opt: str = typer.Option('adamw', help="Optimizer, by timm's names."),
        lr: float = typer.Option(1e-3, help='Peak learning rate.'),
        min_lr: float = typer.Option(1e-6, help='Last learning rate.'),
        warmup: float = typer.Option(0.05, help='Share of the steps with rising learning rate.'),
        weight_decay: float = typer.Option(0.05, help='Weight decay; never on vectors.'),
        clip_grad: float = typer.Option(1.0, help='Largest gradient norm; 0 for none.'),
        ema_decay: Optional[float] = typer.Option(None, help='Decay of the averaged weights; 0 for none.'),
        layer_decay: Optional[float] = typer.Option(
            None, help='Factor on the learning rate of each layer before the head, as in 0.75.'),
        schedule: str = typer.Option('cosine', help='cosine or onecycle.'),
        patience: int = typer.Option(
            0, help='Stop after so many validations without progress, and keep the best weights; 0 trains to the end.'),
        tracker: List[str] = typer.Option([], help='tensorboard, wandb, mlflow …; repeatable.'),
        augmentation: str = typer.Option(
            'medium', help='none, light, medium, heavy, or an albumentations .json or .yaml.'),
        freeze: List[str] = typer.Option([], help='Parameters not trained, as in stem or stages.0.*; repeatable.'),
        linear_probe: bool = typer.Option(False, '--linear-probe', help='Train the classifier alone.'),
        class_weights: Optional[str] = typer.Option(None, help='balanced: rare classes count as much as frequent.'),
        label_smoothing: float = typer.Option(0.1, help='Label smoothing.'),
        mixup: float = typer.Option(0.2, help='Alpha of mixup; 0 for none.'),
        cutmix: float = typer.Option(0.0, help='Alpha of cutmix; 0 for none.'),
        mix_prob: float = typer.Option(1.0, help='Share of the batches that are mixed.'),
        validate_on: str = typer.Option('val', help='val, test, or none (then all training images are trained on).'),
        in_chans: int = typer.Option(3, help='Channels of an image folder: 3, or 1 for grey.'),
        check: bool = typer.Option(True, help='Decode every file of an image folder once before training.'),
        amp: str = typer.Option('no', help='no, bf16 or fp16.'),
        device: str = typer.Option('auto', help='auto or cpu.'),
        compile: bool = typer.Option(False, '--compile', help='Use torch.compile.'),
        channels_last: bool = typer.Option(False, '--channels-last', help='Channels-last memory order.'),
        seed: int = typer.Option(0, help='Seed of all randomness.'),
        num_workers: int = typer.Option(0, help='Loader processes.'),
        num_threads: int = typer.Option(0, help="CPU threads; 0 for torch's own choice."),
        checkpoint_every: int = typer.Option(200, help='Steps between checkpoints; 0: at the ends of epochs only.'),
        validate_every: int = typer.Option(1, help='Epochs between validations; 0 for none.'),
        time_limit: float = typer.Option(0.0, help='Stop cleanly after so many minutes; 0 for no limit.'),
        resume: bool = typer.Option(True, help='Continue from the checkpoint in the output folder, if there is one.'),
        progress: bool = typer.Option(True, help='Show a progress bar.'),
) -> None:
    """Train an image classifier; the same command continues a run that was stopped.

    Writes OUTPUT/<model>.<tag>/ (weights in timm's Hub layout, with figures measured on them), log.csv, training.log
    and checkpoint.safetensors.
    """
    import shlex

    from vishub.tasks.classification.training import ClassificationRecipe, parse_model_args
    from vishub.training import TrainConfig, parse_resolution, train

    config = TrainConfig(
        output=output, resolution=parse_resolution(resolution), batch_size=batch_size, grad_accum=grad_accum, opt=opt,
        lr=lr, min_lr=min_lr, warmup=warmup, weight_decay=weight_decay, clip_grad=clip_grad, ema_decay=ema_decay,
        layer_decay=layer_decay, schedule=schedule, patience=patience, tracker=tuple(tracker),
        amp=amp, device=device, channels_last=channels_last, compile=compile, seed=seed, num_workers=num_workers,
        num_threads=num_threads, checkpoint_every=checkpoint_every, validate_every=validate_every,
        time_limit=time_limit, resume=resume, progress=progress)
    model_args = {**parse_model_args(model_arg), **({'pretrained': True} if pretrained else {})}
    recipe = ClassificationRecipe(
        model, data, model_args=model_args, augmentation=augmentation, freeze=freeze,
        linear_probe=linear_probe, class_weights=class_weights,
        label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix, mix_prob=mix_prob, validate_on=validate_on,
        in_chans=in_chans, check=check, seed=seed, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    result = train(recipe, config)
    if os.environ.get('RANK', '0') != '0':  # one of many processes: the main one speaks
        return
    if not result.finished:
        typer.echo(f'stopped at step {result.step}; the same command continues from {result.checkpoint}')
    else:
        typer.echo(f'weights and figures: {result.folder}')


@app.command('prune', rich_help_panel=_TRAIN)
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


@app.command('evaluate', rich_help_panel=_TRAIN)
def evaluate_command(
        model: str = typer.Argument(help='Name, e.g. favit_b2.cifar10, or folder of weights.'),
        data: str = typer.Option(
            ..., help='Image folder, CSV (path,label), hf:org/name, CIFAR-10 or Fashion-MNIST folder, packed (.npz).'),
        split: str = typer.Option('test', help='test or val.'),
        peer: List[str] = typer.Option([], help='Another model, measured on the same images; repeatable.'),
        robust: bool = typer.Option(False, '--robustness', help='Also under noise, blur, contrast and occlusion.'),
        robustness_images: int = typer.Option(2000, min=1, help='Evenly spread images that robustness is measured on.'),
        output: Optional[Path] = typer.Option(
            None, help='Folder for evaluation.json, confusion.png, calibration.png, robustness.png.'),
        write_card: bool = typer.Option(
            False, '--update-card', help="Write the figures into the weights folder's metrics.json and README.md."),
        as_json: bool = typer.Option(False, '--json', help='Print the report as JSON and nothing else on stdout.'),
        batch_size: int = typer.Option(250, min=1, help='Images a forward pass.'),
        seed: int = typer.Option(0, help='Seed of the corruptions.'),
        device: Optional[str] = typer.Option(None, help='cpu, cuda, cuda:1 or mps; the best one here by default.'),
) -> None:
    """Measure an image classifier: accuracy, calibration, each class; if asked, robustness, and peers beside it."""
    from rich.progress import Progress

    from vishub.errors import InputError
    from vishub.tasks.classification.data import load_data
    from vishub.tasks.classification.metrics import evaluate, save_evaluation, update_card, weights_folder
    from vishub.training.loop import rehearse

    folder = weights_folder(model)
    if write_card and folder is None:
        raise InputError(f"'{model}' has no folder here whose card could be written")
    for place in filter(None, (output, folder if write_card else None)):
        rehearse(place)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task('measuring', total=None)
        report = evaluate(
            [model, *peer], load_data(data), split=split, robustness_images=robustness_images if robust else 0,
            batch_size=batch_size, seed=seed, device=device,
            progress=lambda done, total: bars.update(bar, completed=done, total=total))
    if output is not None:
        save_evaluation(report, output)
    if write_card:
        update_card(folder, report)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    typer.echo(f'{report["data"]}, {report["split"]}, {report["num_test"]:,} images')
    table = Table(box=None, header_style='bold', pad_edge=False)
    for column in ('Model', 'Parameters', 'Top-1 %', '95 % interval', 'Top-5 %', 'ECE'):
        table.add_column(column, overflow='fold', justify='left' if column == 'Model' else 'right')
    for row in ({**report, 'name': report['model']}, *report['peers']):
        figures = row['metrics']
        low, high = figures['top1_ci95']
        table.add_row(
            row['name'], f'{row["num_params"]:,}', f'{figures["top1"]:.2f}', f'{low:.2f} to {high:.2f}',
            f'{figures["top5"]:.2f}' if 'top5' in figures else '–', f'{figures["ece"]:.4f}')
    # into a file as wide as the names want
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if 'robustness' in report:
        console.print(_robustness_table(report['robustness']))
    for place in filter(None, (output, folder if write_card else None)):
        typer.echo(f'written: {place}')


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


tokens_app = typer.Typer(no_args_is_help=True, help='Make vision transformers faster by giving them fewer tokens.')
app.add_typer(tokens_app, name='tokens', rich_help_panel=_TRAIN)


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
    from vishub.tokens.compare import compare, comparison_cells, save_comparison
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
            rounds=rounds, search_trials=search, device=device, seed=seed,
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


@app.command('convert', rich_help_panel=_SHARE)
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
    taken = f' (entry {done.entry})' if done.entry else ''
    typer.echo(f'{done.architecture}, {done.num_classes} classes{taken}: {done.folder}')
    typer.echo(f'licence of the weights: {done.licence}')


@app.command('demo', rich_help_panel=_LOOK)
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
        folder = Path(__file__).resolve().parent.parent / 'app'
        spec = importlib.util.spec_from_file_location(
            name, folder / '__init__.py', submodule_search_locations=[str(folder)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f'{name}.main')


@app.command('predict', rich_help_panel=_LOOK)
def predict(
        model: str = typer.Argument(..., help="Model name, e.g. favit_b2.cifar10; 'vishub list' shows them."),
        inputs: List[str] = typer.Argument(
            ..., metavar='INPUT...', help="Pictures, folders of them, or patterns such as 'photos/**/*.jpg'."),
        output: Optional[Path] = typer.Option(
            None, help='Table (.jsonl, .parquet), or folder for NAME.prediction.json and NAME.prediction.png.'),
        as_json: bool = typer.Option(False, '--json', help='Print one JSON array and nothing else on stdout.'),
        device: Optional[str] = typer.Option(None, help='cpu, cuda, cuda:1 or mps; the best one here by default.'),
        top_k: int = typer.Option(5, min=1, help='How many classes to show.'),
        heatmap: bool = typer.Option(False, '--heatmap', help='Also find where the evidence for the first class lies.'),
        batch_size: int = typer.Option(32, min=1, help='For a table: pictures a forward pass.'),
        workers: Optional[int] = typer.Option(
            None, min=0, help='For a table: processes that decode; one less than there are cores by default.'),
        part_size: int = typer.Option(1024, min=1, help='For a table: files a part, which a kill costs at most.'),
) -> None:
    """Say what is in pictures.

    A picture that cannot be used is reported on stderr in one sentence and the others go on; the exit code is then 1,
    or 2 if none could be used.

    A table may be of any number of pictures. The same command continues one that was stopped, even by kill -9; under
    torchrun or accelerate launch the processes share the work.
    """
    import vishub
    from vishub.tasks.batch import TABLE_SUFFIXES

    if output is not None and output.suffix in TABLE_SUFFIXES and not output.is_dir():
        if as_json or heatmap:
            raise vishub.InputError(f"--json and --heatmap do not go into a table; leave them out, or '{output}'")
        _predict_table(
            model, inputs, output, device, batch_size=batch_size, workers=workers, part_size=part_size, top_k=top_k)
        return
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise vishub.InputError('several processes can only share the work of a table: give --output results.jsonl')
    from vishub.tasks.batch import predict_files

    pipe = vishub.pipeline(model=model, device=device)
    results = []  # for JSON only: pictures are large
    done = failed = 0
    for path, outcome in predict_files(pipe, inputs, output, top_k=top_k, heatmap=heatmap):
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
            for prediction in outcome.predictions:
                typer.echo(f'  {prediction.probability:6.1%}  {prediction.label}')
    if as_json:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
    if failed:
        raise typer.Exit(1 if done else 2)


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


@app.command('publish', rich_help_panel=_SHARE)
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


@app.command('download', rich_help_panel=_SHARE)
def download_command(
        name: str = typer.Argument(help='Weights, e.g. favit_b2.cifar10, or a Hub repository, hf-hub:ORG/NAME[@REV].'),
        output: Optional[Path] = typer.Option(
            None, help='Folder in which the folder of weights is made; the Hub cache by default.'),
) -> None:
    """Fetch weights with card and figures, verify them, and print the folder they lie in."""
    from vishub.hub.download import download

    typer.echo(download(name, output))


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run the command line and leave the process.

    Errors that vishub itself defines (wrong input, missing weights, missing extra, unknown model) are printed as one
    sentence on stderr with exit code 2. With the environment variable VISHUB_DEBUG set they keep their traceback.

    Args:
        arguments: Words behind `vishub`; those of the process by default.
    """
    try:
        app(args=arguments)
    except Exception as error:
        if os.environ.get('VISHUB_DEBUG') or not type(error).__module__.startswith('vishub.'):
            raise
        print(f'vishub: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
