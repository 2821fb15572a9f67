"""The options of every training run, written once: `@training_verb` adds them to a task's verb."""
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Optional

import typer

if TYPE_CHECKING:
    from vishub.training import TrainConfig, TrainResult

__all__ = ['tell_result', 'training_verb']


def _config(
        output: Path = typer.Option(..., help='Folder for the checkpoint, the logs and the finished weights.'),
        resolution: str = typer.Option('64:10', help='side:epochs, one after the other, as in 40:6,64:4.'),
        batch_size: int = typer.Option(128, help='Samples a process and forward pass.'),
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
) -> 'TrainConfig':
    from vishub.training import TrainConfig, parse_resolution

    options = {**locals(), 'resolution': parse_resolution(resolution), 'tracker': tuple(tracker)}
    return TrainConfig(**{name: options[name] for name in inspect.signature(_config).parameters})


def training_verb(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb the options of every training run, behind its own; it gets them as `config`, a `TrainConfig`.

    Args:
        defaults: Where the task's defaults differ, by name, as in `@training_verb(batch_size=16, resolution='64:100')`.
    """
    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [parameter for name, parameter in inspect.signature(verb).parameters.items() if name != 'config']
        shared = []
        for name, parameter in inspect.signature(_config).parameters.items():
            if name in defaults:
                help_text, names = parameter.default.help, parameter.default.param_decls or ()
                parameter = parameter.replace(default=typer.Option(defaults[name], *names, help=help_text))
            shared.append(parameter)
        names = [parameter.name for parameter in shared]

        def run(**options: Any) -> None:
            config = _config(**{name: options.pop(name) for name in names})
            verb(config=config, **options)

        # typer reads both: the parameters with their defaults, and the types.
        run.__name__, run.__doc__ = verb.__name__, verb.__doc__
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        return run
    return decorate


def tell_result(result: 'TrainResult') -> None:
    """Say where a run's weights are, or how to continue it. One of many processes speaks: the main one."""
    if os.environ.get('RANK', '0') != '0':
        return
    if not result.finished:
        typer.echo(f'stopped at step {result.step}; the same command continues from {result.checkpoint}')
    else:
        typer.echo(f'weights and figures: {result.folder}')
