"""The HTTP application: one Starlette app per process, around a service, its batches and its metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..errors import RequestError
from .batcher import Batcher
from .body import Body, Held, read_body
from .metrics import Metrics
from .service import Answer, Asked, Service

__all__ = ['create_app']

_logger = logging.getLogger(__name__)
HUNG_UP = 499  # nginx's number for a client that did not wait
RETRY_AFTER = '1'  # seconds
DECODERS = 4  # threads, at most
PAGE = resources.files(__package__).joinpath('page.html').read_text(encoding='utf-8')
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob:; connect-src 'self'"


def create_app(
    service: Service, max_batch: int = 32, max_wait: float = 0.0, token: str | None = None, warm_up: bool = True
) -> Starlette:
    """The application, for uvicorn or any other ASGI server.

    `POST /predict` answers an image; `/health`, `/ready`, `/metrics` and `/info` are for operators and clients, `/` is
    a page to try it.

    Args:
        service: Answers the images; its limits are the application's.
        max_batch, max_wait: See `Batcher`.
        token: Bearer token that /predict, /info and /metrics ask for; None for none.
        warm_up: Run the network once before the first request.

    Example:
        >>> app = create_app(Service(timm_cascade.load('release/')))
        >>> uvicorn.run(app)
    """
    application = _Application(service, max_batch, max_wait, token, warm_up)
    routes = [
        Route('/predict', application.predict, methods=['POST']),
        Route('/', application.predict, methods=['POST']),  # where Inference Endpoints ask their containers
        Route('/', application.page),
        Route('/health', application.health),
        Route('/ready', application.ready),
        Route('/info', application.info),
        Route('/metrics', application.metrics_text),
    ]
    refused = {RequestError: lambda request, error: _error(error)}
    return Starlette(routes=routes, lifespan=application.lifespan, exception_handlers=refused)


class _Application:
    def __init__(self, service: Service, max_batch: int, max_wait: float, token: str | None, warm_up: bool) -> None:
        self.service, self.limits = service, service.limits
        self.max_batch, self.max_wait, self.token, self.warm = max_batch, max_wait, token, warm_up
        self.metrics = Metrics(len(service.model.exits), service.total)
        self.held = Held(self.limits.held_bytes)
        self.waiting = 0  # requests that arrived and were not answered yet
        self.batcher: Batcher | None = None
        self.decoders: ThreadPoolExecutor | None = None

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        if self.warm:
            self.service.warm_up(self.max_batch)
        self.decoders = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), 'timm-cascade decode')
        self.batcher = Batcher(self.service, self.max_batch, self.max_wait, self.metrics.batches.observe)
        try:
            yield
        finally:  # uvicorn has waited for all requests
            batcher, self.batcher = self.batcher, None
            batcher.close()
            self.decoders.shutdown(cancel_futures=True)

    async def predict(self, request: Request) -> Response:
        """Answers one image, or says why not."""
        began = time.perf_counter()
        response = await self._respond(request, began)
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _respond(self, request: Request, began: float) -> Response:
        try:
            self._authorise(request)
            self._refuse_if_busy()
            with self.held.share() as take:
                body = await read_body(request, self.limits, take)
                with self._waiting():
                    asked, answer = await self._unless_gone(request, self._answer(body))
            described = self.service.describe(asked, answer)
            self.metrics.answered(asked, answer, time.perf_counter() - began)
            return JSONResponse(described)
        except RequestError as e:
            return self._refuse(e)
        except ClientDisconnect:
            return self._refuse(RequestError(HUNG_UP, 'hung_up', 'the client hung up.'))
        except Exception:
            _logger.exception('a request failed')
            return self._refuse(RequestError(500, 'failed', 'the answer could not be computed; see the log.'))

    def _refuse_if_busy(self) -> None:
        if self.waiting >= self.limits.queue:
            raise RequestError(503, 'busy', f'{self.waiting} requests are waiting, which is the limit; try again.')

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._refuse_if_busy()  # others may have arrived while this one was received
        self.waiting += 1
        with self.metrics.queue.track_inprogress():
            try:
                yield
            finally:
                self.waiting -= 1

    async def _answer(self, body: Body) -> tuple[Asked, Answer]:
        if self.batcher is None:
            raise RequestError(503, 'not_ready', 'the server is starting or stopping; try again.')
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self.decoders, self.service.prepare, *body)
        return asked, await asyncio.wrap_future(self.batcher.submit(asked))

    async def _unless_gone(self, request: Request, work: Coroutine[Any, Any, tuple[Asked, Answer]]) -> Any:
        """The result of `work`, which is cancelled when the client hangs up or time is over."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise RequestError(504, 'late', f'there was no answer after {self.limits.answer_seconds:g} seconds.')
        finally:
            task.cancel()
            gone.cancel()

    def _authorise(self, request: Request) -> None:
        if self.token is None:
            return
        kind, _, given = request.headers.get('authorization', '').partition(' ')
        if kind.lower() != 'bearer' or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise RequestError(401, 'unauthorised', 'send the token of this server: Authorization: Bearer TOKEN.')

    def _refuse(self, error: RequestError) -> Response:
        self.metrics.refused(error.reason)
        return _error(error)

    async def page(self, request: Request) -> Response:
        """A page to drop an image on and to move the dial."""
        return HTMLResponse(PAGE, headers={'Content-Security-Policy': POLICY})

    async def health(self, request: Request) -> Response:
        """200 while requests can be answered; else the process should be restarted."""
        if self.batcher is None or not self.batcher.alive:
            return JSONResponse({'status': 'the thread that runs the model has ended'}, 500)
        return JSONResponse({'status': 'ok'})

    async def ready(self, request: Request) -> Response:
        """200 while more requests are accepted, 503 while the queue is full."""
        if self.batcher is None or self.waiting >= self.limits.queue:
            return JSONResponse({'status': 'busy'}, 503, {'Retry-After': RETRY_AFTER})
        return JSONResponse({'status': 'ready'})

    async def info(self, request: Request) -> Response:
        """The model, its exits and its limits."""
        self._authorise(request)
        return JSONResponse(self.service.info())

    async def metrics_text(self, request: Request) -> Response:
        """Counters for Prometheus."""
        self._authorise(request)
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _error(error: RequestError) -> Response:
    headers = {}
    if error.status == 503:
        headers['Retry-After'] = RETRY_AFTER
    if error.status == 401:
        headers['WWW-Authenticate'] = 'Bearer'
    return JSONResponse({'error': str(error)}, error.status, headers)


async def _hung_up(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass
