"""Signals, terminals and pipes: `rlm` as a process of its own."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.cli import held_signals, live, signals
from orchestrator.cli.frame import Row
from orchestrator.cli.tree import RunTree
from orchestrator.limits import RunLimits


def _environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **more}


@contextmanager
def _rlm(
    folder: Path, *options: str, stdout: int, stderr: int, **more: str
) -> Iterator[subprocess.Popen[str]]:
    """The program at work on `folder`, which is surely gone after the block."""
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.unit.cli.waiting_program",
            "run",
            "why?",
            "--context",
            str(folder),
            *options,
        ],
        stdout=stdout,
        stderr=stderr,
        env=_environment(**more),
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _wait_for(folder / "started")
            yield process
        finally:
            process.kill()


def _wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path.name} did not come"
        time.sleep(0.01)


def _signal_this_thread(number: signal.Signals) -> None:
    """As to a program with one thread: a library that pytest has loaded may have started others."""
    signal.pthread_kill(threading.get_ident(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_cleanly_and_a_second_one_breaks_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    with _rlm(tmp_path, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.1)
        stdout, stderr = process.communicate(timeout=30)
    assert (tmp_path / "cleaned").exists()
    assert process.returncode == 1
    shown = json.loads(stdout)
    assert shown["outcome"] == "cancelled"
    assert shown["usage"]["model_calls"] == 1
    assert shown["turns"] == 2
    assert shown["found_so_far"] == "half an answer\n"
    assert "rlm: stopping: calls and containers are being ended\n" in stderr
    assert "rlm: used 100 tokens · $0.000050 · 1 model call" in stderr
    assert "Traceback" not in stderr


async def test_a_signal_that_came_while_signals_were_held_stops_the_work() -> None:
    async def work() -> None:
        await asyncio.sleep(3_600)

    stops: list[int] = []
    with held_signals.held():
        _signal_this_thread(signal.SIGTERM)
        with pytest.raises(signals.StoppedError):
            await signals.until_stopped(work(), stops.append)
    assert stops == [1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


async def test_work_that_answers_although_it_was_stopped_has_its_answer_heard() -> None:
    async def work() -> str:
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            return "just finished"
        return "never"

    with held_signals.held():
        _signal_this_thread(signal.SIGINT)
        assert await signals.until_stopped(work(), lambda _count: None) == "just finished"


def test_on_a_terminal_the_tree_is_drawn_live_and_nothing_hostile_reaches_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with _rlm(tmp_path, stdout=subprocess.DEVNULL, stderr=theirs, TERM="xterm-256color") as process:
        os.close(theirs)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        drawn = bytearray()
        try:
            while piece := os.read(ours, 65_536):
                drawn += piece
        except OSError:
            pass  # how Linux says that the other side is closed
        process.wait(timeout=30)
    os.close(ours)
    assert process.returncode == 1
    assert b"cell running for" in drawn
    assert b"stopping: calls and containers are being ended" in drawn
    assert b"\\x1b]0;evil\\x07" in drawn
    assert b"\x1b]0;" not in drawn
    assert drawn.count(b"\x1b[?25h") >= 1, "the cursor must be shown again"


def test_a_terminal_that_is_closed_ends_the_run_cleanly(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with _rlm(tmp_path, stdout=theirs, stderr=theirs, TERM="xterm") as process:
        os.close(theirs)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 1
    assert (tmp_path / "cleaned").exists()


async def test_a_view_that_cannot_be_drawn_costs_nothing_but_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: object, **_options: object) -> list[Row]:
        raise ZeroDivisionError("height")

    monkeypatch.setattr(live, "frame", broken)
    async with live.LiveView(RunTree(), RunLimits()):
        await asyncio.sleep(0.01)
    assert "the live view failed, which is a bug: ZeroDivisionError('height')" in capsys.readouterr().err


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with _rlm(tmp_path, stdout=subprocess.DEVNULL, stderr=theirs, TERM="dumb") as process:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    os.close(theirs)
    drawn = os.read(ours, 65_536)
    os.close(ours)
    assert b"\x1b" not in drawn
    assert b"turn 1: cell ok" in drawn


def test_readers_that_went_away_break_nothing(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with _rlm(tmp_path, "--json", stdout=write_end, stderr=write_end) as process:
        process.terminate()
        assert process.wait(timeout=30) == 1
    os.close(write_end)
    assert (tmp_path / "cleaned").exists()


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['rlm', '--help']\n"
        "from orchestrator.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'rich', 'docker', 'grpc', 'anthropic', 'asyncio', 'sqlalchemy'} & set(sys.modules)\n"
        "    sys.exit(f'{end.code} {sorted(heavy)}' if end.code or heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: rlm" in done.stdout


def test_a_command_for_a_server_loads_no_engine_no_provider_and_no_database() -> None:
    program = (
        "import sys\n"
        "import orchestrator.cli.main\n"
        "from orchestrator.cli.remote import asking, contexts, export, runs, usage\n"
        "heavy = {'docker', 'anthropic', 'aiohttp', 'sqlalchemy', 'starlette'} & set(sys.modules)\n"
        "sys.exit(f'{sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [("version",), ("--help",), ("run", "--help"), ("image", "--help")])
def test_the_module_is_the_command(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *command],
        capture_output=True,
        text=True,
        env=_environment(),
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout


def test_an_error_that_stops_the_command_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "doctor"],
        capture_output=True,
        text=True,
        env=_environment(RLM_NO_SUCH="1"),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("rlm: unknown settings: RLM_NO_SUCH")
    assert done.stderr.count("\n") == 1
