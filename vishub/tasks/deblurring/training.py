"""The recipe that trains a deblurring model, with the losses of DeepRFTv2 (arXiv:2511.21132)."""
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.models.deeprftv2 import DeblurOutput, half_size
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.deblurring.data import DeblurData, Pairs, Photos, TrainingCrops, load_data
from vishub.training.config import TrainConfig
from vishub.training.loop import TrainResult
from vishub.training.processes import gather_shares, my_share
from vishub.training.recipe import Recipe

__all__ = ['DeblurringRecipe', 'deblurring_loss', 'fourier_distance']


def fourier_distance(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean modulus of the difference of the (unnormalised) spectra of two batches of pictures (B, C, H, W)."""
    return torch.fft.rfft2(prediction.float() - target.float()).abs().mean()


def deblurring_loss(output: DeblurOutput, sharp: torch.Tensor, fourier_weight: float = 0.01) -> torch.Tensor:
    """L1 + `fourier_weight` * Fourier distance, each the mean over a scale's predictions, of both scales.

    Args:
        output: All predictions of both scales; all of them are supervised.
        sharp: The truth (B, 3, H, W).
        fourier_weight: 0.01 in the official recipe.
    """
    loss = sharp.new_zeros(())
    for predictions, target in ((output.full, sharp), (output.half, half_size(sharp))):
        for prediction in predictions:
            one = F.l1_loss(prediction.float(), target) + fourier_weight * fourier_distance(prediction, target)
            loss = loss + one / len(predictions)
    return loss


# Pictures of the test split that are measured when training has ended, evenly spread.
NUM_TEST = 50


class DeblurringRecipe(Recipe):
    """Random crops of pairs, or of photographs that are shaken on the fly; PSNR on the validation split.

    Args:
        model: Name of a deblurring architecture, e.g. `deeprftv2_tiny`.
        data: Folder for `load_data`, or data already read.
        model_args: Further arguments of the model.
        reversible: Undo the model's columns for the gradients in place of keeping their activations: memory does not
            grow with their number, and a step takes one more forward pass.
        crops: Crops of each picture an epoch.
        fourier_weight: See `deblurring_loss`.
        num_val: Pictures of the validation split that are measured, evenly spread.
        val_side: Side in pixels of what is measured of each, its middle.
        seed: Seed of crops and kernels; give the same as in the config.
        tag: Tag of the weights; by default the data's.
        command: Command line, for the card.

    Raises:
        InputError: If the data have no training split, or the model is not for deblurring.
    """

    metric = 'psnr'

    def __init__(
            self,
            model: str,
            data: Union[str, Path, DeblurData],
            *,
            model_args: Optional[Mapping[str, Any]] = None,
            reversible: bool = False,
            crops: int = 8,
            fourier_weight: float = 0.01,
            num_val: int = 32,
            val_side: int = 128,
            seed: int = 0,
            tag: Optional[str] = None,
            command: str = '',
    ):
        self.model_name, self.model_args = model.removeprefix('vishub/'), dict(model_args or {})
        row = catalog.find(self.model_name)
        architecture = catalog.find(row.architecture) if isinstance(row, catalog.Weight) else row
        assert isinstance(architecture, catalog.Architecture)
        if architecture.task != 'deblurring':
            raise InputError(f"'{model}' is for {architecture.task}, not for deblurring: give deeprftv2_tiny, _s or _b")
        self.data = data if isinstance(data, DeblurData) else load_data(data)
        if self.data.train is None:
            raise InputError(f'{self.data.name} has no training split')
        self.train: Union[Photos, Pairs] = self.data.train
        self.reversible, self.crops, self.fourier_weight = reversible, crops, fourier_weight
        self.val = None if self.data.val is None else self.data.val.take(num_val)
        self.val_side, self.seed, self.command = val_side, seed, command
        self.tag = tag or self.data.tag

    def describe(self) -> Dict[str, Any]:
        described = {
            'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name, 'crops': self.crops,
            'fourier_weight': self.fourier_weight,
        }
        if isinstance(self.train, Photos):
            described.update(shake=list(self.train.lengths), noise=self.train.noise)
        return described

    def build_model(self) -> nn.Module:
        import timm

        import vishub  # noqa: F401  registers our architectures
        try:
            model = timm.create_model(self.model_name, **self.model_args)
        except (TypeError, ValueError) as error:
            raise InputError(f"model '{self.model_name}' refuses its arguments {self.model_args}: {error}") from error
        holder: Any = model
        holder.set_grad_checkpointing(self.reversible)
        return model

    def train_set(self) -> TrainingCrops:
        return TrainingCrops(self.train, self.crops, self.seed)

    def prepare(
            self, batch: Dict[str, torch.Tensor], side: int, training: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, side, side) twice -> float 0..1, blurred and sharp."""
        return batch['blurred'].float() / 255, batch['sharp'].float() / 255

    def loss(self, output: DeblurOutput, targets: torch.Tensor) -> torch.Tensor:
        return deblurring_loss(output, targets, self.fourier_weight)

    def preview(self, side: int) -> Optional[Image.Image]:
        """Eight training samples, the blurred above the sharp ones."""
        samples = self.train_set()
        indices = np.random.default_rng([self.seed, 0]).permutation(len(samples))[:8]
        rows: Dict[str, List[np.ndarray]] = {'blurred': [], 'sharp': []}
        for index in indices:
            for name, image in samples[0, int(index), side].items():
                rows[name].append(image.numpy().transpose(1, 2, 0))
        return Image.fromarray(np.concatenate([np.concatenate(rows[name], 1) for name in rows], 0))

    @property
    def validates(self) -> bool:
        return self.val is not None

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        if self.val is None:
            return None
        rows = []
        for index in my_share(len(self.val)):
            sample = self.val.sample(int(index), self.val_side)
            images = torch.from_numpy(np.stack([sample.blurred, sample.sharp])).to(device)
            blurred, sharp = images.permute(0, 3, 1, 2).float() / 255
            output = model(blurred[None])[0].float().clamp(0, 1).mul(255).round() / 255
            rows.append(torch.stack([F.mse_loss(x, sharp) for x in (output, blurred)]))
        share = torch.stack(rows).cpu() if rows else torch.zeros(0, 2)
        psnr, blurred = (-10 * gather_shares(share, len(self.val)).log10()).mean(0).tolist()
        return {'psnr': psnr, 'psnr_gain': psnr - blurred}

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights, load what was stored, measure that, and store the figures beside it."""
        from vishub.hub import save_folder
        from vishub.tasks.deblurring.metrics import card_entry, evaluate, save_sheet

        architecture = self.model_name.split('.')[0]
        folder = Path(config.output) / f'{architecture}.{self.tag}'
        side = config.resolution[-1][0]
        cfg = dict(pretrained_cfg_of(model))
        cfg.update(
            architecture=architecture, tag=self.tag, input_size=(3, side, side), license='apache-2.0',
            hf_hub_id=f'vishub/{architecture}.{self.tag}', url='', file='')
        holder: Any = model
        holder.pretrained_cfg = holder.default_cfg = cfg
        arguments = {key: value for key, value in self.model_args.items() if key != 'pretrained'}
        save_folder(model, folder, metrics={}, card={}, model_args=arguments)
        metrics: Dict[str, Any] = {
            'data': self.data.name,
            'training': {
                'command': self.command, 'seed': config.seed, 'epochs': config.epochs,
                'resolution': [list(phase) for phase in config.resolution], 'wall_s': round(result.wall_s, 1),
                'hardware': describe_hardware(next(model.parameters()).device),
                'samples': len(self.train), 'recipe': {**self.describe(), **config.fingerprint()},
            },
        }
        if self.data.test is not None or self.data.val is not None:
            report = evaluate([str(folder)], self.data, limit=NUM_TEST, device=str(next(model.parameters()).device))
            metrics.update({key: report[key] for key in ('split', 'num_test', 'metrics', 'peers', 'report')})
            save_sheet([str(folder)], self.data, folder / 'samples.png')
        save_folder(
            model, folder, metrics=metrics, model_args=arguments, card=card_entry(folder.name, self.data))
        logging.getLogger('vishub.training.main').info('stored %s: %s', folder, metrics.get('metrics'))
        return folder

    def remarks(self) -> Sequence[str]:
        return (self.data.note,) if self.data.note else ()
