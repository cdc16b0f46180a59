"""
How a synchronous operator talks to an asynchronous hook: one event loop for the length of one Airflow call.

The trap: Airflow interrupts the main thread (SIGALRM for ``execution_timeout``, SIGTERM for a kill), so
the loop may be left in the middle of anything; :meth:`Conversation.close` cancels and awaits what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from airflow.triggers.base import TriggerEvent

    from durable_spark.hooks.job import JobHook
    from durable_spark.triggers.job import JobTrigger

__all__ = ["Conversation", "first_event"]

T = TypeVar("T")


class Conversation:
    """The event loop in which a synchronous operator talks to its hook."""

    def __init__(self, hook: JobHook) -> None:
        self.hook = hook
        self._loop = asyncio.new_event_loop()
        self._interrupted = asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns."""
        return self._loop.run_until_complete(coroutine)

    def interrupt(self) -> None:
        """End :meth:`until_interrupted`, now or when it is called. Called from a signal handler."""
        self._loop.call_soon_threadsafe(self._interrupted.set)

    async def until_interrupted(self, coroutine: Coroutine[Any, Any, T]) -> T | None:
        """Return what the coroutine returns, or ``None`` when :meth:`interrupt` was called first."""
        work = asyncio.ensure_future(coroutine)
        interruption = asyncio.ensure_future(self._interrupted.wait())
        try:
            await asyncio.wait([work, interruption], return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            for task in (work, interruption):
                task.cancel()
            await asyncio.gather(work, interruption, return_exceptions=True)

    def close(self) -> None:
        """Cancel what is left, close the hook and the loop."""
        try:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self.run(asyncio.wait_for(_gather(left), 10))
            self.run(asyncio.wait_for(self.hook.aclose(), 10))
            self.run(self._loop.shutdown_asyncgens())
            self.run(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _gather(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_event(trigger: JobTrigger) -> Any:
    """Return the payload of the trigger's event, run in this process as the triggerer would."""
    events = cast("AsyncGenerator[TriggerEvent, None]", trigger.run())
    async with contextlib.aclosing(events):
        async for event in events:
            return event.payload
    return None
