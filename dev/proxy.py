"""
A reverse proxy that can be told to hold a request back, so that a process can be killed at that very instant.

It stands between Airflow's workers and the execution API (or between a hook and its cluster). What flows in:
requests, and orders such as "hold the next deferral". What flows out: the far side's own answers, word for word;
503 with a JSON body when it cannot be reached. The proxy runs in a thread of its own, so that its orders are
plain calls.

The trap: a client that is made to wait gives up and sends its request again (Airflow's after five seconds). So
an order holds every request that matches, until it is told what to do with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from typing_extensions import Self
from yarl import URL

from dev.processes import free_port

__all__ = ["Hold", "Proxy", "Request"]

_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}  # RFC 9110, section 7.6.1
_TIMEOUT = ClientTimeout(total=60)


class Request(NamedTuple):
    """A request that went through the proxy, or is held by it."""

    method: str
    path: str
    """With the query."""
    body: str


class Hold:
    """
    An order to hold requests back. See :meth:`Proxy.hold`.

    :ivar request: the first one held, once :meth:`wait` has returned.
    """

    request: Request

    def __init__(self, loop: asyncio.AbstractEventLoop, method: str, path: str, body: str, *, after: bool) -> None:
        self.after = after
        self._method, self._path, self._body = method, re.compile(path), re.compile(body)
        self._loop = loop
        self._held = threading.Event()
        self._let_through: asyncio.Future[bool] = loop.create_future()

    def wait(self, deadline: float = 60) -> Request:
        """Return the first request that is held, once one is."""
        if not self._held.wait(deadline):
            raise TimeoutError(f"waited {deadline:g} s for {self._method} {self._path.pattern}")
        return self.request

    def release(self) -> None:
        """Let what is held go on its way, and no longer hold anything."""
        self._decide(let_through=True)

    def drop(self) -> None:
        """Close the connections of what is held without an answer, and no longer hold anything."""
        self._decide(let_through=False)

    def _decide(self, *, let_through: bool) -> None:
        def decide() -> None:
            if not self._let_through.done():
                self._let_through.set_result(let_through)

        self._loop.call_soon_threadsafe(decide)

    def _takes(self, request: Request) -> bool:
        return (
            not self._let_through.done()
            and request.method == self._method
            and self._path.search(request.path) is not None
            and self._body.search(request.body) is not None
        )

    async def _decision(self, request: Request) -> bool:
        if not self._held.is_set():
            self.request = request
            self._held.set()
        return await asyncio.shield(self._let_through)


class Proxy:
    """
    A proxy on loopback. A context manager.

    :param target: base URL of the far side, without a slash at the end.
    :param tls: for a far side whose certificate the machine does not trust.
    """

    def __init__(self, target: str, *, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self._tls = tls
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[Request] = []
        self._holds: list[Hold] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hold in self._holds:
            hold.drop()
        try:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        finally:
            self._end()

    def hold(self, method: str, path: str, *, body: str = "", after: bool = False) -> Hold:
        """
        Hold back what is sent from now on, if it matches.

        :param method: in upper case.
        :param path: regular expression for a part of the path and query.
        :param body: regular expression for a part of the body.
        :param after: hold back the answer instead, when the far side has acted.
        """
        hold = Hold(self._loop, method, path, body, after=after)
        self._holds.append(hold)
        return hold

    @contextlib.contextmanager
    def holding(self, method: str, path: str, *, body: str = "", after: bool = False) -> Iterator[Hold]:
        """Do as :meth:`hold` does; at the end of the block whatever is still held is let through."""
        hold = self.hold(method, path, body=body, after=after)
        try:
            yield hold
        finally:
            hold.release()

    def count(self, method: str, path: str) -> int:
        """Return how many requests of this kind came, also those held and dropped."""
        return sum(request.method == method and re.search(path, request.path) is not None for request in self.requests)

    async def _start(self) -> None:
        self._session = ClientSession(
            connector=TCPConnector(ssl=self._tls if self._tls is not None else True),
            timeout=_TIMEOUT,
            auto_decompress=False,
            cookie_jar=DummyCookieJar(),
        )
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _handle(self, incoming: web.Request) -> web.StreamResponse:
        content = await incoming.read()
        request = Request(incoming.method, incoming.path_qs, content.decode(errors="replace"))
        self.requests.append(request)
        hold = next((hold for hold in self._holds if hold._takes(request)), None)
        if hold and not hold.after and not await hold._decision(request):
            return _hang_up(incoming)
        answer = await self._forward(incoming, content)
        if hold and hold.after and not await hold._decision(request):
            return _hang_up(incoming)
        return answer

    async def _forward(self, incoming: web.Request, content: bytes) -> web.Response:
        headers = [(name, value) for name, value in incoming.headers.items() if name.lower() not in _HOP_BY_HOP]
        url = URL(self.target + incoming.raw_path, encoded=True)
        request = self._session.request(incoming.method, url, headers=headers, data=content, allow_redirects=False)
        try:
            async with request as answer:
                body = await answer.read()
        except (ClientError, asyncio.TimeoutError) as error:
            return web.json_response({"detail": f"{self.target} cannot be reached: {error!r}"}, status=503)
        response = web.Response(status=answer.status, reason=answer.reason, body=body)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP | {"content-length", "content-type"}:
                response.headers.add(name, value)
        if "Content-Type" in answer.headers:
            response.headers["Content-Type"] = answer.headers["Content-Type"]
        return response


def _hang_up(incoming: web.Request) -> web.Response:
    if incoming.transport is not None:
        incoming.transport.abort()
    return web.Response(status=503)  # nobody is there to read it
