"""Small plain vision transformers, the ground on which token reduction and pruning are measured.

They are timm's own `VisionTransformer`, twelve blocks deep as DeiT is (so that published layer choices of token
reduction apply unchanged), but half as wide as DeiT-Ti and with patches of 2 pixels: a 28-pixel image has the 197
tokens of a DeiT at 224 pixels, a 32-pixel image has 257.

Paper: `An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale` - https://arxiv.org/abs/2010.11929

Official code: https://github.com/google-research/vision_transformer (nothing is taken from it; the model is timm's).

Citation:
    @inproceedings{dosovitskiy2021image,
        title={An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
        author={Dosovitskiy, Alexey and others},
        booktitle={ICLR}, year={2021}
    }
"""
from typing import Any, Dict

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from vishub.models.builder import build_model

__all__ = ['vit_mini_patch2_28', 'vit_mini_patch2_32']


def _create_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    out_indices = kwargs.pop('out_indices', 3)
    return build_model(
        VisionTransformer,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        # timm's own filter also fits patch and position embeddings to another patch_size or img_size.
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'pool_size': None,
        'crop_pct': 1.0,
        'crop_mode': 'squash',
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2010.11929',
        'paper_name': 'An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale',
        'origin_url': 'https://github.com/google-research/vision_transformer',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vit_mini_patch2_28': _cfg(input_size=(3, 28, 28)),
    'vit_mini_patch2_28.fashion_mnist': _cfg(
        hf_hub_id='vishub/vit_mini_patch2_28.fashion_mnist', input_size=(1, 28, 28), num_classes=10,
        mean=(0.2874,), std=(0.3537,),
        label_names=(
            'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')),
    'vit_mini_patch2_32': _cfg(input_size=(3, 32, 32)),
    'vit_mini_patch2_32.cifar10': _cfg(
        hf_hub_id='vishub/vit_mini_patch2_32.cifar10', input_size=(3, 32, 32), num_classes=10,
        mean=(0.4935, 0.4830, 0.4473), std=(0.2444, 0.2424, 0.2584),
        label_names=(
            'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')),
})


@register_model
def vit_mini_patch2_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """For 28-pixel images: 197 tokens of width 96, 12 blocks, 3 heads."""
    model_args = dict(img_size=28, patch_size=2, embed_dim=96, depth=12, num_heads=3)
    return _create_vit('vit_mini_patch2_28', pretrained, **dict(model_args, **kwargs))


@register_model
def vit_mini_patch2_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """For 32-pixel images: 257 tokens of width 96, 12 blocks, 3 heads."""
    model_args = dict(img_size=32, patch_size=2, embed_dim=96, depth=12, num_heads=3)
    return _create_vit('vit_mini_patch2_32', pretrained, **dict(model_args, **kwargs))
