"""Reduction never looks at values: no host synchronisation, no shapes from data, no loop over images or tokens."""
import collections

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tokens.small_models import FAMILIES, images, small_model
from vishub import tokens
from vishub.errors import InputError

METHODS = {
    'tome': dict(r=3),
    'pyra': dict(r=3, lora=0),
    'zero_tprune': dict(keep={0: 0.7, 1: 0.6}, votes=5),
    'token_transforming': dict(keep={0: 0.7, 1: 0.6}),
    'class_attention': dict(keep={0: 0.7, 1: 0.6}),
    'random': dict(keep={0: 0.7}),
    'uniform': dict(keep={0: 0.7}),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.filterwarnings('ignore:token_transforming. this model has no class token')
def test_runs_without_values(name, method):
    """Meta tensors have none: `.item()`, `nonzero` or an `if` on a tensor raise there."""
    model = small_model(name)
    try:
        tokens.apply(model, method, **METHODS[method])
    except InputError as error:
        assert 'class token' in str(error) and method == 'class_attention'
        return
    model, x = model.to('meta'), torch.empty(3, 3, 64, 64, device='meta')
    with torch.inference_mode(), tokens.trace(model) as traces:
        logits = model(x)
    assert logits.is_meta and len(logits) == 3
    assert tokens.macs(model).tokens_end == [end for _, end in traces[0].counts]


class _Counter(TorchDispatchMode):
    """What runs, and the shapes it makes."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.shapes.add(tuple(out.shape))
        return out


def operations(model, batch, size):
    with torch.no_grad(), _Counter() as counter:
        model(torch.zeros(batch, 3, size, size))
    return counter.calls


@pytest.mark.parametrize('method', METHODS)
def test_no_loop_over_images_or_tokens(method):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=7, dynamic_img_size=True).eval()
    tokens.apply(model, method, **METHODS[method])
    assert operations(model, 2, 96) == operations(model, 5, 96)
    assert operations(model, 2, 96) == operations(model, 2, 128)


@pytest.mark.parametrize('method, materialised', [
    ('tome', 0), ('class_attention', 0), ('token_transforming', 0), ('zero_tprune', 2)])
@pytest.mark.parametrize('name', ['vit', 'eva02', 'beit', 'nvit'])
def test_attention_is_fused_but_where_its_matrix_is_needed(name, method, materialised, monkeypatch):
    model, fused = small_model(name), []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *a, **k: fused.append(1) or attention(*a, **k))
    tokens.apply(model, method, **METHODS[method])
    with torch.inference_mode(), _Counter() as counter:
        model(images())
    assert len(fused) == 3 - materialised
    prefix = model.num_prefix_tokens
    if not materialised and name != 'beit':  # whose bias has this shape
        assert not any(shape[-2:] == (16 + prefix,) * 2 for shape in counter.shapes), 'a whole attention matrix'


# Those that the installed timm has: older ones lack some.
@pytest.mark.parametrize('name', [name for name in (
    'vit_small_patch16_224', 'deit_small_distilled_patch16_224', 'deit3_small_patch16_224',
    'vit_small_patch14_reg4_dinov2', 'vit_base_patch16_clip_224', 'vit_base_patch16_siglip_224',
    'eva02_tiny_patch14_224', 'eva02_base_patch16_clip_224', 'beit_base_patch16_224', 'vit_small_patch16_dinov3',
    'vit_small_patch16_rope_mixed_ape_224') if name in timm.list_models()])
def test_published_architectures(name):
    """At full size, without a weight in memory."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    full = tokens.macs(model).total
    for method in ('tome', 'zero_tprune'):
        tokens.apply(model, method, macs=0.65)
        assert 0.6 * full < tokens.macs(model).total <= 0.65 * full
        with torch.inference_mode():
            assert model(torch.empty(2, *model.pretrained_cfg['input_size'], device='meta')).shape[0] == 2
