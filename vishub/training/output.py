"""Whether a run will be able to store its results: asked before it trains, not after."""
import secrets
import shutil
from pathlib import Path
from typing import Iterable

import torch
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.training.processes import average, broadcast, on_main, rank_and_world

__all__ = ['checkpoint_bytes', 'rehearse', 'require_shared', 'require_space']


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


def require_shared(output: Path) -> None:
    """See that every process has the same `output`: a run on several machines needs a folder that they share.

    Raises:
        InputError: If a process does not see what the main process writes there; on every process.
    """
    if rank_and_world()[1] == 1:
        return
    name = broadcast(f'.rehearsal-{secrets.token_hex(8)}')
    on_main(lambda: (output / name).touch())
    seen = float(average(torch.tensor(float((output / name).exists()))))
    on_main(lambda: (output / name).unlink())
    if seen < 1:
        raise InputError(
            f"output folder '{output}' is not the same one for all processes: on several machines it must lie on a "
            'disk that they share, under the same name')


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
