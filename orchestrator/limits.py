"""Every number that limits something, with the reason for its default."""

from dataclasses import dataclass

# --- What one run tree may use -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLimits:
    """What one run tree may use. Each default is meant to stop an accident, not a piece of work."""

    max_tokens: int = 5_000_000
    """Input, cache-read, cache-write and output tokens of the whole tree."""
    max_cost_microusd: int = 5_000_000
    """Five dollars for the whole tree."""
    max_calls: int = 1_000
    """Attempts at a provider that were or may have been billed, whole tree."""
    max_child_runs: int = 100
    """Child runs started, whole tree."""
    max_depth: int = 2
    """Edges from the root run. 0 forbids child runs."""
    max_turns: int = 40
    """Turns of each run."""
    max_concurrency: int = 16
    """Provider calls in flight at once, whole tree. A parent that waits for children counts for nothing."""
    deadline_s: float = 3_600.0
    """From the start of the root run; queueing and model time count."""
    cell_timeout_s: float = 120.0
    """Guest time of one cell: wall time less the time in which a sub-call of the cell is in flight."""
    cell_cpu_s: float = 300.0
    """CPU time of one cell, all processes: a busy thread beside a waiting one still pays."""
    cell_ceiling_s: float = 3_600.0
    """Wall time of one cell whatever it waits for."""


# --- One model call ------------------------------------------------------------------------------------

DEFAULT_SUB_CALL_MAX_TOKENS = 4_096
"""What a sub-call may write when it doesn't say. Shrinks to what the budget has left."""
LEAST_SUB_CALL_MAX_TOKENS = 256
"""It shrinks no further: a shorter answer is rarely one."""
TURN_MAX_TOKENS = 16_384
"""What the model of a run may write in a turn, thinking included. Shrinks like the above."""
LEAST_TURN_MAX_TOKENS = 1_024
"""A cell and its thinking need some room."""
LAST_ANSWER_MAX_TOKENS = 2_048
"""What is kept for the root's last answer."""
LEAST_LAST_ANSWER_MAX_TOKENS = 256
"""It shrinks no further."""
MODEL_CALL_TIMEOUT_S = 600.0
"""One attempt; also the provider's own bound for calls that don't stream."""
MODEL_ATTEMPTS = 6
"""Attempts at one model call, the first included."""

# --- The guest's socket --------------------------------------------------------------------------------

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest gRPC message in either direction."""
MAX_PROMPT_BYTES = 7 * 1024 * 1024
"""Largest prompt of a sub-call: more than any model's window holds, less than a message."""
MAX_INLINE_CONTEXT_BYTES = 1024 * 1024
"""A child's context inside the request; a larger one is uploaded."""
MAX_UPLOAD_BYTES = 4 * 1024 * 1024 * 1024
"""All uploads of one run together."""
MAX_CONTEXT_FILES = 1_000_000
"""Files in one context."""
ANSWER_CHUNK_BYTES = 256 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""Longest answer of a run."""
MAX_OUTPUT_CHUNK_BYTES = 64 * 1024
MAX_TRACEBACK_BYTES = 16 * 1024
MAX_VARIABLES = 200
MAX_VARIABLE_NAME_BYTES = 100
OUTPUT_HEAD_BYTES = 12 * 1024
"""Of a cell's output the model sees this much from the start ..."""
OUTPUT_TAIL_BYTES = 4 * 1024
"""... and this much from the end."""
MAX_CALLS_IN_GUEST = 32
"""Sub-calls one sandbox may have in flight on its socket; the guest library queues the rest."""
MAX_CALL_ID_BYTES = 64
"""Length of the ids a guest chooses for its calls."""

# --- Waiting -------------------------------------------------------------------------------------------

WORKER_DIAL_IN_S = 30.0
"""From the engine's start of a container to its worker's Hello; a gVisor start takes about a second."""
INTERRUPT_GRACE_S = 2.0
"""From the interrupt of a cell to the kill of its interpreter."""
KILL_GRACE_S = 5.0
"""From the kill of an interpreter to the end of the sandbox."""
ENGINE_CALL_S = 60.0
"""Any one call to the container engine."""
ENGINE_STARTS_AT_ONCE = 4
"""More make each other slower (design, section 5: 10.4 a second with 4, 9.0 with 8)."""
