"""Conversion of timm ViTs, dependency groups, saliency, and the exactness of dense export."""
import pytest
import timm
import torch

from vishub.errors import InputError
from vishub.models.nvit import NViT
from vishub.pruning.structure import BLOCK_KINDS, EMB, Structure, as_nvit, nvit_args

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=5)
TIMM = {
    'plain': ('vit_tiny_patch16_224', {}),
    'distilled': ('deit_tiny_distilled_patch16_224', {}),
    'registers and average': ('vit_tiny_patch16_224', dict(reg_tokens=2, global_pool='avg', no_embed_class=True)),
    'layer scale, no qkv bias': ('vit_tiny_patch16_224', dict(init_values=0.3, qkv_bias=False)),
    'pre-norm (CLIP)': ('vit_tiny_patch16_224', dict(pre_norm=True, act_layer='quick_gelu')),
    'no class token, grey': ('vit_tiny_patch16_224', dict(class_token=False, global_pool='avg', in_chans=1)),
}


def timm_model(name):
    architecture, kwargs = TIMM[name]
    model = timm.create_model(architecture, **SMALL, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at its neutral initial value
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images_for(model, batch=3):
    return torch.randn(batch, model.patch_embed.proj.in_channels, 32, 32)


@pytest.mark.parametrize('name', TIMM)
def test_as_nvit_computes_the_same(name):
    model = timm_model(name)
    nvit, images = as_nvit(model), images_for(model)
    assert type(nvit) is NViT
    torch.testing.assert_close(nvit(images), model(images), rtol=1e-5, atol=1e-5)
    again = NViT(**nvit_args(nvit)).eval()
    again.load_state_dict(nvit.state_dict())
    torch.testing.assert_close(again(images), nvit(images))


@pytest.mark.parametrize(('architecture', 'kwargs', 'reason'), [
    ('resnet18', {}, 'only timm VisionTransformer'),
    ('swin_tiny_patch4_window7_224', {}, 'only timm VisionTransformer'),
    ('vit_tiny_patch16_224', dict(qk_norm=True), 'q_norm'),
    ('vit_tiny_patch16_224', dict(global_pool='map'), 'pooling'),
    ('vit_tiny_patch16_224', dict(pos_embed='none'), 'position embedding'),
    ('vit_tiny_patch16_224', dict(mlp_layer=timm.layers.SwiGLU), 'SwiGLU'),
    ('vit_tiny_patch16_224', dict(block_fn=timm.models.vision_transformer.ParallelScalingBlock), 'Parallel'),
])
def test_unsupported_models_say_why(architecture, kwargs, reason):
    model = timm.create_model(architecture, **(dict(SMALL, **kwargs) if 'vit' in architecture else {}))
    with pytest.raises(InputError, match=f'prune: {type(model).__name__} is not supported: .*{reason}'):
        as_nvit(model)


def kill(structure, counts, seed=0):
    """Mark random units as dead: {kind: units to kill in every block}."""
    generator = torch.Generator().manual_seed(seed)
    for key, alive in structure.alive.items():
        order = torch.randperm(len(alive), generator=generator)
        alive[order[:counts.get(key[0], 0)]] = False
    structure.zero_dead()


@pytest.mark.parametrize('name', TIMM)
def test_removing_units_of_blocks_is_exact(name):
    model = as_nvit(timm_model(name))
    structure = Structure(model)
    kill(structure, dict(head=1, QK=4, V=3, MLP=50))
    images = images_for(model)
    dense = structure.dense()
    assert dense.dims == dict(EMB=48, head=[3, 3], QK=[8, 8], V=[9, 9], MLP=[142, 142]) == structure.dims
    torch.testing.assert_close(dense(images), model(images), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in dense.parameters()) < sum(p.numel() for p in model.parameters())


def test_dead_embedding_channels_stay_zero_and_leave_the_model():
    model = as_nvit(timm_model('layer scale, no qkv bias'))
    structure = Structure(model)
    kill(structure, dict(EMB=16))
    dead = ~structure.alive[EMB]
    features, intermediates = model.forward_intermediates(images_for(model))
    for tensor in [features.movedim(-1, 1), *intermediates]:
        assert not tensor[:, dead].any() and tensor[:, ~dead].any()
    dense = structure.dense()
    assert dense.embed_dim == 32 and dense.head.in_features == 32
    torch.testing.assert_close(dense.cls_token[0, 0], model.cls_token[0, 0, ~dead])


def test_saliency_predicts_the_first_order_change_of_silencing_a_unit():
    """The summed w * g of a unit's own weights is the derivative of the loss by a factor on these weights."""
    model = as_nvit(timm_model('distilled')).double()
    images, labels = images_for(model).double(), torch.tensor([0, 1, 2])

    def loss():
        return torch.nn.functional.cross_entropy(model(images), labels)

    loss().backward()
    saliency = Structure(model).saliency()
    block, unit, eps = model.blocks[1], 3, 1e-5
    attn = block.attn
    width = attn.num_heads * attn.qk_dim
    rows = {
        'head': torch.cat([part * width + torch.arange(attn.qk_dim) + unit * attn.qk_dim for part in range(3)]),
        'QK': torch.arange(attn.num_heads) * attn.qk_dim + unit,
        'V': 2 * width + torch.arange(attn.num_heads) * attn.v_dim + unit,
        'MLP': torch.tensor([unit]),
    }
    divisor = {'head': 12, 'QK': 2, 'V': 2, 'MLP': 1}
    for kind, index in rows.items():
        layer = block.mlp.fc1 if kind == 'MLP' else attn.qkv
        values = []
        for factor in (1 + eps, (1 - eps) / (1 + eps)):
            with torch.no_grad():
                layer.weight[index] *= factor
                layer.bias[index] *= factor
                values.append(loss().item())
        with torch.no_grad():
            layer.weight[index] /= 1 - eps
            layer.bias[index] /= 1 - eps
        derivative = (values[0] - values[1]) / (2 * eps)
        expected = (derivative / divisor[kind]) ** 2
        assert saliency[kind, 1][unit].item() == pytest.approx(expected, rel=1e-3), kind


def test_saliency_wants_gradients_and_survives_bad_ones():
    model = as_nvit(timm_model('plain'))
    structure = Structure(model)
    with pytest.raises(InputError, match='no gradient'):
        structure.saliency()
    model(images_for(model)).sum().backward()
    model.blocks[0].mlp.fc1.weight.grad[7] = float('nan')
    saliency = structure.saliency()
    assert saliency['MLP', 0][7] == 0 and saliency['MLP', 0][8] > 0
    assert set(saliency) == {EMB} | {(kind, index) for kind in BLOCK_KINDS for index in range(2)}
