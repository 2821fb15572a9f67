"""Pruning from a trained model to a smaller one: the iterative procedure around the engine."""
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import torch
from torch import nn

from vishub.errors import InputError
from vishub.models.nvit import NViT
from vishub.pruning.cost import (
    BlockCost,
    LatencyTable,
    block_costs,
    block_macs,
    block_params,
    count_macs,
    count_params,
    time_model,
)
from vishub.pruning.distillation import head_logits, label_loss, mean_logits, soft_kl
from vishub.pruning.engine import GROUP_SIZES, Pruner, Schedule, smallest_dims
from vishub.pruning.report import PruningReport
from vishub.pruning.structure import BLOCK_KINDS, Key, Structure, as_nvit, nvit_args

__all__ = ['Pruned', 'prune', 'save']

_EVALUATION_BATCHES = 10  # of the calibration loader, where no evaluation loader is given


class Pruned(NamedTuple):
    """A pruned model and what was done to it."""
    model: NViT
    report: PruningReport


class _Target(NamedTuple):
    """A cost to get down to, as a share of the unpruned model's."""
    name: str
    share: float
    measure: Callable[[Mapping[str, Any]], float]  # sizes -> share
    cost: BlockCost  # of a block; saving it is rewarded

    def reached(self, dims: Mapping[str, Any]) -> bool:
        return self.measure(dims) <= self.share


def _target(
        model: NViT,
        latency: Optional[float],
        flops: Optional[float],
        params: Optional[float],
        table: Optional[LatencyTable],
        batch_size: int,
) -> _Target:
    """Check what is asked for.

    Raises:
        InputError: If not exactly one target is given, it is out of range, or cannot be reached.
    """
    given = {name: value for name, value in (
        ('target_latency', latency), ('target_flops', flops), ('target_params', params)) if value is not None}
    if len(given) != 1:
        raise InputError(
            f'prune: give one of target_latency, target_flops, target_params (got {", ".join(given) or "none"})')
    (name, value), = given.items()
    kind = name[len('target_'):]

    if kind == 'latency':
        if not 0 < value < 1:
            raise InputError(f'prune: target_latency is a share of the original, between 0 and 1 (got {value})')
        cost: BlockCost = table or LatencyTable.measure(model, batch_size=batch_size)
        original = sum(block_costs(cost, model.dims))
        target = _Target(kind, value, lambda dims: sum(block_costs(cost, dims)) / original, cost)
    else:
        count = count_macs if kind == 'flops' else count_params
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        whole = count(model)
        share = value if value < 1 else value / whole
        if not 0 < share < 1:
            raise InputError(f'prune: {name} is a share between 0 and 1, or a number below {whole} (got {value})')
        cost = block_macs(tokens) if kind == 'flops' else block_params
        target = _Target(kind, share, lambda dims: count(model, dims) / whole, cost)

    least = target.measure(smallest_dims(model.dims))
    if least > target.share:
        raise InputError(
            f'prune: {kind} {target.share:.3f} of the original cannot be reached; with the last group of every kind '
            f'left it is {least:.3f}')
    return target


def _check_groups(model: NViT) -> None:
    sizes = [('EMB', 'the model', model.dims['EMB'])]
    sizes += [(kind, f'block {i}', size) for kind in BLOCK_KINDS for i, size in enumerate(model.dims[kind])]
    for kind, where, size in sizes:
        if size < GROUP_SIZES[kind]:
            raise InputError(f'prune: {where} has {size} units of {kind}, fewer than one group of {GROUP_SIZES[kind]}')


def _batches(loader: Iterable[Any], model: NViT) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """The loader's (images, labels), on the model's device.

    Raises:
        InputError: If a batch is not such a pair.
    """
    place = dict(device=model.pos_embed.device)
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not torch.is_tensor(batch[1]):
            raise InputError('prune: the loader must yield (images, labels) batches; this one yields no labels')
        yield batch[0].to(**place, dtype=model.pos_embed.dtype), batch[1].to(**place)


@torch.no_grad()
def _accuracies(models: Mapping[str, NViT], batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> Dict[str, float]:
    """Top-1 in per cent of several models on the same batches."""
    correct, count = dict.fromkeys(models, 0), 0
    for images, labels in batches:
        labels = labels.argmax(dim=-1) if labels.ndim > 1 else labels
        count += len(labels)
        for name, model in models.items():
            correct[name] += int((model(images).argmax(dim=-1) == labels).sum())
    return {name: 100 * value / max(count, 1) for name, value in correct.items()}


def prune(
        model: nn.Module,
        loader: Iterable[Any],
        *,
        target_latency: Optional[float] = None,
        target_flops: Optional[float] = None,
        target_params: Optional[float] = None,
        schedule: Optional[Schedule] = None,
        latency_weight: float = 5e-4,
        latency_table: Optional[LatencyTable] = None,
        latency_batch_size: int = 16,
        lr: float = 1e-4,
        weight_decay: float = 0.05,
        kl_weight: float = 100.,
        temperature: float = 3.,
        cnn_teacher: Optional[nn.Module] = None,
        eval_loader: Optional[Iterable[Any]] = None,
        log: Optional[Callable[[str], None]] = None,
        progress: Optional[Callable[[int, float], None]] = None,
        saliency: Optional[Callable[[Structure], Dict[Key, torch.Tensor]]] = None,
) -> Pruned:
    """Prune a trained timm ViT/DeiT or NViT to a target, training it meanwhile (NViT, section "Inference procedure").

    Units of the whole model (embedding channels, heads, query/key and value channels, MLP units) compete in one
    ranking by Hessian-aware saliency less a reward for what removing them saves.

    Args:
        model: The trained model; it is not changed. It is pruned where it lies (device, dtype).
        loader: Yields (images (B, C, H, W) normalised, labels (B,) or (B, classes)), and can be iterated again.
        target_latency: Share (0, 1) of the unpruned blocks' time on this device, by a table measured on it.
        target_flops: Multiply-accumulates of an image, as a share (0, 1) or a number.
        target_params: Parameters, as a share (0, 1) or a number.
        schedule: How fast; `Schedule.paper()` is the official one, made for ImageNet.
        latency_weight: Weight of the reward, per unpruned model's cost. 0 ranks by saliency alone.
        latency_table: A table measured before; by default measured now, or read from the cache.
        latency_batch_size: Images a batch when time is measured.
        lr: Learning rate of AdamW during pruning; 0 leaves the weights as they are.
        weight_decay: Its weight decay.
        kl_weight: Weight of the unpruned model's answers in the loss, from the first pruning step on.
        temperature: Their softening.
        cnn_teacher: A model of images -> logits, whose top answers teach the distillation head.
        eval_loader: What accuracies are measured on; by default the first ten batches of `loader`.
        log: Told a sentence at every pruning step, e.g. `print`.
        progress: Called after every batch with (batches done, the target's cost now as a share of the original).
        saliency: See `Pruner`; None for the Hessian-aware one.

    Returns:
        The smaller dense model in eval mode (a `vishub.models.nvit.NViT`) and the report.

    Raises:
        InputError: If the model, the target or the loader cannot be used, or the target is not reached within
            `schedule.max_epochs` passes over the loader.
    """
    schedule = schedule or Schedule()
    original = as_nvit(model).eval().requires_grad_(False)
    pruned = as_nvit(model).requires_grad_(True)
    _check_groups(pruned)
    target = _target(pruned, target_latency, target_flops, target_params, latency_table, latency_batch_size)
    pruner = Pruner(pruned, target.cost, latency_weight, schedule, saliency or Structure.saliency)
    cnn_teacher = cnn_teacher.eval() if cnn_teacher is not None else None
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=lr, weight_decay=weight_decay) if lr > 0 else None

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head_logits(pruned, images)
        with torch.no_grad():
            teacher_labels = cnn_teacher(images).argmax(dim=-1) if cnn_teacher is not None else None
        loss = label_loss(logits, labels, teacher_labels)
        if kl_weight > 0 and pruner.steps_done:
            answers = mean_logits(head_logits(original, images))
            loss = loss + kl_weight * soft_kl(mean_logits(logits), answers, temperature)
        return loss

    pruned.train()
    history: List[Dict[str, Any]] = []
    batch_number = 0
    share = 1.
    done = False
    for _ in range(schedule.max_epochs):
        before = batch_number
        for images, labels in _batches(loader, pruned):
            loss = loss_of(images, labels)
            if not torch.isfinite(loss):
                raise InputError(f'prune: the loss is {loss.item()} at batch {batch_number}')
            pruned.zero_grad(set_to_none=True)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                pruner.structure.zero_dead()
            pruner.accumulate()  # gradient before the optimizer's step, weight after it, as officially
            if batch_number and batch_number % schedule.interval == 0:
                pruner.step(target.reached)
                pruned.eval()
                dims = pruner.structure.dims
                share = target.measure(dims)
                history.append(dict(batch=batch_number, loss=loss.item(), cost=share, dims=dims))
                if log is not None:
                    log(f'step {pruner.steps_done}: loss {loss.item():.4f}, {target.name} {share:.3f} of the original')
                done = target.reached(dims)
            batch_number += 1
            if progress is not None:
                progress(batch_number, share)
            if done:
                break
        if done:
            break
        if batch_number == before:
            raise InputError('prune: the loader gave no batches; it must be iterable again and again')
    if not done:
        raise InputError(
            f'prune: {target.name} is {target.measure(pruner.structure.dims):.3f} of the original after '
            f'{schedule.max_epochs} passes over the loader, not {target.share:.3f}; allow more epochs, a shorter '
            'interval or more groups per step')

    pruner.round_sizes()
    pruned.zero_grad(set_to_none=True)
    pruned.eval()
    dense = pruner.structure.dense().eval().requires_grad_(True)
    dense.pretrained_cfg = dense.default_cfg = dict(
        dense.pretrained_cfg, architecture='nvit', tag=None, num_classes=dense.num_classes)

    batches = _batches(loader if eval_loader is None else eval_loader, pruned)
    if eval_loader is None:
        batches = (batch for _, batch in zip(range(_EVALUATION_BATCHES), batches))
    report = PruningReport(
        target={target.name: target.share},
        reached=target.measure(dense.dims),
        dims_before=original.dims,
        dims_after=dense.dims,
        macs=(count_macs(original), count_macs(dense)),
        params=(count_params(original), count_params(dense)),
        seconds=(
            (time_model(original, latency_batch_size), time_model(dense, latency_batch_size))
            if target.name == 'latency' else None),
        accuracy=_accuracies({'original': original, 'masked': pruned, 'dense': dense}, batches),
        batches=batch_number,
        history=history,
    )
    return Pruned(dense, report)


def save(pruned: Pruned, folder: Union[str, Path], licence: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write model and report as a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` loads.

    Args:
        pruned: Result of `prune`.
        folder: Its name is the name of the weights, `nvit.<tag>`.
        licence: SPDX name of the licence of the weights that were pruned; it holds for the result too.
        dtype: Type in which weights are stored.
    """
    from vishub.hub import save_folder

    folder = save_folder(
        pruned.model, folder, metrics={}, card={'licence': licence}, dtype=dtype, model_args=nvit_args(pruned.model))
    pruned.report.save(folder)
    return folder
