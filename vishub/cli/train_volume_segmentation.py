"""`vishub train volume_segmentation`."""
import shlex
import sys
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


@train_app.command('volume_segmentation')
@training_verb(
    batch_size=2, resolution='48:30', lr=2e-3, warmup=0.05, weight_decay=0.01, clip_grad=12., validate_every=5)
def train_volume_segmentation(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='Model name, e.g. mambaclinix_tiny or mambaclinix_s6.'),
        data: str = typer.Option(
            ..., help="Folder in nnU-Net's raw layout, DeepMedic's BraTS folder, or 'procedural' for made volumes."),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in drop_path_rate=0.2; repeatable.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
        samples: int = typer.Option(100, min=1, help='Patches an epoch.'),
        regions: str = typer.Option(
            '8,8,14', help="Regions of the Tversky loss along each axis; '' for cross-entropy and Dice alone."),
        spacing: str = typer.Option('', help="Grid to train on, mm along D,H,W, as in '2,2,2'; the data's median."),
        intensity: Optional[str] = typer.Option(None, help="zscore, zscore_nonzero or ct; the data's own by default."),
        size: int = typer.Option(64, min=16, help='Made volumes: voxels a side.'),
) -> None:
    """Train a segmenter of volumes; the same command continues a run that was stopped.

    Of --resolution, as in 32:10,48:5, the sides are those of the patches: their longest side, in multiples of what the
    network divides by.

    Writes OUTPUT/<model>.<tag>/ (weights in timm's Hub layout, with figures measured on them), log.csv, training.log
    and checkpoint.safetensors.
    """
    from vishub.errors import InputError
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.volume_segmentation.training import VolumeSegmentationRecipe
    from vishub.training import train

    try:
        cells = [int(word) for word in regions.split(',') if word.strip()]
        grid = [float(word) for word in spacing.split(',') if word.strip()] or None
    except ValueError as error:
        raise InputError(f'--regions and --spacing are numbers with commas between, as in 4,4,4: {error}') from error
    recipe = VolumeSegmentationRecipe(
        model, data, model_args=parse_model_args(model_arg), samples=samples, regions=cells, size=size, spacing=grid,
        intensity=intensity, seed=config.seed, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
