"""What a model costs: parameters and multiply-accumulates, counted and never typed.

Models are built on the meta device: shapes only, so that no memory is filled and nothing is computed.
"""
import functools
from typing import Tuple

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs', 'count_parameters', 'default_input', 'module_macs']


@functools.cache
def count_parameters(model_name: str) -> int:
    """Number of parameters of a registered `architecture` or `architecture.tag`."""
    return sum(p.numel() for p in _on_meta(model_name).parameters())


def default_input(model_name: str) -> Tuple[int, ...]:
    """Shape of the default input without the batch, e.g. (3, 224, 224); a tag may have one of its own."""
    return tuple(_on_meta(model_name).pretrained_cfg['input_size'])


def count_macs(model_name: str) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention for one input of the default size.

    Elementwise work, normalisation and pooling are not counted. A model that takes other arguments than a batch of
    images gives examples of them: `example_inputs()`, a tuple.
    """
    model = _on_meta(model_name).eval()
    if hasattr(model, 'example_inputs'):
        return module_macs(model, *model.example_inputs())
    return module_macs(model, torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))


def module_macs(model: nn.Module, *inputs: torch.Tensor) -> int:
    """The same count for a model that exists and a batch (or arguments) of its own, all on any one device."""
    # Only plain attention consists of products that the counter knows on every device.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def _on_meta(model_name: str) -> nn.Module:
    with torch.device('meta'):
        return timm.create_model(model_name)
