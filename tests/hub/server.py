"""A Hub for tests: what the genuine client needs to push and pull models, in memory, on this machine only.

    with TestHub() as hub:                          # a thread of this process; clients are other processes
        client(HF_ENDPOINT=hub.url, HF_TOKEN='owner-token')
        hub.fault('GET .*/resolve/', 503, times=2)  # see TestHub.fault

`python tests/hub/server.py` serves one by hand.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (
    '.safetensors',
    '.bin',
    '.png',
    '.parquet',
)  # kept as the Hub keeps large files: under their sha256, behind a redirect


@dataclass
class File:
    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = '') -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Repository:
    """Commits (files by name) by id; branches and tags are names of ids."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.read_only = False
        self.commits: dict[str, dict[str, File]] = {}
        self.refs: dict[str, str] = {}
        self.requests = 0
        self.commit('main', {})

    def commit(self, branch: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(f'{branch}{len(self.commits)}{sorted(files)}'.encode()).hexdigest()
        self.commits[oid], self.refs[branch] = dict(files), oid
        return oid

    def put(self, **contents: bytes | None) -> str:
        """A commit on main from the other side; `None` removes a file, `__` in a name is its dot."""
        files = dict(self.commits[self.refs['main']])
        for key, content in contents.items():
            name = key.replace('__', '.')
            files.pop(name, None)
            if content is not None:
                files[name] = File(content, name.endswith(LARGE))
        return self.commit('main', files)

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return oid, self.commits[oid]


class TestHub:
    __test__ = False  # no test class, whatever its name

    def __init__(self, tokens: dict[str, str] | None = None, port: int = 0) -> None:
        self.tokens = tokens or {'owner-token': 'owner', 'reader-token': 'reader'}
        self.repos: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[str] = []
        self.ranges: list[tuple[int, int]] = []  # of stored files that were asked for in part
        self.faults: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(('127.0.0.1', port), type('Handler', (_Handler,), {'hub': self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'

    def __enter__(self) -> TestHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, pattern: str, what: int | str | Callable[[], None], times: int = 1 << 30) -> None:
        """The next `times` requests whose "METHOD /path" matches go wrong.

        Args:
            what: A status to answer with; 'cut' to end the connection half-way through the answer's body; 'flip' to
                change a bit of the body; or a function that is called before the request is served.
        """
        self.faults.append(dict(pattern=re.compile(pattern), what=what, times=times))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: TestHub
    damage: str | None = None

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query, keep_blank_values=True)
        body = self._body()
        request = f'{self.command} {unquote(address.path)}'
        self.user = self.hub.tokens.get(self.headers.get('Authorization', '').removeprefix('Bearer '))
        self.damage = None
        with self.hub.lock:
            self.hub.log.append(request)
            try:
                for fault in self.hub.faults:
                    if fault['times'] > 0 and fault['pattern'].search(request):
                        fault['times'] -= 1
                        if callable(fault['what']):
                            fault['what']()
                        elif isinstance(fault['what'], int):
                            raise Refusal(fault['what'], 'as the test wants it')
                        else:
                            self.damage = fault['what']
                if self.headers.get('Authorization') and self.user is None:
                    raise Refusal(401, 'Invalid credentials in Authorization header')
                self._dispatch(request, body)
            except Refusal as e:
                self._send(
                    e.status,
                    {'error': str(e)},
                    {'X-Error-Message': str(e), **({'X-Error-Code': e.code} if e.code else {})},
                )

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b';')[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def _send(self, status: int, body: Any = b'', headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(content)))
        self.send_header('Content-Type', 'application/octet-stream' if body is content else 'application/json')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.damage == 'flip':
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.damage == 'cut':
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _dispatch(self, request: str, body: bytes) -> None:
        request = request.replace('HEAD ', 'GET ', 1)
        for pattern, handle in ROUTES:
            if found := re.fullmatch(pattern, request):
                return handle(self, body, **found.groupdict())
        raise Refusal(404, f'this Hub does not know {request}')

    def repository(self, name: str, write: bool = False) -> Repository:
        repo, owner = self.hub.repos.get(name), name.removeprefix('datasets/').partition('/')[0]
        if repo is None or (repo.private and self.user != owner):
            raise Refusal(404 if self.user else 401, 'Repository not found', 'RepoNotFound')
        if write and (self.user != owner or repo.read_only):
            raise Refusal(403 if self.user else 401, 'You do not have the rights to write here')
        return repo


def whoami(h: _Handler, body: bytes) -> None:
    if h.user is None:
        raise Refusal(401, 'Invalid credentials in Authorization header')
    h._send(200, dict(type='user', name=h.user, orgs=[], auth=dict(accessToken=dict(role='write', displayName='t'))))


def create(h: _Handler, body: bytes) -> None:
    asked = json.loads(body)
    owner = asked.get('organization') or h.user
    name = f'{owner}/{asked["name"]}'
    if h.user != owner or h.user is None:
        raise Refusal(403 if h.user else 401, f'You do not have the rights to create {name}')
    if name in h.hub.repos:
        raise Refusal(409, 'You already created this model repo')
    h.hub.repos[name] = Repository(bool(asked.get('private')) or asked.get('visibility') == 'private')
    h._send(200, dict(url=f'{h.hub.url}/{name}', name=name, id=name))


def info(h: _Handler, body: bytes, name: str, revision: str = 'main') -> None:
    oid, files = h.repository(name).at(revision)
    siblings: list[dict[str, Any]] = [dict(rfilename=n) for n in sorted(files)]
    if 'blobs' in h.query:
        for entry in siblings:
            file = files[entry['rfilename']]
            entry.update(size=len(file.content), blobId=file.oid)
            if file.large:
                entry['lfs'] = dict(sha256=file.sha256, size=len(file.content), pointerSize=130)
    h._send(
        200,
        dict(
            _id=name,
            id=name,
            modelId=name,
            sha=oid,
            private=h.repository(name).private,
            tags=[],
            siblings=siblings,
            downloads=0,
            likes=0,
            gated=False,
            disabled=False,
        ),
    )


def resolve(h: _Handler, body: bytes, name: str, revision: str, path: str) -> None:
    oid, files = h.repository(name).at(revision)
    if path not in files:
        h._send(
            404,
            {'error': 'no such entry'},
            {'X-Error-Code': 'EntryNotFound', 'X-Error-Message': 'no such entry', 'X-Repo-Commit': oid},
        )
        return
    file, headers = files[path], {'X-Repo-Commit': oid, 'ETag': f'"{files[path].etag}"', 'Accept-Ranges': 'bytes'}
    if not file.large:
        return h._send(200, file.content, headers)
    h.hub.uploads[file.sha256] = file.content
    h._send(
        302,
        b'',
        headers
        | {
            'X-Linked-Etag': f'"{file.sha256}"',
            'X-Linked-Size': str(len(file.content)),
            'Location': f'http://localhost:{h.hub.port}/storage/{file.sha256}',
        },
    )  # elsewhere, as on the Hub


def storage(h: _Handler, body: bytes, sha: str) -> None:
    content, start = h.hub.uploads[sha], 0
    if part := re.fullmatch(r'bytes=(\d+)-(\d*)', h.headers.get('Range', '')):
        start, stop = int(part[1]), int(part[2] or len(content)) + 1
        headers = {'Content-Range': f'bytes {start}-{min(stop, len(content)) - 1}/{len(content)}'}
        h.hub.ranges.append((start, stop))
        return h._send(206, content[start:stop], headers)
    h._send(200, content)


def entry(path: str, file: File) -> dict[str, Any]:
    large = dict(lfs=dict(oid=file.sha256, size=len(file.content), pointerSize=130)) if file.large else {}
    return dict(type='file', path=path, oid=file.oid, size=len(file.content), **large)


def tree(h: _Handler, body: bytes, name: str, revision: str, path: str = '') -> None:
    """What lies in a folder: everything below it if `recursive` is asked for."""
    _, files = h.repository(name).at(revision)
    below = {n[len(path) :].lstrip('/'): f for n, f in files.items() if not path or n.startswith(f'{path}/')}
    if path and not below:
        raise Refusal(404, f'{path} does not exist', 'EntryNotFound')
    prefix = f'{path}/' if path else ''
    folders = {n[:i] for n in below for i, letter in enumerate(n) if letter == '/'}
    deep = h.query.get('recursive', ['false'])[0].lower() == 'true'
    found = [dict(type='directory', path=prefix + n, oid='0' * 40, size=0) for n in folders if deep or '/' not in n]
    found += [entry(prefix + n, f) for n, f in below.items() if deep or '/' not in n]
    h._send(200, found)


def paths_info(h: _Handler, body: bytes, name: str, revision: str) -> None:
    _, files = h.repository(name).at(revision)
    asked = parse_qs(body.decode())['paths'] if not body.startswith(b'{') else json.loads(body)['paths']
    found = [entry(path, files[path]) for path in asked if path in files]
    folders = [p for p in asked if any(n.startswith(f'{p}/') for n in files)]
    h._send(200, found + [dict(type='directory', path=p, oid='0' * 40, size=0) for p in folders])


def preupload(h: _Handler, body: bytes, name: str, revision: str) -> None:
    repo = h.repository(name, write='create_pr' not in h.query)
    repo.at(revision)
    h._send(
        200,
        dict(
            files=[
                dict(path=f['path'], uploadMode='lfs' if f['path'].endswith(LARGE) else 'regular', shouldIgnore=False)
                for f in json.loads(body)['files']
            ]
        ),
    )


def lfs_batch(h: _Handler, body: bytes, name: str) -> None:
    objects = json.loads(body)['objects']
    h._send(
        200,
        dict(
            transfer='basic',
            objects=[
                dict(
                    oid=o['oid'],
                    size=o['size'],
                    **(
                        {}
                        if o['oid'] in h.hub.uploads
                        else dict(actions=dict(upload=dict(href=f'{h.hub.url}/upload/{o["oid"]}')))
                    ),
                )
                for o in objects
            ],
        ),
    )


def upload(h: _Handler, body: bytes, sha: str) -> None:
    if hashlib.sha256(body).hexdigest() != sha:
        raise Refusal(400, 'these bytes have another hash')
    h.hub.uploads[sha] = body
    h._send(200)


def commit(h: _Handler, body: bytes, name: str, revision: str) -> None:
    request = h.query.get('create_pr', ['0'])[0] in ('1', 'true')
    repo = h.repository(name, write=not request)
    if h.user is None:
        raise Refusal(401, 'Log in to open a pull request')
    parent, files = repo.at(revision)
    files = dict(files)
    for line in body.splitlines():
        entry = json.loads(line)
        kind, value = entry['key'], entry['value']
        if kind == 'header' and value.get('parentCommit', parent) != parent:
            raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
        if kind == 'file':
            files[value['path']] = File(base64.b64decode(value['content']), False)
        elif kind == 'lfsFile':
            files[value['path']] = File(h.hub.uploads[value['oid']], True)
        elif kind == 'deletedFile':
            del files[value['path']]
    repo.requests += request
    oid = repo.commit(f'refs/pr/{repo.requests}' if request else revision, files)
    h._send(
        200,
        dict(
            success=True,
            commitOid=oid,
            commitUrl=f'{h.hub.url}/{name}/commit/{oid}',
            hookOutput='',
            **(dict(pullRequestUrl=f'{h.hub.url}/{name}/discussions/{repo.requests}') if request else {}),
        ),
    )


def add_ref(h: _Handler, body: bytes, name: str, revision: str, branch: str | None = None) -> None:
    repo, asked = h.repository(name, write=True), json.loads(body or b'{}')
    new = branch or asked['tag']
    if new in repo.refs:
        raise Refusal(409, f'{new} exists already')
    repo.refs[new] = repo.at(asked.get('startingPoint') or 'main' if branch else revision)[0]
    h._send(200, {})


MODEL = '/api/models/(?P<name>[^/]+/[^/]+)'
DATA = '/api/(?P<name>datasets/[^/]+/[^/]+)'  # a data set's name begins with its kind, as its address does
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ('GET /api/whoami-v2', whoami),
    ('POST /api/repos/create', create),
    ('POST /api/validate-yaml', lambda h, body: h._send(200, dict(errors=[], warnings=[]))),
    (f'GET {MODEL}', info),
    (f'GET {MODEL}/revision/(?P<revision>.+)', info),
    (f'POST {MODEL}/preupload/(?P<revision>.+)', preupload),
    (f'POST {MODEL}/commit/(?P<revision>.+)', commit),
    (f'POST {MODEL}/tag/(?P<revision>.+)', add_ref),
    (f'POST {MODEL}/branch/(?P<branch>.+)', lambda h, body, name, branch: add_ref(h, body, name, '', branch)),
    ('POST /(?P<name>[^/]+/[^/]+)[.]git/info/lfs/objects/batch', lfs_batch),
    ('PUT /upload/(?P<sha>[0-9a-f]{64})', upload),
    ('GET /storage/(?P<sha>[0-9a-f]{64})', storage),
    (f'GET {DATA}', info),
    (f'GET {DATA}/revision/(?P<revision>.+)', info),
    (
        f'GET {DATA}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?',
        lambda h, body, path, **k: tree(h, body, path=path or '', **k),
    ),
    (f'POST {DATA}/paths-info/(?P<revision>.+)', paths_info),
    ('GET /(?P<name>datasets/[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', resolve),
    ('GET /(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>.+?)/(?P<path>[^/]+)', resolve),
]


if __name__ == '__main__':
    with TestHub() as served:
        print(f'HF_ENDPOINT={served.url} HF_TOKEN=owner-token', flush=True)
        for _ in itertools.count():
            threading.Event().wait(3600)
