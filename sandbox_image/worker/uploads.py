"""Contexts that the interpreter hands in piece by piece for a child run."""

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc
from rlm_proto.v1 import broker_pb2, broker_pb2_grpc

from sandbox_image.worker.frames import Frame


@dataclass(frozen=True, slots=True)
class _Upload:
    call: "grpc.aio.StreamUnaryCall[broker_pb2.UploadContextRequest, broker_pb2.UploadContextResponse]"


class Uploads:
    """Uploads in progress, by the number their interpreter gave them.

    Each part is acknowledged when gRPC has taken it, and the interpreter sends the next one only then: that
    is what bounds memory. An upload holds a slot from its first part to its end. Unlike the unary calls it
    is not repeated after back-pressure, because its parts are gone.
    """

    def __init__(self, broker: "broker_pb2_grpc.BrokerServiceAsyncStub", slots: asyncio.Semaphore) -> None:
        self._broker = broker
        self._slots = slots
        self._open: dict[int, _Upload] = {}

    async def part(self, frame: Frame) -> tuple[dict[str, Any], bytes]:
        """Pass on the pieces of one frame; the header's `pieces` are (path or null, length in bytes)."""
        number = frame.header["upload"]
        if number not in self._open:
            await self._slots.acquire()
            self._open[number] = _Upload(self._broker.UploadContext())
        upload = self._open[number]
        start = 0
        try:
            for path, length_bytes in frame.header["pieces"]:
                if path is not None:
                    await upload.call.write(broker_pb2.UploadContextRequest(file_path=path.encode()))
                if length_bytes:
                    data = frame.payload[start : start + length_bytes]
                    await upload.call.write(broker_pb2.UploadContextRequest(data=data))
                start += length_bytes
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The status, not the failed write, says why.
            await self._finish(number)
        return {}, b""

    async def end(self, frame: Frame) -> tuple[dict[str, Any], bytes]:
        """Close an upload; gives the id under which child runs can name it."""
        number = frame.header["upload"]
        await self._open[number].call.done_writing()
        return {"upload_id": await self._finish(number)}, b""

    def abandon(self) -> None:
        """Cancel all uploads."""
        for upload in self._open.values():
            upload.call.cancel()
            self._slots.release()
        self._open.clear()

    async def _finish(self, number: int) -> str:
        upload = self._open[number]
        try:
            response = await upload.call
            return response.upload_id
        finally:
            if self._open.pop(number, None) is not None:
                self._slots.release()
