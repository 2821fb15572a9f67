"""The scan in C++ against the PyTorch form. They need a C++ compiler, as `torch.compile` does."""
import pytest
import timm
import torch

import vishub  # noqa: F401  registers the models
from tests.models.layers.compare_scans import compare, operands
from vishub.errors import InputError
from vishub.models.layers import selective_scan as module
from vishub.models.layers import selective_scan_cpp


@pytest.mark.parametrize('shape', [
    (2, 32, 8, 150, 1),  # more than two chunks of 64, and a part of one
    (1, 36, 5, 64, 2),  # groups that are no multiple of 16 channels
    (3, 3, 16, 1, 1),
    (1, 130, 1, 65, 1),
])
def test_is_the_chunked_scan(shape):
    compare(selective_scan_cpp.scan, shape)


def test_long_decays_vanish():
    """exp(-1000) is 0 to float32: the polynomial must not come out negative, infinite or not a number."""
    u, delta, A, B, C = (x.detach() for x in operands(1, 16, 4, 80, 1))
    y, last = selective_scan_cpp.scan(u, delta * 1000, A * 1000, B, C)
    expected, expected_last = module.chunked_scan(u, delta * 1000, A * 1000, B, C)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=1e-2)


def test_the_environment_chooses_it(monkeypatch):
    monkeypatch.setenv('VISHUB_SCAN', 'cpp')
    assert module._default_backend('cpu', torch.float32, 8) == 'cpp'
    assert module._default_backend('cpu', torch.bfloat16, 8) == 'cpp'
    assert module._default_backend('cpu', torch.float64, 8) == 'chunked'
    assert module._default_backend('cpu', torch.float32, 17) == 'chunked'
    monkeypatch.delenv('VISHUB_SCAN')
    assert module._default_backend('cpu', torch.float32, 8) == 'chunked'
    monkeypatch.setenv('VISHUB_SCAN', 'c++')
    with pytest.raises(InputError, match="VISHUB_SCAN is 'chunked' or 'cpp', not 'c\\+\\+'"):
        module._default_backend('cpu', torch.float32, 8)


def test_models_compute_with_it(monkeypatch):
    """DeepRFTv2 gives the same picture and gradients by it, and it is what computed them."""
    torch.manual_seed(0)
    model = timm.create_model('deeprftv2_tiny', depths=(1, 1, 1), num_columns=1)
    image, results, scan, calls = torch.rand(1, 3, 24, 32), [], selective_scan_cpp.scan, []
    monkeypatch.setattr(selective_scan_cpp, 'scan', lambda *operands: calls.append(1) or scan(*operands))
    for choice in ('chunked', 'cpp'):
        assert not calls
        monkeypatch.setenv('VISHUB_SCAN', choice)
        output = model(image).full[-1]
        results.append([output, *torch.autograd.grad(output.square().sum(), model.columns[0].stem.parameters())])
    assert len(calls) == 8  # four levels of kernels on each of two scales
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_keeps_states_only_for_gradients():
    inputs = operands(1, 16, 8, 200, 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan_cpp.scan(*inputs)
    assert 16 * 8 * 4 in kept  # before each of four chunks
    with torch.no_grad():
        by_position = [x.transpose(-1, -2).contiguous() for x in (*inputs[:2], *inputs[3:])]
        assert selective_scan_cpp._forward(*by_position[:2], inputs[2], *by_position[2:], False)[2].numel() == 0


@pytest.mark.filterwarnings('ignore')
def test_compiles_to_one_graph():
    inputs = operands(1, 16, 4, 70, 1)
    torch._dynamo.reset()
    y, _ = torch.compile(selective_scan_cpp.scan, fullgraph=True, backend='aot_eager')(*inputs)
    expected = selective_scan_cpp.scan(*inputs)[0]
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('change', [
    lambda x: [x[0].double(), *x[1:]],
    lambda x: operands(1, 16, 17, 10, 1),
])
def test_refuses_what_it_cannot(change):
    with pytest.raises(ValueError, match="float32 on the CPU and up to 16 states.*use backend='chunked'"):
        selective_scan_cpp.scan(*change(operands(1, 16, 4, 10, 1)))


def test_is_built_once_and_left_whole_where_building_fails(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    selective_scan_cpp.build.__wrapped__()
    library, = (tmp_path / 'vishub').iterdir()
    built = library.stat().st_mtime_ns
    selective_scan_cpp.build.__wrapped__()
    assert library.stat().st_mtime_ns == built
    monkeypatch.setenv('CXX', 'false')  # a compiler that only fails
    with pytest.raises(InputError, match="'false' could not build the scan"):
        selective_scan_cpp.build.__wrapped__()
    assert list((tmp_path / 'vishub').iterdir()) == [library]


def test_says_where_it_cannot_be_kept(monkeypatch, tmp_path):
    (tmp_path / 'vishub').write_text('a file, not a folder')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with pytest.raises(InputError, match='cannot be kept in .* set XDG_CACHE_HOME'):
        selective_scan_cpp.build.__wrapped__()


def test_leaves_denormal_numbers_alone():
    selective_scan_cpp.build()
    assert (torch.tensor(1e-40) * 1).item() != 0


def test_says_what_to_install(monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/c++')
    with pytest.raises(InputError, match=r"needs the compiler '/nowhere/c\+\+'.*apt-get install g\+\+"):
        selective_scan_cpp.build.__wrapped__()
