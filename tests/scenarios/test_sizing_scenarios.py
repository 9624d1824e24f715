"""Runs `sizing_*.txt`: commands, a line of dashes, and what they come to.

`pytest tests/scenarios --rewrite` writes the present outcome into the files. A sample is taken each second, one
worker a second is started. Commands, which act on the host that those before them in the file have left (all
amounts are GB, or MB where they end with M):

    host TOTAL others=GB [reserve=GB] [hysteresis=GB] [interval=SECONDS] [formula=literal] [stops=SECONDS]
    pool NAME [min=N] [max=N] [limit=GB] [threshold=GB] [priority=N] [paused]     declares it, or anew
    workers use=GB [ramp=SECONDS]                what each comes to hold, and how long that takes
    others GB                                    what the system and other programs take, from now on
    depth NAME N | depth NAME unknown            what waits
    pressure SOME FULL [reclaim]                 PSI, percent
    pass SECONDS                                 prints what was decided meanwhile, with the reasons
    scale NAME N [hold=SECONDS]                  by hand, as are: auto NAME, pause [NAME], resume [NAME],
                                                 stop NAME, start NAME, drain, undrain
    restart                                      another agent goes on by what this one has saved
    status                                       a line for each pool
    why NAME                                     the reasons now
"""

import pathlib

import pytest
import sizing_host
from leasehold.core import errors
from leasehold.core.node import governor, governor_effects, model, saved_modes, settings

FOLDER = pathlib.Path(__file__).parent
DASHES = "----"


def amount(text: str) -> int:
    return round(float(text.removesuffix("M")) * (model.MIB if text.endswith("M") else model.GIB))


def options(words: list[str]) -> dict[str, str]:
    return dict(word.split("=") for word in words if "=" in word)


class World:
    """The host that a scenario's commands act on."""

    def __init__(self) -> None:
        self.specs: dict[str, model.PoolSpec] = {}
        self.settings = settings.HostSettings()
        self.host = sizing_host.Host([])
        self.saved: saved_modes.SavedModes | None = None

    def run(self, commands: list[str]) -> str:
        return "\n".join(line for command in commands for line in self.apply(*command.split()))

    def apply(self, command: str, *words: str) -> list[str]:
        """What a command comes to, in lines."""
        named = options(list(words))
        plain = [word for word in words if "=" not in word]
        try:
            return [*self.change(command, plain, named), *self.told()]
        except errors.LeaseholdError as error:
            return [f"refused ({type(error).__name__}): {error.message}"]

    def change(self, command: str, plain: list[str], named: dict[str, str]) -> list[str]:
        if command == "host":
            self.begin(plain[0], named)
        elif command == "pool":
            self.declare(plain[0], "paused" in plain, named)
        elif command == "workers":
            self.host.use_bytes, self.host.ramp_seconds = amount(named["use"]), float(named.get("ramp", 0))
        elif command == "others":
            self.host.other_bytes = amount(plain[0])
        elif command == "depth":
            known = plain[1] != "unknown"
            depth = model.Depth(ready=int(plain[1])) if known else model.Depth(error="no answer")
            self.host.governor.depths(self.host.now, {plain[0]: depth})
        elif command == "pressure":
            pages = 1000 if "reclaim" in plain else 0
            self.host.pressure = (float(plain[0]), float(plain[1]), pages)
        elif command == "pass":
            self.host.run(float(plain[0]))
        elif command == "status":
            return [f"{name}: {self.host.governor.view(self.host.now, name).summary}" for name in self.specs]
        elif command == "why":
            return [f"{plain[0]}: {each}" for each in self.host.governor.view(self.host.now, plain[0]).reasons]
        elif command == "restart":
            self.restart()
        else:
            self.order(command, plain, named)
        return []

    def begin(self, total: str, named: dict[str, str]) -> None:
        self.settings = settings.HostSettings(
            reserve_bytes=amount(named.get("reserve", "4")),
            formula=settings.Formula(named.get("formula", "managed")),
            check_interval_seconds=float(named.get("interval", 30)),
            hysteresis_bytes=amount(named.get("hysteresis", "1")),
        )
        self.host = sizing_host.Host(
            [],
            host=self.settings,
            total_bytes=amount(total),
            other_bytes=amount(named["others"]),
            stop_seconds=float(named.get("stops", 10)),
        )
        self.specs = {}

    def declare(self, name: str, is_paused: bool, named: dict[str, str]) -> None:
        self.specs[name] = model.PoolSpec(
            name=name,
            template="command",
            priority=int(named.get("priority", 0)),
            min_workers=int(named.get("min", 1)),
            max_workers=int(named.get("max", 6)),
            worker_limit_bytes=amount(named.get("limit", "4")),
            threshold_bytes=amount(named.get("threshold", "0")),
            is_auto_scaling=not is_paused,
        )
        self.host.names = set(self.specs)
        self.host.governor.reconfigure(self.host.now, self.settings, list(self.specs.values()))

    def order(self, command: str, plain: list[str], named: dict[str, str]) -> None:
        sizer, now = self.host.governor, self.host.now
        pool = plain[0] if plain else None
        if command == "scale":
            assert pool is not None
            hold = float(named["hold"]) if "hold" in named else None
            sizer.set_target(now, pool, int(plain[1]), hold_seconds=hold)
        elif command == "auto":
            assert pool is not None
            sizer.set_auto(now, pool)
        elif command in ("pause", "resume"):
            sizer.set_monitoring(now, pool, command == "resume")
        elif command in ("stop", "start"):
            sizer.set_stopped(now, pool, command == "stop")
        elif command in ("drain", "undrain"):
            sizer.set_draining(now, command == "drain")
        else:
            raise ValueError(f"no such command: {command}")

    def restart(self) -> None:
        saved = saved_modes.SavedModes.decode(self.saved.encode()) if self.saved is not None else None
        self.host.governor = governor.Governor(
            self.settings, list(self.specs.values()), now=self.host.now, saved=saved
        )

    def told(self) -> list[str]:
        """What was decided since the last command, with its reasons."""
        self.host.carry_out(may_start=False)
        lines = []
        for effect in self.host.effects:
            if isinstance(effect, governor_effects.Resize):
                made = effect.decision
                urgent = ", urgent" if effect.is_urgent else ""
                lines.append(
                    f"{made.at_seconds:.0f} s  {made.pool}: {made.before} -> {made.after} "
                    f"({made.trigger}{urgent})"
                )
                lines += [f"    {reason}" for reason in made.reasons]
            elif isinstance(effect, governor_effects.SaveModes):
                self.saved = effect.modes
            elif isinstance(effect, governor_effects.SampleFaster):
                lines.append(f"sampled each {effect.interval_seconds:g} s from now on")
            else:
                lines.append(f"{type(effect).__name__} {effect.worker}: {effect.reason}")
        self.host.effects.clear()
        return lines


def replayed(text: str) -> str:
    """The scenario with each block's outcome as it is now."""
    world = World()
    blocks = []
    for block in text.strip().split("\n\n"):
        commands = block.split(f"\n{DASHES}")[0]
        runnable = [line for line in commands.splitlines() if not line.startswith("#")]
        blocks.append(f"{commands}\n{DASHES}\n{world.run(runnable)}".rstrip() if runnable else commands)
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("sizing_*.txt")), ids=lambda path: path.stem)
def test_scenario_comes_to_what_its_file_says(path: pathlib.Path, pytestconfig: pytest.Config) -> None:
    text = path.read_text()

    outcome = replayed(text)

    if pytestconfig.getoption("--rewrite", default=False):
        path.write_text(outcome)
    else:
        assert outcome == text


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("sizing_*.txt"))) >= 5
