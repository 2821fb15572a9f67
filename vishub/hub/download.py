"""Fetch weights from the Hub, or from its cache here; verified, and what is damaged leaves the cache again."""
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Union

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError

from vishub import catalog
from vishub.errors import InputError, WeightsNotFoundError
from vishub.hub import client
from vishub.hub.find import WEIGHTS_FILE, recorded_checksum, verify, weights_folders, what_exists

__all__ = ['download', 'fetch', 'fetch_repository', 'repository_info']


def fetch(
        name: str,
        hub_id: str,
        expected: str,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """A verified `model.safetensors` of the catalogue from the Hub cache, else from the Hub.

    The environment is read at each call: HF_ENDPOINT names another Hub, HF_HUB_OFFLINE=1 forbids asking one.

    Args:
        name: `<arch>.<tag>`, for messages.
        hub_id: `owner/name`, optionally with `@revision`.
        expected: SHA-256 as 64 lower-case hexadecimal digits.
        cache_dir: Hub cache; by default that of huggingface_hub.

    Raises:
        WeightsNotFoundError: If it is not cached and the Hub cannot or may not be asked, or if it is damaged.
    """
    repository, _, revision = hub_id.partition('@')
    cached = try_to_load_from_cache(repository, WEIGHTS_FILE, cache_dir=cache_dir, revision=revision or None)
    if isinstance(cached, str):  # otherwise None, or a mark that the repository was seen without that file
        try:
            verify(Path(cached), expected)
            return Path(cached)
        except WeightsNotFoundError:
            if client.is_offline():
                raise
            # Perhaps an older revision: let the Hub say whether there is a newer one.
    try:
        file = _get(repository, WEIGHTS_FILE, revision or None, cache_dir)
    except Exception as error:  # the client's errors come from several libraries; to us all mean: out of reach
        why = 'and HF_HUB_OFFLINE forbids asking the Hub' if client.is_offline() else (
            f'and the Hub did not give it ({error})')
        raise WeightsNotFoundError(
            f"The weights '{name}' are neither in weights/ nor in the Hub cache, {why}. {what_exists()}"
        ) from error
    _verify_or_remove(file, expected)
    return file


def fetch_repository(hub_id: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """A verified `model.safetensors` of any Hub repository.

    What it is verified against: the SHA-256 in the repository's own metrics.json if it has one (all that
    `vishub publish` made do), and the checksum under which the Hub keeps the file.

    Args:
        hub_id: `ORG/NAME[@revision]`, with or without `hf-hub:`.
        cache_dir: Hub cache; by default that of huggingface_hub.

    Raises:
        WeightsNotFoundError: If the file is damaged (it then leaves the cache) or not there.
        InputError: If the repository or the Hub is out of reach.
    """
    repository, revision = client.split_hub_id(hub_id)
    with client.one_sentence(hub_id):
        try:
            file = _get(repository, WEIGHTS_FILE, revision, cache_dir)
        except EntryNotFoundError as error:
            if isinstance(error, FileNotFoundError):  # the client's way to say: not in the cache, and no Hub to ask
                raise
            raise WeightsNotFoundError(
                f'{hub_id} has no {WEIGHTS_FILE}, and vishub loads nothing else: a pickle could run code') from error
        _verify_or_remove(file, _published_checksum(repository, file, cache_dir))
    return file


def download(name: str, output: Optional[Union[str, Path]] = None) -> Path:
    """Bring a folder of weights onto this machine: all files of its Hub repository, verified.

    Args:
        name: Weights of the catalogue (`favit_b2.cifar10`), which come from `weights/` where they are already here,
            or a Hub repository `hf-hub:ORG/NAME[@revision]`.
        output: Folder in which the folder `<arch>.<tag>/` (or `NAME/`) is made: give it to VISHUB_WEIGHTS, or the
            one in it to `local-dir:`. None leaves the files in the Hub cache.

    Returns:
        The folder with `model.safetensors`, `config.json` and the rest.

    Raises:
        vishub.UnknownNameError: If the catalogue has no such weights.
        InputError: If the Hub cannot give them, or `output` holds another file of that name.
        WeightsNotFoundError: If what came is damaged.
    """
    expected = None
    if '/' in name.removeprefix('vishub/') or name.startswith('hf-hub:'):
        hub_id = name
    else:
        row = catalog.find(name.removeprefix('vishub/'))
        if not isinstance(row, catalog.Weight):
            have = ', '.join(weight.name for weight in catalog.weights(row.name)) or 'none'
            raise InputError(f"'{name}' is an architecture: name its weights ({have})")
        hub_id, expected = row.hub_id, row.sha256
    here = weights_folders().get(name.removeprefix('vishub/'))
    if here is not None:
        verify(here / WEIGHTS_FILE, expected or recorded_checksum(here))
        source = here
    else:
        source = _snapshot(hub_id, expected)
    if output is None:
        return source
    return _copy_folder(source, Path(output) / client.split_hub_id(hub_id)[0].partition('/')[2])


def repository_info(hub_id: str) -> Dict[str, Any]:
    """What a Hub repository holds, as plain JSON values.

    Args:
        hub_id: `ORG/NAME[@revision]`, with or without `hf-hub:`.

    Returns:
        `repository`, `revision` (the commit), `private`, `last_modified`, `files` (path -> bytes), and from its
        config.json and metrics.json, each None where they do not say: `architecture`, `num_classes`, `num_params`,
        `input`, `licence`, `data`, `metrics` and `sha256`.

    Raises:
        InputError: If the repository or the Hub is out of reach.
    """
    repository, revision = client.split_hub_id(hub_id)
    with client.one_sentence(hub_id), client.patience():
        hub = client.api()
        info = hub.model_info(repository, revision=revision)
        files = {
            entry.path: entry.size
            for entry in hub.list_repo_tree(repository, recursive=True, revision=info.sha) if hasattr(entry, 'size')
        }
        config, metrics = (
            _read_json(_get(repository, name, info.sha, None)) if name in files else {}
            for name in ('config.json', 'metrics.json')
        )
    cfg = config.get('pretrained_cfg', {})
    return {
        'repository': repository,
        'revision': info.sha,
        'private': info.private,
        'last_modified': info.last_modified.isoformat() if info.last_modified else None,
        'architecture': config.get('architecture'),
        'num_classes': config.get('num_classes'),
        'num_params': metrics.get('num_params'),
        'input': cfg.get('input_size'),
        'licence': cfg.get('license'),
        'data': metrics.get('data'),
        'metrics': metrics.get('metrics'),
        'sha256': metrics.get('sha256'),
        'files': files,
    }


def _get(repository: str, file: str, revision: Optional[str], cache_dir: Optional[Union[str, Path]]) -> Path:
    return Path(hf_hub_download(
        repository,
        file,
        revision=revision,
        cache_dir=cache_dir,
        endpoint=client.endpoint(),
        local_files_only=client.is_offline(),
        library_name='vishub',
    ))


def _snapshot(hub_id: str, expected: Optional[str]) -> Path:
    """All that `vishub publish` puts into a repository, in the Hub cache; the weights first, and verified."""
    from huggingface_hub import snapshot_download

    from vishub.hub.publish import PUBLISHED

    repository, revision = client.split_hub_id(hub_id)
    weights = fetch_repository(hub_id)
    if expected is not None:
        _verify_or_remove(weights, expected)
    with client.one_sentence(hub_id):
        return Path(snapshot_download(
            repository,
            revision=_commit_of(weights) or revision,
            allow_patterns=list(PUBLISHED),
            endpoint=client.endpoint(),
            local_files_only=client.is_offline(),
            library_name='vishub',
        ))


def _commit_of(file: Path) -> Optional[str]:
    """The commit of a cached file, …/snapshots/<commit>/<file>, so that what is asked for next is of the same one."""
    return file.parent.name if re.fullmatch('[0-9a-f]{40}', file.parent.name) else None


def _published_checksum(repository: str, file: Path, cache_dir: Optional[Union[str, Path]]) -> Optional[str]:
    """The SHA-256 in the metrics.json beside a cached file; None if there is none."""
    try:
        noted = _read_json(_get(repository, 'metrics.json', _commit_of(file), cache_dir)).get('sha256')
    except (EntryNotFoundError, InputError):  # another's repository, or offline with the weights alone
        return None
    return noted if isinstance(noted, str) else None


def _verify_or_remove(file: Path, expected: Optional[str]) -> None:
    """Check a file of the cache against `expected` and against the name that the Hub gave its content.

    That name is its SHA-256, or for a small file in git the blob's SHA-1; the cache keeps the content under it.
    """
    blob = file.resolve()
    try:
        if expected is not None:
            verify(file, expected)
        elif re.fullmatch('[0-9a-f]{64}', blob.name):
            verify(file, blob.name)
        elif re.fullmatch('[0-9a-f]{40}', blob.name) and _git_blob(file) != blob.name:
            raise WeightsNotFoundError(f'{file} is damaged: it is not the file that the Hub names {blob.name}')
    except WeightsNotFoundError:
        for path in {file, blob}:
            path.unlink(missing_ok=True)
        raise


def _git_blob(file: Path) -> str:
    content = file.read_bytes()  # git holds small files only
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise InputError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise InputError(f'{path} holds no JSON object')
    return content


def _copy_folder(source: Path, target: Path) -> Path:
    """Copy the files of a folder, each whole or not at all; what is there already and the same stays."""
    if target.resolve() == source.resolve():
        return target
    if target.exists() and not target.is_dir():
        raise InputError(f"'{target}' is a file: choose another folder with --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name}-'))
    try:
        for file in sorted(path for path in source.rglob('*') if path.is_file()):
            place = temporary / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)  # through the cache's links
        temporary.chmod(0o755)
        if target.exists():
            for file in sorted(path for path in temporary.rglob('*') if path.is_file()):
                place = target / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
