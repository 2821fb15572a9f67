"""One-cycle is torch's; layer-wise decay scales by depth; the cosine stays timm's."""
import pytest
import timm
import torch
from torch import nn

from vishub.errors import InputError
from vishub.training import TrainConfig
from vishub.training.optimisation import make_optimizer, make_schedule, peak_lr


@pytest.mark.parametrize('rise', [0.3, 0.05, 0.5])
def test_one_cycle_is_that_of_torch(rise):
    config = TrainConfig(output='x', schedule='onecycle', lr=0.4, min_lr=1e-4, warmup=rise, opt='sgd')
    total = 40
    weights = nn.Linear(2, 2)
    ours = make_optimizer(weights, config)
    schedule = make_schedule(ours, config, total)
    theirs = torch.optim.SGD(weights.parameters(), lr=0.4)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=0.4, total_steps=total, pct_start=rise, cycle_momentum=False,
        final_div_factor=0.4 / 25 / 1e-4)
    for step in range(total):
        schedule.step_update(step)
        assert peak_lr(ours) == pytest.approx(theirs.param_groups[0]['lr'], rel=1e-6), step
        theirs.step()
        if step < total - 1:
            reference.step()


def test_one_cycle_without_a_rise_begins_at_the_peak():
    config = TrainConfig(output='x', schedule='onecycle', lr=0.4, min_lr=0.1, warmup=0., opt='sgd')
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config, 10)
    rates = []
    for step in range(10):
        schedule.step_update(step)
        rates.append(peak_lr(optimizer))
    assert rates[0] == pytest.approx(0.4) and rates[-1] == pytest.approx(0.1) and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize('schedule', ['cosine', 'onecycle'])
def test_layer_decay_scales_each_layer(schedule):
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=3, embed_dim=12, num_heads=2, num_classes=4)
    config = TrainConfig(output='x', layer_decay=0.5, schedule=schedule, lr=0.1, min_lr=0.)
    optimizer = make_optimizer(model, config)
    make_schedule(optimizer, config, 10).step_update(4)
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    head = rates[id(model.head.weight)]
    assert head == peak_lr(optimizer) > 0
    # head and norm, then blocks 2, 1, 0, then the patch embedding
    for distance, weight in enumerate((
            model.blocks[2].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight,
            model.patch_embed.proj.weight), start=1):
        assert rates[id(weight)] == pytest.approx(head * 0.5 ** distance)


@pytest.mark.parametrize('options,message', [
    ({'schedule': 'linear'}, 'cosine or onecycle'), ({'layer_decay': 1.5}, 'at most 1'),
    ({'patience': 2, 'validate_every': 0}, 'validate_every'), ({'patience': -1}, 'patience is -1'),
])
def test_refused_options(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(output='x', **options)
