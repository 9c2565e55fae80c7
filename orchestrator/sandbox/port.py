"""What makes the process behind a sandbox, whichever engine does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from orchestrator.ids import InstanceId, SandboxId

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
    expires_at_s: int = 0
    """Unix time at which its maker has certainly ended it, or is gone. 0 for never."""
    record: Path | None = None
    """Where the driver writes the engine's own id of the sandbox before it starts it, so that what a failed
    start leaves running can be found."""


class Ending(Enum):
    """How the process behind a sandbox went away, as the engine tells it. See `sandbox/endings.py`."""

    RUNNING = "running"
    EXITED = "exited"
    OUT_OF_MEMORY = "out of memory"
    """It was killed, and the kernel had killed something of it for memory, at that moment or before."""
    KILLED = "killed"
    """By a SIGKILL, and not for memory."""
    GONE = "gone"


class Counters(NamedTuple):
    """What the kernel counted against a sandbox since its start; None for what the host cannot read."""

    oom_kills: int | None
    """Processes killed for memory."""
    refused_forks: int | None
    """Processes and threads refused at the limit."""
    cpu_s: float | None = None
    """CPU time of all its processes, in seconds."""


class Found(NamedTuple):
    """A sandbox on the engine, whoever made it."""

    sandbox_id: SandboxId
    instance_id: InstanceId
    expires_at_s: int
    uid: int


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

        Whether it raises or not, something may be there: `destroy` must follow.

        Raises:
            SandboxStartError: This sandbox did not start; another may.
            EngineError: The engine does not answer or lacks something.
        """
        ...

    async def destroy(self, sandbox_id: SandboxId) -> None:
        """End a sandbox and everything in it, and see that it is gone. One that is gone already is fine.

        Raises:
            EngineError: The engine did not confirm before its deadline; the sandbox may still be there.
        """
        ...

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        """CPU time of the whole sandbox so far, in seconds, read on the host; 0 when it is gone."""
        ...

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        """How the sandbox went away, for a sandbox that was not destroyed by us.

        Raises:
            EngineError: The engine does not answer.
        """
        ...

    def counters(self, sandbox_id: SandboxId) -> Counters:
        """What the kernel counted against a sandbox; quick, and never raises."""
        ...

    async def found(self) -> Sequence[Found]:
        """All sandboxes on the engine, running or not, those of other orchestrators too.

        Raises:
            EngineError: The engine does not answer.
        """
        ...

    async def aclose(self) -> None:
        """Release connections to the engine."""
        ...
