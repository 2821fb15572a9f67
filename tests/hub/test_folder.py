"""Saved folders: what is in them, what is refused, and that nothing is half written."""
import json
import re
import shutil

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sample_weights import METRICS, NAME

import vishub
from vishub.files import sha256
from vishub.hub import annotate, catalog_row, find, save_folder
from vishub.hub import folder as folder_module


def test_folder_is_a_hub_repository(saved):
    folder, model = saved
    assert {path.name for path in folder.iterdir()} == {
        'model.safetensors', 'config.json', 'metrics.json', 'README.md'}
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'favit_small64'
    assert config['num_classes'] == 10
    assert config['label_names'][9] == 'truck'
    assert config['pretrained_cfg']['tag'] == 'cifar10'
    assert not {'file', 'hf_hub_id', 'architecture'} & set(config['pretrained_cfg'])
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['sha256'] == sha256(folder / 'model.safetensors')
    assert metrics['size'] == (folder / 'model.safetensors').stat().st_size
    assert metrics['num_params'] == sum(p.numel() for p in model.parameters())
    assert all(tensor.dtype == torch.float16 for tensor in load_file(folder / 'model.safetensors').values())


@pytest.mark.parametrize('create', [timm.create_model, vishub.create_model])
def test_constructor_arguments_come_back(create, tmp_path):
    model = create('favit_small64', num_classes=4, in_chans=1, window_size=3, drop_path_rate=0.2)
    arguments = {'window_size': 3, 'in_chans': 1}
    folder = save_folder(
        model, tmp_path / 'favit_small64.grey', metrics={}, card={}, dtype=torch.float32, model_args=arguments,
        pretrained_cfg={'input_size': (1, 64, 64), 'mean': (0.5,), 'std': (0.5,), 'label_names': list('abcd')})
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_args']['window_size'] == 3
    assert 'num_classes' not in config['model_args']  # it is at the root; transformers refuses it twice
    assert 'drop_path_rate' not in config['model_args']
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(loaded(x), model.eval()(x))
    assert loaded.pretrained_cfg['label_names'] == list('abcd')
    assert 'Not measured' in (folder / 'README.md').read_text()


def test_labels_of_other_classes_are_not_kept(tmp_path):
    model = timm.create_model(NAME, num_classes=3)
    folder = save_folder(model, tmp_path / 'favit_small64.three', metrics={}, card={})
    assert 'label_names' not in json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('metrics, message', [
    ({'metrics': {'top1': 1.0}}, 'data'),
    ({**METRICS, 'num_test': None}, 'num_test'),
    ({**METRICS, 'metrics': {'top1': float('nan')}}, 'metrics.json'),
    ({**METRICS, 'training': {'lr': torch.ones(1)}}, 'metrics.json'),
])
def test_bad_metrics_are_refused_and_leave_nothing(saved, metrics, message, tmp_path):
    with pytest.raises(vishub.InputError, match=message):
        save_folder(saved[1], tmp_path / NAME, metrics=metrics, card={})
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_half_precision_are_refused(tmp_path):
    model = timm.create_model(NAME)
    with torch.no_grad():
        model.head.bias[0] = 1e6
    with pytest.raises(vishub.InputError, match='head.bias.*float32'):
        save_folder(model, tmp_path / NAME, metrics={}, card={})
    save_folder(model, tmp_path / NAME, metrics={}, card={}, dtype=torch.float32)


def test_a_model_that_timm_cannot_rebuild_is_refused_and_the_old_folder_stays(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / NAME)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = timm.create_model(NAME)
    model.head = torch.nn.Linear(256, 11)  # behind timm's back
    with pytest.raises(vishub.InputError, match='cannot rebuild'):
        save_folder(model, folder, metrics={}, card={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_save_that_breaks_off_leaves_a_folder_that_is_noticed(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved[0], tmp_path / NAME)
    moved = []

    def replace_once(source, target):
        if moved:
            raise OSError('power cut')
        moved.append(shutil.move(source, target))

    monkeypatch.setattr(folder_module.os, 'replace', replace_once)
    with pytest.raises(OSError, match='power cut'):
        save_folder(timm.create_model(NAME), folder, metrics=METRICS, card={})
    monkeypatch.setattr(find, '_roots', lambda: [tmp_path])
    with pytest.raises(vishub.WeightsNotFoundError, match='damaged'):
        timm.create_model(NAME, pretrained=True)


def test_other_files_of_a_folder_stay(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / NAME)
    (folder / 'robustness.png').write_bytes(b'plot')
    save_folder(saved[1], folder, metrics=METRICS, card={})
    assert (folder / 'robustness.png').read_bytes() == b'plot'


def test_card_front_matter_is_what_the_hub_reads(saved):
    data = ModelCard.load(saved[0] / 'README.md').data
    assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'apache-2.0', 'image-classification')
    assert data.datasets == ['cifar10']
    results = {result.metric_type: result for result in data.eval_results}
    assert results['accuracy'].metric_value == 12.5
    assert results['accuracy'].dataset_name == 'CIFAR-10 (JPEG)'
    assert results['accuracy'].dataset_split == 'official test split'


def test_card_states_the_facts(saved):
    text = (saved[0] / 'README.md').read_text()
    for fact in (
            'arxiv.org/abs/2312.08614', 'github.com/q2479036243/FaViT', '1,569,318 parameters',
            '| Top-1 accuracy (%) | 12.50 | 11.90 to 13.20 |', '10,000 items', 'seed 3', '60 min', '2 CPU cores',
            'vishub train classification --model favit_small64', 'Pictures of 32 pixels.',
            sha256(saved[0] / 'model.safetensors'),
    ):
        assert fact in text, fact
    assert 'Peers' not in text and 'Robustness' not in text


def test_annotate_adds_peers_and_robustness(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / NAME)
    annotate(
        folder,
        peers=[{'name': 'pvt_v2_b0', 'num_params': 3_400_000, 'metrics': {'top1': 13.0}, 'wall_s': 7200}],
        robustness={
            'metric': 'top1', 'severities': [1, 2], 'models': {NAME: {'noise': [11.0, 10.5]}}},
        card={'robustness_plot': 'robustness.png'},
    )
    text = (folder / 'README.md').read_text()
    assert '| pvt_v2_b0 | – | 3,400,000 | 13.00 | – | 2.0 h |' in text
    assert f'| {NAME} | noise | 11.00 | 10.50 |' in text
    assert '](robustness.png)' in text
    with pytest.raises(vishub.InputError, match='sha256'):
        annotate(folder, sha256='0' * 64)


def test_snippet_of_the_card_works(saved, catalogued, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(find, '_roots', lambda: [saved[0].parent])
    snippet = re.search(r'```python\n(.*?)```', (saved[0] / 'README.md').read_text(), flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (90, 70), 'navy').save('picture.jpg')
    exec(snippet, {})
    label, probability = capsys.readouterr().out.split()
    assert label in timm.models.get_pretrained_cfg(NAME).label_names
    assert 0.1 <= float(probability) <= 1


def test_catalog_row_is_source_that_gives_the_row(saved):
    row = eval(catalog_row(saved[0]).strip().rstrip(','), {'Weight': vishub.catalog.Weight})
    assert (row.name, row.metric, row.value, row.hub_id) == (NAME, 'top1', 12.5, f'vishub/{NAME}')
    assert row.sha256 == sha256(saved[0] / 'model.safetensors')
