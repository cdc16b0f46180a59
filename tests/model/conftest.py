"""How much of the model and the fuzzing is run, with which seed, and where the numbers go."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="100,000 steps of the model and 200,000 inputs, not a slice")
    parser.addoption("--model-seed", type=int, default=None, help="seed of the model and the fuzzing; default: the day")
    parser.addoption("--summary", type=Path, default=None, help="file for what was run, as JSON")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all is to be run, or a slice."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def model_seed(request: pytest.FixtureRequest) -> int:
    """The seed. By default another one each day, so that a slice that is run often sees more."""
    given = request.config.getoption("--model-seed")
    return int(datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")) if given is None else int(given)


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest, model_seed: int, full: bool) -> Iterator[dict[str, Any]]:
    """
    What was run. Printed as one line of JSON at the end, and written to the file of ``--summary``.

    A full run of all that is fuzzed that fed fewer inputs than it is to has not shown what it is to show: an error.
    """
    numbers: dict[str, Any] = {"seed": model_seed, "full": full}
    yield numbers
    line = json.dumps(numbers)
    if (path := request.config.getoption("--summary")) is not None:
        path.write_text(line + "\n")
    request.config.stash[_LINE] = line
    if full and _fuzzes_all(request.session):
        assert numbers.get("inputs_total", 0) >= INPUTS, f"fewer than {INPUTS} inputs were fed: {line}"


INPUTS = 200_000
"""That a full run gives to the parsers, at least."""
FUZZED = {"test_answers.py", "test_parsers.py", "test_stored.py"}
_LINE = pytest.StashKey[str]()
_CHOSEN = pytest.StashKey[bool]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note that only some tests run."""
    if items:
        items[0].config.stash[_CHOSEN] = True


def _fuzzes_all(session: pytest.Session) -> bool:
    """Whether every parser is fed: of a part of them, no number of inputs is promised."""
    config = session.config
    named = any("::" in argument for argument in config.args)
    return not (named or config.stash.get(_CHOSEN, False)) and {item.path.name for item in session.items} >= FUZZED


def pytest_report_header(config: pytest.Config) -> str:
    return f"model: seed {config.getoption('--model-seed') or 'of the day'}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (line := config.stash.get(_LINE, None)) is not None:
        terminalreporter.write_line(line)
