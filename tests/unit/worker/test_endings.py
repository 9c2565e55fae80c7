"""Whose doing the end of a cell was."""

from pathlib import Path

import pytest
from rlm_proto.v1 import sandbox_pb2

from sandbox_image.worker import endings, memory, protocol
from sandbox_image.worker.frames import Frame

Lost = sandbox_pb2.NamespaceLost


@pytest.mark.parametrize(
    ("exit_code", "killed", "out_of_memory", "cause", "status"),
    [
        (-9, True, True, Lost.CAUSE_KILLED, 0),
        (0, True, False, Lost.CAUSE_KILLED, 0),
        (0, False, False, Lost.CAUSE_EXITED, 0),
        (3, False, True, Lost.CAUSE_EXITED, 3),
        (-9, False, True, Lost.CAUSE_OUT_OF_MEMORY, 0),
        (-9, False, False, Lost.CAUSE_SIGNALLED, 9),
        (-11, False, True, Lost.CAUSE_SIGNALLED, 11),
    ],
)
def test_why_an_interpreter_is_gone(
    exit_code: int, killed: bool, out_of_memory: bool, cause: int, status: int
) -> None:
    lost = endings.loss_of(exit_code, killed=killed, out_of_memory=out_of_memory)
    assert (lost.cause, lost.status) == (cause, status)


@pytest.mark.parametrize(
    ("outcome", "interrupted", "expected"),
    [
        (protocol.OUTCOME_OK, True, "ok"),
        (protocol.OUTCOME_ERROR, True, "error"),
        (protocol.OUTCOME_INTERRUPTED, True, "interrupted"),
        (protocol.OUTCOME_INTERRUPTED, False, "error"),
    ],
)
def test_only_an_interrupt_that_was_sent_counts_as_one(
    outcome: str, interrupted: bool, expected: str
) -> None:
    header = {"outcome": outcome, "variables": ["é" * 99, "\ud800"], "answer_bytes": None, "used_up": []}
    ended = endings.cell_ended(Frame(header, b"x" * 20_000), 1, 5, interrupted)
    assert ended.WhichOneof("outcome") == expected
    assert list(ended.variables) == [("é" * 50).encode(), b"?"]
    assert len(ended.error.traceback) in (0, 16_384)


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n", 1),
        ("oom_kill_disable 0\nunder_oom 0\n", 0),
        ("", 0),
    ],
)
def test_kills_for_memory_are_read_from_either_cgroup_version(tmp_path: Path, text: str, kills: int) -> None:
    (tmp_path / "events").write_text(text)
    assert memory.oom_kills([tmp_path / "absent", tmp_path / "events"]) == kills
    assert memory.oom_kills([tmp_path / "absent"]) == 0
