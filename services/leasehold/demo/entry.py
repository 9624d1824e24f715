"""How every scene begins and ends: its screen, its exit codes, and what a signal does."""

import argparse
import sys
from collections.abc import Callable, Sequence

from leasehold.core import errors
from leasehold.runtime import interrupts
from leasehold.sim import auditor
from rich import console

EXIT_BROKEN = 1
EXIT_NOT_RUN = 2
EXIT_INTERRUPTED = 130
_WIDTH_MIN = 100


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """For the options of `python -m module`."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog="Exit codes: 0 every claim held, 1 a claim is broken, 2 it could not be run, 130 interrupted.",
    )


def run(what: str, play: Callable[[console.Console], int]) -> int:
    """Play on a screen; the exit code. A signal ends `play` as Ctrl-C does: it ends what it started."""
    screen = console.Console()
    if not screen.is_terminal:
        screen = console.Console(width=_WIDTH_MIN)
    try:
        with interrupts.Interrupts():
            return play(screen)
    except errors.LeaseholdError as error:
        sys.stderr.write(f"{what} could not be run: {error.message}\n")
        return EXIT_NOT_RUN
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; everything that was started has ended\n")
        return EXIT_INTERRUPTED


def judged(claims: Sequence[auditor.Claim]) -> int:
    """The exit code of a run, whose broken claims are told."""
    broken = [claim.name for claim in claims if not claim.is_upheld]
    for name in broken:
        sys.stderr.write(f"broken claim: {name}\n")
    return EXIT_BROKEN if broken else 0


def say(screen: console.Console, line: str) -> None:
    """Show a line as it is, however long."""
    screen.print(line, highlight=False, markup=False, soft_wrap=True)
