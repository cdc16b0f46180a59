"""What all suites share: a clean Airflow configuration, and clusters that are started once."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dev.kubernetes import KubernetesCluster
from dev.processes import ToolMissing
from dev.spark import StandaloneCluster, ensure_spark
from dev.yarn import YarnCluster
from tests.clusters import Clusters

T = TypeVar("T")

FULL_KUBERNETES = bool(os.environ.get("DURABLE_SPARK_FULL_KUBERNETES"))
"""Whether pods are containers of a real kubelet: ``scripts/test --full-kubernetes``."""

pytest.register_assert_rewrite("durable_spark.testing")


def _forget_the_developers_airflow() -> None:
    """Airflow reads its configuration when it is imported, so this comes before any test module."""
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        del os.environ[name]
    os.environ["AIRFLOW_HOME"] = home = tempfile.mkdtemp(prefix="durable-spark-airflow-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)


_forget_the_developers_airflow()


def require(get: Callable[[], T]) -> T:
    """
    Return what ``get`` returns; where it raises :class:`ToolMissing`, skip the test, or fail it under CI.

    ``require(ensure_spark)``, ``require(java_home)``.
    """
    try:
        return get()
    except ToolMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def java_options() -> str:
    """Return the options of all JVMs of the standalone cluster, for a suite to have its own."""
    return ""


@pytest.fixture(scope="session")
def standalone_cluster(java_options: str) -> Iterator[StandaloneCluster]:
    """One master that remembers living drivers over a restart, and one worker. Leave it as it was found."""
    spark = dataclasses.replace(require(ensure_spark), java_options=java_options)
    with StandaloneCluster(recovery=True, spark=spark) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def kubernetes_cluster() -> Iterator[KubernetesCluster]:
    """A Kubernetes API and one node, whose pods really run. Leave it as it was found, but for pods of your own."""
    with require(lambda: KubernetesCluster(full=FULL_KUBERNETES)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def yarn_cluster() -> Iterator[YarnCluster]:
    """One ResourceManager and one NodeManager. Leave it as it was found, but for applications of your own."""
    with require(YarnCluster) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def apps() -> Path:
    """The folder of the applications that run on clusters."""
    return Path(__file__).parent / "apps"


def or_none(request: pytest.FixtureRequest, cluster: str) -> Any:
    """Return a cluster; ``None`` instead of skipping all that needs an Airflow."""
    try:
        return request.getfixturevalue(cluster)
    except pytest.skip.Exception:
        return None


@pytest.fixture(scope="session")
def submit_clusters(
    request: pytest.FixtureRequest,
    standalone_cluster: StandaloneCluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Clusters | None:
    """Return the clusters to which ``spark-submit`` submits."""
    kubernetes: KubernetesCluster | None = or_none(request, "kubernetes_cluster")
    yarn: YarnCluster | None = or_none(request, "yarn_cluster")
    if kubernetes is None or yarn is None:
        return None
    return Clusters(standalone_cluster, kubernetes, yarn, tmp_path_factory.mktemp("submit"))
