"""
What a master's and a worker's pages say, parsed and checked.

What flows in: the JSON of a master's ``/json/``, the HTML of a worker's page, the text of its log
page. What flows out: :class:`View`, :class:`Driver`, labels, lines. No I/O.

The trap: all of it is untrusted. A driver ID or an address goes into the next URL only after it has
matched here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from calendar import timegm
from collections.abc import Mapping, Sequence
from time import strptime
from typing import Any
from urllib.parse import urlsplit

from durable_spark.hooks._standalone_request import DEPLOYMENT, OWNER, TOKEN
from durable_spark.jobs import InvalidAnswer, JobRef, JobState, JobStatus, Link

__all__ = [
    "Driver",
    "PageReader",
    "View",
    "is_driver_id",
    "labels_of",
    "listed_drivers",
    "local_time_of",
    "log_text",
    "state_of",
    "tail",
]

_DRIVER_ID = re.compile(r"driver-[0-9]{14}-[0-9]{4,12}", re.ASCII)
_START_TIME = re.compile(r"(?<![0-9])[0-9]{14}(?![0-9])", re.ASCII)
_LABEL = re.compile(rf'"-D({"|".join(map(re.escape, (TOKEN, OWNER, DEPLOYMENT)))})=([^"\n]*)"')
_COMMAND = "Launch Command: "
_END_OF_COMMAND = re.compile(r"^={40}$", re.MULTILINE)
_LOG_HEADER = re.compile(r"==== Bytes [0-9]+-[0-9]+ of ([0-9]{1,18}) of [^\n]*\n")

_DRIVERS = ("activedrivers", "completeddrivers")
_STATES = {
    "SUBMITTED": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "FINISHED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "ERROR": JobState.FAILED,
    "KILLED": JobState.KILLED,
    "RELAUNCHING": JobState.RELAUNCHED,
}
"""``org.apache.spark.deploy.master.DriverState``. Its UNKNOWN, and what may come later, is UNKNOWN here."""

_MESSAGES = {
    "FAILED": "the driver's process ended with a non-zero exit code",
    "ERROR": "it could not be launched, or its worker was lost (one that was only cut off may still run it)",
}


def state_of(raw: str) -> JobState:
    """Return a driver's state in our words."""
    return _STATES.get(raw, JobState.UNKNOWN)


def is_driver_id(text: str) -> bool:
    """Whether it is an ID as a standalone master makes them, safe to stand in a URL."""
    return _DRIVER_ID.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """
    A driver, as a master lists it.

    :param raw: its state in Spark's words.
    :param start: when the master created it, in seconds since the epoch, by the master's clock.
    :param worker: ID of the worker that it was given to, or ``""``.
    :param live: whether it is among the active ones.
    """

    id: str
    raw: str
    start: float
    worker: str
    live: bool

    @property
    def number(self) -> int:
        """The number at the end of the ID; a master counts up from 0 while it lives."""
        return int(self.id.rpartition("-")[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """
    A master's page, read once.

    :param address: the origin of the page.
    :param leading: whether the master is ALIVE, that is the leader.
    :param raw: its state in Spark's words.
    :param time: its clock, in seconds since the epoch.
    :param drivers: by ID.
    :param last_completed: ID of the driver that completed last, or ``""``.
    :param workers: address of each worker's page, by the worker's ID; ``""`` when it is not a valid one.
    :param alive: IDs of the workers that are ALIVE.
    :param dead: IDs of those that are DEAD; the master lists them for 15 minutes (``spark.dead.worker.persistence``).
    """

    address: str
    leading: bool
    raw: str
    time: float
    drivers: Mapping[str, Driver]
    last_completed: str
    workers: Mapping[str, str]
    alive: frozenset[str]
    dead: frozenset[str]

    @property
    def fleet(self) -> str:
        """
        Digest of the IDs of the workers that are not DEAD. A worker that is restarted gets a new ID.

        Empty when there are none, or when ``spark.worker.idPattern`` has left the time of their start out.
        """
        workers = sorted(self.workers.keys() - self.dead)
        if not workers or not all(_START_TIME.search(worker) for worker in workers):
            return ""
        return hashlib.sha256("\n".join(workers).encode()).hexdigest()[:32]

    @property
    def newest(self) -> int:
        """The highest number of a driver, -1 when there is none."""
        return max((driver.number for driver in self.drivers.values()), default=-1)

    def status(self, driver: Driver, *, job: JobRef | None = None) -> JobStatus:
        """Return a driver's status, with links to its row on this page and to its log."""
        links = {Link.JOB: self._active if driver.live else self._completed}
        if worker := self.workers.get(driver.worker):
            links[Link.LOG] = f"{worker}/logPage/?driverId={driver.id}&logType=stderr"
        return JobStatus(
            job=job or JobRef(driver.id),
            state=state_of(driver.raw),
            raw=driver.raw,
            message=_MESSAGES.get(driver.raw, ""),
            links=links,
        )

    @functools.cached_property
    def _active(self) -> str:
        return f"{self.address}/#aggregated-activeDrivers"

    @functools.cached_property
    def _completed(self) -> str:
        return f"{self.address}/#aggregated-completedDrivers"


class PageReader:
    """
    Makes views of what a master's ``/json/`` says (``org.apache.spark.deploy.JsonProtocol.writeMasterState``).

    :param address: where the page is, see :class:`View`.
    :param before: what was read last. A driver that has not changed since is the same object in both.
    """

    def __init__(self, address: str, before: View | None = None) -> None:
        self._address = address
        self._known: Mapping[str, Driver] = before.drivers if before else {}

    def element(self, entry: Any, name: str) -> Any:
        """
        Return what matters of an element of one of the page's arrays.

        :raises InvalidAnswer: when it is not such an element.
        """
        try:
            if name == "workers":
                return str(entry["id"]), _origin(entry["webuiaddress"]), entry["state"]
            return self._driver(entry, live=name == "activedrivers") if name in _DRIVERS else None
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise self._is_none(error) from error

    def view(self, page: Mapping[str, Any], *, time: float) -> View:
        """
        Return what a page says whose elements have been read.

        :raises InvalidAnswer: when it is not such a page.
        """
        try:
            active, completed = _list(page["activedrivers"]), _list(page["completeddrivers"])
            drivers = {driver.id: driver for driver in [*completed, *active]}
            workers = {worker: origin for worker, origin, _ in _list(page["workers"])}
            states = {worker: state for worker, _, state in page["workers"]}
            last_completed = completed[-1].id if completed else ""
            raw = str(page["status"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._is_none(error) from error
        return View(
            address=self._address,
            leading=raw == "ALIVE",
            raw=raw[:40],
            time=time,
            drivers=drivers,
            last_completed=last_completed,
            workers=workers,
            alive=frozenset(worker for worker, state in states.items() if state == "ALIVE"),
            dead=frozenset(worker for worker, state in states.items() if state == "DEAD"),
        )

    def _driver(self, entry: Mapping[str, Any], *, live: bool) -> Driver:
        driver_id, worker = entry["id"], entry["worker"]
        raw, start = str(entry["state"])[:40], int(entry["starttime"]) / 1000
        if not isinstance(worker, str) or not worker:
            raise TypeError(f"{worker!r:.40} for a worker")  # it would be a driver that nobody was given
        worker = worker if worker != "None" else ""
        known = self._known.get(driver_id)
        if known and (known.raw, known.worker, known.live, known.start) == (raw, worker, live, start):
            return known
        if not isinstance(driver_id, str) or not is_driver_id(driver_id):
            raise ValueError(f"driver ID {str(driver_id)[:60]!r}; spark.deploy.driverIdPattern must be the default one")
        return Driver(id=driver_id, raw=raw, start=start, worker=worker, live=live)

    def _is_none(self, error: Exception) -> InvalidAnswer:
        what = f"{type(error).__name__}: {str(error)[:80]}"
        return InvalidAnswer(f"{self._address}/json/ is not the page of a standalone master ({what})")


def labels_of(log: str) -> Mapping[str, str] | None:
    """
    Return our properties from the launch command at the head of a driver's log, ``None`` if it is not there as a whole.

    The worker writes ``Launch Command: "java" … "-Dkey=value" …`` and a line of 40 ``=`` before it
    starts the process (``org.apache.spark.deploy.worker.DriverRunner``).
    """
    end = _END_OF_COMMAND.search(log)
    return None if end is None or not log.startswith(_COMMAND) else dict(_LABEL.findall(log, 0, end.start()))


def log_text(page: str) -> tuple[str, int] | None:
    """Return the text on a log page and the length of the whole log, ``None`` when the log's directory is not there."""
    header = _LOG_HEADER.match(page)
    if header is None:
        raise InvalidAnswer(f"not a worker's log page: {page[:100]!r}")
    text = page[header.end() :]
    if text.startswith("Error: invalid log directory"):
        return None
    return text, int(header[1])


def listed_drivers(page: str) -> frozenset[str]:
    """Return the IDs of the drivers on a worker's page, those that run and those that have ended."""
    return frozenset(_DRIVER_ID.findall(page))


def tail(text: str, lines: int) -> Sequence[str]:
    """Return the last lines of a log, without the launch command at its head."""
    end = _END_OF_COMMAND.search(text) if text.startswith(_COMMAND) else None
    text = text[end.end() :] if end else text
    return text.strip().splitlines()[-lines:] if lines > 0 else []


def local_time_of(driver_id: str) -> float:
    """Return the time in a driver's ID as if it were UTC; it is the master's local time."""
    try:
        return float(timegm(strptime(driver_id.split("-")[1], "%Y%m%d%H%M%S")))
    except ValueError:
        return 0.0


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):  # an empty text would be a page without drivers
        raise TypeError(f"{type(value).__name__} for a list")
    return value


def _origin(address: object) -> str:
    """Return ``scheme://host:port`` if that is all there is, else ``""``: it becomes the start of URLs."""
    if not isinstance(address, str) or len(address) > 300:
        return ""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return ""
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or parts.username is not None or not re.fullmatch(r"[\w.:-]+", host):
        return ""
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        return ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")
