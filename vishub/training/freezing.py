"""Training a part of a model: which parameters stand still, and that what stands still really does."""
from fnmatch import fnmatchcase
from typing import Sequence

from torch import nn

from vishub.errors import InputError

__all__ = ['freeze', 'freeze_all_but_head', 'rest_frozen']


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names fit a pattern, or begin with it as a whole part: `stem`, `stages.[01].*`.

    Raises:
        InputError: If a pattern fits nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        chosen = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')}
        if not chosen:
            parts = list(dict.fromkeys(name.split('.')[0] for name in names))
            raise InputError(f"freeze '{pattern}' fits no parameter; the model's parts are {', '.join(parts)}")
        for name, parameter in model.named_parameters():
            if name in chosen:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f'freeze {", ".join(patterns)} leaves nothing to train')


def freeze_all_but_head(model: nn.Module) -> None:
    """Leave only the classifier to train (a linear probe): what timm's `get_classifier` gives.

    Raises:
        InputError: If the model has no such classifier.
    """
    found = model.get_classifier() if hasattr(model, 'get_classifier') else None
    heads = found if isinstance(found, (tuple, list)) else [found]  # distilled models have two
    kept = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    if not kept:
        raise InputError(f'{type(model).__name__} has no classifier of its own to probe')
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def rest_frozen(model: nn.Module) -> None:
    """Put every module whose parameters are all frozen into eval mode: no dropout, and no moving batch statistics."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
