"""Pictures to learn to generate: classification's data sets, as pixels in [-1, 1] or as latents of a VAE."""
from typing import Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vishub.errors import InputError
from vishub.tasks.classification.data import ImageSet
from vishub.training.recipe import SampleKey

__all__ = ['PictureSet', 'centre_crop', 'from_pixels', 'to_pixels']


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to `side`, with antialiasing, and take the square in the middle, as ADM and DiT do.

    Large pictures are first halved by box averages, as long as that leaves twice the side.
    """
    while min(image.size) >= 2 * side and min(image.size) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """Pictures (B, C, H, W) in [-1, 1] (others are clipped) -> uint8 (B, H, W, C)."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


class PictureSet(Dataset):
    """Training samples `(uint8 (C, side, side), label)` by `SampleKey`.

    Args:
        images: The images.
        flip: Mirror each picture by chance: right for photographs, wrong where left and right differ.
        seed: Seed of the flips and of the order in which short epochs go through the images.
        epoch_size: Samples of an epoch, at most all; the next epoch goes on where it ended. Generation takes many
            epochs, and a short one lets a run be watched more closely.

    Raises:
        InputError: If epoch_size is not in 1 .. the number of images.
    """

    def __init__(self, images: ImageSet, flip: bool = False, seed: int = 0, epoch_size: Optional[int] = None):
        if epoch_size is not None and not 1 <= epoch_size <= len(images):
            raise InputError(f'epoch_size is {epoch_size}: give 1 to {len(images)}, the training pictures')
        self.images, self.flip, self.seed = images, flip, seed
        self.epoch_size = epoch_size or len(images)
        self._order: Tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.epoch_size

    def image_index(self, epoch: int, index: int) -> int:
        """The image of a sample: sample `index` of epoch `epoch` of an endless row of shuffled passes."""
        if self.epoch_size == len(self.images):
            return index
        number, place = divmod(epoch * self.epoch_size + index, len(self.images))
        if self._order[0] != number:
            self._order = number, np.random.default_rng([self.seed, 1, number]).permutation(len(self.images))
        return int(self._order[1][place])

    def __getitem__(self, key: SampleKey) -> Tuple[torch.Tensor, int]:
        epoch, index, side = key
        chosen = self.image_index(epoch, index)
        image = self.images[chosen]  # H, W, C
        if image.shape[:2] != (side, side):
            cropped = np.asarray(centre_crop(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), side))
            image = cropped.reshape(side, side, -1)
        if self.flip and np.random.default_rng([self.seed, epoch, index]).random() < 0.5:
            image = image[:, ::-1]
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), int(self.images.labels[chosen])
