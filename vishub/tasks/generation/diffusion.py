"""The mathematics of diffusion that training needs: noise schedule, posteriors, hybrid loss, distillation.

Ho et al. 2020 (arXiv:2006.11239) with the learned variance of Nichol & Dhariwal 2021 (arXiv:2102.09672), as DiT
(arXiv:2212.09748, section 3.1) uses them. A is the cumulative product of 1 - beta, A' the one of the step before. The
samplers are diffusers' (`sampling.py`); diffusers has no loss with a learned variance, no posterior of one, and no
respacing in sections.
"""
import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch

from vishub.errors import InputError

__all__ = [
    'NUM_TIMESTEPS', 'Diffusion', 'HybridLoss', 'Posterior', 'distillation_loss', 'hybrid_loss', 'respaced_timesteps']

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


def respaced_timesteps(sections: str, num_timesteps: int = NUM_TIMESTEPS) -> List[int]:
    """The original timesteps that a shorter schedule keeps, ascending.

    Args:
        sections: `250` for so many, evenly spread from first to last; `10,12,8` splits the schedule into equal
            sections (the first ones take what is left over) and spreads so many in each; `ddim20` keeps every n-th
            from 0, with the whole n that gives exactly 20; empty keeps all.
        num_timesteps: Length of the original schedule.

    Raises:
        InputError: If the text is none of these, or the counts do not fit.
    """
    if not sections:
        return list(range(num_timesteps))
    if sections.startswith('ddim'):
        count = _count(sections[len('ddim'):], sections)
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise InputError(f'cannot create exactly {count} of {num_timesteps} steps with an integer stride')
    counts = [_count(part, sections) for part in sections.split(',')]
    size, extra = divmod(num_timesteps, len(counts))
    kept: List[int] = []
    start = 0
    for number, count in enumerate(counts):
        length = size + (number < extra)
        if count > length:
            raise InputError(f"'{sections}': a section of {length} timesteps cannot give {count} steps")
        spacing = (length - 1) / (count - 1) if count > 1 else 1.
        place = 0.
        for _ in range(count):
            kept.append(start + round(place))
            place += spacing  # a running sum, as the official code: halves must round alike
        start += length
    return kept


def _count(text: str, sections: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"'{sections}' is no respacing: give 250, 10,12,8 or ddim50")
    return int(text)


@dataclass(frozen=True)
class Posterior:
    """One reverse step as a model sees it.

    Attributes:
        mean: Of x at the step before, like x.
        log_variance: Like x.
        x_start: The clean picture that the predicted noise implies.
    """
    mean: torch.Tensor
    log_variance: torch.Tensor
    x_start: torch.Tensor


class Diffusion:
    """The linear schedule of 1000 steps, or some of its steps. All tables are float64 of length `num_steps`.

    Args:
        timesteps: Original timesteps that are kept, ascending; all by default. Indices t below count the kept ones;
            the network is always given `timesteps[t]`.

    Attributes:
        timesteps: int64.
        betas, alphas_cumprod: Of the kept steps: betas are 1 - A / A', with A' the kept step before.
        posterior_variance, posterior_log_variance: Of q(x before | x, x_start); the first log variance, of a variance
            of 0, is the second one's.
        posterior_mean_coef1, posterior_mean_coef2: Factors on x_start and x in its mean.
    """

    def __init__(self, timesteps: Optional[Sequence[int]] = None) -> None:
        betas = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
        kept = range(NUM_TIMESTEPS) if timesteps is None else timesteps
        self.timesteps = torch.tensor(list(kept))
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])  # A'
        self.betas = betas if timesteps is None else 1 - self.alphas_cumprod / before
        self.posterior_variance = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        first = self.posterior_variance[1:2] if len(before) > 1 else self.betas
        self.posterior_log_variance = torch.cat([first, self.posterior_variance[1:]]).log()
        self.posterior_mean_coef1 = self.betas * before.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - before) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def add_noise(self, x_start: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x at step t: sqrt(A) x_start + sqrt(1 - A) noise. Pictures (B, C, H, W), indices t (B,)."""
        signal, spread = _at(self.alphas_cumprod.sqrt(), t, x_start), _at((1 - self.alphas_cumprod).sqrt(), t, x_start)
        return signal * x_start + spread * noise

    def predict_start(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean picture from which `noise` made x: sqrt(1 / A) x - sqrt(1 / A - 1) noise."""
        inverse = 1 / self.alphas_cumprod
        return _at(inverse.sqrt(), t, x) * x - _at((inverse - 1).sqrt(), t, x) * noise

    def posterior_mean(self, x_start: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mean of q(x before | x, x_start)."""
        return _at(self.posterior_mean_coef1, t, x) * x_start + _at(self.posterior_mean_coef2, t, x) * x

    def posterior(
            self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, clip: bool = False) -> Posterior:
        """The step before, as the model's output describes it.

        Args:
            output: (B, 2C, H, W): predicted noise, then v. The log variance lies between the posterior's (v = -1) and
                log beta (v = 1).
            x: (B, C, H, W).
            t: Indices, int64 (B,).
            clip: Clamp x_start to [-1, 1].
        """
        noise, variance = output.chunk(2, dim=1)
        share = (variance + 1) / 2
        log_variance = share * _at(self.betas.log(), t, x) + (1 - share) * _at(self.posterior_log_variance, t, x)
        x_start = self.predict_start(x, noise, t)
        x_start = x_start.clamp(-1, 1) if clip else x_start
        return Posterior(self.posterior_mean(x_start, x, t), log_variance, x_start)


def _at(table: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Entries t (B,) of a table as float32 (B, 1, 1, 1) on the device of `like`."""
    return table.float().to(like.device)[t].view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class HybridLoss:
    """L_simple + L_vlb of each picture, float (B,).

    Attributes:
        noise: Mean square error of the predicted noise.
        variational: Term of the variational bound, in bits a dimension; it trains the variance alone.
    """
    noise: torch.Tensor
    variational: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.noise + self.variational


def hybrid_loss(
        diffusion: Diffusion,
        output: torch.Tensor,
        x_start: torch.Tensor,
        x: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
) -> HybridLoss:
    """Loss of a model that predicts noise and variance (Nichol & Dhariwal 2021, section 3.1), as DiT trains.

    At t = 0 the bound is the likelihood of 8-bit pixels, which DiT uses for latents, too.

    Args:
        diffusion: The schedule.
        output: The model's, (B, 2C, H, W).
        x_start: Clean pictures or latents, (B, C, H, W).
        x: What the model saw: `diffusion.add_noise(x_start, noise, t)`.
        noise: (B, C, H, W).
        t: Indices, int64 (B,).

    Raises:
        ValueError: If the output has no variance channels.
    """
    if output.shape[1] != 2 * x.shape[1]:
        raise ValueError(
            f'the hybrid loss needs noise and variance, {2 * x.shape[1]} channels, got {output.shape[1]}: '
            'build the model with learn_sigma=True')
    predicted, variance = output.float().chunk(2, dim=1)
    x_start, x, noise = x_start.float(), x.float(), noise.float()
    # the bound would pull the noise towards rare, large errors; it gets no say in it
    model = diffusion.posterior(torch.cat([predicted.detach(), variance], dim=1), x, t)
    true_mean = diffusion.posterior_mean(x_start, x, t)
    true_log_variance = _at(diffusion.posterior_log_variance, t, x)
    divergence = 0.5 * (
        model.log_variance - true_log_variance - 1 + (true_log_variance - model.log_variance).exp()
        + (true_mean - model.mean).square() * (-model.log_variance).exp())
    last = -pixel_log_likelihood(x_start, model.mean, 0.5 * model.log_variance)
    at_end = (t == 0).view(-1, *[1] * (x.ndim - 1))
    variational = torch.where(at_end, last, divergence).flatten(1).mean(1) / math.log(2)
    return HybridLoss((noise - predicted).square().flatten(1).mean(1), variational)


def pixel_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log probability of 8-bit pixels x in [-1, 1] under a Gaussian, by pixel (Ho et al. 2020, section 3.3)."""
    def below(z: torch.Tensor) -> torch.Tensor:  # the Gaussian's distribution function, nearly
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))

    inverse = (-log_scale).exp()
    upper = below((x - mean + 1 / 255) * inverse)
    lower = below((x - mean - 1 / 255) * inverse)
    # the outermost bins are open
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def distillation_loss(output: torch.Tensor, teacher: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """How far a student is from its teacher (LiT, section 3.4), by picture.

    Args:
        output: Student's noise and raw variance channels, (B, 2C, H, W).
        teacher: The teacher's, of the same x, t and labels.

    Returns:
        Mean square distance of the noise and of the variance channels, float (B,) each.

    Raises:
        ValueError: If the two have different shapes.
    """
    if output.shape != teacher.shape:
        raise ValueError(
            f'teacher and student must have the same channels and learn_sigma, got outputs '
            f'{list(teacher.shape)} and {list(output.shape)}')
    noise, variance = (output.float() - teacher.detach().float()).square().chunk(2, dim=1)
    return noise.flatten(1).mean(1), variance.flatten(1).mean(1)
