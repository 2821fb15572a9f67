"""One file that holds a run: tensors as safetensors, everything else as JSON in its header. No pickle.

The file is replaced as a whole, so that a run killed at any moment finds either the old or the new checkpoint.
"""
import json
from pathlib import Path
from typing import Any, Dict, Tuple, Union

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.training.sharding import split_like

__all__ = ['load_checkpoint', 'load_optimizer', 'optimizer_state', 'save_checkpoint']

FORMAT = 1


def save_checkpoint(path: Union[str, Path], tensors: Dict[str, Dict[str, torch.Tensor]], state: Dict[str, Any]) -> None:
    """Write `tensors` (`{part: {name: tensor}}`) and `state` (JSON types) to `path`, atomically.

    Raises:
        OSError: If the folder cannot be written or the disk is full; the old file is then still whole.
    """
    flat = {}
    for part, named in tensors.items():
        for name, tensor in named.items():
            # A copy of its own: safetensors refuses tensors that share memory (tied weights).
            flat[f'{part}/{name}'] = tensor.detach().to('cpu', copy=True).contiguous()
    with atomic_path(path) as temporary:
        save_file(flat, temporary, metadata={'vishub': json.dumps({'format': FORMAT, **state})})


def load_checkpoint(path: Union[str, Path]) -> Tuple[Dict[str, Dict[str, torch.Tensor]], Dict[str, Any]]:
    """Read what `save_checkpoint` wrote, as (tensors on the CPU, state).

    Raises:
        InputError: If the file is damaged or no checkpoint of this format.
    """
    tensors: Dict[str, Dict[str, torch.Tensor]] = {}
    try:
        with safe_open(str(path), framework='pt') as file:
            state = json.loads((file.metadata() or {})['vishub'])
            for key in list(file.keys()):  # no mapping: it cannot be iterated itself
                part, _, name = key.partition('/')
                tensors.setdefault(part, {})[name] = file.get_tensor(key)
    except Exception as error:  # safetensors raises its own classes, with no common base
        raise InputError(
            f"'{path}' cannot be read as a vishub checkpoint ({error}); delete it to start anew") from error
    if state.pop('format', None) != FORMAT:
        raise InputError(f"'{path}' has another checkpoint format; delete it to start anew")
    return tensors, state


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Take an optimizer's state apart: (tensors by `index/key`, JSON types)."""
    state = optimizer.state_dict()
    tensors: Dict[str, torch.Tensor] = {}
    scalars: Dict[str, Dict[str, Any]] = {}
    for index, values in state['state'].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f'{index}/{key}'] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {'scalars': scalars, 'param_groups': state['param_groups']}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Dict[str, torch.Tensor], state: Dict[str, Any]) -> None:
    """Restore what `optimizer_state` took apart; whole tensors are split as the optimizer's weights are."""
    per_parameter: Dict[int, Dict[str, Any]] = {int(i): dict(values) for i, values in state['scalars'].items()}
    weights = [parameter for group in optimizer.param_groups for parameter in group['params']]
    for name, tensor in tensors.items():
        index, _, key = name.partition('/')
        # counters are the same on every process
        value = tensor if tensor.ndim == 0 else split_like(tensor, weights[int(index)])
        per_parameter.setdefault(int(index), {})[key] = value
    groups = [
        # JSON has no tuples; torch's groups hold them everywhere but in 'params'.
        {k: tuple(v) if isinstance(v, list) and k != 'params' else v for k, v in group.items()}
        for group in state['param_groups']
    ]
    optimizer.load_state_dict({'state': per_parameter, 'param_groups': groups})
