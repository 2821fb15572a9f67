"""How vishub talks to a Hub: the huggingface-hub client, its settings as they are, its errors as one sentence each.

HF_ENDPOINT, HF_TOKEN (or `hf auth login`), HF_HUB_OFFLINE, HF_HUB_CACHE and HF_HOME, HTTP_PROXY and HTTPS_PROXY, and
HF_HUB_DOWNLOAD_TIMEOUT mean what they mean to huggingface-hub: it reads them.
"""
import contextlib
import os
from typing import Iterator, List, Optional, Tuple

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import get_session, validate_repo_id

from vishub.errors import InputError, WeightsNotFoundError

__all__ = ['api', 'endpoint', 'is_offline', 'one_sentence', 'patience', 'split_hub_id']

# Seconds of silence after which an upload counts as stalled; the client itself would wait for ever.
_PATIENCE = 60


def endpoint() -> Optional[str]:
    """The Hub that HF_ENDPOINT names now, or None for the client's own choice."""
    return os.environ.get('HF_ENDPOINT') or None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask a Hub."""
    return os.environ.get('HF_HUB_OFFLINE', '').lower() in ('1', 'true', 'yes', 'on')


def api() -> HfApi:
    """The client, for the Hub of HF_ENDPOINT and the user of HF_TOKEN or of `hf auth login`."""
    return HfApi(endpoint=endpoint(), library_name='vishub')


def split_hub_id(hub_id: str) -> Tuple[str, Optional[str]]:
    """`hf-hub:ORG/NAME[@revision]`, with or without `hf-hub:`, as (`ORG/NAME`, revision or None).

    Raises:
        InputError: If it is no such name.
    """
    repository, at, revision = hub_id.removeprefix('hf-hub:').partition('@')
    try:
        validate_repo_id(repository)
    except hub_errors.HFValidationError:
        repository = ''
    if repository.count('/') != 1 or (at and not revision):
        raise InputError(
            f"'{hub_id}' is no name of a Hub repository: give ORG/NAME, letters, digits, '-', '_' and '.' only, "
            'and @REVISION behind it for a branch, tag or commit'
        )
    return repository, revision or None


@contextlib.contextmanager
def one_sentence(subject: str) -> Iterator[None]:
    """Turn whatever the client raises about `subject` (`ORG/NAME`, or what is being done) into an InputError."""
    try:
        yield
    except (InputError, WeightsNotFoundError):
        raise
    except Exception as error:
        sentence = _sentence(error, subject)
        if sentence is None:
            raise
        raise InputError(sentence) from error


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """End requests on which nothing has come for a minute, or for HF_HUB_DOWNLOAD_TIMEOUT seconds where that is set."""
    session = get_session()
    before = getattr(session, 'timeout', None)
    if not hasattr(session, 'timeout'):  # huggingface-hub before 1.0: requests, which has no such setting
        yield
        return
    own = os.environ.get('HF_HUB_DOWNLOAD_TIMEOUT')
    session.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT if own else _PATIENCE
    try:
        yield
    finally:
        session.timeout = before


def _sentence(error: BaseException, subject: str) -> Optional[str]:
    """What went wrong, or None for a fault that is not the Hub's or the line's."""
    where = endpoint() or constants.ENDPOINT
    chain = _causes(error)
    status = next(filter(None, map(_status, chain)), None)

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if caused_by(hub_errors.OfflineModeIsEnabled) or (is_offline() and caused_by(hub_errors.LocalEntryNotFoundError)):
        return f'{subject}: it is not in the Hub cache, and HF_HUB_OFFLINE forbids to ask {where}'
    if caused_by(hub_errors.LocalTokenNotFoundError):
        return f'{where} asks who you are: set HF_TOKEN to a token that may write, or run `hf auth login`'
    if caused_by(hub_errors.RevisionNotFoundError):
        return f'{subject}: there is no such branch, tag or commit at {where}'
    if caused_by(hub_errors.GatedRepoError):
        return f'{subject}: its owner wants to be asked first; ask for access on {where}'
    if caused_by(hub_errors.RepositoryNotFoundError):
        return (f'{subject}: there is no such repository at {where}, or it is private '
                'and HF_TOKEN is not set to a token that may read it')
    if status == 401:
        return f'{where} does not know the token: set HF_TOKEN to a valid one, or run `hf auth login`'
    if status == 403:
        return f'{subject}: your token may not write there; make one with write access to that name at {where}'
    if status is not None and status >= 500:
        return f'{subject}: {where} is out of order (HTTP {status}); try again later'
    if caused_by(hub_errors.EntryNotFoundError) and not caused_by(hub_errors.LocalEntryNotFoundError):
        return f'{subject}: {where} has the repository, but not the file'
    if status is not None:
        said = next((getattr(cause, 'server_message', None) for cause in chain if _status(cause)), None)
        return f'{subject}: {where} refused it (HTTP {status}{f": {said}" if said else ""})'
    if any('Timeout' in type(cause).__name__ for cause in chain):
        return f'{subject}: {where} does not answer in time; try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds'
    if any(type(cause).__module__.split('.')[0] in ('httpx', 'httpcore', 'requests', 'urllib3') for cause in chain):
        return f'{subject}: the connection to {where} failed ({chain[-1] or type(chain[-1]).__name__})'
    if isinstance(error, (hub_errors.LocalEntryNotFoundError, ConnectionError)):
        return f'{subject}: {where} cannot be reached, and it is not in the Hub cache'
    if isinstance(error, OSError) and 'Consistency check' in str(error):
        return f'{subject}: the file came incomplete from {where}; try again'
    return None


def _causes(error: BaseException) -> List[BaseException]:
    """The error and those behind it, outermost first."""
    chain = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None and behind not in chain:
        chain.append(behind)
    return chain


def _status(error: BaseException) -> Optional[int]:
    """The HTTP status that the Hub answered with, or None if it is no such error."""
    return getattr(getattr(error, 'response', None), 'status_code', None)
