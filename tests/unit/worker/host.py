# ruff: noqa: N802 - rpcs are methods with the names of the contract
"""The other side of the worker: a real gRPC server on a Unix socket, played by the test."""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from rlm_proto.v1 import broker_pb2, broker_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc, types_pb2

from orchestrator.contexts.guest_form import encode_manifest
from orchestrator.contexts.manifest import Kind
from orchestrator.contexts.staging import BlobWriter

ROOT = Path(__file__).parents[3]

LEASE = sandbox_pb2.Lease(
    output_head_bytes=20_000,
    output_tail_bytes=5_000,
    max_answer_bytes=1_000_000,
    max_concurrent_calls=4,
    max_prompt_bytes=10_000_000,
    max_str_bytes=64_000_000,
)


@dataclass
class Ended:
    """All that one cell sent."""

    end: sandbox_pb2.CellEnded
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    answer: bytes = b""

    @property
    def text(self) -> str:
        return b"".join(data for _, data in self.chunks).decode()

    @property
    def outcome(self) -> str | None:
        return self.end.WhichOneof("outcome")

    @property
    def traceback(self) -> str:
        return self.end.error.traceback.decode() or self.end.interrupted.traceback.decode()

    @property
    def variables(self) -> list[str]:
        return [name.decode() for name in self.end.variables]


class Refusal(Exception):  # noqa: N818 - not an error here
    """Makes the broker answer with a status and, unless it is left out, our detail."""

    def __init__(self, status: grpc.StatusCode, detail: types_pb2.ErrorDetail | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.detail = detail


Complete = Callable[[broker_pb2.CompleteRequest], Awaitable[str]]
Child = Callable[[broker_pb2.StartChildRunRequest], Awaitable[bytes]]


async def echo(request: broker_pb2.CompleteRequest) -> str:
    return f"echo: {request.prompt.decode()}"


async def short_answer(request: broker_pb2.StartChildRunRequest) -> bytes:
    return b"child answer"


class Broker(broker_pb2_grpc.BrokerServiceServicer):
    """Answers as the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.complete: Complete = echo
        self.child: Child = short_answer
        self.asked: list[broker_pb2.CompleteRequest] = []
        self.children: list[broker_pb2.StartChildRunRequest] = []
        self.uploads: list[list[broker_pb2.UploadContextRequest]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.cancelled = 0

    async def Complete(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        async with self._counted(context):
            return broker_pb2.CompleteResponse(text=(await self.complete(request)).encode())

    async def StartChildRun(self, request: Any, context: Any) -> Any:
        self.children.append(request)
        async with self._counted(context):
            answer = await self.child(request)
            for start in range(0, len(answer), 262_144):
                yield broker_pb2.StartChildRunResponse(data=answer[start : start + 262_144])

    async def UploadContext(self, request_iterator: Any, context: Any) -> Any:
        self.uploads.append([request async for request in request_iterator])
        return broker_pb2.UploadContextResponse(upload_id=f"upload-{len(self.uploads)}")

    async def GetBudget(self, request: Any, context: Any) -> Any:
        return broker_pb2.GetBudgetResponse(tokens=1234, levels_below=2, deadline_s=60.0)

    @contextlib.asynccontextmanager
    async def _counted(self, context: Any) -> AsyncIterator[None]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except Refusal as refusal:
            metadata = ()
            if refusal.detail is not None:
                metadata = (("rlm-error-bin", refusal.detail.SerializeToString()),)  # type: ignore[assignment]
            await context.abort(refusal.status, "refused", metadata)
        finally:
            self.in_flight -= 1


class Sandbox(sandbox_pb2_grpc.SandboxServiceServicer):
    """The host's end of Attach, turned into two queues."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[sandbox_pb2.AttachRequest] = asyncio.Queue()
        self.to_send: asyncio.Queue[sandbox_pb2.AttachResponse | None] = asyncio.Queue()

    async def Attach(self, request_iterator: Any, context: Any) -> Any:
        async def receive() -> None:
            async for request in request_iterator:
                self.received.put_nowait(request)

        receiving = asyncio.create_task(receive())
        try:
            while (response := await self.to_send.get()) is not None:
                yield response
        finally:
            receiving.cancel()


class Host:
    """A worker process and what the test does with it."""

    def __init__(
        self, sandbox: Sandbox, broker: Broker, process: asyncio.subprocess.Process, context_dir: Path
    ) -> None:
        self.broker = broker
        self.context_dir = context_dir
        self.process = process
        self.hello = sandbox_pb2.Hello()
        self._sandbox = sandbox
        self._last_id = 0

    async def settled(self) -> None:
        """Wait until the broker has nothing in flight any more."""
        while self.broker.in_flight:  # noqa: ASYNC110 - a few milliseconds, in a test
            await asyncio.sleep(0.01)

    def send(self, **message: Any) -> None:
        self._sandbox.to_send.put_nowait(sandbox_pb2.AttachResponse(**message))

    def close_stream(self) -> None:
        self._sandbox.to_send.put_nowait(None)

    async def receive(self) -> sandbox_pb2.AttachRequest:
        return await asyncio.wait_for(self._sandbox.received.get(), 30)

    def start(self, code: str) -> int:
        self._last_id += 1
        self.send(run_cell=sandbox_pb2.RunCell(cell_id=self._last_id, code=code.encode()))
        return self._last_id

    def interrupt(self) -> None:
        self.send(interrupt_cell=sandbox_pb2.InterruptCell(cell_id=self._last_id))

    def kill(self) -> None:
        self.send(kill_interpreter=sandbox_pb2.KillInterpreter(cell_id=self._last_id))

    async def output(self) -> bytes:
        """The next chunk of a running cell."""
        return (await self.receive()).output.data

    async def end(self) -> Ended:
        """Everything until the running cell has ended."""
        chunks: list[tuple[int, bytes]] = []
        answer = b""
        while True:
            message = await self.receive()
            match message.WhichOneof("message"):
                case "output":
                    assert not answer
                    chunks.append((message.output.offset, message.output.data))
                case "answer":
                    answer += message.answer.data
                case "cell_ended":
                    ended = message.cell_ended
                    assert ended.cell_id == self._last_id
                    if ended.HasField("last_output"):
                        chunks.append((ended.last_output.offset, ended.last_output.data))
                    return Ended(ended, chunks, answer)

    async def run(self, code: str) -> Ended:
        self.start(code)
        return await self.end()


@contextlib.asynccontextmanager
async def started(
    context: str | dict[str, str] = "a context", lease: sandbox_pb2.Lease = LEASE
) -> AsyncIterator[Host]:
    """A leased worker, gone after the block."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("context", "work"):
            (root / name).mkdir()
        stage(root / "context", context)
        sandbox, broker = Sandbox(), Broker()
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64_000_000)])
        sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(sandbox, server)
        broker_pb2_grpc.add_BrokerServiceServicer_to_server(broker, server)
        server.add_insecure_port(f"unix:{root}/broker.sock")
        await server.start()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "sandbox_image.worker"),
            *(f"{root}/broker.sock", f"{root}/context", f"{root}/work"),
            env={"PYTHONPATH": f"{ROOT}:{ROOT}/proto", "PATH": os.environ["PATH"]},
        )
        host = Host(sandbox, broker, process, root / "context")
        try:
            host.hello = (await host.receive()).hello
            host.send(lease=lease)
            yield host
        finally:
            host.close_stream()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 10)
            if process.returncode is None:
                process.kill()
                await process.wait()
            await server.stop(None)


def stage(directory: Path, context: str | dict[str, str]) -> None:
    """Write a context the way the orchestrator does, an empty one too."""
    kind: Kind = "text" if isinstance(context, str) else "files"
    with BlobWriter(directory, kind) as writer:
        for path, text in ({"": context} if isinstance(context, str) else context).items():
            writer.begin(path)
            writer.write(text.encode())
            writer.end()
        manifest = writer.seal()
        writer.path.rename(directory / "blob")
        (directory / "landmarks").write_bytes(writer.landmarks())
        (directory / "manifest").write_bytes(encode_manifest(manifest))
