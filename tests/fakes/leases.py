"""Sandboxes without anything in them: a cell is what a function makes of it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator.cells import CellClock, CellOutcome, CellResult
from orchestrator.ids import LOCAL_TENANT, SandboxId, TenantId, new_sandbox_id
from orchestrator.rpc.guest_server import AddServices
from orchestrator.sandbox.lease import PutContext

PlayCell: TypeAlias = Callable[[str, CellClock], Awaitable[CellResult]]


@dataclass
class FakeSandbox:
    """A `LeasedSandbox`."""

    sandbox_id: SandboxId
    play: PlayCell
    runtime: str = "none"
    image: str = "none"
    wait_s: float = 0.0
    hash_seed: int = 1

    async def run_cell(self, code: str, clock: CellClock) -> CellResult:
        """See `LeasedSandbox`."""
        return await self.play(code, clock)


@dataclass
class FakeLeases:
    """A `SandboxLeases`. `start` and `end` hold what the next leases raise when they begin or end."""

    play: PlayCell
    start: list[Exception] = field(default_factory=list)
    end: list[Exception] = field(default_factory=list)
    opened: int = 0
    live: int = 0
    seeds: list[int] = field(default_factory=list)
    """What each lease wanted; 0 for none."""

    @asynccontextmanager
    async def open(
        self,
        put_context: PutContext,
        *,
        runtime: str,
        guest_services: Sequence[AddServices],
        max_concurrent_calls: int,
        wanted_for_s: float = 0.0,
        hash_seed: int = 0,
        tenant_id: TenantId = LOCAL_TENANT,
    ) -> AsyncIterator[FakeSandbox]:
        """See `SandboxLeases.open`."""
        if self.start:
            raise self.start.pop(0)
        self.opened += 1
        self.live += 1
        self.seeds.append(hash_seed)
        try:
            yield FakeSandbox(new_sandbox_id(), self.play)
        finally:
            self.live -= 1
            if self.end:
                raise self.end.pop(0)


async def answers(code: str, _clock: CellClock) -> CellResult:
    """Every cell ends the run with its own code as the answer."""
    return CellResult(outcome=CellOutcome.OK, answer=code)


async def prints(code: str, _clock: CellClock) -> CellResult:
    """Every cell prints its own code."""
    return CellResult(outcome=CellOutcome.OK, output_head=code, output_bytes=len(code))
