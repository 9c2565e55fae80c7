"""What makes the process behind a sandbox, whichever engine does it."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from orchestrator.ids import SandboxId

GUEST_SOCKET_DIR = "/run/rlm"
GUEST_CONTEXT_DIR = "/context"
GUEST_TMP_DIR = "/tmp"  # noqa: S108 - the guest's own, in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSpec:
    """One sandbox to be made. It names no tenant and no run, so the engine learns of neither."""

    sandbox_id: SandboxId
    socket_dir: Path
    """Holds the socket the worker dials; seen by the guest at GUEST_SOCKET_DIR, read-only."""
    context_dir: Path
    """Filled before the lease; seen by the guest at GUEST_CONTEXT_DIR, read-only."""
    uid: int
    """User and group the guest runs as."""
    runtime: str
    """OCI runtime: `runc` or `runsc`."""


class Ending(Enum):
    """How the process behind a sandbox went away, as the engine tells it."""

    RUNNING = "running"
    EXITED = "exited"
    OUT_OF_MEMORY = "out of memory"
    GONE = "gone"


class SandboxDriver(Protocol):
    """Makes and destroys sandboxes. It never looks into one: everything else goes over the socket.

    One contract suite (`tests/contract/test_sandbox_driver.py`) runs over every implementation.
    """

    @property
    def image(self) -> str:
        """What sandboxes are made of, pinned."""
        ...

    async def start(self, spec: SandboxSpec) -> None:
        """Start a sandbox whose worker will dial its socket.

        When it raises, nothing is left behind.

        Raises:
            SandboxStartError: This sandbox did not start; another may.
            EngineError: The engine does not answer or lacks something.
        """
        ...

    async def destroy(self, sandbox_id: SandboxId) -> None:
        """End a sandbox and everything in it. One that is gone already is fine.

        Raises:
            EngineError: The engine did not confirm before the deadline; the sandbox may still be there.
        """
        ...

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        """CPU time of the whole sandbox so far, in seconds, read on the host; 0 when it is gone."""
        ...

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        """How the sandbox went away, for a sandbox that was not destroyed by us."""
        ...

    async def aclose(self) -> None:
        """Release connections to the engine."""
        ...
