"""A worker in the place of ours, as an attacker would write it: PID 1 of a sandbox, and a raw gRPC client.

It keeps to the protocol just as long as a test wants it to: what comes as a cell is run right here, with the
tools below in its namespace, and may send whatever it likes. A cell that does not end itself is ended as it
should be, with what it `say`s as its output. What the image holds in `before_hello.py` is run first of all.
"""

import contextlib
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from rlm_proto.v1 import broker_pb2, broker_pb2_grpc, sandbox_pb2

SOCKET = "/run/rlm/broker.sock"
BROKER = "rlm_proto.v1.BrokerService"
SANDBOX = "rlm_proto.v1.SandboxService"


def dial(*options: tuple[str, Any]) -> grpc.Channel:
    """A connection of its own."""
    return grpc.insecure_channel(
        f"unix:{SOCKET}",
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_metadata_size", 1 << 20),
            ("grpc.enable_retries", 0),
            *options,
        ],
    )


def connect() -> socket.socket:
    """A connection that speaks nothing by itself."""
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(SOCKET)
    return raw


def code_of(call: Callable[[], Any]) -> str:
    """The status that a call ends with."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def together(*calls: Callable[[], Any]) -> list[str]:
    """How they end when all are made at once."""
    codes = [""] * len(calls)

    def make(place: int) -> None:
        codes[place] = code_of(calls[place])

    threads = [threading.Thread(target=make, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


class Worker:
    """One stream, and the tools to misuse it."""

    def __init__(self) -> None:
        self.channel = dial()
        self.broker = broker_pb2_grpc.BrokerServiceStub(self.channel)
        self.version = 1
        self.cell_id = 0
        self.ended = False
        self.said: list[bytes] = []
        self._outbox: queue.Queue[bytes | None] = queue.Queue()

    def send(self, message: sandbox_pb2.AttachRequest | None = None, /, **part: Any) -> None:
        """Anything on the stream."""
        self.send_raw((message or sandbox_pb2.AttachRequest(**part)).SerializeToString())

    def send_raw(self, data: bytes | None) -> None:
        """Any bytes on the stream; None closes our side of it."""
        self._outbox.put(data)

    def say(self, what: object) -> None:
        """More of the cell's output."""
        self.said.append(what if isinstance(what, bytes) else str(what).encode("utf-8", "surrogatepass"))

    def end(self, **how: Any) -> None:
        """End the cell, with what was said as its output."""
        output = b"\n".join(self.said)
        if output:
            self.send(output=sandbox_pb2.OutputChunk(cell_id=self.cell_id, data=output))
        how = how or {"ok": sandbox_pb2.CellOk()}
        self.send(cell_ended=sandbox_pb2.CellEnded(cell_id=self.cell_id, output_bytes=len(output), **how))
        self.ended = True

    def answer(self, data: bytes) -> None:
        """End the run."""
        for start in range(0, len(data), 256 * 1024):
            part = data[start : start + 256 * 1024]
            self.send(answer=sandbox_pb2.AnswerChunk(cell_id=self.cell_id, data=part))
        self.end(ok=sandbox_pb2.CellOk(), answer=sandbox_pb2.Answer(length_bytes=len(data)))

    def complete(self, call_id: str, prompt: bytes = b"hello", **more: Any) -> str:
        """A completion, as the real worker asks for one."""
        request = broker_pb2.CompleteRequest(call_id=call_id, prompt=prompt, **more)
        return str(self.broker.Complete(request).text.decode())

    def raw(
        self,
        method: str,
        data: bytes,
        metadata: Mapping[str, str | bytes] | None = None,
        *,
        service: str = BROKER,
        channel: grpc.Channel | None = None,
        timeout_s: float = 20.0,
        compression: grpc.Compression | None = None,
    ) -> bytes:
        """Any bytes to any method of any service."""
        call: Any = (channel or self.channel).unary_unary(f"/{service}/{method}")
        answer: bytes = call(
            data, metadata=tuple((metadata or {}).items()), timeout=timeout_s, compression=compression
        )
        return answer

    def serve(self) -> None:
        """From Hello to the end of the stream."""
        attach: Any = self.channel.stream_stream(
            f"/{SANDBOX}/Attach", response_deserializer=sandbox_pb2.AttachResponse.FromString
        )
        if self.version:
            self.send(hello=sandbox_pb2.Hello(protocol_version=self.version, hash_seed=7))
        with contextlib.suppress(grpc.RpcError):
            for message in attach(self._sending()):
                if message.WhichOneof("message") == "run_cell":
                    threading.Thread(target=self._run, args=(message.run_cell,), daemon=True).start()

    def run(self, code: bytes) -> None:
        """A cell's code, with everything in reach."""
        tools = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        exec(code, {**globals(), **tools, "me": self})  # noqa: S102 - what it is for

    def _sending(self) -> Iterator[bytes]:
        while (data := self._outbox.get()) is not None:
            yield data

    def _run(self, cell: sandbox_pb2.RunCell) -> None:
        self.cell_id, self.ended, self.said = cell.cell_id, False, []
        try:
            self.run(cell.code)
        except BaseException:
            trace = traceback.format_exc().encode()[-8_000:]
            self.end(error=sandbox_pb2.CellError(traceback=trace))
        if not self.ended:
            self.end()


def main() -> None:
    """Never returns by itself."""
    worker = Worker()
    before_hello = Path("/opt/before_hello.py")
    if before_hello.exists():
        worker.run(before_hello.read_bytes())
    worker.serve()
    # It outlives its stream, until somebody ends it.
    time.sleep(600)


if __name__ == "__main__":
    main()
