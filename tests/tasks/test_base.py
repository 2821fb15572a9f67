"""What every pipeline promises: how it is found, where it runs, how lists and progress work, how results are saved."""
import dataclasses
import importlib
import json
import sys

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vishub
from vishub import catalog
from vishub.errors import InputError
from vishub.tasks import base


class Doubler(base.Pipeline):
    task = 'doubling'
    default_model = 'local-dir:nowhere'

    def __call__(self, number, batch_size=2, progress=None):
        return self.run_batches(number, lambda batch: [2 * n for n in batch], batch_size, progress)


@dataclasses.dataclass(frozen=True)
class Square(base.Result):
    side: int

    def to_dict(self):
        return {'side': self.side, 'name': 'Größe'}

    def plot(self):
        if self.side < 0:
            raise RuntimeError('cannot draw')
        return Image.new('RGB', (self.side, self.side), 'red')


# -- finding pipelines ------------------------------------------------------------------------------------------------

def test_every_task_of_the_catalogue_has_a_pipeline_or_says_it_has_none_yet():
    assert 'classification' in base.pipeline_tasks() and set(base.pipeline_tasks()) <= set(catalog.tasks())
    for task in catalog.tasks():
        if task in base.pipeline_tasks():
            assert issubclass(base.pipeline_class(task), base.Pipeline) and base.pipeline_class(task).task == task
        else:
            with pytest.raises(InputError, match=f"'{task}' has no pipeline yet.*classification"):
                vishub.pipeline(task)


def test_unknown_task_lists_those_that_exist():
    with pytest.raises(InputError, match="'clasification' is not a task.*classification"):
        vishub.pipeline('clasification')
    with pytest.raises(InputError, match='needs a task'):
        vishub.pipeline()


def test_task_follows_from_the_model():
    model = vishub.create_model('favit_b0', num_classes=3)
    assert type(vishub.pipeline(model=model, device='cpu')) is base.pipeline_class('classification')
    # Of a task without a pipeline, before any weights are looked for.
    later = [row for row in catalog.architectures() if row.task not in base.pipeline_tasks()]
    for row in later[:1]:
        with pytest.raises(InputError, match='no pipeline yet'):
            vishub.pipeline(model=f'vishub/{row.name}')


def test_recipe_is_training_s():
    from vishub.training.recipe import Recipe
    assert base.Recipe is Recipe
    with pytest.raises(AttributeError):
        base.NoSuchName  # noqa: B018


def test_running_a_model_needs_nothing_of_training_or_the_demo(monkeypatch):
    import vishub.tasks
    monkeypatch.setattr(vishub, 'tasks', vishub.tasks)  # importing anew replaces it; this puts it back
    for name in [name for name in sys.modules if name.split('.')[:2] == ['vishub', 'tasks']]:
        monkeypatch.delitem(sys.modules, name)
    for name in ('accelerate', 'albumentations', 'gradio', 'matplotlib', 'torchmetrics', 'vishub.training'):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it gets an ImportError
    fresh = importlib.import_module('vishub.tasks.base')
    assert fresh is not base and fresh.pipeline_class('classification').task == 'classification'


# -- models and devices -----------------------------------------------------------------------------------------------

def test_module_is_used_as_it_is():
    module = nn.Linear(3, 2).train()
    pipe = Doubler(module, device='cpu')
    assert pipe.model is module and not module.training
    assert pipe.num_params == 8 and pipe.name == 'Linear' and 'Linear' in repr(pipe)


def test_name_claims_no_weights_that_were_not_loaded():
    assert Doubler(timm.create_model('test_vit'), device='cpu').name == 'test_vit'


def test_models_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match='int as a model'):
        Doubler(7)
    with pytest.raises(InputError, match='no config.json'):
        Doubler(f'local-dir:{tmp_path}')
    with pytest.raises(InputError, match='nowhere'):
        Doubler()  # the default model
    with pytest.raises(vishub.UnknownNameError, match='favit_b0'):
        Doubler('vishub/favit_b00')


@pytest.mark.parametrize('device', ['graphics', 'cuda:99', 'meta', 3.5, ''])
def test_devices_that_are_not_here(device):
    with pytest.raises(InputError, match='device'):
        base.choose_device(device)


def test_device_choice():
    assert base.choose_device('cpu') == base.choose_device(torch.device('cpu')) == torch.device('cpu')
    present = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    assert base.choose_device().type == next(kind for kind, is_there in present.items() if is_there)


# -- lists and progress -----------------------------------------------------------------------------------------------

def test_batches_keep_order_and_report():
    seen = []
    pipe = Doubler(nn.Identity(), device='cpu')
    assert pipe([1, 2, 3, 4, 5], progress=lambda done, total: seen.append((done, total))) == [2, 4, 6, 8, 10]
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert pipe([]) == []
    with pytest.raises(InputError, match='batch_size is 0'):
        pipe([1], batch_size=0)


def test_progress_can_cancel():
    class Cancelled(Exception):
        pass

    ran = []

    def progress(done, total):
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        base.Pipeline.run_batches([1, 2, 3], lambda batch: ran.append(batch) or batch, 1, progress)
    assert ran == [[1]]


# -- results ----------------------------------------------------------------------------------------------------------

def test_save_as_json_and_picture(tmp_path):
    path = Square(8).save(tmp_path / 'new' / 'a.json')
    assert json.loads(path.read_text(encoding='utf-8')) == {'side': 8, 'name': 'Größe'}
    for suffix in ('.png', '.JPG', '.webp'):
        with Image.open(Square(8).save(str(tmp_path / f'a{suffix}'))) as image:
            assert image.size == (8, 8)


def test_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / 'a.png'
    Square(8).save(path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match='cannot draw'):
        Square(-1).save(path)
    with pytest.raises(InputError, match=r"a\.txt.*\.json"):
        Square(8).save(tmp_path / 'a.txt')
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a.png']
