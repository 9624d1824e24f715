"""Several blocking calls with one outcome."""

import threading

import pytest
from leasehold.core import errors
from leasehold.devstack import parallel


def test_the_first_error_cancels_the_others_and_is_the_one_raised() -> None:
    ended: list[str] = []

    def fails(_: threading.Event) -> None:
        raise errors.Unavailable("no server")

    def waits(cancel: threading.Event) -> None:
        cancel.wait()
        ended.append("waits")
        raise errors.DeadlineExceeded("given up")

    with pytest.raises(errors.Unavailable, match="no server"):
        parallel.run_cancellable([waits, fails])
    assert ended == ["waits"]


def test_all_are_run_to_their_end_before_an_error_is_raised() -> None:
    ran: list[int] = []

    def fails() -> None:
        raise errors.Unavailable("no server")

    with pytest.raises(errors.Unavailable):
        parallel.run([fails, lambda: ran.append(1), lambda: ran.append(2)])
    assert sorted(ran) == [1, 2]


def test_nothing_to_run_is_no_error() -> None:
    parallel.run([])
    parallel.run_cancellable([])
