"""NViT and ReViT: official parity, the published rule, exact counts, conversion and bad input.

What holds for every model (timm's method set, compile, export, autocast) is in test_registry.py.
"""
import pytest
import timm
import torch

import vishub  # noqa: F401  registers the models
from tests.models.official_weights import load_case
from tests.models.test_registry import EXPORTS
from vishub.models.nvit import NViT, checkpoint_filter_fn, official_dims, revit_dims, uniform_dims

# embedding, official parameter count, how many of these are token scales
REVIT = {
    'revit_tiny_distilled_patch16_224': (176, 5_341_512, 2_376),
    'revit_small_distilled_patch16_224': (384, 23_125_656, 2_376),
}

UNEVEN = dict(EMB=48, head=[3, 1, 2], QK=[8, 16, 5], V=[16, 4, 8], MLP=[32, 96, 17])


def small(**kwargs):
    return NViT(**{'img_size': 32, 'patch_size': 8, 'num_classes': 7, 'dims': UNEVEN, **kwargs}).eval()


def official_state_dict(model, prunable=False):
    """The official names and layouts of `model`'s tensors, made independently of the conversion under test."""
    out = {}
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = name.rpartition('.')
        if name == 'patch_embed.proj.weight':  # (row, column, colour) vectors, colour fastest
            out[name] = torch.einsum('echw->ehwc', tensor).reshape(len(tensor), -1, 1, 1)
        elif prefix.endswith('attn.qkv'):
            attn = model.get_submodule(prefix.rpartition('.')[0])
            sizes = [attn.num_heads * size for size in (attn.qk_dim, attn.qk_dim, attn.v_dim)]
            for letter, rows in zip('QKV', tensor.split(sizes)):
                if prunable:  # (channel, [embed,] head)
                    rows = rows.unflatten(0, (attn.num_heads, -1)).movedim(0, -1)
                out[f'{prefix}.{letter}.{leaf}'] = rows
        elif prefix.endswith('attn.proj') and not prunable:
            out[f'{prefix}.proj.{leaf}'] = tensor
        elif name.endswith('attn.proj.weight'):
            heads = model.get_submodule(prefix.rpartition('.')[0]).num_heads
            out[name] = tensor.unflatten(1, (heads, -1)).transpose(1, 2)  # (embed, channel, head)
        elif leaf == 'token_scale':
            out[f'{prefix}.qkv.token_mask'] = tensor
        else:
            out[name] = tensor
    return out


def test_official_outputs():
    case = load_case('nvit', 'revit_tiny_224')
    model = timm.create_model('revit_tiny_distilled_patch16_224').eval()
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    model.load_state_dict(checkpoint_filter_fn({'model': case.state_dict, 'dim': case.meta['dims']}, model))
    images = case.inputs['x']
    with torch.no_grad():
        tokens = model.forward_features(images)
        patches, prefix = model.forward_intermediates(
            images, [5], return_prefix_tokens=True, output_fmt='NLC', intermediates_only=True)[0]
        case.check('logits_mean', model(images))
    case.check('logits_cls', model.head(tokens[:, 0]))
    case.check('logits_dist', model.head_dist(tokens[:, 1]))
    case.check('pre_cls', tokens[:, 0])
    case.check('pre_dist', tokens[:, 1])
    case.check('block5', torch.cat([prefix, patches], dim=1))
    assert model.dims == case.meta['dims']


@pytest.mark.parametrize('name', REVIT)
def test_revit_rule_and_counts(name):
    embed_dim, parameters, scales = REVIT[name]
    with torch.device('meta'):
        model = timm.create_model(name)
        plain = timm.create_model(name, token_scale=False)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in plain.parameters()) == parameters - scales
    assert model.dims == revit_dims(embed_dim)


def test_revit_small_sizes_are_the_published_ones():
    assert revit_dims(384) == dict(
        EMB=384,
        head=[10, 4, 4] + [8] * 6 + [4, 4, 10],
        QK=[32, 16, 16] + [32] * 6 + [16, 16, 32],
        V=[64] * 12,
        MLP=[1152] * 3 + [2304] * 6 + [1152] * 3)


def test_unpruned_size_is_distilled_deit_base():
    with torch.device('meta'):
        model = timm.create_model('nvit_distilled_patch16_224', token_scale=False)
    assert sum(p.numel() for p in model.parameters()) == 87_338_192


@pytest.mark.parametrize('prunable', [False, True])
def test_both_official_layouts_convert(prunable):
    model = small()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.token_scale.uniform_(0.5, 1.5)
    other = small()
    other.load_state_dict(checkpoint_filter_fn(official_state_dict(model, prunable), other))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(images), model(images), rtol=0, atol=1e-6)


def test_head_mask_is_folded_into_the_weights():
    model = small()
    state_dict = official_state_dict(model, prunable=True)
    mask = torch.tensor([0.5, 0., 2.])
    state_dict['blocks.0.attn.qkv.head_mask.weight'] = mask[:, None]
    for index, heads in ((1, 1), (2, 2)):
        state_dict[f'blocks.{index}.attn.qkv.head_mask.weight'] = torch.ones(heads, 1)
    folded = small()
    folded.load_state_dict(checkpoint_filter_fn(state_dict, folded))

    def scale_heads(module, args, output):
        q, k, v = output.split([24, 24, 48], dim=-1)
        return torch.cat([(part.unflatten(-1, (3, -1)) * mask[:, None]).flatten(-2) for part in (q, k, v)], dim=-1)

    images = torch.randn(2, 3, 32, 32)
    got = folded(images)
    model.blocks[0].attn.qkv.register_forward_hook(scale_heads)
    torch.testing.assert_close(got, model(images), rtol=0, atol=1e-6)


def test_a_timm_deit_loads_and_agrees():
    deit = timm.create_model(
        'deit_tiny_distilled_patch16_224', img_size=32, patch_size=8, depth=2, num_classes=5).eval()
    model = small(num_classes=5, dims=uniform_dims(192, 2, 3, 64, 768))
    model.load_state_dict(checkpoint_filter_fn(deit.state_dict(), model))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), deit(images), rtol=0, atol=1e-5)


def test_fused_and_plain_attention_agree():
    model, images = small(), torch.randn(2, 3, 32, 32)
    fused = model(images)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images), fused, rtol=0, atol=1e-6)


# test_registry.py exports the plain `nvit`; this one has both heads and token scales.
@pytest.mark.parametrize('way', EXPORTS)
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_export_with_two_heads_and_token_scale(way):
    model, images = small(), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.token_scale.uniform_(0.5, 1.5)
    model.pretrained_cfg = dict(classifier=('head', 'head_dist'))
    expected = model.head(model.pool(model.forward_features(images))[0]) if way == 'fx' else model(images)
    torch.testing.assert_close(EXPORTS[way](model, images), expected, rtol=1e-4, atol=1e-5)


def test_softmax_scale_is_not_that_of_the_query_size():
    model = small()
    assert {block.attn.scale for block in model.blocks} == {64 ** -0.5}


def test_distilled_training_gives_both_heads_in_train_mode_only():
    model, images = small(), torch.randn(2, 3, 32, 32)
    model.set_distilled_training(True)
    mean = model(images)
    assert mean.shape == (2, 7)
    pair = model.train()(images)
    torch.testing.assert_close((pair[0] + pair[1]) / 2, mean)


def test_dynamic_size_resamples_position_and_token_scale():
    images = torch.randn(1, 3, 40, 24)
    model = small(dynamic_img_size=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.token_scale.uniform_(0.5, 1.5)
    dynamic = model(images)
    fixed = small()
    fixed.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        fixed(images)
    fixed.set_input_size((40, 24))
    torch.testing.assert_close(fixed(images), dynamic, rtol=0, atol=1e-6)
    # a checkpoint of one size also loads into a model of another
    larger = small(img_size=(40, 24))
    larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
    torch.testing.assert_close(larger(images), dynamic, rtol=0, atol=1e-6)


def test_grey_input_and_other_prefix_tokens():
    model = small(in_chans=1, distilled=False, reg_tokens=3, no_embed_class=True, global_pool='avg', init_values=0.1)
    assert model.num_prefix_tokens == 4
    features, intermediates = model.forward_intermediates(torch.randn(2, 1, 32, 32))
    assert features.shape == (2, 20, 48)
    assert [tuple(y.shape) for y in intermediates] == [(2, 48, 4, 4)] * 3
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(('dims', 'message'), [
    (dict(UNEVEN, QK=[8, 16]), 'one entry per block'),
    (dict(UNEVEN, MLP=[32, 0, 17]), 'block 1 has size 0 in MLP'),
    (dict(UNEVEN, EMB=0), 'EMB is 0'),
    ({'EMB': 48}, 'head, QK, V, MLP missing'),
    (None, 'pass dims='),
])
def test_bad_dims_say_what_is_wrong(dims, message):
    with pytest.raises(ValueError, match=message):
        small(dims=dims)


def test_bad_checkpoints_say_what_is_wrong():
    with pytest.raises(ValueError, match="no 'dim' entry; pass dims="):
        official_dims({'model': {}})
    with pytest.raises(ValueError, match=r'blocks\.0\.attn\.qkv\.weight is \(96, 48\) there and \(72, 48\)'):
        checkpoint_filter_fn(small().state_dict(), small(dims=dict(UNEVEN, V=[8, 4, 8])))
    scaled = small()
    torch.nn.init.constant_(scaled.blocks[1].attn.token_scale, 2.)
    with pytest.raises(ValueError, match='token_scale=True'):
        checkpoint_filter_fn(scaled.state_dict(), small(token_scale=False))


@pytest.mark.parametrize('embed_dim', [64, 100])
def test_revit_rule_refuses_small_embeddings(embed_dim):
    with pytest.raises(ValueError, match='above 100'):
        revit_dims(embed_dim)
