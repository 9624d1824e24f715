"""What a signal does to a command that has to end what it started: in processes of their own."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import deaf
import pytest

PATIENCE_SECONDS = 30.0

# Says what happens to it; to stop it reads a line.
SCENE = """
import sys, time
from leasehold.demo import entry

def play(screen):
    try:
        print("playing", flush=True)
        time.sleep(60)
    finally:
        print("stopping", flush=True)
        sys.stdin.readline()
        print("stopped", flush=True)

sys.exit(entry.run("the scene", play))
"""

# The exception is raised where Python can only drop it.
LOSING = """
import time
from leasehold.runtime import interrupts

class Held:
    def __del__(self):
        print("held", flush=True)
        time.sleep(60)

with interrupts.Interrupts(lambda: print("stopping", flush=True)):
    try:
        held = Held()
        del held
        time.sleep(60)
    except interrupts.Stopped:
        print("stopped", flush=True)
"""

TOLD = """
import signal
from leasehold.runtime import interrupts

names = ("SIGINT", "SIGTERM", "SIGHUP")
before = [signal.getsignal(getattr(signal, name)) for name in names]
with interrupts.Interrupts():
    print(*(signal.getsignal(getattr(signal, name)) is signal.SIG_IGN for name in names))
print(before == [signal.getsignal(getattr(signal, name)) for name in names])
"""


@contextlib.contextmanager
def child(code: str, *, prefix: Sequence[str] = ()) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("prefix", [(), deaf.PREFIX], ids=["as usual", "deaf"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_scene_in_order_and_a_second_one_does_not_disturb(
    number: signal.Signals, prefix: Sequence[str]
) -> None:
    with child(SCENE, prefix=prefix) as scene:
        assert line_of(scene) == "playing"
        scene.send_signal(number)
        assert line_of(scene) == "stopping"
        scene.send_signal(signal.SIGTERM)
        scene.send_signal(signal.SIGINT)
        out, err = scene.communicate("\n", timeout=PATIENCE_SECONDS)

    assert (scene.returncode, out) == (130, "stopped\n")
    assert err == "interrupted; everything that was started has ended\n"


def test_an_exception_that_a_finalizer_swallows_is_raised_again() -> None:
    with child(LOSING) as process:
        assert line_of(process) == "held"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert (process.returncode, out, err) == (0, "stopping\nstopped\n", "")


def test_under_nohup_a_lost_terminal_is_no_reason_to_stop() -> None:
    with child(TOLD, prefix=("sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh")) as process:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert (out.splitlines(), err) == (["False False True", "True"], "")
