"""The two recipes of a tracker: first to find the target, then to know whether what was found is the target."""
import logging
import math
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.ops import generalized_box_iou_loss

from vishub import catalog
from vishub.errors import InputError
from vishub.models.bactrack import TrackerOutput
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.evaluation import recorded
from vishub.tasks.tracking.constants import choose_constants
from vishub.tasks.tracking.data import PairSamples, TrackingData, load_data
from vishub.training.config import TrainConfig
from vishub.training.freezing import rest_frozen
from vishub.training.loop import TrainResult
from vishub.training.processes import gather_shares, my_share
from vishub.training.recipe import Recipe

__all__ = ['TrackingRecipe', 'corners', 'positive_tokens', 'tracking_loss']

_CE, _L1, _GIOU = 8.334, 5., 2.  # weights of TransT's loss
_BACKGROUND = 1 / 16  # weight of a background token in the cross-entropy
_CHOOSING = 16  # validation videos on which the tracker's constants are chosen


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """cx, cy, w, h -> x0, y0, x1, y1 (..., 4)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def positive_tokens(boxes: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
    """Which tokens lie on the target: columns ceil(x0 n) to ceil(x1 n) - 1, rows likewise, at least one, in the grid.

    TransT's own code does not clip them to the grid.

    Args:
        boxes: (B, 4), cx, cy, w, h in units of the search crop.
        grid: Rows and columns.

    Returns:
        bool (B, rows * columns).
    """
    edges = corners(boxes)
    inside = []
    for axis, count in ((1, grid[0]), (0, grid[1])):
        first = (edges[:, axis] * count).ceil().long()
        last = torch.maximum((edges[:, axis + 2] * count).ceil().long() - 1, first)
        place = torch.arange(count, device=boxes.device)
        inside.append(
            (place >= first.clamp(0, count - 1)[:, None]) & (place <= last.clamp(0, count - 1)[:, None]))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def tracking_loss(output: TrackerOutput, boxes: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
    """8.334 CE + 5 L1 + 2 GIoU, as TransT weighs them.

    CE runs over all tokens, background at 1/16, and is divided by the sum of the weights; the others are means over
    the positive tokens, L1 of the sum of the four differences.

    Args:
        output: Of the model.
        boxes: True boxes (B, 4), cx, cy, w, h in units of the search crop.
        grid: Rows and columns of the search tokens.
    """
    positive = positive_tokens(boxes, grid)
    weight = output.logits.new_tensor([1., _BACKGROUND])
    ce = F.cross_entropy(output.logits.flatten(0, 1), (~positive).long().flatten(), weight=weight)
    found = output.boxes[positive]
    true = boxes[:, None].expand(-1, positive.shape[1], -1)[positive]
    l1 = (found - true).abs().sum(-1).mean()
    giou = generalized_box_iou_loss(corners(found), corners(true), reduction='mean')
    return _CE * ce + _L1 * l1 + _GIOU * giou


class TrackingRecipe(Recipe):
    """Train a BACTrack-style network; the paper's own recipe is not public.

    Stage 1 trains all but the discriminator, with TransT's loss: AdamW, weight decay 1e-4, gradients clipped at 0.1
    (MixFormer's), and at every step a number of templates from 1 to `num_templates`. TransT's ten times lower
    learning rate of the backbone belongs to pretrained ones and is not in this recipe; a constant one of 1e-4 and
    four templates are those of the full-size recipe, one cycle up to 6e-4 and three templates those of the tiny
    network.

    Stage 2 trains the discriminator alone, from the weights of stage 1: binary cross-entropy of whether the box that
    the network chooses shows the target (overlap of 0.5 at least). Half of the samples do not hold the target. Behind
    it the tracker's constants are chosen on validation videos (`choose_constants`) and stored with the weights.

    Args:
        model: Name, e.g. `bactrack_tiny`.
        data: Path for `load_data`, or data already read.
        stage: 1 or 2.
        start: Folder of weights to start from; stage 2 needs one.
        model_args: Further arguments of the model.
        num_templates: Most templates of a sample.
        num_samples: Samples an epoch.
        seed: Seed of generated scenes; give the same as in the config.
        tag: Tag of the weights; by default the data's name.
        command: Command line, for the card.
    """

    def __init__(
            self,
            model: str,
            data: Union[str, Path, TrackingData],
            *,
            stage: int = 1,
            start: Union[str, Path, None] = None,
            model_args: Optional[Mapping[str, Any]] = None,
            num_templates: int = 3,
            num_samples: int = 8000,
            seed: int = 0,
            tag: Optional[str] = None,
            command: str = '',
    ):
        if stage not in (1, 2):
            raise InputError(f'stage is {stage}: it is 1 (find the target) or 2 (discriminator)')
        if stage == 2 and start is None:
            raise InputError('stage 2 trains the discriminator of a network that finds targets: give its folder')
        if num_templates < 1:
            raise InputError(f'num_templates is {num_templates}: give 1 or more')
        self.model_name, self.model_args, self.command = model, dict(model_args or {}), command
        self.stage, self.initial, self.num_templates = stage, None if start is None else Path(start), num_templates
        self.metric = 'iou' if stage == 1 else 'accuracy'
        self.data = data if isinstance(data, TrackingData) else load_data(data, num_samples=num_samples, seed=seed)
        if self.data.train is None or not len(self.data.train):
            raise InputError(f'{self.data.name} has nothing to train on')
        self.tag = tag or self.data.tag
        like = self.create()
        self.grid, self.sizes = like.grid_size, (like.template_size[0], like.img_size[0])
        cfg = pretrained_cfg_of(like)
        self.mean, self.std = (torch.tensor(tuple(cfg[key])).view(-1, 1, 1) for key in ('mean', 'std'))

    def create(self) -> Any:
        import timm

        import vishub  # noqa: F401  registers our architectures
        name = self.model_name.removeprefix('vishub/').split('.')[0]
        if not timm.is_model(name):
            raise catalog.unknown('model', self.model_name, timm.list_models())
        if not name.startswith('bactrack'):
            raise InputError(f"'{self.model_name}' tracks nothing: give a model of the task tracking")
        if self.initial is not None:
            if not (self.initial / 'config.json').is_file():
                raise InputError(f"'{self.initial}' holds no config.json: give the folder of the weights to start from")
            model = timm.create_model(f'local-dir:{self.initial}', pretrained=True, **self.model_args)
            if not pretrained_cfg_of(model).get('architecture', name) == name:
                raise InputError(f"'{self.initial}' holds a {pretrained_cfg_of(model)['architecture']}, not a {name}")
            return model
        try:
            return timm.create_model(self.model_name, **self.model_args)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"model '{self.model_name}' refuses its arguments {self.model_args}: {error}") from error

    def describe(self) -> Dict[str, Any]:
        return {
            'model': self.model_name, 'model_args': self.model_args, 'data': self.data.name, 'stage': self.stage,
            'num_templates': self.num_templates}

    def build_model(self) -> nn.Module:
        model = self.create()
        for name, parameter in model.named_parameters():
            if name.startswith('discriminator.') != (self.stage == 2):
                parameter.requires_grad_(False)
        return model

    def train_mode(self, model: nn.Module) -> None:
        rest_frozen(model)

    def samples(self, videos: Any, augment: bool) -> PairSamples:
        return PairSamples(
            videos, self.num_templates, *self.sizes, absent=0.5 if self.stage == 2 else 0., augment=augment)

    def train_set(self) -> PairSamples:
        assert self.data.train is not None
        return self.samples(self.data.train, augment=True)

    def preview(self, side: int) -> Optional[Image.Image]:
        """Eight samples: search crop with the true box, then the templates."""
        from PIL import ImageDraw

        samples, side = self.train_set(), self.sizes[1]
        sheet = Image.new('RGB', ((self.num_templates + 1) * side * 2, 4 * side), 'white')
        for place, index in enumerate(np.random.default_rng(0).permutation(len(samples))[:8]):
            sample = samples[0, int(index), side]
            left, top = (place % 2) * (self.num_templates + 1) * side, place // 2 * side
            picture = Image.fromarray(sample['search'].permute(1, 2, 0).numpy())
            if sample['present']:
                edges = (corners(sample['box']) * side).tolist()
                ImageDraw.Draw(picture).rectangle(edges, outline=(220, 30, 30))
            sheet.paste(picture, (left, top))
            for number, template in enumerate(sample['templates'], 1):
                sheet.paste(Image.fromarray(template.permute(1, 2, 0).numpy()), (left + number * side, top))
        return sheet

    def prepare(self, batch: Any, side: int, training: bool) -> Tuple[Tuple[torch.Tensor, ...], Any]:
        """-> (templates, search), normalised; (boxes, present)."""
        count = int(torch.randint(1, self.num_templates + 1, ())) if training else self.num_templates
        mean, std = self.mean.to(batch['search'].device), self.std.to(batch['search'].device)
        templates, search = ((batch[key].float() / 255 - mean) / std for key in ('templates', 'search'))
        return (templates[:, :count], search), (batch['box'], batch['present'])

    def loss(self, output: Any, targets: Any) -> torch.Tensor:
        boxes, present = targets
        if self.stage == 1:
            return tracking_loss(output, boxes, self.grid)
        shown = _overlap(output, boxes) >= 0.5
        return F.binary_cross_entropy_with_logits(output.reliability_logits, (shown & present).float())

    @property
    def validates(self) -> bool:
        return self.data.val is not None

    def validate(self, model: nn.Module, side: int, device: torch.device) -> Optional[Dict[str, float]]:
        """`iou`: mean overlap, in per cent, of the box with the highest score; of stage 2 `accuracy`: per cent of
        samples whose reliability is on the right side of 0.5."""
        if self.data.val is None:
            return None
        samples = self.samples(self.data.val, augment=False)
        indices = my_share(len(samples))
        rows = []
        for start in range(0, len(indices), 16):
            chosen = [samples[0, int(index), side] for index in indices[start:start + 16]]
            batch = {key: torch.stack([sample[key] for sample in chosen]).to(device) for key in chosen[0]}
            inputs, (boxes, present) = self.prepare(batch, side, training=False)
            output = model(*inputs)
            overlap = _overlap(output, boxes) * present
            right = (output.reliability_logits > 0) == (overlap >= 0.5)
            rows.append(torch.stack([overlap, right.float()], 1))
        share = torch.cat(rows) if rows else torch.zeros(0, 2)
        overlap, right = gather_shares(share.cpu(), len(samples)).double().mean(0).tolist()
        return {'iou': 100 * overlap} if self.stage == 1 else {'accuracy': 100 * right}

    @torch.no_grad()
    def calibrate_sizes(self, model: nn.Module) -> Tuple[float, float]:
        """Move the last biases of the box head so that half of the boxes are too wide and half too narrow.

        The loss makes boxes too large: where the centre is uncertain, a larger box has the larger expected overlap. A
        tracker feeds its boxes back, so that ten per cent in a frame become a box of half as much again. Measured on
        the validation split, over samples whose box overlaps the target. Ours, no other tracker's.

        Returns:
            Factors by which widths and heights were too large.
        """
        holder: Any = model.eval()
        samples = self.samples(self.data.val, augment=False)
        device = next(model.parameters()).device
        found, true = [], []
        for start in range(0, len(samples), 16):
            chosen = [samples[0, index, self.sizes[1]] for index in range(start, min(start + 16, len(samples)))]
            batch = {key: torch.stack([sample[key] for sample in chosen]).to(device) for key in chosen[0]}
            inputs, (boxes, _) = self.prepare(batch, self.sizes[1], training=False)
            output = model(*inputs)
            best = output.logits.float().softmax(-1)[..., 0].argmax(1)
            overlapping = _overlap(output, boxes) > 0.3
            found.append(output.boxes[torch.arange(len(boxes), device=device), best][overlapping].float().cpu())
            true.append(boxes[overlapping].cpu())
        sizes, right = torch.cat(found)[:, 2:], torch.cat(true)[:, 2:]
        factors = []
        for axis in range(2):
            ratio = float((sizes[:, axis] / right[:, axis]).median()) if len(sizes) else 1.
            middle = float(sizes[:, axis].median()) if len(sizes) else 0.
            # of a sigmoid s: d ln s = (1 - s) dz
            holder.reg_head[-1].bias[2 + axis] -= math.log(ratio) / (1 - middle)
            factors.append(round(ratio, 4))
        return factors[0], factors[1]

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> Path:
        """Store the weights as fp16; behind stage 2 load what was stored, evaluate that, and store its figures."""
        from vishub.hub import save_folder

        architecture = self.model_name.split('/')[-1].split('.')[0]
        name = f'{architecture}.{self.tag}' + ('_stage1' if self.stage == 1 else '')
        folder = Path(config.output) / name
        cfg = dict(pretrained_cfg_of(model))
        cfg.update(
            architecture=architecture, tag=name.partition('.')[2], url='', file='', state_dict=None,
            hf_hub_filename=None, hf_hub_id=f'vishub/{name}', license='apache-2.0')
        holder: Any = model
        holder.pretrained_cfg = holder.default_cfg = cfg
        training: Dict[str, Any] = {
            'command': self.command, 'seed': config.seed, 'epochs': config.epochs, 'wall_s': round(result.wall_s, 1),
            'samples': len(self.train_set()), 'hardware': describe_hardware(next(model.parameters()).device),
            'recipe': {**self.describe(), **config.fingerprint()}, 'validation': result.metrics,
        }
        if self.stage == 1 and self.data.val is not None:
            training['size_calibration'] = self.calibrate_sizes(model)
        if self.initial is not None:
            training['started_from'] = {
                'name': self.initial.resolve().name, **recorded(self.initial).get('training', {})}
        if self.stage == 2 and self.data.val is not None:
            videos = [self.data.val.video(index) for index in range(min(len(self.data.val), _CHOOSING))]
            chosen, trials = choose_constants(
                model, videos, next(model.parameters()).device,
                report=logging.getLogger('vishub.training.main').info)
            cfg['tracking'] = chosen
            training['constants'] = {'validation_videos': len(videos), 'chosen': chosen, 'trials': trials}
        save_folder(model, folder, metrics={'training': training}, card={}, model_args=self.model_args)
        if self.stage == 2 and self.data.test is not None:
            from vishub.tasks.tracking.metrics import draw_pictures, evaluate

            report = evaluate([f'local-dir:{folder}'], self.data, device=str(next(model.parameters()).device))
            card = self.card(folder.name)
            card['pictures'] = draw_pictures(folder, self.data, report)
            metrics = {key: report[key] for key in ('data', 'split', 'num_test', 'metrics', 'report', 'peers')}
            save_folder(
                model, folder, metrics={**metrics, 'training': training}, card=card, model_args=self.model_args)
        logging.getLogger('vishub.training.main').info('stored %s', folder)
        return folder

    def card(self, name: str) -> Dict[str, Any]:
        """What the model card says besides figures."""
        return {
            'description':
                f'`{name.partition(".")[0]}` follows one target from its box in the first frame. It is BACTrack-style, '
                "not a reproduction: only the paper's abstract could be read, so its sizes, constants and training are "
                f'our own choices or those of TransT, STARK and MixFormer. Trained on {self.data.name} and nothing '
                f'else. Precision is that at {self.data.radius} pixels; success AUC, precision and the rest run from 0 '
                'to 1. "latest" and "none" are the same weights with the last reliable template, or the first one '
                'alone, in place of the collection.',
            'use':
                'import vishub\n\n'
                f"pipe = vishub.pipeline('tracking', '{name}')\n"
                "result = pipe('drone.mp4', box=(310, 140, 42, 30))  # x, y, w, h in the first frame\n"
                "result.save('tracked.mp4')  # .csv, .json, .txt, .png too\n",
            'limits': [
                f'It was trained on {self.data.name}, not on real videos.',
                'It finds no target again that was out of its search region (four times its size) for long.',
            ],
        }


def _overlap(output: TrackerOutput, boxes: torch.Tensor) -> torch.Tensor:
    """IoU of each sample's chosen box with the true one, (B,)."""
    best = output.logits.float().softmax(-1)[..., 0].argmax(1)
    found = output.boxes[torch.arange(len(boxes), device=boxes.device), best].float()
    first, second = corners(found), corners(boxes.float())
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    union = found[:, 2:].prod(1) + boxes[:, 2:].prod(1) - shared
    return shared / union.clamp_min(1e-12)
