"""Gradients, options of training, half precision, pooling by size: what is not plain evaluation in float32."""
import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from tests.tokens.small_models import images, small_model
from vishub import tokens
from vishub.errors import InputError
from vishub.tokens.functional import bipartite_matching, merge, similarity, take_rows, transform, transform_matrix

METHODS = {
    'tome': dict(r=3),
    'random': dict(keep={0: 0.6}),
    'class_attention': dict(keep={0: 0.6}),
    'zero_tprune': dict(keep={0: 0.6}),
    'token_transforming': dict(keep={0: 0.6}),
    'pyra': dict(r=3, lora=2, adapter=2),
}


def test_gradients_of_merging_and_mixing():
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    plan, size = bipartite_matching(torch.randn(2, 9, 4), 3), torch.randint(1, 4, (2, 9)).double()
    for sizes in (None, size):
        assert torch.autograd.gradcheck(lambda v, s=sizes: merge(v, plan, s)[0], (x,))
    metric, anchors = torch.randn(2, 9, 4), torch.tensor([[0, 3, 5], [1, 2, 8]])
    columns = transform_matrix(similarity(take_rows(metric, anchors), metric), anchors).double()
    assert torch.autograd.gradcheck(lambda v: transform(v, columns, size)[0], (x,))


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_with_checkpointing(method):
    """Recomputed blocks must decide as they did the first time, chance included."""
    model, x = tokens.apply(small_model('vit'), method, **METHODS[method]), images()
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(4)
        model(x).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1]) > 5
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_in_half_precision(method):
    model, x = tokens.apply(small_model('eva'), method, **METHODS[method]), images()
    with torch.inference_mode():
        torch.manual_seed(4)
        exact = model(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            torch.manual_seed(4)
            mixed = model(x)
        torch.manual_seed(4)
        half = model.bfloat16()(x.bfloat16())
    assert mixed.dtype == half.dtype == torch.bfloat16
    # A close call may fall the other way in bfloat16; the outputs stay near all the same.
    for rough in (mixed, half):
        assert (rough - exact).abs().max() < 0.5 * exact.abs().max()


@pytest.mark.parametrize('cls, options', [
    (VisionTransformer, {}), (Eva, dict(use_rot_pos_emb=True)),
    (Eva, dict(use_rot_pos_emb=True, rope_type='mixed', attn_type='rope'))])
def test_patch_dropout_comes_first(cls, options):
    torch.manual_seed(0)
    model = cls(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, patch_drop_rate=0.5, **options).train()
    tokens.apply(model, 'tome', r=2)
    with tokens.trace(model) as traces:
        model(images()).sum().backward()
    assert traces[0].start == 9 and [end for _, end in traces[0].counts] == [7, 5, 3]


@pytest.mark.parametrize('name', ['vit_avg', 'qk_norm', 'siglip', 'eva', 'beit', 'nvit_plain'])
def test_pooling_by_size_is_pooling_of_copies(name):
    """A token of size 3 pools like three equal tokens."""
    model = tokens.apply(small_model(name), 'tome', r=2)
    prefix = model.num_prefix_tokens
    x = torch.randn(2, prefix + 4, 64)
    copies = torch.tensor([1] * prefix + [3, 1, 2, 1])
    with torch.inference_mode():
        by_size = model.forward_head(x, size=copies.float().expand(2, -1))
        repeated = x.repeat_interleave(copies, dim=1)
        torch.testing.assert_close(by_size, model.forward_head(repeated, size=torch.ones(repeated.shape[:2])))


def test_proportional_attention_is_attention_to_copies():
    """In the second block, keys of size s must weigh as s keys."""
    model, x = tokens.apply(small_model('vit'), 'tome', r=[5]), images(1)
    with torch.inference_mode(), tokens.trace(model) as traces:
        final = model.forward_features(x)
        step, sizes = traces[0].steps[0], traces[0].sizes(0)[0].long()
        # The merged block's output, copied out to every source, runs through the plain remaining blocks.
        merged = step.after + model.blocks[0].mlp(model.blocks[0].norm2(step.after))
        plain = tokens.remove(model)
        copied = plain.norm(plain.blocks[2](plain.blocks[1](merged.repeat_interleave(sizes, dim=1))))
    torch.testing.assert_close(copied, final.repeat_interleave(sizes, dim=1), rtol=1e-4, atol=1e-5)


def test_views_of_timm_keep_working():
    model, x = tokens.apply(small_model('vit'), 'token_transforming', keep={0: 0.5}), images()
    with torch.inference_mode():
        assert model.get_intermediate_layers(x, n=2, reshape=True)[0].shape == (2, 64, 4, 4)
        out = model.forward_intermediates(x, 1, output_dict=True, return_prefix_tokens=True)
        assert out['image_intermediates_prefix'][0].shape == (2, 1, 64) and out['image_features'].shape == (2, 9, 64)
        early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
        late = model.forward_intermediates(x, [0], intermediates_only=True)
        torch.testing.assert_close(early[0], late[0])
        model.reset_classifier(3, 'avg')
        assert model(x).shape == (2, 3)
        model.prune_intermediate_layers(1)
        assert model(x).shape[1:] == (9, 64)


def test_head_alone_of_images_of_any_size():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=7,
                              class_token=False, global_pool='avg', dynamic_img_size=True).eval()
    larger = images(size=96)
    with torch.inference_mode():
        expected = model(larger)
        tokens.apply(model, 'tome', r=0)
        torch.testing.assert_close(model.forward_head(model.forward_features(larger)), expected)
        tokens.apply(model, 'tome', r=[8])  # 28 tokens could be any picture's own
        with pytest.raises(InputError, match='size='):
            model.forward_head(model.forward_features(larger))
        tokens.apply(model, 'uniform', keep={0: 0.5})
        assert model.forward_head(model.forward_features(larger)).shape == (2, 7)
