import pathlib
import re
from pathlib import Path
from typing import Any

import pytest
from leasehold.allocator import config as allocator_config
from leasehold.core import errors
from leasehold.core.node import model, settings
from leasehold.gateway import config as gateway_config
from leasehold.nodeagent import config, names

ROOT = pathlib.Path(__file__).parents[2]
GIB = model.GIB

POOL = """
pools:
  - {name: asr, template: command, parameters: {program: sleep, arguments: ["5"]}}
"""


def load(
    folder: Path,
    yaml: str | None = None,
    *,
    env: dict[str, str] | None = None,
    flags: dict[str, str] | None = None,
) -> config.Config:
    given: dict[str, str | None] = {"LEASEHOLD_STATE_DIR": str(folder / "state"), **(flags or {})}
    if yaml is not None:
        file = folder / "agent.yaml"
        file.write_text(yaml)
        file.chmod(0o600)
        given["LEASEHOLD_AGENT_CONFIG"] = str(file)
    return config.load(given, env or {}, folder)


def refusal(folder: Path, yaml: str | None = None, **given: Any) -> str:
    with pytest.raises(errors.InvalidArgument) as raised:
        load(folder, yaml, **given)
    return raised.value.message


def test_each_source_wins_over_those_before_it(tmp_path: Path) -> None:
    yaml = "preset: r620\nsettings: {max_workers: 20}\n" + POOL

    def maximum(**given: Any) -> int:
        return load(tmp_path, yaml, **given).pools[0].spec.max_workers

    assert load(tmp_path, "preset: r620\n" + POOL).pools[0].spec.max_workers == 8
    assert maximum() == 20
    (tmp_path / ".env").write_text("MAX_WORKERS=21   # many\n")
    assert maximum() == 21
    (tmp_path / ".env.production").write_text("MAX_WORKERS=22\n")
    assert maximum() == 21
    assert maximum(env={"ENV": "production"}) == 22
    assert maximum(env={"ENV": "production", "MAX_WORKERS": "23"}) == 23
    assert maximum(env={"ENV": "production", "MAX_WORKERS": "23"}, flags={"MAX_WORKERS": "24"}) == 24


def test_env_may_be_chosen_in_the_env_file_itself(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ENV=production\n")
    (tmp_path / ".env.production").write_text("MEMORY_CHECK_INTERVAL=7\n")

    assert load(tmp_path).host.check_interval_seconds == 7.0


def test_a_preset_is_what_settings_begin_with(tmp_path: Path) -> None:
    loaded = load(tmp_path, POOL, flags={"LEASEHOLD_PRESET": "r620", "MIN_WORKERS": "3"})
    spec = loaded.pools[0].spec

    assert (spec.threshold_bytes, spec.max_workers, spec.min_workers) == (12 * GIB, 8, 3)
    assert (loaded.host.check_interval_seconds, spec.worker_limit_bytes) == (20.0, 6 * GIB)
    assert loaded.origins["MAX_WORKERS"] == "preset r620"
    assert loaded.origins["MIN_WORKERS"] == "--min-workers"


def test_without_anything_the_defaults_hold_and_there_is_no_pool(tmp_path: Path) -> None:
    loaded = load(tmp_path)

    assert loaded.host == settings.HostSettings()
    assert loaded.pools == ()
    assert loaded.addresses == ("127.0.0.1:7400",)
    assert loaded.socket == tmp_path / "state" / "agent.sock"
    assert loaded.drain_seconds() == 0.0


def test_what_a_pool_says_of_itself_is_nearer_than_a_setting_for_all(tmp_path: Path) -> None:
    yaml = """
settings: {MAX_WORKERS: 6}
pools:
  - name: heavy
    template: command
    parameters: {program: sleep, arguments: "60 60"}
    priority: 10
    min_workers: 0
    max_workers: 3
    worker_memory_limit_gb: 0.5
    memory_threshold_gb: 2
    enable_auto_scaling: false
    env: {A: "1"}
    restart: {initial_seconds: 2}
    log: {max_mb: 1, keep: 2}
  - {name: light, template: command, parameters: {program: sleep}}
"""
    heavy, light = load(tmp_path, yaml, env={"MAX_WORKERS": "9"}).pools

    assert (heavy.spec.min_workers, heavy.spec.max_workers, heavy.spec.priority) == (0, 3, 10)
    assert (heavy.spec.worker_limit_bytes, heavy.spec.threshold_bytes) == (GIB // 2, 2 * GIB)
    assert heavy.spec.is_auto_scaling is False
    assert heavy.spec.parameters["arguments"] == "60 60"
    assert heavy.spec.restart.initial_seconds == 2.0
    assert (heavy.log.max_bytes, heavy.log.keep) == (2**20, 2)
    assert (light.spec.min_workers, light.spec.max_workers, light.spec.priority) == (1, 9, 0)


def test_a_shared_env_file_may_hold_what_is_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "DATABASE_URL=postgres://x\nMAX_CONNECTIONS=5\nWORKER_COUNT=3\nLEASEHOLD_POSTGRES_DSN=x\nMIN_WORKERS=\n"
        "LEASEHOLD_ALLOCATOR_SERVICE_HOST=h\nLEASEHOLD_ALLOCATOR_PORT_7400_TCP_ADDR=h\n"
    )

    loaded = load(tmp_path, POOL)

    assert loaded.pools[0].spec.min_workers == 1
    assert loaded.environment["DATABASE_URL"] == "postgres://x"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("MAX_WORKER=6", "MAX_WORKER (.env) is no setting; MAX_WORKERS was probably meant"),
        ("WORKER_MEMORY_LIMIT=4", "WORKER_MEMORY_LIMIT (.env) is no setting; WORKER_MEMORY_LIMIT_GB was"),
        ("LEASEHOLD_NOD=a", "LEASEHOLD_NOD (.env): there is no such setting; did you mean LEASEHOLD_NODE?"),
        ("LEASEHOLD_QQQ=a", "LEASEHOLD_QQQ (.env): there is no such setting; the agent knows LEASEHOLD_ADDR"),
        ("MIN_WORKERS=9", "MIN_WORKERS (.env): 9 is above MAX_WORKERS, which is 6"),
        ("WORKER_MEMORY_LIMIT_GB=-4", "WORKER_MEMORY_LIMIT_GB (.env): -4 is not in 0 to"),
        ("MEMORY_THRESHOLD_GB=nan", "MEMORY_THRESHOLD_GB (.env): nan is not in 0 to"),
        ("ENABLE_AUTO_SCALING=maybe", "ENABLE_AUTO_SCALING (.env): 'maybe' is neither true nor false"),
        ("LEASEHOLD_LOG_FORMAT=xml", "LEASEHOLD_LOG_FORMAT: 'xml' is none of auto, json, console"),
        ("LEASEHOLD_NODE=../x", "node: '../x' is not a name"),
        ("LEASEHOLD_PRESET=r640", ".env: there is no preset 'r640'; known are dev, r620"),
        ("LEASEHOLD_ADDR=nonsense", ".env: 'nonsense' is neither host:port"),
        ("LEASEHOLD_DRAIN_DEADLINE_SECONDS=-1", "LEASEHOLD_DRAIN_DEADLINE_SECONDS: -1.0 is not a number of 0"),
        (
            "LEASEHOLD_SOCKET=0.0.0.0:80",
            "LEASEHOLD_SOCKET: '0.0.0.0:80' is no path: the agent's API is offered",
        ),
        ("LEASEHOLD_SOCKET=/" + "x" * 120, "LEASEHOLD_SOCKET: the path of a Unix socket has 1 to 107 bytes"),
        ("ENV=../x", "ENV: '../x' is not a name for .env.NAME"),
    ],
)
def test_what_is_wrong_names_the_setting_and_where_it_stands(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / ".env").write_text(text + "\n")

    assert refusal(tmp_path).startswith(told)


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        (
            "pools: [{name: a, template: nope}]",
            "pools[0].template: there is no template 'nope'; known are celery",
        ),
        ("pools: [{name: ../a, template: command}]", "pools[0].name: '../a' is not a name"),
        ("pools: [{name: a, template: command}]", "pools[0].parameters.program: is missing"),
        (
            "pools: [{name: a, template: command, paramters: {program: a}}]",
            "pools[0].paramters: there is no such setting; did you mean 'parameters'?",
        ),
        (POOL + POOL.replace("pools:", ""), "there are two pools 'asr'"),
        (
            POOL.replace("template: command", "template: command, max_worker: 3"),
            "pools[0].max_worker: there is no",
        ),
        (POOL.replace("template: command", "template: command, max_workers: 0"), "MIN_WORKERS: 1 is above"),
        ("settings: {MAX_WORKER: 3}", "MAX_WORKER (settings) is no setting; MAX_WORKERS was probably meant"),
        ("settings: {color: 3}", "settings.color: there is no such setting"),
        ("nodes: a", "nodes: there is no such setting; did you mean 'node'?"),
        ("node: a\nnode: b", "line 2: the key 'node' is given twice"),
        ("[", "not YAML"),
        ("labels: {a: [1]}", "labels.a: [1] is not a text"),
        ("templates: {x: {argv: [a, '{b}']}}", "templates.x.argv[1]: {b} is no parameter"),
    ],
)
def test_a_wrong_file_is_told_by_its_path_and_place(tmp_path: Path, yaml: str, told: str) -> None:
    message = refusal(tmp_path, yaml)

    assert message.startswith(f"{tmp_path}/agent.yaml: ")
    assert told in message


def test_a_host_declares_templates_of_its_own(tmp_path: Path) -> None:
    yaml = """
templates:
  ticker:
    argv: [/bin/tick, '{rate}']
    parameters: {rate: {pattern: '[0-9]+', default: '5'}}
    stop: {steps: [{signal: INT, wait_seconds: 100}], immediate_step: 0}
pools: [{name: t, template: ticker}]
"""
    loaded = load(tmp_path, yaml)

    assert loaded.pools[0].values == {"rate": "5"}
    assert loaded.drain_seconds() == 100.0


def test_no_allocator_is_a_setting_too(tmp_path: Path) -> None:
    assert load(tmp_path, flags={"LEASEHOLD_ADDR": "none"}).addresses == ()
    assert load(tmp_path, "allocators: ['h1:1', 'h2:2']").addresses == ("h1:1", "h2:2")


def test_every_variable_of_the_product_is_known() -> None:
    """A name that one process reads must not make another one refuse to start."""
    found = {name for name in settings.NAMES if name.startswith(names.PREFIX)}
    fields = [*allocator_config.Settings.model_fields, *gateway_config.Settings.model_fields]
    found |= {f"{names.PREFIX}{name.upper()}" for name in fields}
    pattern = re.compile(r"\bLEASEHOLD_[A-Z][A-Z_]*[A-Z]\b")
    for root in ("libs", "services", "agents", "deploy", "tools"):
        for path in (ROOT / root).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".env", ".yaml", ".service", ".sh", ".md"):
                found |= set(pattern.findall(path.read_text("utf-8")))
    partial = {"LEASEHOLD_TLS", "LEASEHOLD_GATEWAY_TLS"}

    with pytest.raises(errors.InvalidArgument):
        names.check_product_names(["LEASEHOLD_NOBODY_KNOWS"], "here")
    names.check_product_names(sorted(found - partial), "the product's own files")


@pytest.mark.parametrize("path", ["agents/leasehold/nodeagent/example-agent.yaml", "deploy/agent.example.yaml"])
def test_the_examples_are_sound(tmp_path: Path, path: str) -> None:
    loaded = load(tmp_path, (ROOT / path).read_text("utf-8"))

    assert loaded.pools
    mins = sum(pool.spec.min_workers * pool.spec.worker_limit_bytes for pool in loaded.pools)
    total = loaded.host.memory_budget_bytes or 64 * GIB
    assert mins + loaded.host.reserve_bytes <= total


def test_the_drain_deadline_of_celery_is_its_task_limit_and_half_a_minute(tmp_path: Path) -> None:
    loaded = load(tmp_path, (ROOT / "deploy/agent.example.yaml").read_text("utf-8"))

    assert loaded.drain_seconds() == 3_630.0
