import os
from pathlib import Path
from typing import Any

import pytest
from leasehold.core import errors
from leasehold.core.node import model
from leasehold.nodeagent import documents, templates

FACTS = {
    "worker": "asr_1@host",
    "pool_name": "asr",
    "node": "host",
    "log_file": "/s/asr_1.log",
    "interpreter": "/usr/bin/python",
}


def template(**parts: Any) -> templates.Template:
    document = {
        "argv": ["{python}", "--level={level}", "-n", "{worker}", "--note={note}", "{extra}"],
        "parameters": {
            "python": {"pattern": "/[a-z/]+", "default": "{interpreter}"},
            "level": {"pattern": "debug|info", "default": "info"},
            "limit": {"pattern": "[0-9]+", "default": "3600"},
            "note": {"pattern": "[a-z]*", "default": ""},
            "app": {"pattern": "[a-z.]+"},
            "extra": {"pattern": "--[a-z]+", "is_list": True, "default": ""},
            "signal": {"pattern": "[A-Z]+", "default": "INT"},
        },
        **parts,
    }
    return templates.read_template("t", documents.Section(document, "templates.t"))


def argv(made: templates.Template, given: dict[str, Any]) -> list[str]:
    return templates.fill_argv(made.argv, made.known(made.values(given, "pools[0].parameters"), FACTS))


def test_a_command_is_a_list_with_parameters_and_facts_filled_in() -> None:
    given = {"app": "a.b", "extra": ["--once", "--fast"], "note": "x"}

    assert argv(template(), given) == [
        *("/usr/bin/python", "--level=info", "-n", "asr_1@host", "--note=x", "--once", "--fast")
    ]


def test_a_list_may_be_one_text_in_words_and_what_names_an_empty_value_is_left_out() -> None:
    given = {"app": "a.b", "extra": "--once '--fast'"}

    assert argv(template(), given) == [
        *("/usr/bin/python", "--level=info", "-n", "asr_1@host", "--once", "--fast")
    ]
    assert argv(template(), {"app": "a"}) == ["/usr/bin/python", "--level=info", "-n", "asr_1@host"]


def test_a_value_that_looks_like_shell_stays_one_argument() -> None:
    given = {"program": "echo", "arguments": ["$(id); {pool} 'x' &", "{{"]}

    assert argv(templates.builtin()["command"], given) == ["echo", "$(id); {pool} 'x' &", "{{"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "p.app: is missing: template 't' needs it"),
        ({"app": "a b"}, "p.app: 'a b' does not match '[a-z.]+'"),
        ({"app": "a\n"}, r"p.app: 'a\n' does not match '[a-z.]+'"),
        ({"app": ["a"]}, "p.app: ['a'] is not a text"),
        ({"app": "a", "levle": "info"}, "p.levle: there is no such setting; did you mean 'level'?"),
        ({"app": "a", "extra": "--once 'x"}, "p.extra: cannot be split into words: No closing quotation"),
        ({"app": "a", "extra": 5}, "p.extra: 5 is not a list of texts"),
        ({"app": "a", "extra": ["--once", "-c"]}, "p.extra: '-c' does not match '--[a-z]+'"),
        ({"app": "a", "level": True}, "p.level: 'true' does not match 'debug|info'"),
    ],
)
def test_a_parameter_that_does_not_fit_is_told_by_its_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        template().values(given, "p")

    assert raised.value.message == told


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"argv": []}, "templates.t.argv: [] is not a list of texts"),
        ({"argv": "prog --x"}, "templates.t.argv: 'prog --x' is not a list of texts"),
        ({"argv": ["{nobody}"]}, "templates.t.argv[0]: {nobody} is no parameter of this template"),
        ({"argv": ["x{extra}"]}, "templates.t.argv[0]: {extra} is a list: it stands alone in an item of argv"),
        ({"cwd": "{extra}"}, "templates.t.cwd: {extra} is a list"),
        (
            {"preflight": [{"kind": "guess"}]},
            "templates.t.preflight[0].kind: 'guess' is none of broker, database",
        ),
        ({"log": {"reopens_on": "NOPE"}}, "templates.t.log.reopens_on: there is no signal 'NOPE'"),
        ({"argv": ["a{b"]}, "templates.t.argv[0]: a single { (write it twice to mean it)"),
        ({"parameters": {"a": {"pattern": "("}}}, "templates.t.parameters.a.pattern: is no regular expression"),
        ({"parameters": {"node": {"pattern": "x"}}}, "templates.t.parameters.node: is not a name for a"),
        (
            {"parameters": {"a": {"pattern": "x", "default": "y"}}, "argv": ["p"]},
            "templates.t.parameters.a.default: 'y' does not match",
        ),
        ({"stop": {"steps": []}}, "templates.t.stop.steps: at least one is needed"),
        (
            {"stop": {"steps": [{"signal": "NOPE", "wait_seconds": 1}]}},
            "templates.t.stop.steps[0].signal: there is no signal 'NOPE'",
        ),
        (
            {"stop": {"steps": [{"signal": "TERM", "wait_seconds": -1}]}},
            "templates.t.stop.steps[0].wait_seconds: -1 is not a number of 0 to 604800",
        ),
        (
            {"stop": {"steps": [{"signal": "TERM", "wait_seconds": "{x} + 1"}]}},
            "templates.t.stop.steps[0].wait_seconds: '{x} + 1' is neither a number",
        ),
        (
            {"stop": {"steps": [{"signal": "TERM", "wait_seconds": 1}], "immediate_step": 1}},
            "templates.t.stop.immediate_step: 1 is not a whole number of 0 to 0",
        ),
        ({"restart": {"initial_seconds": 9, "max_seconds": 3}}, "restart.max_seconds: 3 is below"),
        ({"restart": {"permanent_exit_codes": [0]}}, "permanent_exit_codes: is not a list of exit codes"),
        ({"shell": True}, "templates.t.shell: there is no such setting"),
    ],
)
def test_a_template_that_is_wrong_is_told_by_its_place(parts: dict[str, Any], told: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        template(**parts)

    assert told in raised.value.message


def test_times_of_a_stop_contract_follow_a_parameter() -> None:
    steps = [
        {"signal": "SIGTERM", "wait_seconds": "{limit} + 30"},
        {"signal": "{signal}", "wait_seconds": "{limit}"},
        {"signal": "QUIT", "wait_seconds": 40, "scope": "group"},
    ]
    made = template(stop={"steps": steps, "immediate_step": 1, "visibility_timeout_seconds": "{limit} + 900"})

    contract = templates.contract(made.stop, made.values({"app": "a", "limit": 7200}, "p"))

    assert contract == model.StopContract(
        steps=(
            model.StopStep(signal="TERM", wait_seconds=7230.0),
            model.StopStep(signal="INT", wait_seconds=7200.0),
            model.StopStep(signal="QUIT", wait_seconds=40.0, scope=model.SignalScope.GROUP),
        ),
        immediate_step=1,
        visibility_timeout_seconds=8100.0,
    )
    assert templates.contract(None, {}) is model.PLAIN_STOP


def test_a_default_that_is_a_fact_must_match_too() -> None:
    made = template(
        parameters={"python": {"pattern": "/[a-z]+", "default": "{interpreter}"}}, argv=["{python}"]
    )

    with pytest.raises(errors.InvalidArgument, match="python: '/usr/bin/python' does not match"):
        argv(made, {})


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o622])
def test_a_file_that_others_can_write_is_refused_with_advice(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text("pools: []")
    path.chmod(mode)

    with pytest.raises(errors.InvalidArgument, match=rf"--config: {path} can be written .*; chmod go-w {path}"):
        templates.read_private(path, setting="--config")

    path.chmod(0o644)
    assert templates.read_private(path, setting="--config") == "pools: []"


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text("")
    if path.stat().st_uid == 0:
        os.chown(path, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)

    with pytest.raises(errors.InvalidArgument, match="neither to root nor to this user"):
        templates.read_private(path, setting="--config")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"--config: {tmp_path}/x: No such file or directory"):
        templates.read_private(tmp_path / "x", setting="--config")


def test_every_built_in_template_is_sound() -> None:
    assert set(templates.builtin()) == {"celery", "command"}
    celery = templates.builtin()["celery"]
    contract = templates.contract(celery.stop, celery.values({"app": "a", "queues": "q"}, "p"))
    assert contract.deadline_seconds() == 3_630.0 + 20.0
    assert contract.deadline_seconds(is_immediate=True) == 20.0
