"""`import vishub` is light, registers everything, and loads the rest on demand."""
import json
import subprocess
import sys

import pytest

import vishub

HEAVY = (
    'gradio', 'diffusers', 'monai', 'albumentations', 'openslide', 'av', 'accelerate', 'supervision', 'transformers',
    'matplotlib', 'torchmetrics', 'typer', 'pandas', 'cv2', 'onnx', 'tensorboard',
)
# One fresh process for all questions: importing torch is what takes the time.
FRESH = """
import json, sys
import timm
before = set(sys.modules)
import vishub
answers = {'modules': sorted(sys.modules), 'added': sorted(set(sys.modules) - before)}
try:
    timm.create_model('favit_b0', pretrained=True)
except vishub.WeightsNotFoundError as error:
    answers['error'] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope='module')
def fresh():
    result = subprocess.run([sys.executable, '-c', FRESH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_loads_no_heavy_library(fresh):
    assert not [name for name in HEAVY if name in fresh['modules']]


def test_import_adds_few_modules_to_those_of_timm(fresh):
    # A count holds on a busy machine, where a time would not; benchmarks/import_time.py has the time.
    others = [name for name in fresh['added'] if not name.startswith('vishub')]
    assert len(others) < 30, others


def test_plain_timm_asks_vishub_for_weights(fresh):
    assert "no pretrained weights for 'favit_b0'" in fresh['error']


def test_public_names_are_there_on_demand_and_listed():
    for name in vishub.__all__:
        assert name in dir(vishub)
        assert getattr(vishub, name) is getattr(vishub, name)
    with pytest.raises(AttributeError, match='nonsense'):
        _ = vishub.nonsense
