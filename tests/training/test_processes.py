"""Two processes (gloo, CPU) train as one with the doubled batch; what one of them finds wrong stops both."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.classification.training import ClassificationRecipe
from vishub.training import TrainConfig, TrainResult, train
from vishub.training.checkpoint import load_checkpoint
from vishub.training.processes import gather_shares, my_share, on_main


class PlainNet(nn.Module):
    """No batch norm and no dropout: what it learns does not depend on how a batch is shared out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class PlainRecipe(ClassificationRecipe):
    """The real recipe around that model; stores nothing."""

    def build_model(self) -> nn.Module:
        return PlainNet()

    def finish(self, model: nn.Module, result: TrainResult, config: TrainConfig) -> None:
        return None


def make_data() -> ImageData:
    generator = np.random.default_rng(0)
    labels = np.arange(85) % 4
    images = generator.integers(0, 256, (85, 16, 16, 3), dtype=np.uint8)
    images[labels == 1, :, :, 0] //= 2
    whole = ImageSet(images, labels)
    # 21 validation images: not a multiple of two processes
    return ImageData('noise', 'noise', ('r', 'g', 'b', 'k'), whole.take(range(64)), whole.take(range(64, 85)))


def make_recipe() -> PlainRecipe:
    return PlainRecipe('plain', make_data(), augmentation='light', mixup=0.)


def make_config(output, **changes) -> TrainConfig:
    options = dict(
        output=output, resolution=((16, 3),), batch_size=8, grad_accum=2, lr=1e-2, ema_decay=0.8, device='cpu',
        checkpoint_every=0, progress=False)
    return TrainConfig(**{**options, **changes})


def run_processes(command, seconds: float = 240, **environment) -> str:
    """Run a launcher's command, `{port}` in it standing for a free one; gives what the processes wrote to stderr."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), *sys.path]))
    environment = {
        **os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **environment}
    # a session of its own, so that the workers can be ended with their launcher
    process = subprocess.Popen(
        [word.format(port=port) for word in command], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-4000:]
    return errors


def torchrun(script: str, *arguments) -> str:
    """Run a script in two processes; gives what they wrote to stderr."""
    return run_processes([
        sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-addr', '127.0.0.1',
        '--master-port', '{port}', script, *map(str, arguments)])


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """Everything two processes do here, in one start of them, since starting takes longest."""
    folder = tmp_path_factory.mktemp('two')
    (folder / 'file').write_text('not a folder')
    script = folder / 'script.py'
    script.write_text(textwrap.dedent('''
        import json, os, sys
        from pathlib import Path
        import torch
        import test_processes as t
        from vishub.errors import InputError
        from vishub.training import train
        folder, rank = Path(sys.argv[1]), os.environ['RANK']
        seen = []
        from vishub.tasks.classification import training
        predict = training.predict_logits
        def counted(model, images, *arguments, **options):
            seen.append(len(images))
            return predict(model, images, *arguments, **options)
        training.predict_logits = counted

        result = train(t.make_recipe(), t.make_config(folder / 'two', batch_size=4))
        facts = {'metrics': result.metrics, 'seen': list(seen), 'step': result.step,
                 'head': result.model.head.weight.flatten().tolist()}
        train(t.make_recipe(), t.make_config(folder / 'resumed', batch_size=4, max_steps=5))
        resumed = train(t.make_recipe(), t.make_config(folder / 'resumed', batch_size=4))
        facts['resumed'] = torch.equal(resumed.model.head.weight, result.model.head.weight)
        facts['auto'] = train(
            t.make_recipe(), t.make_config(folder / 'auto', batch_size=4, device='auto', resolution=((16, 1),))).step
        try:
            train(t.make_recipe(), t.make_config(folder / 'file' / 'run'))
        except InputError as error:
            facts['error'] = str(error)
        try:
            train(t.make_recipe(), t.make_config(folder / f'of machine {rank}'))
        except InputError as error:
            facts['apart'] = str(error)
        (folder / f'facts{rank}.json').write_text(json.dumps(facts))
    '''))
    errors = torchrun(str(script), folder)
    return folder, [json.loads((folder / f'facts{rank}.json').read_text()) for rank in range(2)], errors


def test_two_processes_train_as_one_with_the_doubled_batch(two, tmp_path):
    folder, facts, _ = two
    one = train(make_recipe(), make_config(tmp_path))
    assert one.step == 12 == facts[0]['step']
    tensors, state = load_checkpoint(one.checkpoint)
    others, other_state = load_checkpoint(folder / 'two' / 'checkpoint.safetensors')
    assert tensors.keys() == others.keys() == {'model', 'ema', 'optimizer'}
    for part, named in tensors.items():
        for name, tensor in named.items():
            assert torch.allclose(tensor, others[part][name], rtol=0, atol=1e-4), f'{part}/{name} differs'
    for row, other in zip(state['rows'], other_state['rows'], strict=True):
        assert row['train_loss'] == pytest.approx(other['train_loss'], abs=1e-4)
        assert row['top1'] == pytest.approx(other['top1'], abs=1e-3)
        assert row['nll'] == pytest.approx(other['nll'], abs=1e-4)


def test_the_run_changed_the_weights(two):
    """So that equal weights above mean something."""
    folder, _, _ = two
    tensors, _ = load_checkpoint(folder / 'two' / 'checkpoint.safetensors')
    fresh = train(make_recipe(), make_config(folder / 'fresh', max_steps=1, lr=1e-9))
    moved = tensors['model']['head.weight'] - fresh.model.head.weight
    assert moved.abs().max() > 1e-2


def test_processes_agree_and_share_validation(two):
    _, facts, errors = two
    assert facts[0]['metrics'] == facts[1]['metrics'] and facts[0]['head'] == facts[1]['head']
    assert facts[0]['seen'] == facts[1]['seen'] == [11, 11, 11]  # of 21 images, three epochs
    assert errors.count('64 samples, 3 epochs') == 3  # the main process alone speaks, in each of three runs
    assert facts[0]['resumed'] and facts[1]['resumed']


def test_processes_find_each_other_where_the_device_is_left_open(two):
    _, facts, errors = two
    assert facts[0]['auto'] == facts[1]['auto'] == 4  # 64 images, 2 x 4 x 2 a step
    assert errors.count('64 samples, 1 epochs') == 1


def test_an_error_of_the_main_process_reaches_all(two):
    _, facts, _ = two
    assert 'cannot be written' in facts[0]['error'] and facts[0]['error'] == facts[1]['error']


def test_a_folder_that_the_machines_do_not_share_is_refused(two):
    folder, facts, _ = two
    for rank in (0, 1):
        assert f"'{folder / f'of machine {rank}'}' is not the same one for all" in facts[rank]['apart']
    assert list((folder / 'of machine 0').iterdir()) == []


def test_one_process_needs_no_group():
    assert my_share(5) == [0, 1, 2, 3, 4]
    assert gather_shares(torch.arange(5), 5).tolist() == [0, 1, 2, 3, 4]
    assert on_main(lambda: 3) == 3


def test_shares_cover_everything(monkeypatch):
    for world in (2, 3, 8):
        for total in (1, 5, 6):
            shares = []
            for rank in range(world):
                monkeypatch.setattr('vishub.training.processes.rank_and_world', lambda at=(rank, world): at)
                shares.append(my_share(total))
            assert len({len(share) for share in shares}) == 1  # all processes have the same number of batches
            assert [index for turn in zip(*shares) for index in turn][:total] == list(range(total))
