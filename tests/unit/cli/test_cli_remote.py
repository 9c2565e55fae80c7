"""Commands that ask a server, from their arguments to their exit code, with a fake of the service."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from rlm_proto.v1 import run_pb2 as pb
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app as rlm
from orchestrator.errors import BudgetExceededError, NotFoundError, UnauthenticatedError
from orchestrator.ids import RunId
from orchestrator.trajectory import shorten
from tests.fakes.run_service import KEY, FakeRunService, served_in_a_thread
from tests.unit.cli.story import Story, unsafe_characters

EVIL = "\x1b]0;evil\x07\u202e\n"


@dataclass
class House:
    """The fake, and `rlm` as its user types it."""

    service: FakeRunService
    address: str
    context: Path
    environment: dict[str, str]

    def rlm(self, *words: object) -> Result:
        typed = [str(word) for word in (*words, "--server", self.address)]
        return CliRunner(env=self.environment).invoke(rlm, typed)

    def ask(self, *options: object) -> Result:
        return self.rlm("run", "why?", "--context", self.context, *options)

    def answers(self, answer: str = "42", *, turns: int = 1, ends: bool = True) -> None:
        """Each run that is created tells a story, with this answer."""

        def play(run: pb.Run) -> None:
            story = told(run.run_id, turns)
            if ends:
                story.end(run_id=RunId(run.run_id))
                self.service.end(run.run_id, answer=answer.encode())
            self.service.tell(run.run_id, *story.events)

        self.service.on_create = play


def told(run_id: str, turns: int = 1) -> Story:
    root, story = RunId(run_id), Story()
    story.start(root)
    for turn in range(1, turns + 1):
        story.turn(turn, run_id=root)
        story.cell_ends(turn, output="half an answer\n", run_id=root)
    return story


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    context = tmp_path / "context.txt"
    context.write_text("hi")
    with served_in_a_thread() as (service, address):
        yield House(service, address, context, {"RLM_API_KEY": KEY})


def only_run(house: House) -> pb.Run:
    (run,) = house.service.runs.values()
    return run


# --- rlm run --server ----------------------------------------------------------------------------------


def test_an_answer_from_a_server_is_printed_like_one_from_here(house: House) -> None:
    house.answers("forty-two")
    result = house.ask()
    assert (result.exit_code, result.stdout) == (0, "forty-two\n")
    assert f"rlm: run {only_run(house).run_id} on {house.address} is ended\n" in result.stderr
    assert "turn 1: cell ok after" in result.stderr
    assert "rlm: answered after 1 turn, " in result.stderr
    (context,) = house.service.contexts.values()
    assert context.name == "context.txt"


def test_json_of_a_server_has_the_keys_of_json_from_here(house: House) -> None:
    house.answers()
    shown = json.loads(house.ask("--json").stdout)
    documented = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text()
    assert set(shown) <= set(documented.replace("`", " ").split())
    assert (shown["outcome"], shown["answer"], shown["turns"]) == ("answered", "42", 1)
    assert shown["run_id"] == only_run(house).run_id


def test_the_events_file_has_every_event_also_of_a_kind_that_is_not_known_here(
    house: House, tmp_path: Path
) -> None:
    def play(run: pb.Run) -> None:
        house.service.tell(run.run_id, *told(run.run_id).events, {"v": 1, "kind": "of_tomorrow", "x": "\x7f"})
        house.service.end(run.run_id)

    house.service.on_create = play
    assert house.ask("--events", tmp_path / "events.jsonl").exit_code == 0
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines][::5] == ["run_started", "of_tomorrow"]
    assert (tmp_path / "events.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("outcome", "error"), [("budget_exhausted", "no tokens are left"), ("of_tomorrow", "never heard of")]
)
def test_a_run_without_an_answer_ends_with_1_and_says_why(house: House, outcome: str, error: str) -> None:
    def play(run: pb.Run) -> None:
        house.service.tell(run.run_id, *told(run.run_id).events)
        house.service.end(run.run_id, outcome, error=error)

    house.service.on_create = play
    result = house.ask("--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert (shown["answer"], shown["error"], shown["found_so_far"]) == (None, error, "half an answer\n")
    assert error in result.stderr


def test_only_what_was_typed_is_asked_for_and_the_rest_is_the_tenants_default(house: House) -> None:
    house.answers()
    assert house.ask().exit_code == 0
    assert not only_run(house).options.ListFields()
    house.service.runs.clear()
    typed = ("--model", "m", "--max-cost-usd", "0.5", "--max-depth", 0, "--dialect", "tools", "--memoise")
    assert (
        house.ask(*typed, "--deadline-s", "60", "--runtime", "runsc", "--allow-model", "a=b").exit_code == 0
    )
    assert {field.name: value for field, value in only_run(house).options.ListFields()} == {
        "model": "m",
        "max_cost_microusd": 500_000,
        "max_depth": 0,
        "dialect": "tools",
        "memoise": True,
        "deadline_s": 60.0,
        "runtime": "runsc",
        "allow_models": ["a=b"],
    }


@pytest.mark.parametrize(
    "options",
    [("--base-url", "http://x"), ("--price-input", "1", "--price-output", "1"), ("--window-tokens", "5000")],
)
def test_what_only_a_server_can_decide_is_refused(house: House, options: tuple[str, ...]) -> None:
    result = house.ask(*options)
    assert result.exit_code == 2
    assert "with --server that is the server's" in result.stderr
    assert not house.service.calls


def test_options_of_a_connection_go_with_a_server(house: House) -> None:
    typed = ["run", "why?", "--context", str(house.context), "--plaintext"]
    result = CliRunner().invoke(rlm, typed)
    assert result.exit_code == 2
    assert "it goes with --server" in result.stderr


def test_nothing_that_a_server_says_touches_the_terminal(house: House) -> None:
    def spoil(run: pb.Run) -> None:
        story = Story(model=EVIL)
        story.start(RunId(run.run_id), question=EVIL)
        story.turn(1, code=EVIL, run_id=RunId(run.run_id))
        house.service.tell(run.run_id, *story.events)
        house.service.end(run.run_id, answer=EVIL.encode())
        run.question, run.error, run.context_id, run.options.model = EVIL.encode(), EVIL, EVIL, EVIL

    house.service.on_create = spoil
    seen = [house.ask()]
    run_id = only_run(house).run_id
    house.service.contexts["c"] = pb.Context(context_id=EVIL, name=EVIL)
    seen += [
        house.rlm(*words)
        for words in (
            ("runs", "list"),
            ("runs", "show", run_id),
            ("runs", "show", run_id, "--json"),
            ("runs", "watch", run_id),
            ("runs", "cancel", run_id),
            ("contexts", "list"),
            ("contexts", "list", "--json"),
        )
    ]
    for result in seen:
        assert not list(unsafe_characters(result.stdout + result.stderr))
        assert "evil" in result.stdout + result.stderr


# --- Keys ----------------------------------------------------------------------------------------------


def test_a_key_comes_from_a_file_or_the_environment_and_the_file_goes_first(
    house: House, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert house.rlm("usage").exit_code == 0
    house.environment["RLM_API_KEY"] = "rlm_other"
    assert house.rlm("usage", "--api-key-file", file).exit_code == 0
    refused = house.rlm("usage")
    assert isinstance(refused.exception, UnauthenticatedError)
    assert "rlm_other" not in refused.stderr + str(refused.exception)


def test_a_missing_key_is_told_with_what_to_do(house: House, tmp_path: Path) -> None:
    house.environment["RLM_API_KEY"] = ""
    (tmp_path / "empty").touch()
    for options, why in (
        ((), "RLM_API_KEY is not set"),
        (("--api-key-file", tmp_path / "empty"), "is empty"),
        (("--api-key-file", tmp_path / "none"), "cannot read --api-key-file"),
        (("--api-key-file", "/dev/zero"), "is too long for what it should be"),
    ):
        result = house.rlm("usage", *options)
        assert why in str(result.exception)
    assert not house.service.calls


# --- rlm runs, contexts, usage -------------------------------------------------------------------------


def test_runs_are_listed_newest_first_and_no_more_than_asked_for(house: House) -> None:
    for number in range(4):
        house.service.add_run(f"r{number}", question=b"why\nnot?")
    house.service.end("r1", "cancelled")
    lines = house.rlm("runs", "list", "--limit", 3).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["r3", "r2", "r1"]
    assert "cancelled" in lines[2]
    assert "why\\nnot?" in lines[2]
    listed = json.loads(house.rlm("runs", "list", "--state", "ended", "--json").stdout)["runs"]
    assert [run["run_id"] for run in listed] == ["r1"]
    assert listed[0]["created_at"] == "2027-01-15T08:00:02.000Z"


def test_a_run_is_shown_with_its_whole_answer(house: House) -> None:
    answer = "a" * 70_000
    house.service.add_run("r1")
    house.service.end("r1", answer=answer.encode())
    assert house.rlm("runs", "show", "r1").stdout.endswith(f"\n\n{answer}\n")
    shown = json.loads(house.rlm("runs", "show", "r1", "--json").stdout)
    assert (shown["answer"], shown["answer_length_bytes"], shown["state"]) == (answer, 70_000, "ended")


@pytest.mark.parametrize("command", ["show", "watch", "cancel", "resume", "delete"])
def test_a_run_that_is_not_there_is_wrong_use(house: House, command: str) -> None:
    result = house.rlm("runs", command, "r1")
    # `main` makes 2 of the error.
    assert result.exit_code == 2 or isinstance(result.exception, NotFoundError)
    assert result.stdout == ""


def test_runs_are_cancelled_resumed_and_deleted(house: House) -> None:
    house.service.add_run("r1", state=pb.RUN_STATE_INTERRUPTED)
    assert json.loads(house.rlm("runs", "resume", "r1", "--json").stdout)["state"] == "running"
    assert json.loads(house.rlm("runs", "cancel", "r1", "--json").stdout)["outcome"] == "cancelled"
    assert json.loads(house.rlm("runs", "delete", "r1", "--json").stdout) == {"run_id": "r1", "deleted": True}
    assert not house.service.runs


def test_a_watched_run_is_shown_from_its_beginning_and_reported_like_one_that_was_asked(house: House) -> None:
    house.service.add_run("r1")
    house.service.tell("r1", *told("r1", turns=2).events)
    house.service.end("r1")
    result = house.rlm("runs", "watch", "r1")
    assert (result.exit_code, result.stdout) == (0, "42\n")
    assert "turn 2: cell ok after" in result.stderr
    assert json.loads(house.rlm("runs", "watch", "r1", "--json").stdout)["turns"] == 2


@pytest.mark.parametrize("name", ["export", "export.tar"])
def test_an_export_has_all_that_there_is_of_a_run(house: House, tmp_path: Path, name: str) -> None:
    long_text = "long\x1b" * 2_000
    text, data = shorten(long_text)
    assert data is not None
    assert not isinstance(text, str)
    house.service.add_run("r1")
    story = told("r1")
    story.turn(2, run_id=RunId("r1"))
    story.cell_ends(2, output="", run_id=RunId("r1"))
    events: list[Any] = [event.to_json() for event in story.events]
    events[-1]["output"] = {"head": text.head, "length_bytes": text.length_bytes, "sha256": text.sha256}
    house.service.tell("r1", *events)
    house.service.end("r1", answer=b"caf\xe9")
    house.service.texts[text.sha256] = data
    target = tmp_path / name
    result = house.rlm("runs", "export", "r1", target, "--json")
    assert json.loads(result.stdout) == {
        "run_id": "r1", "target": str(target), "events": len(events), "texts": 1,
    }  # fmt: skip
    if target.suffix:
        assert target.stat().st_mode & 0o777 == 0o600
        with tarfile.open(target) as archive:
            archive.extractall(tmp_path / "out", filter="data")
        target = tmp_path / "out"
    assert [json.loads(line) for line in (target / "events.jsonl").read_text().splitlines()] == events
    assert (target / "texts" / text.sha256).read_bytes() == data
    assert (target / "answer.txt").read_bytes() == b"caf\xe9"
    assert json.loads((target / "run.json").read_text())["answer"] == "caf\ufffd"
    again = house.rlm("runs", "export", "r1", tmp_path / name)
    assert "cannot write" in str(again.exception)


def test_a_run_that_goes_on_is_exported_as_far_as_it_is(house: House, tmp_path: Path) -> None:
    house.service.add_run("r1")
    house.service.tell("r1", *told("r1").events)
    assert house.rlm("runs", "export", "r1", tmp_path / "export").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["events.jsonl", "run.json"]


def test_an_export_of_nothing_makes_nothing_and_a_hash_from_a_server_is_no_path(
    house: House, tmp_path: Path
) -> None:
    house.rlm("runs", "export", "none", tmp_path / "export")
    assert not (tmp_path / "export").exists()
    house.service.add_run("r1")
    house.service.tell("r1", {"x": {"head": "", "length_bytes": 5_000, "sha256": "../../evil"}})
    house.service.end("r1")
    result = house.rlm("runs", "export", "r1", tmp_path / "export")
    assert "a hash that is none" in str(result.exception)
    assert not (tmp_path.parent / "evil").exists()


def test_contexts_are_uploaded_listed_and_deleted(house: House, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "link").symlink_to("a.txt")
    sent = house.rlm("contexts", "upload", tmp_path / "folder")
    context_id = sent.stdout.strip()
    assert "left out: " in sent.stderr
    assert "folder.tar is there: " in sent.stderr
    again = json.loads(house.rlm("contexts", "upload", tmp_path / "folder", "--json").stdout)
    assert (again["context_id"], again["existed"]) == (context_id, True)
    assert context_id in house.rlm("contexts", "list").stdout
    (listed,) = json.loads(house.rlm("contexts", "list", "--json").stdout)["contexts"]
    assert (listed["name"], listed["sha256"]) == ("folder.tar", again["sha256"])
    assert house.rlm("contexts", "delete", context_id).exit_code == 0
    assert house.rlm("contexts", "list").stdout == ""


def test_usage_shows_limits_where_there_are_any(house: House) -> None:
    house.service.usage.day.tokens = 1_500
    house.service.usage.day_limit.tokens = 2_000
    house.service.usage.month.cost_microusd = 2_500_000
    house.service.usage.runs_day = 3
    shown = house.rlm("usage").stdout.splitlines()
    assert shown[0] == "today       1,500 tokens of 2,000 · $0.0000 · 3 runs"
    assert shown[1] == "this month  0 tokens · $2.5000"
    told_of = json.loads(house.rlm("usage", "--json").stdout)
    assert (told_of["day"]["tokens"], told_of["day_limit"]) == (1_500, {"tokens": 2_000})
    assert told_of["max_concurrent_runs"] is None


# --- Signals, and servers that go away: `rlm` as a process of its own -----------------------------------


@contextmanager
def started(house: House, *words: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *map(str, words), "--server", house.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **house.environment},
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(holds: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def ending(process: subprocess.Popen[str], until: str) -> str:
    """What stderr says up to a line with these words."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if until in line:
            return said
    raise AssertionError(said)


def test_ctrl_c_asks_the_server_to_cancel_and_waits_for_the_end(house: House) -> None:
    house.answers(ends=False)
    with started(house, "run", "why?", "--context", house.context, "--json") as process:
        ending(process, "turn 1: cell ok")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    shown = json.loads(stdout)
    assert (shown["outcome"], shown["found_so_far"]) == ("cancelled", "half an answer\n")
    assert "rlm: asking the server to cancel the run; once more leaves it running\n" in stderr
    assert "rlm: the server is ending the run\n" in stderr
    assert only_run(house).outcome == "cancelled"


def test_a_second_ctrl_c_leaves_the_run_and_says_how_to_see_it_again(house: House, tmp_path: Path) -> None:
    house.answers(ends=False)
    house.service.before["CancelRun"] = [grpc.StatusCode.UNAVAILABLE] * 1_000
    file = tmp_path / "a key"
    file.write_text(KEY)
    words = ("run", "why?", "--context", house.context, "--json", "--api-key-file", file)
    with started(house, *words) as process:
        ending(process, "turn 1: cell ok")
        process.send_signal(signal.SIGINT)
        wait_for(lambda: house.service.calls["CancelRun"])
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    run_id = only_run(house).run_id
    shown = json.loads(stdout)
    assert (shown["outcome"], shown["run_id"], shown["answer"]) == ("left", run_id, None)
    again = f"rlm runs watch {run_id} --server {house.address} --api-key-file '{file}'"
    assert f"rlm:   {again}\n" in stderr
    assert KEY not in stderr
    assert "Traceback" not in stderr
    assert only_run(house).state == pb.RUN_STATE_QUEUED


def test_ctrl_c_ends_a_watch_and_not_the_run(house: House) -> None:
    house.service.add_run("r1")
    house.service.tell("r1", *told("r1").events)
    with started(house, "runs", "watch", "r1") as process:
        ending(process, "turn 1: cell ok")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (1, "")
    assert "rlm: run r1 is left as it is on" in stderr
    assert house.service.runs["r1"].state == pb.RUN_STATE_RUNNING
    assert not house.service.calls["CancelRun"]


def test_a_signal_before_the_question_was_sent_asks_nothing(house: House) -> None:
    house.service.before["StartUpload"] = [grpc.StatusCode.UNAVAILABLE] * 1_000
    with started(house, "run", "why?", "--context", house.context) as process:
        said = ending(process, "does not answer")
        process.send_signal(signal.SIGINT)
        _stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "trying again" in said
    assert "rlm: stopping: nothing has been asked yet\n" in stderr
    assert not house.service.runs


def test_a_refused_question_is_told_in_one_sentence_with_2(house: House) -> None:
    house.service.before["CreateRun"] = [BudgetExceededError("tenant", {"tokens": 2}, {"tokens": 1})]
    with started(house, "run", "why?", "--context", house.context, "--json") as process:
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.endswith("rlm: the budget of the tenant is too low: 2 tokens wanted, 1 left\n")


def test_a_server_that_is_lost_and_comes_back_costs_a_line_each(house: House) -> None:
    def play(run: pb.Run) -> None:
        house.service.tell(run.run_id, *told(run.run_id, turns=3).events)
        house.service.end(run.run_id)
        # The first stream ends early, and what is asked about that gets no answer for a while.
        house.service.watches = [range(5)]
        house.service.before["GetRun"] = [grpc.StatusCode.UNAVAILABLE] * 2

    house.service.on_create = play
    result = house.ask()
    assert (result.exit_code, result.stdout) == (0, "42\n")
    lines = [line for line in result.stderr.splitlines() if house.address in line]
    assert len([line for line in lines if "does not answer" in line]) == 1
    assert len([line for line in lines if "is back" in line]) == 1


def test_a_run_that_is_deleted_while_it_is_watched_is_not_said_to_go_on(house: House) -> None:
    house.service.add_run("r1")
    house.service.tell("r1", *told("r1").events)
    house.service.watches = [range(5)]
    with started(house, "runs", "watch", "r1") as process:
        ending(process, "turn 1: cell ok")
        del house.service.runs["r1"]
        _stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "rlm: no such run\n" in stderr
    assert "left as it is" not in stderr
