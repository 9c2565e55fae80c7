"""Whether a runtime works on this machine: shown by a real sandbox on it, or not at all.

A runtime is offered only when its probe came through. The probe makes a sandbox as a run does, with all that
a run's sandbox is refused for, runs cells in it, and looks from inside at which kernel answers. It has a
deadline, because a runtime can be registered, and start containers that never run.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.errors import EngineError, OrchestratorError
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import open_machine, open_workplace
from orchestrator.sandbox.lease import LeasedSandbox
from orchestrator.sandbox.runtimes import GVISOR

PROBE_S = 30.0
"""Without the cleaning up, which has the deadline of the engine's calls."""
_CELL_S = 10.0
_WHICH_KERNEL = "print(open('/proc/version').read().strip())"
_COUNT = "x = globals().get('x', 0) + 1; print(x)"
_HOST_KERNEL = Path("/proc/version")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeProbe:
    """What became of a probe."""

    runtime: str
    why_not: str
    """Why it does not work; empty when it does."""
    start_s: float = 0.0
    cells_s: Sequence[float] = ()
    """Round trips of the cells that were run to measure."""

    @property
    def works(self) -> bool:
        """Whether runs may have it."""
        return not self.why_not


async def probe_runtime(
    settings: Settings, runtime: str, *, cells: int = 1, deadline_s: float = PROBE_S
) -> RuntimeProbe:
    """Start a sandbox on the runtime and run cells in it. Nothing is left of it, whatever happens.

    Args:
        settings: The process's.
        runtime: `runc` or `runsc`.
        cells: Trivial cells to run, at least one.
        deadline_s: For all of it without cleaning up.
    """
    try:
        async with asyncio.timeout(deadline_s):
            start_s, cells_s = await _try(settings, runtime, cells)
    except TimeoutError:
        return RuntimeProbe(runtime=runtime, why_not=f"no cell was answered within {deadline_s:g} s")
    except OrchestratorError as error:
        return RuntimeProbe(runtime=runtime, why_not=str(error))
    return RuntimeProbe(runtime=runtime, why_not="", start_s=start_s, cells_s=cells_s)


async def _try(settings: Settings, runtime: str, cells: int) -> tuple[float, list[float]]:
    async with open_workplace(settings) as workplace:
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"probe\n")
        async with (
            open_machine(settings, workplace, runtime=runtime) as machine,
            machine.leases.open(
                lambda directory: workplace.contexts.link_into(context, directory),
                runtime=runtime,
                guest_services=(),
                max_concurrent_calls=1,
            ) as sandbox,
        ):
            kernel, _ = await _cell(sandbox, _WHICH_KERNEL)
            # The guest runs nothing but our image yet, so its word is worth something. The host's side of it,
            # the process behind the container, was looked at when it started (`sandbox.recheck`).
            if runtime == GVISOR and kernel == await asyncio.to_thread(_host_kernel):
                raise EngineError(f"the runtime {GVISOR!r} is not gVisor: this host's kernel answers in it")
            return sandbox.wait_s, [(await _cell(sandbox, _COUNT))[1] for _ in range(cells)]


def _host_kernel() -> str:
    return _HOST_KERNEL.read_text(encoding="utf-8").strip()


async def _cell(sandbox: LeasedSandbox, code: str) -> tuple[str, float]:
    """What a cell printed, and how long it took."""
    clock = CellClock(
        started_s=time.monotonic(), cell_timeout_s=_CELL_S, cell_cpu_s=_CELL_S, cell_ceiling_s=_CELL_S
    )
    result = await sandbox.run_cell(code, clock)
    if result.outcome is not CellOutcome.OK:
        raise EngineError(f"a trivial cell ended as {result.outcome.value}")
    return result.output.strip(), result.duration_s
