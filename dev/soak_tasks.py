"""
What the Dags of the soak have in common, ``dev/soak_dags``: one for each kind of job of :mod:`dev.soak_jobs`.

What a run is to do comes in its conf. A job knows its key, which its cluster shows, and ends as it was planned: a pod
that is to fail once fails the first time that it runs, because each notes that it began.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param, RetryDecision, RetryPolicy

__all__ = ["APPS", "COMMON", "ENDS", "FEW_JVMS", "KEY", "KUBERNETES_CONF", "dag", "pod", "pod_arguments"]

NOTES = os.environ["SOAK_NOTES"]
APPS = Path(os.environ["SOAK_APPS"])
KUBERNETES_CONF = json.loads(os.environ["KUBERNETES_CONF"])
KEY = "{{ run_id }}"
ENDS = ["{{ params.seconds }}", "{{ 3 if params.failures == -1 else 0 }}"]
FEW_JVMS: dict[str, Any] = {"pool": "jvms"}


class UntilTheJobFails(RetryPolicy):
    """Whatever dies is worth another try; a job that is to fail for good is not."""

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        for_good = context is not None and context["params"].get("failures") == -1
        failed = str(exception).startswith("JobFailed")
        return RetryDecision.fail("the job has failed") if for_good and failed else RetryDecision.default()


COMMON: dict[str, Any] = {
    "retries": 1000,
    "retry_delay": timedelta(seconds=2),
    "retry_exponential_backoff": False,
    "retry_policy": UntilTheJobFails(),
}


def pod(key: str, seconds: Any, failures: Any) -> dict[str, Any]:
    """Return what is laid over a driver pod so that it is a shell script, which sleeps."""
    script = f"""
note={NOTES}/{key}; echo begun "$HOSTNAME" >> $note; runs=$(grep -c begun $note)
sleep {seconds}
code=3; if [ {failures} -ge 0 ] && [ $runs -gt {failures} ]; then code=0; fi
echo ended "$HOSTNAME" $code >> $note; echo exiting with $code; exit $code
"""
    container = {"name": "spark-kubernetes-driver", "command": ["sh", "-c", script]}
    return {
        "metadata": {"labels": {"soak": key}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
    }


def pod_arguments(**arguments: Any) -> dict[str, Any]:
    """Return the arguments of an operator whose job is such a pod."""
    conf = {name: value for name, value in KUBERNETES_CONF.items() if "container.image" in name}
    return {
        "application": "local:///nothing.py",
        "conn_id": "kubernetes",
        "conf": conf,
        "poll_interval": 2,
        **COMMON,
        **arguments,
    }


def dag(name: str) -> DAG:
    """Return an empty Dag of one task."""
    params = {"seconds": Param("1", type="string"), "failures": Param(0, type="integer")}
    return DAG(name, schedule=None, params=params)
