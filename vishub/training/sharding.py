"""FSDP: weights, gradients and optimizer state lie split over the processes, as Accelerate's configuration asks.

torch's `fully_shard` does the splitting, through Accelerate. A split tensor is a `DTensor`. Whatever leaves the
training step is whole: the checkpoint is the one that an unsplit run of as many processes writes, and validation and
the finished weights are of an ordinary model. So recipes need to know nothing of all this.
"""
import copy
import os
from typing import Any, Dict, Mapping, Optional

import torch
from torch import nn

from vishub.errors import InputError

__all__ = ['Sharding', 'gather', 'make_sharding', 'split_like']

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch without torch.distributed
    DTensor = ()  # type: ignore[assignment,misc]


def make_sharding(accelerator: Any) -> Optional['Sharding']:
    """What splits the model, where the user configured Accelerate for FSDP; None where every process has all weights.

    Raises:
        InputError: If Accelerate is configured for another way of splitting: the first FSDP, DeepSpeed, Megatron.
    """
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    kind = accelerator.distributed_type
    if kind.value in ('DEEPSPEED', 'MEGATRON_LM'):
        raise InputError(
            f'Accelerate is configured for {kind.value}, which this loop does not know; '
            'to split the weights use FSDP: accelerate launch --use_fsdp --fsdp_version 2')
    asked = os.environ.get('ACCELERATE_USE_FSDP', 'false').lower() == 'true'
    if kind == DistributedType.MULTI_CPU and asked:
        # torch splits on the CPU, too; Accelerate alone looks for FSDP on accelerators only
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    elif kind != DistributedType.FSDP:
        return None
    plugin = accelerator.state.fsdp_plugin
    if getattr(plugin, 'fsdp_version', 1) != 2:  # an older Accelerate knows the first only
        raise InputError(
            'Accelerate is configured for version 1 of FSDP; this loop takes version 2: '
            'accelerate launch --use_fsdp --fsdp_version 2, or fsdp_version: 2 in the configuration file')
    # Every process builds the same model. Accelerate's way to hand out the main process's knows no buffers.
    plugin.cpu_ram_efficient_loading = False
    # The loop's autocast decides what is computed in half precision, as it does without FSDP.
    plugin.mixed_precision_policy = None
    return Sharding(accelerator)


class Sharding:
    """Splits a model, its averaged weights and its optimizer, and puts a whole model together again."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.whole: nn.Module
        self.checked = False

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Optional[nn.Module]) -> Any:
        """Split the three in place. Returns Accelerate's (model, optimizer).

        Raises:
            InputError: If the model has what FSDP cannot split.
        """
        # Whole models are needed for validation only, and wait where memory is cheapest.
        self.whole = copy.deepcopy(model).cpu()
        try:
            prepared = self.accelerator.prepare(model, optimizer)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise InputError(f'FSDP cannot split this model: {error}; train it without FSDP') from error
        if average is not None:
            split = dict(model.named_parameters())
            for name, parameter in list(average.named_parameters()):
                owner, _, leaf = name.rpartition('.')
                shard = nn.Parameter(split_like(parameter.detach(), split[name]), requires_grad=False)
                setattr(average.get_submodule(owner), leaf, shard)
        return prepared

    def step(self, optimizer: Any) -> None:
        """Take a step with Accelerate's optimizer, and see behind the first one that its state can be stored.

        Raises:
            InputError: If the optimizer does not work on split weights, or keeps anything but counters and tensors
                that are split as the weights are.
        """
        inner = optimizer.optimizer
        refusal = InputError(
            f'{type(inner).__name__} does not work on split weights; with FSDP choose an optimizer that treats each '
            'weight by itself, such as adamw, lion or sgd')
        try:
            optimizer.step()
        except RuntimeError as error:
            if 'DTensor' not in str(error):
                raise
            raise refusal from error
        if not self.checked:
            self.checked = True
            for weight, state in inner.state.items():
                for value in state.values():
                    whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
                    if (whole and value.ndim) or (isinstance(value, DTensor) and value.shape != weight.shape):
                        raise refusal

    @torch.no_grad()
    def assemble(self, model: nn.Module) -> nn.Module:
        """An ordinary model with the values of a split one, the same on every process; there is only one of it.

        Every process must call this.
        """
        whole = self.whole.to(self.accelerator.device)
        for named in ('named_parameters', 'named_buffers'):
            values = dict(getattr(model, named)())
            for name, target in getattr(whole, named)():
                target.copy_(_full(values[name]))
        return whole

    def put_away(self) -> None:
        """Free the device's memory of the assembled model."""
        self.whole.cpu()


def split_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole and the same on every process, split as `example` is; as it is where that is not split.

    Raises:
        InputError: If `example` is split and has another shape.
    """
    if not isinstance(example, DTensor):
        return tensor
    if tensor.shape != example.shape:
        raise InputError(f'a tensor of {tuple(tensor.shape)} cannot be split as one of {tuple(example.shape)}')
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def gather(named: Mapping[str, torch.Tensor], keep: bool) -> Dict[str, torch.Tensor]:
    """Tensors by name, whole; empty where `keep` is False. Every process must call this with the same names.

    One tensor after the other becomes whole, and leaves the device.
    """
    kept = {}
    for name, tensor in named.items():
        value = _full(tensor)
        if keep:
            kept[name] = value.detach().cpu()
    return kept


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
