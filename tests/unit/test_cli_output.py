"""What people see: columns, numbers, and how tables behave on a terminal and off it."""

import io

import pytest
from leasehold.api.budget.v1 import budget_pb2
from leasehold.api.budget.v1 import budget_service_pb2 as wire
from leasehold.cli import documents, output, tables
from leasehold.core import errors
from leasehold.rpc import budget_documents


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard output a terminal of 40 columns. Not a fixture: pytest captures each phase anew."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (40000.0, "40000"),
        (2.5, "2.5"),
        (1 / 3, "0.33"),
        (0.999, "1"),
        (1e9, "1000000000"),
    ],
)
def test_a_number_has_no_more_decimals_than_it_needs(amount: float | None, shown: str) -> None:
    assert output.number(amount) == shown


def test_columns_are_as_wide_as_their_cells_and_lines_end_with_the_last_one() -> None:
    text = output.grid(
        ["A", "LIMIT", "WHY"], [["x", "5", "short"], ["long-name", "40000", ""]], right=["LIMIT"]
    )

    assert text.splitlines() == [
        "A          LIMIT  WHY",
        "x              5  short",
        "long-name  40000",
    ]


def test_off_a_terminal_nothing_is_wrapped_or_coloured(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["A", "WHY"], [["x", "word " * 100]])

    out = capsys.readouterr().out
    assert out.count("\n") == 2
    assert "\x1b" not in out


def test_on_a_terminal_the_last_column_is_wrapped_under_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)

    output.table(["HOLDER", "WHY"], [["worker_1", "all of 800: the only active holder; held 800"]])

    assert terminal.getvalue().splitlines() == [
        "\x1b[1mHOLDER    WHY\x1b[0m",
        "worker_1  all of 800: the only active",
        "          holder; held 800",
    ]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")

    output.table(["HOLDER"], [])

    assert terminal.getvalue() == "HOLDER\n"


def test_a_cell_can_neither_break_its_row_nor_drive_the_terminal() -> None:
    assert output.grid(["A"], [["x\n\x1b[2J"]]) == "A\nx\\n\\x1b[2J"


def test_closed_outputs_are_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    output.say("nobody hears")
    assert capsys.readouterr().out == ""

    monkeypatch.setattr("sys.stdout", None)
    output.table(["A"], [["x"]])
    assert not output.is_terminal()


def test_a_failure_names_its_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    output.fail(errors.InvalidArgument("is not a number", field="limits.rpm_limit"))
    output.fail(errors.InvalidArgument("ttl_seconds: is too long", field="ttl_seconds"))

    assert capsys.readouterr().err == (
        "leasehold: limits.rpm_limit: is not a number\nleasehold: ttl_seconds: is too long\n"
    )


def test_status_has_the_four_dimensions_always_and_the_users_own_after_them() -> None:
    amounts = wire.WorkerAllocation(amounts={"zebras": 4.0, "rpm_limit": 200.0, "apples": 1.0})
    answer = wire.GetBudgetStatusResponse(
        total_workers=1,
        base_allocation=amounts,
        current_allocation=amounts,
        utilization_ratio=wire.WorkerAllocation(amounts={"zebras": 1.0, "rpm_limit": 1.0, "apples": 1.0}),
    )

    document = budget_documents.status(answer)

    assert list(document) == [
        "worker_id",
        "total_workers",
        "active_workers",
        "active_worker_ids",
        "is_scaling_enabled",
        "base_allocation",
        "current_allocation",
        "utilization_ratio",
    ]
    assert document["worker_id"] is None
    assert list(document["base_allocation"].items()) == [
        ("max_concurrent_requests", None),
        ("rpm_limit", 200.0),
        ("tpm_limit", None),
        ("num_workers", None),
        ("apples", 1.0),
        ("zebras", 4.0),
    ]
    assert list(document["utilization_ratio"]) == ["concurrent", "rpm", "tpm", "workers", "apples", "zebras"]


def test_status_of_many_active_workers_counts_those_it_does_not_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = wire.GetBudgetStatusResponse(
        worker_id="w0", total_workers=9, active_worker_ids=[f"w{n}" for n in range(8)], active_workers=8
    )

    tables.status(budget_documents.status(answer))

    assert capsys.readouterr().out.splitlines()[:3] == [
        "worker   w0",
        "workers  9 registered, 8 active: w0, w1, w2, w3, w4 and 3 more",
        "scaling  off: everyone stays at its base",
    ]


def test_a_message_keeps_the_order_of_its_fields_and_of_dimensions() -> None:
    answer = wire.WatchBudgetResponse(
        budget="b",
        limits_in_force={"zebras": 1, "tpm_limit": 2, "rpm_limit": 3},
        holders=[wire.HolderView(holder="w", amounts={"tpm_limit": 1, "rpm_limit": 2})],
    )

    document = documents.message(answer)

    assert list(document) == ["budget", "limits_in_force", "pool", "holders"]
    assert list(document["limits_in_force"]) == ["rpm_limit", "tpm_limit", "zebras"]
    assert list(document["holders"][0]["amounts"]) == ["rpm_limit", "tpm_limit"]
    assert list(document["holders"][0])[:3] == ["holder", "state", "is_active"]


def test_a_watched_state_tells_what_still_counts_and_what_was_used_beyond_the_reserve() -> None:
    answer = wire.WatchBudgetResponse(
        budget="llm-api",
        limits_in_force={"rpm_limit": 800, "images": 10},
        pool={"rpm_limit": 0, "images": 6},
        holders=[
            wire.HolderView(
                holder="a",
                state=wire.HOLDER_STATE_LIVE,
                is_active=True,
                amounts={"rpm_limit": 400, "images": 4},
                bound={"rpm_limit": 800, "images": 4},
                overdraft_total={"rpm_limit": 0, "images": 2.5},
            )
        ],
    )

    assert tables.state(answer).splitlines() == [
        "llm-api, 00:00:00.000 UTC; a/b: has a, and b counts against the limit",
        "HOLDER   STATE  ACTIVE      RPM  images",
        "a        live   yes     400/800       4",
        "(free)                        0       6",
        "(limit)                     800      10",
        "a has used more than it reserved: images 2.5",
    ]


def test_a_list_of_budgets_fits_80_columns_and_tells_unusual_windows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dimension(name: str, limit: float, window_seconds: int = 0) -> budget_pb2.Dimension:
        message = budget_pb2.Dimension(name=name, limit=limit)
        if window_seconds:
            message.window.FromSeconds(window_seconds)
        return message

    usual = [
        ("max_concurrent_requests", 40, 0),
        ("rpm_limit", 800, 60),
        ("tpm_limit", 40000, 60),
        ("num_workers", 40, 0),
    ]
    tables.budgets(
        [
            budget_pb2.Budget(name="llm-api", version=1, dimensions=[dimension(*each) for each in usual]),
            budget_pb2.Budget(name="slow", version=12, dimensions=[dimension("rpm_limit", 5, 300)]),
        ]
    )

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines] == [
        ["NAME", "POLICY", "EXPECTED", "VERSION", "CONCURRENT", "RPM", "TPM", "WORKERS"],
        ["llm-api", "active_share", "0", "1", "40", "800", "40000", "40"],
        ["slow", "active_share", "0", "12", "-", "5/300", "s", "-", "-"],
    ]
