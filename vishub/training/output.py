"""Whether a run will be able to store its results: asked before it trains, not after."""
import shutil
from pathlib import Path
from typing import Iterable

import torch
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path

__all__ = ['checkpoint_bytes', 'rehearse', 'require_space']


def rehearse(output: Path) -> None:
    """Write and remove a file in `output`, so that a run which could not store its result fails before training.

    Raises:
        InputError: If the folder cannot be made or written.
    """
    try:
        with atomic_path(output / 'rehearsal.txt') as path:
            path.write_text('a file that is written before training to see that it can be\n')
        (output / 'rehearsal.txt').unlink()
    except OSError as error:
        raise InputError(f"output folder '{output}' cannot be written: {error}") from error


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def checkpoint_bytes(model: nn.Module, averaged: bool) -> int:
    """Size of a run's checkpoint: weights, averaged weights, and two moments of every trained weight, as Adam has."""
    weights = _bytes(model.state_dict().values())
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    return weights * (2 if averaged else 1) + 2 * trained


def require_space(output: Path, last: int, best: int, *, has_last: bool, has_best: bool) -> None:
    """See that the disk has room for the run's files.

    A file is replaced by writing the new one beside the old one: each needs its size twice, or once where the old one
    is there already. The finished weights take at most as much as the best ones.

    Args:
        output: Folder of the run.
        last: Bytes of the checkpoint that the run continues from.
        best: Bytes of the best weights.
        has_last: Whether that checkpoint is on the disk already.
        has_best: Whether the best weights are.

    Raises:
        InputError: If there is too little room.
    """
    needed = last * (1 if has_last else 2) + best * (1 if has_best else 2) + best
    free = shutil.disk_usage(output).free
    if free < needed:
        raise InputError(
            f"output folder '{output}' has {free / 1e6:.1f} MB of free space, the checkpoints need "
            f'{needed / 1e6:.1f} MB; make room or choose another folder')
