"""
How a synchronous operator talks to an asynchronous hook: one event loop for the length of one Airflow call.

The trap: Airflow interrupts the main thread (SIGALRM for ``execution_timeout``, SIGTERM for a kill), so
the loop may be left in the middle of anything; :meth:`Conversation.close` cancels and awaits what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

from airflow.sdk.exceptions import AirflowTaskTimeout

if TYPE_CHECKING:
    from airflow.triggers.base import TriggerEvent

    from durable_spark.hooks.job import JobHook
    from durable_spark.triggers.job import JobTrigger

__all__ = ["Conversation", "first_event"]

T = TypeVar("T")

_ENDS_WITHIN = 10.0
"""Seconds for what is cancelled or closed."""

log = logging.getLogger(__name__)


class Conversation:
    """The event loop in which a synchronous operator talks to its hook."""

    def __init__(self, hook: JobHook) -> None:
        self.hook = hook
        self._loop = asyncio.new_event_loop()
        self._interrupted = asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns. One that is interrupted is cancelled: nothing goes on behind its back."""
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                task.cancel()
                self._loop.run_until_complete(asyncio.wait([task], timeout=_ENDS_WITHIN))
            raise

    def interrupt(self) -> None:
        """End :meth:`until_interrupted`, now or when it is called. Called from a signal handler."""
        self._loop.call_soon_threadsafe(self._interrupted.set)

    async def until_interrupted(self, coroutine: Coroutine[Any, Any, T], *, timeout: float | None) -> T | None:
        """
        Return what the coroutine returns, or ``None`` when :meth:`interrupt` was called first.

        :param timeout: seconds after which :class:`AirflowTaskTimeout` is raised. Airflow's own timer raises it
            from a signal handler, in whatever code happens to run, which may keep it.
        """
        work = asyncio.ensure_future(coroutine)
        interruption = asyncio.ensure_future(self._interrupted.wait())
        try:
            done, _ = await asyncio.wait([work, interruption], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise AirflowTaskTimeout("the execution timeout passed")
            return work.result() if work.done() else None
        finally:
            for task in (work, interruption):
                task.cancel()
            await asyncio.gather(work, interruption, return_exceptions=True)

    def close(self) -> None:
        """Cancel what is left, close the hook and the loop."""
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        try:
            for last in (_gather(left), self.hook.aclose(), self._loop.shutdown_asyncgens(), _shut_down_threads()):
                try:
                    self.run(asyncio.wait_for(last, _ENDS_WITHIN))
                except Exception as error:  # what the task has done or asked for must not be lost for this
                    log.warning("While closing the connection to the cluster: %r", error)
        finally:
            self._loop.close()


async def _shut_down_threads() -> None:
    await asyncio.get_running_loop().shutdown_default_executor()


async def _gather(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_event(trigger: JobTrigger) -> Any:
    """Return the payload of the trigger's event, run in this process as the triggerer would."""
    events = cast("AsyncGenerator[TriggerEvent, None]", trigger.run())
    async with contextlib.aclosing(events):
        async for event in events:
            return event.payload
    return None
