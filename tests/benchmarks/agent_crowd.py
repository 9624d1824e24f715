"""An agent that starts its workers a hundredth of a second apart: a crowd of them is there soon."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping

from leasehold.nodeagent import config, main

_load = config.load


def _hasty(
    flags: Mapping[str, str | None],
    environment: Mapping[str, str] = os.environ,
    folder: pathlib.Path | None = None,
) -> config.Config:
    found = _load(flags, environment, folder)
    return dataclasses.replace(found, host=dataclasses.replace(found.host, start_spacing_seconds=0.01))


if __name__ == "__main__":
    config.load = _hasty
    main.run(
        {"LEASEHOLD_AGENT_CONFIG": sys.argv[1], "LEASEHOLD_STATE_DIR": sys.argv[2], "LEASEHOLD_ADDR": "none"}
    )
