"""How much sharper: PSNR and SSIM of a model, beside the blurred pictures themselves and classical methods.

As in the field: results are clipped and rounded to 8 bits, PSNR is that of all three channels, and both are means over
pictures. Blur made here has unseen photographs and unseen kernels.

The classical methods are told how large each kernel is (its bounding box), not its values, and get the best of several
settings on the very pictures that are measured: an upper bound of what they can do without knowing the kernel.
"""
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from vishub.errors import InputError, import_extra
from vishub.files import atomic_path
from vishub.hub.find import weights_folder
from vishub.tasks import drawing
from vishub.tasks.base import Progress
from vishub.tasks.deblurring.data import DeblurData, Sample, load_data
from vishub.tasks.deblurring.pipeline import DeblurringPipeline
from vishub.tasks.deblurring.shake import from_linear, to_linear
from vishub.tasks.evaluation import into_card, open_models, write_report

__all__ = [
    'card_entry', 'evaluate', 'figures', 'peers_of', 'save_evaluation', 'save_sheet', 'update_card',
]

# Side in pixels of what is measured of a photograph that is shaken here; real pairs are measured whole.
SIDE = 256


def figures(result: np.ndarray, sharp: np.ndarray) -> Dict[str, float]:
    """PSNR in dB and SSIM of one picture, both uint8, H x W x 3.

    SSIM is Wang et al.'s with a Gaussian window of 11 pixels and standard deviation 1.5, mean over channels.

    Raises:
        MissingExtraError: If torchmetrics is not installed (extra `train`).
    """
    functional = import_extra('torchmetrics.functional.image', 'train')
    x, y = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double() / 255
            for image in (result, sharp))
    return {
        'psnr': float(functional.peak_signal_noise_ratio(x, y, data_range=1.)),
        'ssim': float(functional.structural_similarity_index_measure(x, y, data_range=1.)),
    }


def _lpips() -> Optional[Callable[[np.ndarray, np.ndarray], float]]:
    """The learned distance of Zhang et al. 2018, where its package and its network's weights are here."""
    try:
        import lpips

        distance = lpips.LPIPS(net='alex', verbose=False).eval()
    except (ImportError, OSError):  # OSError: weights that would have to be downloaded
        return None

    def measure(result: np.ndarray, sharp: np.ndarray) -> float:
        x, y = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
                for image in (result, sharp))
        with torch.inference_mode():
            return float(distance(x, y))
    return measure


# -- classical methods ------------------------------------------------------------------------------------------------

# (sample, settings) -> picture, uint8 H x W x 3
Method = Callable[[Sample, Tuple[float, ...]], np.ndarray]


def _guess(sample: Sample, spread: float) -> np.ndarray:
    """A kernel of the true one's size: a Gaussian whose standard deviations are `spread` times its box's sides."""
    assert sample.kernel is not None
    used = np.argwhere(sample.kernel > 1e-4 * sample.kernel.max())
    height, width = np.ptp(used, axis=0) + 1
    y, x = (np.arange(side) - side // 2 for side in sample.kernel.shape)
    kernel = np.exp(-0.5 * ((y[:, None] / (spread * height)) ** 2 + (x[None] / (spread * width)) ** 2))
    return kernel / kernel.sum()


def _in_light(image: np.ndarray, method: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a method of one channel in linear light, where blur is a convolution."""
    light = to_linear(image)
    result = np.stack([method(light[..., channel]) for channel in range(3)], -1)
    return np.round(from_linear(result) * 255).astype(np.uint8)


def _unsharp(sample: Sample, settings: Tuple[float, ...]) -> np.ndarray:
    radius, per_cent = settings
    return np.asarray(Image.fromarray(sample.blurred).filter(ImageFilter.UnsharpMask(radius, int(per_cent), 0)))


def _wiener(sample: Sample, settings: Tuple[float, ...]) -> np.ndarray:
    from skimage.restoration import wiener

    spread, balance = settings
    kernel = _guess(sample, spread)
    return _in_light(sample.blurred, lambda light: wiener(light, kernel, balance, clip=False))


def _richardson_lucy(sample: Sample, settings: Tuple[float, ...]) -> np.ndarray:
    from skimage.restoration import richardson_lucy

    spread, iterations = settings
    kernel = _guess(sample, spread)
    return _in_light(sample.blurred, lambda light: richardson_lucy(light, kernel, int(iterations)))


def peers_of(data: DeblurData) -> Dict[str, Tuple[Method, Sequence[Tuple[float, ...]]]]:
    """The classical methods that can be measured here, with the settings to choose from.

    Wiener's filter and Richardson and Lucy's are scikit-image's, where that is installed, and need a known size.
    """
    peers: Dict[str, Tuple[Method, Sequence[Tuple[float, ...]]]] = {
        'unsharp mask': (_unsharp, [(1, 50), (2, 50), (2, 100), (3, 100), (4, 100)])}
    if data.synthetic:
        try:
            import skimage.restoration  # noqa: F401
        except ImportError:
            return peers
        peers['Wiener'] = (_wiener, [(s, b) for s in (0.15, 0.25) for b in (0.01, 0.1, 0.5)])
        peers['Richardson-Lucy'] = (_richardson_lucy, [(s, n) for s in (0.15, 0.25) for n in (3, 10, 25)])
    return peers


# -- evaluation -------------------------------------------------------------------------------------------------------

def evaluate(
        models: Sequence[str],
        data: Union[str, Path, DeblurData],
        *,
        limit: Optional[int] = None,
        batch_size: int = 1,
        seed: int = 0,
        device: Optional[str] = None,
        progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Measure a model, and its peers on the same pictures.

    Args:
        models: Names that `DeblurringPipeline` takes, or folders of weights; the first is the model.
        data: Folder for `load_data`, or data already read; its test split, else its validation split.
        limit: Measure at most so many pictures, evenly spread; all by default.
        batch_size: Without effect: pictures are measured one by one, as they are sharpened.
        seed: Of the kernels, where blur is made here.
        device: See `DeblurringPipeline`.
        progress: Called with (pictures done, pictures in all), those of every method counted.

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_test`, `metrics` (`psnr`, `psnr_gain` over the
        blurred pictures with its 95 % interval, `ssim`, `lpips` where it can be had), `peers`, and `report` with
        `pictures` (for each its name, the blurred one's and the model's PSNR, and the kernel's size).

    Raises:
        InputError: If there is no such split, or two models are the same.
    """
    data = data if isinstance(data, DeblurData) else load_data(data)
    split, split_name = (data.test, 'test split') if data.test is not None else (data.val, 'validation split')
    if split is None:
        raise InputError(f'{data.name} has neither a test nor a validation split')
    split = split if limit is None else split.take(limit)
    pipes, _ = open_models(DeblurringPipeline, models, device)
    classical = peers_of(data)
    total, done = len(split) * (len(pipes) + sum(len(settings) for _, settings in classical.values())), 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    lpips = _lpips()

    def measured(result: np.ndarray, sharp: np.ndarray) -> Dict[str, float]:
        return {**figures(result, sharp), **({'lpips': lpips(result, sharp)} if lpips is not None else {})}

    side = SIDE if split.synthetic else None
    blurred: List[Dict[str, float]] = []
    of_models: Dict[str, List[Dict[str, float]]] = {name: [] for name in pipes}
    of_methods: Dict[str, List[List[Dict[str, float]]]] = {
        name: [[] for _ in settings] for name, (_, settings) in classical.items()}
    pictures = []
    for sample in _samples(split, side, seed):
        blurred.append(measured(sample.blurred, sample.sharp))
        for name, pipe in pipes.items():
            of_models[name].append(measured(pipe(sample.blurred).pixels, sample.sharp))
            count()
        for name, (method, settings) in classical.items():
            for number, setting in enumerate(settings):
                of_methods[name][number].append(measured(method(sample, setting), sample.sharp))
                count()
        extent = None if sample.kernel is None else int(np.ptp(np.argwhere(sample.kernel > 0), axis=0).max() + 1)
        pictures.append({
            'name': sample.name, 'kernel': extent, 'blurred': round(blurred[-1]['psnr'], 3),
            'psnr': round(next(iter(of_models.values()))[-1]['psnr'], 3)})

    rows = [
        {'name': name, 'num_params': pipes[name].num_params, 'metrics': _summary(values, blurred)}
        for name, values in of_models.items()]
    peers: List[Dict[str, Any]] = rows[1:]
    # they were not trained at all
    peers.append({'name': 'the blurred picture', 'num_params': 0, 'epochs': 0, 'metrics': _summary(blurred, blurred)})
    for name, (_, settings) in classical.items():
        best = max(range(len(settings)), key=lambda i: np.mean([row['psnr'] for row in of_methods[name][i]]))
        peers.append({
            'name': name, 'num_params': 0, 'epochs': 0, 'settings': list(settings[best]),
            'metrics': _summary(of_methods[name][best], blurred)})
    return {
        'model': rows[0]['name'], 'num_params': rows[0]['num_params'], 'data': data.name, 'split': split_name,
        'num_test': len(split), 'metrics': rows[0]['metrics'], 'peers': peers,
        'report': {'side': side, 'seed': seed, 'pictures': pictures},
    }


def _samples(split: Any, side: Optional[int], seed: int) -> Iterator[Sample]:
    for index in range(len(split)):
        yield split.sample(index, side, seed)


def _summary(rows: Sequence[Mapping[str, float]], blurred: Sequence[Mapping[str, float]]) -> Dict[str, Any]:
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
    gains = np.array([row['psnr'] - before['psnr'] for row, before in zip(rows, blurred)])
    half = 1.96 * gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.
    gain = round(float(gains.mean()), 4)
    return {
        'psnr': means.pop('psnr'), 'psnr_gain': gain,
        'psnr_gain_ci95': [round(gain - float(half), 4), round(gain + float(half), 4)], **means}


# -- report and card --------------------------------------------------------------------------------------------------

def save_evaluation(report: Mapping[str, Any], folder: Union[str, Path]) -> List[Path]:
    """Write what `evaluate` found: evaluation.json, and gain.png, the gain over the size of the blur.

    Returns:
        The files.
    """
    folder = Path(folder)
    files = [write_report(report, folder), folder / 'gain.png']
    from vishub.tasks.classification.metrics import new_figure

    figure = new_figure(6, 4)
    axis = figure.subplots()
    rows = report['report']['pictures']
    known = all(row['kernel'] is not None for row in rows)
    axis.plot(
        [row['kernel'] if known else row['blurred'] for row in rows],
        [row['psnr'] - row['blurred'] for row in rows], 'o', alpha=0.6)
    axis.axhline(0, color='grey')
    axis.set(
        xlabel='size of the kernel, pixels' if known else 'PSNR of the blurred picture, dB', ylabel='gain in PSNR, dB',
        title=f'{report["model"]}: {report["metrics"]["psnr_gain"]:+.2f} dB, {report["num_test"]} pictures')
    axis.grid(alpha=0.3)
    with atomic_path(files[1]) as temporary:
        figure.savefig(temporary, dpi=120)
    return files


def save_sheet(
        models: Sequence[str],
        data: Union[str, Path, DeblurData],
        path: Union[str, Path],
        count: int = 4,
        seed: int = 0,
        device: Optional[str] = None,
) -> Path:
    """Draw some test pictures side by side: blurred, sharpened by each model, true; with PSNR and kernels."""
    data = data if isinstance(data, DeblurData) else load_data(data)
    split = data.test if data.test is not None else data.val
    if split is None:
        raise InputError(f'{data.name} has neither a test nor a validation split')
    pipes = []
    for model in models:
        folder = weights_folder(model)
        pipes.append(DeblurringPipeline(f'local-dir:{folder}' if folder else model, device))
    samples = list(_samples(split.take(count), SIDE, seed))
    gap, line = 8, 24
    columns = 2 + len(pipes)
    sheet = Image.new(
        'RGB', (gap + columns * (SIDE + gap), gap + len(samples) * (SIDE + line + gap)), drawing.PAPER)
    draw, typeface = ImageDraw.Draw(sheet), drawing.font(15)
    for row, sample in enumerate(samples):
        top = gap + row * (SIDE + line + gap)
        results = [(pipe, pipe(sample.blurred)) for pipe in pipes]
        cells = [('blurred', sample.blurred, sample.kernel)]
        cells += [('sharpened', result.pixels, result.blur) for _, result in results]
        cells.append(('true', sample.sharp, None))
        for column, (title, pixels, kernel) in enumerate(cells):
            left = gap + column * (SIDE + gap)
            text = title if title == 'true' else f'{title}, {figures(pixels, sample.sharp)["psnr"]:.2f} dB'
            draw.text((left, top), text, fill=drawing.INK, font=typeface)
            picture = Image.fromarray(pixels)
            if kernel is not None:  # the true one on the blurred picture, the estimate on the sharpened one
                inset = Image.fromarray(drawing.heat_colours(np.sqrt(kernel / kernel.max())))
                picture.paste(inset.resize((kernel.shape[1] * 2, kernel.shape[0] * 2), Image.Resampling.NEAREST))
            sheet.paste(picture, (left, top + line))
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    return Path(path)


def card_entry(name: str, data: DeblurData) -> Dict[str, Any]:
    """The entry `card` of metrics.json for weights of that name, trained on these data; see `vishub/hub/folder.py`."""
    made = 'random camera shakes of 5 to 17 pixels in linear light, noise of 0.5 %' if data.synthetic else 'real blur'
    limits = [f'It was trained on {made}; stronger blur, blur that differs over the picture, and defocus are not its.']
    if data.note:
        limits.append(data.note)
    return {
        'description': f'Removes camera shake from photographs. Trained on {data.name} ({made}).',
        'licence': 'other' if data.note else 'apache-2.0',
        'limits': limits,
        'use': "import vishub\n\n"
               f"pipe = vishub.pipeline('deblurring', '{name}')\n"
               "result = pipe('shaken.jpg')\n"
               "result.save('sharp.jpg')  # with the original's metadata\n"
               "result.plot().save('what_was_done.png')  # and the blur it believes in\n",
        'pictures': [['samples.png', 'Held-out photographs and unseen kernels: blurred with the true kernel, sharpened '
                                     'with the estimated one, true']],
    }


def update_card(folder: Union[str, Path], report: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into a weights folder's metrics.json and README.md; its weights stay as they are.

    Raises:
        InputError: If the figures are not of the data that the weights were trained on.
        WeightsNotFoundError: If the weights are not those that metrics.json speaks of.
    """
    into_card(folder, report)
