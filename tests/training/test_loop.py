"""The loop: resuming gives the same bits, failing comes early, resolution progresses."""
import collections
import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vishub.errors import InputError, MissingExtraError
from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.classification.training import ClassificationRecipe
from vishub.training import TrainConfig, TrainResult, parse_resolution, train
from vishub.training.checkpoint import load_checkpoint, save_checkpoint


class TinyNet(nn.Module):
    """Batch norm (buffers), dropout (randomness) and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)
        self.sides = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.sides.append(x.shape[-1])
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def make_data(seed: int = 0) -> ImageData:
    """Four classes of 16 x 16 noise that differ in colour."""
    generator = np.random.default_rng(seed)
    labels = np.arange(80) % 4
    images = generator.integers(0, 100, (80, 16, 16, 3), dtype=np.uint8)
    for label, channel in ((0, 0), (1, 1), (2, 2)):
        images[labels == label, :, :, channel] += 100
    whole = ImageSet(images, labels)
    return ImageData('noise', 'noise', ('r', 'g', 'b', 'k'), whole.take(range(64)), whole.take(range(64, 80)))


class TinyRecipe(ClassificationRecipe):
    """The real recipe (augmentation, mixup) around a tiny model; stores nothing."""

    def build_model(self) -> nn.Module:
        return TinyNet()

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> None:
        return None


def make_recipe() -> TinyRecipe:
    return TinyRecipe('tiny', make_data(), augmentation='heavy', mixup=0.4, cutmix=1.0)


def make_config(output, **changes) -> TrainConfig:
    options = dict(
        output=output, resolution=((16, 2), (24, 1)), batch_size=8, grad_accum=2, lr=1e-2, device='cpu',
        checkpoint_every=0, progress=False)
    return TrainConfig(**{**options, **changes})


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> TrainResult:
    return train(make_recipe(), make_config(tmp_path_factory.mktemp('whole')))


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    """The final checkpoints hold the same bits: weights, averaged weights, optimizer."""
    tensors, state = load_checkpoint(one.checkpoint)
    others, other_state = load_checkpoint(other.checkpoint)
    assert set(tensors) == {'model', 'ema', 'optimizer'} == set(others)
    for part, named in tensors.items():
        assert named.keys() == others[part].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, others[part][name]), f'{part}/{name} differs'
    assert state['step'] == other_state['step']
    for row, other_row in zip(state['rows'], other_state['rows'], strict=True):
        assert row['train_loss'] == other_row['train_loss'] and row.get('top1') == other_row.get('top1')


# 64 images / (8 x 2) = 4 steps an epoch, 12 in all: within an epoch, at its end, at the change of side, before the end
@pytest.mark.parametrize('stops', [[1], [4], [6], [8], [3, 5, 9, 11]], ids=str)
def test_stopped_and_resumed_is_bit_identical(tmp_path, uninterrupted, stops):
    for stop in stops:
        part = train(make_recipe(), make_config(tmp_path, max_steps=stop))
        assert not part.finished and part.step == stop
        torch.manual_seed(stop)  # a new process does not continue the old one's generators
        random.seed(stop)
    result = train(make_recipe(), make_config(tmp_path))
    assert result.finished and result.step == uninterrupted.step == 12
    assert_same_run(uninterrupted, result)


def test_loader_processes_change_nothing(tmp_path, uninterrupted):
    assert_same_run(uninterrupted, train(make_recipe(), make_config(tmp_path, num_workers=2)))


def test_another_seed_changes_the_weights(tmp_path, uninterrupted):
    result = train(make_recipe(), make_config(tmp_path, seed=1))
    assert not torch.equal(result.model.head.weight, uninterrupted.model.head.weight)


def test_killed_process_resumes_bit_identical(tmp_path, uninterrupted):
    """SIGKILL at whatever step the run happens to be in; a checkpoint is written at every step."""
    script = textwrap.dedent('''
        import sys, time
        sys.path.insert(0, sys.argv[2])
        import test_loop
        from vishub.training import train
        class Slow(test_loop.TinyRecipe):
            def loss(self, output, targets):
                time.sleep(0.05)
                return super().loss(output, targets)
        recipe = Slow('tiny', test_loop.make_data(), augmentation='heavy', mixup=0.4, cutmix=1.0)
        train(recipe, test_loop.make_config(sys.argv[1], checkpoint_every=1))
    ''')
    command = [sys.executable, '-c', script, str(tmp_path), os.path.dirname(__file__)]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    checkpoint = tmp_path / 'checkpoint.safetensors'
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 300  # a busy machine takes long to import torch
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoint.exists() and load_checkpoint(checkpoint)[1]['step'] >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'the run ended before it was killed'
    assert 3 <= load_checkpoint(checkpoint)[1]['step'] < 12
    assert_same_run(uninterrupted, train(make_recipe(), make_config(tmp_path)))


def test_resolution_progresses(tmp_path):
    recipe = make_recipe()
    result = train(recipe, make_config(tmp_path, ema_decay=0.))
    assert result.model.sides == [16] * 16 + [24] * 8  # 2 epochs and 1 of 8 forward passes
    with open(tmp_path / 'log.csv', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [int(row['side']) for row in rows] == [16, 16, 24]
    assert [int(row['step']) for row in rows] == [4, 8, 12]
    assert float(rows[-1]['lr']) < float(rows[0]['lr'])


def test_learns(tmp_path):
    result = train(make_recipe(), make_config(tmp_path, resolution=((16, 20),), ema_decay=0.9, grad_accum=1))
    assert result.metrics['top1'] >= 80  # chance is 25


def test_averaged_weights_follow_but_differ(uninterrupted):
    tensors, _ = load_checkpoint(uninterrupted.checkpoint)
    assert not torch.equal(tensors['model']['head.weight'], tensors['ema']['head.weight'])
    assert torch.equal(uninterrupted.model.head.weight, tensors['ema']['head.weight'])


@pytest.mark.parametrize('amp', ['bf16'])
def test_mixed_precision(tmp_path, amp):
    result = train(make_recipe(), make_config(tmp_path, amp=amp))
    assert result.finished and result.model.head.weight.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_unwritable_output_fails_before_training(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    recipe = make_recipe()
    recipe.build_model = lambda: pytest.fail('training was prepared')
    with pytest.raises(InputError, match='cannot be written'):
        train(recipe, make_config(tmp_path / 'file' / 'run'))


def test_full_disk_fails_before_training(tmp_path, monkeypatch):
    size = train(make_recipe(), make_config(tmp_path / 'a')).checkpoint.stat().st_size
    Usage = collections.namedtuple('Usage', 'total used free')
    monkeypatch.setattr('vishub.training.loop._Run.take_step', lambda *_: pytest.fail('training began'))
    monkeypatch.setattr('shutil.disk_usage', lambda _path: Usage(10 ** 9, 10 ** 9, size // 2))
    with pytest.raises(InputError, match='MB of free space, the checkpoints need'):
        train(make_recipe(), make_config(tmp_path / 'b'))
    monkeypatch.setattr('shutil.disk_usage', lambda _path: Usage(10 ** 9, 10 ** 9 - 20 * size, 20 * size))
    with pytest.raises(pytest.fail.Exception, match='training began'):
        train(make_recipe(), make_config(tmp_path / 'b'))


def test_checkpoint_of_other_options_is_refused(tmp_path):
    train(make_recipe(), make_config(tmp_path, max_steps=2))
    with pytest.raises(InputError, match='lr was 0.01, now 0.02'):
        train(make_recipe(), make_config(tmp_path, lr=2e-2))
    assert train(make_recipe(), make_config(tmp_path, lr=2e-2, resume=False)).finished


def test_damaged_checkpoint_is_refused(tmp_path):
    path = train(make_recipe(), make_config(tmp_path, max_steps=2)).checkpoint
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match='cannot be read as a vishub checkpoint'):
        train(make_recipe(), make_config(tmp_path))


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.safetensors'
    save_checkpoint(path, {'model': {'a': torch.ones(3)}}, {'step': 1})

    def full(*_args, **_kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('vishub.training.checkpoint.save_file', full)
    with pytest.raises(OSError):
        save_checkpoint(path, {'model': {'a': torch.zeros(3)}}, {'step': 2})
    tensors, state = load_checkpoint(path)
    assert state == {'step': 1} and tensors['model']['a'].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_too_little_data(tmp_path):
    with pytest.raises(InputError, match='do not fill one step'):
        train(make_recipe(), make_config(tmp_path, batch_size=64))


def test_infinite_loss_stops(tmp_path):
    recipe = make_recipe()
    recipe.loss = lambda output, targets: output.mean() * float('nan')
    with pytest.raises(FloatingPointError, match='step 1'):
        train(recipe, make_config(tmp_path))


def test_parse_resolution():
    assert parse_resolution('40:6,64:4') == ((40, 6), (64, 4))
    for text in ('', '40', '40:0', '40:x', '40:6,', '-40:6'):
        with pytest.raises(InputError, match='side:epochs'):
            parse_resolution(text)


def test_config_sides():
    config = TrainConfig(output='x', resolution=((40, 2), (64, 1)))
    assert config.epochs == 3 and [config.side(epoch) for epoch in range(3)] == [40, 40, 64]
    with pytest.raises(InputError, match='batch_size'):
        dataclasses.replace(config, batch_size=0)


# -- best and last, patience, trackers --------------------------------------------------------------------------------

class Scripted(TinyRecipe):
    """Validates to given figures, one an epoch."""

    figures = (10., 30., 20., 25., 40., 50.)

    def validate(self, model, side, device):
        self.seen = [*getattr(self, 'seen', []), {k: v.clone() for k, v in model.state_dict().items()}]
        return {'top1': self.figures[len(self.seen) - 1 + getattr(self, 'offset', 0)]}


def make_scripted(offset: int = 0) -> Scripted:
    recipe = Scripted('tiny', make_data(), augmentation='light', mixup=0.)
    recipe.offset = offset
    return recipe


def test_patience_ends_with_the_best_weights(tmp_path, capsys):
    recipe, config = make_scripted(), make_config(tmp_path, resolution=((16, 6),), patience=2)
    result = train(recipe, config)
    assert result.finished and result.step == 16 and len(recipe.seen) == 4  # 30, then 20 and 25
    assert result.metrics == {'top1': 30.}
    assert all(torch.equal(value, recipe.seen[1][key]) for key, value in result.model.state_dict().items())
    assert not torch.equal(recipe.seen[1]['head.weight'], recipe.seen[3]['head.weight'])
    assert 'ends with the weights of epoch 2' in capsys.readouterr().err
    again = train(make_scripted(4), config)  # the same command trains no further
    assert again.step == 16 and again.metrics == {'top1': 30.}
    assert torch.equal(again.model.head.weight, result.model.head.weight)
    more = train(make_scripted(4), dataclasses.replace(config, patience=5))  # more patience goes on
    assert more.step == 24 and more.metrics == {'top1': 50.}


def test_best_checkpoint_is_of_the_best_validation(tmp_path):
    recipe = make_scripted()
    result = train(recipe, make_config(tmp_path, resolution=((16, 4),)))
    tensors, state = load_checkpoint(tmp_path / 'best.safetensors')
    assert state['epoch'] == 2 and state['metrics'] == {'top1': 30.}
    assert all(torch.equal(tensors['model'][key], value) for key, value in recipe.seen[1].items())
    assert torch.equal(result.model.head.weight, recipe.seen[3]['head.weight'])  # without patience: the last ones
    with Image.open(tmp_path / 'learning_curves.png') as picture:
        assert picture.width > 800 and len(picture.convert('L').getcolors()) > 2


def test_patience_without_validation_is_refused(tmp_path):
    recipe = make_recipe()
    recipe.data = dataclasses.replace(recipe.data, val=None)
    with pytest.raises(InputError, match='patience needs a validation split'):
        train(recipe, make_config(tmp_path, patience=1))


@pytest.mark.parametrize('options', [{'schedule': 'onecycle', 'warmup': 0.3}, {'layer_decay': 0.7}], ids=str)
def test_other_schedules_resume_bit_identical(tmp_path, options):
    whole = train(make_recipe(), make_config(tmp_path / 'whole', **options))
    train(make_recipe(), make_config(tmp_path / 'parts', max_steps=5, **options))
    assert_same_run(whole, train(make_recipe(), make_config(tmp_path / 'parts', **options)))


def test_checkpoint_from_before_an_option_existed_resumes(tmp_path, uninterrupted):
    path = train(make_recipe(), make_config(tmp_path, max_steps=5)).checkpoint
    tensors, state = load_checkpoint(path)
    for key in ('schedule', 'layer_decay'):
        del state['fingerprint'][key]
    save_checkpoint(path, tensors, state)
    assert_same_run(uninterrupted, train(make_recipe(), make_config(tmp_path)))
    save_checkpoint(path, tensors, state)
    with pytest.raises(InputError, match='schedule was cosine, now onecycle'):
        train(make_recipe(), make_config(tmp_path, schedule='onecycle'))


def test_tensorboard_gets_each_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(make_scripted(), make_config(tmp_path, tracker=('tensorboard',)))
    events = EventAccumulator(str(tmp_path / 'tracking'))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars('top1')] == [(4, 10.), (8, 30.), (12, 20.)]
    assert len(events.Scalars('train_loss')) == 3


def test_missing_tracker_says_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(InputError, match='choose one of tensorboard'):
        train(make_recipe(), make_config(tmp_path, tracker=('notebook',)))
    monkeypatch.setattr('importlib.util.find_spec', lambda _name: None)
    with pytest.raises(MissingExtraError, match="pip install 'comet-ml'"):
        train(make_recipe(), make_config(tmp_path, tracker=('comet_ml',)))


def test_scaler_is_part_of_the_checkpoint(tmp_path, monkeypatch):
    """The loss scaler of fp16. The CPU knows the scaler but no fp16 training, so Accelerate is given one by hand."""
    import accelerate
    real = accelerate.Accelerator

    def scaled(*arguments, **options):
        accelerator = real(*arguments, **options)
        accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 10, growth_interval=5)
        return accelerator
    monkeypatch.setattr('accelerate.Accelerator', scaled)
    whole = train(make_recipe(), make_config(tmp_path / 'whole'))
    for stop in (3, 7):
        part = train(make_recipe(), make_config(tmp_path / 'parts', max_steps=stop))
    scaler = load_checkpoint(part.checkpoint)[1]['scaler']
    assert (scaler['scale'], scaler['_growth_tracker']) == (2. ** 11, 2)  # doubled at step 5, two steps ago
    result = train(make_recipe(), make_config(tmp_path / 'parts'))
    assert_same_run(whole, result)
    scalers = [load_checkpoint(run.checkpoint)[1]['scaler'] for run in (whole, result)]
    assert scalers[0] == scalers[1] and scalers[0]['scale'] == 2. ** 12


def test_fp16_on_the_cpu_is_refused(tmp_path):
    with pytest.raises(InputError, match='needs a CUDA device'):
        train(make_recipe(), make_config(tmp_path, amp='fp16'))
