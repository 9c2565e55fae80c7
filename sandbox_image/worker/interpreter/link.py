"""The interpreter's end of the call socket."""

import itertools
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sandbox_image.worker import protocol
from sandbox_image.worker.frames import Frame, FrameDecoder, encode_head
from sandbox_image.worker.interpreter.errors import NotExecuting, SubCallCancelled, SubCallError, from_reply
from sandbox_image.worker.interpreter.interrupts import Interrupts

_RECEIVE_BYTES = 262_144
# Below this, joining head and payload is cheaper than handing the kernel two buffers.
_JOIN_BYTES = 4096

_NO_CELL = "no cell is running; make sub-calls from a cell, not from a thread that outlives it"
_CELL_ENDED = "the cell that made this call has ended"
_CHILD_PROCESS = (
    "sub-calls work only in the cell's own process, not in one it forked; "
    "llm_query_batched runs calls in parallel without processes"
)

OnReply = Callable[[Frame | None, SubCallError | None], None]
"""Called once with a reply or an error, by the thread that reads replies or the one that made the request."""


class Request(NamedTuple):
    """One thing to ask of the worker."""

    kind: str
    header: Mapping[str, Any]
    payload: bytes = b""
    windowed: bool = True
    """Counts towards the calls in flight. Parts of an upload belong to a call that is under way already."""


class _Waiting(NamedTuple):
    request_id: int
    request: Request
    on_reply: OnReply


class _Sent(NamedTuple):
    """What is left of a request once it has been sent: its payload is not kept."""

    on_reply: OnReply
    windowed: bool
    payload_bytes: int


class CallLink:
    """Sends requests, at most `window` at a time, from any thread; one thread of its own reads replies.

    What is in flight together has at most `protocol.BYTES_IN_FLIGHT` of payload, a longer one goes alone: the
    worker holds each of them until its reply, and a hundred may be long.

    The lock covers the state and the socket's sending side. `interrupts` is held around it: a SIGINT that
    raised in the middle of a frame would leave the rest of the run unreadable.
    """

    def __init__(self, sock: socket.socket, interrupts: Interrupts) -> None:
        self.window = 1
        """Most requests in flight at once."""
        self._socket = sock
        self._interrupts = interrupts
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._cell_id: int | None = None
        self._in_flight: dict[int, _Sent] = {}
        self._window_used = 0
        self._bytes_in_flight = 0
        self._waiting: deque[_Waiting] = deque()
        self._reading = False
        self._in_child = False

    @property
    def is_full(self) -> bool:
        """Whether a request would have to wait now."""
        return bool(self._waiting)

    def begin_cell(self, cell_id: int) -> None:
        """Calls made from here on belong to this cell."""
        self._cell_id = cell_id

    def end_cell(self) -> None:
        """Fail every call that has no reply yet, and all made until the next cell begins."""
        with self._lock:
            self._cell_id = None
            if not self._in_flight and not self._waiting:
                return
            open_calls: list[_Sent | _Waiting] = [*self._in_flight.values(), *self._waiting]
            self._in_flight.clear()
            self._waiting.clear()
            self._window_used = self._bytes_in_flight = 0
        for call in open_calls:
            call.on_reply(None, SubCallCancelled(_CELL_ENDED))

    def abandon(self) -> None:
        """In a forked child: let go of the socket, which is the parent's."""
        self._in_child = True
        self._lock = threading.Lock()
        self._socket.close()

    def request(self, request: Request, on_reply: OnReply) -> int:
        """Send a request, at once or when the window allows. Gives the id to cancel it by."""
        request_id = next(self._ids)
        refusal: SubCallError | None = None
        with self._interrupts, self._lock:
            if self._in_child:
                refusal = SubCallError(_CHILD_PROCESS)
            elif self._cell_id is None:
                refusal = NotExecuting(_NO_CELL)
            else:
                call = _Waiting(request_id, request, on_reply)
                if request.windowed:
                    self._waiting.append(call)
                    self._send_waiting()
                else:
                    self._send_request(call)
                self._start_reading()
        if refusal is not None:
            on_reply(None, refusal)
        return request_id

    def cancel(self, request_id: int) -> None:
        """Fail a request that has no reply yet."""
        with self._interrupts, self._lock:
            call: _Sent | _Waiting | None = self._take(request_id)
            if call is not None:
                self._send(Frame({"kind": protocol.CANCEL, "id": request_id}))
                self._send_waiting()
            else:
                waiting = next((one for one in self._waiting if one.request_id == request_id), None)
                if waiting is not None:
                    self._waiting.remove(waiting)
                call = waiting
        if call is not None:
            call.on_reply(None, SubCallCancelled("the call was cancelled"))

    def _send_waiting(self) -> None:
        while self._waiting and self._has_room(len(self._waiting[0].request.payload)):
            self._send_request(self._waiting.popleft())

    def _has_room(self, payload_bytes: int) -> bool:
        if not self._window_used:
            return True
        bytes_then = self._bytes_in_flight + payload_bytes
        return self._window_used < self.window and bytes_then <= protocol.BYTES_IN_FLIGHT

    def _send_request(self, call: _Waiting) -> None:
        request = call.request
        if request.windowed:
            self._window_used += 1
            self._bytes_in_flight += len(request.payload)
        self._in_flight[call.request_id] = _Sent(call.on_reply, request.windowed, len(request.payload))
        header = {"kind": request.kind, "id": call.request_id, "cell_id": self._cell_id}
        self._send(Frame({**header, **request.header}, request.payload))

    def _take(self, request_id: int) -> _Sent | None:
        call = self._in_flight.pop(request_id, None)
        if call is not None and call.windowed:
            self._window_used -= 1
            self._bytes_in_flight -= call.payload_bytes
        return call

    def _send(self, frame: Frame) -> None:
        head = encode_head(frame.header, len(frame.payload))
        if len(frame.payload) < _JOIN_BYTES:
            self._socket.sendall(head + frame.payload)
        else:
            self._socket.sendall(head)
            self._socket.sendall(frame.payload)

    def _start_reading(self) -> None:
        # Only once it is needed: a thread beside the main one makes Python warn at every fork.
        if not self._reading:
            self._reading = True
            threading.Thread(target=self._read, name="sub-call replies", daemon=True).start()

    def _read(self) -> None:
        decoder = FrameDecoder()
        while data := self._socket.recv(_RECEIVE_BYTES):
            for frame in decoder.feed(data):
                self._reply(frame)

    def _reply(self, frame: Frame) -> None:
        with self._lock:
            call = self._take(frame.header["id"])
            self._send_waiting()
        if call is None:
            return
        error = frame.header.get("error")
        if error is None:
            call.on_reply(frame, None)
        else:
            call.on_reply(None, from_reply(error))
