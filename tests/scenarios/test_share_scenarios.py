"""Runs `shares_*.txt`: commands, a line of dashes, and what they come to.

`pytest tests/scenarios --rewrite` writes the present outcome into the files. Commands, which act on the state
that those before them in the file have left:

    budget POLICY [expected=N] [scaling=off]     start again: this policy, no limit, no holder
    limit DIMENSION UNITS [whole]                `whole`: dealt in whole units
    holder NAME [idle] [weight=W] [priority=P] [demand:DIMENSION=UNITS]… [need:DIMENSION=UNITS]…
    leave NAME
    divide                                       a table of the shares
    why                                          the reasons
    turn                                         a table; those served then go to the back of the queue
    rotate                                       a table; then the next get what does not divide evenly
    plan                                         the JSON up to the dashes through the dry run
"""

import json
import pathlib
from dataclasses import dataclass, field, replace

import pytest
from leasehold.core import errors
from leasehold.core.budget import model, plan, quantity, shares

FOLDER = pathlib.Path(__file__).parent
DASHES = "----"


def micros(units: str) -> int:
    return quantity.to_micros(float(units), field="scenario")


def amounts(words: list[str], prefix: str) -> dict[str, int]:
    pairs = (word.removeprefix(prefix).split("=") for word in words if word.startswith(prefix))
    return {dimension: micros(units) for dimension, units in pairs}


def settings(words: list[str]) -> dict[str, str]:
    return dict(word.split("=") for word in words if "=" in word and ":" not in word)


@dataclass
class World:
    """The state that a scenario's commands act on."""

    policy: model.Policy = model.Policy.ACTIVE_SHARE
    expected_workers: int = 4
    scaling_enabled: bool = True
    limits: dict[str, int] = field(default_factory=dict)
    quanta: dict[str, int] = field(default_factory=dict)
    holders: dict[str, shares.Claim] = field(default_factory=dict)
    turns: int = 0
    rotation: int = 0

    def run(self, commands: list[str]) -> str:
        if commands[0] == "plan":
            return rehearsed("\n".join(commands[1:]))
        outputs = (self.apply(*command.split()) for command in commands)
        return "\n".join(output for output in outputs if output)

    def apply(self, command: str, *words: str) -> str:
        arguments = list(words)
        if command == "budget":
            options = settings(arguments)
            self.__init__(  # type: ignore[misc]
                model.Policy(arguments[0]), int(options.get("expected", 4)), options.get("scaling") != "off"
            )
        elif command == "limit":
            self.limits[words[0]] = micros(words[1])
            self.quanta[words[0]] = quantity.MICRO if "whole" in words else 1
        elif command == "holder":
            self.add(words[0], arguments[1:])
        elif command == "leave":
            del self.holders[words[0]]
        elif command == "divide":
            return self.table(self.divide())
        elif command == "why":
            return self.why(self.divide())
        elif command == "turn":
            return self.turn()
        elif command == "rotate":
            division = self.divide()
            self.rotation += 1
            return self.table(division)
        else:
            raise ValueError(f"no such command: {command}")
        return ""

    def add(self, name: str, words: list[str]) -> None:
        options = settings(words)
        self.holders[name] = shares.Claim(
            name,
            is_active="idle" not in words,
            weight=float(options.get("weight", 1)),
            priority=int(options.get("priority", 0)),
            demand=amounts(words, "demand:"),
            need=amounts(words, "need:"),
            last_served=self.turns,
        )

    def divide(self) -> shares.Division:
        rules = shares.Rules(
            self.policy, self.limits, self.quanta, self.expected_workers, self.scaling_enabled, self.rotation
        )
        return shares.divide(rules, list(self.holders.values()))

    def turn(self) -> str:
        division = self.divide()
        self.turns += 1
        for name in self.holders.keys() - division.waiting:
            self.holders[name] = replace(self.holders[name], last_served=self.turns)
        return self.table(division)

    def table(self, division: shares.Division) -> str:
        rows = [["", *self.limits]]
        for name, claim in self.holders.items():
            state = "waits" if name in division.waiting else "active" if claim.is_active else "idle"
            rows.append([f"{name} {state}", *map(quantity.text, division.targets[name])])
        totals = map(sum, zip(*division.targets.values(), strict=True))
        rows.append(["together", *map(quantity.text, totals)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
        )

    def why(self, division: shares.Division) -> str:
        lines = []
        for name in self.holders:
            lines.append(name)
            lines += [f"  {dimension}: {division.reason(name, dimension)}" for dimension in self.limits]
        return "\n".join(lines)


def rehearsed(text: str) -> str:
    try:
        outcome = plan.run(plan.parse(json.loads(text)))
    except errors.InvalidArgument as error:
        return f"refused: {error.message}"
    lines = [f"grants {name}: {json.dumps(grant)}" for name, grant in outcome["grants"].items()]
    return "\n".join(
        lines + [f"reasons {name}: {json.dumps(texts)}" for name, texts in outcome["reasons"].items()]
    )


def replayed(text: str) -> str:
    """The scenario with each block's outcome as it is now."""
    world = World()
    blocks = []
    for block in text.strip().split("\n\n"):
        commands = block.split(f"\n{DASHES}")[0]
        runnable = [line for line in commands.splitlines() if not line.startswith("#")]
        blocks.append(f"{commands}\n{DASHES}\n{world.run(runnable)}".rstrip() if runnable else commands)
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("shares_*.txt")), ids=lambda path: path.stem)
def test_scenario_comes_to_what_its_file_says(path: pathlib.Path, pytestconfig: pytest.Config) -> None:
    text = path.read_text()

    outcome = replayed(text)

    if pytestconfig.getoption("--rewrite", default=False):
        path.write_text(outcome)
    else:
        assert outcome == text


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("shares_*.txt"))) >= 6
