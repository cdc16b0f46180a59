"""OpenLineage's properties for a Spark job, as the Spark provider injects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import Context

__all__ = ["with_lineage"]


def with_lineage(conf: Mapping[str, Any], context: Context, *, parent: bool, transport: bool) -> dict[str, Any]:
    """
    Return the properties, with those that OpenLineage's Spark integration reads.

    :param parent: let the job report this task as its parent.
    :param transport: let the job use Airflow's own transport.
    """
    properties = dict(conf)
    if not (parent or transport):
        return properties
    from airflow.providers.common.compat.openlineage.utils.spark import (
        inject_parent_job_information_into_spark_properties,
        inject_transport_information_into_spark_properties,
    )

    if parent:
        properties = inject_parent_job_information_into_spark_properties(properties, context)
    if transport:
        properties = inject_transport_information_into_spark_properties(properties, context)
    return properties
