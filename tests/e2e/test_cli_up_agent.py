"""`leasehold up` with an agent and the gateway: their workers are there, and none outlives it."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cli_scene
import psutil
import pytest
from leasehold.cli import main
from leasehold.devstack import identity


@pytest.fixture(name="data_dir")
def fixture_data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    assert workers(tmp_path / "data") == [], "workers were left"


@pytest.fixture(name="config")
def fixture_config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.yaml"
    path.write_text(
        "node: here\n"
        "settings: {MEMORY_BUDGET_GB: 0.25, SYSTEM_RESERVE_GB: 0.05, MEMORY_THRESHOLD_GB: 0.05}\n"
        "pools:\n"
        "  - {name: idle, template: command, worker_memory_limit_gb: 0.05, max_workers: 2,\n"
        "     parameters: {program: sleep, arguments: ['86399'], stop_seconds: 5}}\n"
    )
    path.chmod(0o600)
    return path


def workers(data_dir: Path) -> list[int]:
    """PIDs of the workers and shims of a data folder's agent."""
    found = []
    for process in psutil.process_iter(["environ", "cmdline"]):
        run_dir = (process.info["environ"] or {}).get("LEASEHOLD_RUN_DIR", "")
        if run_dir.startswith(f"{data_dir}/") or any(
            str(data_dir / "agent" / "workers") in part for part in process.info["cmdline"] or []
        ):
            found.append(process.pid)
    return found


def running(up: cli_scene.Up) -> int:
    listed = up.run("workers", "list", "-o", "json")
    if listed.returncode:
        return 0
    return sum(worker["state"] == "running" for worker in json.loads(listed.stdout))


def test_an_agent_and_the_gateway_run_and_end_with_it(data_dir: Path, config: Path) -> None:
    with cli_scene.up(data_dir, f"--agent-config={config}", has_parts=True) as up:
        cli_scene.until(lambda: running(up) == 2, "both workers run")
        gateway = next(line.split()[1] for line in up.told if line.startswith("gateway"))
        with urllib.request.urlopen(f"{gateway}/monitoring/status", timeout=5) as answer:
            status = json.load(answer)
        assert (status["totals"]["workers_running"], status["nodes"][0]["name"]) == (2, "here")
        assert workers(data_dir)

        assert up.stop(signal.SIGINT) == 0
        assert workers(data_dir) == []
    assert cli_scene.left_over(data_dir) == []


@pytest.mark.parametrize("by", ["down", "up"])
def test_workers_of_a_killed_one_are_ended_by_identity(data_dir: Path, config: Path, by: str) -> None:
    """The agent is killed first, so that it cannot end its workers when its owner dies."""
    with cli_scene.up(data_dir, f"--agent-config={config}", has_parts=True) as up:
        cli_scene.until(lambda: running(up) == 2, "both workers run")
        left = workers(data_dir)
        os.kill(up.process.pid, signal.SIGSTOP)
        agent = up.children["agent"]
        os.kill(agent.pid, signal.SIGKILL)  # alone: its workers stay
        up.process.kill()
        up.process.wait()
        assert identity.wait(agent, 5.0)
        assert set(left) <= set(workers(data_dir))

        if by == "down":
            down = cli_scene.leasehold("down", f"--data-dir={data_dir}")
            assert down.returncode == 0, down.stderr
        else:
            with cli_scene.up(data_dir, f"--agent-config={config}", has_parts=True) as successor:
                cli_scene.until(lambda: running(successor) == 2, "two new workers run")
                assert not set(left) & set(workers(data_dir))
    assert workers(data_dir) == []
    assert cli_scene.left_over(data_dir) == []


def test_a_wrong_agent_file_is_one_line_and_nothing_starts(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.chmod(0o666)
    folder = tmp_path / "untouched"

    code = main.run(["up", f"--data-dir={folder}", f"--agent-config={config}"])

    out, err = capsys.readouterr()
    assert (code, out, folder.exists()) == (1, "", False)
    assert err.startswith(f"leasehold: --config: {config} can be written by its group or by others")
    assert err.count("\n") == 1
