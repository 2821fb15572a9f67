"""Frozen encoders: a picture of a patch, or of a whole region, to a vector."""
import contextlib
import hashlib
import math
from typing import Any, ContextManager, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vishub.errors import InputError

__all__ = ['Encoder', 'TextureBank', 'load_encoder']

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TextureBank(nn.Module):
    """A fixed bank of random filters in the space of optical density: nothing in it is learnt.

    Optical density (of stains it is the sum) -> random 5 x 5 filters at scales 1, 1/2 and 1/4, a quarter of which see
    colour alone -> magnitude -> mean and standard deviation over the picture -> logarithm, then the mean and scale of
    256 random textures of the same seed.

    All numbers come from numpy's PCG64, so that the seed is all that weights need to say.

    Args:
        seed: Of filters and textures.
        width: Features; half of it filters.
    """

    def __init__(self, seed: int = 0, width: int = 128) -> None:
        super().__init__()
        self.seed, self.num_features = seed, width
        rng = np.random.default_rng(seed)
        count = width // 2
        filters = rng.standard_normal((count, 3, 5, 5)).astype(np.float32)
        grid = np.arange(5) - 2
        filters *= np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / 4.5)
        filters -= filters.mean((2, 3), keepdims=True)
        colours = count // 4
        filters[:colours] = rng.standard_normal((colours, 3, 1, 1)) / 25  # means over the window
        filters /= np.abs(filters).sum((1, 2, 3), keepdims=True)
        # every third filter at each scale
        self.filters = nn.ParameterList(
            nn.Parameter(torch.from_numpy(filters[place::3].copy()), requires_grad=False) for place in range(3))
        self.register_buffer('mean', torch.zeros(width))
        self.register_buffer('std', torch.ones(width))
        features = self(_random_textures(rng))
        self.mean, self.std = features.mean(0), features.std(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), 0 to 1 -> (B, width) float32."""
        density = -torch.log10((x.float() * 255 + 1) / 256)
        means, spreads = [], []
        for scale, filters in zip((1, 2, 4), self.filters):
            padded = F.pad(F.avg_pool2d(density, scale), (2,) * 4, mode='replicate')
            response = F.conv2d(padded, filters).abs()
            means.append(response.mean((2, 3)))
            spreads.append(response.var((2, 3)).sqrt())
        features = torch.log(torch.cat(means + spreads, dim=1) + 0.01)
        return (features - self.mean) / self.std


def _random_textures(rng: np.random.Generator) -> torch.Tensor:
    """256 pictures (3, 32, 32) in stains' colours: coarse and fine, weak and strong."""
    vectors = np.array([(0.65, 0.70, 0.29), (0.07, 0.99, 0.11)])
    pictures = []
    for number in range(256):
        side = (4, 8, 16, 32)[number % 4]
        contrast, strength = np.exp(rng.uniform(-3, 0)), rng.uniform(0.2, 1.2, (2, 1, 1))
        stains = strength * (1 + contrast * rng.standard_normal((2, side, side))).clip(0, 3)
        smooth = F.interpolate(torch.from_numpy(stains)[None], (32, 32), mode='bilinear')[0].numpy()
        pictures.append(np.power(10., -np.tensordot(vectors.T, smooth, 1)))
    return torch.from_numpy(np.stack(pictures).astype(np.float32))


class Encoder:
    """A frozen network behind the pixels.

    Args:
        model: (B, 3, S, S) normalised floats -> (B, num_features).
        name: As in `load_encoder`.
        size: Side S that pictures are brought to.
        mean, std: Of the pixels, 0 to 1.
        device: Where it runs.
        amp: Half precision (bfloat16 on the CPU, float16 on CUDA).

    Attributes:
        width: Features.
        digest: SHA-256 over name, size and all weights, 16 hexadecimal digits: another encoder has another.
    """

    def __init__(
            self,
            model: Any,
            name: str,
            size: int,
            mean: Any = (0., 0., 0.),
            std: Any = (1., 1., 1.),
            device: Union[str, torch.device] = 'cpu',
            amp: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.name, self.size, self.width, self.amp = name, size, int(model.num_features), amp
        self.mean, self.std = (torch.tensor(tuple(v)).view(1, 3, 1, 1).to(self.device) for v in (mean, std))
        state = hashlib.sha256(f'{name}/{size}/{tuple(mean)}/{tuple(std)}/{amp}'.encode())
        if isinstance(model, TextureBank):  # its calibration may differ in the last bit from machine to machine
            state.update(str(model.seed).encode())
        else:
            for key, value in model.state_dict().items():
                state.update(key.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.digest = state.hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, width), on the CPU."""
        x = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device).permute(0, 3, 1, 2).float() / 255
        x = (x - self.mean) / self.std
        autocast: ContextManager[Any] = contextlib.nullcontext()
        if self.amp:
            dtype = torch.float16 if self.device.type == 'cuda' else torch.bfloat16
            autocast = torch.autocast(self.device.type, dtype)
        with autocast:
            return self.model(x).float().cpu()


def load_encoder(
        name: str,
        size: Optional[int] = None,
        device: Union[str, torch.device] = 'cpu',
        amp: bool = False,
) -> Encoder:
    """Make an encoder.

    Args:
        name: `texture_bank` or `texture_bank:SEED` (128 features, no weights needed); or a classifier of timm with
            weights, e.g. `convnext_small.fb_in22k` (768), `local-dir:folder`, `hf-hub:owner/name`, of which the layers
            before the classifier are used.
        size: Side of its pictures; by default that of its weights (224 and so on), 32 for the bank.
        device: Where it runs.
        amp: Half precision.

    Raises:
        InputError: If there is no such encoder or it is none of pictures.
        vishub.WeightsNotFoundError: If its weights cannot be had.
    """
    if size is not None and size < 8:
        raise InputError(f'encoder_size is {size}: give 8 or more')
    if name.partition(':')[0] == 'texture_bank':
        seed = name.partition(':')[2] or '0'
        if not seed.isdigit():
            raise InputError(f"encoder '{name}': its seed is no number, as in texture_bank:0")
        return Encoder(TextureBank(int(seed)), name, size or 32, device=device)
    from vishub.tasks.base import Pipeline, pretrained_cfg_of

    model: Any = Pipeline.load(name)
    if not hasattr(model, 'reset_classifier') or not hasattr(model, 'num_features'):
        raise InputError(f"encoder '{name}' has no features: give a classifier of timm, such as convnext_small")
    model.reset_classifier(0)
    cfg = pretrained_cfg_of(model)
    shape = cfg.get('input_size', (3, 224, 224))
    if shape[0] != 3:
        raise InputError(f"encoder '{name}' takes {shape[0]} channels: slides have 3")
    side = size or int(math.ceil(shape[-1]))
    return Encoder(model, name, side, cfg.get('mean', _IMAGENET[0]), cfg.get('std', _IMAGENET[1]), device, amp)
