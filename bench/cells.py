"""A cell's round trip against the bare path: `python -m bench.cells [RUNTIME...]`.

The bare path is the least that could do the job: a container of the same image and posture in which one
process reads code from a gRPC stream, runs it with `exec`, and sends back what it printed. A cell goes
through our worker besides, to an interpreter in a process of its own, under limits and a clock. Both live at
the same time and take turns.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
from docker import APIClient
from docker.errors import NotFound

from bench.measuring import Step, at_most, keep, spread_ms, take_turns
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.ids import LOCAL_TENANT, new_sandbox_id
from orchestrator.machine import image_id, open_machine, open_workplace, resources, runtimes
from orchestrator.rpc.guest_server import guest_server
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import create_arguments

CELL = "x = globals().get('x', 0) + 1; print(x)"
_TIMES = 3_000
_AIMS = {"p50": 2.0, "p99": 5.0}
"""Times the bare path."""
_WARM_UP = 300
_UID = 65_532
_START_S = 30.0

_BARE_GUEST = """
import asyncio, contextlib, io
import grpc.aio

async def main():
    channel = grpc.aio.insecure_channel("unix:/run/rlm/broker.sock")
    call = channel.stream_stream("/bench.Bare/Attach")()
    await call.write(b"ready")
    namespace = {}
    while (code := await call.read()) is not grpc.aio.EOF:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "cell", "exec"), namespace)
        await call.write(out.getvalue().encode())

asyncio.run(main())
"""


class _BareHost:
    """The host's end of the bare path: one stream of bytes."""

    def __init__(self) -> None:
        self._stream: asyncio.Future[grpc.aio.ServicerContext[bytes, bytes]] = (
            asyncio.get_running_loop().create_future()
        )
        self._over = asyncio.Event()

    def add_to(self, server: grpc.aio.Server) -> None:
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._attach)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bench.Bare", {"Attach": handler}),)
        )

    async def _attach(self, _requests: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        await context.read()
        self._stream.set_result(context)
        await self._over.wait()

    async def ready(self) -> None:
        async with asyncio.timeout(_START_S):
            await self._stream

    async def run(self, code: bytes) -> bytes:
        stream = self._stream.result()
        await stream.write(code)
        printed = await stream.read()
        assert isinstance(printed, bytes)
        return printed

    def close(self) -> None:
        self._over.set()


@asynccontextmanager
async def bare_sandbox(settings: Settings, runtime: str) -> AsyncIterator[Step]:
    """One bare round trip, in a container that differs from a sandbox only in what it runs."""
    engine = await asyncio.to_thread(connect_engine)
    with tempfile.TemporaryDirectory(prefix="rlm") as place:
        socket_dir, context_dir = _lay_out(Path(place))
        host = _BareHost()
        spec = SandboxSpec(
            sandbox_id=new_sandbox_id(),
            socket_dir=socket_dir,
            context_dir=context_dir,
            uid=_UID,
            runtime=runtime,
        )
        image = await asyncio.to_thread(image_id, engine, settings)
        body = create_arguments(spec, resources(settings.sandbox, runtime), image=image, instance_id="bench")
        body["Entrypoint"] = ["python3", "-P", "/context/guest.py"]
        async with guest_server(socket_dir, (host.add_to,), group_id=_UID):
            name = f"rlm-bench-{spec.sandbox_id}"
            try:
                await asyncio.to_thread(_start, engine.api, body, name)
                await host.ready()
                yield lambda: host.run(CELL.encode())
            finally:
                host.close()
                await asyncio.to_thread(_remove, engine.api, name)
                engine.close()


def _lay_out(place: Path) -> tuple[Path, Path]:
    socket_dir, context_dir = place / "sock", place / "ctx"
    socket_dir.mkdir()
    context_dir.mkdir()
    place.chmod(0o711)
    (context_dir / "guest.py").write_text(_BARE_GUEST)
    os.chown(socket_dir, -1, _UID)
    return socket_dir, context_dir


def _start(engine: APIClient, body: dict[str, object], name: str) -> None:
    engine.create_container_from_config(body, name)  # type: ignore[no-untyped-call]
    engine.start(name)


def _remove(engine: APIClient, name: str) -> None:
    try:
        engine.remove_container(name, force=True, v=True)
    except NotFound:
        return


@asynccontextmanager
async def our_sandbox(settings: Settings, runtime: str, *, context_bytes: int = 1_000) -> AsyncIterator[Step]:
    """One cell, in a sandbox as runs have it."""
    async with open_workplace(settings) as workplace:
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"x" * context_bytes)
        async with (
            open_machine(settings, workplace, runtime=runtime) as machine,
            machine.leases.open(
                lambda directory: workplace.contexts.link_into(context, directory),
                runtime=runtime,
                guest_services=(),
                max_concurrent_calls=1,
            ) as sandbox,
        ):

            async def run_cell() -> None:
                clock = CellClock(
                    started_s=time.monotonic(), cell_timeout_s=10.0, cell_cpu_s=10.0, cell_ceiling_s=10.0
                )
                result = await sandbox.run_cell(CELL, clock)
                assert result.outcome is CellOutcome.OK, result

            yield run_cell


async def measure(runtime: str) -> dict[str, dict[str, float]]:
    """Milliseconds of both, and their ratios."""
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir:
        settings = Settings(state_dir=Path(state_dir))
        async with our_sandbox(settings, runtime) as cell, bare_sandbox(settings, runtime) as bare:
            took_s = await take_turns({"cell": cell, "bare": bare}, times=_TIMES, warm_up=_WARM_UP)
    cell_ms, bare_ms = spread_ms(took_s["cell"]), spread_ms(took_s["bare"])
    ratios = {name: round(cell_ms[name] / bare_ms[name], 2) for name in ("p50", "p90", "p99")}
    return {"cell_ms": cell_ms, "bare_ms": bare_ms, "ratio": ratios}


def _aims(runtime: str, ratio: Mapping[str, float]) -> Iterator[dict[str, object]]:
    for name, aim in _AIMS.items():
        measure = f"cell round trip against the bare gRPC echo, {name}, {runtime}"
        yield at_most(measure, ratio[name], aim, "×")


def installed_runtimes() -> list[str]:
    """Of those that we support, the ones that the engine knows."""
    engine = connect_engine()
    try:
        return sorted(runtimes(engine) & {"runc", "runsc"})
    finally:
        engine.close()


def main() -> None:
    """Print the percentiles and keep them."""
    parser = argparse.ArgumentParser(description="A cell's round trip against the bare path.")
    parser.add_argument("runtimes", nargs="*", help="runc, runsc; all that are installed when none is named")
    wanted = parser.parse_args().runtimes or installed_runtimes()
    measured = {runtime: asyncio.run(measure(runtime)) for runtime in wanted}
    for runtime, rows in measured.items():
        for what, row in rows.items():
            print(f"{runtime} {what}: {row}")
    aims = [row for runtime in wanted for row in _aims(runtime, measured[runtime]["ratio"])]
    bars = [
        {
            "title": f"One trivial cell, {runtime}",
            "unit": "ms",
            "rows": {
                f"{way} {name}": measured[runtime][f"{way}_ms"][name]
                for name in ("p50", "p99")
                for way in ("bare", "cell")
            },
        }
        for runtime in wanted
    ]
    keep("cells", {"aims": aims, **measured, "bars": bars})


if __name__ == "__main__":
    main()
