"""`python -m leasehold.demo`."""

import sys

from leasehold.demo import run

if __name__ == "__main__":
    sys.exit(run.main())
