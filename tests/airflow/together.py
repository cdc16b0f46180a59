"""
Tests that are told side by side: most of what they do is to wait.

A test that is marked with :func:`together` is told in a thread of its own, among all such tests of all modules, before
any other test begins, and is judged in its turn. It takes the stage and a function that triggers runs, and must not
care who else is on the stage: it has a Dag of its own, kills no process that others need, and holds requests back only
by a pattern that names its Dag. Whose a driver or an application is it tells by what no other story's has.

Those that need the same process to be dead for a while are told in three acts, see :func:`without_triggerers`. Those
that take away what others need, but not each other, come after them, see :func:`fatal`.

A module whose tests need another Airflow has an ``own_stage``, a function of a Kubernetes cluster of its own and a
folder that gives a context manager. Its tests are told in a thread, from the second act on: then there is no
triggerer, and the time for which there is none is waited for. Those marked with :func:`alone` come when the others of
the module have been told, one after the other.

What takes away Airflow itself comes at the very end, see :func:`last_of_all`.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import pytest

__all__ = [
    "Elsewhere",
    "InActs",
    "Together",
    "Turn",
    "alone",
    "begins_last",
    "fatal",
    "from_the_start",
    "has_own_stage",
    "last_of_all",
    "together",
    "turn_of",
    "without_triggerers",
]

AT_ONCE = 6
Story = Callable[..., None]
StoryInActs = Callable[..., Iterator[None]]
S = TypeVar("S")


class Turn(enum.IntEnum):
    """When a test is told: in this order."""

    LONG = enum.auto()
    STORY = enum.auto()
    IN_ACTS = enum.auto()
    FATAL = enum.auto()
    PLAIN = enum.auto()
    """No story: it begins when the one before it has ended."""
    LAST = enum.auto()
    ELSEWHERE = enum.auto()
    """On a stage of its own, beside what comes after the first act."""


_FIXTURES = {Turn.IN_ACTS: "told_in_acts", Turn.FATAL: "told_at_last"}


def together(story: Story) -> Callable[..., None]:
    """Make a test of a function ``(stage, run)``, and of parameters, that is told beside others."""
    return _test_of(story, Turn.STORY)


def from_the_start(story: Story) -> Callable[..., None]:
    """Do as :func:`together` does for a story that takes longer, which begins before the others."""
    return _test_of(story, Turn.LONG)


def alone(story: Story) -> Callable[..., None]:
    """Do as :func:`together` does for a story on a stage of its own beside which nothing else is told there."""
    return _test_of(story, Turn.STORY, alone=True)


def fatal(story: Story) -> Callable[..., None]:
    """Do as :func:`together` does for a story that takes away what all need but those which come at the same time."""
    return _test_of(story, Turn.FATAL)


def last_of_all(test: Callable[..., None]) -> Callable[..., None]:
    """Have a test that is no story come after all others: for a while it leaves nothing of Airflow."""
    vars(test)["turn"] = Turn.LAST
    return test


def without_triggerers(story: StoryInActs) -> Callable[..., None]:
    """
    Make a test of a generator function ``(stage, run)`` that is told beside all others of its kind.

    It yields twice. When all of them have yielded, all triggerers are killed, and started again when all have yielded
    once more.
    """
    return _test_of(story, Turn.IN_ACTS)


def begins_last(test: Callable[..., None]) -> Callable[..., None]:
    """Let a story's first act begin when those of the others have ended: what it begins does not wait for them."""
    vars(test)["begins_last"] = True
    return test


def _test_of(story: Callable[..., Any], turn: Turn, *, alone: bool = False) -> Callable[..., None]:
    fixture = _FIXTURES.get(turn, "told_together")

    def test(request: pytest.FixtureRequest, **fixtures: Any) -> None:
        fixtures[fixture].result(request.node)

    functools.update_wrapper(test, story)
    del vars(test)["__wrapped__"]  # pytest reads from the signature which fixtures a test asks for
    parameters = [name for name in inspect.signature(story).parameters if name not in ("stage", "run")]
    test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in (fixture, "request", *parameters)]
    )
    vars(test).update(story=story, turn=turn, alone=alone)
    return test


def has_own_stage(item: pytest.Item) -> bool:
    """Whether a test needs an Airflow of its own."""
    return hasattr(getattr(item, "module", None), "own_stage")


def turn_of(item: pytest.Item) -> Turn:
    """Return when a test is told, which tests are to be sorted by."""
    if has_own_stage(item):
        return Turn.ELSEWHERE
    return getattr(getattr(item, "function", None), "turn", Turn.PLAIN)


def _in_turn(stories: list[pytest.Item]) -> Callable[[pytest.Item], tuple[int, float]]:
    """
    Return what stories are to be sorted by for their begin: long ones, then one of each module in turn.

    Those of one module want the same: it shall not be all of them at once who start a JVM, say.
    """
    modules: dict[object, list[str]] = {}
    for item in stories:
        modules.setdefault(item.path, []).append(item.nodeid)

    def turn(item: pytest.Item) -> tuple[int, float]:
        of_module = modules[item.path]
        return turn_of(item), of_module.index(item.nodeid) / len(of_module)

    return turn


class Together:
    """
    Tests that run side by side.

    :param items: tests, among which are stories.
    :param turns: those of the stories that are told.
    :param tell: tells the story of one.
    """

    def __init__(
        self, items: list[pytest.Item], turns: Collection[Turn], tell: Callable[[Story, dict[str, Any]], None]
    ) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="story")
        stories = [item for item in items if turn_of(item) in turns]
        self._told: dict[str, Future[None]] = {}
        for item in sorted(stories, key=_in_turn(stories)):
            parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
            self._told[item.nodeid] = self._pool.submit(tell, item.function.story, parameters)  # type: ignore[attr-defined]

    def result(self, item: pytest.Item) -> None:
        """Return when the test has been told; raise what it raised."""
        self._told[item.nodeid].result()

    def end(self) -> None:
        """Wait for those that have begun; the others are not told any more."""
        self._pool.shutdown(cancel_futures=True)


class InActs:
    """
    Tests in three acts, which are told when this is made.

    :param items: tests, among which are such.
    :param tell: begins to tell the story of one.
    :param second_act: goes on for as long as the second act.
    """

    def __init__(
        self,
        items: list[pytest.Item],
        tell: Callable[[StoryInActs], Iterator[None]],
        second_act: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._failures: dict[str, BaseException] = {}
        tests = [item for item in items if turn_of(item) is Turn.IN_ACTS]
        told = {item.nodeid: tell(item.function.story) for item in tests}  # type: ignore[attr-defined]
        last = {item.nodeid for item in tests if "begins_last" in vars(item.function)}  # type: ignore[attr-defined]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="story") as pool:

            def act(names: Iterable[str] = told) -> None:
                list(pool.map(lambda name: self._go_on(name, told[name]), names))

            act(told.keys() - last)
            act(last)
            with second_act():
                act()
            act()

    def _go_on(self, name: str, story: Iterator[None]) -> None:
        try:
            next(story, None)
        except BaseException as failure:  # also what skips a test
            self._failures[name] = failure

    def result(self, item: pytest.Item) -> None:
        """Return if the test has been told; raise what it raised."""
        if failure := self._failures.get(item.nodeid):
            raise failure


class Elsewhere(Generic[S]):
    """
    Tests on a stage of their own, which is opened and closed in a thread.

    :param items: its tests, all of them stories.
    :param own_stage: the stage.
    :param tell: tells a story on it.
    """

    def __init__(
        self,
        items: list[pytest.Item],
        own_stage: AbstractContextManager[S],
        tell: Callable[[S, Story], None],
    ) -> None:
        self._own_stage, self._tell = own_stage, tell
        self._failures: dict[str, BaseException] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="elsewhere")
        self._end = self._pool.submit(self._tell_all, items)

    def _tell_all(self, items: list[pytest.Item]) -> None:
        own = [item for item in items if vars(item.function)["alone"]]  # type: ignore[attr-defined]
        with self._own_stage as stage:
            with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="story") as pool:
                list(pool.map(functools.partial(self._tell_one, stage), [item for item in items if item not in own]))
            for item in own:
                self._tell_one(stage, item)

    def _tell_one(self, stage: S, item: pytest.Item) -> None:
        try:
            self._tell(stage, item.function.story)  # type: ignore[attr-defined]
        except BaseException as failure:  # also what skips a test
            self._failures[item.nodeid] = failure

    def result(self, item: pytest.Item) -> None:
        """Return if the test has been told; raise what it raised, or what the stage did."""
        self._end.result()
        if failure := self._failures.get(item.nodeid):
            raise failure

    def end(self) -> None:
        """Wait until all is told."""
        self._pool.shutdown()
