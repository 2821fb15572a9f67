"""`vishub train slide_analysis`."""
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Tuple

import typer

from vishub.cli.options import training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


# the official script's recipe
@train_app.command('slide_analysis')
@training_verb(
    batch_size=1, resolution='4096:50', opt='adam', lr=1e-5, warmup=0., weight_decay=0., clip_grad=0., ema_decay=0.,
    checkpoint_every=0)
def train_slide_analysis(
        config: 'TrainConfig',
        task: List[Path] = typer.Option(
            ..., help='Folder (or CSV) of one task; repeatable, in the order in which they are learnt.'),
        model: str = typer.Option('conslide_hit', help='Model name: conslide_hit or conslide_hit_tiny.'),
        method: str = typer.Option('buro', help='buro, er, derpp, ewc, finetune or joint.'),
        continue_from: Optional[Path] = typer.Option(
            None, help='Output folder of an earlier run, whose tasks are kept; it stays as it is.'),
        encoder: str = typer.Option(
            'convnext_small.fb_in22k', help='Frozen encoder: a classifier of timm with weights, or texture_bank.'),
        encoder_size: Optional[int] = typer.Option(None, help="Side of its pictures; the weights' own by default."),
        patch_size: int = typer.Option(512, help='Side of a patch, pixels at --mpp.'),
        mpp: float = typer.Option(0.5, help='Micrometres a pixel at which slides are cut; 0.5 is 20x.'),
        slide_mpp: Optional[float] = typer.Option(None, help='Resolution of slides that do not say theirs.'),
        max_regions: Optional[int] = typer.Option(None, help='Regions a slide at most, those with most tissue.'),
        features: Optional[Path] = typer.Option(None, help='Folder that keeps features; OUTPUT/features by default.'),
        skip_bad: bool = typer.Option(False, '--skip-bad', help='Leave out slides that cannot be used.'),
        buffer: int = typer.Option(1100, help='Regions kept of all earlier slides together.'),
        bag: Tuple[int, int] = typer.Option((100, 249), help='Fewest and most regions of a replayed slide.'),
        replay_weight: float = typer.Option(0.2, help="Weight of a replayed slide (the paper's alpha)."),
        selection: str = typer.Option('uniform', help='Regions that are kept: uniform or attention.'),
        ewc_weight: float = typer.Option(100., help="Weight of EWC's penalty."),
        warmup_epochs: int = typer.Option(10, help='Epochs of the first task with the similarity loss alone.'),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in depth=3; repeatable.'),
        fold: List[int] = typer.Option([0], help='Fold to train, from 0; repeatable.'),
        folds: int = typer.Option(5, help='Folds that data without a split of their own are dealt into.'),
        data_name: Optional[str] = typer.Option(None, help='Name of the data, for the card; the tasks by default.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the method by default.'),
        peer: List[str] = typer.Option([], help="Weights on the same data, for the card's table; repeatable."),
) -> None:
    """Train a slide classifier on tasks one after the other; the same command continues a run that was stopped.

    The learning rate is constant, a step takes one slide. Of --resolution, as in 4096:50, only the epochs count: those
    of each task.

    Writes to OUTPUT (with several folds OUTPUT/fold-N): a folder a task, the buffer, sequence.json, and
    <model>.<tag>/ (weights in timm's Hub layout, with figures measured on them).
    """
    from vishub.errors import InputError
    from vishub.tasks.batch import progress_bar
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.slide_analysis.data import encode_tasks, read_task
    from vishub.tasks.slide_analysis.encoders import load_encoder
    from vishub.tasks.slide_analysis.features import FeatureCache
    from vishub.tasks.slide_analysis.setting import SlideSetting
    from vishub.tasks.slide_analysis.strategies import StrategyOptions
    from vishub.tasks.slide_analysis.tissue import Tiling
    from vishub.tasks.slide_analysis.training import SequenceOptions, earlier_tasks, train_tasks
    from vishub.tasks.slide_analysis.weights import store_weights, summarise_folds
    from vishub.training.loop import rehearse

    output = Path(config.output)
    rehearse(output)
    tiling = Tiling(patch_size=patch_size, mpp=mpp, max_regions=max_regions)
    options = SequenceOptions(
        model=model, model_args=parse_model_args(model_arg), method=method, warmup_epochs=warmup_epochs,
        strategy=StrategyOptions(
            capacity=buffer, bag=bag, replay_weight=replay_weight, selection=selection, ewc_weight=ewc_weight))
    rows = {number: [read_task(path, number, folds, config.seed) for path in task] for number in fold}
    needs_encoder = any(
        Path(row.path).suffix.lower() not in ('.h5', '.hdf5', '.safetensors')
        for tasks in rows.values() for one in tasks for row in (*one.train, *one.val, *one.test))
    device = 'cuda' if config.device == 'auto' and _has_cuda() else 'cpu'
    made = load_encoder(encoder, encoder_size, device, amp=config.amp != 'no') if needs_encoder else None
    cache = FeatureCache(features or output / 'features') if needs_encoder else None
    if len(fold) > 1 and continue_from is not None:
        raise InputError('--continue-from goes on with one fold: give one --fold')
    sequences = []
    for number in fold:
        place = output / f'fold-{number}' if len(fold) > 1 else output
        before = earlier_tasks(continue_from)
        known = [label for one in before for label in one.classes]
        with progress_bar(disable=not config.progress) as bars:
            bar = bars.add_task('Slides', total=None)
            encoded, left_out = encode_tasks(
                rows[number], made, cache, tiling, first_class=len(known), mpp=slide_mpp, skip_bad=skip_bad,
                progress=lambda done, total, bars=bars, bar=bar: bars.update(bar, completed=done, total=total))
        for sentence in left_out:
            typer.echo(f'vishub: left out: {sentence}', err=True)
        sequence = train_tasks(encoded, place, config, options, continue_from, say=lambda line: typer.echo(line))
        if sequence is None:
            typer.echo(f'stopped; the same command continues in {place}')
            return
        sequences.append(sequence)
        tasks = [*before, *encoded]
        if not needs_encoder:  # features tell their grid themselves
            tiling = replace(tiling, grid=encoded[0].train[0].load().patch.shape[1])
        setting = SlideSetting(
            {one.name: one.classes for one in tasks}, encoder if needs_encoder else None,
            made.size if made else None, tiling)
        folder = store_weights(
            sequence, place, setting, tasks, options, config, tag=tag or method,
            data=data_name or ', '.join(one.name for one in tasks), command='vishub ' + shlex.join(sys.argv[1:]),
            peers=peer)
        typer.echo(f'weights and figures: {folder}')
    if len(sequences) > 1:
        for name, figure in summarise_folds(sequences, output / 'folds.json').items():
            typer.echo(f'{name}: {figure["mean"]:.2f} ± {figure["sd"]:.2f}')


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
