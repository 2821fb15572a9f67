"""The training loop. It trains any `Recipe`, on one process or many (Accelerate), and resumes exactly.

How a resumed run ends bit-identical to an uninterrupted one: nothing random depends on history. The order of an
epoch is a function of (seed, epoch), a sample's augmentation of (seed, epoch, index), and everything else (drop path,
mixup) of (seed, step, process), because all generators are seeded anew at every step. So no generator's state needs
keeping.

How many processes train as one: a global batch is one slice of the epoch's order, of which each process takes its
part; gradients and the logged loss are means over the processes, validation is shared out and gathered, and whatever
decides how the run goes on (a limit, an error) is decided once, for all. Only the main process writes. Under FSDP the
processes split the weights, too (`sharding.py`); what is validated and written is whole.
"""
import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Sampler

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.training.checkpoint import load_checkpoint, load_optimizer, optimizer_state, save_checkpoint
from vishub.training.config import TrainConfig
from vishub.training.logs import check_trackers, draw_curves, duration, open_log, start_trackers, write_csv
from vishub.training.optimisation import make_average, make_optimizer, make_schedule, peak_lr
from vishub.training.output import checkpoint_bytes, rehearse, require_shared, require_space
from vishub.training.processes import average, broadcast, on_main, seed_step, sync_buffers
from vishub.training.recipe import Recipe, SampleKey
from vishub.training.sharding import Sharding, gather, make_sharding

__all__ = ['EpochSampler', 'TrainResult', 'rehearse', 'train']

CHECKPOINT_NAME = 'checkpoint.safetensors'
BEST_NAME = 'best.safetensors'


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        model: The trained model (the averaged weights, where averaging is on), in eval mode.
        finished: False if a time or step limit stopped the run before its end; a run that ran out of patience has
            finished, with the best weights.
        step: Optimizer steps done.
        wall_s: Seconds of training and validation, over all resumes.
        metrics: The last validation's metrics; the best one's after a run that ran out of patience.
        checkpoint: Path of the checkpoint.
        folder: Folder of the finished weights, if the recipe stored any.
    """

    model: nn.Module
    finished: bool
    step: int
    wall_s: float
    metrics: Dict[str, float]
    checkpoint: Path
    folder: Optional[Path] = None


class EpochSampler(Sampler[List[SampleKey]]):
    """The batches of one epoch from a step on: lists of (epoch, index, side), this process's share of each batch.

    Samples that do not fill a last batch wait for the next epoch's order.
    """

    def __init__(self, size: int, config: TrainConfig, epoch: int, first: int, batches: int, rank: int, world: int):
        self.size, self.config, self.epoch = size, config, epoch
        self.first, self.batches, self.rank, self.world = first, batches, rank, world

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[List[SampleKey]]:
        order = np.random.default_rng([self.config.seed, self.epoch]).permutation(self.size)
        batch, side = self.config.batch_size, self.config.side(self.epoch)
        for number in range(self.first, self.batches):
            start = (number * self.world + self.rank) * batch
            yield [(self.epoch, int(index), side) for index in order[start:start + batch]]


def train(recipe: Recipe, config: TrainConfig) -> TrainResult:
    """Train `recipe` as `config` says, or continue from the checkpoint in `config.output`.

    Writes `checkpoint.safetensors` (what a run continues from), `best.safetensors` (the weights of the best
    validation), `log.csv` (a row an epoch), `training.log` and `learning_curves.png` to the output folder, before it
    trains the recipe's preview as `augmentation.png`, and at the end what the recipe's `finish` stores.
    Prints a line an epoch to stderr: loss, validation metric, time left. Works under plain `python`, `accelerate
    launch` and `torchrun`, and splits weights and optimizer state where Accelerate is configured for FSDP.

    Raises:
        InputError: If the output folder cannot be written or is not shared by all processes, the checkpoint there
            belongs to other options, the data is too small for one batch, or FSDP cannot split the model.
        MissingExtraError: If accelerate, or a tracker's package, is not installed.
        FloatingPointError: If the loss is not finite.
    """
    accelerate = import_extra('accelerate', 'train')
    check_trackers(config.tracker)
    output = Path(config.output)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)

    if config.amp == 'fp16' and (config.device == 'cpu' or not torch.cuda.is_available()):
        raise InputError('amp is fp16, which needs a CUDA device; on the CPU choose bf16 or no')
    # the others wait while the main process evaluates and stores the weights
    patience = accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=3))
    accelerator = accelerate.Accelerator(
        # said, because Accelerate would let each process train for itself on a machine that has nothing but CPUs
        mixed_precision=config.amp, cpu=config.device == 'cpu' or not torch.accelerator.is_available(),
        kwargs_handlers=[patience], log_with=list(config.tracker) or None, project_dir=str(output))
    try:
        started = int(os.environ.get('WORLD_SIZE', 1))
        if accelerator.num_processes != started:
            raise InputError(
                f'{started} processes were started, but on {accelerator.device} each would train for itself; '
                'start one, or train on the CPU (device cpu)')
        sharding = make_sharding(accelerator)
        if sharding is not None and config.channels_last:
            raise InputError('FSDP cannot split weights in channels-last order: leave channels_last out')
        on_main(lambda: rehearse(output))
        require_shared(output)
        return _Run(recipe, config, output, accelerator, sharding).train()
    finally:
        accelerator.free_memory()
        for tracker in accelerator.trackers:
            tracker.finish()
        # The process group stays: a second one could not be told from the first in the store both would meet in.
        # Accelerate keeps its settings for the life of the process; the next run may want others.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class _Run:
    """The state of one run: model, optimizer, averaged weights, position, log."""

    def __init__(
            self,
            recipe: Recipe,
            config: TrainConfig,
            output: Path,
            accelerator: Any,
            sharding: Optional[Sharding],
    ):
        self.recipe, self.config, self.output = recipe, config, output
        self.accelerator, self.sharding = accelerator, sharding
        self.device = accelerator.device
        self.main = accelerator.is_main_process
        self.logger = open_log(output, 'main') if self.main else logging.getLogger('vishub.training.other')
        if config.patience and not recipe.validates:
            raise InputError('patience needs a validation split, and there is none')
        self.data = recipe.train_set()
        self.micro_batches = len(self.data) // (config.batch_size * accelerator.num_processes)
        self.steps_per_epoch = self.micro_batches // config.grad_accum
        if self.steps_per_epoch == 0:
            raise InputError(
                f'{len(self.data)} training samples do not fill one step of {accelerator.num_processes} process(es) x '
                f'batch_size {config.batch_size} x grad_accum {config.grad_accum}; choose a smaller batch')
        self.total_steps = self.steps_per_epoch * config.epochs

        seed_step(config.seed, 0, 0)  # every process draws the same initial weights
        self.model = recipe.build_model().to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(self.model, config)
        recipe.start(optimizer)
        self.schedule = make_schedule(optimizer, config, self.total_steps)
        self.ema = make_average(self.model, config, self.total_steps, split=sharding is not None)

        self.step = 0  # optimizer steps done
        self.loss_sum = 0.  # of the steps done in this epoch
        self.wall_before = 0.  # seconds of the runs before this one
        self.rows: List[Dict[str, Any]] = []
        self.metrics: Dict[str, float] = {}
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not self.main)
        self.raw_optimizer = optimizer
        on_main(self.check_space)
        restore_optimizer = self.load() if config.resume else None
        if sharding is None:
            self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        else:
            averaged = self.ema.module if self.ema is not None else None
            self.wrapped, self.optimizer = sharding.prepare(self.model, optimizer, averaged)
        if restore_optimizer is not None:
            restore_optimizer()  # its state is split as the weights are
        start_trackers(accelerator, self.fingerprint())
        if config.compile:
            self.wrapped.compile(dynamic=False)

    # -- checkpoint ---------------------------------------------------------------------------------------------------

    @property
    def best(self) -> Path:
        return self.output / BEST_NAME

    @property
    def checkpoint(self) -> Path:
        return self.output / CHECKPOINT_NAME

    def fingerprint(self) -> Dict[str, Any]:
        options = {
            **self.config.fingerprint(), **self.recipe.describe(),
            'samples': len(self.data), 'processes': self.accelerator.num_processes,
        }
        return json.loads(json.dumps(options))  # as it comes back from a checkpoint: without tuples

    def check_space(self) -> None:
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        require_space(
            self.output, checkpoint_bytes(self.model, averaged=self.ema is not None), weights,
            has_last=self.checkpoint.exists(), has_best=self.best.exists())

    def wall(self) -> float:
        return self.wall_before + time.perf_counter() - self.started

    def save(self) -> None:
        optimizer_tensors, optimizer_rest = optimizer_state(self.raw_optimizer)
        parts = {'model': self.model.state_dict(), 'optimizer': optimizer_tensors}
        if self.ema is not None:
            parts['ema'] = self.ema.module.state_dict()
        tensors = {part: gather(named, keep=self.main) for part, named in parts.items()}
        if self.main:
            scaler = self.accelerator.scaler
            save_checkpoint(self.checkpoint, tensors, {
                'fingerprint': self.fingerprint(),
                'step': self.step,
                'loss_sum': self.loss_sum,
                'wall_s': self.wall(),
                'rows': self.rows,
                'metrics': self.metrics,
                'optimizer': optimizer_rest,
                'scaler': scaler.state_dict() if scaler is not None else None,
            })
        self.accelerator.wait_for_everyone()

    def load(self) -> Optional[Callable[[], None]]:
        """Restore what the checkpoint holds, if there is one. Returns what restores the optimizer, later."""
        if not self.checkpoint.exists():
            return None
        tensors, state = load_checkpoint(self.checkpoint)
        # options that came later than the checkpoint had no other value than today's default
        mine, theirs = self.fingerprint(), {**TrainConfig(output='').fingerprint(), **state['fingerprint']}
        changed = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        if changed:
            detail = '; '.join(f'{key} was {theirs.get(key)}, now {mine.get(key)}' for key in changed)
            raise InputError(
                f"'{self.checkpoint}' belongs to a run with other options ({detail}). "
                'Use the same options, another output folder, or --no-resume')
        self.model.load_state_dict(tensors['model'])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors['ema'])
        if self.accelerator.scaler is not None and state['scaler'] is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        self.step, self.loss_sum, self.wall_before = state['step'], state['loss_sum'], state['wall_s']
        self.rows, self.metrics = state['rows'], state['metrics']
        self.logger.info('resumed at step %d of %d', self.step, self.total_steps)
        self.console.print(f'continuing from step {self.step} of {self.total_steps}: {self.checkpoint}')
        return lambda: load_optimizer(self.raw_optimizer, tensors.get('optimizer', {}), state['optimizer'])

    # -- training -----------------------------------------------------------------------------------------------------

    def loader(self, epoch: int, first_step: int) -> DataLoader:
        config, accumulation = self.config, self.config.grad_accum
        sampler = EpochSampler(
            len(self.data), config, epoch,
            first=first_step * accumulation, batches=self.steps_per_epoch * accumulation,
            rank=self.accelerator.process_index, world=self.accelerator.num_processes)
        return DataLoader(
            self.data, batch_sampler=sampler, num_workers=config.num_workers, pin_memory=self.device.type == 'cuda')

    def to_device(self, batch: Any) -> Any:
        if isinstance(batch, torch.Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {key: self.to_device(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return type(batch)(self.to_device(value) for value in batch)
        return batch

    def take_step(self, batches: Iterator[Any], side: int) -> float:
        """One optimizer step over `grad_accum` batches; returns the mean loss over all processes."""
        config = self.config
        seed_step(config.seed, self.step + 1, self.accelerator.process_index)
        self.schedule.step_update(self.step)
        self.wrapped.train()
        self.recipe.train_mode(self.model)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part in range(config.grad_accum):
            inputs, targets = self.recipe.prepare(self.to_device(next(batches)), side, training=True)
            if config.channels_last and isinstance(inputs, torch.Tensor) and inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            last = part == config.grad_accum - 1
            # processes exchange gradients only behind the last part
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                output = self.forward(inputs)
                loss = self.recipe.loss(output, targets) / config.grad_accum
                self.accelerator.backward(loss)
            total += loss.detach()
        if config.clip_grad:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip_grad)
        if self.sharding is None:
            self.optimizer.step()
        else:
            self.sharding.step(self.optimizer)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        value = float(average(total))
        if not math.isfinite(value):
            raise FloatingPointError(
                f'the loss is {value} at step {self.step}; lower the learning rate, or train with amp=no')
        return value

    def forward(self, inputs: Any) -> Any:
        """The model's output, in float32, computed under autocast where `amp` asks for it."""
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.sharding is None:
            return self.wrapped(*arguments)  # so wrapped by Accelerate
        from accelerate.utils import convert_to_fp32
        with self.accelerator.autocast():
            output = self.wrapped(*arguments)
        return output if self.config.amp == 'no' else convert_to_fp32(output)

    @torch.no_grad()
    def validate(self, side: int) -> Dict[str, float]:
        """The recipe's metrics, the same on every process."""
        model = self.final_model()
        sync_buffers(model)
        with self.accelerator.autocast():
            return broadcast(self.recipe.validate(model, side, self.device) or {})

    def final_model(self) -> nn.Module:
        """The model that the run is about, whole: the averaged weights, if there are any. Called by every process."""
        model = self.ema.module if self.ema is not None else self.model
        return (model if self.sharding is None else self.sharding.assemble(model)).eval()

    def train(self) -> TrainResult:
        config = self.config
        self.started = time.perf_counter()
        self.logger.info('%d steps of %d: %s', self.total_steps, config.batch_size, self.fingerprint())
        if self.step < self.total_steps:
            on_main(self.preview)
            for remark in self.recipe.remarks():
                self.console.print(remark)
            self.console.print(
                f'{len(self.data):,} samples, {config.epochs} epochs of {self.steps_per_epoch} steps on {self.device}')
        stop = early = self.out_of_patience()  # a run that had ended so is not trained on
        columns = (
            TextColumn('{task.description}'), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn('{task.fields[note]}'))
        show = config.progress and self.main
        with Progress(*columns, console=self.console, disable=not show) as progress:
            bar = progress.add_task('training', total=self.total_steps, completed=self.step, note='')
            while self.step < self.total_steps and not stop:
                epoch, first_step = divmod(self.step, self.steps_per_epoch)
                side = config.side(epoch)
                progress.update(bar, description=f'epoch {epoch + 1}/{config.epochs} at {side} px')
                batches = iter(self.loader(epoch, first_step))
                epoch_start, done = time.perf_counter(), 0
                for _ in range(first_step, self.steps_per_epoch):
                    loss = self.take_step(batches, side)
                    self.loss_sum += loss
                    done += 1
                    progress.update(bar, completed=self.step, note=f'loss {loss:.3f}')
                    stop = self.out_of_budget()
                    at_end = self.step % self.steps_per_epoch == 0
                    if not at_end and (stop or (config.checkpoint_every and self.step % config.checkpoint_every == 0)):
                        self.save()
                    if stop:
                        break
                if self.step % self.steps_per_epoch == 0:
                    images = done * config.grad_accum * config.batch_size * self.accelerator.num_processes
                    seconds = time.perf_counter() - epoch_start
                    self.end_epoch(epoch, side, images / seconds)
                    self.save()
                    whole = (time.perf_counter() - epoch_start) * self.steps_per_epoch / done  # resumes see a part
                    self.say(whole)
                    early = self.step < self.total_steps and self.out_of_patience()
                    stop = stop or early
        return self.end(early)

    def preview(self) -> None:
        picture = self.recipe.preview(self.config.side(0))
        if picture is not None:
            with atomic_path(self.output / 'augmentation.png') as temporary:
                picture.save(temporary)

    def out_of_budget(self) -> bool:
        config = self.config
        if config.max_steps and self.step >= config.max_steps:
            return True
        if not config.time_limit:
            return False
        return broadcast(time.perf_counter() - self.started > 60 * config.time_limit)  # clocks differ a little

    def end_epoch(self, epoch: int, side: int, images_per_s: float) -> None:
        config = self.config
        last = epoch == config.epochs - 1
        validated: Dict[str, float] = {}
        if config.validate_every and (last or (epoch + 1) % config.validate_every == 0):
            self.metrics = validated = self.validate(side)
        row = {
            'epoch': epoch + 1, 'step': self.step, 'side': side,
            'lr': round(peak_lr(self.raw_optimizer), 9),
            'train_loss': round(self.loss_sum / self.steps_per_epoch, 5),
            'images_per_s': round(images_per_s, 1), 'wall_s': round(self.wall(), 1), **validated,
        }
        self.loss_sum = 0.
        self.rows.append(row)
        if self.validations_since_best() == 0:
            model = self.final_model()
            if self.main:
                save_checkpoint(self.best, {'model': model.state_dict()}, {
                    'fingerprint': self.fingerprint(), 'step': self.step, 'epoch': epoch + 1,
                    'metrics': self.metrics})
        if self.sharding is not None:
            self.sharding.put_away()
        self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=self.step)
        if self.main:
            write_csv(self.output / 'log.csv', self.rows)
            self.logger.info(' '.join(
                f'{key} {value:.5g}' if isinstance(value, float) else f'{key} {value}' for key, value in row.items()))

    def validations_since_best(self) -> Optional[int]:
        """Validations behind the best one, as the rows tell; 0 if the last epoch was the best, None without any."""
        if not self.rows or self.recipe.metric not in self.rows[-1]:
            return None
        values = [row[self.recipe.metric] for row in self.rows if self.recipe.metric in row]
        return len(values) - 1 - values.index(max(values))

    def out_of_patience(self) -> bool:
        behind = self.validations_since_best()
        return bool(self.config.patience and behind is not None and behind >= self.config.patience)

    def say(self, seconds: float) -> None:
        """Print the last epoch's line; `seconds` is what a whole epoch at its side takes."""
        config, row = self.config, self.rows[-1]
        # the work grows with the area
        left = sum((config.side(epoch) / row['side']) ** 2 for epoch in range(row['epoch'], config.epochs)) * seconds
        metric = self.recipe.metric
        validated = f', {metric} {row[metric]:.2f}' if metric in row else ''
        self.console.print(
            f'epoch {row["epoch"]}/{config.epochs} at {row["side"]} px: loss {row["train_loss"]:.4f}{validated}, '
            f'{row["images_per_s"]:.0f} images/s, {duration(row["wall_s"])} so far'
            + (f', about {duration(left)} left' if left else ''))

    def end(self, early: bool) -> TrainResult:
        finished = early or self.step >= self.total_steps
        model = self.final_model()
        if early:
            tensors, state = load_checkpoint(self.best)
            model.load_state_dict(tensors['model'])
            self.metrics = state['metrics']
            self.console.print(
                f'no better {self.recipe.metric} for {self.config.patience} validations: '
                f'ends with the weights of epoch {state["epoch"]}')
        if self.main and self.rows:
            draw_curves(self.rows, self.recipe.metric, self.output / 'learning_curves.png')
        result = TrainResult(
            model=model, finished=finished, step=self.step, wall_s=self.wall(), metrics=self.metrics,
            checkpoint=self.checkpoint)
        self.logger.info('%s at step %d after %.0f s', 'finished' if finished else 'stopped', self.step, result.wall_s)
        if finished:
            sync_buffers(result.model)
            folder = on_main(lambda: self.recipe.finish(result.model, result, self.config))
            result = dataclasses.replace(result, folder=folder)
        return result
