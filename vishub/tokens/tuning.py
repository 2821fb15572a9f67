"""Train what PYRA adds to a frozen model (Xiong et al. 2024, arXiv:2403.09192, section 4), in a short run."""
import math
from typing import Callable, Iterable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError
from vishub.tokens.method import number, whole
from vishub.tokens.pyra import trainable_parameters

__all__ = ['tune']


def tune(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        *,
        steps: int,
        lr: float = 1e-3,
        pyra_lr: Optional[float] = None,
        weight_decay: float = 1e-4,
        amp: bool = False,
        progress: Optional[Callable[[int, int], None]] = None,
) -> List[float]:
    """Fine-tune a model with PYRA: cross entropy, AdamW, a tenth of warm-up, then a cosine to a hundredth of `lr`.

        tokens.apply(model, 'pyra', macs=0.65)
        tokens.tune(model, loader, steps=1000)
        tokens.merge_lora(model)

    Args:
        model: With PYRA applied; only `trainable_parameters` change. It is left in the mode (eval, train) it had.
        loader: Normalised images (B, C, H, W) and class numbers (B,); begun anew when it ends.
        steps: Optimiser steps.
        lr, pyra_lr, weight_decay: See `trainable_parameters`.
        amp: bfloat16 autocast.
        progress: Called with (steps done, steps).

    Returns:
        The loss of each step.

    Raises:
        InputError: If the model is without PYRA, a number is out of range, the loader is empty, or the loss is not
            finite.
    """
    whole(steps, 'steps', 1)
    number(lr, 'lr', 0, 1, above=True)
    groups = trainable_parameters(model, lr, pyra_lr, weight_decay)
    optimizer = torch.optim.AdamW(groups)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
        torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(max(1, steps - warm))),
    ], [warm])
    device = groups[0]['params'][0].device
    was_training, losses = model.training, []
    model.train()
    try:
        while len(losses) < steps:
            before = len(losses)
            for images, labels in loader:
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = model(images.to(device))
                if isinstance(logits, tuple):  # distilled models give both heads in training
                    logits = torch.stack(logits).mean(0)
                loss = F.cross_entropy(logits.float(), labels.to(device))
                if not loss.isfinite():
                    raise InputError(f'the loss is {loss.item()} in step {len(losses) + 1}: give a lower lr')
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if progress is not None:
                    progress(len(losses), steps)
                if len(losses) == steps:
                    break
            if len(losses) == before:
                raise InputError('the loader gives no images')
    finally:
        model.train(was_training)
    return losses


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
