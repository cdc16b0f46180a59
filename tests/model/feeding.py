"""
Feeding a parser: a number of inputs, one seed, a bound on time and memory, and a count for the summary.

What all tests of parsers share. Whatever fails is shrunk by Hypothesis, and is the same again with the seed that was
printed.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.model.clock import Clock, Loop
from tests.unit.hooks.fake import RECORDED

if TYPE_CHECKING:
    from durable_spark.jobs import JobStatus

INPUTS = 11_500
"""Of a parser with a share of 1, in the full run."""
A_FEW = 100
SECONDS = 2.0
"""Of processor time that one input may take; most take less than a thousandth of it."""
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


@pytest.fixture
def fed(full: bool, model_seed: int, summary: dict[str, Any]) -> Callable[..., None]:
    """Return what feeds a parser, and counts."""

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
        @given(parser.inputs)
        def check(value: Any) -> None:
            nonlocal fed
            fed += 1
            started = time.process_time()
            parser.check(value)
            took = time.process_time() - started
            assert took < SECONDS, f"{took:.1f} s of processor time"

        check()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        summary.setdefault("inputs", {})[name] = fed
        summary["inputs_total"] = summary.get("inputs_total", 0) + fed
        summary["fuzz_seconds"] = round(summary.get("fuzz_seconds", 0.0) + time.monotonic() - begun, 1)
        summary["fuzz_cpu_seconds"] = round(summary.get("fuzz_cpu_seconds", 0.0) + time.process_time() - cpu, 1)
        assert grown < MEGABYTES, f"{grown} MB more than before"

    return feed
