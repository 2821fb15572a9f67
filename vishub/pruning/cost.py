"""What a block costs as a function of its sizes: operations, parameters, or time measured on this device.

A cost is a callable (E, heads, query size, value size, MLP size) -> float for one block, zero where nothing is left.
"""
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import nn

from vishub.files import atomic_path
from vishub.models.nvit import Block, NViT
from vishub.pruning.structure import BLOCK_KINDS, Key, nvit_args

__all__ = [
    'BlockCost', 'LatencyTable', 'block_costs', 'block_macs', 'block_params', 'count_macs', 'count_params',
    'cost_per_unit', 'time_model',
]

BlockCost = Callable[[int, int, int, int, int], float]

# Sizes at or below which removing one more unit is no longer rewarded (the official floors).
_FLOOR = {'head': 2, 'QK': 8, 'V': 8, 'MLP': 16}


def block_macs(num_tokens: int) -> BlockCost:
    """Multiply-accumulates of a block for `num_tokens` tokens."""
    def cost(embed: int, heads: int, qk: int, v: int, mlp: int) -> float:
        n = num_tokens
        return float(
            n * embed * heads * (2 * qk + v) + n * n * heads * (qk + v) + n * heads * v * embed + 2 * n * embed * mlp)
    return cost


def block_params(embed: int, heads: int, qk: int, v: int, mlp: int) -> float:
    """Parameters of a block with all biases, without token scale."""
    return float(
        4 * embed + (embed + 1) * heads * (2 * qk + v) + heads * v * embed + embed + (embed + 1) * mlp
        + mlp * embed + embed)


def block_costs(cost: BlockCost, dims: Mapping[str, Any]) -> List[float]:
    """Cost of every block."""
    return [cost(dims['EMB'], *sizes) for sizes in zip(*(dims[kind] for kind in BLOCK_KINDS))]


def cost_per_unit(cost: BlockCost, dims: Mapping[str, Any]) -> Dict[Key, float]:
    """What removing one more unit of each kind saves; 0 at the official floors (2 heads, 8, 8, 16)."""
    now = block_costs(cost, dims)
    smaller = block_costs(cost, dict(dims, EMB=dims['EMB'] - 1))
    saved: Dict[Key, float] = {('EMB', 0): sum(now) - sum(smaller)}
    for index, before in enumerate(now):
        sizes = {kind: dims[kind][index] for kind in BLOCK_KINDS}
        for kind in BLOCK_KINDS:
            saved[kind, index] = 0.
            if sizes[kind] > _FLOOR[kind]:
                fewer = dict(sizes, **{kind: sizes[kind] - 1})
                saved[kind, index] = before - cost(dims['EMB'], *(fewer[k] for k in BLOCK_KINDS))
    return saved


def count_macs(model: NViT, dims: Optional[Mapping[str, Any]] = None) -> int:
    """Multiply-accumulates of one image at the built input size: convolution, linear layers and attention products.

    Norms, activations and additions are not counted. With `dims`, those of the model as if it had these sizes.
    """
    dims = model.dims if dims is None else dims
    patches = model.patch_embed.num_patches
    patch_values = model.patch_embed.proj.weight[0].numel()
    heads = (2 if model.distilled else 1) * dims['EMB'] * model.num_classes
    blocks = block_costs(block_macs(patches + model.num_prefix_tokens), dims)
    return int(patches * patch_values * dims['EMB'] + heads + sum(blocks))


def count_params(model: NViT, dims: Optional[Mapping[str, Any]] = None) -> int:
    """Parameters of the model, or of the same model with the sizes `dims`."""
    if dims is not None:
        with torch.device('meta'):
            model = NViT(**dict(nvit_args(model), dims=dims))
    return sum(parameter.numel() for parameter in model.parameters())


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


@torch.no_grad()
def _median_seconds(function: Callable[[torch.Tensor], Any], x: torch.Tensor, repeats: int, warmup: int = 3) -> float:
    for _ in range(warmup):
        function(x)
    times = []
    for _ in range(repeats):
        _synchronize(x.device)
        start = time.perf_counter()
        function(x)
        _synchronize(x.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _attention_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.attn(block.norm1(x))


def _mlp_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.mlp(block.norm2(x))


def time_model(model: nn.Module, batch_size: int, repeats: int = 20) -> float:
    """Median seconds of a forward pass in eval mode on the model's device, for `batch_size` images of its size."""
    parameter = next(model.parameters())
    size = (batch_size, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    model.eval()
    seconds = _median_seconds(model, images, repeats)
    model.train(was_training)
    return seconds


def _interpolate(axes: Sequence[Sequence[int]], values: np.ndarray, point: Sequence[float]) -> float:
    """Multilinear interpolation; outside the grid the outermost cell is continued."""
    for axis, coordinate in zip(axes, point):  # each turn removes the first axis of `values`
        if len(axis) == 1:
            values = values[0]
            continue
        cell = int(np.clip(np.searchsorted(axis, coordinate, side='right') - 1, 0, len(axis) - 2))
        weight = (coordinate - axis[cell]) / (axis[cell + 1] - axis[cell])
        values = values[cell] * (1 - weight) + values[cell + 1] * weight
    return float(values)


def _axis(largest: int, smallest: int, points: int) -> List[int]:
    """`points` sizes from smallest to largest, evenly spaced."""
    smallest = min(smallest, largest)
    return sorted({int(round(size)) for size in np.linspace(smallest, largest, points)})


def _monotone(values: np.ndarray) -> np.ndarray:
    """Running maximum along every axis: a larger block is never taken to be faster (noise of the clock)."""
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of a block on a grid of sizes, interpolated multilinearly: a `BlockCost`.

    The two halves of a block run one after the other, so they are measured apart: attention over (E, heads, QK, V)
    and MLP over (E, MLP). That makes the table small enough to be measured on the machine at hand.

    Attributes:
        axes: Grid sizes by kind (`EMB`, `head`, `QK`, `V`, `MLP`), ascending.
        attention: Seconds, array (EMB, head, QK, V), norm and residual included.
        mlp: Seconds, array (EMB, MLP), norm and residual included.
        conditions: What was measured where (device, tokens, batch size, torch version, threads).
    """
    axes: Dict[str, List[int]]
    attention: np.ndarray
    mlp: np.ndarray
    conditions: Dict[str, Any]

    def __call__(self, embed: int, heads: int, qk: int, v: int, mlp: int) -> float:
        axes = self.axes
        attention = _interpolate(
            [axes['EMB'], axes['head'], axes['QK'], axes['V']], self.attention, [embed, heads, qk, v])
        return attention + _interpolate([axes['EMB'], axes['MLP']], self.mlp, [embed, mlp])

    @classmethod
    def measure(
            cls,
            model: NViT,
            batch_size: int = 16,
            points: int = 3,
            repeats: int = 20,
            cache: Union[str, Path, None] = None,
            progress: Optional[Callable[[int, int], None]] = None,
    ) -> 'LatencyTable':
        """Measure the blocks of `model` on its device, or read what was measured before under the same conditions.

        Args:
            model: Its token count, largest sizes, device and dtype are used, never its weights.
            batch_size: Images at a time.
            points: Sizes per kind, from one pruning group to the full size (one more for EMB and MLP).
            repeats: Runs per grid point after three warm-up runs; the median counts.
            cache: Folder of measured tables; by default `$XDG_CACHE_HOME/vishub/latency`.
            progress: Called with (points done, points in all).
        """
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        dims = model.dims
        axes = {
            'EMB': _axis(dims['EMB'], 16, points + 1),
            'head': _axis(max(dims['head']), 1, points),
            'QK': _axis(max(dims['QK']), 8, points),
            'V': _axis(max(dims['V']), 8, points),
            'MLP': _axis(max(dims['MLP']), 16, points + 1),
        }
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or 'cpu'
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        conditions = dict(
            device=f'{device.type}: {name}', tokens=tokens, batch_size=batch_size, dtype=str(dtype), repeats=repeats,
            torch=torch.__version__, threads=torch.get_num_threads(), axes=axes)
        file = _cache_file(cache, conditions)
        if file.is_file():
            return cls.load(file)

        def make_block(embed: int, heads: int, qk: int, v: int, mlp: int) -> Tuple[Block, torch.Tensor]:
            block = Block(embed, heads, qk, v, mlp, scale=qk ** -0.5).to(device=device, dtype=dtype).eval()
            return block, torch.randn(batch_size, tokens, embed, device=device, dtype=dtype)

        attention_points = list(itertools.product(axes['EMB'], axes['head'], axes['QK'], axes['V']))
        mlp_points = list(itertools.product(axes['EMB'], axes['MLP']))
        total, attention, mlp = len(attention_points) + len(mlp_points), [], []
        for embed, heads, qk, v in attention_points:
            block, x = make_block(embed, heads, qk, v, 16)
            attention.append(_median_seconds(partial(_attention_half, block), x, repeats))
            if progress:
                progress(len(attention), total)
        for embed, hidden in mlp_points:
            block, x = make_block(embed, 1, 8, 8, hidden)
            mlp.append(_median_seconds(partial(_mlp_half, block), x, repeats))
            if progress:
                progress(len(attention) + len(mlp), total)
        shape = [len(axes[kind]) for kind in ('EMB', 'head', 'QK', 'V')]
        table = cls(
            axes=axes,
            attention=_monotone(np.reshape(attention, shape)),
            mlp=_monotone(np.reshape(mlp, (shape[0], len(axes['MLP'])))),
            conditions=conditions,
        )
        table.save(file)
        return table

    def save(self, path: Union[str, Path]) -> None:
        """Write the table as JSON, whole or not at all."""
        content = dict(
            axes=self.axes, attention=self.attention.tolist(), mlp=self.mlp.tolist(), conditions=self.conditions)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content), encoding='utf-8')

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'LatencyTable':
        """Read a table that `save` wrote."""
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        return cls(
            axes=content['axes'], attention=np.asarray(content['attention']), mlp=np.asarray(content['mlp']),
            conditions=content['conditions'])


def _cache_file(cache: Union[str, Path, None], conditions: Mapping[str, Any]) -> Path:
    """Where a table measured under these conditions lies: the name is their checksum."""

    if cache is None:
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'vishub' / 'latency'
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache) / f'{digest}.json'
