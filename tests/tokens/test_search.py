"""`tokens.search`: budgets, determinism, the better of what it tries, and what it refuses."""
import copy
import json

import pytest
import torch
from torch import nn

from tests.tokens.small_models import images, small_model
from vishub import tokens
from vishub.errors import InputError


def batches(labelled=False, count=2):
    parts = images(8 * count).split(8)
    return [(part, torch.arange(8) % 7) for part in parts] if labelled else list(parts)


@pytest.mark.parametrize('method', ['tome', 'zero_tprune', 'token_transforming', 'class_attention', 'random'])
def test_finds_a_configuration_within_the_budget(method):
    model = small_model('vit').train()
    before = copy.deepcopy(model.state_dict())
    found = tokens.search(model, batches(), method, macs=0.7, trials=6, progress=False)
    assert type(model) is type(small_model('vit')) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [trial.origin for trial in found.trials[:1]] == ['default'] and 1 < len(found.trials) <= 6
    assert found.num_images == 16
    assert found.best.agreement == max(trial.agreement for trial in found.trials)
    full = tokens.macs(model).total
    for trial in found.trials:
        with tokens.reduced(model, **trial.config):
            count = tokens.macs(model)
        assert count.total <= 0.7 * full
        assert trial.macs == pytest.approx(count.total / full)
        assert trial.overhead == pytest.approx(count.overhead / full)
    assert len({json.dumps(trial.config) for trial in found.trials}) == len(found.trials)


def test_figures_are_those_of_the_configuration():
    model, x = small_model('vit'), images(16)
    labels = torch.arange(16) % 7
    found = tokens.search(model, [(x, labels)], 'token_transforming', 0.6, trials=4, progress=False)
    with torch.inference_mode():
        wanted = model(x)
        with tokens.reduced(model, **found.config):
            logits = model(x)
    assert found.best.agreement == (logits.argmax(1) == wanted.argmax(1)).double().mean().item()
    assert found.best.accuracy == (logits.argmax(1) == labels).double().mean().item()
    p, q = wanted.softmax(1), logits.softmax(1)
    assert found.best.divergence == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-3)


def test_same_arguments_same_result_whatever_was_drawn_before():
    results = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        results.append(tokens.search(small_model('vit'), batches(), 'random', 0.6, trials=5, progress=False))
    assert results[0] == results[1]
    model, state = small_model('vit'), torch.get_rng_state()
    tokens.search(model, batches(), 'random', 0.6, trials=2, progress=False)
    assert torch.equal(state, torch.get_rng_state())  # nor does it disturb the caller's draws


class _Spoiler(tokens.Method):
    """Harmless only with good=True, and only in the first block: what a search has to find."""
    name = 'spoiler'
    options = dict(good=False)
    choices = dict(good=(False, True))

    def reduce(self, x, state, seen):
        x = x[:, :seen.count]
        return (x if self.good else x * torch.randn_like(x)), state


def test_finds_the_one_good_option():
    tokens.register_method('test_spoiler', _Spoiler)
    try:
        model = small_model('vit')
        found = tokens.search(model, batches(), 'test_spoiler', macs=0.95, trials=12, progress=False)
        assert found.trials[0].config['good'] is False and found.config['good'] is True
        assert found.best.agreement > found.trials[0].agreement
        kept = tokens.search(
            model, batches(), 'test_spoiler', macs=0.95, trials=6, options=dict(good=False), progress=False)
        assert not any(trial.config['good'] for trial in kept.trials)
    finally:
        tokens.method._METHODS.pop('test_spoiler')


def test_accuracy_as_the_score():
    model = small_model('vit')
    found = tokens.search(model, batches(labelled=True), 'tome', 0.6, trials=5, score='accuracy', progress=False)
    assert found.best.accuracy == max(trial.accuracy for trial in found.trials)


def test_the_loader_is_read_once_and_no_further_than_needed():
    read = []

    def loader():
        for place, batch in enumerate(batches(count=5)):
            read.append(place)
            yield batch

    found = tokens.search(small_model('vit'), loader(), 'tome', 0.6, trials=3, max_images=12, progress=False)
    assert read == [0, 1] and found.num_images == 12


def test_progress_and_tables():
    told = []
    found = tokens.search(
        small_model('vit'), batches(), 'tome', 0.6, trials=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, 4) for i in range(len(found.trials))]
    assert json.loads(json.dumps(found.to_dict()))['config']['method'] == 'tome'
    rows = found.markdown().splitlines()[2:]
    assert len(rows) == len(found.trials) and any('(default)' in row for row in rows)


@pytest.mark.parametrize('family', ['siglip', 'eva02', 'beit', 'deit_distilled', 'nvit'])
def test_other_families(family):
    found = tokens.search(small_model(family), batches(), 'tome', 0.7, trials=3, progress=False)
    assert len(tokens.apply(small_model(family), **found.config)(images())) == 2


def test_a_full_budget_reduces_nothing():
    found = tokens.search(small_model('vit'), batches(), 'tome', 1.0, trials=3, progress=False)
    assert found.best.macs == 1 and found.best.agreement == 1


@pytest.mark.parametrize('change,words', [
    (dict(method='tomme'), "nearest: 'tome'"),
    (dict(method='pyra'), "search with 'tome'"),
    (dict(macs=0), 'macs is 0'),
    (dict(macs=65), 'macs is 65'),
    (dict(macs=0.01), 'cannot be met'),
    (dict(trials=0), 'trials is 0'),
    (dict(score='loss'), "score is 'loss'"),
    (dict(score='accuracy'), 'needs a loader that gives'),
    (dict(loader=[]), 'gave no images'),
    (dict(loader=['cat.jpg']), 'must give tensors'),
    (dict(loader=[(images(4), torch.zeros(3))]), 'one an image'),
    (dict(loader=[images(4) * float('nan')]), 'not finite'),
    (dict(options=dict(prop=1)), "no option 'prop'"),
])
def test_refuses(change, words):
    model = small_model('vit')
    arguments = {**dict(loader=batches(), method='tome', macs=0.6, trials=2, progress=False), **change}
    with pytest.raises(InputError, match=words):
        tokens.search(model, **arguments)
    assert tokens.config(model) is None and not model.training


def test_refuses_a_reduced_model_and_other_models():
    with pytest.raises(InputError, match='reduced by tome already'):
        tokens.search(tokens.apply(small_model('vit'), 'tome', r=2), batches(), progress=False)
    with pytest.raises(InputError, match='cannot reduce'):
        tokens.search(nn.Sequential(nn.Flatten(), nn.Linear(12288, 7)), batches(), progress=False)
