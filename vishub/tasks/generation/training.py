"""The recipe that trains a denoiser on labelled pictures: plain, or as the student of a trained one (LiT)."""
import contextlib
import logging
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from vishub import catalog
from vishub.errors import InputError
from vishub.models.dit import DiffusionTransformer, drop_labels
from vishub.models.lit import LinearDiffusionTransformer, inherit_from_dit
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.data import ImageData, load_data
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.generation.data import PictureSet, from_pixels
from vishub.tasks.generation.diffusion import NUM_TIMESTEPS, Diffusion, distillation_loss, hybrid_loss
from vishub.tasks.generation.metrics import Judge, compare_to_real, feature_statistics, generate_for_metrics
from vishub.tasks.generation.pipeline import GenerationPipeline, load_autoencoder
from vishub.training.config import TrainConfig
from vishub.training.loop import TrainResult
from vishub.training.recipe import Recipe

__all__ = ['GenerationRecipe']


class GenerationRecipe(Recipe):
    """Hybrid loss (noise and variance) on pixels or latents; with a teacher, also its two distillation terms.

    Args:
        model: Name of a denoiser, as `lit_small28`.
        data: Path for classification's `load_data`, or data already read.
        model_args: Further arguments of the model.
        teacher: Trained denoiser whose outputs teach: name with weights, or `local-dir:FOLDER`.
        inherit: Start from the teacher's weights: all but the attention for a LiT (section 3.3 of its paper).
        noise_weight, variance_weight: Weights of the distillation terms; 0.5 and 0.05 in the paper.
        flip: Mirror training pictures by chance.
        epoch_size: Pictures an epoch; see `PictureSet`.
        vae: For models of latents: an AutoencoderKL, by folder or Hub name.
        judge: Classifier of the same classes that judges samples at each validation; without it there is none.
        num_samples: Pictures a validation generates.
        num_inference_steps, guidance_scale: How it generates them.
        in_chans: Channels of an image folder; by default those of the model, or 3 with a VAE.
        seed: Seed of the data's order; give the same as in the config.
        amp: Precision of the teacher's forward passes; give the same as in the config.
        tag: Tag of the weights; by default the data's name.
        command: Command line, for the card.
    """

    metric = 'agreement'

    def __init__(
            self,
            model: str,
            data: Union[str, Path, ImageData],
            *,
            model_args: Optional[Mapping[str, Any]] = None,
            teacher: Optional[str] = None,
            inherit: bool = False,
            noise_weight: float = 0.5,
            variance_weight: float = 0.05,
            flip: bool = False,
            epoch_size: Optional[int] = None,
            vae: Optional[str] = None,
            judge: Optional[str] = None,
            num_samples: int = 250,
            num_inference_steps: int = 20,
            guidance_scale: float = 1.5,
            in_chans: Optional[int] = None,
            seed: int = 0,
            amp: str = 'no',
            tag: Optional[str] = None,
            command: str = '',
    ):
        if inherit and teacher is None:
            raise InputError('inherit takes the weights of a teacher: give one')
        if noise_weight < 0 or variance_weight < 0:
            raise InputError(f'noise_weight is {noise_weight}, variance_weight {variance_weight}: give 0 or more')
        self.model_name, self.model_args = model, dict(model_args or {})
        self.teacher_name, self.inherit = teacher, inherit
        self.weights = (noise_weight, variance_weight)
        cfg = self._architecture_cfg()
        self.autoencoder: Any = load_autoencoder(vae) if vae else None
        channels = in_chans or (cfg['input_size'][0] if vae is None else 3)
        self.data = data if isinstance(data, ImageData) else load_data(data, channels)
        if self.data.train.in_chans != channels:
            raise InputError(
                f"'{model}' makes pictures of {channels} channel(s), those of {self.data.name} have "
                f'{self.data.train.in_chans}: give another model, or model_args in_chans={self.data.train.in_chans}')
        self.flip, self.epoch_size, self.vae, self.seed, self.amp = flip, epoch_size, vae, seed, amp
        self.judge_name, self.num_samples = judge, num_samples
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.tag, self.command = tag or self.data.tag, command
        self.diffusion = Diffusion()
        self.teacher: Any = None
        self._judge: Optional[Tuple[Judge, Any]] = None
        self._remarks: List[str] = []

    def _architecture_cfg(self) -> Dict[str, Any]:
        import timm

        import vishub  # noqa: F401  registers our architectures
        name = self.model_name.removeprefix('vishub/').partition('.')[0]
        row = catalog.find(name)  # an unknown name is answered with the nearest ones
        if not isinstance(row, catalog.Architecture) or row.task != 'generation':
            raise InputError(f"'{self.model_name}' does not generate pictures: give a model of the task generation")
        cfg: Any = timm.get_pretrained_cfg(name)
        if not cfg.num_classes:
            raise InputError(f"'{self.model_name}' is not a model of classes, and this recipe has no captions")
        return {**cfg.to_dict(), **({'input_size': (self.model_args['in_chans'], 0, 0)}
                                    if 'in_chans' in self.model_args else {})}

    def describe(self) -> Dict[str, Any]:
        return {
            'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name,
            'teacher': self.teacher_name, 'inherit': self.inherit,
            'distillation': list(self.weights) if self.teacher_name else None,
            'flip': self.flip, 'epoch_size': self.epoch_size, 'vae': self.vae,
        }

    def build_model(self) -> nn.Module:
        import timm
        try:
            model: Any = timm.create_model(
                self.model_name.removeprefix('vishub/'), num_classes=len(self.data.classes), **self.model_args)
        except (TypeError, ValueError) as error:
            raise InputError(f"model '{self.model_name}' refuses its arguments {self.model_args}: {error}") from error
        if not model.learn_sigma:
            raise InputError('the hybrid loss trains the variance, too: build the model with learn_sigma=True')
        if self.teacher_name is not None:
            self.teacher = self._load_teacher(model)
        if self.inherit and self.teacher is not None:
            if isinstance(model, LinearDiffusionTransformer):
                inherit_from_dit(model, self.teacher.state_dict())
                self._remarks.append(f"all but the attention starts from '{self.teacher_name}'")
            else:
                model.load_state_dict(self.teacher.state_dict())
                self._remarks.append(f"starts from '{self.teacher_name}'")
        return model

    def _load_teacher(self, student: DiffusionTransformer) -> nn.Module:
        teacher = GenerationPipeline.load(str(self.teacher_name)).eval().requires_grad_(False)
        for what in ('in_chans', 'out_chans', 'num_classes', 'img_size'):
            theirs, own = getattr(teacher, what, None), getattr(student, what)
            if theirs != own:
                raise InputError(
                    f"teacher '{self.teacher_name}' does not fit '{self.model_name}': {what} is {theirs}, not {own}")
        return teacher

    def remarks(self) -> Sequence[str]:
        return self._remarks

    def train_mode(self, model: Any) -> None:
        # Labels are dropped by `prepare`, so that student and teacher miss the same ones.
        model.label_embed.eval()

    def train_set(self) -> PictureSet:
        return PictureSet(self.data.train, self.flip, self.seed, self.epoch_size)

    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[Tuple[torch.Tensor, ...], Dict[str, Any]]:
        """(uint8 (B, C, side, side), labels (B,)) -> ((x, t, y), what the loss needs)."""
        pixels, y = batch
        x_start = from_pixels(pixels)
        if self.autoencoder is not None:
            autoencoder = self.autoencoder.to(x_start.device)
            with torch.no_grad():  # a sample of the posterior, as DiT
                x_start = autoencoder.encode(x_start).latent_dist.sample() * autoencoder.config.scaling_factor
        # one timestep in each of B equal stretches of 0..999: uniform, with less scatter in the loss
        places = (torch.randperm(len(y)) + torch.rand(len(y))) / len(y)
        t = (places * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1).to(x_start.device)
        noise = torch.randn_like(x_start)
        x = self.diffusion.add_noise(x_start, noise, t)
        y = drop_labels(y, len(self.data.classes), self._drop_rate)
        targets = {'x_start': x_start, 'x': x, 't': t, 'noise': noise, 'teacher': None}
        if self.teacher is not None and any(self.weights):
            teacher = self.teacher.to(x.device)
            with torch.no_grad(), self._autocast(x.device):
                targets['teacher'] = teacher(x, t, y)
        return (x, t, y), targets

    @property
    def _drop_rate(self) -> float:
        return float(self.model_args.get('class_drop_rate', 0.1))

    def _autocast(self, device: torch.device) -> ContextManager:
        if self.amp == 'no':
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16 if self.amp == 'bf16' else torch.float16)

    def loss(self, output: torch.Tensor, targets: Dict[str, Any]) -> torch.Tensor:
        teacher = targets['teacher']
        total = hybrid_loss(
            self.diffusion, output, targets['x_start'], targets['x'], targets['noise'], targets['t']).total
        if teacher is not None:
            noise, variance = distillation_loss(output, teacher)
            total = total + self.weights[0] * noise + self.weights[1] * variance
        return total.mean()

    @property
    def validates(self) -> bool:
        return self.judge_name is not None

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """Judge samples; the real pictures that they are compared to are the validation split."""
        if self.judge_name is None:
            return None
        if self._judge is None:
            judge = Judge(self.judge_name, self.data.classes, device)
            real = self.data.val if self.data.val is not None else self.data.train
            self._judge = judge, feature_statistics(judge, real)
        judge, real_statistics = self._judge
        pipe = GenerationPipeline(model, device, vae=self.autoencoder, class_names=self.data.classes)
        pictures, labels = generate_for_metrics(
            pipe, self.num_samples, num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale)
        return compare_to_real(judge, pictures, labels, real_statistics)

    def finish(self, model: Any, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights and, where the classes have a judge, figures of the stored weights and a sample sheet."""
        from vishub.hub import save_folder
        from vishub.tasks.generation.metrics import evaluate, update_card
        architecture = self.model_name.split('/')[-1].split('.')[0]
        folder = Path(config.output) / f'{architecture}.{self.tag}'
        arguments = {key: value for key, value in self.model_args.items() if key != 'pretrained'}
        changes = dict(
            architecture=architecture, tag=self.tag, num_classes=model.num_classes,
            input_size=(model.in_chans, *model.img_size), label_names=list(self.data.classes),
            mean=(0.5,) * self.data.train.in_chans, std=(0.5,) * self.data.train.in_chans,
            hf_hub_id=f'vishub/{architecture}.{self.tag}', license='apache-2.0',
        )
        model.pretrained_cfg = model.default_cfg = {**pretrained_cfg_of(model), **changes}
        metrics = {
            'data': self.data.name,
            'training': {
                'command': self.command, 'seed': config.seed, 'epochs': config.epochs,
                'steps': result.step, 'wall_s': round(result.wall_s, 1),
                'hardware': describe_hardware(next(model.parameters()).device), 'samples': len(self.data.train),
                'recipe': {**self.describe(), **config.fingerprint()},
            },
        }
        save_folder(model, folder, metrics=metrics, card={}, model_args=arguments)
        if self.judge_name is not None and self.data.test is not None:
            device = str(next(model.parameters()).device)
            update_card(folder, evaluate([f'local-dir:{folder}'], self.data, device=device))
        logging.getLogger('vishub.training.main').info('stored %s', folder)
        return folder
