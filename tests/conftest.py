"""What every test shares: a clean environment and the server fixtures."""

import os
import signal
import sys
from pathlib import Path

import hypothesis

# Settings of the person who runs the tests must not reach the code under test. The two that stay are for the
# tests themselves: which servers to use, and where fetched programs are kept.
_KEPT = {"LEASEHOLD_TEST_SERVERS", "LEASEHOLD_CACHE_DIR"}
for _name in list(os.environ):
    if (_name.startswith("LEASEHOLD_") and _name not in _KEPT) or _name in {"WORKER_ID", "WORKER_COUNT"}:
        del os.environ[_name]

# Whoever starts the tests may ignore or block signals (a shell does it to what it starts with `&`), and
# children inherit both: what a test sends to the programs under test must reach them as from a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())

# The import mode `importlib` leaves sys.path alone, and a plugin is found by its name.
sys.path.insert(0, str(Path(__file__).parent))

# A slow first example tells of the machine, not of the code. The same examples each time: what a run finds, the
# next one finds again; `make soak` looks further, at other seeds.
hypothesis.settings.register_profile(
    "leasehold", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("leasehold")

pytest_plugins = ["fixtures_servers", "fixtures_allocator", "fixtures_broker", "fixtures_job_reign"]
