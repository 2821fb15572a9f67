"""What many processes need of each other: seeds, shares, gathered results, common errors. One process needs nothing.

Every function may be called without a process group too; it then does what is right for a single process.
"""
import random
from typing import Any, Callable, List, Tuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

__all__ = [
    'average', 'broadcast', 'gather_shares', 'my_share', 'on_main', 'rank_and_world', 'seed_step', 'sync_buffers',
]

T = TypeVar('T')


def rank_and_world() -> Tuple[int, int]:
    """(number of this process, number of processes); (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed python, numpy and torch as a function of (seed, step, rank)."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))  # noqa: NPY002  timm's Mixup draws from the global generator
    torch.manual_seed(int(words[1]))


def my_share(total: int) -> List[int]:
    """Indices 0 to `total` - 1 that this process works on: every world-th.

    All processes get equally many; where that does not come out even, the first indices are done twice, and
    `gather_shares` drops the repetition.
    """
    rank, world = rank_and_world()
    if world == 1:
        return list(range(total))
    rounds = -(-total // world)
    return [(number * world + rank) % total for number in range(rounds)]


def gather_shares(share: torch.Tensor, total: int) -> torch.Tensor:
    """Results of `my_share(total)`, `(len(share), …)`, from all processes: `(total, …)` in the order of the indices.

    Every process gets the same tensor, on the device of its share.
    """
    _, world = rank_and_world()
    if world == 1:
        return share
    device = _device_of_group(share.device)
    local = share.to(device).contiguous()
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].to(share.device)  # R, W, … -> R * W, …


def average(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over the processes; `value` itself is left alone."""
    _, world = rank_and_world()
    if world == 1:
        return value
    total = value.detach().clone().to(_device_of_group(value.device))
    dist.all_reduce(total)
    return (total / world).to(value.device)


def broadcast(value: T) -> T:
    """The main process's value (anything that can be pickled), on every process."""
    if rank_and_world()[1] == 1:
        return value
    box: List[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on the main process; all get its result, or raise its error, so that none waits for ever."""
    if rank_and_world()[1] == 1:
        return function()
    result, error = None, None
    if rank_and_world()[0] == 0:
        try:
            result = function()
        except Exception as raised:  # raised again below, on every process
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def sync_buffers(model: nn.Module) -> None:
    """Give every process the main process's buffers (running statistics of batch norm), which DDP keeps local."""
    if rank_and_world()[1] == 1:
        return
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def _device_of_group(device: torch.device) -> torch.device:
    """Where tensors must lie for the process group: NCCL takes none from the CPU."""
    if device.type == 'cpu' and 'nccl' in str(dist.get_backend()):
        return torch.device('cuda', torch.cuda.current_device())
    return device
