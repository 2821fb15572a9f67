"""The selective scan against the recurrence written down as it is defined, in float64."""
import pytest
import torch
import torch.nn.functional as F

from vishub.models.layers import selective_scan as module
from vishub.models.layers.selective_scan import chunk_length, selective_scan


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Position after position, in float64: y (B, E, L) and the last state (B, E, N)."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    B, C = ((M if M.ndim == 4 else M[:, None]).repeat_interleave(u.shape[1] // (M.shape[1] if M.ndim == 4 else 1), 1)
            for M in (B, C))  # B, E, N, L
    if delta_bias is not None:
        delta = delta + delta_bias.double()[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h, outputs = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        h = (delta[:, :, t, None] * A).exp() * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D.double()[:, None] * u
    if z is not None:
        y = y * F.silu(z.double())
    return y, h


def arguments(batch_size=2, dim=6, num_states=4, length=50, groups=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grouped = (batch_size, num_states, length) if groups is None else (batch_size, groups, num_states, length)
    return dict(
        u=draw(batch_size, dim, length), delta=draw(batch_size, dim, length) - 2, A=-draw(dim, num_states).exp(),
        B=draw(*grouped), C=draw(*grouped), D=draw(dim), z=draw(batch_size, dim, length), delta_bias=draw(dim),
        delta_softplus=True)


@pytest.mark.parametrize('length', [1, 2, 31, 32, 33, 64, 97, 400])
@pytest.mark.parametrize('groups', [None, 1, 3])
def test_is_the_recurrence(length, groups):
    inputs = arguments(length=length, groups=groups)
    y, last = selective_scan(**inputs, return_last_state=True)
    expected, expected_last = recurrence(**inputs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), expected_last, rtol=1e-5, atol=1e-5)
    assert y.dtype == last.dtype == torch.float32


@pytest.mark.parametrize('left_out', [('D',), ('z',), ('delta_bias',), ('D', 'z', 'delta_bias')])
def test_optional_arguments(left_out):
    inputs = {key: value for key, value in arguments().items() if key not in left_out}
    torch.testing.assert_close(selective_scan(**inputs).double(), recurrence(**inputs)[0], rtol=1e-5, atol=1e-5)
    inputs['delta_softplus'], inputs['delta'] = False, inputs['delta'].abs()
    torch.testing.assert_close(selective_scan(**inputs).double(), recurrence(**inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('length, groups', [(5, None), (40, None), (45, 2)])  # one chunk, chunks, a filled tail
def test_gradients(length, groups):
    inputs = arguments(1, 4, 2, length, groups, dtype=torch.float64)
    names = [name for name, value in inputs.items() if torch.is_tensor(value)]
    leaves = [inputs[name].requires_grad_() for name in names]

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors)), delta_softplus=True, return_last_state=True)
    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@pytest.mark.parametrize('floats', [1, 5000])
def test_gradients_in_groups_of_chunks(floats, monkeypatch):
    """Long sequences go through the backward pass part by part."""
    def gradients():
        inputs = arguments(batch_size=3, length=130)
        leaves = [inputs[name].requires_grad_() for name in ('u', 'delta', 'A', 'B', 'C')]
        return torch.autograd.grad(selective_scan(**inputs).square().sum(), leaves)
    expected = gradients()
    monkeypatch.setattr(module, '_BACKWARD_FLOATS', floats)
    for gradient, one in zip(gradients(), expected):
        torch.testing.assert_close(gradient, one)


def test_is_causal():
    inputs = arguments(length=80)
    changed = {key: value.clone() if torch.is_tensor(value) else value for key, value in inputs.items()}
    for name in ('u', 'delta', 'B', 'C', 'z'):
        changed[name][..., 50:] = 9.
    before, after = selective_scan(**inputs), selective_scan(**changed)
    assert torch.equal(before[..., :50], after[..., :50]) and not torch.equal(before, after)


def test_several_directions_at_once():
    """Directions are groups of channels: each gives what it gives alone."""
    one, other = arguments(dim=3, length=60), arguments(dim=3, length=60, seed=1)
    both = {
        name: torch.stack([one[name], other[name]], 1) if name in 'BC' else
        torch.cat([one[name], other[name]], 0 if name in ('A', 'D', 'delta_bias') else 1)
        for name in one if name != 'delta_softplus'}
    y = selective_scan(**both, delta_softplus=True)
    torch.testing.assert_close(y, torch.cat([selective_scan(**one), selective_scan(**other)], 1))


def test_stays_finite_where_decays_vanish():
    """exp(sum of delta * A) is 0 in float32 here, which closed forms divide by."""
    inputs = dict(arguments(length=1200), delta_softplus=False)
    inputs['delta'] = inputs['delta'].abs() * 50
    inputs['u'].requires_grad_()
    y = selective_scan(**inputs)
    torch.testing.assert_close(y.detach().double(), recurrence(**inputs)[0].detach(), rtol=1e-4, atol=1e-3)
    y.sum().backward()
    assert torch.isfinite(inputs['u'].grad).all()


def test_bfloat16_and_autocast():
    """Half-precision inputs are computed with in float32: the error is that of rounding the inputs and the output."""
    exact = arguments(length=1000)
    exact['delta'] -= 3  # long memory
    rounded = {k: v.to(torch.bfloat16) if torch.is_tensor(v) and k != 'A' else v for k, v in exact.items()}
    y = selective_scan(**rounded)
    assert y.dtype == torch.bfloat16
    expected = recurrence(**rounded)[0]
    assert ((y.double() - expected).abs() <= 2 ** -8 * expected.abs() + 1e-4).all()
    with torch.autocast('cpu', torch.bfloat16):
        again = selective_scan(**exact)
    assert again.dtype == torch.float32 and torch.equal(again, selective_scan(**exact))


@pytest.mark.filterwarnings('ignore')
def test_compiles_to_one_graph():
    inputs = arguments(length=70)
    inputs['u'].requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(selective_scan, fullgraph=True, backend='aot_eager')(**inputs)
    torch.testing.assert_close(y, selective_scan(**inputs))
    gradient, = torch.autograd.grad(y.sum(), inputs['u'])
    torch.testing.assert_close(gradient, torch.autograd.grad(selective_scan(**inputs).sum(), inputs['u'])[0])
    torch.library.opcheck(
        module._forward, (torch.randn(2, 4, 40), torch.rand(2, 4, 40), -torch.rand(4, 3), *torch.randn(2, 2, 2, 3, 40)),
        test_utils=('test_schema', 'test_faketensor'))


def test_memory_is_that_of_chunks():
    """Kept for the backward pass: the inputs, and the states at the chunks' starts; not those of all positions."""
    kept = []
    inputs = dict(arguments(1, 8, 16, 4096), D=None, z=None)
    inputs['u'].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(**inputs)
    assert sum(kept) < 8 * 16 * 4096 / 2
    assert chunk_length(4096) == 32 and chunk_length(32) == 32


@pytest.mark.parametrize('change, message', [
    (dict(delta=torch.rand(2, 6, 49)), r'u and delta must both be \(B, E, L\)'),
    (dict(A=-torch.rand(5, 4)), r'A must be real \(E, N\) with E = 6'),
    (dict(B=torch.rand(2, 3, 50)), 'B must be'),
    (dict(C=torch.rand(2, 4, 4, 50)), 'C must be'),
    (dict(backend='cuda'), "backend must be 'chunked', 'cpp', 'triton' or 'mamba_ssm'"),
    (dict(u=torch.rand(2, 6, 0), delta=torch.rand(2, 6, 0)), 'the sequence is empty'),
])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments(), **change})


def test_kernels_of_mamba_ssm_are_used_where_they_are(monkeypatch):
    """Its function takes our arguments in our order (its name and signature are those of mamba_ssm 2.2)."""
    import sys
    from types import ModuleType
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):
        calls.append(u.shape)
        return selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend='chunked')

    fake = ModuleType('mamba_ssm.ops.selective_scan_interface')
    fake.selective_scan_fn = selective_scan_fn
    for name, entry in (('mamba_ssm', ModuleType('mamba_ssm')), ('mamba_ssm.ops', ModuleType('mamba_ssm.ops')),
                        ('mamba_ssm.ops.selective_scan_interface', fake)):
        monkeypatch.setitem(sys.modules, name, entry)
    monkeypatch.setattr(module, '_has_triton', lambda: False)
    module._mamba_ssm.cache_clear()
    try:
        assert module._default_backend('cuda', torch.float32, 4) == 'mamba_ssm'
        assert module._default_backend('cpu', torch.float32, 4) == 'chunked'
        inputs = arguments()
        torch.testing.assert_close(selective_scan(**inputs, backend='mamba_ssm'), selective_scan(**inputs))
        assert calls == [(2, 6, 50)]
    finally:
        module._mamba_ssm.cache_clear()
