"""LiT against the published listing of its attention, and what is particular to it."""
import numpy as np
import pytest
import timm
import torch

from tests.models.official_weights import load_case
from tests.models.test_dit import inputs, randomised, tiny
from vishub.models.cost import count_macs, count_parameters
from vishub.models.lit import (
    LinearAttention,
    LinearDiffusionTransformer,
    TextToImageTransformer,
    checkpoint_filter_fn,
    inherit_from_dit,
    inherit_from_pixart,
    relu_linear_attention,
    text_checkpoint_filter_fn,
)

# without the position table, which official counts include
PARAMETERS = {
    'lit_s_2': 32_924_960,
    'lit_s_2_512': 32_924_960,
    'lit_b_2': 130_395_680,
    'lit_l_2': 458_000_416,
    'lit_xl_2': 675_044_384,
    'lit_small28': 1_897_376 - 49 * 128,
}
# lit_xl_2 is left out: with 256 tokens and d = 288, the cheaper order of the product saves 0.5 of its 119.37
GIGA_MACS = {'lit_s_2': 5.94, 'lit_s_2_512': 23.71, 'lit_b_2': 23.07, 'lit_l_2': 80.86, 'lit_xl_2_512': 476.78}


def tiny_lit(**kwargs):
    return tiny(LinearDiffusionTransformer, **kwargs)


def reference(q, k, v):
    """The formula as it is written, in float64."""
    q, k, v = (y.double() for y in (q, k, v))
    q, k = q.relu() + 1e-6, k.relu() + 1e-6
    num_tokens = q.shape[-2]
    z = 1 / (q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
    return q @ ((k.transpose(-2, -1) * num_tokens ** -0.5) @ (v * num_tokens ** -0.5)) * z


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- official outputs -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_golden_model():
    case = load_case('lit', 'lit_s_2_256')
    model = timm.create_model('lit_s_2', num_heads=2).eval()
    case.check('pos_embed_init', model.pos_embed, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == case.parameters
    model.load_state_dict(checkpoint_filter_fn(case.state_dict, model))
    t, y = torch.tensor(case.inputs['t']), torch.tensor(case.inputs['y'])
    case.check('c', model.condition(t, y, 2), atol=1e-5)
    case.check('out', model(case.inputs['x'], t, y), atol=3e-5)
    x, c = noise_of(case.inputs['block0']['x']), noise_of(case.inputs['block0']['c'])
    case.check('attn0', model.blocks[0].attn(x), atol=1e-5)
    case.check('block0', model.blocks[0](x, c), atol=3e-5)


def noise_of(recipe):
    rng = np.random.Generator(np.random.PCG64(recipe['seed']))
    return torch.from_numpy(rng.standard_normal(recipe['shape'], dtype=np.float32))


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    assert count_parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize('name', GIGA_MACS)
def test_macs(name):
    assert count_macs(name) / 1e9 == pytest.approx(GIGA_MACS[name], abs=0.006)


# ---- attention --------------------------------------------------------------------------------------------------


def test_two_tokens_by_hand():
    q, k, v = (torch.tensor(values).view(1, 1, 2, 1) for values in ([1., 2.], [3., 1.], [10., 20.]))
    torch.testing.assert_close(relu_linear_attention(q, k, v).flatten(), torch.tensor([12.5, 12.5]), rtol=1e-5, atol=0)


@pytest.mark.parametrize('num_tokens', [5, 8, 100])  # below, at and above d: both orders of the product
def test_formula(num_tokens):
    q, k, v = (noise(2, 3, num_tokens, 8, seed=seed) for seed in range(3))
    for dtype in (torch.float32, torch.float64):
        output = relu_linear_attention(*(y.to(dtype) for y in (q, k, v)))
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), reference(q, k, v), rtol=1e-5, atol=1e-5)


def test_equal_keys_and_zero_queries_average():
    q, k, v = noise(1, 2, 20, 4), noise(1, 2, 1, 4, seed=1).expand(-1, -1, 20, -1), noise(1, 2, 20, 4, seed=2)
    mean = v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(relu_linear_attention(q.abs(), k.abs(), v), mean, rtol=1e-4, atol=1e-4)
    # ReLU leaves nothing of these queries: all keys weigh alike, up to eps against the sum of k
    k = torch.ones_like(v)
    torch.testing.assert_close(relu_linear_attention(-q.abs(), k, v), mean * 4 / 5, rtol=1e-4, atol=1e-4)


def test_values_convolved():
    attention = randomised(LinearAttention(16, 2))
    x = noise(2, 12, 16)
    with torch.no_grad():
        attention.dwc.weight.zero_()
        attention.dwc.bias.zero_()
        attention.proj.weight.copy_(torch.eye(16))
        attention.proj.bias.zero_()
        plain = attention(x, (4, 3))
        # without the convolution, tokens are a set
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(attention(x[:, order], (4, 3)), plain[:, order], rtol=1e-4, atol=1e-5)
        v = attention.kv(x)[..., 16:]
        attention.dwc.weight[:, :, 2, 2] = 1.
        torch.testing.assert_close(attention(x, (4, 3)), plain + v)
        # one step down the rows: each token sees the value of the one above; filter 0 serves channel 0 of both heads
        attention.dwc.weight.zero_()
        attention.dwc.weight[0, :, 1, 2] = 1.
        expected = torch.zeros_like(v)
        expected[:, 3:, ::8] = v[:, :-3, ::8]
        torch.testing.assert_close(attention(x, (4, 3)) - plain, expected)


def test_sums_are_made_in_float32():
    # 4,096 products of 16 * 100 are beyond float16, and in bfloat16 adding one to 256 changes nothing
    q, k = torch.full((1, 1, 4096, 16), 100.), torch.full((1, 1, 4096, 16), 100.)
    v = torch.linspace(0, 1, 4096).view(1, 1, 4096, 1).expand(-1, -1, -1, 16)
    output = relu_linear_attention(q.half(), k.half(), v.half())
    torch.testing.assert_close(output, torch.full_like(output, 0.5), rtol=1e-3, atol=0)
    q, k, v = (noise(1, 2, 300, 8, seed=seed) for seed in range(3))
    with torch.autocast('cpu', torch.bfloat16):
        output = relu_linear_attention(q, k, v)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), reference(q, k, v), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_model():
    model, (x, t, y) = tiny_lit(), inputs()
    expected = model(x, t, y)
    output = model.bfloat16()(x.bfloat16(), t, y)
    assert output.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(output.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize('arguments, message', [
    (dict(dim=16, num_heads=3), '16 is not divisible by num_heads 3'),
    (dict(dim=16, num_heads=2, kernel_size=4), 'odd, got 4'),
])
def test_bad_attention(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(**arguments)


def test_the_grid_is_needed():
    attention = LinearAttention(16, 2)
    assert attention(noise(1, 12, 16), (2, 6)).shape == (1, 12, 16)
    for grid_size in (None, (3, 3)):
        with pytest.raises(ValueError, match='token grid needed: 12 tokens'):
            attention(noise(1, 12, 16), grid_size)


# ---- model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_non_square_grids():
    x, t, y = inputs(size=(12, 4))
    expected = tiny_lit(img_size=(12, 4))(x, t, y)
    assert expected.shape == (2, 8, 12, 4)
    torch.testing.assert_close(tiny_lit(dynamic_img_size=True)(x, t, y), expected)


@pytest.mark.filterwarnings('ignore')
def test_compile_without_graph_breaks():
    model, (x, t, y) = tiny_lit(depth=1, num_heads=4), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.autocast('cpu', torch.bfloat16):
        expected, output = model(x, t, y), compiled(x, t, y)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    output.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@torch.no_grad()
def test_inheritance():
    teacher = tiny(num_heads=4)
    student = randomised(tiny_lit(num_heads=1), seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    inherit_from_dit(student, teacher.state_dict())
    teacher_state = teacher.state_dict()
    kept = []
    for name, value in student.state_dict().items():
        if '.attn.' in name:
            assert torch.equal(value, before[name])
            kept.append(name)
        else:
            assert torch.equal(value, teacher_state[name])
    assert len(kept) == 2 * 8  # q, kv, dwc and proj of every block


def test_inheritance_from_official_names_and_another_grid():
    case = load_case('lit', 'dit_s_2_256')
    student = timm.create_model('lit_s_2_512', depth=12)
    table = student.pos_embed.clone()
    inherit_from_dit(student, {'ema': case.state_dict})
    assert torch.equal(student.pos_embed, table)
    assert torch.equal(student.final.linear.weight, case.state_dict['final_layer.linear.weight'])


@pytest.mark.parametrize('arguments, message', [
    (dict(depth=3), 'has no place for blocks.2'),
    (dict(depth=1), 'lacks blocks.1'),
    (dict(embed_dim=64), 'another shape of'),
])
def test_inheritance_refuses_another_size(arguments, message):
    student = tiny_lit()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inherit_from_dit(student, tiny(**arguments).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# ---- text to image ----------------------------------------------------------------------------------------------


def tiny_text(**kwargs):
    sizes = dict(
        img_size=8, embed_dim=32, depth=2, num_heads=2, caption_dim=12, max_tokens=6, caption_drop_rate=0.5)
    return randomised(TextToImageTransformer(**dict(sizes, **kwargs)))


def text_inputs(batch_size=2, tokens=6):
    x, t, _ = inputs(batch_size)
    return x, t, noise(batch_size, tokens, 12, seed=5)


@pytest.mark.parametrize('name, heads, expected', [
    ('lit_t2i_xl_2_512', None, 611_065_760), ('lit_t2i_xl_2_512', 2, 611_275_424),
    ('lit_t2i_xl_2_1024', None, 611_065_760)])
def test_text_parameters(name, heads, expected):
    with torch.device('meta'):
        model = timm.create_model(name, **({'num_heads': heads} if heads else {}))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize('name, expected', [('lit_t2i_xl_2_512', 596.6), ('lit_t2i_xl_2_1024', 2314.0)])
def test_text_macs(name, expected):
    assert count_macs(name) / 1e9 == pytest.approx(expected, rel=2e-3)


def test_text_positions_span_the_same_range():
    small, large = tiny_text(img_size=8), tiny_text(img_size=16, position_scale=2.)
    torch.testing.assert_close(small.pos_embed.view(4, 4, 32), large.pos_embed.view(8, 8, 32)[::2, ::2])
    # any grid of a model does
    dynamic = tiny_text(dynamic_img_size=True)
    assert dynamic.position_steps((8, 2)) == (0.5, 2.)
    x, t, y = text_inputs()
    assert dynamic(x.repeat(1, 1, 1, 2), t, y).shape == (2, 8, 8, 16)


@torch.no_grad()
def test_text_padding_is_not_seen():
    model = tiny_text()
    x, t, y = text_inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    expected = model(x, t, y, mask)
    changed = torch.where(mask[..., None].bool(), y, y + 3)
    torch.testing.assert_close(model(x, t, changed, mask), expected)
    torch.testing.assert_close(model(x, t, changed[:, None], mask), expected)  # PixArt's own shape
    torch.testing.assert_close(model(x[:1], t[:1], y[:1, :3]), expected[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t, changed), expected, atol=1e-3)


@torch.no_grad()
def test_text_block_by_hand():
    """Order of table, gates and cross-attention, as the description of PixArt says."""
    model = tiny_text(depth=1)
    x, t, y = text_inputs()
    block, c = model.blocks[0], model.text_condition(t, y, None, 2)
    tokens = model.embed(x, (4, 4))
    s1, a1, g1, s2, a2, g2 = (
        (block.scale_shift_table[i] + c.shared[:, i])[:, None] for i in range(6))
    norm = torch.nn.functional.layer_norm
    expected = tokens + g1 * block.attn(norm(tokens, (32,), eps=1e-6) * (1 + a1) + s1, (4, 4))
    expected = expected + block.cross_attn(expected, c.captions, None)
    expected = expected + g2 * block.mlp(norm(expected, (32,), eps=1e-6) * (1 + a2) + s2)
    torch.testing.assert_close(model.forward_features(x, t, y), expected)
    torch.testing.assert_close(model.forward_intermediates(x, t, y, output_fmt='NLC')[1][0], expected)
    table = model.final.scale_shift_table + model.time_embed(t)[:, None]
    head = model.final.linear(norm(expected, (32,), eps=1e-6) * (1 + table[:, 1:]) + table[:, :1])
    torch.testing.assert_close(model(x, t, y)[:, :, :2, :2], head[:, 0].view(2, 2, 2, 8).permute(0, 3, 1, 2))


@torch.no_grad()
def test_text_guidance():
    model = tiny_text()
    x, t, y = text_inputs()
    wanted, none = model(x, t, y), model(x, t, model.caption_embed.y_embedding.expand(2, -1, -1))
    guided = model.forward_with_cfg(x, t, y, 3.)
    torch.testing.assert_close(guided[:, :4], none[:, :4] + 3 * (wanted - none)[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[:, 4:], wanted[:, 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1.), wanted, rtol=1e-4, atol=1e-5)


def test_text_training_drops_captions():
    model = tiny_text(caption_drop_rate=1.).train()
    x, t, y = text_inputs()
    torch.testing.assert_close(model(x, t, y), model(x, t, y + 1))
    model(x, t, y).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.allclose(model.eval()(x, t, y), model(x, t, y + 1), atol=1e-3)


def pixart_state(model):
    """The state dict of a PixArt of the same size, under its own names."""
    names = {
        'patch_embed.': 'x_embedder.', 'time_embed.': 't_embedder.', 'time_block.': 't_block.',
        'caption_embed.': 'y_embedder.', 'final.': 'final_layer.'}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = theirs + name[len(ours):] if name.startswith(ours) else name
        state[name] = value.clone()
    del state['pos_embed']
    return state


def test_pixart_names_load_and_are_inherited():
    model = tiny_text()
    state = pixart_state(model)
    other = TextToImageTransformer(**dict(img_size=8, embed_dim=32, depth=2, num_heads=2, caption_dim=12, max_tokens=6))
    other.load_state_dict(text_checkpoint_filter_fn({'state_dict': state}, other))
    x, t, y = text_inputs()
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x, t, y), model(x, t, y))
    teacher = {name: value + 1 for name, value in state.items() if '.attn.' not in name or '.proj.' in name}
    teacher.update({f'blocks.{i}.attn.qkv.weight': torch.zeros(96, 32) for i in range(2)})
    before = {name: value.clone() for name, value in other.state_dict().items()}
    inherit_from_pixart(other, teacher)
    for name, value in other.state_dict().items():
        own = any(f'.attn.{part}.' in name for part in ('q', 'kv', 'dwc')) or name == 'pos_embed'
        torch.testing.assert_close(value, before[name] if own else before[name] + 1)
    del teacher['t_block.1.bias']
    with pytest.raises(ValueError, match='lacks time_block.1.bias'):
        inherit_from_pixart(other, teacher)


def test_text_refuses_what_does_not_fit():
    model = tiny_text()
    x, t, y = text_inputs()
    for arguments, words in (
            ((x,), 'caption features y beside x'), ((x, t), 'caption features'), ((x, t, y[..., :5]), '12'),
            ((x, t, y[:1]), '\\(2, at most 6 tokens'), ((x, t, y.repeat(1, 2, 1)), 'at most 6'),
            ((x, t, y, torch.ones(2, 5)), 'mask must')):
        with pytest.raises(ValueError, match=words):
            model(*arguments)
    with pytest.raises(ValueError, match='no classes'):
        tiny_text(num_classes=3)
    with pytest.raises(ValueError, match='no classes'):
        model.reset_classifier(10)
