"""A sandbox driver whose guests are coroutines of this process: thousands of sandboxes in seconds.

A guest dials its own socket and speaks the real protocol over real gRPC; only the interpreter is played. Its
cells are the bodies of coroutines, with the names below in scope. It isolates nothing.
"""

import asyncio
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc.aio
from rlm_proto.v1 import broker_pb2, broker_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc

from orchestrator.ids import InstanceId, SandboxId
from orchestrator.rpc.guest_server import SOCKET_NAME
from orchestrator.sandbox.port import Counters, Ending, Found, SandboxSpec


class _FinalError(Exception):
    """Carries the answer out of a cell."""


class InProcessDriver:
    """See `SandboxDriver`."""

    instance_id = InstanceId("i0")
    image = "none"

    def __init__(self, **names: Any) -> None:
        """`names` are in the scope of every cell."""
        self._names = names
        self._guests: dict[SandboxId, asyncio.Task[None]] = {}
        self.seeds: list[int] = []
        """What each lease wanted; 0 for no seed of its own."""
        self.live_at_most = 0
        self.started = 0

    async def start(self, spec: SandboxSpec) -> None:
        guest = Guest(f"unix:{spec.socket_dir / SOCKET_NAME}", self._names, self.seeds.append)
        self._guests[spec.sandbox_id] = asyncio.create_task(guest.serve())
        self.started += 1
        self.live_at_most = max(self.live_at_most, len(self._guests))

    async def destroy(self, sandbox_id: SandboxId) -> None:
        guest = self._guests.pop(sandbox_id, None)
        if guest is not None:
            guest.cancel()
            with suppress(asyncio.CancelledError):
                await guest

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        return 0.0

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        guest = self._guests.get(sandbox_id)
        if guest is None:
            return Ending.GONE
        return Ending.EXITED if guest.done() else Ending.RUNNING

    def counters(self, sandbox_id: SandboxId) -> Counters:
        return Counters(oom_kills=None, refused_forks=None)

    async def found(self) -> Sequence[Found]:
        return [Found(sandbox_id, self.instance_id, 0, 0) for sandbox_id in self._guests]

    async def aclose(self) -> None:
        for sandbox_id in tuple(self._guests):
            await self.destroy(sandbox_id)


class Guest:
    """One guest: `llm(prompt)`, `rlm(question)` and `gather(...)` are what its cells can await.

    What they put into `kept` is there in the next one, as in a namespace.
    """

    def __init__(
        self,
        address: str,
        names: Mapping[str, Any] | None = None,
        on_lease: Callable[[int], None] = lambda _seed: None,
    ) -> None:
        self._address = address
        self._names = names or {}
        self._on_lease = on_lease
        self._kept: dict[str, Any] = {}
        self._output = ""
        self._calls = 0

    async def serve(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            self._broker = broker_pb2_grpc.BrokerServiceStub(channel)
            stream = sandbox_pb2_grpc.SandboxServiceStub(channel).Attach()
            try:
                await stream.write(_request(hello=sandbox_pb2.Hello(protocol_version=1, hash_seed=1)))
                async for message in stream:
                    if message.WhichOneof("message") == "run_cell":
                        await self._run(message.run_cell, stream.write)
                    elif message.WhichOneof("message") == "lease":
                        self._on_lease(message.lease.hash_seed)
            except grpc.aio.AioRpcError:
                return

    async def _run(self, cell: sandbox_pb2.RunCell, write: Callable[[Any], Any]) -> None:
        ended = sandbox_pb2.CellEnded(cell_id=cell.cell_id)
        try:
            await self._execute(cell.code.decode())
            ended.ok.SetInParent()
        except _FinalError as final:
            data = str(final).encode()
            await write(_request(answer=sandbox_pb2.AnswerChunk(cell_id=cell.cell_id, data=data)))
            ended.ok.SetInParent()
            ended.answer.length_bytes = len(data)
        except grpc.aio.AioRpcError as error:
            ended.error.traceback = f"{error.code()}: {error.details()}".encode()
        if self._output:
            data, self._output = self._output.encode(), ""
            ended.output_bytes = len(data)
            ended.last_output.CopyFrom(sandbox_pb2.OutputChunk(cell_id=cell.cell_id, data=data))
        await write(_request(cell_ended=ended))

    async def _execute(self, code: str) -> None:
        names: dict[str, Any] = {
            "llm": self._llm,
            "rlm": self._rlm,
            "gather": asyncio.gather,
            "FINAL": _final,
            "print": self._print,
            "kept": self._kept,
            **self._names,
        }
        exec(f"async def cell():\n{textwrap.indent(code, '    ')}", names)  # noqa: S102 - a test's own cells
        await names["cell"]()

    async def _llm(self, prompt: str) -> str:
        request = broker_pb2.CompleteRequest(call_id=self._call_id(), prompt=prompt.encode())
        return (await self._broker.Complete(request)).text.decode()

    async def _rlm(self, question: str) -> str:
        request = broker_pb2.StartChildRunRequest(
            call_id=self._call_id(), question=question.encode(), inline=question.encode()
        )
        return b"".join([part.data async for part in self._broker.StartChildRun(request)]).decode()

    def _print(self, value: object) -> None:
        self._output += f"{value}\n"

    def _call_id(self) -> str:
        self._calls += 1
        return f"call-{self._calls}"


def _request(**message: Any) -> sandbox_pb2.AttachRequest:
    return sandbox_pb2.AttachRequest(**message)


def _final(value: object) -> None:
    raise _FinalError(value)
