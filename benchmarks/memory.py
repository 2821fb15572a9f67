"""Peak memory of a call: what tensors take while it runs, above what they took before. Libraries' own are not in it."""
from typing import Callable

import torch

__all__ = ['peak_bytes']


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that tensors which `call` allocates take at one time.

    On the CPU the profiler's list of allocations is added up: the process's own peak would have what importing took.
    """
    if device.startswith('cuda'):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # each is one allocation or, below zero, a release
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
