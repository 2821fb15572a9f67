"""FaViT: the official outputs, and what is special to this family (what all families share: `test_registry.py`)."""
import pytest
import timm
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape

import vishub  # noqa: F401
from tests.models.official_weights import load_case
from vishub.models.favit import (
    Block,
    FactorizationVisionTransformer,
    FactorizedAttention,
    LocalAttention,
    attend,
    checkpoint_filter_fn,
    default_cfgs,
    depthwise_conv3x3,
    dilations_of,
    window_index,
)

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def golden():
    return load_case('favit', 'favit_b0_224')


@torch.inference_mode()
def test_golden_model(golden):
    model = timm.create_model('favit_b0').eval()
    model.load_state_dict(checkpoint_filter_fn(golden.state_dict, model))
    assert sum(p.numel() for p in model.parameters()) == golden.parameters
    golden.check('logits', model(**golden.inputs), atol=5e-6)
    features, maps = model.forward_intermediates(golden.inputs['x'])
    golden.check('pooled', model.forward_head(features, pre_logits=True), atol=5e-6)
    for i, stage_map in enumerate(maps):
        golden.check(f'stage{i + 1}', stage_map, atol=1e-5)


@pytest.mark.parametrize('name', ['favit_attention_c64_h2_sr4_28x28', 'favit_attention_c256_h8_sr1_7x7'])
@torch.inference_mode()
def test_golden_attention(name):
    case = load_case('favit', name)
    dim, num_heads, sr_ratio = (case.meta['arguments'][key] for key in ('dim', 'num_heads', 'sr_ratio'))
    prefix = 'stages.0.blocks.0.attn.'
    official = {f'block1.0.attn.{key}': value for key, value in case.state_dict.items()}
    official['patch_embed1.proj.weight'] = torch.zeros(1)  # what tells a whole official checkpoint
    converted = checkpoint_filter_fn(official, None)
    attention = FactorizedAttention(dim, num_heads, sr_ratio).eval()
    attention.load_state_dict({key[len(prefix):]: v for key, v in converted.items() if key.startswith(prefix)})
    height, width = case.inputs['H'], case.inputs['W']
    indices = [window_index(height, width, 7, dilation, CPU) for dilation in dilations_of(sr_ratio)]
    case.check('out', attention(case.inputs['x'], height, width, indices), atol=1e-5)


@pytest.mark.parametrize('name, parameters, without_head', [
    ('favit_b0', 3_427_704, 3_170_704),
    ('favit_b1', 12_958_568, 12_445_568),
    ('favit_b2', 24_919_896, 24_406_896),
    ('favit_b3', 48_746_440, 47_977_440),
    ('favit_small64', 1_569_318, 1_566_748),
])
def test_parameters(name, parameters, without_head):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    model.reset_classifier(0)
    assert sum(p.numel() for p in model.parameters()) == without_head


# the larger two are only deeper and wider, and take fvcore long
@pytest.mark.parametrize('name, side, macs', [
    ('favit_b0', 224, 0.639e9), ('favit_b1', 224, 2.358e9), ('favit_small64', 64, 20.6e6)])
def test_multiply_accumulates(name, side, macs):
    model = timm.create_model(name).eval()

    def attention_macs(inputs, outputs):
        (batch_size, heads, queries, dim), keys = get_shape(inputs[0]), get_shape(inputs[1])[2]
        return 2 * batch_size * heads * queries * keys * dim

    counter = FlopCountAnalysis(model, torch.zeros(1, 3, side, side))
    counter.set_op_handle('aten::scaled_dot_product_attention', attention_macs)
    counter.unsupported_ops_warnings(False)
    # The official code projects all tokens for the dilated windows, ours only those that the windows sample.
    saved = 0
    map_side = side // 4
    for stage, dilation in zip(model.stages[:3], (8, 4, 2)):
        samples = window_index(map_side, map_side, model.window_size, dilation, CPU).numel()
        attention = stage.blocks[0].attn
        saved += len(stage.blocks) * (map_side ** 2 - samples) * attention.local_dim * attention.group_dim
        map_side //= 2
    # The figures have three digits; fvcore also counts the official adaptive pooling, which is a plain mean here.
    assert counter.total() + saved == pytest.approx(macs, rel=1e-3)


def test_pooling_worked_example():
    # four windows of two channels, numbered in the order of the official flattened vector: window slow, channel fast
    windows = torch.arange(8.).view(1, 1, 1, 4, 2)
    official = LocalAttention(2, 1, 1, pool_mode='official')
    assert official.pool(windows).flatten().tolist() == [(0 + 1 + 2 + 3) / 4, (4 + 5 + 6 + 7) / 4]
    own = LocalAttention(2, 1, 1, pool_mode='window')
    assert own.pool(windows).flatten().tolist() == [(0 + 2 + 4 + 6) / 4, (1 + 3 + 5 + 7) / 4]
    # one window: nothing to fuse
    single = torch.randn(2, 9, 3, 1, 5)
    assert torch.equal(official.pool(single), single[:, :, :, 0])
    assert torch.equal(own.pool(single), single[:, :, :, 0])


def test_window_index_mirrors_the_border():
    index = window_index(14, 14, 7, 2, CPU)  # 2 x 2 windows
    rows = index.view(7, 7, 2, 2)[:, 0, :, 0] // 14
    assert rows[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert rows[:, 1].tolist() == [13, 11, 9, 7, 5, 3, 1]
    index = window_index(56, 56, 7, 8, CPU)
    columns = index.view(7, 7, 2, 2)[0, :, 0, :] % 56
    assert columns[:, 1].tolist() == [49, 53, 45, 37, 29, 21, 13]


@pytest.mark.parametrize('height, width, window_size, dilation', [
    (56, 56, 7, 8), (25, 40, 7, 8), (28, 31, 7, 4), (7, 9, 7, 1), (16, 9, 3, 8), (2, 5, 3, 1), (8, 8, 2, 3)])
def test_window_index_is_padding_and_unfolding(height, width, window_size, dilation):
    side = (window_size - 1) * dilation + 1
    tokens = torch.arange(float(height * width)).view(1, 1, height, width)
    padded = F.pad(tokens, (0, -width % side, 0, -height % side), mode='reflect')
    expected = F.unfold(padded, window_size, dilation=dilation, stride=side)[0]
    assert torch.equal(window_index(height, width, window_size, dilation, CPU), expected.long())


@pytest.mark.parametrize('name, smallest', [('favit_b0', 97), ('favit_b2.cifar10', 33), ('favit_small64', 33)])
def test_smallest_image(name, smallest):
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    assert model.pretrained_cfg['min_input_size'][1:] == (smallest, smallest)
    assert model(torch.empty(1, 3, smallest, smallest, device='meta')).shape == (1, model.num_classes)
    size = model.window_size
    with pytest.raises(ValueError) as error:
        model(torch.empty(1, 3, 200, smallest - 1, device='meta'))
    assert str(error.value) == (
        f'FaViT needs inputs of at least {smallest}x{smallest} (got 200x{smallest - 1}): reflect padding to '
        f'{size}x{size} dilated windows is impossible below that')


@pytest.mark.parametrize('shape', [(3, 224, 224), (1, 1, 224, 224), (1, 224, 224, 3), (1, 3, 4, 224, 224)])
def test_refuses_other_shapes(shape):
    with torch.device('meta'):
        model = timm.create_model('favit_b0')
    with pytest.raises(ValueError, match=r'expects an input of shape \(B, 3, H, W\), got \[') as error:
        model(torch.empty(shape, device='meta'))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize('kwargs, message', [
    (dict(embed_dims=(32, 64, 120, 256)), 'stage 3: embed_dim 120 must be divisible by 16'),
    (dict(embed_dims=(32, 64, 128, 252)), 'stage 4: embed_dim 252 must be divisible by 8'),
    (dict(num_heads=(3, 2, 4, 8)), 'stage 1: embed_dim 64 gives local groups of 28 channels, which num_heads 3'),
    (dict(depths=(1, 1)), 'depths has 2 entries, but there are 4 embed_dims'),
    (dict(pool_mode='mean'), "pool_mode must be 'official' or 'window', not 'mean'"),
    (dict(global_pool='max'), "global_pool must be 'avg' or '', not 'max'"),
    (dict(window_size=0), 'window_size must be at least 1, not 0'),
])
def test_refuses_sizes_that_do_not_fit(kwargs, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message.replace('(', r'\(')):
        FactorizationVisionTransformer(**kwargs)


def test_refuses_other_formats_of_intermediates():
    model = timm.create_model('favit_small64')
    with pytest.raises(ValueError, match="'NCHW', not 'NLC'"):
        model.forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt='NLC')


@pytest.mark.parametrize('name', ['favit_b0', 'favit_b1', 'favit_b2', 'favit_b3'])
def test_no_weights_of_the_architecture_itself(name):
    cfg = default_cfgs[name].cfgs['']
    assert not cfg.has_weights


def test_pretrained_without_weights_is_refused():
    with pytest.raises(RuntimeError):
        timm.create_model('favit_b0', pretrained=True)


def signature(value):
    return value.numel(), value.flatten()[:8].tolist()


@pytest.mark.parametrize('wrap', [
    lambda official: official,
    lambda official: {'model': official, 'epoch': 299},
    lambda official: {'state_dict': {f'module.{key}': value for key, value in official.items()}},
    lambda official: {'model': {f'module.backbone.{key}': value for key, value in official.items()}},
])
def test_checkpoint_filter_converts_every_entry(golden, wrap):
    model = timm.create_model('favit_b0')
    converted = checkpoint_filter_fn(wrap(golden.state_dict), model)
    assert len(converted) == len(golden.state_dict)
    model.load_state_dict(converted)
    ours = model.state_dict()
    # every official tensor is in exactly one place
    assert sorted(map(signature, ours.values())) == sorted(map(signature, golden.state_dict.values()))


def test_checkpoint_filter_drops_the_rest_of_a_detector(golden):
    trunk = {f'backbone.{key}': value for key, value in golden.state_dict.items() if not key.startswith('head.')}
    detector = {'state_dict': {**trunk, 'neck.lateral_convs.0.conv.weight': torch.zeros(1)}}
    model = timm.create_model('favit_b0', num_classes=0)
    model.load_state_dict(checkpoint_filter_fn(detector, model))


def test_checkpoint_filter_leaves_our_own_alone():
    model = timm.create_model('favit_small64')
    own = model.state_dict()
    converted = checkpoint_filter_fn(own, model)
    assert list(converted) == list(own)
    assert all(converted[key] is own[key] for key in own)
    prefixed = checkpoint_filter_fn({'state_dict': {f'module.{key}': value for key, value in own.items()}}, model)
    assert list(prefixed) == list(own)


def test_window_pooling_is_another_function_of_the_same_weights(golden):
    model = timm.create_model('favit_b0', pool_mode='window').eval()
    model.load_state_dict(checkpoint_filter_fn(golden.state_dict, model))
    with torch.inference_mode():
        logits = model(**golden.inputs)
    assert (logits - torch.from_numpy(golden.arrays['logits']).view(1, -1)).abs().max() > 1
    # a map of one window has nothing to pool, so there the two agree
    tokens = torch.randn(1, 9, 64)
    indices = [window_index(3, 3, 3, dilation, CPU) for dilation in (1, 1)]
    a = FactorizedAttention(64, 2, 2, window_size=3, pool_mode='official').eval()
    b = FactorizedAttention(64, 2, 2, window_size=3, pool_mode='window').eval()
    b.load_state_dict(a.state_dict())
    with torch.inference_mode():
        assert torch.equal(a(tokens, 3, 3, indices), b(tokens, 3, 3, indices))


def test_explicit_attention_of_bfloat16_training_is_the_fused_one():
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (20, 9, 9))
    fused = F.scaled_dot_product_attention(q, k, v)
    expected = torch.autograd.grad(fused.square().sum(), (q, k, v))
    explicit = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.)
    assert 'ScaledDotProduct' not in type(explicit.grad_fn).__name__  # this is the path that is meant
    torch.testing.assert_close(explicit.float(), fused, rtol=2e-2, atol=2e-2)
    got = torch.autograd.grad(explicit.square().sum(), (q, k, v))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 * b.abs().max().item())


@pytest.mark.parametrize('height, width', [(2, 2), (5, 2), (4, 3)])
def test_depthwise_convolution_is_the_same_in_training(height, width):
    conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)
    x = torch.randn(2, 6, height, width)
    for training in (False, True):
        torch.testing.assert_close(depthwise_conv3x3(x, conv.weight, conv.bias, training), conv(x))


def test_tags_have_their_own_sizes_and_labels():
    with torch.device('meta'):
        cifar = timm.create_model('favit_b2.cifar10')
        plain = timm.create_model('favit_b2')
        fashion = timm.create_model('favit_small64.fashion_mnist')
    assert (cifar.window_size, cifar.num_classes, plain.window_size, plain.num_classes) == (3, 10, 7, 1000)
    assert cifar.pretrained_cfg['label_names'][0] == 'airplane' and len(cifar.pretrained_cfg['label_names']) == 10
    assert fashion.patch_embed.proj.weight.shape[1] == 1
    assert len(fashion.pretrained_cfg['mean']) == 1 and len(fashion.pretrained_cfg['label_names']) == 10


def test_drop_path_grows_linearly():
    model = timm.create_model('favit_small64', drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, 'drop_prob', 0.) for block in model.modules() if isinstance(block, Block)]
    assert rates == pytest.approx([0., 0.1, 0.2, 0.3, 0.4])


def test_initial_weights():
    torch.manual_seed(0)
    model = timm.create_model('favit_b0')
    block = model.stages[3].blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    # a 1x1 convolution by origin, so its deviation follows from its channels
    channels = block.attn.local_dim
    assert block.attn.local_kv.pw.weight.std().item() == pytest.approx((2 / channels) ** 0.5, rel=0.02)
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith('bias'))


def test_unpooled_logits_average_to_the_pooled_ones():
    model = timm.create_model('favit_small64').eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        pooled = model(image)
        model.global_pool = ''
        dense = model(image)
    assert dense.shape == (1, 10, 2, 3)
    torch.testing.assert_close(dense.mean((2, 3)), pooled)
