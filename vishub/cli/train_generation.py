"""`vishub train generation`."""
import shlex
import sys
from typing import TYPE_CHECKING, List, Optional

import typer

from vishub.cli.options import tell_result, training_verb
from vishub.cli.root import train_app

if TYPE_CHECKING:
    from vishub.training import TrainConfig


@train_app.command('generation')
@training_verb(batch_size=64, resolution='28:20', lr=2e-3, weight_decay=0.)
def train_generation(
        config: 'TrainConfig',
        model: str = typer.Option(..., help='A model that generates, e.g. lit_small28.'),
        data: str = typer.Option(
            ..., help='Image folder, CSV (path,label), hf:org/name, CIFAR-10 or Fashion-MNIST folder, packed (.npz).'),
        model_arg: List[str] = typer.Option([], help='Argument of the model, as in img_size=32; repeatable.'),
        teacher: Optional[str] = typer.Option(
            None, help='Trained model that also teaches, e.g. dit_small28.fashion_mnist or local-dir:FOLDER.'),
        inherit: bool = typer.Option(
            False, '--inherit', help="Start from the teacher's weights; a LiT from all but its attention."),
        noise_weight: float = typer.Option(0.5, help="Weight of the distance to the teacher's noise."),
        variance_weight: float = typer.Option(0.05, help="Weight of the distance to the teacher's variance."),
        flip: bool = typer.Option(False, '--flip', help='Mirror pictures by chance.'),
        epoch_size: Optional[int] = typer.Option(None, help='Pictures an epoch; all by default.'),
        vae: Optional[str] = typer.Option(None, help='AutoencoderKL for latents: folder or Hub name.'),
        judge: Optional[str] = typer.Option(
            None, help='Classifier of the same classes that judges samples at each validation.'),
        num_samples: int = typer.Option(250, min=1, help='Pictures that a validation generates.'),
        num_inference_steps: int = typer.Option(20, min=1, help='Steps in which it does.'),
        guidance_scale: float = typer.Option(1.5, min=0., help='Guidance with which it does.'),
        tag: Optional[str] = typer.Option(None, help='Tag of the weights; the name of the data by default.'),
) -> None:
    """Train a model that generates pictures of classes; the same command continues a run that was stopped.

    With a teacher, the student also learns the teacher's noise and variance, as LiT does; with --inherit it starts
    from the teacher's weights. Writes OUTPUT/<model>.<tag>/, log.csv, training.log and checkpoint.safetensors.
    """
    from vishub.tasks.classification.training import parse_model_args
    from vishub.tasks.generation.training import GenerationRecipe
    from vishub.training import train

    recipe = GenerationRecipe(
        model, data, model_args=parse_model_args(model_arg), teacher=teacher, inherit=inherit,
        noise_weight=noise_weight, variance_weight=variance_weight, flip=flip, epoch_size=epoch_size, vae=vae,
        judge=judge, num_samples=num_samples, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
        seed=config.seed, amp=config.amp, tag=tag, command='vishub ' + shlex.join(sys.argv[1:]))
    tell_result(train(recipe, config))
