"""
A whole Airflow, for lives that go on side by side: PostgreSQL, a scheduler, LocalExecutor, two triggerers.

Beside :mod:`tests.crash.inprocess`, where each message of a process can be kept from ever leaving it, this is where
nothing stands for anything. A proxy before the execution API sees what a task asks Airflow for; those of a
:func:`~tests.crash.boundaries.backend` see what it and its trigger ask the cluster for. Both numbers come from one
:class:`~tests.crash.interposer.Interposer` for each place.

Who dies is whoever carries the message: where the cluster is asked the task's process alone, of whose death its
supervisor tells; where Airflow is asked its supervisor, too, so that Airflow notices by a heartbeat that does not come
(which is made old, nobody waits for it); after a deferral the whole triggerer, which is started again.

The trap: a triggerer is everybody's. The other lives lose their triggers with it, and have to bear that.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev import processes
from dev.airflow import IMPATIENT
from dev.airflow import Airflow as Servers
from dev.postgres import Postgres
from dev.processes import free_port, process, send_signal
from dev.proxy import Proxy, Request
from tests.airflow.backdoor import miss_heartbeat
from tests.crash.inprocess import TASK, Stuck

if TYPE_CHECKING:
    from tests.crash.boundaries import Backend
    from tests.crash.interposer import Exchange, Interposer

__all__ = ["WholeAirflow"]

_UNNUMBERED = re.compile(r"/(run|heartbeat)$|/health")
"""A beginning, before which there is no process; and what comes by the clock."""
_ENDS = re.compile(r"/task-instances/[^/]+/state$")
_IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_LOOK = 0.1
_TRIGGERER = -1
_CONFIG = {
    **IMPATIENT,
    "scheduler": {**IMPATIENT["scheduler"], "task_instance_heartbeat_timeout": 60},
    "triggerer": {**IMPATIENT["triggerer"], "triggerer_health_check_threshold": 10},
}


class WholeAirflow:
    """
    A whole Airflow. A context manager.

    :param places: what is run in each place, and who counts its exchanges and kills.
    :param environment: more variables for all its processes.
    """

    def __init__(
        self, places: Sequence[tuple[Backend, Interposer]], directory: Path, environment: Mapping[str, str]
    ) -> None:
        self._places = {backend.place: _Place(self, backend.place, interposer) for backend, interposer in places}
        self._backends = [backend for backend, _ in places]
        self._directory = directory
        self._environment = environment
        self._whose: dict[str, _Place | None] = {}
        self._triggerers = threading.Lock()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> WholeAirflow:
        with contextlib.ExitStack() as stack:
            dags = self._directory / "dags"
            dags.mkdir()
            for backend in self._backends:
                (dags / f"{backend.place}.py").write_text(backend.source(self._directory))
            port = free_port()
            api = stack.enter_context(Proxy(f"http://127.0.0.1:{port}", gate=self._gate))
            self.postgres = stack.enter_context(Postgres())
            self.airflow = stack.enter_context(
                Servers(
                    dags,
                    port=port,
                    database=self.postgres.url,
                    triggerers=2,
                    execution_api=api.url,
                    config=_CONFIG,
                    env=self._environment,
                )
            )
            for backend in self._backends:
                self.airflow.connect(backend.place, backend.connection)
                self.airflow.wait_for_dag(backend.place)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def live(self, place: str, run: str, conf: Mapping[str, str]) -> WholeLife:
        """Begin a run of a place's Dag, with these values for its templates."""
        self.airflow.trigger(place, conf=conf, run=run)
        return WholeLife(self, self._places[place], run)

    def kill_triggerer(self, name: str) -> None:
        """Kill -9 a triggerer."""
        with self._triggerers:
            (triggerer,) = (triggerer for triggerer in self.airflow.triggerers if triggerer.name == name)
            triggerer.kill()

    def revive_triggerers(self) -> None:
        """Start those again that are dead."""
        with self._triggerers:
            for triggerer in self.airflow.triggerers:
                if not triggerer.alive:
                    triggerer.start()

    def _gate(self, request: Request) -> Exchange | None:
        """Number what a task asks Airflow for, if its process is watched."""
        place = self._place_of(request)
        path = request.path.partition("?")[0]
        if place is None:
            return None
        if request.method == "PATCH" and path.endswith("/run"):
            place.begins(json.loads(request.body)["pid"])
        if _UNNUMBERED.search(path) or not place.has_process:
            return None
        ends = request.method == "PATCH" and _ENDS.search(path) is not None
        return place.exchange(f"Airflow: {request.method} {_IDS.sub('…', path)}", ends=ends)

    def _place_of(self, request: Request) -> _Place | None:
        """Return whose request it is, by the subject of its token: the ID of the try."""
        try:
            _, claims, _ = request.headers["Authorization"].removeprefix("Bearer ").split(".")
            subject = json.loads(base64.urlsafe_b64decode(claims + "=="))["sub"]
        except (KeyError, ValueError):
            return None
        if subject not in self._whose:
            rows = self.postgres.query("SELECT dag_id FROM task_instance WHERE id = %(id)s", id=subject)
            self._whose[subject] = self._places.get(rows[0][0]) if rows else None
        return self._whose[subject]


class _Place:
    """What is watched in a place: the process of the task, or the triggerer that follows its job."""

    def __init__(self, whole: WholeAirflow, name: str, interposer: Interposer) -> None:
        self.name = name
        self.interposer = interposer
        self.triggerer = ""
        """The name of the one that follows its job."""
        self.given_up = False
        """Whether Airflow is to notice by the heartbeat that the try is dead."""
        self.has_process = False
        self._whole = whole
        self._last = False
        self._runner = 0

    def begins(self, runner: int) -> None:
        """Watch a task's process, which waits to be told what to run."""
        found = process(runner)
        supervisor = found.parent if found else 0
        self.given_up = self._last = False
        self.has_process = True
        self._runner = runner

        def kill(said: str) -> None:
            self.has_process = False
            # One that has nothing more to do than wait for the next task may hold the lock of their queue.
            both = "Airflow: " in said and not self._last
            self.given_up = both and bool(supervisor)
            send_signal([supervisor, runner] if self.given_up else [runner], signal.SIGKILL)

        self.interposer.watch(runner, kill)

    def is_deferred(self) -> None:
        """Watch the triggerer, from now until the task goes on."""

        def kill(_: str) -> None:
            self._whole.kill_triggerer(self.triggerer)

        self.interposer.watch(_TRIGGERER, kill)

    def is_over(self) -> None:
        """Watch nothing any more."""
        for pid in (self._runner, _TRIGGERER):
            self.interposer.ended(pid)

    def exchange(self, what: str, *, ends: bool) -> Exchange:
        exchange = self.interposer.exchange(what)
        if not ends:
            return exchange
        over = exchange.over

        def last() -> bool:
            self._last = True
            goes_on = over()
            self.has_process = False
            return goes_on

        exchange.over = last  # type: ignore[method-assign]
        return exchange


class WholeLife:
    """A task instance, from its first try to its end."""

    waits = False

    def __init__(self, whole: WholeAirflow, place: _Place, run: str) -> None:
        self._whole = whole
        self._place = place
        self._run = run
        self.tries = 0

    def live(self, deadline: float, *, at_death: Callable[[], None]) -> str:
        """Wait for the task's end, and return its state; see to what an outside world would do after each death."""
        interposer, place = self._place.interposer, self._place
        place.has_process, place.given_up, place.triggerer = False, False, ""
        until, deaths, follows = time.monotonic() + deadline * processes.patience, 0, False
        while True:
            ti, state, self.tries, triggerer = self._instance()
            if len(interposer.killed) > deaths:
                deaths = len(interposer.killed)
                at_death()
                self._whole.revive_triggerers()
                follows = False
            if state in ("success", "failed"):
                place.is_over()
                return state
            if time.monotonic() > until:
                raise Stuck(f"{self._run} has not ended: it is {state}")
            if state != "deferred":
                follows = False
            elif not follows and not place.has_process:  # which has had Airflow's answer, too
                place.is_deferred()
                follows = True
            place.triggerer = triggerer or place.triggerer
            if place.given_up and state == "running":
                miss_heartbeat(self._whole.postgres, ti)
            time.sleep(_LOOK)

    def store(self) -> Mapping[str, Any]:
        """Return what is in the task state store."""
        return self._whole.airflow.store(self._place.name, self._run, TASK)

    def log(self) -> str:
        """Return the messages of all tries and triggers."""
        parts = [
            self._whole.airflow.log_text(self._place.name, self._run, TASK, number)
            for number in range(1, self.tries + 1)
        ]
        return "\n".join(parts)

    def _instance(self) -> tuple[str, str, int, str]:
        ((ti, state, number, triggerer),) = self._whole.postgres.query(
            "SELECT task_instance.id::text, task_instance.state, try_number, job.hostname FROM task_instance "
            "LEFT JOIN trigger ON trigger.id = trigger_id LEFT JOIN job ON job.id = triggerer_id "
            "WHERE task_instance.dag_id = %(dag)s AND run_id = %(run)s",
            dag=self._place.name,
            run=self._run,
        )
        return ti, state or "", number, triggerer or ""
