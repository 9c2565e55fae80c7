"""What the worker and the interpreter say to each other. `frames` says how.

Control socket, answered by the interpreter's main thread:

    interpreter  {"kind": "ready"}                               once, when it can be leased
    worker       {"kind": "lease", max_str_bytes, max_answer_bytes, max_concurrent_calls, max_prompt_bytes,
                  context_dir}
    interpreter  {"kind": "leased"}                              the context is open
    worker       {"kind": "cell", "cell_id"}                     payload: the source
    interpreter  {"kind": "answer"}*                             payload: a part of the run's answer
    interpreter  {"kind": "ended", "outcome", "variables", "answer_bytes", "used_up"}   payload: the traceback

Call socket, any number of requests at once, each with exactly one reply unless its cell ends first:

    interpreter  {"kind": <one of the request kinds>, "id", "cell_id", ...}
    interpreter  {"kind": "cancel", "id"}                        nobody waits for that reply any more
    worker       {"id", ...}                                     payload: the result
    worker       {"id", "error": {"reason", "message", ...}}
"""

from typing import Final

READY: Final = "ready"
LEASE: Final = "lease"
LEASED: Final = "leased"
CELL: Final = "cell"
ANSWER: Final = "answer"
ENDED: Final = "ended"

OUTCOME_OK: Final = "ok"
OUTCOME_ERROR: Final = "error"
OUTCOME_INTERRUPTED: Final = "interrupted"

TMP_BYTES: Final = "tmp_bytes"
TMP_FILES: Final = "tmp_files"
SHM_BYTES: Final = "shm_bytes"
OPEN_FILES: Final = "open_files"
PROCESSES: Final = "processes"

COMPLETE: Final = "complete"
CHILD_RUN: Final = "child_run"
UPLOAD_PART: Final = "upload_part"
UPLOAD_END: Final = "upload_end"
BUDGET: Final = "budget"
CANCEL: Final = "cancel"

# The contract's cap on one AnswerChunk; the interpreter cuts there so that the worker only passes parts on.
ANSWER_PART_BYTES: Final = 262_144

# The contract's cap on one part of an upload and on a context sent inside StartChildRun.
UPLOAD_PART_BYTES: Final = 1_048_576

# Prompts in flight together. The host takes in as much of one guest at a time; more would wait in the worker.
BYTES_IN_FLIGHT: Final = 16 * 1024 * 1024

TRACEBACK_BYTES: Final = 16_384
VARIABLES_LISTED: Final = 200
VARIABLE_NAME_BYTES: Final = 100
