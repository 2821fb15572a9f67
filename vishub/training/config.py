"""Every option of a training run, in one frozen table."""
import dataclasses
from pathlib import Path
from typing import ClassVar, Optional, Tuple, Union

from vishub.errors import InputError

__all__ = ['TrainConfig', 'parse_resolution']

# ((side in pixels, epochs at that side), ...)
Resolution = Tuple[Tuple[int, int], ...]


def parse_resolution(text: str) -> Resolution:
    """Read `40:6,64:4` (six epochs at 40 px, then four at 64 px) as `((40, 6), (64, 4))`.

    Raises:
        InputError: If the text is not a list of `side:epochs` of positive whole numbers.
    """
    phases = []
    for part in text.split(','):
        side, _, epochs = part.partition(':')
        if not (side.strip().isdigit() and epochs.strip().isdigit() and int(side) > 0 and int(epochs) > 0):
            raise InputError(f"resolution '{text}': '{part}' is not side:epochs, as in 40:6,64:4")
        phases.append((int(side), int(epochs)))
    return tuple(phases)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train is the recipe's business.

    Attributes:
        output: Folder for the checkpoint, the logs and the finished weights.
        resolution: `((side in pixels, epochs), ...)`, trained in this order.
        batch_size: Images a process and forward pass.
        grad_accum: Forward passes an optimizer step.
        opt: Name of an optimizer that `timm.optim.create_optimizer_v2` knows.
        lr: Peak learning rate, for the batch as given (not scaled).
        min_lr: Learning rate at the end of the cosine.
        warmup: Share of all steps, 0 to 1, in which the learning rate rises linearly from 0.
        weight_decay: Decoupled weight decay; not applied to vectors (biases, norms).
        clip_grad: Largest gradient norm; 0 switches clipping off.
        ema_decay: Decay of the averaged weights; None chooses one that averages over the last tenth of the run,
            0 switches averaging off.
        layer_decay: Factor on the learning rate of each layer before the head, 0 to 1; None gives all layers the same.
        schedule: `cosine` (linear rise, cosine fall), or `onecycle` (rise from lr / 25 and fall as cosines; `warmup`
            is its rise, 0.3 in the paper).
        patience: Stop after so many validations without a better metric, and end with the best weights; 0 trains to
            the end and ends with the last weights.
        tracker: Names of trackers that also get each epoch's figures, as Accelerate calls them: `tensorboard` …
        amp: `no`, `bf16` (CPU, CUDA) or `fp16` (CUDA).
        device: `auto` (CUDA if there is one) or `cpu`.
        channels_last: Keep images and convolution weights in channels-last memory order.
        compile: Compile the model with `torch.compile`.
        seed: Seed of all randomness. Augmentation depends on (seed, epoch, image), everything else on (seed, step).
        num_workers: Loader processes; 0 loads in the training process.
        num_threads: Threads of torch on the CPU; 0 leaves torch's own choice.
        checkpoint_every: Steps between checkpoints; 0 writes one at each epoch's end only.
        validate_every: Epochs between validations (the last epoch is always validated); 0 never validates.
        time_limit: Minutes after which this run stops cleanly behind a checkpoint; 0 is no limit.
        max_steps: Stop behind a checkpoint after this step (the schedule does not change); 0 is no limit.
        resume: Continue from the checkpoint in `output`, if there is one.
        progress: Show a progress bar.
    """

    output: Union[str, Path]
    resolution: Resolution = ((64, 10),)
    batch_size: int = 128
    grad_accum: int = 1
    opt: str = 'adamw'
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    ema_decay: Optional[float] = None
    layer_decay: Optional[float] = None
    schedule: str = 'cosine'
    patience: int = 0
    tracker: Tuple[str, ...] = ()
    amp: str = 'no'
    device: str = 'auto'
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    num_workers: int = 0
    num_threads: int = 0
    checkpoint_every: int = 200
    validate_every: int = 1
    time_limit: float = 0.
    max_steps: int = 0
    resume: bool = True
    progress: bool = True

    # Options that may differ between the runs that share a checkpoint; all others decide the weights.
    FREE: ClassVar[Tuple[str, ...]] = (
        'output', 'num_workers', 'num_threads', 'checkpoint_every', 'validate_every', 'time_limit', 'max_steps',
        'resume', 'progress', 'device', 'compile', 'patience', 'tracker',
    )

    def __post_init__(self) -> None:
        if not self.resolution:
            raise InputError('resolution is empty: give at least one (side, epochs)')
        for name in ('batch_size', 'grad_accum', 'lr'):
            if not getattr(self, name) > 0:
                raise InputError(f'{name} is {getattr(self, name)}; it must be greater than 0')
        if self.amp not in ('no', 'bf16', 'fp16'):
            raise InputError(f"amp is '{self.amp}'; it is one of no, bf16, fp16")
        if self.schedule not in ('cosine', 'onecycle'):
            raise InputError(f"schedule is '{self.schedule}'; it is cosine or onecycle")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise InputError(f'layer_decay is {self.layer_decay}; it is above 0 and at most 1')
        if self.patience < 0:
            raise InputError(f'patience is {self.patience}; it is a number of validations, or 0')
        if self.patience and not self.validate_every:
            raise InputError('patience needs validations: give validate_every, at least 1')
        if self.device not in ('auto', 'cpu'):
            raise InputError(f"device is '{self.device}'; it is auto or cpu")
        if not 0 <= self.warmup < 1:
            raise InputError(f'warmup is {self.warmup}; it is a share of the run, at least 0 and below 1')

    @property
    def epochs(self) -> int:
        """Epochs over all sides."""
        return sum(epochs for _, epochs in self.resolution)

    def side(self, epoch: int) -> int:
        """Image side in pixels of a 0-based epoch."""
        for side, epochs in self.resolution:
            if epoch < epochs:
                return side
            epoch -= epochs
        return self.resolution[-1][0]

    def fingerprint(self) -> dict:
        """The options that decide the weights, as JSON types: a checkpoint resumes only under the same ones."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.FREE}
        options['resolution'] = [list(phase) for phase in self.resolution]
        return options
