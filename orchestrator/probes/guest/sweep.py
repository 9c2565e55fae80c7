"""Every system call there is, and those that may come, with arguments that do nothing (A10)."""

import os
import signal

from orchestrator.probes.guest.door import OPEN, arguments, call, say

_MAX_CHILDREN = 100
"""A call that ends its process or waits costs one; very few do."""

sweep = arguments["sweep"]


def _make_calls(writer: int, start: int) -> None:
    """From `start` on, in this process; what is under way is written before it is made."""
    own = os.getpid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for position in range(start, len(sweep)):
        number, values = sweep[position]
        os.write(writer, f"{position} ".encode())
        signal.alarm(1)  # a call that waits ends this process: it went through
        answer = call(number, *values)
        if os.getpid() != own:
            os._exit(0)  # what `fork` made
        os.write(writer, f"{answer}\n".encode())


def _answers_from(start: int) -> tuple[list[str], str]:
    """What a child process says of the calls from `start` on, and what ended it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _make_calls(writer, start)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        lines = said.read().splitlines()
    status = os.waitpid(child, 0)[1]
    return lines, signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else OPEN


by_answer: dict[str, list[int]] = {}
start = 0
for _child in range(_MAX_CHILDREN):
    lines, ending = _answers_from(start)
    for line in lines:
        where, _, answer = line.partition(" ")
        # Without an answer: the call that ended the process.
        by_answer.setdefault(answer or ending, []).append(sweep[int(where)][0])
        start = int(where) + 1
    if start == len(sweep):
        break
say("sweep", {"answers": by_answer, "finished": start == len(sweep)})
