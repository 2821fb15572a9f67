"""`prune` from a timm model to a smaller one, on a model and data small enough to be trained here."""
import argparse

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import vishub  # noqa: F401  registers the models
from vishub.errors import InputError
from vishub.models.nvit import NViT
from vishub.pruning import (
    LatencyTable,
    Schedule,
    as_nvit,
    count_macs,
    count_params,
    load_official,
    prune,
    save,
)

CLASSES = 4
QUICK = Schedule(interval=2, groups_per_step=4)


def make_data(count, seed):
    """Stripes in four directions over noise: learnt in seconds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angles = labels * torch.pi / CLASSES
    phase = 6 * torch.rand(count, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing='ij')
    wave = torch.sin(
        rows * angles.cos()[:, None, None] + columns * angles.sin()[:, None, None] + phase[:, None, None])
    return TensorDataset(wave[:, None] + 0.5 * torch.randn(count, 3, 16, 16, generator=generator), labels)


@pytest.fixture(scope='module')
def loaders():
    train = DataLoader(make_data(512, 0), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    return train, DataLoader(make_data(256, 1), batch_size=128)


def accuracy(model, loader):
    model.eval()
    with torch.no_grad():
        hits = [(model(images).argmax(dim=-1) == labels).float().mean().item() for images, labels in loader]
    return 100 * float(np.mean(hits))


@pytest.fixture(scope='module')
def trained(loaders):
    torch.manual_seed(0)
    model = timm.create_model(
        'deit_tiny_distilled_patch16_224', img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=4,
        num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(12):
        for images, labels in loaders[0]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert accuracy(model, loaders[1]) > 80
    return model.eval()


def test_prune_to_half_the_operations(trained, loaders, tmp_path):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    sentences, seen = [], []
    pruned = prune(
        trained, loaders[0], target_flops=0.5, schedule=QUICK, eval_loader=loaders[1], log=sentences.append,
        progress=lambda batch, share: seen.append((batch, share)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    model, report = pruned
    assert type(model) is NViT and not model.training
    assert 0.4 < count_macs(model) / count_macs(as_nvit(trained)) <= 0.5
    assert report.macs == (count_macs(as_nvit(trained)), count_macs(model))
    assert report.params == (count_params(as_nvit(trained)), sum(p.numel() for p in model.parameters()))
    assert report.dims_after == model.dims != report.dims_before
    assert report.accuracy['original'] == pytest.approx(accuracy(trained, loaders[1]))
    assert report.accuracy['dense'] == pytest.approx(accuracy(model, loaders[1]))
    assert report.accuracy['dense'] > 60  # chance is 25
    assert len(sentences) == len(report.history)
    assert [batch for batch, _ in seen] == list(range(1, report.batches + 1))
    assert (seen[0][1], seen[-1][1]) == (1., report.history[-1]['cost'])
    costs = [step['cost'] for step in report.history]
    assert costs == sorted(costs, reverse=True) and costs[-1] <= 0.5 < costs[-2]

    # the whole round trip: a folder that timm itself loads
    folder = save(pruned, tmp_path / 'nvit.stripes', licence='apache-2.0')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = next(iter(loaders[1]))[0]
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=1e-6)
    assert {'config.json', 'model.safetensors', 'pruning.json', 'pruning.md', 'pruning.png'} <= {
        path.name for path in folder.iterdir()}
    with Image.open(folder / 'pruning.png') as plot:
        assert plot.width > 800
    assert f'Embedding 64 → {model.dims["EMB"]}' in (folder / 'pruning.md').read_text()


def test_saliency_beats_its_opposite(trained, loaders):
    """Same schedule, data and weights: removing what the saliency calls least keeps more than removing the most."""
    options = dict(
        target_params=0.3, schedule=Schedule(interval=2, groups_per_step=8), lr=0., latency_weight=0.,
        eval_loader=loaders[1])
    least = prune(trained, loaders[0], **options).report.accuracy['dense']

    def opposite(structure):
        return {key: 1 / (value + 1e-12) for key, value in structure.saliency().items()}

    most = prune(trained, loaders[0], saliency=opposite, **options).report.accuracy['dense']
    assert least > most + 10


def test_without_training_kept_weights_are_untouched(trained, loaders):
    model, _ = prune(trained, loaders[0], target_params=0.8, schedule=QUICK, lr=0.)
    own = {round(value, 6) for value in trained.head.bias.tolist()}
    assert {round(value, 6) for value in model.head.bias.tolist()} == own
    columns = {tuple(column) for column in trained.head.weight.T.tolist()}
    assert all(tuple(column) in columns for column in model.head.weight.T.tolist())


def test_latency_target_uses_the_table(trained, loaders):
    nvit = as_nvit(trained)
    axes = {'EMB': [16, 64], 'head': [1, 4], 'QK': [8, 16], 'V': [8, 16], 'MLP': [16, 256]}
    # Only the MLP takes time, so only the MLP should go, when the reward outweighs the saliency.
    table = LatencyTable(axes, np.zeros((2, 2, 2, 2)), np.array([[1., 16.], [1., 16.]]), {})
    model, report = prune(
        trained, loaders[0], target_latency=0.5, latency_table=table, latency_weight=1e3, schedule=QUICK, lr=0.)
    assert report.reached <= 0.5 and min(report.seconds) > 0
    assert {key: model.dims[key] for key in ('EMB', 'head', 'QK', 'V')} == {
        key: nvit.dims[key] for key in ('EMB', 'head', 'QK', 'V')}
    assert all(size < 256 and size % 16 == 0 for size in model.dims['MLP'])


@pytest.mark.parametrize(('options', 'message'), [
    ({}, 'give one of target_latency, target_flops, target_params .got none'),
    (dict(target_flops=0.5, target_params=0.5), 'got target_flops, target_params'),
    (dict(target_latency=1.5), 'between 0 and 1'),
    (dict(target_latency=0.), 'between 0 and 1'),
    (dict(target_flops=10 ** 12), 'a number below'),
    (dict(target_params=0.01), r'params 0\.010 of the original cannot be reached; .* it is 0\.\d+'),
    (dict(target_params=0.6, schedule=Schedule(interval=5, groups_per_step=1, max_epochs=1)),
     r'params is 0\.\d+ of the original after 1 passes'),
])
def test_bad_targets_say_what_is_reachable(trained, loaders, options, message):
    with pytest.raises(InputError, match=message):
        prune(trained, loaders[0], **options)


def test_what_is_said_to_be_reachable_is(trained, loaders):
    with pytest.raises(InputError, match='it is 0') as error:
        prune(trained, loaders[0], target_params=0.01)
    least = float(str(error.value).rpartition(' ')[2])
    _, report = prune(
        trained, loaders[0], target_params=least + 1e-3, schedule=Schedule(interval=1, groups_per_step=60), lr=0.)
    assert report.reached == pytest.approx(least, abs=2e-3)


def test_bad_loaders_and_models_are_named(trained, loaders):
    with pytest.raises(InputError, match='yields no labels'):
        prune(trained, [torch.randn(2, 3, 16, 16)], target_params=0.5)
    with pytest.raises(InputError, match='no batches'):
        prune(trained, [], target_params=0.5)
    with pytest.raises(InputError, match='ResNet is not supported'):
        prune(timm.create_model('resnet18'), loaders[0], target_params=0.5)
    tiny = timm.create_model(
        'vit_tiny_patch16_224', img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=4, num_classes=CLASSES)
    with pytest.raises(InputError, match='block 0 has 4 units of QK, fewer than one group of 8'):
        prune(tiny, loaders[0], target_params=0.5)


def test_official_file_loads_as_data_only(tmp_path):
    from tests.models.test_nvit import UNEVEN, official_state_dict
    model = timm.create_model('nvit_distilled_patch16_224', dims=UNEVEN, num_classes=6, img_size=32).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.token_scale.uniform_(0.5, 1.5)
    checkpoint = {
        'model': official_state_dict(model), 'dim': UNEVEN, 'epoch': 3, 'args': argparse.Namespace(lr=1e-4)}
    torch.save(checkpoint, tmp_path / 'official.pth')
    with pytest.warns(UserWarning, match='CC BY-NC-SA 4.0'):
        loaded = load_official(tmp_path / 'official.pth', img_size=32)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-6)

    torch.save(dict(checkpoint, args=CallsHome()), tmp_path / 'other.pth')
    with pytest.raises(InputError, match='is refused: to read it'):
        load_official(tmp_path / 'other.pth')
    with pytest.raises(InputError, match='is not a file'):
        load_official(tmp_path / 'missing.pth')


class CallsHome:
    """Any class but argparse.Namespace."""
