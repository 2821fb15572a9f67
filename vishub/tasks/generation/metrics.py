"""How good generated pictures are, without a download: a classifier of the same classes judges them.

Class agreement is the share of pictures that the judge takes for the class that was asked for. The Fréchet distance
(Heusel et al. 2017, arXiv:1706.08500) is taken in the judge's features: it is no FID, and only comparable under the
same judge and number of pictures. The FID itself is measured where the Inception weights are at hand.
"""
import dataclasses
import io
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw

from vishub import catalog
from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.tasks import drawing
from vishub.tasks.base import Progress
from vishub.tasks.classification.data import ImageData, ImageSet, load_data
from vishub.tasks.classification.metrics import class_order, model_input, new_figure, wilson_interval
from vishub.tasks.classification.pipeline import ClassificationPipeline
from vishub.tasks.evaluation import card_for, into_card, open_models, write_report
from vishub.tasks.generation.pipeline import GenerationPipeline, picture_grid

__all__ = [
    'Judge', 'Statistics', 'compare_to_real', 'default_judge', 'evaluate', 'feature_statistics', 'frechet_distance',
    'generate_for_metrics', 'inception_distance', 'sample_sheet', 'save_evaluation', 'statistics', 'update_card',
]

INCEPTION_VARIABLE = 'VISHUB_INCEPTION'  # path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64."""
    mean: np.ndarray
    covariance: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """Of features (N, D), N at least 2.

    Raises:
        InputError: If there are fewer.
    """
    if len(features) < 2:
        raise InputError(f'a covariance needs at least 2 pictures, got {len(features)}')
    features = features.astype(np.float64)
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0."""
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2): real and not negative.
    values, vectors = np.linalg.eigh(np.atleast_2d(first.covariance))
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ np.atleast_2d(second.covariance) @ root)
    trace = np.trace(np.atleast_2d(first.covariance)) + np.trace(np.atleast_2d(second.covariance))
    distance = np.square(first.mean - second.mean).sum() + trace - 2 * np.sqrt(np.clip(product, 0, None)).sum()
    return float(max(distance, 0.))


class Judge:
    """A classifier that looks at pictures: what it takes them for, and its features of them.

    Args:
        model: Name of a classifier with weights, or `local-dir:FOLDER`.
        classes: Names of the classes, in the order of the labels.
        device: See `Pipeline`.

    Raises:
        InputError: If it knows other classes.
    """

    def __init__(self, model: str, classes: Sequence[str], device: Union[str, torch.device, None] = None) -> None:
        self.pipe = ClassificationPipeline(model, device)
        self.name = Path(model.removeprefix('local-dir:')).name  # of a folder no more: reports go to others
        self.order = class_order(self.pipe, classes)

    @torch.no_grad()
    def __call__(
            self, pictures: Sequence[np.ndarray], batch_size: int = 100,
            advance: Optional[Callable[[int], None]] = None) -> Tuple[np.ndarray, np.ndarray]:
        """uint8 pictures (H, W, C) -> the classes (N,) it takes them for, and its last features (N, D)."""
        model: Any = self.pipe.model
        classes, features = [], []
        for start in range(0, len(pictures), batch_size):
            batch = model_input(self.pipe, pictures[start:start + batch_size]).to(self.pipe.device)
            tokens = model.forward_features(batch)
            features.append(model.forward_head(tokens, pre_logits=True).float().cpu().numpy())
            logits = model.forward_head(tokens)[:, self.order]
            classes.append(logits.argmax(dim=1).cpu().numpy())
            if advance is not None:
                advance(len(batch))
        return np.concatenate(classes), np.concatenate(features)


def default_judge(tag: str) -> str:
    """The best classifier that the catalogue has for data of that tag.

    Raises:
        InputError: If it has none.
    """
    of_task = {row.name for row in catalog.architectures('classification')}
    rows = [row for row in catalog.weights() if row.architecture in of_task and row.tag == tag]
    if not rows:
        raise InputError(f"no classifier of '{tag}' can judge the pictures: train one, and name it as judge")
    return max(rows, key=lambda row: row.value).name


def feature_statistics(judge: Judge, images: ImageSet, limit: int = 2000) -> Statistics:
    """The judge's features of real pictures, at most `limit`, evenly spread."""
    chosen = np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int)
    return statistics(judge([images[int(index)] for index in chosen])[1])


def generate_for_metrics(
        pipe: GenerationPipeline,
        count: int,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        solver: str = 'dpm++',
        seed: int = 0,
        batch_size: int = 50,
        progress: Optional[Progress] = None,
) -> Tuple[List[np.ndarray], np.ndarray]:
    """Pictures of all classes, equally many of each (`count` rounded up to that).

    Returns:
        uint8 pictures (H, W, C), and the classes (N,) that were asked for.
    """
    classes = range(pipe.model.num_classes)
    each = -(-count // len(classes))
    pictures: List[np.ndarray] = []
    labels: List[int] = []
    for number in classes:  # each class from seeds of its own: the same noise ten times would be one picture's worth
        result: Any = pipe(
            number, num_images=each, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            solver=solver, seed=seed + number * each, batch_size=batch_size)
        pictures += [np.atleast_3d(np.asarray(picture)) for picture in result.pictures]
        labels += [number] * each
        if progress is not None:
            progress(len(pictures), each * len(classes))
    return pictures, np.array(labels)


def compare_to_real(
        judge: Judge, pictures: Sequence[np.ndarray], labels: np.ndarray, real: Statistics) -> Dict[str, float]:
    """`agreement` (per cent) and `frechet` (distance in the judge's features) of generated pictures."""
    judged, features = judge(pictures)
    return {
        'agreement': round(100 * float((judged == labels).mean()), 2),
        'frechet': round(frechet_distance(statistics(features), real), 3),
    }


def inception_distance(
        path: Union[str, os.PathLike], pictures: Sequence[np.ndarray], real: Sequence[np.ndarray],
        device: torch.device) -> float:
    """The FID of Heusel et al. between pictures (H, W, C), uint8, by torch-fidelity's Inception.

    Args:
        path: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; read as data, nothing in it is run.
        pictures: Generated ones.
        real: Real ones.
        device: Where to compute.

    Raises:
        InputError: If the file is not there, or is not that network's.
        MissingExtraError: If torch-fidelity is not installed.
    """
    if not Path(path).is_file():
        raise InputError(f"{INCEPTION_VARIABLE} is '{path}', where there is no file")
    import_extra('torch_fidelity', 'generate')
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from vishub.hub.convert import read_checkpoint
    # torch-fidelity would unpickle the file, whatever is in it: it gets tensors that are known to be nothing else.
    safe = io.BytesIO()
    torch.save(read_checkpoint(Path(path)), safe)
    safe.seek(0)
    try:
        network = FeatureExtractorInceptionV3('inception', ['2048'], feature_extractor_weights_path=safe).to(device)
    except RuntimeError as error:
        raise InputError(
            f"'{path}' is not torch-fidelity's Inception: give weights-inception-2015-12-05-6726825d.pth") from error

    @torch.no_grad()
    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        parts = []
        for start in range(0, len(images), 50):
            batch = torch.from_numpy(np.stack(images[start:start + 50])).permute(0, 3, 1, 2)  # B, C, H, W
            parts.append(network(batch.expand(-1, 3, -1, -1).to(device))[0].double().cpu().numpy())
        return np.concatenate(parts)

    return frechet_distance(statistics(features(pictures)), statistics(features(real)))


def evaluate(
        models: Sequence[str],
        data: Union[str, Path, ImageData],
        *,
        limit: Optional[int] = None,
        batch_size: int = 50,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
        judge: Optional[str] = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.,
        solver: str = 'dpm++',
) -> Dict[str, Any]:
    """Measure pictures of a model, and of its peers, under one judge.

    Args:
        models: Names or folders of weights; the first is the model, the others are its peers.
        data: Data set of the classes, or its path: its test split is what the pictures are compared to.
        limit: Pictures to generate, equally many of each class; 1000 by default.
        batch_size: Pictures made at once.
        seed: Of the first picture of the first class.
        device: See `Pipeline`.
        progress: Called with (pictures done, pictures in all).
        judge: Classifier of the same classes; by default the best one of the catalogue for this data. It must not
            have had a part in the training.
        num_inference_steps, guidance_scale, solver: See `GenerationPipeline`.

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test` (generated pictures), `metrics`: `agreement`
        (per cent, with `agreement_ci95`), `frechet`, `fid` where VISHUB_INCEPTION names the weights; `report`: `judge`,
        `sampling`, `classes` (agreement of each), `real` (the judge's accuracy on the test split, and the distance of
        as many training pictures to it: what no model need surpass); `peers`.

    Raises:
        InputError: If the data have no test split, or models and data do not fit.
    """
    pipes, known = open_models(GenerationPipeline, models, device)
    own, *others = pipes
    first = pipes[own]
    if not isinstance(data, ImageData):
        data = load_data(data, first.model.in_chans if not first.latent else 3)
    if data.test is None:
        raise InputError(f'{data.name} has no test split to compare pictures to')
    for name, pipe in pipes.items():
        if pipe.model.num_classes != len(data.classes):
            raise InputError(f"'{name}' makes {pipe.model.num_classes} classes, {data.name} has {len(data.classes)}")
    chosen = Judge(judge or default_judge(data.tag), data.classes, device)
    judged, features = chosen([data.test[index] for index in range(len(data.test))])
    reference = statistics(features)
    real_agreement = round(100 * float((judged == data.test.labels).mean()), 2)
    each = -(-(limit or 1000) // len(data.classes))
    count = each * len(data.classes)
    total = count * len(pipes)

    # What no model need surpass: the judge on real test pictures, and as many training pictures in place of samples.
    training = data.train.take(np.linspace(0, len(data.train) - 1, count).astype(int))
    real = {
        **compare_to_real(chosen, [training[index] for index in range(count)], training.labels, reference),
        'agreement': real_agreement}

    inception = os.environ.get(INCEPTION_VARIABLE)
    measured = []
    for number, (name, pipe) in enumerate(pipes.items()):
        def advance(done: int, _all: int, before: int = number * count) -> None:
            if progress is not None:
                progress(before + done, total)

        pictures, labels = generate_for_metrics(
            pipe, count, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, solver=solver,
            seed=seed, batch_size=batch_size, progress=advance)
        judged, features = chosen(pictures)
        right = judged == labels
        low, high = wilson_interval(int(right.sum()), count)
        figures: Dict[str, Any] = {
            'agreement': round(100 * float(right.mean()), 2),
            'agreement_ci95': [round(100 * low, 2), round(100 * high, 2)],
            'frechet': round(frechet_distance(statistics(features), reference), 3),
        }
        if inception:
            tests = [data.test[index] for index in range(len(data.test))]
            figures['fid'] = round(inception_distance(inception, pictures, tests, pipe.device), 3)
        classes = {
            label: round(100 * float(right[labels == index].mean()), 2) for index, label in enumerate(data.classes)}
        training_facts = known[name].get('training', {})
        measured.append({
            'name': name, 'num_params': pipe.num_params, 'metrics': figures, 'classes': classes,
            **{key: training_facts[key] for key in ('wall_s', 'epochs', 'steps') if key in training_facts}})
    return {
        'model': own, 'source': models[0], 'num_params': measured[0]['num_params'], 'data': data.name,
        'split': f'samples judged by {chosen.name}, distance to the test split', 'num_test': count,
        'metrics': measured[0]['metrics'],
        'report': {
            'judge': chosen.name, 'classes': measured[0]['classes'], 'real': real, 'seed': seed,
            'sampling': {
                'num_inference_steps': num_inference_steps, 'guidance_scale': guidance_scale, 'solver': solver},
        },
        'peers': [{key: value for key, value in entry.items() if key != 'classes'} for entry in measured[1:]],
    }


# -- report and card --------------------------------------------------------------------------------------------------

def sample_sheet(
        pipe: GenerationPipeline, columns: int = 10, num_inference_steps: int = 25, guidance_scale: float = 2.,
        solver: str = 'dpm++', seed: int = 0) -> Image.Image:
    """A row of pictures for each class (at most 20 classes), under its name: not chosen, of seeds seed, seed + 1 …"""
    rows: List[Any] = []
    for number in range(min(20, pipe.model.num_classes)):
        rows.append(pipe(
            number, num_images=columns, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            solver=solver, seed=seed, batch_size=columns))
    grids = [picture_grid([picture.resize((56, 56), Image.Resampling.NEAREST) if picture.width < 56 else picture
                           for picture in row.pictures], columns=columns) for row in rows]
    label, height = 150, grids[0].height // 2 + 4
    sheet = Image.new('RGB', (label + grids[0].width // 2, height * len(grids)), drawing.PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (row, grid) in enumerate(zip(rows, grids)):
        top = number * height
        draw.text((8, top + height // 2 - 9), drawing.elide(row.prompt, drawing.font(15), label - 16),
                  fill=drawing.INK, font=drawing.font(15))
        sheet.paste(grid.resize((grid.width // 2, grid.height // 2), Image.Resampling.LANCZOS), (label, top + 2))
    return sheet


def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, and agreement.png, the agreement of each class.

    Returns:
        The files.
    """
    folder = Path(folder)
    files = [write_report(report, folder), folder / 'agreement.png']
    classes = report['report']['classes']
    figure = new_figure(6, 1.2 + 0.3 * len(classes))
    axis = figure.subplots()
    axis.barh(list(classes)[::-1], list(classes.values())[::-1])
    axis.axvline(report['metrics']['agreement'], color='black', linewidth=1, label='all classes')
    axis.axvline(report['report']['real']['agreement'], color='grey', linestyle='--', label='real pictures')
    axis.set(xlabel=f'class agreement, %, judged by {report["report"]["judge"]}', xlim=(0, 100))
    axis.legend(loc='lower left', fontsize='small')
    with atomic_path(files[1]) as temporary:
        figure.savefig(temporary, dpi=120)
    return files


def update_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md, with a sample sheet.

    Raises:
        InputError: If the figures are of other data than the weights.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    known = card_for(folder, report)
    sampling, real = report['report']['sampling'], report['report']['real']
    pipe = GenerationPipeline(f'local-dir:{folder}')
    with atomic_path(folder / 'samples.png') as temporary:
        sample_sheet(pipe, seed=report['report']['seed'], **sampling).save(temporary)
    name = folder.resolve().name
    word = (pipe.class_names or ['0'])[-1]
    card = {
        **known.get('card', {}),
        'description': f'`{pipe.model.pretrained_cfg["architecture"]}` trained on {report["data"]}: it makes pictures '
                       f'of a class, {pipe.picture_size[1]}x{pipe.picture_size[0]} pixels, from noise.',
        'use': f"import vishub\n\npipe = vishub.pipeline('generation', '{name}')\n"
               f"pipe({word!r}, num_images=8, seed=0).save('pictures.png')\n",
        'pictures': [['samples.png', 'Samples of each class, not chosen']],
        'limits': [
            f'It makes the {len(report["report"]["classes"])} classes of its training data and nothing else.',
            f'Agreement is judged by `{report["report"]["judge"]}`, which takes real test pictures for their class in '
            f'{real["agreement"]:g} % of cases; as many real training pictures have the distance {real["frechet"]:g}.',
            "The Fréchet distance is in the judge's features: no FID, and comparable only under the same judge and "
            'number of pictures.',
            f'Sampled with {sampling["solver"]} in {sampling["num_inference_steps"]} steps, guidance '
            f'{sampling["guidance_scale"]:g}; guidance above 1 makes pictures more typical than real ones are.',
        ],
    }
    into_card(folder, report, card)
