"""The server that `bench.service` measures, in a process of its own.

Everything of it is real but for its sandboxes, which are coroutines of another process that speak the real
protocol over real sockets, and its model, which answers at once: what is left is what the service costs.
"""

import asyncio
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from bench.guests_elsewhere import GuestsElsewhere
from orchestrator.conversation import Reply
from orchestrator.errors import OrchestratorError
from orchestrator.ids import RunId, TenantId
from orchestrator.machine import allow_open_files
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage
from orchestrator.runs.recorder import Observer
from orchestrator.server.serve import leave_to_stay
from orchestrator.store.books import Role, RunRow, TenantRules
from orchestrator.trajectory import Event, RunEnded, TurnStarted
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.model import runs
from tests.fakes.service import open_server

_STREAMS = 2_000
_TURNS = re.compile(r"in (\d+) turns")
_USAGE = Usage(input=100, output=10)


def question(turns: int) -> bytes:
    """What is answered in so many turns."""
    return f"How many, in {turns} turns?".encode()


@dataclass(slots=True)
class _Instant:
    """A `ModelClient` that answers at once, after somebody has said "go" and a pause."""

    pause_s: float
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`."""
        await self.go.wait()
        if self.pause_s:
            await asyncio.sleep(self.pause_s)
        asked = _TURNS.search(str(request.conversation[0]))
        assert asked is not None
        said = sum(isinstance(entry, Reply) for entry in request.conversation)
        return Completion(runs("FINAL('done')" if said + 1 >= int(asked[1]) else f"x = {said}"), _USAGE)

    async def aclose(self) -> None:
        """See `ModelClient`."""


class Clock:
    """A `ServiceHook`: when each event happened, and how long turns took."""

    def __init__(self) -> None:
        self.happened_at: list[float] = []
        """Unix time; of one run, by position."""
        self.turns_s: list[float] = []
        self._began: dict[RunId, float] = {}

    def created(self, run: RunRow) -> None:
        """See `ServiceHook`."""

    def refused(self, tenant_id: TenantId, error: OrchestratorError) -> None:
        """See `ServiceHook`."""

    def observer(self, run: RunRow) -> Observer:
        """See `ServiceHook`."""
        return self._see

    def left(self, run: RunRow) -> None:
        """See `ServiceHook`."""

    def _see(self, event: Event) -> None:
        self.happened_at.append(event.at)
        if isinstance(event.payload, TurnStarted | RunEnded):
            began = self._began.pop(event.run_id, None)
            # The first turn is held until all runs are live.
            if began is not None:
                self.turns_s.append(event.at - began)
            if isinstance(event.payload, TurnStarted) and event.payload.turn > 1:
                self._began[event.run_id] = event.at


async def serve(directory: Path, store_url: str, max_running: int, pause_s: float) -> None:
    """Serve until stdin ends. The line `go` on it lets runs go on that are held in their first turn."""
    allow_open_files(max_running + _STREAMS)
    model, clock = _Instant(pause_s), Clock()
    async with (
        GuestsElsewhere() as guests,
        open_server(
            directory,
            model,
            sandboxes=max_running,
            max_running=max_running,
            hooks=[clock],
            # It is used as a driver only.
            driver=cast(InProcessDriver, guests),
            store_url=store_url,
        ) as server,
    ):
        rules = TenantRules(max_concurrent_runs=100_000, max_queued_runs=1_000_000)
        tenant = await server.books.tenants.add_tenant("bench", rules)
        _, key = await server.books.tenants.add_key(tenant.tenant_id, Role.ADMIN)
        leave_to_stay()
        print(server.port.address, key, flush=True)
        stdin = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin
        )
        while (line := await stdin.readline()) != b"":
            if line == b"go\n":
                model.go.set()
            else:
                print(json.dumps({"happened_at": clock.happened_at, "turns_s": clock.turns_s}), flush=True)


if __name__ == "__main__":
    _directory, _store_url, _max_running, _pause_s = sys.argv[1:]
    asyncio.run(serve(Path(_directory), _store_url, int(_max_running), float(_pause_s)))
