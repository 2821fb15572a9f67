"""ConSlide against its official outputs and gradients, and what is particular to the family."""
import functools

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.models.official_weights import load_case
from vishub.models import conslide
from vishub.models.conslide import (
    Attention,
    ConSlide,
    attention_rollout,
    checkpoint_filter_fn,
    mean_similarity_loss,
    region_similarity,
)
from vishub.models.cost import count_macs, module_macs


def features(num_regions, width=128, grid=8, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, num_regions, grid, grid, width, generator=generator),
        torch.randn(*batch, num_regions, width, generator=generator),
    )


def randomised(model, seed=0):
    """Weights with which every part of the model matters (fresh attention is nearly uniform)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                value.copy_(0.2 * noise + (1. if name.endswith('weight') else 0.))
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.eval()


@pytest.fixture(scope='module')
def tiny():
    return randomised(timm.create_model('conslide_hit_tiny'))


@functools.cache
def golden():
    """The official case and the model with its weights, loaded strictly."""
    case = load_case('conslide', 'conslide_hit_n5')
    model = timm.create_model('conslide_hit')
    model.load_state_dict(checkpoint_filter_fn(case.state_dict, model))
    return case, model.eval()


# Official outputs

@torch.no_grad()
@pytest.mark.parametrize('as_pair', [True, False])
def test_golden_outputs(as_pair):
    case, model = golden()
    pair = [case.inputs['patch_features'], case.inputs['region_features']]
    output = model(*([pair] if as_pair else pair), return_attention=True, return_similarity=True)
    case.check('logits', output.logits)
    case.check('probabilities', output.probabilities)
    case.check('region_attention', output.region_attention)
    case.check('sim_loss', output.sim_loss)
    assert output.predicted.shape == () and output.predicted.dtype == torch.int64
    assert output.predicted == case.meta['predicted_class']
    case.check('features', model.forward_head(model.forward_features(pair), pre_logits=True))
    assert sum(p.numel() for p in model.parameters()) == case.meta['live_parameters']

    plain = model(*pair)  # fused attention, no maps
    case.check('logits', plain.logits)
    assert plain.region_attention is None and plain.sim_loss is None


@torch.no_grad()
def test_golden_attention():
    case, model = golden()
    maps = model.forward_attention(case.inputs['patch_features'], case.inputs['region_features'])
    case.check('inner_attention_last', maps.patch[-1])
    case.check('outer_attention_last', maps.region[-1])
    rollout = model.rollout(case.inputs['patch_features'], case.inputs['region_features'])
    case.check('region_attention', rollout.region)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_golden_gradients(checkpointing):
    """They pin the stop-gradient: without it the class loss would reach the patch embedding."""
    case, model = golden()
    model.zero_grad()
    model.set_grad_checkpointing(checkpointing)
    output = model(case.inputs['patch_features'], case.inputs['region_features'], return_similarity=True)
    model.set_grad_checkpointing(False)
    label = torch.tensor([case.meta['label_for_loss']])
    loss = F.cross_entropy(output.logits, label) + 1e-5 * mean_similarity_loss(output.sim_loss)
    loss.backward()
    case.check('loss', loss[None])
    case.check('grad_fc1', model.patch_embed.weight.grad)
    case.check('grad_fc2', model.region_embed.weight.grad)
    case.check('grad_cls_token', model.cls_token.grad)


# Sizes

@pytest.mark.parametrize('name, options, parameters', [
    ('conslide_hit', {}, 10_046_600),
    ('conslide_hit', dict(num_classes=2), 10_044_290),
    ('conslide_hit', dict(
        num_classes=5, depth=3, patch_heads=4, region_heads=6, mlp_ratio=3., qkv_bias=True), 16_550_021),
    ('conslide_hit_tiny', {}, 281_800),
])
def test_parameters(name, options, parameters):
    with torch.device('meta'):
        model = timm.create_model(name, **options).eval()
        assert model(*model.example_inputs(3)).logits.shape == (1, model.num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_macs():
    with torch.device('meta'):
        model = timm.create_model('conslide_hit').eval()
        macs = {n: module_macs(model, *model.example_inputs(n)) for n in (1, 16, 110)}
    # the official code by fvcore, which also counts norms and pooling
    assert macs[16] / 1e9 == pytest.approx(4.76, rel=0.004)
    assert macs[110] / 1e9 == pytest.approx(32.75, rel=0.004)
    assert count_macs('conslide_hit') == macs[1]  # the default input is one region


@torch.no_grad()
@pytest.mark.parametrize('num_regions, grid', [(1, 8), (2, 8), (9, 4), (3, 5)])
def test_any_number_of_regions(tiny, num_regions, grid):
    slide = features(num_regions, grid=grid)
    output = tiny(*slide, return_attention=True, return_similarity=True)
    assert output.logits.shape == output.probabilities.shape == (1, 8)
    assert output.region_attention.shape == (1, num_regions)
    assert output.sim_loss.shape == (num_regions, num_regions)
    assert all(part.isfinite().all() for part in output)
    rollout = tiny.rollout(*slide)
    assert rollout.patch.shape == rollout.heat_map.shape == (num_regions, grid, grid)


@torch.no_grad()
def test_order_of_regions_does_not_matter(tiny):
    patches, regions = features(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one = tiny(patches, regions, return_attention=True, return_similarity=True)
    other = tiny(patches[order], regions[order], return_attention=True, return_similarity=True)
    torch.testing.assert_close(other.logits, one.logits)
    torch.testing.assert_close(other.region_attention, one.region_attention[:, order])
    torch.testing.assert_close(other.sim_loss, one.sim_loss[order][:, order], rtol=1e-4, atol=1e-2)
    # ... but which patches belong to which region does.
    assert (tiny(patches[order], regions).logits - one.logits).abs().max() > 1e-3


# Batches

def test_ragged_batch_is_its_slides(tiny):
    """Outputs and gradients, whatever stands in the padding."""
    slides = [features(n, seed=n) for n in (4, 1, 7)]
    mask = torch.tensor([[i < n for i in range(7)] for n in (4, 1, 7)])
    mask[0] = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)  # padding may stand anywhere
    patches, regions = torch.full((3, 7, 8, 8, 128), float('nan')), torch.full((3, 7, 128), float('inf'))
    for i, slide in enumerate(slides):
        patches[i, mask[i]], regions[i, mask[i]] = slide

    tiny.zero_grad()
    batch = tiny(patches, regions, mask, return_attention=True, return_similarity=True)
    target = torch.tensor([3, 0, 5])
    (F.cross_entropy(batch.logits, target) + 1e-3 * mean_similarity_loss(batch.sim_loss, mask)).backward()
    gradients = {name: p.grad.clone() for name, p in tiny.named_parameters()}
    rollout = tiny.rollout(patches, regions, mask)
    saliency = tiny.patch_saliency(patches, regions, mask)

    tiny.zero_grad()
    for i, slide in enumerate(slides):
        one = tiny(*slide, return_attention=True, return_similarity=True)
        loss = F.cross_entropy(one.logits, target[i:i + 1]) + 1e-3 * mean_similarity_loss(one.sim_loss)
        (loss / 3).backward()
        torch.testing.assert_close(batch.logits[i:i + 1], one.logits, rtol=1e-4, atol=1e-5)
        assert batch.predicted[i] == one.predicted
        torch.testing.assert_close(batch.sim_loss[i][mask[i]][:, mask[i]], one.sim_loss, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(batch.region_attention[i:i + 1, mask[i]], one.region_attention)
        for of_batch, of_slide in zip(rollout, tiny.rollout(*slide)):
            torch.testing.assert_close(of_batch[i][mask[i]], of_slide.reshape(of_batch[i][mask[i]].shape))
        torch.testing.assert_close(saliency[i][mask[i]], tiny.patch_saliency(*slide), rtol=1e-3, atol=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(
            dict(tiny.named_parameters())[name].grad / scale, gradient / scale, rtol=1e-3, atol=1e-4, msg=name)
    for part in (batch.sim_loss * ~(mask[:, :, None] & mask[:, None, :]), batch.region_attention * ~mask,
                 saliency[~mask], *(part[~mask] for part in rollout)):
        assert not part.any()
    tiny.zero_grad()


# Who learns what

IN_PATCH_BRANCH = ('patch_embed', '.patch_', '.pool.')


def test_class_loss_and_similarity_train_different_parts(tiny):
    slide = features(4)
    tiny.zero_grad()
    F.cross_entropy(tiny(*slide, return_similarity=True).logits, torch.tensor([2])).backward()
    for name, p in tiny.named_parameters():
        reached = p.grad is not None and bool(p.grad.any())
        assert reached == (not any(part in name for part in IN_PATCH_BRANCH)), name
    tiny.zero_grad()
    tiny(*slide, return_similarity=True).sim_loss.mean().backward()
    for name, p in tiny.named_parameters():
        reached = p.grad is not None and bool(p.grad.any())
        assert reached == (name.startswith('region_embed') or any(part in name for part in IN_PATCH_BRANCH)), name
    tiny.zero_grad()


def test_patch_branch_keeps_nothing_where_no_similarity_is_asked_for(tiny):
    """Replay: the same gradients without the activations of the patch branch."""
    slide = features(4)
    gradients, kept = [], []
    for similarity in (True, False):
        tiny.zero_grad()
        kept.append(0)

        def pack(x):
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = tiny(*slide, return_similarity=similarity).logits
        F.cross_entropy(logits, torch.tensor([2])).backward()
        gradients.append({
            name: p.grad for name, p in tiny.named_parameters() if not any(part in name for part in IN_PATCH_BRANCH)})
    assert kept[1] < 0.3 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert tiny.patch_embed.weight.grad is None
    tiny.zero_grad()


def test_similarity_is_given_in_training_only(tiny):
    slide = features(2)
    assert tiny(*slide).sim_loss is None
    tiny.train()
    try:
        assert tiny(*slide).sim_loss is not None
        assert tiny(*slide, return_similarity=False).sim_loss is None
    finally:
        tiny.eval()


def test_similarity_of_regions():
    x = torch.tensor([[[1., 2.], [4., 9.]]])
    z = (x - 4.) / (38 / 3) ** 0.5  # mean 4; squared deviations 9 + 4 + 0 + 25 = 38, over 4 - 1 values
    torch.testing.assert_close(region_similarity(x), z @ z.mT)
    padded = torch.cat([x, torch.full((1, 1, 2), 7.)], dim=1)
    masked = region_similarity(padded, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(masked, F.pad(z @ z.mT, (0, 1, 0, 1)))
    loss = torch.tensor([[[1., 3.], [3., 5.]], [[8., 0.], [0., 0.]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert mean_similarity_loss(loss, mask) == (12 / 4 + 8) / 2


def test_similarity_in_half_precision_is_computed_in_float32(tiny):
    slide = features(5)
    with torch.no_grad():
        exact = tiny(*slide, return_similarity=True).sim_loss
        with torch.autocast('cpu', torch.bfloat16):
            rounded = tiny(*slide, return_similarity=True).sim_loss
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()


# Attention

def test_rollout_by_hand():
    first = torch.tensor([[[[1., 0.], [0.5, 0.5]], [[0., 1.], [0.5, 0.5]]]])  # mean of heads: all 0.5
    last = torch.tensor([[[[1., 0.], [1., 0.]]]])
    expected = torch.tensor([[[1., 0.], [0.5, 0.5]]]) @ torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    torch.testing.assert_close(attention_rollout([first, last]), expected)


@torch.no_grad()
def test_rollouts_are_shares(tiny):
    slide = features(5)
    rollout = tiny.rollout(*slide)
    assert 0 < rollout.region.sum() < 1
    torch.testing.assert_close(rollout.patch.sum((1, 2)), torch.ones(5))
    share = (rollout.region / rollout.region.sum())[0]
    torch.testing.assert_close(rollout.heat_map.sum((1, 2)), share)
    received = tiny.forward_attention(*slide).patch[-1].mean((1, 2)).view(5, 8, 8)
    torch.testing.assert_close(rollout.heat_map, share[:, None, None] * received)


@torch.no_grad()
def test_explicit_attention_agrees():
    attn = Attention(12, 3, qkv_bias=True)
    x = torch.randn(2, 5, 12)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected, weights = attn(x, mask, True)
    torch.testing.assert_close(attn(x, mask)[0], expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    assert not weights[1, :, :, [2, 4]].any()


@pytest.mark.parametrize('guard', [torch.no_grad, torch.inference_mode])
def test_patch_saliency_is_the_derivative(tiny, guard):
    model = randomised(timm.create_model('conslide_hit_tiny', num_classes=3)).double()
    patches, regions = (x.double() for x in features(2, grid=4))
    with guard():
        saliency = model.patch_saliency(patches.clone(), regions.clone(), class_index=1)
    assert saliency.shape == (2, 4, 4) and (saliency >= 0).all() and saliency.any()
    assert all(p.grad is None for p in model.parameters())

    # Scale one embedding value at a time; the logit's change is gradient times embedding.
    embedded, r = model._embed(patches[None], regions[None], None, True)
    step, total = 1e-5, 0.
    with torch.no_grad():
        for channel in range(64):
            logits = []
            for sign in (1, -1):
                moved = embedded.clone()
                moved[1, 6, channel] *= 1 + sign * step
                logits.append(model.forward_head(model._interact(moved, r, None, 4)[0])[0, 1])
            total += abs(logits[0] - logits[1]) / (2 * step)
    torch.testing.assert_close(saliency[1, 1, 2], total, rtol=1e-4, atol=1e-8)

    predicted = int(model(patches, regions).predicted)
    torch.testing.assert_close(
        model.patch_saliency(patches, regions), model.patch_saliency(patches, regions, class_index=predicted))


# timm's methods

@torch.no_grad()
def test_reset_classifier(tiny):
    model = randomised(timm.create_model('conslide_hit_tiny', num_classes=4))
    slide = features(3)
    before = model(*slide).logits
    model.reset_classifier(6)  # a new task
    assert model.num_classes == 6 and model.get_classifier().out_features == 6
    torch.testing.assert_close(model(*slide).logits[:, :4], before)
    model.reset_classifier(6, keep=False)
    assert (model(*slide).logits[:, :4] - before).abs().max() > 1e-2
    model.reset_classifier(0)
    output = model(*slide)
    assert output.logits.shape == (1, 64) and output.probabilities is None and output.predicted is None
    torch.testing.assert_close(output.logits, model.forward_head(model.forward_features(*slide), pre_logits=True))
    model.reset_classifier(2)
    assert model(*slide).probabilities.shape == (1, 2)


@torch.no_grad()
def test_parts_of_the_forward_are_the_forward(tiny):
    batch = features(3, batch=(2,))
    tokens = tiny.forward_features(*batch)
    assert tokens.shape == (2, 4, 64)
    torch.testing.assert_close(tiny.forward_head(tokens), tiny(*batch).logits)


@pytest.mark.parametrize('options, message', [
    (dict(features_only=True), 'no feature maps'),
    (dict(in_chans=3), 'takes features and not images'),
    (dict(dim=63), r'dim \(63\) must be a multiple of patch_heads \(2\)'),
    (dict(region_heads=3), r'dim \(64\) must be a multiple of .* region_heads \(3\)'),
    (dict(depth=0), 'must be positive'),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('conslide_hit_tiny', **options)


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model('conslide_hit')
    for weight in (model.cls_token, model.head.weight, model.blocks[1].patch_mlp.fc1.weight,
                   model.blocks[0].region_attn.qk.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.blocks[0].patch_attn.proj.bias.any() and not model.head.bias.any()
    bound = 768 ** -0.5  # torch's own: uniform
    assert model.patch_embed.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.blocks[0].pool.conv.weight.std().item() == pytest.approx((384 * 16 * 3) ** -0.5, rel=0.02)


def test_options_take_effect():
    model = ConSlide(depth=3, drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4)
    assert model.head_drop.p == 0.1
    for attn in (model.blocks[0].patch_attn, model.blocks[0].region_attn):
        assert attn.attn_drop.p == 0.3 and attn.proj_drop.p == 0.2
    assert model.blocks[2].patch_mlp.drop2.p == 0.2
    assert [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks] == pytest.approx([0., 0.2, 0.4])


@torch.no_grad()
@pytest.mark.parametrize('way', ['compile', 'export'])
@pytest.mark.filterwarnings('ignore')
def test_captured(tiny, way):
    slide = features(3)
    expected = tiny(*slide).logits
    if way == 'compile':
        torch._dynamo.reset()
        found = torch.compile(tiny, fullgraph=True, backend='aot_eager')(*slide)
        torch.testing.assert_close(found.logits, expected)
    else:  # any number of regions from 2 on
        regions = torch.export.Dim('regions', min=2, max=4096)
        program = torch.export.export(tiny, slide, dynamic_shapes=({0: regions}, {0: regions}))
        torch.testing.assert_close(program.module()(*slide).logits, expected)
        more = features(11)
        torch.testing.assert_close(program.module()(*more).logits, tiny(*more).logits)


@pytest.mark.parametrize('way, similarity', [('checkpointing', True), ('checkpointing', False), ('compile', False)])
def test_ways_to_train_agree(similarity, way):
    """A step on a slide, and a replay step without the patch branch's gradients."""
    model = randomised(timm.create_model('conslide_hit_tiny')).train()
    slide = features(4)
    gradients = []
    for plain in (True, False):
        model.zero_grad()
        model.set_grad_checkpointing(way == 'checkpointing' and not plain)
        call = model
        if way == 'compile' and not plain:
            torch._dynamo.reset()
            call = torch.compile(model, fullgraph=True, backend='aot_eager')
        output = call(*slide, return_similarity=similarity)
        loss = F.cross_entropy(output.logits, torch.tensor([1]))
        if similarity:
            loss = loss + 1e-3 * mean_similarity_loss(output.sim_loss)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][name] is None, name
        else:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert (gradients[0]['patch_embed.weight'] is None) != similarity


# Official checkpoints

def test_checkpoint_of_the_whole_learner():
    case, model = golden()
    official = {f'net.{key}': value for key, value in case.state_dict.items()}
    for checkpoint in (official, {'state_dict': official}):
        found = checkpoint_filter_fn(checkpoint, model)
        assert set(found) == set(model.state_dict())
        assert torch.equal(found['blocks.1.pool.conv.weight'], case.state_dict['blocks.1.convpool.conv.weight'])
    assert set(checkpoint_filter_fn(found, model)) == set(found)


@pytest.mark.parametrize('name', [
    'blocks.0.proj.bias', 'blocks.0.inner_attn.qkv.weight', 'fc3.0.weight', 'net2.head.bias'])
def test_unknown_names_are_refused(name):
    case, model = golden()
    with pytest.raises(ValueError, match=f"'{name}' is no parameter"):
        checkpoint_filter_fn({**case.state_dict, name: torch.zeros(1)}, model)


def test_only_our_own_weights_are_claimed():
    claimed = {
        f'{name}.{tag}' for name, default in conslide.default_cfgs.items() for tag, cfg in default.cfgs.items()
        if cfg.has_weights}
    assert claimed == {'conslide_hit_tiny.procedural_he', 'conslide_hit_tiny.procedural_he_no_replay'}


# Bad input

@pytest.mark.parametrize('patch_shape, region_shape, message', [
    ((5, 64, 128), (5, 128), r'expected patch features \(N, 8, 8, C\) and region features \(N, C\)'),
    ((5, 8, 8, 128), (1, 5, 128), r'expected patch .*, got \(5, 8, 8, 128\) and \(1, 5, 128\)'),
    ((5, 8, 7, 128), (5, 128), 'expected patch features'),
    ((5, 8, 8, 128), (4, 128), 'both feature tensors must describe the same regions'),
    ((5, 8, 8, 96), (5, 96), 'built for 128-dimensional features; use an encoder with 128 outputs'),
    ((5, 8, 8, 128), (5, 96), 'built for 128-dimensional features'),
    ((0, 8, 8, 128), (0, 128), 'slide has no tissue regions'),
    ((5, 3, 3, 128), (5, 128), 'a grid of at least 4 x 4 patches'),
])
def test_bad_shapes(tiny, patch_shape, region_shape, message):
    for call in (tiny, tiny.forward_features, tiny.rollout, tiny.patch_saliency):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(patch_shape), torch.zeros(region_shape))


def test_bad_values(tiny):
    patches, regions = features(4)
    with pytest.raises(ValueError, match='two tensors'):
        tiny(patches)
    for value in (float('nan'), float('inf')):
        bad = patches.clone()
        bad[2, 0, 3, 5] = value
        with pytest.raises(ValueError, match='must be finite: region 2 has'):
            tiny(bad, regions)
        bad = torch.stack([regions, regions])
        bad[1, 3, 0] = value
        with pytest.raises(ValueError, match='region 3 of slide 1'):
            tiny(torch.stack([patches, patches]), bad)
    constant = torch.ones_like(patches), torch.ones_like(regions)
    assert tiny(*constant).logits.isfinite().all()
    with torch.no_grad():
        dead = randomised(timm.create_model('conslide_hit_tiny'))
        dead.region_embed.bias.fill_(-100.)  # ReLU gives zeros
    with pytest.raises(ValueError, match='features are constant'):
        dead(patches, regions, return_similarity=True)
    assert dead(patches, regions).logits.isfinite().all()


def test_bad_masks(tiny):
    batch = features(3, batch=(2,))
    with pytest.raises(ValueError, match=r'mask must be bool \(2, 3\), got torch.float32 \(2, 3\)'):
        tiny(*batch, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r'mask must be bool \(2, 3\), got torch.bool \(2, 4\)'):
        tiny(*batch, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match='no tissue regions: no. 1 of the batch'):
        tiny(*batch, torch.tensor([[True, False, True], [False, False, False]]))
    with pytest.raises(ValueError, match='belongs to a batch'):
        tiny(batch[0][0], batch[1][0], torch.ones(3, dtype=torch.bool))
