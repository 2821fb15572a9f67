"""`vishub train deblurring`."""
import shlex
import sys
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


# the paper's recipe for GoPro, which is for 8 GPUs and 600,000 steps; short runs want --clip-grad 1
@train_app.command('deblurring')
@training_verb(
    batch_size=2, resolution='256:3000,512:1000', lr=1e-3, min_lr=1e-7, warmup=0., weight_decay=1e-3, clip_grad=0.01,
    ema_decay=0.)
def train_deblurring(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='Model name: deeprftv2_s, deeprftv2_b or deeprftv2_tiny.'),
        data: str = typer.Option(
            ..., help='Folder of GoPro, RealBlur or HIDE, or of sharp photographs, which are shaken on the fly.'),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in num_columns=1; repeatable.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        reversible: bool = typer.Option(
            False, '--reversible', help='Keep no activations of the columns: less memory, slower.'),
        crops: int = typer.Option(8, min=1, help='Crops of each picture an epoch.'),
        fourier_weight: float = typer.Option(0.01, min=0., help='Weight of the distance of spectra in the loss.'),
) -> None:
    """Train a deblurring model; the same command continues a run that was stopped.

    The sides of --resolution are those of the training crops, in pixels, multiples of 8.

    Writes OUTPUT/<model>.<tag>/ (weights in timm's Hub layout, with figures measured on them), log.csv, training.log
    and checkpoint.safetensors.
    """
    from vishub.errors import InputError
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.deblurring.training import DeblurringRecipe
    from vishub.training import train

    for side, _ in config.resolution:
        if side % 8 or side < 24:
            raise InputError(f'resolution has crops of {side} px: give multiples of 8 from 24 on, as in 64:20')
    recipe = DeblurringRecipe(
        model, data, model_args=parse_model_args(model_arg), reversible=reversible, crops=crops,
        fourier_weight=fourier_weight, seed=config.seed, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
