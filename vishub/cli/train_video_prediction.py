"""`vishub train video_prediction`."""
import shlex
import sys
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


# the paper's recipe for Moving MNIST; its learning rate for WeatherBench is 5e-4 with --schedule cosine --warmup 0
@train_app.command('video_prediction')
@training_verb(
    batch_size=16, resolution='64:2000', lr=1e-3, min_lr=4e-9, warmup=0.3, weight_decay=0.01, clip_grad=0.,
    ema_decay=0., schedule='onecycle')
def train_video_prediction(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='Model name, e.g. predformer_quad_tsst_mmnist or predformer_tiny.'),
        data: str = typer.Option(
            ..., help="Folder of MNIST's images, of WeatherBench's years or of videos; TaxiBJ (.npz)."),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in arrangement=full; repeatable.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        num_digits: int = typer.Option(2, min=1, help='Moving MNIST: digits in a clip.'),
        num_clips: int = typer.Option(10_000, min=1, help='Moving MNIST: clips an epoch.'),
        stride: int = typer.Option(1, min=1, help='Videos: take every so manieth frame.'),
) -> None:
    """Train a video predictor; the same command continues a run that was stopped.

    The model's own size decides that of generated digits and of videos; other data decide the model's. Of
    --resolution, as in 64:2000, only the epochs count.

    Writes OUTPUT/<model>.<tag>/ (weights in timm's Hub layout, with figures measured on them), log.csv, training.log
    and checkpoint.safetensors.
    """
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.video_prediction.training import VideoPredictionRecipe
    from vishub.training import train

    recipe = VideoPredictionRecipe(
        model, data, model_args=parse_model_args(model_arg), num_digits=num_digits, num_clips=num_clips, stride=stride,
        seed=config.seed, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
