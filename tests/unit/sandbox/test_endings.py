import itertools
import signal

import pytest

from orchestrator.cells import CellOutcome, CellResult, Resource, SandboxLoss, UsedUp
from orchestrator.sandbox.endings import HostFacts, StreamEnd, judged, since, why_lost
from orchestrator.sandbox.port import Counters, Ending

SIZES = {Resource.MEMORY: 512, Resource.PROCESSES: 256, Resource.TMP_BYTES: 128}
QUIET = HostFacts(oom_kills=0, refused_forks=0)
UNREAD = HostFacts(oom_kills=None, refused_forks=None)
OOM = HostFacts(oom_kills=1, refused_forks=0)


@pytest.mark.case("E03", "E04")
@pytest.mark.parametrize(
    ("stream", "engine", "facts", "loss"),
    [
        *((StreamEnd.UNRULY, engine, OOM, SandboxLoss.PROTOCOL_BROKEN) for engine in (*Ending, None)),
        (StreamEnd.CLOSED, None, OOM, SandboxLoss.ENGINE_GONE),
        (StreamEnd.SILENT, None, QUIET, SandboxLoss.ENGINE_GONE),
        (StreamEnd.CLOSED, Ending.GONE, UNREAD, SandboxLoss.CONTAINER_GONE),
        (StreamEnd.CLOSED, Ending.OUT_OF_MEMORY, OOM, SandboxLoss.OUT_OF_MEMORY),
        (StreamEnd.CLOSED, Ending.OUT_OF_MEMORY, UNREAD, SandboxLoss.OUT_OF_MEMORY),
        (StreamEnd.CLOSED, Ending.OUT_OF_MEMORY, QUIET, SandboxLoss.CONTAINER_GONE),
        (StreamEnd.CLOSED, Ending.KILLED, OOM, SandboxLoss.OUT_OF_MEMORY),
        (StreamEnd.CLOSED, Ending.KILLED, QUIET, SandboxLoss.CONTAINER_GONE),
        (StreamEnd.CLOSED, Ending.KILLED, UNREAD, SandboxLoss.CONTAINER_GONE),
        (StreamEnd.CLOSED, Ending.EXITED, OOM, SandboxLoss.WORKER_ENDED),
        (StreamEnd.SILENT, Ending.RUNNING, QUIET, SandboxLoss.WORKER_SILENT),
        (StreamEnd.CLOSED, Ending.RUNNING, QUIET, SandboxLoss.WORKER_ENDED),
    ],
)
def test_why_a_sandbox_went_away(
    stream: StreamEnd, engine: Ending | None, facts: HostFacts, loss: SandboxLoss
) -> None:
    assert why_lost(stream, engine, facts, worker_is_out_of_reach=True) is loss


def test_where_a_cell_can_kill_its_worker_nobody_outside_is_blamed() -> None:
    for engine, facts in ((Ending.KILLED, QUIET), (Ending.KILLED, UNREAD), (Ending.OUT_OF_MEMORY, QUIET)):
        loss = why_lost(StreamEnd.CLOSED, engine, facts, worker_is_out_of_reach=False)
        assert loss is SandboxLoss.WORKER_ENDED


def test_every_combination_has_a_reason() -> None:
    for stream, engine, facts, safe in itertools.product(
        StreamEnd, (*Ending, None), (QUIET, UNREAD, OOM), (True, False)
    ):
        assert why_lost(stream, engine, facts, worker_is_out_of_reach=safe) in SandboxLoss


def test_what_happened_between_two_readings_is_known_only_if_both_are() -> None:
    assert since(Counters(3, 1), Counters(5, 1)) == HostFacts(oom_kills=2, refused_forks=0)
    assert since(Counters(None, 1), Counters(5, None)) == UNREAD


def result(outcome: CellOutcome, *used: Resource, status: int = 0) -> CellResult:
    return CellResult(outcome=outcome, status=status, used_up=tuple(UsedUp(one, 0) for one in used))


@pytest.mark.case("E03", "E04")
@pytest.mark.parametrize(
    ("reported", "facts", "outcome", "status"),
    [
        (result(CellOutcome.SIGNALLED, status=9), OOM, CellOutcome.OUT_OF_MEMORY, 0),
        (result(CellOutcome.SIGNALLED, status=9), QUIET, CellOutcome.SIGNALLED, 9),
        (result(CellOutcome.SIGNALLED, status=9), UNREAD, CellOutcome.SIGNALLED, 9),
        (result(CellOutcome.SIGNALLED, status=11), OOM, CellOutcome.SIGNALLED, 11),
        (result(CellOutcome.OUT_OF_MEMORY), QUIET, CellOutcome.SIGNALLED, signal.SIGKILL),
        (result(CellOutcome.OUT_OF_MEMORY), UNREAD, CellOutcome.OUT_OF_MEMORY, 0),
        (result(CellOutcome.EXITED, status=7), OOM, CellOutcome.EXITED, 7),
        (result(CellOutcome.KILLED), OOM, CellOutcome.KILLED, 0),
    ],
)
def test_a_worker_is_believed_as_far_as_the_host_sees_the_same(
    reported: CellResult, facts: HostFacts, outcome: CellOutcome, status: int
) -> None:
    seen = judged(reported, facts, SIZES)
    assert (seen.outcome, seen.status) == (outcome, status)


@pytest.mark.case("E04")
def test_a_kill_for_memory_that_spared_the_interpreter_took_one_of_its_processes() -> None:
    memory = (UsedUp(Resource.MEMORY, 512),)
    assert judged(result(CellOutcome.OK), OOM, SIZES).used_up == memory
    assert judged(result(CellOutcome.EXITED, status=1), OOM, SIZES).used_up == memory
    assert judged(result(CellOutcome.SIGNALLED, status=9), OOM, SIZES).used_up == ()
    assert judged(result(CellOutcome.OK), QUIET, SIZES).used_up == ()


@pytest.mark.case("E01")
def test_a_guest_says_what_the_host_cannot_read_and_no_more() -> None:
    claims = result(CellOutcome.ERROR, Resource.PROCESSES, Resource.TMP_BYTES)
    both = (UsedUp(Resource.PROCESSES, 256), UsedUp(Resource.TMP_BYTES, 128))
    assert judged(claims, UNREAD, SIZES).used_up == both
    assert judged(claims, QUIET, SIZES).used_up == both[1:]
    refused = HostFacts(oom_kills=0, refused_forks=3)
    assert judged(result(CellOutcome.OK), refused, SIZES).used_up == both[:1]
    assert judged(result(CellOutcome.ERROR, Resource.SHM_BYTES), QUIET, SIZES).used_up == (
        UsedUp(Resource.SHM_BYTES, 0),
    )
