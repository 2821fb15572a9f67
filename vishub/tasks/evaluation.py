"""What the `evaluate` of every task shares: opening models by name, and a place for figures: a file, and the card."""
import json
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union

from torch import nn

from vishub.errors import InputError
from vishub.files import atomic_path
from vishub.hub import annotate, verify
from vishub.hub.find import WEIGHTS_FILE, weights_folder
from vishub.tasks.base import Pipeline

__all__ = ['budget', 'card_for', 'into_card', 'open_models', 'recorded', 'write_report']

AnyPipeline = TypeVar('AnyPipeline', bound=Pipeline)


def open_models(
        pipeline: Type[AnyPipeline],
        models: Sequence[Union[str, nn.Module]],
        device: Optional[str] = None,
) -> Tuple[Dict[str, AnyPipeline], Dict[str, Dict[str, Any]]]:
    """Open the models of a comparison.

    Args:
        pipeline: Class of the task's pipeline.
        models: Names that it takes, folders of weights, or modules.
        device: As of the pipeline.

    Returns:
        The pipelines by the names that tables give them (a folder has its own name), in the order of `models`, and
        what is recorded of each, see `recorded`.

    Raises:
        InputError: If two have one name; or as the pipeline says.
    """
    pipes: Dict[str, AnyPipeline] = {}
    known: Dict[str, Dict[str, Any]] = {}
    for model in models:
        folder = weights_folder(model) if isinstance(model, str) else None
        pipe = pipeline(f'local-dir:{folder}' if folder else model, device)
        name = folder.resolve().name if folder else pipe.name
        if name in pipes:
            raise InputError(f"two models are called '{name}': rename the folder of one")
        pipes[name], known[name] = pipe, recorded(folder)
    return pipes, known


def budget(known: Mapping[str, Any]) -> Dict[str, Any]:
    """Time and epochs of a training, as far as they are recorded."""
    training = known.get('training', {})
    return {key: training[key] for key in ('wall_s', 'epochs') if key in training}


def recorded(folder: Union[str, os.PathLike, None]) -> Dict[str, Any]:
    """A weights folder's metrics.json, empty if there is none."""
    file = None if folder is None else Path(folder) / 'metrics.json'
    return json.loads(file.read_text(encoding='utf-8')) if file is not None and file.is_file() else {}


def write_report(report: Mapping[str, Any], folder: Union[str, os.PathLike]) -> Path:
    """Write evaluation.json, whole or not at all."""
    file = Path(folder) / 'evaluation.json'
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    return file


def card_for(folder: Union[str, os.PathLike], report: Mapping[str, Any]) -> Dict[str, Any]:
    """What a weights folder records, when these figures may go into it.

    Raises:
        InputError: If nothing is recorded, or the figures are of other data than the weights.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    known = recorded(folder)
    if 'sha256' not in known:
        raise InputError(f"'{folder}' has no metrics.json with the checksum of its weights: save it with save_folder")
    verify(Path(folder) / WEIGHTS_FILE, known['sha256'])
    if known.get('data', report['data']) != report['data']:
        raise InputError(f"'{folder}' was trained on {known['data']}; figures on {report['data']} belong elsewhere")
    return known


def into_card(
        folder: Union[str, os.PathLike], report: Mapping[str, Any], card: Optional[Mapping[str, Any]] = None) -> None:
    """Write figures into a weights folder's metrics.json and README.md; its weights stay as they are.

    Args:
        folder: Of the weights.
        report: Of a task's `evaluate`; without peers or robustness, what is there of them stays.
        card: Further facts for the card.

    Raises:
        InputError, WeightsNotFoundError: As `card_for`.
    """
    card_for(folder, report)
    facts = {key: report[key] for key in ('data', 'split', 'num_test', 'metrics', 'report')}
    facts.update({key: report[key] for key in ('peers', 'robustness') if report.get(key)})
    if card is not None:
        facts['card'] = dict(card)
    annotate(Path(folder), **facts)
