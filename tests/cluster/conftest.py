"""Clusters of unusual kinds, each started once, and hooks on them."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import pytest_asyncio
import trustme

from dev.spark import HighlyAvailableCluster, StandaloneCluster, ensure_spark
from durable_spark.hooks.spark import SparkHook
from tests.conftest import require
from tests.standalone import jws, keystore

if TYPE_CHECKING:
    from durable_spark.hooks.job import JobHook

Connect = Callable[..., Any]


@pytest_asyncio.fixture
async def connect(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    """Return a function from a connection's dict to a fresh hook, which is closed when the test ends."""
    async with AsyncExitStack() as stack:

        def connect(connection: Mapping[str, Any], hook_class: type[JobHook] = SparkHook) -> JobHook:
            conn_id = f"c{secrets.token_hex(4)}"
            monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(connection))
            hook = hook_class(conn_id)
            stack.push_async_exit(hook)
            return hook

        yield connect


class Guarded(NamedTuple):
    """A cluster that asks for a token and speaks TLS, and remembers one completed driver at a time."""

    cluster: StandaloneCluster
    key: bytes
    ca: str

    def connection(self) -> dict[str, Any]:
        """Return a connection that has all that it takes."""
        return {**self.cluster.connection(ca=self.ca), "password": jws(self.key)}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    authority, key = trustme.CA(), secrets.token_bytes(32)
    with StandaloneCluster(
        spark=require(ensure_spark),
        jws_key=base64.urlsafe_b64encode(key).decode().rstrip("="),
        keystore=keystore(authority, tmp_path_factory.mktemp("tls") / "keystore.p12"),
        master_conf={"spark.deploy.retainedDrivers": "1"},
    ) as cluster:
        yield Guarded(cluster, key, authority.cert_pem.bytes().decode())


@pytest.fixture(scope="module")
def pair() -> Iterator[HighlyAvailableCluster]:
    """Two masters and two workers."""
    with HighlyAvailableCluster(workers=2, spark=require(ensure_spark)) as cluster:
        yield cluster
