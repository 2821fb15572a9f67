"""Policies from files: what they do, and what is refused before training."""
import json

import albumentations as A
import numpy as np
import pytest

from vishub.errors import InputError
from vishub.tasks.augmentation import check_policy, describe_policy, make_augmentation

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize('kind', ['json', 'yaml'])
def test_file_does_what_it_says(tmp_path, kind):
    path = tmp_path / f'policy.{kind}'
    A.save(A.Compose([A.HorizontalFlip(p=1.), A.InvertImg(p=1.)]), path, data_format=kind)
    check_policy(str(path))
    augment = make_augmentation(str(path), (20, 24), True)
    assert np.array_equal(augment(IMAGE, np.random.default_rng(0)), 255 - IMAGE[:, ::-1])
    grey = IMAGE[..., :1]
    assert np.array_equal(augment(grey, np.random.default_rng(0)), 255 - grey[:, ::-1])
    assert make_augmentation(str(path), (32, 16), False)(IMAGE, np.random.default_rng(0)).shape == (32, 16, 3)


def test_randomness_comes_from_the_generator(tmp_path):
    path = tmp_path / 'policy.json'
    A.save(A.Compose([A.RandomBrightnessContrast(p=1.), A.Affine(rotate=(-90, 90), p=1.)]), path)
    augment = make_augmentation(str(path), (20, 24), True)
    one, same, other = (augment(IMAGE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_description_follows_the_content(tmp_path):
    path = tmp_path / 'policy.json'
    path.write_text('{}')
    first = describe_policy(str(path))
    path.write_text('{ }')
    assert first != describe_policy(str(path)) and describe_policy('light') == 'light'


@pytest.mark.parametrize('name,content,message', [
    ('gone.json', None, 'cannot be used'),
    ('damaged.json', '{', 'cannot be used'),
    ('list.yaml', '- 1', 'cannot be used'),
    ('code.yaml', '!!python/object/apply:os.system ["true"]', 'cannot be used'),
    ('unknown.json', json.dumps({'transform': {'__class_fullname__': 'os.system', 'command': 'true', 'p': 1}}),
     'cannot be used'),
    ('policy.txt', '', 'none, light, medium, heavy, or a .json or .yaml file'),
])
def test_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        check_policy(str(tmp_path / name))


def test_normalising_is_left_to_the_recipe(tmp_path):
    path = tmp_path / 'policy.json'
    A.save(A.Compose([A.Normalize()]), path)
    with pytest.raises(InputError, match='leave out Normalize'):
        check_policy(str(path))
