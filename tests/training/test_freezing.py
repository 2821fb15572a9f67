"""What is frozen stands still, in its weights and in its statistics; what is not, moves."""
import pytest
import timm
import torch
from torch import nn

from vishub.errors import InputError
from vishub.training.freezing import freeze, freeze_all_but_head, rest_frozen


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('resnet10t', num_classes=3)


def step(model: nn.Module) -> None:
    model.train()
    rest_frozen(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


def test_frozen_parts_stand_still_with_their_statistics():
    model = make_model()
    freeze(model, ['conv1', 'bn1', 'layer[12]'])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(('conv1.', 'bn1.', 'layer1.', 'layer2.')) for name in moved)
    assert {'fc.weight', 'layer4.0.bn2.bias', 'layer4.0.bn1.running_mean'} <= moved


def test_linear_probe_trains_the_head_alone():
    model = make_model()
    freeze_all_but_head(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {'fc.weight', 'fc.bias'}


def test_refused():
    with pytest.raises(InputError, match="'stem' fits no parameter; the model's parts are conv1, bn1, layer1"):
        freeze(make_model(), ['layer1', 'stem'])
    with pytest.raises(InputError, match='leaves nothing to train'):
        freeze(make_model(), ['*'])
    with pytest.raises(InputError, match='no classifier'):
        freeze_all_but_head(nn.Linear(2, 2))
