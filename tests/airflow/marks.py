"""By what the jobs of Dags that run side by side are told from each other, where it is not by the name of a pod."""

from __future__ import annotations

from tests.clusters import CLUSTERS

__all__ = ["MEMORY", "SUBMITTING", "mark_of"]

SUBMITTING = [
    *((story, cluster) for story in ("active", "marked", "taken") for cluster in CLUSTERS),
    ("succeeded", "kubernetes"),
    ("failed", "kubernetes"),
    ("given", "kubernetes"),
]
"""The stories of ``spark-submit``, and on which cluster; a Dag file for each."""
_DAGS_OF_DRIVERS = [
    *(f"driver_{trouble}" for trouble in ("refused", "hang", "half", "garbage", "e500", "e429", "token", "long")),
    "late_driver",
    "late_request",
    "life",
    *(f"life_{way}" for way in ("deferred", "short", "failing", "blocking", "blocking_marked", "marked", "followed")),
    *(f"lost_driver{what}" for what in ("", "_seen", "_again")),
    "other_standalone",
    "time_standalone",
    *(f"retry_{case}" for case in ("active", "succeeded", "failed", "sent")),
    *(f"submit_{story}_standalone" for story, cluster in SUBMITTING if cluster == "standalone"),
]
MEMORY = {"durable_spark_example": 512, **{dag: 140 + number for number, dag in enumerate(_DAGS_OF_DRIVERS)}}
"""Of each Dag's drivers, in megabytes: nobody else's have so much."""


def mark_of(dag_id: str) -> str:
    """Return what marks the jobs of a Dag, as :func:`tests.clusters.marked` takes it."""
    return f"{MEMORY[dag_id]}m" if dag_id in MEMORY else dag_id
