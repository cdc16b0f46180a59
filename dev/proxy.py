"""
A reverse proxy that can be told to hold a request back, so that a process can be killed at that very instant,
or to misbehave for a while.

It stands between Airflow's workers and the execution API (or between a hook and its cluster). What flows in:
requests, and orders such as "hold the next deferral" or "answer 500 for the length of this block". What flows out:
the far side's own answers, word for word and as they come, so that a watch goes through it, too; 503 with a JSON
body when it cannot be reached. The proxy runs in a thread of its own, so that its orders are plain calls.

The trap: a client that is made to wait gives up and sends its request again (Airflow's after five seconds). So
an order holds every request that matches, until it is told what to do with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from multidict import CIMultiDict
from typing_extensions import Self
from yarl import URL

from dev import processes
from dev.processes import free_port

__all__ = ["Hold", "Passage", "Proxy", "Request"]

_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}  # RFC 9110, section 7.6.1
_TIMEOUT = ClientTimeout(total=None, sock_connect=10, sock_read=120)  # a watch is silent for a minute and more


class Request(NamedTuple):
    """A request that went through the proxy, or is held by it."""

    method: str
    path: str
    """With the query."""
    body: str
    headers: Mapping[str, str]
    at: float
    """When it came, by ``time.monotonic()``."""


class _Pattern:
    """Which requests an order is about: regular expressions for a part of each, the empty ones for any."""

    def __init__(self, method: str, path: str, body: str, header: str = "") -> None:
        self.method, self.path = method, path
        self._path, self._body, self._header = re.compile(path), re.compile(body), re.compile(header)

    def takes(self, request: Request) -> bool:
        return (
            request.method == (self.method or request.method)
            and self._path.search(request.path) is not None
            and self._body.search(request.body) is not None
            and any(self._header.search(f"{name}: {value}") for name, value in request.headers.items())
        )


class Hold:
    """
    An order to hold requests back. See :meth:`Proxy.hold`.

    :ivar request: the first one held, once :meth:`wait` has returned.
    """

    request: Request

    def __init__(self, loop: asyncio.AbstractEventLoop, pattern: _Pattern, *, after: bool) -> None:
        self.after = after
        self._pattern = pattern
        self._loop = loop
        self._held = threading.Event()
        self._let_through: asyncio.Future[bool] = loop.create_future()

    def wait(self, deadline: float = 120) -> Request:
        """Return the first request that is held, once one is."""
        deadline *= processes.patience
        if not self._held.wait(deadline):
            raise TimeoutError(f"waited {deadline:g} s for {self._pattern.method} {self._pattern.path}")
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
        return not self._let_through.done() and self._pattern.takes(request)

    async def _decision(self, request: Request) -> bool:
        if not self._held.is_set():
            self.request = request
            self._held.set()
        return await asyncio.shield(self._let_through)


@dataclasses.dataclass(frozen=True, eq=False)
class _Trouble:
    """What becomes of requests for a while: an answer of the proxy's own, half of the far side's, or none."""

    pattern: _Pattern
    answer: web.Response | None = None
    cut: bool = False
    over: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def hangs(self) -> bool:
        return self.answer is None and not self.cut


@dataclasses.dataclass(frozen=True, eq=False)
class _Answering:
    """An answer that is being passed on, which may take as long as a watch."""

    request: Request
    incoming: web.Request
    answer: ClientResponse
    passage: Passage | None = None

    def break_off(self) -> None:
        self.answer.close()
        _hang_up(self.incoming)


class Passage(Protocol):
    """One request at a gate: at each of three moments, whether it is to go on. If not, the proxy hangs up."""

    def leaves(self) -> bool:
        """The request has come."""

    def answered(self) -> bool:
        """The far side has begun to answer."""

    def part(self) -> Passage | None:
        """A part of the answer has come; a passage for it, if parts are to pass one by one."""

    def over(self) -> bool:
        """The answer has been passed on."""


class Proxy:
    """
    A proxy on loopback. A context manager.

    :param target: base URL of the far side, without a slash at the end.
    :param tls: for a far side whose certificate the machine does not trust.
    :param gate: asked about each request, in the proxy's thread; nothing for one that is to go on in any case.
    :param renamed: what the far side's answers call by a name that does not lead through a proxy: the bytes that stand
        in their place, as many. Such answers are passed on when they are complete.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: ssl.SSLContext | None = None,
        gate: Callable[[Request], Passage | None] | None = None,
        renamed: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.target = target
        self._tls = tls
        self._gate = gate
        self._renamed = dict(renamed or {})
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[Request] = []
        self._holds: list[Hold] = []
        self._troubles: list[_Trouble] = []
        self._answering: set[_Answering] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._start())
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
            self._call(self._stop())
        finally:
            self._end()

    # Orders to hold something back

    def hold(self, method: str, path: str, *, body: str = "", after: bool = False) -> Hold:
        """
        Hold back what is sent from now on, if it matches.

        :param method: in upper case.
        :param path: regular expression for a part of the path and query.
        :param body: regular expression for a part of the body.
        :param after: hold back the answer instead, when the far side has acted.
        """
        hold = Hold(self._loop, _Pattern(method, path, body), after=after)
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

    # Orders to misbehave

    @contextlib.contextmanager
    def failing(
        self,
        status: int,
        *,
        headers: Mapping[str, str] | None = None,
        answer: str = "",
        method: str = "",
        path: str = "",
        body: str = "",
        header: str = "",
    ) -> Iterator[None]:
        """
        For the length of the block answer in the far side's place what matches; break off the answers under way.

        :param status: of the answer.
        :param headers: of the answer.
        :param answer: its body.
        :param method: in upper case; any when empty.
        :param path: regular expression for a part of the path and query.
        :param body: regular expression for a part of the body.
        :param header: regular expression for a part of one header, as ``name: value``.
        """
        response = web.Response(status=status, headers=headers, text=answer)
        with self._troubled(_Trouble(_Pattern(method, path, body, header), answer=response)):
            yield

    @contextlib.contextmanager
    def cutting(self, *, method: str = "", path: str = "") -> Iterator[None]:
        """For the length of the block hang up in the middle of each answer that matches, also of those under way."""
        with self._troubled(_Trouble(_Pattern(method, path, ""), cut=True)):
            yield

    @contextlib.contextmanager
    def hanging(self, *, method: str = "", path: str = "") -> Iterator[None]:
        """For the length of the block neither answer what matches nor go on with an answer; then hang up on it."""
        with self._troubled(_Trouble(_Pattern(method, path, ""))):
            yield

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """For the length of the block refuse all connections; those that there are break."""
        self._call(self._close())
        try:
            yield
        finally:
            self._call(self._listen())

    def count(self, method: str, path: str) -> int:
        """Return how many requests of this kind came, also those held, dropped, and answered here."""
        return sum(request.method == method and re.search(path, request.path) is not None for request in self.requests)

    @contextlib.contextmanager
    def _troubled(self, trouble: _Trouble) -> Iterator[None]:
        async def begin() -> None:
            self._troubles.append(trouble)
            for each in [] if trouble.hangs else list(self._answering):
                if trouble.pattern.takes(each.request):
                    each.break_off()

        async def end() -> None:
            self._troubles.remove(trouble)
            trouble.over.set()

        self._call(begin())
        try:
            yield
        finally:
            self._call(end())

    def _trouble(self, request: Request) -> _Trouble | None:
        return next((trouble for trouble in self._troubles if trouble.pattern.takes(request)), None)

    # In the thread

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> None:
        self._session = ClientSession(
            connector=TCPConnector(ssl=self._tls if self._tls is not None else True, limit=0),
            timeout=_TIMEOUT,
            auto_decompress=False,
            cookie_jar=DummyCookieJar(),
        )
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await self._site.start()

    async def _close(self) -> None:
        await self._site.stop()
        for each in list(self._answering):
            each.break_off()
        for connection in self._runner.server.connections if self._runner.server else ():
            connection.force_close()

    async def _stop(self) -> None:
        for each in list(self._answering):
            each.break_off()
        await self._runner.cleanup()
        await self._session.close()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _handle(self, incoming: web.Request) -> web.StreamResponse:
        content = await incoming.read()
        text = content.decode(errors="replace")
        request = Request(incoming.method, incoming.path_qs, text, incoming.headers, time.monotonic())
        self.requests.append(request)
        passage = self._gate(request) if self._gate else None
        if passage and not passage.leaves():
            return _hang_up(incoming)
        hold = next((hold for hold in self._holds if hold._takes(request)), None)
        if hold and not hold.after and not await hold._decision(request):
            return _hang_up(incoming)
        if (trouble := self._trouble(request)) is not None:
            if trouble.hangs:
                await trouble.over.wait()
                return _hang_up(incoming)
            if (own := trouble.answer) is not None:
                return web.Response(status=own.status, headers=own.headers, body=own.body)
        return await self._forward(incoming, content, request, hold if hold and hold.after else None, passage)

    async def _forward(
        self, incoming: web.Request, content: bytes, request: Request, hold: Hold | None, passage: Passage | None
    ) -> web.StreamResponse:
        kept_here = _HOP_BY_HOP | ({"accept-encoding"} if self._renamed else set())
        headers = [(name, value) for name, value in incoming.headers.items() if name.lower() not in kept_here]
        url = URL(self.target + incoming.raw_path, encoded=True)
        sent = self._session.request(incoming.method, url, headers=headers, data=content, allow_redirects=False)
        try:
            async with sent as answer:
                if hold and not await hold._decision(request):
                    return _hang_up(incoming)
                if passage and not passage.answered():
                    return _hang_up(incoming)
                under_way = _Answering(request, incoming, answer, passage)
                self._answering.add(under_way)
                try:
                    return await self._pass_on(under_way)
                finally:
                    self._answering.discard(under_way)
        except (ClientError, asyncio.TimeoutError) as error:
            return web.json_response({"detail": f"{self.target} cannot be reached: {error!r}"}, status=503)

    async def _pass_on(self, under_way: _Answering) -> web.StreamResponse:
        incoming, answer = under_way.incoming, under_way.answer
        headers = [(name, value) for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP]
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=CIMultiDict(headers))
        try:
            await response.prepare(incoming)
            async for chunk in self._parts(answer):
                part = under_way.passage.part() if under_way.passage else None
                if part and not (part.leaves() and part.answered()):
                    raise ConnectionError("it is not to be passed on")
                trouble = self._trouble(under_way.request)
                if trouble is not None and trouble.hangs:
                    await trouble.over.wait()
                elif trouble is not None and trouble.cut:
                    await response.write(chunk[: len(chunk) // 2])
                if trouble is not None:
                    raise ConnectionError("it is not to be passed on")
                await response.write(chunk)
                if part and not part.over():
                    raise ConnectionError("nothing more is to be passed on")
            await response.write_eof()
            if under_way.passage and not under_way.passage.over():
                under_way.break_off()
        except (ClientError, asyncio.TimeoutError, ConnectionError):  # whichever side it was, the other one is told
            under_way.break_off()
        return response

    async def _parts(self, answer: ClientResponse) -> AsyncIterator[bytes]:
        """Return the answer as it comes; complete, if names in it are to be replaced."""
        if not self._renamed:
            async for chunk in answer.content.iter_any():
                yield chunk
            return
        content = await answer.read()
        for name, other in self._renamed.items():
            content = content.replace(name, other)
        yield content


def _hang_up(incoming: web.Request) -> web.Response:
    if incoming.transport is not None:
        incoming.transport.close()
    return web.Response(status=503)  # nobody is there to read it
