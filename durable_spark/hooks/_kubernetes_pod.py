"""
From a :class:`~durable_spark.jobs.SparkJob` to the driver pod that runs it.

Pure: no I/O, so that every argument can be checked before anything is sent. The pod is the one that spark-submit would
make, step by step (Spark's feature steps, of which each function here names its own), except that it needs nothing
beside it: the settings are its arguments, its address is its own, and so one ``POST`` is a whole submission.

The trap: whoever may see a pod sees its arguments, and the entrypoint of Spark's images prints them to the driver's
log. Settings and environment variables that Spark would not show go into a Secret instead, which is then the one
thing beside the pod.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from durable_spark.hooks._kubernetes_conf import (
    driver_memory,
    flag,
    port,
    prefixed,
    quantity,
    resources,
    secrecy,
    volumes,
)
from durable_spark.hooks._kubernetes_overlay import AT_END, Options, lay_over, pod_as_dict
from durable_spark.hooks._kubernetes_plan import (
    ARGUMENT_LIMIT,
    Plan,
    deployment_label,
    is_label_value,
    is_namespace,
    is_pod_name,
    namespace_of,
    pod_name,
    refuse_our_names,
    template_path,
)
from durable_spark.hooks._kubernetes_status import APP_ID, DEPLOYMENT, FINALIZER, OWNER, TASK, TOKEN
from durable_spark.hooks._spark_arguments import given, string, string_map, write_properties
from durable_spark.jobs import BadArguments

if TYPE_CHECKING:
    from durable_spark.jobs import SparkJob, Submission

__all__ = [
    "AT_END",
    "DEPLOYMENT",
    "FINALIZER",
    "OWNER",
    "TASK",
    "TOKEN",
    "Driver",
    "build_driver",
    "deployment_label",
    "is_label_value",
    "is_namespace",
    "is_pod_name",
    "namespace_of",
    "owner_reference",
    "pod_as_dict",
    "pod_name",
    "template_path",
]

_CONF_DIR = "/opt/spark/conf"
_CONF_FILE = "spark.properties"
_CONF_VOLUME = "spark-conf-volume-driver"
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*\Z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Driver:
    """
    What is sent for one submission.

    :param pod: the driver pod.
    :param secret: what must not be seen in it; ``None`` when there is nothing of the kind.
    """

    pod: dict[str, Any]
    secret: dict[str, Any] | None


def build_driver(
    job: SparkJob,
    submission: Submission,
    *,
    master: str,
    namespace: str,
    defaults: Mapping[str, str],
    template: Mapping[str, Any] | None,
    user: str,
) -> Driver:
    """
    Return the driver pod of a job, and its Secret if it needs one.

    :param master: the API server's address, as a master URL or without ``k8s://``.
    :param namespace: the connection's; ``spark.kubernetes.namespace`` overrides it.
    :param defaults: properties that the job's own override, from its properties file.
    :param template: what :func:`template_path` named, parsed.
    :param user: whom Spark takes for the submitter (``SPARK_USER``).
    :raises BadArguments: naming the argument, what is wrong with it, and the fix.
    """
    options = Options.of(job)
    plan = Plan.of(job, submission, master=master, namespace=namespace, defaults=defaults)
    hidden = _Hidden(plan.name, secrecy(plan.conf))
    draft = _Draft.of(template, plan.conf)
    _basic(draft, plan, hidden, user=user)
    _service_account(draft, plan)
    _secrets(draft, plan)
    _volumes(draft, plan)
    _command(draft, plan, hidden)
    _hadoop_conf(draft, plan)
    _kerberos(draft, plan)
    _local_dirs(draft, plan)
    _conf_dir(draft, hidden)
    pod = options.apply(draft.finished(), driver=draft.container["name"])
    return Driver(pod=pod, secret=hidden.secret(pod["metadata"]))


def owner_reference(pod: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes an object belong to a pod, to be deleted with it. The pod is as the API server shows it."""
    metadata = pod["metadata"]
    return {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"], "controller": True}


class _Hidden:
    """
    Gathers what must not be seen in the pod, for a Secret of the pod's own name.

    :param name: of the pod.
    :param secret: tells what must not be seen, by name and value.
    """

    def __init__(self, name: str, secret: Callable[[str, str], bool]) -> None:
        self._name = name
        self._secret = secret
        self._data: dict[str, str] = {}

    @property
    def has_settings(self) -> bool:
        """Whether there is a properties file among it."""
        return _CONF_FILE in self._data

    def variable(self, name: str, value: str) -> dict[str, Any]:
        """Return an environment variable that has this very value."""
        if not _VARIABLE.match(name):
            raise BadArguments(f"{name!r} is not a name for an environment variable in Kubernetes")
        if len(f"{name}={value}".encode()) >= ARGUMENT_LIMIT:
            raise BadArguments(f"the value of the environment variable {name} is longer than Linux allows")
        if not self._secret(name, value):
            return {"name": name, "value": _literal(value)}
        self._data[f"env.{name}"] = value
        return {"name": name, "valueFrom": {"secretKeyRef": {"name": self._name, "key": f"env.{name}"}}}

    def arguments(self, plan: Plan) -> list[str]:
        """
        Return the arguments that hand SparkSubmit the settings.

        Spark's scripts take carriage returns out of arguments, and Linux limits their length: such settings go the
        way of the secret ones.
        """
        shown, hidden = [], {}
        for key, value in sorted((plan.conf | plan.own).items()):
            setting = f"{key}={value if key == 'spark.driver.host' else _literal(value)}"
            if key in plan.own:
                shown += ["--conf", setting]
            elif self._secret(key, value) or "\r" in value or len(setting.encode()) >= ARGUMENT_LIMIT:
                hidden[key] = value
            else:
                shown += ["--conf", setting]
        if not hidden:
            return shown
        self._data[_CONF_FILE] = write_properties(hidden)
        return ["--properties-file", f"{_CONF_DIR}/{_CONF_FILE}", *shown]

    def secret(self, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
        """
        Return the Secret, if there is anything to hide.

        :param metadata: the pod's.
        """
        if not self._data:
            return None
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {key: metadata[key] for key in ("name", "namespace", "labels")},
            "type": "Opaque",
            "stringData": self._data,
        }


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A pod in the making, its driver container apart, as in Spark's ``SparkPod``."""

    metadata: dict[str, Any]
    spec: dict[str, Any]
    container: dict[str, Any]

    @classmethod
    def of(cls, template: Mapping[str, Any] | None, conf: Mapping[str, str]) -> _Draft:
        """Begin with a pod template, from which the driver's container is taken (``KubernetesUtils``)."""
        pod = pod_as_dict(template or {}, "the pod template")
        metadata, spec = pod.get("metadata", {}), pod.get("spec", {})
        for kind in ("labels", "annotations"):
            refuse_our_names(f"the pod template's {kind}", metadata.get(kind, {}))
        containers: list[dict[str, Any]] = spec.get("containers", [])
        name = conf.get("spark.kubernetes.driver.podTemplateContainerName")
        candidates = [container for container in containers if name is None or container.get("name") == name]
        if name is not None and not candidates:
            raise BadArguments(
                f"spark.kubernetes.driver.podTemplateContainerName is {name!r}, of which the pod template knows nothing"
            )
        driver = next(iter(candidates), {})
        spec["containers"] = [container for container in containers if container is not driver]
        return cls(metadata, spec, driver)

    def mount(self, volume: dict[str, Any], mount: dict[str, Any]) -> None:
        """Add a volume that the driver's container sees."""
        self.spec.setdefault("volumes", []).append(volume)
        self.container.setdefault("volumeMounts", []).append({"name": volume["name"], **mount})

    def set_variables(self, *variables: dict[str, Any]) -> None:
        """Add environment variables to the driver's container."""
        self.container.setdefault("env", []).extend(variables)

    def finished(self) -> dict[str, Any]:
        """Return the whole pod."""
        spec = {**self.spec, "containers": [*self.spec["containers"], self.container]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": self.metadata, "spec": spec}


def _literal(text: str) -> str:
    """Return a text such that the kubelet makes it the given one again: it expands ``$(NAME)`` and ``$$``."""
    return text.replace("$", "$$") if "$$" in text or "$(" in text else text


def _basic(draft: _Draft, plan: Plan, hidden: _Hidden, *, user: str) -> None:
    """Container, resources, names (``BasicDriverFeatureStep``)."""
    conf, container, metadata, spec = plan.conf, draft.container, draft.metadata, draft.spec
    container["name"] = container.get("name", "spark-kubernetes-driver")
    container["image"] = _image(conf)
    container["imagePullPolicy"] = _pull_policy(conf)
    container.setdefault("ports", []).extend(_ports(conf))
    escalation = "spark.kubernetes.driver.securityContext.allowPrivilegeEscalation"
    if escalation not in conf:
        escalation = "spark.kubernetes.securityContext.allowPrivilegeEscalation"
    container.setdefault("securityContext", {})["allowPrivilegeEscalation"] = flag(conf, escalation)
    container["resources"] = lay_over(container.get("resources", {}), _resources(plan))
    environment = prefixed(conf, "spark.kubernetes.driverEnv.") | string_map("env_vars", plan.job.env_vars)
    # With --proxy-user, SparkSubmit in the driver runs as this one (SparkHadoopUtil.runAsSparkUser).
    user = string("proxy_user", given(plan.job, "proxy_user") or user)
    draft.set_variables(
        {"name": "SPARK_USER", "value": _literal(user)},
        {"name": "SPARK_APPLICATION_ID", "value": plan.app_id},
        *(hidden.variable(name, value) for name, value in environment.items()),
        {"name": "SPARK_DRIVER_BIND_ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    )
    metadata["name"], metadata["namespace"] = plan.name, plan.namespace
    metadata["labels"] = metadata.get("labels", {}) | plan.labels()
    metadata["annotations"] = metadata.get("annotations", {}) | plan.annotations()
    spec["restartPolicy"] = "Never"
    spec["nodeSelector"] = (
        spec.get("nodeSelector", {})
        | prefixed(conf, "spark.kubernetes.node.selector.")
        | prefixed(conf, "spark.kubernetes.driver.node.selector.")
    )
    pull_secrets = [name.strip() for name in conf.get("spark.kubernetes.container.image.pullSecrets", "").split(",")]
    spec.setdefault("imagePullSecrets", []).extend({"name": name} for name in pull_secrets if name)
    for key in ("spark.kubernetes.scheduler.name", "spark.kubernetes.driver.scheduler.name"):
        if key in conf:
            spec["schedulerName"] = conf[key]


def _image(conf: Mapping[str, str]) -> str:
    for key in ("spark.kubernetes.driver.container.image", "spark.kubernetes.container.image"):
        if image := conf.get(key):
            if "{{SPARK_VERSION}}" in image:
                raise BadArguments(f"{key} is {image!r}: write Spark's version out, it is not known to Airflow")
            return image
    raise BadArguments(
        "conf needs spark.kubernetes.container.image: the image that has Spark, such as apache/spark:4.1.0"
    )


def _pull_policy(conf: Mapping[str, str]) -> str:
    policy = conf.get("spark.kubernetes.container.image.pullPolicy", "IfNotPresent")
    if policy not in ("Always", "Never", "IfNotPresent"):
        raise BadArguments(
            f"spark.kubernetes.container.image.pullPolicy is {policy!r}: give Always, Never or IfNotPresent"
        )
    return policy


def _ports(conf: Mapping[str, str]) -> list[dict[str, Any]]:
    ports = {
        "driver-rpc-port": port(conf, "spark.driver.port", default=7078),
        "blockmanager": port(conf, "spark.driver.blockManager.port", "spark.blockManager.port", default=7079),
        "spark-ui": port(conf, "spark.ui.port", default=4040),
        "spark-connect": port(conf, "spark.connect.grpc.binding.port", default=15002),
    }
    return [{"name": name, "containerPort": number, "protocol": "TCP"} for name, number in ports.items()]


def _resources(plan: Plan) -> dict[str, Any]:
    conf, memory = plan.conf, f"{driver_memory(plan.conf, jvm=plan.application.jvm)}Mi"
    request, limit = "spark.kubernetes.driver.request.cores", "spark.kubernetes.driver.limit.cores"
    limits = {"cpu": quantity(limit, conf[limit])} if limit in conf else {}
    return {
        "requests": {
            "cpu": quantity(request, conf.get(request, conf.get("spark.driver.cores", "1"))),
            "memory": memory,
        },
        "limits": {**limits, "memory": memory, **resources(conf)},
    }


def _service_account(draft: _Draft, plan: Plan) -> None:
    """The driver's account (``DriverKubernetesCredentialsFeatureStep``)."""
    if account := plan.conf.get("spark.kubernetes.authenticate.driver.serviceAccountName"):
        draft.spec["serviceAccountName"] = account


def _secrets(draft: _Draft, plan: Plan) -> None:
    """Secrets as files and as variables (``MountSecretsFeatureStep``, ``EnvSecretsFeatureStep``)."""
    for name, path in prefixed(plan.conf, "spark.kubernetes.driver.secrets.").items():
        draft.mount({"name": f"{name}-volume", "secret": {"secretName": name}}, {"mountPath": path})
    prefix = "spark.kubernetes.driver.secretKeyRef."
    for variable, reference in prefixed(plan.conf, prefix).items():
        name, _, key = reference.partition(":")
        if not name or not key or ":" in key:
            raise BadArguments(f"{prefix}{variable} must be name:key of a Secret that there is")
        draft.set_variables({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})


def _volumes(draft: _Draft, plan: Plan) -> None:
    """The user's volumes (``MountVolumesFeatureStep``)."""
    for volume, mount in volumes(plan.conf, claim_labels={APP_ID: plan.app_id}):
        draft.mount(volume, mount)


def _command(draft: _Draft, plan: Plan, hidden: _Hidden) -> None:
    """What the entrypoint of Spark's images hands to spark-submit (``DriverCommandFeatureStep``)."""
    conf, application = plan.conf, plan.application
    proxy_user = given(plan.job, "proxy_user")
    draft.container.setdefault("args", []).extend(
        [
            "driver",
            *(["--proxy-user", _literal(string("proxy_user", proxy_user))] if proxy_user is not None else []),
            *hidden.arguments(plan),
            *("--class", application.main_class),
            _literal(application.uri),
            *map(_literal, application.arguments),
        ]
    )
    if application.type == "python" and (python := conf.get("spark.pyspark.python")):
        draft.set_variables(hidden.variable("PYSPARK_PYTHON", python))
    if application.type == "python" and (python := conf.get("spark.pyspark.driver.python", python)):
        draft.set_variables(hidden.variable("PYSPARK_DRIVER_PYTHON", python))


def _hadoop_conf(draft: _Draft, plan: Plan) -> None:
    """Hadoop's configuration from a config map that there is (``HadoopConfDriverFeatureStep``)."""
    if name := plan.conf.get("spark.kubernetes.hadoop.configMapName"):
        path = "/opt/hadoop/conf"
        draft.mount({"name": "hadoop-properties", "configMap": {"name": name}}, {"mountPath": path})
        draft.set_variables({"name": "HADOOP_CONF_DIR", "value": path})


def _kerberos(draft: _Draft, plan: Plan) -> None:
    """Kerberos from what there is in the cluster and in the image (``KerberosConfDriverFeatureStep``)."""
    conf = plan.conf
    if name := conf.get("spark.kubernetes.kerberos.krb5.configMapName"):
        mount = {"mountPath": "/etc/krb5.conf", "subPath": "krb5.conf"}
        draft.mount({"name": "krb5-file", "configMap": {"name": name}}, mount)
    secret, item = (conf.get(f"spark.kubernetes.kerberos.tokenSecret.{part}") for part in ("name", "itemKey"))
    if (secret is None) != (item is None):
        raise BadArguments("spark.kubernetes.kerberos.tokenSecret.name and .itemKey go together: give both or neither")
    if secret is not None:
        path = "/mnt/secrets/hadoop-credentials"
        draft.mount({"name": "hadoop-secret", "secret": {"secretName": secret}}, {"mountPath": path})
        draft.set_variables({"name": "HADOOP_TOKEN_FILE_LOCATION", "value": f"{path}/{item}"})


def _local_dirs(draft: _Draft, plan: Plan) -> None:
    """Scratch space: the user's volumes of that name, or empty ones (``LocalDirsFeatureStep``)."""
    mounts = draft.container.get("volumeMounts", [])
    paths = [mount["mountPath"] for mount in mounts if mount.get("name", "").startswith("spark-local-dir-")]
    if not paths:
        own = f"/var/data/spark-{uuid.UUID(plan.submission.token)}"
        paths = [path for path in plan.conf.get("spark.local.dir", "").split(",") if path] or [own]
        medium = {"medium": "Memory"} if flag(plan.conf, "spark.kubernetes.local.dirs.tmpfs") else {}
        for number, path in enumerate(paths, 1):
            draft.mount({"name": f"spark-local-dir-{number}", "emptyDir": medium}, {"mountPath": path})
    draft.set_variables({"name": "SPARK_LOCAL_DIRS", "value": _literal(",".join(paths))})


def _conf_dir(draft: _Draft, hidden: _Hidden) -> None:
    """
    The directory of Spark's settings, which hides the image's own as it does with spark-submit (``Client``).

    It holds the secret ones, if there are any.
    """
    volume: dict[str, Any] = {"name": _CONF_VOLUME, "emptyDir": {}}
    if hidden.has_settings:
        items = [{"key": _CONF_FILE, "path": _CONF_FILE, "mode": 0o644}]
        volume = {"name": _CONF_VOLUME, "secret": {"secretName": draft.metadata["name"], "items": items}}
    draft.mount(volume, {"mountPath": _CONF_DIR})
    draft.set_variables({"name": "SPARK_CONF_DIR", "value": _CONF_DIR})
