"""How a process is started that inherits signals as ignored and blocked, as by a shell's `command &`."""

import sys

_CODE = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
os.execvp(sys.argv[1], sys.argv[1:])
"""

#: Before a command: SIGINT and SIGTERM are ignored and blocked, SIGHUP is blocked.
PREFIX = (sys.executable, "-c", _CODE)
