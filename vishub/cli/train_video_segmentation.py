"""`vishub train video_segmentation`."""
import shlex
import sys
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


# the official recipe
@train_app.command('video_segmentation')
@training_verb(
    batch_size=12, resolution='352:24', lr=1e-4, min_lr=1e-6, warmup=0.125, weight_decay=5e-4, clip_grad=0.5,
    ema_decay=0.)
def train_video_segmentation(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='Model name: astr_res2net50, astr_pvt_v2_b2 or astr_tiny.'),
        data: str = typer.Option(
            ..., help="Folder with image/<video>/<frame> and mask/…, or 'phantoms' for procedural clips."),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in clip_size=4; repeatable.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        asma: float = typer.Option(
            0.5, min=0., max=1., help='Probability with which a clip is converted to the other scan geometry.'),
        geometry: str = typer.Option('', help='How the videos were scanned: linear or sector; needed for --asma.'),
        vertical_flip: bool = typer.Option(True, help='Flip clips upside down half of the time.'),
        soft: bool = typer.Option(False, '--soft', help='Take masks of other values than 0 and 1, or 0 and 255.'),
        num_clips: int = typer.Option(1000, min=1, help='Phantoms: clips an epoch.'),
) -> None:
    """Train a segmenter of ultrasound clips; the same command continues a run that was stopped. Research use only.

    The sides of --resolution are those that frames are scaled to, in pixels, multiples of 8.

    Writes OUTPUT/<model>.<tag>/ (weights in timm's Hub layout, with figures measured on them), log.csv, training.log
    and checkpoint.safetensors.
    """
    from vishub.errors import InputError
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.video_segmentation.training import VideoSegmentationRecipe
    from vishub.training import train

    for side, _ in config.resolution:
        if side % 8 or side < 32:
            raise InputError(f'resolution has frames of {side} px: give multiples of 8 from 32 on, as in 352:24')
    recipe = VideoSegmentationRecipe(
        model, data, model_args=parse_model_args(model_arg), asma=asma, vertical_flip=vertical_flip,
        num_clips=num_clips, geometry=geometry, soft=soft, seed=config.seed, tag=tag,
        command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
