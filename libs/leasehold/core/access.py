"""Who may do what: roles of certificates, and which nodes an agent's certificate stands for."""

import enum
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from leasehold.core import errors

PATTERN_LENGTH_MAX = 255
RULES_MAX = 1_000


class Role(enum.Enum):
    """What a certificate is for. `ADMIN` may do everything; what the others may do is told by `allows`."""

    READER = "reader"
    WORKER = "worker"
    AGENT = "agent"
    OPERATOR = "operator"
    ADMIN = "admin"


#: Roles whose rights a role has beside its own.
_INCLUDED = {
    Role.READER: frozenset({Role.READER}),
    Role.WORKER: frozenset({Role.WORKER, Role.READER}),
    Role.AGENT: frozenset({Role.AGENT}),
    Role.OPERATOR: frozenset({Role.OPERATOR, Role.WORKER, Role.READER}),
    Role.ADMIN: frozenset(Role),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Certificates with a name like `certificate` (a shell pattern) have these roles.

    `nodes`: patterns of the names under which they may register as an agent; empty: their own name, or what is
    before its first dot.
    """

    certificate: str
    roles: frozenset[Role]
    nodes: tuple[str, ...] = ()

    def fits(self, names: Iterable[str]) -> bool:
        """Whether one of a certificate's names is like the pattern."""
        return any(fnmatch.fnmatchcase(name, self.certificate) for name in names)


@dataclass(frozen=True, slots=True)
class Roles:
    """All rules. A certificate has the roles of every rule that fits one of its names."""

    rules: tuple[Rule, ...]

    def allows(self, names: Sequence[str], needed: frozenset[Role]) -> bool:
        """Whether a certificate with these names may do what any of the roles `needed` may."""
        return any(_INCLUDED[role] & needed for rule in self.rules if rule.fits(names) for role in rule.roles)

    def is_node(self, names: Sequence[str], node: str) -> bool:
        """Whether a certificate with these names stands for a node."""
        for rule in self.rules:
            if not rule.roles & {Role.AGENT, Role.ADMIN} or not rule.fits(names):
                continue
            if any(fnmatch.fnmatchcase(node, pattern) for pattern in rule.nodes):
                return True
            if not rule.nodes and any(node in (name, name.partition(".")[0]) for name in names):
                return True
        return False


def decode(document: Any) -> Roles:
    """The rules of a parsed file: ``roles: [{certificate: PATTERN, role: ROLE or [ROLE, …], nodes: […]}]``.

    Raises `InvalidArgument` that names the field.
    """
    if not isinstance(document, dict) or set(document) != {"roles"}:
        raise errors.InvalidArgument("roles: a mapping with the one key 'roles' is needed", field="roles")
    found = document["roles"]
    if not isinstance(found, list) or not 1 <= len(found) <= RULES_MAX:
        raise errors.InvalidArgument(f"roles: a list of 1 to {RULES_MAX} rules is needed", field="roles")
    return Roles(tuple(_rule(each, f"roles[{number}]") for number, each in enumerate(found)))


def _rule(document: Any, field: str) -> Rule:
    if not isinstance(document, dict):
        raise errors.InvalidArgument(f"{field}: a mapping is needed", field=field)
    unknown = sorted(str(key) for key in document if key not in ("certificate", "role", "nodes"))
    if unknown:
        raise errors.InvalidArgument(
            f"{field}.{unknown[0]}: unknown; known are certificate, role and nodes",
            field=f"{field}.{unknown[0]}",
        )
    given = document.get("role")
    roles = frozenset(
        _role(name, f"{field}.role") for name in (given if isinstance(given, list) and given else [given])
    )
    given_nodes = document.get("nodes", [])
    if not isinstance(given_nodes, list):
        raise errors.InvalidArgument(f"{field}.nodes: a list of patterns is needed", field=f"{field}.nodes")
    if given_nodes and not roles & {Role.AGENT, Role.ADMIN}:
        raise errors.InvalidArgument(f"{field}.nodes: only with the role agent", field=f"{field}.nodes")
    nodes = tuple(_pattern(each, f"{field}.nodes[{number}]") for number, each in enumerate(given_nodes))
    return Rule(_pattern(document.get("certificate"), f"{field}.certificate"), roles, nodes)


def _role(given: Any, field: str) -> Role:
    try:
        return Role(given)
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise errors.InvalidArgument(f"{field}: {given!r} is none of {known}", field=field) from None


def _pattern(given: Any, field: str) -> str:
    if not isinstance(given, str) or not 1 <= len(given) <= PATTERN_LENGTH_MAX:
        raise errors.InvalidArgument(
            f"{field}: a pattern of 1 to {PATTERN_LENGTH_MAX} characters is needed", field=field
        )
    return given
