"""Attacks on the machine by using it up, from inside a sandbox (group E), seen from the host.

Beside an attacked sandbox another one runs cells all along, and must get them right. Memory (E03 to E05) is
where ways to end are told apart. What differs between the runtimes, seen here:

* runc refuses the process or thread past the limit (EAGAIN). gVisor has threads of its own for the guest's,
  the host counts them all together, and where it refuses one, or their memory, gVisor ends: the sandbox is
  lost, and only that. So its limit is a higher one (`machine.resources`).
* gVisor takes a signal to PID 1 from inside like any other: a cell can end its worker. With runc it can't.
"""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.cells import CellOutcome
from orchestrator.config import Settings
from orchestrator.limits import (
    KILL_GRACE_S,
    MAX_TRACEBACK_BYTES,
    OUTPUT_HEAD_BYTES,
    OUTPUT_TAIL_BYTES,
)
from orchestrator.machine import resources
from orchestrator.models.scripted import Wait
from orchestrator.sandbox import session
from orchestrator.trajectory import CallSettled, SubCallStarted
from tests.security.house import (
    House,
    Inmate,
    forget_peak,
    open_files_of_host,
    open_house,
    own_open_files,
    peak_bytes,
    resident_bytes,
)

MIB = 1024 * 1024
SLACK_S = 10.0
"""For a busy machine, on top of every time that is promised."""


@pytest.fixture
async def house(settings: Settings, engine: DockerClient, runtime: str) -> AsyncIterator[House]:
    async with open_house(settings, engine, runtime) as house:
        yield house


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """From interrupt to kill, so that a dozen kills take no minute."""
    monkeypatch.setattr(session, "INTERRUPT_GRACE_S", 0.7)


@asynccontextmanager
async def beside_a_neighbour(house: House) -> AsyncIterator[Inmate]:
    """A sandbox to attack, while another tenant's works and is right every time."""
    worked = 0

    async def work(neighbour: Inmate) -> None:
        nonlocal worked
        while True:
            assert await neighbour.says("print(len(context), sum(range(10_000)))") == "11 49995000"
            worked += 1
            await asyncio.sleep(0.05)

    async with house.sandbox("their  text") as neighbour, house.sandbox() as victim:
        working = asyncio.create_task(work(neighbour))
        try:
            yield victim
            before = worked
            async with asyncio.timeout(SLACK_S):
                while worked == before and not working.done():  # noqa: ASYNC110 - a container's own time
                    await asyncio.sleep(0.02)
        finally:
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


# --- Processes, threads, files, processors ---------------------------------------------------------------

FORKS = """
import os, time
children, why = 0, None
for _ in range(5_000):
    try: child = os.fork()
    except OSError as error:
        why = error.errno
        break
    if not child: time.sleep(600); os._exit(0)
    children += 1
print(children, why)
"""
THREADS = """
import threading
threads, why, stop = 0, None, threading.Event()
for _ in range(1_000):
    try: threading.Thread(target=stop.wait, daemon=True).start()
    except RuntimeError as error:
        why = str(error)
        break
    threads += 1
print(threads, why)
"""


@pytest.mark.case("E01")
async def test_e01_a_storm_of_processes_ends_at_the_limit_and_goes_with_its_sandbox(house: House) -> None:
    limit = resources(house.settings.sandbox, house.runtime).pids
    async with beside_a_neighbour(house) as victim:
        pids = victim.host_pids()
        result = await victim.cell(FORKS)
        if result.outcome is CellOutcome.OK:
            children, why = result.output.split()
            assert int(children) < limit
            assert why == "11", "EAGAIN"
            pids = victim.host_pids()
            assert len(pids) <= limit == int(victim.cgroup("pids/pids.max", "pids.max"))
        else:
            assert (house.runtime, result.outcome) == ("runsc", CellOutcome.SANDBOX_LOST)
        # The host has processes left for everybody else.
        process = await asyncio.create_subprocess_exec("true")
        assert await process.wait() == 0
        ending_s = time.monotonic()
    assert time.monotonic() - ending_s < 5.0 + SLACK_S
    assert not {pid for pid in pids if is_alive(pid)}


@pytest.mark.case("E02")
async def test_e02_a_storm_of_threads_ends_at_the_limit(house: House) -> None:
    limit = resources(house.settings.sandbox, house.runtime).pids
    async with beside_a_neighbour(house) as victim:
        result = await victim.cell(THREADS)
        assert result.outcome is CellOutcome.OK
        threads, why = result.output.strip().split(" ", 1)
        if house.runtime == "runc":
            assert int(threads) < limit
            assert why == "can't start new thread"
        # gVisor's threads for the guest are its own affair; what the host has of them is what counts.
        assert int(victim.cgroup("pids/pids.current", "pids.current")) <= limit
        assert await victim.says("stop.set(); print('done')") == "done"


@pytest.mark.case("E06")
async def test_e06_there_is_no_swap_beyond_memory(house: House) -> None:
    async with house.sandbox() as victim:
        memory_bytes = int(victim.cgroup("memory/memory.limit_in_bytes", "memory.max"))
        assert memory_bytes == house.settings.sandbox.memory_mib * MIB
        most = int(victim.cgroup("memory/memory.memsw.limit_in_bytes", "memory.swap.max"))
        # v1 counts memory and swap together, v2 swap alone.
        assert most in {memory_bytes, 0}


SPIN = """
import os, threading, time
until = time.monotonic() + 3
def spin():
    while time.monotonic() < until: pass
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        for _ in range(7): threading.Thread(target=spin).start()
        spin()
        os._exit(0)
    children.append(child)
for child in children: os.waitpid(child, 0)
"""


@pytest.mark.case("E07")
@pytest.mark.alone
async def test_e07_64_busy_threads_get_one_sandboxs_share_of_the_processors(house: House) -> None:
    async with beside_a_neighbour(house) as victim:
        await victim.says("pass")
        started_s, before_s = time.monotonic(), cpu_s(victim)
        result = await victim.cell(SPIN)
        assert result.outcome is CellOutcome.OK
        wall_s, used_s = time.monotonic() - started_s, cpu_s(victim) - before_s
    assert used_s > 1.0, "it was busy"
    assert used_s <= house.settings.sandbox.cpus * wall_s * 1.1


FILES = """
import json, os
def open_all():
    held = []
    try:
        while True: held.append(open("/dev/null"))
    except OSError as error: return len(held), error.errno, held
count, why, held = open_all()
for file in held: file.close()
processes = []
for _ in range(8):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        mine = open_all()
        os.write(writing, b"x")
        import time
        time.sleep(600)
    os.close(writing)
    processes.append(os.read(reading, 1))
    os.close(reading)
print(count, why, len(processes))
"""


@pytest.mark.case("E12")
@pytest.mark.alone
async def test_e12_open_files_end_at_the_sandboxs_limit_and_cost_the_host_none(house: House) -> None:
    async with beside_a_neighbour(house) as victim:
        mine, of_all = own_open_files(), open_files_of_host()
        count, why, processes = map(int, (await victim.says(FILES)).split())
        assert count < house.settings.sandbox.open_files
        assert (why, processes) == (24, 8), "EMFILE"
        held = open_files_of_host() - of_all
        assert own_open_files() <= mine + 4
        # What a sandbox can make the kernel hold is bounded by files times processes; gVisor opens none.
        assert held <= (processes + 1) * house.settings.sandbox.open_files + 2_000
        assert own_open_files() > 0, "it can still open one"


DISK = """
import os
wrote = {}
for place in ("/tmp", "/dev/shm", "/var/tmp", "/context", "/run/rlm", "/", os.getcwd()):
    path = os.path.join(place, "attempt")
    try:
        with open(path, "wb") as file:
            for _ in range(64):
                file.write(bytes(128 * 1024))
                file.flush()
                os.fsync(file.fileno())
        wrote[place] = os.path.getsize(path)
        os.unlink(path)
    except OSError as error: wrote[place] = error.errno
os.sync()
import json
print(json.dumps(wrote))
"""


@pytest.mark.case("E13")
async def test_e13_there_is_no_disk_to_write_to(house: House) -> None:
    async with house.sandbox() as victim:
        wrote = json.loads(await victim.says(DISK))
        in_memory = 64 * 128 * 1024
        assert {place for place, count in wrote.items() if count == in_memory} == {"/tmp", "/dev/shm"}
        assert {wrote[place] for place in ("/", "/context", "/run/rlm", "/var/tmp")} <= {30, 13, 2}
        io = victim.cgroup("blkio/blkio.throttle.io_service_bytes_recursive", "io.stat")
        written = [line.split()[-1] for line in io.splitlines() if " Write " in line]
        written += [word[7:] for word in io.split() if word.startswith("wbytes=")]
        assert sum(map(int, written)) == 0


# --- Time ------------------------------------------------------------------------------------------------

LOOPS = {
    "while True: pass": True,
    "import itertools\nsum(itertools.repeat(1))": False,
    "import re\nre.match(r'(x+x+)+y', 'x' * 60)": True,
    "len(str(7 ** 10 ** 8))": True,
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)": True,
    "import hashlib\nhashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 9)": False,
}
"""Loops that never end, and whether the interrupt can end them: not while a call in C asks for no signals."""


@pytest.mark.case("E08")
@pytest.mark.usefixtures("short_grace")
async def test_e08_a_cell_that_never_ends_is_ended_by_the_host(house: House) -> None:
    async with house.sandbox() as victim:
        for loop, yields in LOOPS.items():
            started_s = time.monotonic()
            result = await victim.cell(f"kept = 1\n{loop}", timeout_s=1.0)
            took_s = time.monotonic() - started_s
            assert result.outcome is (CellOutcome.INTERRUPTED if yields else CellOutcome.KILLED), loop
            assert took_s < 1.0 + KILL_GRACE_S + SLACK_S, loop
            assert await victim.says("print('kept' in globals(), 6 * 7)") == f"{yields} 42"


DEAF = {
    "a signal that is ignored": (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    ),
    "a signal that is blocked": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))\nwhile True: pass"
    ),
    "every exception is swallowed": (
        "while True:\n  try:\n    x = 1\n    while True: x += 1\n  except BaseException: continue"
    ),
    "a trace function that catches": (
        "import sys\n"
        "def trace(*event):\n"
        "  while True:\n"
        "    try: x = [0 for _ in range(9**9)]\n"
        "    except BaseException: pass\n"
        "sys.settrace(trace)\n(lambda: 0)()"
    ),
    "finalisers that make their like": (
        "class Again:\n"
        "  def __del__(self):\n"
        "    try:\n"
        "      x = 0\n"
        "      while True: x += 1\n"
        "    except BaseException: Again()\n"
        "def begin(): Again()\nbegin()"
    ),
}


@pytest.mark.case("E09")
@pytest.mark.usefixtures("short_grace")
async def test_e09_a_cell_that_ignores_every_interrupt_is_killed(house: House) -> None:
    async with house.sandbox() as victim:
        for what, deaf in DEAF.items():
            started_s = time.monotonic()
            result = await victim.cell(deaf, timeout_s=0.3)
            assert result.outcome is CellOutcome.KILLED, what
            assert time.monotonic() - started_s < 0.3 + KILL_GRACE_S + SLACK_S, what
            assert await victim.says("print(6 * 7)") == "42", what
        await victim.says(
            "import atexit, signal, time\n"
            "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
            "  signal.signal(number, signal.SIG_IGN)\n"
            "atexit.register(time.sleep, 600)\n"
        )
        ending_s = time.monotonic()
    assert time.monotonic() - ending_s < 5.0 + SLACK_S, "nothing is asked of a guest at its end"


# --- Output ----------------------------------------------------------------------------------------------

FLOOD = """
import os, threading, time
piece = b"x" * (1 << 20)
for _ in range(256): os.write(1, piece)
for _ in range(256): os.write(2, piece)
def later():
    while True: os.write(1, piece)
threading.Thread(target=later, daemon=True).start()
"""


@pytest.mark.case("E10")
async def test_e10_a_flood_of_output_is_cut_and_takes_neither_memory_nor_disk_of_the_host(
    house: House,
) -> None:
    async with beside_a_neighbour(house) as victim:
        forget_peak()
        before = resident_bytes()
        flood = await victim.cell(FLOOD)
        assert flood.outcome is CellOutcome.OK
        assert flood.output_bytes >= 512 * MIB
        assert flood.cut_bytes == flood.output_bytes - OUTPUT_HEAD_BYTES - OUTPUT_TAIL_BYTES
        # The thread goes on. What it writes between two cells comes before the next one's own.
        await asyncio.sleep(0.3)
        after = await victim.cell("print('still here')")
        assert after.outcome is CellOutcome.OK
        assert len(after.output_head) + len(after.output_tail) <= OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES
        assert peak_bytes() - before < 32 * MIB
        assert victim.container["LogPath"] == ""


ODD = {
    "a line of 100 MB": ("print('a' * 10**8)", "a" * 100, 10**8 + 1),
    "bytes at random": ("import os\n_ = os.write(1, bytes(range(256)) * 4)", "\x00\x01\x02", 1_024),
    "NUL": ("print('\\x00' * 1_000)", "\x00" * 100, 1_001),
    "lone surrogates": ("print('\\ud800' * 5)", "", None),
    "escapes": ("print('\\x1b]52;c;aGk=\\x07\\x1b[2J\\x9b6n\\r' * 3)", "\x1b]52;c;", None),
    "line ends of all kinds": ("print('\\u2028\\u2029\\x85\\r\\n\\v\\f' * 3)", "\u2028\u2029", None),
}


@pytest.mark.case("E11")
async def test_e11_odd_bytes_and_giant_lines_break_nothing_and_are_text_to_the_host(house: House) -> None:
    async with house.sandbox() as victim:
        for what, (code, begins, length_bytes) in ODD.items():
            result = await victim.cell(code)
            assert result.outcome in {CellOutcome.OK, CellOutcome.ERROR}, what
            assert result.output.startswith(begins), what
            assert length_bytes is None or result.output_bytes == length_bytes, what
            assert len(result.output_head) <= OUTPUT_HEAD_BYTES, what
            result.output.encode()  # no surrogate has come through
            json.dumps(result.traceback).encode()
        assert await victim.says("print(6 * 7)") == "42"


BOMBS = {
    "a message of 100 MB": "raise ValueError('x' * 10**8)",
    "a traceback without an end": (
        "import sys\ndef deeper(): deeper()\nsys.setrecursionlimit(10**6)\ndeeper()"
    ),
    "words that never end": (
        "class Endless(Exception):\n  def __str__(self):\n    while True: pass\nraise Endless"
    ),
    "words that raise": "class Rude(Exception):\n  def __str__(self): raise self\nraise Rude",
    "words that end the process": (
        "class Last(Exception):\n  def __str__(self):\n    import os\n    os._exit(3)\nraise Last"
    ),
    "words that are none": "class Odd(Exception):\n  __str__ = 7\n  __repr__ = None\nraise Odd",
    "a group of groups": (
        "error = ValueError(1)\nfor _ in range(10_000): error = ExceptionGroup('g', [error])\nraise error"
    ),
    "a circle of causes": "a, b = ValueError(1), ValueError(2)\na.__cause__, b.__cause__ = b, a\nraise a",
    "a value whose repr never ends": "class Long:\n  def __repr__(self):\n    while True: pass\nLong()",
    "a value whose repr is 100 MB": "class Big:\n  def __repr__(self): return 'x' * 10**8\nBig()",
    "an answer that is not what it says": (
        "class Answer(str):\n"
        "  def encode(self, *_): raise SystemExit\n"
        "  def __str__(self): raise KeyboardInterrupt\n"
        "FINAL(Answer('hi'))"
    ),
}


@pytest.mark.case("E15")
async def test_e15_an_exception_is_cut_and_the_host_asks_no_object_of_the_guests_for_its_words(
    house: House,
) -> None:
    async with house.sandbox() as victim:
        forget_peak()
        before = resident_bytes()
        for what, bomb in BOMBS.items():
            result = await victim.cell(bomb, timeout_s=1.0)
            assert result.outcome is not CellOutcome.SANDBOX_LOST, what
            assert len(result.traceback.encode()) <= MAX_TRACEBACK_BYTES, what
            assert len(result.output.encode()) < OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES + 100, what
            assert await victim.says("print(6 * 7)") == "42", what
        assert peak_bytes() - before < 32 * MIB


# --- A cell against its own tools ------------------------------------------------------------------------

SABOTAGE = {
    "other tools": "llm_query = rlm_query = FINAL = SHOW_VARS = print = lambda *_: None",
    "other built-ins": "import builtins\nfor name in dir(builtins):\n  setattr(builtins, name, None)",
    "no built-ins": "import builtins\nbuiltins.__dict__.clear()",
    "no modules": "import sys\nsys.modules.clear()",
    "no namespace": "globals().clear()",
    "no files": "import os\nos.closerange(0, 1_024)",
    "no output": "import os\nos.close(1); os.close(2)",
    "noise to every file": (
        "import os\n"
        "for number in range(3, 64):\n"
        "  try: os.write(number, os.urandom(4_096))\n"
        "  except OSError: pass"
    ),
    "frames of its own": (
        "import json, os, struct\n"
        "head = json.dumps({'kind': 'ended', 'cell_id': 1, 'id': 1, 'outcome': 'ok'}).encode()\n"
        "for number in range(3, 64):\n"
        "  try: os.write(number, struct.pack('>II', len(head), 0) + head)\n"
        "  except OSError: pass"
    ),
    "a quiet end": "import os\nos._exit(0)",
    "everybody's end": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "objects of the library": (
        "import gc\n"
        "for thing in gc.get_objects():\n"
        "  try: thing.__dict__.clear()\n"
        "  except BaseException: pass"
    ),
    "another program": (
        "import os, sys\nos.execv(sys.executable, ['python3', '-c', 'import time; time.sleep(600)'])"
    ),
}


@pytest.mark.case("E16")
@pytest.mark.usefixtures("short_grace")
async def test_e16_a_cell_that_breaks_its_own_tools_ends_in_a_clear_state(house: House) -> None:
    async with house.sandbox() as victim:
        for what, sabotage in SABOTAGE.items():
            ended = [(await victim.cell(sabotage, timeout_s=1.0)).outcome]
            # It may have broken what later cells need, in its own namespace. What a new one needs is whole.
            for _ in range(3):
                after = await victim.cell("assert 6 * 7 == 42", timeout_s=1.0)
                ended.append(after.outcome)
                if after.outcome is CellOutcome.OK:
                    break
                await victim.cell("import os\nos._exit(0)", timeout_s=1.0)
            if CellOutcome.SANDBOX_LOST in ended:
                # gVisor of 2022 may never finish killing a process that has just become another program.
                assert (house.runtime, what) == ("runsc", "another program"), ended
                break
            assert ended[-1] is CellOutcome.OK, (what, ended)


@pytest.mark.case("E16")
async def test_e16_a_cell_can_at_most_end_its_own_sandbox_by_a_signal_to_its_worker(house: House) -> None:
    attempts = """
import os, signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL):
    try: os.kill(1, number)
    except OSError as error: print(error)
import time
time.sleep(0.5)
print("still here")
"""
    async with beside_a_neighbour(house) as victim:
        result = await victim.cell(attempts, timeout_s=5.0)
        if house.runtime == "runc":
            assert result.outcome is CellOutcome.OK
            assert result.output.endswith("still here\n")
        else:
            assert result.outcome in {CellOutcome.OK, CellOutcome.SANDBOX_LOST}


OUTLIVE = """
import os, threading, time
log = []
def daemon():
    if os.fork(): return
    os.setsid()
    if os.fork(): os._exit(0)
    while True:
        try: open("/tmp/alive", "w").write(str(time.time()))
        except OSError: pass
        time.sleep(0.05)
daemon()
def ask_on():
    while True:
        try: log.append(llm_query("Is anybody there?"))
        except Exception as error: log.append(type(error).__name__)
        time.sleep(0.05)
threading.Thread(target=ask_on, daemon=True).start()
time.sleep(0.3)
print("begun")
"""


@pytest.mark.case("E14")
async def test_e14_what_outlives_its_cell_is_refused_until_the_next_and_recorded_like_any_other(
    house: House,
) -> None:
    story = await house.cells(
        OUTLIVE,
        Wait(1.0),
        "import time\n"
        "print(log.count('NotExecuting') > 3, open('/tmp/alive').read() != '')\n"
        "before = log.count('Is anybody there?')\n"
        "time.sleep(0.3)\n"
        "print(log.count('Is anybody there?') > before)",
    )
    assert story.told[0] == "begun"
    assert story.told[1] == "True True\nTrue"
    asked = [request for request in story.requests if not request.system]
    done = [event for event in story.events if isinstance(event.payload, SubCallStarted)]
    assert len(asked) == len(done) > 0, "none but those of a cell, and each of them recorded"


@pytest.mark.case("E14")
async def test_e14_daemons_die_with_their_sandbox(house: House) -> None:
    async with house.sandbox() as victim:
        before = victim.host_pids()
        await victim.says(OUTLIVE.replace("llm_query", "len"))
        pids = victim.host_pids()
        # gVisor's guest processes are threads of its own, or processes that only trace.
        assert house.runtime == "runsc" or len(pids) > len(before)
    assert not {pid for pid in pids if is_alive(pid)}


FORKED_CALLS = """
import os, sys, time
child = os.fork()
if not child:
    try: print("the child got", llm_query("from the child"))
    except BaseException as error: print("the child was told", type(error).__name__)
    sys.stdout.flush()
    time.sleep(0.2)
    os._exit(0)
print("the parent got", llm_query("from the parent"))
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.case("E17")
async def test_e17_a_forked_copy_of_the_interpreter_neither_hangs_its_parent_nor_spends_unseen(
    house: House,
) -> None:
    story = await house.cells(FORKED_CALLS, "print(llm_query('afterwards'))")
    first, second = story.told
    assert "the parent got from the parent" in first
    assert "the child was told" in first
    assert second == "afterwards"
    settled = [event.payload for event in story.events if isinstance(event.payload, CallSettled)]
    assert sum(call.usage.total for call in settled) == story.billed_tokens


# --- On the host -----------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def cpu_s(inmate: Inmate) -> float:
    """Processor time of the whole sandbox so far, as the kernel counts it."""
    used = inmate.cgroup("cpuacct/cpuacct.usage", "cpu.stat").split()
    seconds = int(used[0]) / 1e9 if len(used) == 1 else int(used[used.index("usage_usec") + 1]) / 1e6
    assert math.isfinite(seconds)
    return seconds
