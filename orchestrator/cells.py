"""How a cell ended, and the clock that decides when it must."""

from dataclasses import dataclass, field, replace
from enum import Enum


class CellOutcome(Enum):
    """How a cell ended, and what became of the namespace."""

    OK = "ok"
    ERROR = "error"
    """It raised. Namespace kept."""
    INTERRUPTED = "interrupted"
    """It passed its time and obeyed the interrupt. Namespace kept."""
    KILLED = "killed"
    """It passed its time and ignored the interrupt. Namespace lost."""
    EXITED = "exited"
    """It ended its own interpreter. Namespace lost."""
    SIGNALLED = "signalled"
    """A signal ended its interpreter. Namespace lost."""
    OUT_OF_MEMORY = "out_of_memory"
    """The kernel killed its interpreter for memory. Namespace lost."""
    SANDBOX_LOST = "sandbox_lost"
    """The whole sandbox went away. Namespace lost."""

    @property
    def namespace_kept(self) -> bool:
        """Whether the next cell still finds what this run has built."""
        return self in {CellOutcome.OK, CellOutcome.ERROR, CellOutcome.INTERRUPTED}


class SandboxLoss(Enum):
    """Why a whole sandbox went away under its run. `sandbox/endings.py` decides which."""

    OUT_OF_MEMORY = "out_of_memory"
    """The kernel killed its worker, or all of it, for memory."""
    WORKER_ENDED = "worker_ended"
    """Its worker ended or closed its stream, and nobody had asked for it."""
    WORKER_SILENT = "worker_silent"
    """Its worker neither answered nor ended, so we gave it up."""
    PROTOCOL_BROKEN = "protocol_broken"
    """Something in it spoke out of order on the stream, so we ended it."""
    CONTAINER_GONE = "container_gone"
    """Somebody else killed or removed its container."""
    ENGINE_GONE = "engine_gone"
    """Its stream broke and the container engine does not answer."""
    ORCHESTRATOR_ENDED = "orchestrator_ended"
    """We ended while the cell ran, again and again when it was run again: it is not tried once more."""


class Resource(Enum):
    """Something of which a sandbox has only so much."""

    MEMORY = "memory"
    PROCESSES = "processes"
    TMP_BYTES = "tmp_bytes"
    TMP_FILES = "tmp_files"
    SHM_BYTES = "shm_bytes"
    OPEN_FILES = "open_files"


@dataclass(frozen=True, slots=True)
class UsedUp:
    """A limit of the sandbox that a cell ran into."""

    resource: Resource
    limit: int
    """Bytes or a count; 0 when unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """One cell, run. Text from the guest: hostile, decoded with replacement, capped."""

    outcome: CellOutcome
    output_head: str = ""
    output_tail: str = ""
    output_bytes: int = 0
    """Length of the whole output; more than head and tail hold when it was cut."""
    cut_bytes: int = 0
    """How much is missing between head and tail."""
    traceback: str = ""
    status: int = 0
    """Exit code with EXITED, signal with SIGNALLED."""
    answer: str | None = None
    """Set when the cell ended the run."""
    variables: tuple[str, ...] = ()
    """Names in the namespace after the cell, as the guest reports them."""
    lost_variables: tuple[str, ...] = ()
    """Names that went with the namespace."""
    duration_s: float = 0.0
    guest_s: float = 0.0
    """What the cell clock counted."""
    passed: "CellLimit | None" = None
    """The limit of the clock that the cell passed."""
    used_up: tuple[UsedUp, ...] = ()
    """Limits of the sandbox that the cell ran into. With MEMORY and a namespace kept, the kernel killed a
    process that the cell had started."""
    loss: SandboxLoss | None = None
    """Why the sandbox went away, with SANDBOX_LOST."""

    def lost_for(self, loss: SandboxLoss) -> "CellResult":
        """The result of a cell whose sandbox was lost, with the reason."""
        return replace(self, loss=loss)

    @property
    def output(self) -> str:
        """What the cell wrote, with the cut named."""
        if not self.cut_bytes:
            return self.output_head + self.output_tail
        return f"{self.output_head}\n[... {self.cut_bytes:,} bytes of output cut ...]\n{self.output_tail}"


class CellLimit(Enum):
    """Which limit a cell passed."""

    GUEST_TIME = "guest time"
    CPU_TIME = "CPU time"
    CEILING = "wall time"


@dataclass(slots=True)
class CellClock:
    """Decides when a cell has had its time.

    Guest time is wall time less the intervals in which at least one sub-call of the cell was in flight. CPU
    time and the ceiling run on regardless, so that a cell cannot compute for free beside a waiting call. All
    times are seconds of one monotonic clock that the caller reads.
    """

    started_s: float
    cell_timeout_s: float
    cell_cpu_s: float
    cell_ceiling_s: float
    _in_flight: int = 0
    _waiting_since_s: float = 0.0
    _waited_s: float = field(default=0.0)

    def sub_call_started(self, now_s: float) -> None:
        """A sub-call of the cell was dispatched."""
        if self._in_flight == 0:
            self._waiting_since_s = now_s
        self._in_flight += 1

    def sub_call_ended(self, now_s: float) -> None:
        """It came back, in whatever way."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._waited_s += now_s - self._waiting_since_s

    @property
    def waiting(self) -> bool:
        """Whether a sub-call is in flight, so that guest time stands still."""
        return self._in_flight > 0

    def guest_s(self, now_s: float) -> float:
        """Guest time so far."""
        waited_s = self._waited_s + (now_s - self._waiting_since_s if self._in_flight else 0.0)
        return now_s - self.started_s - waited_s

    def passed(self, now_s: float, cpu_s: float) -> CellLimit | None:
        """The limit the cell has passed, if any."""
        if self.guest_s(now_s) >= self.cell_timeout_s:
            return CellLimit.GUEST_TIME
        if cpu_s >= self.cell_cpu_s:
            return CellLimit.CPU_TIME
        if now_s - self.started_s >= self.cell_ceiling_s:
            return CellLimit.CEILING
        return None

    def next_look_s(self, now_s: float) -> float:
        """Seconds until a limit could be passed at the earliest, if nothing changes; CPU time aside."""
        until_ceiling_s = self.started_s + self.cell_ceiling_s - now_s
        guest_left_s = self.cell_timeout_s - self.guest_s(now_s)
        if self._in_flight and guest_left_s > 0:
            return max(0.0, until_ceiling_s)
        return max(0.0, min(until_ceiling_s, guest_left_s))
