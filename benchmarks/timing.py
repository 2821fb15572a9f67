"""Fair times on a machine that is not ours alone: contenders take turns, so that a slow minute slows all alike.

    seconds = take_turns({'old': timer(lambda: old(x)), 'new': timer(lambda: new(x))}, rounds=7)
    statistics.median(ratios(seconds['old'], seconds['new']))      # how many times faster the new one is
"""
import time
from typing import Callable, Dict, List, Mapping, Optional

__all__ = ['clock_name', 'ratios', 'take_turns', 'timer']


def take_turns(
        contenders: Mapping[str, Callable[[], float]],
        rounds: int,
        on_turn: Optional[Callable[[str], None]] = None,
) -> Dict[str, List[float]]:
    """Measure every contender once a round, each going first equally often; a first round warms up and is not counted.

    Args:
        contenders: By name, a call that measures itself and returns seconds (see `timer`).
        rounds: Rounds that count, at least 1.
        on_turn: Called with the contender's name after each measurement, those of the first round included.

    Returns:
        Seconds by name, one entry a round, in the order of the rounds.

    Raises:
        ValueError: If there is no round or no contender.
    """
    order = list(contenders)
    if rounds < 1 or not order:
        raise ValueError('there must be at least one round and one contender')
    seconds: Dict[str, List[float]] = {name: [] for name in order}
    for number in range(rounds + 1):
        start = number % len(order)
        for name in order[start:] + order[:start]:
            elapsed = contenders[name]()
            if number:
                seconds[name].append(elapsed)
            if on_turn is not None:
                on_turn(name)
    return seconds


def timer(call: Callable[[], object], device: str = 'cpu', threads: int = 1) -> Callable[[], float]:
    """A call that runs `call` and returns the seconds it took, by the clock that `clock_name` names."""
    if device.startswith('cuda'):
        import torch

        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
    else:
        # One thread's CPU time is its wall time on a machine that does nothing else, and much steadier on others.
        now = time.process_time if threads == 1 else time.perf_counter

        def measure() -> float:
            start = now()
            call()
            return now() - start
    return measure


def clock_name(device: str = 'cpu', threads: int = 1) -> str:
    """What `timer` reads, in words."""
    if device.startswith('cuda'):
        return 'CUDA events'
    return 'CPU time of one thread' if threads == 1 else 'wall time'


def ratios(slow: List[float], fast: List[float]) -> List[float]:
    """slow / fast, round by round: both of a pair met the same state of the machine."""
    return [a / b for a, b in zip(slow, fast)]
