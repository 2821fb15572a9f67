"""What is true of BACTrack alone: counts, the asymmetry of its attention, its templates, and what it refuses."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import vishub
from vishub.models import bactrack


@pytest.fixture(scope='module')
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model('bactrack_tiny').eval()


def crops(count, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, count, 3, 48, 48, generator=generator), torch.randn(batch, 3, 96, 96, generator=generator))


def close(a, b):
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name, total, parts', [
    ('bactrack_resnet50', 12_890_695, (8_543_296, 262_400, 768, 3_159_040, 512, 132_098, 132_612, 659_969)),
    ('bactrack_resnet18', 6_933_575, (2_782_784, 65_792, 768, 3_159_040, 512, 132_098, 132_612, 659_969)),
    ('bactrack_tiny', 523_975, (158_112, 9_312, 288, 224_352, 192, 18_818, 19_012, 93_889)),
])
def test_parameters(name, total, parts):
    with torch.device('meta'):
        built = timm.create_model(name)
    assert sum(p.numel() for p in built.parameters()) == total
    names = ('backbone', 'input_proj', 'type_embed', 'blocks', 'norm', 'cls_head', 'reg_head', 'discriminator')
    counted = [
        sum(p.numel() for key, p in built.named_parameters() if key.split('.')[0] == part) for part in names]
    assert tuple(counted) == parts


def test_state_dict_has_the_names_of_the_specification(model):
    names = set(model.state_dict())
    for name in (
            'input_proj.weight', 'type_embed', 'blocks.2.norm1.weight', 'blocks.0.attn.qkv.bias',
            'blocks.0.attn.proj.weight', 'blocks.1.norm2.bias', 'blocks.1.mlp.fc1.weight', 'norm.weight',
            'discriminator.token', 'discriminator.norm0.weight', 'discriminator.q.1.weight',
            'discriminator.proj.0.bias', 'discriminator.norm.1.weight', 'discriminator.head.4.bias'):
        assert name in names


@torch.inference_mode()
def test_resnet_form_takes_its_crops():
    built = timm.create_model('bactrack_resnet18').eval()
    output = built(torch.randn(1, 2, 3, 128, 128), torch.randn(1, 3, 256, 256))
    assert output.logits.shape == (1, 1024, 2) and output.boxes.shape == (1, 1024, 4)
    assert output.reliability.shape == (1,)
    assert built.grid_size == (32, 32) and built.template_grid == (16, 16)


@pytest.mark.parametrize('count', [1, 2, 8])
@torch.inference_mode()
def test_any_number_of_templates(model, count):
    output = model(*crops(count))
    assert output.logits.shape == (2, 144, 2) and output.boxes.shape == (2, 144, 4)
    assert output.boxes.min() >= 0 and output.boxes.max() <= 1
    assert ((output.reliability > 0) & (output.reliability < 1)).all()


@torch.inference_mode()
def test_blocks_are_one_joint_attention_in_which_templates_do_not_see_the_search(model):
    """Against the attention written out over all tokens at once, with a matrix that says who sees whom."""
    templates, search = crops(3)
    z = model.project(templates.flatten(0, 1)).unflatten(0, (2, 3)) + model.template_code
    z = z + model.type_embed[torch.tensor([0, 1, 1])][:, None]
    x = model.project(search) + model.search_code + model.type_embed[2]
    tokens = torch.cat([z.flatten(1, 2), x], dim=1)
    known = 3 * 36
    sees = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    sees[:known, known:] = False
    for block in model.blocks:
        qkv = F.linear(block.norm1(tokens), block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = (part.unflatten(-1, (3, 32)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(32)
        attended = scores.masked_fill(~sees, -math.inf).softmax(-1) @ v
        tokens = tokens + block.attn.proj(attended.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    expected = model.norm(tokens)
    torch.testing.assert_close(model.forward_features(templates, search), expected[:, known:], rtol=0, atol=1e-5)
    cache = model.set_templates(templates)
    torch.testing.assert_close(cache.tokens.flatten(1, 2), expected[:, :known], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_cached_form_is_the_joint_forward(model):
    templates, search = crops(3)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    for given in (None, mask):
        expected = model(templates, search, given)
        model.set_templates(templates, given)
        close(model.track(search), expected)
    assert not torch.equal(model(templates, search)[0][1], expected[0][1])


@torch.inference_mode()
def test_order_of_later_templates_does_not_matter_and_the_first_is_special(model):
    templates, search = crops(4)
    expected = model(templates, search)
    close(model(templates[:, [0, 3, 1, 2]], search), expected)
    assert (model(templates[:, [1, 0, 2, 3]], search).logits - expected.logits).abs().max() > 1e-4


@torch.inference_mode()
def test_unused_slots_change_nothing_whatever_they_hold(model):
    templates, search = crops(2)
    expected = model(templates, search)
    for garbage in (1e4, math.nan):
        padded = torch.cat([templates, torch.full_like(templates, garbage)], dim=1)
        close(model(padded, search, torch.tensor([[True, True, False, False]] * 2)), expected)


@torch.inference_mode()
def test_search_does_not_reach_the_templates_and_templates_reach_the_search(model):
    templates, search = crops(2)
    before = model.set_templates(templates).tokens.clone()
    first = model.track(search)
    model.track(search.flip(2))
    assert torch.equal(model._templates.tokens, before)
    other = templates.clone()
    other[:, 1] = other[:, 1].flip(2)
    assert (model(other, search).logits - first.logits).abs().max() > 1e-4


@torch.inference_mode()
def test_reliability_depends_on_box_and_initial_template(model):
    templates, search = crops(2)
    cache = model.set_templates(templates)
    x = model.encode_search(search, cache)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 2)
    score = model.discriminate(x, cache, box)
    assert not torch.allclose(model.discriminate(x, cache, box + 0.2), score)
    changed = cache._replace(tokens=torch.cat([cache.tokens[:, :1].flip(2) * 2, cache.tokens[:, 1:]], 1))
    assert not torch.allclose(model.discriminate(x, changed, box), score)
    changed = cache._replace(tokens=torch.cat([cache.tokens[:, :1], cache.tokens[:, 1:] * 2], 1))
    assert torch.equal(model.discriminate(x, changed, box), score)


def test_pooled_region_is_the_mean_of_what_the_box_covers(model):
    values = torch.arange(12.).expand(1, 1, 12, 12)  # a column has its number
    region = model.discriminator.pooled(values, torch.tensor([[0.5, 0.5, 4 / 12, 4 / 12]]))
    # cells of one column each, from 4 to 8; column n covers n to n + 1, so its middle is n + 0.5
    torch.testing.assert_close(region.unflatten(1, (4, 4))[0, 0, :, 0], torch.tensor([4., 5., 6., 7.]))


def test_sine_code():
    code = bactrack.position_code(3, 5, 8)
    assert code.shape == (15, 8)
    u = 2 * math.pi * 2 / (3 + 1e-6)  # second row
    expected = [math.sin(u), math.cos(u), math.sin(u / 10000 ** 0.5), math.cos(u / 10000 ** 0.5)]
    assert code[5, :4].tolist() == pytest.approx(expected, abs=1e-6)
    u = 2 * math.pi * 4 / (5 + 1e-6)  # fourth column
    assert code[8, 4:6].tolist() == pytest.approx([math.sin(u), math.cos(u)], abs=1e-6)


def test_appearance_is_a_unit_vector_of_the_centre(model):
    tokens = torch.randn(2, 36, 96)
    appearance = model.embed_appearance(tokens)
    torch.testing.assert_close(appearance.norm(dim=-1), torch.ones(2))
    edge = tokens.unflatten(1, (6, 6)).clone()
    edge[:, 0] = edge[:, :, 5] = 7.
    torch.testing.assert_close(model.embed_appearance(edge.flatten(1, 2)), appearance)


def test_other_crop_sizes():
    built = timm.create_model('bactrack_tiny', img_size=64, template_size=32).eval()
    with torch.inference_mode():
        assert built(torch.randn(1, 1, 3, 32, 32), torch.randn(1, 3, 64, 64)).logits.shape == (1, 64, 2)
    built.set_input_size(96, 48)
    assert built.search_code.shape == (144, 96)
    with pytest.raises(ValueError, match='multiples of 8'):
        built.set_input_size(100)


def test_frozen_norms_of_a_pretrained_backbone(monkeypatch):
    """With timm's weights replaced by random ones: nothing is downloaded."""
    make = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **kw: make(name, pretrained=False, **kw))
    built = bactrack.BACTrack('resnet18', img_size=64, template_size=32, pretrained_backbone=True).train()
    norms = [m for m in built.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = norms[0].running_mean.clone()
    built(torch.randn(2, 1, 3, 32, 32), torch.randn(2, 3, 64, 64)).logits.sum().backward()
    assert torch.equal(norms[0].running_mean, before) and norms[0].weight.grad is None
    assert built.backbone.conv1.weight.grad is not None and built.training


@pytest.mark.parametrize('shapes, sentence', [
    (((2, 3, 48, 48), (2, 3, 96, 96)), r'templates \(batch, K >= 1, 3, 48, 48\), got \(2, 3, 48, 48\)'),
    (((2, 0, 3, 48, 48), (2, 3, 96, 96)), r'got \(2, 0, 3, 48, 48\)'),
    (((2, 1, 3, 48, 48), (2, 1, 3, 96, 96)), r'search crop .* got \(2, 1, 3, 96, 96\)'),
    (((2, 1, 3, 48, 48), (3, 3, 96, 96)), '3 search crops for the templates of 2'),
])
def test_wrong_shapes(model, shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize('mask, sentence', [
    ([[True, True, True]] * 2, r'\(2, 2\), got \(2, 3\)'),
    ([[1, 1], [1, 1]], 'torch.int64'),
    ([[True, True], [False, False]], r'shape \(2, 2\) has a sample without any'),
    ([[True, True], [False, True]], r'shape \(2, 2\) leaves out slot 0'),
])
def test_wrong_masks(model, mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(*crops(2), torch.tensor(mask))


def test_integers_are_refused(model):
    with pytest.raises(ValueError, match='torch.uint8'):
        model(torch.zeros(1, 1, 3, 48, 48, dtype=torch.uint8), torch.zeros(1, 3, 96, 96))


def test_no_templates_to_track():
    with pytest.raises(RuntimeError, match='set_templates'):
        timm.create_model('bactrack_tiny').track(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize('ask', [
    lambda: timm.create_model('bactrack_tiny', features_only=True),
    lambda: timm.create_model('bactrack_tiny', num_classes=10),
    lambda: timm.create_model('bactrack_tiny').reset_classifier(10),
])
def test_it_is_no_classifier_and_no_pyramid(ask):
    with pytest.raises((ValueError, RuntimeError), match=r'BACTrack is a tracker: use create_tracker\(\.\.\.\)'):
        ask()


def test_only_our_own_checkpoints(model):
    state = model.state_dict()
    assert bactrack.checkpoint_filter_fn({'state_dict': state}, model) is state
    with pytest.raises(ValueError, match='there is no official one'):
        bactrack.checkpoint_filter_fn({'conv1.weight': torch.zeros(1)}, model)


def test_it_says_that_it_is_no_reproduction():
    notes = vishub.catalog.family('bactrack').notes
    assert 'BACTrack-style' in notes and 'not a reproduction' in notes
    assert 'not a reproduction' in bactrack.__doc__
