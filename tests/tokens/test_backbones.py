"""Every supported family: the loop is timm's forward, reduction works on it, and `remove` leaves no trace."""
import copy
import io
import threading

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer, checkpoint_filter_fn

from tests.tokens.small_models import DIMS, FAMILIES, images, small_model
from vishub import tokens
from vishub.errors import InputError
from vishub.models.nvit import NViT

ALL = list(FAMILIES)
CONFIGS = {
    'tome': dict(r=3),
    'random': dict(keep={0: 0.7, 1: 0.6}),
    'uniform': dict(keep={0: 0.7, 1: 0.6}),
    'class_attention': dict(keep={0: 0.7, 1: 0.6}),
}


def has_class_token(name):
    return name not in ('vit_avg', 'siglip')


@pytest.mark.parametrize('name', ALL)
def test_loop_is_the_model_and_remove_restores_it(name):
    model, x = small_model(name), images()
    state = copy.deepcopy(model.state_dict())
    attributes, model_type = set(vars(model)), type(model)
    with torch.inference_mode():
        logits, features = model(x), model.forward_features(x)
        final, maps = model.forward_intermediates(x, [0, 2], norm=True)
        tokens.apply(model, 'tome', r=0)
        torch.testing.assert_close(model(x), logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.forward_features(x), features, rtol=1e-5, atol=2e-6)
        for got, expected in zip(model.forward_intermediates(x, [0, 2], norm=True)[1], maps):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
        tokens.apply(model, 'tome', r=2)
        assert isinstance(model, model_type) and model.state_dict().keys() == state.keys()
        reduced = model(x)
        assert reduced.shape == logits.shape and not torch.allclose(reduced, logits, atol=1e-3)
        assert tokens.remove(model) is model
        assert torch.equal(model(x), logits)
    assert type(model) is model_type and set(vars(model)) == attributes and tokens.config(model) is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('method', CONFIGS)
@pytest.mark.parametrize('name', ALL)
def test_methods_reduce_every_family(name, method):
    model, x = small_model(name), images(3)
    if method == 'class_attention' and not has_class_token(name):
        with pytest.raises(InputError, match='no class token'):
            tokens.apply(model, method, **CONFIGS[method])
        return
    tokens.apply(model, method, **CONFIGS[method])
    prefix = model.num_prefix_tokens
    with torch.inference_mode(), tokens.trace(model) as traces:
        torch.manual_seed(3)
        logits = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    trace = traces[0]
    patches = [13, 10, 7] if method == 'tome' else [12, 8, 8]
    assert [end - prefix for _, end in trace.counts] == patches
    assert tokens.macs(model).tokens_end == [end for _, end in trace.counts]
    assert [tuple(m.shape) for m in maps] == [(3, 64, 4, 4)] * 3
    assert (trace.assignment()[:, :prefix] == torch.arange(prefix)).all()
    if method == 'random':
        return
    # An image alone gives what it gives in a batch.
    with torch.inference_mode():
        torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['eva02', 'eva_rope_mixed', 'beit', 'beit_shared', 'nvit'])
def test_pruned_tokens_keep_their_positions(name):
    """Uniform pruning to every token changes nothing; moving tokens must move their rotary rows, biases and scales."""
    model, x = small_model(name), images()
    prefix = model.num_prefix_tokens

    class Shuffle(tokens.Method):
        place = 'end'

        def count(self, layer, count):
            return count - 1 if layer == 0 else count

        def reduce(self, x, state, seen):
            # Drop the last patch, and turn the order of the others round: attention cannot see the order.
            order = torch.cat([torch.arange(prefix), torch.arange(x.shape[1] - 2, prefix - 1, -1)])
            return tokens.keep_tokens(x, state, order.expand(x.shape[0], -1), seen.record)

    class Drop(Shuffle):
        def reduce(self, x, state, seen):
            order = torch.arange(x.shape[1] - 1)
            return tokens.keep_tokens(x, state, order.expand(x.shape[0], -1), seen.record)

    outputs = []
    for cls in (Shuffle, Drop):
        tokens.register_method(f'{name}_{cls.__name__}', cls)
        tokens.apply(model, f'{name}_{cls.__name__}', keep={})
        with torch.inference_mode():
            outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['vit', 'eva02', 'beit', 'nvit'])
def test_unfused_attention_is_the_same(name):
    model, x = small_model(name), images()
    tokens.apply(model, 'tome', r=3)
    with torch.inference_mode():
        expected = model(x)
        for block in model.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['vit', 'eva_rope_mixed', 'beit'])
def test_copies_pickles_and_threads(name):
    model, x = small_model(name), images()
    tokens.apply(model, 'tome', r=3)
    with torch.inference_mode():
        expected = model(x)
    buffer = io.BytesIO()
    with tokens.trace(model):  # a copy does not record for somebody else
        torch.save(model, buffer)
        twin = copy.deepcopy(model)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    results = {}

    def run(key, model, x):
        with torch.inference_mode():
            results[key] = model(x)

    threads = [threading.Thread(target=run, args=(i, model, x[i % 2:i % 2 + 1])) for i in range(4)]
    for thread in threads:
        thread.start()
    run('twin', twin, x)
    run('loaded', loaded, x)
    for thread in threads:
        thread.join()
    for key in ('twin', 'loaded'):
        torch.testing.assert_close(results[key], expected, rtol=0, atol=0)
    for i in range(4):
        torch.testing.assert_close(results[i], expected[i % 2:i % 2 + 1], rtol=1e-4, atol=1e-5)
    assert tokens.config(loaded) == tokens.config(model)
    tokens.remove(twin)
    assert tokens.config(model) is not None  # a copy is another model


@pytest.mark.parametrize('name', ['vit', 'eva02', 'beit_shared', 'nvit'])
def test_gradient_checkpointing(name):
    model, x = small_model(name), images()
    tokens.apply(model, 'tome', r=3)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 20
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_autocast_and_half_keep_decisions_in_float32():
    model, x = small_model('vit'), images()
    tokens.apply(model, 'tome', r=3)
    with torch.inference_mode(), tokens.trace(model) as traces:
        exact = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            rough = model(x)
        model.bfloat16()
        half = model(x.bfloat16())
    assert rough.dtype == half.dtype == torch.bfloat16
    assert all(trace.sizes().dtype == torch.float32 for trace in traces)
    assert (rough - exact).abs().max() < 0.5 and (half - exact).abs().max() < 0.5


def test_any_image_size():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=7, dynamic_img_size=True).eval()
    tokens.apply(model, 'class_attention', keep={0: 0.5})
    with torch.inference_mode(), tokens.trace(model) as traces:
        model(torch.randn(1, 3, 96, 48))
        maps = model.forward_intermediates(torch.randn(1, 3, 96, 48), 1, intermediates_only=True)
    assert traces[0].counts[-1] == (10, 10) and traces[0].grid == (6, 3)
    assert maps[0].shape == (1, 64, 6, 3)
    assert tokens.macs(model, (96, 48)).tokens_end[-1] == 10
    tokens.apply(model, 'class_attention', tokens_after={0: 19})  # more than the 17 of the model's own size
    with torch.inference_mode(), tokens.trace(model) as traces:
        model(torch.randn(1, 3, 96, 96))
    assert traces[0].counts[-1] == (19, 19)
    with pytest.raises(InputError, match='only 5 tokens reach block 0'):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('method, config', [
    ('tome', dict(r=3)), ('zero_tprune', dict(keep={0: 0.6})), ('token_transforming', dict(keep={0: 0.6}))])
@pytest.mark.parametrize('name', ['eva02', 'eva_rope_mixed', 'nvit'])
def test_positions_of_other_image_sizes(name, method, config):
    """Rotary rows and scales are made for the picture at hand; with reduction off it is timm's forward there too."""
    x = torch.randn(2, 3, 96, 48)
    if name == 'nvit':
        model = NViT(img_size=64, num_classes=7, dims=DIMS, attn_scale=0.2, dynamic_img_size=True).eval()
    else:
        torch.manual_seed(0)
        mixed = dict(attn_type='rope', rope_type='mixed', num_reg_tokens=2) if name == 'eva_rope_mixed' else {}
        model = Eva(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, use_rot_pos_emb=True,
                    dynamic_img_size=True, **mixed).eval()
    with torch.inference_mode():
        logits = model(x)
        torch.testing.assert_close(tokens.apply(model, 'tome', r=0)(x), logits, rtol=1e-5, atol=1e-5)
        tokens.apply(model, method, **config)
        with tokens.trace(model) as traces:
            alone = model(x[:1])
        torch.testing.assert_close(model(x)[:1], alone, rtol=1e-4, atol=1e-5)
        maps = model.forward_intermediates(x, 1, intermediates_only=True)
    prefix = model.num_prefix_tokens
    assert traces[0].counts[0][1] - prefix == (15 if method == 'tome' else 11) and traces[0].grid == (6, 3)
    assert maps[0].shape == (2, 64, 6, 3)


@pytest.mark.parametrize('method', ['tome', 'zero_tprune', 'token_transforming', 'pyra'])
def test_published_checkpoints_load_by_timms_own_loader(method, tmp_path):
    """Facebook's DeiT files say {'model': ...}; timm resamples position embeddings of another size on the way."""
    model, source = small_model('deit_distilled'), small_model('deit_distilled')
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.25)
    torch.save({'model': source.state_dict()}, tmp_path / 'deit.pth')
    strict = method != 'pyra'  # which has parameters of its own
    config = dict(r=3) if method in ('tome', 'pyra') else dict(keep={0: 0.7})
    tokens.apply(model, method, **config)
    timm.models.load_checkpoint(model, str(tmp_path / 'deit.pth'), strict=strict)
    with torch.inference_mode():
        torch.testing.assert_close(tokens.remove(model)(images()), source(images()))
        larger = VisionTransformerDistilled(
            img_size=96, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=7).eval()
        tokens.apply(larger, method, **config)
        timm.models.load_checkpoint(
            larger, str(tmp_path / 'deit.pth'), strict=strict, filter_fn=checkpoint_filter_fn)
        torch.testing.assert_close(larger.head.weight, source.head.weight)
        assert larger(images(size=96)).isfinite().all()


def test_what_cannot_be_reduced_is_refused():
    sizes = dict(img_size=64, patch_size=16, embed_dim=64, depth=1, num_heads=2)
    for block in (ResPostBlock, ParallelScalingBlock):
        with pytest.raises(InputError, match=block.__name__):
            tokens.apply(VisionTransformer(**sizes, block_fn=block), 'tome', r=1)
    with pytest.raises(InputError, match='resnet'):
        tokens.apply(timm.create_model('test_resnet'), 'tome', r=1)

    class Patched(VisionTransformer):
        def forward_features(self, x):
            return x

    with pytest.raises(InputError, match='its own forward_features'):
        tokens.apply(Patched(**sizes), 'tome', r=1)
    hooked = VisionTransformer(**sizes)
    hooked.forward = lambda x: x  # another library's patch of this one object
    with pytest.raises(InputError, match='its own forward .another patch'):
        tokens.apply(hooked, 'tome', r=1)
    with pytest.raises((InputError, AssertionError), match='Prr|^$'):  # timm 1.0.20 refuses it itself, without a word
        tokens.apply(VisionTransformer(**sizes, global_pool='prr'), 'tome', r=1)
    model = tokens.apply(small_model('vit'), 'tome', r=1)
    with pytest.raises(InputError, match='attn_mask'):
        model(images(), is_causal=True)
