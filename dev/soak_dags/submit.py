"""
Dags of the soak: jobs that spark-submit submits.

A file of their own, because importing the Spark provider costs each task seconds.
"""

from __future__ import annotations

import json
import os
from typing import Any

from dev.soak_tasks import COMMON, ENDS, FEW_JVMS, KEY, dag
from durable_spark.operators.spark_submit import SparkSubmitOperator

for cluster, arguments in json.loads(os.environ["SUBMIT_ARGUMENTS"]).items():
    more: dict[str, Any] = {"application_args": [*arguments.get("application_args", ()), *ENDS]}
    if cluster == "standalone":
        more["application_args"] += [f"key={KEY}"]
    elif cluster == "kubernetes":
        more["conf"] = {**arguments["conf"], "spark.kubernetes.driver.label.soak": KEY}
    with dag(f"submit_{cluster}"):
        SparkSubmitOperator(
            task_id="job",
            conn_id=f"submit_{cluster}",
            name=KEY,
            pool_slots=2,  # one for spark-submit
            **FEW_JVMS,
            **COMMON,
            **{**arguments, **more},
        )
