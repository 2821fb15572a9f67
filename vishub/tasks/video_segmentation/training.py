"""The recipe that trains ASTR (arXiv:2408.10067): its loss, and the scanning-mode augmentation on the fly."""
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.video_segmentation.data import SegmentationData, TrainingClips, load_data
from vishub.tasks.video_segmentation.geometry import Sector, random_sectors, to_linear, to_sector
from vishub.training.config import TrainConfig
from vishub.training.loop import TrainResult
from vishub.training.processes import gather_shares, my_share
from vishub.training.recipe import Recipe

__all__ = ['VideoSegmentationRecipe', 'mask_loss', 'segmentation_loss']

_BODY_WEIGHT = 0.3


def mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy + (1 - soft Dice) + mean absolute error.

    Args:
        logits: (N, 1, H, W), before the sigmoid.
        target: The same shape, 0 to 1.
    """
    logits, target = logits.float(), target.float()
    share = logits.sigmoid()
    dice = 2 * (share * target).sum((1, 2, 3)) / ((share + target).sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + (1 - dice.mean()) + (share - target).abs().mean()


def segmentation_loss(
        output: Tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        body: torch.Tensor,
        return_parts: bool = False,
) -> Any:
    """ASTR's loss: of the mask, and 0.3 times that of the coarse maps.

    Args:
        output: Logits (B, 1, H, W) and coarse maps (B, T - 1, 1, h, w).
        mask: Of the frame to segment, (B, 1, H, W), 0 to 1.
        body: Widened masks of the earlier frames, (B, T - 1, 1, H, W).
        return_parts: Also give (loss of the mask, loss of the maps).
    """
    logits, maps = output
    maps = F.interpolate(maps.flatten(0, 1), size=body.shape[-2:], mode='bilinear', align_corners=True)
    parts = mask_loss(logits, mask), mask_loss(maps, body.flatten(0, 1))
    loss = parts[0] + _BODY_WEIGHT * parts[1]
    return (loss, parts) if return_parts else loss


class VideoSegmentationRecipe(Recipe):
    """Segment the last frame of a clip.

    The official recipe is AdamW, learning rate 1e-4, weight decay 5e-4, batch 12, 24 epochs at 352 pixels, gradients
    clamped to 0.5 elementwise: the defaults of `vishub train video_segmentation`, but that the loop clips their norm,
    and leaves vectors (biases, norms) out of the weight decay. The official augmentation of scanning modes doubles the
    training set beforehand; here each clip is converted with a probability, with other parameters every time.

    Args:
        model: Name that `timm.create_model` knows, e.g. `astr_tiny`.
        data: Path for `load_data`, or data already read.
        model_args: Further arguments of the model, e.g. `{'clip_size': 4}`.
        asma: Probability with which a clip is converted to the other geometry; needs data of a known geometry.
        vertical_flip: Flip upside down half of the time (left and right are always flipped so), as officially.
        num_clips, geometry, soft: See `load_data`.
        seed: Seed of phantoms; give the same as in the config.
        tag: Tag of the weights; by default the data's.
        command: Command line, for the card.

    Raises:
        InputError: If the data have no training clips, or the model does not segment clips.
    """

    metric = 'dice'

    def __init__(
            self,
            model: str,
            data: Union[str, Path, SegmentationData],
            *,
            model_args: Optional[Mapping[str, Any]] = None,
            asma: float = 0.5,
            vertical_flip: bool = True,
            num_clips: int = 1000,
            geometry: str = '',
            soft: bool = False,
            seed: int = 0,
            tag: Optional[str] = None,
            command: str = '',
    ):
        self.model_name, self.model_args, self.command = model.removeprefix('vishub/'), dict(model_args or {}), command
        if not 0 <= asma <= 1:
            raise InputError(f'asma is {asma}: it is a probability, from 0 to 1')
        with torch.device('meta'):  # shapes only: weights would be fetched for nothing
            like = self._create({
                key: value for key, value in self.model_args.items() if not key.startswith('pretrained')})
        self.cfg = pretrained_cfg_of(like)
        self.clip_size: int = like.clip_size  # type: ignore[assignment]
        self.data = data if isinstance(data, SegmentationData) else load_data(
            data, self.clip_size, num_clips=num_clips, geometry=geometry, soft=soft, side=self.cfg['input_size'][-1],
            seed=seed)
        if self.data.train is None:
            raise InputError(f'{self.data.name} has no training clips')
        self.train_clips = self.data.train
        self.asma = asma if self.train_clips.geometry else 0.
        self.vertical_flip = vertical_flip
        self.tag = tag or self.data.tag

    def describe(self) -> Dict[str, Any]:
        return {
            'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name, 'asma': self.asma,
            'vertical_flip': self.vertical_flip}

    def build_model(self) -> nn.Module:
        return self._create(self.model_args)

    def _create(self, arguments: Mapping[str, Any]) -> nn.Module:
        import timm

        import vishub  # noqa: F401  registers our architectures
        row = catalog.find(self.model_name)
        architecture = catalog.find(row.architecture) if isinstance(row, catalog.Weight) else row
        assert isinstance(architecture, catalog.Architecture)
        if architecture.task != 'video_segmentation':
            raise InputError(
                f"'{self.model_name}' is for {architecture.task}, not for video_segmentation: give astr_tiny, "
                'astr_pvt_v2_b2 or astr_res2net50')
        try:
            return timm.create_model(self.model_name, **arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"model '{self.model_name}' refuses its arguments {dict(arguments)}: {error}") from error

    def train_set(self) -> TrainingClips:
        return TrainingClips(self.train_clips)

    def remarks(self) -> Tuple[str, ...]:
        if self.train_clips.geometry:
            return ()
        return ('The geometry of the videos is unknown, so the scanning-mode augmentation is off (--geometry).',)

    def prepare(
            self, batch: Dict[str, torch.Tensor], side: int, training: bool,
    ) -> Tuple[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Samples of `ClipSet` -> normalised clips (B, T, 3, S, S); masks (B, 1, S, S), bodies (B, T - 1, 1, S, S)."""
        frames = batch['frames'].float().flatten(1, 2) / 255  # B, 3T, S, S
        masks = torch.cat([batch['masks'], batch['body']], dim=1).float() / 255  # B, 2T, S, S
        if training:
            frames, masks = self._augmented(frames, masks, batch['sector'])
        mean, std = (frames.new_tensor(self.cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        clip = (frames.unflatten(1, (self.clip_size, 3)) - mean) / std
        return clip, (masks[:, :1], masks[:, self.clip_size + 1:, None])

    def _augmented(
            self, frames: torch.Tensor, masks: torch.Tensor, sectors: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """One conversion and one flip for all frames of a clip."""
        chosen = torch.rand(len(frames)) < self.asma
        if chosen.any():
            if self.train_clips.geometry == 'sector':
                known = sectors[chosen.to(sectors.device)].cpu()
                convert, sector = to_linear, Sector(known[:, 0], known[:, 1])
            else:
                convert, sector = to_sector, random_sectors(int(chosen.sum()))
            chosen = chosen.to(frames.device)
            frames[chosen] = convert(frames[chosen], sector)
            masks[chosen] = convert(masks[chosen], sector, 'nearest')
        for dim in (3, 2) if self.vertical_flip else (3,):
            flip = (torch.rand(len(frames)) < 0.5).view(-1, 1, 1, 1).to(frames.device)
            frames, masks = (torch.where(flip, x.flip(dim), x) for x in (frames, masks))
        return frames, masks

    def loss(self, output: Any, targets: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return segmentation_loss(output, *targets)

    def preview(self, side: int) -> Optional[Image.Image]:
        """Eight training clips as the model gets them, the masks' outlines in white."""
        clips = self.train_set()
        indices = np.random.default_rng(0).permutation(len(clips))[:8]
        samples = [clips[0, int(index), side] for index in indices]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        clip, (mask, _) = self.prepare(batch, side, training=True)
        mean, std = (torch.tensor(self.cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        pictures = (clip * std + mean).clamp(0, 1)
        outline = F.max_pool2d(mask, 3, 1, 1) - (1 - F.max_pool2d(1 - mask, 3, 1, 1))
        pictures[:, 0] = torch.maximum(pictures[:, 0], outline)
        sheet = pictures.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # B * S, T * S, 3
        return Image.fromarray((255 * sheet).round().byte().numpy())

    @property
    def validates(self) -> bool:
        return bool(self.data.val)

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """Dice of the frames to segment at the training size, of each geometry and over all."""
        figures: Dict[str, float] = {}
        shares: List[torch.Tensor] = []
        for name, clips in self.data.val.items():
            indices = my_share(len(clips))
            rows = []
            for start in range(0, len(indices), 16):
                samples = [clips.sample(int(index), side) for index in indices[start:start + 16]]
                batch = {key: torch.stack([sample[key] for sample in samples]).to(device) for key in samples[0]}
                clip, (mask, _) = self.prepare(batch, side, training=False)
                found, true = model(clip)[:, 0] > 0, mask[:, 0] > 0.5
                total = found.sum((1, 2)) + true.sum((1, 2))
                rows.append(torch.where(total > 0, 2 * (found & true).sum((1, 2)) / total.clamp_min(1), 1.))
            share = torch.cat(rows).float().cpu() if rows else torch.zeros(0)
            shares.append(gather_shares(share[:, None], len(clips))[:, 0])
            figures[f'dice_{name}'] = float(shares[-1].mean())
        if not shares:
            return None
        return {'dice': float(torch.cat(shares).mean()), **(figures if len(figures) > 1 else {})}

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights, load what was stored, measure that, and store the figures beside it."""
        from vishub.hub import save_folder
        from vishub.tasks.video_segmentation.metrics import card_entry, draw_pictures, evaluate

        architecture = self.model_name.split('.')[0]
        folder = Path(config.output) / f'{architecture}.{self.tag}'
        side = config.resolution[-1][0]
        cfg = dict(pretrained_cfg_of(model))
        cfg.update(
            architecture=architecture, tag=self.tag, input_size=(3, side, side), num_frames=self.clip_size, url='',
            file='', state_dict=None, hf_hub_filename=None, hf_hub_id=f'vishub/{architecture}.{self.tag}',
            license='apache-2.0')
        holder: Any = model
        holder.pretrained_cfg = holder.default_cfg = cfg
        arguments = {
            key: value for key, value in self.model_args.items() if key not in ('pretrained', 'pretrained_backbone')}
        # float32: the doubled residuals make maps, and the variances of batch norm, too large for float16
        save_folder(model, folder, metrics={}, card={}, dtype=torch.float32, model_args=arguments)
        device = str(next(model.parameters()).device)
        metrics: Dict[str, Any] = {
            'data': self.data.name,
            'training': {
                'command': self.command, 'seed': config.seed, 'epochs': config.epochs,
                'wall_s': round(result.wall_s, 1), 'samples': len(self.train_clips),
                'hardware': describe_hardware(next(model.parameters()).device),
                'recipe': {**self.describe(), **config.fingerprint()},
            },
        }
        card = card_entry(folder.name, self.data, self.asma)
        if self.data.test:
            report = evaluate([f'local-dir:{folder}'], self.data, device=device)
            metrics.update({key: report[key] for key in ('split', 'num_test', 'metrics', 'report', 'peers')})
            card['pictures'] = draw_pictures(folder, self.data)
        save_folder(model, folder, metrics=metrics, card=card, dtype=torch.float32, model_args=arguments)
        logging.getLogger('vishub.training.main').info('stored %s: %s', folder, metrics.get('metrics'))
        return folder
