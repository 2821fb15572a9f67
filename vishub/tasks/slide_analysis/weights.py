"""From a finished sequence to a folder of weights with its card, and from several folds to their mean."""
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from safetensors.torch import load_file

from vishub.files import atomic_path
from vishub.hub import save_folder
from vishub.tasks.base import pretrained_cfg_of
from vishub.tasks.classification.training import describe_hardware
from vishub.tasks.slide_analysis.data import EncodedTask
from vishub.tasks.slide_analysis.metrics import evaluate, plot_tasks, sequence_figures
from vishub.tasks.slide_analysis.pipeline import NOTICE
from vishub.tasks.slide_analysis.setting import SlideSetting
from vishub.tasks.slide_analysis.training import SequenceOptions, create_network
from vishub.training.config import TrainConfig

__all__ = ['store_weights', 'summarise_folds']


def store_weights(
        sequence: Mapping[str, Any],
        output: Path,
        setting: SlideSetting,
        tasks: Sequence[EncodedTask],
        options: SequenceOptions,
        config: TrainConfig,
        *,
        tag: str,
        data: str,
        command: str = '',
        peers: Sequence[str] = (),
) -> Path:
    """Store the last weights of a sequence as fp16, load what was stored, measure that, and store the figures too.

    Args:
        sequence: What `train_tasks` gave.
        output: Folder in which `<architecture>.<tag>/` is made.
        setting: Tasks, encoder and tiling, for the pipeline.
        tasks: All tasks of the sequence, encoded, for their test slides.
        options, config: Of the training, for the card.
        tag, data, command: Tag of the weights, name of the data, command line.
        peers: Folders of other weights on the same data, for the card's table.

    Returns:
        The folder.
    """
    model = create_network(options, len(setting.classes))
    model.load_state_dict(load_file(Path(sequence['last']) / 'weights.safetensors'))
    architecture = options.model.split('/')[-1].split('.')[0]
    folder = output / f'{architecture}.{tag}'
    cfg = dict(pretrained_cfg_of(model))
    grid = setting.tiling.grid
    cfg.update(
        architecture=architecture, tag=tag, input_size=(grid, grid, model.in_features), num_classes=model.num_classes,
        label_names=tuple(setting.classes), notes=(setting.note(),), url='', file='', state_dict=None,
        hf_hub_filename=None, hf_hub_id=f'vishub/{architecture}.{tag}', license='apache-2.0')
    model.pretrained_cfg = model.default_cfg = cfg
    figures = sequence_figures(sequence)
    card = _card(folder.name, setting, data)
    metrics: Dict[str, Any] = {
        'data': data,
        'report': {'sequence': figures},
        'training': {
            'command': command, 'seed': config.seed, 'epochs': config.epochs,
            'wall_s': round(sequence['seconds'], 1),
            'samples': sum(len(task.train) for task in tasks),
            'hardware': describe_hardware(next(model.parameters()).device),
            'recipe': {
                'method': options.method, **asdict(options.strategy), 'warmup_epochs': options.warmup_epochs,
                'warmup_weight': options.warmup_weight, 'sim_weight': options.sim_weight, 'opt': config.opt,
                'lr': config.lr, 'grad_accum': config.grad_accum},
            'note': 'Epochs are those of each task; those of the first come behind '
                    f'{options.warmup_epochs} with the similarity loss alone.',
        },
    }
    arguments = dict(options.model_args)
    save_folder(model, folder, metrics=metrics, card=card, model_args=arguments)
    report = evaluate([str(folder), *peers], tasks, device='cpu')
    plot_tasks(report, folder / 'tasks.png')
    card['pictures'] = [['tasks.png', 'accuracy after each task']]
    metrics.update({key: report[key] for key in ('split', 'num_test', 'metrics', 'report', 'peers')})
    return save_folder(model, folder, metrics=metrics, card=card, model_args=arguments)


def _card(name: str, setting: SlideSetting, data: str) -> Dict[str, Any]:
    """What the model card says besides figures."""
    tiling = setting.tiling
    tasks = '; '.join(f'{task}: {", ".join(classes)}' for task, classes in setting.tasks.items())
    return {
        'description':
            f'**{NOTICE}**\n\n`{name.partition(".")[0]}` says of a whole-slide image which of {len(setting.classes)} '
            f'classes it has, and where that shows. Trained on {data}, task after task ({tasks}). Slides are cut into '
            f'regions of {tiling.grid} x {tiling.grid} patches of {tiling.patch_size} pixels at {tiling.mpp:g} '
            f'micrometres; the frozen encoder is `{setting.encoder}`'
            + (', which is made from its seed and needs no weights' if (setting.encoder or '').startswith(
                'texture_bank') else '') + '. Accuracies are class-incremental unless called masked: the class is '
            'sought among those of all tasks. AUCs of regions, patches and gradients say how well the heat finds '
            'annotated lesions.',
        'use':
            'import vishub\n\n'
            f"pipe = vishub.pipeline('slide_analysis', '{name}')\n"
            "result = pipe('slide.svs')\n"
            'print(result.predicted, result.by_task)\n'
            "result.save('slide.overlay.png')\n"
            "result.save('slide.geojson')  # opens in QuPath\n",
        'limits': [
            NOTICE,
            f'It knows the {len(setting.classes)} classes of its training data and calls every slide one of them.',
            'The heat shows what the network looked at, not where a disease is.',
        ],
    }


def summarise_folds(sequences: Sequence[Mapping[str, Any]], path: Path) -> Dict[str, Any]:
    """Mean and standard deviation over folds of the figures at the last task and of their mean over the tasks.

    Args:
        sequences: What `train_tasks` gave, one a fold.
        path: JSON file to write.

    Returns:
        Name -> {`mean`, `sd` (None for one fold), `folds`}: `acc` and `masked` at the last task (per cent), `acc_mean`
        and `masked_mean` over the sequence, `bwt`, `forgetting`, `fwt` where there are two tasks or more.
    """
    rows: List[Dict[str, Optional[float]]] = []
    for sequence in sequences:
        figures = sequence_figures(sequence)
        row: Dict[str, Optional[float]] = {
            key: value for key, value in figures.items() if isinstance(value, (int, float))}
        for protocol in ('acc', 'masked'):
            seen = [
                float(np.mean(scores[:entry['tasks']])) for scores, entry in zip(figures[protocol], sequence['scores'])]
            row[protocol], row[f'{protocol}_mean'] = seen[-1], float(np.mean(seen))
        rows.append(row)
    summary = {}
    for name in rows[0]:
        values = [float(row[name]) for row in rows if row.get(name) is not None]  # type: ignore[arg-type]
        summary[name] = {
            'mean': round(float(np.mean(values)), 3),
            'sd': round(float(np.std(values, ddof=1)), 3) if len(values) > 1 else None,
            'folds': [round(value, 3) for value in values]}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + '\n', encoding='utf-8')
    return summary
