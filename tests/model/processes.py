"""
The processes of an Airflow that can be stopped, killed and woken between any two things they do.

In: a task instance as :mod:`tests.unit.tries` has it. Out: the product's own code, run as workers and triggerers run
it, step by step. A worker is a thread that waits for its turn; nothing ever runs beside anything else, so what happened
is what is said to have happened.

Each thing that a process does to the world outside is an *effect*; it is stopped before one, never in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from airflow.sdk.bases.operator import ExecutorSafeguard
from airflow.sdk.exceptions import TaskDeferred

from durable_spark.triggers.feed import Subscription
from tests.model.clock import Clock, Loop
from tests.unit.tries import Died, TaskInstance, Try

Neighbour = Callable[[], contextlib.AbstractAsyncContextManager[Subscription]]
Until = int | str | None
LAST = 300
"""Effects after which a process that goes on is stopped all the same: it waits for something."""


class Process:
    """Whatever may be killed: a worker or a triggerer. What a dead one still tries to do does not happen."""

    airflow: Processes
    dead = False
    fuse: int | None = None
    """Effects until it is killed."""

    def loop_tells(self, context: dict[str, Any]) -> None:
        """Take what an event loop of this process tells its exception handler for a bug, unless it was killed."""
        error = context.get("exception")
        if not self.dead and not isinstance(error, Died):
            self.airflow.bugs.append(error or AssertionError(context.get("message")))

    def effect(self, name: str) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.dead = True
        if self.dead:
            raise Died


class Worker(Process):
    """
    The process of a task.

    :param attempt: its try.
    :param call: what it runs.
    :param event: the kind of the event that it goes on with, if there is one.
    """

    def __init__(self, airflow: Processes, attempt: ModelTry, call: Callable[[], Any], *, event: str = "") -> None:
        self.airflow = airflow
        self.attempt = attempt
        self.operator = attempt.operator
        self.call = call
        self.event = event
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.told = False
        """Whether it was told to stop."""
        self.at = ""
        """The effect before which it is stopped."""
        self._left = 0
        self._until: str | None = None
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self, until: Until) -> bool:
        """
        Run on, and be stopped before an effect.

        :param until: how many effects later, or before which one; ``None``: to the end.
        :return: whether it has ended.
        """
        self._left = until if isinstance(until, int) else LAST
        self._until = until if isinstance(until, str) else None
        before, self.airflow.current = self.airflow.current, self
        self._turn.release()
        self._back.acquire()
        self.airflow.current = before
        return self.ended

    def stop(self) -> None:
        """Tell it to stop, as SIGTERM does."""
        self.told = True
        self.attempt.operator.on_kill()

    def kill(self) -> None:
        """Kill it where it is. No time passes, and nothing that it does now has an effect."""
        self.dead = True
        now = self.airflow.clock.now
        while not self.ended:
            self.go_on(None)
        self.airflow.clock.now = now

    def effect(self, name: str) -> None:
        if not self.dead and (self._left <= 0 or name == self._until):
            self.at = name
            self._back.release()
            self._turn.acquire()
        self._left -= 1
        super().effect(name)

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._back.release()


class Triggerer(Process):
    """
    A triggerer process, and the triggers that it runs: of ours one, and those that it is to let go of.

    :param neighbour: joins the feed for somebody else's trigger, so that the feed outlives ours.
    """

    def __init__(self, airflow: Processes, neighbour: Neighbour | None = None) -> None:
        self.airflow = airflow
        self.loop = Loop(airflow.clock, self.loop_tells)
        self.trigger: Any = None
        self.task: asyncio.Task[Any] | None = None
        self.unwanted: list[tuple[Any, asyncio.Task[Any] | None]] = []
        """What it does not know yet that it is to let go of: a newer trigger of the task may run beside it."""
        self._neighbours = self.loop.create_task(self._follow(neighbour)) if neighbour else None

    async def _follow(self, neighbour: Neighbour) -> None:
        async with neighbour() as subscription:
            while True:
                await subscription.changed(None)

    def start(self, deferral: TaskDeferred) -> None:
        """Run a trigger, made of what Airflow has stored of it."""
        path, arguments = deferral.trigger.serialize()
        kind = type(deferral.trigger)
        assert path == f"{kind.__module__}.{kind.__qualname__}"
        self.trigger = kind(**arguments)
        self.task = self.loop.create_task(self._first_event(self.trigger))

    async def _first_event(self, trigger: Any) -> Any:
        async with contextlib.aclosing(trigger.run()) as events:
            async for event in events:
                return event.payload
        return None

    def run_for(self, seconds: float) -> Any:
        """Run for some time. Returns the payload of an event, if one was fired."""
        with self._running():
            until = self.airflow.clock.now + seconds
            self.loop.run_for(seconds)
            self.airflow.clock.now = max(self.airflow.clock.now, until)
        if self.task is not None and self.task.done() and not self.dead:
            task, self.task = self.task, None
            return task.result()
        return None

    def set_aside(self) -> None:
        """Have no trigger of the task; the one it runs it is to let go of, once it learns that."""
        if self.trigger is not None:
            self.unwanted.append((self.trigger, self.task))
        self.trigger = self.task = None

    def let_go(self) -> set[str]:
        """
        Do what Airflow does with triggers that it is not to run any more: cancel them, then call ``on_kill``.

        :return: the tokens of their submissions.
        """
        unwanted, self.unwanted = self.unwanted, []
        for trigger, task in unwanted:
            with self._running():
                if task is not None:
                    task.cancel()
                    self.loop.run_until_complete(asyncio.wait([task]))
                self.loop.run_until_complete(trigger.on_kill())
        return {trigger._args.submission.token for trigger, _ in unwanted}

    def kill(self) -> None:
        """Kill it. No time passes, and nothing that it does now has an effect."""
        self.dead = True
        now = self.airflow.clock.now
        for _ in range(20):
            if not (tasks := asyncio.all_tasks(self.loop)):
                break
            for task in tasks:
                task.cancel()
            with self._running(), contextlib.suppress(asyncio.CancelledError):
                self.loop.run_until_complete(asyncio.wait(tasks, timeout=100))
        with self._running():
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        self.airflow.clock.now = now

    @contextlib.contextmanager
    def _running(self) -> Any:
        before, self.airflow.current = self.airflow.current, self
        try:
            yield
        except Died:
            pass
        finally:
            self.airflow.current = before


class Processes:
    """What all processes share: a clock, and who of them runs."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.current: Process | None = None
        self.bugs: list[BaseException] = []
        """What no process was to meet, and none has failed of: the product or its event loop has only said it."""

    def effect(self, name: str) -> None:
        """Let the process that runs be stopped or killed here. Nobody runs: a test looks."""
        if self.current is not None:
            self.current.effect(name)


class ModelTry(Try):
    """A try whose every word with Airflow is an effect."""

    instance: ModelInstance
    generation = 0
    """How often the task had been cleared when it began."""

    def _operator(self) -> Any:
        return self.instance.build(task_id=self.task_id, **{**self.instance.defaults, **self._arguments})

    @property
    def context(self) -> Any:
        return {"ti": self, "task_instance": self, "task": self.operator, "dag": None, "task_state_store": self}

    def get(self, key: str, default: Any = None) -> Any:
        self.instance.airflow.effect("read the store")
        return super().get(key, default)

    def set(self, key: str, value: Any, *, retention: Any = None) -> None:
        self.instance.airflow.effect(f"write {key}")
        super().set(key, value, retention=retention)

    def delete(self, key: str) -> None:
        self.instance.airflow.effect("delete from the store")
        super().delete(key)

    def xcom_push(self, key: str, value: Any) -> None:
        self.instance.airflow.effect(f"push {key}")
        super().xcom_push(key, value)

    def xcom_pull(self, *, key: str, map_indexes: int | None = None, **more: Any) -> Any:
        self.instance.airflow.effect("pull")
        return super().xcom_pull(key=key, map_indexes=map_indexes, **more)

    def _call(self, method: str, **arguments: Any) -> Any:
        token = ExecutorSafeguard.tracker.set(self.operator)
        try:
            result = getattr(self.operator, method)(self.context, **arguments)
        except TaskDeferred as deferral:
            result = deferral
        finally:
            ExecutorSafeguard.tracker.reset(token)
        self.instance.airflow.effect("report")
        return result


class ModelInstance(TaskInstance):
    """A task instance whose tries are :class:`ModelTry`."""

    def __init__(self, airflow: Processes, build: Callable[..., Any], **defaults: Any) -> None:
        super().__init__(build, **defaults)
        self.airflow = airflow

    def begin(self, **arguments: Any) -> ModelTry:
        number = self.current.try_number + 1 if self.current else 1
        self.xcoms.clear()
        attempt = ModelTry(self, number, arguments)
        attempt.start_date = attempt.start_date.fromtimestamp(self.airflow.clock.now, attempt.start_date.tzinfo)
        self.current = attempt
        return attempt
