"""What the tests of slides share: a drawn slide, features of made-up slides, an untrained network with its setting."""
from pathlib import Path
from typing import Any, List

import pytest
import timm
import torch
from safetensors.torch import save_file

import vishub  # noqa: F401  registers the models
from vishub.hub import save_folder
from vishub.tasks.slide_analysis.data import EncodedTask, Item, SlideRow
from vishub.tasks.slide_analysis.procedural import ORGANS, draw_slide, write_pyramid
from vishub.tasks.slide_analysis.setting import SlideSetting
from vishub.tasks.slide_analysis.tissue import Tiling

TILING = Tiling(patch_size=16)


@pytest.fixture(scope='session')
def drawn():
    """Pixels of a slide, and its lesions."""
    return draw_slide('organ_a', 'rings', 0, 'test', side=768)


@pytest.fixture(scope='session')
def slide_path(drawn, tmp_path_factory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp('slides') / 'rings.svs', drawn[0])


@pytest.fixture(scope='session')
def network_folder(tmp_path_factory) -> Path:
    """Weights of an untrained conslide_hit_tiny that knows the four organs."""
    root = tmp_path_factory.mktemp('network')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = timm.create_model('conslide_hit_tiny')
    setting = SlideSetting({name: tuple(kind.classes) for name, kind in ORGANS.items()}, 'texture_bank', 16, TILING)
    return save_folder(
        model, root / 'conslide_hit_tiny.untrained', metrics={}, card={},
        pretrained_cfg={'notes': (setting.note(),), 'label_names': tuple(setting.classes)})


@pytest.fixture(scope='session')
def features_tasks(tmp_path_factory) -> List[EncodedTask]:
    """Three tasks of two classes whose slides are a few regions of noise, one of them marked by its class."""
    root = tmp_path_factory.mktemp('features')
    generator = torch.Generator().manual_seed(0)
    marks = 3 * torch.randn(6, 16, generator=generator)
    tasks = []
    for number in range(3):
        splits = {}
        for split, count in (('train', 4), ('test', 3)):
            items = []
            for label in (2 * number, 2 * number + 1):
                for place in range(count):
                    regions = int(torch.randint(2, 5, (1,), generator=generator))
                    patch = 0.3 * torch.randn(regions, 4, 4, 16, generator=generator)
                    region = 0.3 * torch.randn(regions, 16, generator=generator)
                    region[0] += marks[label]
                    patch[0, :2, :2] += marks[label]
                    file = root / f'{split}-{label}-{place}.safetensors'
                    save_file({'patch': patch, 'region': region, 'coords': torch.zeros(regions, 2).long()}, file)
                    items.append(Item(str(file), label, SlideRow(str(file), f'c{label}', file.stem)))
            splits[split] = tuple(items)
        tasks.append(EncodedTask(
            f'task{number}', (f'c{2 * number}', f'c{2 * number + 1}'), splits['train'], (), splits['test']))
    return tasks
