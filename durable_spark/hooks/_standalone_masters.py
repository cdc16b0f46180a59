"""
Speaking to the masters and workers of a standalone cluster: who leads, and what each of them answers.

What flows in: an Airflow connection, read once. What flows out: the leader's page as a
:class:`~durable_spark.hooks._standalone_pages.View`, the REST server's answers as plain objects, and
exceptions that say which field of the connection to look at.

The trap: standby and recovering masters answer, too, and know nothing. Only the leader's word counts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from durable_spark.hooks._connection import Extras, master_url, read_connection
from durable_spark.hooks._http import (
    Answer,
    AnswerTimeout,
    ConnectFailed,
    ConnectionLost,
    HttpClient,
    ssl_context,
)
from durable_spark.hooks._standalone_pages import PageReader, View, log_text
from durable_spark.jobs import (
    AuthenticationFailed,
    BadConfiguration,
    ClusterError,
    ClusterUnreachable,
    DurableJobError,
    InvalidAnswer,
    RequestRefused,
    SubmissionRefused,
)

__all__ = ["LOG_CHUNK", "PAGE_LIMIT", "Master", "Masters", "NobodyLeads", "Settings", "first_lines", "not_leading"]

RPC_PORT = 7077
REST_PORT = 6066
UI_PORT = 8080

PAGE_LIMIT = 64 << 20
"""
Bytes that a page may have.

Indented as Spark sends it, a driver takes 320 to 400 bytes of ``/json/``, an application 370 to 450, a
worker 400 to 500 (4.3.0). 10,000 followed drivers, with an application each, on 1,000 workers: 9 MB.
"""
REST_LIMIT = 1 << 20
"""Bytes that an answer of the REST server may have; one with a stack trace has a few thousand."""
LOG_CHUNK = 64 << 10
"""Bytes of a log that are asked for at once."""
_NOBODY = "driver-00000000000000-0000"
"""A valid ID that no driver has."""
_NOT_LEADING = re.compile(r"(?i)current state is not alive|in ALIVE state")
"""How a standby or recovering master answers (``Utils.BACKUP_STANDALONE_MASTER_PREFIX``; tried on 4.3.0)."""

_T = TypeVar("_T")


class Master(NamedTuple):
    """One master: its ``spark://host:port``, and the origins of its REST server and its page."""

    address: str
    rest: str
    ui: str


class Settings(NamedTuple):
    """What the connection says, checked."""

    masters: Sequence[Master]
    poll_interval: float
    headers: Mapping[str, str]
    ca: str | None

    @property
    def master_url(self) -> str:
        """What drivers register with: all masters."""
        return "spark://" + ",".join(master.address.removeprefix("spark://") for master in self.masters)


class NobodyLeads(ClusterUnreachable):
    """All masters answered, and none is the leader."""


class Masters:
    """
    The masters that a connection names.

    :param conn_id: the connection; it is read on first use.
    :param poll_interval: seconds, unless the connection says otherwise.
    """

    def __init__(self, conn_id: str, *, poll_interval: float) -> None:
        self._conn_id = conn_id
        self._poll_interval = poll_interval
        self._read: Settings | None = None
        self._client: HttpClient | None = None
        self._leader: Master | None = None
        self._views: dict[Master, View] = {}

    async def aclose(self) -> None:
        """Close the HTTP session."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def create(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        Send a submission to the leader; on to its successor only when the leader certainly did not take it.

        :raises SubmissionRefused: the master said no.
        :raises NobodyLeads: no master takes submissions now.
        """
        leader = self._leader or await self.leader_by_rest()
        try:
            answer = await self._post_create(leader, request)
            if not not_leading(answer):
                return answer
        except ConnectFailed:
            if len((await self.settings()).masters) == 1:
                raise
        answer = await self._post_create(await self.leader_by_rest(), request)
        if not_leading(answer):
            raise NobodyLeads("no master takes submissions now: the leadership is changing hands")
        return answer

    async def _post_create(self, master: Master, request: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = await self.ask("POST", f"{master.rest}/v1/submissions/create", limit=REST_LIMIT, body=request)
        if _refused(answer):
            raise SubmissionRefused(f"the master refused the submission ({answer.status}): {await _said(answer)}")
        told = await answer.expect_ok().json()
        if not isinstance(told.get("success"), bool):
            raise InvalidAnswer(f"{master.rest} did not say whether it took the submission")
        return told

    async def kill(self, driver_id: str) -> None:
        """
        Have the leader kill a driver. One that has ended, or is not known, is not an error.

        :raises RequestRefused: the master does not allow it.
        """
        leader = await self.leader_by_rest()
        answer = await self.ask("POST", f"{leader.rest}/v1/submissions/kill/{driver_id}", limit=REST_LIMIT)
        if _refused(answer):
            raise RequestRefused(f"the master refused to kill {driver_id} ({answer.status}): {await _said(answer)}")
        told = await answer.expect_ok().json()
        if not_leading(told):
            raise NobodyLeads(f"{leader.address} cannot kill now: {first_lines(told.get('message'))}")
        if not isinstance(told.get("success"), bool):
            raise InvalidAnswer(f"{leader.rest} did not say whether it kills {driver_id}")

    async def first_view(self) -> View:
        """
        Return the leader's page; when there is none to be had, find out whether its port is wrong.

        A page that does not answer is asked for once more. When many tasks begin in one instant, the queue of the
        master's port, which has room for fifty, overflows, and a connection that was not let in is told so by nobody
        (seen with Spark 4.3.0, whose master was idle meanwhile).
        """
        again = AsyncRetrying(
            stop=stop_after_attempt(2),
            wait=wait_random_exponential(multiplier=0.5, max=5),
            retry=retry_if_exception_type(AnswerTimeout),
            reraise=True,
        )
        try:
            return await again(self.agreed_view)
        except (NobodyLeads, AuthenticationFailed):
            raise
        except ClusterUnreachable as error:
            try:
                leader = await self.leader_by_rest()
            except DurableJobError:
                raise error from None
            raise BadConfiguration(
                f"the REST server {leader.rest} answers, but not the master's page ({error}): set the extra 'ui-port' "
                "(and 'ui-scheme') to the address of the master's web UI, and let Airflow reach it"
            ) from error

    async def leading_view(self) -> View:
        """Return the leader's page, from the last known leader if it still leads."""
        spared: dict[Master, DurableJobError] = {}
        if (leader := self._leader) is not None:
            try:
                view = await self._view(leader)
            except ClusterError as error:
                if isinstance(error, ClusterUnreachable) and error.retry_after is not None:
                    spared[leader] = error
            else:
                if view.leading:
                    return view
        return await self.agreed_view(spared)

    async def agreed_view(self, spared: Mapping[Master, DurableJobError] | None = None) -> View:
        """
        Return the leader's page, all masters asked.

        :param spared: masters that have asked just now to be left alone for a while, and the errors that they are.
        :raises ClusterUnreachable: when none leads, or more than one says so.
        """
        spared = spared or {}
        masters = (await self.settings()).masters
        views, troubles = await _all(self._view(master) for master in masters if master not in spared)
        errors = [*spared.values(), *troubles]
        leading = [view for view in views if view.leading]
        if len(leading) == 1:
            self._leader = await self.master_of(leading[0])
            return leading[0]
        self._leader = None
        if leading:
            raise NobodyLeads(f"more than one master leads: {', '.join(view.address for view in leading)}")
        _raise_first(errors, BadConfiguration, AuthenticationFailed)
        if views:
            states = ", ".join(f"{view.address} is {view.raw}" for view in views)
            raise NobodyLeads(f"no master leads now: {'; '.join([states, *map(str, errors)])}")
        _raise_first(errors, DurableJobError)
        raise AssertionError("a connection has a master")

    async def leader_by_rest(self) -> Master:
        """Return the leader, found without the masters' pages."""
        masters = (await self.settings()).masters
        answers, errors = await _all(self._leads(master) for master in masters)
        leading = [master for master, leads in answers if leads]
        if len(leading) == 1:
            return leading[0]
        if leading:
            raise NobodyLeads(f"more than one master leads: {', '.join(master.address for master in leading)}")
        _raise_first(errors, BadConfiguration, AuthenticationFailed)
        if answers:
            raise NobodyLeads(f"no master leads now: {'; '.join(['standby or recovering', *map(str, errors)])}")
        _raise_first(errors, DurableJobError)
        raise AssertionError("a connection has a master")

    async def _leads(self, master: Master) -> tuple[Master, bool]:
        return master, not not_leading(await self.get_status(master, _NOBODY))

    async def master_of(self, view: View) -> Master:
        """Return the master whose page it is."""
        return next(master for master in (await self.settings()).masters if master.ui == view.address)

    async def reach_rest(self, master: Master) -> str:
        """
        Return Spark's version from a master's REST server.

        :raises BadConfiguration: when something else is there, or nothing at all although the master's page answers.
        """
        try:
            told = await self.get_status(master, _NOBODY)
        except ConnectFailed as error:
            raise BadConfiguration(
                f"the master's page answers, but not its REST server ({error}): set spark.master.rest.enabled=true on "
                "the master, or the extra 'rest-port' to the value of its spark.master.rest.port"
            ) from error
        except ConnectionLost as error:
            raise BadConfiguration(f"{error}: {_wrong_rest_port(master)}") from error
        except InvalidAnswer as error:
            raise BadConfiguration(f"{error}. {_wrong_rest_port(master)}") from error
        if told.get("action") != "SubmissionStatusResponse":
            raise BadConfiguration(f"{master.rest} does not answer as a REST server: {_wrong_rest_port(master)}")
        return str(told.get("serverSparkVersion", "unknown"))[:40]

    async def _view(self, master: Master) -> View:
        answer = (await self.ask("GET", f"{master.ui}/json/", limit=PAGE_LIMIT)).expect_ok()
        time = answer.date
        if time is None:
            raise InvalidAnswer(f"{answer.url} does not tell the time (header Date)")
        reader = PageReader(master.ui, self._views.get(master))
        view = self._views[master] = await answer.parse(
            lambda page: reader.view(page, time=time), element=reader.element
        )
        return view

    async def get_status(self, master: Master, driver_id: str) -> Mapping[str, Any]:
        """Return what a master's REST server says of a driver; whether it leads is for the caller to see."""
        answer = await self.ask("GET", f"{master.rest}/v1/submissions/status/{driver_id}", limit=REST_LIMIT)
        told = await answer.expect_ok().json()
        if told.get("submissionId") != driver_id:
            raise InvalidAnswer(f"{answer.url} answered about {str(told.get('submissionId'))[:80]!r}")
        return told

    async def log_page(
        self, worker: str, driver_id: str, *, offset: int | None = None, log: str = "stderr"
    ) -> tuple[str, int] | None:
        """
        Return a part of a driver's log and the length of the whole, ``None`` when the worker has no such driver.

        :param offset: where the part begins; the end of the log when ``None``.
        """
        where = "" if offset is None else f"&offset={offset}"
        url = f"{worker}/log/?driverId={driver_id}&logType={log}&byteLength={LOG_CHUNK}{where}"
        answer = await self.ask("GET", url, limit=8 * LOG_CHUNK, timeout=5.0)
        return log_text(answer.expect_ok().text)

    async def ask(
        self,
        method: str,
        url: str,
        *,
        limit: int,
        body: Any = None,
        timeout: float | None = None,
    ) -> Answer:
        """Send a request; the bearer token goes along to the configured masters only."""
        settings = await self.settings()
        if self._client is None:
            tls = await ssl_context(settings.ca) if settings.ca else None
            self._client = HttpClient(tls=tls)
        masters = {origin for master in settings.masters for origin in (master.rest, master.ui)}
        parts = urlsplit(url)
        headers = settings.headers if f"{parts.scheme}://{parts.netloc}" in masters else None
        return await self._client.request(method, url, limit=limit, body=body, headers=headers, timeout=timeout)

    async def settings(self) -> Settings:
        """Return what the connection says. It is read once."""
        if self._read is None:
            connection = await read_connection(self._conn_id)
            extras = Extras(connection)
            self._read = Settings(
                masters=_masters(master_url(connection), extras),
                poll_interval=extras.seconds("poll-interval", self._poll_interval),
                headers={"Authorization": f"Bearer {connection.password}"} if connection.password else {},
                ca=extras.text("ca"),
            )
        return self._read


def _masters(url: str, extras: Extras) -> Sequence[Master]:
    scheme, _, rest = url.partition("://")
    if scheme.lower() != "spark":
        raise BadConfiguration(f"{url[:200]!r} is not the URL of a standalone master: give spark://host:7077")
    addresses = [_address(part) for part in rest.split(",")]
    rest_scheme = extras.choice("rest-scheme", ("http", "https"))
    ui_scheme = extras.choice("ui-scheme", ("http", "https"))
    rest_ports = extras.ports("rest-port", REST_PORT, count=len(addresses))
    ui_ports = extras.ports("ui-port", UI_PORT, count=len(addresses))
    masters = [
        Master(f"spark://{host}:{port}", f"{rest_scheme}://{host}:{rest_port}", f"{ui_scheme}://{host}:{ui_port}")
        for (host, port), rest_port, ui_port in zip(addresses, rest_ports, ui_ports, strict=True)
    ]
    if len({master.ui for master in masters}) < len(masters):
        raise BadConfiguration(
            f"several masters of {url[:200]!r} have the same web address: give a port for each in 'rest-port' and "
            "'ui-port', separated by commas"
        )
    return masters


def _address(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text.strip()}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not re.fullmatch(r"[\w.:-]+", host, re.ASCII) or parts.username is not None or parts.path or parts.query:
        raise BadConfiguration(f"{text[:200]!r} in the connection's host is not a master's address: give host:7077")
    return (f"[{host}]" if ":" in host else host), port or RPC_PORT


def not_leading(answer: Mapping[str, Any]) -> bool:
    """Whether a REST server's answer is that of a master that does not lead."""
    return answer.get("success") is False and _NOT_LEADING.search(str(answer.get("message"))) is not None


def _wrong_rest_port(master: Master) -> str:
    port = urlsplit(master.rest).port
    rpc = urlsplit(master.address).port
    if port == rpc:
        return f"{port} is the master's RPC port, set the extra 'rest-port' to its REST port (usually {REST_PORT})"
    return f"set the extra 'rest-port' (and 'rest-scheme') to the master's REST server (usually {REST_PORT})"


def first_lines(message: object) -> str:
    """Return a message of the REST server without its stack trace, bounded."""
    lines = [line for line in str(message or "").splitlines() if not line.startswith("\t")]
    return "\n".join(lines)[:2000].strip()


def _refused(answer: Answer) -> bool:
    """Whether a request was understood and refused: not for want of credentials or patience, nor by a tired proxy."""
    return 400 <= answer.status < 500 and answer.status not in (401, 403, 408, 429)


async def _said(answer: Answer) -> str:
    try:
        return first_lines((await answer.json()).get("message")) or answer.excerpt
    except InvalidAnswer:
        return answer.excerpt


async def _all(calls: Iterable[Awaitable[_T]]) -> tuple[Sequence[_T], Sequence[DurableJobError]]:
    """Return the results, and our own errors; any other one is raised."""
    results: list[_T] = []
    errors: list[DurableJobError] = []
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, DurableJobError):
            errors.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results.append(outcome)
    return results, errors


def _raise_first(errors: Sequence[DurableJobError], *kinds: type[DurableJobError]) -> None:
    for error in errors:
        if isinstance(error, kinds):
            raise error
