"""A real agent with real workers, an allocator and a gateway: seen and moved by HTTP and from a shell."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import allocator_kit
import cli_scene
import gateway_scene
import httpx
import psutil
import pytest
from leasehold.cli import main
from leasehold.devstack import ports
from leasehold.gateway import openapi

AGENT_YAML = """
node: {node}
settings:
  MAX_WORKERS: 3
  MIN_WORKERS: 1
  MEMORY_CHECK_INTERVAL: 1
  WORKER_MEMORY_LIMIT_GB: 0.05
  MEMORY_THRESHOLD_GB: 0.05
  SYSTEM_RESERVE_GB: 0.1
  MEMORY_HYSTERESIS_GB: 0.05
  MEMORY_BUDGET_GB: 0.25
templates:
  napper:
    argv: [/bin/sh, -c, 'trap "echo bye; exit 0" TERM; while :; do echo tick; sleep 0.2; done']
pools:
  - name: naps
    template: napper
"""


@contextlib.contextmanager
def process(*command: str, log: Path, env: dict[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as file:
        started = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=log.parent,
        )
    try:
        yield started
    finally:
        # SIGINT: an agent takes its workers along.
        started.send_signal(signal.SIGINT)
        try:
            started.wait(20.0)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            raise


class Host:
    """One host's agent, the allocator that it reports to, and a gateway."""

    def __init__(self, folder: Path, addr: str) -> None:
        self.folder, self.addr = folder, addr
        self.node = f"n-{uuid.uuid4().hex[:12]}"
        self.state = folder / "state"
        self.config = folder / "agent.yaml"
        self.config.write_text(AGENT_YAML.format(node=self.node))
        self.config.chmod(0o600)
        self.listen = f"127.0.0.1:{ports.free_port()}"
        self.http = httpx.Client(base_url=f"http://{self.listen}", timeout=15.0)

    def pool(self) -> dict[str, Any]:
        body = self.http.get("/monitoring/workers", params={"node": self.node}).json()
        found: dict[str, Any] = body["pools"][0]
        return found

    def alive(self) -> list[dict[str, Any]]:
        body = self.http.get("/monitoring/workers", params={"node": self.node}).json()
        return [each for each in body.get("workers", []) if each["state"] == "running"]

    def shell(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `leasehold` within this process, which is quicker."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run([*arguments, "--addr", self.addr])
        out.flush()
        out.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.getvalue())

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "leasehold.manage", *arguments, "--state-dir", str(self.state)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60.0,
            check=False,
            cwd=self.folder,
        )


def until(condition: Callable[[], Any], what: str) -> Any:
    """What the condition gives, once it is true."""
    deadline = time.monotonic() + 20.0
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within 20 s: {what}"
        time.sleep(0.05)
    return value


@pytest.fixture
def host(tmp_path: Path, shared_allocator: allocator_kit.AllocatorProcess) -> Iterator[Host]:
    made = Host(tmp_path, shared_allocator.address)
    agent = ["leasehold.nodeagent", "--config", str(made.config), "--state-dir", str(made.state)]
    gateway = ["leasehold.gateway", "--listen", made.listen, "--addr", made.addr]
    with (
        process(*agent, "--addr", made.addr, log=tmp_path / "agent.log"),
        process(*gateway, log=tmp_path / "gateway.log"),
        made.http,
    ):
        until(lambda: is_seen(made), "the node shows with its first workers")
        yield made


def is_seen(made: Host) -> bool:
    with contextlib.suppress(httpx.TransportError):
        answer = made.http.get("/monitoring/workers", params={"node": made.node})
        return answer.status_code == 200 and len(answer.json()["workers"]) > 0
    return False


def test_what_is_ordered_by_http_happens_to_real_processes(host: Host) -> None:
    where = {"node": host.node}
    until(lambda: len(host.alive()) == 3, "memory is good for three")
    pids = {each["pid"] for each in host.alive()}
    assert all(psutil.pid_exists(pid) for pid in pids)

    scaled = host.http.post("/monitoring/workers/scale", params={**where, "target_workers": 1})
    assert scaled.status_code == 200, scaled.text
    assert (scaled.json()["pool"]["mode"], scaled.json()["pool"]["manual_target"]) == ("manual", 1)
    until(lambda: sum(psutil.pid_exists(pid) for pid in pids) == 1, "two have ended")

    outside = host.http.post("/monitoring/workers/scale", params={**where, "target_workers": 4})
    assert (outside.status_code, outside.json()["error"]["field"]) == (400, "target_workers")
    unknown = host.http.post("/monitoring/workers/scale", params={**where, "target_workers": 1, "pool": "none"})
    assert (unknown.status_code, unknown.json()["error"]["reason"]) == (404, "NOT_FOUND")
    assert host.pool()["manual_target"] == 1

    paused = host.http.post("/monitoring/monitoring/stop", params=where)
    assert paused.json()["nodes"][0]["pools"][0]["mode"] == "paused"
    started = host.http.post("/monitoring/monitoring/start", params=where)
    assert started.json()["nodes"][0]["pools"][0]["mode"] == "auto"
    until(lambda: len(host.alive()) == 3, "memory decides again")


def test_a_real_fleets_answers_are_as_the_document_describes_them(host: Host) -> None:
    document = openapi.document()
    urls = {
        "get": ["/monitoring/status", "/monitoring/memory", "/monitoring/workers", "/healthz"],
        "post": ["/monitoring/workers/scale", "/monitoring/monitoring/stop", "/monitoring/monitoring/start"],
    }
    for verb, paths in urls.items():
        for path in paths:
            query = {"target_workers": "2"} if path.endswith("/scale") else {}
            answer = host.http.request(
                verb, path, params={**query, "node": host.node} if path[1] == "m" else {}
            )
            assert answer.status_code == 200, answer.text
            told = document["paths"][path][verb]["responses"]["200"]["content"]["application/json"]["schema"]
            assert gateway_scene.faults(answer.json(), told, document) == []
    metrics = host.http.get("/metrics").text
    assert f'leasehold_pool_workers{{node="{host.node}",pool="naps",state="running"}}' in metrics
    assert "grpc_server_handled_total{" in metrics
    declared = [line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE ")]
    assert len(declared) == len(set(declared))


def test_what_is_ordered_from_a_shell_happens_to_real_processes(host: Host) -> None:
    node = ("--node", host.node)
    until(lambda: len(host.alive()) == 3, "memory is good for three")

    scaled = host.shell("workers", "scale", "2", *node, "-o", "json")
    assert json.loads(scaled.stdout)["pools"][0]["manual_target"] == 2
    until(lambda: len(host.alive()) == 2, "one has ended")
    refused = host.shell("workers", "scale", "4", *node)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "MAX_WORKERS" in refused.stderr

    name = f"naps_1@{host.node}"
    assert host.shell("workers", "logs", name, "-n", "2").stdout == "tick\ntick\n"
    before = next(each["pid"] for each in host.alive() if each["name"] == name)
    assert host.shell("workers", "stop", name).returncode == 0
    until(lambda: not psutil.pid_exists(before), "it has ended")
    until(lambda: len(host.alive()) == 2, "it is replaced")

    explained = host.shell("node", "explain", host.node)
    assert explained.returncode == 0
    assert "MANUAL" in explained.stdout
    listed = host.shell("workers", "list", *node, "-o", "name").stdout.splitlines()
    assert len(listed) == 2
    assert host.node in host.shell("node", "status", host.node).stdout

    assert host.shell("node", "drain", host.node).returncode == 0
    until(lambda: host.alive() == [], "all have ended")
    assert json.loads(host.shell("node", "status", host.node, "-o", "json").stdout)["state"] == "draining"
    assert host.shell("node", "drain", host.node, "--cancel").returncode == 0
    until(lambda: len(host.alive()) == 2, "the target by hand is in force again")


def test_a_followed_log_ends_with_its_worker(host: Host) -> None:
    name = f"naps_1@{host.node}"
    with cli_scene.follow(name, host.addr) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"tick\n"
        assert host.shell("workers", "stop", "--node", host.node).returncode == 0
        assert following.stdout.read().endswith(b"bye\n")
        assert following.wait(30.0) == 0


def test_the_first_users_three_commands_manage_this_host(host: Host) -> None:
    status = host.manage("worker-status")
    assert status.returncode == 0
    assert host.node in status.stdout
    assert f"naps_1@{host.node}" in status.stdout
    assert json.loads(host.manage("worker-status", "--json").stdout)["node"] == host.node

    stopped = host.manage("stop-workers", "--wait")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout.startswith(f"naps on {host.node}: 0 running, 0 wanted (stopped by hand")

    again = host.manage("workers")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith(f"naps on {host.node}: ")
    until(lambda: len(host.alive()) == 3, "they are back")


def test_without_an_agent_workers_runs_one_and_the_others_say_that_there_is_none(tmp_path: Path) -> None:
    made = Host(tmp_path, "")
    for command in ("worker-status", "stop-workers"):
        ran = made.manage(command)
        assert (ran.returncode, ran.stdout) == (3, "")
        assert "no agent" in ran.stderr
        assert ran.stderr.count("\n") == 1

    arguments = ["workers", "--config", str(made.config), "--state-dir", str(made.state), "--addr", ""]
    with process("leasehold.manage", *arguments, log=tmp_path / "agent.log") as agent:
        until(lambda: f"naps_1@{made.node}" in made.manage("worker-status").stdout, "a worker runs")
        assert f'"pid": {agent.pid}' in (tmp_path / "agent.log").read_text()
    assert agent.returncode == 0
    made.http.close()


@pytest.mark.parametrize("command", ["agent", "gateway", "allocator"])
def test_each_process_tells_its_settings_by_the_command_of_its_name(command: str) -> None:
    ran = cli_scene.leasehold(command, "--help")

    assert ran.returncode == 0
    assert ran.stdout.startswith(f"usage: leasehold {command} ")


def test_a_status_of_a_host_without_an_agent_is_exit_code_3(tmp_path: Path) -> None:
    ran = cli_scene.leasehold("agent", "--status", "--state-dir", str(tmp_path))

    assert (ran.returncode, ran.stdout) == (3, "")


def test_the_agent_knows_the_names_of_the_gateways_settings() -> None:
    from leasehold.gateway import config
    from leasehold.nodeagent import names

    wanted = {f"{config.PREFIX}{field.upper()}" for field in config.Settings.model_fields}

    assert wanted - names.OTHERS - set(names.AGENT) == set()
