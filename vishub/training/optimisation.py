"""How weights move: optimizer with its parameter groups, learning rate over the steps, averaged weights."""
import math
from typing import List, Optional

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from vishub.errors import InputError
from vishub.training.config import TrainConfig

__all__ = ['OneCycleScheduler', 'make_average', 'make_optimizer', 'make_schedule', 'peak_lr']


class OneCycleScheduler(Scheduler):
    """One-cycle learning rate (Smith & Topin 2018, arXiv:1708.07120) with cosine flanks, as torch's OneCycleLR.

    A function of the step alone, which torch's is not, so that a resumed run needs no state of it; and it heeds
    timm's `lr_scale` of layer-wise decay.

    Args:
        optimizer: Its learning rates are the peaks.
        total_steps: Steps in all; the last one has the lowest learning rate.
        rise: Share of the steps, 0 to 1, up to the peak.
        lr_min: Last learning rate.
        start_factor: The first learning rate is the peak divided by this.
    """

    def __init__(
            self, optimizer: torch.optim.Optimizer, total_steps: int, rise: float, lr_min: float,
            start_factor: float = 25.):
        self.last, self.peak = total_steps - 1, rise * total_steps - 1
        self.lr_min, self.start_factor = lr_min, start_factor
        super().__init__(optimizer, param_group_field='lr', t_in_epochs=False, initialize=True)

    def _get_lr(self, t: int) -> List[float]:
        def flank(start: float, end: float, share: float) -> float:
            return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.), 1.))) / 2

        if self.peak > 0 and t <= self.peak:
            return [flank(peak / self.start_factor, peak, t / self.peak) for peak in self.base_values]
        top = max(self.peak, 0.)
        return [flank(peak, self.lr_min, (t - top) / max(self.last - top, 1e-9)) for peak in self.base_values]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer; vectors and the model's `no_weight_decay()` are left out of the decay.

    With `layer_decay`, timm's groups: a layer's learning rate is scaled by `layer_decay` to the power of its distance
    from the head (Clark et al. 2020; BEiT, arXiv:2106.08254, appendix).

    Raises:
        InputError: If timm knows no such optimizer.
    """
    # torch's own Adam has a fused form, on the CPU three times as fast as the default; others may not know it
    fused = {'fused': True} if config.opt in ('adam', 'adamw') else {}
    try:
        return create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, filter_bias_and_bn=True,
            layer_decay=config.layer_decay, **fused)
    except ValueError as error:
        raise InputError(f"opt is '{config.opt}': {error}") from error


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> Scheduler:
    """The learning rate as a function of the step, set by `step_update(step)`."""
    if config.schedule == 'onecycle':
        return OneCycleScheduler(optimizer, total_steps, rise=config.warmup, lr_min=config.min_lr)
    return CosineLRScheduler(
        optimizer, t_initial=total_steps, lr_min=config.min_lr, warmup_t=round(config.warmup * total_steps),
        t_in_epochs=False)


def make_average(
        model: nn.Module,
        config: TrainConfig,
        total_steps: int,
        split: bool = False,
) -> Optional[ModelEmaV3]:
    """The averaged weights; None where averaging is off. `split` says that FSDP will split both sets of weights."""
    decay = config.ema_decay
    if decay is None:
        decay = max(0., 1. - 10. / total_steps)  # averages over about the last tenth of the run
    if decay <= 0:
        return None
    # torch's operations on lists of tensors take no mixture of split weights and whole buffers
    return ModelEmaV3(model, decay=decay, use_warmup=True, foreach=not split)


def peak_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the group that has the largest: the head's, under layer-wise decay."""
    return max(group['lr'] for group in optimizer.param_groups)
