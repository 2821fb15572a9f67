"""Data sets of a Hub, by the real `datasets` library over real HTTP: Parquet and folders of pictures."""
import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from tests.hub_server import HubServer

COLOURS = {'blue': (0, 0, 200), 'red': (200, 0, 0)}


def png(colour) -> bytes:
    content = io.BytesIO()
    Image.new('RGB', (6, 5), colour).save(content, 'PNG')
    return content.getvalue()


def parquet(labels) -> bytes:
    """As `Dataset.push_to_hub` writes it: pictures as bytes, classes as numbers, their names beside the schema."""
    features = {'image': {'_type': 'Image'}, 'label': {'names': list(COLOURS), '_type': 'ClassLabel'}}
    kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    schema = pa.schema(
        [('image', kind), ('label', pa.int64())],
        metadata={'huggingface': json.dumps({'info': {'features': features}})})
    colours = list(COLOURS.values())
    rows = [{'image': {'bytes': png(colours[i]), 'path': f'{n}.png'}, 'label': i} for n, i in enumerate(labels)]
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), content)
    return content.getvalue()


CODE = '''
import json
from vishub.errors import InputError
from vishub.tasks.classification.data import load_data

def read(name):
    try:
        data = load_data(f'hf:org/{name}')
    except InputError as error:
        return str(error)
    return [data.name, list(data.classes)] + [
        split and [split[i][2, 3].tolist() + [int(split.labels[i])] for i in range(len(split))]
        for split in (data.train, data.val, data.test)]

facts = {name: read(name) for name in ('parquet', 'folders', 'plain', 'none')}
print(json.dumps(facts), flush=True)
import datasets, huggingface_hub
datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True  # as at import with HF_HUB_OFFLINE=1
huggingface_hub.close_session()
print(json.dumps({name: read(name) for name in ('parquet', 'folders')}))
'''


def test_data_sets_of_the_hub(tmp_path):
    blue, red = ([*colour, number] for number, colour in enumerate(COLOURS.values()))
    with HubServer() as hub:
        hub.put('org/parquet', kind='dataset', files={
            'data/train-00000-of-00001.parquet': parquet([0, 1] * 10),
            'data/validation-00000-of-00001.parquet': parquet([1]),
            'data/test-00000-of-00001.parquet': parquet([0, 1, 1])})
        hub.put('org/folders', kind='dataset', files={
            f'train/{name}/{number}.png': png(colour) for name, colour in COLOURS.items() for number in range(10)})
        hub.put('org/plain', kind='dataset', files={'train.csv': b'a,b\n1,2\n'})
        environment = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
        environment.update(
            HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'home'), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        ran = subprocess.run(
            [sys.executable, '-c', CODE], env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
    facts, offline = map(json.loads, ran.stdout.splitlines())
    assert facts['parquet'] == ['parquet', ['blue', 'red'], [blue, red] * 10, [red], [blue, red, red]]
    name, classes, train, val, test = facts['folders']
    assert classes == ['blue', 'red'] and test is None
    assert sorted(train + val) == sorted([blue, red] * 10) and len(val) == 2
    assert 'column of images and one of class labels; it has a, b' in facts['plain']
    assert "data 'hf:org/none' cannot be loaded" in facts['none'] and '\n' not in facts['none']
    assert offline == {name: facts[name] for name in ('parquet', 'folders')}  # from the cache
