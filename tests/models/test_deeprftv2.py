"""DeepRFTv2 against the official code's outputs, and what is particular to it."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vishub  # noqa: F401
from tests.models.official_weights import load_case
from vishub.models.cost import count_macs, module_macs
from vishub.models.deeprftv2 import (
    DeepRFTv2,
    KernelEstimator,
    NafBlock,
    NafScanBlock,
    SelectiveScan2d,
    box_mean,
    checkpoint_filter_fn,
    half_size,
)
from vishub.models.layers.reversible import Step, bounded, run, run_reversible


def trained_look(model, seed=0):
    """Give every branch that starts at zero some weight, so that nothing is hidden."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.3)
    return model


def tiny(**kwargs):
    torch.manual_seed(0)
    return trained_look(timm.create_model('deeprftv2_tiny', **kwargs))


# Parity with the official code

def converted(state_dict, prefix, ours, model=None):
    """Weights of an official part, as ours: put where a whole checkpoint has it, converted, and taken out again."""
    whole = {f'global_model.{prefix}.{name}': value for name, value in state_dict.items()}
    return {name.removeprefix(f'{ours}.'): value for name, value in checkpoint_filter_fn(whole, model).items()}


def load_block(module, case, part=''):
    state_dict = {f'{part}{name}': value for name, value in case.state_dict.items()}
    state_dict = converted(state_dict, 'subnets_max.0.level0.blocks.0', 'columns.0.encoder.0.blocks.0')
    module.load_state_dict({name.removeprefix(part): value for name, value in state_dict.items()})
    assert sum(p.numel() for p in module.parameters()) == case.parameters
    return module.eval()


@pytest.mark.parametrize('name, module, part', [
    ('evss2d_c48_12x10', lambda: SelectiveScan2d(48), 'attn.'),
    ('naf_c48_9x7', lambda: NafBlock(48), ''),
    ('nafevs_c96_idx0_8x6', lambda: NafScanBlock(96, 0), ''),
    ('nafevs_c96_idx1_8x6', lambda: NafScanBlock(96, 1), ''),
])
@torch.no_grad()
def test_official_blocks(name, module, part):
    case = load_case('deeprftv2', name)
    case.check('out', load_block(module(), case, part)(case.inputs['x']))


@torch.no_grad()
def test_official_kernel_estimator():
    case = load_case('deeprftv2', 'fke_first_24x20')
    estimator = KernelEstimator(48, 48, 1, first=True).eval()
    estimator.load_state_dict(converted(case.state_dict, 'kernel_estimator.0', 'columns.0.kernel_estimator'))
    assert sum(p.numel() for p in estimator.parameters()) == case.parameters
    feature, state = case.inputs['x'], estimator.spectrum(case.inputs['x'])
    for i, level in enumerate(estimator.levels):
        state = level(state)
        if i != 1:  # not stored
            case.check(f'ker_{i}', state)
    transfer = estimator.transfer(state)
    case.check('otf_real', transfer.real)
    case.check('otf_imag', transfer.imag)
    filtered = estimator.filtered(feature, state)
    case.check('feature', filtered)
    case.check('image', estimator.head(filtered) + case.inputs['image'])


@pytest.mark.parametrize('name', ['deeprftv2_s_128', 'deeprftv2_b_64'])
@torch.no_grad()
def test_official_networks(name):
    case = load_case('deeprftv2', name)
    with torch.device('meta'):
        model = timm.create_model(name.rpartition('_')[0])
    bare = {key.removeprefix('global_model.'): value for key, value in case.state_dict.items()}
    assert len(bare) == len(case.state_dict)
    wrapped = {'params': {f'module.{key}': value for key, value in case.state_dict.items()}}
    model.load_state_dict(checkpoint_filter_fn(wrapped, model), assign=True)
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    model.eval()
    output = model.forward_all(case.inputs['x'])
    for i, image in enumerate(output.full):
        case.check(f'img_{i}', image)
    case.check('mid_3', output.half[3])
    case.check('img_3', model(case.inputs['x']))


def test_own_state_dict_passes_and_strange_ones_do_not():
    model = timm.create_model('deeprftv2_tiny')
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    for name in ('strange.0.weight', 'subnets_max.0.level0.strange.weight', 'kernel_estimator.0.strange.weight'):
        with pytest.raises(ValueError, match=f"'{name}' is not an entry of an official checkpoint"):
            checkpoint_filter_fn({f'global_model.{name}': torch.zeros(1)}, model)


# Sizes

@pytest.mark.parametrize('name, parameters, macs, size', [
    ('deeprftv2_b', 30_117_560, 122.93, 256), ('deeprftv2_tiny', 1_373_176, 0.363, 64)])
def test_parameters_and_macs(name, parameters, macs, size):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    found = module_macs(model.train(), torch.empty(1, 3, size, size, device='meta')) / 1e9
    assert found == pytest.approx(macs, rel=5e-3)
    # in evaluation the heads of the first column, and those of the half picture, are not run
    assert 0.97 * macs < count_macs(name) / 1e9 < macs


@pytest.mark.parametrize('name, parameters', [('deeprftv2_s', 10_576_924), ('deeprftv2_b', 15_040_156)])
def test_one_column(name, parameters):
    with torch.device('meta'):
        model = timm.create_model(name, num_columns=1)
    assert sum(p.numel() for p in model.parameters()) == parameters


# Reversibility

def test_reversible_steps_are_the_plain_ones():
    """All four kinds of steps, a derived state that a later step needs again, and one that nothing needs."""
    torch.manual_seed(0)
    linears = nn.ModuleList([nn.Linear(3, 3).double() for _ in range(5)])
    alphas = nn.ParameterList([nn.Parameter(torch.full((1, 3), value).double()) for value in (0.5, -0.7, 1e-5)])
    steps = []
    for _ in range(2):
        steps += [
            Step('update', 'a', lambda b, x: linears[0](b).sin() + x, ('b', 'x'), alphas[0]),
            Step('update', 'c', lambda a, b: linears[3](a) * b, ('a', 'b'), alphas[1]),
            Step('derive', 'd', lambda a, c: linears[1](a * c), ('a', 'c')),
            Step('replace', 'b', lambda b, d: linears[2](b + d).tanh(), ('b', 'd')),
            Step('update', 'unread', lambda a: linears[4](a), ('a',), alphas[2]),
        ]
    steps.insert(4, Step('emit', 'first', lambda a, d: (a * d).cos(), ('a', 'd')))
    steps.insert(6, Step('update', 'x', lambda d: d.sin(), ('d',), alphas[1]))
    steps.append(Step('emit', 'second', lambda c: c * 2, ('c',)))
    steps.append(Step('emit', 'third', lambda x: x.exp(), ('unread',)))
    parameters = [*linears.parameters(), *alphas]

    def gradients(execute):
        names = ('a', 'b', 'c', 'unread', 'x')
        states = {name: torch.full((2, 3), float(i), dtype=torch.double) for i, name in enumerate(names)}
        leaves = [states[name].requires_grad_() for name in ('a', 'b', 'x')]
        emitted = execute(dict(states))
        loss = sum(value.sum() * (i + 1) for i, value in enumerate(emitted.values()))
        return list(emitted.values()), torch.autograd.grad(loss, leaves + parameters)

    plain = gradients(lambda states: run(steps, states))
    reversible = gradients(lambda states: run_reversible(steps, states, parameters))
    for one, other in zip(plain, reversible):
        for value, expected in zip(other, one):
            torch.testing.assert_close(value, expected)


def test_factors_can_be_divided_by():
    alpha = torch.tensor([0.5, -0.2, 1e-5, -1e-6, 0.], requires_grad=True)
    torch.testing.assert_close(bounded(alpha), torch.tensor([0.5, -0.2, 1e-3, -1e-3, 1e-3]))
    bounded(alpha).sum().backward()
    assert torch.equal(alpha.grad, torch.ones(5))


def test_columns_can_be_undone():
    """Gradients by undoing the columns are the plain ones, in float64 to rounding."""
    x = torch.rand(1, 3, 24, 32, dtype=torch.double)
    target = torch.rand_like(x)
    results = []
    for reversible in (False, True):
        model = tiny(depths=(1, 1, 2)).double().train()
        model.set_grad_checkpointing(reversible)
        given = x.clone().requires_grad_()
        output = model(given)
        loss = sum((p - target).square().mean() for p in output.full) + sum(p.square().mean() for p in output.half)
        loss.backward()
        results.append([loss, given.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def kept_for_backward(num_columns, reversible):
    """Bytes that autograd keeps between forward and backward, each storage once."""
    model = timm.create_model('deeprftv2_tiny', num_columns=num_columns).train()
    model.set_grad_checkpointing(reversible)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.rand(1, 3, 32, 32))
    return sum(size for size, _ in kept.values())


def test_activation_memory_does_not_grow_with_the_columns():
    plain = [kept_for_backward(n, False) for n in (2, 4)]
    reversible = [kept_for_backward(n, True) for n in (2, 4)]
    assert plain[1] > 1.9 * plain[0]
    # a column keeps its latent map, 4 C channels at a quarter of the side
    assert reversible[1] - reversible[0] == 2 * 4 * (64 * 8 * 8)
    assert reversible[1] < plain[0] / 10


# Parts

def test_blocks_turn_back_after_four():
    x = torch.rand(1, 8, 10, 14)
    with torch.no_grad():
        turned = nn.Sequential(*[NafScanBlock(8, i) for i in range(4)])(x)  # all branches start at zero
    torch.testing.assert_close(turned, x)


def test_local_pooling():
    x = torch.randn(2, 3, 11, 14)
    mean = box_mean(x, (5, 20))
    inner = F.avg_pool2d(x, (5, 14), stride=1)  # 2, 3, 7, 1
    assert mean.shape == x.shape
    torch.testing.assert_close(mean, F.pad(inner, (6, 7, 2, 2), mode='replicate'))
    torch.testing.assert_close(box_mean(x, (11, 14)), x.mean((2, 3), keepdim=True))
    small, large = torch.rand(1, 3, 24, 24), torch.rand(1, 3, 48, 72)
    local, plain = tiny(local_pool=16).eval(), tiny().eval()
    local.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(local(small), plain(small))  # the windows cover it
        assert not torch.allclose(local(large), plain(large), atol=1e-4)


def test_half_size():
    x = torch.rand(1, 3, 16, 20)
    half = half_size(x)
    assert half.shape == (1, 3, 8, 10)
    torch.testing.assert_close(half_size(torch.ones(1, 1, 8, 8)), torch.ones(1, 1, 4, 4))
    # bilinear resizing by two is the mean of four blurred pixels
    weights = torch.tensor([1., 4., 6., 4., 1.]) / 16
    patch = x[0, 0, 2:8, 4:10]  # rows 4, 5 and columns 6, 7, and two around
    blurred = [(patch[i:i + 5, j:j + 5] * torch.outer(weights, weights)).sum() for i in (0, 1) for j in (0, 1)]
    torch.testing.assert_close(half[0, 0, 2, 3], sum(blurred) / 4)


@torch.no_grad()
def test_outputs():
    model = tiny().eval()
    x = torch.rand(2, 3, 32, 80)
    image, kernels = model(x, return_kernels=True)
    assert kernels.shape == (2, 16, 31, 65)
    torch.testing.assert_close(model(x), image)
    torch.testing.assert_close(model(x, half_size(x)), image)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), x), image)
    assert not torch.allclose(model(x, torch.zeros(2, 3, 16, 40)), image)
    output = model.train()(x)
    assert len(output.full) == len(output.half) == 4
    torch.testing.assert_close(output.full[-1], image)
    assert output.half[0].shape == (2, 3, 16, 40)


@torch.no_grad()
def test_kernels_filter():
    """The filter of a channel, applied in space, is the transfer function's product."""
    estimator = KernelEstimator(4, 4, 1, first=True).double()
    state = torch.randn(1, 4, 12, 7, dtype=torch.double)
    transfer = estimator.transfer(state)
    kernels = estimator.kernels(state)
    assert kernels.shape == (1, 4, 11, 11)
    whole = torch.fft.irfft2(transfer)
    torch.testing.assert_close(kernels[..., 5, 5], whole[..., 0, 0])
    torch.testing.assert_close(kernels[..., 5, 6], whole[..., 0, 1])
    torch.testing.assert_close(kernels[..., 4, 5], whole[..., -1, 0])


@torch.no_grad()
def test_intermediates():
    model = tiny().eval()
    x = torch.rand(2, 3, 24, 40)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert [list(m.shape) for m in maps] == [[2, 16, 24, 40], [2, 32, 12, 20], [2, 64, 6, 10]]
    last, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(last, first) and torch.equal(first, maps[0])
    extractor = timm.create_model('deeprftv2_tiny', features_only=True, out_indices=(0, 1)).eval()
    assert extractor.feature_info.channels() == [16, 32] and extractor.feature_info.reduction() == [1, 2]
    assert sum(p.numel() for p in extractor.parameters()) < sum(p.numel() for p in model.parameters())
    own = extractor.model.state_dict()
    extractor.model.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    for one, other in zip(extractor(x), maps):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match='NHWC'):
        model.forward_intermediates(x, output_fmt='NHWC')


# Bad arguments and input

@pytest.mark.parametrize('arguments, message', [
    (dict(in_chans=1), 'in_chans must be 3, not 1'), (dict(num_classes=10), 'num_classes must be 0'),
    (dict(dim=0), 'dim must be at least 1'), (dict(depths=(1, 2)), 'three levels'),
    (dict(block_types=('naf', 'conv', 'naf')), "not 'conv'"),
    (dict(block_types=('naf', 'nafevs', 'naf'), depths=(1, 2, 4)), 'a multiple of 4 of them, not 2'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepRFTv2(**{**dict(dim=8, kernel_dim=8, depths=(1, 4, 4)), **arguments})


@pytest.mark.parametrize('x, message', [
    (torch.rand(1, 4, 32, 32), r'expected RGB \(B, 3, H, W\) in \[0, 1\]'),
    (torch.rand(3, 32, 32), r'expected RGB \(B, 3, H, W\)'),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'divide uint8 by 255'),
    (torch.rand(1, 3, 32, 36), 'multiples of 8, got 32x36'), (torch.rand(1, 3, 16, 32), 'at least 24'),
])
def test_bad_input(x, message):
    model = timm.create_model('deeprftv2_tiny').eval()
    with pytest.raises(ValueError, match=message):
        model(x)
    with pytest.raises(ValueError, match='half must be the picture at half its size'):
        model(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 16, 24))
    with pytest.raises(ValueError, match='no classes'):
        model.reset_classifier(10)
