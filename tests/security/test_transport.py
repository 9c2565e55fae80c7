"""Group G: a guest that speaks to its socket by hand, against a real server. The oracle is the host's side:
its memory, its descriptors, what reached the services, what the gate counted.

Positive controls run the same attack against a server as gRPC makes it, without our options and gate.
"""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import broker_pb2_grpc

from orchestrator.abuse import Offence
from orchestrator.limits import (
    MAX_ANSWER_BYTES_UNREAD,
    MAX_CALLS_ON_SOCKET,
    MAX_GUEST_CONNECTIONS,
    MAX_PROMPT_BYTES,
    MAX_REQUEST_BYTES_HELD,
    RunLimits,
)
from orchestrator.models.port import ModelRequest
from orchestrator.rpc import gate as gate_module
from orchestrator.rpc.guest_server import guest_server
from tests.ledger.guests import Guest, Sandbox, code_of, sandbox
from tests.ledger.witness import Provider, WatchedLedger
from tests.security.house import own_open_files, resident_bytes

Code = grpc.StatusCode
MIB = 1 << 20
POOR = RunLimits(max_tokens=2_000)


@pytest.fixture(autouse=True)
def watched_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.runs.treasury.Ledger", WatchedLedger)


@dataclass(frozen=True, slots=True)
class Host:
    """What an attack did to the process that was attacked."""

    seen: dict[str, Any]
    """The attacker's word."""
    grew_bytes: int
    """At most, against the time before."""
    more_files: int
    """Likewise."""
    cpu_s: float


async def attack(path: Path, name: str, **arguments: object) -> Host:
    """Run one attack of `raw_guest` in a process of its own, and watch this one."""
    before_bytes, before_files, before_s = resident_bytes(), own_open_files(), time.process_time()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.wire.raw_guest", str(path), name, json.dumps(arguments)),
        stdout=asyncio.subprocess.PIPE,
    )
    output = asyncio.ensure_future(process.communicate())
    most_bytes, most_files = before_bytes, before_files
    while not output.done():
        most_bytes, most_files = max(most_bytes, resident_bytes()), max(most_files, own_open_files())
        await asyncio.wait((output,), timeout=0.05)
    seen = json.loads((await output)[0])
    assert seen["ran"] is True
    assert process.returncode == 0
    # Its pipe, and what asyncio watches it with.
    return Host(
        seen, most_bytes - before_bytes, most_files - before_files - 2, time.process_time() - before_s
    )


class Unguarded(broker_pb2_grpc.BrokerServiceServicer):
    """What a service without a gate sees of an attack."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.in_flight_at_most = 0
        self.prompt_bytes = 0

    async def Complete(self, request: pb.CompleteRequest, context: object) -> pb.CompleteResponse:  # noqa: N802
        self.prompt_bytes = max(self.prompt_bytes, len(request.prompt))
        self.in_flight += 1
        self.in_flight_at_most = max(self.in_flight_at_most, self.in_flight)
        try:
            await asyncio.sleep(0.5)
        finally:
            self.in_flight -= 1
        return pb.CompleteResponse()


@asynccontextmanager
async def as_grpc_makes_it(*options: tuple[str, int]) -> AsyncIterator[tuple[Path, Unguarded]]:
    """The positive control's server."""
    service = Unguarded()  # type: ignore[abstract] # the other methods are not asked for
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        path = Path(directory) / "plain.sock"
        server = grpc.aio.server(options=options)
        broker_pb2_grpc.add_BrokerServiceServicer_to_server(service, server)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            yield path, service
        finally:
            await server.stop(None)


async def assert_serves(guest: Guest, mine: Sandbox) -> None:
    """The guest's old connection still works, and costs what it costs."""
    calls = mine.tree.account.used().calls
    assert await guest.complete(f"after-{time.monotonic()}") == "yes"
    assert mine.tree.account.used().calls == calls + 1


# --- Connections -----------------------------------------------------------------------------------------


@pytest.mark.case("G01")
async def test_g01_a_thousand_silent_connections_cost_four_descriptors_for_a_few_seconds() -> None:
    async with sandbox(Provider()) as mine:
        guest = await mine.dial()
        with mine.cell():
            await guest.complete("c1")
            host = await attack(mine.socket, "silent", count=1_000, wait_s=7)
            # A refused connection is accepted and closed: a few are seen on their way.
            assert host.more_files <= MAX_GUEST_CONNECTIONS + 8
            # Whoever was accepted last may have its time-out still before it.
            assert host.seen["closed"] >= host.seen["opened"] - MAX_GUEST_CONNECTIONS
            assert host.seen["opened"] > 900
            await assert_serves(guest, mine)


@pytest.mark.case("G01")
async def test_g01_control_without_our_options_they_are_all_held() -> None:
    async with as_grpc_makes_it() as (path, _):
        host = await attack(path, "silent", count=200, wait_s=2)
        assert host.more_files >= 190


@pytest.mark.case("G01")
async def test_g01_connections_that_come_and_go_leave_nothing() -> None:
    async with sandbox(Provider()) as mine:
        guest = await mine.dial()
        with mine.cell():
            await guest.complete("c1")
            files = own_open_files()
            host = await attack(mine.socket, "connections", most=3_000, most_s=5)
            assert host.seen["done"] > 100
            assert host.more_files <= MAX_GUEST_CONNECTIONS + 8
            await asyncio.sleep(0.2)
            assert own_open_files() <= files + MAX_GUEST_CONNECTIONS
            await assert_serves(guest, mine)


# --- Slow guests -----------------------------------------------------------------------------------------


@pytest.mark.case("G02")
async def test_g02_a_header_that_comes_byte_by_byte_holds_one_connection_and_no_memory() -> None:
    async with sandbox(Provider()) as mine:
        guest = await mine.dial()
        with mine.cell():
            await guest.complete("c1")
            host = await attack(mine.socket, "slow_headers", most_s=5)
            assert host.grew_bytes < 16 * MIB
            assert host.more_files <= 2
            await assert_serves(guest, mine)
        assert mine.sub_calls() == (2, 2)


@pytest.mark.case("G02", "G12")
@pytest.mark.parametrize("method", ["Complete", "StartChildRun", "UploadContext"])
async def test_g02_messages_that_come_byte_by_byte_are_ended_by_our_deadline(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "REQUEST_ARRIVES_S", 0.3)
    provider = Provider()
    async with sandbox(provider) as mine:
        with mine.cell():
            host = await attack(mine.socket, "slow_data", method=method, streams=12, most_s=30)
            assert host.seen["ended"] >= 12 or method == "UploadContext"
            assert host.grew_bytes < 32 * MIB
            assert mine.calls.gate.conduct.counts[Offence.MALFORMED] > 0
            guest = await mine.dial()
            await assert_serves(guest, mine)
    assert len(provider.log) == 1


@pytest.mark.case("G02", "G12")
async def test_g02_control_without_a_gate_they_are_never_ended() -> None:
    async with as_grpc_makes_it() as (path, _):
        host = await attack(path, "slow_data", streams=12, most_s=2)
        assert host.seen["ended"] == 0


@pytest.mark.case("G12")
async def test_g12_an_upload_whose_parts_stop_coming_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "REQUEST_ARRIVES_S", 0.3)
    async with sandbox(Provider()) as mine:
        with mine.cell():
            host = await attack(mine.socket, "half_upload", most_s=20)
            assert host.seen["ended"] > 0
        assert mine.calls.gate.conduct.counts == {Offence.MALFORMED: 1}


@pytest.mark.case("G12")
async def test_g12_an_upload_that_goes_on_after_its_cell_is_refused_with_its_next_part() -> None:
    async with sandbox(Provider()) as mine:
        guest = await mine.dial()
        with mine.cell():
            upload = guest.broker.UploadContext()
            await upload.write(pb.UploadContextRequest(data=b"text"))
            await asyncio.sleep(0.2)
        await upload.write(pb.UploadContextRequest(data=b"more"))
        assert await upload.code() is Code.FAILED_PRECONDITION


@pytest.mark.case("G13")
async def test_g13_who_asks_and_never_reads_holds_little() -> None:
    """One answer, asked for on every stream there is; it is paid once, and nobody reads it."""
    async with sandbox(Provider(lambda _: "x" * 400_000)) as mine:
        with mine.cell():
            host = await attack(mine.socket, "slow_reader", streams=MAX_CALLS_ON_SOCKET, most_s=2)
            assert host.grew_bytes < 128 * MIB
        assert mine.tree.account.used().calls == 1


@pytest.mark.case("G13")
async def test_g13_who_reads_its_answers_gets_any_amount_of_them() -> None:
    text = "x" * 400_000
    async with sandbox(Provider(lambda _: text)) as mine:
        guest = await mine.dial()
        with mine.cell():
            asked = (
                guest.broker.Complete(pb.CompleteRequest(call_id=f"c{number}", prompt=b"%d" % number))
                for number in range(2 * MAX_ANSWER_BYTES_UNREAD // len(text))
            )
            assert {answer.text for answer in await asyncio.gather(*asked)} == {text.encode()}


# --- What does not count: the environment, and who the kernel says is calling ----------------------------


@pytest.mark.case("D09")
async def test_d09_no_proxy_of_any_environment_comes_between_a_guest_and_its_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.2)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        with pytest.MonkeyPatch.context() as environment:
            for name in (*names, *(name.upper() for name in names)):
                environment.setenv(name, address)
            async with sandbox(Provider(lambda _: "yes")) as mine:
                guest = await mine.dial()
                with mine.cell():
                    request = pb.CompleteRequest(call_id="c", prompt=b"well?")
                    assert (await guest.broker.Complete(request)).text == b"yes"
        with pytest.raises(TimeoutError):
            proxy.accept()


@pytest.mark.case("H10")
def test_h10_nobody_is_authorised_by_who_the_kernel_says_is_calling() -> None:
    """Under gVisor the host sees the sandbox process's uid there, not the guest's."""
    sources = (Path(__file__).resolve().parents[2] / "orchestrator").rglob("*.py")
    credentials = re.compile(r"SO_PEERCRED|SCM_CREDENTIALS|getpeereid|\.peer\(\)|auth_context|peer_identit")
    assert [path.name for path in sources if credentials.search(path.read_text(encoding="utf-8"))] == []
    assert credentials.search("connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)")


# --- Floods ----------------------------------------------------------------------------------------------


@pytest.mark.case("G03")
async def test_g03_ten_thousand_calls_over_fifty_connections_are_served_a_window_at_a_time() -> None:
    provider = Provider(delay_s=0.02)
    async with sandbox(provider, limits=RunLimits(max_calls=100, max_tokens=10**9)) as mine:
        with mine.cell():
            floods = [attack(mine.socket, "calls", most=2_000, most_s=5, window=500) for _ in range(5)]
            hosts = await asyncio.gather(*floods)
            assert sum(host.seen["done"] for host in hosts) >= 1_000
            assert max(host.grew_bytes for host in hosts) < 64 * MIB
        assert provider.in_flight_at_most <= RunLimits().max_concurrency
        assert len(provider.log) <= 100


@pytest.mark.case("G03")
async def test_g03_control_without_a_gate_more_are_served_at_once() -> None:
    async with as_grpc_makes_it() as (path, service):
        await attack(path, "calls", most=1_000, most_s=5, window=500)
        assert service.in_flight_at_most > MAX_CALLS_ON_SOCKET


@pytest.mark.case("G04")
@pytest.mark.parametrize("how", ["rapid_reset", "reset_with_request", "reset_by_mistakes"])
async def test_g04_streams_that_are_reset_as_they_are_opened_end_the_run(how: str) -> None:
    provider = Provider()
    async with sandbox(provider) as mine:
        told: list[float] = []
        mine.calls.gate.on_shut = lambda: told.append(time.monotonic())
        with mine.cell():
            host = await attack(mine.socket, how, most=50_000, most_s=20)
            assert host.grew_bytes < 32 * MIB
            assert host.cpu_s < 10
        assert len(told) == 1
        assert "given up" in mine.calls.gate.conduct.verdict
    assert provider.in_flight == 0


@pytest.mark.case("G08")
@pytest.mark.parametrize("kind", ["ping", "settings", "window"])
@pytest.mark.parametrize("polite", [True, False])
async def test_g08_frames_that_need_no_call_cost_no_memory_and_no_service(kind: str, *, polite: bool) -> None:
    async with sandbox(Provider()) as mine:
        guest = await mine.dial()
        with mine.cell():
            await guest.complete("c1")
            host = await attack(mine.socket, "frames", kind=kind, most=300_000, most_s=3, polite=polite)
            assert host.grew_bytes < 32 * MIB
            assert host.more_files <= MAX_GUEST_CONNECTIONS + 8
            if kind == "ping":
                assert host.seen["goaways"] == [] or set(host.seen["goaways"]) == {"too_many_pings"}
            await assert_serves(guest, mine)


@pytest.mark.case("G10")
async def test_g10_a_flood_of_unknown_methods_ends_the_run() -> None:
    async with sandbox(Provider()) as mine:
        with mine.cell():
            await attack(mine.socket, "unknown_methods", most=5_000, most_s=10)
        assert "unknown methods" in mine.calls.gate.conduct.verdict


@pytest.mark.case("G09")
async def test_g09_a_flood_of_malformed_messages_ends_the_run_and_nothing_is_logged_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with sandbox(Provider()) as mine:
        with mine.cell():
            await attack(mine.socket, "malformed", most=5_000, most_s=10)
        assert "malformed" in mine.calls.gate.conduct.verdict
        assert mine.sub_calls() == (0, 0)
    assert len(caplog.records) < 5


async def test_a_flood_of_refused_calls_is_slowed_down_and_costs_no_memory() -> None:
    """At most 64 wait at a time, and those that wait are few bytes: their prompts are gone."""
    async with sandbox(Provider(), limits=POOR) as mine:
        with mine.cell():
            host = await attack(mine.socket, "calls", most=100_000, most_s=8, prompt_bytes=5_000, window=12)
            assert host.seen["done"] < 1_000 + 8 * 200 + 3_000
            assert host.grew_bytes < 64 * MIB
        assert mine.sub_calls()[0] <= 1_000
        assert mine.calls.unrecorded_refusals > 0
        assert not mine.calls.gate.conduct.verdict, "a budget's refusals are honest for a long time"


# --- Sizes -----------------------------------------------------------------------------------------------


@pytest.mark.case("G05")
@pytest.mark.parametrize(("length", "sent"), [(2**31 - 1, 0), (2**32 - 1, 0), (64 * MIB, 64 * MIB)])
async def test_g05_a_message_that_claims_too_much_is_refused_by_its_claim(length: int, sent: int) -> None:
    async with sandbox(Provider()) as mine:
        with mine.cell():
            host = await attack(mine.socket, "oversize", length=length, sent=sent)
            assert host.seen["ended"] or host.seen["closed_after_s"] is not None
            assert host.grew_bytes < 16 * MIB
            await assert_serves(await mine.dial(), mine)


@pytest.mark.case("G06")
async def test_g06_a_compressed_message_is_refused_unpacked_by_nobody() -> None:
    async with sandbox(Provider()) as mine:
        before_bytes = resident_bytes()
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"unix:{mine.socket}", options=options) as channel:
            with mine.cell():
                call: Any = channel.unary_unary("/rlm_proto.v1.BrokerService/Complete")
                bomb = pb.CompleteRequest(call_id="c", prompt=bytes(MAX_PROMPT_BYTES)).SerializeToString()
                refused = call(bomb, compression=grpc.Compression.Gzip)
                assert await code_of(refused) is Code.UNIMPLEMENTED
        assert resident_bytes() - before_bytes < 64 * MIB, "most of it is the guest's, who is in here too"
        assert mine.sub_calls() == (0, 0)


@pytest.mark.case("G06")
async def test_g06_control_a_server_as_grpc_makes_it_unpacks_it() -> None:
    limit = ("grpc.max_receive_message_length", 16 * MIB)
    async with (
        as_grpc_makes_it(limit) as (path, service),
        grpc.aio.insecure_channel(f"unix:{path}") as channel,
    ):
        bomb = pb.CompleteRequest(call_id="c", prompt=bytes(MAX_PROMPT_BYTES))
        await broker_pb2_grpc.BrokerServiceStub(channel).Complete(bomb, compression=grpc.Compression.Gzip)
        assert service.prompt_bytes == MAX_PROMPT_BYTES


@pytest.mark.case("G07")
@pytest.mark.parametrize("kind", ["long", "many", "bin", "nul", "utf8", "upper", "path", "pseudo"])
async def test_g07_metadata_that_is_too_long_or_junk_hurts_nobody(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async with sandbox(Provider()) as mine:
        with mine.cell():
            host = await attack(mine.socket, "metadata", kind=kind)
            assert host.grew_bytes < 16 * MIB
            if kind != "path":
                await assert_serves(await mine.dial(), mine)
    said = "".join(capfd.readouterr())
    assert "y" * 1_000 not in said
    assert "\0" not in said


@pytest.mark.case("G07")
async def test_g07_a_header_block_that_never_ends_is_not_gathered() -> None:
    async with sandbox(Provider()) as mine:
        with mine.cell():
            host = await attack(mine.socket, "continuations", most=200_000, most_s=5)
            assert host.grew_bytes < 64 * MIB
            await assert_serves(await mine.dial(), mine)


_PROMPTS = """
import asyncio, sys, grpc.aio
from rlm_proto.v1 import broker_pb2 as pb, broker_pb2_grpc

path, connections, prompts, wait_s, prompt = sys.argv[1], *map(int, sys.argv[2:5]), eval(sys.argv[5])
options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

async def one(name):
    async with grpc.aio.insecure_channel("unix:" + path, options=options) as channel:
        broker = broker_pb2_grpc.BrokerServiceStub(channel)
        requests = [pb.CompleteRequest(call_id=f"{name}-{n}", prompt=prompt) for n in range(prompts)]
        calls = [broker.Complete(request) for request in requests]
        await asyncio.wait([asyncio.ensure_future(call.code()) for call in calls], timeout=wait_s)

async def main():
    await asyncio.gather(*map(one, range(connections)))

asyncio.run(main())
"""


async def send_prompts(path: Path, prompt: str, *, connections: int, prompts: int, wait_s: int) -> int:
    """Prompts from a process of its own; the most memory that it took here, in bytes."""
    before_bytes = most_bytes = resident_bytes()
    numbers = (str(number) for number in (connections, prompts, wait_s))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROMPTS, str(path), *numbers, prompt
    )
    while process.returncode is None:
        most_bytes = max(most_bytes, resident_bytes())
        await asyncio.sleep(0.05)
    assert process.returncode == 0
    return most_bytes - before_bytes


async def test_the_most_that_one_guest_can_make_us_hold_is_a_few_hundred_megabytes() -> None:
    """Every stream there is, on every connection there may be, with the longest prompt, none of it served."""
    widest = f"b'x' * {MAX_PROMPT_BYTES - 4} + chr(0x1f600).encode()"
    async with sandbox(Provider(delay_s=600)) as mine:
        with mine.cell():
            held_bytes = await send_prompts(mine.socket, widest, connections=4, prompts=16, wait_s=8)
        print(f"one guest made us hold {held_bytes // MIB} MiB")
        # The bound on requests, times what a text of wide characters takes beside its request.
        assert held_bytes < 32 * MAX_REQUEST_BYTES_HELD
        await mine.over(0)


@pytest.mark.case("G15")
@pytest.mark.parametrize(
    "prompt",
    [
        f"b'x' * {MAX_PROMPT_BYTES}",
        f"bytes([255]) * {MAX_PROMPT_BYTES}",
        "bytes([255]) * (2 << 20)",
        "chr(0x1f600).encode() * (1 << 20)",
        "b'`' * (1 << 20)",
    ],
)
@pytest.mark.alone
async def test_g15_no_prompt_keeps_the_loop_from_its_work(prompt: str) -> None:
    """`python -m bench.transport` has the figures.

    Counted is what this process computed while the loop was late, because a test shares its machine. The
    bound is generous; sixteen prompts read on the loop, one right after the other, are far past it.
    """
    own_s: list[float] = []

    async def probe() -> None:
        while True:
            started_s, cpu_s = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.005)
            late_s = time.perf_counter() - started_s - 0.005
            own_s.append(min(late_s, time.process_time() - cpu_s))

    async with sandbox(Provider()) as mine:
        with mine.cell():
            probing = asyncio.create_task(probe())
            await send_prompts(mine.socket, prompt, connections=1, prompts=16, wait_s=20)
            probing.cancel()
    own_s.sort()
    assert own_s[len(own_s) * 99 // 100] < 0.15
    assert own_s[-1] < 1.0


# --- What is told, and to whom -----------------------------------------------------------------------------


@pytest.mark.case("G16")
async def test_g16_whatever_breaks_in_a_handler_its_words_stay_here(
    caplog: pytest.LogCaptureFixture,
) -> None:
    canary = "sk-ant-canary /root/.config/secret Authorization: Bearer x"

    def breaks(_request: ModelRequest) -> str:
        raise ZeroDivisionError(canary)

    async with sandbox(Provider(breaks)) as mine:
        guest = await mine.dial()
        with mine.cell(), pytest.raises(grpc.aio.AioRpcError) as caught:
            await guest.complete("c1")
        error = caught.value
        told = f"{error.details()} {error.trailing_metadata()} {error.debug_error_string()}"
    assert caught.value.code() is Code.INTERNAL
    assert not any(word in told for word in ("canary", "secret", "Bearer", "ZeroDivision", "Traceback"))
    assert canary in caplog.text, "the operator's log has it"


@pytest.mark.case("G17")
async def test_g17_descriptors_that_a_guest_hands_over_are_dropped() -> None:
    async with sandbox(Provider()) as mine:
        guest = await mine.dial()
        with mine.cell():
            await guest.complete("c1")
            files = own_open_files()
            host = await attack(mine.socket, "descriptors", count=100)
            assert host.seen["sent"] >= 100
            assert host.more_files <= 4
            assert own_open_files() <= files + 1


@pytest.mark.case("G18")
@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root can become another user")
async def test_g18_another_user_of_the_host_cannot_connect_and_the_sandboxes_group_can() -> None:
    group_id, other_id = 64_001, 64_002
    with tempfile.TemporaryDirectory(prefix="rlm", dir="/tmp") as directory:
        os.chmod(directory, 0o755)  # noqa: S103 - only the socket's own mode is to decide
        async with guest_server(Path(directory), (), group_id=group_id) as path:
            assert path.stat().st_mode & 0o777 == 0o660
            assert (path.stat().st_uid, path.stat().st_gid) == (0, group_id)
            script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1]); print('in')"

            async def tries(user: int, group: int) -> str:
                done = await asyncio.to_thread(
                    subprocess.run,
                    ["/usr/bin/python3", "-I", "-c", script, str(path)],
                    user=user,
                    group=group,
                    extra_groups=[],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]

            assert "PermissionError" in await tries(other_id, other_id)
            # The control: the one group that may.
            assert await tries(other_id, group_id) == "in"


@pytest.mark.case("G20")
def test_g20_the_orchestrator_dials_no_socket() -> None:
    """Nothing in it makes a gRPC channel or connects a socket of its own, so no guest can be dialled."""
    root = Path(gate_module.__file__).parents[1]
    dials = ("insecure_channel(", "secure_channel(", "open_unix_connection(", ".connect(")
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        # What probes say in there they say inside a sandbox.
        if not path.is_relative_to(root / "probes" / "guest")
        if any(dial in path.read_text() for dial in dials)
    }
    assert found <= {
        # To the process that holds the provider's key, on a socket that no sandbox sees.
        "models/provider/connection.py",
        "models/provider/process.py",
        # To the database that the settings name.
        "store/postgresql.py",
        "store/sqlite.py",
        # Of a program of the user's, to the server that the user names.
        "client/channel.py",
    }


def test_the_attacks_themselves_reach_a_listener() -> None:
    """They would be blind otherwise: what they send arrives."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = f"{directory}/s"
        listener.bind(path)
        listener.listen()
        process = subprocess.Popen([sys.executable, "-m", "tests.wire.raw_guest", path, "descriptors"])
        connection, _ = listener.accept()
        data, ancillary, _, _ = connection.recvmsg(100, 10_000)
        assert data.startswith(b"PRI * HTTP/2.0")
        assert ancillary, "descriptors came with it"
        connection.close()
        process.wait(20)
