"""Find weights: `weights/` of the checkout or of the wheel, then the Hub cache, then the Hub; verified, never guessed.

Only `model.safetensors` is ever read: nothing here unpickles.
"""
import dataclasses
import json
import os
from pathlib import Path
from typing import Dict, List, Optional, Union

from timm.models import PretrainedCfg

from vishub import catalog
from vishub.errors import WeightsNotFoundError
from vishub.files import sha256

__all__ = [
    'WEIGHTS_FILE', 'available', 'recorded_checksum', 'resolve', 'verify', 'weights_folder', 'weights_folders',
    'what_exists',
]

WEIGHTS_FILE = 'model.safetensors'
_PACKAGE = Path(__file__).resolve().parent.parent


def _roots() -> List[Path]:
    """Folders that hold `<arch>.<tag>/` folders: those of VISHUB_WEIGHTS, then the checkout's, then the wheel's."""
    checkout = _PACKAGE.parent
    # The user's own weights, e.g. fine-tuned ones: folders separated as in PATH.
    roots = [Path(root).expanduser() for root in os.environ.get('VISHUB_WEIGHTS', '').split(os.pathsep) if root]
    if (checkout / 'pyproject.toml').is_file():  # else the parent is site-packages, whose `weights` is not ours
        roots.append(checkout / 'weights')
    return roots + [_PACKAGE / '_weights']


def weights_folders() -> Dict[str, Path]:
    """The weights that came with the checkout or the wheel: name `<arch>.<tag>` -> folder, in alphabetical order."""
    found: Dict[str, Path] = {}
    for root in _roots():
        for file in sorted(root.glob(f'*/{WEIGHTS_FILE}')):
            found.setdefault(file.parent.name, file.parent)
    return dict(sorted(found.items()))


def weights_folder(model: str) -> Optional[Path]:
    """The folder of a model's weights, given as a path, as `local-dir:path` or by name; None if there is none."""
    folder = Path(model.removeprefix('local-dir:'))
    if (folder / 'config.json').is_file():
        return folder
    return weights_folders().get(model.removeprefix('vishub/'))


def available() -> List[str]:
    """Names of all weights there are: those of the catalogue and those in `weights/`."""
    return sorted({row.name for row in catalog.weights()} | set(weights_folders()))


def verify(file: Path, expected: str) -> None:
    """Check a file's SHA-256.

    Args:
        file: File to read.
        expected: 64 lower-case hexadecimal digits.

    Raises:
        WeightsNotFoundError: If it differs; the message has the file and both checksums.
    """
    actual = sha256(file)
    if actual != expected:
        raise WeightsNotFoundError(
            f'{file} is damaged or not the published file: its SHA-256 is {actual}, it should be {expected}. '
            'Delete it and fetch it again.'
        )


def resolve(name: str, cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> PretrainedCfg:
    """Turn a registered weight, or that of a name `hf-hub:owner/name[@revision]`, into a verified local file.

    Args:
        name: `<arch>.<tag>`, or `<arch>` if the architecture has no weights.
        cfg: Its configuration; `hf_hub_id` says where on the Hub it is (`owner/name[@revision]`). If its `source` is
            `hf-hub`, it is the repository that the user named, and only that one is asked.
        cache_dir: Hub cache to use instead of the default one.

    Returns:
        `cfg` with `file` set to a `model.safetensors` whose SHA-256 was checked.

    Raises:
        WeightsNotFoundError: If there are no such weights, they cannot be reached, or a file is damaged.
    """
    if cfg.source == 'hf-hub' and cfg.hf_hub_id:
        from vishub.hub.download import fetch_repository
        # Without its source, timm takes the file.
        return dataclasses.replace(cfg, source=None, file=str(fetch_repository(cfg.hf_hub_id, cache_dir)))
    expected = next((row.sha256 for row in catalog.weights() if row.name == name), None)
    folder = weights_folders().get(name)
    if folder is not None:
        file = folder / WEIGHTS_FILE
        verify(file, expected or recorded_checksum(folder))
    elif expected is not None and cfg.hf_hub_id:
        from vishub.hub.download import fetch
        file = fetch(name, cfg.hf_hub_id, expected, cache_dir)
    else:
        raise WeightsNotFoundError(f"There are no pretrained weights for '{name}'. {what_exists()}")
    return dataclasses.replace(cfg, file=str(file))


def recorded_checksum(folder: Path) -> str:
    """The checksum that `save_folder` noted: all there is for weights that are not in the catalogue yet."""
    try:
        return json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))['sha256']
    except (OSError, ValueError, KeyError) as error:
        raise WeightsNotFoundError(
            f'{folder / WEIGHTS_FILE} cannot be verified: neither the catalogue nor {folder / "metrics.json"} '
            'has its SHA-256.'
        ) from error


def what_exists() -> str:
    names = available()
    return f'Weights exist for: {", ".join(names)}.' if names else 'No weights exist yet for any model.'
