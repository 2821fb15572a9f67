"""The catalogue agrees with what is registered, with `weights/` and with README."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch

from vishub import catalog
from vishub.files import sha256
from vishub.hub import catalog_row, weights_folders
from vishub.listing import markdown_table, peers_table, weights_table

ROOT = Path(__file__).resolve().parent.parent


def registered() -> list:
    return [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith('vishub.')]


def test_there_are_eleven_families_for_eight_tasks():
    grounds = {'dit', 'vit'}  # what LiT inherits from, and what pruning and token reduction start from
    assert len({row.name for row in catalog.families()} - grounds) == 11
    assert len(catalog.tasks()) == 8
    for row in catalog.families():
        assert re.fullmatch(r'\d{4}\.\d{5}', row.arxiv)
        assert row.title and row.code_licence and row.notes
        assert not row.repository or re.fullmatch(r'[\w.-]+/[\w.-]+', row.repository)


def test_names_are_unique():
    names = [row.name for row in catalog.architectures()] + [row.name for row in catalog.weights()]
    assert len(names) == len(set(names))


def test_every_registered_architecture_has_a_row_and_the_other_way_round():
    assert sorted(row.name for row in catalog.architectures()) == sorted(registered())


@pytest.mark.parametrize('row', catalog.architectures(), ids=lambda row: row.name)
def test_rows_say_what_the_models_say(row):
    with torch.device('meta'):
        cfg = timm.create_model(row.name).pretrained_cfg
    assert tuple(cfg['input_size']) == row.input
    family = catalog.family(row.family)
    assert family.arxiv in str(cfg['paper_ids'])
    assert row.task == family.task


def test_rows_of_weights_belong_to_a_registered_tag():
    for row in catalog.weights():
        cfg = timm.models.get_pretrained_cfg(row.name)
        assert cfg.hf_hub_id == row.hub_id
        assert re.fullmatch('[0-9a-f]{64}', row.sha256)
        assert row.licence


def test_every_weights_folder_is_in_the_catalogue_as_measured():
    rows = {row.name: row for row in catalog.weights()}
    folders = weights_folders()
    for name, folder in folders.items():
        assert name in rows, f'paste into _WEIGHTS of vishub/catalog.py:\n{catalog_row(folder)}'
        row, metrics = rows[name], json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
        wrong = f'should be:\n{catalog_row(folder)}'
        assert (row.data, row.sha256, row.size) == (metrics['data'], metrics['sha256'], metrics['size']), wrong
        assert row.value == metrics['metrics'][row.metric], wrong
        file = folder / 'model.safetensors'
        assert (sha256(file), file.stat().st_size) == (row.sha256, row.size)
    assert set(rows) == set(folders), 'all weights are shipped with the checkout'


def test_find():
    assert catalog.find('favit_b2') is catalog.find('vishub/favit_b2')
    assert catalog.find('favit_b2').task == 'classification'
    with pytest.raises(catalog.UnknownNameError, match='Nearest: favit_b[0-9], favit_b[0-9], favit_b[0-9]'):
        catalog.find('favit_b7')
    with pytest.raises(catalog.UnknownNameError, match='favit'):
        catalog.family('favti')


def test_catalogue_imports_nothing_of_ours():
    source = (ROOT / 'vishub' / 'catalog.py').read_text(encoding='utf-8')
    imported = set(re.findall(r'^(?:from|import) (\w+)', source, flags=re.MULTILINE))
    assert imported == {'difflib', 'dataclasses', 'typing'}


@pytest.mark.parametrize(
    'mark, table', [('models', markdown_table), ('weights', weights_table), ('peers', peers_table)])
def test_readme_has_the_generated_tables(mark, table):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    found = re.search(rf'<!-- {mark} -->\n(.*?)<!-- /{mark} -->', readme, flags=re.DOTALL)
    assert found, f'README.md needs the markers <!-- {mark} --> and <!-- /{mark} --> around the table'
    option = '' if mark == 'models' else ' --pretrained'
    assert found[1].strip() == table().strip(), f'paste the output of: vishub list{option} --markdown'
