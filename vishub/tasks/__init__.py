"""What a user does with a model: one folder a task. Nothing heavy is imported until a pipeline is asked for."""
import importlib
from typing import Any

__all__ = ['Pipeline', 'Recipe', 'Result', 'pipeline', 'pipeline_class', 'pipeline_tasks']


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module('vishub.tasks.base'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
