"""
The questions that are asked of a ResourceManager, and of a timeline server, about applications.

What flows in: application IDs that were checked, tags, times. What flows out:
:class:`~durable_spark.hooks._yarn_apps.App`.

The trap: ``None`` and an empty list are what some ResourceManager answered, no more. Only within
:meth:`~durable_spark.hooks._yarn_managers.Managers.vouching` do they mean that an application is not known.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

from durable_spark.hooks._yarn_apps import (
    ACTIVE_STATES,
    COMMON_TAG,
    ENDED_STATES,
    App,
    parse_app,
    parse_past_app,
    token_tag,
)
from durable_spark.hooks._yarn_managers import Ask, Manager, Managers, said
from durable_spark.jobs import ClusterUnreachable, DurableJobError, InvalidAnswer, RequestRefused

if TYPE_CHECKING:
    from durable_spark.hooks._http import Answer
    from durable_spark.jobs import JobRef

__all__ = ["APP_LIMIT", "Applications", "Listed", "Timeline"]

T = TypeVar("T")

APP_LIMIT = 4 << 20
"""Bytes that the report of one application may have; one with long diagnostics has some 10,000."""
LIST_LIMIT = 64 << 20
"""
Bytes that a list may have.

Without what is deselected, an application takes 1,100 bytes (3.5.0): 10,000 of them 11 MB.
"""
_LEAN = ("deSelects=resourceRequests,resourceInfo,timeouts", "deSelects=resourceRequests")
"""What reports are asked to leave out; older ResourceManagers refuse the words that they do not know (400)."""
_MAX_COMPLETED = "yarn.resourcemanager.max-completed-applications"
_FILTERS_LISTS = "yarn.webapp.filter-entity-list-by-user"
_RECENT = (600.0, 6 * 3600.0)
"""Seconds that are looked back for an application that has ended, before all of them are asked for."""


class Listed(NamedTuple):
    """
    A list of applications.

    :param time: the ResourceManager's clock when it answered, in seconds since the epoch.
    """

    apps: Sequence[App]
    time: float


class Applications:
    """
    The applications that the ResourceManagers of a connection know.

    :param managers: who is asked.
    """

    def __init__(self, managers: Managers) -> None:
        self._managers = managers
        self._lean = 0

    async def get(self, app_id: str, ask: Ask | None = None) -> App | None:
        """Return an application; ``None`` if whoever answered does not know it."""
        answer, parse = await self._ask(f"apps/{app_id}", APP_LIMIT, ask)
        if await _is_not_found(answer, app_id):
            return None
        app = parse((await _expect_ok(answer).json()).get("app"))
        if app.id != app_id:
            raise InvalidAnswer(f"{answer.url} answered about {app.id}")
        return app

    async def tagged(self, tag: str, *, states: Sequence[str] = (), ask: Ask | None = None) -> Listed:
        """Return the applications with a tag, in some states or in any."""
        wanted = f"&states={','.join(states)}" if states else ""
        return _with(tag, await self._list(f"applicationTags={quote(tag, safe='')}{wanted}", ask))

    async def active(self, ask: Ask | None = None) -> Listed:
        """Return the applications of ours that have not ended."""
        return await self.tagged(COMMON_TAG, states=ACTIVE_STATES, ask=ask)

    async def ended_since(self, time: float) -> Listed:
        """Return the applications of ours that have ended since some time, by the ResourceManager's clock."""
        ended = f"applicationTags={COMMON_TAG}&finishedTimeBegin={int(max(0.0, time) * 1000)}"
        return _with(COMMON_TAG, await self._list(ended, None))

    async def last_ended(self, now: float, ask: Ask) -> App | None:
        """Return the application, anybody's, that ended last; ``None`` if none has that is still known."""
        for begin in (*(now - seconds for seconds in _RECENT), 0.0):
            ended = f"states={','.join(ENDED_STATES)}&finishedTimeBegin={int(max(0.0, begin) * 1000)}"
            if apps := (await self._list(ended, ask)).apps:
                return max(apps, key=lambda app: (app.finished, app.age))
        return None

    async def count_of_ended(self, ask: Ask) -> int:
        """Return how many applications have ended that are still known."""
        _, answer = await ask(f"appstatistics?states={','.join(ENDED_STATES)}", limit=APP_LIMIT)
        try:
            items = (await _expect_ok(answer).json())["appStatInfo"]["statItem"]
            counts = {item["state"]: item["count"] for item in items}
            ended = [counts[state] for state in ENDED_STATES]  # one that is not told of would count for none
            if not all(isinstance(count, int) and count >= 0 for count in ended):
                raise ValueError(f"{ended!r:.80} for numbers")
            return sum(ended)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidAnswer(f"{answer.url} does not count applications: {answer.excerpt!r}") from error

    async def remembers(self, manager: Manager) -> int | None:
        """Return how many applications that have ended a ResourceManager keeps; ``None`` if it does not say."""
        value = await self._configured(manager, _MAX_COMPLETED)
        return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else None

    async def hides_from_others(self, manager: Manager) -> bool:
        """Whether a ResourceManager says that it lists to a user only what that user may view."""
        return (await self._configured(manager, _FILTERS_LISTS)).lower() == "true"

    async def _configured(self, manager: Manager, name: str) -> str:
        try:
            answer = await self._managers.fetch(f"{manager.conf}?name={name}&format=json", limit=APP_LIMIT)
            told = (await answer.expect_ok().json())["property"]
            return str(told["value"]) if told["key"] == name else ""
        except (DurableJobError, KeyError, TypeError):  # not shown to everybody, nor through every proxy
            return ""

    async def _list(self, query: str, ask: Ask | None) -> Listed:
        answer, parse = await self._ask(f"apps?{query}", LIST_LIMIT, ask)
        if answer.date is None:
            raise InvalidAnswer(f"{answer.url} does not tell the time (header Date)")
        return Listed(
            await _expect_ok(answer).parse(_unwrapped(answer), element=lambda entry, _: parse(entry), within="apps"),
            answer.date,
        )

    async def _ask(self, path: str, limit: int, ask: Ask | None) -> tuple[Answer, Callable[[Any], App]]:
        history = (await self._managers.settings()).history
        while True:
            lean = self._lean
            lean_path = f"{path}{'&' if '?' in path else '?'}{_LEAN[lean]}"
            manager, answer = await (ask or self._managers.ask)(lean_path, limit=limit)
            if answer.status == 400 and lean + 1 < len(_LEAN) and "deselects" in (await said(answer)).lower():
                self._lean = lean + 1
                continue
            return answer, functools.partial(parse_app, page=manager.page, history=history)


def _with(tag: str, listed: Listed) -> Listed:
    """Return those that carry the tag: whoever stands in between may have dropped the question for it."""
    return listed._replace(apps=[app for app in listed.apps if tag.lower() in app.tags])


class Timeline:
    """
    The timeline server of a cluster (version 1), which remembers applications that the ResourceManager has forgotten.

    :param managers: who knows its address, and as whom it is asked.
    """

    def __init__(self, managers: Managers) -> None:
        self._managers = managers

    async def in_use(self) -> bool:
        """Whether the connection, or the Hadoop configuration, names one."""
        return bool((await self._managers.settings()).timeline)

    async def get(self, job: JobRef) -> App | None:
        """Return an application, ``None`` if the server does not know it."""
        answer = await self._fetch(f"apps/{job.id}", APP_LIMIT)
        if await _is_not_found(answer, job.id):
            return None
        told = await _expect_ok(answer).json()
        app = parse_past_app(told.get("app", told), history=(await self._managers.settings()).history)
        if app.id != job.id:
            raise InvalidAnswer(f"{answer.url} answered about {app.id}")
        return app

    async def with_token(self, token: str, *, since: float) -> Sequence[App]:
        """Return the applications of a submission among those that were submitted after some time."""
        history = (await self._managers.settings()).history
        answer = await self._fetch(f"apps?startedTimeBegin={int(max(0.0, since) * 1000)}", LIST_LIMIT)
        tag = token_tag(token)

        def parse(entry: Any) -> App | None:
            app = parse_past_app(entry, history=history)
            return app if tag in app.tags else None

        apps = await _expect_ok(answer).parse(_unwrapped(answer), element=lambda entry, _: parse(entry), within="apps")
        return [app for app in apps if app is not None]

    async def _fetch(self, path: str, limit: int) -> Answer:
        base = (await self._managers.settings()).timeline
        answer = await self._managers.fetch(f"{base}/ws/v1/applicationhistory/{path}", limit=limit)
        if answer.status == 429 or (answer.status >= 500 and not await _is_not_found(answer)):
            raise ClusterUnreachable(f"{answer.url} answered {answer.status}: {await said(answer)}")
        return answer


def _unwrapped(answer: Answer) -> Callable[[Any], list[Any]]:
    """Return the function that takes a list out of its wrapping: ``{"apps": {"app": […]}}``, ``{"apps": {}}``, null."""

    def unwrap(told: Any) -> list[Any]:
        wrapped = told.get("apps")
        if "apps" in told and wrapped in (None, {}):
            return []
        apps = wrapped.get("app") if isinstance(wrapped, dict) else None
        if not isinstance(apps, list):
            raise InvalidAnswer(f"{answer.url} did not answer with a list of applications: {answer.excerpt!r}")
        return apps

    return unwrap


async def _is_not_found(answer: Answer, app_id: str = "") -> bool:
    """
    Whether it is how Hadoop says that it does not know an application, which it names. A proxy's 404 is not.

    :raises InvalidAnswer: for another 404.
    """
    if answer.status not in (404, 500):
        return False
    try:
        told = (await answer.json())["RemoteException"]
        name, message = str(told["exception"]), str(told["message"])
    except (InvalidAnswer, KeyError, TypeError):
        name = message = ""
    if name in ("NotFoundException", "ApplicationNotFoundException") and app_id in message:
        return True
    if answer.status == 500:
        return False
    raise InvalidAnswer(f"{answer.url} answered 404, and not as YARN does: {answer.excerpt}")


def _expect_ok(answer: Answer) -> Answer:
    if answer.status == 403:
        raise RequestRefused(f"{answer.url} answered 403: {answer.excerpt}")
    return answer.expect_ok()
