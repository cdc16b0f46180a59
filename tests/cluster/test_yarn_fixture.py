"""The YARN clusters of the tests themselves: Hadoop's own servers, in the life that tests give them."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from dev.hadoop import ensure_hadoop
from dev.kerberos import KeyDistributionCenter, ensure_gssapi
from dev.processes import ServerDied, wait_until
from dev.reaper import mentioning
from dev.yarn import RequestFailed, YarnCluster, send
from tests.conftest import require
from tests.standalone import keystore
from tests.yarn import YarnJob, new_application, spark_submit, submit_app

ROOT = Path(__file__).resolve().parents[2]
LONG = YarnJob(seconds=600)
APPS = "/ws/v1/cluster/apps"


@pytest.fixture(scope="module")
def pair() -> Iterator[YarnCluster]:
    """Two managers and a node."""
    with require(lambda: YarnCluster(managers=2)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def realm() -> Iterator[KeyDistributionCenter]:
    with require(KeyDistributionCenter) as center:
        yield center


@pytest.fixture(scope="module")
def guarded(realm: KeyDistributionCenter) -> Iterator[YarnCluster]:
    """A cluster whose web servers demand tickets."""
    with require(lambda: YarnCluster(kerberos=realm)) as cluster:
        yield cluster


def test_success(yarn_cluster: YarnCluster) -> None:
    app_id = submit_app(yarn_cluster, YarnJob(), ["Nightly", "a:b=c"])
    app = yarn_cluster.wait_for_app(app_id, "FINISHED")
    assert (app.final_status, app.diagnostics, app.tags) == ("SUCCEEDED", "", ("a:b=c", "nightly"))
    assert app in yarn_cluster.apps()
    assert app_id in yarn_cluster.launched()
    assert yarn_cluster.log(app_id) == "sleeping 0.0 s\n"
    assert "ending with SUCCEEDED" in yarn_cluster.log(app_id, "stderr")


def test_failure_that_the_application_tells(yarn_cluster: YarnCluster) -> None:
    diagnostics = "User class threw exception:\n\tat `here` $HOME 'and' \"there\"\nCaused by: \u00fcber"
    app = yarn_cluster.wait_for_app(
        submit_app(yarn_cluster, YarnJob(end="FAILED", diagnostics=diagnostics)), "FINISHED"
    )
    assert (app.final_status, app.diagnostics) == ("FAILED", diagnostics)


@pytest.mark.parametrize("job", [YarnJob(end=7), YarnJob(command='seven="7"; exit $seven')])
def test_failure_without_a_word(yarn_cluster: YarnCluster, job: YarnJob) -> None:
    app = yarn_cluster.wait_for_app(submit_app(yarn_cluster, job), "FAILED")
    assert app.final_status == "FAILED"
    assert "exitCode: 7\n" in app.diagnostics


def test_application_whose_master_never_registers(yarn_cluster: YarnCluster) -> None:
    app_id = submit_app(yarn_cluster, YarnJob(command="echo up; exec sleep 600"))
    wait_until(lambda: yarn_cluster.log(app_id) == "up\n", 30, "the container")
    assert yarn_cluster.app(app_id).state == "ACCEPTED"
    yarn_cluster.kill_app(app_id)
    yarn_cluster.wait_for_app(app_id, "KILLED")


def test_kill(yarn_cluster: YarnCluster) -> None:
    app_id = submit_app(yarn_cluster, LONG)
    yarn_cluster.wait_for_app(app_id, "RUNNING")
    assert yarn_cluster.kill_app(app_id).status == 202
    app = yarn_cluster.wait_for_app(app_id, "KILLED")
    assert app.diagnostics == f"Application {app_id} was killed by user {yarn_cluster.user}"
    assert yarn_cluster.kill_app(app_id).status == 200
    wait_until(lambda: not mentioning(app_id), 30, "the end of its container")


def test_an_id_is_submitted_once(yarn_cluster: YarnCluster) -> None:
    app_id = new_application(yarn_cluster)
    with pytest.raises(RequestFailed, match="404"):
        yarn_cluster.app(app_id)
    for job in (YarnJob(name="first"), YarnJob(name="second")):
        assert submit_app(yarn_cluster, job, app_id=app_id) == app_id
    app = yarn_cluster.wait_for_app(app_id, "FINISHED")
    assert (app.name, len(yarn_cluster.attempts(app_id))) == ("first", 1)


def test_spark_submit(yarn_cluster: YarnCluster, apps: Path) -> None:
    app_id = spark_submit(yarn_cluster, apps / "driver.py", "0", "0", tags=["spark"])
    app = yarn_cluster.wait_for_app(app_id, "FINISHED", deadline=120)
    assert (app.final_status, app.user, app.tags) == ("SUCCEEDED", yarn_cluster.user, ("spark",))
    assert "total=4950" in yarn_cluster.log(app_id)
    assert not list((yarn_cluster.directory / "staging").rglob("*.zip"))


def test_an_application_outlives_the_manager_and_the_node(yarn_cluster: YarnCluster, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    before = submit_app(yarn_cluster, YarnJob(diagnostics="over"))
    yarn_cluster.wait_for_app(before, "FINISHED")
    shell = submit_app(yarn_cluster, YarnJob(command=f"until [ -e {go_on} ]; do sleep 0.1; done; exit 7"))
    app_id = submit_app(yarn_cluster, YarnJob(until=go_on))
    running = yarn_cluster.wait_for_app(app_id, "RUNNING")
    attempt = yarn_cluster.attempts(app_id)

    yarn_cluster.kill_manager()
    with pytest.raises(OSError, match="refused"):
        yarn_cluster.apps()
    yarn_cluster.start_manager()
    yarn_cluster.wait_for_state("ACTIVE")
    assert yarn_cluster.app(app_id).started == running.started  # known as soon as it is active
    assert yarn_cluster.app(before).final_status == "SUCCEEDED"
    yarn_cluster.wait_for_app(app_id, "RUNNING")
    yarn_cluster.wait_for_node()

    processes = mentioning(app_id)
    yarn_cluster.restart_node()
    assert mentioning(app_id) == processes
    yarn_cluster.wait_for_app(app_id, "RUNNING")
    assert [entry["containerId"] for entry in yarn_cluster.attempts(app_id)] == [attempt[0]["containerId"]]

    go_on.touch()
    assert yarn_cluster.wait_for_app(app_id, "FINISHED").final_status == "SUCCEEDED"
    assert len(yarn_cluster.attempts(app_id)) == 1
    assert "exitCode: 7\n" in yarn_cluster.wait_for_app(shell, "FAILED").diagnostics


def test_requests(yarn_cluster: YarnCluster) -> None:
    path = f"{APPS}?states=RUNNING&applicationTags=nobody&user.name=airflow"
    yarn_cluster.request("GET", path.rpartition("&")[0])
    request = wait_until(
        lambda: next((request for request in yarn_cluster.requests() if request.path == path), None), 10, "the log"
    )
    assert (request.method, request.status, request.agent.partition("/")[0]) == ("GET", 200, "Python-urllib")


def test_suspended_manager(yarn_cluster: YarnCluster) -> None:
    manager = yarn_cluster.managers[0].server
    manager.suspend()
    try:
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{yarn_cluster.web()}/ws/v1/cluster/info", timeout=0.5)
    finally:
        manager.resume()
    assert yarn_cluster.state() == "ACTIVE"


def test_fail_over(pair: YarnCluster, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    assert [pair.state(number) for number in (0, 1)] == ["ACTIVE", "STANDBY"]
    app_id = submit_app(pair, YarnJob(until=go_on), ["pair"])
    pair.wait_for_app(app_id, "RUNNING")

    standby = pair.request("GET", f"{APPS}?applicationTags=pair", number=1)
    assert standby.status == 307
    assert f"{APPS}?applicationTags=pair" in standby.headers["Location"]
    assert standby.text.startswith("This is standby RM. The redirect url is: /")

    pair.fail_over()
    assert [pair.state(number) for number in (0, 1)] == ["STANDBY", "ACTIVE"]
    pair.wait_for_app(app_id, "RUNNING")

    pair.transition_to_standby(1)
    nobody = pair.request("GET", f"{APPS}?applicationTags=pair")
    assert nobody.status == 307
    assert "Location" not in nobody.headers
    assert "url=http" in nobody.headers["Refresh"]
    assert nobody.text.startswith("Can not find any active RM.")

    pair.kill_manager(1)
    pair.transition_to_active(0)
    pair.wait_for_app(app_id, "RUNNING")
    pair.restart_manager(1)
    assert [pair.state(number) for number in (0, 1)] == ["ACTIVE", "STANDBY"]

    go_on.touch()
    assert pair.wait_for_app(app_id, "FINISHED").final_status == "SUCCEEDED"
    assert len(pair.attempts(app_id)) == 1


def test_timeline_server_knows_what_the_manager_has_forgotten() -> None:
    one = {f"yarn.resourcemanager.{store}max-completed-applications": "1" for store in ("", "state-store.")}
    with require(lambda: YarnCluster(timeline=True, yarn_site=one)) as cluster:
        first = submit_app(cluster, YarnJob(end="FAILED", diagnostics="one\ntwo"), ["first"])
        cluster.wait_for_app(first, "FINISHED")
        second = submit_app(cluster, YarnJob(command="exit 3"))
        cluster.wait_for_app(second, "FAILED")
        wait_until(lambda: cluster.request("GET", f"{APPS}/{first}").status == 404, 30, f"{first} to be forgotten")
        assert cluster.app(second)

        def finished() -> bool:
            answer = cluster.fetch(f"{cluster.timeline_web}/ws/v1/applicationhistory/apps/{first}")
            return answer.status == 200 and bool(answer.json()["app"]["finishedTime"])

        wait_until(finished, 30, f"{first} in the timeline server")  # the manager tells it when it has time
        app = cluster.fetch(f"{cluster.timeline_web}/ws/v1/applicationhistory/apps/{first}").json()["app"]
        assert (app["appId"], app["appState"], app["finalAppStatus"]) == (first, "FINISHED", "FAILED")
        assert (app["diagnosticsInfo"], app["applicationTags"]) == ("one\ntwo", "first")


def test_kerberos(guarded: YarnCluster, realm: KeyDistributionCenter) -> None:
    info = f"{guarded.web()}/ws/v1/cluster/info"
    for url in (f"{info}?user.name=airflow", f"{guarded.node_web}/ws/v1/node/info"):
        answer = send(urllib.request.Request(url))
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Negotiate")
    assert guarded.fetch(f"{guarded.node_web}/ws/v1/node/info").status == 200
    for user in realm.users:
        app_id = submit_app(guarded, YarnJob(), user=user)
        app = guarded.wait_for_app(app_id, "FINISHED")
        assert (app.user, app.final_status) == (user, "SUCCEEDED")


def test_kerberos_by_gssapi(guarded: YarnCluster, realm: KeyDistributionCenter) -> None:
    require(ensure_gssapi)
    script = """
        import base64, sys, urllib.request
        import gssapi
        name = gssapi.Name("HTTP@localhost", gssapi.NameType.hostbased_service)
        spnego = gssapi.OID.from_int_seq("1.3.6.1.5.5.2")
        context = gssapi.SecurityContext(name=name, mech=spnego, usage="initiate")
        token = base64.b64encode(context.step()).decode()
        request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Negotiate {token}"})
        with urllib.request.urlopen(request) as answer:
            scheme, _, proof = answer.headers["WWW-Authenticate"].partition(" ")
            context.step(base64.b64decode(proof))
            print(answer.status, scheme, context.complete)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), f"{guarded.web()}/ws/v1/cluster/info"]
    environment = os.environ | realm.environment("other")
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert answer.stdout == "200 Negotiate True\n", answer.stderr


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with require(lambda: YarnCluster(node=False, keystore=keystore(authority, tmp_path / "keystore.p12"))) as cluster:
        assert cluster.web().startswith("https://")
        with urllib.request.urlopen(f"{cluster.web()}/ws/v1/cluster/info", context=context) as answer:
            assert answer.status == 200
        app_id = submit_app(cluster, YarnJob())
        assert cluster.app(app_id).state == "ACCEPTED"  # there is no node


def test_acls() -> None:
    with require(
        lambda: YarnCluster(
            node=False,
            yarn_site={"yarn.acl.enable": "true", "yarn.admin.acl": " "},
            capacity_scheduler={
                "yarn.scheduler.capacity.root.acl_administer_queue": " ",
                "yarn.scheduler.capacity.root.acl_submit_applications": "airflow,other",
            },
        )
    ) as cluster:
        app_id = submit_app(cluster, LONG)
        assert cluster.kill_app(app_id, user="other").status == 403
        assert cluster.kill_app(app_id).status == 202
        with pytest.raises(RequestFailed, match="400"):
            submit_app(cluster, LONG, user="stranger")


def test_nothing_is_left_when_the_start_fails(tmp_path: Path) -> None:
    mark = tmp_path / "cluster"
    broken = {"yarn.resourcemanager.scheduler.class": "no.such.Scheduler"}
    cluster = require(lambda: YarnCluster(directory=mark, yarn_site=broken))
    with pytest.raises(ServerDied, match=r"no\.such\.Scheduler"), cluster:
        pass
    wait_until(lambda: not mentioning(mark), 10, f"the end of {mark}")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_nothing_is_left_running(tmp_path: Path, how: str) -> None:
    require(ensure_hadoop)
    script = """
        import sys
        from pathlib import Path
        from dev.yarn import YarnCluster
        from tests.yarn import YarnJob, submit_app
        with YarnCluster(directory=Path(sys.argv[1])) as cluster:
            submit_app(cluster, YarnJob(command="echo up; sleep 600"))
            app_id = submit_app(cluster, YarnJob(seconds=600))
            cluster.wait_for_app(app_id, "RUNNING")
            print("up", flush=True)
            input()
    """
    mark = tmp_path / "cluster"
    command = [sys.executable, "-c", textwrap.dedent(script), str(mark)]
    parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        assert len(mentioning(mark)) >= 7  # the parent, two servers, two containers with a shell each
        if how == "kill":
            parent.kill()
        parent.communicate("\n")
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: not mentioning(mark), 10, f"the end of {mark}")
