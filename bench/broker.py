"""What the broker adds to a sub-call over a bare unary call on the same socket: `python -m bench.broker`.

The model answers at once, so what is measured is ours alone: the call's checks, its hold and settlement, and
four events written to a store in memory. The bare call is to a method beside the broker, on the same server
and channel, with messages of the same size. One call at a time; the two take turns, so that both see the same
machine.
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import broker_pb2_grpc

from orchestrator.broker.service import serve_broker
from orchestrator.cells import CellClock
from orchestrator.limits import RunLimits
from orchestrator.rpc.guest_server import guest_server
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.sub_calls import SubCalls
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from tests.fakes.model import FakeModel, says
from tests.fakes.tree import FakeTree

RESULTS = Path(__file__).parent / "results" / "broker.json"
_CALLS = 2_000
_WARM_UP = 200
_PROMPT = b"x" * 1_000
_REPLY = "y" * 200


async def _bare(_request: bytes, _context: object) -> bytes:
    return pb.CompleteResponse(text=_REPLY.encode()).SerializeToString()


def _add_bare(server: grpc.aio.Server) -> None:
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_bare)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", {"Call": handler}),))


async def _no_child(tree: RunTree, spec: RunSpec) -> RunResult:
    raise AssertionError("no child run is asked for")


@asynccontextmanager
async def _calls() -> AsyncIterator[
    tuple[Callable[[int], Awaitable[object]], Callable[[int], Awaitable[object]]]
]:
    """A sub-call and a bare call, each given its number."""
    limits = RunLimits(max_tokens=10**12, max_cost_microusd=10**12, max_calls=10**9)
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir:
        directory = Path(state_dir)
        async with SandboxSlots(4).admit(0) as slots:
            tree = FakeTree(directory, slots, FakeModel(otherwise=says(_REPLY)), limits=limits)
            calls = SubCalls(tree.tree, tree.spec(), tree.recorder, _no_child)
            clock = CellClock(
                started_s=time.monotonic(), cell_timeout_s=1e6, cell_cpu_s=1e6, cell_ceiling_s=1e6
            )
            async with (
                guest_server(directory, (serve_broker(calls), _add_bare), group_id=None) as socket,
                grpc.aio.insecure_channel(f"unix:{socket}") as channel,
            ):
                broker = broker_pb2_grpc.BrokerServiceStub(channel)
                bare: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/bench.Bare/Call")
                with calls.executing(1, clock):
                    yield (
                        lambda number: broker.Complete(
                            pb.CompleteRequest(call_id=f"c{number}", prompt=_PROMPT)
                        ),
                        lambda number: bare(
                            pb.CompleteRequest(call_id=f"c{number}", prompt=_PROMPT).SerializeToString()
                        ),
                    )
                await calls.aclose(1.0)
            tree.contexts.close()


async def _took_ms(call: Awaitable[object]) -> float:
    started_s = time.perf_counter()
    await call
    return (time.perf_counter() - started_s) * 1_000


async def measure() -> dict[str, dict[str, float]]:
    """Milliseconds, by percentile, of the two and of what the broker adds."""
    took: tuple[list[float], list[float]] = ([], [])
    async with _calls() as kinds:
        for number in range(_WARM_UP + _CALLS):
            for times, call in zip(took, kinds, strict=True):
                took_ms = await _took_ms(call(number))
                if number >= _WARM_UP:
                    times.append(took_ms)
    sub_call, bare = (_percentiles(times) for times in took)
    added = {name: round(sub_call[name] - bare[name], 3) for name in sub_call}
    return {"sub_call_ms": sub_call, "bare_call_ms": bare, "added_ms": added}


def _percentiles(times_ms: list[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(times_ms, n=100)
    return {f"p{n}": round(hundredths[n - 1], 3) for n in (50, 90, 99)}


def main() -> None:
    """Print the percentiles and keep them."""
    measured = asyncio.run(measure())
    for what, row in measured.items():
        print(what + ": " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"calls": _CALLS, **measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
