"""A hub of vision models for PyTorch.

`import vishub` registers every architecture with timm, so that `timm.create_model('vishub/favit_b2')` works, and lets
`pretrained=True` look in `weights/`, the Hub cache and the Hub. Everything else is loaded when it is first used.
"""
import importlib
from typing import TYPE_CHECKING, Any, List

from vishub import models as models  # registers the architectures
from vishub.hub import find as _find
from vishub.models import builder as _builder
from vishub.models import namespace as _namespace

if TYPE_CHECKING:
    from vishub import pruning, tokens
    from vishub.catalog import UnknownNameError
    from vishub.errors import InputError, MissingExtraError, WeightsNotFoundError
    from vishub.hub.publish import publish
    from vishub.models.namespace import create_model, list_models
    from vishub.tasks import pipeline
    from vishub.tasks.tracking.pipeline import create_tracker

__version__ = "0.1.0"

__all__ = [
    'InputError', 'MissingExtraError', 'UnknownNameError', 'WeightsNotFoundError',
    'create_model', 'create_tracker', 'list_models', 'pipeline', 'pruning', 'publish', 'tokens',
]

_namespace.install()
_builder.set_weight_resolver(_find.resolve)

# packages that are loaded when they are first used
_PACKAGES = ('pruning', 'tokens')
# public name -> module that has it
_PUBLIC = {
    'InputError': 'vishub.errors',
    'MissingExtraError': 'vishub.errors',
    'UnknownNameError': 'vishub.catalog',
    'WeightsNotFoundError': 'vishub.errors',
    'create_model': 'vishub.models.namespace',
    'create_tracker': 'vishub.tasks.tracking.pipeline',
    'list_models': 'vishub.models.namespace',
    'pipeline': 'vishub.tasks',
    'publish': 'vishub.hub.publish',
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f'vishub.{name}')  # the import sets the attribute, too
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vishub' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # found directly next time
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *_PUBLIC, *_PACKAGES})
