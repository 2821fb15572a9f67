"""A Hugging Face Hub on loopback, in memory, for the real huggingface-hub client over real HTTP.

    with HubServer() as hub:
        hub.tokens['hf_mine'] = User('me', write=True)
        os.environ['HF_ENDPOINT'] = hub.url
        …
        hub.fail('break', 'model.safetensors', after=1000)   # the next GET of that file ends after 1000 bytes

It keeps repositories (models, data sets and Spaces) as lists of commits, branches and tags, stores uploads by their
SHA-256 as Git LFS does, and writes down every request. Xet's storage is a folder that the client writes to itself, if
`hub.xet` names one; what lies there cannot be downloaded again. With `hub.lfs_from = None` all files come inside the
commit.
"""
import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

__all__ = ['HubServer', 'Repository', 'User']


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and whether it may write."""
    name: str
    write: bool = True


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit."""
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's own name of the file: that of the content, or of the small pointer file that LFS commits."""
        content = self.content
        if self.lfs:
            content = (f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n'
                       f'size {len(self.content)}\n').encode()
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Repository:
    """Commits (oid -> path -> file), and the names that point at them."""
    kind: str = 'model'
    private: bool = False
    sdk: Optional[str] = None
    commits: Dict[str, Dict[str, StoredFile]] = field(default_factory=dict)
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    messages: List[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit('main', {}, 'initial commit')

    def commit(self, branch: str, files: Dict[str, StoredFile], message: str) -> str:
        seed = f'{self.kind} {branch} {message} {len(self.commits)} {sorted((p, f.etag) for p, f in files.items())}'
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> Optional[str]:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.resolve(revision)].items()}


@dataclass
class Fault:
    """What goes wrong, for which requests, how often.

    kind: `break` (the connection ends after `after` bytes of the body), `stall` (nothing is said for `seconds`),
    `corrupt` (the last byte of the body is another one), or `status` (an answer with `code`).
    """
    kind: str
    path: str
    method: str
    times: int
    after: int
    seconds: float
    code: int


class HubServer:
    """Serves at `url` between `__enter__` and `__exit__`; everything in it may be looked at and changed meanwhile.

    Attributes:
        tokens: Token -> whom it belongs to. No token may read what is public.
        repositories: `(kind, 'owner/name')` -> repository; kind is `model`, `dataset` or `space`.
        requests: `(method, path, headers)` of every request, oldest first.
        objects: SHA-256 -> content: what came through LFS.
        lfs_from: Files of at least so many bytes go through LFS; None for none.
        xet: Folder to which a client with Xet on writes such files instead; None for a Hub without Xet.
    """

    def __init__(self):
        self.tokens: Dict[str, User] = {}
        self.repositories: Dict[Tuple[str, str], Repository] = {}
        self.requests: List[Tuple[str, str, Dict[str, str]]] = []
        self.objects: Dict[str, bytes] = {}
        self.lfs_from: Optional[int] = 1_000_000
        self.xet: Optional[Path] = None
        self.faults: List[Fault] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()  # wakes those that stall
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(
            self, kind: str, path: str, *, method: str = 'GET', times: int = 1,
            after: int = 0, seconds: float = 30.0, code: int = 503,
    ) -> None:
        """Let the next `times` requests of `method` whose path contains `path` go wrong (see `Fault`)."""
        self.faults.append(Fault(kind, path, method, times, after, seconds, code))

    def put(self, name: str, files: Dict[str, bytes], *, kind: str = 'model', private: bool = False) -> Repository:
        """Add files to a repository, made if need be, without a client."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, private))
        stored = {path: self.stored(content) for path, content in files.items()}
        repository.commit('main', {**repository.commits[repository.branches['main']], **stored}, 'put')
        return repository

    def stored(self, content: bytes) -> StoredFile:
        return StoredFile(content, self.lfs_from is not None and len(content) >= self.lfs_from)

    def count(self, method: str, part: str) -> int:
        """How many requests of that method had `part` in their path."""
        return sum(1 for used, path, _ in self.requests if used == method and part in path)

    def uploads(self) -> int:
        """How many requests changed something: LFS uploads and commits."""
        return self.count('PUT', '/lfs/') + self.count('POST', '/commit/')

    def take_fault(self, method: str, path: str) -> Optional[Fault]:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class _Answer(Exception):
    """Ends a request with an error answer."""

    def __init__(self, status: int, message: str, code: str = '', **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **headers}


def _handler(hub: HubServer):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        fault: Optional[Fault] = None

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.serve()

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def serve(self):
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                hub.requests.append((self.command, path, dict(self.headers)))
            # Read first, also where nothing is wanted: unread bytes would be taken for the next request.
            self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            self.fault = hub.take_fault(self.command, path)
            if self.fault and self.fault.kind == 'stall':
                hub.closing.wait(self.fault.seconds)
                self.close_connection = True
                return
            try:
                if self.fault and self.fault.kind == 'status':
                    raise _Answer(self.fault.code, 'out of order')
                self.user = self.who()
                for method, pattern, action in _ROUTES:
                    found = re.fullmatch(pattern, path)
                    if found and self.command in method:
                        action(self, **found.groupdict())
                        return
                raise _Answer(404, f'no such page: {path}')
            except _Answer as answer:
                self.send(b'', answer.status, answer.headers)

        def who(self) -> Optional[User]:
            """The user of the request's token; a token that nobody has is refused whatever is asked for."""
            given = self.headers.get('Authorization', '')
            if not given or self.path.startswith('/lfs/'):  # storage behind the Hub has its own, signed addresses
                return None
            user = hub.tokens.get(given.removeprefix('Bearer '))
            if user is None:
                raise _Answer(401, 'Invalid credentials in Authorization header')
            return user

        def send(self, body: bytes, status: int = 200, headers: Optional[Dict[str, str]] = None):
            fault = self.fault
            if fault and fault.kind == 'corrupt' and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.send_response(status)
            headers = {'Content-Length': str(len(body)), **(headers or {})}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == 'HEAD':
                return
            try:
                if fault and fault.kind == 'break':
                    self.wfile.write(body[:fault.after])
                    self.wfile.flush()
                    self.close_connection = True
                    return
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client has gone, as it may
                self.close_connection = True

        def send_json(self, content, status: int = 200):
            self.send(json.dumps(content).encode(), status, {'Content-Type': 'application/json'})

        def repository(self, kind: str, name: str, write: bool = False) -> Repository:
            found = hub.repositories.get((kind, name))
            if found is None or (found.private and self.user is None):
                # The real Hub does not tell strangers which repositories exist.
                raise _Answer(401 if self.user is None else 404, 'Repository not found', 'RepoNotFound')
            if write:
                self.needs_write()
            return found

        def needs_write(self):
            if self.user is None:
                raise _Answer(401, 'Invalid username or password.')
            if not self.user.write:
                raise _Answer(403, 'You do not have write access to this namespace')

        def commit_of(self, repository: Repository, revision: str) -> str:
            oid = repository.resolve(revision)
            if oid is None:
                raise _Answer(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
            return oid

        # What follows is one method a request of the client.

        def whoami(self):
            if self.user is None:
                raise _Answer(401, 'Invalid username or password.')
            self.send_json({'type': 'user', 'name': self.user.name, 'orgs': [],
                            'auth': {'accessToken': {'role': 'write' if self.user.write else 'read'}}})

        def create(self):
            self.needs_write()
            asked = json.loads(self.body)
            name = f'{asked.get("organization") or self.user.name}/{asked["name"]}'
            kind = asked.get('type') or 'model'
            url = f'{hub.url}/{_prefix(kind)}{name}'
            with hub.lock:
                exists = (kind, name) in hub.repositories
                if not exists:
                    private = asked.get('visibility') == 'private' or bool(asked.get('private'))
                    hub.repositories[kind, name] = Repository(kind, private, asked.get('sdk'))
            self.send_json({'url': url}, 409 if exists else 200)

        def delete(self):
            self.needs_write()
            asked = json.loads(self.body)
            name = f'{asked.get("organization") or self.user.name}/{asked["name"]}'
            self.repository(asked.get('type') or 'model', name)
            del hub.repositories[asked.get('type') or 'model', name]
            self.send_json({})

        def validate_yaml(self):
            self.send_json({'errors': [], 'warnings': []})

        def preupload(self, kind, name, revision):
            repository = self.repository(kind, name, write=True)
            existing = repository.commits[self.commit_of(repository, revision)]
            answer = []
            for file in json.loads(self.body)['files']:
                lfs = hub.lfs_from is not None and file['size'] >= hub.lfs_from
                old = existing.get(file['path'])
                answer.append({
                    'path': file['path'], 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False,
                    'oid': old.etag if old else None,
                })
            self.send_json({'files': answer})

        def xet_token(self, kind, name, revision):
            if hub.xet is None:
                raise _Answer(404, 'no such page')
            self.repository(kind, name, write=True)
            self.send_json({'accessToken': 'xet', 'exp': 4102444800, 'casUrl': f'local://{hub.xet}'})

        def lfs_batch(self, name, kind='model'):
            self.repository(kind, name, write=True)
            objects = []
            for entry in json.loads(self.body)['objects']:
                answer = {'oid': entry['oid'], 'size': entry['size']}
                if entry['oid'] not in hub.objects:
                    answer['actions'] = {
                        'upload': {'href': f'{hub.url}/lfs/{entry["oid"]}'},
                        'verify': {'href': f'{hub.url}/lfs-verify'},
                    }
                objects.append(answer)
            self.send_json({'transfer': 'basic', 'objects': objects})

        def lfs_batch_space(self, name):
            self.lfs_batch(name, 'space')

        def lfs_put(self, oid):
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Answer(400, 'the content is not what its name says')
            hub.objects[oid] = self.body
            self.send(b'')

        def lfs_verify(self):
            asked = json.loads(self.body)
            if len(hub.objects.get(asked['oid'], b'')) != asked['size']:
                raise _Answer(404, 'never arrived')
            self.send_json({})

        def commit(self, kind, name, revision):
            repository = self.repository(kind, name, write=True)
            files = dict(repository.commits[self.commit_of(repository, revision)])
            message = ''
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry['value']
                if entry['key'] == 'header':
                    message = value['summary']
                elif entry['key'] == 'file':
                    files[value['path']] = StoredFile(base64.b64decode(value['content']), lfs=False)
                elif entry['key'] == 'lfsFile':
                    if value['oid'] not in hub.objects:
                        raise _Answer(400, f'{value["path"]} was never uploaded')
                    files[value['path']] = StoredFile(hub.objects[value['oid']], lfs=True)
                elif entry['key'] == 'deletedFile':
                    files.pop(value['path'], None)
                else:
                    raise _Answer(400, f'what is {entry["key"]}?')
            oid = repository.commit(revision, files, message)
            self.send_json({'success': True, 'commitUrl': f'{hub.url}/{_prefix(kind)}{name}/commit/{oid}',
                            'commitOid': oid})

        def info(self, kind, name, revision='main'):
            repository = self.repository(kind, name)
            oid = self.commit_of(repository, revision)
            self.send_json({
                '_id': '0', 'id': name, 'modelId': name, 'sha': oid, 'private': repository.private, 'tags': [],
                'lastModified': '2026-11-22T00:00:00.000Z', 'createdAt': '2026-11-22T00:00:00.000Z', 'downloads': 0,
                'likes': 0, 'siblings': [{'rfilename': path} for path in repository.commits[oid]],
            })

        def tree(self, kind, name, revision):
            repository = self.repository(kind, name)
            parts = revision.split('/')
            ends = range(len(parts), 0, -1)  # a branch may have slashes, and a folder may follow
            end = next((end for end in ends if repository.resolve('/'.join(parts[:end]))), len(parts))
            oid = self.commit_of(repository, '/'.join(parts[:end]))
            folder = ''.join(f'{part}/' for part in parts[end:])
            files = {path: file for path, file in repository.commits[oid].items() if path.startswith(folder)}
            if folder and not files:
                raise _Answer(404, f'{folder} does not exist', 'EntryNotFound', **{'X-Repo-Commit': oid})
            entries = {path: _entry(path, file) for path, file in files.items()}
            for path in files:
                inner = path[len(folder):].split('/')[:-1]
                for depth in range(len(inner)):
                    name = folder + '/'.join(inner[:depth + 1])
                    entries[name] = {'type': 'directory', 'path': name, 'size': 0, 'oid': '0' * 40}
            if 'recursive=true' not in self.path.lower():
                entries = {path: entry for path, entry in entries.items() if '/' not in path[len(folder):]}
            self.send_json([entry for _, entry in sorted(entries.items())])

        def paths_info(self, kind, name, revision):
            repository = self.repository(kind, name)
            files = repository.commits[self.commit_of(repository, revision)]
            asked = json.loads(self.body)['paths']
            self.send_json([_entry(path, files[path]) for path in asked if path in files])

        def refs(self, kind, name):
            repository = self.repository(kind, name)
            self.send_json({
                key: [{'name': ref, 'ref': f'refs/{part}/{ref}', 'targetCommit': oid} for ref, oid in named.items()]
                for key, part, named in (
                    ('branches', 'heads', repository.branches), ('tags', 'tags', repository.tags), ('converts', '', {}))
            })

        def make_branch(self, kind, name, revision):
            repository = self.repository(kind, name, write=True)
            if revision in repository.branches:
                raise _Answer(409, 'Reference already exists')
            start = (json.loads(self.body) if self.body else {}).get('startingPoint') or 'main'
            repository.branches[revision] = self.commit_of(repository, start)
            self.send_json({})

        def make_tag(self, kind, name, revision):
            repository = self.repository(kind, name, write=True)
            tag = json.loads(self.body)['tag']
            if tag in repository.tags:
                raise _Answer(409, 'Reference already exists')
            repository.tags[tag] = self.commit_of(repository, revision)
            self.send_json({})

        def resolve(self, name, revision, path, kind='model'):
            repository = self.repository(kind, name)
            oid = self.commit_of(repository, revision)
            file = repository.commits[oid].get(path)
            if file is None:
                raise _Answer(404, 'Entry not found', 'EntryNotFound', **{'X-Repo-Commit': oid})
            headers = {
                'X-Repo-Commit': oid, 'ETag': f'"{file.etag}"', 'Accept-Ranges': 'bytes',
                'Content-Type': 'application/octet-stream',
            }
            if file.lfs:
                headers.update({'X-Linked-Etag': f'"{file.etag}"', 'X-Linked-Size': str(len(file.content))})
            wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
            if wanted is None:
                self.send(file.content, 200, {'Content-Length': str(len(file.content)), **headers})
                return
            size = len(file.content)
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            if start >= size:
                raise _Answer(416, 'beyond the end', **{'Content-Range': f'bytes */{size}'})
            self.send(file.content[start:end + 1], 206, {**headers, 'Content-Range': f'bytes {start}-{end}/{size}'})

        def resolve_dataset(self, name, revision, path):
            self.resolve(name, revision, path, 'dataset')

        def resolve_space(self, name, revision, path):
            self.resolve(name, revision, path, 'space')

    def by_kind(action):
        return lambda self, kind, **rest: action(self, kind=kind.removesuffix('s'), **rest)

    name, rev = r'(?P<name>[^/]+/[^/]+)', r'(?P<revision>.+)'
    repo = rf'/api/(?P<kind>models|datasets|spaces)/{name}'
    _ROUTES = (
        (('GET',), '/api/whoami-v2', Handler.whoami),
        (('POST',), '/api/repos/create', Handler.create),
        (('DELETE',), '/api/repos/delete', Handler.delete),
        (('POST',), '/api/validate-yaml', Handler.validate_yaml),
        (('POST',), rf'{repo}/preupload/{rev}', by_kind(Handler.preupload)),
        (('POST',), rf'{repo}/commit/{rev}', by_kind(Handler.commit)),
        (('GET',), rf'{repo}/xet-write-token/{rev}', by_kind(Handler.xet_token)),
        (('GET',), repo, by_kind(Handler.info)),
        (('GET',), rf'{repo}/revision/{rev}', by_kind(Handler.info)),
        (('GET',), rf'{repo}/tree/{rev}', by_kind(Handler.tree)),
        (('POST',), rf'{repo}/paths-info/{rev}', by_kind(Handler.paths_info)),
        (('GET',), rf'{repo}/refs', by_kind(Handler.refs)),
        (('POST',), rf'{repo}/branch/{rev}', by_kind(Handler.make_branch)),
        (('POST',), rf'{repo}/tag/{rev}', by_kind(Handler.make_tag)),
        (('POST',), rf'/spaces/{name}\.git/info/lfs/objects/batch', Handler.lfs_batch_space),
        (('POST',), rf'/{name}\.git/info/lfs/objects/batch', Handler.lfs_batch),
        (('PUT',), r'/lfs/(?P<oid>[0-9a-f]{64})', Handler.lfs_put),
        (('POST',), '/lfs-verify', Handler.lfs_verify),
        (('GET', 'HEAD'), rf'/datasets/{name}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve_dataset),
        (('GET', 'HEAD'), rf'/spaces/{name}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve_space),
        (('GET', 'HEAD'), rf'/{name}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve),
    )
    return Handler


def _prefix(kind: str) -> str:
    return '' if kind == 'model' else f'{kind}s/'


def _entry(path: str, file: StoredFile) -> Dict[str, object]:
    entry = {'type': 'file', 'path': path, 'size': len(file.content), 'oid': file.blob_id}
    if file.lfs:
        entry['lfs'] = {'oid': file.sha256, 'size': len(file.content), 'pointerSize': 134}
    return entry
