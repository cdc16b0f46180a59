"""What lets a job end that was to live until a test has seen what it waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.airflow.conftest import Run

__all__ = ["open_gate"]


def open_gate(run: Run, *, of: str = "") -> None:
    """
    Let the jobs of a run end that wait for the file of its ID.

    :param of: what ends its name, for what else in the run waits for a file.
    """
    gates = run.stage.airflow.home / "gates"
    gates.mkdir(exist_ok=True)
    (gates / f"{run.id}{of}").touch()
