"""The selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752): a linear recurrence whose coefficients are data.

    h_t = exp(D_t A) h_{t-1} + D_t B_t u_t        y_t = sum_n C_t[n] h_t[n]        D_t = softplus(delta_t + bias)

A recurrence over L positions would be L steps of tiny tensors. Here the sequence is cut into chunks of T positions,
T about sqrt(L) / 2, and the t-th positions of all chunks advance together: T steps for the chunks' end states, L / T
to carry these from chunk to chunk, T more with the right initial states. Only exponentials of numbers <= 0 occur, and
nothing is divided, so nothing overflows, however long the sequence. (The textbook's closed form divides by a
cumulative product of decays, which underflows.)

The backward pass keeps the inputs and the states at the chunks' starts, and computes the others again.
"""
import functools
import math
import os
from typing import Any, Callable, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError

__all__ = ['chunk_length', 'reset_scan_parameters', 'selective_scan']

# Floats of the states that the backward pass holds at once; longer sequences go through it in groups of chunks.
_BACKWARD_FLOATS = 1 << 24


def selective_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: Optional[torch.Tensor] = None,
        z: Optional[torch.Tensor] = None,
        delta_bias: Optional[torch.Tensor] = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        backend: Optional[str] = None,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """Selective scan along the last axis, causal, in float32 (float64 for float64 inputs). Names are mamba_ssm's.

    Several directions or orders of one map are several sequences: stack them along E, with a group for each.

    Args:
        u: Input (B, E, L), any floating-point type.
        delta: Step sizes (B, E, L), before bias and softplus.
        A: (E, N), real and negative: -exp of what is learned.
        B, C: (B, N, L), or (B, G, N, L) in G groups: channel e uses group e // (E / G); or constant, (E, N), which
            costs as much as E groups.
        D: (E,), weight of the input itself in the output.
        z: (B, E, L), gate: the output is multiplied by SiLU(z).
        delta_bias: (E,), added to `delta`.
        delta_softplus: Pass `delta` through softplus (the identity above 20).
        return_last_state: Also return the state behind the last position (before D and z).
        backend: `chunked` (PyTorch, any device), `cpp` (CPU, float32, up to 16 states; several times faster, but the
            first use on a machine builds it, with a C++ compiler and in seconds), `triton` or `mamba_ssm` (CUDA, if
            installed). None takes `chunked` on the CPU, or `cpp` where the environment says `VISHUB_SCAN=cpp` and
            it can compute what is asked; on CUDA the first of triton, mamba_ssm, chunked that there is.

    Returns:
        y (B, E, L) in the type of `u`; with `return_last_state` also h (B, E, N) in float32.

    Raises:
        ValueError: If the shapes do not fit, there is no such backend, or `cpp` cannot be built.
    """
    if 2 in (B.ndim, C.ndim):
        B, C = _by_channel(B, u), _by_channel(C, u)
    _check(u, delta, A, B, C)
    backend = backend or _default_backend(u.device.type, u.dtype, A.shape[1])
    if backend == 'mamba_ssm':
        return _mamba_ssm()(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if backend == 'triton':
        from vishub.models.layers.selective_scan_triton import scan
    elif backend == 'cpp':
        from vishub.models.layers.selective_scan_cpp import scan
    elif backend == 'chunked':
        scan = chunked_scan
    else:
        raise ValueError(f"backend must be 'chunked', 'cpp', 'triton' or 'mamba_ssm', not {backend!r}")

    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, delta = u.to(exact), delta.to(exact)
    if delta_bias is not None:
        delta = delta + delta_bias.to(exact)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = ((M if M.ndim == 4 else M.unsqueeze(1)).to(exact) for M in (B, C))  # B, G, N, L
    y, last_state = scan(x, delta, A.to(exact), B, C)
    if D is not None:
        y = y + D.to(exact)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(exact))
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


@torch.no_grad()
def reset_scan_parameters(dt_proj: nn.Linear, A_log: nn.Parameter) -> None:
    """Mamba's initialisation of what is particular to the scan: decays 1..N, step sizes log-uniform in 0.001..0.1.

    Args:
        dt_proj: R -> E; its bias is the scan's `delta_bias`, in front of the softplus.
        A_log: (E, N), the scan's A being minus its exponential.
    """
    nn.init.uniform_(dt_proj.weight, -dt_proj.in_features ** -0.5, dt_proj.in_features ** -0.5)
    step = torch.empty_like(dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
    dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    decays = torch.arange(1, A_log.shape[1] + 1, device=A_log.device, dtype=A_log.dtype)
    A_log.copy_(decays.log().expand_as(A_log))


def _by_channel(matrix: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """B or C of any form -> (B, E, N, L), a group for each channel of u (B, E, L)."""
    batch_size, dim, length = u.shape
    if matrix.ndim == 2:
        return matrix[None, :, :, None].expand(batch_size, -1, -1, length)
    matrix = matrix if matrix.ndim == 4 else matrix.unsqueeze(1)
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)


def _check(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> None:
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(f'u and delta must both be (B, E, L), got {tuple(u.shape)} and {tuple(delta.shape)}')
    batch_size, dim, length = u.shape
    if length < 1:
        raise ValueError('the sequence is empty')
    if A.ndim != 2 or A.shape[0] != dim or A.is_complex():
        raise ValueError(f'A must be real (E, N) with E = {dim}, got {A.dtype} {tuple(A.shape)}')
    for name, matrix in (('B', B), ('C', C)):
        groups = matrix.shape[1] if matrix.ndim == 4 else 1
        fits = matrix.ndim in (3, 4) and groups > 0 and dim % groups == 0 and (
            matrix.shape[0], matrix.shape[-2], matrix.shape[-1]) == (batch_size, A.shape[1], length)
        if not fits or matrix.shape != B.shape:
            raise ValueError(
                f'{name} must be (B, N, L) or (B, G, N, L) with B, N, L = {batch_size}, {A.shape[1]}, {length} and G a '
                f'divisor of {dim}, and B and C alike, or (E, N); got {tuple(matrix.shape)}')


def _default_backend(device_type: str, dtype: torch.dtype, num_states: int) -> str:
    if device_type == 'cuda':
        return 'triton' if _has_triton() else 'mamba_ssm' if _mamba_ssm() is not None else 'chunked'
    wanted = os.environ.get('VISHUB_SCAN', 'chunked')
    if wanted not in ('chunked', 'cpp'):
        raise InputError(f"the environment variable VISHUB_SCAN is 'chunked' or 'cpp', not {wanted!r}")
    if device_type == 'cpu' and wanted == 'cpp':
        from vishub.models.layers.selective_scan_cpp import MAX_STATES
        if dtype != torch.float64 and num_states <= MAX_STATES:
            return 'cpp'
    return 'chunked'


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _mamba_ssm() -> Optional[Callable[..., Any]]:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:  # not installed, or built for another torch
        return None
    return selective_scan_fn


# ---- in PyTorch: a custom operator, so that `torch.compile` and `torch.export` see one node -------------------------


def chunk_length(length: int) -> int:
    """Positions T of a chunk; short sequences stay whole.

    Half the root of the length: a step through the chunks is several operations, and there are up to three for each
    position (two forward, one more backward), but the states are carried from chunk to chunk by two.
    """
    return length if length <= 32 else math.ceil(math.sqrt(length) / 2)


def chunked_scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """u, delta (B, E, L), A (E, N), B, C (B, G, N, L), of one floating-point type -> y (B, E, L), state (B, E, N)."""
    y, last_state, _ = _forward(u, delta, A, B, C)
    return y, last_state


def _split(x: torch.Tensor) -> torch.Tensor:
    """Cut the last axis into chunks, the tail filled with zeros, and put places within chunks first.

    (B, …, L) -> (T, …, R), R = chunks * B with the batch fastest: so a step's operands are contiguous, and as long
    in the innermost axis as can be. A step with delta = 0 keeps the state, so the filling changes nothing.
    """
    length = x.shape[-1]
    size = chunk_length(length)
    x = F.pad(x, (0, -length % size)).unflatten(-1, (-1, size))  # B, …, chunks, T
    return x.movedim(-1, 0).movedim(1, -1).flatten(-2).contiguous()


def _join(x: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    """The inverse of `_split`: (T, …, R) -> (B, …, L)."""
    x = x.unflatten(-1, (-1, batch_size))  # T, …, chunks, B
    return x.movedim(-1, 0).movedim(1, -1).flatten(-2)[..., :length].contiguous()


def _operands(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """All in the shape of states, (G, N, E / G, R), with 1 where they do not depend on an axis; T first if on time."""
    groups = B.shape[1]
    u, delta = (_split(x).unflatten(1, (groups, 1, -1)) for x in (u, delta))  # T, G, 1, E / G, R
    B, C = (_split(x).unsqueeze(3) for x in (B, C))  # T, G, N, 1, R
    return u, delta, A.unflatten(0, (groups, -1)).transpose(1, 2).unsqueeze(-1), B, C


def _carry(ends: torch.Tensor, decay: torch.Tensor, first: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Run h_{c+1} = decay_c h_c + end_c over chunks.

    Args:
        ends: (chunks, …), what a chunk makes of a zero state.
        decay: (chunks, …), what it leaves of its initial state.
        first: (…), initial state of the first chunk.

    Returns:
        Initial states (chunks, …) of all, and the state behind the last.
    """
    starts, h = torch.empty_like(ends), first
    for chunk in range(len(ends)):
        starts[chunk] = h
        h = torch.addcmul(ends[chunk], decay[chunk], h)
    return starts, h


def _chunks_first(h: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(G, N, e, R) -> (chunks, G, N, e, B)."""
    return h.unflatten(-1, (-1, batch_size)).movedim(-2, 0).contiguous()


def _chunks_last(h: torch.Tensor) -> torch.Tensor:
    """The inverse of `_chunks_first`."""
    return h.movedim(0, -2).flatten(-2).contiguous()


@torch.library.custom_op('vishub::selective_scan', mutates_args=())
def _forward(
        u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (B, E, L), last state (B, E, N), states at the chunks' starts (G, N, E / G, R)."""
    batch_size, dim, length = u.shape
    x, delta, A, B, C = _operands(u, delta, A, B, C)
    x = x * delta
    size, groups, num_states, _, rows = B.shape
    shape = (groups, num_states, dim // groups, rows)
    decay, h = x.new_empty(shape), x.new_zeros(shape)
    y = x.new_empty(size, groups, dim // groups, rows)
    steps = list(zip(x.unbind(), delta.unbind(), B.unbind(), C.unbind(), y.unbind()))

    if rows > batch_size:
        for x_t, delta_t, B_t, _, _ in steps:
            torch.mul(delta_t, A, out=decay)
            h.mul_(decay.exp_()).addcmul_(x_t, B_t)
        ends = _chunks_first(h, batch_size)
        whole = _chunks_first((delta.sum(0) * A).exp_(), batch_size)
        starts = _chunks_last(_carry(ends, whole, torch.zeros_like(ends[0]))[0])
        h = starts.clone()
    else:
        starts = h.clone()
    for x_t, delta_t, B_t, C_t, y_t in steps:
        torch.mul(delta_t, A, out=decay)
        h.mul_(decay.exp_()).addcmul_(x_t, B_t)
        torch.sum(torch.mul(h, C_t, out=decay), 1, out=y_t)
    last_state = h.unflatten(-1, (-1, batch_size))[..., -1, :]  # G, N, e, B
    last_state = last_state.permute(3, 0, 2, 1).flatten(1, 2).contiguous()
    return _join(y.flatten(1, 2), batch_size, length), last_state, starts


@_forward.register_fake
def _(u, delta, A, B, C):
    batch_size, dim, length = u.shape
    groups, num_states = B.shape[1], A.shape[1]
    size = chunk_length(length)
    rows = batch_size * ((length + size - 1) // size)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(batch_size, dim, num_states),
        u.new_empty(groups, num_states, dim // groups, rows))


@torch.library.custom_op('vishub::selective_scan_backward', mutates_args=())
def _backward(
        dy: torch.Tensor, dlast: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
        C: torch.Tensor, starts: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, delta, A, B, C for those of y (B, E, L) and of the last state (B, E, N)."""
    batch_size, dim, length = u.shape
    u, delta, A, B, C = _operands(u, delta, A, B, C)
    size, groups, num_states, _, rows = B.shape
    dy = _split(dy).unflatten(1, (groups, 1, -1))
    incoming = dlast.unflatten(1, (groups, -1)).permute(1, 3, 2, 0)  # B, G, e, N -> G, N, e, B

    # g is the gradient of h; from behind it obeys the same recurrence. What comes into each chunk from later ones:
    if rows > batch_size:
        decay, g = torch.empty_like(starts), torch.zeros_like(starts)
        for delta_t, C_t, dy_t in zip(*(reversed(operand.unbind()) for operand in (delta, C, dy))):
            torch.mul(delta_t, A, out=decay)
            g.addcmul_(C_t, dy_t).mul_(decay.exp_())
        ends = _chunks_first(g, batch_size).flip(0)
        whole = _chunks_first((delta.sum(0) * A).exp_(), batch_size).flip(0)
        incoming = _chunks_last(_carry(ends, whole, incoming)[0].flip(0))

    x = u * delta
    du, ddelta, dA = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    group = max(1, _BACKWARD_FLOATS // (size * starts.shape[:3].numel() * batch_size)) * batch_size
    for first in range(0, rows, group):
        part = slice(first, first + group)
        steps = list(zip(*(
            operand[..., part].unbind() for operand in (u, delta, x, B, C, dy, du, ddelta, dB, dC))))
        states = starts.new_empty(size + 1, *starts[..., part].shape).unbind()  # before each step, and behind the last
        states[0].copy_(starts[..., part])
        decay = torch.empty_like(states[0])
        for t, (_, delta_t, x_t, B_t, *_) in enumerate(steps):
            torch.mul(delta_t, A, out=decay)
            torch.mul(states[t], decay.exp_(), out=states[t + 1]).addcmul_(x_t, B_t)
        g = incoming[..., part].clone(memory_format=torch.contiguous_format)
        product, dA_parts = torch.empty_like(g), torch.zeros_like(g)
        for t in reversed(range(size)):
            u_t, delta_t, x_t, B_t, C_t, dy_t, du_t, ddelta_t, dB_t, dC_t = steps[t]
            torch.sum(torch.mul(states[t + 1], dy_t, out=product), 2, keepdim=True, out=dC_t)
            g.addcmul_(C_t, dy_t)
            torch.sum(torch.mul(g, x_t, out=product), 2, keepdim=True, out=dB_t)
            through = torch.mul(g, B_t, out=product).sum(1, keepdim=True)  # G, 1, e, R
            torch.mul(through, delta_t, out=du_t)
            torch.mul(delta_t, A, out=decay)
            g.mul_(decay.exp_())
            torch.mul(g, states[t], out=product)  # gradient of delta * A
            dA_parts.addcmul_(product, delta_t)
            torch.sum(product.mul_(A), 1, keepdim=True, out=ddelta_t)
            ddelta_t.addcmul_(through, u_t)
        dA += dA_parts.sum(-1, keepdim=True)
    du, ddelta = (_join(x.flatten(1, 3), batch_size, length) for x in (du, ddelta))
    dB, dC = (_join(x.squeeze(3), batch_size, length) for x in (dB, dC))
    return du, ddelta, dA.squeeze(-1).transpose(1, 2).flatten(0, 1).contiguous(), dB, dC


@_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, starts):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, A, B, C))


def _setup_context(ctx: Any, inputs: Tuple[torch.Tensor, ...], output: Tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(True)


def _grad(ctx: Any, dy: torch.Tensor, dlast: torch.Tensor, _: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    return _backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors)


_forward.register_autograd(_grad, setup_context=_setup_context)
