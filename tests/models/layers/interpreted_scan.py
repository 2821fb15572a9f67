"""The Triton kernels against the PyTorch form, under Triton's interpreter.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own, which
`test_selective_scan_triton.py` starts; pytest does not collect this file by itself.
"""
import pytest
import torch

from tests.models.layers.compare_scans import compare, operands
from vishub.models.layers import selective_scan as module
from vishub.models.layers import selective_scan_triton as kernels


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small chunks and blocks: an interpreted position takes milliseconds."""
    monkeypatch.setattr(kernels, 'CHUNK', 8)
    monkeypatch.setattr(kernels, 'BLOCK', 4)


@pytest.mark.parametrize('shape', [
    (1, 3, 2, 5, 1),  # one chunk that is not full, one block that is not full
    (2, 5, 3, 11, 1),  # chunks with a tail, states that are no power of two
])
def test_kernels_are_the_pytorch_form(shape):
    compare(kernels.scan, shape)


def test_gradients_in_groups_of_chunks(monkeypatch):
    monkeypatch.setattr(kernels, '_BACKWARD_FLOATS', 1)
    compare(kernels.scan, (1, 6, 2, 20, 3))  # blocks across groups


def test_through_the_public_function():
    u, delta, A, B, C = (x.detach() for x in operands(1, 4, 2, 12, 1))
    arguments = dict(D=torch.rand(4), z=torch.rand(1, 4, 12), delta_bias=torch.rand(4), delta_softplus=True)
    y = module.selective_scan(u.bfloat16(), delta, A, B[:, 0], C[:, 0], **arguments, backend='triton')
    expected = module.selective_scan(u.bfloat16(), delta, A, B[:, 0], C[:, 0], **arguments)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="use backend='chunked'"):
        module.selective_scan(u.double(), delta.double(), A, B, C, backend='triton')
