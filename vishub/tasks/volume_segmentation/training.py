"""The recipe that trains a segmenter of volumes: patches, nnU-Net's augmentation, and the loss of `loss.py`."""
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.volume_segmentation.data import TrainingPatches, VolumeData, load_data
from vishub.tasks.volume_segmentation.loss import REGIONS, SegmentationLoss
from vishub.tasks.volume_segmentation.sliding_window import sliding_planes
from vishub.training.config import TrainConfig
from vishub.training.loop import TrainResult
from vishub.training.processes import gather_shares, my_share
from vishub.training.recipe import Recipe

__all__ = ['VolumeSegmentationRecipe']


class VolumeSegmentationRecipe(Recipe):
    """Patches of volumes, with deep supervision where the network has it.

    The official recipe is Adam, 1e-4, for 1000 epochs of 250 batches of 2. The small forms here take AdamW, 2e-3 and a
    cosine: the defaults of `vishub train volume_segmentation`.

    Args:
        model: Name that `timm.create_model` knows, e.g. `mambaclinix_tiny`.
        data: For `load_data`, or data already read. They decide the network's channels and classes.
        model_args: Further arguments of the model.
        samples: Patches an epoch.
        regions: Regions of the Tversky loss along D, H, W; empty for the plain loss, cross-entropy and Dice.
        size, spacing, intensity: See `load_data`.
        seed: Of patches and made volumes; give the same as in the config.
        tag: Tag of the weights; by default the data's.
        command: Command line, for the card.
    """

    metric = 'dice'

    def __init__(
            self,
            model: str,
            data: Union[str, Path, VolumeData],
            *,
            model_args: Optional[Mapping[str, Any]] = None,
            samples: int = 500,
            regions: Sequence[int] = REGIONS,
            size: int = 64,
            spacing: Optional[Sequence[float]] = None,
            intensity: Optional[str] = None,
            seed: int = 0,
            tag: Optional[str] = None,
            command: str = '',
    ):
        if regions and (len(regions) != 3 or min(regions) < 1):
            raise InputError(f'regions are {tuple(regions)}: give three positive numbers, or none for the plain loss')
        self.model_name, self.model_args, self.command = model, dict(model_args or {}), command
        self.data = data if isinstance(data, VolumeData) else load_data(
            data, size=size, spacing=spacing, intensity=intensity, seed=seed)
        if self.data.train is None or not len(self.data.train):
            raise InputError(f'{self.data.name} has no training volumes')
        self.tag, self.samples, self.seed = tag or self.data.tag, samples, seed
        self.criterion = SegmentationLoss(regions or None)
        self.arguments = {
            **self.model_args, 'in_chans': len(self.data.channels), 'num_classes': len(self.data.labels)}
        like = self.create(self.arguments)
        self.patch, self.divisor = tuple(like.patch_size), tuple(like.divisor)

    def create(self, arguments: Mapping[str, Any]) -> Any:
        """The model with these arguments; a recipe for models that have no name overrides it."""
        import timm

        import vishub  # noqa: F401  registers our architectures
        if not timm.is_model(self.model_name.removeprefix('vishub/').split('.')[0]):
            raise catalog.unknown('model', self.model_name, timm.list_models())
        try:
            model = timm.create_model(self.model_name, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"model '{self.model_name}' refuses its arguments {dict(arguments)}: {error}") from error
        if not hasattr(model, 'patch_size') or not hasattr(model, 'divisor'):
            raise InputError(f"'{self.model_name}' segments no volumes: give a model of the task volume_segmentation")
        return model

    def describe(self) -> Dict[str, Any]:
        return {
            'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name,
            'regions': list(self.criterion.regions or ()), 'preprocessing': self.data.preprocessing.to_dict(),
        }

    def build_model(self) -> nn.Module:
        model = self.create(self.arguments)
        if hasattr(model, 'deep_supervision'):
            model.deep_supervision = True  # a way of training, so it is no argument of the stored model
        return model

    def train_set(self) -> TrainingPatches:
        assert self.data.train is not None
        return TrainingPatches(self.data.train, self.patch, self.samples, self.divisor, self.seed)

    def preview(self, side: int) -> Optional[Image.Image]:
        """The middle planes of eight training patches above their labels."""
        patches = self.train_set()
        columns = []
        for index in range(min(8, len(patches))):
            image, label = patches[0, index, side]
            plane, truth = image[0, image.shape[1] // 2], label[label.shape[0] // 2].float()
            plane = (plane - plane.min()) / (plane.max() - plane.min()).clamp_min(1e-12)
            columns.append(torch.cat([plane, truth / max(1, len(self.data.labels) - 1)]))
        return Image.fromarray((255 * torch.cat(columns, 1)).round().byte().numpy())

    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """Patches are normalised already: images (B, C, D, H, W) float32, labels (B, D, H, W) int64."""
        image, label = batch
        return image, label.long()

    def loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        return self.criterion(output, targets)

    @property
    def validates(self) -> bool:
        return self.data.val is not None and len(self.data.val) > 0

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """`dice`: per cent, mean over the foreground classes of each whole validation volume, then over volumes."""
        from vishub.tasks.volume_segmentation.metrics import dice_of_classes

        cases = self.data.val
        if cases is None or not len(cases):
            return None
        patch = self.train_set().size(side)
        rows: List[float] = []
        for index in my_share(len(cases)):
            case = cases[int(index)]
            planes = sliding_planes(model, torch.from_numpy(case.image), patch, device=device)
            found = np.stack([plane.argmax(0).byte().numpy() for plane in planes])
            values = [v for v in dice_of_classes(found, case.label, len(self.data.labels)) if v is not None]
            rows.append(100 * float(np.mean(values)) if values else 100.)
        return {'dice': float(gather_shares(torch.tensor(rows, dtype=torch.float64), len(cases)).mean())}

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights as fp16, load what was stored, evaluate that, and store the figures beside it."""
        from vishub.hub import save_folder
        from vishub.tasks.volume_segmentation.metrics import draw_pictures, evaluate

        # architecture without a tag: a fine-tuned model is no longer the tagged one
        architecture = self.model_name.split('/')[-1].split('.')[0]
        folder = Path(config.output) / f'{architecture}.{self.tag}'
        patch = self.train_set().size(config.side(config.epochs - 1))
        holder: Any = model
        holder.patch_size = patch
        cfg = dict(pretrained_cfg_of(model))
        cfg.update(
            architecture=architecture, tag=self.tag, input_size=(len(self.data.channels), *patch), patch_size=patch,
            label_names=self.data.labels, preprocessing=self.data.preprocessing.to_dict(),
            url='', file='', state_dict=None, hf_hub_filename=None,
            hf_hub_id=f'vishub/{architecture}.{self.tag}', license=self.data.licence)
        holder.pretrained_cfg = holder.default_cfg = cfg
        arguments = {**self.arguments, 'patch_size': list(patch)}
        for key in ('drop_path_rate', 'pretrained'):  # they belong to training
            arguments.pop(key, None)
        save_folder(model, folder, metrics={}, card={'licence': self.data.licence}, model_args=arguments)
        card = self.card(folder.name, patch)
        metrics: Dict[str, Any] = {
            'data': self.data.name,
            'training': {
                'command': self.command, 'seed': config.seed, 'epochs': config.epochs,
                'wall_s': round(result.wall_s, 1), 'samples': self.samples,
                'hardware': describe_hardware(next(model.parameters()).device),
                'recipe': {**self.describe(), **config.fingerprint()},
            },
        }
        if self.data.test is not None and len(self.data.test):
            report = evaluate([f'local-dir:{folder}'], self.data, device=str(next(model.parameters()).device))
            metrics.update({key: report[key] for key in ('split', 'num_test', 'metrics', 'report', 'peers')})
            card['pictures'] = draw_pictures(folder, self.data)
        save_folder(model, folder, metrics=metrics, card=card, model_args=arguments)
        logging.getLogger('vishub.training.main').info('stored %s: %s', folder, metrics.get('metrics'))
        return folder

    def card(self, name: str, patch: Sequence[int]) -> Dict[str, Any]:
        """What the model card says besides figures."""
        data = self.data
        channels, classes = ', '.join(data.channels), ', '.join(data.labels[1:])
        many = len(data.channels) > 1
        given = f'({", ".join(repr(f"{channel}.nii.gz") for channel in data.channels)})' if many else "'scan.nii.gz'"
        return {
            'description':
                f'`{name.partition(".")[0]}` labels each voxel of a volume: {classes}. Trained on patches of '
                f'{" x ".join(map(str, patch))} voxels of {data.name} (channels: {channels}). **For research only; it '
                'is no medical device, and nothing it says may decide on the treatment of anybody.**',
            'licence': data.licence,
            'use':
                'import vishub\n\n'
                f"pipe = vishub.pipeline('volume_segmentation', '{name}')\n"
                f'result = pipe({given})  # NIfTI, NRRD, or a folder or zip of DICOM\n'
                'print(result.volumes_ml)\n'
                "result.save('mask.nii.gz')  # in the scan's own geometry; .png, .glb, .json too\n",
            'limits': [
                'For research only. It is not a medical device and was never tried on patients for any purpose.',
                f'It knows what is in {data.name}, at its spacing and grey values, and takes any volume for such.',
                *data.terms,
            ],
        }
