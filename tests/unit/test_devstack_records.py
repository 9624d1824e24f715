"""The list of started processes, the identity of one, and the lock of a data folder."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from leasehold.core import errors
from leasehold.devstack import identity, owner, records

SERVER = records.Record("etcd", identity.Identity("boot", 10, 100), ("etcd", "--name=a b"), signal.SIGTERM)
OTHER = records.Record("postgres", identity.Identity("boot", 11, 101), ("postgres",), signal.SIGINT)


def this_process() -> identity.Identity:
    found = identity.of(os.getpid())
    assert found is not None
    return found


def test_records_are_read_back_in_the_order_they_were_added(tmp_path: Path) -> None:
    book = records.Records(tmp_path)
    book.add(SERVER)
    book.add(OTHER)

    assert records.Records(tmp_path).read() == [SERVER, OTHER]


def test_removing_forgets_one_process_and_an_unknown_one_is_no_error(tmp_path: Path) -> None:
    book = records.Records(tmp_path)
    book.add(SERVER)
    book.add(OTHER)
    book.remove(SERVER.identity)
    book.remove(SERVER.identity)

    assert book.read() == [OTHER]


def test_a_folder_without_a_list_has_no_records(tmp_path: Path) -> None:
    assert records.Records(tmp_path).read() == []


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 2, "processes": []}', '{"version": 1, "processes": [{}]}']
)
def test_a_damaged_list_is_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / records.FILE_NAME
    path.write_text(content)

    with pytest.raises(errors.FailedPrecondition, match=str(path)):
        records.Records(tmp_path).read()


def test_this_process_has_an_identity_and_is_alive() -> None:
    assert this_process().pid == os.getpid()
    assert identity.is_alive(this_process())


@pytest.mark.parametrize("change", [{"start_time_ticks": 1}, {"boot_id": "an earlier boot"}])
def test_a_record_of_an_earlier_process_with_our_pid_is_not_alive(change: dict[str, int | str]) -> None:
    earlier = dataclasses.replace(this_process(), **change)  # type: ignore[arg-type]

    assert not identity.is_alive(earlier)
    assert not identity.send(earlier, signal.SIGKILL)  # or this test would end here
    assert identity.wait(earlier, timeout_seconds=0)


def test_recording_a_process_notes_its_command_and_signal(tmp_path: Path) -> None:
    recorded = records.record_process(tmp_path, "allocator", os.getpid(), stop_signal=signal.SIGINT)

    (record,) = records.Records(tmp_path).read()
    assert record.identity == recorded == this_process()
    assert record.stop_signal is signal.SIGINT
    assert list(record.command) == psutil.Process().cmdline()


def test_a_taken_folder_is_refused_and_tells_the_owners_pid(tmp_path: Path) -> None:
    with owner.Owner(tmp_path), pytest.raises(errors.FailedPrecondition) as refusal:
        owner.Owner(tmp_path).acquire()

    assert f"already running, PID {os.getpid()}" in refusal.value.message
    assert refusal.value.metadata == {"pid": str(os.getpid())}


def test_a_folder_that_was_given_up_can_be_taken_again(tmp_path: Path) -> None:
    with owner.Owner(tmp_path):
        assert owner.find(tmp_path) == this_process()

    assert owner.find(tmp_path) is None
    with owner.Owner(tmp_path):
        assert owner.find(tmp_path) == this_process()


def test_a_folder_whose_owner_is_gone_has_none(tmp_path: Path) -> None:
    gone = dataclasses.asdict(this_process()) | {"start_time_ticks": 1}
    (tmp_path / owner.FILE_NAME).write_text(json.dumps(gone))

    assert owner.find(tmp_path) is None
    assert owner.stop(tmp_path, grace_seconds=0) is None


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(errors.FailedPrecondition, match=str(tmp_path / "file" / "stack")):
        owner.Owner(tmp_path / "file" / "stack").acquire()
