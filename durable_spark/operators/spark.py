"""
Spark jobs without a JVM: the operator's arguments become a description, the connection's hook submits it.

The argument names are those of the Spark provider's ``SparkSubmitOperator`` wherever the meaning is the
same. Which of them a cluster honours is its hook's business; what it cannot do is an error before
anything is submitted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.configuration import conf as airflow_conf

from durable_spark.jobs import BadArguments, SparkJob
from durable_spark.operators._lineage import with_lineage
from durable_spark.operators.job import DurableJobOperator

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk import Context

__all__ = ["SparkJobOperator"]


class SparkJobOperator(DurableJobOperator):
    """
    Submits a Spark application once, and follows it from the triggerer.

    Needs neither Java nor Spark on the worker: the application and everything it names must be
    reachable from the cluster. The connection's master URL says which kind of cluster it is.

    :param application: the application, a jar or a ``.py`` file, as the cluster reaches it. (templated)
    :param conf: Spark configuration properties, strings by name. (templated)
    :param conn_id: the Airflow connection of the cluster. (templated)
    :param files: comma-separated files for the working directory of each executor. (templated)
    :param py_files: comma-separated ``.zip``, ``.egg`` or ``.py`` files for the Python path. (templated)
    :param archives: comma-separated archives to unpack in the working directory of each executor. (templated)
    :param jars: comma-separated jars for the class paths of driver and executors. (templated)
    :param driver_class_path: class path entries of the driver alone. (templated)
    :param java_class: the main class of a jar. (templated)
    :param packages: comma-separated Maven coordinates of jars. (templated)
    :param exclude_packages: comma-separated coordinates to leave out of ``packages``. (templated)
    :param repositories: comma-separated additional repositories for ``packages``. (templated)
    :param total_executor_cores: cores of all executors together. (templated)
    :param executor_cores: cores of each executor. (templated)
    :param executor_memory: memory of each executor (``512m``, ``2g``). (templated)
    :param driver_memory: memory of the driver (``512m``, ``2g``). (templated)
    :param driver_cores: cores of the driver. (templated)
    :param num_executors: number of executors. (templated)
    :param keytab: path of a Kerberos keytab. (templated)
    :param principal: Kerberos principal. (templated)
    :param proxy_user: user to impersonate. (templated)
    :param name: name of the application. (templated)
    :param application_args: arguments of the application. (templated)
    :param env_vars: environment variables of the driver; for executors ``conf`` has ``spark.executorEnv.*``.
        (templated)
    :param properties_file: properties file on the worker, read when the job is submitted; ``conf`` wins. (templated)
    :param supervise: let the cluster itself start the driver again when it fails.
    :param pod: Kubernetes: a pod, as a dict or a ``V1Pod``, whose fields are merged over the driver's. (templated)
    :param hold_pod: Kubernetes: put a finalizer on the driver pod, so that its end cannot be lost to a deletion; it is
        taken off when the end is recorded, or when nobody waits for it any more.
    :param pod_at_end: Kubernetes: ``"keep"`` the driver pod when it has ended (the default, as Spark does), or
        ``"delete"`` it once its end is recorded.
    :param status_poll_interval: seconds between two looks at the cluster; the same as ``poll_interval``.
    :param openlineage_inject_parent_job_info: let the job report this task as its parent to OpenLineage.
    :param openlineage_inject_transport_info: let the job use Airflow's OpenLineage transport.

    All other arguments are those of :class:`~durable_spark.operators.job.DurableJobOperator`.
    """

    template_fields: Sequence[str] = (
        "application",
        "conf",
        "conn_id",
        "files",
        "py_files",
        "archives",
        "jars",
        "driver_class_path",
        "java_class",
        "packages",
        "exclude_packages",
        "repositories",
        "total_executor_cores",
        "executor_cores",
        "executor_memory",
        "driver_memory",
        "driver_cores",
        "num_executors",
        "keytab",
        "principal",
        "proxy_user",
        "name",
        "application_args",
        "env_vars",
        "properties_file",
        "pod",
    )
    template_fields_renderers = {"conf": "json", "env_vars": "json", "application_args": "json", "pod": "json"}
    ui_color = "#ffe0b2"
    external_id_key = "spark_job_id"  # upstream's: a task in flight can change between the operators

    def __init__(
        self,
        *,
        application: str = "",
        conf: Mapping[str, str] | None = None,
        conn_id: str = "spark_default",
        files: str | None = None,
        py_files: str | None = None,
        archives: str | None = None,
        jars: str | None = None,
        driver_class_path: str | None = None,
        java_class: str | None = None,
        packages: str | None = None,
        exclude_packages: str | None = None,
        repositories: str | None = None,
        total_executor_cores: int | str | None = None,
        executor_cores: int | str | None = None,
        executor_memory: str | None = None,
        driver_memory: str | None = None,
        driver_cores: int | str | None = None,
        num_executors: int | str | None = None,
        keytab: str | None = None,
        principal: str | None = None,
        proxy_user: str | None = None,
        name: str = "airflow-spark",
        application_args: Sequence[Any] | None = None,
        env_vars: Mapping[str, Any] | None = None,
        properties_file: str | None = None,
        supervise: bool | None = None,
        pod: Any = None,
        hold_pod: bool = False,
        pod_at_end: str = "keep",
        status_poll_interval: float | None = None,
        openlineage_inject_parent_job_info: bool = airflow_conf.getboolean(
            "openlineage", "spark_inject_parent_job_info", fallback=False
        ),
        openlineage_inject_transport_info: bool = airflow_conf.getboolean(
            "openlineage", "spark_inject_transport_info", fallback=False
        ),
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("hook", "durable_spark.hooks.spark.SparkHook")
        if status_poll_interval is not None:
            kwargs.setdefault("poll_interval", status_poll_interval)
        super().__init__(conn_id=conn_id, **kwargs)
        self.application = application
        self.conf = conf
        self.files = files
        self.py_files = py_files
        self.archives = archives
        self.jars = jars
        self.driver_class_path = driver_class_path
        self.java_class = java_class
        self.packages = packages
        self.exclude_packages = exclude_packages
        self.repositories = repositories
        self.total_executor_cores = total_executor_cores
        self.executor_cores = executor_cores
        self.executor_memory = executor_memory
        self.driver_memory = driver_memory
        self.driver_cores = driver_cores
        self.num_executors = num_executors
        self.keytab = keytab
        self.principal = principal
        self.proxy_user = proxy_user
        self.name = name
        self.application_args = application_args
        self.env_vars = env_vars
        self.properties_file = properties_file
        self.supervise = supervise
        self.pod = pod
        self.hold_pod = hold_pod
        self.pod_at_end = pod_at_end
        self.openlineage_inject_parent_job_info = openlineage_inject_parent_job_info
        self.openlineage_inject_transport_info = openlineage_inject_transport_info

    def render_template(
        self,
        content: Any,
        context: Context,
        jinja_env: jinja2.Environment | None = None,
        seen_oids: set[int] | None = None,
    ) -> Any:
        """Render templates, also those in a client library's objects (a ``V1Pod``), of which a copy is returned."""
        names = getattr(content, "openapi_types", None)
        if not isinstance(names, Mapping) or (seen_oids is not None and id(content) in seen_oids):
            return super().render_template(content, context, jinja_env, seen_oids)
        rendered = copy.copy(content)
        for name in names:
            setattr(rendered, name, self.render_template(getattr(content, name), context, jinja_env, seen_oids))
        return rendered

    def build_job(self, context: Context) -> SparkJob:
        """
        Return the description of the job, with OpenLineage's properties if so asked.

        :raises BadArguments: when an argument is of the wrong kind.
        """
        job = self.describe_job()
        conf = with_lineage(
            job.conf,
            context,
            parent=self.openlineage_inject_parent_job_info,
            transport=self.openlineage_inject_transport_info,
        )
        return dataclasses.replace(job, conf=conf)

    def describe_job(self) -> SparkJob:
        """
        Return the description of the job.

        :raises BadArguments: when an argument is of the wrong kind.
        """
        if not self.application:
            raise BadArguments("application: name the jar or the .py file to run")
        return SparkJob(
            application=self.application,
            java_class=self.java_class,
            application_args=[str(argument) for argument in _sequence("application_args", self.application_args)],
            conf=dict(_mapping("conf", self.conf)),
            name=self.name,
            files=self.files,
            py_files=self.py_files,
            archives=self.archives,
            jars=self.jars,
            driver_class_path=self.driver_class_path,
            packages=self.packages,
            exclude_packages=self.exclude_packages,
            repositories=self.repositories,
            driver_memory=self.driver_memory,
            driver_cores=self.driver_cores,
            executor_memory=self.executor_memory,
            executor_cores=self.executor_cores,
            total_executor_cores=self.total_executor_cores,
            num_executors=self.num_executors,
            env_vars={str(key): str(value) for key, value in _mapping("env_vars", self.env_vars).items()},
            properties_file=self.properties_file,
            keytab=self.keytab,
            principal=self.principal,
            proxy_user=self.proxy_user,
            supervise=self.supervise,
            options=self._options(),
        )

    def _options(self) -> dict[str, Any]:
        """Return what was asked for beyond Spark's own arguments; a cluster that has no such thing refuses it."""
        at_end = None if self.pod_at_end == "keep" else self.pod_at_end
        given = {"pod": self.pod or None, "hold_pod": self.hold_pod or None, "pod_at_end": at_end}
        return {name: value for name, value in given.items() if value is not None}


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadArguments(f"{name}: a mapping of names to strings, not {type(value).__name__}")
    return value


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise BadArguments(f"{name}: a list of arguments, not {type(value).__name__}")
    return value
