"""CSV files and Hub data sets become the splits that training takes."""
import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from vishub.errors import InputError, MissingExtraError
from vishub.tasks.classification.data import load_data


def write_pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new('RGB', (10, 8), (10 * index, 0, 0)).save(folder / f'{index}.png')


def test_csv(tmp_path):
    write_pictures(tmp_path / 'set' / 'pictures', 24)
    write_pictures(tmp_path / 'elsewhere', 1)
    lines = [f'pictures/{i}.png,{"cat" if i % 3 else "dog"}' for i in range(24)]
    (tmp_path / 'set' / 'My pets.csv').write_text(
        '\n'.join(['path,label', *lines, f'{tmp_path}/elsewhere/0.png,dog']) + '\n', encoding='utf-8-sig')
    data = load_data(tmp_path / 'set' / 'My pets.csv', val_share=0.2)
    assert (data.name, data.tag, data.classes) == ('My pets', 'my_pets', ('cat', 'dog'))
    assert len(data.train) == 25 - 3 - 1 and np.bincount(data.val.labels).tolist() == [3, 1] and data.test is None
    whole = [*zip(data.train.images, data.train.labels), *zip(data.val.images, data.val.labels)]
    assert len({file for file, _ in whole}) == 25
    for file, label in whole:
        index = int(file.stem)
        assert label == (1 if 'elsewhere' in str(file) else int(index % 3 == 0))
    assert data.train[1].shape == (8, 10, 3)


def test_csv_with_splits_and_numbers(tmp_path):
    write_pictures(tmp_path, 6)
    (tmp_path / 'a.csv').write_text(
        'split,label,path\n' + ''.join(
            f'{split},{label},{i}.png\n' for i, (split, label) in enumerate((
                ('train', 10), ('train', 9), ('validation', 9), ('val', 10), ('test', 9), ('', 10)))))
    data = load_data(tmp_path / 'a.csv')
    assert data.classes == ('9', '10')
    assert data.train.labels.tolist() == [1, 0, 1] and data.val.labels.tolist() == [0, 1]
    assert data.test.labels.tolist() == [0]


@pytest.mark.parametrize('text,message', [
    ('file,label\n0.png,a\n', "has no column 'path'"),
    ('', "has no column 'path'"),
    ('path,label\n0.png,a\n1.png,\n', "line 3 of .* lacks a path or a label"),
    ('path,label\n0.png,a\n1.png\n', "line 3 of .* lacks a path or a label"),
    ('path,label\n9.png,a\n', "line 2 of .* does not exist: '9.png'"),
    ('path,label\n../secret.png,a\n', 'leads outside the folder'),
    ('path,label\nlink/secret.png,a\n', 'leads outside the folder'),
    ('path,label,split\n0.png,a,future\n', "split 'future'"),
    ('path,label\n0.png,a\n1.png,a\n', 'at least two'),
    ('path,label\n0.png,a\nbroken.png,b\n', 'broken.png'),
])
def test_csv_refused(tmp_path, text, message):
    root = tmp_path / 'set'
    write_pictures(root, 2)
    write_pictures(tmp_path / 'outside', 1)
    (tmp_path / 'outside' / '0.png').rename(tmp_path / 'outside' / 'secret.png')
    Image.new('RGB', (4, 4)).save(tmp_path / 'secret.png')
    (root / 'link').symlink_to(tmp_path / 'outside')
    (root / 'broken.png').write_text('no picture')
    (root / 'a.csv').write_text(text)
    with pytest.raises(InputError, match=message):
        load_data(root / 'a.csv')


# -- Hub data sets: a stand-in for the library, with the parts of its interface that are used ------------------------

class Label:
    names = ['r', 'g']


class Picture:
    def __init__(self, decode=True):
        self.decode = decode


class Table:
    def __init__(self, labels, decoded=True):
        self.labels, self.decoded, self.features = labels, decoded, {'picture': Picture(), 'kind': Label()}

    def cast_column(self, column, feature):
        assert column == 'picture' and not feature.decode
        return Table(self.labels, decoded=False)

    def __getitem__(self, key):
        if key == 'kind':
            return self.labels
        assert not self.decoded, 'pictures are decoded by vishub'
        content = io.BytesIO()
        Image.new('RGB', (6, 5), (200, 0, 0) if self.labels[key] == 0 else (0, 200, 0)).save(content, 'PNG')
        return {'picture': {'bytes': content.getvalue(), 'path': None}, 'kind': self.labels[key]}


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType('datasets')
    module.Image, module.ClassLabel = Picture, Label
    tables = {'train': Table([0, 1] * 10), 'validation': Table([0, 1, 1]), 'test': Table([-1, -1])}

    def load_dataset(name):
        if name != 'org/colours':
            raise FileNotFoundError(f'no data set {name}')
        return tables
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, 'datasets', module)
    return tables


def test_hub_dataset(library):
    data = load_data('hf:org/colours')
    assert (data.name, data.tag, data.classes) == ('colours', 'colours', ('r', 'g'))
    assert len(data.train) == 20 and len(data.val) == 3 and data.test is None  # its labels are secret
    assert data.train[1].shape == (5, 6, 3) and data.train[1][0, 0].tolist() == [0, 200, 0]
    assert data.val[0][0, 0].tolist() == [200, 0, 0]
    del library['validation']
    assert len(load_data('hf:org/colours').val) == 2


def test_hub_dataset_refused(library, monkeypatch):
    with pytest.raises(InputError, match='hf:org/nothing.* cannot be loaded: no data set org/nothing'):
        load_data('hf:org/nothing')
    del library['train'].features['kind']
    with pytest.raises(InputError, match='one of class labels; it has picture'):
        load_data('hf:org/colours')


def test_missing_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r'vishub\[datasets\]'):
        load_data('hf:org/colours')
