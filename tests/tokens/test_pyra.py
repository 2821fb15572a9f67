"""PYRA against the official functions and model (golden), the worked example, and training."""
import copy
import io

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.models.official_weights import load_case
from tests.tokens.small_models import images, small_model
from vishub import tokens
from vishub.errors import InputError
from vishub.tokens import pyra
from vishub.tokens.functional import Plan, bipartite_matching, merge
from vishub.tokens.method import Layout, Seen, State


def block_of(a, b, weight=None, bias=None):
    block = nn.Module()
    block.pyra_a, block.pyra_b = nn.Parameter(a), nn.Parameter(b)
    block.pyra_norm = nn.LayerNorm(b.shape[1], eps=1e-5)
    if weight is not None:
        block.pyra_norm.load_state_dict(dict(weight=weight, bias=bias))
    return block


def modulated(x, plan, size, block):
    seen = Seen(0, plan.keep.shape[1], 1, 1, block, False, None, None, None, None, None)
    with torch.no_grad():
        return pyra.PYRA().merge(x, plan, State(size=size), seen)


def test_merging_is_the_official_one():
    case = load_case('tokens', 'pyra_merge_17x8_cls')
    metric, x, size = case.inputs['metric'], case.inputs['x'], None
    for step, r in enumerate(case.inputs['r']):
        plan = bipartite_matching(metric, r)
        part = {key: case.state_dict[f'{step}.{key}'] for key in (
            'pyra_a', 'pyra_b', 'pyra_norm.weight', 'pyra_norm.bias')}
        case.check(f'plain{step}', merge(x, plan, size)[0])
        metric, _ = merge(metric, plan, size)
        x, size = modulated(x, plan, size, block_of(*part.values()))
        case.check(f'x{step}', x)
        case.check(f'size{step}', size.unsqueeze(-1), atol=0.)


def test_model_is_the_official_one():
    case = load_case('tokens', 'pyra_vit_tiny_lora8_low_224')
    model = VisionTransformer(embed_dim=192, depth=12, num_heads=3, num_classes=10).eval()
    tokens.apply(model, 'pyra', r='low', lora=8)
    model.load_state_dict(pyra.checkpoint_filter_fn(case.state_dict, model))
    assert tokens.config(model)['r'] == case.inputs['r']
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case.meta['trainable']
    gates = sum(p.numel() for name, p in model.named_parameters() if '.pyra_' in name)
    assert gates == case.meta['pyra_parameters']
    with torch.inference_mode(), tokens.trace(model) as traces:
        case.check('features', model.forward_features(case.inputs['x']))
        case.check('logits', model(case.inputs['x']))
        case.check('size', traces[0].sizes().unsqueeze(-1), atol=0.)
        # Folded, it is the same function.
        case.check('logits', tokens.merge_lora(model)(case.inputs['x']))


@pytest.mark.parametrize('b, source, target, expected', [
    ([.5, -.5], [2, 0], [1, 1], [2.175666, .5]), ([0, 0], [2, 0], [1, 1], [1.5, .5]),
    ([.5, -.5], [1, 3], [1, -1], [1, 1])])
def test_worked_example(b, source, target, expected):
    x = torch.tensor([[[9, 9], target, source]], dtype=torch.float32)
    plan = Plan(torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[1]]))
    merged, size = modulated(x, plan, None, block_of(torch.ones(1, 1), torch.tensor([b], dtype=torch.float32)))
    torch.testing.assert_close(merged[0, 1], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-6)
    assert size.tolist() == [[1, 2]]


@pytest.mark.parametrize('name', ['vit', 'deit_distilled', 'eva', 'beit', 'nvit'])
def test_starts_as_tome_and_trains_only_its_own(name):
    model, x = small_model(name), images(4)
    names, frozen_head = set(model.state_dict()), list(model.parameters())[0]
    frozen_head.requires_grad_(False)  # a user's own choice, to be found again after remove
    required = {key: p.requires_grad for key, p in model.named_parameters()}
    with torch.no_grad():
        tokens.apply(model, 'tome', r=[4, 2])
        expected = model(x)
        tokens.apply(model, 'pyra', r=[4, 2], lora=4, adapter=3)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(tokens.trainable_parameters(model, lr=1e-2, pyra_lr=1e-3))
    assert {group['lr'] for group in optimizer.param_groups} == {1e-2, 1e-3}
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    trained = set(tokens.peft_state_dict(model))
    assert moved <= trained and any('pyra_b' in key for key in moved) and any('lora_b' in key for key in moved)

    twin = tokens.apply(copy.deepcopy(tokens.remove(copy.deepcopy(model))), 'pyra', r=[4, 2], lora=4, adapter=3)
    tokens.load_peft_state_dict(twin, tokens.peft_state_dict(model))
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), expected)
        torch.testing.assert_close(tokens.merge_lora(twin)(x), expected, rtol=1e-4, atol=1e-5)
    tokens.remove(model)
    assert set(model.state_dict()) == names
    assert {key: p.requires_grad for key, p in model.named_parameters()} == required


def test_new_parameters_follow_the_model():
    model = tokens.apply(small_model('vit').bfloat16(), 'pyra', r=4, adapter=2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        assert model(images().bfloat16()).isfinite().all()


@pytest.mark.parametrize('layout, low, high', [
    (Layout(12, 1, 1, 197, True), 11, 5), (Layout(12, 2, 2, 198, True), 42, 6), (Layout(24, 1, 1, 197, True), 7, 5)])
def test_published_schedules(layout, low, high):
    for name, left in (('low', low), ('high', high)):
        assert layout.tokens - sum(pyra.named_schedule(name, layout)) == left


@pytest.mark.parametrize('depth, count', [(3, 17), (6, 65), (16, 577), (32, 257)])
def test_schedules_scale(depth, count):
    layout = Layout(depth, 1, 1, count, True)
    for name in ('low', 'high'):
        left, r = count, pyra.named_schedule(name, layout)
        assert len(r) == depth
        for step in r:
            assert 0 <= step <= (left - 1) // 2
            left -= step
        assert left < 0.3 * count


@pytest.mark.parametrize('config, message', [
    (dict(r=9), 'block 0 gets 17 tokens and at most 8'),
    (dict(r=0), 'r is 0 in every block'),
    (dict(r='medium'), 'low, high'),
    (dict(r=2, lora=0, train_head=False), 'nothing to adapt'),
    (dict(r=2, lora=-1), 'lora is -1'),
])
def test_bad_configurations(config, message):
    model = small_model('vit')
    with pytest.raises(InputError, match=message):
        tokens.apply(model, 'pyra', **config)
    assert all(p.requires_grad for p in model.parameters())


def test_other_states_and_models_are_refused():
    model = tokens.apply(small_model('vit'), 'pyra', r=4)
    state = tokens.peft_state_dict(model)
    tokens.apply(model, 'pyra', r=3)
    with pytest.raises(InputError, match='pyra_a has 4 rows, the schedule asks 3'):
        tokens.load_peft_state_dict(model, state)
    tokens.apply(model, 'pyra', r=4, lora=0)
    with pytest.raises(InputError, match='unknown here'):
        tokens.load_peft_state_dict(model, state)
    with pytest.raises(InputError, match='parameters of its own'), tokens.reduced(model, 'tome', r=1):
        pass
    with pytest.raises(InputError, match='comes first'):
        tokens.peft_state_dict(tokens.remove(model))
    with pytest.raises(InputError, match='three'):
        tokens.apply(small_model('eva02'), 'pyra', r=2)
