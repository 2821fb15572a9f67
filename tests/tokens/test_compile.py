"""Every method in one graph: torch.compile without a break, torch.export."""
import pytest
import torch

from tests.tokens.small_models import images, small_model
from vishub import tokens

METHODS = {
    'tome': dict(r=3),
    'uniform': dict(keep={0: 0.6}),
    'class_attention': dict(keep={0: 0.6}),
    'zero_tprune': dict(keep={0: 0.6}, votes=3),
    'token_transforming': dict(keep={0: 0.6}),
    'pyra': dict(r=[4, 2], lora=4),
}
CASES = [('vit', method) for method in METHODS] + [
    ('eva02', 'tome'), ('beit', 'zero_tprune'), ('nvit', 'tome'),
    ('siglip', 'tome'), ('eva_rope_mixed', 'token_transforming')]


@pytest.mark.parametrize('name, method', CASES)
def test_compile_finds_one_graph(name, method):
    torch._dynamo.reset()
    model, x = tokens.apply(small_model(name), method, **METHODS[method]), images()
    with torch.no_grad():
        expected = model(x)
        # The eager backend runs what dynamo captured; fullgraph makes any break an error.
        got = torch.compile(model, fullgraph=True, backend='eager')(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, method', [
    ('vit', 'tome'), ('vit', 'zero_tprune'), ('vit', 'pyra'), ('eva02', 'token_transforming')])
def test_export(name, method):
    model, x = tokens.apply(small_model(name), method, **METHODS[method]), images()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2, max=64)},))
        for batch in (2, 3):
            torch.testing.assert_close(program.module()(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('method', METHODS)
def test_cuda_graph(method):
    """Capture fails on any synchronisation with the host."""
    model = tokens.apply(small_model('vit'), method, **METHODS[method]).cuda()
    x = images().cuda()
    with torch.inference_mode():
        expected = model(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(x)
        got.zero_()
        graph.replay()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
