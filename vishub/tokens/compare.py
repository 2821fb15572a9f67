"""All methods at equal multiply-accumulates on real images: accuracy, cost, and measured speed.

Every image is prepared once and shown to all contenders, which share one set of weights. Speeds are taken in rounds in
which every contender runs once, beginning with another each time, so that other work of the machine slows all alike.
"""
import copy
import math
import statistics
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from vishub.errors import InputError, WeightsNotFoundError
from vishub.tokens.comparison import UNREDUCED, method_title, place
from vishub.tokens.cost import macs
from vishub.tokens.method import Method, find_method, number, whole
from vishub.tokens.method import methods as all_methods
from vishub.tokens.pyra import merge_lora
from vishub.tokens.reduced import apply, config, remove
from vishub.tokens.search import search
from vishub.tokens.tuning import tune

if TYPE_CHECKING:
    from vishub.tasks.classification.data import ImageData, ImageSet
    from vishub.tasks.classification.pipeline import ClassificationPipeline

__all__ = ['compare']

# (what is done now, steps done, steps in all)
Progress = Callable[[str, int, int], None]

_CALIBRATION_IMAGES = 512


@dataclass
class _Contender:
    """A model in the comparison, and what is counted on the test images."""
    method: str
    target: float
    model: nn.Module
    searched: bool = False
    tuned: bool = False
    settings: Dict[str, Any] = field(default_factory=dict)
    hits: int = 0
    same: int = 0  # images with the unreduced model's first class
    lost: int = 0  # right unreduced, wrong here
    won: int = 0  # the other way round
    single: List[float] = field(default_factory=list)  # seconds a forward at batch 1, one a round
    batched: List[float] = field(default_factory=list)  # the same at the full batch


def compare(
        model: Union[str, nn.Module],
        data: 'ImageData',
        *,
        methods: Optional[Sequence[str]] = None,
        targets: Sequence[float] = (0.65,),
        split: Optional[str] = None,
        limit: Optional[int] = None,
        batch_size: int = 64,
        rounds: int = 7,
        search_trials: int = 0,
        tune_steps: int = 0,
        device: Optional[str] = None,
        seed: int = 0,
        progress: Optional[Progress] = None,
) -> Dict[str, Any]:
    """Measure token reduction methods against each other and the unreduced model.

    Args:
        model: Name with weights (`deit_small_patch16_224`, `vishub/…`, `local-dir:…`), or a module with a
            `pretrained_cfg`, which is left as it is.
        data: Labelled images of the model's classes.
        methods: Names; default all that need no training and can work on this model (what is left out is in `notes`).
        targets: Shares of the unreduced model's multiply-accumulates, in (0, 1]; 1 is the unreduced model itself.
        split: `test`, `val` or `all`; default the test split, or the validation split where there is no other.
        limit: At most so many images, evenly spread over the split; default all.
        batch_size: Images a forward pass, in measuring accuracy and throughput.
        rounds: Timed rounds after an untimed one; 0 measures no speed.
        search_trials: Also search each method's schedule and options (`tokens.search`) on 512 evenly spread training
            images with so many trials, by agreement with the unreduced model; 0 does not.
        tune_steps: Also train PYRA at each target on training images, so many steps of `batch_size`, and beside it ToMe
            with the same low-rank updates and classifier, but no gates; 0 does not.
        device: As for `ClassificationPipeline`.
        seed: Of random methods and the search.
        progress: Told how far the work is.

    Returns:
        JSON values: `model`, `num_params`, `data`, `split`, `num_images`, `macs`, `hardware`, `clock`, `batch_size`,
        `rounds`, `rows` (the unreduced model first, then by target and accuracy) and `notes` (sentences). A row has
        `method`, `searched`, `tuned`, `target`, `config`, `macs`, `macs_share`, `overhead`, `overhead_share`,
        `correct`, `top1`, `top1_ci95` (Wilson), `change` and `change_ci95` (against the unreduced model, paired),
        `agreement` (per cent of images with its first class), and with `rounds` `latency_ms` (batch 1),
        `latency_speedup`, `throughput` (images/s) and `throughput_speedup` (medians of the rounds' ratios).

    Raises:
        InputError: If an argument cannot be used, there are no weights, the data have other classes than the model, or
            a method named here cannot work on the model or meet a target.
    """
    chosen, targets = _check(methods, targets, limit, batch_size, rounds, search_trials, tune_steps)
    if (search_trials or tune_steps) and split == 'all':
        raise InputError(
            'searching and tuning need images apart from those that are measured, and split=all leaves none')
    images, split = _images(data, split, limit)
    pipe = _pipeline(model, device)
    from vishub.tasks.classification.metrics import class_order
    order = class_order(pipe, data.classes)
    base = _own(pipe.model)
    tell = progress or (lambda *_: None)
    full = macs(base).total  # refuses models whose tokens cannot be reduced

    contenders = [_Contender(UNREDUCED, 1., base)]
    tuned = bool(tune_steps) and (chosen is None or 'pyra' in chosen)
    untuned = [name for name in chosen or all_methods() if not (tuned and name == 'pyra')]
    notes = _enter(contenders, base, untuned, targets, strict=chosen is not None)
    if search_trials:
        _enter_searched(contenders, pipe, data, search_trials, batch_size, seed, tell)
    if tuned:
        _enter_tuned(contenders, pipe, data, order, targets, tune_steps, batch_size, seed, tell)
    _measure_accuracy(contenders, pipe, images, order, batch_size, seed, tell)
    if rounds:
        _measure_speed(contenders, pipe, images, batch_size, rounds, tell)

    from vishub.tasks.classification.training import describe_hardware
    rows = [_row(contender, contenders[0], full, len(images), batch_size) for contender in contenders]
    rows[1:] = sorted(rows[1:], key=lambda row: (-row['target'], -row['top1']))
    return {
        'model': pipe.name, 'num_params': pipe.num_params, 'data': data.name, 'data_tag': data.tag, 'split': split,
        'num_images': len(images), 'macs': full, 'tokens': macs(base).tokens_end[0], 'batch_size': batch_size,
        'rounds': rounds, 'search_trials': search_trials, 'calibration_images': _CALIBRATION_IMAGES,
        'tune_steps': tune_steps if tuned else 0, 'seed': seed, 'device': str(pipe.device),
        'hardware': describe_hardware(pipe.device),
        'clock': 'CPU time' if _clock(pipe.device) is time.process_time else 'wall time', 'rows': rows, 'notes': notes,
    }


# -- who takes part ---------------------------------------------------------------------------------------------------

def _trains(method: str) -> bool:
    return find_method(method).attach is not Method.attach


def _check(
        chosen: Optional[Sequence[str]],
        targets: Sequence[float],
        limit: Optional[int],
        batch_size: int,
        rounds: int,
        search_trials: int,
        tune_steps: int,
) -> Tuple[Optional[List[str]], List[float]]:
    """Methods without repetitions, and targets below 1 in falling order."""
    for method in chosen or ():
        find_method(method)
    if chosen is not None and not chosen:
        raise InputError(f'no method is named; there are: {", ".join(all_methods())}')
    for target in targets:
        if isinstance(target, (int, float)) and 1 < target <= 100:
            raise InputError(f'the target {target:g} is no share in (0, 1]; for {target:g} % give {target / 100:g}')
        number(target, 'a target', 0, 1, above=True)
    if limit is not None:
        whole(limit, 'limit', 1)
    whole(batch_size, 'batch_size', 1)
    whole(rounds, 'rounds')
    whole(search_trials, 'search_trials')
    whole(tune_steps, 'tune_steps')
    falling = sorted({float(target) for target in targets if target < 1}, reverse=True)
    return None if chosen is None else list(dict.fromkeys(chosen)), falling


def _images(data: 'ImageData', split: Optional[str], limit: Optional[int]) -> Tuple['ImageSet', str]:
    if split not in (None, 'test', 'val', 'all'):
        raise InputError(f"split is '{split}'; it is test, val or all")
    if split is None:
        split = 'test' if data.test is not None else 'val'
    if split == 'all' and data.test is not None:
        raise InputError(f'{data.name} has a test split; split=all is for data without any, such as a folder of '
                         'held-out images')
    images = {'test': data.test, 'val': data.val, 'all': data.with_validation_on('none').train}[split]
    if images is None or not len(images):
        raise InputError(f'{data.name} has no {split} split')
    name = {'test': 'test split', 'val': 'validation split', 'all': 'all images'}[split]
    return _evenly(images, limit), name


def _evenly(images: 'ImageSet', most: Optional[int]) -> 'ImageSet':
    """At most so many, at equal distances: a split may be sorted by class."""
    if most is None or most >= len(images):
        return images
    return images.take([round(i * (len(images) - 1) / max(most - 1, 1)) for i in range(most)])


def _pipeline(model: Union[str, nn.Module], device: Optional[str]) -> 'ClassificationPipeline':
    from vishub.catalog import UnknownNameError
    from vishub.hub.find import weights_folder
    from vishub.tasks.classification.pipeline import ClassificationPipeline
    folder = weights_folder(model) if isinstance(model, str) else None
    try:
        pipe = ClassificationPipeline(f'local-dir:{folder}' if folder else model, device)
        pipe.name = folder.resolve().name if folder else pipe.name  # reports are no place for paths of this machine
        return pipe
    except (InputError, UnknownNameError):
        raise
    except WeightsNotFoundError as error:
        raise InputError(f"'{model}' has no weights to compare with: {error}") from error
    except (RuntimeError, OSError) as error:  # timm's and the Hub's words for weights that are not there
        reason = str(error).strip().split('\n')[0]
        raise InputError(f"'{model}' has no weights here, and accuracy needs trained ones ({reason}); give a name "
                         'with weights, or local-dir: and a folder of them') from error


def _own(model: nn.Module) -> nn.Module:
    """The unreduced model, sharing weights with `model` but no settings."""
    if config(model) is not None:
        raise InputError(f'the model is reduced by {config(model)["method"]} already; tokens.remove(model) comes first')
    return _sharing(model)


def _sharing(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _enter(
        contenders: List[_Contender],
        base: nn.Module,
        chosen: Sequence[str],
        targets: Sequence[float],
        strict: bool,
) -> List[str]:
    """Add every method at every target; give notes on what is special or missing.

    What cannot be done is an error if `strict`: the user named these methods.
    """
    notes = []
    for method in chosen if strict else sorted(chosen, key=place):
        if _trains(method) and not strict:
            notes.append(f'{method_title(method)} is left out: it has parameters that are trained for a task, and '
                         'these weights have none. Untrained it is ToMe.')
            continue
        if _trains(method):
            notes.append(f'{method_title(method)} is untrained here: it does what ToMe does.')
        for target in targets:
            # Parameters of a method are its own, so its copy shares nothing; nor is any update of the weights needed.
            model = copy.deepcopy(base) if _trains(method) else _sharing(base)
            settings = {'lora': 0} if _trains(method) else {}
            try:
                _apply_quietly(model, method, macs=target, **settings)
            except InputError as error:
                if strict:
                    raise
                notes.append(f'{method_title(method)} at {100 * target:g} % is left out: {error}')
                continue
            contenders.append(_Contender(method, target, model, settings=_settings(model)))
    return notes


def _apply_quietly(model: nn.Module, method: str, **settings: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # what a method does instead is in its row's config
        return apply(model, method, **settings)


def _settings(model: nn.Module) -> Dict[str, Any]:
    return {key: value for key, value in config(model).items() if key != 'method'}


def _enter_searched(
        contenders: List[_Contender],
        pipe: 'ClassificationPipeline',
        data: 'ImageData',
        trials: int,
        batch_size: int,
        seed: int,
        tell: Progress,
) -> None:
    """Search beside every contender but the unreduced model and those that cannot be searched."""
    plain = [contender for contender in contenders[1:] if not _trains(contender.method)]
    calibration = [
        batch.to(pipe.device) for batch, _ in _batches(pipe, _evenly(data.train, _CALIBRATION_IMAGES), batch_size)]
    for done, contender in enumerate(plain):
        found = search(
            contenders[0].model, calibration, contender.method, contender.target, trials=trials, seed=seed,
            max_images=_CALIBRATION_IMAGES,
            progress=lambda tried, _, done=done: tell('searching', done * trials + tried, len(plain) * trials))
        model = _apply_quietly(_sharing(contenders[0].model), **found.config)
        contenders.append(
            _Contender(contender.method, contender.target, model, searched=True, settings=_settings(model)))


def _enter_tuned(
        contenders: List[_Contender],
        pipe: 'ClassificationPipeline',
        data: 'ImageData',
        order: Sequence[int],
        targets: Sequence[float],
        steps: int,
        batch_size: int,
        seed: int,
        tell: Progress,
) -> None:
    """Train PYRA, and the same without its gates, at every target."""
    places = torch.as_tensor(order)  # class of the data -> place in the model's output
    drawn = torch.randint(len(data.train), (steps * batch_size,), generator=torch.Generator().manual_seed(seed))
    images = data.train.take(drawn.tolist())
    runs = [(target, gates) for target in targets for gates in (False, True)]
    for done, (target, gates) in enumerate(runs):
        model = copy.deepcopy(contenders[0].model)
        with torch.random.fork_rng([pipe.device] if pipe.device.type == 'cuda' else []):
            torch.manual_seed(seed)
            _apply_quietly(model, 'pyra', macs=target)
            if not gates:  # they start closed
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(parameter.requires_grad and '.pyra_' not in name)
            tune(
                model, ((batch, places[labels]) for batch, labels in _batches(pipe, images, batch_size)), steps=steps,
                amp=pipe.device.type == 'cuda',
                progress=lambda step, _, done=done: tell('tuning', done * steps + step, len(runs) * steps))
        merge_lora(model)
        if not gates:
            remove(model)
            _apply_quietly(model, 'tome', macs=target)
        model.requires_grad_(False)
        contenders.append(
            _Contender('pyra' if gates else 'tome', target, model, tuned=True, settings=_settings(model)))


# -- measuring --------------------------------------------------------------------------------------------------------

def _batches(
        pipe: 'ClassificationPipeline',
        images: 'ImageSet',
        batch_size: int,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Prepared images (B, C, H, W) on the CPU, and their labels (B,)."""
    from vishub.tasks.classification.metrics import model_input
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        yield model_input(pipe, (images[i] for i in range(start, stop))), torch.as_tensor(images.labels[start:stop])


@torch.inference_mode()
def _measure_accuracy(
        contenders: List[_Contender],
        pipe: 'ClassificationPipeline',
        images: 'ImageSet',
        order: Sequence[int],
        batch_size: int,
        seed: int,
        tell: Progress,
) -> None:
    total, done = len(images) * len(contenders), 0
    tell('measuring accuracy', 0, total)
    with torch.random.fork_rng([pipe.device] if pipe.device.type == 'cuda' else []):
        for number_, (batch, labels) in enumerate(_batches(pipe, images, batch_size)):
            batch, wanted = batch.to(pipe.device), None
            for contender in contenders:
                torch.manual_seed(seed + number_)  # a random method draws the same, whoever else takes part
                logits = contender.model(batch).float()
                if contender.method == UNREDUCED and not logits.isfinite().all():
                    raise InputError(f"'{pipe.name}' gave scores that are not finite: its weights are damaged")
                first = logits[:, order].argmax(dim=1).cpu()
                wanted = first if wanted is None else wanted  # the unreduced model comes first
                right, was_right = first == labels, wanted == labels
                contender.hits += int(right.sum())
                contender.same += int((first == wanted).sum())
                contender.lost += int((was_right & ~right).sum())
                contender.won += int((right & ~was_right).sum())
                done += len(labels)
                tell('measuring accuracy', done, total)


@torch.inference_mode()
def _measure_speed(
        contenders: List[_Contender],
        pipe: 'ClassificationPipeline',
        images: 'ImageSet',
        batch_size: int,
        rounds: int,
        tell: Progress,
) -> None:
    batch, _ = next(_batches(pipe, images, batch_size))
    batch = batch.repeat(math.ceil(batch_size / len(batch)), 1, 1, 1)[:batch_size].to(pipe.device)
    total = (rounds + 1) * len(contenders)
    clock = _clock(pipe.device)
    for turn in range(rounds + 1):
        start = turn * max(1, len(contenders) // (rounds + 1)) % len(contenders)
        for rank, contender in enumerate(contenders[start:] + contenders[:start]):
            for x, seconds, repeats in ((batch[:1], contender.single, 5), (batch, contender.batched, 1)):
                elapsed = _seconds(contender.model, x, repeats, clock)
                if turn:
                    seconds.append(elapsed)
            tell('measuring speed', turn * len(contenders) + rank + 1, total)


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU time for one thread on the CPU, which other work of the machine does not stretch; else wall time."""
    return time.process_time if device.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter


def _seconds(model: nn.Module, x: torch.Tensor, repeats: int, clock: Callable[[], float]) -> float:
    """Time of one forward, the mean of so many, the device waited for."""
    def wait() -> None:
        if x.device.type == 'cuda':
            torch.cuda.synchronize(x.device)
        elif x.device.type == 'mps':
            torch.mps.synchronize()

    wait()
    start = clock()
    for _ in range(repeats):
        model(x)
    wait()
    return (clock() - start) / repeats


def _row(contender: _Contender, base: _Contender, full: int, num: int, batch_size: int) -> Dict[str, Any]:
    from vishub.tasks.classification.metrics import wilson_interval
    count = macs(contender.model)
    change = (contender.won - contender.lost) / num
    # Both models saw the same images, so only those that they judge differently make the change uncertain (Wald).
    spread = 1.959964 * math.sqrt(max(contender.won + contender.lost - num * change ** 2, 0)) / num
    row = {
        'method': contender.method, 'searched': contender.searched, 'tuned': contender.tuned,
        'target': contender.target, 'config': contender.settings,
        'macs': count.total, 'macs_share': count.total / full,
        'overhead': count.overhead, 'overhead_share': count.overhead / full,
        'correct': contender.hits, 'top1': 100 * contender.hits / num,
        'top1_ci95': [100 * bound for bound in wilson_interval(contender.hits, num)],
        'change': 100 * change, 'change_ci95': [100 * (change - spread), 100 * (change + spread)],
        'agreement': 100 * contender.same / num,
    }
    if contender.single:
        row.update(
            latency_ms=1000 * statistics.median(contender.single),
            latency_speedup=_ratio(base.single, contender.single),
            throughput=batch_size / statistics.median(contender.batched),
            throughput_speedup=_ratio(base.batched, contender.batched))
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast))
