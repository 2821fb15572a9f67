"""FMViT: there is no official code, so the reconstruction's invariants are the test.

They are the published parameter counts and operations, the shapes, and that the merged form is the training form.
"""
import copy
import functools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vishub.errors import WeightsNotFoundError
from vishub.models import fmvit
from vishub.models.fmvit import (
    ConvFusionBlock,
    ConvNorm,
    DepthwiseMixer,
    FMViT,
    FrequencyMixBlock,
    GroupMlp,
    LightAttention,
    MergeableConv,
    MultiGroupConv,
    PatchEmbed,
    checkpoint_filter_fn,
    frequency_mix_indices,
)

# name -> parameters deployed, in training form; 1e9 multiply-accumulates deployed, in training form (224, nano: 64 px)
PUBLISHED = {
    'fmvit_nano': (337_560, 567_640, 0.01656, 0.02164),
    'fmvit_tiny': (2_020_472, 3_279_168, 0.3388, 0.4953),
    'fmvit_small': (6_362_296, 10_606_760, 0.8477, 1.3357),
    'fmvit_medium': (12_768_480, 21_527_752, 2.0016, 3.1844),
    'fmvit_base': (24_266_408, 40_824_232, 4.1512, 6.6709),
    'fmvit_large': (35_273_592, 59_927_400, 7.0539, 11.1445),
}
# The sizes of the paper: parameters in millions, 1e9 operations, both rounded to one decimal.
PAPER = {
    'fmvit_tiny': (2.0, 0.3),
    'fmvit_small': (6.4, 0.8),
    'fmvit_medium': (12.8, 2.0),
    'fmvit_base': (24.3, 4.2),
    'fmvit_large': (35.3, 7.1),
}
HEADLESS = {
    'fmvit_tiny': 1_763_472,
    'fmvit_small': 5_913_296,
    'fmvit_medium': 12_191_480,
    'fmvit_base': 23_369_408,
    'fmvit_large': 34_440_592,
}
FORMS = ('training', 'deployed')


@functools.cache
def on_meta(name, **kwargs):
    """The model without storage: enough to count and to follow shapes."""
    with torch.device('meta'):
        return timm.create_model(name, **kwargs).eval()


def num_params(module):
    return sum(p.numel() for p in module.parameters())


def giga_macs(module, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(shape, device='meta'))
    return counter.get_total_flops() / 2e9


def randomised(module):
    """Give every BatchNorm statistics and weights of its own, so that no branch hides behind identity or zero."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.3, 2.)
    return module.eval()


def randomised_model(name):
    """A model with such statistics that fit its own activations, as after training; else 30 blocks would explode."""
    model = randomised(timm.create_model(name, drop_path_rate=0.)).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.9
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 64, 96))
    return model.eval()


def assert_same(actual, expected, relative=1e-5):
    """Equal to `relative` of the largest expected value."""
    assert (actual - expected).abs().max().item() <= relative * expected.abs().max().item()


def merged(module):
    """A merged copy, by timm's function."""
    return reparameterize_model(nn.Sequential(module))[0]


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(1)
    return randomised(timm.create_model('fmvit_tiny'))


# Sizes


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_of_both_forms(name):
    deployed, training, _, _ = PUBLISHED[name]
    assert num_params(on_meta(name, deploy=True)) == deployed
    assert num_params(on_meta(name)) == training


@pytest.mark.parametrize('name', PUBLISHED)
def test_multiply_accumulates_of_both_forms(name):
    _, _, deployed, training = PUBLISHED[name]
    shape = (1, *on_meta(name).default_cfg['input_size'])
    tolerance = 5e-5 if name != 'fmvit_nano' else 5e-6
    assert giga_macs(on_meta(name, deploy=True), *shape) == pytest.approx(deployed, abs=tolerance)
    assert giga_macs(on_meta(name), *shape) == pytest.approx(training, abs=tolerance)


@pytest.mark.parametrize('name', PAPER)
def test_counts_round_to_those_of_the_paper(name):
    model = on_meta(name, deploy=True)
    millions, operations = PAPER[name]
    assert round(num_params(model) / 1e6, 1) == millions
    assert round(giga_macs(model, 1, 3, 224, 224), 1) == operations


@pytest.mark.parametrize(('name', 'operations'), [('fmvit_base', 22.14), ('fmvit_large', 37.44)])
def test_backbone_multiply_accumulates_at_512(name, operations):
    model = on_meta(name, deploy=True, num_classes=0)
    assert giga_macs(model, 1, 3, 512, 512) == pytest.approx(operations, abs=5e-3)


@pytest.mark.parametrize('name', HEADLESS)
def test_headless_parameters(name):
    assert num_params(on_meta(name, deploy=True, num_classes=0)) == HEADLESS[name]


def test_parameters_of_the_parts_of_tiny():
    training, deployed = on_meta('fmvit_tiny'), on_meta('fmvit_tiny', deploy=True)
    assert (num_params(deployed.stem), num_params(training.stem)) == (12_832, 12_920)
    assert [num_params(s) for s in deployed.stages] == [9_936, 50_272, 500_160, 1_189_760]
    assert [num_params(s) for s in training.stages] == [18_336, 86_720, 870_272, 2_033_408]
    assert num_params(deployed.norm) == num_params(training.norm) == 512
    assert num_params(deployed.head) == num_params(training.head) == 257_000
    assert [num_params(b) for b in deployed.stages[2].blocks] == [108_416, 100_096, 100_096, 100_096, 91_456]
    assert [num_params(b) for b in deployed.stages[1].blocks] == [27_072, 23_200]
    block = training.stages[1].blocks[0]
    assert (num_params(block.patch_embed), num_params(block.mixer)) == (1_664, 1_024)


@pytest.mark.parametrize(('name', 'indices'), [
    ('fmvit_nano', [(), (1,), (2,), (0,)]),
    ('fmvit_tiny', [(), (1,), (4,), (2,)]),
    ('fmvit_small', [(), (1,), (4, 9), (2,)]),
    ('fmvit_medium', [(), (1,), (5, 11), (2,)]),
    ('fmvit_base', [(), (1,), (4, 9, 14), (1,)]),
    ('fmvit_large', [(), (2,), (4, 9, 14), (2,)]),
])
def test_places_of_the_frequency_mixing_blocks(name, indices):
    model = on_meta(name)
    found = [
        tuple(i for i, block in enumerate(stage.blocks) if isinstance(block, FrequencyMixBlock))
        for stage in model.stages
    ]
    assert found == indices
    assert found == [frequency_mix_indices(i, len(stage.blocks)) for i, stage in enumerate(model.stages)]


@pytest.mark.parametrize(('width', 'low', 'high'), [
    (64, 32, 32), (96, 64, 32), (128, 64, 64), (192, 96, 96), (224, 128, 96), (256, 128, 128), (288, 160, 128),
    (384, 192, 192), (448, 224, 224), (480, 256, 224), (576, 288, 288), (832, 416, 416), (896, 448, 448),
])
def test_split_into_bands(width, low, high):
    with torch.device('meta'):
        block = FrequencyMixBlock(width, width)
    assert block.attn.proj.branches[0].conv.out_channels == low
    assert block.mixer.identity.num_features == high


def test_hidden_width_rounds_up_where_rounding_down_loses_a_tenth():
    # 3 * 24 = 72 would round to 64, which is less than 0.9 * 72.
    assert GroupMlp(24, 3., (1, 2, 4)).fc1.branches[0].conv.out_channels == 96
    assert GroupMlp(64, 3., (1, 2, 4)).fc1.branches[0].conv.out_channels == 192


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('size', 'maps'), [
    ((224, 224), [(56, 56), (28, 28), (14, 14), (7, 7)]),
    ((97, 131), [(25, 33), (13, 17), (7, 9), (4, 5)]),
    ((32, 32), [(8, 8), (4, 4), (2, 2), (1, 1)]),
    ((33, 47), [(9, 12), (5, 6), (3, 3), (2, 2)]),
])
def test_shapes_for_any_size(form, size, maps):
    model = on_meta('fmvit_tiny', deploy=form == 'deployed')
    x = torch.empty(2, 3, *size, device='meta')
    final, intermediates = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in intermediates] == [(2, c, *hw) for c, hw in zip((24, 64, 128, 256), maps)]
    assert final.shape == intermediates[-1].shape
    assert model(x).shape == (2, 1000)


@pytest.mark.parametrize(('name', 'rate'), [
    ('fmvit_tiny', 0.), ('fmvit_small', 0.), ('fmvit_medium', 0.1), ('fmvit_base', 0.1), ('fmvit_large', 0.2),
])
def test_drop_path_grows_linearly_and_is_halved_in_the_bands(name, rate):
    def probability(module):
        return getattr(module, 'drop_prob', 0.)

    blocks = [block for stage in on_meta(name).stages for block in stage.blocks]
    for block, expected in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
        if isinstance(block, ConvFusionBlock):
            found = [probability(block.drop_path1), probability(block.drop_path2)]
            assert found == pytest.approx([expected, expected])
        else:
            found = [probability(m) for m in (block.drop_path_low, block.drop_path_high, block.drop_path)]
            assert found == pytest.approx([expected / 2, expected / 2, expected])


# The blocks against their formulas


def test_multi_group_conv_is_the_sum_of_its_normalised_group_convs():
    module = randomised(MultiGroupConv(16, 24, (1, 2, 4)))
    x = torch.randn(2, 16, 5, 3)
    expected = sum(
        F.batch_norm(
            F.conv2d(x, b.conv.weight, groups=g), b.bn.running_mean, b.bn.running_var, b.bn.weight, b.bn.bias, eps=1e-5)
        for b, g in zip(module.branches, (1, 2, 4))
    )
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('sr_ratio', [1, 2, 4])
def test_attention_shares_keys_and_values_of_the_pooled_map(fused, sr_ratio):
    attn = randomised(LightAttention(64, sr_ratio=sr_ratio))
    attn.fused_attn = fused
    x = torch.randn(2, 64, 5, 7)
    # Averages by hand: the windows at the right and bottom edges hold fewer pixels.
    pooled = torch.stack([
        torch.stack([x[:, :, i:i + sr_ratio, j:j + sr_ratio].mean((2, 3)) for j in range(0, 7, sr_ratio)], -1)
        for i in range(0, 5, sr_ratio)
    ], -2)
    q, kv = attn.q(x), attn.kv(pooled)
    o = torch.empty_like(q)
    for head in range(2):
        channels = slice(32 * head, 32 * head + 32)
        queries, keys = q[:, channels].flatten(2), kv[:, channels].flatten(2)  # B, 32, tokens
        weights = torch.einsum('bcn,bcm->bnm', queries, keys).div(math.sqrt(32)).softmax(-1)
        o[:, channels] = torch.einsum('bnm,bcm->bcn', weights, keys).reshape(2, 32, 5, 7)
    torch.testing.assert_close(attn(x), attn.proj(o), rtol=1e-4, atol=1e-5)


def test_frequency_mix_block_goes_low_then_high_then_mix():
    block = randomised(FrequencyMixBlock(24, 96, stride=2, sr_ratio=2))
    x = torch.randn(2, 24, 9, 6)
    low = block.patch_embed.proj.bn(F.conv2d(block.patch_embed.pool(x), block.patch_embed.proj.conv.weight))
    low = low + block.attn(low)
    high = block.proj.bn(F.conv2d(low, block.proj.conv.weight))
    high = high + block.mixer(high)
    both = torch.cat([low, high], 1)
    torch.testing.assert_close(block(x), both + block.mlp.fc2(block.mlp.fc1(both).relu()))


def test_conv_fusion_block_is_a_metaformer_block():
    block = randomised(ConvFusionBlock(24, 64, stride=2))
    x = torch.randn(2, 24, 9, 6)
    y = block.patch_embed(x)
    assert y.shape == (2, 64, 5, 3)
    mixer = block.mixer
    y = y + mixer.conv3x3(y) + mixer.conv1x1(y) + mixer.identity(y)
    torch.testing.assert_close(block(x), y + block.mlp.fc2(block.mlp.fc1(y).relu()))


def test_patch_embed_projects_only_where_needed():
    assert isinstance(PatchEmbed(64, 64).proj, nn.Identity)
    assert isinstance(PatchEmbed(64, 64, stride=2).proj, ConvNorm)
    assert isinstance(PatchEmbed(64, 32).proj, ConvNorm)
    assert isinstance(PatchEmbed(64, 32).pool, nn.Identity)


# Reparameterisation


def test_merging_the_worked_example():
    module = MultiGroupConv(4, 4, (1, 2)).eval()
    with torch.no_grad():
        module.branches[0].conv.weight.fill_(1.)
        module.branches[1].conv.weight.copy_(torch.tensor([[1., 2], [3, 4], [5, 6], [7, 8]])[:, :, None, None])
        for branch in module.branches:
            branch.bn.running_var.fill_(1. - branch.bn.eps)
    module.reparameterize()
    expected = torch.tensor([[2., 3, 1, 1], [4, 5, 1, 1], [1, 1, 6, 7], [1, 1, 8, 9]])
    torch.testing.assert_close(module.conv.weight[:, :, 0, 0], expected)
    torch.testing.assert_close(module.conv.bias, torch.zeros(4))


def test_merging_the_depthwise_mixer_centres_its_small_kernels():
    module = DepthwiseMixer(2).eval()
    with torch.no_grad():
        module.conv3x3.conv.weight.copy_(torch.arange(18.).reshape(2, 1, 3, 3))
        module.conv1x1.conv.weight.copy_(torch.tensor([100., 200.]).reshape(2, 1, 1, 1))
        for norm in (module.conv3x3.bn, module.conv1x1.bn, module.identity):
            norm.running_var.fill_(1. - norm.eps)
        module.identity.weight.fill_(2.)
        module.identity.running_mean.fill_(3.)
        module.identity.bias.fill_(1.)
    module.reparameterize()
    expected = torch.arange(18.).reshape(2, 1, 3, 3)
    expected[:, 0, 1, 1] += torch.tensor([102., 202.])
    torch.testing.assert_close(module.conv.weight, expected)
    torch.testing.assert_close(module.conv.bias, torch.tensor([-5., -5.]))


@pytest.mark.parametrize(('module', 'channels'), [
    (lambda: ConvNorm(6, 10, 3, stride=2, act=True), 6),
    (lambda: ConvNorm(8, 8, 1, groups=4), 8),
    (lambda: MultiGroupConv(16, 48, (1, 2, 4)), 16),
    (lambda: MultiGroupConv(48, 24, (4, 1, 3)), 48),
    (lambda: MultiGroupConv(12, 12, (1,)), 12),
    (lambda: DepthwiseMixer(10), 10),
    (lambda: PatchEmbed(10, 20, stride=2), 10),
    (lambda: GroupMlp(24, 3., (1, 2, 4)), 24),
    (lambda: LightAttention(64, sr_ratio=2), 64),
    (lambda: LightAttention(96, sr_ratio=1, cmr_groups=(1, 3)), 96),
    (lambda: ConvFusionBlock(24, 64, stride=2), 24),
    (lambda: ConvFusionBlock(64, 64, cmr_groups=(1, 8)), 64),
    (lambda: FrequencyMixBlock(64, 96, stride=2, sr_ratio=2), 64),
    (lambda: FrequencyMixBlock(64, 64, sr_ratio=4), 64),
], ids=['conv', 'grouped_conv', 'cmr', 'cmr_in_any_order', 'cmr_of_one_group', 'dwrep', 'patch_embed', 'gmlp',
        'rlmhsa', 'rlmhsa_three_groups', 'cfb', 'cfb_eight_groups', 'fmb', 'fmb_same_width'])
def test_every_module_equals_its_merged_form(module, channels):
    module = randomised(module())
    x = torch.randn(2, channels, 7, 10)
    deployed = merged(module)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert all(m.bias is not None for m in deployed.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        assert_same(deployed(x), module(x), relative=1e-5)


@pytest.mark.parametrize('name', PUBLISHED)
def test_every_variant_equals_its_deployed_form(name):
    torch.manual_seed(2)
    model = randomised_model(name)
    x = torch.randn(1, 3, 64, 97)
    deployed = reparameterize_model(model)
    with torch.no_grad():
        assert (deployed(x) - model(x)).abs().max() <= 1e-4
        maps, expected_maps = (m.forward_intermediates(x, intermediates_only=True) for m in (deployed, model))
    for one, other in zip(maps, expected_maps):
        assert_same(one, other)
    assert num_params(deployed) == PUBLISHED[name][0]
    assert num_params(model) == PUBLISHED[name][1], 'the model that was given must stay as it was'


def test_merging_is_exact_in_double_precision():
    model = randomised(timm.create_model('fmvit_nano')).double()
    x = torch.randn(1, 3, 64, 97, dtype=torch.float64)
    with torch.no_grad():
        assert_same(reparameterize_model(model)(x), model(x), relative=1e-13)


def test_deployed_form_after_training_steps():
    model = timm.create_model('fmvit_nano').train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        loss = F.cross_entropy(model(torch.randn(16, 3, 64, 64)), torch.randint(16, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert_same(reparameterize_model(model)(x), model(x))


def test_reparameterize_of_the_whole_model_is_what_timm_does(tiny):
    model = copy.deepcopy(tiny)
    model.reparameterize()
    by_timm = reparameterize_model(tiny)
    assert model.state_dict().keys() == by_timm.state_dict().keys()
    for key, value in by_timm.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_second_call_does_nothing(tiny):
    model = reparameterize_model(tiny)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convs = [m.conv for m in model.modules() if isinstance(m, MergeableConv)]
    model.train()  # even in training mode: there is nothing left to merge
    model.reparameterize()
    assert all(m.conv is conv for m, conv in zip((m for m in model.modules() if isinstance(m, MergeableConv)), convs))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_branches_merged_one_by_one_still_merge_into_one():
    module = randomised(MultiGroupConv(16, 16, (1, 2, 4)))
    x = torch.randn(1, 16, 4, 4)
    expected = module(x)
    module.branches[1].reparameterize()
    assert_same(module(x), expected)
    module.reparameterize()
    assert_same(module(x), expected)


def test_merged_convs_keep_type_and_place():
    model = reparameterize_model(copy.deepcopy(on_meta('fmvit_nano')).to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {'meta'}


def test_device_and_dtype_reach_every_parameter():
    model = FMViT(dims=(24, 64, 96, 128), depths=(1, 2, 3, 1), device='meta', dtype=torch.float64, deploy=True)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.float64)}


def test_deployed_form_trains():
    model = timm.create_model('fmvit_nano', deploy=True)
    assert model.training and all(m.training for m in model.modules())
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('form', FORMS)
def test_torchscript_of_both_forms(tiny, form):
    model = tiny if form == 'training' else reparameterize_model(tiny)
    x = torch.randn(1, 3, 45, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=0, atol=1e-5)


def test_export_of_the_deployed_form_with_free_batch_and_size():
    model = randomised(timm.create_model('fmvit_nano'))
    model.reparameterize()
    side = torch.export.Dim('side', min=2, max=16)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (torch.randn(2, 3, 96, 96),),
            dynamic_shapes=({0: torch.export.Dim('batch', max=64), 2: 32 * side, 3: 32 * side},),
        )
        x = torch.randn(3, 3, 64, 64)
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-5)


# Checkpoints


def test_checkpoints_of_either_form_load_into_their_form(tiny):
    deployed = reparameterize_model(tiny)
    for source, kwargs in ((tiny, {}), (deployed, dict(deploy=True))):
        target = timm.create_model('fmvit_tiny', **kwargs).eval()
        target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target))
        x = torch.randn(1, 3, 40, 40)
        with torch.no_grad():
            assert torch.equal(target(x), source(x))


def test_checkpoints_of_the_other_form_are_refused(tiny):
    deployed = reparameterize_model(tiny)
    before = deployed.stem[0].conv.weight.clone()
    message = r'training form; load it before reparameterize\(\) or build with deploy=False'
    with pytest.raises(RuntimeError, match=message):
        deployed.load_state_dict(tiny.state_dict())
    assert torch.equal(deployed.stem[0].conv.weight, before)
    with pytest.raises(RuntimeError, match=r'deployed form; load it after reparameterize\(\) or build with deploy'):
        copy.deepcopy(tiny).load_state_dict(deployed.state_dict())
    # Also within a wrapper, where the keys have a prefix.
    with pytest.raises(RuntimeError, match=message):
        nn.ModuleDict({'model': deployed}).load_state_dict({f'model.{k}': v for k, v in tiny.state_dict().items()})


def test_parts_of_a_checkpoint_load_without_strict(tiny):
    model = timm.create_model('fmvit_tiny', deploy=True)
    head = {key: value for key, value in tiny.state_dict().items() if key.startswith('head')}
    model.load_state_dict(head, strict=False)
    assert torch.equal(model.head.fc.weight, tiny.head.fc.weight)


def test_next_vit_checkpoints_are_refused(tiny):
    timm_layout = timm.create_model('nextvit_small').state_dict()
    authors_layout = {'stem.0.conv.weight': torch.empty(0), 'features.0.mhca.group_conv3x3.weight': torch.empty(0)}
    for state_dict in (timm_layout, authors_layout, {'proj_head.0.weight': torch.empty(0)}):
        with pytest.raises(ValueError, match='nextvit'):
            checkpoint_filter_fn(state_dict, tiny)


# Bad input and options


@pytest.mark.parametrize('size', [(31, 64), (64, 31), (16, 16)])
def test_too_small_images_are_refused(tiny, size):
    x = torch.randn(1, 3, *size)
    message = f'fmvit: input must be at least 32x32, got {size[0]}x{size[1]}'
    for call in (tiny, tiny.forward_features, tiny.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            call(x)
    with pytest.raises(ValueError, match=message):
        timm.create_model('fmvit_nano', features_only=True)(x)


@pytest.mark.parametrize('groups', [(2, 4), (1, 5), (1, 0), (), (1, -2)])
def test_cmr_groups_that_do_not_fit_are_refused(groups):
    with pytest.raises(ValueError, match='cmr_groups must contain 1 and divide every width'):
        timm.create_model('fmvit_nano', cmr_groups=groups)


@pytest.mark.parametrize(('kwargs', 'stage', 'width'), [
    (dict(dims=(24, 32, 96, 128)), 2, 32),
    (dict(dims=(24, 64, 96, 32)), 4, 32),
    (dict(dims=(24, 64, 96, 128), head_dim=48), 2, 64),
])
def test_widths_that_do_not_split_are_refused(kwargs, stage, width):
    with pytest.raises(ValueError, match=f'stage {stage} .*width {width} '):
        FMViT(depths=(1, 2, 3, 1), **kwargs)


def test_wrong_number_of_stages_is_refused():
    with pytest.raises(ValueError, match='four values'):
        FMViT(dims=(24, 64, 128), depths=(1, 1, 1))


def test_merging_in_training_mode_is_refused(tiny):
    model = copy.deepcopy(tiny).train()
    before = model.state_dict().keys()
    for call in (model.reparameterize, lambda: reparameterize_model(model)):
        with pytest.raises(RuntimeError, match='eval mode'):
            call()
    assert model.state_dict().keys() == before


def test_pretrained_says_that_there_are_no_weights():
    with pytest.raises(WeightsNotFoundError, match="no pretrained weights for 'fmvit_large'"):
        timm.create_model('fmvit_large', pretrained=True)


def test_one_group_is_a_plain_network():
    model = on_meta('fmvit_tiny', cmr_groups=(1,))
    # Against the merged form: one BatchNorm (2 per channel) for each bias, so one more per output channel; and DWRep.
    deployed = on_meta('fmvit_tiny', deploy=True)
    mixers = [m for m in model.modules() if isinstance(m, DepthwiseMixer)]
    convs = [m for m in deployed.modules() if isinstance(m, nn.Conv2d)]
    dense = sum(m.out_channels for m in convs if m.groups == 1)
    mixed = sum(m.identity.num_features for m in mixers)
    assert num_params(model) == num_params(deployed) + dense + 6 * mixed


def test_gradient_checkpointing_changes_nothing(tiny):
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = copy.deepcopy(tiny)
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_it_says_that_it_is_a_reconstruction():
    assert 'reconstruction' in fmvit.__doc__
    assert 'reconstruction' in timm.create_model('fmvit_nano').default_cfg['paper_name']
