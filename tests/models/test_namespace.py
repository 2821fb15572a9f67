"""The prefix `vishub/`, on the oldest and the newest timm alike."""
import importlib

import pytest
import timm
import torch
from timm.models import _factory

import vishub
from vishub.models import namespace


def test_the_three_names_build_the_same_model():
    models = []
    for create, name in (
            (timm.create_model, 'favit_small64'),
            (timm.create_model, 'vishub/favit_small64'),
            (vishub.create_model, 'favit_small64'),
            (vishub.create_model, 'vishub/favit_small64'),
    ):
        torch.manual_seed(0)
        models.append(create(name, num_classes=7))
    first = models[0].state_dict()
    for model in models[1:]:
        assert type(model) is type(models[0])
        assert model.num_classes == 7
        state = model.state_dict()
        assert state.keys() == first.keys()
        assert all(torch.equal(state[key], first[key]) for key in first)


def test_prefixed_tag_picks_its_configuration():
    model = timm.create_model('vishub/favit_b2.cifar10')
    assert model.pretrained_cfg['tag'] == 'cifar10'
    assert model.num_classes == 10
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)  # window_size 3 of the tag: 64 px are enough


def test_parser_gives_registry_names():
    assert timm.models.parse_model_name is _factory.parse_model_name
    assert timm.models.parse_model_name('vishub/favit_b2') == (None, 'favit_b2')
    assert timm.models.parse_model_name('vishub/favit_b2.cifar10') == (None, 'favit_b2.cifar10')
    assert timm.models.safe_model_name('vishub/favit_b2') == 'favit_b2'


@pytest.mark.parametrize('name, nearest', [
    ('vishub/favit_b9', 'favit_b'),
    ('vishub/favitb2', 'favit_b2'),
    ('vishub/FaViT_B2', 'favit_b2'),
    ('vishub/favit_b2.cifar1', 'favit_b2.cifar10'),
    ('vishub/resnet50', ''),  # timm has it, vishub does not
    ('vishub/', ''),
    ('vishub/favit_b2/more', ''),
    ('vishub/vishub/favit_b2', ''),
])
def test_unknown_names_are_refused_and_name_the_nearest_three(name, nearest):
    with pytest.raises(vishub.UnknownNameError) as caught:
        timm.create_model(name)
    message = str(caught.value)
    assert f"'{name}'" in message
    named = message.rpartition('Nearest: ')[2].rstrip('.').split(', ')
    assert len(named) == len(set(named)) == 3
    assert all(timm.is_model(n) for n in named)
    assert nearest in message
    assert isinstance(caught.value, RuntimeError)  # what timm raises for an unknown model


def outcome(function, name):
    """What a call gives: its result, or the kind and text of its error."""
    try:
        return function(name)
    except (Exception, AssertionError) as error:
        return type(error), str(error)


@pytest.mark.parametrize('name', [
    'resnet18', 'resnet18.a1_in1k', 'favit_b2', 'favit_b2.cifar10', 'unknown_model', '',
    'timm/resnet18', 'other/favit_b2', 'Vishub/favit_b2', 'vishubx/favit_b2', 'vishub', '/vishub/favit_b2',
    'hf-hub:vishub/favit_b2.cifar10', 'hf-hub:timm/resnet18.a1_in1k', 'hf_hub:timm/resnet18.a1_in1k',
    'local-dir:weights/favit_b2.cifar10', 'local-dir:/tmp/vishub/model', 'ftp:vishub/favit_b2', 'hf-hub:',
    './vishub/favit_b2', 'C:\\models\\vishub',
])
def test_every_other_name_keeps_timms_behaviour_and_error(name):
    timm_parser = _factory.parse_model_name.timm_parser
    assert not hasattr(timm_parser, 'timm_parser')  # really timm's own
    assert outcome(_factory.parse_model_name, name) == outcome(timm_parser, name)


def test_unknown_plain_names_keep_timms_error():
    with pytest.raises(RuntimeError, match='^Unknown model'):
        timm.create_model('favit_b9')


def test_installing_again_and_reloading_are_harmless():
    parser = _factory.parse_model_name
    listed = timm.list_models()
    namespace.install()
    importlib.reload(namespace)
    namespace.install()
    importlib.reload(vishub)
    assert _factory.parse_model_name is parser
    assert timm.models.parse_model_name is parser
    assert timm.list_models() == listed
    assert vishub.create_model('favit_small64').num_classes == 10
    with pytest.raises(RuntimeError, match='Nearest'):
        timm.create_model('vishub/favit_b9')


def test_timm_lists_plain_names():
    assert 'favit_b2' in timm.list_models()
    assert not [name for name in timm.list_models() if '/' in name]
    assert not timm.is_model('vishub/favit_b2')


def test_list_models_follows_the_catalogue():
    everything = vishub.list_models()
    assert {'favit_b0', 'favit_b1', 'favit_b2', 'favit_b3', 'favit_small64'} <= set(everything)
    assert set(vishub.list_models(task='classification')) <= set(everything)
    for name in vishub.list_models(pretrained=True):
        assert name.partition('.')[0] in everything
    with pytest.raises(vishub.UnknownNameError, match='classification'):
        vishub.list_models(task='clasification')


def test_create_model_notes_its_arguments_for_saving():
    model = vishub.create_model('favit_small64', window_size=3, num_classes=4, cache_dir='/nowhere')
    assert model._model_args['window_size'] == 3
    assert 'cache_dir' not in model._model_args
    tagged = timm.create_model('favit_b2.cifar10')
    assert tagged._model_args['window_size'] == 3


def test_entries_that_timm_does_not_know_stay_with_the_model():
    cfg = dict(timm.get_pretrained_cfg('favit_small64').to_dict(), house={'floor': 1})
    model = timm.create_model('favit_small64', pretrained_cfg=cfg)
    assert model.pretrained_cfg['house'] == model.default_cfg['house'] == {'floor': 1}
    first, second = (timm.create_model('mambaclinix_tiny', pretrained_cfg='procedural') for _ in range(2))
    assert first.pretrained_cfg['preprocessing'] == {'intensity': 'zscore'}
    assert first.pretrained_cfg['preprocessing'] is not second.pretrained_cfg['preprocessing']
    assert 'preprocessing' not in timm.create_model('mambaclinix_tiny').pretrained_cfg
