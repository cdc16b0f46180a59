"""
Reading an Airflow connection to a Spark cluster: its master URL and its extras, each checked by name.

What flows in: a connection of our type or of the Spark provider's, as users have them. What flows out:
plain values, or a :class:`~durable_spark.jobs.BadConfiguration` that names the field and the fix.

The trap: the host may hold a bare host name, ``host:port``, a whole master URL, or a word such as
``yarn``, and a connection made from a URI keeps the scheme in its type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from durable_spark.jobs import BadConfiguration, ClusterUnreachable

if TYPE_CHECKING:
    from airflow.sdk import Connection

__all__ = ["CONN_TYPES", "Extras", "master_url", "read_connection"]

CONN_TYPES = ("durable_spark", "spark")
"""Ours, and the Spark provider's, whose connections work unchanged."""

_SCHEME_TYPES = ("k8s", "yarn", "local", "mesos")
"""Connection types that a URI such as ``k8s://…`` makes; the type is the scheme then."""

_WORDS = ("yarn", "local")
"""Master URLs without a scheme."""


async def read_connection(conn_id: str) -> Connection:
    """
    Return the connection.

    :raises BadConfiguration: when there is none of that name.
    :raises ClusterUnreachable: when it cannot be read now (a secrets backend that does not answer).
    """
    from airflow.sdk.exceptions import AirflowNotFoundException, AirflowRuntimeError

    try:
        return await BaseHook.aget_connection(conn_id)
    except AirflowNotFoundException as error:
        raise BadConfiguration(
            f"there is no Airflow connection {conn_id!r}: create it with the master URL as its host"
        ) from error
    except AirflowRuntimeError as error:
        raise ClusterUnreachable(f"the Airflow connection {conn_id!r} could not be read now: {error}") from error


def master_url(connection: Connection) -> str:
    """
    Return the master URL of a connection, put together as the Spark provider does it.

    :raises BadConfiguration: when the connection is of another kind, or has no host.
    """
    host = (connection.host or "").strip()
    host = host if host.endswith("://") else host.rstrip("/")
    scheme = connection.conn_type
    if scheme not in (*CONN_TYPES, *_SCHEME_TYPES):
        raise BadConfiguration(
            f"connection {connection.conn_id!r} is of the type {scheme!r}: use 'durable_spark' (or 'spark')"
        )
    if not host and scheme not in _WORDS:
        raise BadConfiguration(
            f"connection {connection.conn_id!r} has no host: give the master URL, such as spark://host:7077"
        )
    if scheme in _SCHEME_TYPES:
        host = f"{scheme}://{host}"
    elif "://" not in host and host.split("[")[0] not in _WORDS:
        host = f"spark://{host}"
    return f"{host}:{connection.port}" if connection.port else host


class Extras:
    """
    The extras of a connection, read by name. Those that nobody asks for are ignored.

    :param connection: the connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._conn_id = connection.conn_id
        try:
            values = connection.extra_dejson
        except ValueError as error:
            raise BadConfiguration(f"the extras of connection {self._conn_id!r} are not JSON") from error
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}

    def text(self, name: str) -> str | None:
        """Return an extra as text, ``None`` when it is empty."""
        value = self._values.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):  # its value is not shown: it may be a whole kubeconfig
            raise self.wrong(name, type(value).__name__, "give it as a string")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return one of the choices; the first is the default."""
        value = self.text(name)
        if value is None:
            return choices[0]
        if value.lower() not in choices:
            raise self.wrong(name, value, f"give one of {', '.join(choices)}")
        return value.lower()

    def flag(self, name: str) -> bool:
        """Return whether an extra is set: ``true`` or ``false``, as a JSON value or as text."""
        value = self._values.get(name)
        if value is None or value == "":
            return False
        text = str(value).strip().lower()
        if text not in ("true", "false"):
            raise self.wrong(name, value, "give true or false")
        return text == "true"

    def seconds(self, name: str, default: float) -> float:
        """Return a positive number of seconds."""
        value = self._values.get(name)
        if value is None or value == "":
            return default
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not 0 < number < math.inf:
            raise self.wrong(name, value, "give a positive number of seconds")
        return number

    def ports(self, name: str, default: int, *, count: int) -> Sequence[int]:
        """Return a port for each of ``count`` masters: one for all, or a comma list in their order."""
        value = self._values.get(name)
        if value is None or value == "":
            return (default,) * count
        parts = [part.strip() for part in str(value).split(",")]
        if isinstance(value, bool) or not all(part.isdecimal() and 0 < int(part) < 65536 for part in parts):
            raise self.wrong(name, value, f"give a port number, such as {default}")
        if len(parts) not in (1, count):
            raise self.wrong(name, value, f"give one port for all masters, or {count}, one for each of them in order")
        ports = [int(part) for part in parts]
        return ports * count if len(ports) == 1 else ports

    def wrong(self, name: str, value: object, fix: str) -> BadConfiguration:
        """Return the exception for an extra that cannot be used."""
        return BadConfiguration(f"the extra {name!r} of connection {self._conn_id!r} is {str(value)[:80]!r}: {fix}")
