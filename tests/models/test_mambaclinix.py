"""MambaClinix against its official outputs, and what is particular to a network of volumes."""
import pytest
import timm
import torch
from timm.layers import DropPath

from tests.models.official_weights import load_case
from vishub.models.layers.selective_scan import selective_scan
from vishub.models.mambaclinix import (
    HgcnBlock,
    Mamba,
    MambaClinix,
    MambaLayer,
    checkpoint_filter_fn,
)

# fixed parameters and those of each class, as the official code counts them; and its unused scalars, which we have not
PARAMETERS = {
    'mambaclinix_s6': (48_872_579, 805, 3),
    'mambaclinix_s5': (28_426_818, 484, 2),
    'mambaclinix_s7_aniso': (71_412_707, 1126, 3),
}
GOLDEN = dict(features=(8, 16, 32, 32), patch_size=32, num_classes=3, in_chans=1)


def count(model):
    return sum(p.numel() for p in model.parameters())


def tiny(**kwargs):
    """A small model in which every part matters: fresh ones hide what is behind a scale of 1e-6."""
    torch.manual_seed(0)
    model = MambaClinix(**{**GOLDEN, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def volume(*size, seed=0, channels=1, batch_size=1):
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(seed))


# Official outputs

@torch.no_grad()
def test_golden_network():
    case = load_case('mambaclinix', 'mambaclinix_tiny_32')
    model = MambaClinix(**GOLDEN, deep_supervision=True).eval()
    assert count(model) == case.parameters - 2  # one unused scalar a Mamba layer
    model.load_state_dict(checkpoint_filter_fn(case.state_dict, model))
    x = case.inputs['x']
    skips = model.forward_features(x)
    case.check('skip_2', skips[2], rtol=1e-4)
    case.check('skip_3', skips[3], rtol=1e-4)
    case.check('logits_0', model(x), rtol=1e-4)
    model.train()
    for module in model.modules():  # the official outputs are those of evaluation
        if isinstance(module, DropPath):
            module.eval()
    for level, logits in enumerate(model(x)):
        case.check(f'logits_{level}', logits, rtol=1e-4)


def renamed(state_dict, prefix, model):
    """Official entries of one mixer under our names, by way of a whole checkpoint's."""
    named = {f'encoder.encoder_layers.{prefix}.{key}': value for key, value in state_dict.items()}
    named['encoder.stem.convs.0.conv.weight'] = torch.zeros(1)
    own = checkpoint_filter_fn(named, model)
    start = f'stages.{prefix}.mixer.'
    return {key.removeprefix(start): value for key, value in own.items() if key.startswith(start)}


@pytest.mark.parametrize('case, stage, block', [
    ('hgcn_block_c16_order3', 1, lambda: HgcnBlock(16, 3, (3, 3, 3))),
    ('mamba_layer_c32', 2, lambda: MambaLayer(32)),
])
@torch.no_grad()
def test_golden_mixers(case, stage, block):
    case, block = load_case('mambaclinix', case), block().eval()
    assert count(block) == case.parameters - (stage == 2)
    block.load_state_dict(renamed(case.state_dict, stage, tiny()))
    case.check('out', block(case.inputs['x']), atol=2e-5)


@torch.no_grad()
def test_golden_mamba_block():
    case = load_case('mambaclinix', 'mamba_block_d64_l49')
    block = Mamba(64).eval()
    assert count(block) == case.parameters
    block.load_state_dict(case.state_dict)
    case.check('out', block(case.inputs['hidden_states']), atol=2e-5)


def test_golden_selective_scan():
    case = load_case('mambaclinix', 'selective_scan_b2_d8_l37_n4')
    given = dict(case.inputs)
    A = -given['A'].exp()
    u, delta, B, C, D, z, bias = (given[key] for key in ('u', 'delta', 'B', 'C', 'D', 'z', 'delta_bias'))
    soft = dict(delta_softplus=True)
    y, state = selective_scan(u, delta, A, B, C, D, z, bias, return_last_state=True, **soft)
    groups, const = (given['B_groups'], given['C_groups']), (given['B_const'], given['C_const'])
    for output, value in {
            'full': y, 'full_last_state': state,
            'no_z': selective_scan(u, delta, A, B, C, D, None, bias, **soft),
            'no_D': selective_scan(u, delta, A, B, C, None, z, bias, **soft),
            'no_delta_bias': selective_scan(u, delta, A, B, C, D, z, None, **soft),
            'bare_no_softplus': selective_scan(u, delta.abs(), A, B, C),
            'groups': selective_scan(u, delta, A, *groups, D, z, bias, **soft),
            'const_B': selective_scan(u, delta, A, const[0], C, D, None, bias, **soft),
            'const_B_const_C': selective_scan(u, delta, A, *const, D, None, bias, **soft),
    }.items():
        case.check(output, value, atol=1e-4)


# Sizes

@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    fixed, each, unused = PARAMETERS[name]
    for num_classes, in_chans in ((2, 1), (14, 4)):
        with torch.device('meta'):
            model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
        first = model.stem.conv.weight[0, 0].numel() * 32
        assert count(model) == fixed - unused + each * num_classes + (in_chans - 1) * first


def test_parameters_of_the_tiny_form():
    model = timm.create_model('mambaclinix_tiny')
    assert model.num_classes == 3 and count(model) == 1_542_323 - 2


@pytest.mark.parametrize('name, macs', [('mambaclinix_s6', 927.8), ('mambaclinix_s5', 389.3), ('mambaclinix_s7_aniso', 874.5)])
def test_macs(name, macs):
    from vishub.models.cost import module_macs
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=14).eval()
        x = torch.empty(1, 1, *model.patch_size)
    # ours runs the decoder's 1^3 convolutions before the upsampling, which is less work than the official count has
    saved = sum(
        level.up.weight.numel() * (1 - 1 / torch.tensor(level.stride).prod().item())
        * torch.tensor(model.patch_size).div(torch.tensor(info['strides'])).prod().item()
        for level, info in zip(model.decoder, reversed(model.feature_info[:-1])))
    # of all heads only the finest runs here
    assert (module_macs(model, x) + saved) / 1e9 == pytest.approx(macs, rel=1e-2)
