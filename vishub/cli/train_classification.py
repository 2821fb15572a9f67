"""`vishub train classification`."""
import shlex
import sys
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


@train_app.command('classification')
@training_verb()
def train_classification(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='Model name, e.g. favit_b2; any model of timm will do.'),
        data: str = typer.Option(
            ..., help='Image folder, CSV (path,label), hf:org/name, CIFAR-10 or Fashion-MNIST folder, packed (.npz).'),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in window_size=3; repeatable.'),
        pretrained: bool = typer.Option(
            False, '--pretrained', help='Start from trained weights; a head for other classes starts anew.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
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
) -> None:
    """Train an image classifier; the same command continues a run that was stopped.

    Writes OUTPUT/<model>.<tag>/ (weights in timm's Hub layout, with figures measured on them), log.csv, training.log
    and checkpoint.safetensors.
    """
    from vishub.tasks.classification.training import ClassificationRecipe, parse_model_args
    from vishub.training import train

    model_args = {**parse_model_args(model_arg), **({'pretrained': True} if pretrained else {})}
    recipe = ClassificationRecipe(
        model, data, model_args=model_args, augmentation=augmentation, freeze=freeze,
        linear_probe=linear_probe, class_weights=class_weights,
        label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix, mix_prob=mix_prob, validate_on=validate_on,
        in_chans=in_chans, check=check, seed=config.seed, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
