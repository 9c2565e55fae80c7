"""How a cell ended, in the contract's words. Pure."""

import signal
from typing import Any

from rlm_proto.v1 import sandbox_pb2

from sandbox_image.worker import protocol
from sandbox_image.worker.frames import Frame

_USED_UP = {
    protocol.TMP_BYTES: sandbox_pb2.USED_UP_TMP_BYTES,
    protocol.TMP_FILES: sandbox_pb2.USED_UP_TMP_FILES,
    protocol.SHM_BYTES: sandbox_pb2.USED_UP_SHM_BYTES,
    protocol.OPEN_FILES: sandbox_pb2.USED_UP_OPEN_FILES,
    protocol.PROCESSES: sandbox_pb2.USED_UP_PROCESSES,
}


def cell_ended(frame: Frame, cell_id: int, output_bytes: int, interrupted: bool) -> sandbox_pb2.CellEnded:
    """The CellEnded for what the interpreter reported.

    A KeyboardInterrupt counts as an interruption only if the worker sent one; else the cell raised it itself.

    Raises:
        KeyError, TypeError, ValueError: The frame is not what the interpreter sends.
    """
    ended = sandbox_pb2.CellEnded(
        cell_id=cell_id,
        output_bytes=output_bytes,
        variables=_variables(frame.header["variables"]),
        used_up={_USED_UP[name] for name in frame.header["used_up"]},
    )
    outcome = frame.header["outcome"]
    traceback = frame.payload[: protocol.TRACEBACK_BYTES]
    if outcome == protocol.OUTCOME_OK:
        ended.ok.SetInParent()
    elif outcome == protocol.OUTCOME_INTERRUPTED and interrupted:
        ended.interrupted.traceback = traceback
    else:
        ended.error.traceback = traceback
    if frame.header["answer_bytes"] is not None:
        ended.answer.length_bytes = frame.header["answer_bytes"]
    return ended


def loss_of(exit_code: int, *, killed: bool, out_of_memory: bool) -> sandbox_pb2.NamespaceLost:
    """Why an interpreter is gone.

    Args:
        exit_code: What it returned, or minus the signal that ended it.
        killed: The host had asked for it.
        out_of_memory: The kernel has killed something in this sandbox since the interpreter started. It need
            not have been the interpreter, so this decides only together with a SIGKILL.
    """
    causes = sandbox_pb2.NamespaceLost
    if killed:
        return causes(cause=causes.CAUSE_KILLED)
    if exit_code >= 0:
        return causes(cause=causes.CAUSE_EXITED, status=exit_code)
    if exit_code == -signal.SIGKILL and out_of_memory:
        return causes(cause=causes.CAUSE_OUT_OF_MEMORY)
    return causes(cause=causes.CAUSE_SIGNALLED, status=-exit_code)


def _variables(names: Any) -> list[bytes]:
    encoded = [name.encode("utf-8", "replace") for name in names[: protocol.VARIABLES_LISTED]]
    return [_cut(name, protocol.VARIABLE_NAME_BYTES) for name in encoded]


def _cut(text: bytes, limit: int) -> bytes:
    """The longest whole characters that fit."""
    return text[:limit].decode("utf-8", "ignore").encode()
