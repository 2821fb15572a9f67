"""Learning tasks in sequence: the loss, what is carried over, kills, later tasks, and each way of remembering."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vishub import InputError
from vishub.models.conslide import mean_similarity_loss
from vishub.tasks.slide_analysis import training
from vishub.tasks.slide_analysis.buffer import ReplayBuffer
from vishub.tasks.slide_analysis.strategies import METHODS, StrategyOptions, make_strategy
from vishub.tasks.slide_analysis.training import (
    SequenceOptions,
    SlideRecipe,
    create_network,
    earlier_tasks,
    logits_of,
    train_tasks,
)
from vishub.training.checkpoint import load_checkpoint
from vishub.training.config import TrainConfig

STRATEGY = StrategyOptions(capacity=24, bag=(2, 4), share=0.5)
OPTIONS = SequenceOptions(
    model='conslide_hit_tiny', model_args={'in_features': 16, 'dim': 16}, strategy=STRATEGY, warmup_epochs=1)


def config(output, **changes):
    settings = dict(
        output=output, resolution=((64, 6),), batch_size=1, opt='adam', lr=3e-3, min_lr=3e-3, warmup=0.,
        weight_decay=0., clip_grad=0., ema_decay=0., checkpoint_every=0, device='cpu', progress=False)
    return TrainConfig(**{**settings, **changes})


def learn(tasks, folder, method='buro', continue_from=None, **changes):
    options = dataclasses.replace(OPTIONS, method=method)
    return train_tasks(tasks, Path(folder), config(folder, **changes), options, continue_from, say=lambda line: None)


@pytest.fixture(scope='module')
def learnt(features_tasks, tmp_path_factory):
    """Folder and record of two tasks learnt with BuRo."""
    folder = tmp_path_factory.mktemp('learnt')
    return folder, learn(features_tasks[:2], folder)


def weights(folder, task):
    return load_checkpoint(folder / task / 'checkpoint.safetensors')[0]['model']


def test_sequence_is_measured_after_each_task(learnt):
    folder, state = learnt
    assert [row['tasks'] for row in state['scores']] == [1, 2]
    assert [len(row['acc']) for row in state['scores']] == [2, 2]  # the next task too, before it is learnt
    assert state['scores'][0]['masked'][0] > 0.5 and len(state['untrained']['acc']) == 2
    assert json.loads((folder / 'sequence.json').read_text()) == json.loads(json.dumps(state))
    buffer = ReplayBuffer.load(folder / 'buffer.safetensors')
    assert buffer.done == ['task0', 'task1'] and len(buffer) <= 24 and set(buffer.label.tolist()) == {0, 1, 2, 3}
    assert (buffer.slide == -1).all() and torch.equal(buffer.task, buffer.label // 2)


def test_loss_of_a_step(features_tasks, tmp_path):
    """Class and similarity loss, and in the first epoch of the first task the similarity loss alone."""
    strategy = make_strategy('buro', tmp_path, STRATEGY, 4)
    recipe = SlideRecipe(OPTIONS, 4, features_tasks[0], strategy, before=None)
    model = recipe.build_model().train()
    data = recipe.train_set()
    for epoch in (0, 1):
        sample = data[epoch, 0, 64]
        batch = {key: torch.as_tensor(value)[None] for key, value in sample.items()}
        inputs, targets = recipe.prepare(batch, 64, training=True)
        output = model(*inputs)
        similarity = mean_similarity_loss(output.sim_loss)
        expected = 1e-3 * similarity
        if epoch:
            expected = F.cross_entropy(output.logits, batch['label']) + 1e-5 * similarity
        assert torch.equal(recipe.loss(output, targets), expected)


def test_replay_is_a_pseudo_slide_of_each_class_of_one_task(features_tasks, learnt):
    strategy = make_strategy('buro', learnt[0], STRATEGY, 6)
    model = create_network(OPTIONS, 6)
    seen, logits = [], []

    def watch(model, patch, region):
        seen.append(region)
        logits.append(model(patch, region, return_similarity=False).logits)
        return logits[-1]

    strategy.slide_logits = watch
    torch.manual_seed(0)
    penalty = strategy.penalty(model)
    assert len(seen) == 2 and all(2 <= len(region) <= 4 for region in seen)
    buffer = strategy.buffer
    classes = [int(buffer.label[(buffer.region.float() == region[0]).all(1)][0]) for region in seen]
    assert classes in ([0, 1], [2, 3])
    expected = sum(0.2 * F.cross_entropy(row, torch.tensor([label])) for row, label in zip(logits, classes))
    assert torch.allclose(penalty, expected)
    penalty.backward()
    assert model.head.weight.grad is not None and model.patch_embed.weight.grad is None  # asynchronous updating


def test_optimizer_and_weights_are_carried_over(features_tasks, learnt):
    folder, _ = learnt
    first = load_checkpoint(folder / '1-task0' / 'checkpoint.safetensors')[0]
    strategy = make_strategy('buro', folder, STRATEGY, 6)
    recipe = SlideRecipe(OPTIONS, 6, features_tasks[1], strategy, before=folder / '1-task0')  # as if two classes came
    model = recipe.build_model()
    assert model.num_classes == 6 and torch.equal(model.cls_token, first['model']['cls_token'])
    assert torch.equal(model.head.weight[:4], first['model']['head.weight'])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    recipe.start(optimizer)
    state = optimizer.state[model.head.weight]
    assert state['exp_avg'].shape == (6, 16) and (state['exp_avg'][4:] == 0).all() and state['exp_avg'][:4].any()
    assert optimizer.param_groups[0]['lr'] == 1e-3


def test_a_kill_at_any_point_changes_nothing(features_tasks, learnt, tmp_path, monkeypatch):
    folder, state = learnt

    class Killed(Exception):
        pass

    def kill(*args, **options):
        raise Killed

    # in the middle of the first task
    assert learn(features_tasks[:2], tmp_path, max_steps=20) is None
    # behind its training, before its regions are kept
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, '_scores', kill)
        learn(features_tasks[:2], tmp_path)
    # behind the buffer of the second task, before the record is written
    save = ReplayBuffer.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            ReplayBuffer, 'save', lambda self, path: save(self, path) or (len(self.done) == 2 and kill()) or None)
        learn(features_tasks[:2], tmp_path)
    again = learn(features_tasks[:2], tmp_path)
    assert again['scores'] == state['scores']
    assert all(torch.equal(value, weights(folder, '2-task1')[name])
               for name, value in weights(tmp_path, '2-task1').items())
    assert torch.equal(ReplayBuffer.load(tmp_path / 'buffer.safetensors').patch,
                       ReplayBuffer.load(folder / 'buffer.safetensors').patch)


def test_a_later_task(features_tasks, learnt, tmp_path):
    folder, state = learnt
    before = (folder / 'buffer.safetensors').read_bytes()
    later = learn(features_tasks[2:], tmp_path, continue_from=folder)
    assert [task['name'] for task in later['tasks']] == ['task0', 'task1', 'task2']
    assert [task['numbers'] for task in later['tasks']] == [[0, 1], [2, 3], [4, 5]]
    assert later['scores'][:2] == state['scores'] and len(later['scores'][2]['acc']) == 3
    assert weights(tmp_path, '3-task2')['head.bias'].shape == (6,)
    assert ReplayBuffer.load(tmp_path / 'buffer.safetensors').done == ['task0', 'task1', 'task2']
    assert (folder / 'buffer.safetensors').read_bytes() == before  # the earlier run stays as it was
    assert [task.classes for task in earlier_tasks(folder)] == [('c0', 'c1'), ('c2', 'c3')]
    with pytest.raises(InputError, match='has been learnt before'):
        learn(features_tasks[1:2], tmp_path / 'again', continue_from=folder)
    with pytest.raises(InputError, match='was trained with method buro, now er'):
        learn(features_tasks[2:], tmp_path / 'other', method='er', continue_from=folder)
    with pytest.raises(InputError, match='holds no finished sequence'):
        learn(features_tasks[2:], tmp_path / 'none', continue_from=tmp_path / 'nothing')


@pytest.mark.parametrize('method', [name for name in METHODS if name != 'buro'])
def test_every_baseline_runs_on_the_same_loop(features_tasks, tmp_path, method):
    state = learn(features_tasks[:2], tmp_path, method=method, resolution=((64, 1),))
    assert len(state['scores']) == (1 if method == 'joint' else 2) and len(state['scores'][-1]['acc']) == 2
    if method in ('er', 'derpp'):
        buffer = ReplayBuffer.load(tmp_path / 'buffer.safetensors')
        assert 0 < len(buffer) <= 24 and len(buffer.logits) == len(buffer.slide.unique())
        model = create_network(OPTIONS, 4)
        strategy = make_strategy(method, tmp_path, STRATEGY, 4)
        assert strategy.penalty(model).requires_grad
    assert (tmp_path / 'ewc.safetensors').exists() == (method == 'ewc')


def test_ewc_holds_what_mattered(features_tasks, tmp_path):
    strategy = make_strategy('ewc', tmp_path, STRATEGY, 2)
    model = create_network(OPTIONS, 2)
    assert strategy.penalty(model) is None
    strategy.end_task(model, 'task0', 0, features_tasks[0].train, seed=0)
    again = make_strategy('ewc', tmp_path, STRATEGY, 4)  # from disk
    assert float(again.penalty(model).detach()) == 0
    fisher = again.memory['fisher/head.bias']
    assert (fisher > 0).all() and (again.memory['fisher/patch_embed.weight'] == 0).all()
    with torch.no_grad():
        model.head.bias += 0.5
    assert float(again.penalty(model).detach()) == pytest.approx(50 * 0.25 * float(fisher.sum()), rel=1e-4)
    model.reset_classifier(4)  # new rows are free
    with torch.no_grad():
        model.head.bias[2:] += 9
    assert float(again.penalty(model).detach()) == pytest.approx(50 * 0.25 * float(fisher.sum()), rel=1e-4)


def test_attention_selects_the_regions_with_most(features_tasks, tmp_path):
    options = dataclasses.replace(STRATEGY, selection='attention', share=0.2)
    model = create_network(OPTIONS, 2).eval()
    strategy = make_strategy('buro', tmp_path, options, 2)
    item = max(features_tasks[0].train, key=lambda item: len(item.load()))
    strategy.end_task(model, 'task0', 0, [item], seed=0)
    features = item.load()
    best = model.rollout(features.patch, features.region).region[0].argmax()
    assert torch.allclose(strategy.buffer.region.float(), features.region[best], atol=1e-2)


def test_refusals(features_tasks, tmp_path):
    for changes, sentence in (({'batch_size': 2}, 'a step takes one'),):
        with pytest.raises(InputError, match=sentence):
            learn(features_tasks[:1], tmp_path, **changes)
    with pytest.raises(InputError, match='no task was given'):
        learn([], tmp_path)
    with pytest.raises(InputError, match='has no test slides'):
        learn([dataclasses.replace(features_tasks[0], test=())], tmp_path)
    with pytest.raises(InputError, match='cannot hold one of each of 4 classes'):
        train_tasks(features_tasks[:2], tmp_path, config(tmp_path), dataclasses.replace(
            OPTIONS, strategy=StrategyOptions(capacity=3)))
    with pytest.raises(InputError, match='method .* is unknown'):
        SequenceOptions(method='magic')
    with pytest.raises(InputError, match='takes no features of slides'):
        create_network(dataclasses.replace(OPTIONS, model='resnet10t', model_args={}), 2)
    for options, sentence in (
            ({'bag': (5, 2)}, 'the smaller number first'), ({'selection': 'best'}, 'uniform or attention'),
            ({'share': 0.}, 'above 0')):
        with pytest.raises(InputError, match=sentence):
            StrategyOptions(**options)


def test_validation_is_of_this_task(features_tasks, tmp_path):
    task = dataclasses.replace(features_tasks[0], val=features_tasks[0].test)
    recipe = SlideRecipe(OPTIONS, 4, task, make_strategy('finetune', tmp_path, STRATEGY, 4), before=None)
    model = recipe.build_model().eval()
    assert recipe.validates
    found = recipe.validate(model, 64, torch.device('cpu'))
    logits = logits_of(model, task.val)
    nll = F.cross_entropy(logits, torch.tensor([item.label for item in task.val]))
    assert found['nll'] == pytest.approx(float(nll)) and found['likelihood'] == pytest.approx(100 * float((-nll).exp()))
