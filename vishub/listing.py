"""What `vishub list`, `vishub info` and README's model table show: the catalogue, with counts and figures added."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

from vishub import catalog
from vishub.hub.find import weights_folders

__all__ = ['figure', 'markdown_table', 'model_info', 'model_rows', 'peers_table', 'weights_table']


def model_rows(task: Optional[str] = None, pretrained: bool = False) -> List[Dict[str, Any]]:
    """One plain dictionary an architecture: name, task, family, paper, arxiv, input and its weights.

    Args:
        task: Only those for this task.
        pretrained: Only those that have weights.

    Raises:
        vishub.UnknownNameError: If there is no such task.
    """
    rows = []
    for row in catalog.architectures(task):
        weights = catalog.weights(row.name)
        if weights or not pretrained:
            family = catalog.family(row.family)
            rows.append({
                'name': row.name,
                'task': row.task,
                'family': row.family,
                'paper': family.title,
                'arxiv': family.arxiv,
                'input': list(row.input),
                'weights': [_weight(weight) for weight in weights],
            })
    return rows


def model_info(name: str) -> Dict[str, Any]:
    """All that is known of an architecture or of one of its weights, as plain JSON values; counts are made here.

    Args:
        name: `architecture` or `architecture.tag`, with or without `vishub/`.

    Raises:
        vishub.UnknownNameError: If there is none; the message names the nearest three.
    """
    from vishub.models.cost import count_macs, count_parameters, default_input

    found = catalog.find(name)
    if isinstance(found, catalog.Weight):
        architecture, weights = catalog.find(found.architecture), (found,)
    else:
        architecture, weights = found, catalog.weights(found.name)
    family = catalog.family(architecture.family)
    return {
        'name': found.name,
        'task': architecture.task,
        'family': family.name,
        'input': list(default_input(found.name)),
        'num_params': count_parameters(found.name),
        'macs': count_macs(found.name),
        'paper': family.title,
        'arxiv': family.arxiv,
        'repository': family.repository,
        'code_licence': family.code_licence,
        'notes': family.notes,
        'weights': [_weight(weight) for weight in weights],
    }


def markdown_table() -> str:
    """README's model table, one row an architecture."""
    from vishub.models.cost import count_parameters

    lines = ['| Model | Task | Parameters | Paper | Weights |', '| --- | --- | ---: | --- | --- |']
    for row in model_rows():
        weights = ', '.join(
            f'`{weight["name"]}` ({weight["data"]}: {figure(weight)})' for weight in row['weights']
        )
        lines.append(
            f'| `{row["name"]}` | {row["task"].replace("_", " ")} | {count_parameters(row["name"]) / 1e6:.1f} M '
            f'| [{row["family"]}](https://arxiv.org/abs/{row["arxiv"]}) | {weights or "–"} |'
        )
    return '\n'.join(lines) + '\n'


def weights_table() -> str:
    """README's table of the weights in `weights/`: what each was measured on, and its first figure."""
    from vishub.hub.card import metric_title

    lines = [
        '| Weights | Task | Data | Figure (95 % interval) | Input | Epochs |',
        '| --- | --- | --- | --- | --- | ---: |']
    for weight in catalog.weights():
        folder = weights_folders()[weight.name]
        measured = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
        value = f'{weight.value:.2f}{_interval(measured["metrics"], weight.metric)}'
        lines.append(
            f'| [`{weight.name}`](weights/{weight.name}/README.md) '
            f'| {catalog.find(weight.architecture).task.replace("_", " ")} | {weight.data} '
            f'| {metric_title(weight.metric)}: {value} | {_input(folder)} | {measured["training"]["epochs"] or "–"} |')
    return '\n'.join(lines) + '\n'


def peers_table() -> str:
    """README's table of classifiers beside the peers of their cards: same data, same number of epochs."""
    rows: Dict[Any, Dict[str, Any]] = {}  # data, epochs -> name -> its cells
    for name, folder in weights_folders().items():
        measured = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
        peers = measured.get('peers', ())
        if not peers or 'top1' not in measured['metrics']:
            continue
        own = {**measured, 'name': name, 'epochs': measured['training']['epochs']}
        for row in (own, *peers):
            key = measured['data'], row.get('epochs', own['epochs'])
            side = 'x'.join(map(str, row['input_size'])) if 'input_size' in row else _input(folder)
            rows.setdefault(key, {})[row['name'].partition(' with ')[0]] = {
                'input': side, 'num_params': row['num_params'], 'metrics': row['metrics']}
    lines = [
        '| Data | Epochs | Model | Input | Parameters | Top-1 % (95 % interval) |',
        '| --- | ---: | --- | --- | ---: | --- |']
    for (data, epochs), group in sorted(rows.items()):
        if len(group) > 1:
            for name, row in sorted(group.items(), key=lambda item: -item[1]['metrics']['top1']):
                value = f'{row["metrics"]["top1"]:.2f}{_interval(row["metrics"], "top1")}'
                lines.append(
                    f'| {data} | {epochs} | `{name}` | {row["input"]} | {row["num_params"] / 1e6:.2f} M | {value} |')
    return '\n'.join(lines) + '\n'


def _input(folder: Path) -> str:
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    return 'x'.join(map(str, config['pretrained_cfg']['input_size']))


def _interval(figures: Dict[str, Any], metric: str) -> str:
    low, high = figures.get(f'{metric}_ci95', (None, None))
    return '' if low is None else f' ({low:.2f} to {high:.2f})'


def figure(weight: Dict[str, Any]) -> str:
    """The main figure of a weight, to read: `top1 86.10`."""
    return f'{weight["metric"]} {weight["value"]:.2f}'


def _weight(weight: catalog.Weight) -> Dict[str, Any]:
    """A weight's row, where it is, and all figures of its metrics.json where that is on this machine."""
    entry: Dict[str, Any] = {
        'name': weight.name,
        'data': weight.data,
        'metric': weight.metric,
        'value': weight.value,
        'licence': weight.licence,
        'sha256': weight.sha256,
        'size': weight.size,
        'hub_id': weight.hub_id,
        'folder': None,
    }
    folder = weights_folders().get(weight.name)
    if folder is not None:
        measured = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
        entry.update(
            folder=str(folder),
            split=measured.get('split'),
            num_test=measured.get('num_test'),
            metrics=measured['metrics'],
        )
    return entry
