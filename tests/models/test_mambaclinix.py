"""MambaClinix against its official outputs, and what is particular to a network of volumes."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from tests.models.official_weights import load_case
from vishub.models.cost import module_macs
from vishub.models.layers.selective_scan import selective_scan
from vishub.models.mambaclinix import (
    HgcnBlock,
    HgConv,
    Mamba,
    MambaClinix,
    MambaLayer,
    ResidualBlock,
    arguments_of_plan,
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


@pytest.mark.parametrize('name, macs', [
    ('mambaclinix_s6', 927.8), ('mambaclinix_s5', 389.3), ('mambaclinix_s7_aniso', 874.5)])
def test_macs(name, macs):
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


# What is particular to it

@torch.no_grad()
def test_macs_are_saved_where_the_numbers_stay():
    """The decoder's 1^3 convolution runs before the voxels are repeated: the same numbers."""
    level = tiny().decoder[0]
    x = torch.randn(1, 32, 3, 4, 2)
    repeated = F.interpolate(x, scale_factor=2, mode='nearest')
    torch.testing.assert_close(
        F.interpolate(level.up(x), scale_factor=level.stride, mode='nearest'), level.up(repeated), rtol=1e-5, atol=1e-5)


def test_plan():
    model = tiny()
    assert model.divisor == (8, 8, 8) and [info['num_chs'] for info in model.feature_info] == [8, 16, 32, 32]
    assert isinstance(model.stages[1].mixer, HgcnBlock) and isinstance(model.stages[2].mixer, MambaLayer)
    assert isinstance(model.stages[0].norm, nn.Identity) and not isinstance(model.stages[1].norm, nn.Identity)
    with torch.device('meta'):
        aniso = timm.create_model('mambaclinix_s7_aniso')
    assert aniso.divisor == (16, 64, 64) and aniso.patch_size == (48, 192, 192)
    assert aniso.stem.conv.kernel_size == aniso.stages[0].mixer.hgconv.dwconv.kernel_size == (1, 3, 3)
    assert [len(stage.mixer.hgconv.dims) for stage in aniso.stages[:4]] == [2, 3, 4, 5]
    assert timm.create_model('mambaclinix_tiny').stages[1].mixer.hgconv.dims == [4, 8, 16]
    rates = [module.drop_prob for module in MambaClinix(**GOLDEN).modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.5 / 3] * 2)  # the first stage has rate 0


def test_arguments_of_a_plan():
    old = {'patch_size': [48, 192, 192], 'UNet_base_num_features': 32, 'unet_max_num_features': 320,
           'conv_kernel_sizes': [[1, 3, 3]] + [[3, 3, 3]] * 6,
           'pool_op_kernel_sizes': [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4, [1, 2, 2]]}
    arguments = arguments_of_plan(old)
    new = {'patch_size': old['patch_size'], 'architecture': {'arch_kwargs': {
        'features_per_stage': [32, 64, 128, 256, 320, 320, 320], 'kernel_sizes': old['conv_kernel_sizes'],
        'strides': old['pool_op_kernel_sizes']}}}
    assert arguments_of_plan(new) == arguments
    with torch.device('meta'):
        assert count(MambaClinix(**arguments, num_classes=14)) == count(
            timm.create_model('mambaclinix_s7_aniso', num_classes=14))
    with pytest.raises(ValueError, match="has no 'patch_size'"):
        arguments_of_plan({'conv_kernel_sizes': [], 'pool_op_kernel_sizes': [], 'UNet_base_num_features': 1,
                           'unet_max_num_features': 1})
    with pytest.raises(ValueError, match='no 2-D form'):
        arguments_of_plan({**old, 'patch_size': [192, 192]})


@torch.no_grad()
def test_hgconv_by_its_definition():
    torch.manual_seed(0)
    block = HgConv(8, 3, (1, 3, 3))
    x = torch.randn(2, 8, 3, 5, 4)
    z = block.proj_in(x)
    rest = block.dwconv(z[:, 2:])
    h = z[:, :2] + rest[:, :2]
    h = block.reconv[0](h) + rest[:, 2:6]
    h = block.reconv[1](h) + rest[:, 6:14]
    torch.testing.assert_close(block(x), block.proj_out(h))


@torch.no_grad()
def test_mamba_is_causal_along_the_scan():
    block = Mamba(16).eval()
    x = torch.randn(1, 20, 16)
    changed = x.clone()
    changed[:, 12] += 1
    moved = (block(changed) - block(x)).abs().amax((0, 2)) > 1e-7
    assert moved.tolist() == [False] * 12 + [True] * 8


@torch.no_grad()
def test_strided_shortcut_is_a_mean():
    block = ResidualBlock(4, 4, (3, 3, 3), (1, 2, 2))
    x = torch.randn(1, 4, 2, 4, 4)
    assert torch.equal(block.skip(x), F.avg_pool3d(x, (1, 2, 2)))
    assert block(x).shape == (1, 4, 2, 2, 2)


def test_deep_supervision_in_training_alone():
    model = tiny(deep_supervision=True).train()
    x = volume(16, 24, 32)
    logits = model(x)
    assert [tuple(level.shape) for level in logits] == [(1, 3, 16, 24, 32), (1, 3, 8, 12, 16), (1, 3, 4, 6, 8)]
    assert tiny().train()(x).shape == (1, 3, 16, 24, 32)
    assert model.eval()(x).shape == (1, 3, 16, 24, 32)


@torch.no_grad()
def test_heads_and_intermediates():
    model = tiny()
    x = volume(16, 16, 24)
    skips, maps = model.forward_intermediates(x, indices=2)
    assert [tuple(m.shape) for m in maps] == [(1, 32, 4, 4, 6), (1, 32, 2, 2, 3)]
    torch.testing.assert_close(model.forward_head(skips), model(x))
    assert model.forward_head(skips, pre_logits=True).shape == (1, 8, 16, 16, 24)
    first, = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert torch.equal(first, skips[0])
    extractor = timm.create_model(
        'mambaclinix_tiny', features=GOLDEN['features'], features_only=True, out_indices=(0, 2))
    assert [tuple(m.shape) for m in extractor(x)] == [(1, 8, 16, 16, 24), (1, 32, 4, 4, 6)]
    assert extractor.feature_info.channels() == [8, 32] and extractor.feature_info.reduction() == [1, 4]
    model.reset_classifier(5)
    assert model(x).shape == (1, 5, 16, 16, 24) and len({id(level.seg_head) for level in model.decoder}) == 3
    assert all(level.seg_head.weight.shape[0] == 5 for level in model.decoder)
    model.reset_classifier(0)
    assert model(x).shape == (1, 8, 16, 16, 24)
    with pytest.raises(ValueError, match='no pooling'):
        model.reset_classifier(3, 'avg')


def test_half_precision_leaves_the_scan_alone():
    model = tiny(deep_supervision=True).train()
    seen = []
    hook = model.stages[2].mixer.mamba.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        sum(level.float().mean() for level in model(volume(16, 16, 16))).backward()
    hook.remove()
    assert seen == [torch.float32]
    assert tiny().to(torch.bfloat16)(volume(16, 16, 16).bfloat16()).dtype == torch.bfloat16


def test_weight_decay_leaves_the_recurrence_alone():
    assert tiny().no_weight_decay() == {
        f'stages.{i}.mixer.mamba.{name}' for i in (2, 3) for name in ('A_log', 'D')}


# Checkpoints

def test_official_checkpoint_as_nnunet_stores_it():
    case = load_case('mambaclinix', 'mambaclinix_tiny_32')
    model = tiny()
    stored = dict(case.state_dict)
    stored['encoder.stem.convs.0.all_modules.0.weight'] = stored['encoder.stem.convs.0.conv.weight']
    stored.update({f'decoder.{name}': value for name, value in case.state_dict.items() if name.startswith('encoder.')})
    own = checkpoint_filter_fn({'network_weights': {f'module.{name}': value for name, value in stored.items()}}, model)
    assert set(own) == set(model.state_dict())
    assert checkpoint_filter_fn(own, model) is own
    stored['decoder.encoder.stem.convs.0.norm.weight'] = torch.zeros(8)
    with pytest.raises(ValueError, match='should repeat'):
        checkpoint_filter_fn(stored, model)
    with pytest.raises(ValueError, match="'decoder.other.0.weight' is not an entry"):
        checkpoint_filter_fn({**case.state_dict, 'decoder.other.0.weight': torch.zeros(1)}, model)


# Refusals

@pytest.mark.parametrize('arguments, match', [
    ({'features': (8, 16)}, 'n_stages >= 3'),
    ({'features': (8, 12, 32, 32)}, r'divisible by 2\*\*\(order-1\) at stage 1'),
    ({'kernel_sizes': (3, 3)}, 'as many kernel sizes'),
    ({'kernel_sizes': 2}, 'must be odd'),
    ({'strides': (2, 2, 2, 2)}, 'those of the first stage 1'),
    ({'strides': (1, (2, 2), 2, 2)}, 'no 2-D form'),
    ({'in_chans': 0}, 'in_chans must be at least 1'),
])
def test_bad_plans(arguments, match):
    with pytest.raises(ValueError, match=match):
        MambaClinix(**{**GOLDEN, **arguments})


@pytest.mark.parametrize('x, match', [
    (torch.zeros(1, 1, 16, 16), r'x must be \(B, C, D, H, W\)'),
    (torch.zeros(1, 2, 16, 16, 16), 'C must be in_chans=1'),
    (torch.zeros(1, 1, 16, 20, 16), r'must be divisible by \(8, 8, 8\): pad to \(16, 24, 16\)'),
    (torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16), 'floating point'),
])
def test_bad_input(x, match):
    with pytest.raises(ValueError, match=match):
        tiny()(x)
