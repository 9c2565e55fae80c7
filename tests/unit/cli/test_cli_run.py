"""`rlm run` from its arguments to its exit code, with a fake in the place of `app.run`."""

import json
import logging
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from orchestrator import app
from orchestrator.app import RunOptions
from orchestrator.cli import provider
from orchestrator.cli.main import app as rlm
from orchestrator.config import Settings
from orchestrator.errors import (
    Billing,
    ContextInputError,
    EngineError,
    InvariantError,
    KeyMissingError,
    ModelError,
    ModelNotAllowedError,
    OrchestratorError,
    ProviderUnreachableError,
    SandboxStartError,
)
from orchestrator.limits import RunLimits
from orchestrator.run_report import RunReport, WholeContext
from orchestrator.runs.recorder import Observer
from orchestrator.trajectory import Event, Tally
from orchestrator.turn import Outcome
from tests.fakes.provider import NoProcess
from tests.unit.cli import hostile
from tests.unit.cli.story import ROOT, Story, unsafe_characters


class FakeRun:
    """Stands in for `app.run`: tells a story, then ends as it was told to."""

    def __init__(self) -> None:
        self.story = Story()
        self.answer: str | None = "42"
        self.outcome = Outcome.ANSWERED
        self.error = ""
        self.found_so_far = ""
        self.notes: Sequence[str] = ()
        self.failure: Exception | None = None
        self.said: list[str] = []
        self.asked: RunOptions | None = None
        self.provider: NoProcess | None = None

    async def __call__(
        self,
        options: RunOptions,
        settings: Settings,
        *,
        provider: NoProcess | None = None,
        observers: Sequence[Observer] = (),
        say: Callable[[str], None] = lambda _line: None,
    ) -> RunReport:
        self.asked = options
        self.provider = provider
        for line in self.said:
            say(line)
        for event in self.story.events:
            for observer in observers:
                observer(event)
        if self.failure is not None:
            raise self.failure
        return RunReport(
            run_id=ROOT,
            outcome=self.outcome,
            answer=self.answer,
            error=self.error,
            found_so_far=self.found_so_far,
            tally=Tally.of(self.story.events),
            limits=options.limits,
            duration_s=12.3456,
            context_bytes=2,
            whole_context=WholeContext(tokens=5, cost_microusd=10, fits_window=True),
            notes=self.notes,
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    replacement = FakeRun()
    monkeypatch.setattr(app, "run", replacement)
    monkeypatch.setattr(provider, "ProviderProcess", NoProcess)
    return replacement


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.txt"
    path.write_text("hi")
    return path


def _rlm(*arguments: object) -> Result:
    return CliRunner().invoke(rlm, [str(argument) for argument in arguments])


def _run(context: Path, *options: object) -> Result:
    return _rlm("run", "why?", "--context", context, *options)


def test_only_the_answer_goes_to_stdout(fake: FakeRun, context: Path) -> None:
    fake.story.start()
    fake.story.turn(1)
    fake.said = ["starting a sandbox"]
    result = _run(context)
    assert result.exit_code == 0
    assert result.stdout == "42\n"
    assert "rlm: starting a sandbox\n" in result.stderr
    assert "rlm: answered after 1 turn, 12 s\n" in result.stderr


def test_an_answer_cannot_touch_the_terminal(fake: FakeRun, context: Path) -> None:
    fake.answer = "a\tb\nc \x1b[2J\x9b\u202e\ud800"
    assert _run(context).stdout == "a\tb\nc \\x1b[2J\\x9b\\u202e\\ud800\n"
    answer = json.loads(_run(context, "--json").stdout)["answer"]
    assert answer == fake.answer


def test_json_prints_one_object(fake: FakeRun, context: Path) -> None:
    fake.story.start()
    fake.story.turn(1)
    fake.story.start(fake.story.child(1), parent=ROOT, depth=2)
    fake.story.pays("c1", tokens=100, microusd=123_456)
    fake.story.pays("c2", tokens=70, microusd=9, unconfirmed=True)
    fake.notes = ["a link was skipped"]
    result = _run(context, "--json", "--max-cost-usd", "0.1", "--max-depth", 3)
    assert json.loads(result.stdout) == {
        "run_id": "rroot",
        "outcome": "answered",
        "answer": "42",
        "usage": {
            "input_tokens": 90,
            "output_tokens": 10,
            "cache_read_tokens": 0,
            "cache_write_tokens": 0,
            "unconfirmed_tokens": 70,
            "cost_usd": 0.123456,
            "unconfirmed_cost_usd": 9e-06,
            "model_calls": 2,
            "child_runs": 2,
        },
        "usage_by_model_and_depth": [
            {
                "model": "m",
                "depth": 0,
                "input_tokens": 90,
                "output_tokens": 10,
                "cache_read_tokens": 0,
                "cache_write_tokens": 0,
                "unconfirmed_tokens": 70,
                "cost_usd": 0.123456,
                "calls": 2,
                "retried": 0,
                "refused": 0,
                "memoised": 0,
            }
        ],
        "whole_context_once": {"estimated_tokens": 5, "estimated_cost_usd": 1e-05, "fits_window": True},
        "limits": {
            "max_tokens": 5_000_000,
            "max_cost_usd": 0.1,
            "max_calls": 1_000,
            "max_child_runs": 100,
            "max_depth": 3,
            "max_turns": 40,
            "max_concurrency": 16,
            "deadline_s": 3_600.0,
            "cell_timeout_s": 120.0,
            "cell_cpu_s": 300.0,
            "cell_ceiling_s": 3_600.0,
        },
        "turns": 1,
        "sandboxes_lost": [],
        "max_depth_reached": 2,
        "duration_s": 12.346,
        "error": None,
        "found_so_far": None,
        "context_bytes": 2,
        "notes": ["a link was skipped"],
    }
    assert result.stdout.isascii()
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.ANSWERED])
def test_an_end_without_an_answer_is_exit_code_1_and_keeps_what_was_found(
    fake: FakeRun, context: Path, outcome: Outcome
) -> None:
    fake.outcome, fake.answer, fake.error = outcome, None, "no luck \x1b[31m"
    fake.found_so_far = "half\nthe\x1b answer"
    result = _run(context)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"rlm: {outcome.value} after 0 turns, 12 s: no luck \\x1b[31m\n" in result.stderr
    assert "rlm: found so far:\n  half\n  the\\x1b answer\n" in result.stderr
    shown = json.loads(_run(context, "--json").stdout)
    assert shown["outcome"] == outcome.value
    assert shown["answer"] is None
    assert shown["found_so_far"] == fake.found_so_far


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ContextInputError("there is no file nothing.txt"), 2),
        (ModelNotAllowedError("no price is known"), 2),
        (KeyMissingError("set ANTHROPIC_API_KEY"), 3),
        (EngineError("no engine answers"), 3),
        (ProviderUnreachableError("nothing answers at http://localhost:1"), 3),
    ],
)
def test_an_error_before_the_run_is_one_sentence(
    fake: FakeRun, context: Path, failure: OrchestratorError, code: int
) -> None:
    fake.failure = failure
    for options in ((), ("--json",)):
        result = _run(context, *options)
        assert result.exit_code == code
        assert result.stdout == ""
        assert result.stderr == f"rlm: {failure}\n"


def test_an_engine_that_goes_away_during_the_run_leaves_the_usage_told(fake: FakeRun, context: Path) -> None:
    fake.story.start()
    fake.story.turn(1)
    fake.story.cell_ends(1, output="half an answer\n")
    fake.story.pays("c1")
    fake.failure = EngineError("the engine went away")
    result = _run(context, "--json")
    assert result.exit_code == 3
    assert "rlm: the engine went away\n" in result.stderr
    assert "rlm: used 100 tokens" in result.stderr
    shown = json.loads(result.stdout)
    assert shown["usage"]["model_calls"] == 1
    assert shown["found_so_far"] == "half an answer\n"


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (SandboxStartError("the worker did not dial in"), "sandbox_lost"),
        (ModelError("500", billing=Billing.UNKNOWN, retryable=False), "model_failed"),
    ],
)
def test_a_failure_is_an_outcome_without_a_traceback(
    fake: FakeRun, context: Path, failure: Exception, outcome: str
) -> None:
    fake.failure = failure
    result = _run(context, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["outcome"] == outcome
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("failure", [InvariantError("twice settled"), ValueError("odd \x1b]0;evil\x07")])
def test_a_bug_is_told_as_one(fake: FakeRun, context: Path, failure: Exception) -> None:
    fake.story.start()
    fake.story.pays("c1")
    fake.failure = failure
    result = _run(context, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["outcome"] == "internal_error"
    assert json.loads(result.stdout)["usage"]["model_calls"] == 1
    assert "Traceback" in result.stderr
    assert "this is a bug" in result.stderr
    assert not list(unsafe_characters(result.stderr))


def test_what_a_library_logs_is_made_visible(
    fake: FakeRun, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def logging_run(*arguments: Any, **options: Any) -> RunReport:
        logging.getLogger("some.library").warning("odd peer \x1b]0;evil\x07")
        return await fake(*arguments, **options)

    monkeypatch.setattr(app, "run", logging_run)
    result = _run(context)
    assert "rlm: some.library: odd peer \\x1b]0;evil\\x07\n" in result.stderr
    assert not list(unsafe_characters(result.stderr))


def test_the_default_models_are_a_large_and_a_small_one(fake: FakeRun, context: Path) -> None:
    _run(context)
    assert fake.asked is not None
    assert (fake.asked.model, fake.asked.sub_model) == ("claude-sonnet-5-5", "claude-haiku-5-5")


def test_one_model_given_is_used_for_sub_calls_too(fake: FakeRun, context: Path) -> None:
    _run(context, "--model", "mine")
    assert fake.asked is not None
    assert (fake.asked.model, fake.asked.sub_model) == ("mine", "")


def test_every_option_arrives(fake: FakeRun, context: Path, tmp_path: Path) -> None:
    # fmt: off
    result = _run(
        context, "--context", tmp_path, "--model", "a", "--sub-model", "b", "--base-url", "http://localhost:8080/v1",
        "--max-tokens", 10, "--max-cost-usd", "0.0000011", "--max-calls", 11, "--max-child-runs", 0,
        "--max-depth", 0, "--max-turns", 12, "--max-concurrency", 13, "--deadline-s", "4000.5",
        "--cell-timeout-s", 5_000, "--runtime", "runsc", "--price-input", "0", "--price-output", "1.5",
        "--window-tokens", 8_192, "--allow-model", "c", "--allow-model", "quick=d",
    )
    # fmt: on
    assert result.exit_code == 0, result.stderr
    assert fake.asked == RunOptions(
        question="why?",
        context_paths=(context, tmp_path),
        model="a",
        sub_model="b",
        runtime="runsc",
        limits=RunLimits(
            max_tokens=10,
            max_cost_microusd=2,
            max_calls=11,
            max_child_runs=0,
            max_depth=0,
            max_turns=12,
            max_concurrency=13,
            deadline_s=4_000.5,
            cell_timeout_s=5_000.0,
            # Raised with the cell's time, which they would undercut.
            cell_cpu_s=5_000.0,
            cell_ceiling_s=5_000.0,
        ),
        price_input_usd_per_mtok=Decimal(0),
        price_output_usd_per_mtok=Decimal("1.5"),
        window_tokens=8_192,
        allow_models=("c", "quick=d"),
    )
    assert fake.provider is not None
    assert fake.provider.told["base_url"] == "http://localhost:8080/v1"
    assert not fake.provider.is_open


def test_a_run_of_scripted_models_alone_starts_no_provider_process(fake: FakeRun, context: Path) -> None:
    _run(context, "--model", "scripted:a.py", "--sub-model", "scripted:b.py")
    assert fake.provider is None
    _run(context, "--model", "scripted:a.py", "--sub-model", "c")
    assert fake.provider is not None


def test_without_options_the_limits_are_the_documented_ones(fake: FakeRun, context: Path) -> None:
    _run(context)
    assert fake.asked is not None
    assert fake.asked.limits == RunLimits()


def test_a_question_that_is_not_utf8_is_asked_with_replacements(fake: FakeRun, context: Path) -> None:
    result = _rlm("run", "why \udcff?", "--context", context)
    assert result.exit_code == 0
    assert fake.asked is not None
    assert fake.asked.question == "why \ufffd?"


@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-tokens", "0"),
        ("--max-tokens", "-5"),
        ("--max-tokens", "1e6"),
        ("--max-calls", "0"),
        ("--max-turns", "0"),
        ("--max-depth", "-1"),
        ("--max-concurrency", "0"),
        ("--max-child-runs", "-1"),
        ("--max-cost-usd", "nan"),
        ("--max-cost-usd", "-1"),
        ("--deadline-s", "0"),
        ("--deadline-s", "inf"),
        ("--cell-timeout-s", "nan"),
        ("--runtime", "crun"),
        ("--price-input", "1"),
        ("--price-output", "1"),
        ("--price-input", "-1", "--price-output", "1"),
        ("--base-url", "localhost:80"),
        ("--base-url", "ftp://example.com"),
        ("--no-such-option",),
    ],
)
def test_wrong_use_is_exit_code_2_and_starts_nothing(
    fake: FakeRun, context: Path, wrong: tuple[str, ...]
) -> None:
    result = _run(context, *wrong)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("Error: ") == 1
    assert fake.asked is None


def test_an_empty_question_and_a_missing_context_are_wrong_use(fake: FakeRun, context: Path) -> None:
    assert "the question is empty" in _rlm("run", " \n", "--context", context).stderr
    assert "--context" in _rlm("run", "why?").stderr
    assert _rlm("run", "why?").exit_code == 2
    assert fake.asked is None


def test_a_misspelt_setting_is_wrong_use(
    fake: FakeRun, context: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLM_STAT_DIR", "/x")
    assert "RLM_STAT_DIR" in str(_run(context).exception)
    assert fake.asked is None


def test_events_are_written_and_checked_before_anything_starts(
    fake: FakeRun, context: Path, tmp_path: Path
) -> None:
    fake.story.start()
    fake.story.end()
    path = tmp_path / "events.jsonl"
    _run(context, "--events", path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        event.to_json() for event in fake.story.events
    ]
    fake.asked = None
    result = _run(context, "--events", tmp_path / "missing" / "events.jsonl")
    assert isinstance(result.exception, OrchestratorError)
    assert fake.asked is None


def test_a_scripted_run_says_so_wherever_it_shows_what_the_model_did(fake: FakeRun, context: Path) -> None:
    fake.story = Story(model="scripted:demo.py")
    fake.story.start()
    fake.story.turn(1)
    fake.story.cell_ends(1)
    fake.story.end("turn_limit")
    fake.outcome, fake.answer, fake.found_so_far = Outcome.TURN_LIMIT, None, "one\ntwo"
    result = _run(context, "--model", "scripted:demo.py")
    told = [line for line in result.stderr.splitlines() if not line.startswith(("rlm: used", "rlm: sending"))]
    assert len(told) > 6
    assert all(line.startswith("[scripted] ") for line in told)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(events=st.lists(hostile.events, max_size=8), answer=st.none() | hostile.texts, text=hostile.texts)
def test_no_terminal_control_character_is_ever_emitted(
    fake: FakeRun, context: Path, events: list[Event], answer: str | None, text: str
) -> None:
    fake.story.events, fake.said, fake.notes = events, [text], [text]
    fake.answer, fake.error, fake.found_so_far = answer, text, text
    fake.outcome = Outcome.TURN_LIMIT if answer is None else Outcome.ANSWERED
    for options in ((), ("--json",)):
        result = _run(context, *options)
        assert result.exit_code == (1 if answer is None else 0)
        assert not list(unsafe_characters(result.stdout.replace("\t", " ")))
        assert not list(unsafe_characters(result.stderr))
