"""Lines of standard output, for programs that must load quickly."""

import sys


def out(line: str) -> None:
    """A line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
