"""Two forms of the selective scan on the same operands: outputs and gradients."""
import torch

from vishub.models.layers.selective_scan import chunked_scan


def operands(batch_size, dim, num_states, length, groups, device='cpu'):
    torch.manual_seed(0)
    u, delta = torch.randn(batch_size, dim, length), torch.rand(batch_size, dim, length)
    A = -torch.rand(dim, num_states) * 3
    B, C = torch.randn(2, batch_size, groups, num_states, length)
    return [x.clone().to(device).requires_grad_() for x in (u, delta, A, B, C)]


def compare(scan, shape, device='cpu'):
    results = []
    for function in (chunked_scan, scan):
        inputs = operands(*shape, device=device)
        y, last = function(*inputs)
        loss = (y * y.detach().cos()).sum() + (last * last.detach().sin()).sum()
        results.append([y, last, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
