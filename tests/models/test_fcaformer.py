"""FcaFormer against its official outputs, and what is particular to the family."""
import os
import subprocess
import sys

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from tests.models.official_weights import load_case
from vishub import catalog
from vishub.models import fcaformer
from vishub.models.fcaformer import FcaAttention, FcaBlock, FcaFormer, checkpoint_filter_fn

PARAMETERS = {
    'fcaformer_l1': 6_187_560,
    'fcaformer_l2': 16_275_870,
    'fcaformer_l3': 27_894_484,
    'fcaformer_l4': 65_638_204,
    'fcaformer_small64': 1_877_871,
}


def load(model, case):
    """Load the official-named weights of a golden case, strictly."""
    state_dict = checkpoint_filter_fn(case.state_dict, model)
    # Integer entries are not part of a case; all others must fit exactly.
    result = model.load_state_dict(state_dict, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith('num_batches_tracked') for key in result.missing_keys)
    return model.eval()


def randomised(model, seed=0):
    """Weights and statistics with which every part of the model matters (fresh layer scales hide the branches)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in list(model.named_parameters()) + list(model.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith('running_var'):
                value.copy_(1 + noise.abs() / 2)
            elif value.ndim < 2:
                value.copy_(0.2 * noise + (1. if name.endswith('weight') or 'gamma' in name else 0.))
            elif value.shape[0] == 1 or name.endswith('rel_bias'):
                value.copy_(noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.eval()


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def small():
    return randomised(timm.create_model('fcaformer_small64'))


# Official outputs

@torch.no_grad()
def test_golden_classifier():
    case = load_case('fcaformer', 'fcaformer_l1_224')
    model = load(timm.create_model('fcaformer_l1'), case)
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    x = case.inputs['x']
    features, maps = model.forward_intermediates(x)
    case.check('logits', model(x), atol=5e-6)
    case.check('pooled', features.mean((2, 3)), atol=5e-6)
    for i, feature_map in enumerate(maps):
        case.check(f'stage{i + 1}', feature_map, atol=1e-5)
    case.check('logits', model.fuse()(x), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('fused', [True, False])
def test_golden_block(fused):
    case = load_case('fcaformer', 'fcaformer_block_c64_h4_14x14_depth2')
    block = load(FcaBlock(64, 4, (14, 14), num_past=2, makes_cross=True), case)
    assert sum(p.numel() for p in block.parameters()) == case.parameters
    block.attn.fused_attn = fused
    out, cross_tokens = block(case.inputs['x'], case.inputs['s'])
    case.check('out', out, atol=1e-5)
    case.check('cross_tokens', cross_tokens, atol=1e-5)


@torch.no_grad()
def test_golden_dense():
    case = load_case('fcaformer', 'fcaformer_dense_l2_256x320')
    model = load(timm.create_model('fcaformer_dense_l2', features_only=True).model, case)
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    x = case.inputs['x']
    for i, feature_map in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        case.check(f'out{i}', feature_map, atol=1e-5)
    for i, feature_map in enumerate(model.fuse().forward_intermediates(x, intermediates_only=True)):
        case.check(f'out{i}', feature_map, atol=1e-4)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_dense_parameters_and_channels():
    model = timm.create_model('fcaformer_dense_l2', features_only=True)
    assert sum(p.numel() for p in model.parameters()) == 16_334_390
    assert model.feature_info.channels() == [96, 192, 384, 768]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


# Folding

@pytest.mark.parametrize('options', [{}, {'window_size': (3, 2), 'out_dims': (8, 12, 16, 20)}])
@torch.no_grad()
def test_folding(options):
    model = randomised(timm.create_model('fcaformer_small64', **options))
    x = images(2, 3, 64, 64)
    folded = reparameterize_model(model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=0., atol=1e-4)
    for got, expected in zip(
            folded.forward_intermediates(x, intermediates_only=True),
            model.forward_intermediates(x, intermediates_only=True)):
        torch.testing.assert_close(got, expected, rtol=0., atol=1e-4)
    # Folding twice changes nothing.
    torch.testing.assert_close(folded.fuse()(x), model(x), rtol=0., atol=1e-4)


def test_folding_finds_the_features_wrapper():
    model = randomised(timm.create_model('fcaformer_small64', features_only=True))
    x = images(1, 3, 64, 64)
    folded = reparameterize_model(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        for got, expected in zip(folded(x), model(x)):
            torch.testing.assert_close(got, expected, rtol=0., atol=1e-4)


# Attention

@torch.no_grad()
def test_bias_is_the_table_of_absolute_offsets():
    attn = FcaAttention(8, 2, (3, 4), num_cross=2)
    attn.rel_bias.copy_(torch.arange(24.).view(2, 12))
    attn.cross_bias.copy_(torch.tensor([[-1., -2.], [-3., -4.]]).view(1, 2, 1, 2))
    bias = attn.build_bias()
    assert bias.shape == (1, 2, 12, 14)
    for head in range(2):
        for a in range(12):
            for b in range(12):
                offset = abs(a // 4 - b // 4) * 4 + abs(a % 4 - b % 4)
                assert bias[0, head, a, b] == attn.rel_bias[head, offset]
        assert (bias[0, head, :, 12:] == attn.cross_bias[0, head]).all()


@pytest.mark.parametrize('guard', [torch.no_grad, torch.inference_mode])
def test_cached_bias_follows_the_weights(small, guard):
    """Inference keeps the bias; every way of changing the tables must be seen."""
    model = reparameterize_model(small)  # a copy
    x = images(1, 3, 64, 64)
    with guard():
        before = model(x)
        attn = model.stages[2].blocks[1].attn
        kept = attn._bias_cache[1]
        model(x)
        assert attn._bias_cache[1] is kept
    attn.rel_bias.data.add_(images(*attn.rel_bias.shape))
    with guard():
        assert (model(x) - before).abs().max() > 1e-3
    model.load_state_dict(reparameterize_model(small).state_dict())
    with guard():
        torch.testing.assert_close(model(x), before)
    attn.cross_bias = nn.Parameter(attn.cross_bias + images(*attn.cross_bias.shape))
    with guard():
        assert (model(x) - before).abs().max() > 1e-3
        assert model.double()(x.double()).dtype == torch.float64
    # ... and what was kept does not get into the way of gradients.
    model.float()(x).sum().backward()
    assert attn.rel_bias.grad.abs().max() > 0 and attn.cross_bias.grad.abs().max() > 0


@torch.no_grad()
def test_explicit_attention_agrees(small):
    x = images(1, 3, 64, 64)
    expected = small(x)
    for module in small.modules():
        if isinstance(module, FcaAttention):
            module.fused_attn = False
    got = small(x)
    for module in small.modules():
        if isinstance(module, FcaAttention):
            module.fused_attn = True
    torch.testing.assert_close(got, expected, rtol=0., atol=1e-5)


def past_sizes(model, stage=2):
    return [0 if b.cross_scale is None else b.cross_scale.shape[1] for b in model.stages[stage].blocks]


def test_number_of_cross_tokens():
    # 4 tokens a side at stage 3: one cross token a block
    assert past_sizes(timm.create_model('fcaformer_small64')) == [0, 1, 2, 3]
    assert past_sizes(timm.create_model('fcaformer_small64', cab_max_d=2)) == [0, 1, 2, 2]
    assert past_sizes(timm.create_model('fcaformer_small64', cab_max_d=None)) == [0, 1, 2, 3]
    assert past_sizes(timm.create_model('fcaformer_small64', img_size=(160, 96))) == [0, 6, 12, 18]
    ablated = timm.create_model('fcaformer_small64', cross_tokens=False)
    assert past_sizes(ablated) == [0, 0, 0, 0]
    assert all(block.cross_conv is None for block in ablated.stages[2].blocks)
    assert ablated(images(2, 3, 64, 64)).shape == (2, 10)


@torch.no_grad()
def test_cross_tokens_are_of_the_last_blocks():
    """With cab_max_d=1 a block must see the tokens of the block just before it, and not older ones."""
    model = randomised(timm.create_model('fcaformer_small64', cab_max_d=1))
    seen, made = [], []
    for block in model.stages[2].blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(args[1]) or made.append(out[1]))
    model(images(1, 3, 64, 64))
    assert seen[0] is None and made[3] is None
    for i in (1, 2, 3):
        assert torch.equal(seen[i], made[i - 1])


# Sizes and windows

@torch.no_grad()
def test_windows_of_the_size_of_the_map_change_nothing(small):
    """A 64 px map has one window a stage: the dense form is then the classifier itself."""
    windowed = timm.create_model('fcaformer_small64', window_size=(4, 2)).eval()
    windowed.load_state_dict(small.state_dict())
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(windowed(x), small(x), rtol=0., atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('size', [(1, 1), (33, 70), (96, 64), (111, 130)])
def test_windows_take_any_size(size):
    model = randomised(timm.create_model('fcaformer_small64', window_size=(4, 2)))
    features, maps = model.forward_intermediates(images(2, 3, *size))
    for i, feature_map in enumerate(maps):
        reduction = 4 * 2 ** i
        assert feature_map.shape[2:] == (-(-size[0] // reduction), -(-size[1] // reduction))
        assert feature_map.isfinite().all()
    assert model(images(2, 3, *size)).shape == (2, 10)


@torch.no_grad()
def test_padding_alternates_between_blocks():
    """Even blocks see the zeros at the left and top, odd blocks at the right and bottom."""
    model = randomised(timm.create_model('fcaformer_small64', window_size=(4, 2)))
    seen = []
    for block in model.stages[2].blocks:
        block.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(4, 4, 4, -1)))
    model(images(1, 3, 5 * 16, 6 * 16))  # a 5 x 6 map: 2 x 2 windows of 4, 3 rows and 2 columns of padding
    for i, windows in enumerate(seen):
        zero = windows.abs().sum(-1) == 0
        rows, cols = (slice(0, 3), slice(0, 2)) if i % 2 == 0 else (slice(1, 4), slice(2, 4))
        first, second = (0, 1) if i % 2 == 0 else (2, 3)  # the two windows of the padded row
        assert zero[first, rows].all() and zero[second, rows].all()
        padded_column = 0 if i % 2 == 0 else 1
        assert zero[padded_column, :, cols].all()
        assert zero.sum() == 64 - 5 * 6


@torch.no_grad()
def test_windows_do_not_see_each_other():
    """In one block a change in one window must stay in that window."""
    stage = randomised(timm.create_model('fcaformer_small64', window_size=(4, 2), depths=(1, 1, 1, 1))).stages[2]
    x = images(1, 64, 16, 16)  # an 8 x 8 map after the down-sampling: 2 x 2 windows
    other = x.clone()
    other[..., 12:, 12:] += 1.
    change = (stage(x) - stage(other)).abs().amax(1)[0] > 0
    assert change[4:, 4:].any()
    assert not change[:4].any() and not change[:, :4].any()


@torch.no_grad()
def test_set_input_size(small):
    model = reparameterize_model(small)
    model.set_input_size((96, 128))
    assert model.stages[2].blocks[3].attn.rel_bias.shape == (4, 6 * 8)
    assert model.stages[2].blocks[3].cross_scale.shape == (1, 3 * 4, 1)
    assert model(images(1, 3, 96, 128)).shape == (1, 10)
    with pytest.raises(ValueError, match=r'input 64x64 does not match model img_size \(96, 128\)'):
        model(images(1, 3, 64, 64))
    # The way back keeps constant tables what they were.
    model.stages[2].blocks[1].attn.cross_bias.fill_(0.5)
    model.set_input_size(64)
    torch.testing.assert_close(model.stages[2].blocks[1].attn.cross_bias, torch.full((1, 4, 1, 1), 0.5))
    with pytest.raises(ValueError, match='window_size'):
        timm.create_model('fcaformer_small64', window_size=(4, 2)).set_input_size(96)


@torch.no_grad()
def test_checkpoint_of_another_size(small):
    """The filter resizes what set_input_size resizes."""
    bigger = timm.create_model('fcaformer_small64', img_size=96).eval()
    bigger.load_state_dict(checkpoint_filter_fn(small.state_dict(), bigger))
    resized = timm.create_model('fcaformer_small64').eval()
    resized.load_state_dict(small.state_dict())
    resized.set_input_size(96)
    x = images(1, 3, 96, 96)
    torch.testing.assert_close(bigger(x), resized(x), rtol=0., atol=0.)

    oblong = timm.create_model('fcaformer_small64', img_size=(64, 96))
    with pytest.raises(ValueError, match='set_input_size'):
        checkpoint_filter_fn(oblong.state_dict(), small)


@pytest.mark.parametrize('wrap', [
    lambda d: {'model': d, 'epoch': 3},
    lambda d: {'model_ema': d, 'model': {key: 0 * value for key, value in d.items()}},
    lambda d: {'state_dict': {'decode_head.x': d['head.bias'], **{f'backbone.{key}': v for key, v in d.items()}}},
])
def test_official_wrappers(wrap):
    case = load_case('fcaformer', 'fcaformer_l1_224')
    with torch.device('meta'):
        model = timm.create_model('fcaformer_l1')
    official = dict(case.state_dict)
    official['layer_2.blocks.0.attention_bias_idxs'] = torch.zeros(196, 196, dtype=torch.long)
    got = checkpoint_filter_fn(wrap(official), model)
    expected = {key for key in model.state_dict() if not key.endswith('num_batches_tracked')}
    assert set(got) == expected
    assert torch.equal(got['head.fc.bias'], case.state_dict['head.bias'])


# Options

def test_options_take_effect():
    model = timm.create_model(
        'fcaformer_small64', layer_scale_init_value=0.3, mlp_ratio=2., head_init_scale=0., drop_rate=0.1,
        proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.7)
    block = model.stages[2].blocks[1]
    assert (block.gamma1 == 0.3).all() and (block.gamma2 == 0.3).all()
    assert (model.stages[0].blocks[0].gamma == 0.3).all()
    assert block.mlp.fc1.out_features == 256 and model.stages[0].blocks[0].mlp.fc1.out_features == 64
    assert not model.head.fc.weight.any() and model.head.drop.p == 0.1
    assert block.attn.proj_drop.p == 0.2 and block.mlp.drop1.p == 0.2 and block.attn.attn_drop.p == 0.3
    # 8 blocks: 0, 0.1, ... 0.7
    assert block.drop_path1.drop_prob == pytest.approx(0.3)
    assert model.stages[3].blocks[1].drop_path2.drop_prob == pytest.approx(0.7)


def test_published_drop_path():
    for name, rate in (('fcaformer_l1', 0.), ('fcaformer_l2', 0.1), ('fcaformer_l3', 0.2), ('fcaformer_l4', 0.4)):
        with torch.device('meta'):
            last = timm.create_model(name).stages[3].blocks[-1].drop_path2
        assert getattr(last, 'drop_prob', 0.) == pytest.approx(rate)


@torch.no_grad()
def test_head_without_pooling_is_the_pooled_head_at_each_place(small):
    x = small.forward_features(images(2, 3, 64, 64))
    pooled = small.forward_head(x[:, :, :1, 1:])
    small.head.global_pool, pool = timm.layers.SelectAdaptivePool2d(pool_type='', flatten=False), small.head.global_pool
    dense = small.forward_head(x)
    small.head.global_pool = pool
    assert dense.shape == (2, 10, 2, 2)
    torch.testing.assert_close(dense[:, :, 0, 1], pooled)


def test_gradients_with_checkpointing_are_the_same(small):
    model = reparameterize_model(small)
    x = images(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
@pytest.mark.parametrize('size', [(64, 64), (90, 120)])
def test_scripted_windows(size):
    model = randomised(timm.create_model('fcaformer_small64', window_size=(4, 2)))
    x = images(1, 3, *size)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=0., atol=1e-5)


# Bad input

@pytest.mark.parametrize('options, message', [
    (dict(img_size=100), r'img_size \(100, 100\) must be multiples of 32'),
    (dict(img_size=(64, 72)), r'img_size \(64, 72\) must be multiples of 32'),
    (dict(img_size=0), r'img_size \(0, 0\) must be multiples of 32'),
    (dict(num_heads=(0, 0, 5, 10)), r'embed_dims\[2\] \(192\) must be a multiple of num_heads\[2\] \(5\)'),
    (dict(num_heads=(0, 0, 6, 7)), r'embed_dims\[3\] \(320\) must be a multiple of num_heads\[3\] \(7\)'),
    (dict(num_heads=(2, 4, 6, 10)), r'convolutional stages must be 0, got \(2, 4, 6, 10\)'),
    (dict(embed_dims=(65, 128, 192, 320)), r'embed_dims\[0\] even, got \(65, 128, 192, 320\)'),
    (dict(depths=(2, 2, 6)), r'depths must have 4 entries, one a stage, got \(2, 2, 6\)'),
    (dict(depths=(2, 2, 6, 0)), r'depths must be at least 1'),
    (dict(out_dims=(96, 192)), r'out_dims must have 4 entries'),
    (dict(cab_max_d=0), r'cab_max_d must be at least 1 or None \(no limit\), got 0'),
    (dict(window_size=(14, 0)), r'window_size must be two positive sizes'),
    (dict(window_size=(14, 7, 7)), r'window_size must be two positive sizes'),
    (dict(global_pool='max'), r"global_pool must be 'avg' or '', got 'max'"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FcaFormer(**options)


@pytest.mark.parametrize('shape, message', [
    ((1, 3, 63, 64), r'input 63x64 does not match model img_size \(64, 64\)'),  # would round to the same map
    ((1, 3, 128, 128), r'input 128x128 does not match model img_size \(64, 64\)'),
    ((1, 1, 64, 64), r'expected 3 input channels, got 1'),
    ((3, 64, 64), r'expected a batch of images \(B, 3, H, W\), got 3 dimensions'),
])
def test_bad_input(small, shape, message):
    with pytest.raises(ValueError, match=message):
        small(images(*shape))
    with pytest.raises(ValueError, match=message):
        small.forward_intermediates(images(*shape))


def test_only_weights_trained_here_are_claimed():
    claimed = {f'{name}.{tag}' for name, default in fcaformer.default_cfgs.items()
               for tag, cfg in default.cfgs.items() if cfg.has_weights}
    assert claimed == {row.name for row in catalog.weights() if row.name.startswith('fcaformer')}
    with pytest.raises(RuntimeError):
        timm.create_model('fcaformer_l2', pretrained=True)


GRADIENT_OF_SMALL_MAPS = '''
import torch
from torch.nn.functional import conv2d
from vishub.models.fcaformer import CrossConv

torch.set_num_threads(1)
conv = CrossConv(192)
for height in (1, 2, 3, 4, 9):
    for width in (1, 2, 3, 4, 9):
        x = torch.randn(2, 192, height, width).contiguous(memory_format=torch.channels_last)
        whole = conv2d(x, conv.weight, stride=4, padding=3, groups=192)
        torch.testing.assert_close(conv(x), whole)
        gradient = torch.randn_like(whole)
        expected, = torch.autograd.grad(whole, conv.weight, gradient)
        with torch.autocast('cpu', torch.bfloat16):
            found, = torch.autograd.grad(conv(x), conv.weight, gradient.bfloat16())
        assert (found - expected).abs().max() < 0.05 * expected.abs().max(), (height, width)
'''


def test_cross_tokens_of_small_maps_in_bfloat16():
    # The C library fills new memory with 0x7f, so that a kernel that reads what nobody wrote gives itself away.
    env = dict(os.environ, MALLOC_PERTURB_='128')
    run = subprocess.run([sys.executable, '-c', GRADIENT_OF_SMALL_MAPS], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
