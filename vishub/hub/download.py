"""Fetch weights from the Hub, or from its cache on this machine."""
import os
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from vishub.errors import WeightsNotFoundError
from vishub.hub.find import WEIGHTS_FILE, verify, what_exists

__all__ = ['fetch']


def fetch(
        name: str,
        hub_id: str,
        expected: str,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """A verified `model.safetensors` from the Hub cache, else from the Hub.

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
    offline = os.environ.get('HF_HUB_OFFLINE', '').lower() in ('1', 'true', 'yes', 'on')
    cached = try_to_load_from_cache(repository, WEIGHTS_FILE, cache_dir=cache_dir, revision=revision or None)
    if isinstance(cached, str):  # otherwise None, or a mark that the repository was seen without that file
        try:
            verify(Path(cached), expected)
            return Path(cached)
        except WeightsNotFoundError:
            if offline:
                raise
            # Perhaps an older revision: let the Hub say whether there is a newer one.
    try:
        file = Path(hf_hub_download(
            repository,
            WEIGHTS_FILE,
            revision=revision or None,
            cache_dir=cache_dir,
            endpoint=os.environ.get('HF_ENDPOINT') or None,
            local_files_only=offline,
            library_name='vishub',
        ))
    except Exception as error:  # the client's errors come from several libraries; to us all mean: out of reach
        why = 'and HF_HUB_OFFLINE forbids asking the Hub' if offline else f'and the Hub did not give it ({error})'
        raise WeightsNotFoundError(
            f"The weights '{name}' are neither in weights/ nor in the Hub cache, {why}. {what_exists()}"
        ) from error
    verify(file, expected)
    return file
