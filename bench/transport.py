"""What a guest can do to everybody else through its socket: `python -m bench.transport`.

Two figures. *Loop lag*: how late the orchestrator's event loop is while a guest, another process, sends the
worst it can, measured by a task that sleeps for 5 ms again and again. *Neighbour*: the round trip of a
trivial cell in one container while a run in another floods its socket, against the same with nobody there,
and how long the breaker took to end that run. On two cores the flooder's own work counts too, since its
container may use one: "busy alone" computes and floods nothing.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import grpc.aio
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import sandbox_pb2, sandbox_pb2_grpc

from bench.measuring import keep, spread_ms
from orchestrator.config import Settings
from orchestrator.limits import ANSWER_CHUNK_BYTES, MAX_ANSWER_BYTES, MAX_PROMPT_BYTES, RunLimits
from orchestrator.rpc.guest_server import guest_server
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.session import SandboxSession
from tests.ledger.guests import PLENTY, Guest, sandbox
from tests.ledger.witness import Provider, WatchedLedger
from tests.security.house import House, Inmate, open_house
from tests.wire import raw_guest

_PROBE_S = 0.005
_START_S = 1.0
_ATTACHED_S = 30.0
"""For the guest's process to start; only an attached one says when it has."""
_NEIGHBOUR_CELLS = 200
_SMALL_BUDGET = RunLimits(max_tokens=10_000)
_SOCKET = "/run/rlm/broker.sock"
_SOURCE = Path(raw_guest.__file__).read_text()


# --- Loop lag ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lag:
    """How late the loop was, in seconds, each time."""

    late_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)
    """No more of it than this process computed meanwhile: without what the machine's other processes took."""


@contextmanager
def lag_of_loop() -> Iterator[Lag]:
    """Measured for the length of the block."""
    lag = Lag()

    async def probe() -> None:
        while True:
            started_s, cpu_s = time.perf_counter(), time.process_time()
            await asyncio.sleep(_PROBE_S)
            late_s = time.perf_counter() - started_s - _PROBE_S
            lag.late_s.append(late_s)
            lag.own_s.append(min(late_s, time.process_time() - cpu_s))

    task = asyncio.create_task(probe())
    try:
        yield lag
    finally:
        task.cancel()


Send = Callable[[Guest, str], Awaitable[object]]
"""What a guest sends, in a process of its own, over gRPC or by hand on the socket at that path."""


def _flood(attack: str, **arguments: object) -> Send:
    async def send(_guest: Guest, path: str) -> None:
        getattr(raw_guest, attack)(path, **arguments)

    return send


def _prompts(prompt: bytes, count: int) -> Send:
    """Prompts, sixteen at a time."""

    async def send(guest: Guest, _path: str) -> None:
        async def ask(number: int) -> None:
            with suppress(grpc.aio.AioRpcError):
                await guest.complete(f"c{number}", prompt)

        for start in range(0, count, 16):
            await asyncio.gather(*(ask(start + place) for place in range(16)))

    return send


def _upload(part: bytes, count: int) -> Send:
    async def send(guest: Guest, _path: str) -> None:
        with suppress(grpc.aio.AioRpcError):
            await guest.broker.UploadContext(iter([pb.UploadContextRequest(data=part)] * count))

    return send


def _raw(method: str, data: bytes, count: int) -> Send:
    async def send(guest: Guest, _path: str) -> None:
        for _ in range(count):
            with suppress(grpc.aio.AioRpcError):
                await guest.raw(method, data)

    return send


async def _junk_answer(guest: Guest, _path: str) -> None:
    """An answer of the full length, none of it UTF-8."""
    stream = sandbox_pb2_grpc.SandboxServiceStub(guest.channel).Attach()
    hello = sandbox_pb2.Hello(protocol_version=1, hash_seed=1)
    part = sandbox_pb2.AnswerChunk(cell_id=1, data=b"\xff" * ANSWER_CHUNK_BYTES)
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await stream.write(sandbox_pb2.AttachRequest(hello=hello))
        await stream.read()
        for _ in range(MAX_ANSWER_BYTES // ANSWER_CHUNK_BYTES):
            await stream.write(sandbox_pb2.AttachRequest(answer=part))


_PATHS = b"\x2a\x80\x80\x80\x02" + b"\x0a\x00" * (2 << 20)
_EMOJI = "\U0001f600".encode()
_WORST: Mapping[str, tuple[RunLimits, Send]] = {
    "nothing": (PLENTY, lambda _guest, _path: asyncio.sleep(3)),
    "7 MB prompts, refused": (_SMALL_BUDGET, _prompts(b"x" * MAX_PROMPT_BYTES, 64)),
    "7 MB prompts, answered": (PLENTY, _prompts(b"x" * MAX_PROMPT_BYTES, 64)),
    "4 MB prompts of one wide character": (PLENTY, _prompts(_EMOJI * (1 << 20), 64)),
    "7 MB prompts, not UTF-8": (PLENTY, _prompts(b"\xff" * MAX_PROMPT_BYTES, 64)),
    "2 MB prompts, not UTF-8": (PLENTY, _prompts(b"\xff" * (2 << 20), 64)),
    "1 MB prompts of backticks": (PLENTY, _prompts(b"`" * (1 << 20), 160)),
    "small calls, refused": (_SMALL_BUDGET, _flood("calls", prompt_bytes=900, most=10**6, most_s=8)),
    "100,000 tiny calls": (PLENTY, _flood("calls", method="GetBudget", most=100_000, most_s=8)),
    "an upload of 256 MB, not UTF-8": (PLENTY, _upload(b"\xff" * (1 << 20), 256)),
    "4 MB of empty paths": (PLENTY, _raw("StartChildRun", _PATHS, 100)),
    "8 MB of two-byte fields": (PLENTY, _raw("Complete", b"\x0a\x00" * (4_000_000), 100)),
    "an answer of 16 MB, not UTF-8": (PLENTY, _junk_answer),
    "calls past the window": (PLENTY, _flood("calls", window=500)),
    "streams reset as opened": (PLENTY, _flood("rapid_reset", most_s=5)),
    "requests reset as sent": (PLENTY, _flood("reset_with_request", most_s=5)),
    "unknown methods": (PLENTY, _flood("unknown_methods", most_s=5)),
    "malformed messages": (PLENTY, _flood("malformed", most_s=5)),
    "pings": (PLENTY, _flood("frames", most_s=5)),
    "settings": (PLENTY, _flood("frames", kind="settings", most_s=5)),
    "connections": (PLENTY, _flood("connections", most_s=5)),
}


async def _send(path: str, name: str) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        await _WORST[name][1](Guest(channel), path)


async def loop_lag() -> dict[str, dict[str, object]]:
    """Lag of the loop under each of the worst things a guest can send."""
    rows: dict[str, dict[str, object]] = {}
    for name, (limits, send) in _WORST.items():
        session = SandboxSession()
        async with sandbox(Provider(), limits=limits) as mine, _attached(session) as attach_path:
            path = attach_path if send is _junk_answer else mine.socket
            command = (sys.executable, "-m", "bench.transport", "send", str(path), name)
            sender = await asyncio.create_subprocess_exec(*command)
            with mine.cell():
                await session.ready_within(_ATTACHED_S if send is _junk_answer else _START_S)
                cpu_s, started_s = time.process_time(), time.monotonic()
                with lag_of_loop() as lag:
                    if send is _junk_answer:
                        session._protocol.cell_started()
                        await session.lease(max_concurrent_calls=1, max_str_bytes=1)
                    await sender.wait()
            took_s = time.monotonic() - started_s
            rows[name] = {
                "lag_ms": spread_ms(lag.late_s),
                "own_lag_ms": spread_ms(lag.own_s),
                "took_s": round(took_s, 2),
                "cpu_share": round((time.process_time() - cpu_s) / took_s, 2),
                "verdict": mine.calls.gate.conduct.verdict,
            }
        _tell(name, rows[name])
    return rows


def _tell(name: str, row: Mapping[str, object]) -> None:
    print(f"{name}: {row}", flush=True)


@asynccontextmanager
async def _attached(session: SandboxSession) -> AsyncIterator[Path]:
    """A server for a sandbox's stream alone."""
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        services = (partial(sandbox_pb2_grpc.add_SandboxServiceServicer_to_server, session),)
        async with guest_server(Path(directory), services, group_id=None) as path:
            yield path


# --- Neighbours ----------------------------------------------------------------------------------------

_FLOODS: Mapping[str, str] = {
    "busy alone": "end = time.monotonic() + 6\nwhile time.monotonic() < end: pass",
    "refused calls": "calls(S, prompt_bytes=900, most=10**6, most_s=15)",
    "calls past the window": "calls(S, most=10**6, most_s=15, window=200)",
    "tiny calls": "calls(S, 'GetBudget', most=10**6, most_s=15)",
    "unknown methods": "unknown_methods(S, most=10**6, most_s=15)",
    "malformed messages": "malformed(S, most=10**6, most_s=15)",
    "streams reset as opened": "rapid_reset(S, most=10**6, most_s=15)",
    "requests reset as sent": "reset_with_request(S, most=10**6, most_s=15)",
    "pings": "frames(S, most=10**9, most_s=15)",
    "settings": "frames(S, 'settings', most=10**9, most_s=15)",
    "connections": "connections(S, most=10**6, most_s=15)",
}


async def _round_trips(inmate: Inmate, until: Callable[[], bool], least: int) -> list[float]:
    took_s: list[float] = []
    while len(took_s) < least or not until():
        started_s = time.perf_counter()
        await inmate.says("1 + 1")
        took_s.append(time.perf_counter() - started_s)
    return took_s


async def _beside(house: House, neighbour: Inmate, attack: str) -> dict[str, object]:
    """The neighbour's round trips before the flood, and from when it begins until its run is over.

    Right before, because whatever else the machine does changes from minute to minute. Starting and removing
    the other container is part of the time beside it: "busy alone" has that too.
    """
    code = f"{_SOURCE.partition('def main')[0]}\nS = {_SOCKET!r}\nprint({attack!r})\n{attack}\n"
    limits = RunLimits(max_calls=3, cell_timeout_s=30, cell_cpu_s=30)
    alone_s = await _round_trips(neighbour, lambda: True, _NEIGHBOUR_CELLS)
    flooding = asyncio.create_task(house.cells(code, limits=limits))
    await asyncio.sleep(1.0)
    took_s = await _round_trips(neighbour, flooding.done, 1)
    story = await flooding
    return {
        "alone_ms": spread_ms(alone_s),
        "cell_ms": spread_ms(took_s),
        "outcome": story.end.outcome.value,
        "why": story.end.why,
        "flooder_lived_s": round(story.took_s, 2),
    }


async def neighbours() -> dict[str, object]:
    """A neighbour's round trips, alone and beside each flood."""
    rows: dict[str, object] = {}
    async with _one_house() as house, house.sandbox() as neighbour:
        await _round_trips(neighbour, lambda: True, 20)
        for name, attack in _FLOODS.items():
            rows[name] = row = await _beside(house, neighbour, attack)
            _tell(name, row)
    return rows


@asynccontextmanager
async def _one_house() -> AsyncIterator[House]:
    engine = connect_engine()
    with tempfile.TemporaryDirectory(prefix="rlm", dir="/tmp") as state_dir:
        async with open_house(Settings(state_dir=Path(state_dir)), engine, "runc") as house:
            yield house
    engine.close()


async def _measure() -> dict[str, object]:
    wanted = sys.argv[1:] or ["lag", "neighbours"]
    measured: dict[str, object] = {"load_before": os.getloadavg()}
    if "lag" in wanted:
        # What these guests' runs check their books with.
        with patch("orchestrator.runs.treasury.Ledger", WatchedLedger):
            measured["loop_lag"] = await loop_lag()
    if "neighbours" in wanted:
        measured["neighbours"] = await neighbours()
    return measured


def main() -> None:
    """Print the figures and keep them. As `send`: be the guest."""
    if sys.argv[1:2] == ["send"]:
        asyncio.run(_send(sys.argv[2], sys.argv[3]))
        return
    keep("transport", asyncio.run(_measure()))


if __name__ == "__main__":
    main()
