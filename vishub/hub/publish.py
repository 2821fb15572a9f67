"""Publish weights folders, and the demo as a Space, to the Hugging Face Hub.

One commit a repository, so that a visitor sees the old files or all new ones. Only what differs from the Hub is sent:
publishing twice sends nothing, and after a kill the same command goes on where it was (the Hub keeps the large files
that had arrived).
"""
import contextlib
import hashlib
import importlib.metadata
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

import vishub
from vishub.errors import InputError
from vishub.files import sha256
from vishub.hub import client
from vishub.hub.card import model_card
from vishub.hub.find import WEIGHTS_FILE, weights_folders

__all__ = ['PUBLISHED', 'SPACE_NAME', 'Published', 'publish', 'publish_all', 'space_files']

# Of a weights folder only these go to the Hub: never a stray log, checkpoint or secret.
PUBLISHED = (WEIGHTS_FILE, 'config.json', 'metrics.json', 'README.md', '*.png', '*.jpg', '*.svg', 'LICENSE*')
_NEEDED = (WEIGHTS_FILE, 'config.json', 'metrics.json')
SPACE_NAME = 'demo'

# path in the repository -> a file, or its content
Files = Mapping[str, Union[Path, bytes]]


@dataclass(frozen=True)
class Published:
    """What happened, or with `dry_run` would happen, to one repository.

    Attributes:
        repository: `ORG/NAME`.
        kind: `model` or `space`.
        url: Its page.
        commit: The commit that now holds the files; None in a dry run.
        uploaded: Paths that were new or different.
        unchanged: Paths that the Hub had already.
        size: Bytes of `uploaded`.
        dry_run: Nothing was sent.
        compared: The Hub was asked what it has; False in a dry run that could not reach it.
    """
    repository: str
    kind: str
    url: str
    commit: Optional[str]
    uploaded: Tuple[str, ...]
    unchanged: Tuple[str, ...]
    size: int
    dry_run: bool = False
    compared: bool = True

    def to_dict(self) -> Dict[str, Any]:
        """The fields, ready for `json.dumps`."""
        return {**asdict(self), 'uploaded': list(self.uploaded), 'unchanged': list(self.unchanged)}


def publish(
        folder: Union[str, Path],
        repo: str,
        *,
        private: bool = False,
        revision: Optional[str] = None,
        dry_run: bool = False,
) -> Published:
    """Publish a weights folder as a Hub repository that timm, `vishub.create_model` and `vishub.pipeline` can load.

    The model card is generated anew from config.json and metrics.json, with a snippet that loads `repo`. Files on the
    Hub that the folder does not have stay.

    Args:
        folder: Folder written by `vishub train` or `vishub.hub.save_folder`.
        repo: `ORG/NAME` (or `USER/NAME`); made if it is not there.
        private: Make it a private one.
        revision: Branch to commit to, made if it is not there; `main` by default.
        dry_run: Check the folder and say what would be sent; needs no token.

    Raises:
        InputError: If the folder is no weights folder or its checksum does not match (both before anything is sent),
            the name is no repository name, the token may not write, or the Hub is out of reach.
    """
    repository, at = client.split_hub_id(repo)
    if at:
        raise InputError(f"'{repo}': name the branch with revision={at!r} (--revision {at})")
    files = weights_files(folder, repository, revision)
    return _send(repository, 'model', files, private, revision, dry_run)


def publish_all(org: str, *, private: bool = False, dry_run: bool = False) -> Iterator[Published]:
    """Publish every folder of `weights/` as `ORG/<arch>.<tag>`, then the demo as the Space `ORG/demo`.

    All folders are checked before the first is sent. Yields one `Published` as soon as a repository is done.

    Args:
        org: Organisation or user; the catalogue looks for its weights at `vishub`.
        private: Make new repositories private ones.
        dry_run: Say what would be sent; needs no token.

    Raises:
        InputError: As `publish`; also if there are no weights.
    """
    folders = weights_folders()
    if not folders:
        raise InputError('there are no weights to publish: weights/ is empty')
    plan: List[Tuple[str, str, Files]] = []
    for name, folder in folders.items():
        repository, _ = client.split_hub_id(f'{org}/{name}')
        plan.append((repository, 'model', weights_files(folder, repository)))
    plan.append((f'{org}/{SPACE_NAME}', 'space', space_files()))
    for repository, kind, files in plan:
        yield _send(repository, kind, files, private, None, dry_run)


def weights_files(folder: Union[str, Path], repository: str, revision: Optional[str] = None) -> Dict[str, Any]:
    """The files of a weights folder as they go to the Hub, with a model card for `repository`; checked.

    Raises:
        InputError: If a file is missing, no JSON, or not the one that metrics.json has the checksum of.
    """
    folder = Path(folder)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"'{folder}' is no weights folder: {', '.join(missing)} missing; `vishub train` writes complete ones")
    config, metrics = (_read_object(folder / name) for name in ('config.json', 'metrics.json'))
    if not isinstance(config.get('architecture'), str) or not isinstance(config.get('pretrained_cfg'), dict):
        raise InputError(f"'{folder / 'config.json'}' is not timm's: it names no architecture or no pretrained_cfg")
    absent = [key for key in ('sha256', 'size', 'num_params') if key not in metrics]
    if absent:
        raise InputError(f"'{folder / 'metrics.json'}' lacks {', '.join(absent)}: save the model again with vishub")
    actual = sha256(folder / WEIGHTS_FILE)
    if actual != metrics['sha256']:
        raise InputError(
            f"'{folder / WEIGHTS_FILE}' is damaged or another file: its SHA-256 is {actual}, metrics.json has "
            f'{metrics["sha256"]}; nothing was sent'
        )
    files: Dict[str, Any] = {
        path.name: path for pattern in PUBLISHED for path in sorted(folder.glob(pattern)) if path.is_file()}
    pinned = repository if revision in (None, 'main') else f'{repository}@{revision}'
    files['README.md'] = model_card(folder.name, config, metrics, repository=pinned).encode()
    return files


def space_files() -> Dict[str, Any]:
    """The demo as a Space that needs nothing but what it carries: laid out as in the wheel, started by `app.py`.

    Raises:
        InputError: If this installation has no demo.
    """
    package = Path(vishub.__file__).resolve().parent
    demo = next((place for place in (package / '_app', package.parent / 'app') if (place / 'main.py').is_file()), None)
    if demo is None:
        raise InputError('this installation of vishub has no demo to publish')
    files: Dict[str, Any] = {}
    for root, target in ((package, 'vishub'), (demo, 'vishub/_app')):
        for path in sorted(root.rglob('*')):
            inside = path.relative_to(root)
            if path.is_file() and not {'__pycache__', '_app', '_weights'} & set(inside.parts) and path.suffix != '.pyc':
                files[f'{target}/{inside.as_posix()}'] = path
    for name, folder in weights_folders().items():
        for pattern in PUBLISHED:
            for path in sorted(folder.glob(pattern)):
                files[f'vishub/_weights/{name}/{path.name}'] = path
    card = (demo / 'README.md').read_text(encoding='utf-8')
    files['README.md'] = re.sub(r'(?m)^app_file:.*$', 'app_file: app.py', card, count=1).encode()
    files['app.py'] = (
        b'"""The demo of vishub as a Space; the platform names the address in GRADIO_SERVER_NAME and _PORT."""\n'
        b"import runpy\n\nrunpy.run_module('vishub._app', run_name='__main__', alter_sys=True)\n"
    )
    files['requirements.txt'] = ''.join(f'{line}\n' for line in _requirements('app')).encode()
    return files


def _requirements(extra: str) -> List[str]:
    """What vishub and one of its extras need, as lines of a requirements.txt."""
    lines = []
    for line in importlib.metadata.requires('vishub') or []:
        requirement, _, marker = line.partition(';')
        if not marker or re.search(rf'''extra\s*==\s*['"]{extra}['"]''', marker):
            lines.append(requirement.strip())
    # A Space brings the gradio of its front matter.
    return sorted(line for line in lines if not line.startswith('gradio'))


def _send(
        repository: str,
        kind: str,
        files: Files,
        private: bool,
        revision: Optional[str],
        dry_run: bool,
) -> Published:
    hub = client.api()
    url = f'{hub.endpoint}/{"spaces/" if kind == "space" else ""}{repository}'
    with client.one_sentence(repository), client.patience():
        if dry_run:
            try:
                with client.one_sentence(repository):
                    changed, compared = _changed(hub, repository, kind, revision, files), True
            except InputError:  # no network, or none allowed: a rehearsal needs none
                changed, compared = list(files), False
            return _report(repository, kind, url, None, files, changed, dry_run=True, compared=compared)
        hub.whoami()  # one quick request tells a wrong token, a wrong endpoint and a Hub that is silent
        hub.create_repo(
            repository, repo_type=kind, exist_ok=True, private=True if private else None,
            space_sdk='gradio' if kind == 'space' else None)
        info = hub.repo_info(repository, repo_type=kind)
        if private and info.private is False:
            raise InputError(f'{repository} is there already and is public: nothing was sent; make it private first')
        if revision not in (None, 'main'):
            hub.create_branch(repository, branch=revision, repo_type=kind, exist_ok=True)
        changed = _changed(hub, repository, kind, revision, files)
        if changed:
            commit = _commit(hub, repository, kind, revision, {path: files[path] for path in changed})
        else:
            commit = hub.repo_info(repository, repo_type=kind, revision=revision).sha or ''
    return _report(repository, kind, url, commit, files, changed)


def _commit(hub: HfApi, repository: str, kind: str, revision: Optional[str], files: Files) -> str:
    """Upload the files and commit them together; returns the commit."""
    def send(place: Callable[[Path], Any]) -> str:
        return hub.create_commit(
            repository,
            [CommitOperationAdd(path, place(content) if isinstance(content, Path) else content)
             for path, content in files.items()],
            commit_message=f'Publish with vishub {vishub.__version__}',
            repo_type=kind,
            revision=revision,
        ).oid

    try:
        return send(lambda path: str(path.resolve()))
    except ConnectionError as error:
        if not ('xet-write-token' in str(error) and '404' in str(error)):
            raise
    # A Hub that has no Xet storage. The client knows LFS, too, and takes it for files that are open already.
    with contextlib.ExitStack() as opened:
        return send(lambda path: opened.enter_context(open(path, 'rb')))


def _changed(hub: HfApi, repository: str, kind: str, revision: Optional[str], files: Files) -> List[str]:
    """Paths whose content is not what the Hub has, smallest first; all of them if there is no such repository yet."""
    try:
        there = {
            entry.path: entry for entry in hub.list_repo_tree(
                repository, recursive=True, revision=revision, repo_type=kind)
        }
    except (RepositoryNotFoundError, RevisionNotFoundError):
        there = {}
    changed = [path for path, content in files.items() if not _same(content, there.get(path))]
    return sorted(changed, key=lambda path: (_size(files[path]), path))


def _same(content: Union[Path, bytes], entry: Any) -> bool:
    """Whether the Hub's entry is that content: SHA-256 of what LFS holds, git's blob name of what git holds."""
    if entry is None or getattr(entry, 'size', None) != _size(content):
        return False
    if entry.lfs:
        stored = entry.lfs.sha256
        return stored == (hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content))
    body = content if isinstance(content, bytes) else content.read_bytes()
    return entry.blob_id == hashlib.sha1(b'blob %d\0' % len(body) + body).hexdigest()


def _size(content: Union[Path, bytes]) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _report(
        repository: str,
        kind: str,
        url: str,
        commit: Optional[str],
        files: Files,
        changed: List[str],
        dry_run: bool = False,
        compared: bool = True,
) -> Published:
    return Published(
        repository, kind, url, commit,
        uploaded=tuple(changed),
        unchanged=tuple(path for path in files if path not in set(changed)),
        size=sum(_size(files[path]) for path in changed),
        dry_run=dry_run,
        compared=compared,
    )


def _read_object(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds no JSON object")
    return content
