"""Runs an application: a port, one or several processes, connections that must not idle, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.supervisors import Multiprocess

from .metrics import FOLDER

__all__ = ['bind', 'claim', 'run']

IDLE_SECONDS = 10.0  # in which the head of a request must have arrived
CONNECTIONS = 1000  # per process, idle ones included
_claimed: list[Any] = []  # lock files that this process holds open


class _Protocol(AutoHTTPProtocol):
    """uvicorn's protocol, which ends connections on which no request begins: it knows no limit for slow heads."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self.watch = self.loop.call_later(IDLE_SECONDS, self._end_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def _end_if_idle(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        left = IDLE_SECONDS - (self.loop.time() - self.idle_since)
        if not answering and left <= 0:
            self.transport.close()
        else:
            self.watch = self.loop.call_later(IDLE_SECONDS if answering else left, self._end_if_idle)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, not yet listening; port 0 finds a free one.

    Raises:
        OSError: The address is in use, or not one of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.set_inheritable(True)
        except BaseException:
            bound.close()
            raise
    except OSError as e:
        raise OSError(f'port {port} of {host} cannot be opened ({e.strerror or e}); choose another: --port.') from e
    return bound


def run(application: Starlette | str, bound: socket.socket, workers: int = 1, drain_seconds: float = 30.0) -> None:
    """Answers requests until SIGTERM or SIGINT; then no new connections are accepted, and those that are open are
    answered for up to `drain_seconds`.

    Args:
        application: The app; for several processes `module:function`, which makes one in each of them.
        bound: See `bind`.
        workers: Processes.
        drain_seconds: Time for the last answers.
    """
    config = uvicorn.Config(
        application,
        factory=isinstance(application, str),
        http=_Protocol,
        ws='none',
        workers=workers,
        log_level='warning',
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        timeout_worker_healthcheck=60,
    )
    if workers == 1:
        before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
        try:  # uvicorn has drained when it raises the signal again: an end that was asked for is not a failure
            uvicorn.Server(config).run([bound])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return
    with tempfile.TemporaryDirectory(prefix='timm-cascade-') as folder:
        os.environ[FOLDER] = folder  # the processes read it
        try:
            Multiprocess(config, sockets=[bound]).run()
        finally:
            del os.environ[FOLDER]


def claim(names: Sequence[str]) -> str:
    """One of `names` that no other process of this server has claimed; the first, if there are none left.

    What a process has claimed is free again when it ends, so one that is started in its place gets it.
    """
    folder = os.environ.get(FOLDER)
    if len(names) == 1 or folder is None:
        return names[0]
    import fcntl

    for number, name in enumerate(names):
        file = Path(folder, f'claim-{number}').open('w', encoding='utf-8')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _claimed.append(file)
        return name
    return names[0]
