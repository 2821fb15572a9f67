"""Operations, parameters and the measured latency table."""
import json

import numpy as np
import pytest
import timm
import torch

import vishub  # noqa: F401  registers the models
from vishub.models.nvit import NViT, revit_dims, uniform_dims
from vishub.pruning.cost import (
    LatencyTable,
    block_macs,
    block_params,
    cost_per_unit,
    count_macs,
    count_params,
    time_model,
)


@pytest.mark.parametrize(('dims', 'macs'), [
    (revit_dims(176), 1_135_290_112),  # the official count, from the golden case
    (uniform_dims(768, 12, 12, 64, 3072), 17_656_811_520),  # distilled DeiT-B
])
def test_macs_are_the_official_ones(dims, macs):
    with torch.device('meta'):
        model = timm.create_model('nvit_distilled_patch16_224', dims=dims)
    assert count_macs(model) == macs


def small(**kwargs):
    dims = dict(EMB=48, head=[3, 1], QK=[8, 16], V=[16, 4], MLP=[32, 96])
    return NViT(**{'img_size': 32, 'patch_size': 8, 'num_classes': 7, 'dims': dims, **kwargs}).eval()


def test_macs_of_other_sizes_are_those_of_that_model():
    model, dims = small(), dict(EMB=32, head=[2, 1], QK=[8, 8], V=[8, 4], MLP=[16, 80])
    assert count_macs(model, dims) == count_macs(small(dims=dims)) < count_macs(model)
    assert count_params(model, dims) == count_params(small(dims=dims)) < count_params(model)


def test_block_params_are_those_of_the_modules():
    model = small(token_scale=False)
    counts = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert counts == [block_params(48, 3, 8, 16, 32), block_params(48, 1, 16, 4, 96)]


def test_saved_cost_of_a_unit_and_its_floors():
    cost, dims = block_macs(10), dict(EMB=48, head=[3, 2], QK=[9, 8], V=[16, 8], MLP=[32, 16])
    saved = cost_per_unit(cost, dims)
    assert saved['head', 0] == cost(48, 3, 9, 16, 32) - cost(48, 2, 9, 16, 32) > 0
    assert saved['EMB', 0] == sum(
        cost(48, *sizes) - cost(47, *sizes) for sizes in ((3, 9, 16, 32), (2, 8, 8, 16)))
    assert all(saved[kind, 1] == 0 for kind in ('head', 'QK', 'V', 'MLP'))


def test_latency_table_is_measured_once_and_read_back(tmp_path):
    model, done = small(), []
    table = LatencyTable.measure(
        model, batch_size=2, points=2, repeats=3, cache=tmp_path, progress=lambda n, total: done.append((n, total)))
    assert done[-1][0] == done[-1][1] == len(done)
    assert table(48, 3, 16, 16, 96) > 0
    file, = tmp_path.iterdir()
    content = json.loads(file.read_text())
    content['mlp'][-1][-1] = 42.
    file.write_text(json.dumps(content))
    again = LatencyTable.measure(model, batch_size=2, points=2, repeats=3, cache=tmp_path)
    assert again(48, 3, 16, 16, 96) > 42  # from the file, not measured anew
    LatencyTable.measure(model, batch_size=3, points=2, repeats=3, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # other conditions, another table


def test_latency_table_interpolates_and_never_falls_with_size():
    axes = {'EMB': [16, 32], 'head': [1, 2], 'QK': [8, 16], 'V': [8, 16], 'MLP': [16, 32, 64]}
    multilinear = np.fromfunction(lambda e, h, q, v: (1 + e) * (1 + h) * (1 + q + v), (2, 2, 2, 2))
    table = LatencyTable(axes, multilinear, np.array([[1., 2., 4.], [2., 4., 8.]]), {})
    assert table(16, 1, 8, 8, 16) == pytest.approx(1 + 1)
    assert table(24, 1, 12, 8, 48) == pytest.approx(1.5 * 1 * 1.5 + 1.5 * 3)
    assert table(32, 2, 16, 16, 64) == pytest.approx(2 * 2 * 3 + 8)
    from vishub.pruning.cost import _monotone
    noisy = np.array([[3., 2., 4.], [2., 5., 1.]])
    assert _monotone(noisy).tolist() == [[3., 3., 4.], [3., 5., 5.]]


def test_time_model_leaves_the_mode_alone():
    model = small().train()
    assert time_model(model, 2, repeats=3) > 0
    assert model.training
