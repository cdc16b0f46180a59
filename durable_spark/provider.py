"""What Airflow's provider manager asks of this package: entry point ``apache_airflow_provider``."""

from __future__ import annotations

from typing import Any

import durable_spark
from durable_spark.hooks.form import CONN_FIELDS, UI_FIELD_BEHAVIOUR

__all__ = ["get_provider_info"]

_INTEGRATION = "Apache Spark (durable)"


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, in the form of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-provider-durable-spark",
        "name": "Durable Spark",
        "description": "Run Spark jobs: submitted once, followed from the triggerer, never twice.",
        "versions": [durable_spark.__version__],
        "integrations": [
            {
                "integration-name": _INTEGRATION,
                "external-doc-url": "https://spark.apache.org/",
                "tags": ["apache"],
            }
        ],
        "operators": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    "durable_spark.operators.job",
                    "durable_spark.operators.spark",
                    "durable_spark.operators.spark_submit",
                ],
            }
        ],
        "hooks": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    "durable_spark.hooks.job",
                    "durable_spark.hooks.kubernetes",
                    "durable_spark.hooks.spark",
                    "durable_spark.hooks.standalone",
                    "durable_spark.hooks.yarn",
                ],
            }
        ],
        "triggers": [{"integration-name": _INTEGRATION, "python-modules": ["durable_spark.triggers.job"]}],
        "connection-types": [
            {
                "connection-type": "durable_spark",
                "hook-class-name": "durable_spark.hooks.spark.SparkHook",
                "hook-name": "Spark (durable)",
                "conn-fields": {name: dict(field) for name, field in CONN_FIELDS.items()},
                "ui-field-behaviour": dict(UI_FIELD_BEHAVIOUR),
            }
        ],
        "extra-links": [
            "durable_spark.links.JobLink",
            "durable_spark.links.JobLogLink",
            "durable_spark.links.JobTrackingLink",
            "durable_spark.links.JobHistoryLink",
        ],
        "cli": ["durable_spark.cli.definition.get_commands"],
        "config": {
            "durable_spark": {
                "description": "Options of airflow-provider-durable-spark.",
                "options": {
                    "deployment": {
                        "description": (
                            "Name of this Airflow deployment. Jobs are labelled with it, so that a job whose record is "
                            "lost can be found again and told from those of another deployment on the same cluster. "
                            "Without it such jobs are reported, never killed."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "production",
                        "default": "",
                    },
                    "earliest_event": {
                        "description": (
                            "Seconds after a deferral before which no trigger reports an end. An event in the first "
                            "few seconds makes Airflow's scheduler count the try as failed."
                        ),
                        "version_added": "0.1.0",
                        "type": "float",
                        "example": None,
                        "default": "10.0",
                    },
                },
            }
        },
    }
