"""Augmentation of pictures (albumentations), by name or from a file; its randomness comes from the caller.

A policy file is what `albumentations.save(compose, path)` writes, as JSON or YAML.
"""
import json
import random
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import numpy as np

from vishub.errors import InputError, import_extra
from vishub.files import sha256

__all__ = ['AUGMENTATIONS', 'Augmentation', 'check_policy', 'describe_policy', 'make_augmentation']

# uint8 HWC -> uint8 HWC
Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

AUGMENTATIONS = ('none', 'light', 'medium', 'heavy')
FILES = ('.json', '.yaml', '.yml')


def check_policy(policy: str) -> None:
    """Raises `InputError` unless `policy` is a name of `AUGMENTATIONS` or a policy file that can be used."""
    if policy in AUGMENTATIONS:
        return
    if Path(policy).suffix.lower() not in FILES:
        raise InputError(
            f"augmentation '{policy}' is unknown; choose one of {', '.join(AUGMENTATIONS)}, or a .json or .yaml file")
    trial = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    make_augmentation(policy, (64, 64), True)(trial, np.random.default_rng(0))


def describe_policy(policy: str) -> str:
    """The name, for files with the checksum of their content: a file that was edited is another augmentation."""
    return policy if policy in AUGMENTATIONS else f'{Path(policy).name} sha256:{sha256(policy)[:16]}'


def _read_policy(path: Path) -> Any:
    """The composition in a file. Only albumentations' own transforms can be named there, and nothing is executed."""
    A = import_extra('albumentations', 'train')
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix.lower() == '.json':
            content: Dict[str, Any] = json.loads(text)
        else:
            content = import_extra('yaml', 'train').safe_load(text)
        compose = A.from_dict(content)
        if not isinstance(compose, A.BaseCompose):
            raise ValueError('it is not a composition, as albumentations.save(A.Compose([…]), path) writes it')
    except Exception as error:  # yaml, json, pydantic and albumentations have their own classes
        raise InputError(f"augmentation '{path}' cannot be used: {error!r}") from error
    return compose


def make_augmentation(policy: str, size: Tuple[int, int], fixed_size: bool) -> Augmentation:
    """An albumentations policy; its randomness comes from the generator that it is called with.

    Args:
        policy: Path of a policy file (its result is resized to `size` where it has another), or `none`; `light`
            (shifted or resized crop, mirror); `medium` (also colour and sometimes a hole); `heavy` (also rotation and
            scale, stronger colour, more holes).
        size: (height, width) of the result.
        fixed_size: Whether all images have that size already (then crops shift by an eighth over reflected borders)
            or are files of any size (then crops are resized, or, for `none`, the whole image is).

    Raises:
        InputError: If there is no such policy, or a file's result is no uint8 picture (leave out Normalize).
        MissingExtraError: If albumentations is not installed.
    """
    if policy not in AUGMENTATIONS:
        if Path(policy).suffix.lower() not in FILES:
            check_policy(policy)  # says what there is
        return _from_file(Path(policy), size)
    A = import_extra('albumentations', 'train')
    reflect = 2  # cv2.BORDER_REFLECT
    height, width = size
    steps: list = []
    if policy == 'none':
        steps = [] if fixed_size else [A.Resize(height, width)]
    else:
        if fixed_size:
            steps += [
                A.Pad((width // 8, height // 8, width // 8, height // 8), border_mode=reflect),
                A.RandomCrop(height, width)]
        else:
            steps += [A.RandomResizedCrop(size, scale=(0.35 if policy == 'light' else 0.2, 1.))]
        steps += [A.HorizontalFlip(p=0.5)]
    if policy in ('medium', 'heavy'):
        strength = 0.2 if policy == 'medium' else 0.4
        hole = ((height // 5, height // 3), (width // 5, width // 3))
        if policy == 'heavy':
            steps += [A.Affine(scale=(0.8, 1.2), rotate=(-15, 15), shear=(-8, 8), border_mode=reflect, p=0.5)]
        steps += [
            A.ColorJitter(
                brightness=strength, contrast=strength, saturation=strength, hue=0.1 * strength,
                p=0.5 if policy == 'medium' else 0.8),
            A.CoarseDropout(
                num_holes_range=(1, 1 if policy == 'medium' else 2), hole_height_range=hole[0],
                hole_width_range=hole[1], fill=128, p=0.25 if policy == 'medium' else 0.5)]
    compose = A.Compose(steps)

    def augment(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return _apply(compose, image, generator) if steps else image

    return augment


def _apply(compose: Any, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    # albumentations draws from one generator of numpy and one of Python
    compose.set_random_state(generator, random.Random(int(generator.integers(1 << 62))))
    result = compose(image=image)['image']
    # cv2 drops the channel of grey images
    return result[..., None] if isinstance(result, np.ndarray) and result.ndim == 2 else result


def _from_file(path: Path, size: Tuple[int, int]) -> Augmentation:
    A = import_extra('albumentations', 'train')
    compose, resize = _read_policy(path), A.Resize(*size)

    def augment(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        result = _apply(compose, image, generator)
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape[2:] != image.shape[2:]:
            raise InputError(
                f"augmentation '{path}' must give pictures as it gets them, uint8 with the same channels: leave out "
                'Normalize, ToFloat and ToTensorV2, the recipe does their work')
        if result.shape[:2] == size:
            return result
        result = resize(image=result)['image']
        return result if result.ndim == 3 else result[..., None]

    return augment
