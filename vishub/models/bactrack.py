"""BACTrack: several templates of one target, matched at once

Paper: `BACTrack: Building Appearance Collection for Aerial Tracking` - https://arxiv.org/abs/2312.06136

@article{bactrack2024,
  title={BACTrack: Building Appearance Collection for Aerial Tracking},
  journal={IEEE Transactions on Circuits and Systems for Video Technology},
  volume={34}, number={6}, pages={5002--5017},
  year={2024}
}

These models are BACTrack-style, not a reproduction: there is no official code, there are no official weights, and only
the paper's abstract could be read. What is published: a Siamese tracker collects templates of the target while it
tracks, a mixed-temporal transformer relates the search region to all of them in parallel, and an appearance
discriminator says which of its finds may join the collection. Every size, layer and constant is our choice, or taken
from trackers whose code is public, named where it stands: TransT (CVPR 2021), STARK (ICCV 2021), MixFormer (CVPR 2022).

Crops in, boxes out. What a tracker does with them frame by frame is in `vishub/tasks/tracking`.
"""
import math
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple, Union

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import nn
from torchvision.ops import roi_align

from vishub.models.builder import build_model

__all__ = ['BACTrack', 'TemplateCache', 'TrackerOutput']

_STRIDE = 8  # of every backbone
_REFUSAL = 'BACTrack is a tracker: use create_tracker(...)'

Memory = Tuple[torch.Tensor, torch.Tensor]  # keys and values, each (B, heads, tokens, head_dim)


class TemplateCache(NamedTuple):
    """All that the search needs to know of the templates; it holds as long as these do not change.

    Attributes:
        memory: Keys and values of each block, (B, heads, K * Nz, head_dim).
        tokens: Final template tokens (B, K, Nz, d).
        mask: Slots in use (B, K); None if all are.
    """
    memory: List[Memory]
    tokens: torch.Tensor
    mask: Optional[torch.Tensor]


class TrackerOutput(NamedTuple):
    """What the network says of each place of the search region.

    Attributes:
        logits: (B, Nx, 2), of target (index 0) and background.
        boxes: (B, Nx, 4), cx, cy, w, h from 0 to 1 of the search crop.
        reliability_logits: (B,), whether the best box shows the target.
    """
    logits: torch.Tensor
    boxes: torch.Tensor
    reliability_logits: torch.Tensor

    @property
    def reliability(self) -> torch.Tensor:
        """(B,), 0 to 1."""
        return self.reliability_logits.sigmoid()


def position_code(height: int, width: int, dim: int) -> torch.Tensor:
    """2-D sine code (height * width, dim), float32, as in DETR and TransT: vertical half first, then horizontal."""
    half = dim // 2

    def along(count: int) -> torch.Tensor:
        channel = torch.arange(half, dtype=torch.float64, device='cpu')
        wavelength = 10000 ** (2 * (channel // 2) / half)
        place = 2 * math.pi * torch.arange(1, count + 1, dtype=torch.float64, device='cpu') / (count + 1e-6)
        angle = place[:, None] / wavelength
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())  # count, half

    rows = along(height)[:, None].expand(height, width, half)
    columns = along(width)[None].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float()


class ConvBackbone(nn.Module):
    """Four 3 x 3 convolutions with batch norm, stride 8: the backbone of the demo size."""

    def __init__(self, in_chans: int = 3, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        widths, strides = (in_chans, 32, 64, 96, 96), (2, 2, 2, 1)
        for i, stride in enumerate(strides):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False, **dd)
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            self.add_module(f'conv{i + 1}', conv)
            self.add_module(f'bn{i + 1}', nn.BatchNorm2d(widths[i + 1], **dd))
        self.num_features = widths[-1]

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """(B, C, H, W) -> [(B, 96, H / 8, W / 8)]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return [F.relu(self.bn4(self.conv4(x)))]


def make_backbone(name: str, in_chans: int, pretrained: bool, device=None, dtype=None) -> Tuple[nn.Module, int]:
    """A backbone of stride 8, which gives a list of one map, and its channels.

    TransT, too, stops behind the third stage of a ResNet and dilates there; timm dilates more of its blocks.
    """
    if name == 'conv':
        if pretrained:
            raise ValueError('there are no pretrained weights of the small convolutional backbone')
        conv = ConvBackbone(in_chans, device=device, dtype=dtype)
        return conv, conv.num_features
    backbone = timm.create_model(
        name, pretrained=pretrained, features_only=True, output_stride=_STRIDE, out_indices=(3,), in_chans=in_chans)
    return backbone.to(device=device, dtype=dtype), backbone.feature_info.channels()[0]


class MixedTemporalAttention(nn.Module):
    """Tokens attend to a memory and to themselves. Asymmetric, as in MixFormer: the memory never sees them.

    Templates, all of them jointly, have no memory but themselves, which is where time mixes; the search region has
    the templates as its memory.
    """

    def __init__(self, dim: int, num_heads: int, proj_drop: float = 0., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
            self, x: torch.Tensor, memory: Optional[Memory] = None, mask: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Memory]:
        """
        Args:
            x: Tokens (B, L, d).
            memory: Keys and values of M tokens.
            mask: Which of the M + L keys may be looked at, bool (B, 1, 1, M + L); all if None.

        Returns:
            Tokens (B, L, d), and their own keys and values.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        own = (k, v)  # B, heads, L, head_dim
        if memory is not None:
            k, v = torch.cat([memory[0], k], dim=2), torch.cat([memory[1], v], dim=2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2))), own


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0., device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm transformer block with mixed-temporal attention."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float,
            drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = MixedTemporalAttention(dim, num_heads, drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(
            self, x: torch.Tensor, memory: Optional[Memory] = None, mask: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Memory]:
        """See `MixedTemporalAttention.forward`."""
        attended, own = self.attn(self.norm1(x), memory, mask)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), own


def make_head(dim: int, out_dim: int, device=None, dtype=None) -> nn.Sequential:
    """d -> d -> d -> out with ReLU between, as TransT's heads."""
    dd = {'device': device, 'dtype': dtype}
    return nn.Sequential(
        nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd), nn.ReLU(), nn.Linear(dim, out_dim, **dd))


class Discriminator(nn.Module):
    """Appearance discriminator, after MixFormer's score module: does this box show the target of the first frame?

    A learned token attends first to the box's region of the search map, then to the initial template. MixFormer pools
    the region by PrRoIPool, a CUDA extension; here it is RoI-align.
    """

    POOLED = 4  # side of the pooled region

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.norm0 = nn.LayerNorm(dim, **dd)
        self.q, self.k, self.v, self.proj = (
            nn.ModuleList([nn.Linear(dim, dim, **dd) for _ in range(2)]) for _ in range(4))
        self.norm = nn.ModuleList([nn.LayerNorm(dim, **dd) for _ in range(2)])
        self.head = make_head(dim, 1, **dd)

    def forward(self, search_map: torch.Tensor, boxes: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
        """
        Args:
            search_map: Final search tokens as a map (B, d, h, w).
            boxes: (B, 4), cx, cy, w, h from 0 to 1 of the search crop.
            template: Final tokens of the initial template (B, Nz, d).

        Returns:
            Logits (B,).
        """
        region = self.pooled(search_map, boxes)
        token = self.norm0(self.token).expand(len(region), -1, -1)
        for i, memory in enumerate((region, template)):
            q, k, v = (
                linear[i](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B, heads, L, head_dim
                for linear, x in ((self.q, token), (self.k, memory), (self.v, memory)))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            token = self.norm[i](self.proj[i](attended))  # no residual
        return self.head(token).flatten()

    def pooled(self, search_map: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(B, d, h, w) -> (B, 16, d), the region of each box."""
        # torchvision pools no half precision on the CPU
        values = search_map if search_map.dtype == torch.float64 else search_map.float()
        height, width = values.shape[2:]
        centre, size = boxes[:, :2], boxes[:, 2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=1).to(values.dtype)
        corners = corners * corners.new_tensor([width, height, width, height])
        rois = torch.cat([torch.arange(len(corners), device=corners.device)[:, None].to(values.dtype), corners], 1)
        region = roi_align(values, rois, self.POOLED, sampling_ratio=2, aligned=True)  # B, d, 4, 4
        return region.flatten(2).transpose(1, 2).to(search_map.dtype)


class BACTrack(nn.Module):
    """A BACTrack-style tracking network.

    Args:
        backbone: Name of a timm ResNet, or 'conv' for four convolutions.
        img_size: Side of the search crop, or height and width; multiples of 8.
        template_size: Side of a template crop, likewise.
        in_chans: Channels of a crop.
        num_classes: Must be 0: the model has no classes.
        embed_dim: Channels d of a token; a multiple of 4 and of `num_heads`.
        depth: Transformer blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the blocks' perceptrons, in multiples of `embed_dim`.
        drop_rate: Dropout of attention's and perceptron's outputs in training; 0.1 is TransT's.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        pretrained_backbone: Load timm's own ImageNet weights of the backbone. Its batch norms are then frozen (stored
            statistics, no gradient), as TransT's are.

    Attributes:
        num_features: Channels d of a token.
        grid_size: Tokens of the search crop, rows and columns; `template_grid` those of a template.

    Raises:
        ValueError: If a size does not fit.
    """

    def __init__(
            self,
            backbone: str = 'resnet50',
            img_size: Union[int, Tuple[int, int]] = 256,
            template_size: Union[int, Tuple[int, int]] = 128,
            in_chans: int = 3,
            num_classes: int = 0,
            embed_dim: int = 256,
            depth: int = 4,
            num_heads: int = 8,
            mlp_ratio: float = 4.,
            drop_rate: float = 0.1,
            drop_path_rate: float = 0.,
            pretrained_backbone: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if num_classes != 0:
            raise ValueError(f'{_REFUSAL}; num_classes must be 0, not {num_classes}')
        if embed_dim < 4 or embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(
                f'embed_dim must be a multiple of 4 (sine and cosine, rows and columns) and of num_heads {num_heads}, '
                f'not {embed_dim}')
        self.in_chans = in_chans
        self.num_classes = 0
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.frozen_norm = pretrained_backbone

        self.backbone, channels = make_backbone(backbone, in_chans, pretrained_backbone, **dd)
        self.input_proj = nn.Conv2d(channels, embed_dim, 1, **dd)
        # initial template, any later template, search: later templates share one row, so that their order cannot matter
        self.type_embed = nn.Parameter(torch.empty(3, embed_dim, **dd))
        self.blocks = nn.ModuleList([
            Block(embed_dim, num_heads, mlp_ratio, drop_rate, drop_path_rate * i / max(depth - 1, 1), **dd)
            for i in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.cls_head = make_head(embed_dim, 2, **dd)
        self.reg_head = make_head(embed_dim, 4, **dd)
        self.discriminator = Discriminator(embed_dim, num_heads, **dd)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=_STRIDE, module=f'blocks.{i}') for i in range(depth)]
        self.img_size, self.template_size = (0, 0), (0, 0)
        self.set_input_size(img_size, template_size)
        self._templates: Optional[TemplateCache] = None  # of `set_templates`
        self.init_weights()
        self.train(self.training)  # frozen norms go to evaluation

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Xavier-uniform linear layers, embeddings of standard deviation 0.02; the backbone keeps its own."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith('backbone.'):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        trunc_normal_(self.type_embed, std=0.02)
        trunc_normal_(self.discriminator.token, std=0.02)
        if self.frozen_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'BACTrack':
        super().train(mode)
        if self.frozen_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @property
    def grid_size(self) -> Tuple[int, int]:
        return self.img_size[0] // _STRIDE, self.img_size[1] // _STRIDE

    @property
    def template_grid(self) -> Tuple[int, int]:
        return self.template_size[0] // _STRIDE, self.template_size[1] // _STRIDE

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            template_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Make the model one for other crops. No weight depends on their size, only the sine codes do.

        Raises:
            ValueError: If a side is not a positive multiple of 8.
        """
        search = self.img_size if img_size is None else to_2tuple(img_size)
        template = self.template_size if template_size is None else to_2tuple(template_size)
        for name, sides in (('img_size', search), ('template_size', template)):
            if min(sides) < 1 or any(side % _STRIDE for side in sides):
                raise ValueError(f'{name} must be positive multiples of {_STRIDE}, but is {tuple(sides)}')
        self.img_size, self.template_size = tuple(search), tuple(template)
        for name, grid in (('search_code', self.grid_size), ('template_code', self.template_grid)):
            code = position_code(*grid, self.embed_dim).to(self.type_embed.device, self.type_embed.dtype)
            self.register_buffer(name, code, persistent=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {'type_embed', 'discriminator.token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^(?:backbone|input_proj|type_embed)', blocks=r'^blocks\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head that tells target from background."""
        return self.cls_head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Nothing for 0, for there is no classifier.

        Raises:
            ValueError: For any other number, or any pooling.
        """
        if num_classes != 0 or global_pool:
            raise ValueError(f'{_REFUSAL}; it has no classes, so reset_classifier takes 0 alone')

    def example_inputs(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """One blank template (1, 1, C, h, w) and search crop (1, C, H, W) on the model's device."""
        blank = self.type_embed.new_zeros
        return blank(1, 1, self.in_chans, *self.template_size), blank(1, self.in_chans, *self.img_size)

    # -- templates ----------------------------------------------------------------------------------------------------

    def project(self, crops: torch.Tensor) -> torch.Tensor:
        """Backbone and projection, before codes: (B, C, H, W) -> (B, H * W / 64, d), row by row."""
        return self.input_proj(self.backbone(crops)[-1]).flatten(2).transpose(1, 2)

    def embed_appearance(self, projected: torch.Tensor) -> torch.Tensor:
        """What a template looks like, as a unit vector: the mean of its tokens over the central half of the grid.

        Args:
            projected: (..., Nz, d), what `project` gives of templates.

        Returns:
            (..., d); dot products are similarities from -1 to 1.
        """
        rows, columns = self.template_grid
        tokens = projected.unflatten(-2, (rows, columns))
        centre = tokens[..., rows // 4:-(-3 * rows // 4), columns // 4:-(-3 * columns // 4), :]
        return F.normalize(centre.float().mean((-3, -2)), dim=-1)

    def encode_templates(self, projected: torch.Tensor, mask: Optional[torch.Tensor] = None) -> TemplateCache:
        """Run the templates through the blocks. They attend to one another, so any change needs all of this anew.

        Args:
            projected: (B, K, Nz, d), what `project` gives of each; slot 0 is the initial template.
            mask: Slots in use, bool (B, K); all if None. What stands in the others does not matter.

        Raises:
            ValueError: If the shapes do not fit, or slot 0 is not in use.
        """
        if projected.ndim != 4 or projected.shape[1] < 1:
            raise ValueError(f'expected projected templates (batch, K >= 1, tokens, channels), got '
                             f'{tuple(projected.shape)}')
        batch, count, num_tokens, _ = projected.shape
        self._check_mask(mask, (batch, count))
        kinds = torch.cat([self.type_embed[:1], self.type_embed[1:2].expand(count - 1, -1)])  # K, d
        z = projected + self.template_code + kinds[:, None]
        keys = None
        if mask is not None:
            z = z.masked_fill(~mask[:, :, None, None], 0.)  # no weight of 0 saves a sum from NaN
            keys = mask.repeat_interleave(num_tokens, dim=1)[:, None, None]  # B, 1, 1, K * Nz
        z = z.flatten(1, 2)
        memory = []
        for block in self.blocks:
            z, own = self._run(block, z, None, keys)
            memory.append(own)
        tokens = self.norm(z).unflatten(1, (count, num_tokens))
        if mask is not None:
            tokens = tokens * mask[:, :, None, None]
        return TemplateCache(memory, tokens, mask)

    def set_templates(self, templates: torch.Tensor, mask: Optional[torch.Tensor] = None) -> TemplateCache:
        """Encode templates once and keep them for `track`.

        Args:
            templates: (B, K, C, h, w).
            mask: See `encode_templates`.
        """
        self._check_templates(templates)
        self._check_mask(mask, tuple(templates.shape[:2]))
        projected = self.project(templates.flatten(0, 1)).unflatten(0, templates.shape[:2])
        self._templates = self.encode_templates(projected, mask)
        return self._templates

    # -- search -------------------------------------------------------------------------------------------------------

    def encode_search(self, search: torch.Tensor, cache: TemplateCache) -> torch.Tensor:
        """Search crop (B, C, H, W) -> its tokens (B, Nx, d) behind the last norm."""
        self._check_search(search)
        if len(search) != len(cache.tokens):
            raise ValueError(f'{len(search)} search crops for the templates of {len(cache.tokens)}')
        x = self.project(search) + self.search_code + self.type_embed[2]
        mask = None
        if cache.mask is not None:
            known = cache.mask.repeat_interleave(cache.tokens.shape[2], dim=1)
            mask = torch.cat([known, known.new_ones(x.shape[:2])], dim=1)[:, None, None]  # B, 1, 1, K * Nz + Nx
        for block, memory in zip(self.blocks, cache.memory):
            x, _ = self._run(block, x, memory, mask)
        return self.norm(x)

    def _run(self, block: nn.Module, *arguments: Any) -> Any:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *arguments)
        return block(*arguments)

    def forward_head(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Search tokens (B, Nx, d) -> logits (B, Nx, 2) and boxes (B, Nx, 4)."""
        return self.cls_head(x), self.reg_head(x).sigmoid()

    def discriminate(self, x: torch.Tensor, cache: TemplateCache, boxes: torch.Tensor) -> torch.Tensor:
        """Whether boxes show the initial template's target.

        Args:
            x: Search tokens (B, Nx, d), from `encode_search`.
            cache: The templates.
            boxes: (B, 4), cx, cy, w, h from 0 to 1 of the search crop.

        Returns:
            Logits (B,); their sigmoid is the reliability.
        """
        search_map = x.transpose(1, 2).unflatten(2, self.grid_size)
        return self.discriminator(search_map, boxes, cache.tokens[:, 0])

    def track(self, search: torch.Tensor, cache: Optional[TemplateCache] = None) -> TrackerOutput:
        """The forward of the search crop alone, with templates encoded before.

        Args:
            search: (B, C, H, W), normalised.
            cache: From `encode_templates`; by default that of the last `set_templates`.

        Raises:
            RuntimeError: If there are no templates.
        """
        cache = self._templates if cache is None else cache
        if cache is None:
            raise RuntimeError('there are no templates to track: call set_templates first')
        x = self.encode_search(search, cache)
        logits, boxes = self.forward_head(x)
        best = logits.float().softmax(-1)[..., 0].argmax(1)  # B
        chosen = boxes[torch.arange(len(boxes), device=boxes.device), best]
        return TrackerOutput(logits, boxes, self.discriminate(x, cache, chosen.detach()))

    def forward_features(
            self, templates: torch.Tensor, search: torch.Tensor, template_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Search tokens (B, Nx, d) behind the last norm; arguments as `forward`."""
        return self.encode_search(search, self._encoded(templates, template_mask))

    def forward(
            self, templates: torch.Tensor, search: torch.Tensor, template_mask: Optional[torch.Tensor] = None,
    ) -> TrackerOutput:
        """Look for the target of the templates in the search crop.

        Args:
            templates: (B, K, C, h, w), normalised; slot 0 is the initial template, the order of others is free. The
                same weights take any K.
            search: (B, C, H, W), normalised.
            template_mask: Slots in use, bool (B, K); all if None.

        Raises:
            ValueError: If a shape is not the configured one, there is no template, or slot 0 is masked.
        """
        return self.track(search, self._encoded(templates, template_mask))

    def _encoded(self, templates: torch.Tensor, mask: Optional[torch.Tensor]) -> TemplateCache:
        self._check_templates(templates)
        self._check_mask(mask, tuple(templates.shape[:2]))
        projected = self.project(templates.flatten(0, 1)).unflatten(0, templates.shape[:2])
        return self.encode_templates(projected, mask)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_templates(self, templates: torch.Tensor) -> None:
        shape = tuple(templates.shape)
        if templates.ndim != 5 or shape[1] < 1 or shape[2:] != (self.in_chans, *self.template_size):
            raise ValueError(
                f'expected templates (batch, K >= 1, {self.in_chans}, {self.template_size[0]}, '
                f'{self.template_size[1]}), got {shape}; set_input_size changes the crops')
        self._check_kind(templates)

    def _check_search(self, search: torch.Tensor) -> None:
        shape = tuple(search.shape)
        if search.ndim != 4 or shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f'expected a search crop (batch, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), got '
                f'{shape}; set_input_size changes the crops')
        self._check_kind(search)

    @staticmethod
    def _check_kind(crops: torch.Tensor) -> None:
        if not crops.is_floating_point():
            raise ValueError(f'expected floating point crops, normalised; these are {crops.dtype}')

    @staticmethod
    def _check_mask(mask: Optional[torch.Tensor], shape: Tuple[int, ...]) -> None:
        if mask is None:
            return
        if tuple(mask.shape) != tuple(shape) or mask.dtype != torch.bool:
            raise ValueError(
                f'expected a bool template_mask (batch, K) = {tuple(shape)}, got {tuple(mask.shape)} of {mask.dtype}')
        if not mask.any(1).all():
            raise ValueError(f'template_mask of shape {tuple(mask.shape)} has a sample without any template in use')
        if not mask[:, 0].all():
            raise ValueError(
                f'template_mask of shape {tuple(mask.shape)} leaves out slot 0, which holds the initial template')


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Our own checkpoints, bare or under 'state_dict'; there are no others.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    if 'type_embed' not in state_dict:
        raise ValueError('this is no checkpoint of a BACTrack: there is no official one, only those of vishub')
    return state_dict


def _create_bactrack(variant: str, pretrained: bool = False, **kwargs: Any) -> BACTrack:
    if kwargs.pop('features_only', False):
        raise RuntimeError(f'{_REFUSAL}; it gives no pyramid of features')
    num_classes = kwargs.pop('num_classes', None)
    if num_classes:
        raise ValueError(f'{_REFUSAL}; num_classes must be 0, not {num_classes}')
    model = build_model(
        BACTrack,
        variant,
        pretrained,
        default_cfgs=default_cfgs,
        pretrained_filter_fn=checkpoint_filter_fn,
        tag_cfgs=_TAG_CFGS,
        **kwargs,
    )
    model.pretrained_cfg = model.default_cfg = dict(
        model.pretrained_cfg, template_size=(model.in_chans, *model.template_size))
    return model


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'input_size': (3, 256, 256), 'num_classes': 0, 'pool_size': None, 'fixed_input_size': True, 'crop_pct': 1.0,
        'interpolation': 'bilinear', 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225),
        'first_conv': 'backbone.conv1', 'classifier': None,
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2312.06136',
        'paper_name': 'BACTrack: Building Appearance Collection for Aerial Tracking',
        'origin_url': 'https://arxiv.org/abs/2312.06136',
        **kwargs,
    }


# Constants that a training run chose for its tracker (see `vishub/tasks/tracking/constants.py`).
_TAG_CFGS: Dict[str, Dict[str, Any]] = {
    'bactrack_tiny.scenes': {
        'tracking': dict(interval=10, min_reliability=0.7, window_influence=0.7, max_similarity=0.98)},
}

# The authors published neither code nor weights.
default_cfgs = generate_default_cfgs({
    'bactrack_resnet50': _cfg(),
    'bactrack_resnet18': _cfg(),
    'bactrack_tiny': _cfg(input_size=(3, 96, 96)),
    'bactrack_tiny.scenes': _cfg(input_size=(3, 96, 96), hf_hub_id='vishub/bactrack_tiny.scenes', license='other'),
})


@register_model
def bactrack_resnet50(pretrained: bool = False, **kwargs: Any) -> BACTrack:
    """BACTrack-style, ResNet-50 up to its third stage; 12.9 M parameters."""
    return _create_bactrack('bactrack_resnet50', pretrained, **dict(dict(backbone='resnet50'), **kwargs))


@register_model
def bactrack_resnet18(pretrained: bool = False, **kwargs: Any) -> BACTrack:
    """BACTrack-style, ResNet-18 up to its third stage; 6.9 M parameters."""
    return _create_bactrack('bactrack_resnet18', pretrained, **dict(dict(backbone='resnet18'), **kwargs))


@register_model
def bactrack_tiny(pretrained: bool = False, **kwargs: Any) -> BACTrack:
    """BACTrack-style, small enough to train on a CPU: four convolutions, three blocks, crops of 48 and 96 pixels."""
    model_args = dict(
        backbone='conv', img_size=96, template_size=48, embed_dim=96, depth=3, num_heads=3, mlp_ratio=2., drop_rate=0.)
    return _create_bactrack('bactrack_tiny', pretrained, **dict(model_args, **kwargs))
