"""One tiny model of every supported family, with every parameter away from its neutral value."""
import inspect
from typing import Callable, Dict

import torch
from timm.layers import RmsNorm
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vishub.models.nvit import NViT, uniform_dims

_SIZES = dict(img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=7)
# timm 1.0.20 does not have it yet
_QK_NORM = {'qk_norm': True} if 'qk_norm' in inspect.signature(Eva).parameters else {}
DIMS = dict(EMB=64, head=[2, 1, 3], QK=[16, 24, 8], V=[24, 32, 16], MLP=[96, 128, 64])

FAMILIES: Dict[str, Callable[[], nn.Module]] = {
    'vit': lambda: VisionTransformer(**_SIZES),
    'vit_avg': lambda: VisionTransformer(**_SIZES, global_pool='avg', class_token=False),
    'deit_distilled': lambda: VisionTransformerDistilled(**_SIZES),
    'deit3': lambda: VisionTransformer(**_SIZES, no_embed_class=True, init_values=1e-6),
    'dinov2_reg': lambda: VisionTransformer(**_SIZES, reg_tokens=4, no_embed_class=True, init_values=1e-5),
    'clip': lambda: VisionTransformer(**_SIZES, pre_norm=True, act_layer='quick_gelu'),
    'siglip': lambda: VisionTransformer(**_SIZES, class_token=False, global_pool='map'),
    'qk_norm': lambda: VisionTransformer(
        **_SIZES, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, global_pool='avgmax'),
    'eva': lambda: Eva(**_SIZES),
    'eva02': lambda: Eva(**_SIZES, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    'eva_rope_mixed': lambda: Eva(
        **_SIZES, attn_type='rope', use_rot_pos_emb=True, rope_type='mixed', num_reg_tokens=2, init_values=1e-5,
        qkv_fused=False, norm_layer=RmsNorm, **_QK_NORM),
    'beit': lambda: Beit(**_SIZES, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    'beit_shared': lambda: Beit(**_SIZES, use_shared_rel_pos_bias=True, global_pool='token'),
    'nvit': lambda: NViT(img_size=64, num_classes=7, dims=DIMS, attn_scale=0.2),
    'nvit_plain': lambda: NViT(
        img_size=64, num_classes=7, dims=uniform_dims(64, 3, 2, 32, 128), distilled=False, token_scale=False,
        global_pool='avg'),
}


def small_model(name: str) -> nn.Module:
    """A model of `FAMILIES` in eval mode, 64 x 64 pixels, 16 patches, three blocks."""
    model = FAMILIES[name]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            # Norm and layer scale weights stay near 1, so that no branch is muted.
            parameter.copy_(noise + (1. if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.))
    return model


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
