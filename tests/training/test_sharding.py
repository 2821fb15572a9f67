"""FSDP through Accelerate (two gloo processes on the CPU): split weights train, resume and end as whole ones do."""
import json
import sys
import textwrap
import types

import pytest
import timm
import torch
from test_processes import PlainRecipe, make_config, make_data, run_processes
from torch import nn

from vishub.errors import InputError
from vishub.training import train
from vishub.training.checkpoint import load_checkpoint
from vishub.training.sharding import make_sharding


class SplitRecipe(PlainRecipe):
    """A small vision transformer, of which a part is frozen; its class token is a vector that two cannot share."""

    def build_model(self) -> nn.Module:
        model = timm.create_model(
            'vit_tiny_patch16_224', img_size=16, patch_size=8, depth=2, embed_dim=18, num_heads=3, num_classes=4)
        model.patch_embed.requires_grad_(False)
        return model


def make_recipe() -> SplitRecipe:
    return SplitRecipe('split', make_data(), augmentation='light', mixup=0.)


def make_split_config(output, **changes):
    return make_config(output, **{'lr': 3e-3, **changes})


def launch(script, *arguments, **environment) -> str:
    """`accelerate launch --use_fsdp` in two processes, each transformer block split by itself; their stderr."""
    return run_processes(
        [sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--use_fsdp', '--fsdp_version', '2',
         '--fsdp_auto_wrap_policy', 'TRANSFORMER_BASED_WRAP', '--fsdp_transformer_layer_cls_to_wrap', 'Block',
         '--num_processes', '2', '--num_machines', '1', '--main_process_port', '{port}', str(script),
         *map(str, arguments)], **environment)


@pytest.fixture(scope='module')
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp('split')
    script = folder / 'script.py'
    script.write_text(textwrap.dedent('''
        import json, os, sys
        from pathlib import Path
        import torch
        import test_sharding as t
        from torch.distributed.tensor import DTensor
        from vishub.errors import InputError
        from vishub.training import loop, train
        folder, rank = Path(sys.argv[1]), os.environ['RANK']
        facts = {'shares': []}
        take_step = loop._Run.take_step
        def looked_at(run, *arguments):
            loss = take_step(run, *arguments)
            if run.step == 1:
                def local(tensors):
                    assert all(isinstance(v, DTensor) for v in tensors)
                    return sum(v.to_local().numel() for v in tensors) / sum(v.numel() for v in tensors)
                moments = [v for s in run.raw_optimizer.state.values() for k, v in s.items() if k != 'step']
                facts['shares'].append([
                    local(list(run.model.parameters())), local(moments),
                    local(list(run.ema.module.parameters())) if run.ema else None])
            return loss
        loop._Run.take_step = looked_at

        whole = train(t.make_recipe(), t.make_split_config(folder / 'whole', batch_size=4))
        train(t.make_recipe(), t.make_split_config(folder / 'parts', batch_size=4, max_steps=5))
        train(t.make_recipe(), t.make_split_config(folder / 'parts', batch_size=4, max_steps=8))
        parts = train(t.make_recipe(), t.make_split_config(folder / 'parts', batch_size=4))
        # continued without FSDP, and with it again
        train(t.make_recipe(), t.make_split_config(folder / 'mixed', batch_size=4, max_steps=4))
        os.environ['ACCELERATE_USE_FSDP'] = 'false'
        train(t.make_recipe(), t.make_split_config(folder / 'mixed', batch_size=4, max_steps=8))
        os.environ['ACCELERATE_USE_FSDP'] = 'true'
        train(t.make_recipe(), t.make_split_config(folder / 'mixed', batch_size=4))
        facts['resumed'] = all(
            torch.equal(value, parts.model.state_dict()[key]) for key, value in whole.model.state_dict().items())
        facts['plain'] = not any(isinstance(p, DTensor) for p in whole.model.parameters())
        facts['head'] = whole.model.head.weight.flatten().tolist()
        facts['metrics'] = whole.metrics
        half = train(t.make_recipe(), t.make_split_config(folder / 'half', batch_size=4, amp='bf16', ema_decay=0.))
        facts['half'] = half.metrics
        facts['dtypes'] = sorted({str(p.dtype) for p in half.model.parameters()})
        facts['errors'] = []
        for changes in ({'channels_last': True}, {'opt': 'adafactor'}):
            try:
                train(t.make_recipe(), t.make_split_config(folder / 'refused', batch_size=4, **changes))
            except InputError as error:
                facts['errors'].append(str(error))
        (folder / f'facts{rank}.json').write_text(json.dumps(facts))
    '''))
    launch(script, folder)
    return folder, [json.loads((folder / f'facts{rank}.json').read_text()) for rank in range(2)]


def test_split_weights_train_as_whole_ones(split, tmp_path):
    folder, facts = split
    one = train(make_recipe(), make_split_config(tmp_path))
    tensors, state = load_checkpoint(one.checkpoint)
    others, other_state = load_checkpoint(folder / 'whole' / 'checkpoint.safetensors')
    assert tensors.keys() == others.keys() == {'model', 'ema', 'optimizer'}
    for part, named in tensors.items():
        assert named.keys() == others[part].keys()
        for name, tensor in named.items():
            assert torch.allclose(tensor, others[part][name], rtol=0, atol=1e-4), f'{part}/{name} differs'
    for row, other in zip(state['rows'], other_state['rows'], strict=True):
        assert row['train_loss'] == pytest.approx(other['train_loss'], abs=1e-4)
        assert row['nll'] == pytest.approx(other['nll'], abs=1e-4)
    start = make_recipe()
    torch.manual_seed(0)
    assert (one.model.head.weight - start.build_model().head.weight).abs().max() > 1e-2  # something was learned
    best, other = (load_checkpoint(path / 'best.safetensors')[0]['model'] for path in (tmp_path, folder / 'whole'))
    assert all(torch.allclose(value, other[key], rtol=0, atol=1e-4) for key, value in best.items())
    final = torch.tensor(facts[0]['head']).view_as(one.model.head.weight)
    assert torch.allclose(one.model.head.weight, final, rtol=0, atol=1e-4)


def test_each_process_holds_a_part(split):
    _, facts = split
    for of_process in facts:
        weights, moments, averaged = of_process['shares'][0]
        for share in (weights, moments, averaged):
            assert 0.45 < share < 0.55
    assert facts[0]['plain'] and facts[0]['head'] == facts[1]['head'] and facts[0]['metrics'] == facts[1]['metrics']


def test_split_run_resumes_bit_identical(split):
    folder, facts = split
    assert facts[0]['resumed'] and facts[1]['resumed']
    tensors, others = (load_checkpoint(folder / name / 'checkpoint.safetensors')[0] for name in ('whole', 'parts'))
    for part, named in tensors.items():
        assert all(torch.equal(value, others[part][name]) for name, value in named.items()), part


def test_checkpoints_of_split_and_whole_runs_are_the_same(split):
    folder, _ = split
    tensors, others = (load_checkpoint(folder / name / 'checkpoint.safetensors')[0] for name in ('whole', 'mixed'))
    for part, named in tensors.items():
        for name, value in named.items():
            assert torch.allclose(value, others[part][name], rtol=0, atol=1e-4), f'{part}/{name} differs'


def test_half_precision_keeps_whole_precision_weights(split):
    _, facts = split
    assert facts[0]['dtypes'] == ['torch.float32']
    assert facts[0]['half']['nll'] == pytest.approx(facts[0]['metrics']['nll'], abs=0.1)


def test_what_cannot_be_split_is_one_sentence(split):
    _, facts = split
    order, optimizer = facts[0]['errors']
    assert 'leave channels_last out' in order and 'Adafactor does not work on split weights' in optimizer
    assert facts[0]['errors'] == facts[1]['errors']


def test_other_ways_of_splitting_are_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator, DistributedType
    monkeypatch.setattr(Accelerator, 'distributed_type', DistributedType.DEEPSPEED)
    with pytest.raises(InputError, match='use FSDP: accelerate launch --use_fsdp'):
        train(make_recipe(), make_split_config(tmp_path))


def test_first_fsdp_is_refused(monkeypatch):
    from accelerate import DistributedType
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('FSDP_VERSION', '1')
    state = types.SimpleNamespace()
    with pytest.raises(InputError, match='--use_fsdp --fsdp_version 2, or fsdp_version: 2'):
        make_sharding(types.SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, state=state))
