"""DiT against its official outputs, and what is particular to denoisers."""
import functools

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.models.official_weights import load_case
from vishub.models import dit
from vishub.models.cost import count_macs, count_parameters
from vishub.models.dit import (
    DiffusionTransformer,
    checkpoint_filter_fn,
    drop_labels,
    position_table,
    timestep_frequencies,
)

# without the position table, which official counts include
PARAMETERS = {
    'dit_s_2': 32_865_056,
    'dit_s_2_512': 32_865_056,
    'dit_b_2': 130_315_808,
    'dit_l_2': 457_840_672,
    'dit_xl_2': 674_834_720,
}
TABLES = {'dit_s_2': 98_304, 'dit_s_2_512': 393_216, 'dit_b_2': 196_608, 'dit_l_2': 262_144, 'dit_xl_2': 294_912}
GIGA_MACS = {'dit_s_2': 6.06, 'dit_s_2_512': 31.44, 'dit_xl_2': 118.62, 'dit_xl_2_512': 524.54}


def randomised(model, seed=0):
    """Weights with which every part matters: a fresh model's output is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def tiny(model_cls=DiffusionTransformer, **kwargs):
    sizes = dict(img_size=8, in_chans=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return randomised(model_cls(**dict(sizes, **kwargs)))


def inputs(batch_size=2, size=(8, 8), in_chans=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, in_chans, *size, generator=generator)
    return x, torch.arange(batch_size) * 100, torch.arange(batch_size) % 5


# ---- official outputs -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_golden_model():
    case = load_case('lit', 'dit_s_2_256')
    model = timm.create_model('dit_s_2').eval()
    case.check('pos_embed_init', model.pos_embed, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == case.parameters
    model.load_state_dict(checkpoint_filter_fn({'ema': case.state_dict, 'model': {}, 'args': None}, model))
    t, y = torch.tensor(case.inputs['t']), torch.tensor(case.inputs['y'])
    case.check('t_freq', timestep_frequencies(t), atol=1e-4)  # a frequency's last bit moves the angle by some 1e-5
    case.check('c', model.condition(t, y, 2), atol=1e-5)
    case.check('out', model(case.inputs['x'], t, y), atol=3e-5)

    guided = case.inputs['cfg']
    noise = np.random.Generator(np.random.PCG64(guided['x_half']['seed']))
    x = torch.from_numpy(noise.standard_normal(guided['x_half']['shape'], dtype=np.float32))
    output = model.forward_with_cfg(
        torch.cat([x, x]), torch.tensor(guided['t']), torch.tensor(guided['y']), guided['cfg_scale'])
    case.check('out_cfg', output, atol=1e-4)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    assert count_parameters(name) == PARAMETERS[name]
    with torch.device('meta'):
        assert timm.create_model(name).pos_embed.numel() == TABLES[name]


@pytest.mark.parametrize('name', GIGA_MACS)
def test_macs(name):
    assert count_macs(name) / 1e9 == pytest.approx(GIGA_MACS[name], abs=0.006)


def test_position_table():
    table = position_table(2, 3, 8)
    assert table.shape == (1, 6, 8) and table.dtype == torch.float32
    places = [(row, col) for row in range(2) for col in range(3)]
    for token, (row, col) in zip(table[0], places):
        angles = [torch.tensor([place, place * 0.01]) for place in (float(col), float(row))]
        expected = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
        torch.testing.assert_close(token, expected)
    # a larger grid goes on counting
    torch.testing.assert_close(position_table(4, 4, 8).view(4, 4, 8)[:2, :3].reshape(1, 6, 8), table)


def test_filter_leaves_ours_alone_and_keeps_the_table_of_another_grid():
    model, larger = tiny(), tiny(img_size=16)
    state_dict = model.state_dict()
    assert checkpoint_filter_fn(state_dict, model) == state_dict
    filtered = checkpoint_filter_fn({f'module.{name}': value for name, value in state_dict.items()}, larger)
    larger.load_state_dict(filtered)
    torch.testing.assert_close(larger.pos_embed, position_table(8, 8, 32))


# ---- forward ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_fresh_model_gives_zero():
    assert not timm.create_model('dit_small28').eval()(torch.randn(1, 1, 28, 28), 3, torch.tensor([1])).any()


@torch.no_grad()
def test_non_square_and_dynamic_sizes():
    x, t, y = inputs(size=(12, 4))
    built_so = tiny(img_size=(12, 4))
    dynamic = tiny(dynamic_img_size=True)
    expected = built_so(x, t, y)
    assert expected.shape == (2, 8, 12, 4)
    with torch.inference_mode():
        dynamic(x, t, y)  # fills the cache; what it made must still be trainable through
    with torch.enable_grad():
        output = dynamic(x, t, y)
        output.square().mean().backward()
    torch.testing.assert_close(output, expected)
    hits = dit.cached_position_table.cache_info().hits
    dynamic(x, t, y)
    assert dit.cached_position_table.cache_info().hits == hits + 1
    # a transposed picture is another picture: rows and columns have places of their own
    assert not torch.allclose(dynamic(x.transpose(2, 3), t, y), expected.transpose(2, 3), atol=1e-3)


@torch.no_grad()
def test_parts_are_the_whole():
    model = tiny(depth=3)
    x, t, y = inputs()
    expected = model(x, t, y)
    tokens = model.forward_features(x, t, y)
    torch.testing.assert_close(model.forward_head(tokens, model.condition(t, y, 2)), expected)
    last, maps = model.forward_intermediates(x, t, y)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 3
    torch.testing.assert_close(last, tokens)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens)
    first, = model.forward_intermediates(
        x, t, y, indices=[0], stop_early=True, output_fmt='NLC', intermediates_only=True)
    torch.testing.assert_close(first, maps[0].flatten(2).transpose(1, 2))
    normed, = model.forward_intermediates(x, t, y, indices=1, norm=True, output_fmt='NLC', intermediates_only=True)
    torch.testing.assert_close(normed, nn.functional.layer_norm(tokens, (32,), eps=1e-6))


@torch.no_grad()
def test_one_timestep_for_all():
    model = tiny()
    x, _, y = inputs()
    expected = model(x, torch.tensor([70, 70]), y)
    for t in (70, 70., torch.tensor(70)):
        torch.testing.assert_close(model(x, t, y), expected)


@torch.no_grad()
def test_variance_channels_and_models_without_labels():
    x, t, y = inputs()
    assert tiny(learn_sigma=False)(x, t, y).shape == (2, 4, 8, 8)
    model = tiny(num_classes=0)
    assert model.get_classifier() is None
    assert model(x, t).shape == (2, 8, 8, 8)
    with pytest.raises(ValueError, match='no classes'):
        model(x, t, y)


@torch.no_grad()
def test_guidance():
    model = tiny()
    x, t, y = inputs()
    doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full((2,), 5)])
    plain = model(*doubled)
    conditional, unconditional = plain.chunk(2)
    for given, guided in ((None, 3), (1, 1), (4, 4)):
        output = model.forward_with_cfg(*doubled, 2.5, guide_channels=given)
        expected = 2.5 * conditional[:, :guided] - 1.5 * unconditional[:, :guided]
        for half in output.chunk(2):
            torch.testing.assert_close(half[:, :guided], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output[:, guided:], plain[:, guided:])
    # one channel: the variances are left alone
    grey = tiny(in_chans=1)
    output = grey.forward_with_cfg(doubled[0][:, :1], *doubled[1:], 2.5)
    torch.testing.assert_close(output[:, 1:], grey(doubled[0][:, :1], *doubled[1:])[:, 1:])


# ---- labels -----------------------------------------------------------------------------------------------------


def test_labels_are_dropped_in_training_only():
    torch.manual_seed(0)
    y = torch.zeros(10_000, dtype=torch.int64)
    share = (drop_labels(y, 5, 0.1) == 5).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.02)
    model = tiny(class_drop_rate=1.)
    x, t, y = inputs()
    with torch.no_grad():
        null = model(x, t, torch.full((2,), 5))
        assert not torch.allclose(model(x, t, y), null)
        torch.testing.assert_close(model.train()(x, t, y), null)


def test_reset_classifier():
    model = tiny()
    assert model.get_classifier().embedding_table.num_embeddings == 6
    x, t, y = inputs()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.label_embed.embedding_table.weight.shape == (8, 32)
    assert not model.label_embed.training
    assert model(x, t, y + 3).shape == (2, 8, 8, 8)
    model.reset_classifier(0)
    assert model.no_weight_decay() == set()
    assert model(x, t).shape == (2, 8, 8, 8)
    assert tiny(class_drop_rate=0.).label_embed.embedding_table.num_embeddings == 5


# ---- compile ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_compile_without_graph_breaks():
    for size in ((8, 8), (12, 4)):
        model, (x, t, y) = tiny(depth=1, dynamic_img_size=True), inputs(size=size)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-5)


# ---- bad input --------------------------------------------------------------------------------------------------


def shape(*sizes):
    return lambda x, t, y: (torch.zeros(sizes), t, y)


@pytest.mark.parametrize('change, message', [
    (shape(4, 8, 8), r'expected \(B, 4, H, W\) latents, got \[4, 8, 8\]'),
    (shape(2, 3, 8, 8), r'expected \(B, 4, H, W\) latents, got \[2, 3, 8, 8\]'),
    (shape(2, 4, 8, 9), 'divisible by the patch size 2, got 8x9'),
    (shape(2, 4, 8, 10), 'built for 8x8, got 8x10.*dynamic_img_size'),
    (lambda x, t, y: (x,), 'timesteps t and labels y'),
    (lambda x, t, y: (x, t), 'timesteps t and labels y'),
    (lambda x, t, y: (x, t[:1], y), r't must be one timestep or \(2,\), got \[1\]'),
    (lambda x, t, y: (x, t, y[None]), r'y must have the shape \(2,\), got \[1, 2\]'),
    (lambda x, t, y: (x, t, y.float()), 'whole numbers'),
    (lambda x, t, y: (x, t, y + 5), r'0\.\.5, got 6'),
    (lambda x, t, y: (x, t, y - 1), r'0\.\.5, got -1'),
])
def test_bad_input(change, message):
    model = tiny()
    for forward in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            forward(*change(*inputs()))


def test_bad_guidance():
    model = tiny()
    with pytest.raises(ValueError, match='doubled batch'):
        model.forward_with_cfg(*inputs(3), 2.)
    for channels in (0, 5):
        with pytest.raises(ValueError, match=r'1\.\.4'):
            model.forward_with_cfg(*inputs(), 2., guide_channels=channels)


@pytest.mark.parametrize('arguments, message', [
    (dict(num_heads=3), 'embed_dim 32 is not divisible by num_heads 3'),
    (dict(embed_dim=30, num_heads=2), 'divisible by 4'),
    (dict(img_size=9), 'patch size 2'),
    (dict(class_drop_rate=1.5), 'between 0 and 1'),
])
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize('name', ['dit_small28', 'lit_small28'])
def test_features_only_is_refused(name):
    with pytest.raises(ValueError, match='timesteps t and labels y'):
        timm.create_model(name, features_only=True)


def test_heads_need_their_grid():
    model = tiny()
    tokens, c = torch.zeros(2, 12, 32), torch.zeros(2, 32)
    with pytest.raises(ValueError, match='token grid needed'):
        model.forward_head(tokens, c)
    assert model.forward_head(tokens, c, (6, 2)).shape == (2, 8, 12, 4)


def test_attention_can_be_exchanged():
    class Nothing(nn.Module):
        def __init__(self, dim, num_heads, scale, device=None, dtype=None):
            super().__init__()
            self.scale = scale

        def forward(self, x, grid_size):
            assert grid_size == (4, 4)
            return self.scale * x

    x, t, y = inputs()
    zero, one = (tiny(attn_layer=functools.partial(Nothing, scale=scale)) for scale in (0., 1.))
    assert not torch.allclose(zero(x, t, y), one(x, t, y))
