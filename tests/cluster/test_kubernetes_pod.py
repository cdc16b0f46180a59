"""
The driver pod beside the one that spark-submit makes of the same job: equal, but for what is different on purpose.

Both are read back from an API server. There is no node, so nothing runs; what counts is what would.
"""

from __future__ import annotations

import dataclasses
import functools
import getpass
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dev.kubernetes import KubernetesCluster
from dev.spark import ensure_spark
from durable_spark.hooks._kubernetes_pod import build_driver, template_path
from durable_spark.jobs import SparkJob
from tests.conftest import require
from tests.spark_submit import SparkSubmit
from tests.submitting import new_submission

CONF_VOLUME = "spark-conf-volume-driver"
SCRIPT = "local:///opt/app/job.py"
IMAGE = {"spark.kubernetes.container.image": "registry.example/spark:4"}


def python(conf: Mapping[str, str] | None = None, **arguments: Any) -> SparkJob:
    return SparkJob(application=SCRIPT, conf=IMAGE | dict(conf or {}), **arguments)


def jar(conf: Mapping[str, str] | None = None, **arguments: Any) -> SparkJob:
    return SparkJob(
        application="local:///opt/app/job.jar", java_class="org.Main", conf=IMAGE | dict(conf or {}), **arguments
    )


def under(prefix: str, settings: Mapping[str, str]) -> dict[str, str]:
    return {f"spark.{prefix}.{key}": value for key, value in settings.items()}


TEMPLATE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "labels": {"team": "data", "spark-role": "template", "kept": "yes"},
        "annotations": {"note": "of the template"},
    },
    "spec": {
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 5,
        "nodeSelector": {"disk": "ssd"},
        "schedulerName": "of-the-template",
        "serviceAccountName": "of-the-template",
        "imagePullSecrets": [{"name": "of-the-template"}],
        "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "spark", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
                }
            }
        },
        "securityContext": {"runAsUser": 185, "fsGroup": 185},
        "initContainers": [{"name": "fetch", "image": "busybox", "command": ["true"]}],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "containers": [
            {"name": "sidecar", "image": "busybox", "command": ["sleep", "1"]},
            {
                "name": "main",
                "image": "of-the-template",
                "env": [{"name": "FROM_TEMPLATE", "value": "1"}],
                "ports": [{"name": "metrics", "containerPort": 9090}],
                "resources": {"requests": {"ephemeral-storage": "1Gi"}, "limits": {"cpu": "7", "memory": "1Ti"}},
                "securityContext": {"runAsNonRoot": True},
                "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                "args": ["first"],
            },
        ],
    },
}

TEMPLATES = {
    "template": TEMPLATE,
    "template, first container": TEMPLATE,
    "template without containers": {"spec": {"enableServiceLinks": False, "volumes": [{"name": "x", "emptyDir": {}}]}},
}
"""By the name of the job that has it."""

JOBS = {
    "minimal": python(),
    "jar": jar(
        {
            "spark.driver.memoryOverhead": "700m",
            "spark.kubernetes.driver.limit.cores": "3",
            "spark.executor.pyspark.memory": "1g",
        },
        driver_memory="3g",
        driver_cores=2,
        executor_cores=4,
        executor_memory="5g",
        num_executors=3,
        driver_class_path="/opt/lib/*",
        jars="local:///opt/a.jar,https://host.example/b.jar",
        application_args=["x"],
    ),
    "R": SparkJob(
        application="local:///opt/app/job.R",
        conf=IMAGE | {"spark.kubernetes.memoryOverheadFactor": "0.25"},
        driver_memory="3001m",
    ),
    "own overhead of the driver": python(
        {"spark.driver.memoryOverheadFactor": "0.3", "spark.kubernetes.driver.request.cores": "250m"},
        driver_memory="4g",
    ),
    "least overhead": jar({"spark.driver.minMemoryOverhead": "1g", "spark.driver.memory": " 2048M "}),
    "names and places": python(
        {
            "spark.kubernetes.driver.container.image": "registry.example/driver:1",
            "spark.kubernetes.container.image.pullPolicy": "Always",
            "spark.kubernetes.container.image.pullSecrets": "one, two",
            "spark.kubernetes.authenticate.driver.serviceAccountName": "spark",
            "spark.kubernetes.authenticate.serviceAccountName": "of-client-mode",
            "spark.kubernetes.scheduler.name": "all",
            "spark.kubernetes.driver.scheduler.name": "driver",
            **under("kubernetes.driver.label", {"team": "data", "example.com/app": "{{APP_ID}}"}),
            **under("kubernetes.driver.annotation", {"example.com/note": "ü of {{APP_ID}}-{{EXECUTOR_ID}}", "x": "y"}),
            **under("kubernetes.node.selector", {"disk": "ssd", "zone": "a"}),
            **under("kubernetes.driver.node.selector", {"zone": "b"}),
            **under("driver.resource.gpu", {"amount": "2", "vendor": "nvidia.com", "discoveryScript": "/gpu.sh"}),
        },
        name=" Ünusual -- Application.name_1 " + "x" * 70,
    ),
    "environment and secrets": python(
        {
            **under("kubernetes.driverEnv", {"PLAIN": "a $HOME b", "DB_PASSWORD": "hush", "URL": "x?token=hush"}),
            **under("kubernetes.driver.secrets", {"keys": "/mnt/keys", "more": "/mnt/more"}),
            **under("kubernetes.driver.secretKeyRef", {"USER_NAME": "login:user"}),
            "spark.redaction.regex": "(?i)hidden|token",
            "spark.my.password": "hush äß=:#! \\ \t end",
            "spark.my.hidden": "hush",
            "spark.my.url": "https://x?token=hush",
            "spark.pyspark.python": "/opt/python",
            "spark.kubernetes.driver.securityContext.allowPrivilegeEscalation": "true",
        },
        env_vars={"MORE": 'it\'s "quoted"'},
    ),
    "volumes": python(
        {
            **under("kubernetes.driver.volumes.hostPath.host", {"mount.path": "/host", "options.path": "/data"}),
            **under("kubernetes.driver.volumes.hostPath.typed", {"mount.path": "/typed", "options.path": "/typed"}),
            **under(
                "kubernetes.driver.volumes.hostPath.typed", {"options.type": "Directory", "mount.readOnly": "true"}
            ),
            **under("kubernetes.driver.volumes.emptyDir.empty", {"mount.path": "/empty"}),
            **under("kubernetes.driver.volumes.emptyDir.ram", {"mount.path": "/ram", "options.medium": "Memory"}),
            **under("kubernetes.driver.volumes.emptyDir.ram", {"options.sizeLimit": "1Gi", "mount.subPath": "sub"}),
            **under("kubernetes.driver.volumes.nfs.share", {"mount.path": "/share", "mount.readOnly": "true"}),
            **under("kubernetes.driver.volumes.nfs.share", {"options.server": "nfs.example", "options.path": "/a"}),
            **under("kubernetes.driver.volumes.nfs.share", {"mount.subPathExpr": "$(SPARK_APPLICATION_ID)"}),
            **under("kubernetes.driver.volumes.persistentVolumeClaim.claim", {"options.claimName": "data"}),
            **under(
                "kubernetes.driver.volumes.persistentVolumeClaim.claim",
                {"mount.path": "/claim", "mount.readOnly": "true"},
            ),
            **under("kubernetes.executor.volumes.emptyDir.x", {"mount.path": "/x"}),
        }
    ),
    "claim on demand": python(
        under(
            "kubernetes.driver.volumes.persistentVolumeClaim.spark-local-dir-1",
            {
                "mount.path": "/scratch",
                "options.claimName": "OnDemand",
                "options.storageClass": "fast",
                "options.sizeLimit": "10Gi",
                "label.team": "data",
                "annotation.note": "x",
            },
        )
    ),
    "template": python(
        {
            "spark.kubernetes.driver.podTemplateContainerName": "main",
            "spark.kubernetes.driver.label.team": "of-the-conf",
            "spark.kubernetes.node.selector.zone": "a",
            "spark.kubernetes.container.image.pullSecrets": "one",
            "spark.kubernetes.driver.request.cores": "1500m",
        }
    ),
    "template, first container": jar(),
    "template without containers": python(),
    "ports and directories": python(
        {
            "spark.driver.port": "17078",
            "spark.blockManager.port": "17079",
            "spark.ui.port": "14040",
            "spark.connect.grpc.binding.port": "15003",
            "spark.local.dir": "/fast,",  # of several, Spark changes the order at random
            "spark.kubernetes.local.dirs.tmpfs": "true",
        }
    ),
    "hadoop and kerberos": jar(
        {
            "spark.kubernetes.hadoop.configMapName": "hadoop",
            "spark.kubernetes.kerberos.krb5.configMapName": "krb5",
            "spark.kubernetes.kerberos.tokenSecret.name": "tokens",
            "spark.kubernetes.kerberos.tokenSecret.itemKey": "token",
        }
    ),
    "another user": jar(proxy_user="somebody"),
    "files": python(
        files="local:///opt/data.txt,https://host.example/conf.json",
        archives="https://host.example/env.tar.gz#env",
        jars="local:///opt/x.jar",
        py_files="local:///opt/a.py,https://host.example/b.zip",
        keytab="local:///mnt/keys/me.keytab",
        principal="me@EXAMPLE.COM",
    ),
    "difficult arguments": python(
        {
            "spark.my.text": "a \"b\" 'c' $HOME $(SPARK_USER) $$ \\ ünïcødé 😀 {{APP_ID}} a=b #!:",
            "spark.my.password": " a \"b\" 'c' $HOME $(SPARK_USER) $$ \\ ünïcødé 😀 {{APP_ID}} a=b #!: ",
            "spark.my.lines": "a\n\tb\rc",
            "spark.my.line": "\r\n",
            "spark.my.blanks": " \ta ",
            "spark.my.empty": "",
        },
        application_args=[
            *("a b", "$HOME", "$(SPARK_USER)", "$$(SPARK_USER)", "$(HOME)", "$$", "it's", '"', "\\", "ünïcødé 😀", ""),
            *("--conf", "a=b", "x\ny"),
        ],
        env_vars={"TEXT": "$(SPARK_USER) $$ $HOME"},
    ),
}


INTENDED = {
    r"\.metadata\.name": "it holds the submission's token",
    r"\.metadata\.labels\.durable-spark/(token|owner|deployment)": "by which the pod is found again",
    r"\.metadata\.annotations\.durable-spark/task": "for people",
    r"\.metadata\.labels\.spark-version": "only the image knows it",
    r"\.spec\.volumes\[spark-conf-volume-driver\]\.(configMap|emptyDir|secret)\b.*": (
        "the settings are arguments, and the secret ones in a Secret; there is no config map"
    ),
}
"""Fields of the pod that are different on purpose, and why."""

INTENDED_PROPERTIES = {
    r"spark\.app\.submitTime": "the SparkSubmit in the pod sets it anew",
    r"spark\.driver\.host": "the pod's own address: there is no Service",
    r"spark\.kubernetes\.driver\.pod\.name": "it holds the submission's token",
    r"spark\.kubernetes\.authenticate\.submission\..*": "how to reach the API server is in the connection",
    r"spark\.kubernetes\.submission\.waitAppCompletion": "nobody waits",
    r"spark\.kubernetes\.driverEnv\.(MORE|TEXT)": "env_vars are in the pod, and no property of it",
}
"""Spark's properties that are different on purpose, and why."""


class Submitted(NamedTuple):
    """What was submitted, as the API server has it, in a form that can be compared."""

    pod: dict[str, Any]
    """Leaves by their paths, without the arguments."""
    containers: list[str]
    arguments: list[str]
    """Those of the entrypoint of Spark's images."""
    understood: dict[str, Any]
    """What Spark makes of its own ones: properties, application, and the arguments of the latter."""


Submit = Callable[[str], tuple[Submitted, Submitted]]


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submit]:
    """Return a function that submits a job by spark-submit and by us."""
    template = tmp_path_factory.mktemp("template") / "pod.yaml"
    with ExitStack() as stack:
        spark = require(ensure_spark)
        cluster = stack.enter_context(require(lambda: KubernetesCluster(node=False)))
        cluster.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "of-the-template"}})
        spark_submit = stack.enter_context(SparkSubmit.started(spark))

        @functools.cache
        def both(name: str) -> tuple[Submitted, Submitted]:
            job = JOBS[name]
            if name in TEMPLATES:
                template.write_text(yaml.safe_dump(TEMPLATES[name]))
                path = {"spark.kubernetes.driver.podTemplateFile": str(template)}
                job = dataclasses.replace(job, conf={**job.conf, **path})
            pod = re.sub("[^a-z]", "-", name.lower())
            return theirs(cluster, spark_submit, job, pod), ours(cluster, spark_submit, job)

        yield both


def theirs(cluster: KubernetesCluster, spark_submit: SparkSubmit, job: SparkJob, name: str) -> Submitted:
    spark_submit.submit(command(job, name, cluster))
    pod = cluster.pod(name)
    (config,) = [volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if volume["name"] == CONF_VOLUME]
    path = in_namespace(cluster, "configmaps", config)
    properties = cluster.request("GET", path)["data"]["spark.properties"]
    cluster.request("DELETE", path)
    for volume in pod["spec"]["volumes"]:
        if volume.get("persistentVolumeClaim", {}).get("claimName", "").endswith("-driver-pvc-0"):
            volume["ephemeral"] = {"volumeClaimTemplate": claim(cluster, volume.pop("persistentVolumeClaim"))}
    submitted = comparable(pod, spark_submit, properties)
    if not submitted.understood["properties"]["spark.submit.pyFiles"]:  # always there
        del submitted.understood["properties"]["spark.submit.pyFiles"]
    return submitted


def ours(cluster: KubernetesCluster, spark_submit: SparkSubmit, job: SparkJob) -> Submitted:
    path = template_path(job, {})
    driver = build_driver(
        job,
        new_submission(),
        master=cluster.url,
        namespace=cluster.namespace,
        defaults={},
        template=yaml.safe_load(Path(path).read_text()) if path else None,
        user=getpass.getuser(),
    )
    secret: dict[str, str] = {}
    if driver.secret:
        cluster.request("POST", in_namespace(cluster, "secrets"), driver.secret, token=cluster.token)
        secret = driver.secret["stringData"]
    pod = cluster.request("POST", in_namespace(cluster, "pods"), driver.pod, token=cluster.token)
    return comparable(as_run(pod, secret), spark_submit, secret.get("spark.properties", ""))


def in_namespace(cluster: KubernetesCluster, kind: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{cluster.namespace}/{kind}/{name}".rstrip("/")


def claim(cluster: KubernetesCluster, source: Mapping[str, str]) -> dict[str, Any]:
    """Return what there is to a claim that spark-submit made."""
    made = cluster.request("GET", in_namespace(cluster, "persistentvolumeclaims", source["claimName"]))
    return {"metadata": {part: made["metadata"][part] for part in ("labels", "annotations")}, "spec": made["spec"]}


def driver_of(pod: Mapping[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod["spec"]["containers"][-1]
    return container


def as_run(pod: dict[str, Any], secret: Mapping[str, str]) -> dict[str, Any]:
    """Return the pod as the kubelet would run it: variables have values, and references to them are resolved."""
    container = driver_of(pod)
    variables = {"SPARK_DRIVER_BIND_ADDRESS": "10.1.2.3"}
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference and reference["name"] == pod["metadata"]["name"]:
            variable["value"] = secret[reference["key"]]
            del variable["valueFrom"]
        elif "value" in variable:
            variable["value"] = expanded(variable["value"], variables)
        variables.setdefault(variable["name"], variable.get("value", ""))
    container["args"] = [expanded(argument, variables) for argument in container["args"]]
    return pod


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """As ``k8s.io/kubernetes/third_party/forked/golang/expansion`` does it."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda match: variables.get(match[1] or "", match[0][1:] if match[1] is None else match[0]),
        text,
    )


def comparable(pod: dict[str, Any], spark_submit: SparkSubmit, properties: str) -> Submitted:
    arguments = driver_of(pod).pop("args")
    understood = spark_submit.read(arguments, properties)
    before = arguments[: arguments.index("driver")]
    text = json.dumps([pod, before, understood]).replace(understood["properties"]["spark.app.id"], "APP_ID")
    text = re.sub(r"/var/data/spark-[-0-9a-f]{36}", "/var/data/spark-UUID", text)
    pod, before, understood = json.loads(re.sub(r"kube-api-access-\w+", "kube-api-access", text))
    names = [container["name"] for container in pod["spec"]["containers"]]
    return Submitted(flat({part: pod[part] for part in ("metadata", "spec")}), names, before, understood)


FLAGS = {
    "archives": "--archives",
    "driver_class_path": "--driver-class-path",
    "driver_cores": "--driver-cores",
    "driver_memory": "--driver-memory",
    "executor_cores": "--executor-cores",
    "executor_memory": "--executor-memory",
    "files": "--files",
    "jars": "--jars",
    "java_class": "--class",
    "keytab": "--keytab",
    "name": "--name",
    "num_executors": "--num-executors",
    "principal": "--principal",
    "proxy_user": "--proxy-user",
    "py_files": "--py-files",
}


def command(job: SparkJob, pod: str, cluster: KubernetesCluster) -> list[str]:
    """Return what spark-submit is told of a job; by people, so it sees the same words."""
    settings = {
        **job.conf,
        **under("kubernetes.driverEnv", job.env_vars),
        "spark.kubernetes.authenticate.submission.caCertFile": str(cluster.ca),
        "spark.kubernetes.authenticate.submission.oauthToken": cluster.admin_token,
        "spark.kubernetes.driver.pod.name": pod,
        "spark.kubernetes.namespace": cluster.namespace,
        "spark.kubernetes.submission.waitAppCompletion": "false",
    }
    flags = {flag: getattr(job, field) for field, flag in FLAGS.items() if getattr(job, field) is not None}
    return [
        *("--master", f"k8s://{cluster.url}", "--deploy-mode", "cluster"),
        *(part for flag, value in flags.items() for part in (flag, str(value))),
        *(part for key, value in settings.items() for part in ("--conf", f"{key}={value}")),
        *(job.application, *job.application_args),
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a JSON value by their paths. Entries of lists go by their names, not their places."""
    if isinstance(value, Mapping):
        parts = [(f"{path}.{key}", part) for key, part in value.items()]
    elif isinstance(value, list) and all(isinstance(part, Mapping) and "name" in part for part in value):
        parts = [(f"{path}[{part.get('mountPath', part['name'])}]", part) for part in value]
    elif isinstance(value, list):
        parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for part in parts for key, leaf in flat(part[1], part[0]).items()} or {path: value}


SERVERS = re.compile(r"\.metadata\.(creationTimestamp|generation|managedFields|resourceVersion|uid)\b.*")
"""What the API server puts into a pod, different for each."""


def differences(left: Mapping[str, Any], right: Mapping[str, Any], intended: Mapping[str, str]) -> dict[str, Any]:
    return {
        key: f"spark-submit: {left.get(key, 'nothing')!r}, ours: {right.get(key, 'nothing')!r}"
        for key in {**left, **right}
        if left.get(key) != right.get(key) and not any(re.fullmatch(pattern, key) for pattern in intended)
    }


@pytest.mark.parametrize("name", JOBS)
def test_pod_is_that_of_spark_submit(name: str, submitted: Submit) -> None:
    expected, pod = submitted(name)
    assert differences(expected.pod, pod.pod, {**INTENDED, SERVERS.pattern: ""}) == {}
    assert pod.containers == expected.containers
    assert pod.arguments == expected.arguments


@pytest.mark.parametrize("name", JOBS)
def test_spark_understands_the_same(name: str, submitted: Submit) -> None:
    expected, understood = (dict(pod.understood) for pod in submitted(name))
    assert differences(expected.pop("properties"), understood.pop("properties"), INTENDED_PROPERTIES) == {}
    assert understood == expected


def test_each_intended_difference_is_one(submitted: Submit) -> None:
    found: set[str] = set()
    for name in ("minimal", "environment and secrets", "difficult arguments"):
        expected, pod = submitted(name)
        found |= differences(expected.pod, pod.pod, {}).keys()
        found |= differences(expected.understood["properties"], pod.understood["properties"], {}).keys()
    patterns = [*INTENDED, *INTENDED_PROPERTIES]
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, key) for key in found)] == []
