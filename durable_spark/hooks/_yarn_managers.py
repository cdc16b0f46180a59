"""
Speaking to the ResourceManagers of a YARN cluster: which of them is active, as whom we ask, what may be believed.

What flows in: an Airflow connection, read once, and the Hadoop configuration of this machine if the connection leaves
the addresses to it. What flows out: answers of the active ResourceManager.

Two traps. A standby answers with a redirect (307) to where *it* believes the active one to be, by a name that may mean
nothing here: no redirect is followed, and no credentials go to a host that the connection does not name. And a
ResourceManager that has just been started answers for 0.3 to 0.6 s before it has read its own state: it knows no
application then, and says so with a 404 or an empty list (tried on 3.5.0). What it does not know is therefore believed
within :meth:`Managers.vouching` alone.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

from durable_spark.hooks._connection import Extras, master_url, read_connection
from durable_spark.hooks._http import Answer, HttpClient, ssl_context
from durable_spark.hooks._spnego import Keytab, Negotiator
from durable_spark.hooks._yarn_apps import is_history_template, is_web_address
from durable_spark.hooks._yarn_conf import read_site
from durable_spark.jobs import (
    AuthenticationFailed,
    BadConfiguration,
    ClusterUnreachable,
    DurableJobError,
    InvalidAnswer,
)

__all__ = ["Ask", "Info", "Manager", "Managers", "NotVouchedFor", "Settings", "said"]

ADDRESS = "yarn_resourcemanager_webapp_address"
TIMELINE_ADDRESS = "yarn-timeline-address"
HTTP_PORT, HTTPS_PORT = 8088, 8090
INFO_LIMIT = 1 << 20
INFO_TIMEOUT = 5.0
"""Seconds in which a ResourceManager must say who it is."""
KNOX_SERVICE = "/resourcemanager"
"""How the path of a ResourceManager behind Apache Knox ends; what follows there is ``/v1``, without ``/ws``."""

_COOKIE = re.compile(r'hadoop\.auth=("?)([^";,\s]*)\1(?:;|$)')
_USER = re.compile(r"[\w.@/+-]{1,200}", re.ASCII)


class Ask(Protocol):
    """Sends a ``GET`` for a path below ``…/v1/cluster/``, and returns who answered, and the answer."""

    def __call__(self, path: str, *, limit: int) -> Awaitable[tuple[Manager, Answer]]:
        """Return them."""


log = logging.getLogger(__name__)


class NotVouchedFor(ClusterUnreachable):
    """What the cluster does not know cannot be believed now: none leads, several do, or one has just been started."""


class Manager(NamedTuple):
    """
    A ResourceManager's web app.

    :param base: its URL, as people know it.
    """

    base: str

    @property
    def api(self) -> str:
        """Where its REST server's paths begin."""
        return f"{self.base}/v1/cluster" if self.base.endswith(KNOX_SERVICE) else f"{self.base}/ws/v1/cluster"

    @property
    def page(self) -> str:
        """What the URL of an application's page begins with. Knox has the pages in a service of their own."""
        if self.base.endswith(KNOX_SERVICE):
            return f"{self.base.removesuffix(KNOX_SERVICE)}/yarn/cluster/app/"
        return f"{self.base}/cluster/app/"

    @property
    def conf(self) -> str:
        """Where it shows its configuration; Knox does not."""
        return f"{self.base}/conf"


class Info(NamedTuple):
    """
    Who a ResourceManager says it is.

    :param state: ``ACTIVE``, ``STANDBY`` or ``INITIALIZING``.
    :param started: when its process was started, in milliseconds since the epoch: tells two lives of it apart.
    :param time: its clock, in seconds since the epoch.
    """

    manager: Manager
    state: str
    started: int
    version: str
    time: float


class Settings(NamedTuple):
    """What the connection says, checked."""

    managers: Sequence[Manager]
    timeline: str
    history: str | None
    user: str
    principal: str | None
    keytab: Keytab | None
    auth: str
    basic: Mapping[str, str]
    login: str
    ca: str | None
    poll_interval: float

    @property
    def who(self) -> str:
        """As whom we ask, for messages."""
        return self.principal or self.login or self.user

    @property
    def negotiates(self) -> bool:
        """Whether Kerberos is to be used, should a server ask for it."""
        return self.auth == "kerberos" or (self.auth == "auto" and not self.basic)


class Managers:
    """
    The ResourceManagers that a connection names.

    :param conn_id: the connection; it is read on first use.
    :param poll_interval: seconds, unless the connection says otherwise.
    """

    recovery_time: float = 10.0
    """Seconds after the start of a ResourceManager in which an absence is not believed even if it says ``ACTIVE``."""

    def __init__(self, conn_id: str, *, poll_interval: float) -> None:
        self._conn_id = conn_id
        self._poll_interval = poll_interval
        self._read: Settings | None = None
        self._client: HttpClient | None = None
        self._negotiator: Negotiator | None = None
        self._negotiating: dict[str, asyncio.Lock] = {}
        self._cookies: dict[str, str] = {}
        self._leader: Manager | None = None
        self._warned_of_two = False

    async def aclose(self) -> None:
        """Close the HTTP session, and forget who we were."""
        client, self._client = self._client, None
        self._cookies.clear()
        self._negotiating.clear()
        if client is not None:
            await client.aclose()

    # --- questions

    async def ask(self, path: str, *, limit: int, method: str = "GET", body: Any = None) -> tuple[Manager, Answer]:
        """
        Ask the active ResourceManager: the last known one first, then the others.

        :return: its answer, unless that is a 307, 401, 429 or 5xx.
        :raises ClusterUnreachable: when none answers as the active one.
        """
        managers = (await self.settings()).managers
        errors: list[ClusterUnreachable] = []
        for manager in sorted(managers, key=lambda each: each != self._leader):
            try:
                answer = await self._of(manager, path, limit=limit, method=method, body=body)
            except ClusterUnreachable as error:
                errors.append(error)
            else:
                self._leader = manager
                return manager, answer
        self._leader = None
        if len(errors) == 1:
            raise errors[0]
        delays = [error.retry_after for error in errors if error.retry_after is not None]
        why = "; ".join(map(str, errors))
        raise ClusterUnreachable(f"no ResourceManager is active: {why}", retry_after=min(delays, default=None))

    async def _of(self, manager: Manager, path: str, *, limit: int, method: str = "GET", body: Any = None) -> Answer:
        answer = await self.fetch(f"{manager.api}/{path}", limit=limit, method=method, body=body)
        if answer.status == 307:  # with Location, without, or to itself while the leadership changes hands
            raise ClusterUnreachable(f"{manager.base} is a standby ({answer.excerpt})", retry_after=answer.retry_after)
        if answer.status >= 500 or answer.status == 429:
            raise ClusterUnreachable(
                f"{answer.url} answered {answer.status}: {await said(answer)}", retry_after=answer.retry_after
            )
        return answer

    async def info(self, manager: Manager) -> Info:
        """Return who a ResourceManager says it is."""
        answer = await self.fetch(f"{manager.api}/info", limit=INFO_LIMIT, timeout=INFO_TIMEOUT)
        if answer.status == 404:
            raise InvalidAnswer(
                f"{answer.url} answered 404: {manager.base} does not answer as a ResourceManager. Give the address of "
                f"its web app in the extra {ADDRESS!r}, such as http://host:{HTTP_PORT}"
            )
        told = (await answer.expect_ok().json()).get("clusterInfo")
        try:
            state, started = told["haState"], told["startedOn"]  # type: ignore[index]
            version = re.sub(r"[^\w.+-]", "", str(told["resourceManagerVersion"]))[:40]  # type: ignore[index]
        except (KeyError, TypeError) as error:
            raise InvalidAnswer(f"{answer.url} does not say who it is: {answer.excerpt!r}") from error
        numbered = isinstance(started, int) and not isinstance(started, bool) and 0 <= started < 1 << 63
        if not isinstance(state, str) or not numbered:
            raise InvalidAnswer(f"{answer.url} does not say who it is: {answer.excerpt!r}")
        if answer.date is None:
            raise InvalidAnswer(f"{answer.url} does not tell the time (header Date)")
        return Info(manager, state[:20], started, version, answer.date)

    async def active(self) -> Info:
        """
        Return who is active, all ResourceManagers asked.

        :raises NotVouchedFor: when none is, or more than one says so.
        """
        managers = (await self.settings()).managers
        infos: list[Info] = []
        errors: list[DurableJobError] = []
        for outcome in await asyncio.gather(*map(self.info, managers), return_exceptions=True):
            if isinstance(outcome, Info):
                infos.append(outcome)
            elif isinstance(outcome, DurableJobError):
                errors.append(outcome)
            else:
                raise outcome
        active = [info for info in infos if info.state == "ACTIVE"]
        if len(active) == 1:
            self._leader, self._warned_of_two = active[0].manager, False
            return active[0]
        self._leader = None
        if active:
            raise NotVouchedFor(self._two(active))
        for kind in (BadConfiguration, AuthenticationFailed):
            for error in errors:
                if isinstance(error, kind):
                    raise error
        if not infos:
            if len(errors) == 1:
                raise errors[0]
            raise ClusterUnreachable(f"no ResourceManager answers: {'; '.join(map(str, errors))}")
        states = [f"{info.manager.base} is {info.state}" for info in infos]
        raise NotVouchedFor(f"no ResourceManager is active: {'; '.join([*states, *map(str, errors)])}")

    def _two(self, active: Sequence[Info]) -> str:
        """Say that two lead: without a ZooKeeper that fences the older one, they contradict each other."""
        text = f"more than one ResourceManager is active: {', '.join(info.manager.base for info in active)}"
        if not self._warned_of_two:
            self._warned_of_two = True
            log.warning("%s. What one of them does not know, the other may", text)
        return text

    def asking(self, manager: Manager) -> Ask:
        """Return what asks one ResourceManager and no other."""

        async def ask(path: str, *, limit: int) -> tuple[Manager, Answer]:
            return manager, await self._of(manager, path, limit=limit)

        return ask

    @asynccontextmanager
    async def vouching(self) -> AsyncIterator[tuple[Info, Ask]]:
        """
        Ask one ResourceManager that is ACTIVE, and the same process, before the questions and after them.

        Its process says ACTIVE once it has read its whole state (``ResourceManager.transitionToActive``), and between
        two answers of the same process nobody else can have answered at its address. That holds behind a proxy, too,
        where one TCP connection would show nothing. What was asked counts only when the context has been left.

        :raises NotVouchedFor: when it does not hold.
        """
        before = await self.active()
        age = before.time - before.started / 1000
        if age < self.recovery_time:
            raise NotVouchedFor(f"{before.manager.base} was started {max(0.0, age):.0f} s ago")

        yield before, self.asking(before.manager)
        after = await self.info(before.manager)
        if (after.state, after.started) != (before.state, before.started):
            raise NotVouchedFor(f"{before.manager.base} was restarted, or is not active any more ({after.state})")

    # --- one request

    async def fetch(
        self, url: str, *, limit: int, method: str = "GET", body: Any = None, timeout: float | None = None
    ) -> Answer:
        """
        Send a request to a server of the cluster, as whom the connection says.

        :return: any answer but a 401; redirects are not followed.
        :raises AuthenticationFailed: the server does not accept who we are.
        """
        settings = await self.settings()
        origin = _origin(url)
        if settings.user:
            url = f"{url}{'&' if '?' in url else '?'}user.name={quote(settings.user, safe='')}"

        async def send(authorization: str = "") -> Answer:
            headers = {"Accept": "application/json, text/plain;q=0.9, */*;q=0.5"}
            if origin in {_origin(manager.base) for manager in settings.managers}:
                headers.update(settings.basic)
            if cookie := self._cookies.get(origin):
                headers["Cookie"] = f"hadoop.auth={cookie}"
            if authorization:
                headers["Authorization"] = authorization
            client = await self._http()
            return await client.request(method, url, limit=limit, body=body, headers=headers, timeout=timeout)

        if settings.auth == "kerberos" and origin not in self._cookies:
            answer = await self._negotiated(origin, send)
        else:
            answer = await send()
            if _wants_negotiation(answer) and settings.negotiates:
                answer = await self._negotiated(origin, send)
        if answer.status == 401 or _refuses_token(answer):
            raise AuthenticationFailed(f"{_bare(answer.url)} answered {answer.status}: {await _why(answer, settings)}")
        return answer

    async def _negotiated(self, origin: str, send: Callable[..., Awaitable[Answer]]) -> Answer:
        """
        Send a request with a ticket, and keep the cookie that stands for it afterwards (``AuthenticationFilter``).

        Of many requests at once, one negotiates; the others use its cookie.
        """
        settings = await self.settings()
        lock = self._negotiating.setdefault(origin, asyncio.Lock())
        seen = self._cookies.get(origin)
        async with lock:
            if (cookie := self._cookies.get(origin)) is not None and cookie != seen:
                answer = await send()
                if not _wants_negotiation(answer):
                    return answer
            self._cookies.pop(origin, None)
            if self._negotiator is None:
                self._negotiator = Negotiator(principal=settings.principal, keytab=settings.keytab)
            host = urlsplit(origin).hostname or ""
            handshake = await self._negotiator.begin(host)
            answer = await send(f"Negotiate {handshake.token}")
            scheme, _, token = answer.headers.get("WWW-Authenticate", "").partition(" ")
            if answer.status != 401 and scheme.lower() == "negotiate" and token:
                await handshake.finish(token.strip(), host)
            if cookie := _cookie_of(answer):
                self._cookies[origin] = cookie
            return answer

    async def _http(self) -> HttpClient:
        if self._client is None:
            ca = (await self.settings()).ca
            tls = await ssl_context(ca) if ca else None
            self._client = self._client or HttpClient(tls=tls)
        return self._client

    # --- the connection

    async def settings(self) -> Settings:
        """Return what the connection says. It is read once."""
        if self._read is None:
            connection = await read_connection(self._conn_id)
            extras = Extras(connection)
            _expect_yarn(master_url(connection))
            addresses = [part.strip() for part in (extras.text(ADDRESS) or "").split(",") if part.strip()]
            timeline = extras.text(TIMELINE_ADDRESS) or ""
            if not addresses:
                site = await read_site()
                if site is None:
                    raise BadConfiguration(
                        f"connection {self._conn_id!r} does not say where the ResourceManager is: give the address of "
                        f"its web app in the extra {ADDRESS!r} (http://host:{HTTP_PORT}; of several, separated by "
                        "commas), or set HADOOP_CONF_DIR for all Airflow processes, the triggerer as well"
                    )
                addresses, timeline = list(site.managers), timeline or site.timeline
            password, login = connection.password or "", connection.login or ""
            self._read = Settings(
                managers=_managers(addresses, extras),
                timeline=_base(timeline, TIMELINE_ADDRESS, extras, ports=(8188, 8190)) if timeline else "",
                history=_history(extras),
                user=_user(extras),
                principal=extras.text("principal"),
                keytab=_keytab(extras),
                auth=extras.choice("yarn-auth", ("auto", "simple", "kerberos")),
                basic={"Authorization": f"Basic {_basic(login, password)}"} if login and password else {},
                login=login if password else "",
                ca=extras.text("ca"),
                poll_interval=extras.seconds("poll-interval", self._poll_interval),
            )
        return self._read


def _expect_yarn(url: str) -> None:
    if url.partition("://")[0].partition(":")[0].lower() != "yarn":
        raise BadConfiguration(f"{url[:200]!r} is not the master URL of a YARN cluster: give yarn")


def _managers(addresses: Sequence[str], extras: Extras) -> Sequence[Manager]:
    bases = [_base(address, ADDRESS, extras, ports=(HTTP_PORT, HTTPS_PORT)) for address in addresses]
    return [Manager(base) for base in dict.fromkeys(bases)]


def _base(address: str, name: str, extras: Extras, *, ports: tuple[int, int]) -> str:
    """Return the URL that an address means; of a page that was copied from a browser, what its web app begins with."""
    bare = "://" not in address
    url = f"http://{address}" if bare else address
    if not is_web_address(url) or "?" in url or "#" in url:
        raise extras.wrong(name, address, f"give an http or https URL, such as http://host:{ports[0]}")
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port is not None else f":{ports[0]}" if bare else ""
    path = re.sub(r"(/ws)?(/v1)?/(cluster|applicationhistory)\Z", "", parts.path.rstrip("/")).rstrip("/")
    if ".." in path.split("/"):
        raise extras.wrong(name, address, f"give an http or https URL, such as http://host:{ports[0]}")
    return f"{parts.scheme}://{host}{port}{path}"


def _history(extras: Extras) -> str | None:
    template = extras.text("history-url")
    if template is not None and not is_history_template(template):
        raise extras.wrong(
            "history-url", template, "give an http or https URL such as https://host/history/{app_id}, with {app_id}"
        )
    return template


def _user(extras: Extras) -> str:
    user = extras.text("yarn-user") or ""
    if user and not _USER.fullmatch(user):
        raise extras.wrong("yarn-user", user, "give the name of a user, as Hadoop knows it")
    return user


def _keytab(extras: Extras) -> Keytab | None:
    text = extras.text("keytab")
    if text is None:
        return None
    try:
        return Keytab(text)
    except ValueError as error:
        raise BadConfiguration(  # its value is not shown: it is a key
            f"the extra 'keytab' of the connection cannot be used: {error}. Give the path of a keytab that all Airflow "
            "processes can read, or its content in base64"
        ) from error


def _basic(login: str, password: str) -> str:
    return base64.b64encode(f"{login}:{password}".encode()).decode()


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _bare(url: str) -> str:
    return url.partition("?")[0]


def _challenges(answer: Answer) -> str:
    return ", ".join(_all_of(answer, "WWW-Authenticate")).lower()


def _wants_negotiation(answer: Answer) -> bool:
    return (answer.status == 401 and "negotiate" in _challenges(answer)) or _refuses_token(answer)


def _refuses_token(answer: Answer) -> bool:
    """Whether it is how Hadoop says that a token or cookie is no good: a 403 that takes the cookie back."""
    return answer.status == 403 and any("hadoop.auth=;" in each or 'hadoop.auth="";' in each for each in _set(answer))


def _cookie_of(answer: Answer) -> str:
    """Return the cookie that an answer sets, with its quotes: a secret, which is sent back to this server alone."""
    found = [match for each in _set(answer) if (match := _COOKIE.search(each))]
    return f"{match[1]}{match[2]}{match[1]}" if found and (match := found[-1])[2] else ""


def _set(answer: Answer) -> Sequence[str]:
    return _all_of(answer, "Set-Cookie")


def _all_of(answer: Answer, name: str) -> Sequence[str]:
    getall = getattr(answer.headers, "getall", None)
    if getall is not None:
        return list(getall(name, []))
    return [answer.headers[name]] if name in answer.headers else []


async def _why(answer: Answer, settings: Settings) -> str:
    asked = "negotiate" in _challenges(answer)
    if asked and not settings.negotiates:
        how = "yarn-auth is simple" if settings.auth == "simple" else "the connection gives a login and a password"
        return f"it asks for Kerberos, and {how}: set the extra 'yarn-auth' to kerberos"
    if settings.basic and not asked:
        return "it does not accept the connection's login and password"
    return f"it does not accept {'the ticket' if asked else 'who asks'}{_as(settings)}: {await said(answer)}"


def _as(settings: Settings) -> str:
    return f" of {settings.principal}" if settings.principal else ""


async def said(answer: Answer) -> str:
    """Return a server's own explanation, without the Java around it, on one line and bounded."""
    try:
        told = (await answer.json()).get("RemoteException")
        message = str(told["message"])  # type: ignore[index]
    except (InvalidAnswer, KeyError, TypeError):
        return answer.excerpt
    return re.sub(r"\s+", " ", re.sub(r"^(?:[\w.$]+(?:Exception|Error): )+", "", message))[:500].strip()
