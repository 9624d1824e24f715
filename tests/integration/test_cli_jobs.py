"""`leasehold job`, `doctor` and `node utilization` against a made-up JobService behind a real gRPC server."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fake_jobs
import pytest
from leasehold.api.job.v1 import job_service_pb2 as wire
from leasehold.cli import main
from leasehold.core import errors

LINE = '{"template": "encode", "cpus": 2, "memory": "4GB"}\n'
SUBMIT = ["job", "submit", "encode", "--cpus", "2", "--memory", "4GB"]


class Scene:
    """A service that is served, and commands against it within this process."""

    def __init__(self, fake: fake_jobs.FakeJobs, addr: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.fake, self.addr = fake, addr
        self._capsys = capsys

    def ask(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self._capsys.readouterr()
        code = main.run([*arguments, "--addr", self.addr])
        return code, *self._capsys.readouterr()

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ask(*arguments, "-o", "json")[1])

    def submit(self, *arguments: str) -> str:
        code, out, err = self.ask(*SUBMIT, "--detach", "-o", "name", *arguments)
        assert (code, err) == (0, "")
        return out.strip()

    def while_asking(self, change: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        """The same, while `change` runs on another thread."""
        thread = threading.Thread(target=change)
        thread.start()
        try:
            return self.ask(*arguments)
        finally:
            thread.join()


@pytest.fixture
def scene(capsys: pytest.CaptureFixture[str]) -> Iterator[Scene]:
    fake = fake_jobs.FakeJobs()
    with fake_jobs.serve(fake) as addr:
        yield Scene(fake, addr, capsys)


def test_submit_shows_what_happens_until_the_end(scene: Scene) -> None:
    scene.fake.is_placing = False

    def go_on() -> None:
        scene.fake.until(lambda: bool(scene.fake.asked(wire.ExplainJobRequest)))
        scene.fake.move(scene.fake.only(), "RUNNING")
        scene.fake.until(lambda: bool(scene.fake.asked(wire.WatchJobRequest)))
        scene.fake.end(scene.fake.only())

    code, out, err = scene.while_asking(go_on, *SUBMIT)

    assert (code, err) == (0, "")
    told = [line.removeprefix(f"{scene.fake.only()} ") for line in out.splitlines()]
    assert told[:3] == [
        "submitted",
        "pending (3 of 12 in line): 2 nodes: 1 lacks 4 CPUs, 1 draining",
        "running on r620-1 (2 CPUs, 4 GB)",
    ]
    assert told[3].startswith("completed after ")


def test_a_job_that_fails_shows_the_end_of_its_log_and_is_1(scene: Scene) -> None:
    def fail() -> None:
        scene.fake.until(lambda: bool(scene.fake.asked(wire.WatchJobRequest)))
        scene.fake.end(scene.fake.only(), "FAILED", "FAILED", 3)

    code, out, err = scene.while_asking(fail, *SUBMIT)

    assert code == 1
    assert "failed: failed with 3 after " in out
    assert err == "  | one\n  | two\n"


def test_a_job_that_its_host_refuses_says_why_and_has_no_log(scene: Scene) -> None:
    def refuse() -> None:
        scene.fake.until(lambda: bool(scene.fake.asked(wire.WatchJobRequest)))
        scene.fake.end(scene.fake.only(), "FAILED", "REFUSED", 0)

    code, out, err = scene.while_asking(refuse, *SUBMIT)

    assert code == 1
    assert "failed: refused" in out
    assert err == ""


def test_a_job_that_is_not_placed_in_time_is_cancelled_and_2(scene: Scene) -> None:
    scene.fake.is_placing = False
    code, _, err = scene.ask(*SUBMIT, "--place-within", "100ms")

    assert code == 2
    assert "had no node within 0.1 s, and is cancelled: pending (3 of 12 in line)" in err
    assert scene.ask("job", "wait", scene.fake.only())[0] == 2


def test_what_no_node_could_hold_is_told_at_once_and_is_1(scene: Scene) -> None:
    code, out, err = scene.ask("job", "submit", "encode", "--cpus", "64", "--memory", "4GB")

    assert (code, out) == (1, "")
    assert err == "leasehold: required_cpus: 64 is more than any node has (16)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "much"], "memory: 'much' is no amount of memory"),
        (["--memory", "1GB", "-p", "input"], "--param: 'input' is not KEY=VALUE"),
        (["--memory", "1GB", "--max-run", "soon"], "--max-run: 'soon' is no duration"),
        (["--memory", "1GB", "--queue", "none"], "there is no queue none"),
        (["--memory", "1GB", "--on-lost", "always"], "on_lost: one of never, after_proof, after_fence"),
    ],
)
def test_a_wrong_submit_names_the_field(scene: Scene, arguments: list[str], said: str) -> None:
    code, _, err = scene.ask("job", "submit", "encode", "--cpus", "1", *arguments)

    assert code == 1
    assert said in err


def test_a_batch_takes_the_right_lines_and_tells_the_others_by_number(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = LINE + "{\n" + '{"cpus": 1}\n' + "\n" + LINE.replace("2", "64") + LINE
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, err = scene.ask("job", "batch", "-")

    assert code == 1
    assert out == "2 submitted, 3 refused\n"
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["line 2", "line 3", "line 5"]
    assert len(scene.fake.jobs) == 2


def test_a_batch_takes_all_or_none(scene: Scene, tmp_path: Any) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(LINE + "{\n")
    code, out, err = scene.ask("job", "batch", str(file), "--all-or-none")
    assert (code, out) == (1, "0 submitted, 1 refused\n")
    assert "nothing is submitted: 1 of 2 lines are wrong" in err

    file.write_text(LINE * 3)
    code, out, _ = scene.ask("job", "batch", str(file), "--all-or-none", "-o", "json")
    assert code == 0
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 2, 3]
    assert [each.is_all_or_none for each in scene.fake.asked(wire.SubmitJobsRequest)] == [True]

    file.write_text(LINE * 1001)
    code, _, err = scene.ask("job", "batch", str(file), "--all-or-none")
    assert code == 1
    assert "at most 1000 jobs" in err
    assert len(scene.fake.jobs) == 3


def test_a_batch_of_many_chunks_goes_through_with_a_cut_in_it(scene: Scene, tmp_path: Any) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(LINE * 2500)
    scene.fake.cuts = [1]
    code, out, _ = scene.ask("job", "batch", str(file))

    assert (code, out) == (0, "2500 submitted, 0 refused\n")
    assert len(scene.fake.jobs) == 2500


def test_jobs_are_listed_shown_explained_and_cancelled(scene: Scene) -> None:
    scene.fake.is_placing = False
    waiting = scene.submit("--name", "night")
    scene.fake.is_placing = True
    running = scene.submit()

    assert [each["job_id"] for each in scene.json("job", "list")] == [running, waiting]
    assert [each["job_id"] for each in scene.json("job", "list", "--state", "pending")] == [waiting]
    assert scene.ask("job", "list", "-o", "name")[1] == f"{running}\n{waiting}\n"
    assert "night" in scene.ask("job", "list")[1]
    assert scene.json("job", "status", running)["allocation"]["node"] == fake_jobs.NODE
    assert "  state     running\n" in scene.ask("job", "status", running)[1]
    explained = scene.ask("job", "explain", waiting)[1]
    assert explained.startswith("pending (3 of 12 in line): 2 nodes: 1 lacks 4 CPUs, 1 draining\n")
    assert "when it starts cannot be told" in explained
    assert scene.json("job", "explain", waiting)["estimated_start_time"] is None
    assert scene.ask("job", "cancel", waiting, running)[1] == (
        f"job {waiting} has ended: cancelled\njob {running} is asked to end\n"
    )


def test_a_dry_run_keeps_nothing(scene: Scene) -> None:
    code, out, _ = scene.ask(*SUBMIT, "--dry-run")

    assert (code, scene.fake.jobs) == (0, {})
    assert "LACKS_CPUS" in out


def test_a_log_is_followed(scene: Scene) -> None:
    job = scene.submit()
    scene.fake.cuts_logs = 1

    assert scene.ask("job", "logs", "-f", job) == (0, "one\ntwo\n", "")


@pytest.mark.parametrize("command", ["status", "explain", "cancel", "logs", "wait"])
def test_a_job_id_that_is_none_is_refused(scene: Scene, command: str) -> None:
    code, _, err = scene.ask("job", command, "seven")

    assert code == 1
    assert "JOB: 'seven' is not a job id" in err


def test_a_forced_release_needs_a_word_and_a_cause(scene: Scene) -> None:
    job = scene.submit()

    assert scene.ask("job", "release", job)[0] == 1
    assert scene.ask("job", "release", job, "--force")[0] == 1
    code, out, _ = scene.ask("job", "release", job, "--force", "--cause", "the host burnt down")
    assert (code, out) == (0, f"job {job} attempt 1 is released; it is failed\n")
    (request,) = scene.fake.asked(wire.ForceReleaseAllocationRequest)
    assert (request.attempt, request.cause) == (1, "the host burnt down")


def test_queues_are_put_listed_and_deleted(scene: Scene) -> None:
    assert scene.ask("job", "queue", "put", "night", "--cpus", "8", "--memory", "64GB")[1] == (
        "queue night: at most 8 CPUs, 64 GB\n"
    )
    assert [each["nominal_cpus"] for each in scene.json("job", "queue", "list")] == [None, 8]
    assert scene.ask("job", "queue", "delete", "night")[0] == 0
    assert scene.ask("job", "queue", "delete", "default")[0] == 1


def test_utilization_is_told_of_each_node_and_of_all(scene: Scene) -> None:
    out = scene.ask("node", "utilization")[1].splitlines()

    assert out[1].split() == ["r620-1", "4/16", "25.0", "8", "GB/64", "GB", "12.5", "2", "yes"]
    assert out[2].split()[0] == "all"
    assert out[3] == "5 pending"


def test_reclaims_that_are_held_back_are_told_until_somebody_acknowledges(scene: Scene) -> None:
    assert scene.ask("node", "utilization")[2] == ""
    scene.fake.held_back_cause = "6 of 8 holders lapsed within 60 s"
    code, out, err = scene.ask("node", "utilization")
    assert code == 0 and out.splitlines()[3] == "5 pending"
    assert "nothing is given up for silence: 6 of 8 holders lapsed within 60 s" in err
    assert scene.json("node", "utilization")["held_back_cause"] == "6 of 8 holders lapsed within 60 s"

    code, _, err = scene.ask("job", "acknowledge-silence")
    assert (code, scene.fake.asked(wire.AcknowledgeSilenceRequest)) == (1, [])
    assert "--cause" in err
    told = scene.ask("job", "acknowledge-silence", "--cause", "the rack burnt down")
    assert told == (0, "acknowledged: 6 allocations are given up\n", "")
    (request,) = scene.fake.asked(wire.AcknowledgeSilenceRequest)
    assert request.cause == "the rack burnt down"
    again = scene.json("job", "acknowledge-silence", "--cause", "the rack burnt down")
    assert again == {"was_held_back": False, "given_up": 0}
    assert scene.ask("job", "acknowledge-silence", "--cause", "x")[1] == "no reclaims were held back\n"


def test_the_doctor_is_1_only_where_something_is_definite(scene: Scene) -> None:
    doubt = wire.AuditFinding(
        verdict="IN_FLIGHT", rule="ENDED_UNRELEASED", subject="job x", detail="a moment ago"
    )
    scene.fake.findings = [doubt]
    assert scene.ask("doctor")[0] == 0

    wrong = wire.AuditFinding(verdict="DEFINITE", rule="COUNTER_DIFFERS", subject="r620-1", detail="4, not 2")
    scene.fake.findings = [doubt, wrong]
    code, out, _ = scene.ask("doctor")
    assert code == 1
    assert "COUNTER_DIFFERS" in out
    assert "1 definite, 1 in flight or unknown" in out


def test_a_leader_that_lacks_postgres_is_3(scene: Scene) -> None:
    scene.fake.failure = errors.PostgresUnavailable("Postgres is away", retry_after_seconds=0.05)
    code, _, err = scene.ask(*SUBMIT, "--timeout", "0.3")

    assert code == 3
    assert "Postgres is away" in err
