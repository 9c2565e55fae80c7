"""The Attach stream: one run's cells, in the order the contract gives."""

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

import grpc
from rlm_proto.v1 import broker_pb2_grpc, sandbox_pb2

from sandbox_image.worker import protocol
from sandbox_image.worker.endings import cell_ended, loss_of
from sandbox_image.worker.frames import Frame
from sandbox_image.worker.guest import Guest, Listener
from sandbox_image.worker.memory import oom_kills
from sandbox_image.worker.outbox import Outbox
from sandbox_image.worker.output import Chunk, OutputCapture
from sandbox_image.worker.processes import Reaper
from sandbox_image.worker.spawn import Spawned, spawn_interpreter
from sandbox_image.worker.subcalls import SubCalls

PROTOCOL_VERSION: Final = 1

# Code that swallows the first KeyboardInterrupt, or an async cell that never awaits, gets one more.
_SECOND_INTERRUPT_S: Final = 0.5

AttachCall: TypeAlias = "grpc.aio.StreamStreamCall[sandbox_pb2.AttachRequest, sandbox_pb2.AttachResponse]"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the guest finds and keeps files."""

    context_dir: str
    """Holds `blob` and `manifest.json` once the lease has come."""
    work_dir: str
    """The cells' current directory and home."""


@dataclass(slots=True)
class _Cell:
    """The running cell."""

    cell_id: int
    capture: OutputCapture
    answer_bytes: int = 0
    interrupted: bool = False
    killed: bool = False


class Session:
    """Serves one lease, from Hello to the end of the stream.

    One event loop, no locks. Three things happen to it: a message of the host (`_serve`), a frame of the
    interpreter (`_on_control`), the interpreter's death (`_outlive`). Each cell ends exactly once: whoever
    ends it takes it out of `_cell`.
    """

    def __init__(
        self,
        call: AttachCall,
        broker: "broker_pb2_grpc.BrokerServiceAsyncStub",
        reaper: Reaper,
        places: Places,
    ) -> None:
        self._call = call
        self._broker = broker
        self._reaper = reaper
        self._places = places
        self._call_ids = (f"call-{number}" for number in itertools.count(1))
        self._outbox = Outbox(call.write, self._hold_back)
        self._listener = Listener(self._on_control, self._on_call, self._on_output)
        self._lease = sandbox_pb2.Lease()
        self._guest: Guest
        self._subcalls: SubCalls
        self._cell: _Cell | None = None
        self._lost_between_cells: sandbox_pb2.NamespaceLost | None = None
        self._oom_kills = 0

    async def run(self, spawned: Spawned) -> None:
        """Serve until the host closes the stream.

        Raises:
            grpc.aio.AioRpcError: The stream broke.
            InterpreterFailed: No interpreter can be started here.
        """
        writing = asyncio.create_task(self._outbox.broken())
        serving = asyncio.create_task(self._serve(spawned))
        done, _ = await asyncio.wait({writing, serving}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _serve(self, spawned: Spawned) -> None:
        self._guest = await Guest.open(spawned, self._listener, self._reaper)
        hello = sandbox_pb2.Hello(protocol_version=PROTOCOL_VERSION, hash_seed=spawned.hash_seed)
        self._outbox.post(sandbox_pb2.AttachRequest(hello=hello))
        message = await self._call.read()
        if not isinstance(message, sandbox_pb2.AttachResponse):
            return
        self._lease = message.lease
        if self._lease.hash_seed not in (0, spawned.hash_seed):
            await self._reaper.kill_all()
            self._guest.close()
            seeded = spawn_interpreter(self._lease.hash_seed, self._places.work_dir)
            self._guest = await Guest.open(seeded, self._listener, self._reaper)
        await self._lease_guest()
        outliving = asyncio.create_task(self._outlive())
        hearing = asyncio.create_task(self._hear())
        done, _ = await asyncio.wait({outliving, hearing}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _hear(self) -> None:
        while isinstance(message := await self._call.read(), sandbox_pb2.AttachResponse):
            match message.WhichOneof("message"):
                case "run_cell":
                    self._run_cell(message.run_cell)
                case "interrupt_cell":
                    self._interrupt(message.interrupt_cell.cell_id)
                case "kill_interpreter":
                    await self._kill(message.kill_interpreter.cell_id)

    async def _lease_guest(self) -> None:
        lease = self._lease
        self._subcalls = SubCalls(self._broker, self._guest.calls, lease.max_concurrent_calls, self._call_ids)
        self._oom_kills = oom_kills()
        await self._guest.lease(
            {
                "context_dir": self._places.context_dir,
                "max_str_bytes": lease.max_str_bytes,
                "max_answer_bytes": lease.max_answer_bytes,
                "max_prompt_bytes": lease.max_prompt_bytes,
                "max_concurrent_calls": lease.max_concurrent_calls,
            }
        )

    def _run_cell(self, request: sandbox_pb2.RunCell) -> None:
        capture = OutputCapture(self._lease.output_head_bytes, self._lease.output_tail_bytes)
        self._cell = _Cell(request.cell_id, capture)
        if self._lost_between_cells is not None:
            # The cell was written for a namespace that is gone: it is not run.
            self._end_lost(self._cell, self._lost_between_cells)
        elif not self._guest.exit_code.done():
            # First, so that the interpreter wakes meanwhile.
            self._guest.control.send({"kind": protocol.CELL, "cell_id": request.cell_id}, request.code)
            self._guest.pump.begin(capture)
            self._subcalls.cell_id = request.cell_id

    def _interrupt(self, cell_id: int) -> None:
        if self._cell is None or self._cell.cell_id != cell_id:
            return
        first = not self._cell.interrupted
        self._cell.interrupted = True
        self._guest.interrupt()
        if first:
            asyncio.get_running_loop().call_later(_SECOND_INTERRUPT_S, self._interrupt, cell_id)

    async def _kill(self, cell_id: int) -> None:
        if self._cell is not None and self._cell.cell_id == cell_id:
            self._cell.killed = True
            await self._reaper.kill_all()

    async def _outlive(self) -> None:
        """Put a new interpreter in the place of each one that dies."""
        while True:
            exit_code = await self._guest.exit_code
            # What a dead interpreter left running is part of the namespace that is lost.
            await self._reaper.kill_all()
            await self._guest.drain()
            killed = self._cell is not None and self._cell.killed
            lost = loss_of(exit_code, killed=killed, out_of_memory=oom_kills() > self._oom_kills)
            self._send_output(self._guest.pump.end())
            self._subcalls.end_cell()
            self._guest.close()
            spawned = spawn_interpreter(self._guest.hash_seed, self._places.work_dir)
            self._guest = await Guest.open(spawned, self._listener, self._reaper)
            await self._lease_guest()
            if self._cell is not None:
                self._end_lost(self._cell, lost)
            else:
                self._lost_between_cells = lost

    def _end_lost(self, cell: _Cell, lost: sandbox_pb2.NamespaceLost) -> None:
        self._lost_between_cells = None
        output_bytes = cell.capture.total_bytes
        self._end_cell(
            sandbox_pb2.CellEnded(cell_id=cell.cell_id, output_bytes=output_bytes, namespace_lost=lost)
        )

    def _end_cell(self, ended: sandbox_pb2.CellEnded) -> None:
        self._cell = None
        self._outbox.post(sandbox_pb2.AttachRequest(cell_ended=ended))

    def _on_control(self, frame: Frame) -> None:
        cell = self._cell
        if cell is None or cell.killed:
            return
        # Output comes before answers. The cell's code is over, whichever of the two messages this is.
        rest = self._guest.pump.end()
        if frame.header["kind"] == protocol.ANSWER:
            self._send_output(rest)
            cell.answer_bytes += len(frame.payload)
            chunk = sandbox_pb2.AnswerChunk(cell_id=cell.cell_id, data=frame.payload)
            self._outbox.post(sandbox_pb2.AttachRequest(answer=chunk))
        else:
            ended = cell_ended(frame, cell.cell_id, cell.capture.total_bytes, cell.interrupted)
            if rest:
                last = rest.pop()
                ended.last_output.cell_id = cell.cell_id
                ended.last_output.offset = last.offset
                ended.last_output.data = last.data
            self._send_output(rest)
            self._end_cell(ended)
            self._subcalls.end_cell()

    def _on_call(self, frame: Frame) -> None:
        self._subcalls.on_request(frame)

    def _on_output(self, chunk: Chunk) -> None:
        self._send_output([chunk])

    def _send_output(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            if self._cell is not None:
                self._outbox.post(sandbox_pb2.AttachRequest(output=_output_chunk(self._cell, chunk)))

    def _hold_back(self, held: bool) -> None:
        self._guest.control.pause(held)


def _output_chunk(cell: _Cell, chunk: Chunk) -> sandbox_pb2.OutputChunk:
    return sandbox_pb2.OutputChunk(cell_id=cell.cell_id, offset=chunk.offset, data=chunk.data)
