"""Reading a checkpoint file of the official NViT release that the user has obtained."""
import warnings
from pathlib import Path
from typing import Any, Union

import timm

from vishub.errors import InputError
from vishub.hub.convert import read_checkpoint
from vishub.models.nvit import NViT, checkpoint_filter_fn, official_dims

__all__ = ['load_official']

NOTICE = (
    'Official NViT weights are CC BY-NC-SA 4.0 and its code is under the NVIDIA Source Code License-NC: '
    'for research and evaluation only.')


def load_official(path: Union[str, Path], **kwargs: Any) -> NViT:
    """The model of an official checkpoint file (sizes under `dim`, weights under `model`), in eval mode.

    The file is a pickle. It is read as data only, with one class allowed besides tensors: `argparse.Namespace`, in
    which the official scripts keep their options.

    Args:
        path: The file.
        **kwargs: Constructor arguments of `NViT`, e.g. `img_size`.

    Raises:
        InputError: If the file cannot be read that way.
        ValueError: If it has no sizes, or they are not those of its tensors.
    """
    checkpoint = read_checkpoint(path)
    if 'model' not in checkpoint:
        raise InputError(f"'{path}' has no entry 'model'; an official NViT checkpoint has 'model' and 'dim'")
    warnings.warn(NOTICE, stacklevel=2)
    dims = official_dims(checkpoint)
    num_classes = checkpoint['model']['head.weight'].shape[0]
    model = timm.create_model('nvit_distilled_patch16_224', dims=dims, num_classes=num_classes, **kwargs)
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model))
    return model.eval()
