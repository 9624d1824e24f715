"""The YAML file of roles. Whoever can write it can do everything, so others must not be able to."""

import os
import pathlib
import stat

from leasehold.core import access, errors
from leasehold.runtime import strict_yaml


def read(path: pathlib.Path) -> access.Roles:
    """The roles of the file at `path`. Raises `InvalidArgument` that names the field, or `roles_file`."""
    return access.decode(strict_yaml.load(_text(path), field="roles"))


def _text(path: pathlib.Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(strict_yaml.TEXT_BYTES_MAX + 1)
    except OSError as error:
        raise errors.InvalidArgument(f"roles_file: {error.strerror}: {path}", field="roles_file") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise errors.InvalidArgument(
            f"roles_file: {path} can be written by others; chmod go-w {path}", field="roles_file"
        )
    if len(data) > strict_yaml.TEXT_BYTES_MAX:
        raise errors.InvalidArgument(f"roles_file: {path} is larger than 4 MiB", field="roles_file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"roles_file: {path} is not UTF-8", field="roles_file") from error
