"""What the crash test counts with, and kills."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.crash.interposer import Exchange, Interposer, Kill, Way


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def cross(interposer: Interposer, what: str) -> list[bool]:
    """Carry an exchange as far as it goes."""
    exchange, passed = interposer.exchange(what), []
    for goes_on in (exchange.leaves, exchange.answered, exchange.over):
        passed.append(goes_on())
        if not passed[-1]:
            break
    return passed


@pytest.mark.parametrize(("way", "passed"), [(Way.BEFORE, [0]), (Way.ACTED, [1, 0]), (Way.AFTER, [1, 1, 0])])
def test_kills_at_the_planned_exchange(process: subprocess.Popen[bytes], way: Way, passed: list[int]) -> None:
    interposer = Interposer()
    interposer.plan([Kill(2, way)])
    interposer.watch(process.pid)
    assert cross(interposer, "one") == [True, True, True]
    assert process.poll() is None
    assert cross(interposer, "two") == passed
    assert process.wait(10) == -9
    assert interposer.killed == [f"{way.value}: two"]
    assert cross(interposer, "of the dead one") == [False]
    assert interposer.crossed == [["one", "two"], []]


def test_a_second_death_is_counted_from_the_first(process: subprocess.Popen[bytes]) -> None:
    interposer = Interposer()
    interposer.plan([Kill(1, Way.BEFORE), Kill(1, Way.ACTED)])
    with subprocess.Popen(["sleep", "60"]) as first:
        interposer.watch(first.pid)
        late = interposer.exchange("one")
        assert not late.leaves()
    interposer.watch(process.pid)
    assert not late.answered(), "it belongs to the process that is dead"
    assert process.poll() is None
    assert cross(interposer, "two") == [True, False]
    assert process.wait(10) == -9


def test_each_part_of_a_stream_is_an_exchange(process: subprocess.Popen[bytes]) -> None:
    interposer = Interposer()
    interposer.plan([Kill(3, Way.ACTED)])
    interposer.watch(process.pid)
    watch = interposer.exchange("cluster: GET watch", stream=True)
    assert watch.leaves()
    assert watch.answered()
    first, second = watch.part(), None
    assert first is not None
    assert [first.leaves(), first.answered(), first.over()] == [True, True, True]
    second = watch.part()
    assert isinstance(second, Exchange)
    assert [second.leaves(), second.answered()] == [True, False]
    assert process.wait(10) == -9


def test_a_poll_may_count_once(process: subprocess.Popen[bytes]) -> None:
    interposer = Interposer()
    interposer.plan([])
    interposer.watch(process.pid)
    interposer.repeats = False
    for what in ("cluster: GET a", "cluster: GET b", "cluster: GET a", "cluster: GET b", "Airflow: c", "Airflow: c"):
        assert cross(interposer, what) == [True, True, True]
    assert interposer.crossed == [["cluster: GET a", "cluster: GET b", "Airflow: c", "Airflow: c"]]


def test_a_death_may_come_later(process: subprocess.Popen[bytes]) -> None:
    interposer = Interposer()
    interposer.plan([Kill(1, Way.ACTED, later=0.2)])
    interposer.watch(process.pid)
    assert cross(interposer, "one") == [True, True, True]
    assert cross(interposer, "two") == [True, True, True]
    assert process.wait(10) == -9
    assert interposer.crossed == [["one", "two"], []]
    assert interposer.killed == ["0.20 s after acted upon, not answered: one"]


def test_but_not_to_the_next_process(process: subprocess.Popen[bytes]) -> None:
    interposer = Interposer()
    interposer.plan([Kill(1, Way.ACTED, later=0.2)])
    with subprocess.Popen(["true"]) as first:
        interposer.watch(first.pid)
        assert cross(interposer, "one") == [True, True, True]
        first.wait()
    interposer.ended(first.pid)
    interposer.watch(process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert interposer.killed == []


def test_a_program_that_is_started_stands_for_an_answer() -> None:
    """Killed when it is there: the two moments after the start are those of a child, and of its child."""
    interposer = Interposer()
    interposer.plan([Kill(1, Way.AFTER)])
    script = "sleep 0.3; sh -c 'sleep 0.3; sleep 60 & wait' & wait"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:
        interposer.watch(process.pid)
        act = interposer.exchange("machine: start sh")
        assert act.leaves()
        interposer.settle(act)
        assert process.wait(10) == -9
        os.killpg(process.pid, signal.SIGKILL)


def test_kills_something_else_in_the_place_of_the_process(process: subprocess.Popen[bytes]) -> None:
    interposer, deaths = Interposer(), []
    interposer.plan([Kill(1, Way.ACTED)])
    interposer.instead = lambda: deaths.append(process.poll())
    interposer.watch(process.pid)
    assert cross(interposer, "Airflow: what is none of its business") == [True, True, True]
    assert cross(interposer, "cluster: POST /jobs") == [True, False], "its answer went with it"
    assert deaths == [None], "the process lives"
    assert cross(interposer, "cluster: GET /jobs") == [True, True, True]
    assert interposer.crossed == [["cluster: POST /jobs", "cluster: GET /jobs"]]
