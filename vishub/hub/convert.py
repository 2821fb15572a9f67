"""Official checkpoints, as the papers' own code writes them, become folders of weights that timm loads.

This is the only place of the hub that reads pickle, and it reads it as data (`weights_only=True`): a file that wants to
run code is refused before it does. Names are translated by each family's `checkpoint_filter_fn`; which variant a file
holds follows from the shapes alone.
"""
import argparse
import importlib
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from safetensors.torch import load_file

from vishub import catalog
from vishub.errors import InputError
from vishub.files import sha256
from vishub.hub.find import WEIGHTS_FILE
from vishub.hub.folder import save_folder
from vishub.models.nvit import check_dims, official_dims

__all__ = ['Converted', 'convert', 'read_checkpoint', 'state_dict_of']

Tensors = Dict[str, torch.Tensor]

# Where trainers keep the weights. Averaged ones first: they are what a paper's figures were measured on.
_ENTRIES = (
    'model_ema', 'state_dict_ema', 'ema', 'ema_state_dict', 'params_ema', 'model', 'state_dict', 'model_state_dict',
    'params', 'module', 'net')
# What wrappers (distributed training, torch.compile, Lightning, a continual learner) put before every name.
_PREFIXES = ('module.', '_orig_mod.', 'model.', 'ema_model.', 'net.')


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Attributes:
        folder: The folder of weights.
        architecture: Name of the model that the checkpoint turned out to hold.
        num_classes: Classes of its head; 0 for a backbone without one, and for a model that knows no classes.
        entry: Which entry of the file was taken, e.g. `model_ema`; empty for a bare state dict.
        licence: SPDX identifier of the official weights' licence; `unknown` where the authors state none.
    """
    folder: Path
    architecture: str
    num_classes: int
    entry: str
    licence: str


@dataclass(frozen=True)
class _Layout:
    """A family's official layout: names that every file of it has and no other family's, its classifier's names
    (official, ours; none where the arguments tell the classes), and the sizes that only the file knows."""
    licence: str
    mark: str
    classifiers: Tuple[str, ...]
    arguments: Callable[[str, Mapping[str, Any], Tensors], Dict[str, Any]]


def convert(name: str, checkpoint: Union[str, Path], output: Union[str, Path]) -> Converted:
    """Convert an official checkpoint to a folder that `timm.create_model('local-dir:…', pretrained=True)` loads.

    The number of classes is that of the file's head, the image size that of its position tables; what a file does not
    tell (attention heads, frames) is the model's default. Tensors are stored in the type they have in the file.

    Args:
        name: A family (`favit`, or the beginning of its models' names, `revit`): the shapes say which variant it is,
            where they can. Or a model (`favit_b2`): the file must be of that one.
        checkpoint: The official file, `.pth`, `.pt` or any other pickle of torch.save, or `.safetensors`.
        output: Folder to write, by convention `<arch>.<tag>`. It may exist, but not hold weights.

    Raises:
        UnknownNameError: If there is no such family or model.
        InputError: If the family has no official layout, the file cannot be read as data, holds another model (the
            message names it), fits several or none of ours, or the folder cannot be written. Nothing is written then.
    """
    _candidates(name)  # a wrong name is told before a large file is read
    output = Path(output)
    if (output / WEIGHTS_FILE).exists() or (output.exists() and not output.is_dir()):
        raise InputError(f"'{output}' already holds weights or is a file: give a new folder")
    file = Path(checkpoint)
    content = read_checkpoint(file)
    tensors, entry = state_dict_of(content, str(file))

    row, arguments = _best_fit(name, file, content, tensors)
    model = timm.create_model(row.name, **arguments)
    model.load_state_dict({**_untold(model, tensors), **_filtered(row, tensors, model)})
    layout = _LAYOUTS[row.family]
    source = {'file': file.name, 'sha256': sha256(file), **({'entry': entry} if entry else {})}
    card = {
        'licence': layout.licence,
        'description': f'`{row.name}`, converted by `vishub convert` from the official checkpoint `{file.name}`.',
        'limits': ['Its figures are those that its authors published; they were not measured again here.'],
    }
    size = list(row.input)
    for place, key in ((0, 'in_chans'), (slice(1, 3), 'img_size'), (2, 'in_features')):
        if key in arguments:
            size[place] = 2 * [arguments[key]] if key == 'img_size' else arguments[key]  # type: ignore[index,assignment]
    try:
        save_folder(
            model, output, metrics={'converted_from': source}, card=card, dtype=_float_type(tensors),
            pretrained_cfg={'input_size': tuple(size)})
    except OSError as error:
        raise InputError(f"'{output}' cannot be written ({error.strerror or error}): give another folder") from error
    return Converted(output, row.name, arguments.get('num_classes', 0), entry, layout.licence)


def read_checkpoint(file: Union[str, Path]) -> Dict[str, Any]:
    """Read a checkpoint as data: dictionaries, numbers, strings and tensors (on the CPU).

    Of a pickle's classes only those of torch's own allow-list are built, and `argparse.Namespace`, in which official
    trainers keep their options.

    Raises:
        InputError: If the file is missing, damaged, no checkpoint, or asks for any other class or function.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"'{file}' is not a file: give the official checkpoint, .pth, .pt or .safetensors")
    try:
        if file.suffix == '.safetensors':
            content: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # the error below says it
                content = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything at all
        asked = re.search(r'(?:GLOBAL|global:?) `?([\w.]+)`?', str(error))
        if asked and 'weights_only' in str(error):
            raise InputError(
                f"'{file}' is refused: to read it, {asked[1]} would have to run, and only tensors, numbers and names "
                'are read; ask for a file that holds a plain state dict'
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"'{file}' is no checkpoint, or is damaged or incomplete ({reason}): get it again from where it came"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"'{file}' holds a {type(content).__name__}: give a file with a state dict")
    return content


def state_dict_of(content: Mapping[str, Any], name: str = 'the checkpoint') -> Tuple[Tensors, str]:
    """The weights in a trainer's dictionary, under their official names.

    Args:
        content: A bare state dict, or one below `model_ema`, `model`, `state_dict`, `module` and the like, at any
            depth; averaged weights are preferred. Prefixes of wrappers (`module.`) are taken off; of a detector
            (`backbone.`) only the backbone is taken.
        name: For messages.

    Returns:
        The tensors, and the entries that led to them, joined by dots (empty for a bare state dict).

    Raises:
        InputError: If there are none, or some are no ordinary tensors.
    """
    path: List[str] = []
    while not any(isinstance(value, torch.Tensor) for value in content.values()):
        entry = next((key for key in _ENTRIES if isinstance(content.get(key), Mapping) and content[key]), None)
        if entry is None:
            found = ', '.join(map(str, list(content)[:5])) or 'nothing'
            raise InputError(f"'{name}' has no state dict ({found} in it): expected model, state_dict, ema or module")
        path.append(entry)
        content = content[entry]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
            raise InputError(f"'{name}': {key} is not an ordinary tensor (sparse, quantised or without values)")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), ''):
        tensors = {key[len(prefix):]: value for key, value in tensors.items()}
    if not any(re.search(_LAYOUTS['astr'].mark, key) for key in tensors):  # of which the backbone is a part
        backbone = {key[9:]: value for key, value in tensors.items() if key.startswith('backbone.')}
        tensors = backbone or tensors
    return tensors, '.'.join(path)


def _candidates(name: str) -> Sequence[catalog.Architecture]:
    """The architectures that a family, the beginning of a name, or a model stands for."""
    wanted = name.removeprefix('vishub/')
    rows = [row for row in catalog.architectures() if wanted in (row.family, row.name)]
    if wanted in {family.name for family in catalog.families()}:
        rows = [row for row in rows if row.family == wanted]
    rows = rows or [row for row in catalog.architectures() if row.name.startswith(f'{wanted}_')]
    family = rows[0].family if rows else next((f.name for f in catalog.families() if f.name == wanted), None)
    if family is None:
        names = [row.name for row in catalog.architectures()] + [family.name for family in catalog.families()]
        raise catalog.unknown('family or model', name, names)
    if family not in _LAYOUTS:
        raise InputError(
            f"'{name}' has no official checkpoints that could be converted ({catalog.family(family).notes.rstrip('.')})"
            f'; there are layouts for {", ".join(_LAYOUTS)}')
    return _convertible(rows)


def _best_fit(
        name: str,
        file: Path,
        content: Mapping[str, Any],
        tensors: Tensors,
) -> Tuple[catalog.Architecture, Dict[str, Any]]:
    """The architecture that `name` stands for and that the checkpoint fits, and its constructor arguments.

    Raises:
        InputError: If none fits, or several alike.
    """
    best, faults = _fitting(_candidates(name), content, tensors)
    if not best:
        raise _mismatch(name, file, content, tensors, faults)
    if len(best) > 1:
        names = [row.name for row, _ in best]
        raise InputError(
            f"'{file}' fits {' and '.join(names)}, whose weights have the same names and sizes: "
            f'name the one that it was trained as, as in vishub convert {names[0]}')
    return best[0]


def _fitting(
        rows: Sequence[catalog.Architecture],
        content: Mapping[str, Any],
        tensors: Tensors,
) -> Tuple[List[Tuple[catalog.Architecture, Dict[str, Any]]], Dict[str, str]]:
    """The architectures that the checkpoint fits best, with constructor arguments; and why it does not fit others.

    What fits as it is registered goes before what needs another image size, and that before a model of any sizes.
    """
    faults: Dict[str, str] = {}
    fits: Dict[int, List[Tuple[catalog.Architecture, Dict[str, Any]]]] = {0: [], 1: [], 2: []}
    for row in rows:
        arguments, fault = _fit(row, content, tensors)
        if fault is None:
            fits[2 if row.name in _ANY_SIZES else int('img_size' in arguments)].append((row, arguments))
        else:
            faults[row.name] = fault
    return next(filter(None, fits.values()), []), faults


def _convertible(rows: Sequence[catalog.Architecture]) -> Sequence[catalog.Architecture]:
    """Those with an official layout."""
    return [row for row in rows if row.family in _LAYOUTS and row.name not in _OURS]


def _fit(
        row: catalog.Architecture,
        content: Mapping[str, Any],
        tensors: Tensors,
) -> Tuple[Dict[str, Any], Optional[str]]:
    """Constructor arguments with which the checkpoint fits this architecture, and None; or else why it does not."""
    layout = _LAYOUTS[row.family]
    if not any(re.search(layout.mark, key) for key in tensors):
        return {}, f'no name in it is one of {row.family}'
    arguments: Dict[str, Any] = {}
    if layout.classifiers:
        classifier = next((tensors[key] for key in layout.classifiers if key in tensors), None)
        arguments['num_classes'] = 0 if classifier is None else classifier.shape[0]
    try:
        arguments.update(layout.arguments(row.name, content, tensors))
        with torch.device('meta'):  # shapes only
            model = timm.create_model(row.name, **arguments)
        converted = _filtered(row, tensors, model)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:  # foreign names, impossible sizes
        return arguments, f'{error}'
    own = model.state_dict()
    converted = {**_untold(model, tensors), **converted}
    for key in own:
        if key not in converted:
            return arguments, f'{key} is missing'
        if own[key].shape != converted[key].shape:
            return arguments, f'{key} is {tuple(converted[key].shape)}, not {tuple(own[key].shape)}'
    unknown = next((key for key in converted if key not in own), None)
    return arguments, None if unknown is None else f'{unknown} is not in the model'


def _filtered(row: catalog.Architecture, tensors: Tensors, model: torch.nn.Module) -> Tensors:
    return importlib.import_module(f'vishub.models.{row.family}').checkpoint_filter_fn(dict(tensors), model)


def _untold(model: torch.nn.Module, tensors: Tensors) -> Tensors:
    """What a complete official file may leave out: counters, and the norm before a classifier that it lacks."""
    headless = not any(key.startswith(('head.', 'norm_head.')) for key in tensors)
    return {
        key: value for key, value in model.state_dict().items()
        if key.endswith('.num_batches_tracked') or (headless and key.startswith('head.norm.'))
    }


def _mismatch(
        name: str,
        file: Path,
        content: Mapping[str, Any],
        tensors: Tensors,
        faults: Mapping[str, str],
) -> InputError:
    """The error for a file that is none of the models asked for; it names the one that it is, if it is ours."""
    others = [row for row in _convertible(catalog.architectures()) if row.name not in faults]
    best, _ = _fitting(others, content, tensors)
    if best:
        right = best[0][0].name
        holds = ' or '.join(row.name for row, _ in best)
        return InputError(f"'{file}' holds {holds}, not {name}: run vishub convert {right}")
    reasons = {fault: f'{model}: {fault}' for model, fault in faults.items()}  # each said once
    why = '; '.join(list(reasons.values())[:3])
    return InputError(f"'{file}' holds no {name} nor another model of ours ({why})")


def _float_type(tensors: Tensors) -> torch.dtype:
    """The type to store: the file's own where that is a half one throughout, else float32."""
    types = {value.dtype for value in tensors.values() if value.is_floating_point()}
    return next(iter(types)) if types in ({torch.float16}, {torch.bfloat16}) else torch.float32


def _favit_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    stem = tensors.get('patch_embed1.proj.weight', tensors.get('patch_embed.proj.weight'))
    return {} if stem is None or stem.shape[1] == 3 else {'in_chans': stem.shape[1]}


def _fcaformer_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    # (heads, h * w) of stage 3, at reduction 16. The dense form has tables of its windows instead.
    table = tensors.get('layer_2.blocks.0.attention_biases', tensors.get('stages.2.blocks.0.attn.rel_bias'))
    if table is None or '_dense_' in architecture:
        return {}
    return _img_size(architecture, 16 * math.isqrt(table.shape[-1]))


def _nvit_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    # (1, 2 + h * w, E): class and distillation token, then patches of 16 pixels.
    arguments = _img_size(architecture, 16 * math.isqrt(tensors['pos_embed'].shape[1] - 2))
    if architecture.startswith('revit_'):
        # Its sizes follow from a rule; a file that states others is pruned, even where the products agree.
        with torch.device('meta'):
            ruled = timm.create_model(architecture).dims
        if 'dim' in content and official_dims(content) != ruled:
            raise ValueError("the file's own sizes ('dim') are not those of ReViT")
        return arguments
    query = tensors.get('blocks.0.attn.qkv.Q.weight')
    if 'dim' in content:
        arguments['dims'] = official_dims(content)
    elif query is not None and query.ndim == 3:
        arguments['dims'] = _prunable_dims(tensors)
    elif query is not None:
        official_dims(content)  # raises: the dense layout does not tell heads
    return arguments


def _dit_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    patches = tensors.get('x_embedder.proj.weight', tensors.get('patch_embed.proj.weight'))  # D, C, p, p
    labels = tensors.get('y_embedder.embedding_table.weight', tensors.get('label_embed.embedding_table.weight'))
    output = tensors.get('final_layer.linear.bias', tensors.get('final.linear.bias'))  # p * p * C or twice as many
    if patches is None or output is None:
        raise ValueError('the layers of input and output are missing')
    channels, side = patches.shape[1], patches.shape[-1]
    expected = catalog.find(architecture).input[0]  # type: ignore[union-attr]
    arguments: Dict[str, Any] = {} if channels == expected else {'in_chans': channels}
    if len(output) == side * side * channels:
        arguments['learn_sigma'] = False
    # the last row of the table means 'no label'
    arguments['num_classes'] = 0 if labels is None else len(labels) - 1
    return {**arguments, **_img_size(architecture, side * math.isqrt(tensors['pos_embed'].shape[1]))}


def _predformer_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    # what the official code trains as FacST reads its tokens in another order than the paper says
    official = 'to_patch_embedding.1.weight' in tensors
    return {'legacy_token_order': True} if official and '_fac_st_' in architecture else {}


def _astr_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    lags = {match[2] for key in tensors if (match := re.match(r'(pool|context\.lags)\.(\d+)\.', key))}
    return {} if len(lags) == 2 else {'clip_size': len(lags) + 1}


def _no_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    return {}


def _conslide_arguments(architecture: str, content: Mapping[str, Any], tensors: Tensors) -> Dict[str, Any]:
    embedding = tensors.get('fc1.0.weight', tensors.get('patch_embed.weight'))  # dim, in_features
    depth = len({key.split('.')[1] for key in tensors if key.startswith('blocks.')})
    arguments: Dict[str, Any] = {} if depth == 2 else {'depth': depth}
    if embedding is not None and embedding.shape[1] != catalog.find(architecture).input[-1]:  # type: ignore[union-attr]
        arguments['in_features'] = embedding.shape[1]
    return arguments


def _prunable_dims(tensors: Tensors) -> Dict[str, Any]:
    """`dims` of the official prunable layout, whose layers are (channel, E, head)."""
    depth = sum(key.endswith('.attn.qkv.Q.weight') for key in tensors)
    query, value = ([tensors[f'blocks.{i}.attn.qkv.{kind}.weight'] for i in range(depth)] for kind in 'QV')
    return check_dims(dict(
        EMB=query[0].shape[1], head=[q.shape[2] for q in query], QK=[q.shape[0] for q in query],
        V=[v.shape[0] for v in value], MLP=[tensors[f'blocks.{i}.mlp.fc1.weight'].shape[0] for i in range(depth)]))


def _img_size(architecture: str, side: int) -> Dict[str, Any]:
    return {} if side == catalog.find(architecture).input[-1] else {'img_size': side}  # type: ignore[union-attr]


# The one layout of each family that its authors released weights in, or that their code trains. FMViT and our small
# ViTs have none, and that of LiT was not seen.
_LAYOUTS = {
    'favit': _Layout('unknown', r'\.attn\.(kv_g|global_kv)\.', ('head.weight',), _favit_arguments),
    'fcaformer': _Layout(
        'unknown', r'\.(attention_biases|attn\.rel_bias)$', ('head.weight', 'head.fc.weight'), _fcaformer_arguments),
    'nvit': _Layout('cc-by-nc-sa-4.0', r'^blocks\.0\.attn\.qkv\.', ('head.weight',), _nvit_arguments),
    'dit': _Layout('cc-by-nc-4.0', r'^blocks\.0\.(adaLN_modulation|adaln)\.', (), _dit_arguments),
    'predformer': _Layout('unknown', r'^(to_patch_embedding\.1|layers\.0\.units)\.', (), _predformer_arguments),
    'deeprftv2': _Layout('unknown', r'^(global_model|columns\.0)\.', (), _no_arguments),
    'astr': _Layout(
        'unknown', r'^fusion\.(linear|level)2\.', ('segmentation_head.0.weight', 'head.weight'), _astr_arguments),
    'conslide': _Layout(
        'unknown', r'^blocks\.0\.(inner|patch)_attn\.qk\.', ('head.weight',), _conslide_arguments),
}
# Models of these families that only this project knows: sizes come with their own folders.
_OURS = ('nvit',)
_ANY_SIZES = ('nvit_distilled_patch16_224',)  # so it fits files of the others, too
