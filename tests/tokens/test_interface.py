"""apply, config, reduced, macs, schedule, restore, visualize: results and refusals."""
import functools
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from tests.tokens.small_models import images, small_model
from vishub import tokens
from vishub.errors import InputError


@functools.cache
def full_size(name):
    with torch.device('meta'):
        return timm.create_model(name)


def deit_small():
    """On the meta device, not reduced."""
    return tokens.remove(full_size('deit_small_patch16_224'))


@pytest.mark.parametrize('method, config, message', [
    ('tome', dict(r=-1), 'r is -1'),
    ('tome', dict(r=[1] * 4), 'r has 4 entries'),
    ('tome', dict(r=1.5), 'r is 1.5'),
    ('tome', dict(), 'r='),
    ('tome', dict(r=1, prop_attn='yes'), "prop_attn is 'yes'"),
    ('tome', dict(r=1, prop_atn=True), "nearest: 'prop_attn'"),
    ('tomee', dict(r=1), "nearest: 'tome'"),
    ('random', dict(), 'tokens_after='),
    ('random', dict(tokens_after={0: 9}, keep={0: 0.5}), 'either'),
    ('random', dict(tokens_after={3: 9}), 'block index'),
    ('random', dict(tokens_after={0: 1}), '2 or more'),
    ('random', dict(tokens_after={0: 18}), 'only 17 tokens reach block 0'),
    ('random', dict(tokens_after={0: 9, 1: 10}), 'cannot grow'),
    ('random', dict(keep={0: 0.}), r'keep\[0\] is 0'),
    ('random', dict(keep={0: 1.01}), r'keep\[0\] is 1.01'),
    ('random', dict(keep=0.5), 'must be a dict'),
    ('random', dict(macs=0.), 'macs is 0'),
    ('random', dict(macs=1.2), 'macs is 1.2'),
    ('random', dict(macs=0.01), 'cannot be met'),
    ('random', dict(macs=0.5, keep={0: 0.5}), 'leave out macs'),
])
def test_bad_configurations_change_nothing(method, config, message):
    model = small_model('vit')
    with pytest.raises(InputError, match=message):
        tokens.apply(model, method, **config)
    assert type(model) is VisionTransformer and tokens.config(model) is None
    tokens.apply(model, 'tome', r=1)
    with pytest.raises(InputError):
        tokens.apply(model, method, **config)
    assert tokens.config(model) == dict(method='tome', r=[1, 1, 1], prop_attn=True)


def test_config_can_be_applied_again_and_the_last_one_counts():
    model = tokens.apply(small_model('vit'), 'tome', r=(2, -1.))
    assert tokens.config(model) == dict(method='tome', r=[4, 2, 0], prop_attn=True)
    tokens.apply(model, **tokens.config(model))
    assert tokens.config(model)['r'] == [4, 2, 0]
    tokens.apply(model, 'uniform', keep={1: 0.5})
    assert tokens.config(model) == dict(method='uniform', keep={1: 0.5})
    assert type(tokens.remove(model)) is VisionTransformer


def test_config_comes_back_from_json():
    model = tokens.apply(small_model('vit'), 'zero_tprune', tokens_after={0: 9, 1: 7}, votes={0: 3}, similar={0: 2})
    kept = tokens.config(model)
    again = json.loads(json.dumps(kept))
    assert '0' in again['tokens_after']
    assert tokens.config(tokens.apply(model, **again)) == kept
    with pytest.raises(InputError, match="block index in tokens_after is 'first'"):
        tokens.apply(model, 'uniform', tokens_after={'first': 9})


def test_context_manager_gives_back_what_was_there():
    model = small_model('vit')
    with tokens.reduced(model, 'tome', r=2):
        with tokens.reduced(model, 'uniform', keep={0: 0.5}):
            assert tokens.config(model)['method'] == 'uniform'
        assert tokens.config(model)['method'] == 'tome'
    assert type(model) is VisionTransformer


def test_half_is_the_most_that_merges_and_a_warning_says_so():
    model = small_model('vit')
    with pytest.warns(UserWarning, match='8 of them merge, not r=100'):
        tokens.apply(model, 'tome', r=100)
    assert tokens.macs(model).tokens_end == [9, 5, 3]
    with torch.inference_mode():
        assert model(images()).isfinite().all()


def test_reduction_behind_the_last_block_is_pointed_out():
    with pytest.warns(UserWarning, match='behind the last block'):
        tokens.apply(small_model('vit'), 'random', keep={2: 0.5})


@pytest.mark.parametrize('name, full, r8, r13', [
    ('deit_tiny_patch16_224', 1.2537, 0.9244, 0.7312), ('deit_small_patch16_224', 4.5989, 3.4165, 2.7027)])
def test_macs_are_the_published_ones(name, full, r8, r13):
    model = tokens.remove(full_size(name))
    assert round(tokens.macs(model).total / 1e9, 4) == full
    for r, expected in ((8, r8), (13, r13)):
        count = tokens.macs(tokens.apply(model, 'tome', r=r))
        assert round(count.total / 1e9, 4) == expected
        assert count.tokens_end[-1] == count.tokens_mid[-1] == 197 - 12 * r
        assert 0 < count.overhead < 0.01 * count.total


@pytest.mark.parametrize('method, layers, macs, expected', [
    ('random', [3, 6, 9], 0.653, [131, 87, 58]), ('class_attention', [3, 6, 9], 0.653, [139, 98, 70]),
    ('random', [3, 6, 9], 0.6, [117, 70, 42]), ('class_attention', [3, 6, 9], 0.6, [127, 82, 53]),
    ('random', None, 0.653, [158, 127, 102, 82]), ('class_attention', None, 0.653, [162, 133, 110, 91]),
    ('random', None, 0.6, [150, 115, 88, 68]), ('class_attention', None, 0.6, [155, 122, 97, 77]),
])
def test_schedule_of_stages(method, layers, macs, expected):
    model = deit_small()
    found = tokens.schedule(model, method, macs=macs, layers=layers)
    assert list(found['tokens_after'].values()) == expected
    full = tokens.macs(model).total
    assert tokens.macs(tokens.apply(model, method, **found)).total <= macs * full


@pytest.mark.parametrize('macs', [1., 0.8, 0.6, 0.35])
def test_schedule_of_merging_is_the_largest_that_fits(macs):
    model = deit_small()
    full = tokens.macs(model).total
    r = tokens.schedule(model, 'tome', macs=macs)['r']
    assert tokens.macs(tokens.apply(model, 'tome', r=r)).total <= macs * full
    if sum(r):
        last = max(i for i, count in enumerate(r) if count == max(r))
        fewer = [count - (i == last) for i, count in enumerate(r)]
        assert tokens.macs(tokens.apply(model, 'tome', r=fewer)).total > macs * full


def test_schedule_by_final_tokens():
    model = deit_small()
    assert tokens.schedule(model, 'tome', tokens_after=41)['r'] == [13] * 12
    assert tokens.schedule(model, 'random', tokens_after=50, layers=[5]) == dict(tokens_after={5: 50})


def test_macs_equal_the_layers_that_run():
    """Against torch's own counter, which sees what is executed (attention unfused, so that it is seen)."""
    from torch.utils.flop_counter import FlopCounterMode
    for name in ('vit', 'siglip', 'eva02', 'beit', 'nvit', 'deit_distilled'):
        model = tokens.apply(small_model(name).requires_grad_(False), 'uniform', keep={0: 0.6, 1: 0.5})
        for module in model.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = False
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images(1))
        assert counter.get_total_flops() == 2 * tokens.macs(model).total, name


def reduced_trace(method, **config):
    model = tokens.apply(small_model('vit'), method, **config)
    with torch.inference_mode(), tokens.trace(model) as traces:
        features, maps = model.forward_intermediates(images(), output_fmt='NLC', return_prefix_tokens=True)
    return model, traces[0], maps


def test_trace_and_restore_of_merging():
    _, trace, maps = reduced_trace('tome', r=4)
    assert trace.counts == [(13, 13), (9, 9), (5, 5)]
    groups, sizes, matrix = trace.assignment(), trace.sizes(), trace.matrix()
    assert groups.shape == (2, 17) and matrix.shape == (2, 5, 17) and sizes.sum(1).tolist() == [17, 17]
    torch.testing.assert_close(matrix.sum(2), sizes)
    assert torch.equal(matrix.argmax(1), groups)
    assert trace.importance() is None
    y = torch.randn(2, 5, 8)
    torch.testing.assert_close(tokens.restore(y, trace), matrix.transpose(1, 2) @ y)
    patches, prefix = maps[2]  # every patch carries the value of its group
    full = torch.cat([prefix, patches], dim=1)
    for image in range(2):
        for group in range(5):
            rows = full[image, groups[image] == group]
            assert (rows == rows[0]).all()


def test_restore_of_pruning():
    _, trace, _ = reduced_trace('class_attention', keep={0: 0.5, 1: 0.5})
    groups = trace.assignment()
    assert ((groups >= 0).sum(1) == 5).all() and groups.min() == -1
    scores = trace.importance(0)
    assert scores.shape == (2, 17) and trace.importance(2) is None
    kept = trace.assignment(0)[:, 1:] >= 0
    assert (scores[:, 1:][kept].view(2, -1).amin(1) >= scores[:, 1:][~kept].view(2, -1).amax(1)).all()
    y = torch.randn(2, 5, 64)
    zero = tokens.restore(y, trace, pruned='zero')
    torch.testing.assert_close(zero, trace.matrix().transpose(1, 2) @ y)
    last = tokens.restore(y, trace, pruned='last')
    gone_first = trace.assignment(0) < 0
    torch.testing.assert_close(last[gone_first], trace.steps[0].before[gone_first])
    nearest = tokens.restore(y, trace, pruned='nearest')
    for image in range(2):
        values = {tuple(row.tolist()) for row in y[image]}
        assert all(tuple(row.tolist()) in values for row in nearest[image])
    for full in (zero, last, nearest):
        torch.testing.assert_close(full[groups >= 0].sum(0), y.sum((0, 1)))
    with pytest.raises(InputError, match='pruned is'):
        tokens.restore(y, trace, pruned='first')
    with pytest.raises(InputError, match='left'):
        tokens.restore(y[:, 1:], trace)
    with pytest.raises(InputError, match='wide'):
        tokens.restore(y[..., :3], trace)


def test_only_this_thread_and_this_model_are_recorded():
    model, other = tokens.apply(small_model('vit'), 'tome', r=2), tokens.apply(small_model('vit'), 'tome', r=2)
    with torch.inference_mode(), tokens.trace(model) as outer:
        model(images())
        other(images())
        with tokens.trace(model) as inner:
            model(images())
    model(images())
    assert (len(outer), len(inner)) == (2, 1)
    with pytest.raises(InputError, match='not reduced'), tokens.trace(tokens.remove(model)):
        pass


def test_head_alone_needs_the_sizes_of_merged_tokens():
    model = tokens.apply(small_model('vit_avg'), 'tome', r=3)
    with torch.inference_mode(), tokens.trace(model) as traces:
        features = model.forward_features(images())
        with pytest.raises(InputError, match='size='):
            model.forward_head(features)
        torch.testing.assert_close(model.forward_head(features, size=traces[0].sizes()), model(images()))


@pytest.mark.parametrize('method, config', [('tome', dict(r=4)), ('uniform', dict(keep={0: 0.5}))])
def test_picture(method, config):
    _, trace, _ = reduced_trace(method, **config)
    pixels = np.random.default_rng(0).integers(0, 200, (64, 80, 3), dtype=np.uint8)
    picture = np.asarray(tokens.visualize(Image.fromarray(pixels), trace, index=1))
    assert picture.shape == pixels.shape
    groups = trace.assignment()[1, 1:].view(4, 4).numpy()
    members = np.bincount(groups[groups >= 0], minlength=17)
    for row in range(4):
        for column in range(4):
            inner = (slice(row * 16, row * 16 + 15), slice(column * 20, column * 20 + 19))
            group = groups[row, column]
            if group < 0:
                np.testing.assert_allclose(picture[inner], pixels[inner] * 0.25, atol=0.51)
            elif members[group] == 1:
                np.testing.assert_array_equal(picture[inner], pixels[inner])
            else:
                assert len(np.unique(picture[inner].reshape(-1, 3), axis=0)) == 1
    with pytest.raises(InputError, match='smaller'):
        tokens.visualize(Image.new('RGB', (3, 3)), trace)
    with pytest.raises(InputError, match='index'):
        tokens.visualize(Image.new('RGB', (64, 64)), trace, index=2)


def test_own_methods_can_be_registered():
    class First(tokens.Method):
        """Keeps the first patches."""

        def reduce(self, x, state, seen):
            keep = torch.arange(seen.count, device=x.device).expand(x.shape[0], -1)
            return tokens.keep_tokens(x, state, keep, seen.record)

    tokens.register_method('first', First)
    _, trace, _ = reduced_trace('first', tokens_after={1: 6})
    assert trace.assignment()[0].tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 11
    with pytest.raises(InputError, match='registered already'):
        tokens.register_method('tome', First)
    with pytest.raises(InputError, match='lacks prepare'):
        tokens.register_method('nothing', int)
