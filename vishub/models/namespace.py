"""Names: teaches `timm.create_model` the owner prefix `vishub/`.

timm's `parse_model_name` splits a name into a source (`hf-hub`, `local-dir`, None for the registry) and the rest. A
bare `owner/name` it refuses with a ValueError (1.0.31), or it drops the owner without a word (1.0.20). This module
wraps that one function, the same way for both: `vishub/<name>` is the registered `<name>` if vishub registered it,
else an error; every other name goes to timm's own function untouched.
"""
import functools
from typing import Any, Callable, List, Optional, Tuple

import timm
from timm.models import _factory
from torch import nn

from vishub import catalog

__all__ = ['create_model', 'install', 'list_models']

PREFIX = 'vishub/'
NameParser = Callable[[str], Tuple[Optional[str], str]]


def install() -> None:
    """Extend timm's parser; once it is extended, also by an earlier load of this module, do nothing."""
    if hasattr(_factory.parse_model_name, 'timm_parser'):
        return
    parser = _extend(_factory.parse_model_name)
    _factory.parse_model_name = parser  # what create_model and safe_model_name call
    timm.models.parse_model_name = parser  # what users import


def _extend(timm_parser: NameParser) -> NameParser:
    @functools.wraps(timm_parser)
    def parse_model_name(model_name: str) -> Tuple[Optional[str], str]:
        if isinstance(model_name, str) and model_name.startswith(PREFIX):
            return None, _registered(model_name)
        return timm_parser(model_name)

    parse_model_name.timm_parser = timm_parser  # type: ignore[attr-defined]
    return parse_model_name


def _registered(model_name: str) -> str:
    """`vishub/arch[.tag]` -> `arch[.tag]`, refused unless vishub registered that architecture and that tag."""
    name = model_name[len(PREFIX):]
    architecture = name.partition('.')[0]
    if _is_ours(architecture) and name in (architecture, *timm.list_models(architecture, include_tags=True)):
        return name
    ours = [n for n in timm.list_models() if _is_ours(n)]
    raise catalog.unknown('model', model_name, ours + timm.list_models(ours, include_tags=True))


def _is_ours(architecture: str) -> bool:
    return timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith('vishub.')


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model of vishub; the same call as `timm.create_model('vishub/<model_name>', …)`.

    Args:
        model_name: `favit_b2`, `favit_b2.cifar10`, either with `vishub/` in front; or with a source of timm's in
            front, `hf-hub:<owner>/<name>` or `local-dir:<folder>`.
        pretrained: Load weights: from `weights/`, else the Hub cache, else the Hub, checked against the catalogue.
        **kwargs: What `timm.create_model` takes, e.g. `num_classes`, `in_chans`, `features_only`, `cache_dir`.

    Raises:
        vishub.UnknownNameError: If vishub has no such model; the message names the nearest three.
        vishub.WeightsNotFoundError: If `pretrained` and there are no weights, or they are damaged or out of reach.
    """
    if ':' not in model_name and not model_name.startswith(PREFIX):
        model_name = PREFIX + model_name
    model = timm.create_model(model_name, pretrained=pretrained, **kwargs)
    # timm notes the caller's arguments on the model since 1.0.2x; saving a model needs them on every version.
    noted = {key: value for key, value in kwargs.items() if value is not None and key not in _NOT_MODEL_ARGS}
    model._model_args = {**getattr(model, '_model_args', {}), **noted}
    return model


# Arguments of timm.create_model that say where weights come from or how to build, not what the model is.
_NOT_MODEL_ARGS = frozenset((
    'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir',
    'scriptable', 'exportable', 'no_jit', 'device', 'dtype',
))


def list_models(task: Optional[str] = None, pretrained: bool = False) -> List[str]:
    """Names of vishub's architectures, or with `pretrained` those of the trained weights (`architecture.tag`).

    Args:
        task: Only those for this task, e.g. `classification`.
        pretrained: List weights instead.

    Raises:
        vishub.UnknownNameError: If there is no such task.
    """
    architectures = catalog.architectures(task)
    if not pretrained:
        return [row.name for row in architectures]
    return [weight.name for row in architectures for weight in catalog.weights(row.name)]
