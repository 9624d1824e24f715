"""Every host runs an agent: what it must not load, and how little it weighs."""

import json
import subprocess
import sys

FORBIDDEN = (
    *("pydantic", "pydantic_settings", "prometheus_client", "rich", "typer", "psycopg", "starlette", "uvicorn"),
    *("celery", "kombu", "redis", "psutil", "requests", "httpx"),
)
PROGRAM = """
import json, pkgutil, sys
import leasehold.nodeagent as package
import leasehold.nodeagent.__main__, leasehold.nodeagent.main
for module in pkgutil.iter_modules(package.__path__, "leasehold.nodeagent."):
    if not module.name.endswith((".__main__", ".shim")):
        __import__(module.name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_agent_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )

    loaded = set(json.loads(done.stdout))

    assert "grpc" in loaded
    assert sorted(loaded & set(FORBIDDEN)) == []
