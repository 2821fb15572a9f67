"""Loaded pipelines, kept for the next request: a few at most, so that memory stays bounded."""
import threading
from collections import OrderedDict
from typing import Callable, Tuple

import vishub
from vishub.tasks.base import Pipeline

__all__ = ['PIPELINES', 'PipelineCache']


class PipelineCache:
    """The pipelines used last. Safe for many threads; a model is never loaded twice at once.

    A pipeline that is dropped while a request still uses it lives until that request ends.

    Args:
        capacity: How many to keep, at least 1.
        load: `load(task, model)` gives a pipeline; `vishub.pipeline` by default.
    """

    def __init__(self, capacity: int = 2, load: Callable[[str, str], Pipeline] = vishub.pipeline) -> None:
        if capacity < 1:
            raise ValueError(f'capacity is {capacity}; it must be at least 1')
        self.capacity = capacity
        self._load = load
        self._kept: OrderedDict[Tuple[str, str], Pipeline] = OrderedDict()  # the one used last comes last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Tuple[str, str]) -> bool:
        return key in self._kept

    def get(self, task: str, model: str) -> Pipeline:
        """The pipeline of a task with these weights, loaded if it is not here. Raises what loading raises."""
        key = (task, model)
        with self._lock:  # held while loading: two requests for one model wait for one load
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                while len(self._kept) >= self.capacity:  # before loading, so that the peak is bounded too
                    self._kept.popitem(last=False)
                self._kept[key] = self._load(task, model)
            return self._kept[key]


PIPELINES = PipelineCache()
