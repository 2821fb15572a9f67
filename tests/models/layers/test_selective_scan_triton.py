"""The Triton kernels against the PyTorch form: under Triton's interpreter on the CPU, and on CUDA where there is one.

Triton decides when it is imported whether it interprets, so `test_under_the_interpreter` runs this file once more in a
process of its own; only there the tests with the fixture `small` do anything.
"""
import os
import subprocess
import sys

import pytest
import torch

from vishub.models.layers import selective_scan as module

pytest.importorskip('triton')
INTERPRETS = os.environ.get('TRITON_INTERPRET') == '1'


@pytest.fixture
def small(monkeypatch):
    """The kernels' module, with small chunks and blocks: an interpreted position takes milliseconds."""
    if not INTERPRETS:
        pytest.skip('runs in the process of test_under_the_interpreter')
    from vishub.models.layers import selective_scan_triton as kernels
    monkeypatch.setattr(kernels, 'CHUNK', 8)
    monkeypatch.setattr(kernels, 'BLOCK', 4)
    return kernels


@pytest.mark.skipif(INTERPRETS, reason='this is that process')
def test_under_the_interpreter():
    outcome = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    assert '....' in outcome.stdout  # not all skipped


def operands(batch_size, dim, num_states, length, groups, device='cpu'):
    torch.manual_seed(0)
    u, delta = torch.randn(batch_size, dim, length), torch.rand(batch_size, dim, length)
    A = -torch.rand(dim, num_states) * 3
    B, C = torch.randn(2, batch_size, groups, num_states, length)
    return [x.clone().to(device).requires_grad_() for x in (u, delta, A, B, C)]


def compare(scan, shape, device='cpu'):
    results = []
    for function in (module.chunked_scan, scan):
        inputs = operands(*shape, device=device)
        y, last = function(*inputs)
        loss = (y * y.detach().cos()).sum() + (last * last.detach().sin()).sum()
        results.append([y, last, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [
    (1, 3, 2, 5, 1),  # one chunk that is not full, one block that is not full
    (2, 5, 3, 11, 1),  # chunks with a tail, states that are no power of two
])
def test_kernels_are_the_pytorch_form(small, shape):
    compare(small.scan, shape)


def test_gradients_in_groups_of_chunks(small, monkeypatch):
    monkeypatch.setattr(small, '_BACKWARD_FLOATS', 1)
    compare(small.scan, (1, 6, 2, 20, 3))  # blocks across groups


def test_through_the_public_function(small):
    u, delta, A, B, C = (x.detach() for x in operands(1, 4, 2, 12, 1))
    arguments = dict(D=torch.rand(4), z=torch.rand(1, 4, 12), delta_bias=torch.rand(4), delta_softplus=True)
    y = module.selective_scan(u.bfloat16(), delta, A, B[:, 0], C[:, 0], **arguments, backend='triton')
    expected = module.selective_scan(u.bfloat16(), delta, A, B[:, 0], C[:, 0], **arguments)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="use backend='chunked'"):
        module.selective_scan(u.double(), delta.double(), A, B, C, backend='triton')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('shape', [(2, 96, 8, 2112, 1), (1, 768, 16, 300, 3)])
def test_on_cuda(shape):
    from vishub.models.layers.selective_scan_triton import scan
    compare(scan, shape, 'cuda')
