"""What commands read, and the documents that programs get: from text and from the wire."""

import json
import pathlib
import sys
from typing import Any

from leasehold.core import errors
from leasehold.rpc import budget_documents


def read_text(file: str) -> str:
    """The text of a file, or of standard input (`-`). Raises `InvalidArgument`, naming ``file``."""
    try:
        if file != "-":
            content = pathlib.Path(file).read_bytes()
        elif sys.stdin is None:
            raise errors.InvalidArgument("file: standard input is closed", field="file")
        else:
            content = sys.stdin.buffer.read()
        return content.decode("utf-8")
    except OSError as error:
        raise errors.InvalidArgument(f"file: {file}: {error.strerror}", field="file") from error
    except UnicodeDecodeError as error:
        raise errors.InvalidArgument(f"file: {file}: is not UTF-8", field="file") from error
    except ValueError as error:  # a path with a NUL
        raise errors.InvalidArgument(f"file: {file!r}: {error}", field="file") from error


def read_budgets(file: str) -> Any:
    """The `model.BudgetSpec` of each budget in a YAML file, or of standard input (`-`).

    Raises `InvalidArgument`, naming the field.
    """
    from leasehold.runtime import budgets_yaml

    return budgets_yaml.parse(read_text(file))


def read_plan(file: str) -> Any:
    """The JSON value of a file, or of standard input (`-`). Raises `InvalidArgument`, naming the field."""
    return parse_json(read_text(file), what="document")


def parse_json(text: str, *, what: str) -> Any:
    """The JSON value of a text. Raises `InvalidArgument`, naming `what`, or the key that is given twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise errors.InvalidArgument(f"{what}: is nested too deeply", field=what) from error
    except ValueError as error:
        raise errors.InvalidArgument(f"{what}: is not JSON: {error}", field=what) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key given twice is a mistake that must not pass in silence."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise errors.InvalidArgument(f"the key {name[:60]!r} is given twice in one object", field=name)
        found[name] = value
    return found


def budget(message: Any) -> dict[str, Any]:
    """A definition with the keys of the budgets file, defaults written out."""
    from leasehold.core.budget import codec
    from leasehold.rpc import budget_codec

    return codec.encode_budget(budget_codec.decode_budget(message))


def message(answer: Any) -> dict[str, Any]:
    """A message of the API with the names of its .proto, in protobuf's JSON form (64-bit numbers are texts).

    Fields are in the order of the .proto, and the keys of a map, which are dimensions, as people expect them.
    """
    from google.protobuf import json_format

    document = json_format.MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _ordered(document, answer.DESCRIPTOR)


def _ordered(document: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    ordered: dict[str, Any] = {}
    for field in descriptor.fields:
        value = document.get(field.name)
        if isinstance(value, dict) and field.message_type.GetOptions().map_entry:
            value = {name: value[name] for name in budget_documents.in_order(value)}
        elif isinstance(value, dict):
            value = _ordered(value, field.message_type)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            value = [_ordered(item, field.message_type) for item in value]
        if field.name in document:
            ordered[field.name] = value
    return ordered
