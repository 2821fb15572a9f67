"""The example pictures. `README.md` beside them says where each comes from and under which licence."""
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

__all__ = ['EXAMPLES', 'FOLDER', 'Example']

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Example:
    """One picture.

    Attributes:
        file: File name in this folder.
        caption: What it shows, for the user.
        data: Tag of the weights it suits, e.g. `cifar10`.
    """
    file: str
    caption: str
    data: str

    @property
    def path(self) -> Path:
        return FOLDER / self.file


EXAMPLES: Tuple[Example, ...] = (
    Example('firetruck.jpg', 'Fire engine', 'cifar10'),
    Example('jet.jpg', 'Jet', 'cifar10'),
    Example('cat.jpg', 'Cat', 'cifar10'),
    Example('coffee.jpg', 'Coffee', 'cifar10'),
    Example('fashion-ankle-boot.png', 'Ankle boot', 'fashion_mnist'),
    Example('fashion-trouser.png', 'Trouser', 'fashion_mnist'),
    Example('fashion-bag.png', 'Bag', 'fashion_mnist'),
)
