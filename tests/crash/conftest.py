"""How much of the crash suite is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-slice", action="store_true", help="kill in each slice, not in a few of the day's")
    parser.addoption("--every-boundary", action="store_true", help="kill at each boundary, not at a few of the day's")
