"""Reversible steps: networks whose states are updated so that each update can be undone (Gomez et al. 2017; RevCol).

A network is written as a list of steps on named states. `run` executes them under ordinary autograd, which keeps all
activations. `run_reversible` keeps the last states alone: its backward pass undoes step after step, computes what each
had computed again, and so needs the activations of one step at a time, however many steps there are.

    update    s <- a * s + f(others)      undone as (s - f(others)) / a
    replace   s <- f(s, others)           cannot be undone: the old s is kept
    derive    s <- f(others)              computed again when it is needed, so it may be read only as long as these
                                          others are what they were
    emit      an output f(others)
"""
import contextlib
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ['Step', 'bounded', 'run', 'run_reversible']

States = Dict[str, torch.Tensor]


class Step(NamedTuple):
    """One step.

    Attributes:
        kind: `update`, `replace`, `derive` or `emit`, see above.
        target: The state (or output) that it makes.
        function: Takes the states `reads`, gives the new value, or f for an update.
        reads: Names of states; an update may not read its target.
        alpha: The factor a of an update, a parameter that broadcasts over the state.
    """
    kind: str
    target: str
    function: Callable[..., torch.Tensor]
    reads: Tuple[str, ...]
    alpha: Optional[torch.nn.Parameter] = None


def bounded(alpha: torch.Tensor, least: float = 1e-3) -> torch.Tensor:
    """`alpha` with a magnitude of at least `least`, so that one can divide by it; gradients as if it were `alpha`."""
    kept = torch.where(alpha.abs() < least, torch.where(alpha < 0, -least, least), alpha)
    return alpha + (kept - alpha).detach()


def run(steps: Iterable[Step], states: States) -> States:
    """Execute steps on `states`, in place; returns what they emitted."""
    emitted: States = {}
    for step in steps:
        value = step.function(*(states[name] for name in step.reads))
        if step.kind == 'update':
            states[step.target] = bounded(step.alpha) * states[step.target] + value
        elif step.kind == 'emit':
            emitted[step.target] = value
        else:
            states[step.target] = value
    return emitted


def run_reversible(
        steps: Sequence[Step],
        states: States,
        parameters: Sequence[torch.nn.Parameter],
) -> States:
    """As `run`, but with activation memory that does not grow with the number of steps (`replace` apart).

    Args:
        steps: No output name may occur twice.
        states: All initial states. They are left as they are.
        parameters: Every parameter that the steps use.
    """
    names, outputs = tuple(states), tuple(step.target for step in steps if step.kind == 'emit')
    values = _Reversible.apply(steps, names, outputs, len(parameters), *states.values(), *parameters)
    return dict(zip(outputs, values))


class _Reversible(torch.autograd.Function):

    @staticmethod
    def forward(ctx, steps, names, outputs, num_parameters, *tensors):
        device_type = tensors[0].device.type
        ctx.autocast = dict(
            device_type=device_type, dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type), cache_enabled=False)
        states = dict(zip(names, tensors))
        inputs, emitted, replaced = set(names), {}, []
        for step in steps:
            if step.kind == 'replace':
                replaced.append(states[step.target])
            # autocast must not keep the casts of parameters, which here know no gradient
            with torch.autocast(**ctx.autocast):
                emitted.update(run([step], states))
        ctx.steps, ctx.names, ctx.outputs, ctx.num_parameters = steps, names, outputs, num_parameters
        ctx.kept = tuple(name for name in states if name in inputs)
        ctx.save_for_backward(
            *(states[name] for name in ctx.kept), *replaced, *tensors[len(names):])
        return tuple(emitted[name] for name in outputs)

    @staticmethod
    def backward(ctx, *output_grads):
        saved = list(ctx.saved_tensors)
        states = dict(zip(ctx.kept, saved))
        parameters = saved[len(saved) - ctx.num_parameters:]
        replaced = saved[len(ctx.kept):len(saved) - ctx.num_parameters]
        grads: Dict[str, Optional[torch.Tensor]] = dict(zip(ctx.outputs, output_grads))
        parameter_grads: List[Optional[torch.Tensor]] = [None] * len(parameters)
        places = {id(parameter): i for i, parameter in enumerate(parameters)}

        with torch.autocast(**ctx.autocast):
            for position in reversed(range(len(ctx.steps))):
                step = ctx.steps[position]
                for name in step.reads:
                    if name not in states:
                        _derive(ctx.steps[:position], name, states)
                old = replaced.pop() if step.kind == 'replace' else None
                if old is not None:
                    states[step.target] = old
                _undo(step, states, grads, parameters, parameter_grads, places)
        return None, None, None, None, *(grads.get(name) for name in ctx.names), *parameter_grads


def _derive(steps: Sequence[Step], name: str, states: States) -> None:
    """Compute a derived state again, by the last of `steps` that made it."""
    step = next(step for step in reversed(steps) if step.kind == 'derive' and step.target == name)
    with torch.no_grad():
        states[name] = step.function(*(states[read] for read in step.reads))


def _undo(
        step: Step,
        states: States,
        grads: Dict[str, Any],
        parameters: Sequence[torch.Tensor],
        parameter_grads: List[Optional[torch.Tensor]],
        places: Dict[int, int],
) -> None:
    """Take one step back: restore its target, and pass gradients from there to what it read."""
    grad = grads.pop(step.target, None)
    if step.kind == 'derive':
        states.pop(step.target, None)
    if grad is None and step.kind != 'update':
        return
    reads = [states[name].detach().requires_grad_() for name in step.reads]
    with torch.enable_grad() if grad is not None else contextlib.nullcontext():
        value = step.function(*reads)
    if step.kind == 'update':
        alpha = bounded(step.alpha.detach())
        states[step.target] = (states[step.target] - value.detach()) / alpha
        if grad is None:
            return
        summed = (grad * states[step.target]).sum_to_size(alpha.shape)
        _add(parameter_grads, places[id(step.alpha)], summed)
        grads[step.target] = alpha * grad
    found = torch.autograd.grad(value, [*reads, *parameters], grad.to(value.dtype), allow_unused=True)
    for name, one in zip(step.reads, found):
        _add(grads, name, one)
    for i, one in enumerate(found[len(reads):]):
        _add(parameter_grads, i, one)


def _add(sums: Any, key: Any, value: Optional[torch.Tensor]) -> None:
    if value is not None:
        present = sums[key] if isinstance(sums, list) else sums.get(key)
        sums[key] = value if present is None else present + value
