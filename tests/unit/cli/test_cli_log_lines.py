import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from orchestrator.cli.log_lines import LogLines
from orchestrator.service.log_context import bound, log_context


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.log_lines")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield logger
    logger.handlers.clear()
    logger.propagate = True


def test_a_line_is_one_object_with_the_run_that_it_is_about(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.addHandler(LogLines(as_json=True))
    with log_context(tenant_id="t1"), log_context(run_id="r1"):
        log.warning("slow: %s s", 3)
    log.info("done")
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (first["level"], first["logger"], first["message"]) == ("warning", log.name, "slow: 3 s")
    assert (first["tenant_id"], first["run_id"]) == ("t1", "r1")
    assert first["at"].endswith("+00:00")
    assert "run_id" not in second


def test_an_exception_is_told_without_its_text(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.addHandler(LogLines(as_json=True))

    def fail() -> None:
        raise ValueError("the prompt was: CANARY")

    try:
        fail()
    except ValueError:
        log.exception("a run failed")
    said = capsys.readouterr().err
    assert "CANARY" not in said
    assert json.loads(said)["exception"] == "ValueError"
    assert "test_cli_log_lines.py:" in json.loads(said)["through"]


@pytest.mark.parametrize("as_json", [False, True])
def test_no_record_forges_a_line_or_moves_a_cursor(
    log: logging.Logger, capsys: pytest.CaptureFixture[str], *, as_json: bool
) -> None:
    handler = LogLines(as_json=as_json)
    log.addHandler(handler)
    log.info("one\nrlm: error: two\x1b[2J")
    # Not through the logger: other handlers may mind.
    handler.emit(logging.makeLogRecord({"msg": "%d of nothing", "args": ("no number",), "levelname": "INFO"}))
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert len(said.splitlines()) == 2


def test_a_long_message_is_cut_and_its_line_is_an_object_still(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.addHandler(LogLines(as_json=True))
    log.info("\N{GRINNING FACE}" * 10_000)
    said = json.loads(capsys.readouterr().err)
    assert said["message"] == "\N{GRINNING FACE}" * 4_000 + "..."


async def test_what_is_bound_is_bound_for_the_tasks_that_begin_there_and_no_others() -> None:
    async def look() -> str:
        await asyncio.sleep(0)
        return bound().get("run_id", "")

    with log_context(run_id="r1"):
        inner = asyncio.create_task(look())
    outer = asyncio.create_task(look())
    assert (await inner, await outer) == ("r1", "")
