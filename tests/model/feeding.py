"""
Feeding a parser: a number of inputs, one seed, a bound on time and memory, and a count for the summary.

What all tests of parsers share. Whatever fails is shrunk by Hypothesis, and is the same again with the seed that is
printed. An input that takes too long is interrupted, so that its traceback shows where; what even a signal cannot
interrupt ends the whole run with one. What the product logs with a traceback is a failure, too: it has caught what
nobody foresaw, as a feed does with its hook's exceptions.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import re
import resource
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.model.clock import Clock, Loop
from tests.unit.hooks.fake import RECORDED

if TYPE_CHECKING:
    from durable_spark.jobs import JobStatus

INPUTS = 11_500
"""Of a parser with a share of 1, in the full run."""
A_FEW = 100
SECONDS = 2.0
"""Of processor time that one input may take; most take less than a thousandth of it."""
HUNG = 600.0
"""Seconds after which a hundred inputs that are not done never will be."""
MEASURED = 50
"""One input of about so many has its memory measured, which makes it several times as slow."""
PEAK = 100
"""Megabytes that one input may take at once. A body has up to 0.3 MB, and up to forty answers are kept here."""
MEGABYTES = 700
"""By which the process may grow over all inputs of a parser: Hypothesis remembers what it has tried."""
URL = re.compile(r"https?://[\w.:\[\]-]+(/[!-~]*)?", re.ASCII)


loop = Loop(Clock(1795406100.0))


def recordings(start: str, end: str = ".json") -> list[str]:
    return [path.read_text() for path in sorted(RECORDED.glob(f"{start}*{end}"))]


def expect_harmless(status: JobStatus, *origins: str) -> None:
    """See that nothing in a status is longer, or stranger, than what the UI, a log or a database takes."""
    assert len(status.raw) <= 150
    assert len(status.message) <= 6100
    assert isinstance(status.held_up_since, (float, type(None)))
    for url in status.links.values():
        assert URL.fullmatch(url), url
        assert not set(url) & set("\"'<>\\"), url
        assert "@" not in urlsplit(url).netloc


class Parser(NamedTuple):
    """
    One parser: what is fed, and what is made of it.

    :param check: fails if more than ours is raised, or something is believed that was not said.
    :param share: of the inputs, relative to the others.
    """

    inputs: Any
    check: Callable[[Any], None]
    share: float = 1.0


class _TooLong(BaseException):
    """An input has had its time. No ``except Exception`` of the product may take it for an outage."""


class _Raised(logging.Handler):
    """Keeps the exceptions that are logged with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Interrupt what takes more processor time."""

    def interrupt(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except _TooLong as error:
        raise AssertionError(f"more than {seconds} s of processor time") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _measured() -> Iterator[None]:
    """See that no more memory is taken at once than is allowed to one input."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] >> 20
    finally:
        tracemalloc.stop()
    assert peak < PEAK, f"{peak} MB at once"


@pytest.fixture
def fed(
    request: pytest.FixtureRequest, full: bool, model_seed: int, summary: dict[str, Any]
) -> Iterator[Callable[..., None]]:
    """Return what feeds a parser, and counts."""
    raised, product = _Raised(), logging.getLogger("durable_spark")
    stderr = request.config.stash[fault_handler_stderr_fd_key]

    def feed(name: str, parser: Parser) -> None:
        count = round((INPUTS if full else A_FEW) * parser.share)
        begun, cpu, before = time.monotonic(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fed = 0

        @seed(model_seed)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        )
        @given(st.integers(0, MEASURED - 1), parser.inputs)
        def check(sample: int, value: Any) -> None:
            nonlocal fed
            if fed % 100 == 0:
                faulthandler.dump_traceback_later(HUNG, exit=True, file=stderr)
            fed += 1
            raised.errors.clear()
            measured = sample == 0
            with _bounded(SECONDS * (5 if measured else 1)), _measured() if measured else contextlib.nullcontext():
                parser.check(value)
            for error in raised.errors:
                raise AssertionError("the product logged an exception that nobody foresaw") from error

        try:
            check()
        except BaseException:
            print(f"{name}: run it again with {'--full ' if full else ''}--model-seed {model_seed}")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        summary.setdefault("inputs", {})[name] = fed
        summary["inputs_total"] = summary.get("inputs_total", 0) + fed
        summary["fuzz_seconds"] = round(summary.get("fuzz_seconds", 0.0) + time.monotonic() - begun, 1)
        summary["fuzz_cpu_seconds"] = round(summary.get("fuzz_cpu_seconds", 0.0) + time.process_time() - cpu, 1)
        assert grown < MEGABYTES, f"{grown} MB more than before"

    product.addHandler(raised)
    yield feed
    product.removeHandler(raised)
