"""The selective scan in C++ for processors, built on first use: the source is `selective_scan.cpp`.

The recurrence runs position by position, for sixteen channels at once, whose states stay in registers; sequences,
groups and blocks of channels run in parallel. The backward pass keeps the state before every 64th position and
computes the others again.

The library is plain C++ behind ctypes, without PyTorch's headers: so it builds in seconds, needs nothing but a
compiler, and does not care for PyTorch's version.
"""
import ctypes
import functools
import hashlib
import importlib.resources
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Tuple

import torch
import torch.nn.functional as F

from vishub.errors import InputError
from vishub.files import atomic_path

__all__ = ['MAX_STATES', 'build', 'scan']

MAX_STATES = 16
_LANES, _CHUNK = 16, 64  # as in the source


@functools.cache
def build() -> ctypes.CDLL:
    """The library, compiled for the processor of this machine with `c++`, or the program that CXX names.

    It is kept in `vishub/` of the user's cache folder (XDG_CACHE_HOME, by default `~/.cache`), under a name that
    changes with the source, the compiler and the processor.

    Raises:
        InputError: If there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = os.environ.get('CXX', 'c++')
    if shutil.which(compiler) is None:
        raise InputError(
            f"the scan in C++ (VISHUB_SCAN=cpp) needs the compiler '{compiler}', which is not there: "
            'apt-get install g++')
    # sums may be taken in another order, so that they vectorise; -ffast-math itself would, when the library is loaded,
    # turn off denormal numbers in the whole process
    flags = ['-O3', '-march=native', '-fno-math-errno', '-fno-trapping-math', '-fno-signed-zeros', '-fassociative-math',
             '-std=c++14', '-shared', '-fPIC']
    if sys.platform == 'linux':  # elsewhere compilers may lack OpenMP, and the scan takes one thread
        flags.append('-fopenmp')
    source = importlib.resources.files('vishub.models.layers') / 'selective_scan.cpp'
    # what -march=native means here
    target = subprocess.run(
        [compiler, *flags, '-E', '-dM', '-x', 'c++', os.devnull], capture_output=True, check=False).stdout
    name = hashlib.sha256(source.read_bytes() + target + ' '.join([compiler, *flags]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'vishub'
    library = cache / f'selective_scan.{name}.so'
    if library.is_file():
        return ctypes.CDLL(str(library))
    try:
        with importlib.resources.as_file(source) as path, atomic_path(library) as unfinished:
            outcome = subprocess.run(
                [compiler, *flags, str(path), '-o', str(unfinished)], capture_output=True, text=True, check=False)
            if outcome.returncode:
                raise InputError(f"'{compiler}' could not build the scan in C++:\n{outcome.stderr[-2000:]}")
    except OSError as error:
        raise InputError(
            f"the scan in C++ cannot be kept in '{cache}' ({error}): set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return ctypes.CDLL(str(library))


def _call(name: str, tensors: Tuple[torch.Tensor, ...], u: torch.Tensor, B: torch.Tensor) -> None:
    """Call the library's function `name`: arrays, then sizes. An empty tensor is passed as null."""
    sizes = (*u.shape, B.shape[1], B.shape[3])  # batch, length, dim, groups, states
    pointers = (ctypes.c_void_p(x.data_ptr() if x.numel() else None) for x in tensors)
    getattr(build(), f'vishub_scan_{name}')(
        *pointers, *(ctypes.c_int64(size) for size in sizes), ctypes.c_int(torch.get_num_threads()))


def _by_position(x: torch.Tensor) -> torch.Tensor:
    """(…, C, L) -> (…, L, C), contiguous; nothing is copied where channels already lie side by side."""
    return x.transpose(-1, -2).contiguous()


def scan(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """As `selective_scan.chunked_scan`, in float32: u, delta (B, E, L), A (E, N), B, C (B, G, N, L) -> y (B, E, L),
    state (B, E, N).

    Raises:
        ValueError: If the tensors are not float32 on the CPU, or there are more than 16 states; InputError, which is
            one, if it cannot be built.
    """
    num_states = A.shape[1]
    if u.dtype != torch.float32 or u.device.type != 'cpu' or num_states > MAX_STATES:
        raise ValueError(
            f'the scan in C++ takes float32 on the CPU and up to {MAX_STATES} states, not {u.dtype} on {u.device} and '
            f"{num_states}: use backend='chunked'")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (u, delta, A, B, C))
    B, C = _by_position(B), _by_position(C)
    if num_states not in (8, 16):  # states without input and output
        A, B, C = (F.pad(x, (0, -num_states % 8)) for x in (A, B, C))
    y, last_state, _ = _forward(_by_position(u), _by_position(delta), A.contiguous(), B, C, keep)
    return y.transpose(1, 2), last_state[..., :num_states]


@torch.library.custom_op('vishub::selective_scan_cpp', mutates_args=(), device_types='cpu')
def _forward(
        u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, keep: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, delta (B, L, E), A (E, N), B, C (B, G, L, N), N 8 or 16 -> y (B, L, E), last state (B, E, N), states for the
    backward pass if `keep`."""
    outputs = _outputs(u, A, B, keep)
    _call('forward', (u, delta, A, B, C, *outputs), u, B)
    return outputs


def _outputs(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, keep: bool) -> Tuple[torch.Tensor, ...]:
    batch_size, length, dim = u.shape
    groups, num_states = B.shape[1], A.shape[1]
    blocks = groups * ((dim // groups + _LANES - 1) // _LANES)
    rows = batch_size * blocks * ((length + _CHUNK - 1) // _CHUNK) if keep else 0
    return torch.empty_like(u), u.new_empty(batch_size, dim, num_states), u.new_empty(rows, num_states, _LANES)


@_forward.register_fake
def _(u, delta, A, B, C, keep):
    return _outputs(u, A, B, keep)


@torch.library.custom_op('vishub::selective_scan_cpp_backward', mutates_args=(), device_types='cpu')
def _backward(
        dy: torch.Tensor, dlast: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
        C: torch.Tensor, starts: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = du, ddelta, dA, dB, dC = (
        torch.empty_like(u), torch.empty_like(u), torch.empty_like(dlast), torch.zeros_like(B), torch.zeros_like(C))
    _call('backward', (dy, dlast, u, delta, A, B, C, starts, *gradients), u, B)
    return du, ddelta, dA.sum(0), dB, dC


@_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, starts):
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C))


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.set_materialize_grads(True)


def _grad(ctx: Any, dy: torch.Tensor, dlast: torch.Tensor, _: torch.Tensor) -> Tuple[Any, ...]:
    return (*_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors), None)


_forward.register_autograd(_grad, setup_context=_setup_context)
