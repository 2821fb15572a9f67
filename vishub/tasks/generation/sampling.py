"""From noise to pictures: diffusers' solvers around a class- or text-conditional denoiser, with guidance.

The solvers agree with the official DiT loops (tests/tasks/generation/test_sampling.py): `ddpm` with the respacing
'N', `ddim` with 'ddimN'. `dpm++` is DPM-Solver++ of second order (arXiv:2211.01095), for few steps.
"""
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Sequence, Union

import torch

from vishub.errors import InputError, import_extra
from vishub.tasks.generation.diffusion import BETA_END, BETA_START, NUM_TIMESTEPS

__all__ = [
    'MIN_STEPS', 'SOLVERS', 'StepState', 'check_steps', 'draw_noise', 'make_scheduler', 'sample', 'sampling_steps',
]

SOLVERS = ('dpm++', 'ddim', 'ddpm')
MIN_STEPS = 2

# (x (B, C, H, W), timestep) -> the model's output for the pictures wanted, guided: (B, C, H, W) or (B, 2C, H, W)
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StepState:
    """What is known after a step.

    Attributes:
        step: Steps done, from 1.
        num_steps: Steps in all.
        x: (B, C, H, W) after the step.
        x_start: The clean picture as the model guesses it now: what a preview shows.
    """
    step: int
    num_steps: int
    x: torch.Tensor
    x_start: torch.Tensor


def check_steps(solver: str, num_inference_steps: int) -> None:
    """Raises:
        InputError: If there is no such solver, or it cannot take so many steps.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver is '{solver}': give one of {', '.join(SOLVERS)}")
    if not MIN_STEPS <= num_inference_steps <= NUM_TIMESTEPS:
        raise InputError(f'num_inference_steps is {num_inference_steps}: give {MIN_STEPS} to {NUM_TIMESTEPS}')
    if solver == 'ddim' and NUM_TIMESTEPS % num_inference_steps:
        fitting = [n for n in range(MIN_STEPS, NUM_TIMESTEPS + 1) if NUM_TIMESTEPS % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - num_inference_steps))
        raise InputError(
            f'num_inference_steps is {num_inference_steps}: ddim takes a divisor of {NUM_TIMESTEPS}, as {nearest}')


def make_scheduler(solver: str, num_inference_steps: int, *, learn_sigma: bool = True, clip: bool = False) -> Any:
    """diffusers' scheduler, its timesteps set.

    Args:
        solver: `ddpm`, `ddim` or `dpm++`.
        num_inference_steps: Steps.
        learn_sigma: The model predicts its variance, which `ddpm` uses.
        clip: Clamp the guessed clean picture to [-1, 1] at every step: right for pixels, wrong for latents.

    Raises:
        InputError: See `check_steps`.
        MissingExtraError: If diffusers is not installed.
    """
    check_steps(solver, num_inference_steps)
    diffusers = import_extra('diffusers', 'generate')
    betas = dict(
        num_train_timesteps=NUM_TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule='linear')
    if solver == 'ddpm':
        scheduler = diffusers.DDPMScheduler(
            **betas, variance_type='learned_range' if learn_sigma else 'fixed_small', timestep_spacing='linspace',
            clip_sample=clip)
    elif solver == 'ddim':
        # Its step back is 1000 // N timesteps long, which only this spacing keeps to.
        scheduler = diffusers.DDIMScheduler(
            **betas, timestep_spacing='leading', set_alpha_to_one=True, clip_sample=clip)
    else:
        # It has no static clipping, so it is fed clean pictures, which can be clipped before.
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **betas, algorithm_type='dpmsolver++', solver_order=2, prediction_type='sample',
            timestep_spacing='linspace', final_sigmas_type='zero', lower_order_final=True)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> List[Any]:
    """Noise of each picture from a generator of its own, so that neither the batch nor the device changes it.

    Args:
        shape: Of one picture, (C, H, W).
        seeds: One a picture.

    Returns:
        [noise float32 (B, C, H, W) on the CPU, the generators, which the solver draws on from].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.stack([torch.randn(*shape, generator=generator) for generator in generators]), generators]


def sampling_steps(
        denoise: Denoise,
        x: torch.Tensor,
        scheduler: Any,
        generator: Union[torch.Generator, List[torch.Generator], None] = None,
        clip: bool = False,
) -> Iterator[StepState]:
    """Run a solver from noise to clean pictures or latents, step by step.

    Args:
        denoise: See `Denoise`; gets the timestep as a 0-d tensor.
        x: Noise, float (B, C, H, W).
        scheduler: From `make_scheduler`; it is used up.
        generator: Source of the noise that `ddpm` adds, one a picture or one for all.
        clip: As given to `make_scheduler`.
    """
    channels = x.shape[1]
    takes_pictures = scheduler.config.prediction_type == 'sample'
    learned_variance = getattr(scheduler.config, 'variance_type', None) == 'learned_range'
    random = {} if takes_pictures else {'generator': generator}
    for number, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = denoise(x, timestep.to(x.device)).float()
            signal = scheduler.alphas_cumprod[int(timestep)].item()
            x_start = (x - (1 - signal) ** 0.5 * output[:, :channels]) / signal ** 0.5
            x_start = x_start.clamp(-1, 1) if clip else x_start
            given = x_start if takes_pictures else output if learned_variance else output[:, :channels]
            x = scheduler.step(given, timestep, x, **random).prev_sample
        yield StepState(number + 1, len(scheduler.timesteps), x, x_start)


def sample(*arguments: Any, **options: Any) -> torch.Tensor:
    """The end of `sampling_steps`, (B, C, H, W)."""
    x = None
    for state in sampling_steps(*arguments, **options):
        x = state.x
    assert x is not None  # there are at least MIN_STEPS
    return x
