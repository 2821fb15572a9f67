"""Save a trained model as a folder that timm and the Hub understand.

`metrics.json` is one JSON object; the model card is made from it:

    data        str    data set, e.g. 'CIFAR-10 (JPEG)'
    split       str    what was measured on, e.g. 'official test split'
    num_test    int    number of test items
    metrics     dict   name -> number; `<name>_ci95` -> [low, high]; the first name is the one in the catalogue,
                       e.g. {'top1': 86.1, 'top1_ci95': [85.4, 86.8], 'top5': 99.4} (accuracies in per cent)
    training    dict   optional; 'command', 'seed', 'epochs', 'wall_s' (seconds), 'hardware', 'recipe' (a sentence or a
                       dict), and whatever else the training wants to note
    peers       list   optional; same data: {'name', 'num_params', 'metrics', 'wall_s'} each, and 'epochs' and
                       'input_size' ([C, H, W]) where known: others than the model's own, and the card claims no same
                       budget
    robustness  dict   optional; {'metric': 'top1', 'severities': [0, 1, 2, 3, 4, 5] (0 is clean), 'num_images': 2000,
                       'models': {name: {'noise': [one number a severity], 'blur': […], …}}}
    card        dict   what only a person can say, all optional: 'licence' (SPDX, default apache-2.0), 'limits' (list of
                       sentences), 'datasets' (Hub ids), 'description', 'robustness_plot' (file name in the folder),
                       'use' (Python code, instead of a classifier's), 'pictures' (list of [file name, caption])
    num_params  int    parameters of the model (written here)
    sha256      str    of model.safetensors (written here)
    size        int    of model.safetensors in bytes (written here)

All figures are those of the stored weights: save with `metrics={}`, load the folder, measure, save again. A folder
without `metrics` is one that was not measured; its card claims nothing.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path, sha256
from vishub.hub.card import model_card
from vishub.hub.find import WEIGHTS_FILE

__all__ = ['annotate', 'catalog_row', 'save_folder']

# What figures need beside them to mean anything, and the type of each.
_CONTEXT = {'data': str, 'split': str, 'num_test': int}
# Where weights came from says nothing about these ones, and drop rates belong to training.
_SOURCE_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture', 'custom_load')
_DROP_RATES = ('drop_rate', 'attn_drop_rate', 'proj_drop_rate', 'drop_path_rate', 'pretrained_model_args')


def save_folder(
        model: nn.Module,
        folder: Union[str, Path],
        *,
        metrics: Mapping[str, Any],
        card: Mapping[str, Any],
        dtype: torch.dtype = torch.float16,
        model_args: Optional[Mapping[str, Any]] = None,
        pretrained_cfg: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write `model.safetensors`, `config.json`, `metrics.json` and `README.md` to `folder`.

    The folder is first written elsewhere and loaded back with `timm.create_model('local-dir:…', pretrained=True)`;
    only if that gives the same tensors does it take its place. Other files in an existing folder stay.

    Args:
        model: A model with timm's `pretrained_cfg` and `num_classes`.
        folder: Where to; its name is the name of the weights, `<arch>.<tag>`.
        metrics: As described at the top of this file, without what is written here.
        card: The entry `card` of metrics.json.
        dtype: Type in which floating-point tensors are stored.
        model_args: Constructor arguments besides those that `create_model` was given.
        pretrained_cfg: Entries to change in the model's, e.g. input_size, mean, std, label_names.

    Returns:
        The folder.

    Raises:
        InputError: If `metrics` has figures but not what they were measured on, a tensor is not finite in `dtype`, or
            timm cannot rebuild the model.
    """
    folder = Path(folder)
    _check_metrics(metrics)
    tensors = _tensors(model, dtype)
    config = _config(model, folder.name, card, model_args or {}, pretrained_cfg or {})

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}-'))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={'format': 'pt'})
        metrics = {
            **metrics,
            'card': dict(card),
            'num_params': sum(p.numel() for p in model.parameters()),
            'sha256': sha256(temporary / WEIGHTS_FILE),
            'size': (temporary / WEIGHTS_FILE).stat().st_size,
        }
        _write_json(temporary / 'config.json', config)
        # safetensors makes its file private; it gets the rights of any other
        (temporary / WEIGHTS_FILE).chmod((temporary / 'config.json').stat().st_mode)
        _write_json(temporary / 'metrics.json', metrics)
        (temporary / 'README.md').write_text(model_card(folder.name, config, metrics), encoding='utf-8')
        _check_rebuilds(temporary, tensors)
        folder.mkdir(exist_ok=True)
        # Until metrics.json, the last, is in place, a broken off replacement is noticed: its checksum is the old one.
        for name in (WEIGHTS_FILE, 'config.json', 'README.md', 'metrics.json'):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)
    return folder


def annotate(folder: Union[str, Path], **facts: Any) -> None:
    """Add facts to a saved folder's metrics.json, e.g. `peers`, `robustness` or `card`, and write its card anew.

    Raises:
        InputError: If a fact is one of the file itself (`sha256`, `size`, `num_params`).
    """
    folder = Path(folder)
    fixed = {'sha256', 'size', 'num_params'} & set(facts)
    if fixed:
        raise InputError(f'{", ".join(sorted(fixed))} belong to the stored weights: use save_folder')
    config, metrics = (_read_json(folder / name) for name in ('config.json', 'metrics.json'))
    metrics.update(facts)
    _check_metrics(metrics)
    with atomic_path(folder / 'metrics.json') as path:
        _write_json(path, metrics)
    with atomic_path(folder / 'README.md') as path:
        path.write_text(model_card(folder.name, config, metrics), encoding='utf-8')


def catalog_row(folder: Union[str, Path]) -> str:
    """The row of `vishub/catalog.py` for a saved folder, as source text to paste into `_WEIGHTS`.

    Raises:
        InputError: If the folder was saved without figures.
    """
    folder = Path(folder)
    config, metrics = (_read_json(folder / name) for name in ('config.json', 'metrics.json'))
    if not metrics.get('metrics'):
        raise InputError(f'{folder} has no measured figures, so it has no row in the catalogue')
    metric, value = next(iter(metrics['metrics'].items()))
    fields = {
        'name': folder.name,
        'data': metrics['data'],
        'metric': metric,
        'value': value,
        'sha256': metrics['sha256'],
        'size': metrics['size'],
        'licence': config['pretrained_cfg']['license'],
    }
    lines = [f'        {key}={value!r},\n' for key, value in fields.items()]
    return f'    Weight(\n{"".join(lines)}    ),\n'


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    if not metrics.get('metrics'):
        return
    for key, kind in _CONTEXT.items():
        if not isinstance(metrics.get(key), kind):
            raise InputError(f"figures need metrics['{key}'] as a {kind.__name__}, not {metrics.get(key)!r}")


def _tensors(model: nn.Module, dtype: torch.dtype) -> Dict[str, torch.Tensor]:
    """The state dict on the CPU, floats as `dtype`, every tensor with memory of its own (as safetensors wants)."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to('cpu', dtype if tensor.is_floating_point() else tensor.dtype)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"'{name}' has values that are not finite as {dtype}; save it with dtype=torch.float32")
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def _config(
        model: nn.Module,
        name: str,
        card: Mapping[str, Any],
        model_args: Mapping[str, Any],
        changes: Mapping[str, Any],
) -> Dict[str, Any]:
    """timm's Hub layout of config.json."""
    source: Any = model.pretrained_cfg
    cfg = {key: value for key, value in source.items() if key not in _SOURCE_KEYS and value is not None}
    for key in ('pool_size', 'first_conv', 'classifier'):  # None means something here
        cfg.setdefault(key, source.get(key))
    if model.num_classes != source.get('num_classes'):
        for key in ('label_names', 'label_descriptions', 'label_offset'):  # those were of other classes
            cfg.pop(key, None)
    cfg.update(changes)
    cfg.update(
        num_classes=model.num_classes,
        tag=name.partition('.')[2] or None,
        license=card.get('licence', 'apache-2.0'),
    )
    noted = {key: value for key, value in getattr(model, '_model_args', {}).items() if key not in _DROP_RATES}
    arguments = {**noted, **model_args}
    arguments.pop('num_classes', None)  # said at the root; transformers refuses a model that says it twice
    config = {
        'architecture': source['architecture'],
        'num_classes': model.num_classes,
        'num_features': model.num_features,
        'model_args': arguments,
        'pretrained_cfg': cfg,
    }
    label_names = cfg.pop('label_names', None)
    if label_names:
        if len(label_names) != model.num_classes:
            raise InputError(f'{len(label_names)} label names for {model.num_classes} classes')
        config['label_names'] = list(label_names)  # at the root, where timm looks for it
    return config


def _check_rebuilds(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    except Exception as error:  # whatever timm or torch says, the folder would be useless
        raise InputError(
            f'timm cannot rebuild this model from its config.json: {error}. '
            'If its constructor needs more arguments, give them as model_args.'
        ) from error
    for name, tensor in tensors.items():
        if not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
            raise InputError(f"'{name}' does not come back as it was saved")


def _read_json(path: Path) -> Dict[str, Any]:
    return json.loads(path.read_text(encoding='utf-8'))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f'{path.name} cannot be written as JSON: {error}') from error
    path.write_text(text + '\n', encoding='utf-8')
