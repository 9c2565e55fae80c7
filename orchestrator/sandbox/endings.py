"""What became of a cell and its sandbox, judged on the host: facts in, ending out. Pure.

Why a sandbox went away. `stream` is how its stream ended (`StreamEnd`), `engine` what the container engine
says of its container (`port.Ending`), `OOM` how often the kernel killed something of it for memory since
the cell began, as the host reads it from the control group. The first row that fits decides:

    stream     engine          OOM            loss
    --------   -------------   ------------   ---------------
    unruly     any             any            protocol_broken
    any        no answer       any            engine_gone
    any        gone            any            container_gone
    any        out of memory   some, unread   out_of_memory
    any        out of memory   none           as "killed"       the flag is an older one
    any        killed          some           out_of_memory     the engine had not heard of it yet
    any        killed          none, unread   container_gone    with runc nobody inside can kill PID 1
                                              worker_ended      with gVisor a cell can
    any        exited          any            worker_ended
    silent     running         any            worker_silent
    closed     running         any            worker_ended      on its way out, or it hung up on us

The engine's flag alone is ambiguous: it is also set when only a child of the worker was killed, and stays
set.

What became of a cell whose sandbox still stands is in what the worker reports, checked against the host:

    worker reports          OOM            outcome
    ---------------------   ------------   -------------
    signalled with SIGKILL  some           out_of_memory
    out_of_memory           none           signalled         the worker does not get to blame the kernel
    anything else           any            as reported

A kernel that killed something of a cell which kept its namespace, or whose interpreter ended otherwise,
killed a process which the cell had started: `UsedUp(MEMORY)`. Refused forks are `UsedUp(PROCESSES)`. Where
the host cannot read a counter (another engine's machine), the guest's word stands; it is told to its own
model only.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from orchestrator.cells import CellOutcome, CellResult, Resource, SandboxLoss, UsedUp
from orchestrator.sandbox.port import Counters, Ending


class StreamEnd(Enum):
    """How a sandbox's stream ended, as its session saw it."""

    CLOSED = "closed"
    """By the other side, or it broke."""
    SILENT = "silent"
    """By us: the worker neither read nor answered."""
    UNRULY = "unruly"
    """By us: a message was out of order or past a cap."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host read about one cell."""

    oom_kills: int | None
    """Since the cell before it; None when the host cannot read it."""
    refused_forks: int | None
    """Likewise."""


def since(before: Counters, after: Counters) -> HostFacts:
    """What happened between two readings."""
    return HostFacts(
        oom_kills=_rise(before.oom_kills, after.oom_kills),
        refused_forks=_rise(before.refused_forks, after.refused_forks),
    )


def why_lost(
    stream: StreamEnd, engine: Ending | None, facts: HostFacts, *, worker_is_out_of_reach: bool
) -> SandboxLoss:
    """The first table.

    Args:
        stream: How the stream ended.
        engine: None when it did not answer.
        facts: Since the cell began.
        worker_is_out_of_reach: Whether the runtime keeps signals of a cell from its worker, as Linux does for
            the first process of a pid namespace. gVisor (seen with 20221219) does not.
    """
    killed = SandboxLoss.CONTAINER_GONE if worker_is_out_of_reach else SandboxLoss.WORKER_ENDED
    if stream is StreamEnd.UNRULY:
        return SandboxLoss.PROTOCOL_BROKEN
    match engine:
        case None:
            return SandboxLoss.ENGINE_GONE
        case Ending.GONE:
            return SandboxLoss.CONTAINER_GONE
        case Ending.OUT_OF_MEMORY:
            return killed if facts.oom_kills == 0 else SandboxLoss.OUT_OF_MEMORY
        case Ending.KILLED:
            return SandboxLoss.OUT_OF_MEMORY if facts.oom_kills else killed
        case Ending.EXITED:
            return SandboxLoss.WORKER_ENDED
        case Ending.RUNNING:
            return SandboxLoss.WORKER_SILENT if stream is StreamEnd.SILENT else SandboxLoss.WORKER_ENDED


def judged(result: CellResult, facts: HostFacts, sizes: Mapping[Resource, int]) -> CellResult:
    """The result with the second table applied and the limits it names given their sizes."""
    if result.outcome is CellOutcome.OK and not (facts.oom_kills or facts.refused_forks or result.used_up):
        return result
    outcome, status = result.outcome, result.status
    if facts.oom_kills and (outcome, status) == (CellOutcome.SIGNALLED, signal.SIGKILL):
        outcome, status = CellOutcome.OUT_OF_MEMORY, 0
    elif facts.oom_kills == 0 and outcome is CellOutcome.OUT_OF_MEMORY:
        outcome, status = CellOutcome.SIGNALLED, int(signal.SIGKILL)
    found = {used.resource for used in result.used_up}
    if facts.oom_kills and outcome not in {CellOutcome.OUT_OF_MEMORY, CellOutcome.SANDBOX_LOST}:
        found.add(Resource.MEMORY)
    if facts.refused_forks is not None:
        found.discard(Resource.PROCESSES)
    if facts.refused_forks:
        found.add(Resource.PROCESSES)
    used_up = tuple(UsedUp(resource, sizes.get(resource, 0)) for resource in Resource if resource in found)
    return replace(result, outcome=outcome, status=status, used_up=used_up)


def _rise(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)
