"""
What a :class:`~durable_spark.jobs.SparkJob` comes to on Kubernetes: the application, its settings, and names.

Defaults, conf and arguments together, checked. What takes the machine that submits (uploads, files read there, Java
classes of spark-submit) is an error here, never silently dropped. Pure: no I/O.

The trap: much of ``spark.kubernetes.*`` is for the driver, which reads it when it asks for executors. So properties
are passed on as they are, understood here or not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from durable_spark.hooks._kubernetes_conf import (
    app_name_label,
    check_executor_volumes,
    overhead_factor,
    port,
    prefixed,
)
from durable_spark.hooks._kubernetes_status import APP_ID, APP_NAME, DEPLOYMENT, OWNER, TASK, TOKEN
from durable_spark.hooks._spark_arguments import (
    check_main_class,
    check_memory,
    given,
    merge_properties,
    string,
    string_map,
    strings,
    trimmed,
)
from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob, Submission

__all__ = [
    "ARGUMENT_LIMIT",
    "SPARK_LABELS",
    "TASK",
    "Application",
    "Plan",
    "deployment_label",
    "is_label_value",
    "is_namespace",
    "is_pod_name",
    "namespace_of",
    "our_labels",
    "pod_name",
    "refuse_our_names",
    "template_path",
]

_ONLY_ELSEWHERE = {
    "total_executor_cores": "Spark ignores it there: set num_executors and executor_cores",
    "supervise": "Spark ignores it there, and a driver pod is never started again: let Airflow retry the task",
}

_PROPERTY_OF = {
    "num_executors": "spark.executor.instances",
    "keytab": "spark.kerberos.keytab",
    "principal": "spark.kerberos.principal",
    "files": "spark.files",
    "archives": "spark.archives",
    "jars": "spark.jars",
    "py_files": "spark.submit.pyFiles",
}
_EXECUTOR_TEMPLATE = "spark.kubernetes.executor.podTemplateFile"
_FILES = ("spark.files", "spark.archives", "spark.jars", "spark.submit.pyFiles")

_RUNNERS: Mapping[str | None, tuple[str, str]] = {
    "Python": ("python", "org.apache.spark.deploy.PythonRunner"),
    "R": ("r", "org.apache.spark.deploy.RRunner"),
}

_OF_THE_CONNECTION = "which cluster it is, and as whom, says the connection"
_OF_THE_SUBMITTER = (
    "spark-submit reads it on its own machine; mount a Secret and name its files with "
    "spark.kubernetes.authenticate.driver.mounted.*, or use a service account"
)
_NO_SERVICE = "the driver has no Service here: executors reach it at its pod's address"
_REFUSED = {
    "spark.driver.bindAddress": "it is the pod's address",
    "spark.driver.host": "it is the pod's address",
    "spark.kubernetes.driver.pod.name": "the pod's name holds the submission's token",
    "spark.kubernetes.driver.pod.featureSteps": "Java classes that only spark-submit can run; use a pod template",
    "spark.kubernetes.kerberos.krb5.path": "a file of the machine that submits; use .krb5.configMapName",
    "spark.kubernetes.authenticate.driver.caCertFile": _OF_THE_SUBMITTER,
    "spark.kubernetes.authenticate.driver.clientCertFile": _OF_THE_SUBMITTER,
    "spark.kubernetes.authenticate.driver.clientKeyFile": _OF_THE_SUBMITTER,
    "spark.kubernetes.authenticate.driver.oauthToken": _OF_THE_SUBMITTER,
    "spark.kubernetes.context": _OF_THE_CONNECTION,
}
_EXCLUDED_STEPS = "spark.kubernetes.driver.pod.excludedFeatureSteps"
_STEPS_NOT_TAKEN = tuple(
    f"org.apache.spark.deploy.k8s.features.{step}" for step in ("DriverServiceFeatureStep", "NetworkPolicyFeatureStep")
)
_REFUSED_PREFIXES = {
    "spark.kubernetes.authenticate.submission.": _OF_THE_CONNECTION,
    "spark.kubernetes.driver.service.annotation.": _NO_SERVICE,
    "spark.kubernetes.driver.service.label.": _NO_SERVICE,
}

SPARK_LABELS = (APP_NAME, APP_ID, "spark-role", "spark-version")
"""Labels that Spark gives its driver pods."""

ARGUMENT_LIMIT = 128 << 10
"""Bytes of one argument or variable, with the NUL at its end (Linux: ``MAX_ARG_STRLEN``)."""
_HEAP = re.compile(r"[0-9]+[kmgtKMGT]\Z")
"""Sizes that a JVM understands (``-Xmx``), as which Spark's launcher hands it the driver's memory."""
_NAME_LIMIT = 63
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")


def template_path(job: SparkJob, defaults: Mapping[str, str]) -> str | None:
    """
    Return the path of the pod template that the job's conf or its properties file asks for, on the Airflow worker.

    :raises BadArguments: when it is not a file of the worker.
    """
    text = {**defaults, **string_map("conf", job.conf)}.get("spark.kubernetes.driver.podTemplateFile", "")
    scheme, path = _split("spark.kubernetes.driver.podTemplateFile", text)
    if scheme not in ("", "file", "local"):
        raise BadArguments(
            f"spark.kubernetes.driver.podTemplateFile is {text[:200]!r}: it is read from the Airflow worker's disk, "
            "give a path"
        )
    return path if scheme else text or None


def namespace_of(job: SparkJob, defaults: Mapping[str, str], otherwise: str) -> str:
    """
    Return the namespace that the job's conf or its properties file asks for.

    :param otherwise: the connection's, when it asks for none.
    :raises BadArguments: when it is no name of a namespace.
    """
    return _namespace({**defaults, **string_map("conf", job.conf)}, otherwise)


def pod_name(submission: Submission) -> str:
    """Return the name of a submission's pod: Dag and task, as far as there is room, and the token."""
    dag, _, task = (re.sub(r"[^a-z0-9]+", "-", part).strip("-") for part in submission.name.lower().partition("."))
    room = _NAME_LIMIT - len(f"--{submission.token}")
    dag = dag[: max(room // 2, room - len(task))]
    words = (dag.rstrip("-"), task[: room - len(dag)].rstrip("-"))
    return "-".join([*filter(None, words), submission.token])


def is_pod_name(text: str) -> bool:
    """Return whether a text may be the name of a pod: a subdomain (RFC 1123), whose parts Kubernetes does not limit."""
    return _SUBDOMAIN.match(text) is not None


def is_namespace(text: str) -> bool:
    """Return whether a text may be the name of a namespace (RFC 1123)."""
    return _LABEL.match(text) is not None


def is_label_value(text: str) -> bool:
    """Return whether a text may be the value of a label, and is not empty."""
    return _LABEL_VALUE.match(text) is not None


def deployment_label(deployment: str) -> str:
    """Return a deployment's name as a label's value: the name itself, or a hash of one that is no such value."""
    if is_label_value(deployment):
        return deployment
    return hashlib.sha256(deployment.encode()).hexdigest()[:32]


def our_labels(submission: Submission) -> dict[str, str]:
    """Return the labels by which a submission's pod is found again."""
    deployment = deployment_label(submission.deployment) if submission.deployment else ""
    labels = {TOKEN: submission.token, OWNER: submission.owner, DEPLOYMENT: deployment}
    return {key: value for key, value in labels.items() if value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Application:
    """What runs: a script or a jar."""

    uri: str
    arguments: list[str]
    type: str
    main_class: str

    @classmethod
    def of(cls, job: SparkJob) -> Application:
        """SparkSubmit, in the pod, tells scripts by how the URI ends, and so do we."""
        uri = _uri("application", job.application)
        language = "Python" if uri.endswith(".py") else "R" if uri.endswith((".R", ".r")) else None
        check_main_class(job, language=language)
        arguments = strings("application_args", job.application_args)
        for index, argument in enumerate(arguments):
            if "\r" in argument:
                raise BadArguments(f"application_args[{index}] has a carriage return, which Spark's scripts take out")
            if len(argument.encode()) >= ARGUMENT_LIMIT:
                raise BadArguments(f"application_args[{index}] is longer than Linux allows: put it into a file")
        kind, main_class = _RUNNERS.get(language, ("java", job.java_class or ""))
        return cls(uri=uri, arguments=arguments, type=kind, main_class=main_class)

    @property
    def jvm(self) -> bool:
        """Whether all of it runs in the JVM."""
        return self.type == "java"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A job as its arguments, its conf and its properties file have it together."""

    job: SparkJob
    submission: Submission
    application: Application
    namespace: str
    conf: dict[str, str]
    """The user's properties, checked."""
    own: dict[str, str]
    """What we set ourselves. None of it is secret, and the driver's address is not literal: the kubelet fills it in."""

    @classmethod
    def of(
        cls, job: SparkJob, submission: Submission, *, master: str, namespace: str, defaults: Mapping[str, str]
    ) -> Plan:
        for name, why in _ONLY_ELSEWHERE.items():
            if given(job, name) is not None:
                raise BadArguments(f"{name} cannot be used with Kubernetes: {why}")
        application = Application.of(job)
        conf = _conf(job, application, defaults)
        namespace = _namespace(conf, namespace)
        own = {
            "spark.app.id": f"spark-{submission.token}",
            "spark.app.name": conf["spark.app.name"],
            "spark.driver.blockManager.port": str(port(conf, "spark.driver.blockManager.port", default=7079)),
            "spark.driver.host": _address(conf),
            "spark.driver.port": str(port(conf, "spark.driver.port", default=7078)),
            "spark.kubernetes.driver.pod.name": pod_name(submission),
            "spark.kubernetes.memoryOverheadFactor": str(overhead_factor(conf, jvm=application.jvm)),
            "spark.kubernetes.namespace": namespace,
            "spark.kubernetes.resource.type": application.type,
            "spark.kubernetes.submitInDriver": "true",
            "spark.master": "k8s://" + master.removeprefix("k8s://"),
            "spark.submit.deployMode": "cluster",
        }
        if "spark.kubernetes.hadoop.configMapName" in conf:
            own["spark.kubernetes.executor.hadoopConfigMapName"] = conf["spark.kubernetes.hadoop.configMapName"]
        return cls(job=job, submission=submission, application=application, namespace=namespace, conf=conf, own=own)

    @property
    def name(self) -> str:
        """The pod's name."""
        return self.own["spark.kubernetes.driver.pod.name"]

    @property
    def app_id(self) -> str:
        """Spark's own form of an application ID."""
        return self.own["spark.app.id"]

    def labels(self) -> dict[str, str]:
        """Return the user's labels, and those by which Spark and we find the pod again."""
        prefix = "spark.kubernetes.driver.label."
        labels = self._substituted(prefix)
        refuse_our_names(f"{prefix}*", labels)
        for key in SPARK_LABELS:
            if key in labels:
                raise BadArguments(f"{prefix}{key} cannot be used: the label is Spark's own")
        sparks = {
            APP_ID: self.app_id,
            APP_NAME: app_name_label(self.conf["spark.app.name"]),
            "spark-role": "driver",
        }
        return labels | sparks | our_labels(self.submission)

    def annotations(self) -> dict[str, str]:
        """Return the user's annotations, and one for people."""
        prefix = "spark.kubernetes.driver.annotation."
        annotations = self._substituted(prefix)
        refuse_our_names(f"{prefix}*", annotations)
        return annotations | {TASK: self.submission.name}

    def _substituted(self, prefix: str) -> dict[str, str]:
        """Return prefixed properties with Spark's placeholders filled (``Utils.substituteAppNExecIds``)."""
        return {
            key: value.replace("{{APP_ID}}", self.app_id).replace("{{EXECUTOR_ID}}", "")
            for key, value in prefixed(self.conf, prefix).items()
        }


def refuse_our_names(what: str, names: Mapping[str, Any]) -> None:
    """
    Check that labels or annotations of the user's are none of ours.

    :param what: how an error calls their place.
    """
    for key in names:
        if key.startswith("durable-spark/"):
            raise BadArguments(f"{what} must not set {key}: it is how this package finds its jobs again")


def _conf(job: SparkJob, application: Application, defaults: Mapping[str, str]) -> dict[str, str]:
    conf = {key: trimmed(value) for key, value in merge_properties(job, defaults, _PROPERTY_OF).items()}
    for key in conf:
        why = _REFUSED.get(key) or next(
            (why for prefix, why in _REFUSED_PREFIXES.items() if key.startswith(prefix)), ""
        )
        if why:
            raise BadArguments(f"{key} cannot be used here: {why}")
    excluded = {step.strip() for step in conf.get(_EXCLUDED_STEPS, "").split(",")}
    if excluded - {"", *_STEPS_NOT_TAKEN}:
        raise BadArguments(f"{_EXCLUDED_STEPS} cannot be used here but for {', '.join(_STEPS_NOT_TAKEN)}")
    for name, key in _PROPERTY_OF.items():
        if key in _FILES and key in conf:
            conf[key] = _uris(name if given(job, name) is not None else key, conf[key])
    if application.jvm:
        conf["spark.jars"] = ",".join(filter(None, [conf.get("spark.jars"), application.uri]))
    check_executor_volumes(conf)
    if template := conf.get(_EXECUTOR_TEMPLATE):
        _uri(_EXECUTOR_TEMPLATE, template)  # the driver reads it when it makes executors (KubernetesExecutorBuilder)
    if (heap := conf.get("spark.driver.memory")) and not _HEAP.match(heap):
        conf["spark.driver.memory"] = f"{check_memory('spark.driver.memory', heap)}m"
    _check_kerberos(job, conf)
    return {key: value for key, value in conf.items() if value or key not in _FILES}


def _check_kerberos(job: SparkJob, conf: Mapping[str, str]) -> None:
    keytab, principal = conf.get("spark.kerberos.keytab"), conf.get("spark.kerberos.principal")
    if (keytab is None) != (principal is None):
        raise BadArguments("keytab and principal go together: give both or neither")
    if keytab is None:
        return
    if _split("keytab", keytab)[0] != "local":
        raise BadArguments(
            f"keytab is {keytab[:200]!r}, a file of the Airflow worker, which is not sent to a cluster: mount a Secret "
            "that holds it (spark.kubernetes.driver.secrets.*), and give its path in the pod with local://"
        )
    if given(job, "proxy_user") is not None:
        raise BadArguments("proxy_user and principal exclude each other: Spark takes one of them")


def _uris(name: str, value: object) -> str:
    return ",".join(_uri(name, part) for part in str(value).split(",") if part.strip())


def _uri(name: str, value: object) -> str:
    """Return a URI that the driver's pod can resolve."""
    text = string(name, value).strip()
    scheme, path = _split(name, text)
    if scheme in ("", "file"):
        raise BadArguments(
            f"{name} is {text[:200]!r}, a file of the Airflow worker, which the driver's pod cannot read: use local:// "
            "for a file in the image, or a URL that the pod can reach"
        )
    if not path.strip("/"):
        raise BadArguments(f"{name} is {text[:200]!r}, which names no file")
    if scheme == "local" and urlsplit(text).netloc:
        raise BadArguments(f"{name} is {text[:200]!r}: a path begins with a slash, so local:// has three")
    return text


def _split(name: str, text: str) -> tuple[str, str]:
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise BadArguments(f"{name} is {text[:200]!r}, which is no URL: {error}") from error
    return parts.scheme, parts.path


def _namespace(conf: Mapping[str, str], otherwise: str) -> str:
    name = conf.get("spark.kubernetes.namespace", otherwise)
    if not is_namespace(name):
        raise BadArguments(f"spark.kubernetes.namespace is {name[:100]!r}, which is no name of a namespace")
    return name


def _address(conf: Mapping[str, str]) -> str:
    """The pod's own address, which the kubelet fills in; Spark wants IPv6 ones in brackets (``Utils.checkHost``)."""
    address = "$(SPARK_DRIVER_BIND_ADDRESS)"
    return f"[{address}]" if conf.get("spark.kubernetes.driver.service.ipFamilies", "").startswith("IPv6") else address
