"""The least that every sandbox keeps to, seen from inside it and from the engine, and what is left of it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.models.port import ModelRequest
from orchestrator.models.scripted import Step, Wait
from orchestrator.sandbox.posture import LABEL_INSTANCE
from orchestrator.trajectory import CellStarted
from orchestrator.turn import Outcome
from tests.e2e.conftest import containers_of, instances_in
from tests.e2e.playing import Played, Player

MIB = 1024 * 1024
KEY = "sk-canary-5c1d"

# --- From inside ---------------------------------------------------------------------------------------

STATUS = """
import json, os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "capabilities": {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")},
    "no_new_privs": int(status["NoNewPrivs"]),
    "seccomp": int(status["Seccomp"]),
    "uids": sorted(set(status["Uid"].split())),
    "groups": sorted(set(status["Gid"].split() + status["Groups"].split())),
    "limits": {name: resource.getrlimit(getattr(resource, name))[1]
               for name in ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CORE")},
    "environment": dict(os.environ),
    "environment of the worker": open("/proc/1/environ").read(),
    "hostname": os.uname().nodename,
}))
"""

NETWORK = """
import json, os, socket
def attempt(what):
    try: return str(what())
    except OSError as error: return type(error).__name__
print(json.dumps({
    "interfaces": os.listdir("/sys/class/net"),
    "routes": open("/proc/net/route").read().splitlines()[1:],
    "tcp": attempt(lambda: socket.create_connection(("192.0.2.1", 80), timeout=3)),
    "gateway": attempt(lambda: socket.create_connection(("172.17.0.1", 2375), timeout=3)),
    "udp": attempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))),
    "name": attempt(lambda: socket.getaddrinfo("pypi.org", 443)),
    "raw": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
    "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
}))
"""

WRITING = """
import json, os
def can_write(directory):
    path = os.path.join(directory, "attempt")
    try:
        with open(path, "w"): pass
    except OSError: return False
    os.unlink(path)
    return True
roots = [entry for entry in os.listdir("/") if entry not in ("proc", "sys")]
directories = ["/"] + [directory for root in roots for directory, _, _ in os.walk("/" + root)]
def can_change(path):
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError: return False
    return True
files = [os.path.join(directory, name) for directory in ("/context", "/run/rlm", "/opt/rlm", "/etc")
         for name in os.listdir(directory)]
kernel = ["/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/kcore"]
print(json.dumps({
    "directories": sorted(directory for directory in directories if can_write(directory)),
    "looked at": len(directories),
    "files": sorted(path for path in files + kernel if os.path.isfile(path) and can_change(path)),
    "the socket's directory": os.listdir("/run/rlm"),
}))
"""

ESCAPES = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call, *arguments):
    return os.strerror(ctypes.get_errno()) if call(*arguments) else "done"
def replace_socket():
    try: os.rename("/run/rlm/" + os.listdir("/run/rlm")[0], "/run/rlm/other")
    except OSError as error: return os.strerror(error.errno)
    return "done"
CLONE_NEWUSER, MS_REMOUNT = 0x10000000, 32
print(json.dumps({
    "mount": attempt(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
    "remount": attempt(libc.mount, b"none", b"/context", None, MS_REMOUNT, None),
    "new user namespace": attempt(libc.unshare, CLONE_NEWUSER),
    "become root": attempt(libc.setuid, 0),
    "chroot": attempt(libc.chroot, b"/tmp"),
    "replace the socket": replace_socket(),
}))
"""


async def test_a_cell_has_no_network_no_privilege_and_nothing_to_write_to_but_scratch(
    player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    script = player.script([STATUS, NETWORK, WRITING, ESCAPES])
    played = await player.run(script)
    status, network, writing, escapes = (json.loads(told) for told in played.told)

    assert set(status["capabilities"].values()) == {0}
    assert len(status["capabilities"]) == 5
    assert status["no_new_privs"] == 1
    assert status["seccomp"] == 2, "filtered"
    (uid,) = status["uids"]
    assert int(uid) not in {0, os.geteuid()} or os.geteuid() != 0
    assert status["groups"] == [uid]
    assert status["limits"] == {"RLIMIT_NOFILE": 1_024, "RLIMIT_FSIZE": 256 * MIB, "RLIMIT_CORE": 0}
    assert status["hostname"] == "sandbox"
    # What Python itself is told is no secret: its hash seed is the run's, and recorded.
    of_python = {"PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONUTF8"}
    assert status["environment"].keys() - of_python == {"HOME", "PATH", "LANG", "HOSTNAME"}
    assert KEY not in json.dumps(status)

    assert network["interfaces"] == ["lo"]
    assert network["routes"] == []
    assert network["tcp"] == network["gateway"] == network["udp"] == "PermissionError"
    assert network["name"] == "gaierror"
    assert network["raw"] == network["packet"] == "PermissionError"

    assert writing["directories"] == ["/dev/shm", "/tmp"]
    assert writing["looked at"] > 100
    assert writing["files"] == []
    assert len(writing["the socket's directory"]) == 1

    assert set(escapes.values()) <= {"Operation not permitted", "Read-only file system"}


async def test_scratch_is_small_and_lasts_no_longer_than_the_run(player: Player) -> None:
    fill = """
import os
def fill(path):
    try:
        with open(path, "wb") as file:
            for _ in range(300): file.write(bytes(1024 * 1024))
    except OSError as error: return os.strerror(error.errno), os.path.getsize(path) // 1024 // 1024
    finally: os.unlink(path)
print(fill("/dev/shm/big"), fill("/tmp/big"), os.path.exists("/tmp/note"), open("/tmp/note", "w").write("x"))
"""
    for _ in range(2):
        played = await player.cells(fill)
        assert played.told == ["('No space left on device', 16) ('No space left on device', 128) False 1"]


# --- From the engine -----------------------------------------------------------------------------------


async def test_the_engine_was_told_to_keep_to_the_floor(
    player: Player, engine: DockerClient, state_dir: Path
) -> None:
    inspected: list[dict[str, Any]] = []

    async def inspect(request: ModelRequest) -> None:
        for container in await asyncio.to_thread(containers_of, engine, state_dir):
            inspected.append(await asyncio.to_thread(engine.api.inspect_container, container))

    await player.run(player.script([]), before=inspect)

    (sandbox,) = inspected
    config, host = sandbox["Config"], sandbox["HostConfig"]
    assert sandbox["State"]["Running"]
    assert config["User"] not in {"", "0", "root"}
    assert not config["User"].startswith("0:")
    assert config["Image"] == player.settings.image
    assert {name.partition("=")[0] for name in config["Env"]} == {
        "HOME", "PATH", "LANG", "PYTHONDONTWRITEBYTECODE",
    }  # fmt: skip
    assert host["Runtime"] == "runc"
    assert not host["Privileged"]
    assert host["NetworkMode"] == "none"
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert not any("unconfined" in option for option in host["SecurityOpt"])
    assert host["ReadonlyRootfs"]
    assert (host["PidMode"], host["UTSMode"], host["IpcMode"]) == ("", "", "private")
    assert not host["Devices"]
    assert not host["Binds"]
    assert host["Memory"] == host["MemorySwap"] == 512 * MIB
    assert host["NanoCpus"] == 1_000_000_000
    assert host["PidsLimit"] == 256
    assert host["ShmSize"] == 16 * MIB
    assert "noexec" in host["Tmpfs"]["/tmp"]
    assert host["LogConfig"]["Type"] == "none"
    assert {limit["Name"] for limit in host["Ulimits"]} >= {"nofile", "fsize", "core"}
    assert {mount["Destination"]: mount["RW"] for mount in sandbox["Mounts"]} == {
        "/context": False,
        "/run/rlm": False,
    }
    assert LABEL_INSTANCE in config["Labels"]
    assert "ExposedPorts" not in config


# --- What is left of it --------------------------------------------------------------------------------


async def test_nothing_is_left_after_an_answer(player: Player, engine: DockerClient, state_dir: Path) -> None:
    during: list[int] = []

    async def count(request: ModelRequest) -> None:
        during.append(len(await asyncio.to_thread(containers_of, engine, state_dir)))

    script = player.script(["FINAL(rlm_query('q', 'c'))"], child_steps=["FINAL('from below')"])
    played = await player.run(script, before=count)
    assert played.report.answer == "from below"
    assert during == [1, 2], "there was something to remove: a sandbox for each run"
    assert_nothing_left(engine, state_dir)


async def test_nothing_is_left_after_a_model_error(
    player: Player, engine: DockerClient, state_dir: Path
) -> None:
    script = player.script(["print('found')", 42])  # type: ignore[list-item] # 42 is no step
    played = await player.run(script)
    assert played.report.outcome is Outcome.MODEL_FAILED
    assert played.report.found_so_far == "found"
    assert_nothing_left(engine, state_dir)


@pytest.mark.parametrize(
    ("steps", "requests"),
    [(["while True: pass"], 1), (["rlm_query('q', 'c')"], 2), (["llm_query('wait')"], 2), ([Wait(60)], 1)],
    ids=["in a cell", "in a child run", "in a sub-call", "in a turn"],
)
async def test_nothing_is_left_after_a_cancellation(
    player: Player, engine: DockerClient, state_dir: Path, steps: list[Step], requests: int
) -> None:
    played, arrived = Played(), asyncio.Event()

    async def look(request: ModelRequest) -> None:
        if len(played.requests) == requests:
            arrived.set()

    script = player.script(
        steps, child_steps=["while True: pass"], complete="await asyncio.sleep(60)\nreturn ''"
    )
    work = asyncio.create_task(player.run(script, before=look, played=played))
    await asyncio.wait_for(arrived.wait(), 30)
    await asyncio.sleep(0.5)
    assert containers_of(engine, state_dir)
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work
    assert work.cancelled()
    assert played.events[-1].kind == "run_ended"
    assert_nothing_left(engine, state_dir)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(
    player: Player, engine: DockerClient, state_dir: Path, settings: Settings, signal_number: signal.Signals
) -> None:
    script = player.script(["rlm_query('q', 'c')"], child_steps=["print('busy')\nwhile True: pass"])
    events = script.with_suffix(".jsonl")
    with rlm_run(script, player.context(), events, settings) as process:
        wait_for_cell(events, depth=1, process=process)
        assert len(containers_of(engine, state_dir)) == 2
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert out == ""
    assert "cancelled" in err
    assert "rlm: used " in err
    assert_nothing_left(engine, state_dir)


async def test_what_a_killed_orchestrator_left_is_removed_by_the_next(
    player: Player, engine: DockerClient, state_dir: Path, settings: Settings
) -> None:
    script = player.script(["print('busy')\nwhile True: pass"])
    events = script.with_suffix(".jsonl")
    with rlm_run(script, player.context(), events, settings) as process:
        await asyncio.to_thread(wait_for_cell, events, depth=0, process=process)
        process.kill()
        process.communicate(timeout=30)
    assert len(containers_of(engine, state_dir)) == 1
    await player.cells("1 + 1")
    assert_nothing_left(engine, state_dir)


def assert_nothing_left(engine: DockerClient, state_dir: Path) -> None:
    assert containers_of(engine, state_dir) == []
    assert instances_in(state_dir) == []


@contextmanager
def rlm_run(script: Path, context: Path, events: Path, settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """`rlm run`, as a process of its own."""
    command = [sys.executable, "-m", "orchestrator", "run", "What is in there?", "--context", str(context)]
    command += ["--model", f"scripted:{script}", "--events", str(events)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLM_")}
    environment |= {"RLM_STATE_DIR": str(settings.state_dir), "RLM_IMAGE": settings.image}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_cell(events: Path, *, depth: int, process: subprocess.Popen[str]) -> None:
    """Until a cell of a run of that depth has started."""
    runs: dict[str, int] = {}
    while process.poll() is None:
        time.sleep(0.05)
        for line in events.read_text().splitlines() if events.exists() else ():
            with suppress(ValueError):  # the last line may be half written
                event = json.loads(line)
                runs.setdefault(event["run_id"], event.get("depth", -1))
                if event["kind"] == CellStarted.KIND and runs[event["run_id"]] == depth:
                    return
    raise AssertionError(process.communicate()[1])
