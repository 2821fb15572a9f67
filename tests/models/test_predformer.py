"""PredFormer against its official outputs, and what is particular to a model of clips."""
import math

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import load_checkpoint
from torch import nn

from tests.models.official_weights import load_case
from vishub.hub import save_folder
from vishub.models.cost import count_macs
from vishub.models.predformer import ARRANGEMENTS, Attention, PredFormer, checkpoint_filter_fn, position_encoding

# arrangement group -> parameters for mmnist, taxibj, weather, human
PARAMETERS = {
    ('full',): (25_285_952, 8_434_976, 5_272_848, 12_725_696),
    ('fac_st', 'fac_ts'): (25_286_464, 8_435_488, 5_273_360, 12_726_208),
    ('binary_st', 'binary_ts', 'quad_tsst', 'quad_stts'): (25_297_728, 8_438_560, 5_276_432, 12_731_328),
    ('triplet_sts', 'triplet_tst'): (25_297_728, 6_333_216, 3_959_568, 12_731_328),
}
# The paper's multiply-accumulates, in G; fvcore's count has normalisation in it, ours has not: up to half a per cent.
MACS = {
    'full': (21.20, 2.426, 17.77, 155),
    'fac_st': (16.46, 2.194, 8.544, 65.02),
    'quad_stts': (16.48, 2.196, 8.555, 65.07),
    'triplet_sts': (16.55, 1.656, 6.511, 69.35),
    'triplet_tst': (16.41, 1.640, 6.329, 60.79),
}
DATA = ('mmnist', 'taxibj', 'weather', 'human')


def tiny(arrangement='triplet_tst', **kwargs):
    """A tiny model in which every part matters (fresh biases and norms hide theirs)."""
    torch.manual_seed(0)
    model = timm.create_model('predformer_tiny', arrangement=arrangement, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip(model, batch_size=2, seed=0):
    shape = batch_size, model.num_frames, model.in_chans, *model.img_size
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Official outputs

@pytest.mark.parametrize('name, case, kwargs, output', [
    ('fac_st_taxibj', 'fac_st_taxibj_32', {'legacy_token_order': True}, 'output'),
    ('fac_st_taxibj', 'fac_st_taxibj_32', {}, 'output_fixed_order'),
    ('full_taxibj', 'full_taxibj_32_rollout7', {}, 'output'),
    ('triplet_sts_taxibj', 'triplet_sts_taxibj_32', {}, 'output'),
    ('quad_tsst_mmnist', 'quad_tsst_mmnist_64', {}, 'output'),
])
@torch.no_grad()
def test_golden(name, case, kwargs, output):
    case = load_case('predformer', f'predformer_{case}')
    model = timm.create_model(f'predformer_{name}', **kwargs).eval()
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    model.load_state_dict(checkpoint_filter_fn(case.state_dict, model))
    x = case.inputs['x']
    case.check('patch_embed', model.patch_embed(x), atol=1e-5)
    features = model.forward_features(x)
    case.check(output, model.forward_head(features), atol=2e-5)
    if output == 'output':
        case.check('head_input', features.flatten(1, 2), atol=2e-5)
    if 'layer0' in case.outputs:
        first, = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        case.check('layer0', first.flatten(3).transpose(2, 3), atol=2e-5)
    if 'rollout' in case.outputs:
        case.check('rollout', model.predict(x, case.meta['aft_seq_length']), atol=2e-5)


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_parameters(arrangement):
    expected = next(counts for names, counts in PARAMETERS.items() if arrangement in names)
    for data, count in zip(DATA, expected):
        with torch.device('meta'):
            model = timm.create_model(f'predformer_{arrangement}_{data}')
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.layers[0].skip == (data == 'human' and arrangement.startswith('triplet'))


def test_parameters_by_size():
    with torch.device('meta'):
        for n_layers, count in ((2, 8_454_976), (8, 33_719_104)):
            model = timm.create_model('predformer_quad_tsst_mmnist', n_layers=n_layers)
            assert sum(p.numel() for p in model.parameters()) == count
        for arrangement, count in (('triplet_tst', 1_009_088), ('quad_tsst', 1_339_840)):
            model = timm.create_model('predformer_tiny', arrangement=arrangement)
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize('arrangement', MACS)
def test_macs(arrangement):
    for data, macs in zip(DATA, MACS[arrangement]):
        assert count_macs(f'predformer_{arrangement}_{data}') / 1e9 == pytest.approx(macs, rel=6e-3)


def test_position_encoding():
    encoding = position_encoding(640, 256)
    for k, j in ((0, 0), (0, 1), (1, 0), (17, 4), (17, 5), (639, 255), (600, 2)):
        angle = k / 10000 ** (2 * (j // 2) / 256)
        assert encoding[k, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=4e-5)
    model = tiny()
    assert torch.equal(model.pos_embed[2, 3], position_encoding(8 * 16, 128)[2 * 16 + 3])
    assert 'pos_embed' not in model.state_dict()


# What attends to what

@pytest.mark.parametrize('arrangement', ['s', 't', 'j'])
@torch.no_grad()
def test_units_attend_along_their_axis(arrangement):
    model = tiny({'s': 'binary_st', 't': 'binary_ts', 'j': 'full'}[arrangement])
    unit = model.layers[0].units[0]
    x = torch.randn(2, 3, 4, 128)
    changed = x.clone()
    changed[0, 1, 2] += torch.randn(128)
    moved = (unit(changed) - unit(x)).abs().amax(-1) > 1e-6  # B, T, N
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1 if arrangement == 's' else slice(None), 2 if arrangement == 't' else slice(None)] = True
    assert torch.equal(moved, expected)


@torch.no_grad()
def test_units_along_time_pass_their_layout_on():
    """A unit along time leaves patches first in memory, so that the next one's view of them needs no copy."""
    unit = tiny('quad_tsst').layers[0].units[0]
    once = unit(torch.randn(2, 8, 16, 128))
    seen = []
    hook = unit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    unit(once)
    hook.remove()
    assert seen[0].data_ptr() == once.data_ptr() and seen[0].shape == (32, 8, 128)


@torch.no_grad()
def test_patch_order():
    """In, the channel is the fastest; out, it is the slowest."""
    model = PredFormer('full', 1, img_size=(4, 6), num_frames=1, in_chans=3, patch_size=2, embed_dim=12, num_heads=1)
    model.patch_embed.proj.weight.copy_(torch.eye(12))
    model.patch_embed.proj.bias.zero_()
    x = torch.rand(1, 1, 3, 4, 6)
    tokens = model.patch_embed(x)
    assert tokens.shape == (1, 1, 6, 12)
    assert torch.equal(tokens[0, 0, 4], x[0, 0, :, 2:4, 2:4].permute(1, 2, 0).flatten())
    model.norm, model.head.weight = nn.Identity(), nn.Parameter(torch.eye(12))
    model.head.bias.zero_()
    frames = model.forward_head(tokens)
    assert torch.equal(frames[0, 0, :, 2:4, 2:4].flatten(), tokens[0, 0, 4])


@torch.no_grad()
def test_attention_by_its_definition():
    torch.manual_seed(0)
    attn = Attention(12, 2, 5)
    x = torch.randn(3, 7, 12)
    q, k, v = (attn.qkv.weight[i * 10:(i + 1) * 10] for i in range(3))
    heads = []
    for h in (slice(0, 5), slice(5, 10)):
        weights = ((x @ q[h].T) @ (x @ k[h].T).transpose(1, 2) * 5 ** -0.5).softmax(-1)
        heads.append(weights @ (x @ v[h].T))
    torch.testing.assert_close(attn(x), attn.proj(torch.cat(heads, -1)))
    assert isinstance(Attention(12, 1, 12).proj, nn.Identity)
    assert isinstance(Attention(12, 1, 8).proj, nn.Linear) and isinstance(Attention(12, 2, 6).proj, nn.Linear)


def test_bfloat16_training_on_a_cpu_has_the_plain_gradients():
    torch.manual_seed(0)
    attn = Attention(32, 2, 16)
    x = torch.randn(3, 9, 32)
    gradients = []
    for enabled in (False, True):
        attn.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = attn(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        out.float().square().sum().backward()
        gradients.append(attn.qkv.weight.grad.clone())
    plain, half = gradients
    assert (half - plain).norm() < 0.03 * plain.norm()
    model = attn.to(torch.bfloat16)  # without autocast, too
    assert model(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_layer_skip():
    model, skipping = tiny('triplet_sts'), tiny('triplet_sts', layer_skip=True)
    x = torch.randn(1, 8, 16, 128)
    torch.testing.assert_close(skipping.layers[0](x), model.layers[0](x) + x)


@torch.no_grad()
def test_legacy_token_order():
    model, legacy = tiny('fac_st'), tiny('fac_st', legacy_token_order=True)
    x = clip(model)
    tokens, quirk = model.forward_features(x), legacy.forward_features(x)
    for i in (0, 1, 37, 127):
        torch.testing.assert_close(quirk.flatten(1, 2)[:, i], tokens[:, i % 8, i // 8])
    with pytest.raises(ValueError, match='fac_st'):
        tiny('fac_ts', legacy_token_order=True)


def test_drop_path_is_constant():
    model = timm.create_model('predformer_quad_tsst_weather')
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == [0.25] * 8
    block = model.layers[0].units[0].blocks[0]
    assert (block.mlp.drop1.p, block.mlp.drop2.p, block.attn.proj_drop.p) == (0.1, 0.1, 0.1)


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model('predformer_tiny')
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias is None or not module.bias.any()
    assert model.head.bias.any() and model.patch_embed.proj.bias.any()


# Rollout

@torch.no_grad()
def test_rollout():
    model = tiny()
    x = clip(model)
    once = model(x)
    twice = model(once)
    torch.testing.assert_close(model.predict(x, 8), once)
    torch.testing.assert_close(model.predict(x, 3), once[:, :3])
    torch.testing.assert_close(model.predict(x, 13), torch.cat([once, twice[:, :5]], 1))
    assert model.predict(x, 24).shape[1] == 24
    for n_future in (0, -1):
        with pytest.raises(ValueError, match='at least 1'):
            model.predict(x, n_future)


# timm's methods

@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
@torch.no_grad()
def test_intermediates(arrangement):
    model = tiny(arrangement)
    x = clip(model)
    features, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info) == 2  # blocks, units or layers
    assert all(feature_map.shape == (2, 8, 128, 4, 4) for feature_map in maps)
    torch.testing.assert_close(features, model.forward_features(x))
    torch.testing.assert_close(maps[-1].flatten(3).transpose(2, 3), features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    for info in model.feature_info:
        assert (info['num_chs'], info['reduction']) == (128, 8)
        model.get_submodule(info['module'])
    normed, = model.forward_intermediates(x, indices=1, norm=True, output_fmt='NCHW', intermediates_only=True)
    torch.testing.assert_close(
        normed.permute(0, 2, 3, 1).reshape(2, 8, 16, 128), model.forward_head(features, pre_logits=True))

    extractor = timm.create_model('predformer_tiny', arrangement=arrangement, features_only=True, out_indices=[0])
    assert sum(p.numel() for p in extractor.parameters()) < sum(p.numel() for p in model.parameters())
    own = extractor.model.state_dict()
    extractor.model.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    first, = extractor.eval()(x)
    torch.testing.assert_close(first, maps[0].flatten(0, 1))
    assert extractor.feature_info.channels() == [128] and extractor.feature_info.reduction() == [8]
    with pytest.raises(ValueError, match='NHWC'):
        model.forward_intermediates(x, output_fmt='NHWC')


@torch.no_grad()
def test_without_head():
    model = tiny()
    x = clip(model)
    tokens = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens)
    assert tokens.shape == (2, 8, 16, 128)
    assert timm.create_model('predformer_tiny', num_classes=0)(x).shape == tokens.shape
    with pytest.raises(ValueError, match='gives tokens'):
        model.predict(x, 4)
    for attempt in (
            lambda: model.reset_classifier(10), lambda: model.reset_classifier(0, 'avg'),
            lambda: timm.create_model('predformer_tiny', num_classes=10)):
        with pytest.raises(ValueError, match='no classes'):
            attempt()


@torch.no_grad()
def test_set_input_size():
    model = tiny()
    expected = tiny(img_size=(48, 16), num_frames=3)
    model.set_input_size(img_size=(48, 16), num_frames=3)
    assert model.grid_size == (6, 2)
    x = torch.rand(1, 3, 1, 48, 16)
    torch.testing.assert_close(model(x), expected(x))
    assert model(x).shape == x.shape
    model.set_input_size(num_frames=5)
    assert model(torch.rand(1, 5, 1, 48, 16)).shape[1] == 5
    assert timm.create_model('predformer_tiny', num_frames=3).pretrained_cfg['num_frames'] == 3
    half = tiny().to(torch.bfloat16)
    half.set_input_size(num_frames=2)
    assert half.pos_embed.dtype == torch.bfloat16


def test_groups_and_checkpointing():
    model = tiny()
    assert model.no_weight_decay() == set()
    model.set_grad_checkpointing()
    assert all(unit.grad_checkpointing for layer in model.layers for unit in layer.units)


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
@torch.no_grad()
def test_compile_in_one_graph(arrangement):
    model = tiny(arrangement, n_layers=1)
    x = clip(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_export():
    model = tiny('quad_tsst')
    x = clip(model)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = clip(model, batch_size=3, seed=1)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


# Checkpoints

def official_names(model):
    """The model's state dict under official names."""
    _, interleaved, units = ARRANGEMENTS[model.arrangement]
    p = {'patch_embed.proj': 'to_patch_embedding.1', 'norm': 'mlp_head.0', 'head': 'mlp_head.1'}
    official = {f'{new}.{leaf}': model.state_dict()[f'{old}.{leaf}'] for old, new in p.items()
                for leaf in ('weight', 'bias')}
    for i, layer in enumerate(model.layers):
        for name, unit in zip(units, layer.units):
            prefix = f'blocks.{i}.{name}' if interleaved else name
            official.update({f'{prefix}.norm.{k}': v for k, v in unit.norm.state_dict().items()})
            for j, block in enumerate(unit.blocks):
                parts = {
                    '0.norm': block.norm1, '0.fn.to_qkv': block.attn.qkv, '0.fn.to_out.0': block.attn.proj,
                    '1.norm': block.norm2, '1.fn.fc2': block.mlp.fc2}
                for part, module in parts.items():
                    official.update({f'{prefix}.layers.{j}.{part}.{k}': v for k, v in module.state_dict().items()})
                for k, v in block.mlp.fc1.state_dict().items():
                    for half, value in zip(('fc1_g', 'fc1_x'), v.chunk(2)):
                        official[f'{prefix}.layers.{j}.1.fn.{half}.{k}'] = value
    return official


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_official_checkpoints(arrangement):
    model = tiny(arrangement)
    bare = official_names(model)
    wrapped = {'state_dict': {f'module.{k}': v for k, v in bare.items()}, 'epoch': 3}
    for state_dict in (bare, wrapped, model.state_dict()):
        converted = checkpoint_filter_fn(state_dict, model)
        assert converted.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in converted.items())
    other = tiny('full' if arrangement != 'full' else 'binary_st')
    with pytest.raises(ValueError, match=f"arrangement '{other.arrangement}'"):
        checkpoint_filter_fn(bare, other)


def test_other_channels_are_refused():
    source = tiny().state_dict()
    with pytest.raises(ValueError, match='patches of 64 values, the model patches of 192'):
        checkpoint_filter_fn(source, tiny(in_chans=3))


def test_saved_model_refuses_other_channels(tmp_path):
    folder = save_folder(
        tiny(), tmp_path / 'predformer_tiny.test', metrics={}, card={'licence': 'apache-2.0', 'description': 'A test.'})
    with pytest.raises(ValueError, match='must have the same channels'):
        timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=3)


@torch.no_grad()
def test_saved_model_is_the_same(tmp_path):
    model = tiny('quad_tsst', num_frames=5)
    folder = save_folder(
        model, tmp_path / 'predformer_tiny.test', metrics={}, card={'licence': 'apache-2.0', 'description': 'A test.'},
        dtype=torch.float32, model_args=dict(arrangement='quad_tsst', num_frames=5))  # old versions of timm forget them
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = clip(model)
    assert again.pretrained_cfg['num_frames'] == 5 and again.pretrained_cfg['first_conv'] == 'patch_embed.proj'
    torch.testing.assert_close(again(x), model(x))
    features = timm.create_model('predformer_tiny', arrangement='quad_tsst', num_frames=5, num_classes=0).eval()
    load_checkpoint(features, str(folder / 'model.safetensors'), strict=False)
    torch.testing.assert_close(
        features(x), model.forward_head(model.forward_features(x), pre_logits=True))


# Bad input

@pytest.mark.parametrize('kwargs, message', [
    ({'arrangement': 'quad_stst'}, 'there are: full, fac_st, fac_ts, binary_st'),
    ({'img_size': (32, 36)}, 'image width must be divisible by the patch size 8'),
    ({'img_size': 30}, 'image height must be divisible by the patch size 8'),
    ({'embed_dim': 127}, 'embed_dim must be even'),
    ({'num_heads': 0}, 'num_heads must be at least 1'),
    ({'head_dim': 0}, 'head_dim must be at least 1'),
    ({'n_layers': 0}, 'n_layers must be at least 1'),
    ({'depth': 0}, 'depth must be at least 1'),
    ({'num_frames': 0}, 'num_frames must be at least 1'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('predformer_tiny', **kwargs)


@pytest.mark.parametrize('shape, message', [
    ((8, 1, 32, 32), r'expects \(batch, frames, channels, height, width\), got shape \(8, 1, 32, 32\)'),
    ((1, 4, 1, 32, 32), 'expected 8 frames, got 4; use num_frames=4 or set_input_size'),
    ((1, 8, 3, 32, 32), 'expected 1 channels, got 3'),
    ((1, 8, 1, 32, 40), r'height, width \(32, 32\), got \(32, 40\)'),
])
def test_bad_clips(shape, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model(torch.rand(shape))
    with pytest.raises(ValueError, match='floating point video; scale uint8'):
        model(clip(model).byte())
