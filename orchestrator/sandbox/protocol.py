"""What a guest may say on its stream, and when: the host's side of `SandboxService.Attach`, without I/O.

The guest is hostile from its first message. Anything out of order or past a cap is a `GuestProtocolError`,
which ends the sandbox; nothing a guest sends reaches the rest of the program unchecked.
"""

import codecs
from dataclasses import dataclass, field

from rlm_proto.v1 import sandbox_pb2 as pb

from orchestrator.cells import CellOutcome, CellResult, Resource, UsedUp
from orchestrator.errors import GuestProtocolError
from orchestrator.limits import (
    ANSWER_CHUNK_BYTES,
    MAX_ANSWER_BYTES,
    MAX_ANSWER_CHUNKS,
    MAX_OUTPUT_CHUNK_BYTES,
    MAX_TRACEBACK_BYTES,
    MAX_VARIABLE_NAME_BYTES,
    MAX_VARIABLES,
    OUTPUT_HEAD_BYTES,
    OUTPUT_TAIL_BYTES,
)

PROTOCOL_VERSION = 1
_REPLACEMENT_BYTES = 3
"""Of one character: an answer that was cut in the middle of its last one."""

_LOST = {
    pb.NamespaceLost.CAUSE_KILLED: CellOutcome.KILLED,
    pb.NamespaceLost.CAUSE_EXITED: CellOutcome.EXITED,
    pb.NamespaceLost.CAUSE_SIGNALLED: CellOutcome.SIGNALLED,
    pb.NamespaceLost.CAUSE_OUT_OF_MEMORY: CellOutcome.OUT_OF_MEMORY,
}

_RESOURCES = {
    pb.USED_UP_TMP_BYTES: Resource.TMP_BYTES,
    pb.USED_UP_TMP_FILES: Resource.TMP_FILES,
    pb.USED_UP_SHM_BYTES: Resource.SHM_BYTES,
    pb.USED_UP_OPEN_FILES: Resource.OPEN_FILES,
    pb.USED_UP_PROCESSES: Resource.PROCESSES,
}


class _Answer:
    """A run's answer as it comes in. Each chunk is read at once, so that no step of it is a long one."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._parts: list[str] = []
        self._length_bytes = 0

    def add(self, data: bytes) -> None:
        """The next chunk.

        Raises:
            GuestProtocolError: The answer comes in too many chunks or is too long, as it is or with all
                replaced that is no UTF-8.
        """
        self.received_bytes += len(data)
        if self.received_bytes > MAX_ANSWER_BYTES:
            raise GuestProtocolError("the answer is longer than it may be")
        if len(self._parts) == MAX_ANSWER_CHUNKS:
            raise GuestProtocolError("the answer comes in too many chunks")
        self._put(self._decoder.decode(data))

    def text(self) -> str:
        """The whole answer."""
        self._put(self._decoder.decode(b"", True))
        return "".join(self._parts)

    def _put(self, part: str) -> None:
        self._parts.append(part)
        self._length_bytes += len(part.encode())
        if self._length_bytes > MAX_ANSWER_BYTES + _REPLACEMENT_BYTES:
            raise GuestProtocolError("the answer is longer than it may be, as UTF-8")


@dataclass(slots=True)
class _RunningCell:
    cell_id: int
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    tail_offset: int = 0
    answer: _Answer | None = None
    received_bytes: int = 0

    @property
    def end(self) -> int:
        """Where what has come so far ends in the cell's whole output."""
        return self.tail_offset + len(self.tail) if self.tail else len(self.head)

    @property
    def cut_bytes(self) -> int:
        """How much is missing between head and tail."""
        return self.tail_offset - len(self.head) if self.tail else 0


class AttachProtocol:
    """The order of one stream. Feed it each message; it tells when a cell is over."""

    def __init__(self) -> None:
        self.hash_seed = 0
        """From Hello; 0 before it."""
        self._cell: _RunningCell | None = None
        self._last_cell_id = 0
        self._variables: tuple[str, ...] = ()

    def cell_started(self) -> int:
        """We are about to send a RunCell; its id."""
        self._last_cell_id += 1
        self._cell = _RunningCell(self._last_cell_id)
        return self._last_cell_id

    def received(self, message: pb.AttachRequest) -> CellResult | None:
        """Take one message from the guest; the result when it ended the cell.

        Raises:
            GuestProtocolError: The message is not allowed here, or passes a cap.
        """
        match message.WhichOneof("message"):
            case "hello":
                self._hello(message.hello)
            case "output":
                self._output(self._running(message.output.cell_id), message.output)
            case "answer":
                self._answer(self._running(message.answer.cell_id), message.answer.data)
            case "cell_ended":
                return self._cell_ended(self._running(message.cell_ended.cell_id), message.cell_ended)
            case _:
                raise GuestProtocolError("the guest sent an empty message")
        return None

    def sandbox_lost(self) -> CellResult:
        """The result of the running cell when the stream broke under it."""
        cell = self._cell
        self._cell = None
        return CellResult(
            outcome=CellOutcome.SANDBOX_LOST,
            output_head=_text(cell.head) if cell else "",
            output_tail=_text(cell.tail) if cell else "",
            output_bytes=cell.end if cell else 0,
            cut_bytes=cell.cut_bytes if cell else 0,
            lost_variables=self._variables,
        )

    def _hello(self, hello: pb.Hello) -> None:
        if self.hash_seed:
            raise GuestProtocolError("the guest said hello twice")
        if hello.protocol_version != PROTOCOL_VERSION:
            raise GuestProtocolError(
                f"the sandbox image speaks protocol {hello.protocol_version}, "
                f"this orchestrator {PROTOCOL_VERSION}: run `rlm image build`"
            )
        if not hello.hash_seed:
            raise GuestProtocolError("the guest's hash seed is 0")
        self.hash_seed = hello.hash_seed

    def _running(self, cell_id: int) -> _RunningCell:
        if self._cell is None or self._cell.cell_id != cell_id:
            raise GuestProtocolError("the guest reported on a cell that is not running")
        return self._cell

    def _output(self, cell: _RunningCell, chunk: pb.OutputChunk) -> None:
        if not 0 < len(chunk.data) <= MAX_OUTPUT_CHUNK_BYTES:
            raise GuestProtocolError("an output chunk is empty or too large")
        cell.received_bytes += len(chunk.data)
        if cell.received_bytes > OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES:
            raise GuestProtocolError("the guest sent more output than it may")
        if chunk.offset == cell.end:
            (cell.tail if cell.tail else cell.head).extend(chunk.data)
        elif chunk.offset > cell.end and not cell.tail:
            cell.tail_offset = chunk.offset
            cell.tail.extend(chunk.data)
        else:
            raise GuestProtocolError("the guest's output goes backwards")

    def _answer(self, cell: _RunningCell, data: bytes) -> None:
        if not 0 < len(data) <= ANSWER_CHUNK_BYTES:
            raise GuestProtocolError("an answer chunk is empty or too large")
        if cell.answer is None:
            cell.answer = _Answer()
        cell.answer.add(data)

    def _cell_ended(self, cell: _RunningCell, ended: pb.CellEnded) -> CellResult:
        outcome, traceback, status = _outcome(ended)
        if ended.HasField("last_output"):
            self._output(self._running(ended.last_output.cell_id), ended.last_output)
        if ended.output_bytes != cell.end:
            raise GuestProtocolError("the guest's output does not add up")
        answer: str | None = None
        if ended.HasField("answer"):
            if ended.answer.length_bytes != (cell.answer.received_bytes if cell.answer else 0):
                raise GuestProtocolError("the answer does not add up")
            answer = cell.answer.text() if cell.answer else ""
        elif cell.answer:
            raise GuestProtocolError("the guest sent an answer and did not announce it")
        variables = _variables(ended)
        lost = () if outcome.namespace_kept else self._variables
        self._variables = variables
        self._cell = None
        return CellResult(
            outcome=outcome,
            output_head=_text(cell.head),
            output_tail=_text(cell.tail),
            output_bytes=ended.output_bytes,
            cut_bytes=cell.cut_bytes,
            traceback=traceback,
            status=status,
            answer=answer,
            variables=variables,
            lost_variables=lost,
            used_up=_used_up(ended),
        )


def _outcome(ended: pb.CellEnded) -> tuple[CellOutcome, str, int]:
    match ended.WhichOneof("outcome"):
        case "ok":
            return CellOutcome.OK, "", 0
        case "error":
            return CellOutcome.ERROR, _traceback(ended.error.traceback), 0
        case "interrupted":
            return CellOutcome.INTERRUPTED, _traceback(ended.interrupted.traceback), 0
        case "namespace_lost":
            lost = ended.namespace_lost
            if lost.cause not in _LOST:
                raise GuestProtocolError("the guest lost its namespace for no known cause")
            return _LOST[lost.cause], "", lost.status
        case _:
            raise GuestProtocolError("the guest ended a cell without an outcome")


def _traceback(data: bytes) -> str:
    if len(data) > MAX_TRACEBACK_BYTES:
        raise GuestProtocolError("a traceback is too large")
    return _text(data)


def _variables(ended: pb.CellEnded) -> tuple[str, ...]:
    if len(ended.variables) > MAX_VARIABLES or any(
        len(name) > MAX_VARIABLE_NAME_BYTES for name in ended.variables
    ):
        raise GuestProtocolError("the guest lists too many variables, or too long ones")
    return tuple(_text(name) for name in ended.variables)


def _used_up(ended: pb.CellEnded) -> tuple[UsedUp, ...]:
    if not ended.used_up:
        return ()
    if len(ended.used_up) > len(_RESOURCES) or not set(ended.used_up) <= set(_RESOURCES):
        raise GuestProtocolError("the guest names limits that there are not")
    return tuple(UsedUp(_RESOURCES[named], 0) for named in dict.fromkeys(ended.used_up))


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace")
