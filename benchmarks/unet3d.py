"""A plain 3-D U-Net to compare MambaClinix with, after nnU-Net (Isensee et al. 2021), and its training.

    python benchmarks/unet3d.py --output runs/unet3d --resolution 32:10 --samples 200 --regions 4,4,4 --amp bf16

Two convolutions with instance norm and LeakyReLU a stage, strided ones down, transposed ones up, deep supervision.
It is a peer for benchmarks, not one of vishub's models. The command takes the options of `vishub train
volume_segmentation` that decide a budget, and says at the end what the network scores on the test volumes.
"""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Union

import torch
from torch import nn

from vishub.files import atomic_path
from vishub.hub import annotate
from vishub.tasks.volume_segmentation.metrics import evaluate
from vishub.tasks.volume_segmentation.training import VolumeSegmentationRecipe
from vishub.training import TrainConfig, TrainResult, parse_resolution, train

__all__ = ['FEATURES', 'UNet3dRecipe', 'PlainUNet']

# widths with which the peer has about as many multiply-accumulates as MambaClinix of that name
FEATURES: Dict[str, Sequence[int]] = {
    'mambaclinix_tiny': (22, 44, 88, 88),
}


class ConvBlock(nn.Sequential):
    """Two times convolution, instance norm, LeakyReLU; the first convolution may be strided."""

    def __init__(self, in_dim: int, dim: int, stride: int = 1) -> None:
        layers: List[nn.Module] = []
        for source, step in ((in_dim, stride), (dim, 1)):
            layers += [nn.Conv3d(source, dim, 3, step, padding=1), nn.InstanceNorm3d(dim, affine=True),
                       nn.LeakyReLU(0.01, inplace=True)]
        super().__init__(*layers)


class PlainUNet(nn.Module):
    """The U-Net of nnU-Net's plans, isotropic, halving at every stage but the first.

    Args:
        features: Channels of each stage.
        in_chans, num_classes: Channels in, classes out.
        patch_size: Of the patches that it is trained with.
    """

    def __init__(
            self, features: Sequence[int], in_chans: int = 1, num_classes: int = 2,
            patch_size: Sequence[int] = (48, 48, 48)) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.patch_size = in_chans, num_classes, tuple(patch_size)
        self.divisor = (2 ** (len(features) - 1),) * 3
        self.deep_supervision = False
        self.pretrained_cfg: Dict[str, Any] = {'architecture': 'plain_unet_3d'}
        self.encoder = nn.ModuleList([
            ConvBlock(features[i - 1] if i else in_chans, dim, 2 if i else 1) for i, dim in enumerate(features)])
        pairs = list(zip(features[::-1], features[-2::-1]))
        self.up = nn.ModuleList([nn.ConvTranspose3d(low, dim, 2, 2) for low, dim in pairs])
        self.decoder = nn.ModuleList([ConvBlock(2 * dim, dim) for _, dim in pairs])
        self.heads = nn.ModuleList([nn.Conv3d(dim, num_classes, 1) for _, dim in pairs])

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """(B, C, D, H, W) -> logits (B, K, D, H, W); in training with deep supervision those of all levels."""
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        supervised = self.deep_supervision and self.training
        logits = []
        for up, block, head, skip in zip(self.up, self.decoder, self.heads, reversed(skips[:-1])):
            x = block(torch.cat([up(x), skip], dim=1))
            if supervised or head is self.heads[-1]:
                logits.append(head(x))
        return logits[::-1] if supervised else logits[-1]


class UNet3dRecipe(VolumeSegmentationRecipe):
    """The recipe of the task, on the plain U-Net. Its results are figures, no weights folder."""

    def create(self, arguments: Mapping[str, Any]) -> PlainUNet:
        return PlainUNet(FEATURES[self.model_name], arguments['in_chans'], arguments['num_classes'])

    def describe(self) -> Dict[str, Any]:
        return {**super().describe(), 'model': f'plain U-Net as large as {self.model_name}'}

    def finish(self, model: Any, result: TrainResult, config: TrainConfig) -> Path:
        model.patch_size = self.train_set().size(config.side(config.epochs - 1))
        model.pretrained_cfg.update(
            label_names=self.data.labels, preprocessing=self.data.preprocessing.to_dict())
        report = evaluate([model], self.data, device='cpu')
        row = {
            'name': 'plain U-Net', 'num_params': sum(p.numel() for p in model.parameters()),
            'metrics': report['metrics'], 'epochs': config.epochs, 'wall_s': round(result.wall_s, 1)}
        path = Path(config.output) / 'peer.json'
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({**row, 'report': report['report']}, indent=2) + '\n', encoding='utf-8')
        print(json.dumps(row, indent=2))
        return path.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--like', default='mambaclinix_tiny', choices=list(FEATURES))
    parser.add_argument('--data', default='procedural')
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--card', type=Path, metavar='DIR', help='weights folder whose card gets the row of this peer')
    parser.add_argument('--resolution', default='32:10')
    parser.add_argument('--samples', type=int, default=200)
    parser.add_argument('--regions', default='4,4,4')
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--amp', default='no')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--validate-every', type=int, default=5)
    options = parser.parse_args()
    recipe = UNet3dRecipe(
        options.like, options.data, samples=options.samples, seed=options.seed,
        regions=[int(word) for word in options.regions.split(',') if word])
    # what `vishub train volume_segmentation` takes by default
    train(recipe, TrainConfig(
        options.output, parse_resolution(options.resolution), batch_size=2, lr=options.lr, warmup=0.05,
        weight_decay=0.01, clip_grad=12., amp=options.amp, device='cpu', seed=options.seed, progress=False,
        checkpoint_every=25, validate_every=options.validate_every))
    if options.card is not None:
        add_to_card(options.card, options.output / 'peer.json')


def add_to_card(folder: Path, file: Path) -> None:
    """Put what `finish` wrote among the peers of a weights folder."""
    row = {key: value for key, value in json.loads(file.read_text(encoding='utf-8')).items() if key != 'report'}
    told = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
    annotate(folder, peers=[row, *(peer for peer in told.get('peers', []) if peer['name'] != row['name'])])


if __name__ == '__main__':
    main()
