"""Two sandboxes at once: what one does, and what the other and the host notice of it."""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.cells import CellOutcome
from orchestrator.config import Settings
from orchestrator.probes.host import read_namespaces, read_process
from tests.security.house import Inmate, open_house


@pytest.fixture
async def pair(
    runtime: str, settings: Settings, engine: DockerClient
) -> AsyncIterator[tuple[Inmate, Inmate]]:
    """Two sandboxes, alive at the same time."""
    async with (
        open_house(settings, engine, runtime) as house,
        house.sandbox() as first,
        house.sandbox() as second,
    ):
        yield first, second


NAMESPACES = """
import json, os
print(json.dumps({name: os.readlink(f"/proc/self/ns/{name}")
                  for name in ("cgroup", "ipc", "mnt", "net", "pid", "uts")}))
"""


@pytest.mark.case("A04", "A05")
async def test_uids_and_namespaces_are_shared_with_nobody(runtime: str, pair: tuple[Inmate, Inmate]) -> None:
    """Told by the kernel of the host, not by the guests."""
    first, second = (read_process(each.pid) for each in pair)
    inside = [json.loads(await each.says(NAMESPACES)) for each in pair if runtime == "runc"]
    assert first is not None
    assert second is not None
    host = read_namespaces("self")
    if runtime == "runc":
        uids = {process.status["Uid"] for process in (first, second)}
        assert len(uids) == 2
        assert all(set(uid.split()) & {"0", str(os.geteuid())} == set() for uid in uids)
        assert inside == [
            {name: process.namespaces[name] for name in inside[0]} for process in (first, second)
        ]
    for name in ("ipc", "mnt", "net", *(("cgroup", "pid", "uts") if runtime == "runc" else ())):
        assert len({host[name], first.namespaces[name], second.namespaces[name]}) == 3, name


QUOTA = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
held = []
while len(held) < 1_000 and (descriptor := libc.inotify_init1(0)) >= 0:
    held.append(descriptor)
pipes = []
try:
    while len(pipes) < 450:
        pipes.append(os.pipe())
except OSError:
    pass
print(len(held), len(pipes))
"""


@pytest.mark.case("C09")
async def test_what_one_sandbox_takes_of_the_kernels_quotas_another_still_has(
    pair: tuple[Inmate, Inmate],
) -> None:
    greedy, honest = pair
    taken = await greedy.says(QUOTA)
    assert await honest.says(QUOTA) == taken


LEAVE = """
import ctypes, multiprocessing.shared_memory as sm, os
open("/dev/shm/canary", "w").write("mine")
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0x524C4D, 4096, 0o1666), libc.semget(0x524C4D, 1, 0o1666), libc.msgget(0x524C4D, 0o1666))
"""
LOOK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(os.path.exists("/dev/shm/canary"), libc.shmget(0x524C4D, 0, 0), libc.semget(0x524C4D, 0, 0),
      libc.msgget(0x524C4D, 0))
"""


@pytest.mark.case("C07")
async def test_shared_memory_semaphores_and_queues_end_at_the_sandbox(
    runtime: str, pair: tuple[Inmate, Inmate]
) -> None:
    mine, yours = pair
    made = await mine.says(LEAVE)
    # In gVisor there are such things, of gVisor's own: there the probe sees them in the first sandbox.
    assert made == "-1 -1 -1" if runtime == "runc" else "-1" not in made.split()
    assert await mine.says(LOOK) == f"True {made}"
    assert await yours.says(LOOK) == "False -1 -1 -1"


LISTEN = """
import socket
line = socket.socket(socket.AF_UNIX)
line.bind("\\0" + {name!r})
line.listen()
print("listening")
"""
CONNECT = """
import socket
try:
    socket.socket(socket.AF_UNIX).connect("\\0" + {name!r})
    print("connected")
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.case("C06")
async def test_an_abstract_socket_of_one_sandbox_is_not_there_for_another(
    pair: tuple[Inmate, Inmate],
) -> None:
    name = secrets.token_hex(8)
    mine, yours = pair
    await mine.says(LISTEN.format(name=name))
    assert await mine.says(CONNECT.format(name=name)) == "connected"
    assert await yours.says(CONNECT.format(name=name)) == "Connection refused"


SIGNALS = """
import errno, os, signal
def send(pid, number):
    try:
        os.kill(pid, number)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "sent"
# A thread answers to its number too.
own = {{int(task) for pid in filter(str.isdigit, os.listdir("/proc"))
       for task in os.listdir(f"/proc/{{pid}}/task")}}
print("everybody", send(-1, signal.SIGWINCH))
print("the canary", send({canary}, signal.SIGKILL))
print("strangers", sorted({{send(pid, signal.SIGKILL) for pid in range(2, 5_000) if pid not in own}}))
print("the worker", send(1, signal.SIGKILL))
"""


@pytest.mark.case("C14", "C03")
async def test_signals_reach_nobody_outside(runtime: str, pair: tuple[Inmate, Inmate]) -> None:
    hostile, neighbour = pair
    with canary_process() as (canary, _):
        said = await hostile.cell(SIGNALS.format(canary=canary.pid))
        assert canary.poll() is None
    assert await neighbour.says("print(6 * 7)") == "42"
    if runtime == "runc":
        # Its first process takes no signal from inside, so the sandbox is alive too.
        assert said.output.splitlines()[1:3] == ["the canary ESRCH", "strangers ['ESRCH']"]
        assert await hostile.says("print('alive')") == "alive"
    else:
        assert said.outcome in {CellOutcome.OK, CellOutcome.SANDBOX_LOST}


SEARCH = """
import os
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("cmdline", "environ", "comm"):
        try:
            with open(f"/proc/{{pid}}/{{name}}", "rb") as file:
                if {backwards!r}[::-1].encode() in file.read():
                    found.append(f"{{pid}} {{name}}")
        except OSError:
            pass
print(found)
"""


@pytest.mark.case("C03")
async def test_no_process_of_the_host_is_in_sight(
    runtime: str, settings: Settings, engine: DockerClient
) -> None:
    async with open_house(settings, engine, runtime) as house, house.sandbox() as sandbox:
        with canary_process() as (_, canary):
            assert await sandbox.says(SEARCH.format(backwards=canary[::-1])) == "[]"


OVERWRITE = """
import os, subprocess, sys
answers = []
for path in ("/proc/1/exe", "/proc/self/exe", "/proc/1/root/proc/1/exe", sys.executable):
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_PATH):
        try:
            descriptor = os.open(path, flags)
            if flags == os.O_PATH:
                descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            os.write(descriptor, b"#!/bin/sh\\n")
            answers.append(path)
        except OSError:
            pass
with open("/tmp/script", "w") as file:
    file.write("#!/proc/self/exe\\n")
os.chmod("/tmp/script", 0o700)
print(answers, subprocess.run(["sh", "-c", "/tmp/script; true"], capture_output=True).returncode)
"""


@pytest.mark.case("C05")
async def test_the_runtimes_program_is_the_same_afterwards(
    runtime: str, settings: Settings, engine: DockerClient
) -> None:
    before = hash_of_runtime(engine, runtime)
    async with open_house(settings, engine, runtime) as house, house.sandbox() as sandbox:
        assert await sandbox.says(OVERWRITE) == "[] 0"
    assert hash_of_runtime(engine, runtime) == before


def hash_of_runtime(engine: DockerClient, runtime: str) -> str:
    path = shutil.which(engine.info()["Runtimes"][runtime]["path"])
    assert path is not None, "the engine is on this machine"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def canary_process() -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A process of the host that has a canary among its arguments."""
    canary = secrets.token_hex(16)
    sleeps = "import sys, time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-I", "-c", sleeps, canary], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert canary in Path(f"/proc/{process.pid}/cmdline").read_text()
        yield process, canary
    finally:
        process.kill()
        process.communicate()


BIND = """
import os, socket
made = []
for path in ("/tmp/canary.sock", "/dev/shm/canary.sock", "/run/rlm/canary.sock", "/context/canary.sock"):
    try:
        line = socket.socket(socket.AF_UNIX)
        line.bind(path)
        line.listen()
        made.append(path)
    except OSError:
        pass
print(made)
"""


@pytest.mark.case("G21", "G19")
async def test_a_socket_that_a_guest_makes_is_not_on_the_host(
    runtime: str, settings: Settings, engine: DockerClient
) -> None:
    async with open_house(settings, engine, runtime) as house, house.sandbox() as sandbox:
        before = sockets_below(settings.state_dir)
        assert await sandbox.says(BIND) == "['/tmp/canary.sock', '/dev/shm/canary.sock']"
        assert sockets_below(settings.state_dir) == before
        assert len(before) == 1, "the search finds the broker's"
        if runtime == "runsc":
            # Under runc it is one of the host's kernel, in a network namespace of its own.
            assert "canary.sock" not in unix_sockets_of(sandbox.pid)


def sockets_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_socket())


def unix_sockets_of(pid: int) -> str:
    """As the host's kernel lists them for a process's network namespace."""
    return Path(f"/proc/{pid}/net/unix").read_text()
