"""YAML files of users: safe, bounded, and a key that is given twice is refused."""

from typing import Any, Final

import yaml
from leasehold.core import errors

TEXT_BYTES_MAX: Final = 4 << 20


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML's own keeps the last one without a word."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            line = key_node.start_mark.line + 1
            raise errors.InvalidArgument(f"line {line}: the key {key!r} is given twice", field=key)
        seen.add(key if isinstance(key, str) else id(key_node))
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(text: str, *, field: str) -> Any:
    """The document of a file's text.

    Raises `InvalidArgument` that names `field`, or the line where it is no YAML or a key is given twice.
    """
    if len(text) > TEXT_BYTES_MAX:
        raise errors.InvalidArgument("larger than 4 MiB", field=field)
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except RecursionError as error:
        raise errors.InvalidArgument("nested too deeply", field=field) from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date that is none, or a number of thousands of digits.
        raise errors.InvalidArgument(f"not YAML: {' '.join(str(error).split())}", field=field) from error
