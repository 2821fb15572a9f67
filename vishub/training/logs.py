"""What a run tells: training.log, log.csv, learning curves, and trackers by name (TensorBoard and others)."""
import csv
import importlib.util
import logging
from pathlib import Path
from typing import Any, Dict, List, Sequence

from vishub.errors import InputError, MissingExtraError, import_extra
from vishub.files import atomic_path

__all__ = ['LOG_FIELDS', 'check_trackers', 'draw_curves', 'duration', 'open_log', 'start_trackers', 'write_csv']

LOG_FIELDS = ('epoch', 'step', 'side', 'lr', 'train_loss', 'images_per_s', 'wall_s')
# The trackers that Accelerate drives, and what pip calls them.
TRACKERS = {
    'tensorboard': 'tensorboard', 'wandb': 'wandb', 'mlflow': 'mlflow', 'comet_ml': 'comet-ml', 'aim': 'aim',
    'clearml': 'clearml', 'dvclive': 'dvclive', 'swanlab': 'swanlab', 'trackio': 'trackio',
}


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def open_log(output: Path, name: str) -> logging.Logger:
    """A logger that appends to `output/training.log`."""
    logger = logging.getLogger(f'vishub.training.{name}')
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(output / 'training.log', encoding='utf-8')
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    logger.addHandler(handler)
    return logger


def write_csv(path: Path, rows: List[Dict[str, Any]]) -> None:
    """Write the epochs' rows; columns are `LOG_FIELDS` and the validation's metrics."""
    fields = list(LOG_FIELDS) + sorted({key for row in rows for key in row} - set(LOG_FIELDS))
    with atomic_path(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(rows: Sequence[Dict[str, Any]], metric: str, path: Path) -> None:
    """Draw loss, validation metric and learning rate over the epochs, and save the picture.

    Args:
        rows: A dictionary an epoch: `epoch`, `train_loss`, `lr`, and, where it was validated, `metric` and `nll`.
        metric: Key of the validation metric.
        path: Picture file; its suffix tells the format.
    """
    import_extra('matplotlib', 'train')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout='constrained')
    FigureCanvasAgg(figure)
    panels = [('loss', ('train_loss', 'nll')), (metric, (metric,)), ('learning rate', ('lr',))]
    for axis, (title, keys) in zip(figure.subplots(1, len(panels)), panels):
        for key in keys:
            points = [(row['epoch'], row[key]) for row in rows if key in row]
            if points:
                name = {'train_loss': 'training', 'nll': 'validation'}.get(key, key)
                axis.plot(*zip(*points), marker='o', markersize=3, label=name)
        axis.set(title=title, xlabel='epoch')
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def check_trackers(names: Sequence[str]) -> None:
    """See that the trackers exist and are installed, before anything is trained.

    Raises:
        InputError: If Accelerate knows no tracker of a name.
        MissingExtraError: If a tracker's package is missing; says what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"tracker '{name}' is unknown; choose one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            extra = " (or 'vishub[train]')" if name == 'tensorboard' else ''
            raise MissingExtraError(
                f"tracker '{name}' needs a package that is not installed: pip install '{TRACKERS[name]}'{extra}")


def start_trackers(accelerator: Any, options: Dict[str, Any]) -> None:
    """Open the trackers that `accelerator` was made with, and store the run's options (JSON types) with them."""
    if accelerator.log_with:
        accelerator.init_trackers('tracking', config={
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in options.items()})
