"""What MambaClinix is trained with: cross-entropy, soft Dice and a Tversky index of regions, on every decoder level.

The loss wants 0.8 times the region term (section "TRS" of the official trainers); the plain trainer leaves it out.
"""
from typing import List, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['REGIONS', 'SegmentationLoss', 'dice_loss', 'region_tversky_loss', 'supervision_weights']

_SMOOTH = 1e-5
REGIONS = (8, 8, 14)  # of the official trainer, for every data set


def one_hot(target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels (B, D, H, W) -> (B, K, D, H, W) float32."""
    return F.one_hot(target, num_classes).movedim(-1, 1).float()


def dice_loss(logits: torch.Tensor, target: torch.Tensor, batch_dice: bool = False) -> torch.Tensor:
    """Soft Dice of the foreground classes, negated: from -1 (all right) to 0.

    Args:
        logits: (B, K, D, H, W), floating point.
        target: (B, D, H, W), int64 labels 0..K-1, 0 being the background.
        batch_dice: Sum over the batch before dividing, as nnU-Net does where there is a cascade.

    Returns:
        A scalar, the mean over foreground classes (and samples).
    """
    p = logits.float().softmax(1)
    y = one_hot(target, logits.shape[1])
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    both, total = (p * y).sum(axes), p.sum(axes) + y.sum(axes)
    return -((2 * both + _SMOOTH) / (total + _SMOOTH))[..., 1:].mean()


def region_tversky_loss(
        logits: torch.Tensor,
        target: torch.Tensor,
        regions: Sequence[int] = REGIONS,
        batch_dice: bool = False,
) -> torch.Tensor:
    """Tversky index of every region, weighted by what the region gets wrong, negated: from -1 to 0.

    The volume is cut into `regions` along D, H, W. Where a region has more false positives than negatives, its alpha,
    and so their price, rises from 0.3 towards 0.7; beta does the same for false negatives. Gradients flow through
    both.

    Args:
        logits, target, batch_dice: As in `dice_loss`.
        regions: How many regions along each axis.
    """
    p = logits.float().softmax(1)
    y = one_hot(target, logits.shape[1])
    depth, height, width = regions
    tp, fp, fn = (
        F.adaptive_avg_pool3d(part, (depth, height, width))  # B, K, regions
        for part in (p * y, p * (1 - y), (1 - p) * y))
    if batch_dice:
        tp, fp, fn = (part.sum(0, keepdim=True) for part in (tp, fp, fn))
    wrong = fp + fn + _SMOOTH
    alpha, beta = 0.3 + 0.4 * (fp + _SMOOTH) / wrong, 0.3 + 0.4 * (fn + _SMOOTH) / wrong
    index = (tp + _SMOOTH) / (tp + alpha * fp + beta * fn + _SMOOTH)
    return -index[:, 1:].mean()


def supervision_weights(num_levels: int) -> List[float]:
    """Weight of each decoder level, finest first: halved from level to level, the coarsest 0, in sum 1.

    A single level has it all.
    """
    if num_levels == 1:
        return [1.]
    weights = [2. ** -level for level in range(num_levels - 1)] + [0.]
    return [weight / sum(weights) for weight in weights]


class SegmentationLoss(nn.Module):
    """Cross-entropy + Dice + `region_weight` x region Tversky.

    Args:
        regions: See `region_tversky_loss`; None leaves that term out.
        region_weight: Its weight.
        batch_dice: See `dice_loss`.
    """

    def __init__(
            self, regions: Union[Sequence[int], None] = REGIONS, region_weight: float = 0.8, batch_dice: bool = False,
    ) -> None:
        super().__init__()
        self.regions = None if regions is None else tuple(regions)
        self.region_weight = region_weight
        self.batch_dice = batch_dice

    def level(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of one level: logits (B, K, D, H, W), labels (B, D, H, W)."""
        loss = F.cross_entropy(logits.float(), target) + dice_loss(logits, target, self.batch_dice)
        if self.regions is not None:
            loss = loss + self.region_weight * region_tversky_loss(logits, target, self.regions, self.batch_dice)
        return loss

    def forward(self, logits: Union[torch.Tensor, Sequence[torch.Tensor]], target: torch.Tensor) -> torch.Tensor:
        """The loss of one output, or of all decoder levels, finest first.

        Args:
            logits: (B, K, D, H, W), or a list of such at ever smaller sizes.
            target: (B, D, H, W), int64, at full size; coarser levels take every so manieth label.
        """
        levels: Tuple[torch.Tensor, ...] = (logits,) if isinstance(logits, torch.Tensor) else tuple(logits)
        total = target.new_zeros((), dtype=torch.float32)
        for weight, level in zip(supervision_weights(len(levels)), levels):
            if weight:
                total = total + weight * self.level(level, resized(target, level.shape[2:]))
        return total


def resized(target: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Labels (B, D, H, W) at another size, by the nearest voxel."""
    if tuple(target.shape[1:]) == tuple(size):
        return target
    return F.interpolate(target[:, None].float(), size=tuple(size), mode='nearest')[:, 0].long()
