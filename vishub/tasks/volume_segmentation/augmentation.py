"""nnU-Net's augmentation of patches, from MONAI's transforms, with the probabilities and ranges of its 2.1 release."""
import math
from typing import Any, Dict, Sequence, Tuple

import numpy as np
import torch

from vishub.errors import import_extra

__all__ = ['augmentation', 'augment']


def augmentation(patch: Sequence[int]) -> Any:
    """The transforms for patches of a size: of a dict of `image` (C, D, H, W) and `label` (1, D, H, W).

    Rotation, scale, noise, blur, brightness, contrast, simulated low resolution, gamma of the inverted and of the plain
    image, mirroring, in this order. What comes in from beyond the border is 0 in both. Patches that are flat (the
    longest side over three times the first) turn in their plane only.
    """
    monai = import_extra('monai.transforms', 'medical')
    both, image = ('image', 'label'), ('image',)
    flat = max(patch) / patch[0] > 3
    angle = math.radians(30)
    turns: Dict[str, float] = {'range_x': math.pi if flat else angle}
    if not flat:
        turns.update(range_y=angle, range_z=angle)
    transforms = [
        monai.RandRotated(
            both, prob=0.2, keep_size=True, mode=('bilinear', 'nearest'), padding_mode='zeros', **turns),
        monai.RandZoomd(
            both, prob=0.2, min_zoom=0.7, max_zoom=1.4, mode=('trilinear', 'nearest'), padding_mode='constant'),
        monai.RandGaussianNoised(image, prob=0.1, std=math.sqrt(0.1)),
        monai.RandGaussianSmoothd(image, sigma_x=(0.5, 1), sigma_y=(0.5, 1), sigma_z=(0.5, 1), prob=0.2),
        monai.RandScaleIntensityd(image, factors=0.25, prob=0.15),
        monai.RandScaleIntensityFixedMeand(image, factors=0.25, preserve_range=True, fixed_mean=True, prob=0.15),
        monai.RandSimulateLowResolutiond(image, prob=0.25, zoom_range=(0.5, 1)),
        monai.RandAdjustContrastd(image, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        monai.RandAdjustContrastd(image, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        *(monai.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
    ]
    return monai.Compose(transforms)


def augment(
        transforms: Any, image: np.ndarray, label: np.ndarray, seed: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """One patch, as a pure function of `seed`.

    Args:
        transforms: Of `augmentation`.
        image: float32 (C, D, H, W), normalised.
        label: uint8 (D, H, W).
        seed: 0 to 2**32 - 1.

    Returns:
        float32 (C, D, H, W) and uint8 (D, H, W).
    """
    transforms.set_random_state(seed=seed)
    out = transforms({'image': torch.from_numpy(image), 'label': torch.from_numpy(label[None].astype(np.float32))})
    plain = [torch.as_tensor(out[key]).as_subclass(torch.Tensor) for key in ('image', 'label')]
    return plain[0].float().contiguous(), plain[1][0].round().to(torch.uint8).contiguous()
