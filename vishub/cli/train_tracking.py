"""`vishub train tracking`."""
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


# the specification's recipe of the tiny network
@train_app.command('tracking')
@training_verb(
    batch_size=16, resolution='96:9', lr=6e-4, min_lr=2e-6, warmup=0.3, weight_decay=1e-4, clip_grad=0.1,
    schedule='onecycle')
def train_tracking(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='Model name, e.g. bactrack_tiny or bactrack_resnet50.'),
        data: str = typer.Option(
            ..., help='Folder of photographs (scenes are cut from them), GOT-10k or LaSOT folder, or the word noise.'),
        stage: int = typer.Option(1, min=1, max=2, help='1: find the target; 2: the discriminator, with --start.'),
        start: Optional[Path] = typer.Option(None, help='Folder of the weights that training starts from.'),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in depth=2; repeatable.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        num_templates: int = typer.Option(3, min=1, help='Most templates of a sample.'),
        num_samples: int = typer.Option(8000, min=1, help='Samples an epoch.'),
) -> None:
    """Train a tracker; the same command continues a run that was stopped.

    Stage 1 writes OUTPUT/<model>.<tag>_stage1/; stage 2, started from that folder, OUTPUT/<model>.<tag>/ (weights in
    timm's Hub layout, with figures measured on them). Both write log.csv, training.log and checkpoint.safetensors, so
    give each its own output folder. Of --resolution, as in 96:9, only the epochs count.
    """
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.tracking.training import TrackingRecipe
    from vishub.training import train

    recipe = TrackingRecipe(
        model, data, stage=stage, start=start, model_args=parse_model_args(model_arg), num_templates=num_templates,
        num_samples=num_samples, seed=config.seed, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
