"""Every folder of `weights/`: complete, in the catalogue, and the same model by every name a user may type."""
import json
from pathlib import Path

import pytest
import timm
import torch

import vishub
from vishub import catalog

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.name for path in (ROOT / 'weights').iterdir() if path.is_dir())


def test_the_names_that_users_type_first_have_weights():
    assert {'favit_b2.cifar10', 'favit_small64.cifar10', 'favit_small64.fashion_mnist'} <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_folder_is_a_complete_hub_repository(name):
    folder = ROOT / 'weights' / name
    for file in ('model.safetensors', 'config.json', 'README.md', 'metrics.json'):
        assert (folder / file).is_file(), f'{name} lacks {file}'
    card = (folder / 'README.md').read_text(encoding='utf-8')
    metrics = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
    row = catalog.find(name)
    value = metrics['metrics'][row.metric]
    assert (f'{value:.2f}' if abs(value) >= 1 else f'{value:.4f}') in card
    assert metrics['data'] in card
    assert row.value == pytest.approx(metrics['metrics'][row.metric])
    for link in ('robustness.png', 'samples.png'):
        assert link not in card or (folder / link).is_file(), f'{name}: the card shows {link}, which is not there'


@pytest.mark.parametrize('name', NAMES)
def test_registered_tag_agrees_with_the_stored_configuration(name):
    stored = json.loads((ROOT / 'weights' / name / 'config.json').read_text(encoding='utf-8'))
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, f'{name} has no tag in its family'
    for key, value in stored['pretrained_cfg'].items():
        if key in ('input_size', 'min_input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation'):
            registered = getattr(cfg, key)
            assert (list(registered) if isinstance(registered, tuple) else registered) == value, key
    assert list(cfg.label_names or ()) == stored.get('label_names', [])  # not of every task
    assert cfg.num_classes == stored['num_classes']


@pytest.mark.parametrize('name', NAMES)
def test_same_model_by_every_name(name):
    by_folder = timm.create_model(f'local-dir:{ROOT / "weights" / name}', pretrained=True).eval()
    arguments = torch.rand(2, *by_folder.pretrained_cfg['input_size']),
    if hasattr(by_folder, 'example_inputs'):
        arguments = by_folder.example_inputs()
    with torch.no_grad():
        expected = by_folder(*arguments)
        for model in (
                timm.create_model(name, pretrained=True),
                timm.create_model(f'vishub/{name}', pretrained=True),
                vishub.create_model(name, pretrained=True),
        ):
            torch.testing.assert_close(model.eval()(*arguments), expected)
            for key in ('tracking', 'preprocessing', 'patch_size'):  # what pipelines go by, of the tasks that have it
                assert model.pretrained_cfg.get(key) == by_folder.pretrained_cfg.get(key), key


def test_architecture_alone_takes_its_first_weights():
    model = timm.create_model('vishub/favit_b2', pretrained=True)
    assert model.num_classes == 10 and model.pretrained_cfg['tag'] == 'cifar10'
    assert timm.create_model('vishub/favit_b2').num_classes == 1000
    new_head = timm.create_model('vishub/favit_b2', pretrained=True, num_classes=3)
    assert new_head.num_classes == 3


@pytest.mark.parametrize('model', ['favit_b2.cifar10', 'favit_small64.cifar10'])
@pytest.mark.parametrize('file, label', [('firetruck.jpg', 'truck'), ('jet.jpg', 'airplane')])
def test_a_model_knows_a_real_photograph(model, file, label):
    result = vishub.pipeline(model=model)(ROOT / 'app' / 'examples' / file)
    assert result.predictions[0].label == label
