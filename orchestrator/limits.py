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
MAX_ANSWER_CHUNKS = 1_024
"""The worker needs 64; each costs us a turn of the event loop, whatever its length."""
MAX_OUTPUT_CHUNK_BYTES = 64 * 1024
MAX_TRACEBACK_BYTES = 16 * 1024
MAX_VARIABLES = 200
MAX_VARIABLE_NAME_BYTES = 100
OUTPUT_HEAD_BYTES = 12 * 1024
"""Of a cell's output the model sees this much from the start ..."""
OUTPUT_TAIL_BYTES = 4 * 1024
"""... and this much from the end."""
MAX_CALLS_IN_GUEST = 128
"""Sub-calls one sandbox may have in flight on its socket, or `max_concurrency` where that is less; the guest
library queues the rest. What they cost us is bounded by their bytes (`MAX_REQUEST_BYTES_HELD`), to which the
guest library keeps too, and not by their number."""
MAX_CALL_ID_BYTES = 64
"""Length of the ids a guest chooses for its calls."""
MAX_CALLS_ON_SOCKET = MAX_CALLS_IN_GUEST + 32
"""Calls served at once on one socket: the stream of cells, the window, and a few cheap ones beside them. Each
may have sent 64 kB that nobody has read yet: 40 MB of one guest, on all its connections."""
MAX_GUEST_CONNECTIONS = 4
"""One worker makes one; the slack is for a reconnect whose predecessor is not yet reaped."""
REQUESTS_RECEIVED_AT_ONCE = 2
"""Messages of one guest that are being received: a started one costs its whole length, and the last step of
receiving a long one some milliseconds in one piece. One of them may be an upload between two parts."""
MAX_REQUEST_BYTES_HELD = 16 * 1024 * 1024
"""Requests of one guest under way together: sixteen prompts that fill a window of 200,000 tokens. While they
are more, the next is left in the guest. A request costs up to seven times its size here (message, text of
wide characters, record), so this is what bounds a guest, at some 400 MB."""
MAX_ANSWER_BYTES_UNREAD = 16 * 1024 * 1024
"""Long answers on their way to one guest, together. An honest worker reads each at once; what a guest leaves
unread costs three times its size here (message, its bytes, gRPC's)."""
MAX_ATTACH_MESSAGE_BYTES = 512 * 1024
"""The longest honest one is an answer chunk."""
MAX_UPLOAD_PART_BYTES = 1024 * 1024
"""One part of an upload."""
MAX_NESTED_MESSAGE_BYTES = 2 * 1024 * 1024
"""A message inside a message, of which only a list of paths is ever long. Two bytes of it can be an element:
parsing a full message of those takes 130 ms in one piece, this much 30."""
MAX_PATHS_IN_REQUEST = 100_000
"""Files a child run may be given by name."""
MAX_FIELDS_IN_MESSAGE = 64
"""Fields at the top of a message, repeats included; our largest has 8."""
INLINE_WORK_BYTES = 64 * 1024
"""Longer texts are read in a thread: hashing and decoding this much takes less than a millisecond."""

# --- A guest's conduct ---------------------------------------------------------------------------------

FREE_CALLS_AT_FULL_SPEED = 1_000
"""Refusals and other calls that cost a guest nothing are answered at once this often ..."""
FREE_CALLS_PER_S = 200.0
"""... and then this often a second, which is some quarter of one core of ours. A batch of 10,000 prompts with
`on_error="return"` after the budget ran out takes 45 s."""
MAX_REFUSALS = 50_000
"""Of one run: five such batches. At the pace above this takes four minutes."""
RECORDED_REFUSALS = 1_000
"""Refusals by a budget that are recorded one by one; later ones are only counted."""
MAX_HANG_UPS = 5_000
"""Of one run: an interrupted cell hangs up on at most a window of calls, a program with time-outs on more."""
MAX_RESETS = 500
"""Of one run, of calls whose request was not even received: milliseconds, in which few interrupts fall."""
MAX_TURNED_AWAY = 2_000
"""Of one run. The guest library never exceeds its window; code that speaks gRPC itself may, by accident."""
MAX_MALFORMED = 100
"""Of one run, of unknown methods likewise: our library sends none, so nobody is hurt by a low number."""

# --- Waiting -------------------------------------------------------------------------------------------

WORKER_DIAL_IN_S = 30.0
"""From the engine's start of a container to its worker's Hello; a gVisor start takes about a second."""
REQUEST_ARRIVES_S = 30.0
"""From the start of a call, or from one part of an upload to the next, until the message is there. A Unix
socket takes milliseconds; a guest that its own cell starves of CPU, seconds."""
RESPONSE_TAKEN_S = 30.0
"""For a guest to take one part of a streamed answer; our worker always reads."""
INTERRUPT_GRACE_S = 2.0
"""From the interrupt of a cell to the kill of its interpreter."""
KILL_GRACE_S = 5.0
"""From the kill of an interpreter to the end of the sandbox."""
ENGINE_CALL_S = 60.0
"""Any one call to the container engine."""
ENGINE_LOOK_S = 10.0
"""A call that only looks; it takes milliseconds."""
ENGINE_REMOVE_S = 20.0
"""To remove a sandbox and see it gone; it takes 54 ms. What is not gone by then is left to the reaper."""
ENGINE_LAST_CALLS_S = 5.0
"""Each, once a server that was told to end has given its runs their time."""
ENGINE_CALLS_AT_ONCE = 16
"""Calls in flight, each in a thread; overdue ones don't count."""
ENGINE_SLOW_START_S = 5.0
"""A start that takes longer is stuck rather than slow, and no longer counts among those at once."""
ENGINE_STARTS_AT_ONCE = 4
"""More make each other slower (design, section 5: 10.4 a second with 4, 9.0 with 8)."""
OWN_STARTS_AT_ONCE = 2 * ENGINE_STARTS_AT_ONCE
"""Sandboxes that are being started, each for a lease of its own, from asking the engine to the first Hello.
Others wait, in turns between tenants; twice as many because the engine has no part in the second half."""
LOOK_AT_LOSS_S = 3.0
"""How long a sandbox whose stream broke may still run before it counts as having hung up on us."""
SANDBOX_EXPIRY_GRACE_S = 600
"""From the deadline of a run to the expiry of its sandbox: ending it takes seconds, clocks may be set."""
POOL_REFILLS_AT_ONCE = 2
"""Starts ahead of demand: half of all starts, so that the other half is left for leases that wait for one."""
POOL_REFILL_AFTER_S = 0.1
"""From a lease to the start of the sandbox that takes the place: its first cell takes a tenth of that, unless
the engine works beside it."""
POOLED_LEASE_S = 6 * 3_600.0
"""The longest lease that a sandbox made ahead can serve: it says when it expires before its run is known. A
longer one starts its own. Only a reaper with another state directory looks at that."""
POOL_MAX_AGE_S = 3_600.0
"""How long a sandbox waits for a lease before it is replaced."""
POOL_QUEUE_S = 30.0
"""With RLM_POOL_WHEN_EMPTY=queue: how long a lease waits. Six starts a second, so some 180 come before it."""
REAP_EVERY_S = 60.0
"""How often a living orchestrator looks for what was left behind."""
REAP_AT_START_S = 10.0
"""How long a start waits for the first look; it goes on behind the first run."""

# --- The HTTP port -------------------------------------------------------------------------------------

MAX_HTTP_HEADER_BYTES = 32 * 1024
"""Request line and headers."""
MAX_INLINE_TEXT_BYTES = 4 * 1024 * 1024
"""A context inside the request of a run; a larger one is uploaded."""
MAX_HTTP_BODY_BYTES = 8 * 1024 * 1024
"""A JSON body: the text above and its escapes."""
MAX_MESSAGES_BODY_BYTES = 64 * 1024 * 1024
"""A prompt to `/v1/messages`: twice what Anthropic's own endpoint takes. It is held in memory a few times
over until its run is stored; whoever has more uploads it."""
MAX_JSON_STRUCTURE_BYTES = 256 * 1024
"""Of a JSON body outside of its strings: some ten thousand blocks of text. What is in strings costs its
length; eight megabytes of `{"type":"text","text":""}` cost 400 MB, and seconds in one piece."""
JSON_STRUCTURE_COST = 50
"""What a byte outside of strings takes in memory, measured."""
MAX_HTTP_BODIES_BYTES = 256 * 1024 * 1024
"""Bodies under way, all clients together. While they are more, the next is asked to come again."""
MAX_HTTP_CONNECTIONS = 4_000
"""More are told to come again: sandboxes and gRPC need open files too."""
MAX_HTTP_IDLE_CONNECTIONS = 1_000
"""Without a request that was let in, strangers' among them. The next one takes the oldest one's place, so
that whoever opens connections and says nothing shuts nobody out."""
MAX_HTTP_REQUESTS_OF_TENANT = 2_000
"""Requests of one tenant at once, watched runs included: half of the connections are for others."""
HTTP_HEAD_S = 30.0
"""From a connection's start to the end of its first request's headers."""
HTTP_KEEP_ALIVE_S = 75
"""A connection without a request is kept so long."""
HTTP_BODY_PART_S = 30.0
"""From one part of a body to the next."""
HTTP_BODY_S = 600.0
"""For a whole body: the largest at 1 Mbit/s."""
HTTP_ANSWER_S = 60.0
"""For an answer that is no stream, once the request is there."""
HTTP_PART_TAKEN_S = 60.0
"""For a client to take the 48 kB that bring a full buffer down; then it counts as gone."""
HTTP_HEARTBEAT_S = 15.0
"""Something is sent so often while a stream has nothing to say, for what sits in between and cuts silence."""
HTTP_LINGER_S = 5.0
"""How long a body is read on after its request was refused, so that its client gets to read why."""
HTTP_STREAMS_END_S = 3
"""What streams have to end when the server does; their clients take them up elsewhere."""
