"""How well a mask fits the truth."""
from typing import List, Optional

import numpy as np

__all__ = ['dice_of_classes']


def dice_of_classes(found: np.ndarray, truth: np.ndarray, num_classes: int) -> List[Optional[float]]:
    """Dice of each foreground class, 0 to 1: twice the common voxels over the sum of both.

    A class that neither has gives None (there is nothing to measure); one that only one of them has gives 0.

    Args:
        found, truth: Labels (D, H, W), whole numbers.
        num_classes: K, with the background.
    """
    values: List[Optional[float]] = []
    for kind in range(1, num_classes):
        a, b = found == kind, truth == kind
        total = int(a.sum()) + int(b.sum())
        values.append(2 * int((a & b).sum()) / total if total else None)
    return values
