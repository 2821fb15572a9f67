"""The selective scan as Triton kernels, for CUDA: the three phases of `selective_scan.py`, a chunk a program.

A program keeps the states of a block of channels in registers and goes through its chunk position by position: once
from zero states, for the chunk's end, and once more, when the states were carried from chunk to chunk, for the output.
So a long sequence fills the device even with few channels, and states never leave it, but at the chunks' starts.
The backward pass goes through groups of chunks, whose states it writes to memory and reads again in reverse.
"""
from typing import Any, Tuple

import torch
import triton
import triton.language as tl

from vishub.models.layers.selective_scan import _BACKWARD_FLOATS, _carry

__all__ = ['scan']

CHUNK = 64
BLOCK = 32  # channels a program


@triton.jit
def _forward_kernel(
        u, delta, A, B, C, starts, y, ends, sums, length, dim, groups,
        N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, E: tl.constexpr, OUTPUT: tl.constexpr):
    """u, delta, y (B, L, E), A (E, N), B, C (B, L, G, N), starts, ends (chunks, B, E, N), sums (chunks, B, E).

    With OUTPUT: from `starts`, writes `y` and `ends`. Without: from zero, writes `ends` and `sums` of delta.
    """
    batch, chunk = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * E + tl.arange(0, E)
    n = tl.arange(0, NP)
    in_e, in_n = e < dim, n < N
    inside = in_e[:, None] & in_n[None, :]
    a = tl.load(A + e[:, None] * N + n[None, :], mask=inside, other=0.)
    group = e // (dim // groups)
    state = ((chunk * tl.num_programs(0) + batch) * dim + e)[:, None] * N + n[None, :]
    if OUTPUT:
        h = tl.load(starts + state, mask=inside, other=0.)
    else:
        h = tl.zeros([E, NP], dtype=tl.float32)
    total = tl.zeros([E], dtype=tl.float32)
    for i in range(T):
        t = chunk * T + i
        row = (batch * length + t) * dim + e
        there = in_e & (t < length)  # delta = 0 behind the end keeps the state
        d = tl.load(delta + row, mask=there, other=0.)
        x = d * tl.load(u + row, mask=there, other=0.)
        place = ((batch * length + t) * groups + group)[:, None] * N + n[None, :]
        both = inside & (t < length)
        h = tl.exp(d[:, None] * a) * h + x[:, None] * tl.load(B + place, mask=both, other=0.)
        if OUTPUT:
            c = tl.load(C + place, mask=both, other=0.)
            tl.store(y + row, tl.sum(h * c, axis=1), mask=there)
        else:
            total += d
    tl.store(ends + state, h, mask=inside)
    if not OUTPUT:
        tl.store(sums + (chunk * tl.num_programs(0) + batch) * dim + e, total, mask=in_e)


@triton.jit
def _incoming_kernel(
        dy, delta, A, C, ends, length, dim, groups,
        N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, E: tl.constexpr):
    """What a chunk passes to the one before, of gradients that arise in it: writes `ends` (chunks, B, E, N)."""
    batch, chunk = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * E + tl.arange(0, E)
    n = tl.arange(0, NP)
    in_e, in_n = e < dim, n < N
    inside = in_e[:, None] & in_n[None, :]
    a = tl.load(A + e[:, None] * N + n[None, :], mask=inside, other=0.)
    group = e // (dim // groups)
    g = tl.zeros([E, NP], dtype=tl.float32)
    for i in range(T):
        t = chunk * T + (T - 1 - i)
        row = (batch * length + t) * dim + e
        there = in_e & (t < length)
        d = tl.load(delta + row, mask=there, other=0.)
        place = ((batch * length + t) * groups + group)[:, None] * N + n[None, :]
        c = tl.load(C + place, mask=inside & (t < length), other=0.)
        g = (g + c * tl.load(dy + row, mask=there, other=0.)[:, None]) * tl.exp(d[:, None] * a)
    state = ((chunk * tl.num_programs(0) + batch) * dim + e)[:, None] * N + n[None, :]
    tl.store(ends + state, g, mask=inside)


@triton.jit
def _backward_kernel(
        dy, u, delta, A, B, C, starts, incoming, states, du, ddelta, dA, dB, dC, first, length, dim, groups,
        N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, E: tl.constexpr):
    """Gradients of a chunk. `states` (chunks of this launch, B, T, E, N) is memory to work in; dA, dB, dC are added to.

    `first` is the first chunk of this launch.
    """
    batch, local = tl.program_id(0), tl.program_id(2)
    chunk = first + local
    e = tl.program_id(1) * E + tl.arange(0, E)
    n = tl.arange(0, NP)
    in_e, in_n = e < dim, n < N
    inside = in_e[:, None] & in_n[None, :]
    weight = e[:, None] * N + n[None, :]
    a = tl.load(A + weight, mask=inside, other=0.)
    group = e // (dim // groups)
    state = ((chunk * tl.num_programs(0) + batch) * dim + e)[:, None] * N + n[None, :]
    h = tl.load(starts + state, mask=inside, other=0.)
    scratch = states + (local * tl.num_programs(0) + batch) * T * dim * N
    for i in range(T):
        t = chunk * T + i
        row = (batch * length + t) * dim + e
        there = in_e & (t < length)
        tl.store(scratch + i * dim * N + weight, h, mask=inside)
        d = tl.load(delta + row, mask=there, other=0.)
        x = d * tl.load(u + row, mask=there, other=0.)
        place = ((batch * length + t) * groups + group)[:, None] * N + n[None, :]
        h = tl.exp(d[:, None] * a) * h + x[:, None] * tl.load(B + place, mask=inside & (t < length), other=0.)
    g = tl.load(incoming + state, mask=inside, other=0.)
    a_grad = tl.zeros([E, NP], dtype=tl.float32)
    for i in range(T):
        back = T - 1 - i
        t = chunk * T + back
        row = (batch * length + t) * dim + e
        there = in_e & (t < length)
        both = inside & (t < length)
        d = tl.load(delta + row, mask=there, other=0.)
        value = tl.load(u + row, mask=there, other=0.)
        out = tl.load(dy + row, mask=there, other=0.)
        place = ((batch * length + t) * groups + group)[:, None] * N + n[None, :]
        b, c = tl.load(B + place, mask=both, other=0.), tl.load(C + place, mask=both, other=0.)
        tl.atomic_add(dC + place, h * out[:, None], mask=both)  # many channels share a place
        g += c * out[:, None]
        tl.atomic_add(dB + place, g * (d * value)[:, None], mask=both)
        through = tl.sum(g * b, axis=1)
        h = tl.load(scratch + back * dim * N + weight, mask=inside, other=0.)
        g *= tl.exp(d[:, None] * a)
        product = g * h
        a_grad += product * d[:, None]
        tl.store(du + row, through * d, mask=there)
        tl.store(ddelta + row, tl.sum(product * a, axis=1) + through * value, mask=there)
    tl.atomic_add(dA + weight, a_grad, mask=inside)


class _Scan(torch.autograd.Function):

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        """u, delta (B, L, E), A (E, N), B, C (B, L, G, N), float32 and contiguous -> y (B, L, E), state (B, E, N)."""
        batch_size, length, dim = u.shape
        chunks = triton.cdiv(length, CHUNK)
        grid = (batch_size, triton.cdiv(dim, BLOCK), chunks)
        sizes = _sizes(A)
        y = torch.empty_like(u)
        ends, sums = u.new_empty(chunks, batch_size, *A.shape), u.new_empty(chunks, batch_size, dim)
        starts = torch.zeros_like(ends)
        if chunks > 1:
            _forward_kernel[grid](
                u, delta, A, B, C, starts, y, ends, sums, length, dim, B.shape[2], OUTPUT=False, **sizes)
            starts = _carry(ends, (sums[..., None] * A).exp_(), starts[0])[0]
        _forward_kernel[grid](u, delta, A, B, C, starts, y, ends, sums, length, dim, B.shape[2], OUTPUT=True, **sizes)
        ctx.save_for_backward(u, delta, A, B, C, starts)
        return y, ends[-1].clone()

    @staticmethod
    def backward(ctx, dy, dlast):
        u, delta, A, B, C, starts = ctx.saved_tensors
        dy, dlast = dy.contiguous(), dlast.contiguous()
        (batch_size, length, dim), (chunks, groups) = u.shape, (len(starts), B.shape[2])
        grid = (batch_size, triton.cdiv(dim, BLOCK), chunks)
        sizes = _sizes(A)
        incoming = dlast[None]
        if chunks > 1:
            ends = torch.empty_like(starts)
            _incoming_kernel[grid](dy, delta, A, C, ends, length, dim, groups, **sizes)
            sums = torch.nn.functional.pad(delta, (0, 0, 0, chunks * CHUNK - length)).unflatten(1, (chunks, CHUNK))
            whole = (sums.sum(2).transpose(0, 1)[..., None] * A).exp_()
            incoming = _carry(ends.flip(0), whole.flip(0), dlast)[0].flip(0)
        du, ddelta = torch.empty_like(u), torch.empty_like(u)
        dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        group = max(1, _BACKWARD_FLOATS // (batch_size * CHUNK * A.numel()))
        states = u.new_empty(min(group, chunks), batch_size, CHUNK, *A.shape)
        for first in range(0, chunks, group):
            part = (*grid[:2], min(group, chunks - first))
            _backward_kernel[part](
                dy, u, delta, A, B, C, starts, incoming.contiguous(), states, du, ddelta, dA, dB, dC,
                first, length, dim, groups, **sizes)
        return du, ddelta, dA, dB, dC


def _sizes(A: torch.Tensor) -> dict:
    return dict(N=A.shape[1], NP=triton.next_power_of_2(A.shape[1]), T=CHUNK, E=BLOCK)


def scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """As `chunked_scan`, float32: u, delta (B, E, L), A (E, N), B, C (B, G, N, L) -> y (B, E, L), state (B, E, N).

    Raises:
        ValueError: If the tensors are not float32.
    """
    if u.dtype != torch.float32:
        raise ValueError(f"the Triton kernels compute in float32, not in {u.dtype}: use backend='chunked'")
    inputs: Tuple[Any, ...] = (
        u.transpose(1, 2), delta.transpose(1, 2), A, B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2))
    y, last_state = _Scan.apply(*(x.contiguous() for x in inputs))
    return y.transpose(1, 2), last_state
