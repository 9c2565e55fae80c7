"""Whose run is started next.

Rules:

1. A tenant's runs are started in the order in which they were queued.
2. When there is room, the tenant that has the fewest runs running is served; among equals the one that came
   to that many, or began to wait with that many, longest ago. A tenant with as many running as it may have is
   passed over, and so is one that was told to wait (`hold_back`), or whose chains would need more sandboxes
   than it may have; with nothing running it has its run, which was queued when it might have more.
3. Each run needs a chain of sandboxes, one for each depth it may reach. Chains of running runs never need
   more than the server has, and no more than `max_running` runs run. The run whose turn it is waits for its
   room; none of another tenant's slips past it, so that a long chain is not starved by short ones.

What follows from them. Let a tenant with nothing running, and not held back, queue its first run while all
room is taken. Before it are only tenants that had nothing running either and waited before it, each with one
run: who has run one in between comes behind it. So with T tenants that wait, it is started after at most T of
the ends that make room for a chain; whatever the others have queued. With one tenant's 500 runs queued and
running, another tenant's first run is the next to be started: after one end, where chains are equally long,
and after as many ends as free its chain where they are not.

Pure: no clock, no I/O, no runs. The time of a step grows with the tenants that wait, not with the runs.
"""

import itertools
from collections import deque
from dataclasses import dataclass, field

from orchestrator.errors import InvalidRequestError, InvariantError
from orchestrator.ids import RunId, TenantId


@dataclass(frozen=True, slots=True)
class Waiting:
    """A run that wants to be started."""

    run_id: RunId
    tenant_id: TenantId
    chain: int
    """Sandboxes it needs at once."""


@dataclass(slots=True)
class _Line:
    """One tenant."""

    max_running: int
    max_sandboxes: int
    since: int
    """When it came to as many running as it has, or began to wait with that many, counted in such moments."""
    waiting: deque[Waiting] = field(default_factory=deque)
    running: int = 0
    sandboxes: int = 0
    """Of the chains of those."""
    is_held_back: bool = False

    @property
    def may_start(self) -> bool:
        return (
            bool(self.waiting)
            and self.running < self.max_running
            and (self.sandboxes + self.waiting[0].chain <= self.max_sandboxes or not self.running)
            and not self.is_held_back
        )


class FairQueue:
    """Runs that wait for their start, and how many run. One event-loop thread calls it, hence no lock."""

    def __init__(self, *, max_running: int, sandboxes: int) -> None:
        """An empty queue.

        Args:
            max_running: Runs at once, of all tenants.
            sandboxes: What chains of running runs may add up to.
        """
        self._max_running = max_running
        self._sandboxes = sandboxes
        self._free_sandboxes = sandboxes
        self._lines: dict[TenantId, _Line] = {}
        self._running: dict[RunId, Waiting] = {}
        self._places: dict[RunId, int] = {}
        """In the order of queueing."""
        self._moments = itertools.count()

    @property
    def running(self) -> int:
        """Runs that run."""
        return len(self._running)

    def waiting(self) -> int:
        """Runs that wait."""
        return sum(len(line.waiting) for line in self._lines.values())

    def add(self, run: Waiting, *, max_running: int, max_sandboxes: int | None = None) -> None:
        """Queue a run behind its tenant's others.

        Args:
            run: New to the queue.
            max_running: Of its tenant; counts for all of the tenant's runs from now on.
            max_sandboxes: Likewise; None for all there are.

        Raises:
            InvalidRequestError: Its chain is longer than all there is, or than what its tenant may have.
        """
        if run.chain > self._sandboxes:
            raise InvalidRequestError(
                f"the run needs {run.chain} sandboxes at once and this server has {self._sandboxes}:"
                " lower max_depth"
            )
        most = self._sandboxes if max_sandboxes is None else max_sandboxes
        if run.chain > most:
            raise InvalidRequestError(
                f"the run needs {run.chain} sandboxes at once and you may have {most}: lower max_depth"
            )
        line = self._lines.get(run.tenant_id)
        if line is None:
            line = self._lines[run.tenant_id] = _Line(max_running, most, next(self._moments))
        elif not line.waiting:
            line.since = next(self._moments)
        line.max_running, line.max_sandboxes = max_running, most
        line.waiting.append(run)
        self._places[run.run_id] = next(self._moments)

    def remove(self, run_id: RunId, tenant_id: TenantId) -> bool:
        """Take a waiting run out; False when it doesn't wait."""
        line = self._lines.get(tenant_id)
        if line is None:
            return False
        for run in line.waiting:
            if run.run_id == run_id:
                line.waiting.remove(run)
                del self._places[run_id]
                self._forget_if_idle(tenant_id)
                return True
        return False

    def next(self) -> Waiting | None:
        """The run to be started now, which counts as running from here on; None when there is no room."""
        if len(self._running) >= self._max_running:
            return None
        ready = [line for line in self._lines.values() if line.may_start]
        if not ready:
            return None
        line = min(ready, key=lambda one: (one.running, one.since))
        if line.waiting[0].chain > self._free_sandboxes:
            return None
        run = line.waiting.popleft()
        line.since = next(self._moments)
        line.running += 1
        line.sandboxes += run.chain
        self._running[run.run_id] = run
        self._free_sandboxes -= run.chain
        return run

    def ended(self, run_id: RunId) -> None:
        """A running run is over."""
        run = self._running.pop(run_id, None)
        if run is None:
            raise InvariantError("a run ended that does not run")
        del self._places[run_id]
        self._taken_from(self._lines[run.tenant_id], run)
        self._forget_if_idle(run.tenant_id)

    def put_back(self, run_id: RunId) -> None:
        """A run that counts as running could not be started: it waits again, where it was."""
        run = self._running.pop(run_id, None)
        if run is None:
            raise InvariantError("a run was put back that does not run")
        line = self._lines[run.tenant_id]
        self._taken_from(line, run)
        place = self._places[run_id]
        # Others that were put back may be before it, and all others are behind it.
        before = itertools.takewhile(lambda one: self._places[one.run_id] < place, line.waiting)
        line.waiting.insert(sum(1 for _ in before), run)

    def hold_back(self, tenant_id: TenantId, *, held: bool) -> None:
        """Pass a tenant over for now, because other servers run as many of its runs, or have as many of its
        sandboxes, as it may have.
        """
        line = self._lines.get(tenant_id)
        if line is not None:
            line.is_held_back = held

    def _taken_from(self, line: _Line, run: Waiting) -> None:
        line.since = next(self._moments)
        line.running -= 1
        line.sandboxes -= run.chain
        self._free_sandboxes += run.chain

    def _forget_if_idle(self, tenant_id: TenantId) -> None:
        # Else tenants that came once would be looked at for ever.
        line = self._lines[tenant_id]
        if not line.waiting and not line.running:
            del self._lines[tenant_id]
