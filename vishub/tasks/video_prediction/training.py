"""The recipe that trains a video predictor: mean squared error and nothing else (the paper, section 4)."""
import logging
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.video_prediction.data import TrainingClips, VideoData, as_float, load_data, stack
from vishub.training.config import TrainConfig
from vishub.training.loop import TrainResult
from vishub.training.processes import gather_shares, my_share
from vishub.training.recipe import Recipe

__all__ = ['VideoPredictionRecipe']


class VideoPredictionRecipe(Recipe):
    """The next T frames from T frames.

    The paper's recipe is AdamW, weight decay 1e-2, no clipping, no averaged weights, and for Moving MNIST and TaxiBJ
    one cycle of the learning rate up to 1e-3, for WeatherBench a cosine from 5e-4: the defaults of `vishub train
    video_prediction`. Two things differ from the official run: the loop leaves vectors (biases, norms) out of the
    weight decay, and the cycle moves the learning rate but not Adam's first beta.

    Args:
        model: Name that `timm.create_model` knows, e.g. `predformer_tiny`.
        data: Path for `load_data`, or data already read, with clips of twice the model's number of frames.
        model_args: Further arguments of the model, e.g. `{'arrangement': 'full'}`.
        num_digits: See `load_data`.
        num_clips, stride: Generated clips an epoch, and pace of videos, see `load_data`.
        seed: Seed of generated clips; give the same as in the config.
        tag: Tag of the weights, as in `predformer_tiny.<tag>`; by default the data's name.
        command: Command line, for the card.
    """

    metric = 'skill'

    def __init__(
            self,
            model: str,
            data: Union[str, Path, VideoData],
            *,
            model_args: Optional[Mapping[str, Any]] = None,
            num_digits: int = 2,
            num_clips: int = 10_000,
            stride: int = 1,
            seed: int = 0,
            tag: Optional[str] = None,
            command: str = '',
    ):
        self.model_name, self.model_args, self.command = model, dict(model_args or {}), command
        like = self.create(self.model_args)  # its frames decide those of data that are made to measure
        self.num_frames = like.num_frames
        if isinstance(data, VideoData):
            self.data = data
        else:
            self.data = load_data(
                data, (like.in_chans, *like.img_size), 2 * self.num_frames, num_digits=num_digits,
                num_clips=num_clips, stride=stride, seed=seed)
        if self.data.train is None or not len(self.data.train):
            raise InputError(f'{self.data.name} has no training clips')
        length, channels, *sides = self.data.shape
        if length != 2 * self.num_frames:
            raise InputError(f'the clips have {length} frames; the model takes {self.num_frames} and gives as many')
        self.tag = tag or self.data.tag
        # data with a size of their own decide the model's
        self.shape_args = {
            name: value for name, value, had in (
                ('in_chans', channels, like.in_chans), ('img_size', tuple(sides), like.img_size))
            if value != had}

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
        if not hasattr(model, 'num_frames'):
            raise InputError(f"'{self.model_name}' predicts no frames: give a model of the task video_prediction")
        return model

    def describe(self) -> Dict[str, Any]:
        return {'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name}

    def build_model(self) -> nn.Module:
        return self.create({**self.model_args, **self.shape_args})

    def train_set(self) -> TrainingClips:
        assert self.data.train is not None
        return TrainingClips(self.data.train)

    def preview(self, side: int) -> Optional[Image.Image]:
        """Six training clips as strips, each from its lowest to its highest value, so that measurements show too."""
        clips = self.train_set()
        chosen = np.random.default_rng(0).permutation(len(clips))[:6]
        rows = []
        for index in chosen:
            clip = as_float(clips[0, int(index), side])[:, :1]  # the first channel
            clip = (clip - clip.min()) / (clip.max() - clip.min()).clamp_min(1e-12)
            rows.append(F.pad(clip, (1, 1, 1, 1), value=0.5).permute(1, 2, 0, 3).flatten(2)[0])  # H, T * W
        return Image.fromarray((255 * torch.cat(rows)).round().byte().numpy())

    def prepare(self, batch: torch.Tensor, side: int, training: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clips (B, 2T, C, H, W) -> the first T frames and the last T, normalised."""
        mean, std = (batch.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.data.mean, self.data.std))
        x = (as_float(batch) - mean) / std
        return x[:, :self.num_frames], x[:, self.num_frames:]

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, targets)

    @property
    def validates(self) -> bool:
        return self.data.val is not None

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """MSE and MAE in the scale of the field, and `skill`: per cent of copy-last-frame's MSE that is gone."""
        clips = self.data.val
        if clips is None:
            return None
        rows = []
        indices = my_share(len(clips))
        for start in range(0, len(indices), 16):
            batch = stack(clips, indices[start:start + 16]).to(device)
            x, y = self.prepare(batch, side, training=False)
            predicted = model(x).float()
            copied = x[:, -1:].expand_as(y)
            scale = torch.tensor(self.data.std, device=device).view(-1, 1, 1)
            for guess in (predicted, copied):
                error = (guess - y) * scale
                rows.append(torch.stack([error.square().sum((2, 3, 4)).mean(1), error.abs().sum((2, 3, 4)).mean(1)], 1))
        share = torch.cat([torch.cat(rows[0::2]), torch.cat(rows[1::2])], 1) if rows else torch.zeros(0, 4)
        mse, mae, copy_mse, _ = gather_shares(share.cpu(), len(clips)).double().mean(0).tolist()
        pixels = np.prod(clips.shape[1:]) if self.data.per_pixel else 1
        return {'mse': mse / pixels, 'mae': mae / pixels, 'skill': 100 * (1 - mse / copy_mse)}

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights as fp16, load what was stored, evaluate that, and store the figures beside it."""
        from vishub.hub import save_folder
        from vishub.tasks.video_prediction.metrics import draw_pictures, evaluate

        # architecture without a tag: a fine-tuned model is no longer the tagged one
        architecture = self.model_name.split('/')[-1].split('.')[0]
        folder = Path(config.output) / f'{architecture}.{self.tag}'
        length, channels, *sides = self.data.shape
        cfg = dict(pretrained_cfg_of(model))
        cfg.update(
            architecture=architecture, tag=self.tag, input_size=(channels, *sides), num_frames=self.num_frames,
            mean=tuple(self.data.mean) * (channels if len(self.data.mean) == 1 else 1),
            std=tuple(self.data.std) * (channels if len(self.data.std) == 1 else 1),
            url='', file='', state_dict=None, hf_hub_filename=None,
            hf_hub_id=f'vishub/{architecture}.{self.tag}', license='apache-2.0')
        holder: Any = model
        holder.pretrained_cfg = holder.default_cfg = cfg
        arguments = {**self.model_args, **self.shape_args}
        for key in ('drop_rate', 'proj_drop_rate', 'drop_path_rate', 'pretrained'):  # they belong to training
            arguments.pop(key, None)
        save_folder(model, folder, metrics={}, card={}, model_args=arguments)
        card = self.card(folder.name)
        metrics: Dict[str, Any] = {
            'data': self.data.name,
            'training': {
                'command': self.command, 'seed': config.seed, 'epochs': config.epochs,
                'wall_s': round(result.wall_s, 1), 'samples': len(self.train_set()),
                'hardware': describe_hardware(next(model.parameters()).device),
                'recipe': {**self.describe(), **config.fingerprint()},
            },
        }
        if self.data.test is not None:
            report = evaluate([f'local-dir:{folder}'], self.data, device=str(next(model.parameters()).device))
            metrics.update({key: report[key] for key in ('split', 'num_test', 'metrics', 'report', 'peers')})
            card['pictures'] = draw_pictures(folder, self.data, report)
        save_folder(model, folder, metrics=metrics, card=card, model_args=arguments)
        logging.getLogger('vishub.training.main').info('stored %s: %s', folder, metrics.get('metrics'))
        return folder

    def card(self, name: str) -> Dict[str, Any]:
        """What the model card says besides figures."""
        _, channels, height, width = self.data.shape
        given = f'{self.num_frames} frames of {height} x {width}'
        scale = 'means over pixels' if self.data.per_pixel else 'sums over the pixels of a frame'
        return {
            'description':
                f'`{name.partition(".")[0]}` predicts the next {self.num_frames} frames from {given} pixels, any '
                f'further ones from its own predictions. Trained on {self.data.name}. MSE and MAE are {scale}, means '
                'over clips and frames' + ('; SSIM uses a data range of 2, as published figures do.' if 'ssim' in
                                           self.data.metrics else '.'),
            'use':
                'import vishub\n\n'
                f"pipe = vishub.pipeline('video_prediction', '{name}')\n"
                f"result = pipe({'array' if self.data.per_pixel or channels == 2 else repr('clip.gif')}, "
                f'horizon={3 * self.num_frames})\n'
                "result.save('future.gif')  # true and predicted frames side by side; .mp4, .png, .npy, .json too\n",
            'limits': [
                f'It knows what moves in {self.data.name} and takes any clip for such.',
                'Where several futures are possible it predicts their mean, which is blurred.',
            ],
        }
