"""
Tests that are told side by side: most of what they do is to wait.

A test that is marked with :func:`together` is told in a thread of its own, among all such tests of all modules, before
any other test begins, and is judged in its turn. It takes the stage and a function that triggers runs, and must not
care who else is on the stage: it has a Dag of its own, kills no process that others need, and holds requests back only
by a pattern that names its Dag. Whose a driver or an application is it tells by what no other story's has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

__all__ = ["Together", "at_the_end", "from_the_start", "in_order", "together"]

AT_ONCE = 7
Story = Callable[..., None]


def together(story: Story) -> Callable[..., None]:
    """Make a test of a function ``(stage, run)``, and of parameters, that is told beside others."""
    return _test_of(story, minutes=False)


def from_the_start(story: Story) -> Callable[..., None]:
    """Do as :func:`together` does for a story of minutes, which begins before the others."""
    return _test_of(story, minutes=True)


def _test_of(story: Story, *, minutes: bool) -> Callable[..., None]:
    def test(told_together: Together, request: pytest.FixtureRequest, **_parameters: Any) -> None:
        told_together.result(request.node)

    functools.update_wrapper(test, story)
    del vars(test)["__wrapped__"]  # pytest reads from the signature which fixtures a test asks for
    parameters = [name for name in inspect.signature(story).parameters if name not in ("stage", "run")]
    test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("told_together", "request", *parameters)
        ]
    )
    test.story, test.minutes = story, minutes  # type: ignore[attr-defined]
    return test


def at_the_end(test: Callable[..., None]) -> Callable[..., None]:
    """Have a test come after all others, because it starts anew what they all need."""
    test.at_the_end = True  # type: ignore[attr-defined]
    return test


def in_order(item: pytest.Item) -> int:
    """Return what tests are to be sorted by: long stories, stories, all else, what comes at the end."""
    function = getattr(item, "function", None)
    if not hasattr(function, "story"):
        return 3 if hasattr(function, "at_the_end") else 2
    return 0 if function.minutes else 1  # type: ignore[union-attr]


class Together:
    """
    Tests that run side by side.

    :param items: tests, among which are stories.
    :param tell: tells the story of one.
    """

    def __init__(self, items: list[pytest.Item], tell: Callable[[Story, dict[str, Any]], None]) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="story")
        self._told: dict[str, Future[None]] = {}
        for item in items:
            story = getattr(getattr(item, "function", None), "story", None)
            if story is not None:
                parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
                self._told[item.nodeid] = self._pool.submit(tell, story, parameters)

    def result(self, item: pytest.Item) -> None:
        """Return when the test has been told; raise what it raised."""
        self._told[item.nodeid].result()

    def end(self) -> None:
        """Wait for those that have begun; the others are not told any more."""
        self._pool.shutdown(cancel_futures=True)
