"""The model card of a weights folder: Hub front matter, then facts. Every figure comes from `metrics.json`."""
from typing import Any, Dict, List, Mapping, Optional, Sequence

import timm

from vishub import catalog

__all__ = ['metric_title', 'model_card']

# our task -> the Hub's name for it
_PIPELINE_TAGS = {
    'classification': 'image-classification',
    'generation': 'unconditional-image-generation',
    'deblurring': 'image-to-image',
    'video_prediction': 'other',
    'tracking': 'object-detection',
    'video_segmentation': 'image-segmentation',
    'volume_segmentation': 'image-segmentation',
    'slide_analysis': 'image-classification',
}
# our metric -> the Hub's name for it, where it has one
_METRIC_TYPES = {'top1': 'accuracy'}
# our data set -> its name on the Hub
_HUB_DATASETS = {'CIFAR-10 (JPEG)': 'uoft-cs/cifar10', 'Fashion-MNIST': 'zalando-datasets/fashion_mnist'}
_METRIC_TITLES = {
    'top1': 'Top-1 accuracy (%)', 'top5': 'Top-5 accuracy (%)', 'ece': 'Calibration error (0 to 1)',
    'agreement': 'Class agreement (%)', 'frechet': "Fréchet distance in the judge's features",
    'auc': 'Success AUC (0 to 1)', 'precision': 'Precision (0 to 1)', 'success_rate': 'Success at 0.5 (0 to 1)',
    'normalised_precision': 'Normalised precision at 0.2 (0 to 1)', 'normalised_auc': 'Normalised precision, mean',
    'late_iou': 'Mean overlap, second half', 'fps': 'Frames a second', 'ao': 'GOT-10k AO (0 to 1)',
    'acc': 'Accuracy among all classes (%)', 'masked_acc': 'Accuracy, task given (%)',
    'masked_auc': 'AUC, task given', 'micro_acc': 'Pooled accuracy (%)', 'multi_auc': 'AUC, one class against the rest',
    'region_auc': 'AUC of regions for lesions', 'patch_auc': 'AUC of patches for lesions',
    'grad_auc': 'AUC of gradients for lesions', 'forgetting': 'Forgetting (points)',
    'bwt': 'Backward transfer (points)',
    'fid': 'FID', 'mse': 'MSE', 'mae': 'MAE', 'rmse': 'RMSE', 'ssim': 'SSIM', 'psnr': 'PSNR (dB)',
    'psnr_gain': 'PSNR gain over the blurred picture (dB)', 'lpips': 'LPIPS',
    'dice': 'Dice (0 to 1)', 'hd95': '95 % Hausdorff distance (mm)', 'nsd': 'Normalised surface Dice at 1 mm (0 to 1)',
}


def metric_title(metric: str) -> str:
    """A metric's name to read, with its unit."""
    return _METRIC_TITLES.get(metric, metric)


def model_card(
        name: str,
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        repository: Optional[str] = None,
) -> str:
    """The text of `README.md`.

    Args:
        name: Name of the weights, `<arch>.<tag>`.
        config: The folder's config.json.
        metrics: The folder's metrics.json (layout in `vishub/hub/folder.py`).
        repository: `ORG/NAME[@revision]` on the Hub that the snippet loads from; None for weights that are local.
    """
    card = metrics.get('card', {})
    family = _family(config['architecture'])
    sections = [
        _front_matter(name, family, metrics, card),
        f'# {name}\n',
        _what(family, config, metrics, card),
        _results(metrics),
        _pictures(card),
        _use(name, config, card, repository),
        _training(metrics),
        _peers(name, config, metrics),
        _robustness(metrics, card),
        _limits(config, card),
        _file(metrics),
    ]
    return '\n'.join(section for section in sections if section)


def _family(architecture: str) -> Optional[catalog.Family]:
    """The catalogue's family, or None for a model that is not vishub's (a peer, say)."""
    for row in catalog.architectures():
        if row.name == architecture:
            return catalog.family(row.family)
    return None


def _front_matter(
        name: str,
        family: Optional[catalog.Family],
        metrics: Mapping[str, Any],
        card: Mapping[str, Any],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _PIPELINE_TAGS[family.task if family else 'classification']
    figures = _figures(metrics)
    known = _HUB_DATASETS.get(metrics.get('data', ''))
    datasets = list(card.get('datasets', ())) or ([known] if known else [])
    results = [
        EvalResult(
            task_type=task,
            dataset_type=next(iter(datasets), metrics['data']),
            dataset_name=metrics['data'],
            dataset_split=metrics['split'],
            metric_type=_METRIC_TYPES.get(key, key),
            metric_name=metric_title(key),
            metric_value=value,
        )
        for key, value in figures.items()
    ]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        license=card.get('licence', 'apache-2.0'),
        tags=['timm', 'vishub', task],
        datasets=datasets or None,
        metrics=[_METRIC_TYPES.get(key, key) for key in figures] or None,
        model_name=name,
        eval_results=results or None,
    )
    return f'---\n{data.to_yaml()}\n---\n'


def _what(
        family: Optional[catalog.Family],
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        card: Mapping[str, Any],
) -> str:
    size = 'x'.join(str(n) for n in config['pretrained_cfg']['input_size'])
    data = metrics.get('data') or 'data that is not stated'
    lines = [
        card.get('description') or f'`{config["architecture"]}` trained on {data}.',
        '',
        f'- Architecture: `{config["architecture"]}`, {metrics["num_params"]:,} parameters, input {size}'
        + (f', {config["num_classes"]} classes' if config['num_classes'] else ''),
    ]
    if family:
        repository = family.repository and f'https://github.com/{family.repository}'
        lines += [
            f'- Paper: [{family.title}](https://arxiv.org/abs/{family.arxiv})',
            f'- Official code: {repository or "none"} (licence: {family.code_licence}); '
            'the code here is written anew under Apache-2.0',
            f'- Note: {family.notes}',
        ]
    lines.append(f'- Licence of these weights: {card.get("licence", "apache-2.0")}')
    return '\n'.join(lines) + '\n'


def _results(metrics: Mapping[str, Any]) -> str:
    if not _figures(metrics):
        return '## Results\n\nNot measured.\n'
    rows = []
    for key, value in _figures(metrics).items():
        low_high = metrics['metrics'].get(f'{key}_ci95')
        rows.append([metric_title(key), _number(value), _interval(low_high)])
    return (
        f'## Results\n\nMeasured on the stored weights: {metrics["data"]}, {metrics["split"]}, '
        f'{metrics["num_test"]:,} items.\n\n' + _table(['Metric', 'Value', '95 % interval'], rows)
    )


def _pictures(card: Mapping[str, Any]) -> str:
    return '\n'.join(f'![{caption}]({file})\n' for file, caption in card.get('pictures', ()))


def _use(name: str, config: Mapping[str, Any], card: Mapping[str, Any], repository: Optional[str]) -> str:
    if 'use' in card:
        return f'## Use\n\n```python\n{card["use"]}```\n'
    registered = name in timm.list_models(config['architecture'], include_tags=True)
    source = f'hf-hub:{repository}' if repository else name if registered else f'local-dir:{name}'
    channels = config['pretrained_cfg']['input_size'][0]
    shape = ', '.join(str(n) for n in (1, *config['pretrained_cfg']['input_size']))
    label = "model.pretrained_cfg['label_names'][int(best)]" if config.get('label_names') else 'int(best)'
    return f"""## Use

```python
import timm
import torch
import vishub
from PIL import Image

model = vishub.create_model('{source}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('picture.jpg').convert('{'L' if channels == 1 else 'RGB'}'))[None]  # {shape}
with torch.inference_mode():
    probability, best = model(image).softmax(-1)[0].max(0)
print({label}, float(probability))
```
"""


def _training(metrics: Mapping[str, Any]) -> str:
    training = metrics.get('training')
    if not training:
        return ''
    recipe = training.get('recipe', '–')
    if isinstance(recipe, Mapping):
        recipe = ', '.join(f'{key} {value}' for key, value in recipe.items())
    note = f'- Note: {training["note"]}\n' if training.get('note') else ''
    return f"""## Training

- Data: {metrics.get('data', '–')}
- Recipe: {recipe}
- Epochs: {training.get('epochs', '–')}, seed {training.get('seed', '–')}
- Time: {_duration(training.get('wall_s'))} on {training.get('hardware', '–')}
{note}
```sh
{training.get('command', '')}
```
"""


def _peers(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    peers = metrics.get('peers')
    if not peers:
        return ''
    keys = list(_figures(metrics))
    own = {
        'name': f'**{name}**',
        'num_params': metrics['num_params'],
        'metrics': metrics['metrics'],
        'wall_s': metrics.get('training', {}).get('wall_s'),
        'epochs': metrics.get('training', {}).get('epochs', '–'),
    }
    rows = [
        [
            entry['name'],
            str(entry.get('epochs', '–')),
            f'{entry["num_params"]:,}',
            *(_number(entry['metrics'].get(key)) for key in keys),
            _duration(entry.get('wall_s')),
        ]
        for entry in (own, *peers)
    ]
    header = ['Model', 'Epochs', 'Parameters', *(metric_title(key) for key in keys), 'Training time']
    epochs = metrics.get('training', {}).get('epochs')
    size = config['pretrained_cfg']['input_size']
    same = all(
        peer.get('epochs', epochs) == epochs and list(peer.get('input_size', size)) == list(size) for peer in peers)
    return f'## Peers {"under the same budget" if same else "on the same data"}\n\n' + _table(header, rows)


def _robustness(metrics: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    robustness = metrics.get('robustness')
    if not robustness:
        return ''
    rows = [
        [model, corruption, *(_number(value) for value in values)]
        for model, corruptions in robustness['models'].items()
        for corruption, values in corruptions.items()
    ]
    title = metric_title(robustness['metric'])
    header = ['Model', 'Corruption', *(f'severity {n}' if n else 'clean' for n in robustness['severities'])]
    count = robustness.get('num_images')
    images = f'{count:,} evenly spread images of the test split' if count else 'the test split'
    plot = card.get('robustness_plot')
    image = f'\n![{title} under corruption]({plot})\n' if plot else ''
    return f'## Robustness\n\n{title} on {images}, corrupted at rising severity.\n\n{_table(header, rows)}{image}'


def _limits(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    limits = list(card.get('limits', ()))
    if 'use' not in card:  # a classifier, as the usual snippet
        limits.insert(0, f'It knows the {config["num_classes"]} classes of its training data and calls everything one '
                         'of them.')
    return '## Limits\n\n' + ''.join(f'- {sentence}\n' for sentence in limits)


def _file(metrics: Mapping[str, Any]) -> str:
    return f'## File\n\n`model.safetensors`, {metrics["size"]:,} bytes, SHA-256 `{metrics["sha256"]}`\n'


def _figures(measured: Mapping[str, Any]) -> Dict[str, float]:
    """The single numbers of an entry's 'metrics', without intervals and tables."""
    return {
        key: value for key, value in measured.get('metrics', {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: List[Sequence[str]] = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _number(value: Optional[float]) -> str:
    if value is None:
        return '–'
    return f'{value:.2f}' if abs(value) >= 1 else f'{value:.4f}'


def _interval(low_high: Optional[Sequence[float]]) -> str:
    return '–' if low_high is None else f'{_number(low_high[0])} to {_number(low_high[1])}'


def _duration(seconds: Optional[float]) -> str:
    if seconds is None:
        return '–'
    minutes = seconds / 60
    return f'{minutes:.0f} min' if minutes < 120 else f'{minutes / 60:.1f} h'
