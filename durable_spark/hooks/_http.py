"""
HTTP for hooks: one aiohttp session per hook, every request bounded in time and size, errors in our own words.

What flows in: a URL that the hook has built from validated parts. What flows out: an :class:`Answer`,
or one of the exceptions of :mod:`durable_spark.jobs`. Private exceptions say more than
:class:`~durable_spark.jobs.ClusterUnreachable`, because a submission must know whether its request can
have reached the server.

The trap: aiohttp is imported inside functions. Operator modules reach this one at parse time, and
aiohttp costs them more than everything else here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import ssl
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from durable_spark.jobs import AuthenticationFailed, BadConfiguration, ClusterUnreachable, InvalidAnswer

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    import aiohttp

__all__ = [
    "Answer",
    "AnswerTimeout",
    "AnswerTooLong",
    "ConnectFailed",
    "ConnectionLost",
    "HttpClient",
    "Stream",
    "for_each",
    "ssl_context",
    "whole_characters",
]

_T = TypeVar("_T")

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 15.0
TOTAL_TIMEOUT = 30.0

_ERROR_LIMIT = 1 << 20
"""Bytes that the answer to a stream's request may have when it is an error."""
_IN_ONE_GO = 512 * 1024
"""Characters of JSON that are parsed where they are: about 8 ms."""


class ConnectFailed(ClusterUnreachable):
    """No connection came about, so the request was certainly not sent."""


class ConnectionLost(ClusterUnreachable):
    """The server closed the connection instead of answering. The request may have been served."""


class AnswerTimeout(ClusterUnreachable):
    """The answer did not come in time. The request may still be served."""


class AnswerTooLong(InvalidAnswer):
    """The answer has more bytes than were asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """
    What a server answered.

    :param url: what was asked, for messages.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text; what is not UTF-8 is replaced."""
        return self.body.decode("utf-8", errors="replace")

    @property
    def excerpt(self) -> str:
        """The title of a page, or the beginning of the body on one line, for messages."""
        title = re.search(r"<title>([^<]*)</title>", self.text[:5000])
        text = title[1] if title else self.text[:2000]
        return re.sub(r"(\s|<[^>]*>)+", " ", text)[:200].strip()

    @property
    def date(self) -> float | None:
        """The server's clock, in seconds since the epoch, truncated to seconds; from the header ``Date``."""
        return _moment(self.headers.get("Date", ""))

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to be left alone for; from ``Retry-After``, in seconds or as a date."""
        value = self.headers.get("Retry-After", "").strip()
        if value.isascii() and value.isdigit():
            return float(value)
        until, now = _moment(value), self.date
        return max(0.0, until - now) if until is not None and now is not None else None

    def expect_ok(self) -> Answer:
        """
        Return the answer if it is a 200.

        :raises AuthenticationFailed: for a 401 or 403.
        :raises ClusterUnreachable: for a 5xx or a 429.
        :raises InvalidAnswer: for anything else. Redirects are not followed: they may lead a token elsewhere.
        """
        if self.status == 200:
            return self
        if self.status in (401, 403):
            raise AuthenticationFailed(
                f"{self.url} answered {self.status}: it does not accept the connection's password"
            )
        if self.status >= 500 or self.status == 429:
            raise ClusterUnreachable(f"{self.url} answered {self.status}: {self.excerpt}", retry_after=self.retry_after)
        where = f" to {self.headers.get('Location', '')[:200]!r}" if 300 <= self.status < 400 else ""
        raise InvalidAnswer(f"{self.url} answered {self.status}{where}: {self.excerpt}")

    async def json(self) -> dict[str, Any]:
        """
        Return the body as a JSON object.

        :raises InvalidAnswer: when it is not one.
        """
        return await self.parse(lambda value: value)

    async def parse(
        self,
        build: Callable[[dict[str, Any]], _T],
        *,
        element: Callable[[Any, str], Any] = lambda value, _: value,
        within: str = "",
    ) -> _T:
        """
        Return what ``build`` makes of the body as a JSON object, without keeping the event loop waiting.

        :param build: is called in a thread when the body is large.
        :param element: what becomes of each element of the object's arrays, as soon as it is read; it is called with
            the element and the name of its array, where it is parsed. Thousands of parsed elements make the garbage
            collector look at all that the process has, which holds every thread (130 ms in a process that had
            imported Airflow); those that are let go of at once do not.
        :param within: a member of the object that is an object itself, whose arrays are meant as well.
        :raises InvalidAnswer: when the body is not a JSON object.
        """
        if len(self.body) <= _IN_ONE_GO:
            return build(self._object(element, within))
        return await asyncio.to_thread(lambda: build(self._object(element, within)))

    def _object(self, element: Callable[[Any, str], Any], within: str) -> dict[str, Any]:
        try:
            value = _loads_stepwise(whole_characters(self.body.decode()), element, within)
        except (ValueError, RecursionError) as error:
            raise InvalidAnswer(f"{self.url} did not answer with JSON: {self.excerpt!r}") from error
        if not isinstance(value, dict):
            raise InvalidAnswer(f"{self.url} did not answer with a JSON object: {self.excerpt!r}")
        return value


def _moment(text: str) -> float | None:
    """Return the time that a header tells, in seconds since the epoch."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):  # the latter for the year 99999999999
        return None


class Stream:
    """
    An answer without an end, read line by line.

    :param answer: status and headers; the body is there only if the status is not 200.
    """

    def __init__(self, answer: Answer, response: aiohttp.ClientResponse) -> None:
        self.answer = answer
        self._response = response

    async def lines(self, *, limit: int) -> AsyncGenerator[Sequence[bytes], None]:
        """
        Yield the lines as they come, those that come together in one piece. Ends when the server ends it.

        What follows the last line break when the stream ends is no line: it was cut off.

        :param limit: bytes that a line may have.
        :raises ConnectionLost: the connection broke.
        :raises AnswerTimeout: nothing came for longer than the read timeout.
        :raises InvalidAnswer: a line is longer than the limit.
        """
        begun: list[bytes] = []
        size = 0
        with _named(self.answer.url):
            async for chunk in self._response.content.iter_any():
                *lines, rest = chunk.split(b"\n")
                if lines:
                    lines[0] = b"".join([*begun, lines[0]])
                    begun, size = [], 0
                begun.append(rest)
                size += len(rest)
                if max([size, *map(len, lines)]) > limit:
                    raise InvalidAnswer(f"a line of {self.answer.url} is longer than {limit} bytes")
                if lines:
                    yield lines


class HttpClient:
    """
    An aiohttp session, made on first use, in the event loop that uses it.

    :param tls: for ``https`` URLs; ``None`` means the system's authorities.
    :param proxy: URL of an HTTP proxy.
    :param server_hostname: the name that the server's certificate must have, if not the URL's.
    """

    def __init__(
        self, *, tls: ssl.SSLContext | None = None, proxy: str | None = None, server_hostname: str | None = None
    ) -> None:
        self._tls = tls
        self._proxy = proxy
        self._server_hostname = server_hostname
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close the session."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        url: str,
        *,
        limit: int,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """
        Send one request and read the whole answer.

        :param limit: bytes that the answer may have.
        :param body: is sent as JSON.
        :param timeout: seconds for all of it; :data:`TOTAL_TIMEOUT` when ``None``.
        :raises ConnectFailed: nothing was sent.
        :raises ConnectionLost: the server hung up.
        :raises AnswerTimeout: no answer in time.
        :raises InvalidAnswer: longer than the limit, or not HTTP.
        :raises BadConfiguration: TLS was not agreed on.
        """
        import aiohttp

        timeout = timeout or TOTAL_TIMEOUT
        limits = aiohttp.ClientTimeout(
            total=timeout, connect=min(timeout, CONNECT_TIMEOUT), sock_read=min(timeout, READ_TIMEOUT)
        )
        with _named(url, timeout, silent=min(timeout, READ_TIMEOUT)):
            async with self._send(method, url, json=body, headers=headers, timeout=limits) as response:
                return await _answer(response, url=url, limit=limit)

    @contextlib.asynccontextmanager
    async def stream(
        self, url: str, *, headers: Mapping[str, str] | None = None, read_timeout: float
    ) -> AsyncIterator[Stream]:
        """
        Send a ``GET`` whose answer comes bit by bit, for as long as the context is open.

        :param read_timeout: seconds without a byte after which the server is taken for hung.
        :raises ConnectFailed, ConnectionLost, AnswerTimeout, InvalidAnswer, BadConfiguration: as :meth:`request` does.
        """
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT, sock_read=read_timeout)
        async with contextlib.AsyncExitStack() as stack:
            with _named(url, read_timeout):
                response = await stack.enter_async_context(self._send("GET", url, headers=headers, timeout=limits))
                if response.status != 200:
                    answer = await asyncio.wait_for(_answer(response, url=url, limit=_ERROR_LIMIT), TOTAL_TIMEOUT)
                else:
                    answer = Answer(url=url, status=200, headers=response.headers, body=b"")
            yield Stream(answer, response)

    def _send(self, method: str, url: str, **options: Any) -> aiohttp.client._RequestContextManager:
        from yarl import URL

        return self._open().request(
            method,
            URL(url, encoded=True),
            proxy=self._proxy,
            server_hostname=self._server_hostname,
            allow_redirects=False,
            **options,
        )

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None or self._session.closed:
            # Jetty closes idle connections after 30 s; aiohttp lets go of them after 15 s, and meets no dead one.
            connector = aiohttp.TCPConnector(limit=32, ssl=self._tls if self._tls is not None else True)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._session


@contextlib.contextmanager
def _named(url: str, timeout: float | None = None, *, silent: float | None = None) -> Iterator[None]:
    """
    Raise this module's exceptions for aiohttp's.

    :param timeout: seconds in which the answer was to come.
    :param silent: seconds in which something of it was, if that is another limit.
    """
    import aiohttp

    try:
        yield
    except aiohttp.ClientSSLError as error:
        raise _tls_failure(url, error) from error
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ConnectFailed(f"no connection to {url}: {error or type(error).__name__}") from error
    except asyncio.TimeoutError as error:
        timeout = (silent or timeout) if isinstance(error, aiohttp.SocketTimeoutError) else timeout
        within = f" within {timeout:g} s" if timeout else " any more"
        raise AnswerTimeout(f"{url} did not answer{within}") from error
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
        raise ConnectionLost(f"{url} closed the connection without an answer") from error
    except aiohttp.ClientPayloadError as error:
        raise ConnectionLost(f"{url} closed the connection in the middle of its answer") from error
    except aiohttp.ClientError as error:
        raise InvalidAnswer(f"{url} did not answer in HTTP: {type(error).__name__}") from error


async def _answer(response: aiohttp.ClientResponse, *, url: str, limit: int) -> Answer:
    body = await _read(response, url=url, limit=limit)
    return Answer(url=url, status=response.status, headers=response.headers, body=body)


async def for_each(call: Callable[[_T], Awaitable[None]], items: Iterable[_T], *, at_once: int) -> None:
    """Call for each item, a few at once; the first error ends it."""
    gate = asyncio.Semaphore(at_once)

    async def one(item: _T) -> None:
        async with gate:
            await call(item)

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ssl_context(ca: str) -> ssl.SSLContext:
    """
    Return a TLS context that trusts a certificate authority.

    :param ca: path of a PEM file, or the PEM text itself.
    :raises BadConfiguration: when it cannot be read.
    """
    try:
        if "-----BEGIN" in ca:
            return ssl.create_default_context(cadata=ca)
        pem = await asyncio.to_thread(Path(ca).read_text)
        return ssl.create_default_context(cadata=pem)
    except (OSError, TypeError, ValueError) as error:  # ssl.SSLError is an OSError; TypeError: it is not ASCII
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise BadConfiguration(
            f"the extra 'ca' of the connection cannot be used as a certificate authority ({reason}): "
            "give the path of a PEM file that the Airflow processes can read, or the PEM text itself"
        ) from error


def _tls_failure(url: str, error: Exception) -> BadConfiguration:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return BadConfiguration(
            f"the certificate of {url} is not trusted ({_verify_message(error)}): give the certificate authority "
            "in the extra 'ca' of the connection (a path or PEM text)"
        )
    return BadConfiguration(
        f"no TLS with {url} ({getattr(error, 'os_error', None) or error}): if the server speaks plain HTTP, "
        "set 'http' as the scheme in the connection's extras"
    )


def _verify_message(error: Exception) -> str:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    return getattr(cause, "verify_message", "") or str(cause)[:200]


async def _read(response: aiohttp.ClientResponse, *, url: str, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_chunked(1 << 16):
        size += len(chunk)
        if size > limit:
            response.close()
            raise AnswerTooLong(f"the answer of {url} is longer than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


_HIGH, _LOW = r"\\u[dD][89aAbB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF = re.compile(rf"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")


def whole_characters(text: str) -> str:
    """
    Return JSON without the halves of characters that stand in it as escapes: each becomes U+FFFD.

    A message that Java has cut off in the middle of an emoji ends in one, and neither a URL, nor Airflow's database,
    nor the way there takes a text with it.
    """
    return _HALF.sub(r"\\ufffd", text) if "\\ud" in text or "\\uD" in text else text


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _loads_stepwise(text: str, element: Callable[[Any, str], Any], within: str = "") -> Any:
    """
    Parse a JSON object, which may be large and this a thread, element by element of its arrays.

    ``json.loads`` holds the interpreter's lock from the first to the last character, thread or not:
    10,000 drivers kept the event loop waiting for 130 ms. Here the lock is free between any two elements.
    """
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        return _DECODER.decode(text)
    members, position = _members(text, position, element, within)
    _at_end(text, position)
    return members


def _members(text: str, position: int, element: Callable[[Any, str], Any], within: str) -> tuple[dict[str, Any], int]:
    members: dict[str, Any] = {}
    position = _skip(text, position + 1)
    if text[position : position + 1] == "}":
        return members, position + 1
    while True:
        _expect(text, position, '"')
        key, position = _DECODER.raw_decode(text, position)
        position = _skip(text, _expect(text, _skip(text, position), ":"))
        begin = text[position : position + 1]
        if begin == "[":
            members[key], position = _array(text, position, element, key)
        elif begin == "{" and within and key == within:
            members[key], position = _members(text, position, element, "")
        else:
            members[key], position = _DECODER.raw_decode(text, position)
        position = _skip(text, position)
        if text[position : position + 1] == "}":
            return members, position + 1
        position = _skip(text, _expect(text, position, ","))


def _array(text: str, position: int, element: Callable[[Any, str], Any], name: str) -> tuple[list[Any], int]:
    elements: list[Any] = []
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        return elements, position + 1
    while True:
        value, position = _DECODER.raw_decode(text, position)
        elements.append(element(value, name))
        del value
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            return elements, position + 1
        position = _skip(text, _expect(text, position, ","))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _expect(text: str, position: int, char: str) -> int:
    if text[position : position + 1] != char:
        raise json.JSONDecodeError(f"expecting {char!r}", text, position)
    return position + 1


def _at_end(text: str, position: int) -> None:
    if _skip(text, position) != len(text):
        raise json.JSONDecodeError("extra data", text, position)
